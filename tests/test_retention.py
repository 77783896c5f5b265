"""What age removes, by injected clocks: only what a setting names, only from jobs that are over."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from client import Client
from serving import finished, png, queued, running, still, until, volume

import jobs
import server
import settings
from work import retention, submissions
from work.retention import DAY_S, LOOK_S, Keep, Retention

ENDED_S = 2000.0  # when serving.finished() ends its jobs
ALL = Keep(1, 1, 1)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A service at rest whose clocks the test moves: time to see, and time that passes."""
    with still(tmp_path) as service:
        world = SimpleNamespace(service=service, table=service.table, layout=service.config.layout)
        world.wall_s, world.passed_s = ENDED_S, 0.0
        service.table.clock = lambda: world.wall_s
        world.client = Client(service.url)
        yield world


def ended(world: Any, container: str = "zip") -> jobs.Job:
    """A finished job with a page, an artifact, a preview."""
    job = finished(world.service, container=container)
    folder = world.layout.output_dir(job.title, job.volume, job.id)
    for path in (folder / "1.png", world.layout.previews / job.id / "1.jpg"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"page")
    source = ("1.png", "1.png", "0" * 64, 1, None, "1")
    world.table.replace_pages(
        job.id, [jobs.Page(job.id, 1, *source, "upscaled", "1.png", "1" * 64, 4, 1, 1, "L")]
    )
    return job


def left(world: Any, job: jobs.Job) -> str:
    """Which things of a job are there: o(utputs), a(rtifact), j(ob's row), p(review)."""
    there = {
        "o": world.layout.output_dir(job.title, job.volume, job.id).exists(),
        "a": world.layout.artifact(job.title, job.volume, job.id, job.params.container).exists(),
        "j": job.id in world.table.ids_over(),
        "p": (world.layout.previews / job.id).exists(),
    }
    return "".join(letter for letter, is_there in there.items() if is_there)


def keeper(world: Any, keep: Keep) -> Retention:
    return Retention(world.table, world.layout, keep, lambda: world.passed_s)


def live_through(world: Any, keeper: Retention, days: float, looks: int = 2) -> None:
    """Both clocks go on by `days`; then this many looks, LOOK_S apart, with turns between."""
    world.wall_s += days * DAY_S
    world.passed_s += days * DAY_S
    for _ in range(looks):
        for _ in range(5):
            keeper.turn()
        world.wall_s += LOOK_S
        world.passed_s += LOOK_S


@pytest.mark.parametrize(
    ("keep", "days", "expected"),
    [
        (Keep(), 36_500, "oajp"),
        (Keep(outputs_days=2), 1.9, "oajp"),
        (Keep(outputs_days=2), 2.1, "aj"),
        (Keep(artifacts_days=2), 1.9, "oajp"),
        (Keep(artifacts_days=2), 2.1, "ojp"),
        (Keep(outputs_days=1, artifacts_days=5), 3, "aj"),
        (Keep(outputs_days=1, artifacts_days=5), 6, "j"),
        (Keep(jobs_days=2), 1.9, "oajp"),
        (Keep(jobs_days=2), 2.1, ""),
        (Keep(1, 1, 2), 3, ""),
    ],
)
def test_age_removes_what_a_setting_names_and_nothing_else(world, keep, days, expected):
    job, upload = ended(world), world.layout.incoming / "one.zip"
    live_through(world, keeper(world, keep), days)
    assert left(world, job) == expected
    assert upload.exists()


def test_a_job_that_never_had_anything_is_not_told_that_it_was_removed(world):
    job = jobs.cancel(world.table, queued(world.service).id, ENDED_S)
    live_through(world, keeper(world, Keep(outputs_days=1, artifacts_days=1)), 2)
    assert world.table.get(job.id) == job and job.message == "Cancelled by user"


def test_age_removes_a_cbz_as_it_removes_a_zip(world):
    job = ended(world, "cbz")
    part = world.client.call("GET", f"/jobs/{job.id}/artifact", headers={"Range": "bytes=6-"})
    assert (part.status, part.body, part.headers["etag"]) == (206, b"world", f'"{job.artifact_hash}"')
    live_through(world, keeper(world, Keep(artifacts_days=2)), 2.1)
    assert left(world, job) == "ojp"
    assert world.client.call("GET", f"/jobs/{job.id}/artifact").problem().code == "ARTIFACT_GONE"


@pytest.mark.parametrize("attempted", [queued, running])
def test_a_job_that_is_not_over_never_loses_anything(world, attempted):
    job = attempted(world.service)
    folder = world.layout.output_dir(job.title, job.volume, job.id)
    folder.mkdir(parents=True)
    live_through(world, keeper(world, ALL), 1000, looks=3)
    assert folder.exists() and world.table.get(job.id) == job


# What the clock shows at each look, in days after the job's end, and what is left then.
CLOCKS = {
    "set back: a negative age": ([-5000, -5000, -5000], "oajp"),
    "far forward while it runs": ([0.1, 20_000, 20_000, 20_000], "oajp"),
    "far forward at the start, then put right": ([20_000, 0.2, 0.2], "oajp"),
    "far forward at one look": ([0.1, 20_000, 0.2, 0.2], "oajp"),
    "right": ([2.0, 2.0], ""),
    "back by an hour over midnight": ([2.0, 1.96], ""),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_a_clock_that_is_wrong_removes_nothing(world, name):
    days, expected = CLOCKS[name]
    job = ended(world)
    world.wall_s = ENDED_S + days[0] * DAY_S
    service = keeper(world, ALL)
    for at in days:
        world.wall_s = ENDED_S + at * DAY_S
        for _ in range(5):
            service.turn()
        world.passed_s += LOOK_S
    assert left(world, job) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="monotonic() counts sleep there")
