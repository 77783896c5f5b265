"""Beyond one machine: the pages of jobs computed by the nodes of a Ray cluster.

Map: what is said - the dispatcher's side (NodeSlot, ClusterDispatcher) - the service's bridge
     (Bridge, Link, run_bridge) - a node's side (Node)
Rule: Ray is imported by the bridge alone, and runs Node. It ends each process that loses its
cluster: neither the service nor a worker may be one of them.
Runs in: the dispatcher thread; the bridge process; one Ray actor a card, or a node's processor.

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
import importlib.util
import logging
import multiprocessing.connection
import os
import queue
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import logs
import storage
from files import weightfiles
from files.cache import PageCache
from jobs import Job
from messages import (
    AUTO_MODEL,
    Beat,
    BootFailed,
    ComputePage,
    Dropped,
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
from work.dispatch import DIED_TWICE, PAGE_DEATHS, Dispatcher
from work.runs import Run
from work.workers import Slot, WorkerSlot

log = logging.getLogger("cluster")

BRIDGE = 1  # its index beside worker 0
LOOK_S = 1.0  # between two looks at the cluster's nodes
SILENCE_S = 5.0  # after which a head that does not answer counts as gone, in what is told
LOSSES = 3  # of a page with its node; one more, and the page is suspected
BATCH_BYTES = 32 << 20  # of pages in one call
COLLECT_S = 5.0  # a call waits for news; a beat, every second, is none and goes along
CLOSE_S = 2.0  # for a node to leave nothing behind
STORE_BYTES = 256 << 20  # of the object store where the bridge starts a cluster
CODE = (
    "cluster", "storage", "files.inputs", "files.weightfiles", "work.dispatch", "work.workers",
    *storage.PIPELINE,
)  # fmt: skip


def is_installed() -> bool:
    """Whether Ray is here; it is not imported."""
    return importlib.util.find_spec("ray") is not None


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
class Lost:
    """From the bridge, or from a node of its worker: the actor is gone. blame: a worker process died, so that
    a page may be the reason; else the node or the network."""

    index: int
    why: str
    blame: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """From the bridge: why there is no cluster at present; None: there is one."""

    detail: str | None


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


# ---------------------------------------------------------------- the dispatcher's side
class NodeSlot(Slot):
    """A node's worker, reached through the bridge."""

    obey_s = 10.0  # a network lies between

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
        self.address = address  # "auto": the cluster of this machine, started where there is none
        self.nodes: dict[int, NodeSlot] = {}  # by index, as their bridge counts them
        self.cut: str | None = None  # see Cut
        self.bridge_after_s = 0.0  # no new bridge before this moment
        self.settling: dict[str, int] = {}  # job id -> node that was asked for its plan
        self.declined: dict[str, dict[int, Declined]] = {}  # job id -> node -> why not there
        self.losses: Counter[tuple[str, int]] = Counter()  # of (job id, page), see LOSSES

    def health(self) -> dict[str, Any]:
        """What GET /health says: neither names nor addresses."""
        ready = sum(node.capacity > 0 for node in list(self.nodes.values()))
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

    def _turn(self) -> None:
        bridge = self.workers.get(BRIDGE)
        is_due = bool(self.runs) and self.paused_s is None
        if bridge and (is_due or any(node.tasks for node in self.nodes.values())):
            bridge.used_s = time.monotonic()  # an idle one ends, and gives the cards back
        super()._turn()

    def _deal_file_task(self, run: Run) -> bool:
        if run.file_task == "stage" and run.settled is None:
            self._ask_for_plan(run)
            return False
        return super()._deal_file_task(run)

    def _ask_for_plan(self, run: Run) -> None:
        """The plan is settled where pages are computed: a node with a card before one without."""
        self._want_file_slot()  # it loads its libraries meanwhile
        if self.settling.get(run.job.id) in self.nodes or self._is_held(run.job.id):
            return
        able = [node for node in self.nodes.values() if node.is_open()]
        able = [node for node in able if node.index not in self.declined.get(run.job.id, {})]
        if not able:
            self._want_page_slot()
            return
        node = max(able, key=lambda node: (node.has_card, -len(node.tasks)))
        self.settling[run.job.id] = node.index
        node.give(run.key(0), Settle(run.job.id, run.job.attempt, run.job.params, run.job.plan))

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
                if run:
                    run.settled = plan
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

    def _decline(self, node: NodeSlot, event: Declined) -> None:
        """No page of this job for that node. The job fails when no node is left, and an error is why."""
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
                    self.questions.disappoint(key, f"the worker ended: {node.doom or why}")
                continue  # else it is still asked for, and given to another
            run = self.runs.get(key[0])
            if run and run.job.attempt == key[1] and key[2]:
                self._take_back(run, key[2], node.exclusive, blame)

    def _take_back(self, run: Run, n: int, alone: bool, blame: bool) -> None:
        run.in_flight.discard(n)
        self.losses[run.job.id, n] += not blame
        if not blame and self.losses[run.job.id, n] <= LOSSES:
            (run.alone if alone else run.todo).appendleft(n)
            return
        page = replace(run.pages[n], alone=True, deaths=run.pages[n].deaths + alone)
        run.pages[n] = page
        self.table.change_page(run.job.id, n, alone=True, deaths=page.deaths)
        if page.deaths >= PAGE_DEATHS:
            run.give_up(n, "worker_died", DIED_TWICE)
        else:
            run.alone.append(n)

    def _bury(self, slot: WorkerSlot) -> None:
        if slot.index == BRIDGE:
            self.bridge_after_s = time.monotonic() + 2.0
            self.cut = slot.doom or "the connection to the cluster was lost"
            for index in list(self.nodes):
                self._lose_node(self.nodes.pop(index), self.cut, blame=False)
            for run in self.runs.values():  # what it was writing
                storage.sweep_temporaries(run.outputs)
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


