"""TIFF, AVIF and JPEG XL: files by Pillow, libavif's and libjxl's own programs, and their damaged kin."""

from __future__ import annotations

import importlib.util
import io
import shutil
import struct
import subprocess
import time
import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from drawn import alpha, colour, grey, sixteen_bit
from helpers import require

import storage
from engine import imagekinds, pages
from engine.pages import Pixels
from messages import Limits, Params

LIMITS = Limits()
COLOUR = colour(60, 40)


def decode(data: bytes, **limits: Any) -> Pixels:
    return pages.decode(data, 1, Limits(**limits))


def saved(pixels: Pixels, form: str, **options: Any) -> bytes:
    """By Pillow."""
    require(importlib.util.find_spec("PIL"), "Pillow is not installed")
    from PIL import Image

    order = {2: slice(None), 3: (..., slice(None, None, -1))}[pixels.ndim]
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        order = (..., [2, 1, 0, 3])
    image = Image.fromarray(np.ascontiguousarray(pixels[order]))
    image = image.convert(options.pop("mode", image.mode))
    if "orientation" in options:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = options.pop("orientation")
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def srgb() -> bytes:
    require(importlib.util.find_spec("PIL"), "Pillow is not installed")
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def far(got: Pixels, wanted: Pixels) -> float:
    assert got.shape == wanted.shape
    return float(np.abs(got.astype(int) - wanted).mean())


def refusal(data: bytes, **limits: Any) -> str:
    with pytest.raises(pages.PageError) as caught:
        decode(data, **limits)
    return str(caught.value)


# ---------------------------------------------------------------- TIFF
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("page", [COLOUR, grey(60, 40), sixteen_bit(grey(36, 44))], ids=range(3))
def test_a_tiff_comes_back_pixel_for_pixel(page, compression):
    assert np.array_equal(decode(saved(page, "TIFF", compression=compression)), page)


def test_a_tiffs_alpha_does_not_darken_its_colours():
    page = alpha(36, 44)
    got = decode(saved(page, "TIFF"))
    assert np.array_equal(got[..., 3], page[..., 3])
    seen = page[..., 3] >= 128
    assert np.abs(got[seen].astype(int) - page[seen]).max() <= 1


def test_bilevel_palette_and_ink_tiffs_show_what_they_show_elsewhere():
    lines = np.where(grey(60, 40) > 128, 255, 0).astype(np.uint8)
    for compression in (None, "group4"):
        assert np.array_equal(decode(saved(lines, "TIFF", mode="1", compression=compression)), lines)
    assert far(decode(saved(COLOUR, "TIFF", mode="P")), COLOUR) < 20
    assert far(decode(saved(COLOUR, "TIFF", mode="CMYK")), COLOUR) < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiffs_orientation_is_applied_once(orientation):
    got = decode(saved(COLOUR, "TIFF", tiffinfo={274: orientation}))
    assert np.array_equal(got, pages.orient(COLOUR, orientation))


def test_of_several_images_in_a_tiff_the_first_counts():
    require(importlib.util.find_spec("PIL"), "Pillow is not installed")
    from PIL import Image

    data, first = io.BytesIO(), Image.fromarray(grey(60, 40))
    first.save(data, "TIFF", save_all=True, append_images=[Image.fromarray(grey(10, 10))])
    assert np.array_equal(decode(data.getvalue()), grey(60, 40))


def test_tiffs_of_other_samples_are_named():
    for mode in ("F", "I"):
        assert "8 or 16 bits" in refusal(saved(grey(60, 40), "TIFF", mode=mode))


def test_a_tiff_cut_anywhere_is_a_page_error():
    data = saved(COLOUR, "TIFF", compression="tiff_lzw")
    for size in range(8, len(data), 97):
        assert "cut off" in refusal(data[:size])


def tiff_with(entries: list[tuple[int, int, int, int]], rest: bytes = b"") -> bytes:
    """A TIFF of nothing but a directory: (tag, type, count, value) of each entry."""
    fields = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4) + rest


