"""Pages computed by the nodes of a real Ray cluster: several on this machine, on loopback."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import pytest
from client import Client, JobState, check_artifact
from helpers import require
from serving import PLAN, png, running, still, until, volume
from test_cache import made

import cluster
import jobs
import server
import settings
from commands import verify
from messages import Beat, ComputePage, EngineChoice, Limits, PageDone, Params, Settle, Settled
from work import dispatch, workers
from work.node import Declined, Lost
from work.runs import Run

HERE = Path(__file__).parent
SETTINGS = {
    "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",  # nodes have what the service has, and faults
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its name for: every node on loopback
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # of its own accord 15: other tests beside these would starve the nodes
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}
STORE = {"object_store_memory": 100 << 20, "include_log_monitor": False}
NODE = STORE | {"num_cpus": 1}


@dataclass
class Ring:
    """A Ray cluster whose head computes nothing."""

    place: Path
    port: int = 0
    ray: Any = None

    def start(self) -> None:
        """Start the head, at the port it had before."""
        from ray.cluster_utils import Cluster

        if not self.port:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
        head = STORE | {"num_cpus": 0, "include_dashboard": False, "no_monitor": True,
                "node_ip_address": "127.0.0.1", "gcs_server_port": self.port}  # fmt: skip
        self.ray = Cluster(initialize_head=True, head_node_args=head)

    def stop(self) -> None:
        """End all of its processes, and see that they are gone."""
        nodes = [*self.ray.worker_nodes, self.ray.head_node]
        pids = [info.process.pid for node in nodes for one in node.all_processes.values() for info in one]
        self.ray.shutdown()
        for pid in pids:
            until(lambda pid=pid: not Path(f"/proc/{pid}/cmdline").exists()
                  or not Path(f"/proc/{pid}/cmdline").read_bytes(), 20)  # fmt: skip

    @property
    def address(self) -> str:
        """For REICHAN_CLUSTER."""
        return f"127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def ring() -> Iterator[Ring]:
    """The cluster that the tests share, and its nodes."""
    require(importlib.util.find_spec("ray") and sys.platform == "linux", "Ray is not installed: .[cluster]")
    place = Path(tempfile.mkdtemp(prefix="ring-"))  # short: Ray's sockets lie in it
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        patch.setenv("FAULTS", str(place))
        patch.setenv("TMPDIR", str(place))
        patch.setenv("HOME", str(place))  # where Ray keeps its token
        made = Ring(place)
        made.start()
        try:
            yield made
        finally:
            made.stop()
            shutil.rmtree(place)


def nodes(ring: Ring, count: int) -> list[Any]:
    """So many nodes of one core each, those that earlier tests left where there are any."""
    left = list(ring.ray.worker_nodes)
    for node in left[count:]:
        ring.ray.remove_node(node)
    return left[:count] + [ring.ray.add_node(**NODE, wait=False) for _ in range(count - len(left))]


@contextlib.contextmanager
def serving(
    root: Path, address: str | None, worker: Callable[..., None] | None = None, **chosen: Any
) -> Iterator[tuple[server.Service, Client]]:
    """A service over this cluster."""
    config = settings.Config(storage_root=root, port=0, cluster=address, **chosen)
    with server.Service(config, worker) as service:
        yield service, Client(service.url)


def niceness_of_nodes() -> set[int]:
    """Of all processes that compute for a cluster."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::Node"):
                found.add(os.getpriority(os.PRIO_PROCESS, int(path.parent.name)))
    return found


def mixed() -> bytes:
    """A volume of 16 pages of several sizes, and one that no decoder reads."""
    pages = {f"{n:02}.png": png(96 + 16 * (n % 3), 128, n) for n in range(16)}
    return volume(pages | {"07a.png": b"\x89PNG\r\n\x1a\n broken"})


def facts(client: Client, state: JobState) -> dict[str, Any]:
    """A finished job's report, without what differs between two jobs."""
    assert state.status == "SUCCESS", state
    report = check_artifact(client.call("GET", f"/jobs/{state.job_id}/artifact").body, state)
    return {key: value for key, value in report.items() if key not in ("jobId", "outputDir")}


