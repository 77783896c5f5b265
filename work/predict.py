"""How long a volume will take and how large it will become, from what this machine measured.

Map: Rate - of volumes, of a preview's pages - what is kept with a job - Rates
Rule: a prediction rests on like work only: the same weights, device, precision and settings.
Runs in: the dispatcher thread (jobs) and http-* threads (previews). Standard library only.

A volume that ran without a break has measured all there is: seconds from its start to its end, pixels
in, bytes out. The time beside its pages is about the same for a short volume as for a long one. The
time until it is staged is measured for each job, since a worker may have to start first, which can take
longer than a volume; so a job is foretold only once it is staged. Until a like volume has run, pages
of previews stand in for it; those are kept in memory only, volumes in the job table.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import threading
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import logs
from messages import OF_VOLUMES, PageDone, Params, Plan, Workload

if TYPE_CHECKING:  # jobs.py itself tells clients what is kept here
    from jobs import Job, JobTable, Page

log = logging.getLogger("predict")

VOLUMES, PREVIEW = "volumes", "preview"  # what a prediction rests on
LOOKED_AT = 200  # of the newest volumes, for like ones
ENOUGH_PAGES = 500  # of like volumes; older ones are left aside
# By which power of its bytes before a page's bytes grow: drawn pages had 0.4 as JPEG, 1 as WebP.
FOLLOWS = 0.75
KINDS_KEPT, PAGES_KEPT = 64, 8  # of previews: kinds of work, pages of each


@dataclass(frozen=True, slots=True)
class Rate:
    """What one kind of work costs on this machine."""

    second_per_pixel: float  # of input
    end_s: float  # what a volume takes beside its pages once it is staged, however many it has
    byte_per_pixel: float  # of output
    density: float | None  # of previewed pages: bytes as they came to pixels of output
    pages: int  # that were measured
    basis: str  # VOLUMES or PREVIEW

    def seconds(self, workload: Workload, staged_s: float = 0.0) -> float:
        """From the volume's start to its end. staged_s: until it was staged; where a worker is there
        that is next to nothing."""
        return staged_s + self.second_per_pixel * workload.input_pixels + self.end_s

    def size_bytes(self, workload: Workload) -> int:
        """The artifact's."""
        made = self.byte_per_pixel * workload.output_pixels
        if self.density and workload.source_bytes and workload.output_pixels:
            # One page may be emptier than the others; the full ones are so before and after.
            made *= (workload.source_bytes / workload.output_pixels / self.density) ** FOLLOWS
        return round(made + workload.carried_bytes + workload.other_bytes)


@dataclass(frozen=True, slots=True)
class Measured:
    """A volume that ran from its start to its end without a break."""

    workload: Workload
    seconds: float
    page_seconds: float  # its pages' own, together
    size_bytes: int
    staged_s: float = 0.0  # the share of the seconds before its first page was begun

    @property
    def busy_s(self) -> float:
        """The share of the seconds that more pages would make longer. Pages that were computed side
        by side took more seconds together than the volume did."""
        return min(self.seconds - self.staged_s, self.page_seconds)


@dataclass(frozen=True, slots=True)
class Sample:
    """One page, or a part of one, that a preview computed."""

    seconds: float  # that it would add to a volume
    input_pixels: int
    output_pixels: int
    size_bytes: int
    source_bytes: int  # 0: only a part of the page was computed


def of_volumes(volumes: Iterable[Measured]) -> Rate | None:
    """The rate that volumes of one kind show, the newest first."""
    seen: list[Measured] = []
    for volume in volumes:
        if volume.workload.input_pixels and volume.workload.output_pixels:
            seen.append(volume)
        if sum(one.workload.pages for one in seen) >= ENOUGH_PAGES:
            break
    if not seen:
        return None
    return Rate(
        sum(one.busy_s for one in seen) / sum(one.workload.input_pixels for one in seen),
        statistics.median(one.seconds - one.staged_s - one.busy_s for one in seen),
        sum(one.size_bytes - one.workload.carried_bytes - one.workload.other_bytes for one in seen)
        / sum(one.workload.output_pixels for one in seen),
        None,
        sum(one.workload.pages for one in seen),
        VOLUMES,
    )


