"""Windows of a page, and what lies between its pixels and a network's tensors.

Map: boxes and tiles - pixels to tensors and back - Lanczos
Rule: all that is done here to a page is upstream's arithmetic, at most 1/255 apart from it.
Runs in: the worker process only (it loads torch). Knows nothing of models, files and processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from engine import pages
from engine.pages import Pixels
from messages import Crop

EIGHT_BIT_WHITE = 255
LANCZOS_TAPS = 8  # of each resized pixel, along each axis
CLEANING_REACH = 32  # input pixels around one that decide what pages.clean makes of it, and the resizing
PART_GRID = 32  # a part begins on a multiple: networks unshuffle by 4, or lay windows of up to 32 over a page
RESIZE_REACH = 4  # input pixels that a resized one may depend on: Lanczos-4 at network scale 1


# ---------------------------------------------------------------- boxes and tiles
@dataclass(frozen=True, slots=True)
class Box:
    """Half-open, in input pixels."""

    y0: int
    x0: int
    y1: int
    x1: int

    def of(self, page: Any) -> Any:
        """This part of a page, array or tensor of (H, W, ...), as a view."""
        return page[self.y0 : self.y1, self.x0 : self.x1]

    def times(self, factor: int) -> Box:
        """The same part of the page at `factor` times its size."""
        return Box(self.y0 * factor, self.x0 * factor, self.y1 * factor, self.x1 * factor)

    def within(self, outer: Box) -> Box:
        """This box in `outer`'s own coordinates."""
        return Box(self.y0 - outer.y0, self.x0 - outer.x0, self.y1 - outer.y0, self.x1 - outer.x0)


def tiles(height: int, width: int, tile: int, halo: int, multiple: int = 1) -> Iterator[tuple[Box, Box]]:
    """Yield (core, window) boxes, row-major; cores cover the page exactly once.

    Input pixels; boxes are half-open. All windows of a page have one shape and lie inside
    it: at the page's edge the network then sees the same zero padding as on the whole page.
    `height` and `width` are multiples of `multiple`, and so are all window edges.
    Raises ValueError unless tile >= 1 and halo >= 0.
    """
    across = spans(width, tile, halo, multiple)
    for y0, y1, wy0, wy1 in spans(height, tile, halo, multiple):
        for x0, x1, wx0, wx1 in across:
            yield Box(y0, x0, y1, x1), Box(wy0, wx0, wy1, wx1)


def grid_tiles(height: int, width: int, tile: int, halo: int, grid: int) -> Iterator[tuple[Box, Box]]:
    """Yield (core, window) boxes as tiles does, all inner edges on multiples of `grid`.

    For networks that lay windows of their own over what they are given: those must be the page's. At
    the page's bottom and right a window ends where the page does, so that windows differ in shape.
    """
    across = _grid_spans(width, tile, halo, grid)
    for y0, y1, wy0, wy1 in _grid_spans(height, tile, halo, grid):
        for x0, x1, wx0, wx1 in across:
            yield Box(y0, x0, y1, x1), Box(wy0, wx0, wy1, wx1)


def _grid_spans(size: int, tile: int, halo: int, grid: int) -> list[tuple[int, int, int, int]]:
    core = math.ceil(size / math.ceil(size / tile) / grid) * grid
    halo = math.ceil(halo / grid) * grid
    starts = range(0, size, core)
    return [(at, min(at + core, size), max(0, at - halo), min(at + core + halo, size)) for at in starts]


