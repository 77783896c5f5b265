"""What becomes of a volume when workers die, stop, hang, or never start."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import pytest
from client import Client, check_artifact
from serving import png, queued, running, still, until, volume

import jobs
import messages
import server
import settings
import storage
from files import inputs
from messages import SourcePage
from work import dispatch, submissions, workers
from work.runs import Run
from work.workers import Slot


@contextlib.contextmanager
def serving(
    root: Path, worker: Callable[..., None] | None, **chosen: object
) -> Iterator[tuple[server.Service, Client]]:
    """A service with this worker, and a client of it."""
    config = settings.Config(storage_root=root / "storage", port=0, **chosen)  # type: ignore[arg-type]
    with server.Service(config, worker) as service:
        yield service, Client(service.url)


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where faults write down what they did."""
    folder = tmp_path / "faults"
    folder.mkdir()
    monkeypatch.setenv("FAULTS", str(folder))
    # Spawned children must find this folder's modules.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return folder


def widths(*pages: int) -> bytes:
    """A volume with a page of each width."""
    return volume({f"{n}.png": png(width, shade=n) for n, width in enumerate(pages, 1)})


def test_a_page_that_always_kills_its_worker_is_carried_and_the_rest_goes_on(tmp_path, notes):
    with serving(tmp_path, faults.by_width) as (_, client):
        client.call("PUT", "/incoming/v.zip", widths(32, faults.KILLER, 33, 34))
        state = client.wait(job := client.submit("v.zip"))
        report = check_artifact(client.call("GET", f"/jobs/{job}/artifact").body, state)
    assert [item["status"] for item in report["items"]] == ["upscaled", "carried", "upscaled", "upscaled"]
    assert "died twice" in report["items"][1]["error"]
    # Once beside others, then twice alone.
    assert (notes / "killer").stat().st_size == 1 + dispatch.PAGE_DEATHS


def test_a_page_that_kills_whatever_decodes_it_is_carried_and_looked_at_twice_at_most(tmp_path, notes):
    with serving(tmp_path, faults.deadly_decoder) as (_, client):
        client.call("PUT", "/incoming/v.zip", widths(32, faults.KILLER, 33))
        state = client.wait(job := client.submit("v.zip"))
        report = check_artifact(client.call("GET", f"/jobs/{job}/artifact").body, state)
        looks = [client.call("GET", f"/jobs/{job}/pages/2/after?w=96").problem() for _ in range(3)]
    items = report["items"]
    assert [item["status"] for item in items] == ["upscaled", "carried", "upscaled"]
    assert "died twice" in items[1]["error"] and items[1]["width"] == faults.KILLER
    assert [look.status for look in looks] == [503, 503, 422] and "died of it" in looks[2].detail
    assert (notes / "killer").stat().st_size == 1 + dispatch.PAGE_DEATHS + 2


def test_a_page_that_fails_once_is_upscaled_at_the_end(tmp_path, notes):
    with serving(tmp_path, faults.by_width) as (_, client):
        client.call("PUT", "/incoming/v.zip", widths(faults.CLUMSY, 32, 33))
        state = client.wait(job := client.submit("v.zip"))
        report = check_artifact(client.call("GET", f"/jobs/{job}/artifact").body, state)
    assert (state.status, state.failed_pages) == ("SUCCESS", 0)
    assert report["items"][0]["status"] == "upscaled" and (notes / "clumsy").stat().st_size == 2


@pytest.mark.parametrize("width, note", [(faults.STOPPER, "stopper"), (faults.SLEEPER, "sleeper")])
def test_a_worker_that_stops_or_hangs_is_replaced(tmp_path, notes, monkeypatch, width, note):
    """Stopped, it beats no more; hanging, its beats say that a step takes too long."""
    monkeypatch.setattr(dispatch, "BEAT_LIMIT_S", 4.0)
    with serving(tmp_path, faults.by_width) as (_, client):
        client.call("PUT", "/incoming/v.zip", widths(32, width))
        state = client.wait(client.submit("v.zip"))
    assert (state.status, state.failed_pages) == ("SUCCESS", 0)
    assert (notes / note).stat().st_size == 2


