"""TIFF, AVIF and JPEG XL: what their headers say, since OpenCV tells less of them than of other formats.

Map: Facts - TIFF - AVIF - JPEG XL
Rule: sizes come from the header, before anything is decoded; struct.error, IndexError or ValueError
mean that it is cut off.
Runs in: the worker's decode threads; the command line. Pillow and its plugin (extra `formats`) are imported
where the first JPEG XL is decoded.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file says of its pixels: their size as stored, and how they are meant."""

    width: int
    height: int
    turns: tuple[int, ...] = ()  # EXIF orientations to be applied one after the other
    profile: bytes | None = None  # ICC
    depth: int = 8  # bits a sample, where the decoder does not scale them
    turn_at: int = 0  # where a TIFF states its orientation, see unturned()
    end: int = 0  # where its pixels' bytes end, where the header says so
    is_negative: bool = False  # a TIFF whose 0 is white
    is_planar: bool = False  # a TIFF whose colours lie one behind the other


# ---------------------------------------------------------------- TIFF
TIFF_TYPES = {3: "H", 4: "I"}  # SHORT, LONG
PIECES_MOST = 1 << 20  # strips or tiles; 100 megapixels in the smallest tiles are 390,000
PIECES = (273, 279, 324, 325)  # offsets and sizes of strips, of tiles
NO_PIECES = np.zeros(0, np.int64)
WIDTH, HEIGHT, PHOTOMETRIC, ORIENTATION, PLANAR, PROFILE = 256, 257, 262, 274, 284, 34_675


def tiff_facts(data: bytes) -> Facts:
    """Of the first image (TIFF 6.0, sections 2 and 8; ICC.1:2022, B.4)."""
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", data, 4)[0]
    count = struct.unpack_from(order + "H", data, start)[0]
    numbers: dict[int, int] = {}
    lists: dict[int, npt.NDArray[Any]] = {}
    profile, turn_at = None, 0
    for n in range(count):
        at = start + 2 + 12 * n
        tag, kind, values = struct.unpack_from(order + "HHI", data, at)
        if tag in lists or (tag == PROFILE and profile is not None):
            continue  # a directory may hold it 65,535 times
        if tag == PROFILE:
            place = struct.unpack_from(order + "I", data, at + 8)[0]
            profile = data[place : place + values]
        elif kind in TIFF_TYPES and tag in PIECES:
            form = np.dtype(order + TIFF_TYPES[kind])
            if values > PIECES_MOST:
                raise ValueError(f"it is said to consist of {values} pieces")
            place = at + 8
            if form.itemsize * values > 4:  # what does not fit stands elsewhere
                place = struct.unpack_from(order + "I", data, place)[0]
            lists[tag] = np.frombuffer(data, form, values, place).astype(np.int64)
        elif kind in TIFF_TYPES:
            turn_at = at + 8 if tag == ORIENTATION else turn_at
            numbers[tag] = struct.unpack_from(order + TIFF_TYPES[kind], data, at + 8)[0]
    turn = numbers.get(ORIENTATION, 1)
    turns = (turn,) if 1 < turn <= 8 else ()
    starts = lists.get(273, lists.get(324, NO_PIECES))
    sizes = lists.get(279, lists.get(325, NO_PIECES))
    both = min(len(starts), len(sizes))
    end = int((starts[:both] + sizes[:both]).max(initial=0))
    return Facts(
        numbers.get(WIDTH, 0),
        numbers.get(HEIGHT, 0),
        turns,
        profile,
        turn_at=turn_at,
        end=end,
        is_negative=numbers.get(PHOTOMETRIC) == 0,
        is_planar=numbers.get(PLANAR) == 2,
    )


def unturned(data: bytes, facts: Facts) -> bytes:
    """A TIFF that states no orientation: OpenCV applies some of them, and halves of others."""
    if not facts.turn_at:
        return data
    return data[: facts.turn_at] + (b"\1\0" if data[:2] == b"II" else b"\0\1") + data[facts.turn_at + 2 :]


