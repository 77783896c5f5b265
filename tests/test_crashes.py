"""Rows of checks.md on crashes (C..), and some on states (S..), that no other file has.

Kills at random moments: test_kills.py. A damaged job table: test_rebuild.py. Deaths that a page
causes, hangs: test_dispatch.py. A full disk: test_room.py. Out of memory: test_upscaling.py.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import kills
import pytest
import safetensors.torch
from client import Client, JobList
from conftest import make_hostile
from engines import random_network
from helpers import require
from kills import Service, contents
from serving import png, still, until, volume

import server
import settings
import storage
from engine import models
from files import database

ON_LINUX = sys.platform == "linux"
SMALL = {f"{n}.png": png(48, 64, n) for n in range(6)}


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where faults write down what they did."""
    folder = tmp_path / "faults"
    folder.mkdir()
    monkeypatch.setenv("FAULTS", str(folder))
    return folder


@contextlib.contextmanager
def serving(root: Path, worker: Any = None, **chosen: Any) -> Iterator[tuple[server.Service, Client]]:
    config = settings.Config(storage_root=root, port=0, **chosen)
    with server.Service(config, worker) as service:
        yield service, Client(service.url)


def finish(client: Client, job: str) -> Any:
    """The job's last state."""
    states, _ = client.watch(job)
    return states[-1]


def body_of(client: Client, job: str) -> bytes:
    """The artifact, whose hash must be the promised one."""
    reply = client.call("GET", f"/jobs/{job}/artifact")
    assert reply.status == 200
    digest = storage.hashlib.sha256(reply.body).hexdigest()
    assert digest == client.state(job).artifact_hash
    return reply.body


def pages_of(client: Client, job: str) -> list[dict[str, Any]]:
    pages: list[dict[str, Any]] = client.call("GET", f"/jobs/{job}/pages").json()["pages"]
    return pages


def amid(client: Client) -> str:
    """A job of v.zip whose pages are being computed; one over before it was seen is followed by the next."""
    phase = ""
    while phase != "inferring":
        job = client.submit("v.zip")
        while (phase := client.state(job).phase) not in ("inferring", "done"):
            time.sleep(0.01)
    return job


def leftovers(layout: storage.Layout) -> list[Path]:
    return [*layout.root.rglob("*.tmp"), *layout.staging.iterdir()]


# ---------------------------------------------------------------- the service's own process
@pytest.fixture
def process(tmp_path: Path) -> Iterator[Service]:
    require(ON_LINUX, "processes are found in /proc")
    service = Service(tmp_path / "root")
    yield service
    service.kill()


def test_a_worker_that_still_boots_ends_with_its_killed_service(process):
    """C04. The promise is 5 s; tests/kills.py measures."""
    process.client.call("PUT", "/incoming/v.zip", volume(SMALL))
    process.client.submit("v.zip")
    (worker,) = until(process.workers)
    process.kill()
    until(lambda: not kills.is_alive(worker), 15)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What the artifact of SMALL holds when nothing happens."""
    with serving(tmp_path_factory.mktemp("calm")) as (_, client):
        client.call("PUT", "/incoming/v.zip", volume(SMALL))
        job = client.submit("v.zip")
        assert finish(client, job).status == "SUCCESS"
        return contents(body_of(client, job))


def test_a_service_killed_amid_a_cancel_keeps_the_cancel_and_a_resume_finishes_the_job(process, calm):
    """C05."""
    process.client.call("PUT", "/incoming/v.zip", volume(SMALL))
    job = amid(process.client)
    process.client.post(job, "cancel")
    process.kill()
    process.start()
    state = process.client.state(job)
    assert (state.status, state.cancelled, state.artifact_path) == ("FAILED", True, None)
    until(lambda: not leftovers(process.layout))
    process.client.post(job, "resume")
    assert finish(process.client, job).status == "SUCCESS"
    assert contents(body_of(process.client, job)) == calm


def test_a_service_ended_amid_a_job_exits_with_0_and_goes_on_at_its_next_start(process, calm):
    """C08."""
    process.client.call("PUT", "/incoming/v.zip", volume(SMALL))
    job = amid(process.client)
    (worker,) = process.workers()
    assert process.end() == 0
    until(lambda: not kills.is_alive(worker))
    with process.frozen_table() as table:
        assert table.get(job).state in ("PENDING", "SUCCESS")
    process.start()
    assert finish(process.client, job).status == "SUCCESS"
    assert contents(body_of(process.client, job)) == calm


# The real service, killed by itself before or after a call of the function that is named.
DYING = """
import os, sys
import server
when, (module, _, name) = sys.argv.pop(1), sys.argv.pop(1).rpartition(".")
real = getattr(sys.modules[module], name)
def dying(*arguments):
    if when == "after":
        real(*arguments)
    os.kill(os.getpid(), 9)