def test_things_grow_old_while_the_machine_sleeps(monkeypatch):
    counted = {"darwin": "CLOCK_MONOTONIC"}.get(sys.platform, "CLOCK_BOOTTIME")
    clocks = {getattr(time, counted): 30 * DAY_S}
    monkeypatch.setattr(time, "monotonic", lambda: DAY_S)
    monkeypatch.setattr(time, "clock_gettime", clocks.get)
    service = Retention(SimpleNamespace(clock=lambda: 0.0), None, ALL)
    assert service.monotonic() == 30 * DAY_S


def test_a_job_resumed_between_look_and_removal_keeps_its_pages(world):
    job, service = ended(world), keeper(world, ALL)
    live_through(world, service, 2, looks=1)
    service._look_at_s = world.passed_s + 1e9
    service._look()  # now it is to be removed
    assert service.todo
    assert world.table.change(job, state=jobs.PENDING, finished_s=None)
    for _ in range(5):
        service.turn()
    assert world.table.get(job.id).state == jobs.PENDING
    assert left(world, job) == "oap"


def test_a_job_that_changes_while_its_files_go_keeps_its_row(world, monkeypatch):
    """A resume between files and row: the guarded statement finds another state."""
    job, service = ended(world), keeper(world, ALL)
    remove = submissions.remove_files

    def slowly(*arguments: Any) -> None:
        remove(*arguments)
        fresh = world.table.get(job.id)
        if fresh.state == jobs.SUCCESS:
            assert world.table.change(fresh, state=jobs.PENDING, finished_s=None)

    monkeypatch.setattr(retention.submissions, "remove_files", slowly)
    live_through(world, service, 2)
    fresh = world.table.get(job.id)
    assert (fresh.state, fresh.outputs_removed_s, fresh.artifact_removed_s) == (jobs.PENDING, None, None)


def test_what_cannot_be_removed_now_is_tried_again(world, monkeypatch, caplog):
    job, service = ended(world), keeper(world, Keep(artifacts_days=1))
    with monkeypatch.context() as patched:

        def in_use(*_: Any) -> None:
            raise PermissionError(13, "in use")

        patched.setattr(jobs.storage, "remove_file", in_use)
        live_through(world, service, 2)
    assert left(world, job) == "oajp" and "can't be removed now" in caplog.text
    assert world.table.get(job.id).artifact_removed_s is None
    live_through(world, service, 0)
    assert left(world, job) == "ojp"


def test_a_job_says_what_it_lost_and_clients_are_told_what_to_do(world):
    job = ended(world)
    live_through(world, keeper(world, Keep(outputs_days=1, artifacts_days=3)), 4)
    state = world.client.state(job.id)
    assert (state.status, state.artifact_path, state.artifact_hash) == ("SUCCESS", None, job.artifact_hash)
    assert "pages were removed after 1 days (REICHAN_KEEP_OUTPUTS_DAYS)" in state.message
    assert "artifact was removed after 3 days (REICHAN_KEEP_ARTIFACTS_DAYS)" in state.message
    for path, code in (("artifact", "ARTIFACT_GONE"), ("pages/1/after", "PAGE_GONE")):
        problem = world.client.call("GET", f"/jobs/{job.id}/{path}").problem()
        assert (problem.status, problem.code) == (410, code)
        assert "removed by age; submit the volume again" in problem.detail
    listed = json.loads(world.client.call("GET", f"/jobs/{job.id}/pages").body)["pages"]
    assert [page["sha256"] for page in listed] == ["1" * 64]
    assert world.client.call("GET", f"/jobs/{job.id}/report").status == 200
    assert world.client.post(job.id, "resume").status == "SUCCESS"


def test_a_failed_job_without_its_pages_is_resumed_from_the_input_or_told_that_it_is_gone(world):
    job = ended(world)
    assert world.table.change(world.table.get(job.id), state=jobs.FAILED, artifact_hash=None)
    live_through(world, keeper(world, Keep(outputs_days=1)), 2)
    upload = world.layout.incoming / "one.zip"
    data = upload.read_bytes()
    upload.unlink()
    problem = world.client.call("POST", f"/jobs/{job.id}/resume").problem()
    assert (problem.status, problem.code) == (422, "INPUT_MISSING")
    upload.write_bytes(data)
    assert world.client.post(job.id, "resume").message is None
    fresh = world.table.get(job.id)
    assert (fresh.state, fresh.outputs_removed_s) == (jobs.PENDING, None)


def test_a_real_job_is_swept_by_the_service_and_computed_again_on_resume(tmp_path, monkeypatch):
    """One page can't be upscaled, so that the finished job may be resumed."""
    monkeypatch.setattr(retention, "LOOK_S", 0.05)
    monkeypatch.setattr(retention, "DAY_S", 1.0)
    config = settings.Config(storage_root=tmp_path, port=0, keep=Keep(outputs_days=1))
    with server.Service(config) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume({"1.png": png(16, 16), "2.png": b"broken"}))
        job = client.submit("v.zip")
        first, _ = client.watch(job)
        until(lambda: service.table.get(job).outputs_removed_s, 60)
        assert not list(config.layout.outputs.rglob("*.*"))
        assert client.state(job).artifact_hash == first[-1].artifact_hash
        assert client.call("GET", f"/jobs/{job}/artifact").status == 200
        client.post(job, "resume")
        again, _ = client.watch(job)
    assert (again[-1].status, again[-1].processed) == ("SUCCESS", 2)
    assert again[-1].artifact_hash == first[-1].artifact_hash
