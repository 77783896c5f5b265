"""The dispatcher's end of a worker, and what runs at the other end.

Map: Slot - WorkerSlot - who is next (quickest, idlest) - keep_awake - deaths in words - run_worker
Rule: nothing here waits for a worker, but stop(), and that not long: one that stopped must not hold up
the others.
Runs in: the dispatcher thread, a send-N thread a worker; run_worker in the child.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import logs
from messages import CARD_LOST_STATUS, BootFailed, Cancel, ComputePage, EngineChoice, Task

STRANGERS_PAGES = 2  # that a worker beside others has at once, before its pace is known
PACES = 8  # pages that tell a worker's pace; a node's come several at a time
PACE_KEPT_S = 60.0  # of idleness; it may have been another program's fault
FAILURES = 3  # in a row, after which it may be the worker's fault, and pages go to others
REST_S = 60.0  # until it is tried again
KILL_S = 1.0  # for a killed process's end, where somebody waits for it
OBEY_S = 2.0  # for a cancelled job's tasks, before their worker is killed

CONTEXT = multiprocessing.get_context("spawn")  # a fork would have other threads' locks for ever
TaskKey = tuple[str, int, int]  # job, attempt, page; page 0: stage or pack


# ---------------------------------------------------------------- the dispatcher's end
class Slot(abc.ABC):
    """What the dispatcher knows of one worker, wherever it runs."""

    obey_s = OBEY_S
    patience = 1.0  # times the usual limit of its silence

    def __init__(self, index: int) -> None:
        self.index = index
        self.capacity = 0  # until it says Ready
        self.tasks: dict[TaskKey | str, Task] = {}
        self.exclusive = False  # a suspect page has it for itself
        self.kept_for: str | None = None  # job whose page waits to have it for itself
        self.heard_s = time.monotonic()  # last event
        self.used_s = time.monotonic()  # last time it had a task
        self.obey_by_s: dict[TaskKey, float] = {}  # cancelled tasks -> deadline
        self.doom: str | None = None  # why we killed it
        self.doomed_s = 0.0  # since when
        self.card: tuple[str, int, int] | None = None  # see Beat
        self.computing_s = 0.0  # since when it computes the page that will be finished next
        self.is_warm = False  # it computed more than one page
        self.paces_s: deque[float] = deque(maxlen=PACES)  # seconds from page to page, of the last ones
        self.failures = 0  # of pages, in a row
        self.rests_until_s = 0.0

    @abc.abstractmethod
    def post(self, item: Any) -> None:
        """Send it this, without waiting."""

    def has_unread(self) -> bool:
        """Whether it said something that nobody has listened to yet."""
        return False

    @abc.abstractmethod
    def kill(self, why: str) -> None:
        """End it now; the dispatcher will hear of it."""

    def give(self, key: TaskKey | str, task: Task) -> None:
        """Send a task; it is in flight until its closing event."""
        if not self.tasks:
            self.computing_s = time.monotonic()
        self.tasks[key] = task
        self.post(task)

    def cancel(self, key: TaskKey, now_s: float) -> None:
        """Ask for a task to be dropped; the dispatcher kills the worker if it isn't."""
        self.obey_by_s[key] = now_s + self.obey_s
        self.post(Cancel(key[0], key[1]))

    def free(self, key: TaskKey | str) -> Task | None:
        """A closing event came for this task."""
        task = self.tasks.pop(key, None)
        self.obey_by_s.pop(key, None)  # type: ignore[arg-type]
        self.used_s = time.monotonic()
        if not self.tasks:
            self.exclusive = False
        return task

    def count_page(self, now_s: float) -> None:
        """It finished a page that it computed."""
        if len(self.paces_s) == 1 and not self.is_warm:
            self.paces_s.clear()  # the first one loaded the model, and counted while there was no other
            self.is_warm = True
        self.paces_s.append(now_s - self.computing_s)
        self.computing_s = now_s
        self.failures, self.rests_until_s = 0, 0.0

    def count_failure(self, now_s: float) -> None:
        """A page failed there. Too many in a row, and others take the pages: where they fail at once it would
        always be the first that has room."""
        self.failures += 1
        if self.failures >= FAILURES:
            self.rests_until_s = now_s + REST_S

    def pace_s(self, now_s: float) -> float | None:
        """Seconds a page, of late; None where nobody knows, or what was known is old."""
        if not self.paces_s or (not self.tasks and now_s - self.used_s > PACE_KEPT_S):
            return None
        return sum(self.paces_s) / len(self.paces_s)

    def excuse(self, asleep_s: float) -> None:
        """The machine was asleep so long: nobody was silent or disobedient."""
        self.heard_s += asleep_s
        self.used_s += asleep_s
        self.computing_s += asleep_s
        self.rests_until_s += asleep_s
        self.obey_by_s = {key: by_s + asleep_s for key, by_s in self.obey_by_s.items()}

    def is_open(self) -> bool:
        """Whether it is up, and no page has it, or waits to have it, for itself."""
        return bool(self.capacity) and not (self.exclusive or self.kept_for or self.doom)

    def room(self) -> int:
        """How many more pages it takes now."""
        return self.capacity - len(self.tasks) if self.is_open() else 0

    def singles(self) -> int:
        """How many pages outside any job it has."""
        return sum(isinstance(key, str) and isinstance(task, ComputePage) for key, task in self.tasks.items())


