"""Who does the work: workers, what is dealt to them, and what becomes of their deaths.

Map: Dispatcher (for other threads, its turns, dealing, events, deaths and deadlines)
Rule: a page counts only after its row; a dead worker costs an attempt, never a page.
Runs in: the dispatcher thread. What it knows of an attempt is runs.py's, of a worker
workers.py's; cluster.py can stand in for it.

    JobTable <--claim, advance, finish_page-- dispatcher ==tasks==> worker-0 (slot 0)
                                                  ^------events---- worker-1 (slot 1)
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import logs
import storage
from files import inputs
from files.cache import Keeper
from files.database import DatabaseDamaged
from jobs import (
    FAILED,
    RUNNING,
    SUCCESS,
    Job,
    JobError,
    JobTable,
    StaleAttempt,
    UnknownJob,
    advance,
    claim,
    finish_page,
    lose_worker,
    record_stage,
    reopen_page,
)
from messages import (
    DIED_TWICE,
    Beat,
    BootFailed,
    ComputePage,
    Dropped,
    EngineChoice,
    Limits,
    Pack,
    Packed,
    PageDone,
    PageFailed,
    Previewed,
    Probed,
    Ready,
    Staged,
    StagedPage,
    Surveyed,
    Task,
    TaskFailed,
)
from storage import Layout
from work import submissions
from work.metrics import Metrics
from work.predict import Rates
from work.questions import Question, Questions, WorkerDied
from work.retention import Keep, Retention
from work.runs import Run
from work.workers import (
    KILL_S,
    Slot,
    WorkerSlot,
    exit_reason,
    idlest,
    keep_awake,
    kind_of_death,
    quickest,
    run_worker,
)

log = logging.getLogger("dispatch")

ASLEEP_S = 10.0  # a turn later than this was held up by the machine's sleep: workers were not silent
BEAT_LIMIT_S = 30.0  # a live worker beats every second; a stopped one never again
BOOT_LIMIT_S = 180.0  # importing torch from a cold disk
END_LIMIT_S = 10.0  # of a worker that was killed: in a driver's or a network disk's hands it may never end
CARELESS_DEATHS = 3  # of workers that were staging or packing, with no page to blame
PAGE_DEATHS = 2  # of workers that had this page alone
CARRY_DEATHS = 4  # of workers, those among them that were only to take it over
SINGLES = 2  # pages outside any job that a worker has at once: one computed, one on its way
PACK_TRIES = 3  # when finished pages turn out damaged on disk
TABLE_ERRORS = (sqlite3.Error, MemoryError)  # of a full disk, a damaged table, or no memory to look at it


# ---------------------------------------------------------------- the dispatcher
class Dispatcher:
    """Deals pages, not jobs, to the workers; turns their events into rows.

    One thread waits on every worker's pipe and process sentinel and on wake-ups, so that
    nothing is polled but deadlines.
    """

    def __init__(
        self,
        table: JobTable,
        layout: Layout,
        choice: EngineChoice,
        slots: int = 1,
        limits: Limits | None = None,
        idle_s: float = 120.0,
        entry: Callable[..., None] | None = None,
        keep: Keep | None = None,
        reserve_bytes: int | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.table = table
        self.layout = layout
        self.cache = Keeper(layout.cache, cache_bytes)
        self.choice = replace(choice, cache_root=layout.cache) if cache_bytes else choice
        self.slots = slots  # jobs running at once
        self.devices = 1  # see Ready; each has a worker, though one job has it all
        self.limits = limits or Limits()
        self.idle_s = idle_s
        self.entry = entry or run_worker
        self.reserve_bytes = reserve_bytes  # see Stage
        self.unrecorded: dict[str, tuple[Job, dict[str, Any]]] = {}  # failures that a full disk kept out
        self.metrics = Metrics()
        self.rates = Rates(table)
        self.retention = Retention(table, layout, keep or Keep())
        self.workers: dict[int, WorkerSlot] = {}  # by slot
        self.runs: dict[str, Run] = {}  # by job id
        self.untidy: set[str] = set()  # jobs that ended, until no worker holds a task of them
        self.careless_deaths: dict[str, int] = {}  # by job id, see CARELESS_DEATHS
        self.not_before_s = 0.0  # no new worker before this moment: one could not start
        self.boot_failures = 0  # in a row
        self.paused_s: float | None = None  # monotonic, since when the queue stands still
        self.probed: Probed | None = None
        self.questions = Questions()
        self._stumbled: dict[str, str] = {}  # step of a turn -> what it stumbled over last
        self.awake = False  # see _stay_awake
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._wake_lock = threading.Lock()  # of the pipe's writing end
        self._wake_r, self._wake_w = multiprocessing.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._loop, name="dispatcher", daemon=True)

    # -- for other threads
    def start(self) -> None:
        """Start the thread; recover() must have run."""
        self._thread.start()

    def stop(self) -> None:
        """End the workers and the thread; running jobs go back to PENDING."""
        self._stopping.set()
        self.wake()
        if self._thread.is_alive():
            self._thread.join(10)

    @property
    def stopping(self) -> bool:
        """Whether stop() was called."""
        return self._stopping.is_set()

    def wake(self) -> None:
        """The table changed; look at it."""
        with self._wake_lock:
            if not self._woken.is_set():
                self._woken.set()
                with contextlib.suppress(OSError):
                    self._wake_w.send_bytes(b"!")

    def ask(self, key: str, question: Question) -> Future[Any]:
        """Have a worker answer this, or compute a page outside any job; see Questions."""
        future = self.questions.ask(key, question)
        self.wake()
        return future

    def wait_released(self, job_id: str, timeout_s: float) -> bool:
        """Wait until no worker holds a task of this job any more, nor will get one."""
        deadline_s = time.monotonic() + timeout_s
        while job_id in self.runs or job_id in self.untidy or self.is_held(job_id):
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.02)
        return True

    def tidy(self, job_id: str) -> None:
        """A job was cancelled, perhaps one that waited: remove what its attempts left."""
        self.untidy.add(job_id)
        self.wake()

    def is_held(self, job_id: str) -> bool:
        """Whether a worker has a task of this job, of any attempt."""
        return any(key[0] == job_id for slot in self.holders() for key in list(slot.tasks))

    def holders(self) -> list[Slot]:
        """Whoever may hold a task."""
        return list(self.workers.values())

    # -- the thread
    def _loop(self) -> None:
        places = self.layout.artifacts, self.layout.incoming, self.layout.previews
        upkeep: dict[str, Callable[[], object]] = {
            **{f"{place.name}/": partial(storage.sweep_temporaries, place) for place in places},
            "previews of deleted jobs": partial(submissions.sweep_previews, self.table, self.layout),
            "the system's temporary files": storage.sweep_scratch,
            "the cache of pages": self.cache.load,
        }
        for what, step in upkeep.items():
            try:
                step()
            except (OSError, *TABLE_ERRORS) as error:  # of a read-only folder, say: no reason to do no work
                log.warning("%s can't be looked through: %s", what, storage.reason_of(error))
        while not self._stopping.is_set():
            self._turn()
        for slot in self.workers.values():
            slot.post(None)  # all at once; none is to wait for the one before it
        for slot in self.workers.values():
            slot.stop(wait_s=slot.stop_s)
        for run in self.runs.values():
            # What a full disk does not take, the next start finds as after a crash.
            with contextlib.suppress(JobError, *TABLE_ERRORS):
                lose_worker(self.table, self.table.get(run.job.id), self.table.clock())
        self.questions.cancel_all()

    def _steps(self) -> Sequence[Callable[[], None]]:
        """What a turn consists of."""
        return (
            self._drop_ended_runs,
            self._take_up_lost,
            self._tidy,
            self._record_failures,
            self.retention.turn,
            self._see_pause,
            self._claim,
            self._stay_awake,
            self._deal,
            self._wait,
            self._check_deadlines,
        )

    def _turn(self) -> None:
        for step in self._steps():
            try:
                step()
            # Around an attempt: one job's bad luck, or the table's, must not stop the others' work.
            except Exception as error:
                self._stumble(step.__name__, error)
            else:
                self._stumbled.pop(step.__name__, None)

    def _stumble(self, step: str, error: Exception) -> None:
        if self._stumbled.get(step) != str(error):  # once, if it is the same at every turn
            log.error("the dispatcher stumbled (%s); it goes on", step, exc_info=error)
        self._stumbled[step] = str(error)
        time.sleep(0.1)

    def _wait(self) -> None:
        """Sleep until an event, a death, a wake-up, or the next deadline."""
        waiting: list[Any] = [self._wake_r]
        for slot in self.workers.values():
            waiting += [slot.conn, slot.process.sentinel]
        timeout_s, began_s = 0.25 if self.workers else 5.0, time.monotonic()
        ready = multiprocessing.connection.wait(waiting, timeout_s)
        late_s = time.monotonic() - began_s - timeout_s
        if late_s > ASLEEP_S:
            for holder in self.holders():
                holder.excuse(late_s)
            for run in self.runs.values():
                run.held = True
                if run.started_s and self.paused_s is None:  # else _see_pause sees to it
                    run.started_s += late_s
        if self._wake_r in ready:
            self._woken.clear()
            self._wake_r.recv_bytes()
        for slot in list(self.workers.values()):
            if slot.conn in ready:
                self._receive(slot)
            if slot.process.sentinel in ready:
                self._receive(slot)  # what it said before it died still counts
                self._bury(slot)

    def _receive(self, slot: WorkerSlot) -> None:
        try:
            while slot.conn.poll():
                event = slot.conn.recv()
                self._handle(slot, event)
        except (EOFError, OSError):
            slot.is_cut = True  # dead: its sentinel follows

    def _handle(self, slot: Slot, event: Any) -> None:
        slot.heard_s = time.monotonic()
        try:
            if not self._is_answer(slot, event):
                self._on_event(slot, event)
        except TABLE_ERRORS as error:
            run = self._run_of(event) if hasattr(event, "attempt") else None
            if run is None:
                raise
            self._fail(run, *_refusal_of(error))

    def _claim(self) -> None:
        while len(self.runs) < self.slots and (self._is_up() or time.monotonic() >= self.not_before_s):
            job = claim(self.table, self.table.clock())
            if job is None:
                return
            try:
                outputs = self.layout.output_dir(job.title, job.volume, job.id)
            except (storage.StorageError, OSError) as error:
                refused = storage.DiskRefused(error) if isinstance(error, OSError) else error
                advance(self.table, job, "fail", self.table.clock(), **_failure(refused.code, refused.detail))
                self._count_failure(refused.code)
                continue
            self.runs[job.id] = Run(job, self.layout.staging / job.id, outputs)

    def _stay_awake(self) -> None:
        """While jobs run, so does the machine."""
        is_busy = bool(self.runs) and self.paused_s is None
        if is_busy != self.awake:
            self.awake = is_busy
            keep_awake(is_busy)

    def _see_pause(self) -> None:
        """While the queue is paused nothing is claimed, and no task of a job dealt; what is under way
        ends, and then the workers, which give the device's memory back after their idle time."""
        now_s = time.monotonic()
        paused = self.table.is_paused
        if paused and self.paused_s is None:
            self.paused_s = now_s
            for slot in self.holders():
                slot.kept_for = None  # no page will come to have it for itself
            log.info("the queue is paused; %d running jobs are held", len(self.runs))
            for run in self.runs.values():  # nobody knows when they will be done
                run.held = True
                self.table.change(run.job, eta_s=None)
        elif not paused and self.paused_s is not None:
            for run in self.runs.values():
                if run.started_s:  # no page's rate is to blame for the pause
                    run.started_s += now_s - max(self.paused_s, run.started_s)
            self.paused_s = None
            log.info("the queue goes on")

    def _drop_ended_runs(self) -> None:
        """Stop working on jobs that were cancelled (or otherwise moved) behind our back."""
        for run in list(self.runs.values()):
            try:
                job = self.table.get(run.job.id)
                ended = (job.state, job.attempt) != (RUNNING, run.job.attempt)
            except UnknownJob:  # cancelled and deleted between two turns
                ended = True
            if ended:
                self._abandon(run)

    def _take_up_lost(self) -> None:
        """Let jobs wait again that run in the table alone: their attempt ended while it could not be
        written."""
        for job in self.table.in_state(RUNNING):
            if job.id not in self.runs and job.id not in self.unrecorded:
                with contextlib.suppress(JobError):
                    lose_worker(self.table, job, self.table.clock())

    def _abandon(self, run: Run) -> None:
        self.untidy.add(run.job.id)
        self.runs.pop(run.job.id, None)
        for slot in self.holders():
            for key in list(slot.tasks):
                if key[:2] == (run.job.id, run.job.attempt) and not isinstance(key, str):
                    slot.cancel(key, time.monotonic())
            if slot.kept_for == run.job.id:
                slot.kept_for = None

    def _tidy(self) -> None:
        """Remove what jobs that are over leave, once no worker can add to it any more."""
        for job_id in [one for one in list(self.untidy) if not self.is_held(one)]:
            try:
                job = self.table.get(job_id)
            except UnknownJob:
                self.careless_deaths.pop(job_id, None)
                storage.remove_tree(self.layout.staging / job_id)
            else:
                if job.is_over or job_id in self.unrecorded:  # its working copy may be what fills the disk
                    self._tidy_job(job)
            self.untidy.discard(job_id)

    def _tidy_job(self, job: Job) -> None:
        self.careless_deaths.pop(job.id, None)
        storage.remove_tree(self.layout.staging / job.id)
        if job.state != SUCCESS:  # packed at the very moment of the cancel, or killed amid it
            artifact = submissions.artifact_of(job, self.layout)
            with contextlib.suppress(OSError, storage.NameTaken):
                storage.remove_file(artifact)
                storage.remove_file(storage.own_temporary(artifact))
                outputs = self.layout.output_dir(job.title, job.volume, job.id)
                storage.sweep_folders(outputs)
                storage.sweep_temporaries(outputs)

    # -- dealing
    def _deal(self) -> None:
        for slot in self.holders():
            if slot.kept_for not in self.runs:
                slot.kept_for = None  # that job is over
        self._deal_asked()
        while self.paused_s is None:
            # The job with the fewest pages under way comes first: several share fairly.
            for run in sorted(self.runs.values(), key=lambda run: len(run.in_flight)):
                if self._deal_one(run):
                    break
            else:
                return

    def _deal_asked(self) -> None:
        for key, task in self.questions.unanswered():
            if any(key in slot.tasks for slot in self.holders()):
                continue
            if isinstance(task, ComputePage):
                slot = self._for_single()
            else:
                slot = next((slot for slot in self._file_slots() if not slot.doom), None) or self._hire()
            if slot:
                slot.give(key, task)

    # cluster.py computes elsewhere than it stages and packs.
    def _page_slots(self, run: Run | None) -> Sequence[Slot]:
        """Who may compute this run's pages, or one outside any job (None)."""
        return self.holders()

    def _file_slots(self) -> Sequence[Slot]:
        """Who may stage, pack, take pages over as they are, and answer questions."""
        return self.holders()

    def _is_up(self) -> bool:
        """Whether there is a worker that jobs can begin with."""
        return any(slot.capacity for slot in self._file_slots())

    def _want_page_slot(self) -> None:
        """Nobody has room for a page: see to it that somebody will."""
        self._want_file_slot()

    def _want_file_slot(self) -> None:
        if not any(slot.capacity == 0 for slot in self._file_slots()):  # booting
            self._hire()

    def _for_single(self) -> Slot | None:
        """A worker for a page outside any job. Somebody waits for it, so it may be more than the worker has
        room for, by SINGLES at most; but not one where a suspect page is alone, or about to be."""
        able = [slot for slot in self._page_slots(None) if slot.is_open() and slot.singles() < SINGLES]
        if able:
            return min(able, key=lambda slot: len(slot.tasks))
        self._want_page_slot()
        return None

    def _deal_one(self, run: Run) -> bool:
        """Give one task of this run to a worker, if there is one to give and one to take it."""
        if run.file_task is not None:
            return self._deal_file_task(run)
        if run.carry:
            slot = self._for_files()
            if slot:
                self._send_page(run, slot, *run.carry.popleft())
                return True
        if run.todo:
            slot = self._for_pages(run)
            if slot:
                self._send_page(run, slot, run.todo.popleft(), None)
            return slot is not None
        if run.alone and not run.in_flight and not run.carry:
            slot = self._emptied(run)
            if slot:
                slot.exclusive, slot.kept_for = True, None
                self._send_page(run, slot, run.alone.popleft(), None)
            return slot is not None
        return False

    def _emptied(self, run: Run) -> Slot | None:
        """A worker without tasks, for a page that must be alone. While there is none, the
        least busy one gets nothing new: other jobs must not keep it busy for ever."""
        able = [slot for slot in self._page_slots(run) if slot.capacity and not slot.doom]
        kept = [slot for slot in able if slot.kept_for == run.job.id]
        other = [slot for slot in able if slot.index != run.failed_on.get(run.alone[0])] or able
        for slot in kept or [slot for slot in other if slot.room() > 0]:
            if not slot.tasks:
                return slot
        free = [slot for slot in other if slot.kept_for not in self.runs]  # else it is another job's turn
        if free and not kept:
            min(free, key=lambda slot: len(slot.tasks)).kept_for = run.job.id
        return None if able else self._for_pages(run)

    def _for_pages(self, run: Run) -> Slot | None:
        """The worker that will be done first; without one, another is started where there may be more."""
        rest = sum(len(run.todo) + len(run.in_flight) for run in self.runs.values())
        slot = quickest(self._page_slots(run), rest, time.monotonic())
        if slot is None:
            self._want_page_slot()
        return slot

    def _for_files(self) -> Slot | None:
        """As _for_pages, for what needs the service's own disk."""
        slot = idlest(self._file_slots())
        if slot is None:
            self._want_file_slot()
        return slot

    def _hire(self) -> WorkerSlot | None:
        """Start a worker in a free slot, unless workers can't start at present."""
        workers = max(self.slots, self.devices)
        free = next((i for i in range(workers) if i not in self.workers), None)
        if free is None or time.monotonic() < self.not_before_s:
            return None
        try:
            self.workers[free] = WorkerSlot(free, self.entry, self.choice)
        except OSError as error:  # no process, file or memory to be had
            self._on_boot_failure(storage.reason_of(error))
            return None
        return self.workers[free]

    def _send_page(self, run: Run, slot: Slot, n: int, carry: str | None) -> None:
        run.in_flight.add(n)
        run.started_s = run.started_s or time.monotonic()
        slot.give(run.key(n), run.page_task(n, carry, self.limits))

    def _deal_file_task(self, run: Run) -> bool:
        if run.file_task == "stage" and self.is_held(run.job.id):
            return False  # an attempt that ended may still write where this one will
        slot = self._for_files()
        if slot is None:
            return False
        job = run.job
        source = self.layout.incoming / job.input_path
        try:
            moved = inputs.resolve_incoming(self.layout, "incoming/" + job.input_path) != source
        except storage.OutsideIncoming:
            moved = True
        if moved:  # since the submit a folder on the way became a link
            self._fail(run, "INPUT_UNUSABLE", f"{job.input_path} now leads elsewhere through a link")
            return True
        if run.file_task == "stage":
            known = self.table.pages(job.id)
            task: Task = run.stage_task(source, known, self.limits, self.reserve_bytes)
        else:
            try:
                report = submissions.to_report(job, self.table.pages(job.id), self.layout)
            except storage.StorageError as error:  # its folder is one no longer
                self._fail(run, error.code, error.detail)
                return True
            artifact = submissions.artifact_of(job, self.layout)
            task = Pack(job.id, job.attempt, run.outputs, artifact, report)
        run.file_task = None
        run.in_flight.add(0)
        slot.give(run.key(0), task)
        return True

    # -- events
    def _is_answer(self, slot: Slot, event: object) -> bool:
        """Whether it ends a page outside any job, whose key stands for a job's id."""
        key = getattr(event, "job_id", None)
        if key is None or key not in slot.tasks:
            return False
        slot.free(key)
        self.questions.answer(key, event)
        return True

    def _on_event(self, slot: Slot, event: object) -> None:
        match event:
            case Beat(busy_s, limit_s, card):
                slot.card = card
                if busy_s > limit_s:
                    slot.kill(f"a step took longer than {limit_s:.0f} s")
            case Ready(capacity, devices):
                slot.capacity, self.devices, self.boot_failures = capacity, devices, 0
                log.info("%s is ready", slot)
                slot.used_s = time.monotonic()  # booting was no idleness
            case BootFailed(detail):
                slot.doom, slot.doomed_s = detail, time.monotonic()
            case Probed():
                slot.free("probe")
                self.probed = event
                self.questions.answer("probe", event)
            case Previewed(key) | Surveyed(key):
                slot.free(key)
                self.questions.answer(key, event)
            case StagedPage(job_id):
                run = self._run_of(event)
                if run:
                    run.found.append(event)
            case Dropped(job_id, attempt, n):
                slot.free((job_id, attempt, n))
            case PageDone(job_id, attempt, n) | PageFailed(job_id, attempt, n):
                self._on_page(slot, event, slot.free((job_id, attempt, n)))
            case Staged(job_id, attempt) | Packed(job_id, attempt) | TaskFailed(job_id, attempt):
                slot.free((job_id, attempt, event.n if isinstance(event, TaskFailed) else 0))
                run = self._run_of(event)
                if run:
                    run.in_flight.discard(0)
                    self._on_file_task(run, event)

    def _run_of(self, event: Any) -> Run | None:
        """The run an event belongs to, unless that attempt is over."""
        run = self.runs.get(event.job_id)
        return run if run and run.job.attempt == event.attempt else None

    def _on_page(self, slot: Slot, event: PageDone | PageFailed, task: Task | None) -> None:
        if isinstance(event, PageDone) and event.cache_key:
            self.cache.used(event.cache_key)
        if isinstance(event, PageDone) and not (event.carried or event.cached):
            slot.count_page(time.monotonic())
        run = self._run_of(event)
        if run is None:
            return
        run.in_flight.discard(event.n)
        page = run.pages[event.n]
        if isinstance(event, PageFailed) and isinstance(task, ComputePage) and task.carry is not None:
            self._fail(run, "PAGE_LOST", f"{page.name} can't be taken over as it is either: {event.error}")
            return
        if isinstance(event, PageFailed):
            about = logs.of(event.job_id, event.n)
            log.warning("%s failed (try %d): %s", page.name, page.tries + 1, event.error, extra=about)
            run.pages[event.n] = replace(page, tries=page.tries + 1)
            self.table.change_page(event.job_id, event.n, tries=page.tries + 1)
            if page.tries == 0:
                slot.count_failure(time.monotonic())
                run.failed_on[event.n] = slot.index
                run.alone.append(event.n)  # once more, at the end, by itself, elsewhere if there is another
            else:
                run.give_up(event.n, event.step, event.error)
            return
        self._count_page(run, event)
        what = "carried" if event.carried else "taken from the cache" if event.cached else "upscaled"
        what = f"kept as it is: {event.error}" if event.error else what
        log.info("%s %s in %.2f s", page.name, what, event.seconds, extra=logs.of(event.job_id, event.n))
        run.finished += not event.cached  # which tells nothing of how long the others take
        if event.cached:
            run.cached.add(event.n)
        else:
            run.cached.discard(event.n)  # damaged since, and computed after all
        run.left -= 1
        underway = min(run.in_flight, default=None)
        with contextlib.suppress(StaleAttempt):  # cancelled meanwhile: the next turn drops the run
            finish_page(
                self.table,
                run.job,
                event,
                page,
                current_page=run.pages[underway].name if underway else None,
                eta_s=run.eta_s(time.monotonic()) if self.paused_s is None else None,
            )
            self._maybe_pack(run)

    def _count_page(self, run: Run, event: PageDone) -> None:
        self.metrics.pages.add(1, "carried" if event.carried else "cached" if event.cached else "upscaled")
        self.metrics.page_bytes.add(event.size_bytes)
        if event.error:
            self.metrics.page_failures.add(1, run.blamed[event.n])
        elif not (event.carried or event.cached):
            self.metrics.page_seconds.observe(event.seconds, event.model or "")

    def _on_file_task(self, run: Run, event: Staged | Packed | TaskFailed) -> None:
        with contextlib.suppress(StaleAttempt):
            if isinstance(event, Staged):
                with self.table.transaction():
                    staged = record_stage(self.table, run.job, event, run.found)
                    run.job = self.rates.begin(staged, event.workload)
                self._begin_pages(run)
            elif isinstance(event, Packed):
                self._finish(run, event)
            elif event.page is not None and run.pack_tries < PACK_TRIES:
                self._redo_damaged(run, event)
            elif event.code == storage.NoRoom.code and self.cache.clear():
                run.file_task = "stage"  # look again: what nobody asked to keep goes first
            else:
                if event.trace:
                    log.error("%s: %s", event.code, event.trace, extra=logs.of(run.job.id))
                self._fail(run, event.code, event.detail)

    def _begin_pages(self, run: Run) -> None:
        run.found = []
        for page in self.table.pages(run.job.id):
            run.pages[page.n] = page
            if page.status != "pending":
                continue
            run.left += 1
            if page.source_error:
                run.give_up(page.n, "input", page.source_error)
            elif page.deaths >= PAGE_DEATHS:
                run.give_up(page.n, "worker_died", DIED_TWICE)
            elif page.alone or page.tries:
                run.alone.append(page.n)
            else:
                run.todo.append(page.n)
        self._maybe_pack(run)

    def _maybe_pack(self, run: Run) -> None:
        if run.in_flight or run.todo or run.alone or run.carry:
            return
        pages = self.table.pages(run.job.id)
        if all(page.failed for page in pages):
            detail = f"none of the {len(pages)} pages could be upscaled; {pages[0].name}: {pages[0].error}"
            self._fail(run, "ALL_PAGES_FAILED", detail)
            return
        if self.table.change(run.job, phase="packing", current_page=None, eta_s=None):
            run.job = self.table.get(run.job.id)
            run.file_task = "pack"

    def _redo_damaged(self, run: Run, event: TaskFailed) -> None:
        """A finished page is no longer on disk as it was written: compute it again."""
        assert event.page is not None
        log.warning("%s; computing that page again", event.detail, extra=logs.of(run.job.id, event.page))
        run.pack_tries += 1
        page = run.pages[event.page]
        reopen_page(self.table, run.job, page.n)
        run.left += 1
        run.todo.append(page.n)

    def _finish(self, run: Run, event: Packed) -> None:
        pages = self.table.pages(run.job.id)
        # Where this clock stands still while the machine sleeps, the other tells; and that one may be set.
        awake_s = time.monotonic() - run.claimed_s
        run.held |= abs(self.table.clock() - (run.job.started_s or 0.0) - awake_s) > ASLEEP_S
        advance(
            self.table,
            run.job,
            "finish",
            self.table.clock(),
            artifact_hash=event.sha256,
            artifact_bytes=event.size_bytes,
            message=submissions.closing_message(run.job, pages, event.size_bytes),
            **self.rates.end(run.job, pages, event.size_bytes, run.cached, run.held),
        )
        self.metrics.jobs.add(1, SUCCESS)
        self.metrics.artifact_bytes.add(event.size_bytes)
        self.untidy.add(run.job.id)
        self.runs.pop(run.job.id)

    def _fail(self, run: Run, code: str, detail: str) -> None:
        self._abandon(run)
        if code == storage.DiskRefused.code:
            self.cache.clear()  # most often it is full, and a resume needs the room
        log.error("failed: %s: %s", code, detail, extra=logs.of(run.job.id))
        self.unrecorded[run.job.id] = (run.job, _failure(code, detail))
        self._record_failures()

    def _record_failures(self) -> None:
        """Write failures into the table; on a full disk that is tried again every turn."""
        for job_id, (job, values) in list(self.unrecorded.items()):
            try:
                advance(self.table, job, "fail", self.table.clock(), **values)
                self._count_failure(values["error_code"])
            except StaleAttempt:  # cancelled meanwhile: that stands
                pass
            except TABLE_ERRORS as error:
                log.warning("failed, and the table can't say so yet: %s", error, extra=logs.of(job_id))
                continue
            del self.unrecorded[job_id]

    def _count_failure(self, code: str) -> None:
        self.metrics.jobs.add(1, FAILED)
        self.metrics.job_failures.add(1, code)

    # -- deaths and deadlines
    def _check_deadlines(self) -> None:
        now_s = time.monotonic()
        for slot in self.holders():
            if slot.has_unread():
                continue  # another's event took its time: what this one said meanwhile is heard first
            limit_s = slot.patience * BEAT_LIMIT_S if slot.capacity else BOOT_LIMIT_S
            if slot.doom:
                if isinstance(slot, WorkerSlot) and now_s - slot.doomed_s > END_LIMIT_S:
                    self._bury(slot)
            elif now_s - slot.heard_s > limit_s:
                slot.kill(f"it gave no sign of life for {limit_s:.0f} s")
            elif any(deadline_s < now_s for deadline_s in slot.obey_by_s.values()):
                slot.kill("cancel")
            elif not isinstance(slot, WorkerSlot):
                continue
            elif not slot.tasks and slot.capacity and now_s - slot.used_s > self.idle_s:
                log.info("worker %d was idle for %.0f s: stopped", slot.index, self.idle_s)
                del self.workers[slot.index]
                slot.stop(wait_s=max(2.0, slot.stop_s))

    def _bury(self, slot: WorkerSlot) -> None:
        """A worker died: blame the page it had alone, suspect those it had together."""
        del self.workers[slot.index]
        slot.process.join(KILL_S)
        slot.stop(wait_s=0)
        why = slot.doom or exit_reason(slot.process.exitcode)
        log.error("worker %d ended: %s", slot.index, why)
        self.metrics.worker_deaths.add(1, kind_of_death(slot))
        if slot.capacity == 0:
            self._on_boot_failure(why)
        hurt = {key[0] for key in slot.tasks if not isinstance(key, str)}
        for key in slot.tasks if slot.capacity and slot.doom != "cancel" else ():
            if isinstance(key, str):  # else it is still asked, and another worker gets it
                self.questions.disappoint(key, WorkerDied(f"the worker ended: {why}"))
        for job_id in hurt:
            run = self.runs.get(job_id)
            if run:
                self._lose(run, slot, why)

    def _lose(self, run: Run, slot: WorkerSlot, why: str) -> None:
        """One attempt is spent. The next finds on disk and in the table where to go on."""
        mine = {
            key[2]: task
            for key, task in slot.tasks.items()
            if not isinstance(key, str) and key[:2] == run.key(0)[:2]
        }
        self._abandon(run)
        # Killed for a cancelled neighbour's sake: nobody here is to blame.
        enough = None if slot.doom == "cancel" else self._blame(run, mine, slot, why)
        if enough:
            self._fail(run, *enough)
            return
        with contextlib.suppress(JobError, *TABLE_ERRORS):  # _take_up_lost tries again
            lose_worker(self.table, self.table.get(run.job.id), self.table.clock())

    def _blame(self, run: Run, mine: dict[int, Task], slot: Slot, why: str) -> tuple[str, str] | None:
        """Count a worker's death for what it had of a run; (code, detail) once that is to end the job."""
        asked = any(isinstance(key, str) for key in slot.tasks)  # which is likelier to have done it
        for n, task in mine.items():
            if not isinstance(task, ComputePage):
                continue
            carried = task.carry is not None
            deaths = run.pages[n].deaths + (carried or (slot.exclusive and not asked))
            self._suspect(run, n, deaths)
            if carried and deaths >= CARRY_DEATHS:
                return "PAGE_LOST", f"{run.pages[n].name} can't be taken over as it is either: {why}"
        if 0 in mine and not asked:
            count = self.careless_deaths.get(run.job.id, 0) + 1
            self.careless_deaths[run.job.id] = count
            if count >= CARELESS_DEATHS:
                return "WORKER_DIED", f"the worker process died {count} times: {why}"
        return None

    def _suspect(self, run: Run, n: int, deaths: int) -> None:
        """Note that a page may have ended its worker. Where a full disk keeps that out, the job goes on."""
        try:
            self.table.change_page(run.job.id, n, alone=True, deaths=deaths)
        except TABLE_ERRORS as error:
            about = logs.of(run.job.id, n)
            log.warning("the table can't say of a page that it is suspect: %s", error, extra=about)

    def _on_boot_failure(self, why: str) -> None:
        """Workers can't start: say so in the jobs, and don't try again at once."""
        self.boot_failures += 1
        self.not_before_s = time.monotonic() + min(60.0, 2.0 ** min(self.boot_failures, 6))
        if self.boot_failures < CARELESS_DEATHS or self._is_up():
            return  # with one that is up, the jobs go on
        for run in list(self.runs.values()):
            self._fail(run, "WORKER_CANNOT_START", f"the worker process can't start: {why}")
        self.questions.disappoint_all(JobError(f"the worker process can't start: {why}"))


def _refusal_of(error: Exception) -> tuple[str, str]:
    """(code, detail) of a job whose event did not get into the table."""
    if isinstance(error, sqlite3.OperationalError):
        detail = f"the job table can't be written ({error}); make room and resume the job"
        return storage.DiskRefused.code, detail
    if isinstance(error, MemoryError):
        return "INTERNAL", "the service ran out of memory; make some free and resume the job"
    log.error("the job table is damaged", exc_info=error)
    return DatabaseDamaged.code, "the job table is damaged; restart the service, which sets it aside"


def _failure(code: str, detail: str) -> dict[str, Any]:
    return {"last_error": detail, "message": detail, "error_code": code}
