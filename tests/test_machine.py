"""The job table against a model of it, through any sequence of calls and crashes (hypothesis).

Real SQLite, real files, jobs.py's own functions and retention's removals; the clock is the
test's. Beside it a model in plain Python that knows the rules from the contract alone. A call
can be cut off at any statement of its SQL: what is on disk at that moment is all that is left.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from client import JobState, parse
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from serving import PLAN

import jobs
import storage
from files import database
from jobs import Job, JobTable
from messages import Limits, PageDone, Params, SourcePage, Staged, StagedPage
from storage import Layout
from work import retention, submissions
from work.retention import DAY_S, LOOK_S, Keep, Retention

PENDING, RUNNING, SUCCESS, FAILED = "PENDING", "RUNNING", "SUCCESS", "FAILED"
# From the contract, not from jobs.MOVES: a row too many there must be found here.
LEGAL = {
    (RUNNING, "finish"), (RUNNING, "fail"), (RUNNING, "lose_worker"), (RUNNING, "cancel"),
    (PENDING, "cancel"), (FAILED, "resume"), (SUCCESS, "resume"),
}  # fmt: skip
MOVES = sorted({move for _, move in LEGAL})
EDGES = {
    (None, PENDING), (PENDING, RUNNING), (PENDING, FAILED), (RUNNING, RUNNING), (RUNNING, PENDING),
    (RUNNING, SUCCESS), (RUNNING, FAILED), (SUCCESS, PENDING), (FAILED, PENDING),
    (PENDING, PENDING),  # another priority
    (SUCCESS, SUCCESS), (FAILED, FAILED),  # the same, or age removed something
}  # fmt: skip
PHASES = {PENDING: {"queued"}, RUNNING: {"staging", "inferring"}, SUCCESS: {"done"}, FAILED: {"done"}}
PRIORITIES = (-1, 0, 0, 1)
INPUTS, KEYS = ("a.zip", "b.zip"), (None, None, "k", "l")
KEEP = Keep(outputs_days=1, artifacts_days=2, jobs_days=5)
UNKNOWN = "no-such-job"


# ---------------------------------------------------------------- the model
@dataclass
class MPage:
    """A page as the model has it. `where`: its file, if it is finished."""

    source: str  # sha-256 of the input's bytes
    where: str | None = None
    failed: bool = False


@dataclass
class MJob:
    """A job as the model has it."""

    id: str
    path: str
    key: str | None
    body: str
    began_s: float  # when it was submitted, then when it was first claimed
    state: str = PENDING
    attempt: int = 0
    pages: dict[str, MPage] = field(default_factory=dict)
    staged: bool = False  # in this attempt
    cancelled: bool = False
    retries: int = 0
    artifact: str | None = None
    last_error: str | None = None
    ends: int = 0
    finished_s: float | None = None
    aged: set[str] = field(default_factory=set)  # fields of Keep
    priority: int = 0

    @property
    def is_over(self) -> bool:
        return self.state in (SUCCESS, FAILED)

    @property
    def todo(self) -> list[str]:
        return sorted(name for name, page in self.pages.items() if not page.where)

    @property
    def failed_pages(self) -> int:
        return sum(page.failed for page in self.pages.values())

    def end(self, state: str, now_s: float, **values: Any) -> None:
        # Whatever the clock says: no job ends before it began.
        self.state, self.finished_s, self.ends = state, max(now_s, self.began_s), self.ends + 1
        for name, value in values.items():
            setattr(self, name, value)


class CutOff(Exception):
    """The power went while this call was under way."""


def survives(step: Callable[..., None]) -> Callable[..., None]:
    """A rule whose call may be cut off: the rest of it does not happen then."""

    @functools.wraps(step)
    def stepped(self: Machine, **drawn: Any) -> None:
        with contextlib.suppress(CutOff):
            step(self, **drawn)

    return stepped


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@functools.lru_cache(1000)  # most jobs are as they were a step before
def as_clients_read_it(text: str) -> JobState:
    return parse(JobState, json.loads(text))


which = st.integers(0, 4)
with_jobs = precondition(lambda self: self.jobs)
with_attempts = precondition(lambda self: self.attempts)


# ---------------------------------------------------------------- the machine
class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")  # where an fsync costs nothing
        self.root = Path(tempfile.mkdtemp(prefix="machine-", dir=memory if memory.is_dir() else None))
        self.layout = Layout(self.root, self.root / "models")
        self.layout.create()
        self.now_s, self.passed_s = 1e9, 0.0
        self.inputs: dict[str, dict[str, bytes]] = {}  # path -> name -> bytes
        for path in INPUTS:
            self.put(path, {f"{n}.png": f"{path} {n}".encode() for n in (1, 2)})
        self.jobs: list[MJob] = []  # in order of arrival
        self.rows: list[Job] = []  # as they were read at some time
        self.attempts: list[Job] = []  # as claims gave them
        self.events: list[Job] = []  # what listeners were told
        self.lost: Counter[str] = Counter()  # endings of deleted jobs
        self.fuse: int | None = None  # statements until the power goes
        self.paused = False
        self.open()

    def teardown(self) -> None:
        self.table.close()
        shutil.rmtree(self.root)

    # -- means
    def open(self) -> None:
        """Start the service's part that matters here."""
        self.table = JobTable(self.layout.database, lambda: self.now_s)
        self.table.listeners.append(self.events.append)
        jobs.recover(self.table, self.layout, self.now_s)
        for job in self.jobs:
            if job.state == RUNNING:
                job.state = PENDING
        self.started = self.now_s, self.passed_s
        self.keeper = Retention(self.table, self.layout, KEEP, lambda: self.passed_s)

    def put(self, path: str, pages: dict[str, bytes]) -> None:
        self.inputs[path] = pages
        (self.layout.incoming / path).write_bytes(b"zip")

    def on_disk(self) -> dict[str, bytes]:
        """The database as a crash would leave it now."""
        files = (self.layout.database.with_name(f"jobs.sqlite3{end}") for end in ("", "-wal"))
        return {file.name: file.read_bytes() for file in files if file.exists()}

    def crash(self, left: dict[str, bytes]) -> None:
        """Nothing is left of the process; `left` is what the disk has."""
        self.table.close()
        for file in self.root.glob("jobs.sqlite3*"):
            file.unlink()
        for name, data in left.items():
            (self.root / name).write_bytes(data)
        with contextlib.closing(sqlite3.connect(self.layout.database)) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        self.open()

    def call(self, what: Callable[[], Any]) -> Any:
        """The call's result; where the fuse burns down in it, a crash, and CutOff."""
        if self.fuse is None:
            return what()
        told, left, self.fuse, burning = len(self.events), {}, None, iter(range(self.fuse))

        def burn(_: str) -> None:
            if next(burning, None) is None and not left:
                left.update(self.on_disk())

        self.table._db.set_trace_callback(burn)
        try:
            result = what()
        except (jobs.JobError, storage.StorageError):
            if not left:
                raise
        finally:
            self.table._db.set_trace_callback(None)
        if left:
            del self.events[told:]  # nobody lived to hear of it
            self.crash(left)
            raise CutOff
        return result

    def refused(self, kind: type[Exception], what: Callable[[], Any]) -> None:
        """The call raises `kind` and changes nothing."""
        before, told = self.dump(), len(self.events)
        with pytest.raises(kind):
            self.call(what)
        assert self.dump() == before and len(self.events) == told

    def dump(self) -> list[tuple[Any, ...]]:
        """All rows; the counter of seq may have gaps."""
        rows = (self.table._db.execute(f"SELECT * FROM {name}") for name in ("jobs", "pages"))
        return [tuple(row) for row in itertools.chain.from_iterable(rows)]

    def pick(self, n: int) -> MJob:
        """One of the jobs, most often the latest ones."""
        return self.jobs[-1 - n % len(self.jobs)]

    def modelled(self, row: Job) -> MJob | None:
        """The model's job, if the row still is as it was read."""
        found = next((job for job in self.jobs if job.id == row.id), None)
        return found if found and (found.state, found.attempt) == (row.state, row.attempt) else None

    def folder(self, job: MJob) -> Path:
        return self.layout.output_dir("作品", "1", job.id)

    def is_whole(self, job: MJob, page: MPage) -> bool:
        """Whether the page's file is on disk as it was recorded."""
        path = self.folder(job) / (page.where or "")
        return bool(page.where) and storage.file_is(path, digest(page.source.encode()))

    # -- what clients ask for
    @rule(
        path=st.sampled_from(INPUTS), key=st.sampled_from(KEYS), body=st.sampled_from("xy"),
        priority=st.sampled_from(PRIORITIES),
    )  # fmt: skip
    @survives
    def submit(self, path: str, key: str | None, body: str, priority: int) -> None:
        wanted = submissions.Submission("作品", "1", "zip", path, Params(), None, priority)
        before = next((job for job in self.jobs if key and job.key == key), None)

        def submit() -> Job:
            return submissions.submit(self.table, self.layout, wanted, key, body, Limits())

        if before and before.body != body:
            self.refused(jobs.KeyReused, submit)
        elif before:
            assert self.call(submit).id == before.id
        elif path not in self.inputs:
            self.refused(storage.InputMissing, submit)
        else:
            self.jobs.append(MJob(self.call(submit).id, path, key, body, self.now_s, priority=priority))

    @initialize(path=st.sampled_from(INPUTS))
    def begin(self, path: str) -> None:
        self.submit(path=path, key=None, body="x", priority=0)

    @with_jobs
    @rule(n=which, priority=st.sampled_from(PRIORITIES))
    @survives
    def prioritize(self, n: int, priority: int) -> None:
        job, before = self.pick(n), self.dump()
        self.call(lambda: jobs.prioritize(self.table, job.id, priority))
        assert (self.dump() != before) == (job.priority != priority)
        job.priority = priority

    @rule(paused=st.sampled_from([False, False, True]))
    @survives
    def pause(self, paused: bool) -> None:
        before, told = self.dump(), len(self.events)
        self.call(lambda: self.table.pause(paused))
        self.paused = paused
        assert self.dump() == before and len(self.events) == told

    @with_jobs
    @rule(n=which)
    @survives
    def cancel(self, n: int) -> None:
        job, before = self.pick(n), self.dump()
        answer = self.call(lambda: jobs.cancel(self.table, job.id, self.now_s))
        if job.is_over:
            assert self.dump() == before
        else:
            job.end(FAILED, self.now_s, cancelled=True)
            assert answer.message == "Cancelled by user"

    @with_jobs
    @rule(n=which, path=st.sampled_from((None, *INPUTS, "../a.zip")))
    @survives
    def resume(self, n: int, path: str | None) -> None:
        self._resume(self.pick(n), path)

    @precondition(lambda self: any(job.state == SUCCESS and job.failed_pages for job in self.jobs))
    @rule()
    @survives
    def resume_a_success(self) -> None:
        """One whose failed pages are tried again: bare chance seldom finds one."""
        self._resume(next(job for job in self.jobs if job.state == SUCCESS and job.failed_pages), None)

    def _resume(self, job: MJob, path: str | None) -> None:
        before, given = self.dump(), (path, "zip") if path else None
        unfinished = not job.pages or any(page.failed or not page.where for page in job.pages.values())
        source = path or job.path

        def resume() -> Job:
            return submissions.resume(self.table, self.layout, job.id, given, Limits())

        if not job.is_over or (job.state == SUCCESS and not job.failed_pages):
            self.call(resume)
            assert self.dump() == before
        elif source.startswith(".."):
            self.refused(storage.OutsideIncoming, resume)
        elif source not in self.inputs and (unfinished or "outputs_days" in job.aged):
            self.refused(storage.InputMissing, resume)
        else:
            self.call(resume)
            for name, page in job.pages.items():
                job.pages[name] = MPage(page.source) if page.failed else page
            job.state, job.cancelled, job.path, job.retries = PENDING, False, source, job.retries + 1
            job.artifact, job.last_error, job.finished_s, job.aged = None, None, None, set()

    @with_jobs
    @rule(n=which)
    @survives
    def delete(self, n: int) -> None:
        job = self.pick(n)

        def delete() -> None:
            submissions.delete(self.table, self.layout, job.id)

        if job.state == RUNNING:
            self.refused(jobs.JobIsRunning, delete)
            return
        waited = job.state == PENDING  # then it is cancelled before its files go
        try:
            self.call(delete)
        except CutOff:
            if waited and self.table.get(job.id).is_over:
                job.end(FAILED, self.now_s, cancelled=True)
            raise
        finally:
            assert not self.folder(job).exists() and not list(self.root.glob(f"*/*{job.id}*"))
        self.lost[job.id] = job.ends + waited
        self.jobs.remove(job)

    @rule(what=st.sampled_from(["cancel", "resume", "delete", "prioritize"]))
    @survives
    def name_an_unknown_job(self, what: str) -> None:
        calls = {
            "cancel": lambda: jobs.cancel(self.table, UNKNOWN, self.now_s),
            "resume": lambda: submissions.resume(self.table, self.layout, UNKNOWN, None, Limits()),
            "delete": lambda: submissions.delete(self.table, self.layout, UNKNOWN),
            "prioritize": lambda: jobs.prioritize(self.table, UNKNOWN, 1),
        }
        self.refused(jobs.UnknownJob, calls[what])

    # -- what the dispatcher does
    @rule(steps=st.integers(1, 8), bad=st.sampled_from([None, "1.png"]))
    @survives
    def work(self, steps: int, bad: str | None) -> None:
        """Some steps of a day without trouble, which bare chance would seldom put in a row."""
        for _ in range(steps):
            under_way = [row for row in self.attempts if self.modelled(row)]
            job = self.modelled(under_way[-1]) if under_way else None
            if job is None:
                self._claim()
            elif not job.staged:
                self._stage(under_way[-1], job, copied=False)
            elif job.todo:
                self._finish_page(under_way[-1], job, 0, ".png" if job.todo[0] == bad else ".jpg")
            else:
                self._end(under_way[-1], job, "fail" if job.failed_pages == len(job.pages) else "finish")

    @rule()
    @survives
    def claim(self) -> None:
        self._claim()

    @with_attempts
    @rule(n=which, copied=st.booleans())
    @survives
    def stage(self, n: int, copied: bool) -> None:
        self._stage(*self.attempt(n), copied)

    @with_attempts
    @rule(n=which, at=which, form=st.sampled_from([".jpg", ".png"]))
    @survives
    def finish_page(self, n: int, at: int, form: str) -> None:
        self._finish_page(*self.attempt(n), at, form)

    @with_attempts
    @rule(n=which, move=st.sampled_from(["finish", "fail", "lose_worker"]))
    @survives
    def end(self, n: int, move: str) -> None:
        self._end(*self.attempt(n), move)

    @with_attempts
    @rule(n=which, at=which)
    @survives
    def reopen_page(self, n: int, at: int) -> None:
        row, job = self.attempt(n)
        if job is None:
            self.refused(jobs.StaleAttempt, lambda: jobs.reopen_page(self.table, row, 1))
        elif job.staged:
            name = sorted(job.pages)[at % len(job.pages)]
            number = sorted(job.pages).index(name) + 1
            before = self.dump()
            self.call(lambda: jobs.reopen_page(self.table, row, number))
            assert bool(job.pages[name].where) == (self.dump() != before)
            job.pages[name] = MPage(job.pages[name].source)

    def attempt(self, n: int) -> tuple[Job, MJob | None]:
        """An attempt that some worker may still be at; None: it is over."""
        row = self.attempts[-1 - n % len(self.attempts)]
        return row, self.modelled(row)

    def _claim(self) -> None:
        waiting = [job for job in self.jobs if job.state == PENDING and not self.paused]
        due = max(waiting, key=lambda job: job.priority, default=None)  # the first of several equals
        row = self.call(lambda: jobs.claim(self.table, self.now_s))
        assert (row and row.id) == (due and due.id)
        if due:
            due.began_s = max(due.began_s, self.now_s) if not due.attempt else due.began_s
            due.state, due.attempt, due.staged = RUNNING, due.attempt + 1, False
            self.attempts.append(row)

    def _stage(self, row: Job, job: MJob | None, copied: bool) -> None:
        """copied: an earlier attempt's working copy is intact, so the input is not looked at."""
        event = Staged(row.id, row.attempt, PLAN, 0, None)
        if job is None:
            self.refused(jobs.StaleAttempt, lambda: jobs.record_stage(self.table, row, event, []))
            return
        old = {name: page.source for name, page in job.pages.items()}
        source = {name: digest(data) for name, data in self.inputs.get(job.path, {}).items()}
        source = old if copied and old else source
        if job.staged or not source:
            return
        kept = {
            name: page
            for name, page in job.pages.items()
            if source.get(name) == page.source and self.is_whole(job, page)
        }
        found = [
            StagedPage(row.id, row.attempt, SourcePage(name, name, sha, 3), name in kept)
            for name, sha in sorted(source.items())
        ]
        self.call(lambda: jobs.record_stage(self.table, row, event, found))
        job.staged, job.pages = True, {name: kept.get(name, MPage(sha)) for name, sha in source.items()}

    def _finish_page(self, row: Job, job: MJob | None, at: int, form: str) -> None:
        """form: .jpg, or .png for the original, carried since it could not be upscaled."""
        todo = job.todo if job and job.staged else []
        name = todo[at % len(todo)] if todo else "1.png"
        number = sorted(job.pages).index(name) + 1 if job and todo else 1
        data = job.pages[name].source.encode() if job and todo else b"late"
        output, error = name.replace(".png", form), "unreadable" if form == ".png" else None
        event = PageDone(
            row.id, row.attempt, number, output, digest(data), len(data), 1, 1, "L", 0.1, error,
            carried=form == ".png",
        )  # fmt: skip
        page = jobs.Page(row.id, number, name, name, "", 3, None, name.removesuffix(".png"))

        def finish_page() -> None:
            jobs.finish_page(self.table, row, event, page, eta_s=1.0)

        if job is None:
            self.refused(jobs.StaleAttempt, finish_page)
        elif todo:
            self.folder(job).mkdir(parents=True, exist_ok=True)
            (self.folder(job) / output).write_bytes(data)  # the file first, then the row
            self.call(finish_page)
            job.pages[name] = replace(job.pages[name], where=output, failed=error is not None)

    def _end(self, row: Job, job: MJob | None, move: str) -> None:
        values: dict[str, Any] = {
            "finish": {"artifact_hash": digest(row.id.encode()), "artifact_bytes": len(row.id)},
            "fail": {"last_error": "why", "message": "why"},
            "lose_worker": {},
        }[move]

        def end() -> Job:
            if move == "lose_worker":
                return jobs.lose_worker(self.table, row, self.now_s)
            return jobs.advance(self.table, row, move, self.now_s, **values)

        if job is None:
            self.refused(jobs.StaleAttempt, end)
        elif move != "finish" or (job.staged and not job.todo and job.failed_pages < len(job.pages)):
            if move == "finish":
                self.layout.artifact("作品", "1", job.id).write_bytes(row.id.encode())
            self.call(end)
            if move == "lose_worker":
                job.state = PENDING
            else:
                told = {"artifact": values.get("artifact_hash"), "last_error": values.get("last_error")}
                job.end(SUCCESS if move == "finish" else FAILED, self.now_s, **told)

    # -- what must not work
    @with_jobs
    @rule(n=which)
    def read(self, n: int) -> None:
        self.rows.append(self.table.get(self.pick(n).id))

    @with_jobs
    @rule(n=which, values=st.sampled_from([{}, {"processed": 99}]))
    @survives
    def advance(self, n: int, values: dict[str, Any]) -> None:
        """Every move that isn't legal, or comes late, changes nothing."""
        rows = [self.table.get(self.pick(n).id), *self.rows[-1 - n % max(1, len(self.rows)) :][:1]]
        for row, move in itertools.product(rows, MOVES):
            late = self.modelled(row) is None
            legal = (row.state, move) in LEGAL
            call = functools.partial(jobs.advance, self.table, row, move, self.now_s, **values)
            if late or not legal:
                self.refused(jobs.StaleAttempt if legal else jobs.IllegalMove, call)

    # -- what happens to it
    @rule(clean=st.booleans())
    def end_process(self, clean: bool) -> None:
        if clean:
            self.table.close()
            self.open()
        else:
            self.crash(self.on_disk())

    @rule(statements=st.integers(0, 8))
    def light_fuse(self, statements: int) -> None:
        """The next call is cut off before this statement of it."""
        self.fuse = statements

    @rule(path=st.sampled_from(INPUTS), change=st.sampled_from(["gone", "other", "more"]))
    def change_input(self, path: str, change: str) -> None:
        if change == "gone":
            self.inputs.pop(path, None)
            (self.layout.incoming / path).unlink(missing_ok=True)
            return
        pages = self.inputs.get(path, {"1.png": path.encode()})
        if change == "more":
            self.put(path, pages | {"3.png": b"new"})
        else:
            self.put(path, pages | {"1.png": pages["1.png"] + b"+"})

    @with_jobs
    @rule(n=which, at=which)
    def damage_page(self, n: int, at: int) -> None:
        """A finished page's file is cut on disk: the one way in which an attempt may lose it."""
        job = self.pick(n)
        done = sorted(page.where for page in job.pages.values() if page.where)
        if done:
            path = self.folder(job) / done[at % len(done)]
            if path.exists():
                path.write_bytes(b"")

    @rule(by_s=st.sampled_from([1.0, 60.0, DAY_S, -3600.0, -30 * DAY_S, 30 * DAY_S]))
    def set_clock(self, by_s: float) -> None:
        """The clock is set forward or back while the service runs."""
        self.now_s += by_s

    @rule(days=st.sampled_from([0.5, 1.5, 1.5, 3.0, 6.0]))
    @survives
    def grow_old(self, days: float) -> None:
        """Time passes; then retention looks twice and has its turns."""
        self.now_s += days * DAY_S
        self.passed_s += days * DAY_S
        wall_s, start_s = self.started
        now_s = min(self.now_s, wall_s + self.passed_s - start_s + retention.CLOCK_SLACK_S)
        due = [
            (job, what)
            for what in ("outputs_days", "artifacts_days", "jobs_days")
            for job in self.jobs
            if job.is_over and job.finished_s is not None
            if job.finished_s < now_s - getattr(KEEP, what) * DAY_S
        ]
        for _ in range(2):
            self.keeper._look_at_s = self.passed_s  # a look is due
            for _ in range(3 * len(self.jobs) + 1):
                self.keeper.turn()
            self.now_s += LOOK_S
            self.passed_s += LOOK_S
        for job, what in due:
            if what == "jobs_days":
                self.lost[job.id] = job.ends
                self.jobs.remove(job)
            job.aged.add(what)
        for job, what in due:
            where = self.layout.artifact("作品", "1", job.id), self.folder(job)
            assert not where[what != "artifacts_days"].exists()

    # -- what holds at any time
    @invariant()
    def api_table_and_events_agree(self) -> None:
        newest = {row.id: row for row in self.events}
        assert self.table.is_paused == self.paused
        assert [row.id for row in reversed(self.table.page_of_jobs(None, "", 500, None))] == [
            job.id for job in self.jobs
        ]
        for job in self.jobs:
            row = self.table.get(job.id)
            assert newest[job.id] == row
            state = as_clients_read_it(json.dumps(submissions.to_state(row, self.layout)))
            has_artifact = job.artifact is not None and "artifacts_days" not in job.aged
            finished = sum(page.where is not None for page in job.pages.values())
            assert (state.status, state.cancelled, state.retries, state.last_error) == (
                job.state, job.cancelled, job.retries, job.last_error,
            )  # fmt: skip
            assert (state.processed, state.total, state.failed_pages) == (
                finished, len(job.pages), job.failed_pages,
            )  # fmt: skip
            assert (state.artifact_hash, state.artifact_path is not None) == (job.artifact, has_artifact)
            assert (row.finished_s, row.attempt) == (job.finished_s, job.attempt)
            assert row.priority == job.priority
            times = [at for at in (state.created_at, state.started_at, state.finished_at) if at]
            assert times == sorted(times)
            assert state.phase in PHASES[job.state]
            assert job.state == RUNNING or (state.current_page, state.eta_seconds) == (None, None)

    @invariant()
    def only_legal_edges_were_told_and_every_end_once(self) -> None:
        seqs = [row.seq for row in self.events]
        assert all(earlier < later for earlier, later in itertools.pairwise(seqs))
        states: dict[str, str] = {}
        ends: Counter[str] = Counter()
        for row in self.events:
            before = states.get(row.id)
            assert (before, row.state) in EDGES
            ends[row.id] += row.is_over and before not in (SUCCESS, FAILED)
            states[row.id] = row.state
        assert +ends == +(Counter({job.id: job.ends for job in self.jobs}) + self.lost)

    @invariant()
    def no_finished_page_is_lost(self) -> None:
        for job in self.jobs:
            rows = {page.name: page for page in self.table.pages(job.id)}
            assert {name: (row.source_sha256, row.output, row.failed) for name, row in rows.items()} == {
                name: (page.source, page.where, page.failed) for name, page in job.pages.items()
            }
            assert all((row.status == "pending") == (row.output is None) for row in rows.values())


