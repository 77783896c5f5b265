"""Beyond one machine: the pages of jobs computed by the nodes of a Ray cluster.

Map: what is said - the dispatcher's side (NodeSlot, ClusterDispatcher) - the service's bridge
     (places, Link, Bridge, run_bridge); a node's side is work/node.py
Rule: only the bridge process imports Ray, and Ray's own processes run Node. Ray ends its processes when they
lose their cluster: neither the service nor a worker may be one of them.
Runs in: the dispatcher thread; the bridge process. One Node a card, or a node's processor.

    dispatcher ==pipe==> bridge ==object store==> Node ==pipe==> run_worker, as in one machine
        |                staging/ -> bytes        bytes -> spool -> decode, infer, encode -> spool
        |                outputs/ <- bytes <------------------- bytes <---------------------'
        '==pipe==> worker 0: stage, pack, previews, pages that are only copied

A page is in flight until it is on the service's disk, and a node has no more than its capacity: a slow
disk holds back the nodes. What is ready goes together in one call, either way.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import queue
import signal
import socket
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import logs
import storage
from files import weightfiles
from files.cache import PageCache
from jobs import Job, JobError, lose_worker
from messages import (
    AUTO_MODEL,
    DIED_TWICE,
    Beat,
    BootFailed,
    ComputePage,
    EngineChoice,
    PageDone,
    PageFailed,
    Params,
    Plan,
    Ready,
    Settle,
    Settled,
    TaskFailed,
)
from work import workers
from work.dispatch import PAGE_DEATHS, Dispatcher
from work.node import BATCH_BYTES, PAGE, Declined, Lost, Node, Weights, code_hash
from work.questions import WorkerDied
from work.runs import Run
from work.workers import Slot, WorkerSlot

log = logging.getLogger("cluster")

NO_FOLLOWER = "no machine of the cluster can compute this job's pages as it began"
BRIDGE = 1  # its index beside worker 0
LOOK_S = 1.0  # between two looks at the cluster's nodes
SILENCE_S = 5.0  # after which a head that does not answer counts as gone, in what is told
LOSSES = 3  # of a page with its node; one more, and the page is suspected
GIVE_S = 60.0  # for a node to take a file of weights, beside
WEIGHTS_BYTES_S = 100_000  # of the slowest line that is waited for
UNFOLLOWED_S = 600.0  # for a machine that can follow a job's plan to come back
CLOSE_S = 2.0  # for a node to leave nothing behind
STORE_BYTES = 256 << 20  # of the object store where the bridge starts a cluster


# ---------------------------------------------------------------- what is said
@dataclass(frozen=True, slots=True)
class ToNode:
    """To the bridge: give this to a node's worker; None: end the node's actor."""

    index: int
    item: Any


@dataclass(frozen=True, slots=True)
class Joined:
    """From the bridge: an actor was asked for; its worker says Ready when it is up."""

    index: int
    host: str
    has_card: bool


@dataclass(frozen=True, slots=True)
class FromNode:
    """From the bridge: an event of a node's worker. PageDone: the page is on the service's disk."""

    index: int
    event: Any


@dataclass(frozen=True, slots=True)
class Met:
    """From the bridge: the cluster that "auto" found. When its head goes, it is waited for."""

    address: str


@dataclass(frozen=True, slots=True)
class Cut:
    """From the bridge: why there is no cluster at present; None: there is one."""

    detail: str | None


# ---------------------------------------------------------------- the dispatcher's side
class NodeSlot(Slot):
    """A node's worker, reached through the bridge."""

    obey_s = 10.0  # a network lies between
    patience = 4.0  # a page may be all that it carries for a while

    def __init__(self, index: int, host: str, has_card: bool, bridge: WorkerSlot) -> None:
        super().__init__(index)
        self.host = host
        self.has_card = has_card
        self.bridge = bridge

    def __str__(self) -> str:
        return f"node {self.index} ({self.host})"

    def post(self, item: Any) -> None:
        """See Slot."""
        self.bridge.post(ToNode(self.index, item))

    def has_unread(self) -> bool:
        """See Slot."""
        return self.bridge.has_unread()

    def kill(self, why: str) -> None:
        """See Slot."""
        self.doom = self.doom or why
        self.post(None)