def test_a_full_disk_fails_the_job_and_resume_finishes_it(tmp_path, notes):
    with serving(tmp_path, faults.full_disk) as (_, client):
        client.call("PUT", "/incoming/v.zip", widths(32, 33))
        state = client.wait(job := client.submit("v.zip"))
        assert (state.status, client.full_state(job)["errorCode"]) == ("FAILED", "DISK")
        assert "No space left" in state.last_error
        (notes / "room").touch()
        client.post(job, "resume")
        state = client.wait(job)
        assert state.status == "SUCCESS"
        check_artifact(client.call("GET", f"/jobs/{job}/artifact").body, state)


def test_workers_that_cannot_start_fail_the_job_with_the_reason_and_leave_no_thread_behind(tmp_path, notes):
    before = threading.enumerate()
    with serving(tmp_path, faults.cannot_boot) as (service, client):
        client.call("PUT", "/incoming/v.zip", widths(32))
        state = client.wait(job := client.submit("v.zip"))
        code = client.full_state(job)["errorCode"]
        assert (state.status, code) == ("FAILED", "WORKER_CANNOT_START")
        assert "no torch here" in state.last_error
        assert (notes / "boots").stat().st_size == dispatch.CARELESS_DEATHS
        made = lambda: {*threading.enumerate()}.difference(before)  # noqa: E731
        names = lambda: [one.name for one in made() if one.name.startswith("send-")]  # noqa: E731
        until(lambda: len(names()) <= len(service.dispatcher.workers))


def test_a_finished_page_that_was_damaged_is_computed_again_before_packing(tmp_path):
    with serving(tmp_path, None) as (service, client):
        client.call("PUT", "/incoming/v.zip", volume({f"{n}.png": png(160, 200, n) for n in range(6)}))
        job = client.submit("v.zip")
        client.wait(job, lambda state: state.processed >= 2)
        next(service.config.layout.outputs.glob(f"*/*/{job}/0.jpg")).write_bytes(b"damaged")
        state = client.wait(job)
        assert (state.status, state.processed) == ("SUCCESS", 6)
        check_artifact(client.call("GET", f"/jobs/{job}/artifact").body, state)


def test_a_resume_after_the_input_changed_never_mixes_pages(tmp_path):
    with serving(tmp_path, None) as (service, client):
        pages = {f"{n}.png": png(120, 160, n) for n in range(8)}
        client.call("PUT", "/incoming/v.zip", volume(pages))
        job = client.submit("v.zip")
        client.wait(job, lambda state: state.processed >= 2)
        client.call("POST", f"/jobs/{job}/cancel")
        assert service.dispatcher.wait_released(job, 5)
        pages["0.png"] = png(120, 160, 99)
        client.call("PUT", "/incoming/v.zip", volume(pages))
        client.call("POST", f"/jobs/{job}/resume")
        state = client.wait(job)
        report = check_artifact(client.call("GET", f"/jobs/{job}/artifact").body, state)
        client.call("PUT", "/incoming/w.zip", volume({"0.png": pages["0.png"]}))
        fresh = client.wait(client.submit("w.zip"))
        other = check_artifact(client.call("GET", f"/jobs/{fresh.job_id}/artifact").body, fresh)
    assert report["items"][0]["sha256"] == other["items"][0]["sha256"]


def test_two_slots_run_two_jobs_and_share_one(tmp_path):
    with serving(tmp_path, None, max_concurrency=2) as (service, client):
        client.call("PUT", "/incoming/v.zip", volume({f"{n}.png": png(120, 160, n) for n in range(12)}))
        first, second = client.submit("v.zip"), client.submit("v.zip")
        client.wait(second, lambda state: state.status == "RUNNING")
        assert client.state(first).status == "RUNNING"
        results = [client.wait(job) for job in (first, second)]
        assert len(service.dispatcher.workers) == 2
    assert [state.status for state in results] == ["SUCCESS", "SUCCESS"]


