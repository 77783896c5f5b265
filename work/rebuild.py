"""A job table that was damaged or lost: what can be read of it still, and what artifacts give back.

Map: open_table (set aside, salvage) - reading a damaged file - Rebuild (artifacts that no job claims) -
     a job from a report
Rule: nothing is deleted, and a job comes back only as it was: by rows whose checksums are
right, or by an artifact of which every hash is.
Runs in: main, before all else (open_table); the rebuild thread, beside a service that is ready.

    jobs.sqlite3 --damaged?--> .damaged --rows as written--> new jobs.sqlite3, then .damaged-<time>
    artifacts/*.zip that no row names --every hash--> a SUCCESS job again

The artifacts are looked through at every start, not only after damage: so a rebuild that was
killed goes on, and a storage root that lost its table altogether is found again too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jobs
import storage
from files import artifacts, database
from jobs import SUCCESS, Job, JobTable, Page
from messages import Params, Plan, camel
from storage import Layout
from work import submissions

log = logging.getLogger("rebuild")

NOTE = "rebuilt from its artifact after the job table had lost it; where its input lies is not known"


# ---------------------------------------------------------------- the damaged table
def open_table(path: Path) -> JobTable:
    """The job table at `path`. A damaged one is set aside, and a new one takes from it every
    job that is still as it was written. Raises database.DatabaseUnusable."""
    waiting = path.with_name(path.name + ".damaged")  # until all is taken from it
    if waiting.exists() and not path.exists():
        _move(path, waiting)  # killed between the two renames
    try:
        table = JobTable(path)
    except database.DatabaseDamaged as error:
        log.error("the job table is damaged: %s", error)
        if waiting.exists():
            _keep(waiting, 0)
        _move(path, waiting)
        table = JobTable(path)
    if waiting.exists():
        table.salvaged = _salvage(waiting, table)
        table.set_aside = _keep(waiting, int(table.clock()))
        log.error("it is kept as %s; %d jobs were read from it", table.set_aside.name, table.salvaged)
    return table


def _move(source: Path, target: Path) -> None:
    """Rename a database with its log, which may hold the latest commits. The index goes: it is made anew."""
    for suffix in ("", "-wal"):
        if source.with_name(source.name + suffix).exists():
            source.with_name(source.name + suffix).replace(target.with_name(target.name + suffix))
    source.with_name(source.name + "-shm").unlink(missing_ok=True)


def _keep(waiting: Path, now_s: int) -> Path:
    """Give it a name that is its own for ever."""
    while (kept := waiting.with_name(f"{waiting.name}-{now_s}")).exists():
        now_s += 1
    _move(waiting, kept)
    return kept


def _salvage(damaged: Path, table: JobTable) -> int:
    """Take over what can be read, in one transaction: killed, it begins again."""
    salvaged = 0
    try:
        with table.transaction():
            for job, pages in read_damaged(damaged):
                salvaged += table.restore(job, pages)
    except sqlite3.OperationalError as error:
        raise database.DatabaseUnusable(f"the new job table can't be written: {error}") from error
    return salvaged


# ---------------------------------------------------------------- what can be read of it
def read_damaged(path: Path) -> list[tuple[Job, list[Page]]]:
    """What can still be read of a damaged database: jobs whose row and, if there were any, pages
    are all as written. Of one that is not over the row alone counts: it comes without pages
    then, and starts over. Works on a copy: SQLite writes to what it opens."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        for suffix in ("", "-wal"):
            if path.with_name(path.name + suffix).exists():
                shutil.copyfile(path.with_name(path.name + suffix), Path(folder, "copy" + suffix))
        found = _read_jobs(copy)
        if not found:
            _renew_first_page(copy)
            found = _read_jobs(copy)
        return found