THOROUGH = settings(
    max_examples=250, stateful_step_count=50, derandomize=True, database=None, deadline=None,
    suppress_health_check=list(HealthCheck), print_blob=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of clocks are set forward, and each is warned of."""
    caplog.set_level(logging.ERROR, "retention")


def test_no_sequence_of_calls_and_crashes_breaks_a_rule_or_loses_a_page():
    seen: Counter[Any] = Counter()

    class Counting(Machine):
        def refused(self, kind: type[Exception], what: Callable[[], Any]) -> None:
            super().refused(kind, what)
            seen[kind] += 1

        def crash(self, left: dict[str, bytes]) -> None:
            super().crash(left)
            seen["crash"] += 1

        def teardown(self) -> None:
            states: dict[str, str] = {}
            for row in self.events:
                seen[states.get(row.id), row.state] += 1
                states[row.id] = row.state
            super().teardown()

    run_state_machine_as_test(Counting, settings=THOROUGH)
    # Else it proved nothing: every edge was walked, every refusal met, hundreds of crashes survived.
    assert EDGES <= {*seen} and seen["crash"] > 300
    assert {kind for kind in seen if isinstance(kind, type)} == {
        jobs.UnknownJob, jobs.IllegalMove, jobs.StaleAttempt, jobs.JobIsRunning, jobs.KeyReused,
        storage.InputMissing, storage.OutsideIncoming,
    }  # fmt: skip


# ---------------------------------------------------------------- and it can fail
def an_edge_too_many(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(jobs.MOVES, (SUCCESS, "cancel"), FAILED)


def an_edge_too_few(patch: pytest.MonkeyPatch) -> None:
    patch.delitem(jobs.MOVES, (RUNNING, "lose_worker"))


def no_guard_on_the_attempt(patch: pytest.MonkeyPatch) -> None:
    change = JobTable.change

    def unguarded(self: JobTable, job: Job, **values: Any) -> bool:
        return change(self, replace(job, attempt=self.get(job.id).attempt), **values)

    patch.setattr(JobTable, "change", unguarded)


def a_resume_that_is_not_counted(patch: pytest.MonkeyPatch) -> None:
    advance = jobs.advance

    def uncounted(table: JobTable, job: Job, move: str, now_s: float, **values: Any) -> Job:
        values.pop("retries", None)
        return advance(table, job, move, now_s, **values)

    patch.setattr(jobs, "advance", uncounted)


def a_recovery_that_starts_from_scratch(patch: pytest.MonkeyPatch) -> None:
    lose_worker = jobs.lose_worker

    def forgetful(table: JobTable, job: Job, now_s: float) -> Job:
        table.replace_pages(job.id, [])
        return lose_worker(table, job, now_s)

    patch.setattr(jobs, "lose_worker", forgetful)


def a_page_whose_row_and_count_are_two_transactions(patch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def torn(self: JobTable) -> Iterator[sqlite3.Connection]:
        yield self._db  # each statement commits by itself

    finish_page = jobs.finish_page

    def in_two(table: JobTable, *rest: Any, **values: Any) -> None:
        changed: list[str] = []
        with pytest.MonkeyPatch.context() as once:
            once.setattr(JobTable, "transaction", torn)
            finish_page(table, *rest, **values)
            changed += sorted(table._changed)
        for job_id in changed:
            for listener in table.listeners:
                listener(table.get(job_id))

    patch.setattr(jobs, "finish_page", in_two)


def an_event_too_few(patch: pytest.MonkeyPatch) -> None:
    take = JobTable.take_next

    def silently(self: JobTable, now_s: float) -> Job | None:
        listeners, self.listeners = self.listeners, []
        try:
            return take(self, now_s)
        finally:
            self.listeners = listeners

    patch.setattr(JobTable, "take_next", silently)


def a_turn_out_of_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jobs, "prioritize", lambda table, job_id, priority: table.get(job_id))


def a_pause_that_a_restart_forgets(patch: pytest.MonkeyPatch) -> None:
    recover = jobs.recover

    def forgetful(table: JobTable, *rest: Any) -> None:
        recover(table, *rest)
        table.pause(False)

    patch.setattr(jobs, "recover", forgetful)


def a_removal_by_age_without_its_setting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(retention, "DAY_S", DAY_S / 4)


@pytest.mark.parametrize(
    "defect",
    [
        an_edge_too_many, an_edge_too_few, no_guard_on_the_attempt, a_resume_that_is_not_counted,
        a_recovery_that_starts_from_scratch, a_page_whose_row_and_count_are_two_transactions,
        an_event_too_few, a_turn_out_of_order, a_pause_that_a_restart_forgets,
        a_removal_by_age_without_its_setting,
    ],
)  # fmt: skip
def test_a_defect_planted_in_the_job_table_is_found(monkeypatch, defect):
    defect(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, jobs.JobError, database.DatabaseDamaged)):
        run_state_machine_as_test(Machine, settings=settings(THOROUGH, phases=[Phase.generate]))
