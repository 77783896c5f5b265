"""A page's bytes to pixels and back: codecs, orientation, channels, grain.

Map: errors - header checks - decode - colour and depth - grain - encode - previews
Rule: the header decides whether a page may be decoded at all; nothing of networks here.
Runs in: the worker's decode and encode threads; the command line.

Pixels are numpy arrays: (H, W) grey, (H, W, 3) BGR or (H, W, 4) BGRA, uint8 or uint16.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

import storage
from messages import Limits, Params, setting_name

Pixels = npt.NDArray[Any]  # uint8 or uint16, see above

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# The most that a format's own fields can say, in pixels of one side.
# OpenCV refuses JPEG over 65,500 although the format itself has 65,535.
SIDE_LIMITS = {"jpg": 65_500, "webp": 16_383, "png": 2**31 - 1}
# A lossy WebP or a colour conversion leaves a grey page's channels one level apart here and
# there, and 0.05 in the mean (measured); the faintest tint moves some pixel by two.
GREY_SPREAD = 1.0  # 8-bit levels
GREY_CAST = 0.25  # 8-bit levels
GRAIN_STRENGTH = 6.0  # 8-bit levels; the noise that a JPEG of quality 75 or a scan has
ALPHA_CHANNELS = 4


class PageError(Exception):
    """A page that can't be decoded, computed or encoded; says what is wrong with it."""


# ---------------------------------------------------------------- header checks
def image_kind(data: bytes) -> str:
    """Which of the formats read here `data` is, by content. Raises PageError."""
    kind = storage.sniff(data)
    if kind in HEADER_SIZES:
        return kind
    if not data:
        raise PageError("the file is empty")
    known = f"it is {kind}" if kind else "unknown content"
    raise PageError(f"not an image that can be read ({known}); expected JPEG, PNG, WebP, BMP or GIF")