class ClusterDispatcher(Dispatcher):
    """Deals pages to the cluster's nodes, all else to one worker here.

    A node that is lost costs no attempt: its pages go to others.
    """

    def __init__(self, address: str, *settings: Any) -> None:
        super().__init__(*settings)
        self.choice = replace(self.choice, cache_program=code_hash())  # what the bridge keeps pages by
        self.address = address  # "auto": the cluster of this machine, started where there is none
        self.nodes: dict[int, NodeSlot] = {}  # by index, as their bridge counts them
        self.cut: str | None = None  # see Cut
        self.bridge_after_s = 0.0  # no new bridge before this moment
        self.settling: dict[str, int] = {}  # job id -> node that was asked for its plan
        self.declined: dict[str, dict[int, Declined]] = {}  # job id -> node -> why not there
        self.losses: Counter[tuple[str, int]] = Counter()  # of (job id, page), see LOSSES
        self.unfollowed_s: dict[str, float] = {}  # job id -> since when no node can follow its plan
        self.unplanned: set[str] = set()  # jobs whose plan is to be settled anew

    def health(self) -> dict[str, Any]:
        """What GET /health says: neither names nor addresses."""
        ready = sum(node.capacity > 0 for node in list(self.nodes.values()))
        if ready and not self.cut and self.unfollowed_s:
            return {"status": "waiting", "devices": ready, "detail": NO_FOLLOWER}
        if ready and not self.cut:
            return {"status": "ready", "devices": ready, "detail": None}
        if BRIDGE not in self.workers and self.cut is None:
            return {"status": "idle", "devices": 0, "detail": None}
        return {"status": "waiting", "devices": ready, "detail": self.cut or "no node is ready to compute"}

    # -- who takes what
    def holders(self) -> list[Slot]:
        """See Dispatcher."""
        return [*list(self.workers.values()), *list(self.nodes.values())]

    def _page_slots(self, run: Run | None) -> Sequence[Slot]:
        declined = self.declined.get(run.job.id, {}) if run else {}
        return [node for node in self.nodes.values() if node.index not in declined]

    def _file_slots(self) -> Sequence[Slot]:
        return [slot for index, slot in self.workers.items() if index != BRIDGE]

    def _want_page_slot(self) -> None:
        if BRIDGE not in self.workers and time.monotonic() >= self.bridge_after_s:
            entry = functools.partial(run_bridge, self.address, self.entry)
            self.workers[BRIDGE] = WorkerSlot(BRIDGE, entry, self.choice)
            self.workers[BRIDGE].stop_s = 8.0  # Ray's processes end one after the other

    def _hire(self) -> WorkerSlot | None:
        self.devices = 1  # here nothing is computed
        return None if 0 in self.workers else super()._hire()

    def _steps(self) -> Sequence[Callable[[], None]]:
        return (self._keep_bridge, *super()._steps(), self._see_unfollowed)

    def _keep_bridge(self) -> None:
        """An idle one ends, and gives the cards back."""
        bridge = self.workers.get(BRIDGE)
        is_due = bool(self.runs) and self.paused_s is None
        if bridge and (is_due or any(node.tasks for node in self.nodes.values())):
            bridge.used_s = time.monotonic()

    def _see_unfollowed(self) -> None:
        """Settle anew what no machine that is left can follow: better all pages by another plan than none."""
        for one in self.runs.values():
            waits = one.todo or one.alone or (one.file_task == "stage" and one.settled is None)
            left = self._page_slots(one) or not self.declined.get(one.job.id)
            if waits and not left and one.job.id not in self.unfollowed_s:
                self.unfollowed_s[one.job.id] = time.monotonic()
                self.table.change(one.job, message=f"{NO_FOLLOWER}; it waits for one that can")
        for job_id, since_s in list(self.unfollowed_s.items()):
            run = self.runs.get(job_id)
            # One that only starts is none yet: it may never come up, and be tried for ever.
            if run is None or any(node.capacity and not node.doom for node in self._page_slots(run)):
                del self.unfollowed_s[job_id]
                if run:
                    self.table.change(run.job, message=None)
            elif time.monotonic() - since_s > UNFOLLOWED_S:
                log.warning("%s: its plan is settled anew", NO_FOLLOWER, extra=logs.of(job_id))
                del self.unfollowed_s[job_id]
                self.unplanned.add(job_id)
                self._abandon(run)
                with contextlib.suppress(JobError, sqlite3.OperationalError):
                    lose_worker(self.table, run.job, self.table.clock())

    def _deal_file_task(self, run: Run) -> bool:
        if run.file_task == "stage" and run.settled is None:
            self._ask_for_plan(run)
            return False
        return super()._deal_file_task(run)

    def _ask_for_plan(self, run: Run) -> None:
        """The plan is settled where pages are computed: a node with a card before one without."""
        self._want_file_slot()  # it loads its libraries meanwhile
        if self.settling.get(run.job.id) in self.nodes or self.is_held(run.job.id):
            return
        declined = self.declined.get(run.job.id, {})
        left = [node for node in self.nodes.values() if node.index not in declined and not node.doom]
        # A card that is starting, or busy, is waited for: by another machine's plan it would compute nothing.
        cards = [node for node in left if node.has_card]
        able = [node for node in cards or left if node.is_open()]
        if not able:
            self._want_page_slot()
            return
        node = min(able, key=lambda node: len(node.tasks))
        self.settling[run.job.id] = node.index
        plan = None if run.job.id in self.unplanned else run.job.plan
        node.give(run.key(0), Settle(run.job.id, run.job.attempt, run.job.params, plan))

    def _abandon(self, run: Run) -> None:
        super()._abandon(run)
        self._forget(run.job)

    def _finish(self, run: Run, event: Any) -> None:
        super()._finish(run, event)
        self._forget(run.job)

    def _forget(self, job: Job) -> None:
        self.settling.pop(job.id, None)
        self.declined.pop(job.id, None)
        for key in [key for key in self.losses if key[0] == job.id]:
            del self.losses[key]

    # -- events
    def _handle(self, slot: Slot, event: Any) -> None:
        match event:
            case Joined(index, host, has_card):
                assert isinstance(slot, WorkerSlot)
                self.nodes[index] = NodeSlot(index, host, has_card, slot)
            case Lost(index, why, blame):
                node = self.nodes.pop(index, None)
                if node:
                    self._lose_node(node, why, blame)
            case Cut(detail):
                self.cut = detail
            case Met(address):
                self.address = address
            case FromNode(index, inner):
                if index in self.nodes:
                    self._hear(self.nodes[index], inner)
            case _:
                super()._handle(slot, event)

    def _hear(self, node: NodeSlot, event: Any) -> None:
        """An event of a node's worker."""
        match event:
            case Settled(job_id, attempt, plan):
                node.free((job_id, attempt, 0))
                self.settling.pop(job_id, None)
                run = self._run_of(event)
                if run and not self._asks_other_cards(node, run, plan):
                    run.settled = plan
                    self.unplanned.discard(job_id)
            case TaskFailed(job_id, attempt, 0, code, detail) if (job_id, attempt, 0) in node.tasks:
                node.free((job_id, attempt, 0))
                self.settling.pop(job_id, None)
                self._decline(node, Declined(job_id, attempt, 0, code, detail))
            case Declined(job_id, attempt, n):
                alone = node.exclusive
                node.free((job_id, attempt, n))
                run = self._run_of(event)
                if run:
                    run.in_flight.discard(n)
                    (run.alone if alone else run.todo).appendleft(n)
                self._decline(node, event)
            case _:
                super()._handle(node, event)

    def _asks_other_cards(self, node: NodeSlot, run: Run, plan: Plan) -> bool:
        """Take note of a card that torch makes no use of: its machine settled the plan on its processor.
        Whether there are other cards, which could not follow that, and are asked then."""
        asked = (run.job.params.device, self.choice.device)
        if not node.has_card or plan.device != "cpu" or "cpu" in asked or plan == run.job.plan:
            return False  # the job's own, from before, tells nothing of the card
        node.has_card = False
        log.warning("%s has a card that torch can't use: it computes by its processor", node)
        declined = self.declined.get(run.job.id, {})
        others = [one for one in self.nodes.values() if one.index not in declined and not one.doom]
        return any(one.has_card for one in others)

    def _decline(self, node: NodeSlot, event: Declined) -> None:
        """No page of this job for that node. The job fails when no node is left, and an error is why; else
        see _see_unfollowed."""
        run = self._run_of(event)
        if run is None:
            return
        node.heard_s = time.monotonic()
        declined = self.declined.setdefault(run.job.id, {})
        declined[node.index] = event
        log.warning("%s takes no pages: %s", node, event.detail, extra=logs.of(run.job.id))
        if not self._page_slots(run):
            errors = [one for index, one in declined.items() if one.code and index in self.nodes]
            if errors:
                self._fail(run, str(errors[0].code), errors[0].detail)

    # -- losses
    def _lose_node(self, node: NodeSlot, why: str, blame: bool) -> None:
        """Its pages go to others, at once and in this attempt; a page that may be the reason comes alone."""
        log.error("%s ended: %s", node, node.doom or why)
        kind = "boot" if node.capacity == 0 else "cancel" if node.doom == "cancel" else "node"
        self.metrics.worker_deaths.add(1, kind)
        blame = blame and node.doom != "cancel"
        self.settling = {job_id: index for job_id, index in self.settling.items() if index != node.index}
        for declined in self.declined.values():
            declined.pop(node.index, None)  # another may get its index, from another bridge
        for key in node.tasks:
            if isinstance(key, str):
                if blame:
                    self.questions.disappoint(key, WorkerDied(f"the worker ended: {node.doom or why}"))
                continue  # else it is still asked for, and given to another
            run = self.runs.get(key[0])
            if run is None or run.job.attempt != key[1]:
                continue
            if key[2]:
                self._take_back(run, key[2], node.exclusive, blame)
            elif blame:  # it was to settle the job's plan, which another does now, though not for ever
                enough = self._blame(run, {0: node.tasks[key]}, node, node.doom or why)
                if enough:
                    self._fail(run, *enough)

    def _take_back(self, run: Run, n: int, alone: bool, blame: bool) -> None:
        run.in_flight.discard(n)
        self.losses[run.job.id, n] += not blame
        if not blame and self.losses[run.job.id, n] <= LOSSES:
            (run.alone if alone else run.todo).appendleft(n)
            return
        page = replace(run.pages[n], alone=True, deaths=run.pages[n].deaths + alone)
        run.pages[n] = page
        if page.deaths >= PAGE_DEATHS:
            run.give_up(n, "worker_died", DIED_TWICE)
        else:
            run.alone.append(n)
        self._suspect(run, n, page.deaths)

    def _bury(self, slot: WorkerSlot) -> None:
        if slot.index == BRIDGE:
            self.bridge_after_s = time.monotonic() + 2.0
            self.cut = slot.doom or "the connection to the cluster was lost"
            for index in list(self.nodes):
                self._lose_node(self.nodes.pop(index), self.cut, blame=False)
            busy = {key[0] for slot in self._file_slots() for key in slot.tasks}  # who writes there, too
            for job_id in self.runs.keys() - busy:
                with contextlib.suppress(OSError):  # in use, on Windows
                    storage.sweep_temporaries(self.runs[job_id].outputs)  # what it was writing
        super()._bury(slot)

    def _check_deadlines(self) -> None:
        super()._check_deadlines()
        if self.nodes and BRIDGE not in self.workers:  # it was idle, and stopped: so were they
            self.nodes.clear()
            self.declined.clear()
            self.settling.clear()