def without_premultiplied(pixels: Pixels) -> Pixels:
    """(H, W, 4) uint8 whose colours libtiff's RGBA interface multiplied by their alpha, as they were."""
    alpha = pixels[..., 3:].astype(np.uint32)
    colours = (pixels[..., :3].astype(np.uint32) * 255 + alpha // 2) // np.maximum(alpha, 1)
    plain: Pixels = np.dstack([np.minimum(colours, 255), alpha]).astype(np.uint8)
    return plain


# ---------------------------------------------------------------- AVIF
def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end of the content) of the boxes of an ISO media file (ISO/IEC 14496-12, 4.2)."""
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            size, head = struct.unpack_from(">Q", data, at + 8)[0], 16
        stop = end if size == 0 else at + size
        if stop < at + head or stop > end:
            raise ValueError("a box is longer than what holds it")
        yield kind, at + head, stop
        at = stop


def _box(data: bytes, wanted: bytes, at: int, end: int) -> tuple[int, int]:
    """(start, end of the content) of the first box of a type. Raises ValueError."""
    for kind, start, stop in _boxes(data, at, end):
        if kind == wanted:
            return start, stop
    raise ValueError("a box is missing")


def avif_facts(data: bytes) -> Facts:
    """Of the primary item (HEIF, ISO/IEC 23008-12, 6.5 and 9.3; AV1-ISOBMFF, 2.3).

    The size is the largest that any item has: tiles and alpha are decoded too. A grid's depth is the
    deepest of any: only its tiles state one.
    """
    start, end = _box(data, b"meta", 0, len(data))
    start += 4
    place, _ = _box(data, b"pitm", start, end)
    primary = struct.unpack_from(">I" if data[place] else ">H", data, place + 4)[0]
    place, stop = _box(data, b"iprp", start, end)
    owners, owners_end = _box(data, b"ipma", place, stop)
    properties = list(_boxes(data, *_box(data, b"ipco", place, stop)))
    sizes = [struct.unpack_from(">II", data, at + 4) for kind, at, _ in properties if kind == b"ispe"]
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    turns: list[int] = []
    depth = max((_av1_depth(data, at) for kind, at, _ in properties if kind == b"av1C"), default=8)
    profile = None
    for n in _properties_of(data, owners, owners_end, primary):
        kind, at, stop = properties[n - 1]
        if kind == b"irot" and data[at] & 3:
            turns.append((8, 3, 6)[(data[at] & 3) - 1])  # quarters, anticlockwise
        elif kind == b"imir":
            turns.append(2 if data[at] & 1 else 4)
        elif kind == b"colr" and data[at : at + 4] in (b"prof", b"rICC"):
            profile = data[at + 4 : stop]
        elif kind == b"av1C":
            depth = _av1_depth(data, at)
    return Facts(width, height, tuple(turns), profile, depth)


def _av1_depth(data: bytes, at: int) -> int:
    """Bits a sample, by the content of an av1C (AV1-ISOBMFF, 2.3.3: high_bitdepth, twelve_bit)."""
    if not data[at + 2] & 0x40:
        return 8
    return 12 if data[at + 2] & 0x20 else 10


def _properties_of(data: bytes, at: int, end: int, item: int) -> list[int]:
    """The numbers (from 1) of an item's properties, in their order."""
    version, wide = data[at], data[at + 3] & 1
    count = struct.unpack_from(">I", data, at + 4)[0]
    at += 8
    for _ in range(count):
        owner = struct.unpack_from(">I" if version else ">H", data, at)[0]
        at += 4 if version else 2
        form, mask = (">H", 0x7FFF) if wide else (">B", 0x7F)
        step = struct.calcsize(form)
        if at >= end:
            raise ValueError("cut off")
        held = [struct.unpack_from(form, data, at + 1 + step * n)[0] & mask for n in range(data[at])]
        at += 1 + step * data[at]
        if owner == item:
            return [number for number in held if number]
    return []


# ---------------------------------------------------------------- JPEG XL
RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
U32_BITS = (9, 13, 18, 30)


def jxl_facts(data: bytes) -> Facts:
    """The size alone (ISO/IEC 18181-1, SizeHeader): its decoder sees to the rest."""
    at = 0
    if data[:2] != b"\xff\x0a":
        for kind, start, _ in _boxes(data, 12, len(data)):
            if kind in (b"jxlc", b"jxlp"):
                at = start + (4 if kind == b"jxlp" else 0)
                break
    if data[at : at + 2] != b"\xff\x0a":
        raise ValueError("no codestream")
    bits, used = int.from_bytes(data[at + 2 : at + 18], "little"), 0
    if len(data) < at + 14:
        raise ValueError("cut off")

    def take(n: int) -> int:
        nonlocal used
        value = bits >> used & ((1 << n) - 1)
        used += n
        return value

    def side(small: int) -> int:
        return (take(5) + 1) * 8 if small else take(U32_BITS[take(2)]) + 1

    small = take(1)
    height = side(small)
    ratio = take(3)
    width = height * RATIOS[ratio - 1][0] // RATIOS[ratio - 1][1] if ratio else side(small)
    return Facts(width, height)


class PluginMissing(Exception):
    """The extra that reads JPEG XL is not installed."""


def decode_jxl(data: bytes) -> tuple[Pixels, bytes | None, bytes | None]:
    """(pixels, ICC profile, EXIF that still has to be applied). Raises PluginMissing, ValueError.

    A JPEG that was packed without loss comes back as that JPEG, not turned by its EXIF; all else
    libjxl has turned already.
    """
    try:
        import pillow_jxl  # noqa: F401 - registers itself
        from PIL import Image
    except ImportError as error:
        raise PluginMissing(f'JPEG XL needs: pip install ".[formats]" ({error})') from error
    try:
        with Image.open(io.BytesIO(data), formats=["JXL"]) as image:
            exif = image.info.get("exif") if getattr(image, "jpeg", False) else None
            profile = image.info.get("icc_profile")
            pixels = _pixels_of(image)
    # A binding to another language: what it raises for damaged data is no promise.
    except Exception as error:
        raise ValueError(str(error)) from error
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    return pixels, profile, exif


def _pixels_of(image: Any) -> Pixels:
    """(H, W), (H, W, 3) RGB or (H, W, 4) RGBA, uint8 or uint16, of an image of the JPEG XL plugin."""
    if image.mode in ("L", "RGB", "RGBA", "I;16"):
        return np.asarray(image).copy()
    if image.mode == "LA":
        return np.asarray(image.convert("RGBA")).copy()
    raise ValueError(f"samples of the kind {image.mode} are not read")


FACTS: dict[str, Callable[[bytes], Facts]] = {"tiff": tiff_facts, "avif": avif_facts, "jxl": jxl_facts}
