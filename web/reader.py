"""POST /pages: one page for a manga reader, upscaled while it waits.

Map: Outcome - Cache - Reader (convert, computing)
Rule: whoever sent an image gets an image: the reader stores whatever comes back, so that all that
goes wrong ends in the page as it came.
Runs in: http-* threads; the futures' ends in the dispatcher thread.

Suwayomi-Server (ConversionUtil.kt, Page.kt) posts the field "image" of a form, looks at neither
status nor Content-Type of the answer, and waits 30 s for its first byte.

    bytes --known?--> previews/reader/<key>.jpg --> answer
            '--no--> ComputePage without a plan --dispatch--> worker --> the same file
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jobs
import storage
from files import weightfiles
from jobs import JobError
from messages import (
    CHOICES,
    OF_VOLUMES,
    RANGES,
    ComputePage,
    EngineChoice,
    Limits,
    PageDone,
    PageFailed,
    Params,
    TaskFailed,
    camel,
)
from storage import Layout
from web import forms
from web.wire import Refused
from work import submissions
from work.dispatch import Dispatcher

log = logging.getLogger("reader")

PAGE_BYTES = 64 << 20  # of one page as it comes; readers get theirs from the web
AT_ONCE = 8  # pages with the workers, or waiting for one
BODIES = 16  # requests that hold a page in memory; the others wait
REMEMBERED = 1000  # pages that can't be upscaled, so that a reader's next view costs nothing
STOPPING = "the service is shutting down"
SOURCE = "source-"  # begins the name of a page that a worker is to read
DEATHS = 2  # of workers that had this page, before it is not tried again
IMAGES = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "jxl")


# Of the query; the small model is the default, since somebody waits.
DEFAULTS = Params(model="realesr-animevideov3")
PARAMETERS = (
    *(camel(name) for name in (*RANGES, *CHOICES) if name not in OF_VOLUMES),
    "model",
    "profile",
)


def params_of(query: dict[str, str], models: dict[str, str], model: str = DEFAULTS.model) -> Params:
    """Params from a query, other keys ignored. models: see submissions.parse_params; model: where the
    query names none. Raises InvalidFields."""
    given: dict[str, Any] = {"model": model}
    numbers = {*map(camel, RANGES)}
    for name in query.keys() & {*PARAMETERS}:
        is_whole = name in numbers and re.fullmatch(r"[0-9]{1,9}", query[name])
        given[name] = int(query[name]) if is_whole else query[name]
    errors: list[tuple[str, str]] = []
    params = submissions.parse_params(given, models, errors)
    if errors:
        raise jobs.InvalidFields(errors)
    return params


MEDIA = re.compile(
    r"(?:multipart/form-data|image/[^;]+|application/octet-stream|)[ \t]*(?:;.*)?", re.IGNORECASE
)


def image_of(content_type: str, body: bytes) -> memoryview:
    """The body itself, or a form's field "image". Raises Refused 400, 415."""
    if not body:
        raise Refused(400, "NO_PAGE", "the body is empty; send an image")
    if not MEDIA.fullmatch(content_type):
        raise Refused(415, "MEDIA_TYPE", 'send the image itself, or a form with the field "image"')
    try:
        boundary = forms.boundary_of(content_type)
        return forms.field(body, boundary, "image") if boundary else memoryview(body)
    except forms.BadForm as error:
        raise Refused(400, "BAD_FORM", str(error)) from error


