"""Threads that take work from two queues by turns: what somebody waits for, and all the rest.

Map: Lanes
Rule: neither queue waits for the other to become empty.
Runs in: the worker process, its device threads.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger("lanes")


class Lanes:
    """As a ThreadPoolExecutor without results. A device takes minutes for the pages that a job has
    queued on it: a single page goes before those, and one of those before the next single page."""

    def __init__(self, threads: int, name: str) -> None:
        self._lanes: tuple[deque[Callable[[], None]], ...] = (deque(), deque())  # first, the rest
        self._due = 0  # the lane whose turn it is, if there is something in it
        self._changed = threading.Condition()
        for n in range(threads):
            threading.Thread(target=self._run, name=f"{name}_{n}", daemon=True).start()

    def submit(self, function: Callable[..., None], *values: Any, first: bool = False) -> None:
        """Have function(*values) called by one of the threads."""
        with self._changed:
            self._lanes[0 if first else 1].append(lambda: function(*values))
            self._changed.notify()

    def _take(self) -> Callable[[], None]:
        with self._changed:
            self._changed.wait_for(lambda: any(self._lanes))
            lane = self._due if self._lanes[self._due] else 1 - self._due
            self._due = 1 - lane
            return self._lanes[lane].popleft()

    def _run(self) -> None:
        while True:
            call = self._take()
            try:
                call()
            # Around an attempt: a thread that ends would leave its queue to nobody.
            except Exception:
                log.exception("a step that should have told of its failure did not")
            del call  # with the page that it holds, while this thread waits for the next
