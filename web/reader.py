"""POST /pages: one page for a manga reader, upscaled while it waits.

Map: a request - Outcome - Reader (convert, computing)
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
import re
import threading
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
    DIED_TWICE,
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
from web.asking import AT_ONCE, SOURCE, Asked, Cache, Newest
from web.wire import Refused
from work import submissions
from work.dispatch import Dispatcher

log = logging.getLogger("reader")

PAGE_BYTES = 64 << 20  # of one page as it comes; readers get theirs from the web
BODIES = 16  # requests that hold a page in memory; the others wait
STOPPING = "the service is shutting down"
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
        self._asked = Asked(dispatcher)
        self._lock = self._asked.lock  # of all below
        self._cache: Cache | None = None  # made when the first page comes
        self._cache_bytes = cache_bytes
        self._left: dict[str, Path] = {}  # sources whose request is over before their page is
        self._failed: Newest[str] = Newest()  # key -> why it can't be upscaled

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
        if file is None and self._asked.is_deadly(key):
            return Outcome(None, DIED_TWICE)
        return Outcome(file) if file else None

    # -- computing
    def _computed(self, key: str, data: bytes | memoryview, params: Params) -> Outcome:
        source = None
        with self._lock:
            future = self._asked.underway.get(key)
            if future is None:
                if self._asked.is_full or self.dispatcher.stopping:
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
        return self._asked.ask(key, page, lambda event: self._ended(key, event)), source

    def _ended(self, key: str, event: Any) -> None:
        source = self._left.pop(key, None)
        if source:
            with contextlib.suppress(OSError):
                storage.remove_file(source)
        if isinstance(event, PageDone) and self._cache is not None:
            self._cache.add(event.output)
        elif isinstance(event, PageFailed):
            self._failed[key] = event.error
