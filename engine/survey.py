"""What a volume asks of a machine, seen from its pages' headers: nothing is decoded.

Map: Tally - survey
Rule: a header may lie. What is counted here serves predictions; limits are checked by who decodes.
Runs in: the worker process.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import storage
from engine import pages
from files import inputs
from messages import Params, Survey, Surveyed, Workload

HEAD_BYTES = 256 << 10  # of a page: a JPEG tells its size behind its metadata
LOOKED_AT = 400  # pages of a survey, evenly spread; the others count as like them
LOOKED_AT_UNPACKED = 24  # of a container whose pages have to be unpacked to look at them


class Tally:
    """Adds up a volume's pages for one job's params."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.read = 0  # pages whose header told a size
        self.computed = self.input_pixels = self.output_pixels = self.source_bytes = 0
        self.carried_bytes = self.other_bytes = self.cached = 0

    def add(self, head: bytes, size_bytes: int, parts: int = 1) -> None:
        """Count a page by its first bytes and its size; parts: 2 if it is a half of what these show."""
        try:
            width, height = pages.header_size(head)
        except pages.PageError:
            return
        self.read += 1
        width, size_bytes = max(1, width // parts), size_bytes // parts
        wanted = pages.target_size(width, height, self.params)
        is_large = self.params.has_target and wanted <= (width, height)
        if is_large and pages.stays(self.params, head, size_bytes, self.params.max_page_bytes, parts > 1):
            self.carried_bytes += size_bytes
            return
        if not is_large:  # else it is written anew, by no network
            self.computed += 1
            self.input_pixels += width * height
        self.output_pixels += wanted[0] * wanted[1]
        self.source_bytes += size_bytes

    def add_cached(self, size_bytes: int | None) -> bool:
        """Count a page that is computed already, if it is: its size in the cache, None where it is not."""
        if size_bytes is None:
            return False
        self.read += 1
        self.cached += 1
        self.carried_bytes += size_bytes
        return True

    def add_file(self, path: Path, parts: int = 1) -> None:
        """Count a page that lies in a file; parts: see add()."""
        with open(path, "rb") as file:
            self.add(file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size, parts)

    def workload(self, count: int) -> Workload:
        """Of a volume with as many pages, those that told no size being like the others."""
        share = count / self.read if self.read else 0.0
        counted = (
            self.computed, self.input_pixels, self.output_pixels, self.source_bytes, self.carried_bytes,
        )  # fmt: skip
        workload = Workload(*(round(share * one) for one in counted))
        return replace(workload, other_bytes=self.other_bytes, cached=self.cached)


def survey(task: Survey) -> Surveyed:
    """Look through an input, and take one page out. Raises storage.StorageError, PageError, OSError."""
    from files import formats  # here: most inputs are none of them

    tallies = [Tally(params) for params in task.variants]
    with inputs.opened(task.source, task.limits) as archive:
        listing = inputs.list_input(task.source, task.limits, archive)
        found = listing.pages
        if task.n > len(found):
            raise storage.InputMissing(f"{task.source.name} has {len(found)} pages, no page {task.n}")
        n = task.n or len(found) // 2 + 1
        wanted = found[n - 1]
        most = LOOKED_AT_UNPACKED if isinstance(archive, formats.Container) else LOOKED_AT
        looked_at = found[:: max(1, -(-len(found) // most))]
        with formats.opener([wanted, *looked_at], archive, task.limits) as open_entry:
            data = inputs.read_entry(wanted, open_entry, task.limits)
            for entry in looked_at:
                size_bytes = inputs.entry_bytes(entry)
                try:
                    head = inputs.read_entry(entry, open_entry, task.limits, HEAD_BYTES)
                except storage.InputUnusable:
                    continue
                for tally in tallies:
                    tally.add(head, size_bytes)
        others_bytes = sum(map(inputs.entry_bytes, listing.others))
        for tally in tallies:
            tally.other_bytes = others_bytes if tally.params.container == "cbz" else 0
    name = f"{hashlib.sha256(data).hexdigest()[:32]}.{pages.image_kind(data)}"
    storage.write_whole(task.folder / name, data)
    workloads = tuple(tally.workload(len(found)) for tally in tallies)
    return Surveyed(task.key, name, wanted.name, n, len(found), workloads)
