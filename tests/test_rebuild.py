"""A damaged or lost job table: set aside, read as far as it can be, rebuilt from artifacts; said so."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import damage
import pytest
from client import Client
from conftest import make_hostile
from damage import Known
from serving import until, volume

import jobs
import server
import settings
import storage
from files import artifacts, database
from messages import Limits
from storage import Layout
from work import rebuild, submissions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage root of a service that ended; not to be changed."""
    root = tmp_path_factory.mktemp("run") / "root"
    damage.make(root)
    return root


@pytest.fixture
def layout(run: Path, tmp_path: Path) -> Layout:
    """A copy of it, to be damaged."""
    shutil.copytree(run, tmp_path / "root")
    return Layout(tmp_path / "root", tmp_path / "root/models")


@pytest.fixture
def before(layout: Layout) -> Known:
    """What its table holds."""
    with opened(layout) as table:
        return Known.of(table)


@contextlib.contextmanager
def opened(layout: Layout) -> Iterator[jobs.JobTable]:
    table = rebuild.open_table(layout.database)
    try:
        yield table
    finally:
        table.close()


@contextlib.contextmanager
def serving(layout: Layout) -> Iterator[Client]:
    """The service on this root, once it has looked through the artifacts."""
    with server.Service(settings.Config(storage_root=layout.root, port=0)) as service:
        client = Client(service.url)
        until(lambda: not client.call("GET", "/health").json()["rebuilding"])
        yield client


def asides(layout: Layout) -> list[Path]:
    return sorted(layout.root.glob("jobs.sqlite3.damaged*"))


def change(layout: Layout, *statements: str) -> None:
    """Change values behind the service's back, as a bad disk might, the structure whole."""
    with contextlib.closing(sqlite3.connect(layout.database)) as db, db:
        for statement in statements:
            db.execute(statement)


def values(layout: Layout, table: str, column: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(layout.database)) as db:
        return [value for (value,) in db.execute(f"SELECT {column} FROM {table}")]


# ---------------------------------------------------------------- what is noticed
@pytest.mark.parametrize(
    ("table", "column"), [(t, c) for t, columns in database.SEALED.items() for c in [*columns, "seal"]]
)
def test_a_value_that_changed_by_itself_is_noticed(layout, table, column):
    # Not a digit more for a number: behind those of a time it may be beyond what a double holds.
    other = f"iif(typeof({column}) IN ('integer', 'real'), {column} + 77, coalesce({column}, '') || '1')"
    value = "'RUNNING'" if column == "state" else other
    were = values(layout, table, column)
    change(layout, f"UPDATE {table} SET {column} = {value} WHERE {'number' if table == 'jobs' else 'n'} = 1")
    assert values(layout, table, column) != were
    with pytest.raises(database.DatabaseDamaged):
        jobs.JobTable(layout.database)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE counter SET seq = 3",
        "DELETE FROM counter",
        "INSERT INTO counter SELECT * FROM counter",
        "PRAGMA user_version = 77",
        "DROP INDEX jobs_by_state",
        "ALTER TABLE pages RENAME COLUMN alone TO lone",
    ],
)
def test_a_changed_counter_schema_or_version_is_noticed_and_costs_nothing(layout, before, statement):
    change(layout, statement)
    with opened(layout) as table:
        known = Known.of(table)
        assert table.set_aside in asides(layout)
        if "RENAME" not in statement:  # else no page could be read
            assert known == before and table.salvaged == len(before.jobs)


def test_a_healthy_table_is_neither_set_aside_nor_changed(layout):
    data = layout.database.read_bytes()
    for _ in range(2):
        with opened(layout) as table:
            assert (table.set_aside, table.salvaged) == (None, 0)
    assert layout.database.read_bytes() == data and asides(layout) == []


def test_the_database_of_another_program_or_a_newer_service_is_refused_and_left_alone(layout):
    change(layout, "PRAGMA user_version = 77", "UPDATE jobs SET seal = 1")  # as a newer one might seal
    data = layout.database.read_bytes()
    with pytest.raises(database.DatabaseUnusable, match="has version 77"):
        rebuild.open_table(layout.database)
    assert layout.database.read_bytes() == data and asides(layout) == []