def of_samples(samples: Sequence[Sample]) -> Rate | None:
    """The rate that previewed pages of one kind show."""
    if not samples:
        return None
    whole = [one for one in samples if one.source_bytes]
    like = whole or samples
    output_pixels = sum(one.output_pixels for one in like)
    return Rate(
        # Kernels are chosen at the first page, and whatever else happens only slows one down.
        min(one.seconds / one.input_pixels for one in samples),
        0.0,
        sum(one.size_bytes for one in like) / output_pixels,
        sum(one.source_bytes for one in whole) / output_pixels if whole else None,
        len(samples),
        PREVIEW,
    )


# ---------------------------------------------------------------- single pages
def kind_of(params: Params, plan: Plan) -> tuple[Any, ...]:
    """Of work: equal ones cost the same."""
    # What is left out here the plan has settled, or it costs nothing.
    settled = replace(params, device="auto", tile_size=None, tile_pad=None, batch_size=None)
    wanted = replace(settled, **{name: getattr(Params(), name) for name in OF_VOLUMES})
    return wanted, plan.weights_sha256, plan.device, plan.precision, plan.engine


def sample_of(done: PageDone, plan: Plan, source_bytes: int) -> Sample:
    """What a computed page adds to a volume. Decoding and encoding go on beside the device, on all
    cores; where those are the device they take from it."""
    beside_s = max(0.0, done.seconds - done.device_s) / (os.cpu_count() or 1)
    seconds = done.device_s + beside_s if plan.device == "cpu" else max(done.device_s, beside_s)
    return Sample(seconds, done.input_pixels, done.width * done.height, done.size_bytes, source_bytes)


# ---------------------------------------------------------------- what is kept with a job
def forecast(workload: Workload, rate: Rate | None, staged_s: float = 0.0) -> dict[str, Any]:
    """What is known of a volume before its first page, as JSON values for the job table.

    staged_s: of a job, what it took until now.
    """
    return {
        "workload": asdict(workload),
        "staged": staged_s,
        "seconds": round(rate.seconds(workload, staged_s), 3) if rate else None,
        "bytes": rate.size_bytes(workload) if rate else None,
        "basis": rate.basis if rate else None,
        "basisPages": rate.pages if rate else 0,
        "actualSeconds": None,
        "actualBytes": None,
        "measured": None,
    }


def measure(
    told: dict[str, Any],
    pages: Sequence[Page],
    seconds: float,
    size_bytes: int,
    cached: Collection[int] = (),
) -> Measured:
    """What a volume showed that ended without a break; told: its forecast, cached: the pages that no
    work was done for."""
    made = [page for page in pages if page.status == "upscaled" and page.n not in cached]
    computed = [page for page in made if page.model is not None]  # the others were reduced by no network
    expected = told["workload"]["pages"]
    # A page that turned out to be damaged was counted by its header.
    share = len(computed) / expected if expected else 0.0
    workload = Workload(
        len(computed),
        round(share * told["workload"]["input_pixels"]),
        sum((page.width or 0) * (page.height or 0) for page in made),
        sum(page.source_bytes for page in made),
        sum(page.bytes or 0 for page in pages if page.status == "carried" or page.n in cached),
        told["workload"]["other_bytes"],
        len(cached),
    )
    page_seconds = sum(page.seconds or 0.0 for page in made)
    return Measured(workload, seconds, page_seconds, size_bytes, told["staged"])


def measured_of(told: dict[str, Any]) -> Measured | None:
    """What measure() gave, read back."""
    kept = told.get("measured")
    return Measured(**kept | {"workload": Workload(**kept["workload"])}) if kept else None


def error_percent(predicted: float | None, actual: float | None) -> float | None:
    """How far too high a prediction was; None while one of the two is not known."""
    return round(100 * (predicted / actual - 1), 1) if predicted is not None and actual else None


