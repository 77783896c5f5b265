"""What a job may ask of its pages' colour, size and model, by pixels, bytes and report."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from client import Client
from drawn import colour, grey
from engines import COMPACT, SIX_B, native
from serving import volume

import server
import settings
from engine import pages, upscaling
from messages import Limits, Params

GREY, COLOUR = grey(40, 32), colour(40, 32)
GREY_IN_COLOUR = np.dstack([GREY, GREY, GREY])
CLEAR = np.dstack([COLOUR, np.where(GREY > 100, 255, 40).astype(np.uint8)])


def profile(space: bytes, *tags: tuple[bytes, bytes]) -> bytes:
    """An ICC profile of these tags."""
    table, data, at = b"", b"", 132 + 12 * len(tags)
    for name, content in tags:
        table += struct.pack(">4sII", name, at + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"test", 0x04200000, b"mntr", space, b"XYZ ")
    return (head + bytes(12) + b"acsp").ljust(128, b"\0") + body


def gamma(power: float) -> bytes:
    return b"curv" + struct.pack(">IIH", 0, 1, round(power * 256))


SRGB_CURVE = b"para" + struct.pack(
    ">IHH5i", 0, 3, 0, *(round(65_536 * v) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
)
WIDE = profile(b"RGB ", *((name, gamma(1.8)) for name in (b"rTRC", b"gTRC", b"bTRC")))
STANDARD = profile(b"RGB ", *((name, SRGB_CURVE) for name in (b"rTRC", b"gTRC", b"bTRC")))
TABLES_ONLY = profile(b"RGB ", (b"A2B0", b"mft2" + bytes(60)))
DOT_GAIN = profile(b"GRAY", (b"kTRC", gamma(1.75)))
PRESS = profile(b"CMYK", (b"A2B0", b"mft2" + bytes(60)))
UNEVEN = struct.pack(">I", len(WIDE) + 1) + WIDE[4:] + b"\0"  # libpng refuses it: no multiple of four bytes


def jpeg(pixels: pages.Pixels, icc: bytes | None = None) -> bytes:
    """Of the best quality, so that a grey page stays grey within a level."""
    kinds, blocks = ([cv2.IMAGE_METADATA_ICCP], [np.frombuffer(icc, np.uint8)]) if icc else ([], [])
    settings = [cv2.IMWRITE_JPEG_QUALITY, 100]
    done, data = cv2.imencodeWithMetadata(".jpg", pixels, kinds, blocks, settings)
    assert done
    return data.tobytes()


def segments(*contents: bytes) -> bytes:
    """JPEG's APP2 segments: profiles, and what else programs lay there."""
    return b"".join(b"\xff\xe2" + struct.pack(">H", len(content) + 2) + content for content in contents)


def png(pixels: pages.Pixels) -> bytes:
    done, data = cv2.imencode(".png", pixels)
    assert done
    return data.tobytes()


