"""Job lifecycle: which moves are legal, and who may make them.

Map: states and errors - MOVES - Job, Page - JobTable (all SQL but what opens the file, see database.py,
     or reads a damaged one, see rebuild.py) - moves (advance, claim, cancel, finish_page, ...)
Rule: a job's state changes only through advance() and claim().
Runs in: http-* threads (requests), the dispatcher thread (everything that follows from
work). The worker process never opens the database.

    http-N --insert, cancel--> JobTable <--claim, advance, finish_page-- dispatcher
                                  |
                                  '-- listeners (the WebSocket loop), after each commit
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import logs
import storage
from files import database
from files.database import SEALS
from messages import (
    PageDone,
    Params,
    Plan,
    Staged,
    StagedPage,
)
from storage import Layout

log = logging.getLogger("jobs")

PENDING, RUNNING, SUCCESS, FAILED = "PENDING", "RUNNING", "SUCCESS", "FAILED"
STATES = (PENDING, RUNNING, SUCCESS, FAILED)
CANCEL_MESSAGE = "Cancelled by user"
REMOVED = {  # by age: field of Keep -> column that says when, what in words, which jobs ever had it
    "outputs_days": ("outputs_removed_s", "the pages were", "total > 0"),
    "artifacts_days": ("artifact_removed_s", "the artifact was", "artifact_hash IS NOT NULL"),
}


# ---------------------------------------------------------------- errors
class JobError(Exception):
    """Base of this file's errors; `code` is stable and goes to clients as it is."""

    code = "JOB"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class UnknownJob(JobError):
    """No job has this id."""

    code = "UNKNOWN_JOB"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id[:64]!a}")


class IllegalMove(JobError):
    """MOVES has no such row. A client asked for what this state can't do."""

    code = "ILLEGAL_MOVE"

    def __init__(self, job_id: str, state: str, move: str) -> None:
        super().__init__(f"job {job_id} is {state}: {move} is not possible")
        self.state, self.move = state, move


class StaleAttempt(JobError):
    """The job moved on since it was read: this caller's attempt is over."""

    code = "STALE_ATTEMPT"

    def __init__(self, job_id: str, attempt: int) -> None:
        super().__init__(f"attempt {attempt} of job {job_id} is over")


class JobIsRunning(JobError):
    """A running job can't be deleted."""

    code = "JOB_RUNNING"


class KeyReused(JobError):
    """An Idempotency-Key came back with another body."""

    code = "IDEMPOTENCY_KEY_REUSED"


