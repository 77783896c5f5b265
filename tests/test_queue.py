"""Whose turn it is: priorities, and a queue that stands still."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from client import Client, check_artifact, submission
from serving import png, queued, running, still, until, volume

import jobs
import server
import settings
from work import dispatch, submissions


@pytest.fixture
def resting(tmp_path: Path) -> Iterator[server.Service]:
    with still(tmp_path) as service:
        yield service


def submitted(client: Client, **fields: object) -> str:
    client.call("PUT", "/incoming/one.zip", volume({"1.png": png()}))
    return client.submit("one.zip", **fields)


def claimed(service: server.Service) -> list[str]:
    """Every waiting job's id, in the order of their turns."""
    found = []
    while job := jobs.claim(service.table, 0.0):
        found.append(job.id)
    return found


def test_a_higher_priority_goes_first_and_equals_go_in_order_of_arrival(resting):
    client = Client(resting.url)
    first = queued(resting).id
    low, high, last = submitted(client, priority=-5), submitted(client, priority=7), submitted(client)
    assert claimed(resting) == [high, first, last, low]


def test_a_priority_can_be_changed_while_the_job_waits(resting):
    client = Client(resting.url)
    first, second = queued(resting).id, submitted(client)
    assert client.full_state(first)["priority"] == 0
    reply = client.call("POST", f"/jobs/{second}/priority", {"priority": 1})
    assert (reply.status, reply.json()["priority"]) == (200, 1)
    assert claimed(resting) == [second, first]


def test_a_job_that_lost_its_worker_keeps_its_turn(resting):
    first, second = queued(resting), queued(resting)
    claimed_first = jobs.claim(resting.table, 0.0)
    assert claimed_first and claimed_first.id == first.id
    jobs.lose_worker(resting.table, claimed_first, 1.0)
    assert claimed(resting) == [first.id, second.id]


def test_the_same_priority_again_is_no_change(resting):
    job, heard = queued(resting), list[jobs.Job]()
    resting.table.listeners.append(heard.append)
    assert jobs.prioritize(resting.table, job.id, 0) == job and not heard
    assert jobs.prioritize(resting.table, job.id, 1).seq > job.seq and len(heard) == 1


def test_a_finished_job_takes_a_priority_for_when_it_is_resumed(resting):
    job = queued(resting)
    jobs.cancel(resting.table, job.id, 0.0)
    jobs.prioritize(resting.table, job.id, 3)
    config, other = resting.config, queued(resting).id
    again = submissions.resume(resting.table, config.layout, job.id, None, config.limits)
    assert claimed(resting) == [again.id, other]


def test_the_queue_tells_the_highest_priority_that_waits(resting):
    client = Client(resting.url)
    assert client.call("GET", "/queue").json()["highestPriority"] is None
    submitted(client, priority=None), submitted(client, priority=-3)
    assert client.call("GET", "/queue").json()["highestPriority"] == 0
    claimed(resting)
    assert client.call("GET", "/queue").json()["highestPriority"] is None


@pytest.mark.parametrize("value", [101, -101, 1.5, "1", True])
def test_a_priority_out_of_range_is_refused_and_named(resting, value):
    client, job = Client(resting.url), queued(resting)
    reply = client.call("POST", f"/jobs/{job.id}/priority", {"priority": value})
    assert (reply.status, [*reply.faults()]) == (422, ["priority"])
    assert client.call("POST", "/jobs", submission("one.zip") | {"priority": value}).status == 422
    assert resting.table.get(job.id).priority == 0


def test_an_unknown_job_has_no_priority(resting):
    job = "00000000-0000-4000-8000-000000000000"
    assert Client(resting.url).call("POST", f"/jobs/{job}/priority", {"priority": 1}).status == 404


def test_a_running_job_holds_at_a_page_border_over_a_restart_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTS", str(tmp_path))
    pages = {f"{n:02}.png": png(faults.WAITER if n > 1 else 32, shade=n) for n in range(12)}
    config = settings.Config(tmp_path / "root", port=0)
    with server.Service(config, worker=faults.with_leave) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume(pages))
        job = client.submit("v.zip", params={"outputFormat": "png"})
        client.wait(job, lambda state: state.processed > 0)
        waiting = client.submit("v.zip")
        queue = client.call("POST", "/queue/pause").json()
        assert queue == {"paused": True, "waiting": 1, "running": 1, "highestPriority": 0}
        until(lambda: service.dispatcher.paused_s)
        (tmp_path / "go").touch()
        until(lambda: not any(slot.tasks for slot in service.dispatcher.workers.values()))
        held = client.state(job)
        assert held.status == "RUNNING" and held.processed < held.total == len(pages)
        assert held.eta_seconds is None
        assert client.state(waiting).status == "PENDING"
        reader = client.call("POST", "/pages", png(shade=99), {"Content-Type": "image/png"})
        assert reader.headers["x-reichan-page"] == "finished"  # somebody waits for that one
        assert client.state(job).processed == held.processed
    with server.Service(config) as service:
        client = Client(service.url)
        assert client.call("GET", "/health").json()["paused"] is True
        assert client.state(job).status == "PENDING" and not service.dispatcher.workers
        client.post(waiting, "cancel")
        assert client.call("POST", "/queue/resume").json()["paused"] is False
        state = client.wait(job)
        report = check_artifact(client.call("GET", f"/jobs/{job}/artifact").body, state)
    assert [item["status"] for item in report["items"]] == ["upscaled"] * len(pages)
    assert state.processed == len(pages) and state.retries == 0


def test_a_held_job_can_be_cancelled_and_the_pause_is_no_time_of_its_pages(tmp_path):
    with still(tmp_path) as resting:
        dispatcher = resting.dispatcher
        runs = [dispatch.Run(running(resting, title), tmp_path, tmp_path) for title in ("a", "b")]
        dispatcher.runs = {run.job.id: run for run in runs}
        for run in runs:
            run.started_s, run.finished, run.left = time.monotonic() - 10, 5, 5
        resting.table.pause(True)
        dispatcher._see_pause()
        dispatcher.paused_s -= 1000  # so long ago
        for run in runs:
            run.started_s -= 1000
        client = Client(resting.url)
        client.post(runs[0].job.id, "cancel")
        dispatcher._drop_ended_runs()
        assert [*dispatcher.runs.values()] == runs[1:]
        resting.table.pause(False)
        dispatcher._see_pause()
        assert dispatcher.paused_s is None and runs[1].eta_s(time.monotonic()) == pytest.approx(10, abs=5)