def icc_of(data: bytes) -> bytes | None:
    _, kinds, blocks = cv2.imdecodeWithMetadata(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    found = dict(zip(kinds, blocks, strict=True))
    block = found.get(cv2.IMAGE_METADATA_ICCP)
    return None if block is None else bytes(block.reshape(-1).view(np.uint8))


def read(data: bytes, **params: object) -> pages.Decoded:
    return pages.decode_page(data, Params(**{"scale": 1} | params), Limits())  # type: ignore[arg-type]


# ---------------------------------------------------------------- colour
@pytest.mark.parametrize(
    "page, auto, gray, keep",
    [(GREY, 1, 1, 1), (GREY_IN_COLOUR, 1, 1, 3), (COLOUR, 3, 1, 3), (CLEAR, 4, 4, 4)],
    ids=["grey", "grey in colour", "colour", "transparent"],
)
def test_color_settles_the_channels(page, auto, gray, keep):
    for wish, wanted in {"auto": auto, "gray": gray, "keep": keep}.items():
        assert pages.channels(read(png(page), color=wish).pixels) == wanted, wish
    made_grey = read(png(page), color="gray").pixels
    assert pages.colour_spread(made_grey) == 0
    if page is COLOUR:
        assert np.array_equal(made_grey, cv2.cvtColor(page, cv2.COLOR_BGR2GRAY))
    if page is CLEAR:
        assert np.array_equal(made_grey[..., 3], page[..., 3])


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("icc, page", [(WIDE, COLOUR), (TABLES_ONLY, COLOUR), (DOT_GAIN, GREY)])
def test_a_profile_is_embedded_in_what_is_written(suffix, icc, page):
    decoded = read(jpeg(page, icc))
    assert decoded.profile == icc
    data, _, _ = pages.encode(decoded.pixels, Params(output_format=suffix), decoded.profile)
    assert icc_of(data) == (None if (suffix, icc) == ("webp", DOT_GAIN) else icc)


def test_a_profile_reaches_png_as_it_is():
    image_cms = pytest.importorskip("PIL.ImageCms", reason="Pillow makes profiles that libpng accepts")
    icc = image_cms.ImageCmsProfile(image_cms.createProfile("sRGB")).tobytes()
    decoded = read(jpeg(COLOUR, icc))
    data, _, _ = pages.encode(decoded.pixels, Params(output_format="png"), decoded.profile)
    assert icc_of(data) == icc


MPF, INNER = b"MPF\0" + bytes(range(60)), b"ICC_PROFILE\0\1\1" + WIDE


@pytest.mark.parametrize(
    "around, wanted",
    [
        ([INNER], WIDE),
        ([INNER, MPF], WIDE),
        ([MPF, INNER], WIDE),
        ([INNER + bytes(10)], WIDE),
        ([INNER[:-1]], None),
        ([MPF], None),
    ],
    ids=["alone", "before others", "behind others", "padded", "cut", "none"],
)
def test_a_profile_is_told_from_what_else_a_jpeg_has_in_its_place(around, wanted):
    plain = jpeg(COLOUR)
    assert read(plain[:2] + segments(*around) + plain[2:]).profile == wanted


def test_a_profile_that_an_encoder_refuses_is_left_out_and_costs_no_page():
    data, suffix, why = pages.encode(COLOUR, Params(output_format="png"), UNEVEN)
    assert (suffix, why) == (".png", "without its colour profile, which the png encoder refused")
    assert icc_of(data) is None and np.array_equal(read(data).pixels, COLOUR)
    too_long = np.zeros((65_501, 2, 3), np.uint8)
    too_long[..., 0] = 200
    why = pages.encode(too_long, Params(), UNEVEN)[2]
    assert why is not None and why.startswith("written as png: 65501 px") and "; without its colour" in why


def test_a_grey_page_with_a_grey_profile_becomes_srgb_where_a_format_holds_colours_alone():
    lossless = Params(output_format="webp", jpeg_quality=100)
    data, _, why = pages.encode(GREY, lossless, DOT_GAIN)
    assert icc_of(data) is None and why is None
    assert np.abs(read(data).pixels - 255 * pages.to_srgb((GREY / 255) ** 1.75)).max() <= 1
    untold = curve_of(5, 1.0)
    data = pages.encode(GREY, lossless, untold)[0]
    assert icc_of(data) == untold and np.array_equal(read(data, color="gray").pixels, GREY)


def test_the_greys_of_a_screen_are_its_own_whatever_the_page_s_profile():
    page = pages.as_srgb(pages.Decoded(GREY, 0.0, DOT_GAIN))
    assert np.array_equal(page.pixels, pages.through_curve(GREY, pages.tone_curve(DOT_GAIN)))
    lossless = Params(output_format="webp", jpeg_quality=100)
    written = pages.encode(pages.to_levels(page.pixels, 16), lossless, page.profile)[0]
    assert set(np.unique(read(written).pixels)) <= {17 * level for level in range(16)}
    for kept in (pages.Decoded(COLOUR, 9.0, WIDE), pages.Decoded(GREY, 0.0, None)):
        assert pages.as_srgb(kept) is kept


@pytest.mark.parametrize("color, icc, channels", [("auto", None, 1), ("keep", WIDE, 3)])
def test_a_transparent_page_that_is_grey_on_white_paper_becomes_srgb_unless_it_keeps_its_channels(
    color, icc, channels
):
    page = np.dstack([GREY_IN_COLOUR, np.where(GREY > 100, 255, 0).astype(np.uint8)])
    params = Params(jpeg_quality=100, color=color)
    data = pages.encode(page, params, WIDE)[0]
    flat = pages.flatten(page)
    wanted = flat.astype(float) if icc else 255 * pages.to_srgb((flat / 255) ** 1.8)
    shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert icc_of(data) == icc and pages.channels(shown) == channels
    assert np.abs(shown.reshape(*GREY.shape, -1) - wanted[..., None]).max() <= 2
    assert pages.channels(upscaling.upscale_page(native(COMPACT), page, params)) == channels


@pytest.mark.parametrize("icc, power", [(WIDE, 1.8), (STANDARD, None)])
def test_a_grey_page_with_a_colour_profile_becomes_srgb_in_one_channel(icc, power):
    decoded = read(jpeg(GREY_IN_COLOUR, icc))
    assert decoded.pixels.ndim == 2 and decoded.profile is None
    plain = read(jpeg(GREY_IN_COLOUR)).pixels
    light = (plain / 255) ** power if power else None
    wanted = plain if light is None else 255 * pages.to_srgb(light)
    assert np.abs(decoded.pixels - wanted).max() <= 1


def curve_of(kind: int, *parameters: float) -> bytes:
    """A grey profile whose curve is this function of ICC.1:2022, 10.18."""
    given = struct.pack(f">{len(parameters)}i", *(round(65_536 * value) for value in parameters))
    return profile(b"GRAY", (b"kTRC", b"para" + struct.pack(">IHH", 0, kind, 0) + given))


TABLE = profile(b"GRAY", (b"kTRC", b"curv" + struct.pack(">II3H", 0, 3, 0, 16_384, 65_535)))
X = np.arange(256) / 255


@pytest.mark.parametrize(
    "icc, light",
    [
        (profile(b"GRAY", (b"kTRC", b"curv" + struct.pack(">II", 0, 0))), X),
        (TABLE, np.interp(X, [0, 0.5, 1], [0, 0.25, 1])),
        (curve_of(0, 2.2), X**2.2),
        (curve_of(1, 2, 1.25, -0.25), np.maximum(1.25 * X - 0.25, 0) ** 2),
        (curve_of(2, 2, 0.5, 0.25, 0.25), (0.5 * X + 0.25) ** 2 + 0.25),
        (curve_of(4, 2, 1, 0, 0.5, 0.25, 0.125, 0), np.where(X >= 0.25, X**2 + 0.125, 0.5 * X)),
    ],
    ids=["straight", "table", "kind 0", "kind 1", "kind 2", "kind 4"],
)
def test_a_profiles_curve_is_read_in_each_form_that_the_standard_has(icc, light):
    curve = pages.tone_curve(icc)
    assert curve is not None
    assert np.abs(curve - pages.to_srgb(np.clip(light, 0, 1))).max() < 1e-3


@pytest.mark.parametrize(
    "icc",
    [
        curve_of(5, 1.0),  # no such kind
        profile(b"GRAY", (b"kTRC", b"what" + bytes(12))),
        profile(b"RGB ", *((name, gamma(1.8)) for name in (b"rTRC", b"gTRC")), (b"bTRC", gamma(2.2))),
        profile(b"RGB ", (b"rTRC", gamma(1.8)), (b"gTRC", gamma(1.8))),
    ],
    ids=["kind 5", "another type", "three curves", "two curves"],
)
def test_a_profile_without_one_known_curve_has_none(icc):
    assert pages.tone_curve(icc) is None


def test_a_grey_page_whose_profile_can_not_be_told_keeps_its_channels_and_the_profile():
    decoded = read(jpeg(GREY_IN_COLOUR, TABLES_ONLY))
    assert decoded.pixels.ndim == 3 and decoded.profile == TABLES_ONLY


def test_a_press_profile_is_not_laid_over_the_rgb_that_was_made_of_it():
    decoded = read(jpeg(COLOUR, PRESS))
    assert pages.encode(decoded.pixels, Params(), decoded.profile)[0].find(b"ICC_PROFILE") < 0


@pytest.mark.parametrize("block", [INNER.replace(WIDE, PRESS), MPF], ids=["press", "no profile"])
def test_a_grey_page_has_one_channel_whatever_is_no_profile_of_its_colours(block):
    plain = jpeg(GREY_IN_COLOUR)
    decoded = read(plain[:2] + segments(block) + plain[2:])
    assert decoded.profile is None and np.array_equal(decoded.pixels, read(plain).pixels)
    assert decoded.pixels.ndim == 2


@pytest.mark.parametrize("cut", range(0, len(WIDE), 7))
def test_a_cut_profile_never_stops_a_page(cut):
    assert read(jpeg(GREY_IN_COLOUR, WIDE[:cut] or b"\0")).pixels.shape[:2] == GREY.shape


# ---------------------------------------------------------------- size
@pytest.mark.parametrize(
    "params, expected",
    [
        ({"scale": 3}, (96, 120)),
        ({"target_height": 100}, (80, 100)),
        ({"target_width": 100}, (100, 125)),
        ({"target_width": 100, "target_height": 100}, (80, 100)),
        ({"target_height": 400}, (320, 400)),  # beyond what the network gives
        ({"target_height": 100, "reduction": "lanczos"}, (80, 100)),
        ({"scale": 2, "reduction": "area"}, (64, 80)),
    ],
    ids=str,
)
@pytest.mark.parametrize("page", [GREY, COLOUR, CLEAR], ids=["grey", "colour", "transparent"])
def test_a_page_gets_the_size_that_was_asked_for(params, expected, page):
    asked = Params(output_format="png", **params)
    result = upscaling.upscale_page(native(COMPACT), page, asked)
    assert result.shape[1::-1] == expected and pages.channels(result) == pages.channels(page)
    # It is the page: reduced to its old size it looks like it.
    back = cv2.resize(result, page.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.corrcoef(back.ravel(), page.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
    "params, is_read",
    [
        ({"target_width": 32}, True),
        ({"target_width": 40, "target_height": 40}, True),
        ({"target_width": 33}, False),
        ({"target_height": 40}, False),  # its pixels may lie turned, and it would grow
        ({"target_height": 20, "spreads": "split"}, False),  # as a half might
        ({"scale": 1, "reduction": "area"}, False),
    ],
    ids=str,
)
def test_a_page_that_needs_no_network_is_not_refused_for_what_a_network_would_make_of_it(params, is_read):
    limits = Limits(output_pixels=2 * GREY.size)
    if is_read:
        assert pages.decode_page(png(GREY), Params(**params), limits).pixels.shape == GREY.shape
    else:
        with pytest.raises(pages.PageError, match="at scale 4 would be"):
            pages.decode_page(png(GREY), Params(**params), limits)


def false_energy(page: pages.Pixels, period: float) -> float:
    """Energy between flatness and the screen's own frequency: none of it was in the tone."""
    spectrum = np.abs(np.fft.fft2(page.astype(float) - page.mean())) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(page.shape[1]), np.fft.fftfreq(page.shape[0])))
    return float(spectrum[(frequency > 0.004) & (frequency < 0.8 / period)].sum() / page.size)


