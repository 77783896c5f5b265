"""Double pages: which scans are two pages side by side, and their halves.

Map: what is a spread - the gutter - at staging - at decoding
Rule: what is not clearly two pages stays as it is: covers, panoramas, drawings that cross the fold.
Runs in: the worker, while staging and in the decode threads.

A half is a page of its own from staging on: "004.jpg" becomes "004-1.jpg" and "004-2.jpg" in reading order.
Their working copies are the whole scan, under names that say what is to be taken of it (storage.mark_of).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

import storage
from engine import pages
from engine.pages import Pixels
from messages import Limits, Params, SourcePage

# Width to height. Two portrait pages: from twice 0.6 (a narrow paperback) to twice 0.9; wider
# ones are fold-outs.
LEAST_ASPECT, MOST_ASPECT = 1.2, 1.8
GUTTER_REACH = 0.02  # of the width, to either side of the middle: how far off a scan's fold may lie
GUTTER_SHARE = 0.98  # of a column's pixels that must look alike where two pages meet
GUTTER_LEVELS = 24  # 8-bit levels: what counts as alike; paper's grain and a JPEG's ringing
LOOK_HEIGHT = 800  # pixels; a scan is reduced to it to look for its gutter
TURNS = {"anticlockwise": 1, "clockwise": -1}  # np.rot90's
T = TypeVar("T")


# ---------------------------------------------------------------- what is a spread
def is_spread(pixels: Pixels) -> bool:
    """Whether a page's shape is that of two pages side by side."""
    height, width = pixels.shape[:2]
    return bool(LEAST_ASPECT <= width / height <= MOST_ASPECT)


def gutter(pixels: Pixels) -> int | None:
    """The column at which a spread falls into its two pages; None where the drawing crosses the fold.

    There, near the middle, one column of paper (or of black) runs from top to bottom.
    """
    grey = pages.to_eight_bit(pages.flatten(pixels))
    grey = grey if grey.ndim == 2 else cv2.cvtColor(grey, cv2.COLOR_BGR2GRAY)
    height, width = grey.shape
    factor = min(1.0, LOOK_HEIGHT / height)
    look = cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    middle, reach = look.shape[1] / 2, max(1, round(look.shape[1] * GUTTER_REACH))
    first = max(0, round(middle) - reach)
    strip = look[:, first : round(middle) + reach + 1].astype(np.int16)  # (H, 2 * reach + 1)
    apart = np.abs(strip - np.median(strip, axis=0))
    plain = (apart <= GUTTER_LEVELS).mean(axis=0) >= GUTTER_SHARE  # (2 * reach + 1,)
    if not plain.any():
        return None
    columns = first + np.flatnonzero(plain)
    nearest = int(columns[np.argmin(np.abs(columns + 0.5 - middle))])
    # In the middle itself when that is plain: both halves are of one size then.
    if abs(nearest + 0.5 - middle) <= 1:
        return int(width // 2)
    column: int = round((nearest + 0.5) / factor)
    return column


# ---------------------------------------------------------------- at staging
def divided(
    staged: Iterable[SourcePage | T], staging: Path, params: Params, limits: Limits
) -> Iterator[SourcePage | T]:
    """Staged pages, with the halves of a spread in its place ("split"), or marked to be turned ("rotate").

    The first page, a cover, stays as it is, and so does one that can't be decoded. Raises OSError.
    """
    seen = 0
    for item in staged:
        if not isinstance(item, SourcePage):
            yield item
            continue
        seen += 1
        wanted = params.spreads if seen > 1 and not item.error else "keep"
        if wanted == "keep" or not _may_be_spread(staging / item.staged, limits):
            yield item
        elif wanted == "rotate":
            # What is read first comes to lie on top.
            turn = "anticlockwise" if params.reading_direction == "rtl" else "clockwise"
            yield _marked(item, staging, turn, item.name)
        else:
            yield from _halves(item, staging, params, limits)


def _may_be_spread(path: Path, limits: Limits) -> bool:
    """By its header alone, as stored: EXIF may turn it, so that tall ones are looked at too."""
    data = path.read_bytes()
    with contextlib.suppress(pages.PageError):
        pages.check_size(data, 1, limits)
        width, height = pages.header_size(data)
        if LEAST_ASPECT <= max(width, height) / min(width, height) <= MOST_ASPECT:
            return is_spread(pages.decode(data, 1, limits))
    return False


def _halves(item: SourcePage, staging: Path, params: Params, limits: Limits) -> Iterator[SourcePage]:
    if gutter(pages.decode((staging / item.staged).read_bytes(), 1, limits)) is None:
        yield item
        return
    order = ("right", "left") if params.reading_direction == "rtl" else ("left", "right")
    stem, suffix = os.path.splitext(item.name)
    for n, mark in enumerate(order, 1):
        yield _marked(item, staging, mark, f"{stem}-{n}{suffix}")


def _marked(item: SourcePage, staging: Path, mark: str, name: str) -> SourcePage:
    number, suffix = os.path.splitext(item.staged)
    staged = f"{number}.{mark}{suffix}"
    whole, marked = staging / item.staged, staging / staged
    if not (marked.exists() and os.path.samefile(whole, marked)):
        storage.remove_file(marked)  # of another input, which Windows left while it was being shown
        try:
            os.link(whole, marked)
        except OSError:  # a file system without links
            shutil.copyfile(whole, marked)
    return replace(item, name=name, staged=staged)


# ---------------------------------------------------------------- at decoding
def taken(pixels: Pixels, mark: str | None) -> Pixels:
    """What a working copy's mark (storage.mark_of) says is to be taken of its pixels."""
    if mark is None:
        return pixels
    if mark in TURNS:
        return np.ascontiguousarray(np.rot90(pixels, TURNS[mark]))
    at = gutter(pixels) or pixels.shape[1] // 2
    return np.ascontiguousarray(pixels[:, :at] if mark == "left" else pixels[:, at:])


def half_of(data: bytes, mark: str | None, limits: Limits) -> tuple[bytes, str] | None:
    """(a PNG of that half, its suffix): what stays of a page that is one, since two whole scans in its
    place would show everything twice. None for what is no half, or can't be decoded."""
    if mark not in storage.HALVES:
        return None
    with contextlib.suppress(pages.PageError):
        pixels = taken(pages.decode(data, 1, limits), mark)
        return pages.encode(pages.to_eight_bit(pixels), Params(output_format="png"))[:2]
    return None
