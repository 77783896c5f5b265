"""Device profiles: what a job is told, what a page becomes, what the report says; within its bytes, too."""

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

import server
import settings
from engine import pages, screens
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
        assert all(name in errors[0][1] for name in screens.SCREENS)


def test_every_screen_is_upright_and_has_black_and_white():
    for name, screen in screens.SCREENS.items():
        assert name == name.lower() and 600 <= screen.width < screen.height <= 3000
        assert screen.greys == 16


@pytest.mark.parametrize("greys", [4, 16])
def test_levels_are_the_screens_own_and_keep_each_tone(greys):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 8)).reshape(64, -1)
    page = np.sort(ramp, axis=1)  # 64 rows, each tone eight columns wide
    got = pages.to_levels(page, greys)
    assert set(np.unique(got)) == set(np.rint(np.arange(greys) * 255 / (greys - 1)).astype(int))
    tones = got.reshape(64, 256, 8).astype(float).mean(axis=(0, 2))
    assert np.abs(tones - np.arange(256)).max() <= 1.5
    assert (got[page == 0] == 0).all() and (got[page == 255] == 255).all()


# ---------------------------------------------------------------- through the service
def coded(page: Pixels, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, page)[1].tobytes()


def test_a_job_for_a_screen_within_its_bytes(tmp_path):
    noisy = np.random.RandomState(1).randint(0, 256, (90, 60), np.uint8)
    volumes = {
        "small": {"1.png": coded(colour(45, 30))},
        "large": {"1.png": coded(np.kron(grey(500, 400), np.ones((2, 2), np.uint8)))},
        "noisy": {f"{n}.png": coded(np.roll(noisy, n)) for n in range(6)},
        # The second page is as large as asked already: without a limit it stays byte for byte.
        "bounded": {"1.png": coded(noisy), "2.png": coded(np.tile(noisy, (2, 2)))},
    }
    volumes["boundless"] = volumes["bounded"]
    most_bytes = 8192
    wanted = {
        "small": {"profile": "kobo-touch", "outputFormat": "png"},
        "large": {"profile": "kobo-touch", "outputFormat": "png"},
        "noisy": {"maxArtifactBytes": 1 << 16, "scale": 2},
        "bounded": {"maxPageBytes": most_bytes, "targetHeight": 180},
        "boundless": {"targetHeight": 180},
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
    sizes = {name: [item["bytes"] for item in report["items"]] for name, report in reports.items()}
    assert max(sizes["bounded"]) <= most_bytes < min(sizes["boundless"])
    assert all("for its size written as" in item["deviation"] for item in reports["bounded"]["items"])
