"""POST /preview: a page in several settings before its volume is submitted, and what the volume will take.

Map: Wanted, parse - Source - Previews (a page, its part, computing, answering)
Rule: what is shown is what a job would make; it lies in a bounded folder of its own, in no job's way.
Runs in: http-* threads; the futures' ends in the dispatcher thread.

    input --Survey--> page, sizes of all --.
    image ------------> page --------------+--ComputePage without a plan, one a variant--> images
                                           '--Preview with a crop------------------------> before
    GET /preview/{key} <-- previews/preview/<key>.<suffix>
"""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import jobs
import storage
from files import inputs
from jobs import JobError
from messages import (
    OF_VOLUMES,
    ComputePage,
    Crop,
    Limits,
    PageDone,
    PageFailed,
    Params,
    Preview,
    Previewed,
    Survey,
    Surveyed,
    TaskFailed,
    Workload,
    camel,
)
from storage import Layout
from web import forms, reader
from web.asking import AT_ONCE, Asked, Cache, Newest
from web.wire import Refused
from work import predict, submissions, volumes
from work.dispatch import Dispatcher

VARIANTS = 4  # of one request
CACHE_BYTES = 256 << 20  # of images: pages as they came, and what was made of them
CROP_LEAST, SIDE_MOST = 8, 65_535  # pixels
VOLUME = {"pages": 20_000, "pixels": 1 << 50, "bytes": 1 << 50}  # facts that may come with an image, at most


# ---------------------------------------------------------------- the request
@dataclass(frozen=True, slots=True)
class Wanted:
    """A request, checked. input: (type, path) where the page lies in incoming/."""

    variants: tuple[Params, ...]
    crop: Crop | None = None
    input: tuple[str, str] | None = None
    n: int = 0  # page of the input; 0: the middle one
    volume: dict[str, int] | None = None  # of an image: what is known of its volume, see VOLUME


def parse(body: dict[str, Any], models: dict[str, str], has_image: bool) -> Wanted:
    """Check a request's JSON. models: see submissions.parse_params. Raises InvalidFields with all faults."""
    errors: list[tuple[str, str]] = []
    given = body.get("variants", [{}])
    if not isinstance(given, list) or not 1 <= len(given) <= VARIANTS:
        errors.append(("variants", f"must be a list of 1 to {VARIANTS} objects like params of POST /jobs"))
        given = []
    variants = []
    for n, one in enumerate(given):
        faults: list[tuple[str, str]] = []
        if isinstance(one, dict):
            variants.append(submissions.parse_params(one, models, faults))
        else:
            faults.append(("params", "must be an object"))
        errors += [(f"variants[{n}]{name.removeprefix('params')}", fault) for name, fault in faults]
    crop = _crop(body.get("crop"), errors)
    if crop and any(params.has_target for params in variants):
        errors.append(("crop", "goes with a scale: what a part's target size would be, only the page tells"))
    if has_image:
        wanted = Wanted(tuple(variants), crop, volume=_volume(body.get("volume"), errors))
    else:
        wanted = Wanted(tuple(variants), crop, _input(body.get("input"), errors), _page(body, errors))
    if errors:
        raise jobs.InvalidFields(errors)
    return wanted


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _crop(given: Any, errors: list[tuple[str, str]]) -> Crop | None:
    if given is None:
        return None
    leasts = {"x": 0, "y": 0, "width": CROP_LEAST, "height": CROP_LEAST}
    if isinstance(given, dict) and all(_is_whole(given.get(k), leasts[k], SIDE_MOST) for k in leasts):
        return given["x"], given["y"], given["width"], given["height"]
    errors.append(("crop", f"must have whole x and y from 0, width and height from {CROP_LEAST}"))
    return None


def _volume(given: Any, errors: list[tuple[str, str]]) -> dict[str, int] | None:
    if given is None:
        return None
    if not isinstance(given, dict) or not _is_whole(given.get("pages"), 1, VOLUME["pages"]):
        errors.append(("volume", f"must have pages, a whole number from 1 to {VOLUME['pages']}"))
        return None
    for name in ("pixels", "bytes"):
        if given.get(name) is not None and not _is_whole(given[name], 1, VOLUME[name]):
            errors.append((f"volume.{name}", f"must be a whole number from 1 to {VOLUME[name]}"))
    return {name: given[name] for name in VOLUME if given.get(name) is not None}


