"""The database's file: what its tables look like, and whether they are as they were written.

Map: errors - SCHEMA, MIGRATIONS - seals - connect (versions, checks)
Rule: a file that is not ours, or that is locked, is never written to; a damaged one never used.
Runs in: the main process, at its start.

SQLite finds damage to its structure, and none to a value: each row has a checksum of its own.
"""

from __future__ import annotations

import os
import re
import sqlite3
import zlib
from pathlib import Path
from typing import Any

from storage import StorageError

BUSY_S = 30.0  # for another process that has the database locked
SCHEMA_VERSION = 7
MIGRATIONS = {  # version -> what makes the next
    1: "ALTER TABLE pages ADD COLUMN color_spread REAL",
    2: "ALTER TABLE pages ADD COLUMN model TEXT",
    3: "ALTER TABLE jobs ADD COLUMN outputs_removed_s REAL;"
    " ALTER TABLE jobs ADD COLUMN artifact_removed_s REAL",
    4: "ALTER TABLE jobs ADD COLUMN seal INTEGER; ALTER TABLE pages ADD COLUMN seal INTEGER;"
    " ALTER TABLE counter ADD COLUMN schema_seal INTEGER",
    5: "ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;"
    " ALTER TABLE counter ADD COLUMN paused INTEGER NOT NULL DEFAULT 0;"
    " CREATE INDEX jobs_waiting ON jobs (state, priority DESC, number)",
    6: "ALTER TABLE jobs ADD COLUMN forecast TEXT",
}
# What the machine, not the file, is to blame for: locked, no memory, no rights, no disk.
NOT_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_AUTH,
    }
)  # fmt: skip


# ---------------------------------------------------------------- errors
class DatabaseUnusable(StorageError):
    """The database belongs to another program or a newer version, or can't be opened now."""

    code = "DATABASE_UNUSABLE"


class DatabaseDamaged(StorageError):
    """The database is not as it was written: see rebuild.py."""

    code = "DATABASE_DAMAGED"


# ---------------------------------------------------------------- tables and seals
SCHEMA = f"""
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL CHECK (state IN ('PENDING', 'RUNNING', 'SUCCESS', 'FAILED')),
    attempt INTEGER NOT NULL DEFAULT 0, cancelled INTEGER NOT NULL DEFAULT 0, title TEXT NOT NULL,
    volume TEXT NOT NULL, input_type TEXT NOT NULL, input_path TEXT NOT NULL, params TEXT NOT NULL,
    manifest TEXT, plan TEXT, phase TEXT NOT NULL DEFAULT 'queued', processed INTEGER NOT NULL DEFAULT 0,
    total INTEGER NOT NULL DEFAULT 0, failed_pages INTEGER NOT NULL DEFAULT 0,
    left_out INTEGER NOT NULL DEFAULT 0, reconciliation TEXT, retries INTEGER NOT NULL DEFAULT 0,
    message TEXT, last_error TEXT, error_code TEXT, current_page TEXT, eta_s REAL,
    artifact_hash TEXT, artifact_bytes INTEGER, seq INTEGER NOT NULL, created_s REAL NOT NULL,
    started_s REAL, finished_s REAL, idempotency_key TEXT UNIQUE, request_hash TEXT,
    outputs_removed_s REAL, artifact_removed_s REAL, seal INTEGER, priority INTEGER NOT NULL DEFAULT 0,
    forecast TEXT
);
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE INDEX jobs_waiting ON jobs (state, priority DESC, number);
CREATE TABLE pages (
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, n INTEGER NOT NULL,
    name TEXT NOT NULL, staged TEXT NOT NULL, source_sha256 TEXT NOT NULL,
    source_bytes INTEGER NOT NULL, source_error TEXT, stem TEXT NOT NULL, status TEXT NOT NULL,
    output TEXT, sha256 TEXT, bytes INTEGER, width INTEGER, height INTEGER, mode TEXT,
    error TEXT, deviation TEXT, color_spread REAL, model TEXT, seconds REAL, tries INTEGER NOT NULL,
    alone INTEGER NOT NULL, deaths INTEGER NOT NULL, seal INTEGER, PRIMARY KEY (job_id, n)
) WITHOUT ROWID;
CREATE TABLE counter (seq INTEGER NOT NULL, schema_seal INTEGER, paused INTEGER NOT NULL DEFAULT 0);
INSERT INTO counter VALUES (0, NULL, 0);
PRAGMA user_version = {SCHEMA_VERSION};
"""


def _columns_of(table: str) -> list[str]:
    """All but the seal; sorted, that their order in SCHEMA may change without a new version."""
    columns = SCHEMA.partition(f"CREATE TABLE {table} (")[2].partition(";")[0]
    return sorted(set(re.findall(r"(\w+) (?:INTEGER|REAL|TEXT)\b", columns)) - {"seal"})