def screentone(side: int, period: float, ink: float) -> pages.Pixels:
    """Round dots at 45 degrees that cover this share of the paper; black on white."""
    y, x = np.mgrid[:side, :side] / period
    u, v = (x + y) % 1 - 0.5, (x - y) % 1 - 0.5
    return np.where(np.hypot(u, v) < np.sqrt(ink / np.pi), 0, 255).astype(np.uint8)


def test_area_in_light_makes_less_moire_of_a_screentone_and_keeps_its_tone():
    """A screen of 11 pixels a dot reduced to 3 a dot. The figures are those of the README."""
    tone, size = screentone(1000, 11.0, 0.35), (271, 271)
    plain, soft = (pages.resize(tone, size, in_light) for in_light in (False, True))
    shares = [false_energy(page, 3.0) for page in (plain, soft)]
    print("energy at false frequencies: lanczos", shares[0], "area", shares[1])
    assert shares[1] < 0.25 * shares[0]
    light = [pages.to_light(page / 255).mean() for page in (tone, plain, soft)]
    assert abs(light[2] - light[0]) < 0.005 < abs(light[1] - light[0])


# ---------------------------------------------------------------- model
SMALL, TALL, PAINTED = "2x_MangaJaNai_1200p_V1", "2x_MangaJaNai_1600p_V1", "2x_IllustrationJaNai_V1"


