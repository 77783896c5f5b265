"""The REST layer: each request to its answer.

Map: Api (each request, jobs, pages, artifact, uploads, readers, previews, about the service, WebSocket
    upgrades) - in words and as JSON
Under it: gate.py (who may ask), bodies.py (what a request carries), refusals.py (errors to answers)
Rule: it decides nothing about jobs: it reads the request, calls one function, and words the answer.
Runs in: http-N threads, one a connection.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import itertools
import logging
import os
import re
import time
import unicodedata
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

from websockets.http11 import Request as UpgradeRequest
from websockets.server import ServerProtocol

import cluster
import jobs
import settings
import storage
from files import containers, inputs, weightfiles
from jobs import Job, JobTable
from messages import Params, Preview, Probe, Probed, setting_name
from web import asking, openapi, preview, reader, routes, webpage, wire
from web.bodies import digest_of, json_body, json_object, whole_number
from web.gate import NO_COOKIE, Gate, cors, preflight
from web.live import MESSAGE_BYTES, Live, Watcher
from web.refusals import refusal_of
from web.wire import Answer, Refused, Request, json_answer, json_list_answer
from work import dispatch, rebuild, submissions, volumes
from work.metrics import Family, expose, gauge, gauges, processor_seconds

log = logging.getLogger("api")

VERSION = "0.1.0"
PREVIEW_S = 20.0  # for a worker's answer; a cold one loads torch first
ROOM_LOOK_BYTES = 16 << 20  # of an upload, between two looks at the disk
# Of opening a file that is not there; None: what is there is no file.
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, None)


class Api:
    """One method a route; each takes the request and the path's variables."""

    def __init__(
        self,
        config: settings.Config,
        table: JobTable,
        dispatcher: dispatch.Dispatcher,
        live: Live,
        rebuild: rebuild.Rebuild,
    ) -> None:
        self.config = config
        self.layout = config.layout
        self.gate = Gate(config)
        self.table = table
        self.dispatcher = dispatcher
        self.live = live
        self.rebuild = rebuild
        self.count = dispatcher.metrics
        self.reader = reader.Reader(
            dispatcher, self.layout, config.limits, config.page_wait_s, config.page_cache_bytes
        )
        self._drawn = asking.Asked(dispatcher)
        self.previews = preview.Previews(dispatcher, self.layout, config.limits, config.page_wait_s)
        self.started_s = time.monotonic()
        self.connections: Callable[[], int] = lambda: 0
        self._probed_files: object = None  # the weights files that dispatcher.probed speaks of
        self._asked_probe: object = None  # the last question to a worker

    # -- every request comes through here
    def handle(self, handler: wire.Handler, request: Request) -> Answer | None:
        """Check, route, answer; None for a socket that went to the WebSocket loop."""
        origin = None
        try:
            self.gate.check_host(request)
            origin = self.gate.check_origin(request)
            answer = self._route(handler, request, origin)
        except EOFError:
            raise
        # Around a request: whatever went wrong, this client gets an answer and the others stay.
        except Exception as error:
            refusal = refusal_of(error)
            log.info("%s %s: %d %s", request.method, ascii(request.path), refusal.status, refusal.detail)
            answer = refusal.answer()
            if refusal.close:
                request.keep_alive = False
        self.count.requests.add(1, str(answer.status if answer else 101))
        if answer is not None:
            answer.headers |= {"X-Content-Type-Options": "nosniff"} | cors(origin)
        return answer

    def _route(self, handler: wire.Handler, request: Request, origin: str | None) -> Answer | None:
        if request.method == "OPTIONS" and request.headers.all("access-control-request-method"):
            return preflight(origin)
        method = "GET" if request.method == "HEAD" else request.method
        allowed = []
        for route in routes.ROUTES:
            values = route.match(request.segments)
            if values is None:
                continue
            allowed.append(route.method)
            if route.method == method:
                if not route.open:
                    self.gate.check_token(request)
                if route.handler.startswith("watch"):
                    return self._upgrade(handler, request, values)
                return getattr(self, route.handler)(request, **values)  # type: ignore[no-any-return]
        if not allowed:
            raise Refused(404, "NO_ROUTE", f"there is nothing at {request.path[:200]!a}")
        if "GET" in allowed:
            allowed.append("HEAD")
        allow = {"Allow": ", ".join(sorted({*allowed, "OPTIONS"}))}
        if request.method == "OPTIONS":
            return Answer(204, allow)
        raise Refused(405, "METHOD", f"{request.method[:20]} is not possible here", allow)

    # -- jobs
    def submit(self, request: Request) -> Answer:
        """POST /jobs."""
        if self.dispatcher.stopping:
            raise jobs.ShuttingDown("the service is shutting down; submit again after its restart")
        body = json_body(request)
        key = request.headers.one("idempotency-key")
        if key is not None and not 1 <= len(key) <= 255:
            raise jobs.InvalidFields([("Idempotency-Key", "must have 1 to 255 characters")])
        wanted = submissions.parse_submission(body, weightfiles.model_names(self.layout.models))
        body_hash = submissions.request_hash(body)
        if not submissions.submitted(self.table, key, body_hash):
            self._check_room(0)
        limits, reserve = self.config.limits, self.dispatcher.reserve_bytes
        given = (self.table, self.layout, wanted, key, body_hash, limits, reserve)
        with _blaming("input.path"):
            made = self.dispatcher.cache.with_room(lambda: volumes.submit(*given))
        self.dispatcher.wake()
        ids = [job.id for job in made]
        several = {} if wanted.params.split == "none" else {"jobIds": ids}
        answer = json_answer({"jobId": ids[0]} | several, 202)
        answer.headers["Location"] = f"/jobs/{ids[0]}"
        return answer

    def list_jobs(self, request: Request) -> Answer:
        """GET /jobs."""
        state = request.query.get("status")
        if state is not None and state not in jobs.STATES:
            raise jobs.InvalidFields([("status", f"must be one of {', '.join(jobs.STATES)}")])
        limit = whole_number(request.query, "limit", routes.LIMIT) or routes.LISTED
        before = whole_number(request.query, "cursor", routes.CURSOR)
        found = self.table.page_of_jobs(state, request.query.get("q", ""), limit + 1, before)
        cursor = str(found[limit - 1].number) if len(found) > limit else None
        states = [submissions.to_state(job, self.layout) for job in found[:limit]]
        return json_answer({"jobs": states, "nextCursor": cursor})

    def _state_answer(self, job: Job) -> Answer:
        return json_answer(submissions.to_state(job, self.layout))

    def job(self, _request: Request, id: str) -> Answer:
        """GET /jobs/{id}."""
        return self._state_answer(self.table.get(id))

    def delete(self, _request: Request, id: str) -> Answer:
        """DELETE /jobs/{id}."""
        # A cancelled job's worker may still be writing for a moment.
        if self.table.get(id).state != jobs.RUNNING:
            self.dispatcher.wait_released(id, timeout_s=5)
            if self.dispatcher.is_held(id):
                raise storage.FilesInUse(f"a worker still holds pages of job {id}; try again in a moment")
        submissions.delete(self.table, self.layout, id)
        self.live.end(id)
        return Answer(204)

    def resume(self, request: Request, id: str) -> Answer:
        """POST /jobs/{id}/resume."""
        if self.dispatcher.stopping:
            raise jobs.ShuttingDown("the service is shutting down; resume after its restart")
        self.table.get(id)
        body = json_body(request, optional=True)
        path, kind = submissions.pick(body, "input_path"), submissions.pick(body, "input_type")
        given = None
        if path is not None or kind is not None:
            if not isinstance(path, str) or kind not in ("folder", "zip"):
                fault = 'inputPath (text) and inputType ("folder" or "zip") go together'
                raise jobs.InvalidFields([("inputPath", fault)])
            given = (path, kind)
        with _blaming("inputPath"):
            job = submissions.resume(self.table, self.layout, id, given, self.config.limits)
        self.dispatcher.wake()
        return self._state_answer(job)

    def cancel(self, _request: Request, id: str) -> Answer:
        """POST /jobs/{id}/cancel."""
        job = jobs.cancel(self.table, id, self.table.clock())
        self.dispatcher.tidy(id)
        return self._state_answer(job)

    def prioritize(self, request: Request, id: str) -> Answer:
        """POST /jobs/{id}/priority."""
        self.table.get(id)
        body, errors = json_body(request), list[tuple[str, str]]()
        priority = submissions.parse_priority(body, errors)
        if errors:
            raise jobs.InvalidFields(errors)
        return self._state_answer(jobs.prioritize(self.table, id, priority))

    def queue(self, _request: Request) -> Answer:
        """GET /queue."""
        counts = self.table.counts()
        numbers = {"waiting": counts[jobs.PENDING], "running": counts[jobs.RUNNING]}
        return json_answer(
            {"paused": self.table.is_paused, **numbers, "highestPriority": self.table.highest_waiting()}
        )

    def pause_queue(self, request: Request) -> Answer:
        """POST /queue/pause."""
        self.table.pause(True)
        self.dispatcher.wake()
        return self.queue(request)

    def resume_queue(self, request: Request) -> Answer:
        """POST /queue/resume."""
        self.table.pause(False)
        self.dispatcher.wake()
        return self.queue(request)

    def pages(self, _request: Request, id: str) -> Answer:
        """GET /jobs/{id}/pages."""
        self.table.get(id)
        return json_list_answer("pages", map(_page_json, self.table.pages(id)))

    def _page(self, id: str, n: str) -> tuple[Job, jobs.Page]:
        job = self.table.get(id)
        page = self.table.page(id, int(n)) if re.fullmatch(r"[1-9][0-9]{0,8}", n) else None
        if page is None:
            if not job.total and not job.is_over:
                raise Refused(409, "NOT_STAGED", "the job's pages are not listed yet")
            raise Refused(404, "UNKNOWN_PAGE", f"job {id} has no page {n[:20]!a}")
        return job, page

    def before(self, request: Request, id: str, n: str) -> Answer:
        """GET /jobs/{id}/pages/{n}/before."""
        job, page = self._page(id, n)
        width = whole_number(request.query, "w", routes.WIDTH)
        path = self.layout.staging / job.id / page.staged
        preview = self._preview_path(page, "before", page.source_sha256, width)
        if preview and preview.is_file():
            return self._image(request, preview)
        if path.is_file():
            return self._image(request, self._preview(path, preview, width) if preview else path)
        if not job.input_path:
            raise Refused(410, storage.InputMissing.code, submissions.INPUT_UNKNOWN)
        source = self.layout.incoming / job.input_path
        try:
            name = storage.whole_name(page.name, page.staged)
            data = inputs.read_source_page(source, name, page.source_sha256, self.config.limits)
        except storage.StorageError as error:
            raise Refused(410, error.code, error.detail) from error
        if not preview:
            return Answer(200, _image_headers(data), data)
        # Its own, not the preview's: whoever comes or gives up meanwhile takes it from nobody.
        copy = preview.with_name(f"{uuid.uuid4()}.{page.staged or 'page'}")  # of which it may be a half
        storage.write_whole(copy, data)

        def remove(_: Any) -> None:
            with contextlib.suppress(OSError):  # being read, on Windows
                storage.remove_file(copy)

        return self._image(request, self._preview(copy, preview, width, remove))

    def after(self, request: Request, id: str, n: str) -> Answer:
        """GET /jobs/{id}/pages/{n}/after."""
        job, page = self._page(id, n)
        width = whole_number(request.query, "w", routes.WIDTH)
        if page.output is None or page.sha256 is None:
            raise Refused(409, "NOT_THERE_YET", f"page {n} is not finished")
        preview = self._preview_path(page, "after", page.sha256, width)
        if preview and preview.is_file():
            return self._image(request, preview)
        path = self.layout.output_dir(job.title, job.volume, job.id) / page.output
        if not path.is_file():
            why = "was removed by age" if job.outputs_removed_s else "is no longer on disk"
            raise Refused(410, "PAGE_GONE", f"the file of page {n} {why}; {_remedy(job)}")
        return self._image(request, self._preview(path, preview, width) if preview else path)

    def _preview_path(self, page: jobs.Page, side: str, sha256: str, width: int | None) -> Path | None:
        if width is None:
            return None
        return self.layout.previews / page.job_id / f"{page.n}-{side}-{width}-{sha256[:16]}.jpg"

    def _preview(
        self, source: Path, target: Path, width: int | None, ended: Callable[[Any], None] = lambda _: None
    ) -> Path:
        """ended: called once no worker will read the source, which may be after who waits gave up."""
        task = Preview(target.name + target.parent.name, source, target, width or 0, self.config.limits)
        with self._drawn.lock:
            is_deadly = self._drawn.is_deadly(task.key)
            if is_deadly or task.key in self._drawn.underway:  # with another copy of the page, perhaps
                ended(None)
            if is_deadly:
                raise Refused(422, "NO_PREVIEW", "the page can't be shown: two worker processes died of it")
            future = self._drawn.ask(task.key, task, ended)
        try:
            answer = future.result(PREVIEW_S)
        except (FutureTimeout, CancelledError, jobs.JobError) as error:
            raise Refused(503, "NO_PREVIEW", "no worker could draw it in time; try again") from error
        if answer.error:
            raise Refused(422, "NO_PREVIEW", f"the page can't be shown: {answer.error}")
        return target

    def _image(self, request: Request, path: Path) -> Answer:
        try:
            file = storage.open_regular(path)
        except OSError as error:
            _raise_unless_gone(error)
            raise Refused(410, "PAGE_GONE", "the file is no longer on disk") from error
        stat = os.fstat(file.fileno())
        # Good enough for an image: size and time change whenever it is written anew.
        etag = f"{stat.st_size:x}-{stat.st_mtime_ns:x}"
        headers = _image_headers(file.read(16))
        return wire.file_answer(request, file, etag, stat.st_mtime, headers)

    def artifact(self, request: Request, id: str) -> Answer:
        """GET /jobs/{id}/artifact."""
        job = self.table.get(id)
        if job.state != jobs.SUCCESS or not job.artifact_hash:
            raise Refused(409, "NOT_FINISHED", f"job {id} is {job.state}; its artifact is not there")
        path = submissions.artifact_of(job, self.layout)
        kind = job.params.container
        try:
            file = storage.open_regular(path)
        except OSError as error:
            _raise_unless_gone(error)
            why = "was removed by age" if job.artifact_removed_s else "is no longer on disk"
            detail = f"the artifact {why}; {_remedy(job)}"
            raise Refused(410, "ARTIFACT_GONE", detail) from error
        size = os.fstat(file.fileno()).st_size
        if size != job.artifact_bytes:
            file.close()
            detail = f"the artifact on disk has {size} bytes instead of {job.artifact_bytes}"
            raise Refused(410, "ARTIFACT_DAMAGED", detail)
        digest = base64.b64encode(bytes.fromhex(job.artifact_hash)).decode()
        headers = {
            "Content-Type": containers.MEDIA_TYPES[kind],
            "Content-Disposition": content_disposition(f"{job.title} {job.volume}.{kind}"),
            "Repr-Digest": f"sha-256=:{digest}:",
        }
        return wire.file_answer(request, file, job.artifact_hash, job.finished_s or 0, headers)

    def report(self, _request: Request, id: str) -> Answer:
        """GET /jobs/{id}/report."""
        job = self.table.get(id)
        pages = self.table.pages(id)
        report = None
        if job.state == jobs.SUCCESS and job.plan:
            report = submissions.to_report(job, pages, self.layout)
            if job.params.container == "cbz":
                outputs = self.layout.output_dir(job.title, job.volume, job.id)
                report["files"] = containers.packed_files(outputs)
        seconds = [page.seconds for page in pages if page.seconds is not None]
        finished_s, started_s = job.finished_s, job.started_s
        timings = {
            "pages": [{"n": page.n, "seconds": page.seconds} for page in pages],
            "pageSecondsTotal": round(sum(seconds), 3),
            "wallSeconds": round(finished_s - started_s, 3) if finished_s and started_s else None,
        }
        return json_answer({**submissions.to_state(job, self.layout), "report": report, "timings": timings})

    # -- uploads
    def upload(self, request: Request, path: str) -> Answer:
        """PUT /incoming/{path}."""
        if self.dispatcher.stopping:
            raise jobs.ShuttingDown("the service is shutting down; upload again after its restart")
        target = inputs.resolve_incoming(self.layout, "incoming/" + path)
        # Composed or not: a Mac's file names are not, and stay as their owner spells them.
        spelt = unicodedata.normalize("NFC", path)
        if any(part.startswith(".") or storage.safe_component(part) != part for part in spelt.split("/")):
            raise Refused(422, "UNSAFE_NAME", "a name that some file systems can't hold, or a hidden one")
        if target.is_dir() or any(parent.is_file() for parent in target.parents):
            raise storage.NameTaken(f"{path!r} is a folder, or lies below a file")
        wanted = digest_of(request)
        limit = self.config.upload_bytes, setting_name("upload_bytes")
        request.body.refuse_over(*limit)
        self._check_room(request.body.length or 0)
        existed = target.exists()
        digest, size, looked = hashlib.sha256(), 0, 0
        # Of a broken-off upload nothing may stay, not even the folders that it would have made.
        home = next(folder for folder in target.parents if folder.is_dir())
        try:
            with storage.replacing(target, storage.new_temporary(home)) as file:
                for piece in request.body.pieces(*limit):
                    digest.update(piece)
                    file.write(piece)
                    size += len(piece)
                    # Its length may be unknown, and jobs write too, which a full disk would end.
                    if size - looked >= ROOM_LOOK_BYTES:
                        looked = size
                        self._check_room(0)
                if wanted is not None and digest.digest() != wanted:
                    detail = "the bytes received are not those that Repr-Digest names; send them again"
                    raise Refused(422, "DIGEST", detail)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            # Another upload was quicker, and made a folder of this name or a file of a folder's.
            raise storage.NameTaken(f"{path!r} is a folder, or lies below a file") from error
        self.count.uploaded.add(size)
        log.info("uploaded %s: %d bytes", path, size)
        if existed:
            return Answer(204)
        stored = {"path": f"incoming/{path}", "bytes": size, "sha256": digest.hexdigest()}
        answer = json_answer(stored, 201)
        answer.headers["Location"] = "/incoming/" + urllib.parse.quote(path)
        return answer

    def _check_room(self, size_bytes: int) -> None:
        def is_short() -> bool:
            return storage.free_bytes(self.layout) < size_bytes + self.config.reserve_bytes

        if is_short() and not (self.dispatcher.cache.clear() and not is_short()):
            raise Refused(507, "DISK_FULL", "the service's disk is nearly full; make room and try again")

    def convert(self, request: Request) -> Answer:
        """POST /pages."""
        with self.reader.holding_body():
            body = request.body.read(reader.PAGE_BYTES)
            page = reader.image_of(request.headers.one("content-type") or "", body)
            outcome = self._converted(page, request.query)
            if outcome.file is not None:
                size = os.fstat(outcome.file.fileno()).st_size
                headers = _image_headers(outcome.file.read(16)) | {"X-Reichan-Page": "finished"}
                return Answer(200, headers, outcome.file, 0, size)
            log.info("POST /pages: the page stays as it was: %s", outcome.reason)
            why = {"X-Reichan-Page": "original", "X-Reichan-Reason": ascii(outcome.reason)[1:-1][:300]}
            return Answer(200, _image_headers(bytes(page[:16])) | why, bytes(page))

    def _converted(self, page: memoryview, query: dict[str, str]) -> reader.Outcome:
        try:
            params = reader.params_of(query, weightfiles.model_names(self.layout.models))
        except jobs.InvalidFields as error:
            return reader.Outcome(None, error.detail)
        return self.reader.convert(page, params)

    def preview(self, request: Request) -> Answer:
        """POST /preview."""
        if self.dispatcher.stopping:
            raise jobs.ShuttingDown("the service is shutting down; ask after its restart")
        names = weightfiles.model_names(self.layout.models)
        media = request.headers.one("content-type") or ""
        if media.partition(";")[0].strip().lower() == "application/json":
            wanted = preview.parse(json_body(request), names, has_image=False)
            with _blaming("input.path"):
                source = preview.source_of(self.layout, wanted, self.config.limits)
            return json_answer(self.previews.of_input(source, wanted))
        with self.reader.holding_body():
            body = request.body.read(reader.PAGE_BYTES)
            page = self.previews.keep(reader.image_of(media, body))
            asked = preview.request_field(media, body)
        if asked or "form-data" in media.lower():
            wanted = preview.parse(json_object(asked or b"{}"), names, has_image=True)
        else:
            wanted = preview.Wanted((reader.params_of(request.query, names, Params().model),))
        return json_answer(self.previews.of_image(page, wanted))

    def preview_image(self, request: Request, key: str) -> Answer:
        """GET /preview/{key}."""
        file = self.previews.image(key)
        if file is None:
            raise Refused(404, "UNKNOWN_PREVIEW", "there is no such image, or no longer; ask for it again")
        headers = _image_headers(file.read(16))
        return wire.file_answer(request, file, key, os.fstat(file.fileno()).st_mtime, headers)

    # -- the service itself
    def _probe(self) -> Probed | None:
        """What a worker last told of devices and weights; asks one when files changed since."""
        weights = weightfiles.find_weights(self.layout.models)
        stamps = {}
        for key, file in weights.items():
            with contextlib.suppress(OSError):
                stat = file.path.stat()
                stamps[key] = (file.path, stat.st_size, stat.st_mtime_ns)
        if self.dispatcher.probed is None or stamps != self._probed_files:
            future = self.dispatcher.ask("probe", Probe())
            # Once a question: while nobody answers, every request would leave something behind.
            if future is not self._asked_probe:
                self._asked_probe = future
                future.add_done_callback(lambda done: self._remember_probe(done, stamps))
        return self.dispatcher.probed

    def _remember_probe(self, done: Any, stamps: object) -> None:
        if not done.cancelled() and done.exception() is None:
            self._probed_files = stamps

    def models(self, _request: Request) -> Answer:
        """GET /models."""
        probed = self._probe()
        facts = {weightfiles.model_key(model["name"]): model for model in probed.models} if probed else {}
        files = weightfiles.find_weights(self.layout.models)
        listed = []
        for release in weightfiles.RELEASES:
            key = weightfiles.model_key(release.name)
            listed.append(_model_json(release.name, files.get(key), facts.get(key), release))
            files.pop(key, None)
        for key, file in files.items():
            if key in facts:  # only a worker can tell what an unknown file holds
                listed.append(_model_json(file.name, file, facts[key], None))
        return json_answer({"models": listed, "probed": probed is not None})

    def devices(self, _request: Request) -> Answer:
        """GET /devices."""
        probed = self._probe()
        return json_answer({"devices": probed.devices if probed else [], "probed": probed is not None})

    def open_session(self, _request: Request) -> Answer:
        """POST /session; the token was checked on the way here."""
        return Answer(204, {"Set-Cookie": self.gate.cookie()})

    def close_session(self, _request: Request) -> Answer:
        """DELETE /session."""
        return Answer(204, {"Set-Cookie": NO_COOKIE})

    def health(self, _request: Request) -> Answer:
        """GET /health. No paths, no names: it needs no token."""
        counts = self.table.counts()
        here = self.dispatcher
        beyond = {"cluster": here.health()} if isinstance(here, cluster.ClusterDispatcher) else {}
        return json_answer(
            {
                "status": "stopping" if self.dispatcher.stopping else "ok",
                "active_jobs": counts[jobs.RUNNING],
                "registered_jobs": sum(counts.values()),
                "default_model": Params().model,
                "max_concurrency": self.config.max_concurrency,
                "paused": self.table.is_paused,
                "version": VERSION,
                "uptime_s": round(time.monotonic() - self.started_s, 1),
                "workers": len(self.dispatcher.workers),
                "workers_can_start": self.dispatcher.boot_failures == 0,
                "database_set_aside": self.table.set_aside is not None,
                "rebuilding": self.rebuild.is_running,
                "rebuilt_jobs": self.table.salvaged + self.rebuild.found,
                **beyond,
            }
        )

    def metrics(self, _request: Request) -> Answer:
        """GET /metrics, in Prometheus' text format 0.0.4."""
        media = "text/plain; version=0.0.4; charset=utf-8"
        families = itertools.chain(self._gauges(), self.count.families(), [processor_seconds()])
        return Answer(200, {"Content-Type": media}, expose(families).encode("utf-8", "replace"))

    def _gauges(self) -> Iterator[Family]:
        """What stands at this moment. Counting jobs reads an index, no rows."""
        counts = self.table.counts()
        yield gauges("reichan_build_info", "Always 1.", "version", {VERSION: 1})
        yield gauges("reichan_jobs", "Jobs by state.", "state", counts)
        yield gauge("reichan_queued_jobs", "Jobs that wait for a worker.", counts[jobs.PENDING])
        left = sum(run.left for run in list(self.dispatcher.runs.values()))
        yield gauge("reichan_queued_pages", "Unfinished pages of running jobs.", left)
        workers = self.dispatcher.holders()
        yield gauge("reichan_workers", "Worker processes.", len(workers))
        cards = {slot.card[0]: slot.card[1:] for slot in workers if slot.card}
        used, whole = ({device: sizes[i] for device, sizes in cards.items()} for i in (0, 1))
        yield gauges("reichan_gpu_memory_used_bytes", "Memory in use on a card, by anyone.", "device", used)
        yield gauges("reichan_gpu_memory_size_bytes", "Memory of a card that a worker uses.", "device", whole)
        kept = self.dispatcher.cache.bytes
        yield gauge("reichan_job_cache_bytes", "Finished pages kept for other jobs.", kept)
        yield gauge("reichan_watchers", "Open WebSockets.", self.live.count())
        yield gauge("reichan_http_connections", "Open HTTP connections.", self.connections())
        uptime_s = round(time.monotonic() - self.started_s, 1)
        yield gauge("reichan_uptime_seconds", "Since the start.", uptime_s)
        free = storage.free_bytes(self.layout)
        yield gauge("reichan_free_bytes", "Free space under the storage root.", free)

    def openapi(self, _request: Request) -> Answer:
        """GET /openapi.json."""
        return json_answer(openapi.document(routes.ROUTES, VERSION, secured=bool(self.config.token)))

    def docs(self, request: Request) -> Answer:
        """GET /docs."""
        return webpage.docs(routes.ROUTES, request.host)

    def docs_asset(self, request: Request, file: str) -> Answer:
        """GET /docs/{file}."""
        path = webpage.asset(file)
        if path is None:
            raise Refused(404, "NO_ROUTE", f"there is nothing at {request.path[:200]!a}")
        stat = path.stat()
        headers = {"Content-Type": webpage.ASSETS[file]}
        return wire.file_answer(request, path.open("rb"), f"{stat.st_size:x}", stat.st_mtime, headers)

    def index(self, request: Request) -> Answer:
        """GET /."""
        return webpage.index(request.host)

    # -- websocket
    def _upgrade(self, handler: wire.Handler, request: Request, values: dict[str, str]) -> Answer | None:
        """Shake hands here; frames are the loop's."""
        after = whole_number(request.query, "after", routes.CURSOR)
        if request.method != "GET" or not request.headers.all("upgrade"):
            upgrade = {"Upgrade": "websocket", "Connection": "close"}
            raise Refused(426, "UPGRADE", "this is a WebSocket; connect with one", upgrade)
        if self.live.stopping:
            raise jobs.ShuttingDown("the service is shutting down; connect again after its restart")
        if self.live.count() >= self.config.watchers:
            raise Refused(503, "TOO_MANY", "too many WebSockets are open", {"Retry-After": "5"})
        protocol = ServerProtocol(max_size=MESSAGE_BYTES, logger=logging.getLogger("live.protocol"))
        protocol.receive_data(_handshake_bytes(request))
        handshake = next(iter(protocol.events_received()), None)
        if not isinstance(handshake, UpgradeRequest):
            raise wire.malformed("not a WebSocket handshake")
        response = protocol.accept(handshake)
        if response.status_code != 101:
            reason = (response.body or b"").decode("utf-8", "replace").strip()
            version = {"Sec-WebSocket-Version": "13"}
            raise Refused(response.status_code, "HANDSHAKE", reason, version, close=True)
        protocol.send_response(response)
        watcher = Watcher(values.get("id"), -1 if after is None else after)
        # Listening starts before the present state is read: no change falls between.
        self.live.add(watcher)
        try:
            self._offer_present(watcher, after is not None)
            self.live.adopt(*handler.hand_over(), protocol, watcher)
        except BaseException:
            self.live.forget(watcher)
            raise
        return None

    def _offer_present(self, watcher: Watcher, returns: bool) -> None:
        """What a new watcher is told first; `returns`: it says what it knows already."""
        try:
            if watcher.job_id is None:
                missed = self.table.changed_since(watcher.after) if returns else ()
                for job in itertools.chain(self.table.in_state(jobs.RUNNING), missed):
                    watcher.offer(job, self.live.frame(job))
            else:
                job = self.table.get(watcher.job_id)
                watcher.offer(job, self.live.frame(job))
        except jobs.UnknownJob:
            watcher.unknown = True