SEALED = {table: _columns_of(table) for table in ("jobs", "pages")}
SEALS = {table: f"seal({SCHEMA_VERSION}, {', '.join(columns)})" for table, columns in SEALED.items()}
SCHEMA_SEAL = "(SELECT seal(group_concat(sql)) FROM (SELECT sql FROM sqlite_master ORDER BY name))"
SEAL_ALL = f"""
UPDATE jobs SET seal = {SEALS["jobs"]}; UPDATE pages SET seal = {SEALS["pages"]};
UPDATE counter SET schema_seal = {SCHEMA_SEAL};
"""


def checksum(*values: Any) -> int:
    """The checksum of a row's values, as the database computes it too."""
    return zlib.crc32("\0".join(map(str, values)).encode())


# ---------------------------------------------------------------- opening and checking
def connect(path: Path) -> sqlite3.Connection:
    """Connect, and sort the ways in which that fails. Raises DatabaseDamaged, DatabaseUnusable."""
    try:
        return _connected(path)
    except UnicodeDecodeError as error:  # of the message, which quotes a damaged schema
        raise DatabaseDamaged(f"{path.name}: {error.object!r}") from error
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # the primary one
        # A file of another format version is read-only to SQLite, whatever its mode.
        writable = code == sqlite3.SQLITE_READONLY and os.access(path, os.W_OK)
        if code in NOT_DAMAGE and not writable:
            raise DatabaseUnusable(f"{path.name} can't be used now: {error}") from error
        raise DatabaseDamaged(f"{path.name}: {error}") from error


def _connected(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        db.row_factory = sqlite3.Row
        db.create_function("seal", -1, checksum, deterministic=True)
        version = _version_of(db, path.name)  # before anything is written: it may not be ours
        db.execute("PRAGMA journal_mode = WAL")
        # WAL with NORMAL may lose the last commits in a power cut: a 202 would be a lie.
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA fullfsync = ON")  # macOS' plain fsync leaves it in the drive's cache
        db.execute("PRAGMA foreign_keys = ON")
        if version == 0:
            db.executescript("BEGIN;" + SCHEMA + SEAL_ALL + "COMMIT;")
        while version in MIGRATIONS:
            script = MIGRATIONS[version]
            version += 1
            seal = SEAL_ALL if version == SCHEMA_VERSION else ""
            db.executescript(f"BEGIN; {script}; {seal} PRAGMA user_version = {version}; COMMIT;")
        _check(db)
        # Else a file that can't be written shows at the first submit.
        db.executescript("BEGIN; UPDATE counter SET seq = seq; ROLLBACK;")
    except BaseException:
        db.close()
        raise
    return db


def _version_of(db: sqlite3.Connection, name: str) -> int:
    """The database's version, 0 for a new one. Raises DatabaseUnusable where it can't be brought to ours."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    is_new = version == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if is_new or version in (SCHEMA_VERSION, *MIGRATIONS):
        return version
    if _holds_our_rows(db):  # then it is the number that is wrong
        raise sqlite3.DatabaseError(f"it calls itself version {version}")
    raise DatabaseUnusable(
        f"{name} has version {version}, this service writes version {SCHEMA_VERSION}: "
        "it belongs to a newer service or to another program; move it away to start afresh"
    )


# UnicodeDecodeError, a ValueError: also of SQLite's message, where it quotes a damaged schema.
UNREADABLE = (sqlite3.Error, ValueError, TypeError, LookupError, DatabaseUnusable)


def _holds_our_rows(db: sqlite3.Connection) -> bool:
    try:
        return bool(db.execute(f"SELECT 1 FROM jobs WHERE seal = {SEALS['jobs']} LIMIT 1").fetchone())
    except UNREADABLE:
        return False


def _check(db: sqlite3.Connection) -> None:
    """Raises sqlite3.DatabaseError unless structure, schema, counter and every row are as written."""
    check = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if check != "ok":
        raise sqlite3.DatabaseError(check)
    for table, seal in SEALS.items():
        if db.execute(f"SELECT 1 FROM {table} WHERE seal IS NOT {seal} LIMIT 1").fetchone():
            raise sqlite3.DatabaseError(f"a row of {table} is not as it was written")
    rising = "seq >= (SELECT coalesce(max(seq), 0) FROM jobs)"
    found = db.execute(f"SELECT {rising}, schema_seal IS {SCHEMA_SEAL} FROM counter").fetchall()
    if list(map(tuple, found)) != [(1, 1)]:
        raise sqlite3.DatabaseError("its schema or its counter of changes is not as it was written")
