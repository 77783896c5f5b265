"""Many clients at once, and moments that race: submits, cancels, resumes, deletes, shutdown, clocks.

The real service and worker; where the job table alone is meant, nobody works (serving.still).
"""

from __future__ import annotations

import hashlib
import http.client
import io
import itertools
import json
import random
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import pytest
from client import Client, JobState, Refusal, submission
from load import race_once
from serving import finished, png, queued, running, still, until, volume

import jobs
import server
import settings
from work import retention, submissions, workers
from work.retention import Keep


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Service]:
    config = settings.Config(storage_root=tmp_path_factory.mktemp("concurrency"), port=0)
    with server.Service(config) as running_service:
        yield running_service


@pytest.fixture
def client(service: server.Service) -> Client:
    return Client(service.url)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that start at the same moment, each in a thread of its own."""
    gate = threading.Barrier(len(calls))

    def pass_gate(call: Callable[[], Any]) -> Any:
        gate.wait(10)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(pass_gate, calls))


def over(client: Client, job: str) -> JobState:
    return until(lambda: (state := client.state(job)).is_over and state, 120)


def pages_of(client: Client, job: str) -> list[dict[str, Any]]:
    return json.loads(client.call("GET", f"/jobs/{job}/pages").body)["pages"]


# ---------------------------------------------------------------- submits
def test_fifty_submits_at_once_of_one_title_are_fifty_jobs_and_each_has_its_own_pages(service, client):
    sources = [png(16, 16, shade) for shade in range(50)]
    for n, page in enumerate(sources):
        client.call("PUT", f"/incoming/{n}.zip", volume({"1.png": page}))
    told: list[jobs.Job] = []
    service.table.listeners.append(told.append)
    ids = at_once(*(lambda n=n: client.submit(f"{n}.zip") for n in range(50)))
    states = [over(client, job) for job in ids]
    service.table.listeners.remove(told.append)
    assert len({*ids}) == 50 and {state.status for state in states} == {"SUCCESS"}
    assert {state.metadata.title for state in states} == {"作品名"}
    for job, page in zip(ids, sources, strict=True):
        with zipfile.ZipFile(io.BytesIO(client.call("GET", f"/jobs/{job}/artifact").body)) as archive:
            (item,) = json.loads(archive.read("artifact-report.json"))["items"]
            assert item["source"]["sha256"] == hashlib.sha256(page).hexdigest()
            assert item["sha256"] == hashlib.sha256(archive.read(item["filename"])).hexdigest()
    assert len([*service.config.layout.outputs.glob("*/*/*")]) >= 50
    for job in ids:  # progress only rises, the end is the end
        seen = [(change.processed, change.state) for change in told if change.id == job]
        assert [processed for processed, _ in seen] == sorted(processed for processed, _ in seen)
        assert [state for _, state in seen if state in ("SUCCESS", "FAILED")] == ["SUCCESS"]


def test_identical_submits_at_once_are_one_job_with_a_key_and_many_without(tmp_path):
    with still(tmp_path) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume({"1.png": png()}))

        def submit(**headers: str) -> str:
            reply = client.call("POST", "/jobs", submission("v.zip"), headers)
            assert reply.status == 202
            return reply.json()["jobId"]

        assert len({*at_once(*[lambda: submit(**{"Idempotency-Key": "k"})] * 20)}) == 1
        assert len({*at_once(*[submit] * 20)}) == 20
        assert sum(service.table.counts().values()) == 21


def test_a_submit_during_the_shutdown_is_kept_or_refused_and_never_half(tmp_path):
    """Until the very end: a 202 is in the table of the next start, a 503 is not."""
    kept, refused = [], []

    def submit_on(client: Client) -> None:
        for n in itertools.count():
            title = f"{threading.get_ident()}-{n}"
            try:
                client.submit("v.zip", title=title)
                kept.append(title)
            except Refusal as refusal:
                assert refusal.problem.status == 503, refusal
                refused.append(title)
            except (OSError, http.client.HTTPException):
                return  # the line went: either may be true

    with server.Service(settings.Config(storage_root=tmp_path, port=0)) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume({"1.png": png(16, 16)}))
        threads = [threading.Thread(target=submit_on, args=(client,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: len(kept) > 20)
    for thread in threads:
        thread.join(30)
    with still(tmp_path) as service:
        titles = Counter(job.title for job in service.table.page_of_jobs(None, "", 100_000, None))
    assert {*kept} <= {*titles} and not {*refused} & {*titles}
    assert max(titles.values()) == 1 and refused


def test_two_claimers_of_two_hundred_jobs_claim_each_once_and_in_order(tmp_path):
    with still(tmp_path) as service:
        waiting = [queued(service).id for _ in range(200)]

        def claim_all() -> list[str]:
            claims = iter(lambda: jobs.claim(service.table, 1.0), None)
            return [job.id for job in claims]

        first, second = at_once(claim_all, claim_all)
        assert sorted(first + second) == sorted(waiting)
        for claims in (first, second):
            assert claims == sorted(claims, key=waiting.index)
        assert {job.attempt for job in service.table.in_state(jobs.RUNNING)} == {1}


# ---------------------------------------------------------------- cancel and resume
def test_a_cancel_racing_the_end_leaves_a_whole_artifact_or_none(service, client):
    """Until both came; tests/load.py race does it 500 times."""
    client.call("PUT", "/incoming/race.zip", volume({f"{n}.png": png(16, 16, n) for n in range(2)}))
    rng, guess, ends = random.Random(7), [0.05], Counter[str]()
    while ends.total() < 25 or (len(ends) < 2 and ends.total() < 300):
        ends[race_once(service, "race.zip", rng, guess)] += 1
    assert {*ends} == {"SUCCESS", "FAILED"}
    until(lambda: not [*service.config.layout.staging.iterdir()])


def test_a_waiting_job_that_is_cancelled_never_runs(service, client):
    client.call("PUT", "/incoming/c.zip", volume({f"{n}.png": png(64, 64, n) for n in range(3)}))
    first, second, third = (client.submit("c.zip") for _ in range(3))
    state = client.post(second, "cancel")
    assert (state.status, state.cancelled, state.message) == ("FAILED", True, "Cancelled by user")
    assert [over(client, job).status for job in (first, third)] == ["SUCCESS", "SUCCESS"]
    row = service.table.get(second)
    assert (row.state, row.attempt, row.started_s) == ("FAILED", 0, None)


def test_a_cancel_that_the_worker_does_not_obey_costs_it_its_life_and_not_the_next_job(
    tmp_path, monkeypatch
):
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("FAULTS", str(tmp_path / "notes"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(workers.Slot, "obey_s", 0.2)
    with server.Service(settings.Config(storage_root=tmp_path / "s", port=0), faults.by_width) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume({"1.png": png(), "2.png": png(faults.SLEEPER)}))
        job = client.submit("v.zip")
        until(lambda: (tmp_path / "notes/sleeper").exists() and client.state(job).processed == 1, 60)
        pid = service.dispatcher.workers[0].process.pid
        assert client.post(job, "cancel").cancelled
        assert service.dispatcher.wait_released(job, 10)
        assert [slot.process.pid for slot in service.dispatcher.workers.values()] != [pid]
        assert client.call("GET", f"/jobs/{job}/artifact").status == 409
        assert [page["status"] for page in pages_of(client, job)] == ["upscaled", "pending"]
        assert over(client, client.submit("v.zip")).status == "SUCCESS"


def test_a_job_that_is_over_stays_as_it_is_and_cancel_twice_is_cancel_once(service, client):
    client.call("PUT", "/incoming/o.zip", volume({"1.png": png(16, 16)}))
    done = over(client, client.submit("o.zip"))
    assert client.post(done.job_id, "cancel") == client.post(done.job_id, "resume") == done
    assert client.call("HEAD", f"/jobs/{done.job_id}/artifact").status == 200
    job = client.submit("o.zip")
    assert client.post(job, "cancel") == client.post(job, "cancel") == client.state(job)


def test_a_resume_of_a_job_that_waits_or_runs_changes_nothing_and_starts_nothing(service, client):
    client.call("PUT", "/incoming/r.zip", volume({f"{n}.png": png(96, 96, n) for n in range(6)}))
    runs, waits = client.submit("r.zip"), client.submit("r.zip")
    until(lambda: client.state(runs).processed >= 1, 60)
    for job in (runs, waits):
        assert client.post(job, "resume").retries == 0
    assert [over(client, job).status for job in (runs, waits)] == ["SUCCESS", "SUCCESS"]
    assert [service.table.get(job).attempt for job in (runs, waits)] == [1, 1]


def test_twenty_resumes_at_once_are_one(service, client):
    client.call("PUT", "/incoming/t.zip", volume({"1.png": png(16, 16), "2.png": b"broken"}))
    job = over(client, client.submit("t.zip")).job_id
    before = service.table.get(job).attempt
    client.call("POST", "/queue/pause")  # else it may be over, and be resumed once more, before the last asks
    try:
        replies = at_once(*[lambda: client.post(job, "resume")] * 20)
    finally:
        client.call("POST", "/queue/resume")
    assert {(state.status, state.retries) for state in replies} == {("PENDING", 1)}
    state = over(client, job)
    assert (state.status, state.retries, service.table.get(job).attempt) == ("SUCCESS", 1, before + 1)


def test_cancels_beside_resumes_give_a_legal_sequence_and_an_end(service, client):
    client.call("PUT", "/incoming/x.zip", volume({f"{n}.png": png(16, 16, n) for n in range(3)}))
    job, told = client.submit("x.zip"), []
    service.table.listeners.append(told.append)
    for _ in range(10):
        at_once(*[lambda: client.post(job, "cancel"), lambda: client.post(job, "resume")] * 3)
    client.post(job, "resume")
    state = over(client, job)
    service.table.listeners.remove(told.append)
    states = [change.state for change in told if change.id == job]
    legal = {("PENDING", "RUNNING"), ("PENDING", "FAILED"), ("RUNNING", "RUNNING"), ("RUNNING", "SUCCESS"),
             ("RUNNING", "FAILED"), ("FAILED", "PENDING")}  # fmt: skip
    assert {*itertools.pairwise(states)} <= legal
    assert state.status == "SUCCESS"
    assert [page["status"] for page in pages_of(client, job)] == ["upscaled"] * 3
    assert state.retries == sum(pair == ("FAILED", "PENDING") for pair in itertools.pairwise(states))


# ---------------------------------------------------------------- delete, and the clock
@pytest.mark.parametrize("how", ["deleted", "made anew", "grown old"])
def test_a_download_under_way_ends_whole_with_the_old_bytes(tmp_path, how):
    with still(tmp_path) as service:
        client, data = Client(service.url), random.Random(1).randbytes(32 << 20)  # more than sockets buffer
        job = finished(service, data)
        line = http.client.HTTPConnection(client.host, timeout=30)
        line.request("GET", f"/jobs/{job.id}/artifact")
        answer = line.getresponse()
        read = answer.read(1000)
        path = service.config.layout.artifact(job.title, job.volume, job.id)
        if how == "deleted":
            assert client.call("DELETE", f"/jobs/{job.id}").status == 204
        elif how == "made anew":
            jobs.storage.write_whole(path, b"another artifact")
        else:
            submissions.remove_files(service.config.layout, job, outputs=False)
        assert read + answer.read() == data
        line.close()
        assert client.call("GET", f"/jobs/{job.id}/artifact").status == (404 if how == "deleted" else 410)


@pytest.mark.parametrize("leap_s", [-400 * 86_400.0, 3600.0])
def test_a_clock_set_while_a_job_runs_shows_in_no_duration_and_ages_nothing(tmp_path, monkeypatch, leap_s):
    monkeypatch.setattr(retention, "LOOK_S", 0.01)
    config = settings.Config(storage_root=tmp_path, port=0, keep=Keep(1, 1, 1))
    with server.Service(config) as service:
        client, by = Client(service.url), SimpleNamespace(s=0.0)
        service.table.clock = lambda: time.time() + by.s
        client.call("PUT", "/incoming/v.zip", volume({f"{n}.png": png(64, 64, n) for n in range(8)}))
        told: list[jobs.Job] = []
        service.table.listeners.append(told.append)
        old, job = over(client, client.submit("v.zip")).job_id, client.submit("v.zip")
        until(lambda: client.state(job).processed >= 1, 60)
        by.s = leap_s
        assert over(client, job).status == "SUCCESS"
        time.sleep(0.3)  # some looks of retention
        assert all(change.eta_s is None or 0 <= change.eta_s < 600 for change in told)
        timings = json.loads(client.call("GET", f"/jobs/{job}/report").body)["timings"]
        assert 0 <= timings["wallSeconds"] < 3600 + 600 and timings["pageSecondsTotal"] >= 0
        for one in (old, job):
            state = client.state(one)
            assert state.created_at <= state.started_at <= state.finished_at
            assert client.call("GET", f"/jobs/{one}/artifact").status == 200


def test_a_running_job_is_not_deleted_and_goes_on(tmp_path):
    with still(tmp_path) as service:
        job, client = running(service), Client(service.url)
        assert client.call("DELETE", f"/jobs/{job.id}").problem().code == "JOB_RUNNING"
        assert client.state(job.id).status == "RUNNING"