# ---------------------------------------------------------------- the bridge
@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor goes: one a card, or one a node without."""

    node_id: str
    n: int
    cards: int
    cores: int


def places(nodes: list[dict[str, Any]], device: str) -> dict[Place, str]:
    """Place -> host, of ray.nodes(). A card's actor has its share of the cores, for decoding and encoding."""
    found = {}
    for node in nodes:
        cores = int(node["Resources"].get("CPU", 0))
        cards = 0 if device == "cpu" else int(node["Resources"].get("GPU", 0))
        if not node["Alive"]:
            continue
        for n in range(cards or (1 if cores else 0)):
            place = Place(node["NodeID"], n, min(cards, 1), cores // max(cards, 1))
            found[place] = str(node["NodeManagerHostname"])
    return found


class Link:
    """The bridge's end of one actor."""

    def __init__(self, bridge: Bridge, index: int, actor: Any) -> None:
        self.bridge = bridge
        self.index = index
        self.actor = actor
        # With its key in the cache.
        self.pages: dict[tuple[str, int, int], tuple[ComputePage, str | None]] = {}
        self.weights: dict[str, tuple[Any, ...]] = {}  # of the service's own, as the node has them
        self.plans: set[tuple[Params, Plan | None]] = set()  # that the node knows of
        self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.given: deque[Any] = deque()  # calls that may be under way
        self.is_up = False
        self.is_delivering = False  # to the service's disk, which may take its time

    def start(self) -> None:
        """Begin to pass things on."""
        for step, name in ((self._send_all, "give"), (self._receive_all, "collect")):
            threading.Thread(target=step, name=f"{name}-{self.index}", daemon=True).start()

    def tell(self, event: Any) -> None:
        """Pass an event on to the dispatcher."""
        self.bridge.send(FromNode(self.index, event))

    def _send_all(self) -> None:
        try:
            self._give_all()
        # Around an attempt: a node that is told nothing any more would keep its pages for ever.
        except Exception as error:
            why = f"it can't be given more: {storage.reason_of(error)}"
            self.bridge.lose(self, Lost(self.index, why, blame=False))

    def _give_all(self) -> None:
        while True:
            items, size = [self.outbox.get()], 0
            with contextlib.suppress(queue.Empty):
                while items[-1] is not None and size < BATCH_BYTES:
                    size += self._size_of(items[-1])
                    items.append(self.outbox.get_nowait())
            batch = [packed for packed in map(self._packed, filter(None, items)) if packed]
            if batch:
                self.given.append(self.actor.give.remote(batch))
            if items[-1] is None:
                return

    def end(self) -> None:
        """End the actor, whatever it or its line is stuck in; _receive_all learns of it."""
        self.outbox.put(None)
        self.bridge.close([self])
        self.bridge.ray.kill(self.actor)

    @staticmethod
    def _size_of(item: Any) -> int:
        with contextlib.suppress(OSError):
            return item.source.stat().st_size if isinstance(item, ComputePage) else 0
        return 0

    def _packed(self, item: Any) -> tuple[Any, bytes | None] | None:
        """A task with its source's bytes, once the node has its weights. None: the page is in the cache, or
        can't be read; that is told at once."""
        if isinstance(item, Settle):
            self._send_weights(item.params)
        if not isinstance(item, ComputePage):
            return item, None
        started = time.perf_counter()
        try:
            data = item.source.read_bytes()
        except OSError as error:
            reason = f"{type(error).__name__}: {storage.reason_of(error)}"
            self.tell(PageFailed(item.job_id, item.attempt, item.n, reason, "decode"))
            return None
        cache = self.bridge.cache
        key = cache.key(data, item) if cache else None
        found = cache.find(key) if cache and key else None
        if found and key:
            facts = found.facts(key, time.perf_counter() - started)
            facts["deviation"] = storage.part_of(item.source.name)
            digest, size = hashlib.sha256(found.data).hexdigest(), len(found.data)
            place = (item.job_id, item.attempt, item.n, PAGE + found.suffix)
            self._finish(item, PageDone(*place, digest, size_bytes=size, **facts), found.data)
            return None
        self.pages[item.job_id, item.attempt, item.n] = item, key
        if item.plan is None or (item.params, item.plan) not in self.plans:
            self._send_weights(item.params)
            self.plans.add((item.params, item.plan))
        return item, data

    def _send_weights(self, params: Params) -> None:
        """What lies in the service's model root for these settings, unless the node has it as it is."""
        root, trusted = self.bridge.choice.model_root, b""
        found = weightfiles.find_weights(root)
        files = {key: file for key, file in found.items() if file.source == "model-root"}
        for key in self.weights.keys() - files.keys():
            del self.weights[key]
            self._give_now(Weights(key, "", b""), None)
        with contextlib.suppress(OSError):
            trusted = (root / weightfiles.TRUSTED).read_bytes()
        for key, file in files.items():
            # "auto" chooses among these, see upscaling.auto_candidates.
            of_auto = file.release is not None or "janai" in key
            if not (of_auto if params.model == AUTO_MODEL else key == weightfiles.model_key(params.model)):
                continue
            try:
                stat = file.path.stat()
                stamp = (file.path.name, stat.st_size, stat.st_mtime_ns, trusted)
                data = None if self.weights.get(key) == stamp else file.path.read_bytes()
            except OSError:  # it was just removed: the worker will say so
                continue
            if data is not None:
                self._give_now(Weights(key, file.path.name, trusted), data)
                self.weights[key] = stamp

    def _give_now(self, item: Any, data: bytes | None) -> None:
        """Calls may overtake each other: this one is over before the next begins."""
        limit_s = GIVE_S + len(data or b"") / WEIGHTS_BYTES_S
        self.bridge.ray.get(self.actor.give.remote([(item, data)]), timeout=limit_s)

    def _see_given(self) -> None:
        """Raise what a call failed with: what it gave would be waited for for ever."""
        while self.given and self.bridge.ray.wait([self.given[0]], timeout=0)[0]:
            self.bridge.ray.get(self.given.popleft())

    def _receive_all(self) -> None:
        lost: Lost | None = None
        while lost is None:
            try:
                self._see_given()
                collected = self.bridge.ray.get(self.actor.collect.remote())
                self.is_delivering = True
                for event, data in collected:
                    if isinstance(event, Lost):
                        lost = event
                        break
                    self.is_up = self.is_up or isinstance(event, Ready)
                    self._deliver(event, data)
                self.is_delivering = False
            # Around an attempt: whatever Ray says of an actor that is gone, its pages go elsewhere.
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                told = dict.fromkeys((lines[0], lines[-1]))  # of a traceback the last one says why
                lost = Lost(self.index, f"{type(error).__name__}: {' '.join(told)}", blame=False)
        self.bridge.lose(self, replace(lost, index=self.index))

    def _deliver(self, event: Any, data: bytes | None) -> None:
        place = (event.job_id, event.attempt, event.n) if hasattr(event, "n") else None
        task, key = self.pages.pop(place, (None, None)) if place else (None, None)
        if not isinstance(event, PageDone):
            self.tell(event)
            return
        if task is None or data is None:
            raise ValueError(f"a page came back that was not sent: {place}")
        if hashlib.sha256(data).hexdigest() != event.sha256:
            raise ValueError(f"page {event.n} came back damaged")
        self._finish(task, replace(event, cache_key=None if event.carried else key), data)

    def _finish(self, task: ComputePage, done: PageDone, data: bytes) -> None:
        """Put a page on the service's disk, then say so. Its name so far is PAGE and the suffix, see Node."""
        target = task.target_stem.with_name(task.target_stem.name + done.output.removeprefix(PAGE))
        try:
            storage.write_whole(target, data)
        except OSError as error:
            refused = storage.DiskRefused(error)
            self.tell(TaskFailed(done.job_id, done.attempt, done.n, refused.code, refused.detail))
            return
        done = replace(done, output=target.name)
        part = storage.part_of(task.source.name)
        self.tell(self.bridge.cache.take(target, done, part) if self.bridge.cache else done)


class Bridge:
    """The process that speaks with Ray."""

    def __init__(
        self, conn: Connection, choice: EngineChoice, address: str, entry: Callable[..., None]
    ) -> None:
        import ray

        self.ray = ray
        self.conn = conn
        self.choice = choice
        # A plan names its machine, and what another one computed is not kept.
        self.cache = PageCache(choice.cache_root, code_hash()) if choice.cache_root else None
        self.address = address
        self.entry = entry
        self.lock = threading.Lock()  # of what is sent, and of links
        self.links: dict[Place, Link] = {}
        self.by_index: dict[int, Link] = {}
        self.failures: Counter[Place] = Counter()  # in a row, before a worker was up
        self.not_before_s: dict[Place, float] = {}
        self.indices = 0
        self.looking_s: float | None = None  # since when the head is asked
        self.told: str | None = ""  # detail of the last Cut that was sent
        self.ending = threading.Event()

    def run(self) -> None:
        """Returns when the parent wants no more of it."""
        self.send(Ready(1))
        for step in (self._beat, self._read):
            threading.Thread(target=step, name=step.__name__.strip("_"), daemon=True).start()
        if self._connect():
            while not self.ending.wait(LOOK_S):
                self.looking_s = time.monotonic()
                self._look()  # raises where the cluster is another one: the next bridge joins that
                self.looking_s = None
                self._tell(None)
            self.close(list(self.links.values()))
        self.ray.shutdown()

    def send(self, event: object) -> None:
        """Send one event; any thread."""
        try:
            with self.lock:
                self.conn.send(event)
        except OSError:
            os._exit(0)

    def _beat(self) -> None:
        while True:
            self.send(Beat(0.0, 1.0))
            for link in list(self.links.values()):
                if link.is_delivering:  # nor does its node's silence mean anything meanwhile
                    link.tell(Beat(0.0, 1.0))
            since_s = self.looking_s
            if since_s and time.monotonic() - since_s > SILENCE_S:
                self._tell("the cluster's head does not answer")
            time.sleep(1)

    def close(self, links: list[Link]) -> None:
        """Have nodes end their workers and empty their spools; one that hangs is not waited for."""
        ends = [link.actor.close.remote() for link in links]
        if ends:
            self.ray.wait(ends, num_returns=len(ends), timeout=CLOSE_S)

    def _tell(self, detail: str | None) -> None:
        if detail != self.told:
            self.told = detail
            self.send(Cut(detail))

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while (order := self.conn.recv()) is not None:
                link = self.by_index.get(order.index)
                if link and order.item is None:
                    threading.Thread(target=link.end, name=f"end-{link.index}", daemon=True).start()
                elif link:
                    link.outbox.put(order.item)
        self.ending.set()
        time.sleep(7.0)
        os._exit(0)  # Ray hangs

    # -- joining
    def _connect(self) -> bool:
        """Join the cluster, or start one; waits for one that is not there. False when told to end."""
        while not self.ending.is_set():
            address = self._address()
            try:
                if address and not _answers(address):
                    raise ConnectionError("nothing answers at its address")
                self.ray.init(address or "local", **self._settings(own=not address))
                self._tell(None)
                if address:
                    self.send(Met(address))
                return True
            # Around an attempt: whatever keeps us from the cluster now, it is tried again.
            except Exception as error:
                if not self.told:
                    log.warning("no Ray cluster at %s: %s; waiting for it", self.address, error)
                self._tell("the cluster is not there; waiting for it")
                self.ray.shutdown()
                self.ending.wait(2.0)
        return False

    def _address(self) -> str | None:
        """host:port of the head; None: start a cluster here."""
        if self.address != "auto":
            return self.address
        from ray._private import services  # what ray.init() does, which waits two minutes for a dead one

        found: str | None = services.canonicalize_bootstrap_address(None)
        # One that is named is waited for; one that only was here may be gone for good.
        return found if found and (os.environ.get("RAY_ADDRESS") or _answers(found)) else None

    def _settings(self, own: bool) -> dict[str, Any]:
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if own:
            settings |= {
                "include_dashboard": False,
                "object_store_memory": STORE_BYTES,
                "_node_ip_address": "127.0.0.1",
                # Ray has 15: pages would stand still while anything else computes on this machine.
                "_system_config": {"worker_niceness": 0},
            }
        return settings

    # -- nodes
    def _look(self) -> None:
        now_s = time.monotonic()
        for place, host in places(self.ray.nodes(), self.choice.device).items():
            if place not in self.links and now_s >= self.not_before_s.get(place, 0.0):
                self._start(place, host)

    def _start(self, place: Place, host: str) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        kind = self.ray.remote(Node).options(
            num_gpus=place.cards,
            num_cpus=place.cores,
            max_concurrency=4,  # give and collect, and one more of each
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False),
        )
        self.indices += 1
        self.send(Joined(self.indices, host, place.cards > 0))
        actor = kind.remote(replace(self.choice, cache_root=None), self.entry, code_hash())
        link = Link(self, self.indices, actor)
        self.links[place] = self.by_index[self.indices] = link
        link.start()

    def lose(self, link: Link, lost: Lost) -> None:
        """An actor is gone, or must be; another takes its place, later each time it does not come up."""
        with contextlib.suppress(Exception):  # of an actor that never was
            self.ray.kill(link.actor)
        link.outbox.put(None)
        self.by_index.pop(link.index, None)
        for place in [place for place, one in self.links.items() if one is link]:
            self.failures[place] = 0 if link.is_up else self.failures[place] + 1
            self.not_before_s[place] = time.monotonic() + min(60.0, 2.0 ** min(6, self.failures[place]))
            del self.links[place]
        self.send(lost)


def _answers(address: str) -> bool:
    """Whether something listens there. Ray takes a loopback address for one of this machine's others too."""
    import ray

    host, _, port = address.rpartition(":")
    hosts = [host.strip("[]")]
    if hosts[0] in ("localhost", "127.0.0.1", "::1"):
        hosts.append(ray.util.get_node_ip_address())
    for one in hosts:
        with contextlib.suppress(OSError), socket.create_connection((one, int(port)), 2.0):
            return True
    return False


def run_bridge(
    address: str, entry: Callable[..., None], conn: Connection, choice: EngineChoice, _slot: int
) -> None:
    """Entry point of the bridge process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=workers.end_with_parent, name="parent", daemon=True).start()
    with contextlib.suppress(OSError):
        os.dup2(2, 1)
    logs.setup(choice.log, "cluster")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing leaves the house
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")  # of a head; then this process ends
    try:
        bridge = Bridge(conn, choice, address, entry)
    except BaseException as error:
        conn.send(BootFailed(f"{type(error).__name__}: {error}"))
        raise SystemExit(3) from error
    bridge.run()
    os._exit(0)
