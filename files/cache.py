"""Finished pages by what decides their bytes: a repeated volume costs only its new pages.

Map: Entry - key_of - PageCache (find, size_of, take, keep) - Keeper (the bound)
Rule: an entry is nothing until its bytes have the hash that stands beside them; a doubt means a miss.
Runs in: the worker's byte threads, or a cluster's bridge (PageCache); dispatcher and http-N threads (Keeper).
No torch, no SQL.

    <root>/cache/<2 hex>/<key>.page   a hard link to the job's own page (a copy, where there are no links)
                         <key>.json   its hash and facts, sealed; renamed into place last
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import storage
from messages import ComputePage, Limits, PageDone, Params, Plan

log = logging.getLogger("cache")

T = TypeVar("T")
Part = tuple[str | None, int | None]  # what of its scan a page is (storage.mark_of), its share of bytes
ENTRY = re.compile(r"([0-9a-f]{64})\.(page|json)")


@dataclass(frozen=True, slots=True)
class Entry:
    """A page that need not be computed again. Fields but data: see messages.PageDone."""

    data: bytes
    suffix: str
    width: int
    height: int
    mode: str
    color_spread: float | None
    model: str | None

    def facts(self, key: str, seconds: float) -> dict[str, Any]:
        """What PageDone says of a page that was taken from here."""
        names = ("width", "height", "mode", "color_spread", "model")
        told = {"seconds": round(seconds, 3), "cache_key": key, "cached": True}
        return {name: getattr(self, name) for name in names} | told


def key_of(
    source_sha256: str, params: Params, plan: Plan, limits: Limits, program: str, part: Part = (None, None)
) -> str:
    """64 hex digits of all that decides a page's bytes, and whether it can be computed at all.

    program: code, libraries and hardware, whose results are alike to the bit only among themselves.
    """
    sizes = (limits.page_pixels, limits.output_pixels)
    parts = (source_sha256, asdict(params), asdict(plan), sizes, program, part)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- the worker's side
class PageCache:
    """Looks pages up and takes new ones in; any thread, and any number of processes.

    How much it holds is not its concern: see Keeper.
    """

    def __init__(self, root: Path, program: str) -> None:
        self.root = root
        self.program = program

    def key(self, source: bytes, task: ComputePage) -> str | None:
        """See key_of; source: the page's file as it came. None: no page of a job (a reader's or a
        preview's: they are kept elsewhere), or not by our own engine."""
        if task.plan is None or task.plan.engine != "native":
            return None
        part = (storage.mark_of(task.source.name), task.most_bytes)
        digest = hashlib.sha256(source).hexdigest()
        return key_of(digest, task.params, task.plan, task.limits, self.program, part)

    def find(self, key: str) -> Entry | None:
        """The entry, proved by its hash. A damaged one is removed."""
        page, record = _paths(self.root, key)
        try:
            facts = _unsealed(record.read_bytes(), key)
            with storage.open_regular(page) as file:
                data = file.read(facts["bytes"] + 1)
            if hashlib.sha256(data).hexdigest() != facts["sha256"]:
                raise ValueError("the page has another hash")
            os.utime(record)  # the order of use, for the Keeper's next start
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the cached page %s is damaged and dropped: %s", key[:16], error)
            _remove(self.root, key)
            return None
        names = ("suffix", "width", "height", "mode", "color_spread", "model")
        return Entry(data, **{name: facts[name] for name in names})

    def take(self, page: Path, done: PageDone, part: str | None = None) -> PageDone:
        """Take in a page that was just computed; its event, with the key if the page is held under it.

        What deviated from its plan is not what another attempt would give; but what is said of a
        part (storage.part_of) is said of it always.
        """
        if done.cache_key is None or done.cached:
            return done
        facts = {"suffix": page.suffix, "width": done.width, "height": done.height, "mode": done.mode}
        facts |= {"color_spread": done.color_spread, "model": done.model}
        if done.deviation in (None, part) and self.keep(
            done.cache_key, page, done.sha256, done.size_bytes, facts
        ):
            return done
        return replace(done, cache_key=None)

    def size_of(
        self, source_sha256: str, params: Params, plan: Plan, limits: Limits, part: Part = (None, None)
    ) -> int | None:
        """Bytes of the entry that find() would most likely give: nothing is read but its record."""
        key = key_of(source_sha256, params, plan, limits, self.program, part)
        try:
            return int(_unsealed(_paths(self.root, key)[1].read_bytes(), key)["bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, key: str, page: Path, sha256: str, size_bytes: int, facts: dict[str, Any]) -> bool:
        """Take in a page that is on disk, whole, under its final name; was it possible?

        facts: the fields of Entry but data. A link takes no room while the job's own page is
        there; what is edited in that place is found by its hash.
        """
        target, record = _paths(self.root, key)
        temporary = storage.new_temporary(target.parent)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(page, temporary)
            except OSError:  # no links here, or too many to one page
                shutil.copyfile(page, temporary)
            os.replace(temporary, target)
            storage.write_whole(record, _sealed({**facts, "sha256": sha256, "bytes": size_bytes}, key))
        except OSError as error:  # full, say: the page itself is safe
            log.warning("a page can't be cached: %s", storage.reason_of(error))
            with contextlib.suppress(OSError):
                storage.remove_file(temporary)
                _remove(self.root, key)
            return False
        return True


def _paths(root: Path, key: str) -> tuple[Path, Path]:
    return root / key[:2] / f"{key}.page", root / key[:2] / f"{key}.json"


def _remove(root: Path, key: str) -> None:
    """The record first: without one, a page is no entry."""
    page, record = _paths(root, key)
    storage.remove_file(record)
    storage.remove_file(page)


def _sealed(facts: dict[str, Any], key: str) -> bytes:
    text = json.dumps([key, facts], sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n".encode()


def _unsealed(data: bytes, key: str) -> dict[str, Any]:
    """Raises ValueError unless these are the facts of this key, as they were written."""
    seal, _, text = data.decode("ascii").rstrip("\n").partition(" ")
    if hashlib.sha256(text.encode()).hexdigest() != seal:
        raise ValueError("its record is not as it was written")
    whose, facts = json.loads(text)
    if whose != key:
        raise ValueError("its record is another page's")
    return dict(facts)


# ---------------------------------------------------------------- the bound
class Keeper:
    """Bounds the cache in bytes: the least recently used pages go first. Any thread.

    The only one that removes sound entries; workers tell through PageDone what they used and
    added. Until that is told, what they added is not counted: for so long there may be more.
    """

    def __init__(self, root: Path, most_bytes: int) -> None:
        self.root = root
        self.most_bytes = most_bytes
        self.bytes = 0
        self.sizes: OrderedDict[str, int] = OrderedDict()  # key -> bytes; the least recently used first
        self._lock = threading.RLock()  # guards all of these

    def load(self) -> None:
        """See what an earlier run left; incomplete entries and temporaries go."""
        if not self.root.is_dir():
            return
        storage.sweep_temporaries(self.root)
        used: dict[str, float] = {}
        pages = set()
        for name, path in self._files():
            if path.suffix == ".json":
                used[name] = path.stat().st_mtime
            else:
                pages.add(name)
        for key in used.keys() ^ pages:
            _remove(self.root, key)
        with self._lock:
            for key in sorted(used.keys() & pages, key=used.__getitem__):
                self._add(key)
            self._evict()
        if self.most_bytes == 0:  # switched off: its folders go too, but nothing of anybody else's
            for folder in (*self.root.glob("[0-9a-f][0-9a-f]"), self.root):
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _files(self) -> Iterator[tuple[str, Path]]:
        for folder, _, names in os.walk(self.root):
            for name in names:
                if match := ENTRY.fullmatch(name):
                    yield match[1], Path(folder, name)

    def used(self, key: str) -> None:
        """A worker added this entry, or used it again."""
        with self._lock:
            self._add(key)
            self._evict()

    def with_room(self, what: Callable[[], T]) -> T:
        """What this call gives; where there is no room for it, again without the cache, which nobody
        asked to keep. Raises storage.NoRoom."""
        try:
            return what()
        except storage.NoRoom:
            if not self.clear():
                raise
            return what()

    def clear(self) -> int:
        """Remove all of it, for a disk that has no room left; how many entries that were."""
        with self._lock:
            most, self.most_bytes = self.most_bytes, 0
            count = len(self.sizes)
            self._evict()
            self.most_bytes = most
            return count - len(self.sizes)

    def _add(self, key: str) -> None:
        self.bytes -= self.sizes.pop(key, 0)
        try:
            self.sizes[key] = sum(path.stat().st_size for path in _paths(self.root, key))
        except OSError:  # dropped as damaged meanwhile
            return
        self.bytes += self.sizes[key]

    def _evict(self) -> None:
        for key in list(self.sizes):
            if self.bytes <= self.most_bytes:
                return
            try:
                _remove(self.root, key)
            except OSError as error:  # open on Windows: its turn comes again
                log.warning("a cached page can't be removed now: %s", storage.reason_of(error))
                continue
            self.bytes -= self.sizes.pop(key)