class WorkerSlot(Slot):
    """The parent's end of one worker process."""

    stop_s = 1.0  # for its end, before it is killed

    def __init__(self, index: int, entry: Callable[..., None], choice: EngineChoice) -> None:
        super().__init__(index)
        self.conn, theirs = CONTEXT.Pipe()
        arguments = (theirs, choice, index)
        self.process = CONTEXT.Process(target=entry, args=arguments, name=f"worker-{index}", daemon=True)
        self.process.start()
        self.is_cut = False  # its end of the pipe is closed
        theirs.close()  # else its end would stay open here, and its death go unnoticed
        # A stopped worker doesn't read; its pipe may be full; the dispatcher must not wait.
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name=f"send-{index}", daemon=True)
        self._sender.start()

    def __str__(self) -> str:
        return f"worker {self.index} (process {self.process.pid})"

    def _send_all(self) -> None:
        while True:
            item = self._outbox.get()
            try:
                self.conn.send(item)
            except OSError:
                return  # it died: the dispatcher learns of it from the sentinel
            if item is None:
                return

    def post(self, item: Any) -> None:
        """See Slot."""
        self._outbox.put(item)

    def has_unread(self) -> bool:
        """See Slot."""
        with contextlib.suppress(OSError):  # EOF is no message, though poll() says so
            return not self.is_cut and self.conn.poll()
        return False

    def kill(self, why: str) -> None:
        """See Slot; its sentinel wakes the dispatcher."""
        if not self.doom:
            self.doom, self.doomed_s = why, time.monotonic()
        self.process.kill()

    def stop(self, wait_s: float) -> None:
        """Ask it to end, then see to it."""
        self.post(None)
        self.process.join(wait_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(KILL_S)
        self._sender.join(KILL_S)
        if not self._sender.is_alive():  # amid a send its descriptor's number could become another file's
            self.conn.close()


# ---------------------------------------------------------------- who is next
def quickest(slots: Sequence[Slot], rest: int, now_s: float) -> Slot | None:
    """Of workers on unlike cards the one whose next page would be done first, at the pace of its last
    ones. None where all together would be done with the rest, in pages, before it: nobody is to wait for
    the last pages of a slow card."""
    able = [slot for slot in slots if slot.is_open()]
    able = [slot for slot in able if slot.rests_until_s <= now_s] or able
    paces = {slot.index: pace_s for slot in able if (pace_s := slot.pace_s(now_s)) is not None}
    if len(able) < 2 or len(paces) < len(able):
        few = [slot for slot in able if slot.index in paces or len(slot.tasks) < STRANGERS_PAGES]
        return idlest(few if len(able) > 1 else able)

    def done_s(slot: Slot) -> float:
        return (len(slot.tasks) + 1) * paces[slot.index]

    rest_s = rest / sum(1 / max(pace_s, 1e-3) for pace_s in paces.values())
    best = min((slot for slot in able if slot.room() > 0), key=done_s, default=None)
    return best if best and done_s(best) <= max(rest_s, min(map(done_s, able))) else None


def idlest(slots: Sequence[Slot]) -> Slot | None:
    """Who takes most pages now, if anybody takes one."""
    return max((slot for slot in slots if slot.room() > 0), key=Slot.room, default=None)


# ---------------------------------------------------------------- the machine
def keep_awake(busy: bool) -> None:
    """Let Windows not fall asleep, or fall asleep again: a computing program counts as nobody there. It
    holds for the calling thread (SetThreadExecutionState). Other systems are left as they are set."""
    if sys.platform == "win32":
        continuous, system_required = 0x80000000, 0x1
        ctypes.windll.kernel32.SetThreadExecutionState(continuous | (system_required if busy else 0))


# ---------------------------------------------------------------- deaths in words
def kind_of_death(slot: WorkerSlot) -> str:
    """Of a worker that ended, for Prometheus: boot, cancel, hung, signal or exit."""
    if slot.capacity == 0:
        return "boot"
    if slot.doom:
        return "cancel" if slot.doom == "cancel" else "hung"
    return "signal" if (slot.process.exitcode or 0) < 0 else "exit"


def exit_reason(code: int | None) -> str:
    """Of a worker process, in words."""
    if code == CARD_LOST_STATUS:
        return "the worker's card stopped answering (a reset of its driver, or a fault)"
    if code is not None and code < 0:
        likely = ": probably out of memory, or killed by hand" if code == -9 else ""
        return f"the worker process was ended by signal {-code}{likely}"
    return f"the worker process ended with status {code}"


# ---------------------------------------------------------------- the child's side
def end_with_parent() -> None:
    """The pipe's end tells of the parent's death too, but nobody reads it during seconds of imports."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(0)


def run_worker(conn: Connection, choice: EngineChoice, slot: int) -> None:
    """Entry point of the worker process. infer is imported here, in the child: naming its
    function as the target would load torch in the parent, which pickles it by name."""
    threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # whatever a library prints: the service's stdout is for who started it
    logs.setup(choice.log, f"worker-{slot}")
    # What the libraries make stays: looking it through for garbage meanwhile, and again whenever pages have
    # left some, took 0.3 of the 2.4 s until a worker is up, and 0.2 s each time after (measured).
    gc.disable()
    try:
        import infer
    except BaseException as error:
        conn.send(BootFailed(f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=3)}"))
        raise SystemExit(3) from error  # told: the log gets it once
    gc.freeze()
    gc.enable()
    infer.worker_main(conn, choice, slot)