def test_one_volume_uses_both_devices_while_the_next_waits(tmp_path, notes):
    with serving(tmp_path, faults.two_devices, precision="fp32") as (_, client):
        client.call("PUT", "/incoming/v.zip", widths(*range(32, 42)))
        first, second = client.submit("v.zip"), client.submit("v.zip")
        client.wait(first, lambda _: all((notes / f"page on {slot}").exists() for slot in (0, 1)))
        assert client.state(second).status == "PENDING"
        (notes / "go").touch()
        assert client.wait(first).status == "SUCCESS"


@pytest.mark.parametrize(
    "worker, width, waits", [(faults.held_up, 32, "page"), (faults.with_leave, faults.WAITER, "stage")]
)
def test_a_cancel_ends_no_worker_for_what_only_waits_there_behind_another_job(
    tmp_path, notes, worker, width, waits
):
    with serving(tmp_path, worker, max_concurrency=2) as (service, client):
        made = service.dispatcher
        client.call("PUT", "/incoming/a.zip", widths(width))
        client.call("PUT", "/incoming/b.zip", widths(32, 33))
        first = client.submit("a.zip")
        until(lambda: made.workers and (first, 1, 1) in made.workers[0].tasks, 60)
        slot = made.workers[0]
        second = client.submit("b.zip")
        until(lambda: (second, 1, 0 if waits == "stage" else 2) in slot.tasks)
        client.post(second, "cancel")
        assert made.wait_released(second, 1.5) and not slot.obey_by_s
        assert made.workers[0] is slot and slot.doom is None
        (notes / "go").touch()
        assert client.wait(first).status == "SUCCESS" and service.table.get(first).attempt == 1


def test_an_idle_worker_gives_its_memory_back(tmp_path):
    with serving(tmp_path, None, worker_idle_s=1.0) as (service, client):
        client.call("PUT", "/incoming/v.zip", widths(32))
        client.wait(client.submit("v.zip"))
        pid = service.dispatcher.workers[0].process.pid
        deadline = time.monotonic() + 20
        while service.dispatcher.workers and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not service.dispatcher.workers
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < deadline:  # it leaves the table first, then ends
                os.kill(pid, 0)
                time.sleep(0.05)


def test_an_input_that_became_a_link_elsewhere_is_not_followed(tmp_path):
    with serving(tmp_path, None) as (service, client):
        incoming = service.config.layout.incoming
        for folder in (incoming / "a/vol", tmp_path / "secret/vol"):
            folder.mkdir(parents=True)
            (folder / "1.png").write_bytes(png())
        client.call("PUT", "/incoming/long.zip", volume({f"{n}.png": png(160, 200, n) for n in range(8)}))
        first = client.submit("long.zip")
        job = client.submit("a/vol", "folder")
        (incoming / "a").rename(tmp_path / "moved")
        (incoming / "a").symlink_to(tmp_path / "secret")
        client.call("POST", f"/jobs/{first}/cancel")
        state, code = client.wait(job), client.full_state(job)["errorCode"]
    assert (state.status, code) == ("FAILED", "INPUT_UNUSABLE")