# ---------------------------------------------------------------- in words and as JSON
def _remedy(job: Job) -> str:
    """What brings a job's lost files back: a job without failed pages can't be resumed."""
    whole = job.state == jobs.SUCCESS and not job.failed_pages
    return "submit the volume again" if whole else "resume the job"


@contextlib.contextmanager
def _blaming(name: str) -> Iterator[None]:
    """A path that can't be an input is the fault of the field that named it."""
    try:
        yield
    except (storage.OutsideIncoming, storage.InputMissing, storage.InputUnusable) as error:
        raise Refused(422, error.code, error.detail, errors=[(name, error.detail)]) from error


def content_disposition(name: str) -> str:
    """An attachment's name in both forms of RFC 6266: a plain one, and UTF-8 for the rest."""
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\%;' else "_" for c in name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{urllib.parse.quote(name, safe='')}"


def _raise_unless_gone(error: OSError) -> None:
    """Raises Refused where a file that can't be opened may well be there: gone is for good."""
    if error.errno not in GONE:
        detail = f"the file can't be read now: {storage.reason_of(error)}; ask again"
        raise Refused(503, storage.DiskRefused.code, detail, {"Retry-After": "5"}) from error


def _image_headers(data: bytes) -> dict[str, str]:
    """By content, never by name: an HTML file called .jpg must not run as a page."""
    kind = storage.sniff(data)
    media = f"image/{kind}" if kind in reader.IMAGES else "application/octet-stream"
    return {"Content-Type": media, "Content-Security-Policy": "default-src 'none'; sandbox"}