setattr(sys.modules[module], name, dying)
sys.exit(server.main())
"""


@pytest.mark.parametrize(("when", "rows"), [("before", 0), ("after", 1)])
def test_a_submit_whose_answer_never_came_is_one_job_when_it_is_repeated(tmp_path, when, rows):
    """C06: killed between commit and answer, or before the commit."""
    body = {"title": "t", "volume": "1", "input": {"type": "zip", "path": "v.zip"}}
    dying = Service(tmp_path, ("-c", DYING, when, "work.submissions.submit"))
    try:
        dying.client.call("PUT", "/incoming/v.zip", volume(SMALL))
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            dying.client.call("POST", "/jobs", body, {"Idempotency-Key": "once"})
    finally:
        dying.kill()
    with still(tmp_path) as service:
        client = Client(service.url)
        found = client.ask(JobList, "GET", "/jobs").jobs
        reply = client.call("POST", "/jobs", body, {"Idempotency-Key": "once"})
        (job,) = client.ask(JobList, "GET", "/jobs").jobs
    assert len(found) == rows and reply.status == 202 and reply.json()["jobId"] == job.job_id


RECOVERY = (
    ("before", "work.rebuild.open_table"),
    ("after", "work.rebuild.open_table"),
    ("before", "jobs.recover"),
    ("before", "jobs.lose_worker"),
    ("after", "jobs.lose_worker"),
    ("before", "storage.remove_tree"),
    ("after", "storage.remove_tree"),
    ("after", "jobs.recover"),
)


def test_a_service_killed_at_every_step_of_its_recovery_recovers_in_the_end(process, calm):
    """C07. A job that is over has left a working copy, which is to be removed."""
    process.client.call("PUT", "/incoming/v.zip", volume(SMALL))
    over = process.client.submit("v.zip")
    assert finish(process.client, over).status == "SUCCESS"
    job = amid(process.client)
    process.kill()
    (process.layout.staging / over).mkdir()
    for when, step in RECOVERY:
        command = [sys.executable, "-c", DYING, when, step, "--port", "0", "--storage-root", process.root]
        done = subprocess.run(command, cwd=kills.ROOT, capture_output=True, timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL, (when, step, done.stderr)
    process.start()
    assert finish(process.client, job).status == "SUCCESS"
    assert contents(body_of(process.client, job)) == calm
    until(lambda: not leftovers(process.layout))


def frozen(pid: int) -> bool:
    """Whether each thread of a process is stopped."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def test_the_job_table_is_whole_and_has_every_acknowledged_job_at_50_instants(process):
    """C14: the service is stopped, its database and log are copied as a crash would leave them."""
    assert process.process is not None
    pid, rng = process.process.pid, random.Random(1)
    process.client.call("PUT", "/incoming/v.zip", volume({"1.png": png(16, 16)}))
    acknowledged = set()
    for _ in range(50):
        acknowledged.add(process.client.submit("v.zip"))
        time.sleep(rng.uniform(0, 0.06))
        os.kill(pid, signal.SIGSTOP)
        try:
            until(lambda: frozen(pid))
            with process.frozen_table() as table:  # checks it, see database._check
                assert {job.id for job in table.page_of_jobs(None, "", 100, None)} == acknowledged
        finally:
            os.kill(pid, signal.SIGCONT)


