"""Device profiles and file-size budgets: what a job is told, what a page becomes, what the report says."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import cv2
import numpy as np
import pytest
from client import Client
from drawn import colour, grey
from serving import until, volume

import jobs
import server
import settings
import storage
from engine import budgets, devices, pages
from engine.pages import Pixels
from messages import Limits, Params
from work import submissions

MODELS = {
    "realesr_animevideov3": "realesr-animevideov3",
    "realesrgan_x4plus_anime_6b": "RealESRGAN_x4plus_anime_6B",
}


def parsed(**given: Any) -> Params:
    errors: list[tuple[str, str]] = []
    params = submissions.parse_params(given, MODELS, errors)
    assert errors == []
    return params


# ---------------------------------------------------------------- profiles
def test_a_profile_sets_pixels_and_colour_and_a_request_overrides_them():
    params = parsed(profile="kobo-libra")
    assert (params.target_width, params.target_height, params.color) == (1264, 1680, "gray")
    assert params.reduces_in_light and params.profile == "kobo-libra"
    params = parsed(profile="kobo-libra", targetWidth=632, color="keep")
    assert (params.target_width, params.target_height, params.color) == (632, 1680, "keep")
    assert parsed(profile="kobo-libra-colour").color == "auto"
    assert parsed(profile=None) == parsed() == Params()


def test_an_unknown_profile_is_refused_with_all_that_there_are():
    for wrong in ("kindle", 7, ["kobo-libra"]):
        errors: list[tuple[str, str]] = []
        submissions.parse_params({"profile": wrong}, MODELS, errors)
        assert [field for field, _ in errors] == ["params.profile"]
        assert all(name in errors[0][1] for name in devices.DEVICES)


def test_every_screen_is_upright_and_has_black_and_white():
    for name, device in devices.DEVICES.items():
        assert name == name.lower() and 600 <= device.width < device.height <= 3000
        assert device.greys == 16


@pytest.mark.parametrize("greys", [4, 16])
def test_levels_are_the_screens_own_and_keep_each_tone(greys):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 8)).reshape(64, -1)
    page = np.sort(ramp, axis=1)  # 64 rows, each tone eight columns wide
    got = pages.to_levels(page, greys)
    assert set(np.unique(got)) == set(np.rint(np.arange(greys) * 255 / (greys - 1)).astype(int))
    tones = got.reshape(64, 256, 8).astype(float).mean(axis=(0, 2))
    assert np.abs(tones - np.arange(256)).max() <= 1.5
    assert (got[page == 0] == 0).all() and (got[page == 255] == 255).all()


# ---------------------------------------------------------------- budgets, one page
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


# ---------------------------------------------------------------- budgets, an artifact
def test_shares_fill_an_artifact_and_no_more():
    sources = [(100_000 * n, 20) for n in (1, 5, 2)]
    given = budgets.shares(1_000_000, sources)
    overhead = budgets.OVERHEAD_BYTES + 3 * (budgets.PAGE_OVERHEAD_BYTES + 80)
    assert 0 <= 1_000_000 - overhead - sum(given) < 3
    assert given[1] > given[2] > given[0] > 0.15 * sum(given)
    assert budgets.shares(1000, sources) == [0, 0, 0] and budgets.shares(1000, []) == []


# ---------------------------------------------------------------- through the service
def coded(page: Pixels, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, page)[1].tobytes()


def test_a_job_for_a_device_within_its_bytes(tmp_path):
    noisy = np.random.RandomState(1).randint(0, 256, (90, 60), np.uint8)
    volumes = {
        "small": {"1.png": coded(colour(45, 30))},
        "large": {"1.png": coded(np.kron(grey(500, 400), np.ones((2, 2), np.uint8)))},
        "noisy": {f"{n}.png": coded(np.roll(noisy, n)) for n in range(6)},
    }
    wanted = {
        "small": {"profile": "kobo-touch", "outputFormat": "png"},
        "large": {"profile": "kobo-touch", "outputFormat": "png"},
        "noisy": {"maxArtifactBytes": 1 << 16, "scale": 2},
    }
    found, reports = {}, {}
    with server.Service(settings.Config(storage_root=tmp_path, port=0, precision="fp32")) as service:
        client = Client(service.url)
        for name, files in volumes.items():
            client.call("PUT", f"/incoming/{name}.zip", volume(files))
            body: dict[str, Any] = {
                "title": "t",
                "volume": name,
                "input": {"type": "zip", "path": f"{name}.zip"},
            }
            body["params"] = {"model": "realesr-animevideov3"} | wanted[name]
            job = client.call("POST", "/jobs", body).json()["jobId"]
            url = f"/jobs/{job}"
            state = until(lambda url=url: (s := client.call("GET", url).json())["finishedAt"] and s, 60)
            assert (state["status"], state["message"]) == ("SUCCESS", None), state
            reports[name] = client.call("GET", f"{url}/report").json()["report"]
            found[name] = client.call("GET", f"{url}/artifact").body
    for name, pixels in (("small", (800, 533)), ("large", (750, 600))):
        item = reports[name]["items"][0]
        assert (item["height"], item["width"]) == pixels and item["status"] == "upscaled"
        with zipfile.ZipFile(io.BytesIO(found[name])) as artifact:
            page = pages.decode(artifact.read("1.png"), 1, Limits())
        assert page.shape == pixels and set(np.unique(page)) <= set(range(0, 256, 17))
    assert reports["large"]["items"][0]["deviation"] == "reduced from 800x1000, by no network"
    assert reports["large"]["items"][0]["model"] is None
    assert len(found["noisy"]) <= 1 << 16
    assert len(reports["noisy"]["items"]) == 6
    assert all("for its size written as" in item["deviation"] for item in reports["noisy"]["items"])


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
