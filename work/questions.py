"""What other threads ask of the workers, outside any job: pages for readers, previews, surveys, a probe.

Map: WorkerDied - Questions
Rule: one question a key at a time; who asks the same again meanwhile shares its answer.
Runs in: http-N threads (ask), the dispatcher thread (the rest).
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

from jobs import JobError
from messages import ComputePage, Preview, Probe, Survey

Question = Probe | Preview | Survey | ComputePage


class WorkerDied(JobError):
    """A worker ended with this question, perhaps by it."""

    code = "WORKER_DIED"


class Questions:
    """Questions without an answer yet, by key."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[Question, Future[Any]]] = {}
        self._lock = threading.Lock()  # of _open

    def ask(self, key: str, question: Question) -> Future[Any]:
        """The answer to come. It fails with WorkerDied where a worker does, else with JobError."""
        with self._lock:
            if key not in self._open:
                self._open[key] = (question, Future())
            return self._open[key][1]

    def unanswered(self) -> list[tuple[str, Question]]:
        """(key, question) of each, the oldest first."""
        with self._lock:
            return [(key, question) for key, (question, _) in self._open.items()]

    def answer(self, key: str, event: object) -> None:
        """A worker's answer came."""
        future = self._taken(key)
        if future and not future.cancelled():
            future.set_result(event)

    def disappoint(self, key: str, error: JobError) -> None:
        """No answer will come to this one."""
        future = self._taken(key)
        if future and not future.cancelled():
            future.set_exception(error)

    def disappoint_all(self, error: JobError) -> None:
        """Nor to any that is open now."""
        for key, _ in self.unanswered():
            self.disappoint(key, error)

    def cancel_all(self) -> None:
        """The service ends."""
        for key, _ in self.unanswered():
            future = self._taken(key)
            if future:
                future.cancel()

    def _taken(self, key: str) -> Future[Any] | None:
        """Whoever is told of a future may ask at once: nothing is told under the lock."""
        with self._lock:
            _, future = self._open.pop(key, (None, None))
        return future