def to_json(told: dict[str, Any] | None) -> dict[str, Any] | None:
    """A prediction as clients get it, None where there is none. MB of 1,000,000 bytes."""
    if told is None or told["seconds"] is None:
        return None
    seconds, size_bytes = told["actualSeconds"], told["actualBytes"]
    # Pages that others put into the cache meanwhile say nothing of how good it was.
    comparable = None if told.get("fromCache") else seconds
    return {
        "minutes": round(told["seconds"] / 60, 3),
        "megabytes": round(told["bytes"] / 1e6, 3),
        "basis": told["basis"],
        "basisPages": told["basisPages"],
        "actualMinutes": None if seconds is None else round(seconds / 60, 3),
        "actualMegabytes": None if size_bytes is None else round(size_bytes / 1e6, 3),
        "minutesErrorPercent": error_percent(told["seconds"], comparable),
        "megabytesErrorPercent": error_percent(told["bytes"], size_bytes),
    }


# ---------------------------------------------------------------- rates
class Rates:
    """What was measured here, and what follows from it for the next volume."""

    def __init__(self, table: JobTable) -> None:
        self.table = table
        self._lock = threading.Lock()
        self._samples: OrderedDict[tuple[Any, ...], deque[Sample]] = OrderedDict()  # by kind

    def remember(self, params: Params, plan: Plan, sample: Sample) -> None:
        """A preview computed this."""
        if not sample.input_pixels or not sample.output_pixels:
            return
        with self._lock:
            kept = self._samples.setdefault(kind_of(params, plan), deque(maxlen=PAGES_KEPT))
            kept.append(sample)
            self._samples.move_to_end(kind_of(params, plan))
            while len(self._samples) > KINDS_KEPT:
                self._samples.popitem(last=False)

    def rate(self, params: Params, plan: Plan) -> Rate | None:
        """Of this kind of work: from volumes, else from previews, else unknown."""
        kind = kind_of(params, plan)
        like = (
            measured_of(told)
            for its_params, its_plan, told in self.table.forecasts(LOOKED_AT)
            if kind_of(its_params, its_plan) == kind
        )
        with self._lock:
            samples = tuple(self._samples.get(kind, ()))
        return of_volumes(filter(None, like)) or of_samples(samples)

    def begin(self, job: Job, workload: Workload | None) -> Job:
        """Keep a prediction with a job that was staged for the first time."""
        if workload is None or job.plan is None or job.forecast is not None:
            return job
        staged_s = max(0.0, self.table.clock() - job.started_s) if job.started_s is not None else 0.0
        told = forecast(workload, self.rate(job.params, job.plan), round(staged_s, 3))
        if not self.table.change(job, forecast=told):
            return job
        return self.table.get(job.id)

    def end(
        self,
        job: Job,
        pages: Sequence[Page],
        size_bytes: int,
        cached: Collection[int] = (),
        held: bool = False,
    ) -> dict[str, Any]:
        """What became of the prediction: columns for the job's last move. Says so in the log.

        cached: the pages that came from the cache; held: whether the queue was paused meanwhile, or
        the machine asleep.
        """
        if job.forecast is None:
            return {}
        told = json.loads(job.forecast)
        told["actualBytes"] = size_bytes
        told["fromCache"] = len(cached) - told["workload"]["cached"]
        seconds = self.table.clock() - (job.started_s or 0.0)
        is_whole = job.attempt == 1 and job.started_s is not None and not held  # else it lay still in between
        if is_whole and seconds >= told["staged"]:  # else the clock was set back
            measured = measure(told, pages, seconds, size_bytes, cached)
            told |= {"actualSeconds": round(seconds, 3), "measured": asdict(measured)}
        _tell(job, to_json(told))
        return {"forecast": told}


def _tell(job: Job, seen: dict[str, Any] | None) -> None:
    if seen is None:
        return
    took = "with breaks"
    if seen["minutesErrorPercent"] is not None:
        took = f"{seen['actualMinutes']:.2f} min ({seen['minutesErrorPercent']:+.1f}%)"
    elif seen["actualMinutes"] is not None:
        took = f"{seen['actualMinutes']:.2f} min with pages of other jobs"
    log.info(
        "predicted %.2f min and %.2f MB from %d pages; it was %s and %.2f MB (%+.1f%%)",
        seen["minutes"],
        seen["megabytes"],
        seen["basisPages"],
        took,
        seen["actualMegabytes"],
        seen["megabytesErrorPercent"] or 0.0,
        extra=logs.of(job.id),
    )