def header_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels as the header says, nothing decoded. Raises PageError."""
    kind = image_kind(data)
    try:
        width, height = HEADER_SIZES[kind](data)
    except (struct.error, IndexError, ValueError) as error:
        raise PageError(f"the {kind.upper()} header is cut off") from error
    if width <= 0 or height <= 0:
        raise PageError(f"the {kind.upper()} header says {width}x{height} pixels")
    return width, height


def _png_size(data: bytes) -> tuple[int, int]:
    return struct.unpack_from(">ii", data, 16)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    while True:
        # As libjpeg looks for markers, byte for byte: were another one seen here than
        # there, a file could show this check a small size and the decoder a huge one.
        at = data.index(b"\xff", at)
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD7:  # stuffing, TEM, RSTn: no length follows
            continue
        if marker in (0xD8, 0xD9, 0xDA):
            raise PageError("the JPEG has no frame header before its data")
        # SOF0..SOF15, less DHT (C4), JPG (C8) and DAC (CC): the frame header (ITU T.81, B.1.1.3)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 3)
            return width, height
        at += max(2, struct.unpack_from(">H", data, at)[0])


def _webp_size(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _bmp_size(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:  # the header of OS/2 1.x
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)  # negative: rows from top to bottom


def _gif_size(data: bytes) -> tuple[int, int]:
    return struct.unpack_from("<HH", data, 6)


HEADER_SIZES: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "png": _png_size,
    "jpeg": _jpeg_size,
    "webp": _webp_size,
    "bmp": _bmp_size,
    "gif": _gif_size,
}


def check_size(data: bytes, scale: int, limits: Limits) -> None:
    """Refuse from the header what would not fit in memory. Raises PageError."""
    width, height = header_size(data)
    pixels = width * height
    if pixels > limits.page_pixels:
        raise PageError(
            f"{width}x{height} are {pixels} pixels, over the limit of {limits.page_pixels} a page "
            f"({setting_name('page_pixels')})"
        )
    if pixels * scale * scale > limits.output_pixels:
        raise PageError(
            f"{width}x{height} at scale {scale} would be {pixels * scale * scale} pixels, over the limit of "
            f"{limits.output_pixels} ({setting_name('output_pixels')}); use a smaller scale"
        )


# ---------------------------------------------------------------- decode
def decode(data: bytes, scale: int, limits: Limits) -> Pixels:
    """A page's pixels, upright, as few channels as they need.

    EXIF orientation is applied once; of animations the first frame counts; opaque alpha
    and the colour of grey pages (see fewest_channels) are dropped. Raises PageError, also
    for a page that ends early: half a page is no page.
    """
    return decode_scored(data, scale, limits)[0]


def decode_scored(data: bytes, scale: int, limits: Limits) -> tuple[Pixels, float]:
    """decode()'s pixels, and how far the page's channels were apart: see colour_spread."""
    pixels = _decode_upright(data, scale, limits)
    return fewest_channels(pixels), colour_spread(pixels)


def _decode_upright(data: bytes, scale: int, limits: Limits) -> Pixels:
    check_size(data, scale, limits)
    try:
        pixels, kinds, blocks = cv2.imdecodeWithMetadata(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise PageError(f"the decoder refused it: {error.err or 'damaged data'}") from error
    if pixels is None:
        raise PageError(f"the {image_kind(data).upper()} data is damaged or cut off")
    pixels = _with_transparent_grey(pixels, data)
    for kind, block in zip(kinds, blocks, strict=False):
        if kind == cv2.IMAGE_METADATA_EXIF:
            pixels = orient(pixels, exif_orientation(bytes(block.reshape(-1).view(np.uint8))))
    return pixels


def _with_transparent_grey(pixels: Pixels, data: bytes) -> Pixels:
    """Alpha for a grey PNG that names one value transparent (tRNS), which OpenCV leaves out."""
    if pixels.ndim != 2 or storage.sniff(data) != "png" or data[25] != 0:  # 25: IHDR's colour type
        return pixels
    at = 8
    while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IDAT":
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"tRNS" and size == 2:
            depth = data[24]
            value = struct.unpack_from(">H", data, at + 8)[0] * (255 // (2**depth - 1) if depth < 8 else 1)
            white = levels(pixels)
            alpha = np.where(pixels == value, 0, white).astype(pixels.dtype)
            return np.dstack([pixels, pixels, pixels, alpha])
        at += 12 + size
    return pixels


def exif_orientation(exif: bytes) -> int:
    """The orientation (1..8) that an EXIF block states; 1 where it states none.

    Reads the first directory only (EXIF 2.32, 4.6.4: tag 0x0112, a SHORT).
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        start = struct.unpack_from(order + "I", tiff, 4)[0]
        count = struct.unpack_from(order + "H", tiff, start)[0]
        for i in range(min(count, 512)):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * i)
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # a garbled block says nothing
    return 1


def orient(pixels: Pixels, orientation: int) -> Pixels:
    """Pixels turned upright: the eight EXIF orientations."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# ---------------------------------------------------------------- colour and depth
def channels(pixels: Pixels) -> int:
    """1, 3 or 4."""
    return 1 if pixels.ndim == 2 else pixels.shape[2]


def levels(pixels: Pixels) -> int:
    """The value of white: 255 or 65535, by dtype and never by content."""
    return 65_535 if pixels.dtype == np.uint16 else 255


def colour_spread(pixels: Pixels) -> float:
    """The largest difference between two channels of one pixel, in 8-bit levels; 0 for grey."""
    if channels(pixels) < 3:
        return 0.0
    blue, green, red = cv2.split(pixels)[:3]
    apart = cv2.max(cv2.max(cv2.absdiff(blue, green), cv2.absdiff(green, red)), cv2.absdiff(blue, red))
    return float(apart.max()) * 255 / levels(pixels)


def is_grey(pixels: Pixels) -> bool:
    """Whether (H, W, 3+) channels are equal but for roundings, without a cast of any colour."""
    if colour_spread(pixels) > GREY_SPREAD:
        return False
    means = np.array(cv2.mean(pixels)[:3]) * 255 / levels(pixels)
    return float(means.max() - means.min()) <= GREY_CAST


def fewest_channels(pixels: Pixels) -> Pixels:
    """Drop alpha that is opaque everywhere, and the colour of a page that is_grey()."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if channels(pixels) == ALPHA_CHANNELS and bool((pixels[..., 3] == levels(pixels)).all()):
        pixels = pixels[..., :3]
    if channels(pixels) == 3 and is_grey(pixels):
        pixels = pixels[..., 1]
    return np.ascontiguousarray(pixels)


