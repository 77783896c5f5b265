"""The worker process: a page's way from its bytes to the disk, and what else a job needs done.

Map: Watch (is a step still moving?) - Worker (pages; stage, settle, pack; questions) - worker_main
Rule: every task ends with one event, whatever a page, a driver or the disk does.
Runs in: the worker process, and as `python infer.py` in a terminal (commands/cli.py); the main process
never imports this file (it loads torch).
Over upscaling.py: what becomes of the pixels.

                 pipe                decode threads     device thread     encode threads
  dispatcher --ComputePage--> recv --> bytes->pixels --> windows ------> pixels->bytes -> disk
             <--PageDone----- send <--------------------------------------------'
  beat thread: once a second, how long the present step has taken and how long it may take
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

import logs
import storage
from engine import budgets, devices, pages, screens, spreads, survey, upscaling, windows
from engine.lanes import Lanes
from engine.models import load_model
from engine.pages import PageError
from files import containers, inputs, sandbox, weightfiles
from files.cache import Entry, PageCache
from messages import (
    CARD_LOST_STATUS,
    DIED_TWICE,
    Beat,
    Cancel,
    ComputePage,
    Dropped,
    EngineChoice,
    KnownPage,
    Pack,
    Packed,
    PageDone,
    PageFailed,
    Params,
    Plan,
    Preview,
    Previewed,
    Probe,
    Probed,
    Ready,
    Settle,
    Settled,
    SourcePage,
    Stage,
    Staged,
    StagedPage,
    Survey,
    Surveyed,
    Task,
    TaskFailed,
)

log = logging.getLogger("infer")

FIRST_STEP_LIMIT_S = 600.0  # before anything was measured: a slow machine compiles kernels
SETTLE_LIMIT_S = 3600.0  # "auto" tries each of its models on the device


class Watch:
    """What each thread is doing, and since when: so that a hang can be told from work."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.steps: dict[int, tuple[float, float]] = {}  # thread -> (started, limit_s)
        self.slowest_s = 0.0  # step between two layers so far

    def begin(self, limit_s: float) -> None:
        """This thread starts a step that may take limit_s seconds."""
        with self.lock:
            self.steps[threading.get_ident()] = (time.monotonic(), limit_s)

    def tick(self) -> None:
        """This thread's device step moved on by a layer."""
        now, me = time.monotonic(), threading.get_ident()
        with self.lock:
            if me in self.steps:
                if not math.isinf(self.steps[me][1]):  # a file task's ticks tell nothing of a device
                    self.slowest_s = max(self.slowest_s, now - self.steps[me][0])
                    self.steps[me] = (now, max(60.0, 50 * self.slowest_s))

    def slept(self, asleep_s: float) -> None:
        """The machine was asleep so long, which is no step's fault."""
        with self.lock:
            self.steps = {me: (started + asleep_s, limit_s) for me, (started, limit_s) in self.steps.items()}

    def end(self) -> None:
        """This thread has nothing to do."""
        with self.lock:
            self.steps.pop(threading.get_ident(), None)

    def worst(self) -> Beat:
        """The step nearest to its limit."""
        now = time.monotonic()
        with self.lock:
            beats = [Beat(now - started, limit_s) for started, limit_s in self.steps.values()]
        return max(beats, key=lambda beat: beat.busy_s / beat.limit_s, default=Beat(0.0, 1.0))


