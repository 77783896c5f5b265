"""What the log's lines hold, and that nobody outside can write one. A whole job's lines: test_commands.py."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import logs
import server

ROOT = Path(server.__file__).parent
FORMATTERS = (logs.TextLines("worker-0"), logs.JsonLines("worker-0"))
HOSTILE = "a\nb\r\x1b[31m\u2028\u202e\x85\ud800作品"


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("infer", logging.WARNING, "x.py", 1, message, arguments, None)
    vars(made).update(more)
    return made


def test_a_text_line_says_when_who_and_what_it_concerns():
    line = FORMATTERS[0].format(record("tile %d", 3, **logs.of("3f2a", 4)))
    when, rest = line[:23], line[23:]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", when)
    assert rest == " WARNING worker-0 infer job 3f2a page 4: tile 3"


def test_a_json_line_holds_the_same_as_fields():
    line = json.loads(FORMATTERS[1].format(record("tile %d", 3, **logs.of("3f2a", 4))))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "WARNING", "process": "worker-0", "logger": "infer", "message": "tile 3",
        "job": "3f2a", "page": 4,
    }  # fmt: skip


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_what_a_client_wrote_begins_no_line_and_commands_no_terminal(formatter):
    line = formatter.format(record("refused %s", HOSTILE))
    assert len(line.splitlines()) == 1
    assert not logs.UNFIT.search(line)


@pytest.mark.parametrize("formatter", FORMATTERS)
def test_a_traceback_stays_with_its_line(formatter):
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        line = formatter.format(record("failed", exc_info=sys.exc_info()))
    first, *rest = line.splitlines()
    assert "failed" in first and "ValueError" in line
    assert all(part.startswith("    ") for part in rest)
    assert bool(rest) == (formatter is FORMATTERS[0])


def test_what_a_thread_is_about_reaches_lines_logged_deep_in_it_and_no_other_thread():
    lines = {}

    def work(n):
        with logs.about("job", n):
            lines[n] = json.loads(FORMATTERS[1].format(record("deep")))

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [lines[n]["page"] for n in (1, 2)] == [1, 2]
    assert "job" not in json.loads(FORMATTERS[1].format(record("outside")))


def test_warnings_and_deaths_are_lines_too():
    code = (
        "import logs, threading, warnings\n"
        "logs.setup('json', 'worker-3')\n"
        "warnings.warn('old')\n"
        "thread = threading.Thread(target=lambda: 1 / 0, name='t')\n"
        "thread.start(); thread.join()\n"
        "raise KeyError('end')\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    warned, thread, end = map(json.loads, done.stderr.splitlines())
    assert "UserWarning: old" in warned["message"]
    assert thread["message"] == "thread t died" and "ZeroDivisionError" in thread["trace"]
    assert end["level"] == "CRITICAL" and "KeyError: 'end'" in end["trace"] and done.returncode == 1
