"""Files that must not be larger than asked: by quality first, then by format, never by leaving a page out.

Map: shares of an artifact - a page within its bytes
Runs in: the dispatcher (shares), the worker's encode threads. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from messages import CONTAINER_FORMATS, Params

LEAST_QUALITY = 40  # below it every format smears lettering
# In which a page is tried next, once the one asked for is too large at LEAST_QUALITY. Each is smaller than
# the one before it; PNG, which has no quality, goes on as a lossless WebP first.
NEXT_FORMATS = {
    "png": (("webp", 100, 100), ("webp", LEAST_QUALITY, 99), ("avif", LEAST_QUALITY, 99)),
    "jpg": (("webp", LEAST_QUALITY, 100), ("avif", LEAST_QUALITY, 100)),
    "webp": (("avif", LEAST_QUALITY, 100),),
    "avif": (),
}
EQUAL_PART = 0.5  # of an artifact's bytes is dealt out equally, the rest by the sources' sizes
# Of an artifact that is no page: a page's lines in the report and its two entries in the zip; the rest.
PAGE_OVERHEAD_BYTES, OVERHEAD_BYTES = 1400, 6000

BOOK_PAGE_BYTES = 2200  # of an EPUB: a page's document, its line in the report, its entry

Encoded = tuple[bytes, str, str | None]  # see pages.encode


# ---------------------------------------------------------------- shares of an artifact
def shares(artifact_bytes: int, sources: Sequence[tuple[int, int]], is_book: bool = False) -> list[int]:
    """How many bytes each page may have, so that all of them and the report fit into an artifact.

    is_book: an EPUB or PDF has documents of its own.
    sources: each page's size in bytes as it came, and the UTF-8 bytes of its two names. Known before any
    page is computed, so that a resumed job deals out the same.
    """
    if not sources:
        return []
    each_page = PAGE_OVERHEAD_BYTES + (BOOK_PAGE_BYTES if is_book else 0)
    overhead = sum(each_page + 4 * names for _, names in sources) + OVERHEAD_BYTES
    left = max(0, artifact_bytes - overhead)
    total = max(1, sum(size_bytes for size_bytes, _ in sources))
    each = left * EQUAL_PART / len(sources)
    return [int(each + left * (1 - EQUAL_PART) * size_bytes / total) for size_bytes, _ in sources]


# ---------------------------------------------------------------- a page within its bytes
def fitted(encode: Callable[[Params], Encoded], params: Params, most_bytes: int | None) -> Encoded:
    """A page encoded as asked, or as near to it as `most_bytes` allows; the third value says what was done.

    The highest quality that fits; where none does in any format, the smallest of all that were tried.
    """
    first = encode(params)
    if most_bytes is None or len(first[0]) <= most_bytes:
        return first
    tried = [(first, params)]
    asked = params.output_format
    steps = ((asked, LEAST_QUALITY, params.jpeg_quality - 1), *NEXT_FORMATS[asked])
    for form, least, most in steps:
        if form == "png" or form not in CONTAINER_FORMATS.get(params.container, NEXT_FORMATS):
            continue  # PNG has no quality
        found = _best_quality(encode, replace(params, output_format=form), least, most, most_bytes)
        if found is None:
            continue
        tried.append(found)
        if len(found[0][0]) <= most_bytes:
            return _told(found, params, "")
    smallest = min(tried, key=lambda one: len(one[0][0]))
    return _told(smallest, params, f": {len(smallest[0][0])} bytes, nothing tried was smaller")


def _best_quality(
    encode: Callable[[Params], Encoded], params: Params, least: int, most: int, most_bytes: int
) -> tuple[Encoded, Params] | None:
    """The highest quality from `least` to `most` that fits, else `least`'s; None for an empty range."""
    if most < least:
        return None
    lowest = replace(params, jpeg_quality=least)
    best = (encode(lowest), lowest)
    low, high = least + 1, most
    while low <= high and len(best[0][0]) <= most_bytes:
        middle = (low + high) // 2
        wanted = replace(params, jpeg_quality=middle)
        data = encode(wanted)
        if len(data[0]) <= most_bytes:
            best, low = (data, wanted), middle + 1
        else:
            high = middle - 1
    return best


def _told(found: tuple[Encoded, Params], asked: Params, over: str) -> Encoded:
    (data, suffix, why), used = found
    done = f"{used.output_format}, quality {used.jpeg_quality}" if used != asked else "as asked"
    return data, suffix, "; ".join(filter(None, (why, f"for its size written as {done}{over}")))