def run(client: Client, data: bytes, name: str = "v.zip") -> dict[str, Any]:
    client.call("PUT", f"/incoming/{name}", data)
    return facts(client, client.wait(client.submit(name)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one machine makes of mixed()."""
    with serving(tmp_path_factory.mktemp("alone"), None) as (_, client):
        return run(client, mixed())


# ---------------------------------------------------------------- with Ray
def test_pages_and_report_are_those_of_one_machine(tmp_path, ring, alone):
    nodes(ring, 2)
    with serving(tmp_path, ring.address) as (service, client):
        # Nodes start with the first page; one could compute a whole volume before the other is up.
        run(client, volume({"1.png": png()}), "first.zip")
        until(lambda: sum(bool(node.capacity) for node in service.dispatcher.nodes.values()) == 2, 60)
        client.call("PUT", "/incoming/v.zip", mixed())
        job = client.submit("v.zip")
        shared = until(lambda: sum(bool(node.tasks) for node in service.dispatcher.nodes.values()) == 2, 60)
        assert facts(client, client.wait(job)) == alone and shared
        assert client.call("GET", "/health").json()["cluster"]["devices"] == 2
        page = client.call("POST", "/pages?outputFormat=png", png(), {"Content-Type": "image/png"}).body
        assert page[16:24] == struct.pack(">II", 64, 96), "a reader's page is computed there too"
        spools = [path for path in ring.place.glob("reichan-node-*") if any(path.iterdir())]
        assert not spools
    until(lambda: not [*ring.place.glob("reichan-node-*")])


def test_own_weights_go_to_the_nodes_and_repeated_pages_do_not(tmp_path, ring):
    pages = {f"{n}.png": png(96, 128, n) for n in range(3)}
    weights = tmp_path / "models/own.safetensors"
    weights.parent.mkdir()
    nodes(ring, 1)
    with serving(tmp_path, ring.address, job_cache_bytes=1 << 20) as (service, client):
        made_of(weights, seed=1)
        _, computed, _ = made(client, pages, model="own")
        again, *same = made(client, pages, model="own")
        assert same == [computed, 3]
        assert json.loads(service.table.get(again).forecast)["workload"]["cached"] == 3
        made_of(weights, seed=2)
        _, other, from_cache = made(client, pages, model="own")
        assert from_cache == 0 and not [name for name in computed if computed[name] == other[name]]
        state = client.wait(client.submit("v.zip", params={"model": "own", "container": "cbz"}))
        book = client.call("GET", f"/jobs/{state.job_id}/artifact").body
    (tmp_path / "v.cbz").write_bytes(book)
    with zipfile.ZipFile(tmp_path / "v.cbz") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        assert {name: archive.read(name) for name in names} == {name: other[name] for name in names}
    sources = str(tmp_path / "incoming/v.zip")
    assert len(names) == 3 and verify.main(["verify", str(tmp_path / "v.cbz"), "--against", sources]) == 0


def made_of(path: Path, seed: int) -> None:
    """Weights of a small network, drawn."""
    import safetensors.torch
    import torch

    from engine import models

    torch.manual_seed(seed)
    safetensors.torch.save_file(models.SRVGGNetCompact(8, 1, 2).state_dict(), path)


def test_a_cluster_of_its_own_gives_the_same(tmp_path, ring, alone, monkeypatch):
    """auto, where no cluster runs: none is found under another folder of Ray's."""
    monkeypatch.setenv("RAY_TMPDIR", str(ring.place / "own"))
    monkeypatch.delenv("RAY_worker_niceness")
    with serving(tmp_path, "auto") as (_, client):
        assert run(client, mixed()) == alone
        assert niceness_of_nodes() == {os.nice(0)}, "as a worker of this machine has it"


def test_a_page_that_kills_its_workers_is_carried_and_costs_the_job_no_attempt(tmp_path, ring):
    pages = {f"{n}.png": png(width, shade=n) for n, width in enumerate((32, faults.KILLER, 33, 34))}
    nodes(ring, 2)
    with serving(tmp_path, ring.address, faults.by_width) as (service, client):
        client.call("PUT", "/incoming/v.zip", volume(pages))
        state = client.wait(job := client.submit("v.zip"))
        items = facts(client, state)["items"]
        assert service.table.get(job).attempt == 1
    assert [item["status"] for item in items] == ["upscaled", "carried", "upscaled", "upscaled"]
    assert "died twice" in items[1]["error"]


def test_a_node_added_halfway_takes_pages_and_one_killed_halfway_loses_none(tmp_path, ring, alone):
    running = nodes(ring, 1)
    with serving(tmp_path, ring.address, faults.held_up) as (service, client):
        (ring.place / "go").unlink(missing_ok=True)
        client.call("PUT", "/incoming/v.zip", mixed())
        job = client.submit("v.zip")
        busy = lambda: [node for node in service.dispatcher.nodes.values() if node.tasks]  # noqa: E731
        first = until(busy, 60)[0]
        ring.ray.add_node(**NODE, wait=False)
        until(lambda: len(busy()) == 2, 60)
        ring.ray.remove_node(running[0], allow_graceful=False)
        # Its worker lives on for a moment, and could still end what it holds.
        until(lambda: first.index not in service.dispatcher.nodes, 60)
        (ring.place / "go").touch()
        assert facts(client, client.wait(job)) == alone
        assert service.table.get(job).attempt == 1


def test_two_jobs_share_the_nodes_a_third_waits_and_cancel_reaches_them(tmp_path, ring, monkeypatch):
    monkeypatch.setattr(workers, "STRANGERS_PAGES", 1 << 10)  # their pace is not what is looked at
    nodes(ring, 2)
    worker = faults.held_up_on_unlike_machines
    with serving(tmp_path, ring.address, worker, max_concurrency=2) as (service, client):
        (ring.place / "go").unlink(missing_ok=True)
        client.call("PUT", "/incoming/v.zip", mixed())
        jobs = [client.submit("v.zip") for _ in range(3)]

        def held() -> list[int]:
            keys = [key for node in service.dispatcher.nodes.values() for key in node.tasks]
            return [sum(key[0] == job for key in keys) for job in jobs]

        client.wait(jobs[1], lambda state: state.phase == "inferring")
        until(lambda: sum(node.capacity > 0 for node in service.dispatcher.nodes.values()) == 2, 60)
        room = sum(node.capacity for node in service.dispatcher.nodes.values())
        until(lambda: sum(held()) == room)
        for n in range(room // 2):  # what these pages leave goes to the job that has fewer
            (ring.place / f"pass{n}").touch()
        until(lambda: held() == [room // 2, room // 2, 0])
        assert client.state(jobs[2]).status == "PENDING"
        for job in jobs[:2]:
            client.call("POST", f"/jobs/{job}/cancel")
        (ring.place / "go").touch()
        assert all(service.dispatcher.wait_released(job, 20) for job in jobs[:2])
        items = facts(client, client.wait(jobs[2]))["items"]
        machines = {(item.get("deviation") or "the plan's").rpartition(", ")[2] for item in items}
        assert len(machines) == 2 and "the plan's" in machines, "the report says which pages are another's"
        done = [sum(page.status != "pending" for page in service.table.pages(job)) for job in jobs]
        assert max(done[:2]) < done[2] == 17


def test_the_service_waits_for_a_head_that_restarts_and_goes_on(tmp_path, ring, alone):
    """The whole cluster goes with its head, as without a database of Ray's; the job keeps its pages."""
    own = Ring(ring.place)
    own.start()
    try:
        own.ray.add_node(**NODE, wait=False)
        with serving(tmp_path, own.address, faults.held_up) as (service, client):
            (ring.place / "go").unlink(missing_ok=True)
            client.call("PUT", "/incoming/v.zip", mixed())
            job = client.submit("v.zip")
            for n in range(5):
                (ring.place / f"pass{n}").touch()
            client.wait(job, lambda state: state.processed == 5)
            own.stop()
            health = lambda: client.call("GET", "/health").json()["cluster"]  # noqa: E731
            until(lambda: "waiting for it" in (health()["detail"] or ""), 90)
            state = client.state(job)
            assert (health()["status"], state.status, state.processed) == ("waiting", "RUNNING", 5)
            (ring.place / "go").touch()
            own.start()
            own.ray.add_node(**NODE, wait=False)
            assert facts(client, client.wait(job)) == alone
            assert service.table.get(job).attempt == 1
    finally:
        own.stop()


# ---------------------------------------------------------------- without
def test_a_paused_queue_lets_the_bridge_grow_idle(tmp_path):
    """Though jobs run: the nodes give their cards back."""
    with still(tmp_path) as service:
        config = service.config
        made = cluster.ClusterDispatcher("auto", service.table, config.layout, EngineChoice(), 1)
    bridge = SimpleNamespace(used_s=0.0, tasks=())
    made.workers[cluster.BRIDGE], made.runs["job"] = bridge, None
    made.paused_s = 1.0
    made._keep_bridge()
    assert bridge.used_s == 0.0
    made.paused_s = None
    made._keep_bridge()
    assert bridge.used_s > 0.0


def test_a_plan_that_no_machine_follows_any_more_is_settled_anew_after_a_while(tmp_path, monkeypatch):
    """The machine with the card is off: a job that began on it is not to hold up the queue for ever."""
    with still(tmp_path) as service:
        table, config = service.table, service.config
        made = cluster.ClusterDispatcher("auto", table, config.layout, EngineChoice(), 1)
        given: list[Any] = []
        bridge = SimpleNamespace(post=given.append, used_s=0.0, tasks={}, capacity=1)
        node = cluster.NodeSlot(3, "host", False, bridge)
        node.capacity, made.nodes[3] = 4, node
        job = running(service)
        made.runs[job.id] = Run(job, tmp_path, tmp_path)
        made._hear(node, Declined(job.id, job.attempt, 1, None, "it would compute in fp32, not by fp16"))
        made._see_unfollowed()
        assert made.health()["status"] == "waiting" and "no machine" in made.health()["detail"]
        assert "no machine" in table.get(job.id).message and table.get(job.id).state == jobs.RUNNING
        monkeypatch.setattr(cluster, "UNFOLLOWED_S", -1.0)
        made._see_unfollowed()
        assert (table.get(job.id).state, table.get(job.id).message) == (jobs.PENDING, None)
        made.runs[job.id] = run = Run(jobs.claim(table, 2000.0), tmp_path, tmp_path)
        monkeypatch.setattr(made, "_want_file_slot", lambda: None)
        made._ask_for_plan(run)
        assert given[-1].item.plan is None and run.job.plan == PLAN
        made._hear(node, Settled(job.id, run.job.attempt, PLAN))
        assert run.settled == PLAN and not made.unplanned


def of_two_nodes(service: server.Service, *cards: bool) -> cluster.ClusterDispatcher:
    """A dispatcher with nodes 3 and 4, of which some have a card."""
    made = cluster.ClusterDispatcher("auto", service.table, service.config.layout, EngineChoice(), 1)
    for index, has_card in zip((3, 4), cards or (False, False), strict=True):
        made.nodes[index] = cluster.NodeSlot(index, "host", has_card, SimpleNamespace(post=lambda _: None))
        made.nodes[index].capacity = 4
    return made


def test_when_the_one_machine_that_could_is_lost_it_is_told_and_the_plan_settled_anew(tmp_path, monkeypatch):
    with still(tmp_path) as service:
        made, job = of_two_nodes(service), running(service)
        made.runs[job.id] = run = Run(job, tmp_path, tmp_path)
        run.todo.append(1)
        made._hear(made.nodes[3], Declined(job.id, job.attempt, 1, None, "it would compute otherwise"))
        made._see_unfollowed()
        assert service.table.get(job.id).message is None
        made._handle(SimpleNamespace(), Lost(4, "switched off", False))
        made._see_unfollowed()
        assert "no machine" in service.table.get(job.id).message and made.health()["status"] == "waiting"
        monkeypatch.setattr(cluster, "UNFOLLOWED_S", -1.0)
        made._see_unfollowed()
        assert service.table.get(job.id).state == jobs.PENDING
        # While the head is away, or with nothing left to compute, nobody waits for a follower.
        made.runs[job.id] = run = Run(jobs.claim(service.table, 2000.0), tmp_path, tmp_path)
        run.settled, run.file_task = PLAN, "pack"
        made._decline(made.nodes[3], Declined(job.id, run.job.attempt, 1, None, "late"))
        made.unfollowed_s.clear()
        made._see_unfollowed()
        assert not made.unfollowed_s


def test_a_plan_waits_for_the_machine_with_the_card_while_that_starts_or_is_busy(tmp_path, monkeypatch):
    """A plan without a card none of the cards could follow."""
    with still(tmp_path) as service:
        made, job = of_two_nodes(service, False, True), running(service)
        made.runs[job.id] = run = Run(job, tmp_path, tmp_path)
        wanted: list[str] = []  # neither worker nor bridge is to start here
        for name in ("_want_file_slot", "_want_page_slot"):
            monkeypatch.setattr(made, name, functools.partial(wanted.append, name))
        card = made.nodes[4]
        for hinder in ({"capacity": 0}, {"exclusive": True}):
            wanted.clear()
            with monkeypatch.context() as now:
                for name, value in hinder.items():
                    now.setattr(card, name, value)
                made._ask_for_plan(run)
            assert not made.settling and "_want_page_slot" in wanted
        made._ask_for_plan(run)
        assert made.settling == {job.id: 4}
        made.settling.clear()
        card.free(run.key(0))
        card.doom = "it did not come up"
        made._ask_for_plan(run)
        assert made.settling == {job.id: 3}


def test_a_card_that_torch_cannot_use_makes_no_plan_for_those_that_it_can(tmp_path, monkeypatch):
    with still(tmp_path) as service:
        made, job = of_two_nodes(service, True, True), running(service)
        made.runs[job.id] = run = Run(job, tmp_path, tmp_path)
        monkeypatch.setattr(made, "_want_file_slot", lambda: None)
        made._ask_for_plan(run)
        assert made.settling == {job.id: 3}
        by_processor = replace(PLAN, device="cpu", tile=77)
        made._hear(made.nodes[3], Settled(job.id, job.attempt, by_processor))
        assert run.settled is None and not made.nodes[3].has_card
        made._ask_for_plan(run)
        assert made.settling == {job.id: 4}
        # Where no card is left that torch could use, or for a job that began so, it is the plan.
        made._hear(made.nodes[4], Settled(job.id, job.attempt, by_processor))
        assert run.settled == by_processor
        made.nodes[3].has_card = made.nodes[4].has_card = True
        job = replace(job, plan=by_processor)
        made.runs[job.id] = run = Run(job, tmp_path, tmp_path)
        made._hear(made.nodes[3], Settled(job.id, job.attempt, by_processor))
        assert run.settled == by_processor and made.nodes[3].has_card


def test_a_plan_that_ends_every_worker_that_is_to_settle_it_fails_its_job(tmp_path, monkeypatch):
    with still(tmp_path) as service:
        made, job = of_two_nodes(service), running(service)
        made.runs[job.id] = run = Run(job, tmp_path, tmp_path)
        monkeypatch.setattr(made, "_want_file_slot", lambda: None)
        for _ in range(dispatch.CARELESS_DEATHS):
            assert service.table.get(job.id).state == jobs.RUNNING
            made._ask_for_plan(run)
            made._lose_node(made.nodes[made.settling[job.id]], "killed for its memory", True)
            for node in made.nodes.values():
                node.tasks.clear()
        lost = service.table.get(job.id)
        assert lost.state == jobs.FAILED and "killed for its memory" in lost.last_error


def test_with_the_bridge_goes_what_it_was_writing_and_nothing_of_a_worker_here(tmp_path, monkeypatch):
    with still(tmp_path) as service:
        made, left = of_two_nodes(service), []
        monkeypatch.setattr(cluster.Dispatcher, "_bury", lambda *_: None)
        made.workers[0] = SimpleNamespace(tasks={})
        for name in ("packed", "computed"):
            (tmp_path / name).mkdir()
            job = running(service)
            made.runs[job.id] = Run(job, tmp_path, tmp_path / name)
            left.append(tmp_path / name / f".reichan-{'0' * 32}.tmp")
            left[-1].touch()
        made.workers[0].tasks[next(iter(made.runs.values())).key(0)] = None
        made._bury(SimpleNamespace(index=cluster.BRIDGE, doom="lost"))
        assert [path.exists() for path in left] == [True, False]
        made.workers.clear()


def test_a_place_where_nothing_comes_up_is_tried_for_ever():
    place, ended = "host", []
    link = SimpleNamespace(actor=None, outbox=SimpleNamespace(put=ended.append), index=7, is_up=False)
    bridge = SimpleNamespace(by_index={7: link}, links={place: link}, not_before_s={}, send=ended.append)
    bridge.failures = {place: 5000}
    cluster.Bridge.lose(bridge, link, Lost(7, "out of memory", False))
    assert not bridge.links and bridge.failures[place] == 5001


def test_a_plan_whose_machine_comes_back_is_kept(tmp_path):
    with still(tmp_path) as service:
        made = of_two_nodes(service)
        job, back = running(service), made.nodes.pop(4)
        made.runs[job.id] = Run(job, tmp_path, tmp_path)
        made._hear(made.nodes[3], Declined(job.id, job.attempt, 1, None, "it would compute otherwise"))
        made._see_unfollowed()
        assert made.unfollowed_s
        made.nodes[5] = cluster.NodeSlot(5, "host", True, SimpleNamespace())  # asked for, as often before
        made._see_unfollowed()
        assert made.unfollowed_s
        made.nodes[4] = back
        made._see_unfollowed()
        assert not made.unfollowed_s and service.table.get(job.id).message is None
        assert made.health()["status"] == "ready"


class Stuck:
    """An actor's method that fails, or never returns."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.called = error, threading.Event()

    def remote(self, *_: Any) -> None:
        self.called.set()
        if self.error:
            raise self.error
        threading.Event().wait(30)


@pytest.mark.parametrize("error", [RuntimeError("the object store is full (injected)"), None])
def test_a_node_that_can_be_told_nothing_more_is_lost_not_waited_for(tmp_path, error):
    lost, killed = threading.Event(), threading.Event()
    why: list[Any] = []
    never = SimpleNamespace(remote=lambda: None)
    actor = SimpleNamespace(give=Stuck(error), collect=never, close=never)
    ray = SimpleNamespace(get=lambda *_, **__: threading.Event().wait(30), kill=lambda _: killed.set())
    bridge = SimpleNamespace(ray=ray, cache=None, close=lambda _: None)
    bridge.lose = lambda link, reason: (why.append(reason), lost.set())
    link = cluster.Link(bridge, 7, actor)
    threading.Thread(target=link._send_all, daemon=True).start()
    link.outbox.put(Settle("job", 1, Params(model="no model"), None))
    bridge.choice = EngineChoice(model_root=tmp_path)
    assert actor.give.called.wait(10)
    if error:
        assert lost.wait(10) and "object store is full" in why[0].why and not why[0].blame
    else:
        link.end()  # as the dispatcher's kill does
        assert killed.is_set()


@pytest.mark.parametrize("what", ["pages", "weights"])
def test_what_a_node_did_not_take_is_not_waited_for(tmp_path, what):
    """Its call failed, though the node lives; or took too long. It is a TimeoutError: no file's fault."""
    lost, why = threading.Event(), []

    def get(call: str, timeout: float | None = None) -> list[Any]:
        if call == "given" or lost.is_set():
            raise TimeoutError("first\n  where\nthe line broke (injected)")
        time.sleep(0.01)
        return []

    actor = SimpleNamespace(give=SimpleNamespace(remote=lambda _: "given"))
    actor.collect = SimpleNamespace(remote=lambda: "collected")
    ray = SimpleNamespace(get=get, wait=lambda refs, timeout: (refs, []))
    bridge = SimpleNamespace(ray=ray, cache=None, choice=EngineChoice(model_root=tmp_path))
    bridge.lose = lambda link, reason: (why.append(reason.why), link.outbox.put(None), lost.set())
    link = cluster.Link(bridge, 7, actor)
    if what == "weights":
        (tmp_path / "own.safetensors").write_bytes(b"x")
    link.outbox.put(Settle("job", 1, Params(model="own"), None))
    link.start()
    assert lost.wait(10) and "the line broke (injected)" in why[0] and not link.weights
    assert why[0].startswith("it can't be given more") == (what == "weights")


def test_while_pages_are_written_here_their_node_s_silence_means_nothing(monkeypatch):
    sent: list[Any] = []

    def nap(_: float) -> None:
        raise InterruptedError

    monkeypatch.setattr(cluster.time, "sleep", nap)
    link = SimpleNamespace(is_delivering=True, tell=sent.append)
    bridge = SimpleNamespace(send=sent.append, links={1: link, 2: SimpleNamespace(is_delivering=False)})
    bridge.looking_s = None
    with pytest.raises(InterruptedError):
        cluster.Bridge._beat(bridge)
    assert sent == [Beat(0.0, 1.0), Beat(0.0, 1.0)]


def test_a_slow_disk_holds_back_the_node(tmp_path, monkeypatch):
    """While a page is being written no more are collected, and none is told of as done."""
    told, writing, free = [], threading.Event(), threading.Event()
    page = ComputePage("job", 1, 1, tmp_path, tmp_path / "1", Params(), PLAN, Limits())
    done = PageDone("job", 1, 1, "page.jpg", hashlib.sha256(b"x").hexdigest(), 1, 1, 1, "L", 0.1)
    calls = iter([[(done, b"x")]])
    ray = SimpleNamespace(get=lambda call: next(calls), kill=lambda actor: None)
    collect = SimpleNamespace(collect=SimpleNamespace(remote=lambda: told.append("asked")))
    lost = threading.Event()
    bridge = SimpleNamespace(ray=ray, send=told.append, close=lambda _: None, lose=lambda *_: lost.set())
    bridge.cache = None
    link = cluster.Link(bridge, 7, collect)
    link.pages["job", 1, 1] = page, None
    write = cluster.storage.write_whole

    def slow(target: Path, data: bytes) -> str:
        writing.set()
        assert free.wait(10)
        return write(target, data)

    monkeypatch.setattr(cluster.storage, "write_whole", slow)
    link.start()
    assert writing.wait(10) and told == ["asked"]
    free.set()
    assert lost.wait(10)  # it asked again, and there was no more
    link.outbox.put(None)
    assert told[1:] == [cluster.FromNode(7, replace(done, output="1.jpg")), "asked"]
    assert (tmp_path / "1.jpg").read_bytes() == b"x"


def test_the_service_itself_never_imports_ray(tmp_path):
    """Not even with the setting: the bridge does."""
    code = (
        "import sys, server, settings; from pathlib import Path\n"
        "config = settings.Config(storage_root=Path(sys.argv[1]), port=0, cluster='auto')\n"
        "with server.Service(config) as one:\n"
        "    assert one.dispatcher.health()['status'] == 'idle'\n"
        "sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=HERE.parent, check=False)
    assert done.returncode == 0