class Worker:
    """One process's pipeline. Each task is answered by exactly one closing event, unless
    its job was cancelled."""

    BEAT_S = 1.0
    ASLEEP_S = 5.0  # a beat that is later than this by itself was held up by the machine's sleep
    BYTES_STEP_LIMIT_S = 300.0  # decoding, encoding or writing one page

    def __init__(self, conn: Connection, choice: EngineChoice, slot: int) -> None:
        self.conn = conn
        self.choice = choice
        self.slot = slot
        self.send_lock = threading.Lock()
        self.cancelled: set[tuple[str, int]] = set()
        self.resting: dict[tuple[str, int, int], Callable[[], None]] = {}  # by key: steps not yet begun
        self.rest_lock = threading.Lock()  # of resting, and of cancelled's changes
        self.computing: dict[int, tuple[str, int]] = {}  # thread -> job and attempt, cancellable
        self.watch = Watch()
        self.engines = upscaling.Engines(choice, slot, self._tick)
        self.cache = None
        if choice.cache_root:
            self.cache = PageCache(choice.cache_root, choice.cache_program or devices.program(slot))
        kinds = devices.kinds_for(choice)  # none where the one that was chosen is missing
        at_once = max((kind.pages for kind in kinds), default=1)
        # A card outruns a few cores' JPEG; beside a processor's own work they are enough.
        cores = os.cpu_count() or 1
        encoders = max(1, min(2 if all(kind.rolls for kind in kinds) else 16, cores - 1))
        self.capacity = encoders + at_once + 1  # some in each step, and one decoded
        self.decoders = ThreadPoolExecutor(max(1, encoders // 2), "decode")
        self.device = Lanes(at_once, "device")
        self.encoders = ThreadPoolExecutor(encoders, "encode")
        self.files = ThreadPoolExecutor(1, "files")

    def run(self) -> None:
        """Read tasks until the parent closes the pipe, or dies."""
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        self.send(Ready(self.capacity, devices.device_count(self.choice)))
        while True:
            try:
                task = self.conn.recv()
            except (EOFError, OSError):
                os._exit(0)  # the parent is gone; temporary files are swept by the next attempt
            if task is None:
                os._exit(0)
            if isinstance(task, Cancel):
                self._cancel(task)
            else:
                self._start(task)

    def send(self, event: object) -> None:
        """Send one event; any thread."""
        try:
            with self.send_lock:
                self.conn.send(event)
        except OSError:
            os._exit(0)

    def _beat(self) -> None:
        while True:
            self.send(replace(self.watch.worst(), card=devices.card_memory(self.slot)))
            began_s = time.monotonic()
            time.sleep(self.BEAT_S)
            late_s = time.monotonic() - began_s - self.BEAT_S  # Windows' clock goes on in its sleep
            if late_s > self.ASLEEP_S:
                self.watch.slept(late_s)

    def _tick(self) -> None:
        self.watch.tick()
        if self.computing.get(threading.get_ident()) in self.cancelled:
            raise upscaling.Cancelled

    def _cancel(self, task: Cancel) -> None:
        """Drop what rests of this attempt, at once: behind other jobs' pages its turn might come too late,
        and this process be killed with those. What is under way notices by itself."""
        with self.rest_lock:
            self.cancelled.add((task.job_id, task.attempt))
            keys = [key for key in self.resting if key[:2] == (task.job_id, task.attempt)]
            for key in keys:
                del self.resting[key]  # with the pixels that it held
        for key in keys:
            self.send(Dropped(*key))

    def _queue(
        self,
        submit: Callable[..., object],
        task: ComputePage | Stage | Settle | Pack,
        step: Callable[..., None],
        *values: Any,
    ) -> None:
        """Have a queue's thread take this step, unless a cancel comes first."""
        n = task.n if isinstance(task, ComputePage) else 0  # pages are counted from 1
        whole: Callable[..., None] = self._page_step if n else self._file_step
        key = (task.job_id, task.attempt, n)
        with self.rest_lock:
            may_rest = key[:2] not in self.cancelled
            if may_rest:
                self.resting[key] = functools.partial(whole, task, step, *values)
        if may_rest:
            submit(self._take_up, key)
        else:
            self.send(Dropped(*key))

    def _take_up(self, key: tuple[str, int, int]) -> None:
        with self.rest_lock:
            step = self.resting.pop(key, None)
        if step:
            step()

    def _start(self, task: Task) -> None:
        match task:
            case ComputePage(carry=None):
                self._queue(self.decoders.submit, task, self._decode)
            case ComputePage():
                self._queue(self.encoders.submit, task, self._carry)
            case Stage():
                # Staging settles the plan, which loads and probes the model.
                self._queue(self.device.submit, task, self._stage)
            case Settle():
                self._queue(functools.partial(self.device.submit, first=True), task, self._settle)
            case Pack():
                self._queue(self.files.submit, task, self._pack)
            case Preview():
                failed = functools.partial(Previewed, task.key)
                self.decoders.submit(self._answer, lambda: self._preview(task), failed)
            case Survey():
                self.files.submit(
                    self._answer,
                    lambda: survey.survey(task),
                    lambda why: Surveyed(task.key, error=why),
                    math.inf,  # as staging: a large solid archive is unpacked for it
                )
            case Probe():
                self.files.submit(self._answer, self._probe, lambda _why: Probed([], []))

    def _end_if_card_is_lost(self) -> None:
        """End this process, in which every page would fail; in the next one the card may be back."""
        if devices.card_is_lost(self.slot):
            log.error("the card no longer answers this process: ending it, so that another takes over")
            os._exit(CARD_LOST_STATUS)

    # Each step of a page hands over to the next one's thread.
    def _page_step(self, task: ComputePage, step: Callable[..., None], *values: Any) -> None:
        self.watch.begin(self.BYTES_STEP_LIMIT_S)
        try:
            if (task.job_id, task.attempt) in self.cancelled:
                raise upscaling.Cancelled
            with logs.about(task.job_id, task.n):
                step(task, *values)
        except upscaling.Cancelled:
            self.send(Dropped(task.job_id, task.attempt, task.n))
        except PageError as error:
            name = step.__name__.strip("_")
            self.send(PageFailed(task.job_id, task.attempt, task.n, str(error), name))
        except storage.StorageError as error:  # weights or device gone: no page can be computed
            self.send(TaskFailed(task.job_id, task.attempt, task.n, error.code, error.detail))
        # Around an attempt: whatever a page does to a decoder or a driver is that page's failure.
        except Exception as error:
            log.exception("a page's step failed", extra=logs.of(task.job_id, task.n))
            self._end_if_card_is_lost()
            reason = f"{type(error).__name__}: {storage.reason_of(error)}"
            if isinstance(error, OSError) and error.errno in storage.OUR_DISK:
                refused = storage.DiskRefused(error)
                self.send(TaskFailed(task.job_id, task.attempt, task.n, refused.code, refused.detail))
            else:
                name = step.__name__.strip("_")
                self.send(PageFailed(task.job_id, task.attempt, task.n, reason, name))
        finally:
            self.watch.end()

    def _decode(self, task: ComputePage) -> None:
        started = time.perf_counter()
        data, params = task.source.read_bytes(), task.params
        key = self.cache.key(data, task) if self.cache else None
        found = self.cache.find(key) if self.cache and key else None
        if found:
            spent = time.perf_counter() - started
            self._queue(self.encoders.submit, task, self._reuse, found, key, spent)
            return
        page = pages.decode_page(data, params, task.limits)
        mark = storage.mark_of(task.source.name)
        page = replace(page, pixels=spreads.taken(page.pixels, mark))
        height, width = page.pixels.shape[:2]
        wanted = pages.target_size(width, height, params)
        spent = time.perf_counter() - started
        if params.has_target and wanted <= (width, height):  # both sides: the proportions stay
            if pages.stays(params, data, len(data), _most_bytes(task), is_part=bool(mark)):
                self._queue(self.encoders.submit, task, self._carry)
            else:
                self._queue(self.encoders.submit, task, self._reduce, page, wanted, spent)
            return
        to_device = functools.partial(self.device.submit, first=task.plan is None)
        self._queue(to_device, task, self._infer, page, spent, key)

    def _reuse(self, task: ComputePage, entry: Entry, key: str, spent: float) -> None:
        """Write a cached page: a copy, so that what befalls one job's file is no other's harm."""
        facts = entry.facts(key, spent) | {"deviation": storage.part_of(task.source.name)}
        self._finish(task, entry.data, entry.suffix, **facts)

    def _reduce(self, task: ComputePage, page: pages.Decoded, wanted: tuple[int, int], spent: float) -> None:
        """A page that is large enough, in the size, format or bytes that were asked for."""
        height, width = page.pixels.shape[:2]
        pixels = pages.resize(pages.to_eight_bit(page.pixels), wanted, in_light=True)
        smaller = wanted != (width, height)
        what = f"reduced from {width}x{height}, by no network" if smaller else "by no network"
        self._encode(task, replace(page, pixels=pixels), what, spent, {"model": None})

    def _infer(self, task: ComputePage, page: pages.Decoded, spent: float, key: str | None) -> None:
        self.watch.begin(FIRST_STEP_LIMIT_S)
        self.computing[threading.get_ident()] = (task.job_id, task.attempt)
        try:
            settled = task.plan or self.engines.plan(task.params)  # a job's staging does this, once
            plan = upscaling.plan_for(settled, page.pixels)
            part, cut = windows.around(page.pixels, task.crop, plan.halo_px, task.params.scale)
            started = time.perf_counter()
            result, deviation = self.engines.compute(part, task.params, plan)
        finally:
            del self.computing[threading.get_ident()]
        device_s = time.perf_counter() - started
        done = replace(page, pixels=result[cut])
        facts = {"model": plan.model, "input_pixels": part.shape[0] * part.shape[1]}
        facts |= {"device_s": round(device_s, 3), "plan": None if task.plan else settled, "cache_key": key}
        self._queue(self.encoders.submit, task, self._encode, done, deviation, spent + device_s, facts)

    def _encode(
        self,
        task: ComputePage,
        page: pages.Decoded,
        deviation: str | None,
        spent: float,
        facts: dict[str, Any],
    ) -> None:
        started = time.perf_counter()
        screen = screens.SCREENS.get(task.params.profile or "")
        if screen and page.pixels.ndim == 2 and pages.is_lossless(task.params):
            page = pages.as_srgb(page)  # first: a profile's curve would make other greys of the screen's
            page = replace(page, pixels=pages.to_levels(page.pixels, screen.greys))
        data, suffix, other = budgets.fitted(
            lambda params: pages.encode(page.pixels, params, page.profile), task.params, _most_bytes(task)
        )
        elsewhere = self.engines.elsewhere(task.plan) if task.plan else None
        deviations = (storage.part_of(task.source.name), deviation, other, elsewhere)
        height, width = page.pixels.shape[:2]
        written = pages.flatten(page.pixels, task.params.color) if suffix == ".jpg" else page.pixels
        self._finish(
            task,
            data,
            suffix,
            width=width,
            height=height,
            mode=pages.MODES[pages.channels(written)],
            seconds=round(spent + time.perf_counter() - started, 3),
            deviation="; ".join(filter(None, deviations)) or None,
            color_spread=round(page.spread, 2),
            **facts,
        )

    def _carry(self, task: ComputePage) -> None:
        """Take the original over, so that a reader finds the page where it belongs."""
        data = task.source.read_bytes()
        suffix = pages.kept_suffix(data, task.source.suffix)
        half, width, height, mode = None, 0, 0, ""
        mark = storage.mark_of(task.source.name)
        # Whatever a decoder makes of it. Where workers died of the page, none gets it once more, but for what
        # was decoded to be divided: it was not the decoder then, and a half must not become the whole.
        if task.carry == DIED_TWICE and not mark:
            with contextlib.suppress(PageError):
                width, height = pages.header_size(data)
        else:
            with contextlib.suppress(Exception):
                half = spreads.half_of(data, mark, task.limits)
                data, suffix = half or (data, suffix)
                pixels = pages.decode(data, 1, task.limits)
                (height, width), mode = pixels.shape[:2], pages.MODES[pages.channels(pixels)]
        self._finish(
            task,
            data,
            suffix,
            width=width,
            height=height,
            mode=mode,
            seconds=0.0,
            error=task.carry,
            carried=True,
            deviation=storage.part_of(task.source.name) if half else None,
        )

    def _finish(self, task: ComputePage, data: bytes, suffix: str, **facts: Any) -> None:
        """Make the page durable, then say so: never the other way round."""
        target = task.target_stem.with_name(task.target_stem.name + suffix)
        try:
            digest = storage.write_whole(target, data)
        except OSError as error:
            raise storage.DiskRefused(error) from error
        done = PageDone(task.job_id, task.attempt, task.n, target.name, digest, size_bytes=len(data), **facts)
        self.send(self.cache.take(target, done, storage.part_of(task.source.name)) if self.cache else done)

    def _file_step(self, task: Stage | Settle | Pack, step: Callable[..., None]) -> None:
        self.watch.begin(math.inf)  # copying 16 GB takes its time; the disk answers or errs
        self.computing[threading.get_ident()] = (task.job_id, task.attempt)
        try:
            with logs.about(task.job_id):
                step(task)
        except upscaling.Cancelled:
            self.send(Dropped(task.job_id, task.attempt, 0))
        except storage.OutputDamaged as error:
            self.send(TaskFailed(task.job_id, task.attempt, 0, error.code, error.detail, page=error.page))
        except storage.StorageError as error:
            self.send(TaskFailed(task.job_id, task.attempt, 0, error.code, error.detail))
        # Around an attempt: the job fails with the reason, the worker stays.
        except Exception as error:
            log.exception("%s failed", type(task).__name__, extra=logs.of(task.job_id))
            self._end_if_card_is_lost()
            if isinstance(error, OSError):  # of the input, it would be InputUnusable
                refused = storage.DiskRefused(error)
                self.send(TaskFailed(task.job_id, task.attempt, 0, refused.code, refused.detail))
            else:
                detail = f"{type(error).__name__}: {error}"
                self.send(TaskFailed(task.job_id, task.attempt, 0, "TASK", detail, traceback.format_exc()))
        finally:
            del self.computing[threading.get_ident()]
            self.watch.end()

    def _settled(self, params: Params, plan: Plan | None) -> Plan:
        """The job's last plan while it holds, else a new one."""
        if plan is None or not self.engines.is_current(plan):
            self.watch.begin(SETTLE_LIMIT_S)
            try:
                return self.engines.plan(params)
            finally:
                self.watch.begin(math.inf)
        if params.device != "auto":
            devices.pick_device(plan.device)  # with "auto" its pages may deviate to the CPU
        return plan

    def _settle(self, task: Settle) -> None:
        self.send(Settled(task.job_id, task.attempt, self._settled(task.params, task.plan)))

    def _stage(self, task: Stage) -> None:
        storage.sweep_temporaries(task.outputs)
        plan = task.settled or self._settled(task.params, task.plan)
        log.info("%s on %s, %s, by the %s engine", plan.model, plan.device, plan.precision, plan.engine)
        # Other weights make other pages: nothing of the old plan may stay among the new.
        known = {page.source.name: page for page in task.known} if plan == task.plan else {}
        names: list[str] = []
        staged, left_out, manifest = 0, None, task.manifest
        tally = survey.Tally(task.params) if task.plan is None else None
        for item in self._staged_pages(task, known):
            self._tick()
            if isinstance(item, inputs.Listing):
                is_cbz = task.params.container == "cbz"
                left_out = containers.left_out(task.outputs) if is_cbz else item.left_out
                manifest = manifest or inputs.find_manifest(task.source, item.manifest)
                continue
            whole = storage.whole_name(item.name, item.staged)
            names += [whole] if names[-1:] != [whole] else []
            if tally and not tally.add_cached(self._cached_bytes(task, plan, item)):
                tally.add_file(task.staging / item.staged, 2 if whole != item.name else 1)
            staged += 1
            done = _still_done(task, known.get(item.name), item)
            self.send(StagedPage(task.job_id, task.attempt, item, done))
        reconciliation = inputs.reconcile(manifest, names) if manifest else None
        workload = tally.workload(staged) if tally else None
        if workload and task.params.container == "cbz":
            workload = replace(workload, other_bytes=containers.kept_bytes(task.outputs))
        self.send(Staged(task.job_id, task.attempt, plan, left_out, reconciliation, workload))

    def _cached_bytes(self, task: Stage, plan: Plan, page: SourcePage) -> int | None:
        """How large a page is in the cache, where it is there."""
        if self.cache is None or plan.engine != "native":
            return None
        part = (storage.mark_of(page.staged), None)
        return self.cache.size_of(page.sha256, task.params, plan, task.limits, part)

    def _staged_pages(
        self, task: Stage, known: dict[str, KnownPage]
    ) -> Iterator[SourcePage | inputs.Listing]:
        """The pages of an earlier attempt's intact working copy, else of a new one.

        With every page finished the working copy isn't needed, nor is the input, unless it is another one
        since (see JobTable.forget_staged).
        """
        sources = [page.source for page in task.known]
        is_cbz = task.params.container == "cbz"
        kept = not is_cbz or containers.is_kept(task.outputs)
        same_input = all(page.source.staged for page in known.values())
        done_before = all(_still_done(task, page, page.source) for page in known.values())
        # Of several pages of one name only the last is known.
        complete = bool(known) and len(known) == len(sources) and same_input and done_before
        if sources and kept and (complete or inputs.staged_pages_intact(task.staging, sources)):
            yield from sources
        else:
            done = {name for name, page in known.items() if _still_done(task, page, page.source)}
            others_bytes = self._keep_others(task) if is_cbz else 0

            def check(sizes: list[tuple[str, int]]) -> None:
                if task.reserve_bytes is not None:
                    folder, reserve = task.staging.parent, task.reserve_bytes
                    inputs.check_room(folder, sizes, done, task.params, reserve, others_bytes)

            staged = inputs.stage_input(task.source, task.staging, task.limits, check)
            yield from spreads.divided(staged, task.staging, task.params, task.limits)

    def _keep_others(self, task: Stage) -> int:
        """Copy the other files of a cbz to the outputs, cancellable between two; their bytes in all."""
        total_bytes = 0
        for kept_bytes in containers.keep(task.source, task.outputs, task.limits, task.reserve_bytes):
            self._tick()
            total_bytes = kept_bytes
        return total_bytes

    def _pack(self, task: Pack) -> None:
        digest, size_bytes = containers.pack(task.outputs, task.artifact, task.report)
        self.send(Packed(task.job_id, task.attempt, digest, size_bytes))

    def _answer(
        self,
        work: Callable[[], object],
        failed: Callable[[str], object],
        limit_s: float = BYTES_STEP_LIMIT_S,
    ) -> None:
        """Do what was asked outside any job, and send the one event that answers it."""
        self.watch.begin(limit_s)
        try:
            event = work()
        # Around an attempt: without an answer the question would stay open for ever.
        except Exception as problem:
            if not isinstance(problem, (PageError, OSError, storage.StorageError)):
                log.exception("a question can't be answered")
            event = failed(storage.reason_of(problem) or type(problem).__name__)
        finally:
            self.watch.end()
        self.send(event)

    def _preview(self, task: Preview) -> Previewed:
        if task.crop:
            write_part(task)
        else:
            part = functools.partial(spreads.taken, mark=storage.mark_of(task.source.name))
            pages.write_preview(task.source, task.target, task.width, task.limits, part)
        return Previewed(task.key)

    def _probe(self) -> Probed:
        return Probed(devices.describe_devices(), describe_models(self.choice.model_root))


def _still_done(task: Stage, known: KnownPage | None, source: SourcePage) -> bool:
    """Whether a page's recorded output is on disk, and was made from these very bytes."""
    if known is None or known.output is None or known.source.sha256 != source.sha256:
        return False
    return storage.file_is(task.outputs / known.output, known.output_sha256)


def _most_bytes(task: ComputePage) -> int | None:
    """How large a page may be, by its own limit and by its share of the artifact."""
    limits = (task.most_bytes, task.params.max_page_bytes)
    return min((most for most in limits if most is not None), default=None)


def write_part(task: Preview) -> None:
    """A PNG of a part of a page, upright, its colours as they are. Raises PageError, OSError."""
    assert task.crop is not None
    page = pages.decode_page(task.source.read_bytes(), Params(scale=1, color="keep"), task.limits)
    part = np.ascontiguousarray(windows.crop_box(page.pixels, task.crop).of(page.pixels))
    data, _, _ = pages.encode(part, Params(output_format="png"), page.profile)
    storage.write_whole(task.target, data)


def describe_models(model_root: Path) -> list[dict[str, Any]]:
    """Every weights file, opened: what it holds, or why it can't be used."""
    models = []
    for file in weightfiles.find_weights(model_root).values():
        facts: dict[str, Any] = {"name": file.name, "source": file.source, "available": True, "error": None}
        try:
            model = load_model(file)
            facts |= {"sha256": model.weights_sha256, "scale": model.scale}
            facts |= {"architecture": model.architecture}
        except (storage.WeightsRefused, OSError) as error:
            facts |= {"sha256": None, "available": False, "error": str(error)}
        models.append(facts)
    return models


def keep_freed_memory() -> None:
    """Let glibc reuse what was freed instead of giving it back at once.

    Layers free and ask for megabytes all the time; a fresh page of memory costs a fault, and all of
    them together were 5% of an fp32 page. All threads ask one heap: others come in parts of 64 MB, which
    hold two or three activations and gaps (6B, fp32: 1.3 instead of 2.2 GB for a page 1200 wide).
    Elsewhere than on glibc nothing is changed.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 32 << 20)  # the most it takes
        libc.mallopt(m_trim_threshold, 1 << 30)
        libc.mallopt(m_arena_max, 1)


def settle_torch() -> None:
    """What holds for all that a process computes: the same page, the same bytes."""
    import torch  # not above: the package engine must be there first

    keep_freed_memory()
    # As use_deterministic_algorithms(True, warn_only=True), which loads a compiler that we don't use: a
    # worker was up 1.7 s later for it.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # it would choose kernels by timing
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32


def worker_main(conn: Connection, choice: EngineChoice, slot: int) -> None:
    """The worker process. Returns never: it ends with the pipe."""
    # Ctrl-C reaches every process of the terminal; the parent decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settle_torch()
    if choice.sandbox:
        for kind in devices.KINDS.values():
            kind.usable()  # a driver's first use may need rights that are about to go
        sandbox.drop_rights()
    devices.leave_out_silent(choice, slot)
    Worker(conn, choice, slot).run()


if __name__ == "__main__":
    from commands import cli

    settle_torch()
    sys.exit(cli.main())