def _renew_first_page(path: Path) -> None:
    """Put today's first page, which holds the schema, in place of a damaged one. Where the tables
    lay elsewhere than they do today, no row's checksum will be right."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(database.SCHEMA)
        page_bytes = db.execute("PRAGMA page_size").fetchone()[0]
        first = bytearray(db.serialize()[:page_bytes])
    first[28:32] = (path.stat().st_size // page_bytes).to_bytes(4, "big")  # the file's size in pages
    with open(path, "r+b") as file:
        file.write(first)


def _read_jobs(path: Path) -> list[tuple[Job, list[Page]]]:
    numbers: set[int] = set()
    found = []
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        for order in ("ASC", "DESC"):  # from both sides of a page that can't be read
            query = f"SELECT number FROM jobs ORDER BY number {order}"
            with contextlib.suppress(*database.UNREADABLE):
                numbers.update(row[0] for row in db.execute(query))
        for number in sorted(numbers):
            with contextlib.suppress(*database.UNREADABLE):
                found.append(_read_sealed(db, number))
    return [item for item in found if item]


def _read_sealed(db: sqlite3.Connection, number: int) -> tuple[Job, list[Page]] | None:
    row = db.execute("SELECT * FROM jobs WHERE number = ?", (number,)).fetchone()
    if row is None or not _is_sealed(row, "jobs"):
        return None
    job, pages = jobs.job_from_row(row), []
    with contextlib.suppress(*database.UNREADABLE):
        rows = db.execute("SELECT * FROM pages WHERE job_id = ? ORDER BY n", (job.id,)).fetchall()
        pages = [jobs.page_from_row(row) for row in rows if _is_sealed(row, "pages")]
    if [page.n for page in pages] == [*range(1, job.total + 1)]:
        return job, pages
    if job.state == SUCCESS:
        return None  # its artifact tells more
    note = "the job table was damaged: this job's pages are computed again"
    message = f"{job.message}. {note}" if job.message else note
    return replace(job, total=0, processed=0, failed_pages=0, message=message), []


def _is_sealed(row: sqlite3.Row, table: str) -> bool:
    # Not in SQL: "WHERE job_id = ?" would have it seal what was asked for, not what is there.
    values = (row[column] for column in database.SEALED[table])
    return bool(row["seal"] == database.checksum(database.SCHEMA_VERSION, *values))


# ---------------------------------------------------------------- artifacts
class Rebuild:
    """Looks for artifacts that no job claims, oldest first, in a thread of its own.

    Hashing them may take minutes; the service is ready meanwhile. A job appears once its
    artifact is proved, and not before: its hash is a promise.
    """

    def __init__(self, table: JobTable, layout: Layout) -> None:
        self.table = table
        self.layout = layout
        self.found = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rebuild", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether there may be more to come."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Give up after the present artifact; the next start goes on."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def _run(self) -> None:
        try:
            found = self.layout.artifacts.glob("*")
            held = [path for path in found if path.suffix in (".zip", ".cbz", ".epub")]
            unclaimed = [path for path in held if not self._is_claimed(path)]
            for path in sorted(unclaimed, key=os.path.getmtime):
                if self._stopping.is_set():
                    return
                self._adopt(path)
            if unclaimed:
                log.warning("%d of %d unclaimed artifacts are jobs again", self.found, len(unclaimed))
            if unclaimed or self.table.set_aside:
                self._name_strays()
        except (sqlite3.Error, OSError) as error:  # closed, or the disk is full: the next start goes on
            log.warning("the rebuild stopped: %s", error)

    def _is_claimed(self, artifact: Path) -> bool:
        job_id = artifact.stem[-36:]
        return not submissions.JOB_ID.fullmatch(job_id) or self._is_known(job_id)

    def _is_known(self, job_id: str) -> bool:
        try:
            self.table.get(job_id)
        except jobs.UnknownJob:
            return False
        return True

    def _adopt(self, artifact: Path) -> None:
        try:
            report, sha256, size_bytes = artifacts.prove_artifact(artifact)
            container = report["params"].get("container", "zip")
            place = self.layout.artifact(report["title"], report["volume"], report["jobId"], container)
            if not (place.exists() and place.samefile(artifact)):
                raise storage.ArtifactDamaged(f"{artifact.name} belongs elsewhere, by its report")
            job, pages = job_of(report, sha256, size_bytes, artifact.stat().st_mtime)
        except storage.ArtifactDamaged as error:
            log.error("not rebuilt, and left as it is: %s", error.detail)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # a zip of another kind
            log.error("not rebuilt, and left as it is: %s: its report lacks %s", artifact.name, error)
        else:
            self.found += self.table.restore(job, pages)

    def _name_strays(self) -> None:
        """Pages of jobs that are lost stay; nobody can tell any more what they were made from."""
        strays = [
            self.layout.relative(folder)
            for folder in sorted(self.layout.outputs.glob("*/*/*"))
            if submissions.JOB_ID.fullmatch(folder.name) and not self._is_known(folder.name)
        ]
        if strays:
            log.error("lost jobs left pages, which stay; submit these again: %s", ", ".join(strays))


# ---------------------------------------------------------------- a job from its report
def job_of(report: dict[str, Any], sha256: str, size_bytes: int, when_s: float) -> tuple[Job, list[Page]]:
    """The job that submissions.to_report() made this report of, as far as the report tells.

    when_s: of the artifact, in place of all times. Raises KeyError, TypeError, ValueError where it is none.
    """
    job_id, items = str(report["jobId"]), report["items"]
    if not submissions.JOB_ID.fullmatch(job_id):
        raise ValueError("a job id")
    pages = list(_pages_of(job_id, items))
    compared = report["reconciliation"]  # the table has it as text
    job = Job(
        number=0, id=job_id, state=SUCCESS, attempt=1, cancelled=False, title=report["title"],
        volume=report["volume"], input_type="zip", input_path="", params=_params_of(report),
        manifest=None, plan=_plan_of(report), phase="done", processed=len(pages), total=len(pages),
        failed_pages=sum(page.failed for page in pages), left_out=report["leftOut"],
        reconciliation=compared and json.dumps(compared), retries=0, message=None, last_error=None,
        error_code=None, current_page=None, eta_s=None, artifact_hash=sha256, artifact_bytes=size_bytes,
        seq=0, created_s=when_s, started_s=None, finished_s=when_s, idempotency_key=None,
        request_hash=None, outputs_removed_s=None, artifact_removed_s=None,
    )  # fmt: skip
    closing = submissions.closing_message(job, pages, size_bytes)
    return replace(job, message=f"{closing}. {NOTE}" if closing else NOTE), pages


def _params_of(report: dict[str, Any]) -> Params:
    """Settings that are younger than the report have their defaults."""
    given, names = report["params"], [item.name for item in fields(Params)]
    keys = {name: camel(name) for name in names}
    return Params(**{name: given[key] for name, key in keys.items() if key in given})


def _plan_of(report: dict[str, Any]) -> Plan:
    plan = {
        "model": report["model"],
        "weights_sha256": report["weightsSha256"],
        "weights_source": report["weightsSource"],
        "device": report["device"],
        "precision": report["precision"],
        "engine": report["engine"],
        "tile": report["tile"],
        "halo_px": report["haloPx"],
        "batch": report["batch"],
    }
    choices = [
        Plan(**{name: one.get(camel(name), value) for name, value in plan.items()})
        for one in report["choices"]
    ]
    return Plan(**plan, choices=tuple(choices))


def _pages_of(job_id: str, items: list[dict[str, Any]]) -> Iterable[Page]:
    stems = storage.output_stems([item["source"]["filename"] for item in items])
    for n, (item, stem) in enumerate(zip(items, stems, strict=True), 1):
        source = item["source"]
        halves = [mark for mark, words in storage.HALVES.items() if words in (item["deviation"] or "")]
        # None is there; the name says what of the scan is the page.
        staged = f"{n:05d}.{halves[0]}.lost" if halves else ""
        yield Page(
            job_id=job_id, n=n, name=source["filename"], staged=staged, source_sha256=source["sha256"],
            source_bytes=source["bytes"], source_error=None, stem=stem, status=item["status"],
            output=item["filename"], sha256=item["sha256"], bytes=item["bytes"], width=item["width"],
            height=item["height"], mode=item["mode"], error=item["error"], deviation=item["deviation"],
            color_spread=item["colorSpread"], model=item["model"],
        )  # fmt: skip