def page_key(layout: Layout, choice: EngineChoice, data: bytes | memoryview, params: Params) -> str:
    """Of what decides how a page will look: bytes, params, engine, and weights as files."""
    weights = []
    for name, file in weightfiles.find_weights(layout.models).items():
        with contextlib.suppress(OSError):
            stat = file.path.stat()
            weights.append((name, stat.st_size, stat.st_mtime_ns))
    chosen = (choice.device, choice.precision, choice.engine, choice.convolutions)
    facts = (asdict(params), chosen, sorted(weights))
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a page: an open file with it, or why it stays as it was."""

    file: BinaryIO | None
    reason: str = ""


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


class Reader:
    """Pages outside any job, through the workers beside the jobs."""

    def __init__(
        self, dispatcher: Dispatcher, layout: Layout, limits: Limits, wait_s: float, cache_bytes: int
    ) -> None:
        self.dispatcher = dispatcher
        self.layout = layout
        self.limits = limits
        self.wait_s = wait_s  # for a page, before its reader gets the original
        self.bodies = threading.BoundedSemaphore(BODIES)
        self._lock = threading.RLock()  # of all below
        self._cache: Cache | None = None  # made when the first page comes
        self._cache_bytes = cache_bytes
        self._underway: dict[str, Future[Any]] = {}
        self._left: dict[str, Path] = {}  # sources whose request is over before their page is
        self._failed: OrderedDict[str, str] = OrderedDict()  # key -> why it can't be upscaled
        self._deaths: OrderedDict[str, int] = OrderedDict()  # key -> workers that died with it

    @contextlib.contextmanager
    def holding_body(self) -> Iterator[None]:
        """Hold a page in memory, once few enough others do. Raises Refused 503."""
        if not self.bodies.acquire(timeout=self.wait_s):
            detail = f"{BODIES} pages are held already; try again"
            raise Refused(503, "BUSY", detail, {"Retry-After": "5"}, close=True)
        try:
            yield
        finally:
            self.bodies.release()

    def convert(self, data: bytes | memoryview, params: Params) -> Outcome:
        """The page upscaled, in wait_s at most; what isn't finished by then is when it is asked for again."""
        if storage.sniff(bytes(data[:16])) not in IMAGES:
            return Outcome(None, "it is no image that can be read here")
        try:
            key = self._key(data, params)
            with self._lock:
                found = self._cached(key)
            return found or self._computed(key, data, params)
        except OSError as error:
            log.warning("a reader's page stays as it was: %s", error)
            return Outcome(None, f"the disk refused: {storage.reason_of(error)}")

    def _key(self, data: bytes | memoryview, params: Params) -> str:
        return page_key(self.layout, self.dispatcher.choice, data, params)

    def _cached(self, key: str) -> Outcome | None:
        if self._cache is None:
            self._cache = Cache(self.layout.previews / "reader", self._cache_bytes)
        file = self._cache.open(key)
        if file is None and key in self._failed:
            return Outcome(None, self._failed[key])
        return Outcome(file) if file else None

    # -- computing
    def _computed(self, key: str, data: bytes | memoryview, params: Params) -> Outcome:
        source = None
        with self._lock:
            future = self._underway.get(key)
            if future is None:
                if len(self._underway) >= AT_ONCE or self.dispatcher.stopping:
                    busy = f"{AT_ONCE} pages are being computed already"
                    return Outcome(None, STOPPING if self.dispatcher.stopping else busy)
                future, source = self._ask(key, data, params)
        try:
            return self._told(key, future.result(self.wait_s))
        except FutureTimeout:
            return Outcome(None, f"it takes over {self.wait_s:.0f} s; asked for again later it may be there")
        except (CancelledError, JobError) as error:
            return Outcome(None, str(error) or STOPPING)
        finally:
            with self._lock:
                if source and not future.done():
                    self._left[key] = source
                elif source:
                    storage.remove_file(source)

    def _told(self, key: str, event: PageDone | PageFailed | TaskFailed) -> Outcome:
        """What the worker's answer means for who waits for it."""
        if isinstance(event, PageFailed):
            return Outcome(None, event.error)
        if isinstance(event, TaskFailed):  # no weights, no device, no disk
            return Outcome(None, event.detail)
        with self._lock:
            assert self._cache is not None
            self._cache.add(event.output)  # _ended may not have come to it: a future wakes its waiters first
            return self._cached(key) or Outcome(None, "its file went while it was waited for")

    def _ask(self, key: str, data: bytes | memoryview, params: Params) -> tuple[Future[Any], Path]:
        assert self._cache is not None
        # With a suffix: a page that is large enough already is taken over under it.
        source = self._cache.folder / f"{SOURCE}{key}.{storage.sniff(bytes(data[:16]))}"
        try:
            source.write_bytes(data)  # read once, soon: no need to sync it
        except OSError:
            storage.remove_file(source)
            raise
        page = ComputePage(key, 0, 1, source, self._cache.folder / key, params, None, self.limits)
        future = self.dispatcher.ask(key, page)
        self._underway[key] = future
        future.add_done_callback(lambda done: self._ended(key, done))
        return future, source

    def _ended(self, key: str, future: Future[Any]) -> None:
        with self._lock:
            self._underway.pop(key, None)
            source = self._left.pop(key, None)
            if source:
                with contextlib.suppress(OSError):
                    storage.remove_file(source)
            event = None if future.cancelled() or future.exception() else future.result()
            if isinstance(event, PageDone) and self._cache is not None:
                self._cache.add(event.output)
            elif isinstance(event, PageFailed):
                self._fail(key, event.error)
            elif not future.cancelled() and future.exception():
                self._deaths[key] = self._deaths.get(key, 0) + 1
                if self._deaths[key] >= DEATHS:
                    self._fail(key, "the worker process died twice while computing this page")
                while len(self._deaths) > REMEMBERED:
                    self._deaths.popitem(last=False)

    def _fail(self, key: str, reason: str) -> None:
        self._failed[key] = reason
        while len(self._failed) > REMEMBERED:
            self._failed.popitem(last=False)
