"""pages.py: bytes to pixels and back, by value; what may not be decoded at all."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import require

import storage
from engine import pages
from files import inputs
from messages import Limits, Params, SourcePage

LIMITS = Limits()


def gradient(height: int, width: int, channels: int = 1) -> pages.Pixels:
    """Smooth, so that JPEG keeps it; its channels differ, and no turn maps it to itself."""
    y, x = np.mgrid[:height, :width]
    planes = [40 + 150 * x // width + 60 * y // height * (c + 1) // 4 for c in range(channels)]
    planes = [plane.astype(np.uint8) for plane in planes]
    return planes[0] if channels == 1 else np.dstack(planes)


def coded(pixels: pages.Pixels, suffix: str = ".png", *settings: int) -> bytes:
    done, data = cv2.imencode(suffix, pixels, settings)
    assert done
    return data.tobytes()


def decode(data: bytes) -> pages.Pixels:
    return pages.decode(data, 1, LIMITS)


def scored(data: bytes) -> tuple[pages.Pixels, float]:
    page = pages.decode_page(data, Params(scale=1), LIMITS)
    return page.pixels, page.spread


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """The PNG with one more chunk behind its header."""
    return png[:33] + chunk(kind, data) + png[33:]


def raw_png(rows: bytes, width: int, height: int, depth: int, colour: int, *between: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(between) + body


def exif(orientation: int, order: str = "<") -> bytes:
    start = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return start + struct.pack(order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def with_exif(jpeg: bytes, block: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + jpeg[2:]


def refusal(data: bytes, scale: int = 1, limits: Limits = LIMITS) -> str:
    with pytest.raises(pages.PageError) as caught:
        pages.decode(data, scale, limits)
    return str(caught.value)


@pytest.fixture
def no_decoder(monkeypatch):
    def forbidden(*args: object) -> None:
        raise AssertionError("the decoder was called")

    monkeypatch.setattr(cv2, "imdecodeWithMetadata", forbidden)


# ---------------------------------------------------------------- hostile images
def judge(data: bytes) -> tuple[str, list[int] | None]:
    """What decode makes of an image, in the words of the hostile index."""
    try:
        pixels = decode(data)
    except pages.PageError as error:
        assert str(error)
        return "page-error", None
    assert pixels.dtype in (np.uint8, np.uint16) and pages.channels(pixels) in pages.MODES
    return "ok", [pixels.shape[1], pixels.shape[0]]


def test_every_hostile_image_ends_as_its_index_says(hostile):
    images = [entry for entry in hostile.index if entry["kind"] == "image"]
    wrong = {}
    for entry in images:
        verdict, size = judge((hostile.root / entry["file"]).read_bytes())
        allowed = {entry["expect"], *entry.get("accept", ())}
        if verdict not in allowed or (size and size != entry.get("size", size)):
            wrong[entry["file"]] = (verdict, size, entry["why"])
    assert wrong == {} and len(images) > 100


def test_every_hostile_input_has_the_good_pages_its_index_counts(hostile, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    staging, wrong = tmp_path / "staging", {}
    for entry in hostile.index:
        if entry["kind"] not in ("archive", "folder") or entry.get("heavy"):
            continue
        staged: list[SourcePage] = []
        with contextlib.suppress(storage.InputUnusable):
            *staged, _ = inputs.stage_input(hostile.root / entry["file"], staging, LIMITS)
        bad = [p for p in staged if p.error or judge((staging / p.staged).read_bytes())[0] != "ok"]
        verdict = "reject" if not staged else "page-error" if bad else "ok"
        counted = (len(staged) - len(bad), len(bad)) == (entry.get("pages", 0), entry.get("bad", 0))
        expected = verdict == entry["expect"] and (counted or verdict == "reject")
        if not expected and verdict not in entry.get("accept", ()):
            wrong[entry["file"]] = (verdict, len(staged), len(bad), entry["why"])
    assert wrong == {}


def test_pages_of_one_drawing_in_every_format_show_that_drawing(hostile):
    grey, colour = hostile.make.page(11), hostile.make.rgb(12)[..., ::-1]
    turned = np.rot90(grey, -1)
    exact = dict.fromkeys(
        "ok_grey8.png ok_adam7.png ok_lossless.webp ok_bmp8.bmp ok_bmp_rle8.bmp".split(), grey
    )
    exact |= dict.fromkeys("ok_gif.gif png_named.jpg webp_named.png ok_png_10000_chunks.png".split(), grey)
    exact |= dict.fromkeys(
        "ok_rgb8.png ok_bmp24.bmp ok_bmp32.bmp ok_bmp_topdown.bmp tail_garbage.png".split(), colour
    )
    exact |= dict.fromkeys(["exif_6.png", "exif_6.webp"], turned)
    lossy = dict.fromkeys(
        "ok_rgb.jpg ok_444.jpg ok_progressive.jpg ok_cmyk.jpg ok_lossy.webp".split(), colour
    )
    lossy |= dict.fromkeys("ok_grey.jpg jpg_named.webp exif_1.jpg".split(), grey)
    for name, want in (exact | lossy).items():
        got = decode((hostile.root / "images" / name).read_bytes()).astype(int)
        assert got.shape == want.shape, name
        assert abs(got - want).max() == 0 if name in exact else abs(got.mean() - want.mean()) < 3, name


def test_the_first_frame_of_an_animation_counts(hostile):
    for name in ("anim.webp", "anim.gif", "anim.png"):
        got = decode((hostile.root / "images" / name).read_bytes())
        assert np.array_equal(got, hostile.make.page(20)), name


# ---------------------------------------------------------------- header checks
def vp8x(width: int, height: int) -> bytes:
    canvas = struct.pack("<I", 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + canvas


def bmp_header(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, width, height, 1, 24) + bytes(24)


def jpeg_header(width: int, height: int) -> bytes:
    return b"\xff\xd8\xff\xe0\0\4JF\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes(9)


BOMBS = {
    "PNG": raw_png(bytes(100), 60_000, 60_000, 8, 0),
    "JPEG": jpeg_header(65_500, 65_500),
    "WebP": vp8x(16_384, 16_384),
    "WebP lossless": b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0/" + struct.pack("<I", 0x0FFFFFFF),
    "WebP lossy": b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383),
    "BMP": bmp_header(2**31 - 1, 128),
    "BMP top-down": bmp_header(128, -(2**31)),
    "GIF": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(3),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_from_its_header_alone(no_decoder, kind):
    assert "pixels, over the limit of 100000000 a page" in refusal(BOMBS[kind])


def test_the_indexed_bombs_never_reach_the_decoder(hostile, no_decoder):
    for name in ("png_60000.png", "png_900mpx.png", "png_120mpx.png", "jpg_65500.jpg"):
        assert "over the limit" in refusal((hostile.root / f"images/bomb_{name}").read_bytes())


EMPTY = {
    "PNG": raw_png(b"", 0, 10, 8, 0),
    "PNG past 2^31": raw_png(b"", 0x80000001, 1, 8, 0),
    "JPEG": jpeg_header(96, 0),
    "BMP": bmp_header(-96, 128),
    "GIF": b"GIF89a" + bytes(7),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_size_of_nothing_is_refused_from_the_header(no_decoder, kind):
    assert "header says" in refusal(EMPTY[kind])


CUT = [
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"\xff\xd8\xff\xe0\xff\xff",
    b"RIFF\0\0\0\0WEBP",
    b"BM",
    b"GIF89a",
]


@pytest.mark.parametrize("data", CUT, ids=ascii)
def test_a_header_that_is_cut_off_is_refused(no_decoder, data):
    assert "header is cut off" in refusal(data)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (17, 31), (300, 2)])
def test_the_header_and_the_decoder_agree_on_the_size(width, height):
    grey, colour = gradient(height, width), gradient(height, width, 3)
    clear = np.dstack([colour, grey])
    os2 = b"BM" + struct.pack("<IHHIIHHHH", 0, 0, 0, 26, 12, width, height, 1, 24)
    os2 += bytes((width * 3 + 3) // 4 * 4 * height)
    files = [coded(p, s) for p in (grey, colour) for s in (".png", ".jpg", ".bmp", ".webp")]
    files += [coded(colour, ".webp", cv2.IMWRITE_WEBP_QUALITY, 101), coded(clear, ".webp"), coded(clear), os2]
    for data in files:
        assert pages.header_size(data) == (width, height), data[:16]
        assert decode(data).shape[:2] == (height, width), data[:16]


def fake_frame(lead: bytes) -> bytes:
    """A 40x30 JPEG; whoever reads `lead` and the two bytes after it as marker and length
    lands on an 8x8 frame header inside a comment."""
    real, small = coded(gradient(30, 40), ".jpg"), coded(gradient(8, 8), ".jpg")
    frame = small[small.index(b"\xff\xc0") :][:19]
    head = b"\xff\xd8" + lead
    skipped = len(head) + 0xFFFE  # the length that FF FE, the comment's marker, would mean
    comments = b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)
    comments += b"\xff\xfe" + struct.pack(">H", 8_002)
    hidden = bytes(skipped - len(head + comments)) + frame
    return head + comments + hidden.ljust(8_000, b"\0") + real[2:]


@pytest.mark.parametrize("lead", [b"\xff\x01", b"\xff\xd0", b"\xff\xd7", b"\xff\x00"], ids=ascii)
def test_no_marker_without_a_length_hides_a_jpegs_real_size(lead):
    data = fake_frame(lead)
    assert cv2.imdecode(np.frombuffer(data, np.uint8), 0).shape == (30, 40)  # what the decoder will do
    try:
        assert pages.header_size(data) == (40, 30)
    except pages.PageError:
        pass  # refusing it is as safe


@pytest.mark.parametrize("junk", [b"\xff\xff\xff", b"\0\0\0", b"\xff\xe0\0\2"], ids=ascii)
def test_a_jpeg_with_bytes_between_its_markers_is_read(junk):
    data = coded(gradient(30, 40), ".jpg")
    at = data.index(b"\xff\xdb")
    assert np.array_equal(decode(data[:at] + junk + data[at:]), decode(data))


def test_a_page_may_reach_the_limits_but_not_pass_them():
    data = coded(gradient(30, 40))
    assert pages.decode(data, 4, Limits(page_pixels=1200, output_pixels=19_200)).shape == (30, 40)
    told = refusal(data, 4, Limits(page_pixels=1199))
    assert "40x30 are 1200 pixels, over the limit of 1199 a page (REICHAN_MAX_PAGE_PIXELS)" in told
    told = refusal(data, 4, Limits(output_pixels=19_199))
    assert "would be 19200 pixels, over the limit of 19199 (REICHAN_MAX_OUTPUT_PIXELS); use" in told
    assert pages.decode(data, 3, Limits(output_pixels=19_199)).shape == (30, 40)


NO_IMAGES = [
    (b"", "the file is empty"),
    (b"hello, I am text\n", "unknown content"),
    (b"<!doctype html>", "markup"),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "markup"),
    (b"%PDF-1.7", "pdf"),
    (b"%!PS-Adobe-3.0", "PostScript"),
    (b"8BPS\0\1", "Photoshop"),
    (b"\0\0\0\x18ftypheic", "heic"),
    (b"PK\x03\x04", "zip"),
    (b"Rar!\x1a\x07", "rar"),
]


@pytest.mark.parametrize(("data", "said"), NO_IMAGES, ids=range(len(NO_IMAGES)))
def test_what_is_no_image_is_refused_by_name(no_decoder, data, said):
    assert said in refusal(data)


# ---------------------------------------------------------------- decode
def test_the_unused_byte_of_a_32_bit_bmp_is_no_transparency():
    masks = struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)
    head = struct.pack("<IiiHHIIiiII", 40, 4, -2, 1, 32, 3, 32, 0, 0, 0, 0)
    pixels = bytes([10, 20, 30, 0] * 8)
    data = b"BM" + struct.pack("<IHHI", 54 + 12 + 32, 0, 0, 54 + 12) + head + masks + pixels
    page = pages.decode_page(data, Params(color="keep"), Limits()).pixels
    assert page.shape == (2, 4, 3) and page.reshape(-1, 3).tolist() == [[10, 20, 30]] * 8


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_comes_as_one_channel_and_colour_as_blue_green_red(suffix, channels):
    pixels = gradient(30, 40, channels)
    assert np.array_equal(decode(coded(pixels, suffix)), pixels)


def test_a_page_is_known_by_content_whatever_its_channels_say():
    grey = gradient(30, 40)
    opaque = np.full_like(grey, 255)
    for pixels in (grey, np.dstack([grey] * 3), np.dstack([grey, grey, grey, opaque])):
        assert np.array_equal(decode(coded(pixels)), grey)
    colour = gradient(30, 40, 3)
    assert np.array_equal(decode(coded(np.dstack([colour, opaque]))), colour)


def tinted(paper: tuple[float, float, float]) -> pages.Pixels:
    """A grey page scanned on coloured paper."""
    tint: pages.Pixels = np.rint(np.dstack([gradient(64, 80)] * 3) * paper).astype(np.uint8)
    return tint


def stained(level: int) -> pages.Pixels:
    """A grey page with one pixel that is `level` levels off."""
    page = np.dstack([np.minimum(gradient(64, 80), 250)] * 3)
    page[40, 40, 2] += level
    return page


GREY = np.dstack([gradient(64, 80)] * 3)
GREYISH = {
    "jpeg 30": lambda: coded(GREY, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 30),
    "webp 60": lambda: coded(GREY, ".webp", cv2.IMWRITE_WEBP_QUALITY, 60),
    "by way of Lab": lambda: coded(
        cv2.cvtColor(cv2.cvtColor(GREY, cv2.COLOR_BGR2LAB), cv2.COLOR_LAB2BGR), ".png"
    ),
    "one level off once": lambda: coded(stained(1)),
}
COLOURED = {
    "ivory": lambda: tinted((0.97, 0.99, 1)),
    "the faintest ivory": lambda: tinted((0.99, 0.995, 1)),
    "one level everywhere": lambda: np.dstack([GREY[..., 0] // 2, GREY[..., 0] // 2 + 1, GREY[..., 0] // 2]),
    "one pixel of two levels": lambda: stained(2),
}


@pytest.mark.parametrize("make", GREYISH.values(), ids=list(GREYISH))
def test_a_grey_page_that_was_saved_in_colour_is_grey(make):
    page, spread = scored(make())
    assert page.ndim == 2 and spread <= pages.GREY_SPREAD
    assert np.abs(page.astype(int) - GREY[..., 0]).mean() < 6


@pytest.mark.parametrize("make", COLOURED.values(), ids=list(COLOURED))
def test_a_tinted_page_is_never_called_grey(make):
    page, spread = scored(coded(make()))
    assert np.array_equal(page, make()) and spread >= 1


def test_the_spread_is_told_in_8_bit_levels_at_any_depth():
    assert pages.colour_spread(stained(7)) == pages.colour_spread(stained(7).astype(np.uint16) * 257) == 7
    assert pages.colour_spread(gradient(8, 8)) == 0
    assert pages.is_grey(stained(1).astype(np.uint16) * 257)
    assert not pages.is_grey(stained(2).astype(np.uint16) * 257)


def test_alpha_that_is_clear_anywhere_is_kept():
    pixels = np.dstack([gradient(30, 40, 3), np.full((30, 40), 255, np.uint8)])
    pixels[29, 39, 3] = 254
    assert np.array_equal(decode(coded(pixels)), pixels)


def test_sixteen_bits_stay_sixteen_even_on_a_dark_page():
    dark = gradient(30, 40).astype(np.uint16)  # nothing over 250 of 65535
    assert decode(coded(dark)).dtype == np.uint16 and np.array_equal(decode(coded(dark)), dark)
    assert pages.levels(dark) == 65_535
    assert pages.to_eight_bit(dark).max() == 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_sixteen_bit_page_means_its_eight_bit_twin(channels):
    twin = gradient(30, 40, channels)
    deep = decode(coded(twin.astype(np.uint16) * 257 + 100))
    assert abs(pages.to_eight_bit(deep).mean() - decode(coded(twin)).mean()) <= 1
    assert np.array_equal(pages.to_eight_bit(deep), twin)


def test_eight_bits_of_sixteen_are_rounded():
    deep = np.array([[0, 128, 129, 257, 32_767, 32_768, 65_406, 65_407, 65_535]], np.uint16)
    assert pages.to_eight_bit(deep).tolist() == [[0, 0, 1, 1, 127, 128, 254, 255, 255]]


def test_grey_of_few_bits_spans_black_to_white():
    for depth, rows, want in [
        (1, b"\0\x40", [0, 255]),
        (2, b"\0\x1b", [0, 85, 170, 255]),
        (4, b"\0\x0f", [0, 255]),
    ]:
        assert decode(raw_png(rows, len(want), 1, depth, 0)).tolist() == [want]


TRANSPARENT = {
    "palette": raw_png(
        b"\0\0\1", 2, 1, 8, 3, chunk(b"PLTE", bytes(3) + b"\x10\x10\x10"), chunk(b"tRNS", b"\0")
    ),
    "colour": raw_png(b"\0" + bytes(3) + b"\x10\x10\x10", 2, 1, 8, 2, chunk(b"tRNS", bytes(6))),
    "grey": raw_png(b"\0\0\x10", 2, 1, 8, 0, chunk(b"tRNS", bytes(2))),
    "16-bit grey": raw_png(b"\0\0\0\x10\x10", 2, 1, 16, 0, chunk(b"tRNS", bytes(2))),
    "grey and alpha": raw_png(b"\0\0\0\x10\xff", 2, 1, 8, 4),
    "alpha": coded(np.array([[[0, 0, 0, 0], [16, 16, 16, 255]]], np.uint8)),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_black_is_white_paper(kind):
    flat = pages.to_eight_bit(pages.flatten(decode(TRANSPARENT[kind])))
    assert flat.tolist() == [[255, 16]]


@pytest.mark.parametrize("white", [255, 65_535])
def test_a_page_transparent_everywhere_is_white_and_never_black(white):
    clear = np.zeros((8, 8, 4), np.uint8 if white == 255 else np.uint16)
    flat = pages.flatten(decode(coded(clear)))
    assert flat.shape == (8, 8) and (flat == white).all()


def test_half_transparent_ink_is_mixed_with_white():
    page = np.array([[[0, 100, 200, 128], [0, 100, 200, 51], [9, 9, 9, 255]]], np.uint8)
    assert pages.flatten(page).tolist() == [[[127, 177, 227], [204, 224, 244], [9, 9, 9]]]
    assert pages.flatten(page[..., :3]).tolist() == page[..., :3].tolist()


def test_cmyk_is_not_negated():
    require(importlib.util.find_spec("PIL"), "Pillow is not installed")
    from PIL import Image

    for ink, want in [
        ((0, 255, 255, 0), (0, 0, 255)),
        ((0, 0, 0, 0), (255,) * 3),
        ((0, 0, 0, 255), (0,) * 3),
    ]:
        data = io.BytesIO()
        Image.new("CMYK", (16, 16), ink).save(data, "JPEG", quality=95)
        got = decode(data.getvalue()).reshape(16, 16, -1).astype(int)
        assert abs(got - np.array(want[: got.shape[2]])).max() <= 2


UPRIGHT = gradient(12, 20, 3)
# What a camera stores so that the page is upright once its tag is honoured (EXIF 2.32, 4.6.4).
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_gives_the_same_upright_page(orientation, order):
    stored = np.ascontiguousarray(STORED[orientation])
    png = with_chunk(coded(stored), b"eXIf", exif(orientation, order))
    assert np.array_equal(decode(png), UPRIGHT)
    plain = coded(stored, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 100)
    jpeg = decode(with_exif(plain, exif(orientation, order))).astype(int)
    assert jpeg.shape == UPRIGHT.shape and abs(jpeg - UPRIGHT).mean() < 3


BLOCKS = {
    "no block": b"",
    "no order": b"XX*\0" + exif(6)[4:],
    "0": exif(0),
    "9": exif(9),
    "65535": exif(65_535),
    "cut": exif(6)[:15],
    "offset beyond the end": b"II*\0" + struct.pack("<I", 2**32 - 1),
    "count beyond the end": b"II*\0" + struct.pack("<IHHH", 8, 65_535, 1, 3),
    "another tag": b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0110, 3, 1, 6, 0, 0),
    "garbage": b"\xff" * 24,
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_without_a_valid_orientation_turns_nothing(kind):
    assert pages.exif_orientation(BLOCKS[kind]) == 1
    assert pages.exif_orientation(b"Exif\0\0" + BLOCKS[kind]) == 1
    data = coded(UPRIGHT, ".jpg")
    assert np.array_equal(decode(with_exif(data, BLOCKS[kind])), decode(data))


def test_an_orientation_is_found_behind_other_tags():
    block = b"MM\0*" + struct.pack(">IH", 8, 2) + struct.pack(">HHIHH", 0x0110, 3, 1, 7, 0)
    assert pages.exif_orientation(block + struct.pack(">HHIHHI", 0x0112, 3, 1, 8, 0, 0)) == 8


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_page_that_ends_early_is_an_error_and_never_half_a_page(suffix):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    data = coded(noise, suffix)
    assert decode(data).shape == (64, 64, 3)
    for part in (0.3, 0.5, 0.8, 0.95):
        assert refusal(data[: int(len(data) * part)])


def test_what_the_decoder_raises_becomes_a_page_error(monkeypatch):
    def fail(*args: object) -> None:
        raise cv2.error("boom")

    monkeypatch.setattr(cv2, "imdecodeWithMetadata", fail)
    assert "the decoder refused it" in refusal(coded(gradient(8, 8)))


# ---------------------------------------------------------------- grain
def test_cleaning_takes_noise_and_spares_a_screentone():
    noise = np.random.RandomState(0).normal(0, 6, (64, 64))
    flat = np.clip(180 + noise, 0, 255).astype(np.uint8)
    assert pages.clean(flat).std() < flat.std() / 3
    y, x = np.mgrid[:64, :64]
    tone = np.where((x // 2 + y // 2) % 2, 60, 240).astype(np.uint8)
    assert abs(pages.clean(tone).astype(int) - tone).max() <= 2


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_page_is_its_clean_self_plus_its_grain(channels):
    page = gradient(32, 32, channels) + np.random.RandomState(0).randint(
        0, 9, gradient(32, 32, channels).shape
    )
    page = page.astype(np.uint8)
    assert np.array_equal(pages.clean(page) + pages.grain(page), page)
    assert channels != 4 or not pages.grain(page)[..., 3].any()


# ---------------------------------------------------------------- encode
def encode(pixels: pages.Pixels, form: str, quality: int = 95) -> tuple[bytes, str, str | None]:
    return pages.encode(pixels, Params(output_format=form, jpeg_quality=quality))


def read_back(data: bytes) -> pages.Pixels:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_gives_back_every_channel_exactly(channels):
    pixels = gradient(30, 40, channels)
    data, suffix, deviation = encode(pixels, "png")
    assert (suffix, deviation) == (".png", None)
    assert np.array_equal(read_back(data), pixels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_webp_at_100_is_lossless(channels):
    pixels = gradient(30, 40, channels)
    data, suffix, deviation = encode(pixels, "webp", 100)
    assert (suffix, deviation, data[12:16]) == (".webp", None, b"VP8L")
    assert np.array_equal(decode(data), pixels)


@pytest.mark.parametrize("form", ["jpg", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_lossy_page_is_close_and_closer_with_quality(form, channels):
    pixels = gradient(64, 64, channels)
    pixels[20:40, 20:40] = 0
    errors = []
    for quality in (30, 80, 99):
        got = read_back(encode(pixels, form, quality)[0]).astype(int)
        errors.append(abs(got - (pixels if got.ndim == pixels.ndim else pixels[..., None])).mean())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 2


def test_grey_stays_one_channel_in_jpeg_and_png():
    for form in ("jpg", "png"):
        assert read_back(encode(gradient(30, 40), form)[0]).ndim == 2


def sampling(jpeg: bytes) -> list[int]:
    """The factors, 0xHV, of the components in the frame header."""
    at = jpeg.index(b"\xff\xc0")
    count = jpeg[at + 9]
    return list(jpeg[at + 11 : at + 11 + 3 * count : 3])


@pytest.mark.parametrize(
    ("quality", "luma"), [(1, 0x22), (75, 0x22), (89, 0x22), (90, 0x11), (95, 0x11), (100, 0x11)]
)
def test_jpeg_keeps_chroma_whole_from_quality_90_on(quality, luma):
    assert sampling(encode(gradient(30, 40, 3), "jpg", quality)[0]) == [luma, 0x11, 0x11]


def test_jpeg_shows_alpha_over_white():
    pixels = np.dstack([np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)])
    pixels[:8, :, 3] = 255
    got = read_back(encode(pixels, "jpg", 100)[0]).astype(int)
    assert got.ndim == 2 and got[:8].max() <= 2 and got[8:].min() >= 253


@pytest.mark.parametrize(("form", "limit"), [("jpg", 65_500), ("webp", 16_383)])
@pytest.mark.parametrize("upright", [True, False])
def test_a_side_over_the_formats_limit_is_written_as_png_and_says_so(form, limit, upright):
    at, over = (gradient(2, n) if upright else gradient(n, 2) for n in (limit, limit + 1))
    data, suffix, deviation = encode(at, form)
    assert (suffix, deviation, storage.sniff(data)) == (f".{form}", None, {"jpg": "jpeg"}.get(form, form))
    data, suffix, deviation = encode(over, form)
    assert deviation == f"written as png: {limit + 1} px is over the {limit} px that {form} allows"
    assert suffix == ".png" and np.array_equal(read_back(data), over)


@pytest.mark.parametrize(
    "given", [(False, np.zeros(0, np.uint8)), (True, np.zeros(0, np.uint8)), cv2.error("boom")]
)
def test_an_encoder_that_fails_is_a_page_error_and_no_empty_file(monkeypatch, given):
    def imencode(*args: object) -> object:
        if isinstance(given, cv2.error):
            raise given
        return given

    monkeypatch.setattr(cv2, "imencode", imencode)
    with pytest.raises(pages.PageError, match="the png encoder"):
        encode(gradient(8, 8), "png")


def test_encoding_one_page_twice_gives_the_same_bytes():
    for form in ("jpg", "png", "webp"):
        assert encode(gradient(30, 40, 3), form) == encode(gradient(30, 40, 3), form)


# ---------------------------------------------------------------- previews
def preview(tmp_path: Path, data: bytes, width: int) -> pages.Pixels:
    (tmp_path / "page").write_bytes(data)
    pages.write_preview(tmp_path / "page", tmp_path / "previews/p.jpg", width, LIMITS)
    written = (tmp_path / "previews/p.jpg").read_bytes()
    assert storage.sniff(written) == "jpeg"
    return read_back(written)


def test_a_preview_has_the_width_asked_for_and_the_pages_shape(tmp_path):
    page = gradient(100, 200, 3)
    small = preview(tmp_path, coded(page), 50)
    assert small.shape == (25, 50, 3)
    assert abs(small.astype(int) - page[2::4, 2::4]).max() <= 6


def test_a_preview_is_never_larger_than_its_page(tmp_path):
    assert preview(tmp_path, coded(gradient(30, 40)), 50).shape == (30, 40)
    assert preview(tmp_path, coded(gradient(2, 3000)), 50).shape == (1, 50)


def test_a_preview_of_a_very_long_strip_is_still_a_jpeg(tmp_path):
    assert preview(tmp_path, coded(gradient(70_000, 20)), 50).shape[0] <= 65_500


def test_a_preview_is_upright_of_eight_bits_and_on_white(tmp_path):
    clear = np.zeros((30, 40, 4), np.uint16)
    got = preview(tmp_path, with_chunk(coded(clear), b"eXIf", exif(6)), 20)
    assert got.shape == (27, 20) and got.dtype == np.uint8 and got.min() >= 253


def test_without_a_readable_page_there_is_no_preview(tmp_path):
    with pytest.raises(pages.PageError):
        preview(tmp_path, b"no image", 50)
    assert not (tmp_path / "previews").exists()
