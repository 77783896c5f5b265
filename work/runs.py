"""One attempt of a job in progress, as the dispatcher knows it: what is to be done, what is under way.

Map: Run
Rule: only in memory. What must outlive the process is in the job table.
Runs in: the dispatcher thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from engine import budgets
from jobs import Job, Page, parsed
from messages import CONTAINER_FORMATS, ComputePage, KnownPage, Limits, Plan, SourcePage, Stage, StagedPage
from work.workers import TaskKey


@dataclass(slots=True)
class Run:
    """One attempt in progress, in the dispatcher's memory only."""

    job: Job
    staging: Path
    outputs: Path
    found: list[StagedPage] = field(default_factory=list)
    pages: dict[int, Page] = field(default_factory=dict)
    todo: deque[int] = field(default_factory=deque)
    alone: deque[int] = field(default_factory=deque)  # to be computed without company
    carry: deque[tuple[int, str]] = field(default_factory=deque)  # page, why it is given up
    blamed: dict[int, str] = field(default_factory=dict)  # page given up -> step that failed
    in_flight: set[int] = field(default_factory=set)
    failed_on: dict[int, int] = field(default_factory=dict)  # page -> the worker on which it did
    settled: Plan | None = None  # see Stage
    shares: dict[int, int] = field(default_factory=dict)  # page -> bytes, see share_of()
    file_task: str | None = "stage"  # the stage or pack task that is due
    pack_tries: int = 0
    claimed_s: float = field(default_factory=time.monotonic)
    started_s: float = 0.0  # monotonic, when the first page was dealt
    finished: int = 0  # pages that this attempt computed, or took over
    left: int = 0  # pages that are not finished
    cached: set[int] = field(default_factory=set)  # pages that came from the cache
    held: bool = False  # by a pause of the queue, or by the machine's sleep

    def key(self, n: int) -> TaskKey:
        """The key of this attempt's page n, or of its stage or pack (0)."""
        return (self.job.id, self.job.attempt, n)

    def share_of(self, n: int) -> int | None:
        """How many bytes page n may have, so that the artifact is no larger than was asked."""
        most = self.job.params.max_artifact_bytes
        if most is None:
            return None
        if not self.shares:
            numbers = sorted(self.pages)
            held = [self.pages[number] for number in numbers]
            is_book = self.job.params.container in CONTAINER_FORMATS
            sources = [(page.source_bytes, len((page.name + page.stem).encode())) for page in held]
            self.shares = dict(zip(numbers, budgets.shares(most, sources, is_book), strict=True))
        return self.shares[n]

    def give_up(self, n: int, step: str, why: str) -> None:
        """Page n will be taken over as it is."""
        self.carry.append((n, why))
        self.blamed[n] = step

    def eta_s(self, now_s: float) -> float | None:
        """Seconds until the last page, from this attempt's own rate."""
        if not self.finished or not self.left:
            return None
        return round((now_s - self.started_s) / self.finished * self.left, 1)

    # -- its tasks
    def stage_task(
        self, source: Path, known: Iterable[Page], limits: Limits, reserve_bytes: int | None
    ) -> Stage:
        """What has the input looked at, and its pages copied. known: those of attempts before."""
        job = self.job
        return Stage(
            job.id,
            job.attempt,
            source,
            self.staging,
            self.outputs,
            job.params,
            job.plan,
            tuple(_known(page) for page in known),
            parsed(job.manifest),
            limits,
            self.settled,
            reserve_bytes,
        )

    def page_task(self, n: int, carry: str | None, limits: Limits) -> ComputePage:
        """What has page n computed, or taken over as it is for the reason in carry."""
        job, page = self.job, self.pages[n]
        assert job.plan is not None
        return ComputePage(
            job.id,
            job.attempt,
            n,
            self.staging / page.staged,
            self.outputs / page.stem,
            job.params,
            job.plan,
            limits,
            carry,
            self.share_of(n),
        )


def _known(page: Page) -> KnownPage:
    source = SourcePage(page.name, page.staged, page.source_sha256, page.source_bytes, page.source_error)
    return KnownPage(source, page.output if page.status != "pending" else None, page.sha256)
