"""Figures for Prometheus, in its text format 0.0.4.

Map: Family - Counter, Histogram - Metrics (what is counted since the start) - processor_seconds - expose
Rule: names and units as Prometheus asks: base units, _total for what only rises, few labels of
few values (never a job or a page). Counting is an addition under a lock; nothing is scanned to answer.
Runs in: any thread.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

# Upper bounds of buckets: from a small page on a card to a large one on few cores.
PAGE_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0)
Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric as it is told: samples are (suffix of its name, labels, value)."""

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    text: str
    samples: tuple[tuple[str, Labels, float], ...]


def gauge(name: str, text: str, value: float) -> Family:
    """A figure of this moment."""
    return Family(name, "gauge", text, (("", {}, value),))


def gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Family:
    """One figure for each value of a label."""
    samples = tuple(("", {label: key}, value) for key, value in values.items())
    return Family(name, "gauge", text, samples)


class Counter:
    """What only rises, for each value of one label, or without one."""

    def __init__(self, name: str, text: str, label: str | None = None, known: Iterable[str] = ()) -> None:
        """known: values of the label that are told from the start, as 0."""
        self.name, self.text, self.label = name, text, label
        self._values = dict.fromkeys(known if label else ("",), 0)
        self._lock = threading.Lock()

    def add(self, amount: int = 1, value: str = "") -> None:
        """Count; `value`: the label's."""
        with self._lock:
            self._values[value] = self._values.get(value, 0) + amount

    def family(self) -> Family:
        """As it stands now."""
        with self._lock:
            values = list(self._values.items())
        samples = (("", {self.label: key} if self.label else {}, value) for key, value in values)
        return Family(self.name, "counter", self.text, tuple(samples))


class Histogram:
    """How many values lay at or below each bound, for each value of one label."""

    def __init__(self, name: str, text: str, label: str, bounds: tuple[float, ...]) -> None:
        self.name, self.text, self.label, self.bounds = name, text, label, bounds
        self._counts: dict[str, list[int]] = {}  # a bucket each, the last one without a bound
        self._sums: dict[str, float] = {}
        self._lock = threading.Lock()

    def observe(self, amount: float, value: str) -> None:
        """Count one measured amount; `value`: the label's."""
        with self._lock:
            counts = self._counts.setdefault(value, [0] * (len(self.bounds) + 1))
            counts[bisect.bisect_left(self.bounds, amount)] += 1
            self._sums[value] = self._sums.get(value, 0.0) + amount

    def family(self) -> Family:
        """As it stands now; buckets add up, as Prometheus has them."""
        with self._lock:
            held = [(key, list(counts), self._sums[key]) for key, counts in self._counts.items()]
        samples: list[tuple[str, Labels, float]] = []
        for key, counts, total in held:
            labels = {self.label: key}
            for bound, below in zip((*self.bounds, float("inf")), itertools.accumulate(counts), strict=True):
                samples.append(("_bucket", labels | {"le": _number(bound)}, below))
            samples += [("_sum", labels, round(total, 6)), ("_count", labels, sum(counts))]
        return Family(self.name, "histogram", self.text, tuple(samples))


class Metrics:
    """What one service counts from its start on."""

    def __init__(self) -> None:
        seconds = "Seconds that decoding, computing and encoding of an upscaled page took."
        self.page_seconds = Histogram("reichan_page_duration_seconds", seconds, "model", PAGE_SECONDS)
        finished = ("upscaled", "carried", "cached")
        self.pages = Counter("reichan_pages_total", "Pages finished.", "status", finished)
        self.page_failures = Counter(
            "reichan_page_failures_total",
            "Pages that could not be upscaled, by the step that failed.",
            "reason",
            ("input", "decode", "infer", "encode", "worker_died"),
        )
        self.jobs = Counter("reichan_jobs_finished_total", "Jobs that succeeded or failed.", "state")
        self.job_failures = Counter("reichan_job_failures_total", "Jobs failed, by errorCode.", "reason")
        self.worker_deaths = Counter(
            "reichan_worker_deaths_total",
            "Worker processes that ended unasked, or had to be killed.",
            "reason",
            ("boot", "cancel", "hung", "signal", "exit"),
        )
        self.uploaded = Counter("reichan_uploaded_bytes_total", "Bytes of finished uploads.")
        self.page_bytes = Counter("reichan_page_bytes_total", "Bytes of finished pages.")
        self.artifact_bytes = Counter("reichan_artifact_bytes_total", "Bytes of finished artifacts.")
        self.requests = Counter("reichan_http_requests_total", "Requests answered.", "code")

    def families(self) -> Iterator[Family]:
        """All of them, as they stand now."""
        for counted in vars(self).values():
            yield counted.family()


def processor_seconds() -> Family:
    """Under the name that every exporter uses. (Its memory would have to be read from /proc, and an
    answer opens no file outside the storage root.)"""
    text = "Processor time of the service's process."
    return Family("process_cpu_seconds_total", "counter", text, (("", {}, round(time.process_time(), 3)),))


def _number(value: float) -> str:
    return "+Inf" if value == float("inf") else repr(value)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def expose(families: Iterable[Family]) -> str:
    """The text that Prometheus reads."""
    lines = []
    for family in families:
        lines += [f"# HELP {family.name} {family.text}", f"# TYPE {family.name} {family.kind}"]
        for suffix, labels, value in family.samples:
            inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            lines.append(f"{family.name}{suffix}{f'{{{inside}}}' if inside else ''} {_number(value)}")
    return "\n".join(lines) + "\n"