def _input(given: Any, errors: list[tuple[str, str]]) -> tuple[str, str]:
    kind, path = (given.get("type"), given.get("path")) if isinstance(given, dict) else (None, None)
    if kind not in ("folder", "zip") or not isinstance(path, str) or not path:
        errors.append(("input", 'is required: {"type": "folder" | "zip", "path": "incoming/..."}'))
    return str(kind), str(path)


def _page(body: dict[str, Any], errors: list[tuple[str, str]]) -> int:
    n = body.get("page")
    if n is not None and not _is_whole(n, 1, 1 << 31):
        errors.append(("page", "must be a whole number from 1, or null for the one in the middle"))
    return n or 0


def request_field(content_type: str, body: bytes) -> bytes:
    """A form's field "request", b"" where there is none. Raises Refused 400."""
    try:
        boundary = forms.boundary_of(content_type)
        return bytes(forms.field(body, boundary, "request")) if boundary else b""
    except forms.NoField:
        return b""
    except forms.BadForm as error:
        raise Refused(400, "BAD_FORM", str(error)) from error


@dataclass(frozen=True, slots=True)
class Source:
    """Where the page lies. Of several volumes, which a job each will take, the middle one stands for all."""

    place: Path
    volume: str | None = None  # its path in the upload, where that holds several
    volumes: int | None = None  # how many those are


