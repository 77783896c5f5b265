"""Double pages: which are split or turned, at which column, and what stays whole."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from client import Client
from drawn import colour, grey
from helpers import require
from serving import until, volume

import infer
import server
import settings
import storage
from commands import verify
from engine import pages, spreads
from engine.pages import Pixels
from files import inputs
from messages import DIED_TWICE, ComputePage, Limits, Params, SourcePage
from work import rebuild

LEFT, RIGHT = grey(120, 80), grey(120, 80)[::-1]
MARGIN = np.full((120, 4), 250, np.uint8)  # of paper, at each page's edges


def page(drawing: Pixels) -> Pixels:
    return np.hstack([MARGIN, drawing, MARGIN])


SPREAD = np.hstack([page(LEFT), page(RIGHT)])  # 176x120, its fold at 88


def coded(pixels: Pixels, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, pixels)[1].tobytes()


def staged(tmp_path: Path, files: dict[str, bytes], **params: Any) -> tuple[list[SourcePage], Path]:
    """The pages of a zip of these files, staged and divided."""
    source, staging = tmp_path / "v.zip", tmp_path / "staging"
    source.write_bytes(volume(files))
    found = spreads.divided(
        inputs.stage_input(source, staging, Limits()), staging, Params(**params), Limits()
    )
    return [item for item in found if isinstance(item, SourcePage)], staging


def shown(item: SourcePage, staging: Path) -> Pixels:
    pixels = pages.decode((staging / item.staged).read_bytes(), 1, Limits())
    return spreads.taken(pixels, storage.mark_of(item.staged))


COVER = coded(page(LEFT))


# ---------------------------------------------------------------- the gutter
@pytest.mark.parametrize("off", [-3, -1, 0, 2, 3])
@pytest.mark.parametrize("paper", [255, 250, 8])
def test_the_gutter_is_found_where_the_pages_meet(off, paper):
    wide = np.full((400, 600 + abs(off) * 2), paper, np.uint8)
    wide[:, : 290 + max(off, 0) * 2] = cv2.resize(LEFT, (290 + max(off, 0) * 2, 400))
    wide[:, -290 - max(-off, 0) * 2 :] = cv2.resize(RIGHT, (290 + max(-off, 0) * 2, 400))
    at = spreads.gutter(wide)
    assert at is not None and (wide[:, at] == paper).all()


def test_a_drawing_that_crosses_the_fold_has_no_gutter():
    assert spreads.gutter(grey(400, 600)) is None
    crossed = SPREAD.copy()
    crossed[50:70, 70:110] = np.arange(40) * 5  # one object on both pages
    assert spreads.gutter(crossed) is None


def test_noise_and_colour_of_the_paper_hide_no_gutter():
    noise = np.random.RandomState(1).normal(0, 5, (*SPREAD.shape, 3))
    scan = np.clip(SPREAD[..., None] * (0.9, 0.95, 1.0) + noise, 0, 255).astype(np.uint8)
    assert spreads.gutter(scan) is not None


# ---------------------------------------------------------------- split
def test_a_spread_becomes_its_halves_right_to_left(tmp_path):
    files = {"001.png": COVER, "002.png": coded(SPREAD), "003.png": coded(page(RIGHT))}
    found, staging = staged(tmp_path, files, spreads="split")
    assert [item.name for item in found] == ["001.png", "002-1.png", "002-2.png", "003.png"]
    assert np.array_equal(shown(found[1], staging), page(RIGHT))
    assert np.array_equal(shown(found[2], staging), page(LEFT))
    assert found[1].sha256 == found[2].sha256 == storage.sha256_file(staging / "00002.png")
    assert inputs.staged_pages_intact(staging, found)


def test_left_to_right_the_left_half_comes_first(tmp_path):
    files = {"001.png": COVER, "002.jpg": coded(SPREAD, ".jpg")}
    found, staging = staged(tmp_path, files, spreads="split", reading_direction="ltr")
    halves = [shown(item, staging).astype(int) for item in found[1:]]
    assert abs(halves[0] - page(LEFT)).mean() < 12 and abs(halves[1] - page(RIGHT)).mean() < 12


def test_a_split_in_colour_loses_no_pixel(tmp_path):
    drawing = np.hstack([colour(120, 84), np.full((120, 8, 3), 255, np.uint8), colour(120, 84)])
    found, staging = staged(tmp_path, {"1.png": COVER, "2.png": coded(drawing)}, spreads="split")
    assert np.array_equal(np.hstack([shown(found[2], staging), shown(found[1], staging)]), drawing)


WHOLE = {
    "a cover": {"001.png": coded(SPREAD)},
    "a portrait page": {"001.png": COVER, "002.png": coded(page(LEFT))},
    "a drawing over both pages": {"001.png": COVER, "002.png": coded(grey(120, 176))},
    "a fold-out of four": {"001.png": COVER, "002.png": coded(np.hstack([SPREAD, SPREAD]))},
    "a long strip": {"001.png": COVER, "002.png": coded(np.rot90(np.hstack([SPREAD] * 4)))},
    "an almost square one": {"001.png": COVER, "002.png": coded(SPREAD[:, 20:-20])},
    "no image": {"001.png": COVER, "002.png": b"nothing"},
}


@pytest.mark.parametrize("what", WHOLE)
def test_what_is_not_clearly_two_pages_stays_whole(what, tmp_path):
    found, _ = staged(tmp_path, WHOLE[what], spreads="split")
    assert [item.name for item in found] == list(WHOLE[what])
    assert [storage.mark_of(item.staged) for item in found] == [None] * len(found)


def test_by_default_everything_stays(tmp_path):
    found, _ = staged(tmp_path, {"001.png": COVER, "002.png": coded(SPREAD)})
    assert [item.name for item in found] == ["001.png", "002.png"]


def test_a_spread_that_exif_turns_is_split_upright(tmp_path):
    require(importlib.util.find_spec("PIL"), "Pillow is not installed")
    from PIL import Image

    lying, data = Image.fromarray(np.rot90(SPREAD, 1)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(data, "PNG", exif=exif)
    found, staging = staged(tmp_path, {"1.png": COVER, "2.png": data.getvalue()}, spreads="split")
    assert np.array_equal(shown(found[1], staging), page(RIGHT))


# ---------------------------------------------------------------- rotate
@pytest.mark.parametrize(("direction", "first"), [("rtl", RIGHT), ("ltr", LEFT)])
def test_a_turned_spread_has_on_top_what_is_read_first(direction, first, tmp_path):
    files = {"001.png": COVER, "002.png": coded(SPREAD), "003.png": coded(grey(120, 176))}
    found, staging = staged(tmp_path, files, spreads="rotate", reading_direction=direction)
    assert [item.name for item in found] == list(files)
    top = shown(found[1], staging)[:88]
    assert np.array_equal(np.rot90(top, -1 if direction == "rtl" else 1), page(first))
    assert shown(found[2], staging).shape == (176, 120)


# ---------------------------------------------------------------- through the service
def test_halves_are_pages_of_their_own_to_the_end(tmp_path):
    files = {"001.png": COVER, "002.png": coded(SPREAD)}
    with server.Service(settings.Config(storage_root=tmp_path, port=0, precision="fp32")) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume(files))
        body = {"title": "t", "volume": "1", "input": {"type": "zip", "path": "v.zip"}}
        body["params"] = {"model": "realesr-animevideov3", "outputFormat": "png", "spreads": "split"}
        body["manifest"] = {"files": list(files)}
        job = client.call("POST", "/jobs", body).json()["jobId"]
        state = until(lambda: (s := client.call("GET", f"/jobs/{job}").json())["finishedAt"] and s, 60)
        assert (state["status"], state["total"], state["message"]) == ("SUCCESS", 3, None)
        report = client.call("GET", f"/jobs/{job}/report").json()["report"]
        with zipfile.ZipFile(io.BytesIO(client.call("GET", f"/jobs/{job}/artifact").body)) as artifact:
            half = cv2.imdecode(np.frombuffer(artifact.read("002-1.png"), np.uint8), cv2.IMREAD_UNCHANGED)
        whole = client.call("GET", f"/jobs/{job}/pages/2/before").body
        before = client.call("GET", f"/jobs/{job}/pages/2/before?w=64").body
    assert [item["filename"] for item in report["items"]] == ["001.png", "002-1.png", "002-2.png"]
    rebuilt = rebuild.job_of(report, "0" * 64, 1, 0.0)[1]  # as of a lost job table
    assert [storage.whole_name(one.name, one.staged) for one in rebuilt] == ["001.png", "002.png", "002.png"]
    assert report["items"][1]["deviation"] == "the right half of a double page"
    assert half.shape == (240, 176)
    smaller = cv2.resize(half, (88, 120), interpolation=cv2.INTER_AREA).astype(int)
    assert abs(smaller - page(RIGHT)).mean() < 25 < abs(smaller - page(LEFT)).mean()
    assert whole == files["002.png"]
    assert cv2.imdecode(np.frombuffer(before, np.uint8), cv2.IMREAD_UNCHANGED).shape == (87, 64)


@pytest.mark.parametrize("why", ["why", DIED_TWICE])
def test_a_half_that_fails_stays_that_half(tmp_path, why):
    """And not the whole scan, which would then stand there twice."""
    found, staging = staged(tmp_path, {"1.png": COVER, "2.png": coded(SPREAD)}, spreads="split")
    for item, side in zip(found[1:], (RIGHT, LEFT), strict=True):
        places = (staging / item.staged, tmp_path / "out")
        task = ComputePage("j", 1, 2, *places, Params(), None, Limits(), why)
        written: list[Any] = []
        worker: Any = SimpleNamespace(_finish=lambda *given, to=written, **facts: to.append((given, facts)))
        infer.Worker._carry(worker, task)
        ((_, data, suffix), facts) = written[0]
        assert (suffix, facts["carried"], facts["error"]) == (".png", True, why)
        assert facts["deviation"] == storage.HALVES[storage.mark_of(item.staged)]
        kept = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(kept, page(side)) and (facts["height"], facts["width"]) == kept.shape


def test_what_was_a_half_is_proved_against_its_scan(tmp_path):
    files = {"1.png": COVER, "2.png": coded(SPREAD)}
    found, _ = staged(tmp_path, files, spreads="split")
    items = [
        {"filename": item.name, "source": {"filename": item.name, "sha256": item.sha256}}
        | {"deviation": storage.part_of(item.staged)}
        for item in found
    ]
    assert verify.sources_of({"items": items}).expected == [
        (name, hashlib.sha256(data).hexdigest()) for name, data in files.items()
    ]
