"""A page's bytes to pixels and back: codecs, orientation, channels, grain.

Map: errors - header checks - decode - colour profiles - colour and depth - size - grain -
     encode - previews
Rule: the header decides whether a page may be decoded at all; nothing of networks here.
Runs in: the worker's decode and encode threads; the command line.

Pixels are numpy arrays: (H, W) grey, (H, W, 3) BGR or (H, W, 4) BGRA, uint8 or uint16.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

import storage
from engine import imagekinds
from messages import Limits, Params, setting_name

Pixels = npt.NDArray[Any]  # uint8 or uint16, see above
Curve = npt.NDArray[np.float64]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# The most that a format's own fields can say, in pixels of one side.
# OpenCV refuses JPEG over 65,500 although the format itself has 65,535.
# AVIF: libavif, which OpenCV asks, refuses to read more, and more pixels than PIXEL_LIMITS.
SIDE_LIMITS = {"jpg": 65_500, "webp": 16_383, "avif": 32_768, "png": 2**31 - 1}
PIXEL_LIMITS = {"avif": 16_384 * 16_384}
# A lossy WebP or a colour conversion leaves a grey page's channels one level apart here and
# there, and 0.05 in the mean (measured); the faintest tint moves some pixel by two.
GREY_SPREAD = 1.0  # 8-bit levels
GREY_CAST = 0.25  # 8-bit levels
GRAIN_STRENGTH = 6.0  # 8-bit levels; the noise that a JPEG of quality 75 or a scan has
ALPHA_CHANNELS = 4
AVIF_SPEED = 8  # of 0..10: at 6 a page takes three times as long and is a few percent smaller
PDF_KINDS = ("jpeg", "png")  # that a PDF holds as they are
NETWORK_SCALE = 4  # the largest; what a page may need before it is reduced to its target


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
    raise PageError(f"not an image that can be read ({known}); expected {KNOWN_KINDS}")


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


def _size_by(facts_of: Callable[[bytes], imagekinds.Facts]) -> Callable[[bytes], tuple[int, int]]:
    def size(data: bytes) -> tuple[int, int]:
        facts = facts_of(data)
        return facts.width, facts.height

    return size


KNOWN_KINDS = "JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or JPEG XL"
HEADER_SIZES: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "png": _png_size,
    "jpeg": _jpeg_size,
    "webp": _webp_size,
    "bmp": _bmp_size,
    "gif": _gif_size,
    **{kind: _size_by(facts_of) for kind, facts_of in imagekinds.FACTS.items()},
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


def _largest_scale(data: bytes, params: Params) -> int:
    """At which a page may be computed, as far as its header tells. Raises PageError."""
    if not (params.has_target or params.reduces_in_light):
        return params.scale
    # Its pixels may lie turned; and a half of a spread may need the network where the whole does not.
    sizes = (header_size(data), header_size(data)[::-1])
    is_large = all(target_size(*size, params) <= size for size in sizes)
    return 1 if params.has_target and params.spreads != "split" and is_large else NETWORK_SCALE


# ---------------------------------------------------------------- decode
@dataclass(frozen=True, slots=True)
class Decoded:
    """A page ready for a network, and what its file says of its colours."""

    pixels: Pixels
    spread: float  # see colour_spread; of the file, before any conversion
    profile: bytes | None = None  # ICC, to be embedded in what is written


def decode(data: bytes, scale: int, limits: Limits) -> Pixels:
    """A page's pixels, upright, as few channels as they need.

    EXIF orientation is applied once; of animations the first frame counts; opaque alpha
    and the colour of grey pages (see fewest_channels) are dropped. Raises PageError, also
    for a page that ends early: half a page is no page.
    """
    return decode_page(data, Params(scale=scale), limits).pixels


def decode_page(data: bytes, params: Params, limits: Limits) -> Decoded:
    """decode() with the job's wishes for colour, and the profile that its colours are in."""
    check_size(data, _largest_scale(data, params), limits)
    pixels, block = _decode_upright(data)
    profile = whole_profile(block)
    spread = colour_spread(pixels)
    if params.color == "keep":
        return Decoded(drop_opaque_alpha(pixels), spread, fitting_profile(profile, pixels))
    fewest = to_grey(pixels) if params.color == "gray" else fewest_channels(pixels)
    if profile is None or fitting_profile(profile, fewest):
        return Decoded(fewest, spread, profile)
    # The profile speaks of three colours, or of one, and the page has another number now.
    curve = tone_curve(profile)
    if curve is not None:
        return Decoded(through_curve(fewest, curve), spread)
    if params.color == "gray":
        return Decoded(fewest, spread)
    return Decoded(drop_opaque_alpha(pixels), spread, fitting_profile(profile, pixels))