def around(page: Pixels, crop: Crop | None, halo: int, factor: int) -> tuple[Pixels, tuple[slice, slice]]:
    """(what must be computed of a page for this part of it, where the part lies in the result).

    factor: of the result's size to the page's. Raises PageError for a part that leaves the page.
    """
    if crop is None:
        return page, (slice(None), slice(None))
    core, (height, width) = crop_box(page, crop), page.shape[:2]
    reach = halo + CLEANING_REACH
    y0, x0 = (max(0, start - reach) // PART_GRID * PART_GRID for start in (core.y0, core.x0))
    window = Box(y0, x0, min(height, core.y1 + reach), min(width, core.x1 + reach))
    cut = core.within(window).times(factor)
    return np.ascontiguousarray(window.of(page)), (slice(cut.y0, cut.y1), slice(cut.x0, cut.x1))


def crop_box(page: Pixels, crop: Crop) -> Box:
    """A part of a page. Raises PageError where it is not all there."""
    x, y, width, height = crop
    if y + height > page.shape[0] or x + width > page.shape[1]:
        raise pages.PageError(
            f"the page has {page.shape[1]}x{page.shape[0]} pixels; {width}x{height} from {x},{y} leave it"
        )
    return Box(y, x, y + height, x + width)


def spans(size: int, tile: int, halo: int, multiple: int = 1) -> list[tuple[int, int, int, int]]:
    """(core start, core end, window start, window end) along one side; see tiles."""
    if tile < 1 or halo < 0:
        raise ValueError(f"tile {tile}, halo {halo}")
    # Cores of equal size: a thin last one would cost a whole window.
    core = math.ceil(size / math.ceil(size / tile) / multiple) * multiple
    halo = math.ceil(halo / multiple) * multiple
    window = min(core + 2 * halo, size)
    firsts = {start: max(0, min(start - halo, size - window)) for start in range(0, size, core)}
    return [(start, min(start + core, size), first, first + window) for start, first in firsts.items()]


def pad_to_multiple(pixels: Pixels, multiple: int) -> Pixels:
    """Mirrored at the bottom and right, as upstream pads for networks that unshuffle."""
    bottom, right = (-side % multiple for side in pixels.shape[:2])
    if not bottom and not right:
        return pixels
    padding = ((0, bottom), (0, right), *((0, 0),) * (pixels.ndim - 2))
    # A side of one pixel has nothing to mirror.
    return np.pad(pixels, padding, "reflect" if min(pixels.shape[:2]) > multiple else "edge")


def probe_page(side: int = 96) -> Pixels:
    """(side, side) uint8: strokes, screentone and a gradient, drawn."""
    y, x = np.mgrid[0:side, 0:side]
    page = np.where((x // 2 + y // 2) % 2 == 0, 190, 240) - y // 2
    page[np.abs(x - y) % 96 < 3] = 10
    page[(x % 96 - 60) ** 2 + (y % 96 - 30) ** 2 < 120] = 255
    drawn: Pixels = page.astype(np.uint8)
    return drawn


# ---------------------------------------------------------------- pixels to tensors and back
def upload(pixels: Pixels, device: torch.device) -> Tensor:
    """The same values on a device, copied while the host goes on."""
    host = torch.from_numpy(pixels if pixels.dtype == np.uint8 else pixels.astype(np.int32))
    # Elsewhere the copy may still read what is not held any more.
    asynchronous = device.type == "cuda"
    return (host.pin_memory() if asynchronous else host).to(device, non_blocking=asynchronous)


def download(page: Tensor) -> Tensor:
    """The same values on the host, there only when the device has come so far."""
    host = torch.empty(page.shape, dtype=page.dtype, pin_memory=page.device.type == "cuda")
    return host.copy_(page, non_blocking=True)


def to_input(stack: Tensor, white: int, dtype: torch.dtype, grey_channels: int = 3) -> Tensor:
    """(B, h, w[, 3]) grey or BGR levels -> (B, 3, h, w) RGB, 0..1, channels last.

    grey_channels: that a grey page gets, 3 or 1.
    """
    x = stack.float() / white
    x = x.unsqueeze(1).expand(-1, grey_channels, -1, -1) if x.ndim == 3 else x.permute(0, 3, 1, 2).flip(1)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def is_finite(y: Tensor) -> Tensor:
    """A bool tensor of no dimensions: whether all values are finite. A sum that isn't tells of one
    that isn't, in one pass instead of five."""
    return torch.isfinite(y.sum(dtype=torch.float32))


def to_levels(y: Tensor, white: int, grey: bool) -> Tensor:
    """(..., 3) BGR -> (...[, 3]) fp32 grey or BGR, rounded to 0..white; y changes."""
    y = y.float().clamp_(0, 1)
    if grey:
        blue, green, red = y.unbind(-1)
        y = red * 0.299 + green * 0.587 + blue * 0.114  # ITU-R BT.601, as cv2
    return y.mul_(white).round_()


def shuffle(results: Tensor, dtype: torch.dtype) -> Tensor:
    """(h, w, factor**2[, 3]), a pixel's results row by row -> (h * factor, w * factor[, 3]) in dtype."""
    height, width, count, *colours = results.shape
    factor = math.isqrt(count)
    page = torch.empty(height * factor, width * factor, *colours, dtype=dtype)
    rows = results.reshape(height, width, factor, -1).transpose(1, 2)  # (h, factor, w, factor * colours)
    page.view(rows.shape).copy_(rows)
    return page


def reduce_to(computed: Pixels, window: Box, outscale: int) -> Pixels:
    """A computed window at the asked scale, 8-bit; Lanczos-4 after rounding, as upstream.

    The page's sampling phase repeats every input pixel, so a window's own resize gives
    the page's values, but for the outermost pixels, which lie in the halo.
    """
    size = ((window.x1 - window.x0) * outscale, (window.y1 - window.y0) * outscale)
    if size != (computed.shape[1], computed.shape[0]):
        computed = cv2.resize(computed, size, interpolation=cv2.INTER_LANCZOS4)
    return pages.to_eight_bit(computed)


def reduce_on_device(levels: Tensor, white: int, scale: int, outscale: int) -> Tensor:
    """What reduce_to does, for (B, H, W[, 3]) levels on their device; uint8.

    The same to the last bit for 8-bit pages: in integers, weights rounded to 1/2048 as cv2's.
    """
    if scale != outscale:
        exact = white == EIGHT_BIT_WHITE
        sums = levels.to(torch.int32) if exact else levels
        for axis in (1, 2):
            sums = lanczos(sums, axis, scale, outscale)
        levels = ((sums + (1 << 21)) >> 22 if exact else sums.round_()).clamp_(0, white)
    return levels.mul(EIGHT_BIT_WHITE / white).round_().to(torch.uint8)


# ---------------------------------------------------------------- Lanczos
def lanczos(values: Tensor, axis: int, scale: int, outscale: int) -> Tensor:
    """Along one axis, n * scale values -> n * outscale: cv2's INTER_LANCZOS4, edges repeated.

    fp32 values give fp32; int32 ones come back 2048 times as large. sinc(d) sinc(d / 4) over
    eight taps whatever the factor. Every `phases` results the taps stand over the inputs
    alike: each phase is one sum of strided rows.
    """
    step, phases = scale // math.gcd(scale, outscale), outscale // math.gcd(scale, outscale)
    x = values.movedim(axis, 0)
    padded = x[torch.arange(-LANCZOS_TAPS, len(x) + LANCZOS_TAPS, device=x.device).clamp_(0, len(x) - 1)]
    results = []
    for phase in range(phases):
        at = (phase + 0.5) * step / phases - 0.5  # the result's centre, in inputs
        first = math.floor(at) - LANCZOS_TAPS // 2 + 1
        distances = at - first - np.arange(LANCZOS_TAPS)
        weights = np.sinc(distances) * np.sinc(distances / 4)
        weights /= weights.sum()
        if values.dtype == torch.int32:
            weights = np.rint(2048 * weights).astype(int)
        total = torch.zeros_like(x[::step])
        for tap, weight in enumerate(weights.tolist()):
            start = LANCZOS_TAPS + first + tap
            total.add_(padded[start : start + len(x) : step], alpha=weight)
        results.append(total)
    return torch.stack(results, 1).flatten(0, 1).movedim(0, axis)
