"""What is removed by age: pages, artifacts and rows of jobs that are over, if settings say so.

Map: Keep - since_boot_s (its clock) - Retention (look, then remove job by job)
Rule: nothing is removed without a setting, and nothing on one look at the clock.
Runs in: the dispatcher thread, which alone claims jobs: none starts while its files go.

    finished_s + keep < now, seen twice --> files go --> the row says so (or goes)
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields

import jobs
import logs
import storage
from jobs import JobTable
from storage import Layout
from work import submissions

log = logging.getLogger("retention")

LOOK_S = 600.0  # between two looks; a job must be due at both
CLOCK_SLACK_S = 3600.0  # that the clock may gain on the time since the start
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Keep:
    """Days after its end for which a job's things stay; None: for ever."""

    outputs_days: int | None = None
    artifacts_days: int | None = None
    jobs_days: int | None = None  # the row, and with it all the rest


def since_boot_s() -> float:
    """Seconds, those counted that the machine sleeps; monotonic() leaves them out but on Windows."""
    # macOS' own of that name goes on in sleep; Python's monotonic() is another one there.
    clock = getattr(time, "CLOCK_MONOTONIC", None) if sys.platform == "darwin" else None
    clock = getattr(time, "CLOCK_BOOTTIME", clock)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Retention:
    """Removes what is older than `keep`, one job's things a turn, so that nobody waits for it."""

    def __init__(
        self, table: JobTable, layout: Layout, keep: Keep, monotonic: Callable[[], float] = since_boot_s
    ) -> None:
        self.table = table
        self.layout = layout
        self.keep = keep
        self.monotonic = monotonic
        self.todo: deque[tuple[str, str]] = deque()  # what (a field of Keep), job id
        self._seen: set[tuple[str, str]] = set()  # due at the last look
        self._started = (table.clock(), monotonic())
        self._look_at_s = monotonic()

    def turn(self) -> None:
        """Look for what is due, if it is time to; remove one job's things."""
        if self.keep == Keep():
            return
        if self.monotonic() >= self._look_at_s:
            self._look_at_s = self.monotonic() + LOOK_S
            self._look()
        if self.todo:
            self._remove(*self.todo.popleft())

    def now_s(self) -> float:
        """The clock, but for a leap into the future while the service runs: that one may be wrong,
        and is not believed before the next start."""
        wall_s, start_s = self._started
        return min(self.table.clock(), wall_s + self.monotonic() - start_s + CLOCK_SLACK_S)

    def _look(self) -> None:
        now_s, due = self.now_s(), []
        if self.table.clock() > now_s:
            log.warning("the clock was set forward; nothing grows old by that until the next start")
        for one in fields(Keep):
            days = getattr(self.keep, one.name)
            if days is not None:
                found = self.table.ids_to_clear(one.name, now_s - days * DAY_S)
                due += [(one.name, job_id) for job_id in found]
        # A clock that is wrong at the start, until it is set by the network, removes nothing.
        self.todo = deque(item for item in due if item in self._seen)
        self._seen = set(due)

    def _remove(self, what: str, job_id: str) -> None:
        """Files first: what a crash leaves is found again at a later look."""
        try:
            job = self.table.get(job_id)
            days = getattr(self.keep, what)
            if job.finished_s is None or self.now_s() - job.finished_s < days * DAY_S:
                return  # resumed meanwhile
            outputs, artifact = what != "artifacts_days", what != "outputs_days"
            submissions.remove_files(self.layout, job, outputs, artifact)
            if submissions.note_removed(self.table, job, what, days):
                log.info("REICHAN_KEEP_%s (%d): removed", what.upper(), days, extra=logs.of(job_id))
        except jobs.UnknownJob:
            pass  # deleted meanwhile
        except (OSError, storage.StorageError) as error:  # in use on Windows; a link where a folder was
            name = what.removesuffix("_days")
            log.warning("%s can't be removed now: %s", name, error, extra=logs.of(job_id))