@functools.cache
def code_hash() -> str:
    """Of the files that decide how a page will look: nodes must have the service's own."""
    return storage.code_hash(CODE)


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
        self.is_up = False

    def start(self) -> None:
        """Begin to pass things on."""
        for step in (self._send_all, self._receive_all):
            threading.Thread(target=step, name=f"{step.__name__}-{self.index}", daemon=True).start()

    def tell(self, event: Any) -> None:
        """Pass an event on to the dispatcher."""
        self.bridge.send(FromNode(self.index, event))

    def _send_all(self) -> None:
        while True:
            items, size = [self.outbox.get()], 0
            with contextlib.suppress(queue.Empty):
                while items[-1] is not None and size < BATCH_BYTES:
                    size += self._size_of(items[-1])
                    items.append(self.outbox.get_nowait())
            batch = [packed for packed in map(self._packed, filter(None, items)) if packed]
            if batch:
                self.actor.give.remote(batch)
            if items[-1] is None:
                self.bridge.close([self])
                self.bridge.ray.kill(self.actor)  # _receive_all learns of it
                return

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
            with contextlib.suppress(OSError):  # it was just removed: the worker will say so
                stat = file.path.stat()
                stamp = (file.path.name, stat.st_size, stat.st_mtime_ns, trusted)
                if self.weights.get(key) != stamp:
                    self._give_now(Weights(key, file.path.name, trusted), file.path.read_bytes())
                    self.weights[key] = stamp

    def _give_now(self, item: Any, data: bytes | None) -> None:
        """Calls may overtake each other: this one is over before the next begins."""
        with contextlib.suppress(Exception):  # of an actor that is gone: _receive_all learns of it
            self.bridge.ray.get(self.actor.give.remote([(item, data)]))

    def _receive_all(self) -> None:
        lost: Lost | None = None
        while lost is None:
            try:
                for event, data in self.bridge.ray.get(self.actor.collect.remote()):
                    if isinstance(event, Lost):
                        lost = event
                        break
                    self.is_up = self.is_up or isinstance(event, Ready)
                    self._deliver(event, data)
            # Around an attempt: whatever Ray says of an actor that is gone, its pages go elsewhere.
            except Exception as error:
                first = str(error).strip().splitlines()
                lost = Lost(self.index, f"{type(error).__name__}: {first[0] if first else ''}", blame=False)
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
        self.told: str | None = ""  # of Cut, at last
        self.ending = threading.Event()

    def run(self) -> None:
        """Returns when the parent wants no more of it."""
        self.send(Ready(1))
        for step in (self._beat, self._read):
            threading.Thread(target=step, name=step.__name__, daemon=True).start()
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
                if link:
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
        return found if found and _answers(found) else None

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
        self.by_index.pop(link.index, None)
        for place in [place for place, one in self.links.items() if one is link]:
            self.failures[place] = 0 if link.is_up else self.failures[place] + 1
            self.not_before_s[place] = time.monotonic() + min(60.0, 2.0 ** self.failures[place])
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


