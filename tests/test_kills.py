"""A short form of tests/kills.py, and that it would find what it looks for."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import kills
import pytest
from helpers import require
from kills import BAD, MOMENTS, VICTIMS, Service, Tally, Trial, contents

from files import database

WORKER, SERVICE = VICTIMS


@pytest.fixture(autouse=True, scope="module")
def linux() -> None:
    require(sys.platform == "linux", "processes are found in /proc")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path / "root")
    yield service
    service.kill()


# By their names in MOMENTS; two jobs.
KILLS = (
    [("the worker boots", SERVICE), ("n pages are there", WORKER), ("the zip is begun", WORKER)],
    [("the 202 was sent", SERVICE), ("the last page is there", SERVICE), ("the job is over", WORKER)],
)


def test_kills_in_every_phase_lose_nothing_and_change_no_byte(service):
    named = {moment.what: moment for moment in MOMENTS}
    plans = [[(named[what], victim) for what, victim in plan] for plan in KILLS]
    tally = kills.run(service, plans, random.Random(1))
    assert tally.faults == []
    assert (tally.jobs, len(tally.kills), tally.recomputed) == (2, 6, 0)
    assert tally.recorded > 0
    assert service.end() == 0


def test_kills_amid_a_long_queue_leave_each_job_done_once(service):
    tally = kills.run_queued(service, queued=12, kills=3, seed=1)
    assert tally.faults == []
    assert (tally.jobs, len(tally.kills)) == (12, 3)


@pytest.mark.parametrize("count", [1, 50, 200])
def test_moments_are_drawn_evenly_and_no_job_gets_more_than_it_can_take(count):
    plans = kills.draw_moments(count, random.Random(count))
    struck = [(moment.phase, victim) for plan in plans for moment, victim in plan]
    assert len(struck) == count
    for plan in plans:
        assert sum(victim == WORKER for _, victim in plan) <= kills.WORKER_KILLS
        assert all(moment.phase != "tidy" for moment, _ in plan[:-1])
    for one in {*struck}:
        assert abs(struck.count(one) - count / 8) <= 1


# ---------------------------------------------------------------- planted bugs
def another_byte(trial: Trial, artifact: bytes) -> bytes:
    return artifact[:-1] + bytes([artifact[-1] ^ 1])


def another_page(trial: Trial, artifact: bytes) -> bytes:
    """A zip that is whole, with one pixel's worth of difference."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(artifact)) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info, data + b"\0" if info.filename == "05.jpg" else data)
    return target.getvalue()


def a_page_written_again(trial: Trial, artifact: bytes) -> bytes:
    page = trial.scene.outputs / "03.jpg"
    kills.storage.write_whole(page, page.read_bytes())
    return artifact


def a_page_lost(trial: Trial, artifact: bytes) -> bytes:
    (trial.scene.outputs / "03.jpg").unlink()
    return artifact


def a_temporary(trial: Trial, artifact: bytes) -> bytes:
    (trial.scene.outputs / f".reichan-{'0' * 32}.tmp").touch()
    return artifact


def a_working_copy(trial: Trial, artifact: bytes) -> bytes:
    trial.scene.staging.mkdir()
    return artifact


PLANTED: dict[Callable[[Trial, bytes], bytes], str] = {
    another_byte: "promised hash",
    another_page: "05.jpg in the artifact",
    a_page_written_again: "page 4 was recorded as",
    a_page_lost: "its file is not there",
    a_temporary: "left behind: ['.reichan-",
    a_working_copy: "left behind: ['",
}


def test_each_planted_bug_is_found(service):
    """A job without kills, whose pages are noted halfway; then one thing is made wrong at a time."""
    expected = kills.undisturbed(service, Tally())
    for plant, told in PLANTED.items():
        trial = Trial(service, Tally(), service.client.submit("v.zip"))
        trial.wait()
        assert trial.faults(trial.wait(), trial.artifact(), expected) == []
        artifact = plant(trial, trial.artifact())
        found = trial.faults(service.client.state(trial.job), artifact, expected)
        assert any(told in fault for fault in found), (plant.__name__, found)
        service.client.call("DELETE", f"/jobs/{trial.job}")
        for left in service.root.rglob("*.tmp"):
            left.unlink()


# The real service, but that it forgets which pages were finished before.
FORGETFUL = """
import sys
from dataclasses import replace
import server
from work import dispatch
real = dispatch.record_stage
def forget(table, job, event, found):
    return real(table, job, event, [replace(item, output_ok=False) for item in found])
dispatch.record_stage = forget
sys.exit(server.main())
"""


def test_a_service_that_computes_pages_again_is_found(tmp_path):
    service = Service(tmp_path / "root", ("-c", FORGETFUL))
    try:
        moment = next(moment for moment in MOMENTS if moment.what == "the last page is there")
        tally = kills.run(service, [[(moment, WORKER)]], random.Random(1))
    finally:
        service.kill()
    assert tally.recomputed > 0 and "was recorded as" in tally.faults[0]


def test_a_worker_that_outlives_its_service_is_found(service):
    trial = Trial(service, Tally(), service.client.submit(upload(service)))
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        trial.orphans[sleeper.pid] = time.monotonic() - 2 * kills.GONE_S
        trial._wait_for_orphans()
    finally:
        sleeper.kill()
        sleeper.wait()
    assert "outlived its service" in trial.found[0]


def upload(service: Service) -> str:
    service.client.call("PUT", "/incoming/v.zip", kills.volume(BAD | {"1.png": kills.PAGES["01.png"]}))
    return "v.zip"


def test_a_damaged_job_table_is_found(service):
    trial = Trial(service, Tally(), service.client.submit(upload(service)))
    trial.wait()
    service.end()
    data = bytearray((service.root / "jobs.sqlite3").read_bytes())
    data[data.index(trial.job.encode())] ^= 1
    (service.root / "jobs.sqlite3").write_bytes(data)
    with pytest.raises(database.DatabaseDamaged, match=r"jobs\.sqlite3: "), service.frozen_table():
        pass


def test_what_an_artifact_holds_does_not_depend_on_its_jobs_id(service):
    trials = [Trial(service, Tally(), service.client.submit(upload(service))) for _ in range(2)]
    for trial in trials:
        trial.wait()
    first, second = (trial.artifact() for trial in trials)
    assert first != second and contents(first) == contents(second)