def source_of(layout: Layout, wanted: Wanted, limits: Limits) -> Source:
    """Raises storage.OutsideIncoming, InputMissing; where a variant is split InputUnusable's family."""
    kind, path = wanted.input or ("", "")
    path = submissions.checked_input(layout, path, kind, limits)
    place = layout.incoming / path
    if all(params.split == "none" for params in wanted.variants):
        return Source(place)
    found = volumes.find(place, limits)
    middle = found[len(found) // 2].parts
    place = inputs.resolve_incoming(layout, "/".join(("incoming", path, *middle)))
    return Source(place, "/".join(middle) or None, len(found))


# ---------------------------------------------------------------- previews
@dataclass(frozen=True, slots=True)
class Page:
    """What is previewed: a file of the cache."""

    key: str
    path: Path
    name: str | None = None  # in its input, as of the two below
    n: int | None = None
    count: int | None = None
    source: Source | None = None


class Previews:
    """Pages outside any job, through the workers beside the jobs; see reader.Reader."""

    def __init__(self, dispatcher: Dispatcher, layout: Layout, limits: Limits, wait_s: float) -> None:
        self.dispatcher = dispatcher
        self.layout = layout
        self.limits = limits
        self.wait_s = wait_s  # for all of a request; what isn't there by then is at a later one
        self.folder = layout.previews / "preview"
        self._questions = Asked(dispatcher)
        self._lock = self._questions.lock  # of all below
        self._made: Cache | None = None  # with the first request
        self._done: Newest[PageDone] = Newest()

    @property
    def _cache(self) -> Cache:
        with self._lock:
            if self._made is None:
                self._made = Cache(self.folder, CACHE_BYTES)
            return self._made

    def image(self, key: str) -> BinaryIO | None:
        """One of the images that an answer named, while it is kept."""
        with self._lock:
            return self._cache.open(key)

    def keep(self, data: memoryview) -> Page:
        """Take in an image that was sent. Raises Refused 422, OSError."""
        kind = storage.sniff(bytes(data[:16]))
        if kind not in reader.IMAGES:
            kinds = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG XL"
            raise Refused(422, "NO_IMAGE", f"what was sent is no {kinds}")
        key = hashlib.sha256(data).hexdigest()[:32]
        path = self._cache.folder / f"{key}.{kind}"
        with self._lock:
            is_there = self._has(key)
        if not is_there:
            storage.write_whole(path, bytes(data))  # not under the lock, for which the dispatcher waits, too
            with self._lock:
                self._cache.add(path.name)
        return Page(key, path)

    def _has(self, key: str) -> bool:
        file = self._cache.open(key)
        if file is None:
            return False
        file.close()
        return True

    def of_image(self, page: Page, wanted: Wanted) -> dict[str, Any]:
        """The answer for an image that was sent. Raises Refused."""
        volume, deadline_s = wanted.volume, time.monotonic() + self.wait_s
        source_bytes = page.path.stat().st_size
        computed = self._computed(page, wanted, source_bytes, deadline_s)
        loads = [
            workload_of(volume, done, params, source_bytes, wanted.crop) if volume else None
            for params, done in zip(wanted.variants, computed, strict=True)
        ]
        return self._answer(page, wanted, computed, loads)

    def of_input(self, source: Source, wanted: Wanted) -> dict[str, Any]:
        """The answer for a page of an input in incoming/. Raises Refused."""
        deadline_s = time.monotonic() + self.wait_s
        key = _hash("survey", source.place, wanted.n, [asdict(params) for params in wanted.variants])
        folder = self._cache.folder
        task = Survey(key, source.place, wanted.n, folder, wanted.variants, self.limits)
        found: Surveyed = self._awaited(self._asked(key, task), deadline_s)
        if found.error:
            raise Refused(422, storage.InputUnusable.code, found.error)
        self._take_in(key, task, found)
        path = folder / found.file
        page = Page(path.stem, path, found.name, found.n, found.count, source)
        computed = self._computed(page, wanted, page.path.stat().st_size, deadline_s)
        return self._answer(page, wanted, computed, list(found.workloads))

    # -- computing
    def _computed(self, page: Page, wanted: Wanted, source_bytes: int, deadline_s: float) -> list[PageDone]:
        """One event a variant. Raises Refused."""
        asked = []
        if wanted.crop:
            self._cut_out(page, wanted.crop, deadline_s)
        for variant in wanted.variants:
            params = replace(variant, **{name: getattr(Params(), name) for name in OF_VOLUMES})
            settings = reader.page_key(self.layout, self.dispatcher.choice, b"", params)
            key = _hash(page.key, wanted.crop, settings)
            task = ComputePage(
                key, 0, 1, page.path, self.folder / key, params, None, self.limits, crop=wanted.crop
            )
            asked.append((task, self._known(key) or self._asked(key, task, source_bytes)))
        done, faults = [], []
        for n, (task, future) in enumerate(asked):
            event = future if isinstance(future, PageDone) else self._awaited(future, deadline_s)
            if isinstance(event, PageDone):
                self._take_in(task.job_id, task, event, source_bytes)
                done.append(event)
            elif isinstance(event, TaskFailed) and event.code == storage.DiskRefused.code:
                raise Refused(507, event.code, event.detail)
            else:
                reason = event.error if isinstance(event, PageFailed) else event.detail
                faults.append((f"variants[{n}]", reason))
        if faults:
            detail = "; ".join(dict.fromkeys(reason for _, reason in faults))
            raise Refused(422, "NO_PREVIEW", f"no preview: {detail}", errors=faults)
        return done

    def _cut_out(self, page: Page, crop: Crop, deadline_s: float) -> None:
        """Have the part of the page as it is, for the eye."""
        key = part_key(page, crop)
        with self._lock:
            if self._has(key):
                return
        target = self.folder / f"{key}.png"
        task = Preview(key, page.path, target, 0, self.limits, crop)
        drawn: Previewed = self._awaited(self._asked(key, task), deadline_s)
        if drawn.error:
            raise Refused(422, "NO_PREVIEW", f"no preview: {drawn.error}", errors=[("crop", drawn.error)])
        self._take_in(key, task, drawn)

    def _known(self, key: str) -> PageDone | None:
        with self._lock:
            return self._done[key] if key in self._done and self._has(key) else None

    def _asked(self, key: str, task: Survey | Preview | ComputePage, source_bytes: int = 0) -> Future[Any]:
        """The worker's answer to be. Raises Refused 422, 503."""
        with self._lock:
            if self._questions.is_deadly(key):
                raise Refused(422, "NO_PREVIEW", "no preview: the worker process died of this page, twice")
            if self._questions.is_full and key not in self._questions.underway:
                busy = f"{AT_ONCE} previews are being made already; try again"
                raise Refused(503, "BUSY", busy, {"Retry-After": "5"})
            return self._questions.ask(key, task, lambda event: self._take_in(key, task, event, source_bytes))

    def _awaited(self, future: Future[Any], deadline_s: float) -> Any:
        """Raises Refused 503 when it isn't there in time."""
        try:
            return future.result(max(0.0, deadline_s - time.monotonic()))
        except FutureTimeout as error:
            slow = f"it takes over {self.wait_s:.0f} s, and goes on; ask again"
            raise Refused(503, "PREVIEW_SLOW", slow, {"Retry-After": "2"}) from error
        except CancelledError as error:
            raise jobs.ShuttingDown("the service is shutting down; ask after its restart") from error
        except JobError as error:
            raise Refused(503, "NO_PREVIEW", f"no preview: {error.detail}", {"Retry-After": "5"}) from error

    def _take_in(self, key: str, task: Any, event: Any, source_bytes: int = 0) -> None:
        """Keep what an answer brought; more than once for those who wait, since a future wakes them before
        it calls back."""
        with self._lock:
            if isinstance(event, Surveyed) and not event.error:
                self._cache.add(event.file)
            elif isinstance(event, Previewed) and not event.error:
                self._cache.add(task.target.name)
            elif isinstance(event, PageDone):
                self._cache.add(event.output)
                is_new = key not in self._done
                self._done[key] = event
                if is_new and event.plan is not None:
                    sample = predict.sample_of(event, event.plan, 0 if task.crop else source_bytes)
                    self.dispatcher.rates.remember(task.params, event.plan, sample)

    # -- answering
    def _answer(
        self, page: Page, wanted: Wanted, computed: list[PageDone], loads: list[Workload | None]
    ) -> dict[str, Any]:
        before = part_key(page, wanted.crop) if wanted.crop else page.key
        return {
            "page": page.n,
            "name": page.name,
            "pages": page.count,
            "volume": page.source.volume if page.source else None,
            "volumes": page.source.volumes if page.source else None,
            "before": f"/preview/{before}",
            "variants": [
                self._variant(params, done, load)
                for params, done, load in zip(wanted.variants, computed, loads, strict=True)
            ],
        }

    def _variant(self, params: Params, done: PageDone, load: Workload | None) -> dict[str, Any]:
        told = None
        if load is not None and done.plan is not None:
            told = predict.to_json(predict.forecast(load, self.dispatcher.rates.rate(params, done.plan)))
        return {
            "params": {camel(key): value for key, value in asdict(params).items()},
            "after": f"/preview/{Path(done.output).stem}",
            "width": done.width,
            "height": done.height,
            "mode": done.mode,
            "bytes": done.size_bytes,
            "sha256": done.sha256,
            "model": done.model,
            "carried": done.carried,
            "deviation": done.deviation,
            "seconds": done.seconds,
            "prediction": told,
        }


def part_key(page: Page, crop: Crop) -> str:
    """Of the image of a part of a page as it came."""
    return _hash("part", page.key, crop)


def workload_of(
    volume: dict[str, int], done: PageDone, params: Params, source_bytes: int, crop: Crop | None
) -> Workload | None:
    """Of a volume of which only these facts and one page are known: all its pages count as like that
    one. None where that says too little."""
    count = volume["pages"]
    size_bytes = volume.get("bytes", 0 if crop else source_bytes * count)
    if done.carried:
        return Workload(carried_bytes=volume.get("bytes", source_bytes * count))
    if not done.input_pixels:  # large enough, and written anew by no network
        return Workload(output_pixels=done.width * done.height * count, source_bytes=size_bytes)
    pixels = volume.get("pixels", 0 if crop else done.input_pixels * count)
    growth = done.width * done.height / done.input_pixels if params.has_target else params.scale**2
    return Workload(count, pixels, round(pixels * growth), size_bytes) if pixels else None


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]
