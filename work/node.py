"""A node's side of a Ray cluster: the actor that passes pages between the service and a worker.

Map: what is said - the spool - Node - whether a node can follow a plan
Rule: nothing of Ray is imported: cluster.py makes an actor of Node.
Runs in: an actor's process on any machine of the cluster; give() and collect() in its threads, listen
in one of its own; run_worker in the child.

    give() -> bytes -> spool -> run_worker: decode, infer, encode -> spool -> bytes -> collect()
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing.connection
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import storage
from files import weightfiles
from messages import (
    Beat,
    ComputePage,
    Dropped,
    EngineChoice,
    PageDone,
    PageFailed,
    Params,
    Plan,
    Settle,
    Settled,
    TaskFailed,
)
from work import workers
from work.workers import WorkerSlot

log = logging.getLogger("cluster")

BATCH_BYTES = 32 << 20  # of pages that go to a node in one call
RESULT_BYTES = 4 << 20  # of those that come back in one, at least a page: a beat comes no sooner than they
COLLECT_S = 5.0  # a call waits for news; a beat, every second, is none and goes along
PAGE, SOURCE = "page", "source"  # names in the spool, before their suffixes
MODELS = "models"  # its folder for weights
CODE = (
    "cluster", "storage", "files.inputs", "files.weightfiles", "work.dispatch", "work.node", "work.workers",
    *storage.PIPELINE,
)  # fmt: skip


@functools.cache
def code_hash() -> str:
    """Of the files that decide how a page will look: nodes must have the service's own."""
    return storage.code_hash(CODE)


# ---------------------------------------------------------------- what is said
@dataclass(frozen=True, slots=True)
class Lost:
    """From the bridge, or from a node of its worker: the actor is gone. blame: a worker process died, so that
    a page may be the reason; else the node or the network."""

    index: int
    why: str
    blame: bool


@dataclass(frozen=True, slots=True)
class Weights:
    """To a node, with the bytes: the file in the service's model root of this model. Without: it is gone."""

    key: str  # see weightfiles.model_key
    name: str  # of the file
    trusted: bytes  # what stands beside it, see weightfiles.read_weights


@dataclass(frozen=True, slots=True)
class Declined:
    """From a node: it computes no page of this job. code: of an error; None: it can't follow the plan."""

    job_id: str
    attempt: int
    n: int
    code: str | None
    detail: str


# ---------------------------------------------------------------- the spool
@dataclass(slots=True)
class Spooled:
    """A page that its node has."""

    task: ComputePage  # as it came
    folder: Path


def new_spool() -> Path:
    """A folder for pages on their way. What killed actors left of theirs is removed."""
    storage.sweep_scratch()
    return Path(tempfile.mkdtemp(prefix=storage.scratch_prefix("node")))