def test_what_the_machine_is_to_blame_for_is_no_damage(layout, monkeypatch):
    monkeypatch.setattr(database, "BUSY_S", 0.1)
    with contextlib.closing(sqlite3.connect(layout.database)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(database.DatabaseUnusable, match="locked"):
            rebuild.open_table(layout.database)
    layout.database.rename(layout.root / "elsewhere")
    layout.database.mkdir()
    command = [sys.executable, str(Path(server.__file__)), "--port", "0", "--storage-root", str(layout.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and asides(layout) == []
    assert done.stderr.splitlines()[-1].startswith("server.py: jobs.sqlite3 can't be used now: ")


# ---------------------------------------------------------------- what comes back
def cut(data: bytearray) -> None:
    del data[len(data) // 2 + 100 :]


def zero_page(data: bytearray) -> None:
    data[4096 * 3 : 4096 * 4] = bytes(4096)


def flip_header(data: bytearray) -> None:
    data[4096 * 5 + 3] ^= 0x5A


def no_schema(data: bytearray) -> None:
    data[:4096] = bytes(4096)


def other_encoding(data: bytearray) -> None:
    data[56:60] = (2).to_bytes(4, "big")


def read_only(data: bytearray) -> None:
    data[18] = 9


def garbage(data: bytearray) -> None:
    data[:] = random.Random(1).randbytes(len(data))


def emptied(data: bytearray) -> None:
    data.clear()


DAMAGE = (cut, zero_page, flip_header, no_schema, other_encoding, read_only, garbage, emptied)


@pytest.mark.parametrize("harm", DAMAGE)
def test_every_finished_job_is_served_as_before(layout, harm):
    with serving(layout) as client:
        finished = [job.job_id for job in client.ask(client_jobs(), "GET", "/jobs").jobs if job.artifact_path]
        expected = {job: damage.state_of(client, job) for job in finished}
    assert len(expected) == 3
    data = bytearray(layout.database.read_bytes())
    harm(data)
    layout.database.write_bytes(data)
    with serving(layout) as client:
        health = client.call("GET", "/health").json()
        assert {job: damage.state_of(client, job) for job in finished} == expected
    assert health["database_set_aside"] == (harm is not emptied)  # SQLite takes nothing as a new one
    assert health["rebuilt_jobs"] >= 3 and health["registered_jobs"] >= 3
    if harm is not emptied:
        (aside,) = asides(layout)
        assert aside.read_bytes() == data


def client_jobs() -> Any:
    from client import JobList

    return JobList


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_anywhere_lose_no_finished_job(layout, before, seed):
    """The short form of tests/damage.py."""
    rng, good = random.Random(seed), layout.database.read_bytes()
    for _ in range(40):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        known, is_aside, _, _ = damage.start_on(bytes(data), layout)
        for job in before.ids("SUCCESS"):
            assert known.is_as_before(job, before, layout)
        assert is_aside or known == before


def test_hostile_databases_are_refused_or_kept_aside_and_artifacts_come_back(layout, before, tmp_path):
    """Row C15 of checks.md."""
    out = make_hostile(tmp_path / "hostile", "db")
    names = [entry["file"] for entry in json.loads((out / "index.json").read_text())]
    assert len(names) == 7
    good = layout.database.read_bytes()
    for name in names:
        data = (out / name).read_bytes()
        layout.database.write_bytes(data)
        if name.endswith("stale_wal.sqlite3"):  # a good one is ours, beside its log of noise
            layout.database.write_bytes(good)
            shutil.copy(out / "db/stale_wal.sqlite3-wal", layout.root / "jobs.sqlite3-wal")
        try:
            known = damage_free_start(layout)
        except database.DatabaseUnusable as error:  # a table of another program
            assert "belongs to" in error.detail and layout.database.read_bytes() == data, name
            continue
        kept = asides(layout)
        if name.endswith("stale_wal.sqlite3"):
            assert known == before and kept == []
            continue
        assert [path.read_bytes() for path in kept] == ([data] if data else []), name
        assert all(known.is_as_before(job, before, layout) for job in before.ids("SUCCESS")), name
        for path in kept:
            path.unlink()


def damage_free_start(layout: Layout) -> Known:
    with opened(layout) as table:
        rebuild.Rebuild(table, layout)._run()
        return Known.of(table)


def test_jobs_that_wait_or_failed_are_read_from_the_damaged_table(layout, before):
    finished = before.ids("SUCCESS")[0]
    change(layout, f"UPDATE jobs SET title = 'other' WHERE id = '{finished}'")
    with opened(layout) as table:
        known = Known.of(table)
        assert table.salvaged == len(before.jobs) - 1
        for job in before.ids("PENDING", "FAILED"):
            assert known.jobs[job] == before.jobs[job] and known.pages[job] == before.pages[job]
        assert table.by_key("key")  # a repeated submit still finds its job
        assert min(job.seq for job in table.page_of_jobs(None, "", 9, None)) > 1_600_000_000


def test_an_unfinished_job_whose_page_was_damaged_starts_over_and_gives_the_same_artifact(layout, before):
    """Its rows are no proof any more; a carried page makes the finished job one that can be resumed."""
    job = before.ids("SUCCESS")[-1]
    whole = layout.artifact(before.jobs[job].title, "01", job).read_bytes()
    with opened(layout) as table:
        for waiting in table.in_state("PENDING"):
            jobs.cancel(table, waiting.id, 1.0)
        submissions.resume(table, layout, job, None, Limits())
    change(layout, f"UPDATE pages SET width = 1 WHERE job_id = '{job}' AND n = 1")
    with opened(layout) as table:
        fresh = table.get(job)
        assert (fresh.state, fresh.total, table.pages(job)) == ("PENDING", 0, [])
        assert "damaged: this job's pages are computed again" in fresh.message
    with serving(layout) as client:
        assert client.watch(job)[0][-1].status == "SUCCESS"
        assert client.call("GET", f"/jobs/{job}/artifact").body == whole


def test_the_latest_commits_are_read_from_the_log_of_a_damaged_table(layout, before, tmp_path):
    """They stand in the -wal alone when the service was killed."""
    with opened(layout) as table:
        wanted = submissions.Submission("latest", "1", "zip", "v.zip", jobs.Params(), None)
        latest = submissions.submit(table, layout, wanted, None, "", Limits()).id
        files = {name: (layout.root / name).read_bytes() for name in ("jobs.sqlite3", "jobs.sqlite3-wal")}
    data = bytearray(files["jobs.sqlite3"])
    data[data.index(b"Ch 1/0.png")] ^= 1  # of a page, which is not in the log
    layout.database.write_bytes(data)
    (layout.root / "jobs.sqlite3-wal").write_bytes(files["jobs.sqlite3-wal"])
    with opened(layout) as table:
        assert table.set_aside and table.get(latest).title == "latest"
    assert [path.suffix[-4:] for path in asides(layout)][1:] in ([], ["-wal"])


KILLED_AT = ("JobTable", "_salvage", "_keep")


@pytest.mark.parametrize("step", KILLED_AT)
def test_a_rebuild_that_was_killed_begins_again(layout, before, monkeypatch, step):
    """Row C07: the second start finds what the first one left."""
    change(layout, "UPDATE counter SET seq = 3")
    real, calls = getattr(rebuild, step), []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments)
        if step == "JobTable" and len(calls) == 1:
            return real(*arguments)  # it finds the damage
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(rebuild, step, killed)
        rebuild.open_table(layout.database)
    assert [path.name for path in asides(layout)] == ["jobs.sqlite3.damaged"]
    with opened(layout) as table:
        assert Known.of(table) == before and table.set_aside in asides(layout)
    assert len(asides(layout)) == 1


def test_a_rename_that_was_killed_halfway_is_finished(layout, before):
    with opened(layout):
        log = (layout.root / "jobs.sqlite3-wal").read_bytes()
    layout.database.rename(layout.root / "jobs.sqlite3.damaged")
    (layout.root / "jobs.sqlite3-wal").write_bytes(log)
    with opened(layout) as table:
        assert Known.of(table) == before


def test_two_damaged_tables_of_one_second_are_both_kept(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "t.damaged").write_text(text)
        rebuild._keep(tmp_path / "t.damaged", 7)
    assert [(tmp_path / f"t.damaged-{n}").read_text() for n in (7, 8)] == ["first", "second"]


# ---------------------------------------------------------------- artifacts
def test_a_lost_table_is_rebuilt_from_artifacts_alone_oldest_first(layout, before, caplog):
    layout.database.unlink()
    shutil.rmtree(layout.outputs)
    finished = before.ids("SUCCESS")
    for age, job in enumerate(finished):  # newest first
        artifact = next(layout.artifacts.glob(f"*{job}.zip"))
        os.utime(artifact, (1e9 - age, 1e9 - age))
    with caplog.at_level(logging.WARNING), serving(layout) as client:
        states = client.ask(client_jobs(), "GET", "/jobs").jobs
        assert [state.job_id for state in states] == finished
        assert {state.created_at for state in states} <= {f"2001-09-09T01:46:{s}.000Z" for s in (38, 39, 40)}
        for state in states:
            assert "rebuilt from its artifact" in state.message and "pages kept as they were" in state.message
            assert client.call("GET", f"/jobs/{state.job_id}/artifact").status == 200
            assert client.call("GET", f"/jobs/{state.job_id}/pages/1/after").problem().code == "PAGE_GONE"
            problem = client.call("GET", f"/jobs/{state.job_id}/pages/1/before").problem()
            assert (problem.status, problem.code) == (410, "INPUT_MISSING")
    assert "3 of 3 unclaimed artifacts are jobs again" in caplog.text


def test_a_rebuilt_job_with_a_bad_page_is_resumed_once_its_input_is_named(layout, before):
    layout.database.unlink()
    job = before.ids("SUCCESS")[-1]
    with serving(layout) as client:
        problem = client.call("POST", f"/jobs/{job}/resume").problem()
        assert problem.status == 422 and "inputPath" in problem.detail
        client.post(job, "resume", {"inputPath": "incoming/v.zip", "inputType": "zip"})
        last = client.watch(job)[0][-1]
    assert (last.status, last.artifact_hash) == ("SUCCESS", before.jobs[job].artifact_hash)


def spoil_page(artifact: Path, report: dict[str, Any]) -> None:
    data = bytearray(artifact.read_bytes())
    data[-3000] ^= 1
    artifact.write_bytes(data)


def spoil_end(artifact: Path, report: dict[str, Any]) -> None:
    os.truncate(artifact, artifact.stat().st_size - 20)


def spoil_name(artifact: Path, report: dict[str, Any]) -> None:
    artifact.rename(artifact.with_name(f"another-{artifact.name}"))


def spoil_kind(artifact: Path, report: dict[str, Any]) -> None:
    artifact.write_bytes(volume({"1.png": b"page"}))


def spoil_report(artifact: Path, report: dict[str, Any]) -> None:
    del report["params"]
    artifact.write_bytes(volume({storage.REPORT_NAME: json.dumps(report | {"items": []}).encode()}))


def spoil_more(artifact: Path, report: dict[str, Any]) -> None:
    with zipfile.ZipFile(artifact, "a") as archive:
        archive.writestr("more.png", b"page")


SPOILS: tuple[Callable[[Path, dict[str, Any]], None], ...] = (
    spoil_page, spoil_end, spoil_name, spoil_kind, spoil_report, spoil_more,
)  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS)
def test_an_artifact_that_is_not_proved_is_left_as_it_is_and_said(layout, before, caplog, spoil):
    job = before.ids("SUCCESS")[0]
    artifact = next(layout.artifacts.glob(f"*{job}.zip"))
    spoil(artifact, artifacts.prove_artifact(artifact)[0])
    there = {path: path.read_bytes() for path in layout.artifacts.iterdir()}
    layout.database.unlink()
    with caplog.at_level(logging.ERROR):
        known = damage_free_start(layout)
    assert sorted(known.jobs) == sorted(set(before.ids("SUCCESS")) - {job})
    assert {path: path.read_bytes() for path in layout.artifacts.iterdir()} == there
    assert "not rebuilt, and left as it is" in caplog.text
    assert "lost jobs left pages, which stay" in caplog.text and job in caplog.text


def test_the_service_is_ready_before_an_artifact_is_hashed(layout, before, monkeypatch):
    layout.database.unlink()
    go_on, prove = threading.Event(), artifacts.prove_artifact

    def slowly(artifact: Path) -> Any:
        assert go_on.wait(30)
        return prove(artifact)

    monkeypatch.setattr(rebuild.artifacts, "prove_artifact", slowly)
    with server.Service(settings.Config(storage_root=layout.root, port=0)) as service:
        client = Client(service.url)
        assert client.call("GET", "/health").json()["rebuilding"] is True
        assert client.call("GET", "/jobs").json()["jobs"] == []
        with client.socket("/ws/jobs") as line:
            go_on.set()
            told = {json.loads(line.recv(30))["jobId"] for _ in range(3)}
        assert told == set(before.ids("SUCCESS"))


def test_damage_found_while_the_service_runs_asks_for_a_restart(layout, monkeypatch):
    with serving(layout) as client, monkeypatch.context() as patched:
        def malformed(*_: Any) -> None:
            raise sqlite3.DatabaseError("database disk image is malformed")

        patched.setattr(jobs.JobTable, "page_of_jobs", malformed)
        problem = client.call("GET", "/jobs").problem()
        assert (problem.status, problem.code) == (503, "DATABASE_DAMAGED") and "restart" in problem.detail
