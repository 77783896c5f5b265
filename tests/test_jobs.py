"""jobs.py over database.py: a table of an earlier version. Any calls and crashes: test_machine.py."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import Any

import jobs
from files import database


def test_rows_are_the_tables_columns_and_states_what_the_table_allows():
    assert database.SEALED == {"jobs": sorted(jobs.JOB_COLUMNS), "pages": sorted(jobs.PAGE_COLUMNS)}
    assert f"CHECK (state IN {jobs.STATES})" in database.SCHEMA


def test_a_disk_too_full_for_the_table_is_given_room_first_and_does_not_stop_the_start(layout, monkeypatch):
    table = jobs.JobTable(layout.database)
    values = {"title": "t", "volume": "1", "input_type": "zip", "input_path": "v", "params": jobs.Params()}
    for name in ("over", "ran"):
        table.insert({"id": name, **values})
        (layout.staging / name).mkdir()
    jobs.cancel(table, "over", 1.0)
    assert jobs.claim(table, 2.0).id == "ran"

    def full(*_: Any) -> None:
        assert not (layout.staging / "over").exists()
        raise sqlite3.OperationalError("database or disk is full")

    try:
        with monkeypatch.context() as disk:
            disk.setattr(jobs, "lose_worker", full)
            jobs.recover(table, layout, 3.0)
        assert table.get("ran").state == jobs.RUNNING and (layout.staging / "ran").exists()
        jobs.recover(table, layout, 3.0)
        assert table.get("ran").state == jobs.PENDING
    finally:
        table.close()


def test_a_database_of_the_first_version_is_brought_up_to_date(tmp_path):
    table = jobs.JobTable(tmp_path / "jobs.db")
    values = {"title": "t", "volume": "1", "input_type": "zip", "input_path": "v", "params": jobs.Params()}
    table.insert({"id": "job", **values})
    table.replace_pages("job", [jobs.Page("job", 1, "1.png", "1.png", "0" * 64, 1, None, "1")])
    table.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.db")) as db:
        for column in ("color_spread", "model"):
            db.execute(f"ALTER TABLE pages DROP COLUMN {column}")
        for column in ("outputs_removed_s", "artifact_removed_s", "forecast"):
            db.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
        for name in ("jobs", "pages"):
            db.execute(f"ALTER TABLE {name} DROP COLUMN seal")
        db.execute("DROP INDEX jobs_waiting")
        db.execute("ALTER TABLE jobs DROP COLUMN priority")
        for column in ("schema_seal", "paused"):
            db.execute(f"ALTER TABLE counter DROP COLUMN {column}")
        db.execute("PRAGMA user_version = 1")
    table = jobs.JobTable(tmp_path / "jobs.db")
    try:
        assert table.get("job").title == "t" and [page.name for page in table.pages("job")] == ["1.png"]
    finally:
        table.close()
    jobs.JobTable(tmp_path / "jobs.db").close()  # its rows have got checksums