def flatten(pixels: Pixels) -> Pixels:
    """Alpha over white paper; unchanged without alpha."""
    if channels(pixels) != ALPHA_CHANNELS:
        return pixels
    white = levels(pixels)
    alpha = pixels[..., 3:].astype(np.float32) / white
    flat = pixels[..., :3] * alpha + white * (1 - alpha)
    return fewest_channels(np.rint(flat).astype(pixels.dtype))


def to_eight_bit(pixels: Pixels) -> Pixels:
    """uint16 rounded to uint8 (65535 -> 255); uint8 as it is."""
    if pixels.dtype == np.uint8:
        return pixels
    return ((pixels.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)


# ---------------------------------------------------------------- grain
def clean(pixels: Pixels) -> Pixels:
    """An 8-bit page without its grain, edges and screentone kept.

    Non-local means (Buades, Coll, Morel 2005): it averages patches that look alike, so a
    screentone's dots, which repeat, stay; what repeats nowhere is noise.
    """
    strength = GRAIN_STRENGTH
    if channels(pixels) == 1:
        return cv2.fastNlMeansDenoising(pixels, None, strength, 5, 15)
    colour = cv2.fastNlMeansDenoisingColored(
        np.ascontiguousarray(pixels[..., :3]), None, strength, strength, 5, 15
    )
    return np.dstack([colour, pixels[..., 3]]) if channels(pixels) == ALPHA_CHANNELS else colour


def grain(pixels: Pixels) -> npt.NDArray[np.int16]:
    """What clean() would take away from an 8-bit page: (H, W[, C]) int16."""
    return pixels.astype(np.int16) - clean(pixels)


# ---------------------------------------------------------------- encode
def encode(pixels: Pixels, params: Params) -> tuple[bytes, str, str | None]:
    """(bytes, suffix, deviation): an 8-bit page in the asked format.

    A side over the format's limit falls back to PNG, and deviation says so.
    JPEG is 4:4:4 from quality 90 on, since chroma subsampling smears coloured line art;
    WebP at 100 is lossless. Raises PageError.
    """
    side = max(pixels.shape[:2])
    wanted = params.output_format
    actual = wanted if side <= SIDE_LIMITS[wanted] else "png"
    if actual == "jpg":
        pixels = flatten(pixels)
    settings = {
        "jpg": [
            *(cv2.IMWRITE_JPEG_QUALITY, params.jpeg_quality),
            *(cv2.IMWRITE_JPEG_OPTIMIZE, 1),
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
            if params.jpeg_quality >= 90
            else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
        ],
        "png": [cv2.IMWRITE_PNG_COMPRESSION, 6],
        # OpenCV's own convention: over 100 means lossless.
        "webp": [cv2.IMWRITE_WEBP_QUALITY, 101 if params.jpeg_quality == 100 else params.jpeg_quality],
    }[actual]
    try:
        done, data = cv2.imencode(f".{actual}", pixels, settings)
    except cv2.error as error:
        raise PageError(f"the {actual} encoder refused it: {error.err}") from error
    if not done or not data.size:
        raise PageError(f"the {actual} encoder gave nothing for {pixels.shape[1]}x{pixels.shape[0]} pixels")
    why = f"written as png: {side} px is over the {SIDE_LIMITS[wanted]} px that {wanted} allows"
    return data.tobytes(), f".{actual}", None if actual == wanted else why


# ---------------------------------------------------------------- previews
def write_preview(source: Path, target: Path, width: int, limits: Limits) -> None:
    """A JPEG of `source`, at most `width` pixels wide. Raises PageError, OSError."""
    pixels = to_eight_bit(flatten(decode(source.read_bytes(), 1, limits)))
    height = pixels.shape[0]
    # A strip may be over JPEG's own limit at any width.
    factor = min(width / pixels.shape[1], SIDE_LIMITS["jpg"] / height)
    if factor < 1:
        size = (max(1, round(pixels.shape[1] * factor)), max(1, round(height * factor)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    data, _, _ = encode(pixels, Params(output_format="jpg", jpeg_quality=85))
    storage.write_whole(target, data)