# ---------------------------------------------------------------- a node's side
PAGE, SOURCE = "page", "source"  # names in the spool, before their suffixes
MODELS = "models"  # its folder for weights


@dataclass(slots=True)
class Spooled:
    """A page that its node has."""

    task: ComputePage  # as it came
    folder: Path


def new_spool() -> Path:
    """A folder for pages on their way. What killed actors left of theirs is removed."""
    for left in Path(tempfile.gettempdir()).glob("reichan-node-*"):
        pid = left.name.split("-")[2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"reichan-node-{os.getpid()}-"))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


class Node:
    """The Ray actor: a worker process like any, and what passes between it and the service.

    Pages are files in between, as the worker knows them: so that it may be the same one, with the rights
    that it gives up, its deadlines, and a death of its own.
    """

    def __init__(self, choice: EngineChoice, entry: Callable[..., None], code: str) -> None:
        if code != code_hash():
            raise RuntimeError("another version of the service is installed on this node")
        self.spool = new_spool()
        self.folders = 0
        self.lock = threading.RLock()  # of all below
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
            batch, size = [], 0
            while self.news and size < BATCH_BYTES:
                batch.append(self.news.popleft())
                size += len(batch[-1][1] or b"")
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
            shutil.rmtree(folder, ignore_errors=True)
            detail = f"the node's disk refused: {storage.reason_of(error)}"
            self._decline(task, storage.DiskRefused.code, detail)
            return
        self.pages[task.job_id, task.attempt, task.n] = Spooled(task, folder)
        self.worker.post(replace(task, source=source, target_stem=folder / PAGE))

    # -- events on their way out
    def _listen(self) -> None:
        worker = self.worker
        while True:
            ready = multiprocessing.connection.wait([worker.conn, worker.process.sentinel])
            with contextlib.suppress(EOFError, OSError):
                while worker.conn.poll():
                    event = worker.conn.recv()
                    with self.lock:
                        self._on_event(event)
            if worker.process.sentinel in ready:
                worker.process.join()
                shutil.rmtree(self.spool, ignore_errors=True)
                self._put(Lost(0, workers.exit_reason(worker.process.exitcode), blame=True))
                return

    def _on_event(self, event: Any) -> None:
        match event:
            case Settled(job_id, 0) | TaskFailed(job_id, 0, 0):  # attempts of jobs are counted from 1
                asked = self.asked[int(job_id.removeprefix("plan ")) - 1]
                self.own[asked] = event
                self._release()
                if isinstance(event, TaskFailed):
                    del self.own[asked]  # ask again, should it ever come back: somebody may have mended it
            case Beat():
                self.beat = event
            case PageDone(job_id, attempt, n) | PageFailed(job_id, attempt, n) | Dropped(job_id, attempt, n):
                spooled = self.pages.pop((job_id, attempt, n), None)
                self._page_ended(event, spooled)
            case TaskFailed(job_id, attempt, n) if n and (job_id, attempt, n) in self.pages:
                spooled = self.pages.pop((job_id, attempt, n))
                shutil.rmtree(spooled.folder, ignore_errors=True)
                if spooled.task.plan is None:
                    self._put(event)
                else:  # no weights, no device, no room: others may have them
                    self._decline(spooled.task, event.code, event.detail)
            case _:
                self._put(event)

    def _page_ended(self, event: Any, spooled: Spooled | None) -> None:
        data = None
        if spooled and isinstance(event, PageDone):
            data = (spooled.folder / event.output).read_bytes()
            if not event.carried:
                event = replace(event, deviation=self._deviation(spooled.task, event.deviation))
        if spooled:
            shutil.rmtree(spooled.folder, ignore_errors=True)
        self._put(event, data)

    def _deviation(self, task: ComputePage, deviation: str | None) -> str | None:
        """What the worker says, and that this machine is another than the plan's."""
        own = self.own.get((task.params, task.plan)) if task.plan else None
        if not isinstance(own, Settled) or task.plan is None:
            return deviation
        differs = task.plan.machine not in ("", own.plan.machine)
        return "; ".join(filter(None, (deviation, f"on {own.plan.machine}" if differs else ""))) or None

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