# ---------------------------------------------------------------- the actor
class Node:
    """The Ray actor: a worker process like any, and what passes between it and the service.

    Between service and worker a page is a file in the spool. So the worker is the same as on a single
    machine: it gives up the same rights, has the same deadlines, and can die by itself.
    """

    def __init__(self, choice: EngineChoice, entry: Callable[..., None], code: str) -> None:
        if code != code_hash():
            raise RuntimeError("another version of the service is installed on this node")
        self.spool = new_spool()
        self.folders = 0
        self.lock = threading.RLock()  # of all below
        self.is_lost = False  # its worker has ended
        self.pages: dict[tuple[str, int, int], Spooled] = {}
        self.own: dict[tuple[Params, Plan], Settled | TaskFailed | None] = {}  # None: being asked
        self.asked: list[tuple[Params, Plan]] = []  # in the order of the questions
        self.beat: Beat | None = None  # the last one that was not told
        self.held: list[tuple[ComputePage, bytes]] = []  # until own knows of their plan
        self.news: deque[tuple[Any, bytes | None]] = deque()
        self.changed = threading.Condition(self.lock)
        self.worker = WorkerSlot(0, entry, replace(choice, model_root=self.spool / MODELS))
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    # -- called by the bridge
    def give(self, batch: list[tuple[Any, bytes | None]]) -> None:
        """Tasks for the worker, pages with their bytes."""
        for item, data in batch:
            with self.lock:
                if self.is_lost:
                    return  # the service hears of that, and gives it to others
                if isinstance(item, Weights):
                    self._keep_weights(item, data)
                elif isinstance(item, ComputePage) and data is not None:
                    self._take(item, data)
                else:
                    self.worker.post(item)

    def collect(self) -> list[tuple[Any, bytes | None]]:
        """The worker's events since the last call, pages with their bytes; waits for the first."""
        with self.changed:
            self.changed.wait_for(lambda: self.news, COLLECT_S)
            batch: list[tuple[Any, bytes | None]] = []
            size = 0
            while self.news:
                size += len(self.news[0][1] or b"")
                if batch and size > RESULT_BYTES:
                    break
                batch.append(self.news.popleft())
            if self.beat:
                batch.append((self.beat, None))
                self.beat = None
            return batch

    def close(self) -> None:
        """The service is ending."""
        self.worker.process.kill()
        self.worker.process.join()
        shutil.rmtree(self.spool, ignore_errors=True)

    # -- weights and pages on their way in
    def _keep_weights(self, item: Weights, data: bytes | None) -> None:
        root = self.spool / MODELS
        try:
            root.mkdir(exist_ok=True)
            for path in root.iterdir():
                key = weightfiles.model_key(path.stem)
                if path.name not in (item.name, weightfiles.TRUSTED) and key == item.key:
                    path.unlink()
            if data is not None:
                storage.write_whole(root / weightfiles.TRUSTED, item.trusted)
                storage.write_whole(root / item.name, data)
        except OSError as error:  # its worker will say that there are none
            log.warning("weights can't be kept: %s", storage.reason_of(error))

    def _take(self, task: ComputePage, data: bytes) -> None:
        if task.plan is None:  # outside any job
            self._spool(task, data)
            return
        asked = (task.params, task.plan)
        if asked not in self.own:
            self.own[asked] = None
            self.asked.append(asked)
            self.worker.post(Settle(f"plan {len(self.asked)}", 0, task.params, None))
        self.held.append((task, data))
        self._release()

    def _release(self) -> None:
        """Pass on, or send back, the pages whose plan this node by now knows or doesn't."""
        held, self.held = self.held, []
        for task, data in held:
            assert task.plan is not None
            own = self.own[task.params, task.plan]
            if own is None:
                self.held.append((task, data))
            elif isinstance(own, TaskFailed):
                self._decline(task, own.code, own.detail)
            elif not can_follow(task.plan, own.plan):
                detail = f"it would compute by {_in_words(own.plan)}, not by {_in_words(task.plan)}"
                self._decline(task, None, detail)
            else:
                self._spool(task, data)

    def _decline(self, task: ComputePage, code: str | None, detail: str) -> None:
        self._put(Declined(task.job_id, task.attempt, task.n, code, detail))

    def _spool(self, task: ComputePage, data: bytes) -> None:
        self.folders += 1
        folder = self.spool / str(self.folders)
        mark = storage.mark_of(task.source.name)
        source = folder / ((f"{SOURCE}.{mark}" if mark else SOURCE) + task.source.suffix)
        try:
            folder.mkdir()
            source.write_bytes(data)
        except OSError as error:
            self._lose_page(Spooled(task, folder), f"the node's disk refused: {storage.reason_of(error)}")
            return
        self.pages[task.job_id, task.attempt, task.n] = Spooled(task, folder)
        self.worker.post(replace(task, source=source, target_stem=folder / PAGE))

    # -- events on their way out
    def _listen(self) -> None:
        worker = self.worker
        while True:
            ready = multiprocessing.connection.wait([worker.conn, worker.process.sentinel])
            for event in self._heard():
                with self.lock:
                    self._on_event(event)
            if worker.process.sentinel in ready:
                worker.process.join()
                with self.lock:
                    self.is_lost = True
                    self._put(Lost(0, workers.exit_reason(worker.process.exitcode), blame=True))
                shutil.rmtree(self.spool, ignore_errors=True)
                return

    def _heard(self) -> Iterator[Any]:
        with contextlib.suppress(EOFError, OSError):  # it died: its sentinel follows
            while self.worker.conn.poll():
                yield self.worker.conn.recv()

    def _on_event(self, event: Any) -> None:
        match event:
            case Settled(job_id, 0) | TaskFailed(job_id, 0, 0):  # attempts of jobs are counted from 1
                asked = self.asked[int(job_id.removeprefix("plan ")) - 1]
                self.own[asked] = event
                self._release()
                if isinstance(event, TaskFailed):
                    del self.own[asked]  # asked again with the next page: somebody may have mended it
            case Beat():
                self.beat = event
            case PageDone(job_id, attempt, n) | PageFailed(job_id, attempt, n) | Dropped(job_id, attempt, n):
                spooled = self.pages.pop((job_id, attempt, n), None)
                self._page_ended(event, spooled)
            case TaskFailed(job_id, attempt, n) if n and (job_id, attempt, n) in self.pages:
                self._lose_page(self.pages.pop((job_id, attempt, n)), event.detail, event.code)
            case _:
                self._put(event)

    def _lose_page(self, spooled: Spooled, detail: str, code: str = storage.DiskRefused.code) -> None:
        """No weights, no device, no room: others may have them."""
        shutil.rmtree(spooled.folder, ignore_errors=True)
        task = spooled.task
        if task.plan is None:
            self._put(TaskFailed(task.job_id, task.attempt, task.n, code, detail))
        else:
            self._decline(task, code, detail)

    def _page_ended(self, event: Any, spooled: Spooled | None) -> None:
        data = None
        if spooled and isinstance(event, PageDone):
            try:
                data = (spooled.folder / event.output).read_bytes()
            except OSError as error:
                self._lose_page(spooled, f"the node's disk refused: {storage.reason_of(error)}")
                return
        if spooled:
            shutil.rmtree(spooled.folder, ignore_errors=True)
        self._put(event, data)

    def _put(self, event: Any, data: bytes | None = None) -> None:
        with self.changed:
            self.news.append((event, data))
            self.changed.notify()


def can_follow(plan: Plan, own: Plan) -> bool:
    """Whether a node that would settle on `own` computes by `plan`: the same weights by the same kind of
    device and engine, in a precision that it uses itself or in fp32. Windows are as the plan says."""
    mine = {one.weights_sha256: one for one in own.choices or (own,)}
    return all(
        (here := mine.get(one.weights_sha256)) is not None
        and (here.device, here.engine) == (one.device, one.engine)
        and one.precision in ("fp32", here.precision)
        for one in plan.choices or (plan,)
    )


def _in_words(plan: Plan) -> str:
    return f"{plan.engine} {plan.model} {plan.weights_sha256[:8]} on {plan.device} in {plan.precision}"
