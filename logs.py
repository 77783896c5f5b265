"""What the service tells its operator on stderr: one line an event, for people or for programs.

Map: of, about (which job and page) - TextLines, JsonLines - setup
Rule: nothing that a client wrote can begin a line of its own.
Runs in: every process of the service; a worker's lines go to the same stderr.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

FORMS = ("text", "json")
# Controls, line separators, marks that turn the writing direction, halves of surrogate pairs.
UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_here: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("job and page", default=None)


def of(job: str, page: int | None = None) -> dict[str, Any]:
    """For `extra=` of a log call: what its event concerns."""
    return {"job": job} if page is None else {"job": job, "page": page}


@contextlib.contextmanager
def about(job: str, page: int | None = None) -> Iterator[None]:
    """Whatever this thread logs inside concerns this job and page, however deep it is called."""
    token = _here.set(of(job, page))
    try:
        yield
    finally:
        _here.reset(token)


def _concerns(record: logging.LogRecord) -> dict[str, Any]:
    given = {name: getattr(record, name) for name in ("job", "page") if hasattr(record, name)}
    return given or _here.get() or {}


def _escaped(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]


class TextLines(logging.Formatter):
    """2026-11-25 04:43:14.123 INFO worker-0 infer job 3f2a… page 4: what happened

    A traceback follows its line, indented.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        """See the class."""
        when = datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds")
        concerns = "".join(f" {name} {value}" for name, value in _concerns(record).items())
        message = UNFIT.sub(_escaped, record.getMessage())
        line = f"{when} {record.levelname} {self.process} {record.name}{concerns}: {message}"
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            # Split where a reader of lines would: an error's text may hold any of the separators.
            line += "".join("\n    " + UNFIT.sub(_escaped, part) for part in trace.splitlines())
        return line


class JsonLines(logging.Formatter):
    """{"time": UTC, "level", "process", "logger", "message"[, "job", "page", "trace"]}"""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        """See the class. ASCII, so that no terminal's encoding can spoil it."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": when.replace("+00:00", "Z"),
            "level": record.levelname,
            "process": self.process,
            "logger": record.name,
            "message": record.getMessage(),
            **_concerns(record),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def setup(form: str, process: str) -> None:
    """Send everything that this process logs, warns of, or dies of to stderr, in one of FORMS."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(process) if form == "json" else TextLines(process))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # websockets' own: two lines for each that only say that it came and went.
    logging.getLogger("live.protocol").setLevel(logging.WARNING)
    log = logging.getLogger(process.partition("-")[0])

    def thread_died(end: threading.ExceptHookArgs) -> None:
        if end.exc_type is not SystemExit and end.exc_value is not None:
            where = end.thread.name if end.thread else "?"
            log.critical("thread %s died", where, exc_info=(end.exc_type, end.exc_value, end.exc_traceback))

    threading.excepthook = thread_died
    sys.excepthook = lambda kind, error, trace: log.critical("it dies", exc_info=(kind, error, trace))