def raw_tiff(page: Pixels, photometric: int, bits: int, planes: int = 1, order: str = "<") -> bytes:
    """A TIFF of these samples as they are; planes: 3 where each colour has a strip of its own."""
    height, width = page.shape[:2]
    samples = 1 if page.ndim == 2 else page.shape[2]
    stored = np.packbits(page, axis=1) if bits == 1 else page.astype(f"{order}u{bits // 8}")
    data = (np.moveaxis(stored, 2, 0) if planes > 1 else stored).tobytes()
    entries = [(256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * samples), (259, 3, [1])]
    entries += [(262, 3, [photometric]), (277, 3, [samples]), (278, 4, [height])]
    entries += [(279, 4, [len(data) // planes] * planes), (284, 3, [2 if planes > 1 else 1])]
    begin = 512  # the directory and its lists lie before it
    entries.append((273, 4, [begin + n * (len(data) // planes) for n in range(planes)]))
    fields, lists, at = b"", b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, values in sorted(entries):
        value = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(value) > 4:
            lists, value = lists + value, struct.pack(f"{order}I", at + len(lists))
        fields += struct.pack(f"{order}HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    mark = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    return (mark + fields + bytes(4) + lists).ljust(begin, b"\0") + data


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("white_is_zero", [True, False])
def test_a_tiff_whose_zero_is_white_is_no_negative(bits, white_is_zero, order):
    lines = (grey(60, 40) > 128).astype(np.uint8)
    page = {1: lines * 255, 8: grey(60, 40), 16: sixteen_bit(grey(60, 40))}[bits]
    samples = lines if bits == 1 else page
    samples = 2**bits - 1 - samples if white_is_zero else samples
    assert np.array_equal(decode(raw_tiff(samples, int(not white_is_zero), bits, order=order)), page)


@pytest.mark.parametrize("order", ["<", ">"])
def test_colours_in_separate_planes_of_a_tiff_are_right_or_refused(order):
    deep = sixteen_bit(COLOUR)
    assert np.array_equal(decode(raw_tiff(COLOUR[..., ::-1], 2, 8, 3, order)), COLOUR)
    assert np.array_equal(decode(raw_tiff(deep[..., ::-1], 2, 16, 1, order)), deep)
    assert "save it with them interleaved, or with 8 bits" in refusal(
        raw_tiff(deep[..., ::-1], 2, 16, 3, order)
    )


def test_a_tiff_that_names_millions_of_pieces_takes_neither_memory_nor_time():
    rest, at = bytes(32 << 20), 8 + 2 + 12 * 3 + 4
    size = [(256, 4, 1, 40), (257, 4, 1, 30)]
    tracemalloc.start()
    with pytest.raises(ValueError, match="pieces"):
        imagekinds.tiff_facts(tiff_with([*size, (273, 3, 16 << 20, at)], rest))
    many = [*size, *[(tag, 3, 100_000, 0) for tag in (273, 279)] * 10_000]
    started_s = time.process_time()
    facts = imagekinds.tiff_facts(tiff_with(many, bytes(1 << 20)))
    assert time.process_time() - started_s < 10  # it took some seconds a hundred
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (facts.width, facts.height) == (40, 30) and peak_bytes < 100 << 20


# ---------------------------------------------------------------- AVIF
def test_avif_by_pillow_and_by_libavif_shows_its_drawing(tmp_path):
    got = decode(saved(COLOUR, "AVIF", quality=100, subsampling="4:4:4"))
    assert far(got, COLOUR) < 1.5
    require(shutil.which("avifenc"), "avifenc is not installed")
    cv2.imwrite(str(tmp_path / "c.png"), COLOUR)
    cv2.imwrite(str(tmp_path / "g.png"), grey(60, 40))
    for name, page, depth in (
        ("c", COLOUR, 8),
        ("c", COLOUR, 10),
        ("c", COLOUR, 12),
        ("g", grey(60, 40), 10),
    ):
        command = [
            "avifenc",
            "-d",
            str(depth),
            "-y",
            "444",
            "--min",
            "0",
            "--max",
            "0",
            f"{name}.png",
            "o.avif",
        ]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        got = decode((tmp_path / "o.avif").read_bytes())
        assert got.dtype == (np.uint8 if depth == 8 else np.uint16)
        assert far(pages.to_eight_bit(got), page) < 1.5, (name, depth)


@pytest.mark.parametrize("depth", [8, 10, 12])
def test_an_avif_of_several_tiles_is_as_bright_as_its_drawing(depth, tmp_path):
    """Its primary item is the grid, which states no depth."""
    require(shutil.which("avifenc"), "avifenc is not installed")
    page = colour(128, 192)
    (tmp_path / "in.png").write_bytes(coded(page))
    flags = f"--grid 2x2 -d {depth} -y 444 --min 0 --max 0 in.png o.avif".split()
    subprocess.run(["avifenc", *flags], cwd=tmp_path, check=True, capture_output=True)
    data = (tmp_path / "o.avif").read_bytes()
    assert b"grid" in data and far(pages.to_eight_bit(decode(data)), page) < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_turned_and_mirrored_as_its_boxes_say(orientation):
    data = saved(COLOUR, "AVIF", quality=100, subsampling="4:4:4", orientation=orientation)
    assert far(decode(data), pages.orient(COLOUR, orientation)) < 1.5


def test_alpha_of_an_avif_is_kept():
    page = alpha(36, 44)
    got = decode(saved(page, "AVIF", quality=100, subsampling="4:4:4"))
    assert far(got[..., 3], page[..., 3]) < 2


def test_a_cut_avif_is_a_page_error():
    data = saved(COLOUR, "AVIF")
    for size in range(12, len(data), 61):
        assert refusal(data[:size])


# ---------------------------------------------------------------- JPEG XL
def jxl(tmp_path: Path, source: bytes, suffix: str, *flags: str) -> bytes:
    """By cjxl."""
    require(shutil.which("cjxl"), "cjxl is not installed")
    require(importlib.util.find_spec("pillow_jxl"), "pillow-jxl-plugin is not installed")
    (tmp_path / f"in{suffix}").write_bytes(source)
    command = ["cjxl", f"in{suffix}", "out.jxl", "--quiet", *flags]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return (tmp_path / "out.jxl").read_bytes()


def coded(page: Pixels, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, page)[1].tobytes()


@pytest.mark.parametrize(
    "page", [COLOUR, grey(48, 64), grey(40, 40), alpha(36, 44), sixteen_bit(grey(36, 44))], ids=range(5)
)
def test_a_jpeg_xl_comes_back_pixel_for_pixel(page, tmp_path):
    data = jxl(tmp_path, coded(page), ".png", "-d", "0")
    assert pages.header_size(data) == (page.shape[1], page.shape[0])
    assert np.array_equal(decode(data), page)
    boxed = jxl(tmp_path, coded(page), ".png", "-d", "0", "--container=1")
    assert boxed[:2] == b"\0\0" and np.array_equal(decode(boxed), page)


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize("flags", [["-d", "0", "-j", "0"], ["-j", "1"]], ids=["pixels", "packed JPEG"])
def test_the_orientation_of_a_jpeg_xl_is_applied_once(orientation, flags, tmp_path):
    source = saved(COLOUR, "JPEG", quality=95, orientation=orientation)
    got = decode(jxl(tmp_path, source, ".jpg", *flags))
    assert far(got, decode(source)) < 1.5


def test_a_grey_jpeg_xl_keeps_its_alpha(tmp_path):
    source = saved(alpha(36, 44), "PNG", mode="LA")
    assert np.array_equal(decode(jxl(tmp_path, source, ".png", "-d", "0")), decode(source))


def test_a_jpeg_xl_of_other_samples_is_named():
    require(importlib.util.find_spec("pillow_jxl"), "pillow-jxl-plugin is not installed")
    importlib.import_module("pillow_jxl")  # it registers itself
    assert "of the kind F" in refusal(saved(grey(60, 40), "JXL", mode="F"))


def test_a_cut_jpeg_xl_is_a_page_error(tmp_path):
    data = jxl(tmp_path, coded(COLOUR), ".png", "-d", "0")
    for size in range(3, len(data), 397):
        assert refusal(data[:size])


def test_without_the_extra_the_error_of_a_jpeg_xl_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_jxl", None)
    small = (1 << 0 | 4 << 1 | 1 << 6).to_bytes(2, "little")  # 40x40
    assert 'pip install ".[formats]"' in refusal(b"\xff\x0a" + small + bytes(20))


# ---------------------------------------------------------------- all of them
def bombs() -> dict[str, bytes]:
    """Headers that state 60,000 x 60,000 pixels, with next to nothing behind them."""
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in ((256, 60_000), (257, 60_000)))
    tiff = b"II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    fields = 2 << 1 | (60_000 - 1) << 3 | 1 << 21  # not small; 18 bits; as wide as high
    jxl_head = b"\xff\x0a" + fields.to_bytes(16, "little")
    avif = bytearray(saved(grey(60, 40), "AVIF"))
    at = avif.find(b"ispe") + 8
    avif[at : at + 8] = struct.pack(">II", 60_000, 60_000)
    return {"tiff": tiff, "jxl": jxl_head, "avif": bytes(avif)}


@pytest.mark.parametrize("kind", ["tiff", "jxl", "avif"])
def test_a_bomb_is_refused_by_its_header(kind, monkeypatch):
    data = bombs()[kind]
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    monkeypatch.setattr(imagekinds, "decode_jxl", lambda *_: pytest.fail("it was decoded"))
    assert pages.header_size(data) == (60_000, 60_000)
    assert "over the limit of 100000000" in refusal(data)


def test_a_decoder_that_shows_another_size_than_was_checked_is_not_believed(monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: grey(60, 41))
    assert "damaged" in refusal(saved(COLOUR, "AVIF"))


@pytest.mark.parametrize("form", ["TIFF", "AVIF"])
def test_profiles_go_with_the_page(form):
    profile = srgb()
    page = pages.decode_page(saved(COLOUR, form, icc_profile=profile), Params(), LIMITS)
    assert page.profile == profile


@pytest.mark.parametrize("form", ["TIFF", "AVIF"])
def test_any_byte_changed_gives_a_page_or_a_page_error(form):
    data = saved(COLOUR, form)
    for at in range(0, len(data), max(1, len(data) // 150)):
        changed = bytearray(data)
        changed[at] ^= 0x55
        try:
            decode(bytes(changed))
        except pages.PageError as error:
            assert str(error)


# ---------------------------------------------------------------- output
def encode(pixels: Pixels, quality: int, profile: bytes | None = None) -> bytes:
    data, suffix, deviation = pages.encode(
        pixels, Params(output_format="avif", jpeg_quality=quality), profile
    )
    assert (suffix, deviation, storage.sniff(data)) == (".avif", None, "avif")
    return data


@pytest.mark.parametrize("page", [COLOUR, grey(60, 40)], ids=["colour", "grey"])
def test_avif_at_100_is_lossless_and_below_is_near(page):
    assert np.array_equal(decode(encode(page, 100)), page)
    smooth = cv2.GaussianBlur(page, (0, 0), 4)
    assert far(decode(encode(smooth, 90)), smooth) < 3
    assert encode(page, 90) == encode(page, 90)


def test_an_avif_keeps_its_profile_and_its_alpha():
    profile, page = srgb(), alpha(36, 44)
    back = pages.decode_page(encode(page, 100, profile), Params(color="keep"), LIMITS)
    assert back.profile == profile and np.array_equal(back.pixels[..., 3], page[..., 3])
    from PIL import Image

    with Image.open(io.BytesIO(encode(page, 100, profile))) as other:
        assert other.info["icc_profile"] == profile and other.size == (44, 36)


def test_what_avif_cant_hold_is_written_as_png_and_says_so(monkeypatch):
    params = Params(output_format="avif")
    data, suffix, why = pages.encode(np.zeros((32_769, 2), np.uint8), params)
    assert (suffix, storage.sniff(data)) == (".png", "png")
    assert why == "written as png: 32769 px is over the 32768 px that avif allows"
    monkeypatch.setitem(pages.PIXEL_LIMITS, "avif", 99)
    _, suffix, why = pages.encode(np.zeros((10, 10), np.uint8), params)
    assert (suffix, why) == (".png", "written as png: 100 pixels are over the 99 that avif allows")
