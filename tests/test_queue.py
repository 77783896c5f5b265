"""Whose turn it is: priorities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import queued, still
from test_service import Client, png, volume

import jobs
import server


@pytest.fixture
def resting(tmp_path: Path) -> Iterator[server.Service]:
    with still(tmp_path) as service:
        yield service


def submitted(client: Client, **fields: object) -> str:
    client.call("PUT", "/incoming/one.zip", volume({"1.png": png(1)}))
    body = {"title": "t", "volume": "1", "input": {"type": "zip", "path": "one.zip"}, **fields}
    status, _, text = client.call("POST", "/jobs", body)
    assert status == 202, text
    return str(json.loads(text)["jobId"])


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
    assert client.state(first)["priority"] == 0
    status, _, text = client.call("POST", f"/jobs/{second}/priority", {"priority": 1})
    assert (status, json.loads(text)["priority"]) == (200, 1)
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
    other, again = queued(resting).id, jobs.resume(resting.table, resting.config.layout, job.id, None)
    assert claimed(resting) == [again.id, other]


def test_the_queue_tells_the_highest_priority_that_waits(resting):
    client = Client(resting.url)
    assert json.loads(client.call("GET", "/queue")[2])["highestPriority"] is None
    submitted(client, priority=None), submitted(client, priority=-3)
    assert json.loads(client.call("GET", "/queue")[2])["highestPriority"] == 0
    claimed(resting)
    assert json.loads(client.call("GET", "/queue")[2])["highestPriority"] is None


@pytest.mark.parametrize("value", [101, -101, 1.5, "1", True])
def test_a_priority_out_of_range_is_refused_and_named(resting, value):
    client, job = Client(resting.url), queued(resting)
    status, _, text = client.call("POST", f"/jobs/{job.id}/priority", {"priority": value})
    assert (status, json.loads(text)["errors"][0]["field"]) == (422, "priority")
    body = {"title": "t", "volume": "1", "input": {"type": "zip", "path": "one.zip"}, "priority": value}
    assert client.call("POST", "/jobs", body)[0] == 422
    assert resting.table.get(job.id).priority == 0


def test_an_unknown_job_has_no_priority(resting):
    job = "00000000-0000-4000-8000-000000000000"
    assert Client(resting.url).call("POST", f"/jobs/{job}/priority", {"priority": 1})[0] == 404
