"""Each error to its one answer.

Map: STATUS_OF - refusal_of
Rule: an error's code and detail reach the person as they are; what nobody foresaw reaches the log, and the
person its number.
Runs in: http-N threads.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3

import jobs
import storage
from files import database
from web.wire import Refused

log = logging.getLogger("api")

STATUS_OF: dict[type[Exception], int] = {
    jobs.UnknownJob: 404,
    jobs.InvalidFields: 422,
    jobs.KeyReused: 409,
    jobs.JobIsRunning: 409,
    jobs.IllegalMove: 409,
    jobs.StaleAttempt: 409,
    jobs.ShuttingDown: 503,
    storage.OutsideIncoming: 422,
    storage.InputMissing: 422,
    storage.InputUnusable: 422,
    storage.NameTaken: 409,
    storage.FilesInUse: 409,
    storage.NoRoom: 507,
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_REFUSES = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# What is told of a file that a program has open: Windows lets nobody replace or remove it.
IN_USE: tuple[type[OSError], ...] = (PermissionError,) if os.name == "nt" else ()


def refusal_of(error: Exception) -> Refused:
    """The one place where errors become answers."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, (jobs.JobError, storage.StorageError)):
        status = next((STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF), 500)
        errors = error.errors if isinstance(error, jobs.InvalidFields) else None
        return Refused(status, error.code, error.detail, errors=errors)
    if isinstance(error, OSError) and error.errno in DISK_FULL + DISK_REFUSES:
        return _refusal_of_disk(error)
    if isinstance(error, sqlite3.DatabaseError):
        return _refusal_of_table(error)
    number = os.urandom(4).hex()
    log.error("request failed, number %s", number, exc_info=error)
    return Refused(500, "INTERNAL", f"an unexpected error; the log has it under {number}", close=True)


def _refusal_of_disk(error: OSError) -> Refused:
    if error.errno in DISK_FULL:
        return Refused(507, "DISK_FULL", "the service's disk is full; make room and try again", close=True)
    if isinstance(error, IN_USE):
        detail = "a program has the file open, or it is read-only; close it there and try again"
        return Refused(409, storage.FilesInUse.code, detail, close=True)
    detail = f"the service's disk can't be written: {storage.reason_of(error)}"
    return Refused(507, storage.DiskRefused.code, detail, close=True)


def _refusal_of_table(error: sqlite3.DatabaseError) -> Refused:
    if isinstance(error, sqlite3.ProgrammingError) and "closed" in str(error):
        detail = "the service is shutting down; ask again after its restart"
        return Refused(503, jobs.ShuttingDown.code, detail)
    if not isinstance(error, sqlite3.OperationalError):
        log.error("the job table is damaged: %s", error)
        detail = "the job table is damaged; restart the service, which sets it aside and rebuilds it"
        return Refused(503, database.DatabaseDamaged.code, detail)
    full = "full" in str(error)
    detail = "the job table can't be written now" + (": the disk is full" if full else "; try again")
    return Refused(507 if full else 503, "DATABASE", detail)