def stored(data: bytes) -> tuple[Pixels, dict[int, bytes]]:
    """(pixels as the file holds them, not turned; what stands beside them, by cv2.IMAGE_METADATA_...), of a
    kind that is not in imagekinds.FACTS. Raises PageError."""
    kind = image_kind(data)
    try:
        pixels, kinds, blocks = cv2.imdecodeWithMetadata(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise PageError(f"the decoder refused it: {error.err or 'damaged data'}") from error
    if pixels is None:
        raise PageError(f"the {kind.upper()} data is damaged or cut off")
    found = zip(kinds, blocks, strict=False)
    return pixels, {about: bytes(block.reshape(-1).view(np.uint8)) for about, block in found}


def _decode_upright(data: bytes) -> tuple[Pixels, bytes | None]:
    """(pixels, what stands in the place of an ICC profile, see whole_profile)."""
    kind = image_kind(data)
    if kind in imagekinds.FACTS:
        return _decode_by_facts(data, kind)
    pixels, found = stored(data)
    pixels = _with_transparent_grey(pixels, data)
    if kind == "bmp" and channels(pixels) == ALPHA_CHANNELS and not pixels[..., 3].any():
        pixels = np.ascontiguousarray(pixels[..., :3])  # 32 bits a pixel, of which 8 mean nothing
    pixels = orient(pixels, exif_orientation(found.get(cv2.IMAGE_METADATA_EXIF, b"")))
    return pixels, found.get(cv2.IMAGE_METADATA_ICCP)


def _decode_by_facts(data: bytes, kind: str) -> tuple[Pixels, bytes | None]:
    """_decode_upright() for the kinds of imagekinds.py."""
    facts = imagekinds.FACTS[kind](data)
    pixels: Pixels | None
    profile, exif = facts.profile, None
    try:
        if kind == "jxl":
            pixels, profile, exif = imagekinds.decode_jxl(data)
        else:
            plain = np.frombuffer(imagekinds.unturned(data, facts), np.uint8)
            pixels = cv2.imdecode(plain, cv2.IMREAD_UNCHANGED)
    except imagekinds.PluginMissing as error:
        raise PageError(str(error)) from error
    except (cv2.error, ValueError) as error:
        reason = getattr(error, "err", None) or str(error) or "damaged data"
        raise PageError(f"the decoder refused it: {reason}") from error
    # A decoder that went by another size than was checked has shown something else.
    fits = pixels is not None and sorted(pixels.shape[:2]) == sorted((facts.height, facts.width))
    if pixels is None or not fits or facts.end > len(data):
        raise PageError(f"the {kind.upper()} data is damaged or cut off")
    if pixels.dtype not in (np.uint8, np.uint16):
        samples = f"samples of the kind {pixels.dtype}"
        raise PageError(f"{kind.upper()} with {samples} is not read; save it with 8 or 16 bits")
    if pixels.dtype == np.uint16 and pixels.ndim == 3 and facts.is_planar:
        # OpenCV reads the first plane as if it held all colours.
        planes = "16-bit colours in separate planes"
        raise PageError(f"TIFF with {planes} is not read; save it with them interleaved, or with 8 bits")
    if pixels.dtype == np.uint16 and pixels.ndim == 2 and facts.is_negative:
        pixels = np.invert(pixels)  # OpenCV did that with fewer bits
    if pixels.dtype == np.uint16 and facts.depth > 8:
        white = 2**facts.depth - 1
        pixels = ((pixels.astype(np.uint32) * 65_535 + white // 2) // white).astype(np.uint16)
    if kind == "tiff" and channels(pixels) == ALPHA_CHANNELS and pixels.dtype == np.uint8:
        pixels = imagekinds.without_premultiplied(pixels)
    for turn in (*facts.turns, exif_orientation(exif) if exif else 1):
        pixels = orient(pixels, turn)
    return pixels, profile


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


# ---------------------------------------------------------------- colour profiles
def whole_profile(block: bytes | None) -> bytes | None:
    """The ICC profile in what a file has in its place; None if it isn't whole, or not of a page's colours.

    ICC.1:2022, 7.2: its length stands at byte 0, the data colour space at 16, "acsp" at 36. Of a JPEG OpenCV
    gives all APP2 segments: a phone's (MPF) lie before the profile, behind it, or are all there is. A CMYK
    profile is none any more: the decoder made RGB of such a page.
    """
    at = (block or b"").find(b"acsp") - 36
    if block is None or at < 0:
        return None
    size = int.from_bytes(block[at : at + 4])
    profile = block[at : at + size]
    is_whole = len(profile) == size >= 132
    return profile if is_whole and profile[16:20] in (b"GRAY", b"RGB ") else None


def fitting_profile(profile: bytes | None, pixels: Pixels) -> bytes | None:
    """The profile, if it describes an image of as many colours as these pixels have."""
    wanted = b"GRAY" if pixels.ndim == 2 else b"RGB "
    return profile if profile is not None and profile[16:20] == wanted else None


def tone_curve(profile: bytes) -> Curve | None:
    """(256,) what each 8-bit grey of this profile is in sRGB, 0..1; None if it can't be told.

    On the grey axis of a matrix profile, as of a grey one, all colours share one curve.
    """
    try:
        tags = [struct.unpack_from(">4sII", profile, 132 + 12 * i) for i in range(_u32(profile, 128))]
        places = {name: profile[at : at + size] for name, at, size in tags if name in TONE_TAGS}
        curves = [_light_of(place) for place in places.values()]
    except (struct.error, IndexError, ValueError, OverflowError):
        return None
    if profile[16:20] not in (b"GRAY", b"RGB ") or len(curves) not in (1, 3):
        return None
    if any(np.abs(curve - curves[0]).max() > 1e-3 for curve in curves):
        return None
    return to_srgb(np.clip(curves[0], 0, 1))


PARAMETERS = (1, 3, 4, 5, 7)  # of a parametric curve, by its kind
TONE_TAGS = (b"kTRC", b"rTRC", b"gTRC", b"bTRC")


def _u32(data: bytes, at: int) -> int:
    return min(int.from_bytes(data[at : at + 4]), 256)  # a garbled count reads no further


def _light_of(tag: bytes) -> Curve:
    """(256,) linear light of each grey, from a curveType or parametricCurveType (10.6, 10.18)."""
    x: Curve = np.arange(256) / 255
    if tag[:4] == b"curv":
        count = struct.unpack_from(">I", tag, 8)[0]
        table = np.frombuffer(tag, ">u2", count, 12)
        if count < 2:
            return np.power(x, float(table[0]) / 256 if count else 1.0)
        return np.interp(x, np.linspace(0, 1, count), table / 65_535)
    kind = struct.unpack_from(">H", tag, 8)[0]
    if tag[:4] != b"para" or kind > 4:
        raise ValueError("neither a curve nor a function of a known kind")
    given = np.frombuffer(tag, ">i4", PARAMETERS[kind], 12) / 65_536
    gamma, a, b, c, d, e, f = map(float, np.pad(given, (0, 7 - len(given))))
    if kind == 0:
        a = 1.0
    if kind < 3:  # no straight part: below where the power begins it is constant
        return np.power(np.maximum(a * x + b, 0), gamma) + c
    power = np.power(np.maximum(a * x + b, 0), gamma) + e
    return np.where(x >= d, power, c * x + f)


def as_srgb(page: Decoded) -> Decoded:
    """A grey page without its profile, where that has a tone curve; others as they are."""
    curve = tone_curve(page.profile) if page.profile and page.pixels.ndim == 2 else None
    return page if curve is None else replace(page, pixels=through_curve(page.pixels, curve), profile=None)


def through_curve(pixels: Pixels, curve: Curve) -> Pixels:
    """The colours of a page through a curve of 0..1; alpha stays. Rounded to the page's levels."""
    white = levels(pixels)
    steps = np.interp(np.linspace(0, 1, white + 1), np.linspace(0, 1, 256), curve)
    table = np.rint(steps * white).astype(pixels.dtype)
    if channels(pixels) == ALPHA_CHANNELS:
        return np.dstack([table[pixels[..., :3]], pixels[..., 3]])
    changed: Pixels = table[pixels]
    return changed


def to_srgb(light: Curve) -> Curve:
    """Linear light 0..1 -> sRGB 0..1 (IEC 61966-2-1)."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055)


def to_light(srgb: Curve) -> Curve:
    """sRGB 0..1 -> linear light 0..1."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((np.maximum(srgb, 0) + 0.055) / 1.055) ** 2.4)


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
    pixels = drop_opaque_alpha(pixels)
    if channels(pixels) == 3 and is_grey(pixels):
        pixels = pixels[..., 1]
    return np.ascontiguousarray(pixels)


def drop_opaque_alpha(pixels: Pixels) -> Pixels:
    """The page without alpha, if that is opaque everywhere."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        return np.ascontiguousarray(pixels[..., 0])
    if channels(pixels) == ALPHA_CHANNELS and bool((pixels[..., 3] == levels(pixels)).all()):
        return np.ascontiguousarray(pixels[..., :3])
    return pixels


def to_grey(pixels: Pixels) -> Pixels:
    """Luma (Rec. 601, as OpenCV weighs it) in one channel; in three where alpha stays."""
    pixels = fewest_channels(pixels)
    if pixels.ndim == 2:
        return pixels
    grey = cv2.cvtColor(np.ascontiguousarray(pixels[..., :3]), cv2.COLOR_BGR2GRAY)
    return grey if channels(pixels) == 3 else np.dstack([grey, grey, grey, pixels[..., 3]])


def flatten(pixels: Pixels, color: str = "auto") -> Pixels:
    """Alpha over white paper, in as few channels as that needs unless color is "keep"; unchanged without
    alpha."""
    if channels(pixels) != ALPHA_CHANNELS:
        return pixels
    white = levels(pixels)
    alpha = pixels[..., 3:].astype(np.float32) / white
    flat = np.rint(pixels[..., :3] * alpha + white * (1 - alpha)).astype(pixels.dtype)
    return flat if color == "keep" else fewest_channels(flat)


def to_eight_bit(pixels: Pixels) -> Pixels:
    """uint16 rounded to uint8 (65535 -> 255); uint8 as it is."""
    if pixels.dtype == np.uint8:
        return pixels
    return ((pixels.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)


def to_levels(pixels: Pixels, greys: int) -> Pixels:
    """An 8-bit grey page in so many greys, black and white among them; tones between them are dithered.

    By an 8x8 ordered pattern (Bayer 1973): a page has the same dots wherever it is cut into tiles, and
    flat black and white stay without any.
    """
    step = 255 / (greys - 1)
    height, width = pixels.shape
    pattern = np.tile(BAYER, (height // 8 + 1, width // 8 + 1))[:height, :width]
    steps = np.floor(pixels / step + 0.5 + pattern)
    levelled: Pixels = np.rint(steps * step).astype(np.uint8)
    return levelled


def _bayer() -> npt.NDArray[np.float32]:
    pattern = np.zeros((1, 1))
    for _ in range(3):
        pattern = np.block([[4 * pattern, 4 * pattern + 2], [4 * pattern + 3, 4 * pattern + 1]])
    return ((pattern + 0.5) / 64 - 0.5).astype(np.float32)  # within -0.5 and 0.5


BAYER = _bayer()


def is_lossless(params: Params) -> bool:
    """Whether what is written shows each pixel as it is."""
    form = params.output_format
    return form == "png" or (form in ("webp", "avif") and params.jpeg_quality == 100)


# ---------------------------------------------------------------- size
def target_size(width: int, height: int, params: Params) -> tuple[int, int]:
    """(width, height) that a page of this size shall get; its proportions stay."""
    if not params.has_target:
        return width * params.scale, height * params.scale
    factor = min(
        (params.target_width or math.inf) / width,
        (params.target_height or math.inf) / height,
    )
    return max(1, round(width * factor)), max(1, round(height * factor))


def stays(params: Params, head: bytes, size_bytes: int, most_bytes: int | None, is_part: bool) -> bool:
    """Whether a page that is as large as its target already is taken over byte for byte; else it is written
    anew, for a screen's greys and pixels, within its bytes, as the half that it is, or for a PDF, which would
    hold it as a PNG many times as large. head: the page's first bytes."""
    if params.container == "pdf" and storage.sniff(head) not in PDF_KINDS:
        return False
    return (most_bytes is None or size_bytes <= most_bytes) and not params.profile and not is_part


def resize(pixels: Pixels, size: tuple[int, int], in_light: bool) -> Pixels:
    """An 8-bit page at another size, (width, height).

    in_light: reduced by averaging areas in linear light. A screentone's dots then keep their
    share of ink and fade into grey; Lanczos of a fixed reach drops some of them, which
    shows as moire, and an average of sRGB values darkens them. Enlarged by Lanczos.
    """
    if size == (pixels.shape[1], pixels.shape[0]):
        return pixels
    smaller = size[0] <= pixels.shape[1] and size[1] <= pixels.shape[0]
    if not (in_light and smaller):
        return cv2.resize(pixels, size, interpolation=cv2.INTER_LANCZOS4)
    if channels(pixels) == ALPHA_CHANNELS:
        alpha = cv2.resize(np.ascontiguousarray(pixels[..., 3]), size, interpolation=cv2.INTER_AREA)
        return np.dstack([resize(np.ascontiguousarray(pixels[..., :3]), size, in_light), alpha])
    light = cv2.resize(cv2.LUT(pixels, LIGHT), size, interpolation=cv2.INTER_AREA)
    reduced: Pixels = SRGB[light]
    return reduced


LIGHT = np.rint(to_light(np.arange(256) / 255) * 65_535).astype(np.uint16)
SRGB = np.rint(to_srgb(np.arange(65_536) / 65_535) * 255).astype(np.uint8)


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
def _coded(form: str, pixels: Pixels, settings: list[int], profile: bytes | None) -> bytes:
    """The pixels in one format, with this profile. Raises PageError."""
    try:
        if profile:
            kinds, blocks = [cv2.IMAGE_METADATA_ICCP], [np.frombuffer(profile, np.uint8)]
            done, data = cv2.imencodeWithMetadata(f".{form}", pixels, kinds, blocks, settings)
        else:
            done, data = cv2.imencode(f".{form}", pixels, settings)
    except cv2.error as error:
        raise PageError(f"the {form} encoder refused it: {error.err}") from error
    if not done or not data.size:
        raise PageError(f"the {form} encoder gave nothing for {pixels.shape[1]}x{pixels.shape[0]} pixels")
    return data.tobytes()


def encode(pixels: Pixels, params: Params, profile: bytes | None = None) -> tuple[bytes, str, str | None]:
    """(bytes, suffix, deviation): an 8-bit page in the asked format, with its ICC profile.

    A side over the format's limit falls back to PNG, a profile that its encoder refuses is left out, and
    deviation says so. JPEG is 4:4:4 from quality 90 on, since chroma subsampling smears coloured line art;
    WebP and AVIF at 100 are lossless. Raises PageError.
    """
    side = max(pixels.shape[:2])
    wanted = params.output_format
    many = pixels.shape[0] * pixels.shape[1]
    fits = side <= SIDE_LIMITS[wanted] and many <= PIXEL_LIMITS.get(wanted, many)
    actual = wanted if fits else "png"
    if actual == "jpg":
        pixels = flatten(pixels, params.color)
    fitting = fitting_profile(profile, pixels)
    # On white paper a page may have lost its colours; and a WebP is always RGB, for which browsers take no
    # profile of one colour.
    if profile and pixels.ndim == 2 and (fitting is None or actual == "webp"):
        curve = tone_curve(profile)
        if curve is not None:
            pixels, fitting = through_curve(pixels, curve), None
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
        # Below 100 it keeps a quarter of the chroma samples; OpenCV has no setting for that.
        "avif": [*(cv2.IMWRITE_AVIF_QUALITY, params.jpeg_quality), *(cv2.IMWRITE_AVIF_SPEED, AVIF_SPEED)],
    }[actual]
    left_out = None
    try:
        data = _coded(actual, pixels, settings, fitting)
    except PageError:
        if fitting is None:
            raise
        # libpng takes none whose length is no multiple of four, as some programs write them.
        data = _coded(actual, pixels, settings, None)
        left_out = f"without its colour profile, which the {actual} encoder refused"
    why = f"written as png: {side} px is over the {SIDE_LIMITS[wanted]} px that {wanted} allows"
    if side <= SIDE_LIMITS[wanted]:
        why = f"written as png: {many} pixels are over the {PIXEL_LIMITS.get(wanted)} that {wanted} allows"
    deviations = (None if actual == wanted else why, left_out)
    return data, f".{actual}", "; ".join(filter(None, deviations)) or None


def kept_suffix(data: bytes, named: str) -> str:
    """What a page that is kept as it is ends in: as it was named, unless its content is of another kind."""
    fitting = storage.SUFFIXES.get(storage.sniff(data), (named,))
    return named if named in fitting else fitting[0]


# ---------------------------------------------------------------- previews
def write_preview(
    source: Path,
    target: Path,
    width: int,
    limits: Limits,
    part: Callable[[Pixels], Pixels] = lambda pixels: pixels,
) -> None:
    """A JPEG of `source`, or of a part of it, at most `width` pixels wide. Raises PageError, OSError."""
    pixels = to_eight_bit(flatten(part(decode(source.read_bytes(), 1, limits))))
    height = pixels.shape[0]
    # A strip may be over JPEG's own limit at any width.
    factor = min(width / pixels.shape[1], SIDE_LIMITS["jpg"] / height)
    if factor < 1:
        size = (max(1, round(pixels.shape[1] * factor)), max(1, round(height * factor)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    data, _, _ = encode(pixels, Params(output_format="jpg", jpeg_quality=85))
    storage.write_whole(target, data)
