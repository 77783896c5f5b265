"""What single pages and previews share: questions to the workers, and the folder that their answers lie in.

Map: Newest - Cache - Asked
Rule: who holds some of this has one lock for all of it, that of its Asked.
Runs in: http-* threads; the futures' ends in the dispatcher thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import storage
from work.dispatch import Dispatcher
from work.questions import Question, WorkerDied

AT_ONCE = 8  # questions with the workers, or waiting for one, of one kind
REMEMBERED = 1000  # outcomes without a file
DEATHS = 2  # of workers that had this page, before it is not tried again
SOURCE = "source-"  # begins the name of a page that a worker is to read

V = TypeVar("V")


class Newest(OrderedDict[str, V]):
    """By key; only what came last is remembered."""

    def __setitem__(self, key: str, value: V) -> None:
        super().__setitem__(key, value)
        while len(self) > REMEMBERED:
            self.popitem(last=False)


class Cache:
    """Finished pages in one folder, the longest unused removed beyond max_bytes. Not locked itself."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self.sizes: OrderedDict[str, int] = OrderedDict()  # by key, the longest unused first
        self.names: dict[str, str] = {}  # by key: the file
        folder.mkdir(parents=True, exist_ok=True)
        found = [(entry.stat().st_mtime, entry) for entry in os.scandir(folder) if entry.is_file()]
        for _, entry in sorted(found, key=lambda item: item[0]):
            if entry.name.startswith(SOURCE) or storage.TEMPORARY.fullmatch(entry.name):
                storage.remove_file(Path(entry.path))  # of a service that was killed
            else:
                self.add(entry.name)

    def open(self, key: str) -> BinaryIO | None:
        """The page of this key, if it is there."""
        if key not in self.names:
            return None
        path = self.folder / self.names[key]
        try:
            file = storage.open_regular(path)
        except OSError:  # somebody removed it
            self.held_bytes -= self.sizes.pop(key)
            del self.names[key]
            return None
        self.sizes.move_to_end(key)
        with contextlib.suppress(OSError):
            os.utime(path)  # the order survives a restart
        return file

    def add(self, name: str) -> None:
        """Take in a file of the folder, and remove what is too much then."""
        key, size_bytes = os.path.splitext(name)[0], 0
        with contextlib.suppress(OSError):
            size_bytes = (self.folder / name).stat().st_size
        self.held_bytes += size_bytes - self.sizes.pop(key, 0)
        self.sizes[key], self.names[key] = size_bytes, name
        for old in list(self.sizes)[:-1]:  # the newest stays: somebody waits for it
            if self.held_bytes <= self.max_bytes:
                return
            with contextlib.suppress(OSError):  # being read, on Windows: at a later turn
                storage.remove_file(self.folder / self.names[old])
                self.held_bytes -= self.sizes.pop(old)
                del self.names[old]


class Asked:
    """Questions of one kind that are with the workers. Its lock is its owner's for all the rest, too, and
    held when anything of it is called."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.lock = threading.RLock()
        self.underway: dict[str, Future[Any]] = {}
        self._deaths: Newest[int] = Newest()  # key -> workers that died with it

    @property
    def is_full(self) -> bool:
        """Whether as many are underway as should be."""
        return len(self.underway) >= AT_ONCE

    def is_deadly(self, key: str) -> bool:
        """Whether enough workers died of this."""
        return self._deaths.get(key, 0) >= DEATHS

    def ask(self, key: str, question: Question, ended: Callable[[Any], None]) -> Future[Any]:
        """Ask, or share the answer to come of who asked before. ended: gets the answer, under the lock, None
        where there is none; who waits for the future may have it before."""
        if key not in self.underway:
            future = self.underway[key] = self.dispatcher.ask(key, question)
            future.add_done_callback(lambda done: self._ended(key, done, ended))
            return future
        return self.underway[key]

    def _ended(self, key: str, future: Future[Any], ended: Callable[[Any], None]) -> None:
        with self.lock:
            self.underway.pop(key, None)
            error = None if future.cancelled() else future.exception()
            if isinstance(error, WorkerDied):
                self._deaths[key] = self._deaths.get(key, 0) + 1
            ended(None if future.cancelled() or error else future.result())