# ---------------------------------------------------------------- disks
def test_a_submit_that_the_job_table_has_no_room_for_is_507_and_no_row(disk):
    """C10."""
    with still(disk, reserve_bytes=0) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume(SMALL))
        service.dispatcher.reserve_bytes = None  # the estimate would refuse it first
        body = {"title": "t", "volume": "1", "input": {"type": "zip", "path": "v.zip"}}
        with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        replies = [client.call("POST", "/jobs", body | {"title": "x" * 300}) for _ in range(30)]
        accepted = [reply for reply in replies if reply.status == 202]
        refused = [reply.problem() for reply in replies if reply.status != 202]
        assert refused and {(one.status, one.code) for one in refused} == {(507, "DATABASE")}
        assert client.call("GET", "/health").json()["registered_jobs"] == len(accepted)
        (disk / "filler").unlink()
        assert client.call("POST", "/jobs", body).status == 202


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that even root can't write to."""
    require(ON_LINUX and os.geteuid() == 0, "a read-only mount takes root on Linux")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_folder_that_is_read_only_fails_the_job_with_the_reason_and_a_resume_finishes_it(tmp_path, calm):
    """C11."""
    with serving(tmp_path / "root") as (service, client):
        client.call("PUT", "/incoming/v.zip", volume(SMALL))
        for name, pages in (("staging", 0), ("outputs", 0), ("artifacts", len(SMALL))):
            with read_only(tmp_path / "root" / name):
                failed = finish(client, job := client.submit("v.zip"))
            assert (failed.status, service.table.get(job).error_code) == ("FAILED", "DISK"), name
            assert "refused: Read-only file system; see to it and resume the job" in failed.last_error
            assert failed.processed == pages, name
            client.post(job, "resume")
            assert finish(client, job).status == "SUCCESS"
            assert contents(body_of(client, job)) == calm


def test_a_read_only_incoming_is_read_and_an_upload_to_it_is_refused_with_the_reason(tmp_path):
    """C11; what a broken-off upload left there must not keep the dispatcher from its work."""
    incoming = tmp_path / "root/incoming"
    incoming.mkdir(parents=True)
    (incoming / "v.zip").write_bytes(volume(SMALL))
    (incoming / f".reichan-{'0' * 32}.tmp").touch()
    with read_only(incoming), serving(tmp_path / "root") as (_, client):
        problem = client.call("PUT", "/incoming/w.zip", b"x").problem()
        assert (problem.status, problem.code) == (507, "DISK") and "Read-only" in problem.detail
        assert finish(client, client.submit("v.zip")).status == "SUCCESS"