def _page_json(page: jobs.Page) -> dict[str, Any]:
    here = {"n": page.n, "name": page.name, "seconds": page.seconds}
    return submissions.item_of(page) | here | {"error": page.error or page.source_error}


def _model_json(
    name: str,
    file: weightfiles.WeightsFile | None,
    facts: dict[str, Any] | None,
    release: weightfiles.Release | None,
) -> dict[str, Any]:
    scale = facts.get("scale", 4) if facts else 4
    missing = None if file else "no weights: see the README, Models"
    return {
        "name": name,
        "scale": scale,
        "recommended_scale": release.recommended_scale if release else scale,
        "weights": release.file if release else (file.path.name if file else ""),
        "download_url": release.url if release else "",
        "available": bool(file) and (facts is None or facts["available"]),
        "source": file.source if file else None,
        "sha256": facts["sha256"] if facts else None,
        "architecture": facts.get("architecture") if facts else None,
        "license": weightfiles.RELEASE_LICENSE if release else None,  # of other files nobody tells it
        "error": facts["error"] if facts else missing,
        "probed": facts is not None,
    }


def _handshake_bytes(request: Request) -> bytes:
    """The upgrade request for websockets' own parser, reduced to what concerns it."""
    lines = [f"GET /{'/'.join(map(urllib.parse.quote, request.segments))} HTTP/1.1"]
    names = ("host", "upgrade", "connection", "origin")
    lines += [
        f"{name}: {value}"
        for name, value in request.headers
        if name in names or name.startswith("sec-websocket-")
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