# ---------------------------------------------------------------- the dispatcher itself, without a worker
class Hand(Slot):
    """A worker that only takes."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.capacity = 4
        self.posted: list[Any] = []

    def post(self, item: Any) -> None:
        """Keep it."""
        self.posted.append(item)

    def kill(self, why: str) -> None:
        """Remember."""
        self.doom = why


def full(*_: Any, **__: Any) -> None:
    raise sqlite3.OperationalError("database or disk is full (injected)")


def test_a_step_that_fails_keeps_no_other_from_being_taken_and_is_told_once(tmp_path, monkeypatch, caplog):
    with still(tmp_path) as service:
        made, taken = service.dispatcher, []
        monkeypatch.setattr(made, "_claim", full)
        for name in ("_deal", "_wait", "_check_deadlines"):
            monkeypatch.setattr(made, name, lambda name=name: taken.append(name))
        made._turn()
        made._turn()
    assert taken == ["_deal", "_wait", "_check_deadlines"] * 2
    assert caplog.text.count("the dispatcher stumbled (full)") == 1


def test_a_death_that_a_full_disk_keeps_out_of_the_table_leaves_no_job_running(tmp_path, monkeypatch):
    with still(tmp_path) as service:
        made, job = service.dispatcher, running(service)
        made.runs[job.id] = run = Run(job, tmp_path, tmp_path)
        run.pages[1] = jobs.Page(job.id, 1, "1.png", "1.png", "0" * 64, 1, None, "1")
        slot = Hand()
        slot.tasks[run.key(1)] = None
        with monkeypatch.context() as broken:
            broken.setattr(service.table, "change_page", full)
            broken.setattr(service.table, "change", full)
            made._lose(run, slot, "killed")
        assert service.table.get(job.id).state == jobs.RUNNING and not made.runs
        made._take_up_lost()
        assert service.table.get(job.id).state == jobs.PENDING


@pytest.mark.parametrize(
    "error, code",
    [
        (sqlite3.OperationalError("database or disk is full"), "DISK"),
        (sqlite3.DatabaseError("database disk image is malformed"), "DATABASE_DAMAGED"),
        (MemoryError(), "INTERNAL"),
    ],
)
def test_an_event_that_the_table_does_not_take_fails_its_job(tmp_path, monkeypatch, error, code):
    def broken(*_: Any, **__: Any) -> None:
        raise error

    with still(tmp_path) as service:
        made, run = service.dispatcher, with_a_run(service)
        with monkeypatch.context() as table:
            table.setattr(dispatch, "finish_page", broken)
            table.setattr(dispatch, "advance", broken)
            table.setattr(service.table, "change_page", broken)
            made._suspect(run, 1, 1)
            done = messages.PageDone(run.job.id, run.job.attempt, 1, "1.jpg", "0" * 64, 9, 2, 2, "L", 1.0)
            made._handle(Hand(), done)
        assert service.table.get(run.job.id).state == jobs.RUNNING and not made.runs
        made._record_failures()
        job = service.table.get(run.job.id)
        assert (job.state, job.error_code) == (jobs.FAILED, code)
        assert ("damaged" in job.last_error) == (code == "DATABASE_DAMAGED")


@pytest.mark.parametrize("error", [sqlite3.DatabaseError("malformed"), MemoryError()])
def test_a_death_that_the_table_does_not_take_hurts_no_other_job(tmp_path, monkeypatch, error):
    def broken(*_: Any, **__: Any) -> None:
        raise error

    with still(tmp_path) as service:
        made, run = service.dispatcher, with_a_run(service)
        monkeypatch.setattr(dispatch, "lose_worker", broken)
        made._lose(run, dead(run, {}, exclusive=False), "it was killed")
        assert not made.runs


def test_a_job_that_cannot_be_packed_fails_and_stops_nobody(tmp_path, monkeypatch):
    """Its folder became a link since, say."""

    def taken(*_: Any) -> None:
        raise storage.NameTaken("outputs/t is a link (injected)")

    with still(tmp_path) as service:
        made, job = service.dispatcher, running(service)
        made.workers[0] = Hand()
        made.runs[job.id] = run = Run(job, tmp_path, tmp_path, file_task="pack")
        monkeypatch.setattr(submissions, "to_report", taken)
        assert made._deal_one(run)
        job = service.table.get(job.id)
        assert (job.state, job.error_code) == (jobs.FAILED, "NAME_TAKEN") and not made.runs
        made.workers.clear()


def test_where_no_process_can_be_started_jobs_wait_while_a_worker_is_up(tmp_path, monkeypatch):
    def none(*_: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with still(tmp_path, max_concurrency=2) as service:
        made, job = service.dispatcher, running(service)
        monkeypatch.setattr(dispatch, "WorkerSlot", none)
        made.workers[0], made.runs[job.id] = Hand(), Run(job, tmp_path, tmp_path)
        for _ in range(dispatch.CARELESS_DEATHS):
            made.not_before_s = 0.0
            assert made._hire() is None
        assert service.table.get(job.id).state == jobs.RUNNING
        made.workers.clear()
        made.not_before_s = 0.0
        assert made._hire() is None
        job = service.table.get(job.id)
        assert (job.state, job.error_code) == (jobs.FAILED, "WORKER_CANNOT_START")


def test_workers_that_never_start_are_tried_for_ever_and_a_job_begins_where_one_is_up(tmp_path):
    with still(tmp_path, max_concurrency=2) as service:
        made, job = service.dispatcher, queued(service)
        made.boot_failures = 1100
        made._on_boot_failure("no torch here")
        assert 50 < made.not_before_s - time.monotonic() <= 60
        made._claim()
        assert not made.runs
        made.workers[1] = Hand(1)
        made._claim()
        assert [*made.runs] == [job.id]
        made.workers.clear()


def test_what_a_worker_said_is_heard_before_it_is_called_silent_or_disobedient(tmp_path):
    """Another worker's event took long, and this one's beats lie in the pipe."""
    with still(tmp_path) as service:
        made, slot = service.dispatcher, piped()
        made.workers[0] = slot
        slot.heard_s -= dispatch.BEAT_LIMIT_S + 1
        slot.obey_by_s[("job", 1, 1)] = 0.0
        slot.theirs.send(messages.Dropped("job", 1, 1))
        made._check_deadlines()
        assert slot.doom is None
        made._receive(slot)
        made._check_deadlines()
        assert slot.doom is None and not slot.obey_by_s
        slot.heard_s -= dispatch.BEAT_LIMIT_S + 1
        slot.theirs.close()  # which is no word
        made._receive(slot)
        made._check_deadlines()
        assert slot.doom
        made.workers.clear()


def test_a_worker_that_no_signal_ends_is_given_up_and_its_job_goes_on(tmp_path, monkeypatch):
    """Its driver, or a network disk, does not let it go."""
    monkeypatch.setattr(workers, "KILL_S", 0.01)
    with still(tmp_path) as service:
        made, run, slot = service.dispatcher, with_a_run(service), piped()
        made.workers[0] = slot
        slot.tasks[run.key(1)] = run.page_task(1, None, service.config.limits)
        slot.kill("it gave no sign of life")
        made._check_deadlines()
        assert made.workers
        slot.doomed_s -= dispatch.END_LIMIT_S
        made._check_deadlines()
        assert not made.workers and not made.runs
        assert service.table.get(run.job.id).state == jobs.PENDING


def test_a_machine_that_slept_blames_no_worker_for_its_silence(tmp_path, monkeypatch):
    with still(tmp_path) as service:
        made, slot, now = service.dispatcher, Hand(), [1000.0]
        made.workers[0] = slot
        slot.conn = slot.process = SimpleNamespace(sentinel=None)
        slot.heard_s = slot.used_s = now[0]
        slot.obey_by_s[("job", 1, 1)] = now[0] + 2
        slot.computing_s = now[0] - 20
        job = running(service)
        made.runs[job.id] = run = Run(job, tmp_path, tmp_path)
        run.started_s = now[0] - 600
        monkeypatch.setattr(time, "monotonic", lambda: now[0])

        def sleep(_ready: Any, _timeout_s: float) -> list[Any]:
            now[0] += 8 * 3600
            return []

        monkeypatch.setattr(dispatch.multiprocessing.connection, "wait", sleep)
        made._wait()
        made._check_deadlines()
        assert slot.doom is None
        assert now[0] - run.started_s < 601 and now[0] - slot.computing_s < 21  # else it foretells days
        now[0] += dispatch.BEAT_LIMIT_S + 1
        made._check_deadlines()
        assert slot.doom
        made.workers.clear()


def test_a_cancel_while_a_job_waits_removes_its_working_copy(tmp_path):
    with still(tmp_path) as service:
        made, job = service.dispatcher, queued(service)
        place = service.config.layout.staging / job.id
        place.mkdir()
        outputs = service.config.layout.output_dir(job.title, job.volume, job.id)
        for name in (storage.UNPACKED + "x", storage.PARTS + "y"):  # of a worker that was killed
            (outputs / name).mkdir(parents=True)
        jobs.cancel(service.table, job.id, 1.0)
        made.tidy(job.id)
        made._tidy()
        assert not place.exists() and not made.untidy and not [*outputs.iterdir()]


def test_a_start_removes_previews_of_jobs_that_are_gone_and_no_others(tmp_path):
    with still(tmp_path) as service:
        made, kept = service.dispatcher, {queued(service).id, "preview"}
        for name in (*kept, "00000000-0000-4000-8000-000000000000"):
            (service.config.layout.previews / name).mkdir(parents=True)
            (service.config.layout.previews / name / "1.jpg").touch()
        made.stop()
        made._loop()  # no turn of it: it is to stop
        assert {path.parent.name for path in service.config.layout.previews.glob("*/1.jpg")} == kept


def test_a_resume_with_another_input_takes_no_page_from_the_old_working_copy(tmp_path):
    with still(tmp_path) as service:
        table, layout, job = service.table, service.config.layout, queued(service)
        page = jobs.Page(job.id, 1, "1.png", "00001.png", "0" * 64, 1, None, "1")
        table.replace_pages(job.id, [page])
        (layout.incoming / "two.zip").write_bytes(volume({"1.png": png(shade=9)}))
        jobs.cancel(table, job.id, 1.0)
        submissions.resume(table, layout, job.id, ("two.zip", "zip"), service.config.limits)
        assert [one.staged for one in table.pages(job.id)] == [""]
        assert not inputs.staged_pages_intact(
            layout.staging / job.id, [SourcePage("1.png", "", "0" * 64, 1, None)]
        )


def piped() -> Any:
    """A worker that is up, whose process nothing ends; `theirs` is its end of the pipe."""
    slot = dispatch.WorkerSlot.__new__(dispatch.WorkerSlot)
    Slot.__init__(slot, 0)
    slot.conn, slot.theirs = multiprocessing.Pipe()
    slot.is_cut, slot.capacity, slot.post = False, 4, lambda item: None
    slot.process = SimpleNamespace(
        exitcode=None, kill=lambda: None, join=lambda _: None, is_alive=lambda: True
    )
    slot._sender = SimpleNamespace(join=lambda _: None, is_alive=lambda: False)
    return slot


def test_a_workers_pipe_stays_open_while_something_is_being_sent():
    slot = dispatch.WorkerSlot(0, faults.cannot_boot, messages.EngineChoice())
    send, begun, go, closed = slot.conn.send, threading.Event(), threading.Event(), []

    def held_up(item: Any) -> None:
        begun.set()
        assert go.wait(10)
        closed.append(slot.conn.closed)
        send(item)

    slot.conn.send = held_up
    slot.post("something")
    assert begun.wait(10)
    later = threading.Timer(0.3, go.set)
    later.start()
    slot.stop(wait_s=0)
    later.join()
    assert closed == [False] and slot.conn.closed


def dead(run: Run, tasks: dict[Any, Any], exclusive: bool) -> Any:
    """A worker that died with these tasks: without a process."""
    slot = dispatch.WorkerSlot.__new__(dispatch.WorkerSlot)
    slot.tasks, slot.doom, slot.exclusive = tasks, None, exclusive
    return slot


def with_a_run(service: server.Service, deaths: int = 0) -> Run:
    """A running job of one page, as the dispatcher knows it."""
    job, made = running(service), service.dispatcher
    page = jobs.Page(job.id, 1, "1.png", "1.png", "0" * 64, 9, None, "1", deaths=deaths)
    service.table.replace_pages(job.id, [page])
    run = Run(job, service.config.layout.staging / job.id, service.config.layout.outputs, pages={1: page})
    made.runs[job.id] = run
    return run


def test_a_page_is_not_blamed_for_what_its_worker_was_asked_beside_it(tmp_path):
    for asked, deaths in ((True, 0), (False, 1)):
        with still(tmp_path / str(deaths)) as service:
            run = with_a_run(service)
            tasks: dict[Any, Any] = {run.key(1): run.page_task(1, None, service.config.limits)}
            slot = dead(run, tasks | ({"a preview": None} if asked else {}), exclusive=True)
            service.dispatcher._lose(run, slot, "it was killed")
            page = service.table.page(run.job.id, 1)
            assert (page.deaths, page.alone) == (deaths, True)


def test_a_page_that_can_not_even_be_taken_over_fails_the_job_and_does_not_go_round_for_ever(tmp_path):
    for deaths, state in ((2, jobs.PENDING), (3, jobs.FAILED)):
        with still(tmp_path / str(deaths)) as service:
            run = with_a_run(service, deaths)
            task = run.page_task(1, "it is damaged", service.config.limits)
            service.dispatcher._lose(run, dead(run, {run.key(1): task}, exclusive=False), "it was killed")
            job = service.table.get(run.job.id)
            assert job.state == state and service.table.page(job.id, 1).deaths == deaths + 1
            assert job.error_code == (None if state == jobs.PENDING else "PAGE_LOST")


def test_what_a_worker_was_asked_that_was_killed_for_a_cancel_is_asked_again(tmp_path):
    for doom, is_open in (("cancel", True), (None, False)):
        with still(tmp_path / str(doom)) as service:
            made = service.dispatcher
            future = made.ask("a preview", None)
            slot = SimpleNamespace(index=0, doom=doom, tasks={"a preview": None}, capacity=4)
            slot.stop = lambda wait_s: None
            slot.process = SimpleNamespace(exitcode=-9, join=lambda _: None)
            made.workers[0] = slot
            made._bury(slot)
            assert future.done() != is_open and bool(made.questions.unanswered()) == is_open


def test_a_pause_lets_no_worker_wait_for_a_page_that_will_not_come(tmp_path):
    with still(tmp_path) as service:
        made = service.dispatcher
        slot = SimpleNamespace(kept_for="job")
        made.workers[0] = slot
        service.table.pause(True)
        made._see_pause()
        assert slot.kept_for is None
        made.workers.clear()


def test_a_volume_that_the_machine_slept_through_measures_no_time(tmp_path):
    for wall_s, is_held in ((5.0, False), (8 * 3600.0, True), (-55.0, True)):  # the last: its clock was set
        with still(tmp_path / str(wall_s)) as service:
            run = with_a_run(service)
            run.job = dispatch.replace(run.job, started_s=service.table.clock() - wall_s)
            run.claimed_s = time.monotonic() - 5.0
            service.dispatcher._finish(run, messages.Packed(run.job.id, run.job.attempt, "0" * 64, 9))
            assert run.held == is_held


def test_a_resume_finds_its_input_also_where_that_lies_in_a_folder_of_the_same_name(tmp_path):
    with still(tmp_path) as service:
        table, layout, limits = service.table, service.config.layout, service.config.limits
        job = queued(service)
        table.change(job, input_path="incoming/t.zip")
        (layout.incoming / "incoming").mkdir()
        for place, shade in (("t.zip", 1), ("incoming/t.zip", 2)):
            (layout.incoming / place).write_bytes(volume({"1.png": png(shade=shade)}))
        jobs.cancel(table, job.id, 1.0)
        again = submissions.resume(table, layout, job.id, None, limits)
        assert (again.state, again.input_path) == (jobs.PENDING, "incoming/t.zip")


def test_a_comparison_with_a_manifest_is_that_of_the_input_that_was_looked_at_last(tmp_path):
    with still(tmp_path) as service:
        job = running(service)
        service.table.change(job, reconciliation={"missing": ["of the old one"]})
        job = service.table.get(job.id)
        for left_out, kept in ((None, True), (0, False)):
            staged = messages.Staged(job.id, job.attempt, job.plan, left_out, None)
            job = jobs.record_stage(service.table, job, staged, [])
            assert bool(job.reconciliation) == kept