def test_a_read_only_root_stops_the_start_with_one_line(tmp_path):
    """C11."""
    command = [sys.executable, str(kills.ROOT / "server.py"), "--port", "0", "--storage-root"]
    for folder in ("root", "used"):
        root = tmp_path / folder
        if folder == "used":
            with still(root):
                pass
        with read_only(root):
            done = subprocess.run([*command, root], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert "Read-only file system" in done.stderr


@contextlib.contextmanager
def injected(pid: int, fault: str) -> Iterator[None]:
    """Calls of a process that fail: strace's inject=..."""
    calls = fault.partition(":")[0]
    command = ["strace", "-f", "-p", str(pid), "-o", "/dev/null", "-e", f"trace={calls}"]
    tracer = subprocess.Popen(
        [*command, "-e", f"inject={fault}"], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert tracer.stderr is not None
    try:
        line = tracer.stderr.readline()
        require("attached" in line, f"strace can't attach: {line}")
        yield
    finally:
        tracer.terminate()
        tracer.wait(30)
        tracer.stderr.close()


RENAMES = "rename,renameat,renameat2"
# Of each thread the calls from the n-th on fail: when=1 is the working copy's fsync, 2 that of the
# outputs' folder after a page's rename, 3 that of a thread's second page.
FAULTS = {
    "fsync:error=EIO": "Input/output error; see to it",
    "fsync:error=EIO:when=2+": "Input/output error; see to it",
    "fsync:error=EIO:when=3+": "Input/output error; see to it",
    f"{RENAMES}:error=ENOSPC": "No space left on device; make room",
    f"{RENAMES}:error=EACCES": "Permission denied; see to it",
}


def test_a_page_that_the_disk_did_not_take_is_not_done_and_a_resume_computes_it(tmp_path, calm):
    """C12: system calls of the worker fail, one fault after another."""
    require(shutil.which("strace"), "strace is not installed")
    require(ON_LINUX and os.geteuid() == 0, "tracing a worker that gave up rights takes root")
    with serving(tmp_path / "root") as (service, client):
        client.call("PUT", "/incoming/v.zip", volume(SMALL))
        assert finish(client, client.submit("v.zip")).status == "SUCCESS"
        pid = service.dispatcher.workers[0].process.pid
        for fault, reason in FAULTS.items():
            with injected(pid, fault):
                failed = finish(client, job := client.submit("v.zip"))
            assert (failed.status, failed.last_error) == (
                "FAILED", f"the disk refused: {reason} and resume the job",
            ), fault  # fmt: skip
            folder = next(service.config.layout.outputs.glob(f"*/*/{job}"), tmp_path)
            done = [page for page in pages_of(client, job) if page["status"] != "pending"]
            assert all(storage.file_is(folder / page["filename"], page["sha256"]) for page in done), fault
            assert bool(done) == ("when=3" in fault), fault
            until(lambda: not leftovers(service.config.layout))
            client.post(job, "resume")
            assert finish(client, job).status == "SUCCESS"
            assert contents(body_of(client, job)) == calm, fault
        assert service.dispatcher.workers[0].process.pid == pid


# ---------------------------------------------------------------- what is on disk is not what was
def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = (zeroed, cut, flipped, Path.unlink)


def stuck_at_last_page(client: Client, pages: int, model: str) -> str:
    """A job of some pages and one on which the worker sleeps, the others recorded."""
    files = {f"{n}.png": png(48, 64, n) for n in range(pages)} | {"9.png": png(faults.SLEEPER, 64)}
    client.call("PUT", "/incoming/stuck.zip", volume(files))
    job = client.submit("stuck.zip", params={"model": model})
    until(lambda: client.state(job).processed == pages, 60)
    return job


def test_a_worker_that_ignores_a_cancel_is_killed_and_only_missing_or_damaged_pages_are_computed_again(
    tmp_path, notes
):
    """S03, S05, C13."""
    with serving(tmp_path / "root", faults.by_width) as (service, client):
        job = stuck_at_last_page(client, 6, "realesr-animevideov3")
        worker = service.dispatcher.workers[0].process.pid
        state = client.post(job, "cancel")
        assert (state.status, state.cancelled, state.artifact_path) == ("FAILED", True, None)
        assert service.dispatcher.wait_released(job, 30)
        until(lambda: not kills.is_alive(worker))
        folder = next(service.config.layout.outputs.glob(f"*/*/{job}"))
        before = {page["filename"]: (folder / page["filename"]).stat() for page in pages_of(client, job)[:6]}
        for damage, name in zip(DAMAGE, before, strict=False):
            damage(folder / name)
        (notes / "sleeper").write_text("xx")
        client.post(job, "resume")
        assert finish(client, job).status == "SUCCESS"
        after = {name: (folder / name).stat() for name in before}
        fresh = client.submit("stuck.zip")
        assert finish(client, fresh).status == "SUCCESS"
        assert contents(body_of(client, job)) == contents(body_of(client, fresh))
    same = [name for name in before if before[name].st_mtime_ns == after[name].st_mtime_ns]
    assert same == [*before][len(DAMAGE) :]


def test_a_resume_after_the_weights_changed_computes_every_page_with_the_new_ones(tmp_path):
    """S07."""
    weights = tmp_path / "models/own.safetensors"
    weights.parent.mkdir()

    def put(seed: int) -> None:
        network = models.SRVGGNetCompact(8, 1, 2)
        tensors = random_network(network)
        safetensors.torch.save_file({name: t * (1 + seed) for name, t in tensors.items()}, weights)

    put(0)
    with serving(tmp_path / "root", faults.by_width, model_root=weights.parent) as (service, client):
        job = stuck_at_last_page(client, 2, "own")
        first = [page["sha256"] for page in pages_of(client, job)]
        client.post(job, "cancel")
        assert service.dispatcher.wait_released(job, 30)
        put(1)
        client.post(job, "resume")
        assert finish(client, job).status == "SUCCESS"
        fresh = client.submit("stuck.zip", params={"model": "own"})
        assert finish(client, fresh).status == "SUCCESS"
        assert contents(body_of(client, job)) == contents(body_of(client, fresh))
        assert not {*first} & {page["sha256"] for page in pages_of(client, job)}


def test_a_resume_under_another_setting_keeps_to_the_plan_that_the_first_pages_were_made_by(tmp_path):
    """S07."""
    with serving(tmp_path / "root", faults.by_width, precision="fp32") as (service, client):
        job = stuck_at_last_page(client, 2, "realesr-animevideov3")
        client.post(job, "cancel")
        assert service.dispatcher.wait_released(job, 30)
        fresh = client.submit("stuck.zip")
        assert finish(client, fresh).status == "SUCCESS"
        expected = contents(body_of(client, fresh))
    with serving(tmp_path / "root", precision="bf16") as (_, client):
        client.post(job, "resume")
        assert finish(client, job).status == "SUCCESS"
        assert contents(body_of(client, job)) == expected
        other = client.submit("stuck.zip")
        assert finish(client, other).status == "SUCCESS"
        assert contents(body_of(client, other)) != expected


def test_a_worker_that_always_dies_packing_fails_the_job_and_leaves_nothing(tmp_path, notes):
    from work import dispatch

    with serving(tmp_path / "root", faults.dying_amid_the_zip) as (service, client):
        client.call("PUT", "/incoming/v.zip", volume(SMALL))
        failed = finish(client, job := client.submit("v.zip"))
        assert (failed.status, service.table.get(job).error_code) == ("FAILED", "WORKER_DIED")
        assert (notes / "packing").stat().st_size == dispatch.CARELESS_DEATHS
        until(lambda: not leftovers(service.config.layout))
        assert list(service.config.layout.artifacts.iterdir()) == []


def test_a_working_copy_that_vanished_fails_the_job_with_the_reason_and_a_resume_finishes_it(tmp_path, calm):
    with serving(tmp_path / "root", faults.losing_its_working_copy) as (service, client):
        client.call("PUT", "/incoming/v.zip", volume(SMALL))
        failed = finish(client, job := client.submit("v.zip"))
        assert (failed.status, service.table.get(job).error_code) == ("FAILED", "PAGE_LOST")
        assert "1.png" in failed.last_error and "No such file" in failed.last_error
        assert str(tmp_path) not in json.dumps([failed.last_error, pages_of(client, job)])
        client.post(job, "resume")
        assert finish(client, job).status == "SUCCESS"
        assert contents(body_of(client, job)) == calm


# ---------------------------------------------------------------- the table locked, weights, the clock
LOCKING = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
db.execute("ROLLBACK")
"""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process has the database for itself."""
    command = [sys.executable, "-c", LOCKING, str(path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        yield other
    finally:
        other.communicate(timeout=30)


def test_a_locked_database_is_waited_for_and_no_event_is_lost(tmp_path, calm):
    """C16; for 3 s, of the 30 that it waits."""
    with serving(tmp_path / "root") as (service, client):
        client.call("PUT", "/incoming/v.zip", volume(SMALL))
        job = amid(client)
        with locked(service.config.layout.database):
            time.sleep(3)
        second = client.submit("v.zip")
        for one in (job, second):
            assert finish(client, one).status == "SUCCESS"
            assert contents(body_of(client, one)) == calm


def test_a_database_that_stays_locked_refuses_a_submit_with_503_and_no_row(tmp_path, monkeypatch):
    """C16."""
    monkeypatch.setattr(database, "BUSY_S", 0.2)
    with still(tmp_path) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume(SMALL))
        body = {"title": "t", "volume": "1", "input": {"type": "zip", "path": "v.zip"}}
        with locked(service.config.layout.database):
            problem = client.call("POST", "/jobs", body).problem()
            assert (problem.status, problem.code) == (503, "DATABASE")
            assert client.call("GET", "/health").json()["registered_jobs"] == 0
        assert client.call("POST", "/jobs", body).status == 202


def test_hostile_weights_fail_their_job_run_nothing_and_the_service_goes_on(tmp_path):
    """C17: as they come, and vouched for."""
    make_hostile(tmp_path, "weights")
    canary = Path("/tmp/mus-hostile-canary")  # make_hostile's
    assert not canary.exists()
    files = sorted((tmp_path / "weights").iterdir())
    assert len(files) == 10
    lines = [f"{storage.sha256_file(path)}  {path.name}\n" for path in files]
    with serving(tmp_path / "root", model_root=tmp_path / "weights") as (service, client):
        client.call("PUT", "/incoming/v.zip", volume({"1.png": png(16, 16)}))
        submitted = [client.submit("v.zip", params={"model": path.stem}) for path in files]
        for trusted in (False, True):
            if trusted:
                (tmp_path / "weights/trusted.sha256").write_text("".join(lines))
                for job in submitted:
                    client.post(job, "resume")
            for path, job in zip(files, submitted, strict=True):
                assert finish(client, job).status == "FAILED", path.name
                assert service.table.get(job).error_code == "MODEL_BAD", path.name
        assert finish(client, client.submit("v.zip")).status == "SUCCESS"
        assert len(service.dispatcher.workers) == 1
    assert not canary.exists()


def test_a_clock_set_back_makes_no_negative_time_and_loses_no_attempt(tmp_path):
    """C21."""
    with serving(tmp_path / "root") as (service, client):
        client.call("PUT", "/incoming/v.zip", volume(SMALL))
        job = amid(client)
        service.table.clock = lambda: time.time() - 3600
        states, _ = client.watch(job)
        second = client.submit("v.zip")
        assert finish(client, second).status == states[-1].status == "SUCCESS"
        for one in (job, second):
            timings = client.call("GET", f"/jobs/{one}/report").json()["timings"]
            assert timings["wallSeconds"] >= 0 and all(page["seconds"] >= 0 for page in timings["pages"])
            assert service.table.get(one).attempt == 1
        assert [state.seq for state in states] == sorted({state.seq for state in states})
        assert all(state.eta_seconds is None or state.eta_seconds >= 0 for state in states)
        newest = client.ask(JobList, "GET", "/jobs").jobs[0]
        assert newest.job_id == second  # by arrival, not by the clock


def test_another_page_name_time_or_order_is_another_content(calm):
    """What many tests above rest on; a job's id is none."""

    def packed(entries: list[tuple[str, bytes]], when: int = 0) -> list[tuple[Any, ...]]:
        with zipfile.ZipFile(made := io.BytesIO(), "w") as archive:
            for name, data in entries:
                info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, when))
                archive.writestr(info, data.replace(b"JOB", b"another id"))
        return contents(made.getvalue())

    entries = [(name, data) for name, *_, data in calm]
    same = packed(entries)
    assert [(name, data) for name, *_, data in same] == entries
    report, first, *rest = entries
    for other in ([report, *rest, first], [report, (first[0], first[1] + b"0"), *rest], entries[:-1]):
        assert packed(other) != same
    assert packed(entries, when=2) != same