class InvalidFields(JobError):
    """The request's values are wrong; `errors` names each field."""

    code = "INVALID_FIELDS"

    def __init__(self, errors: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{name}: {message}" for name, message in errors))
        self.errors = errors


class ShuttingDown(JobError):
    """The service is ending and takes no more work."""

    code = "SHUTTING_DOWN"


# ---------------------------------------------------------------- states and rows
MOVES = {
    (RUNNING, "finish"): SUCCESS,
    (RUNNING, "fail"): FAILED,
    (RUNNING, "lose_worker"): PENDING,  # another attempt goes on where this one stopped
    (PENDING, "cancel"): FAILED,
    (RUNNING, "cancel"): FAILED,  # the worker notices at its next layer, or is killed
    (FAILED, "resume"): PENDING,
    (SUCCESS, "resume"): PENDING,  # only with failed pages to redo
}


@dataclass(frozen=True, slots=True)
class Job:
    """One row of jobs. Times are seconds since the epoch."""

    number: int  # order of arrival
    id: str
    state: str
    attempt: int
    cancelled: bool
    title: str
    volume: str
    input_type: str
    input_path: str  # inside incoming/
    params: Params
    manifest: str | None  # see parsed()
    plan: Plan | None
    phase: str
    processed: int
    total: int
    failed_pages: int
    left_out: int
    reconciliation: str | None  # see parsed()
    retries: int
    message: str | None
    last_error: str | None
    error_code: str | None
    current_page: str | None
    eta_s: float | None
    artifact_hash: str | None
    artifact_bytes: int | None
    seq: int
    created_s: float
    started_s: float | None
    finished_s: float | None
    idempotency_key: str | None
    request_hash: str | None
    outputs_removed_s: float | None  # by age, see retention.py
    artifact_removed_s: float | None
    priority: int = 0  # higher ones are claimed first
    forecast: str | None = None  # see predict.py, and parsed()

    @property
    def is_over(self) -> bool:
        """SUCCESS or FAILED."""
        return self.state in (SUCCESS, FAILED)


@dataclass(frozen=True, slots=True)
class Page:
    """One row of pages. Status: pending, upscaled, or carried: the original, because it could
    not be upscaled (then error says why) or was large enough."""

    job_id: str
    n: int  # from 1, in natural order
    name: str
    staged: str
    source_sha256: str
    source_bytes: int
    source_error: str | None
    stem: str  # output path without suffix
    status: str = "pending"
    output: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    width: int | None = None
    height: int | None = None
    mode: str | None = None
    error: str | None = None
    deviation: str | None = None
    color_spread: float | None = None
    model: str | None = None
    seconds: float | None = None
    tries: int = 0
    alone: bool = False  # was in flight when a worker died: no company until it is done
    deaths: int = 0  # of workers that computed this page alone

    @property
    def failed(self) -> bool:
        """Whether the original stands in for what could not be computed."""
        return self.status == "carried" and self.error is not None


JOB_COLUMNS = tuple(Job.__slots__)
PAGE_COLUMNS = tuple(Page.__slots__)


def job_from_row(row: sqlite3.Row) -> Job:
    """A row of jobs. Raises DatabaseUnusable, ValueError, TypeError where it is not one."""
    values = {column: row[column] for column in JOB_COLUMNS}
    if values["state"] not in STATES:
        raise database.DatabaseUnusable(f"job {values['id']} has the unknown state {values['state']!r}")
    values["params"] = Params(**json.loads(values["params"]))
    values["plan"] = Plan.of(json.loads(values["plan"])) if values["plan"] else None
    values["cancelled"] = bool(values["cancelled"])
    return Job(**values)


def parsed(text: str | None) -> dict[str, Any] | None:
    """The value of manifest or reconciliation, where it is needed: of 10,000 pages it takes 10 ms
    to parse, and a job's row is read several times a page."""
    return json.loads(text) if text else None


def page_from_row(row: sqlite3.Row) -> Page:
    """A row of pages."""
    values = {column: row[column] for column in PAGE_COLUMNS}
    return Page(**values | {"alone": bool(values["alone"])})


def _to_column(value: Any) -> Any:
    if isinstance(value, (Params, Plan)):
        value = asdict(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


# ---------------------------------------------------------------- the table
class JobTable:
    """The one connection to the one database.

    Every change of a job gives it a new seq from one rising counter, commits, and is then
    told to the listeners, in order. Listeners must not block.
    Raises database.DatabaseDamaged, DatabaseUnusable.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.listeners: list[Callable[[Job], None]] = []
        self.set_aside: Path | None = None  # where a damaged database went, see rebuild.py
        self.salvaged = 0  # jobs that were read from there
        self._lock = threading.RLock()
        self._changed: set[str] = set()  # within the open transaction
        self._db = database.connect(path)

    def close(self) -> None:
        """Close the connection; the WAL goes back into the database."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Owns begin, commit, rollback, and telling the listeners. Nests."""
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            self._changed.clear()
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                changed = [self.get(job_id) for job_id in sorted(self._changed)]
                for job in changed:
                    self._db.execute(f"UPDATE jobs SET seal = {SEALS['jobs']} WHERE id = ?", (job.id,))
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has rolled back already
                    self._db.execute("ROLLBACK")
                raise
            # Under the lock, so that listeners see changes in the order of their seq.
            for job in sorted(changed, key=lambda job: job.seq):
                for listener in self.listeners:
                    listener(job)

    def _next_seq(self, least: int = 0) -> int:
        row = self._db.execute("UPDATE counter SET seq = max(seq + 1, ?) RETURNING seq", (least,)).fetchone()
        return int(row[0])

    # -- reading
    def get(self, job_id: str) -> Job:
        """Raises UnknownJob."""
        with self._lock:
            row = self._db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise UnknownJob(job_id)
        return job_from_row(row)

    def by_key(self, key: str) -> list[Job]:
        """What was submitted with this Idempotency-Key: a job, or one a volume, whose keys have a
        line feed and "number/count" behind it (submissions.submit_all)."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM jobs WHERE idempotency_key = ?"
                " OR (idempotency_key > ? AND idempotency_key < ?) ORDER BY number",
                (key, f"{key}\n", f"{key}\v"),
            ).fetchall()
        return [job_from_row(row) for row in rows]

    def newest_submission(self, input_paths: Sequence[str], inside: str | None = None) -> float | None:
        """When a job of one of these inputs, or of what lies inside one, was last submitted, if ever."""
        marks = ", ".join("?" * len(input_paths))
        with self._lock:
            row = self._db.execute(
                f"SELECT max(created_s) FROM jobs WHERE input_path IN ({marks})"
                " OR substr(input_path, 1, length(?)) = ?",
                [*input_paths, *([f"{inside}/"] * 2 if inside else [None, None])],
            ).fetchone()
        return None if row[0] is None else float(row[0])

    def page_of_jobs(self, state: str | None, text: str, limit: int, before: int | None) -> list[Job]:
        """Up to `limit` jobs, newest first, older than number `before`."""
        like = "%" + text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        asked: dict[str, list[Any]] = {  # only what was asked for: with "? IS NULL OR" no index would be used
            "state = ?": [] if state is None else [state],
            "number < ?": [] if before is None else [before],
            "(title LIKE ? ESCAPE '\\' OR volume LIKE ? ESCAPE '\\')": [like, like] if text else [],
        }
        where = " AND ".join(condition for condition, values in asked.items() if values) or "TRUE"
        values = [value for one in asked.values() for value in one]
        with self._lock:
            rows = self._db.execute(
                f"SELECT * FROM jobs WHERE {where} ORDER BY number DESC LIMIT ?", [*values, limit]
            ).fetchall()
        return [job_from_row(row) for row in rows]

    def in_state(self, state: str) -> list[Job]:
        """All jobs in a state, oldest first."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM jobs WHERE state = ? ORDER BY number", (state,)).fetchall()
        return [job_from_row(row) for row in rows]

    def changed_since(self, seq: int, batch: int = 500) -> Iterator[Job]:
        """Jobs with a later seq, oldest change first. The table is free between batches; what
        changes meanwhile may come twice."""
        while True:
            with self._lock:
                rows = self._db.execute(
                    "SELECT * FROM jobs WHERE seq > ? ORDER BY seq LIMIT ?", (seq, batch)
                ).fetchall()
            yield from map(job_from_row, rows)
            if len(rows) < batch:
                return
            seq = rows[-1]["seq"]

    def ids(self) -> set[str]:
        """Ids of all jobs."""
        with self._lock:
            return {row[0] for row in self._db.execute("SELECT id FROM jobs")}

    def ids_over(self) -> set[str]:
        """Ids of the jobs that ended."""
        with self._lock:
            rows = self._db.execute("SELECT id FROM jobs WHERE state IN (?, ?)", (SUCCESS, FAILED))
            return {row[0] for row in rows}

    def ids_to_clear(self, what: str, before_s: float) -> list[str]:
        """Jobs that ended before this moment and still have `what` (a field of retention.Keep)."""
        column, _, had = REMOVED.get(what, ("", "", ""))
        still = f"AND {column} IS NULL AND {had}" if column else ""
        with self._lock:
            rows = self._db.execute(
                f"SELECT id FROM jobs WHERE state IN (?, ?) AND finished_s < ? {still} ORDER BY number",
                (SUCCESS, FAILED, before_s),
            )
            return [row[0] for row in rows]

    def forecasts(self, limit: int) -> list[tuple[Params, Plan, dict[str, Any]]]:
        """Params, plan and forecast of volumes that succeeded, the newest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT params, plan, forecast FROM jobs WHERE state = ? AND plan IS NOT NULL"
                " AND forecast IS NOT NULL ORDER BY number DESC LIMIT ?",
                (SUCCESS, limit),
            ).fetchall()
        values = [[json.loads(text) for text in row] for row in rows]
        return [(Params(**params), Plan.of(plan), forecast) for params, plan, forecast in values]

    def counts(self) -> dict[str, int]:
        """Number of jobs by state."""
        with self._lock:
            rows = self._db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall()
        return dict.fromkeys(STATES, 0) | {row[0]: row[1] for row in rows}

    def pages(self, job_id: str) -> list[Page]:
        """A job's pages in order; none before it was staged."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM pages WHERE job_id = ? ORDER BY n", (job_id,)).fetchall()
        return [page_from_row(row) for row in rows]

    def page(self, job_id: str, n: int) -> Page | None:
        """One page, if there is one of this number."""
        with self._lock:
            row = self._db.execute("SELECT * FROM pages WHERE job_id = ? AND n = ?", (job_id, n)).fetchone()
        return page_from_row(row) if row else None

    # -- writing
    def insert(self, values: dict[str, Any]) -> None:
        """A new PENDING job."""
        with self.transaction() as db:
            columns = {key: _to_column(value) for key, value in values.items()}
            columns |= {"state": PENDING, "seq": self._next_seq(), "created_s": self.clock()}
            db.execute(f"INSERT INTO jobs {_values_of(columns)}", [*columns.values()])
            self._changed.add(values["id"])

    def restore(self, job: Job, pages: Iterable[Page]) -> bool:
        """Put a lost job back as it was; False if it is there. A number of 0 means the next one.

        Its seq is the time: later than any that a client saw before the loss.
        """
        columns = {key: _to_column(getattr(job, key)) for key in JOB_COLUMNS if key != "number" or job.number}
        with self.transaction() as db:
            columns["seq"] = self._next_seq(int(self.clock()))
            values = [*columns.values()]
            done = db.execute(f"INSERT OR IGNORE INTO jobs {_values_of(columns)}", values).rowcount > 0
            if done:
                self.replace_pages(job.id, pages)
                self._changed.add(job.id)
        return done

    def change(self, job: Job, **values: Any) -> bool:
        """Set columns of a job that still is as it was read (state and attempt); was it? `state` is set by
        advance() alone."""
        columns = {key: _to_column(value) for key, value in values.items()}
        with self.transaction() as db:
            columns["seq"] = self._next_seq()
            done = db.execute(
                f"UPDATE jobs SET {', '.join(f'{key} = ?' for key in columns)}"
                " WHERE id = ? AND state = ? AND attempt = ?",
                [*columns.values(), job.id, job.state, job.attempt],
            ).rowcount
            if done:
                self._changed.add(job.id)
        return bool(done)

    @property
    def is_paused(self) -> bool:
        """Whether the queue stands still; see pause()."""
        with self._lock:
            return bool(self._db.execute("SELECT paused FROM counter").fetchone()[0])

    def pause(self, paused: bool) -> None:
        """Let the queue stand still, or go on; kept over restarts. From then on nothing is claimed;
        what running jobs do is the dispatcher's."""
        with self.transaction() as db:
            db.execute("UPDATE counter SET paused = ?", (paused,))

    def highest_waiting(self) -> int | None:
        """The highest priority among PENDING jobs, if there are any."""
        with self._lock:
            row = self._db.execute("SELECT max(priority) FROM jobs WHERE state = ?", (PENDING,)).fetchone()
        return None if row[0] is None else int(row[0])

    def take_next(self, now_s: float) -> Job | None:
        """The PENDING job of the highest priority, among equals the oldest, now RUNNING in a new
        attempt; none while the queue is paused. One statement: claimed once."""
        with self.transaction() as db:
            if self.is_paused:
                return None
            # Without one, nothing is written: a turn on a full disk must get past this.
            if not db.execute("SELECT 1 FROM jobs WHERE state = ? LIMIT 1", (PENDING,)).fetchone():
                return None
            row = db.execute(
                "UPDATE jobs SET state = ?, attempt = attempt + 1, phase = 'staging',"
                " started_s = coalesce(started_s, max(?, created_s)), eta_s = NULL, seq = ?"
                " WHERE number = (SELECT number FROM jobs WHERE state = ?"
                " ORDER BY priority DESC, number LIMIT 1) RETURNING *",
                (RUNNING, now_s, self._next_seq(), PENDING),
            ).fetchone()
            if row is None:
                return None
            self._changed.add(row["id"])
            return job_from_row(row)

    def replace_pages(self, job_id: str, pages: Iterable[Page]) -> None:
        """A job's whole list of pages."""
        with self.transaction() as db:
            db.execute("DELETE FROM pages WHERE job_id = ?", (job_id,))
            db.executemany(
                f"INSERT INTO pages {_values_of(PAGE_COLUMNS)}",
                ([getattr(page, column) for column in PAGE_COLUMNS] for page in pages),
            )
            db.execute(f"UPDATE pages SET seal = {SEALS['pages']} WHERE job_id = ?", (job_id,))

    def change_page(self, job_id: str, n: int, **values: Any) -> None:
        """Set columns of one page."""
        with self.transaction() as db:
            db.execute(
                f"UPDATE pages SET {', '.join(f'{key} = ?' for key in values)} WHERE job_id = ? AND n = ?",
                [*values.values(), job_id, n],
            )
            # A second statement: the first one's right-hand sides are the old values.
            db.execute(f"UPDATE pages SET seal = {SEALS['pages']} WHERE job_id = ? AND n = ?", (job_id, n))

    def reset_failed_pages(self, job_id: str) -> int:
        """Make pages that failed pending again, with a clean record; returns how many."""
        with self.transaction() as db:
            db.execute("UPDATE pages SET tries = 0, alone = 0, deaths = 0 WHERE job_id = ?", (job_id,))
            reset = db.execute(
                "UPDATE pages SET status = 'pending', output = NULL, sha256 = NULL, bytes = NULL,"
                " width = NULL, height = NULL, mode = NULL, error = NULL, deviation = NULL,"
                " color_spread = NULL, model = NULL"
                " WHERE job_id = ? AND status = 'carried' AND error IS NOT NULL",
                (job_id,),
            ).rowcount
            db.execute(f"UPDATE pages SET seal = {SEALS['pages']} WHERE job_id = ?", (job_id,))
            return reset

    def forget_staged(self, job_id: str) -> None:
        """Take no page from a working copy that may be of another input any more."""
        with self.transaction() as db:
            db.execute("UPDATE pages SET staged = '' WHERE job_id = ?", (job_id,))
            db.execute(f"UPDATE pages SET seal = {SEALS['pages']} WHERE job_id = ?", (job_id,))

    def delete(self, job: Job, as_read: bool = False) -> bool:
        """Remove a job that is not running; False if it runs after all, or if it is no longer
        in the state and attempt in which it was read, where that is asked for."""
        with self.transaction() as db:
            done = db.execute(
                "DELETE FROM jobs WHERE id = ? AND state != ? AND (NOT ? OR (state = ? AND attempt = ?))",
                (job.id, RUNNING, as_read, job.state, job.attempt),
            )
            return bool(done.rowcount)


def _values_of(columns: Iterable[str]) -> str:
    """What follows INSERT INTO <table>."""
    names = list(columns)
    return f"({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"


# ---------------------------------------------------------------- moves
def advance(table: JobTable, job: Job, move: str, now_s: float, **values: Any) -> Job:
    """Apply one move and record it with `values`, in one transaction.

    Raises IllegalMove if MOVES has no such row, StaleAttempt if the job moved on
    since it was read.
    """
    after = MOVES.get((job.state, move))
    if after is None:
        raise IllegalMove(job.id, job.state, move)
    if after in (SUCCESS, FAILED):
        # A clock that was set back meanwhile must not end a job before its start.
        ended_s = max(now_s, job.started_s or job.created_s)
        values |= {"phase": "done", "finished_s": ended_s, "current_page": None, "eta_s": None}
    with table.transaction():
        # Guarding on the attempt, not just the state, stops a worker that outlived
        # its time from finishing its successor's work.
        if not table.change(job, state=after, **values):
            raise StaleAttempt(job.id, job.attempt)
        moved = table.get(job.id)
    log.info("%s -> %s (%s)", job.state, after, move, extra=logs.of(job.id))
    return moved


def claim(table: JobTable, now_s: float) -> Job | None:
    """Take the waiting job whose turn it is; no one else gets it."""
    job = table.take_next(now_s)
    if job:
        log.info("%s -> %s (claim, attempt %d)", PENDING, RUNNING, job.attempt, extra=logs.of(job.id))
    return job


def lose_worker(table: JobTable, job: Job, now_s: float) -> Job:
    """The attempt ended without a result; the next one goes on from the finished pages."""
    nothing = {"current_page": None, "eta_s": None, "message": None}  # of this attempt holds for the next
    return advance(table, job, "lose_worker", now_s, phase="queued", **nothing)


def cancel(table: JobTable, job_id: str, now_s: float) -> Job:
    """Cancel a job; one that is over already is answered unchanged. Raises UnknownJob."""
    while True:
        job = table.get(job_id)
        if job.is_over:
            return job
        with contextlib.suppress(StaleAttempt):  # it moved between the two lines: look again
            return advance(table, job, "cancel", now_s, cancelled=True, message=CANCEL_MESSAGE)


def prioritize(table: JobTable, job_id: str, priority: int) -> Job:
    """Give a job, in whatever state, another priority: one that runs may come to wait again. Raises
    UnknownJob."""
    with table.transaction():
        job = table.get(job_id)
        if job.priority != priority:
            table.change(job, priority=priority)
        return table.get(job_id)


def _still_running(table: JobTable, job: Job) -> Job:
    """The job as it is now, in the attempt that the caller works on. Raises StaleAttempt."""
    try:
        fresh = table.get(job.id)
    except UnknownJob:  # cancelled, and deleted since
        raise StaleAttempt(job.id, job.attempt) from None
    if (fresh.state, fresh.attempt) != (RUNNING, job.attempt):
        raise StaleAttempt(job.id, job.attempt)
    return fresh


def finish_page(table: JobTable, job: Job, event: PageDone, page: Page, **values: Any) -> None:
    """Record a page that is on disk, and the job's progress with it. Raises StaleAttempt."""
    folder = page.stem.rpartition("/")[0]
    with table.transaction():
        fresh = _still_running(table, job)
        table.change_page(
            job.id,
            event.n,
            status="carried" if event.carried else "upscaled",
            output=f"{folder}/{event.output}" if folder else event.output,
            sha256=event.sha256,
            bytes=event.size_bytes,
            width=event.width,
            height=event.height,
            mode=event.mode,
            error=event.error,
            deviation=event.deviation,
            color_spread=event.color_spread,
            model=event.model,
            seconds=event.seconds,
        )
        table.change(
            fresh,
            processed=fresh.processed + 1,
            failed_pages=fresh.failed_pages + bool(event.error),
            **values,
        )


def reopen_page(table: JobTable, job: Job, n: int) -> None:
    """A finished page is no longer on disk as recorded: it is pending again. Raises StaleAttempt."""
    with table.transaction():
        fresh = _still_running(table, job)
        page = table.page(job.id, n)
        if page is None or page.status == "pending":
            return
        table.change_page(job.id, n, status="pending", output=None, sha256=None)
        table.change(
            fresh,
            phase="inferring",
            processed=fresh.processed - 1,
            failed_pages=fresh.failed_pages - page.failed,
            current_page=page.name,
        )


def record_stage(table: JobTable, job: Job, event: Staged, found: list[StagedPage]) -> Job:
    """Store the pages of an attempt, keeping those finished before. Raises StaleAttempt."""
    before = {page.name: page for page in table.pages(job.id)}
    names = [item.page.name for item in found]
    pages = []
    for n, (item, stem) in enumerate(zip(found, storage.output_stems(names), strict=True), 1):
        source, old = item.page, before.get(item.page.name)
        if old and item.output_ok and old.stem == stem and old.status != "pending":
            pages.append(replace(old, n=n, staged=source.staged))
            continue
        page = Page(
            job.id, n, source.name, source.staged, source.sha256, source.size_bytes, source.error, stem
        )
        if old and old.source_sha256 == source.sha256:
            page = replace(page, tries=old.tries, alone=old.alone, deaths=old.deaths)
        pages.append(page)
    with table.transaction():
        changed = table.change(
            job,
            phase="inferring",
            plan=event.plan,
            total=len(pages),
            processed=sum(page.status != "pending" for page in pages),
            failed_pages=sum(page.failed for page in pages),
            left_out=job.left_out if event.left_out is None else event.left_out,
            reconciliation=job.reconciliation if event.left_out is None else event.reconciliation,
            current_page=next((page.name for page in pages if page.status == "pending"), None),
        )
        if not changed:
            raise StaleAttempt(job.id, job.attempt)
        table.replace_pages(job.id, pages)
        return table.get(job.id)


def recover(table: JobTable, layout: Layout, now_s: float) -> None:
    """After any kind of end: jobs that ran go on, leftovers of jobs that are over go."""
    over = table.ids_over()
    for folder in layout.staging.iterdir():  # first: on a full disk the table has no room without
        if folder.name in over:
            storage.remove_tree(folder)
    with contextlib.suppress(sqlite3.OperationalError):  # full all the same: the dispatcher tries again
        for job in table.in_state(RUNNING):
            lose_worker(table, job, now_s)


