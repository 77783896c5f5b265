"""budgets.py: a page and an artifact within so many bytes, and what is said of one that is larger."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from drawn import grey
from serving import volume

import jobs
import storage
from engine import budgets, pages
from engine.pages import Pixels
from messages import Limits, Params
from work import submissions

# ---------------------------------------------------------------- one page
PAGE = cv2.GaussianBlur(np.kron(grey(120, 90), np.ones((3, 3), np.uint8)), (0, 0), 1)


def fitted(most_bytes: int | None, page: Pixels = PAGE, **params: Any) -> budgets.Encoded:
    wanted = Params(**params)
    return budgets.fitted(lambda given: pages.encode(page, given), wanted, most_bytes)


def size(page: Pixels = PAGE, **params: Any) -> int:
    return len(pages.encode(page, Params(**params))[0])


def test_a_page_within_its_bytes_is_as_it_would_be_without_them():
    assert fitted(size()) == fitted(None) == pages.encode(PAGE, Params())


def test_quality_goes_down_first_and_no_further_than_it_must():
    most = size(jpeg_quality=70)
    data, suffix, why = fitted(most)
    assert (suffix, why) == (".jpg", "for its size written as jpg, quality 70")
    assert len(data) == most < size(jpeg_quality=71)


def test_then_the_format_changes():
    most = size(jpeg_quality=budgets.LEAST_QUALITY) - 1
    data, suffix, why = fitted(most)
    assert (
        suffix == ".webp" and len(data) <= most and why.startswith("for its size written as webp, quality ")
    )
    quality = int(why.rpartition(" ")[2])
    assert size(output_format="webp", jpeg_quality=min(100, quality + 1)) > most
    assert abs(pages.decode(data, 1, Limits()).astype(int) - PAGE).mean() < 12


def test_the_least_quality_is_not_tried_again():
    least, tried = budgets.LEAST_QUALITY, []

    def encode(given: Params) -> budgets.Encoded:
        tried.append((given.output_format, given.jpeg_quality))
        return pages.encode(PAGE, given)

    most = size(jpeg_quality=least) - 1
    assert budgets.fitted(encode, Params(jpeg_quality=least), most) == fitted(most)
    assert [quality for form, quality in tried if form == "jpg"] == [least]
    assert len({*tried}) == len(tried)


def test_png_becomes_a_lossless_webp_before_it_loses_anything():
    flat = np.kron(grey(60, 45), np.ones((4, 4), np.uint8))
    most = size(flat, output_format="png") - 1
    data, suffix, why = fitted(most, flat, output_format="png")
    assert (suffix, why) == (".webp", "for its size written as webp, quality 100")
    assert np.array_equal(pages.decode(data, 1, Limits()), flat)


def test_what_can_not_be_that_small_is_the_smallest_there_is_and_says_so():
    data, _, why = fitted(10)
    assert why.endswith(f": {len(data)} bytes, nothing tried was smaller")
    assert len(data) <= size(output_format="webp", jpeg_quality=budgets.LEAST_QUALITY)
    assert len(data) <= size(output_format="avif", jpeg_quality=budgets.LEAST_QUALITY)


def test_a_page_too_long_for_webp_is_not_made_a_larger_png():
    long = np.tile(PAGE[:, :40], (50, 1))  # 18,000 pixels high
    most = size(long, jpeg_quality=50)
    data, suffix, _ = fitted(most, long)
    assert suffix == ".jpg" and len(data) <= most


# ---------------------------------------------------------------- an artifact
def test_shares_fill_an_artifact_and_no_more():
    sources = [(100_000 * n, 20) for n in (1, 5, 2)]
    given = budgets.shares(1_000_000, sources)
    overhead = budgets.OVERHEAD_BYTES + 3 * (budgets.PAGE_OVERHEAD_BYTES + 80)
    assert 0 <= 1_000_000 - overhead - sum(given) < 3
    assert given[1] > given[2] > given[0] > 0.15 * sum(given)
    assert budgets.shares(1000, sources) == [0, 0, 0] and budgets.shares(1000, []) == []


def test_an_artifact_that_could_not_be_that_small_is_told_of(tmp_path):
    layout = storage.Layout(tmp_path, tmp_path)
    layout.create()
    table = jobs.JobTable(layout.database)
    (layout.incoming / "one.zip").write_bytes(volume({"1.png": b"x"}))
    params = Params(max_artifact_bytes=70_000)
    wanted = submissions.Submission("t", "1", "zip", "one.zip", params, None)
    job = submissions.submit(table, layout, wanted, None, "", Limits())
    assert submissions.closing_message(job, [], 70_000) is None
    assert (
        submissions.closing_message(job, [], 70_001)
        == "the artifact has 70001 bytes, over the 70000 of maxArtifactBytes"
    )
    table.close()
