"""Small pages drawn by code, in integers only: the same values on every machine.

Pixels are as in pages.py: (H, W) grey, (H, W, 3) BGR or (H, W, 4) BGRA.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.pages import Pixels


def grey(height: int, width: int) -> Pixels:
    """uint8: paper with a gradient, screentone, strokes, a speech bubble and lettering."""
    y, x = np.mgrid[:height, :width]
    page = 245 - 90 * y // height - 40 * x // width
    dots = (x % 5 - 2) ** 2 + (y % 5 - 2) ** 2 < 4
    page[dots & (x > width // 2)] = 70
    page[np.abs(3 * x - 2 * y) < 5] = 12
    page[(2 * x + y) % 37 < 2] = 40
    bubble = 3 * (x - width // 3) ** 2 + 4 * (y - height // 2) ** 2
    page[bubble < height * width // 6] = 15
    page[bubble < height * width // 8] = 250
    letters = (x // 2 * 7 + y // 3 * 5) % 11 < 4
    page[letters & (bubble < height * width // 20)] = 0
    return page.astype(np.uint8)


def colour(height: int, width: int) -> Pixels:
    """uint8 BGR: the grey page, each channel shaded and shifted in its own way."""
    page = grey(height, width).astype(np.int64)
    y, x = np.mgrid[:height, :width]
    green = np.roll(page, 1, axis=1) * (400 - 200 * x // width) // 400
    red = page[::-1] // 2 + 127 * y // height
    return np.dstack([page, green, red]).astype(np.uint8)


def alpha(height: int, width: int) -> Pixels:
    """uint8 BGRA: clear, opaque, and every step between."""
    y, x = np.mgrid[:height, :width]
    opacity = np.clip((x - width // 4) * 510 // width, 0, 255)
    opacity[(x + 2 * y) % 29 < 3] = 255
    return np.dstack([colour(height, width), opacity]).astype(np.uint8)


def sixteen_bit(page: Pixels) -> Pixels:
    """uint16: a uint8 page with finer steps; its 8-bit rounding is the page again.

    At most 100 of 65535 are added where that leaves white white.
    """
    y, x = np.mgrid[: page.shape[0], : page.shape[1]]
    finer = ((7 * x + 3 * y) % 101).reshape(y.shape + (1,) * (page.ndim - 2))
    return np.minimum(page.astype(np.int64) * 257 + finer, 65_535).astype(np.uint16)


def grainy(height: int, width: int, level: int = 160, spread: int = 8) -> Pixels:
    """uint8 grey: a flat area under noise."""
    noise = np.random.RandomState(1).normal(0, spread, (height, width))
    return np.clip(np.rint(level + noise), 0, 255).astype(np.uint8)


# The pages that are compared with the reference, by name.
PAGES: dict[str, Callable[[], Pixels]] = {
    "grey": lambda: grey(64, 80),
    "colour": lambda: colour(44, 60),
    "odd": lambda: colour(33, 47),
    "dot": lambda: np.full((1, 1), 90, np.uint8),
    "tall": lambda: grey(1000, 7),
    "wide": lambda: colour(7, 1000),
    "alpha": lambda: alpha(36, 44),
    "grey16": lambda: sixteen_bit(grey(36, 44)),
    "colour16": lambda: sixteen_bit(colour(24, 32)),
    "alpha16": lambda: sixteen_bit(alpha(18, 24)),
}