@pytest.mark.parametrize(
    "names, height, is_grey, wanted",
    [
        ([SIX_B, COMPACT], 1200, False, SIX_B),
        ([SIX_B, COMPACT], 2400, False, COMPACT),
        ([SIX_B, COMPACT], 1200, True, COMPACT),
        ([SMALL, TALL, PAINTED], 1300, True, SMALL),
        ([SMALL, TALL, PAINTED], 1500, True, TALL),
        ([SMALL, TALL, PAINTED], 1500, False, PAINTED),
        (["only"], 1500, False, "only"),
    ],
)  # fmt: skip
def test_auto_chooses_by_height_and_colour(names, height, is_grey, wanted):
    assert upscaling.choose_model(names, height, is_grey) == wanted


def test_auto_considers_the_family_that_is_there():
    assert upscaling.auto_candidates([COMPACT, "x", SIX_B]) == [SIX_B, COMPACT]
    assert upscaling.auto_candidates([COMPACT, "4x_MangaJaNai_1300p", "x"]) == ["4x_MangaJaNai_1300p"]


# ---------------------------------------------------------------- through the service
def test_one_volume_with_targets_and_auto(tmp_path: Path):
    """Small pages come out at the target, each by its model; a large one as it came."""
    large = png(grey(120, 90))
    sources = {"1.png": png(GREY), "2.png": png(COLOUR), "3.png": large}
    body = {"params": {"model": "AUTO", "targetHeight": 100, "outputFormat": "png"}}
    with server.Service(settings.Config(storage_root=tmp_path, port=0)) as running:
        client = Client(running.url)
        client.upload("v.zip", [volume(sources)])
        job = client.submit("v.zip", **body)
        state = client.watch(job)[0][-1]
        members = zipfile.ZipFile(io.BytesIO(client.call("GET", f"/jobs/{job}/artifact").body))
    report = json.loads(members.read("artifact-report.json"))
    assert (state.status, state.failed_pages, state.message) == ("SUCCESS", 0, None)
    items = report["items"]
    assert [item["height"] for item in items] == [100, 100, 120]
    assert [item["model"] for item in items] == [COMPACT, SIX_B, None]
    assert [item["status"] for item in items] == ["upscaled", "upscaled", "carried"]
    assert items[2]["error"] is None and members.read("3.png") == large
    assert items[2]["sha256"] == hashlib.sha256(large).hexdigest() == items[2]["source"]["sha256"]
    assert report["model"] == "auto" and [one["model"] for one in report["choices"]] == [SIX_B, COMPACT]
    assert report["summary"] == {"processed": 3, "failed": 0}
