"""The service as another program's child: its one line, and its end with that program's pipe. With the
program itself, killed while a worker runs: test_commands.py."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client import Client

import server

ROOT = Path(server.__file__).parent
def command(root: Path, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "server.py"), "--port", "0", "--storage-root", str(root), *flags]


@contextlib.contextmanager
def child(arguments: list[str], **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process with pipes, which is gone afterwards."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, **(pipes | more)) as process:
        try:
            yield process
        finally:
            process.kill()


def test_it_prints_one_line_and_ends_when_its_stdin_is_closed(tmp_path):
    environ = os.environ | {"REICHAN_TOKEN": "secret-token"}
    with child(command(tmp_path, "--ready-json", "--exit-with-stdin"), env=environ) as process:
        ready = json.loads(process.stdout.readline())
        assert ready.keys() == {"url", "token", "pid"}
        assert (ready["token"], ready["pid"]) == ("secret-token", process.pid)
        assert Client(ready["url"], ready["token"]).call("GET", "/jobs").status == 200
        process.stdin.write(b"what is written means nothing\n")
        rest, _ = process.communicate(timeout=30)  # closes its stdin
        assert (rest, process.returncode) == (b"", 0)


def test_without_a_token_the_line_says_null(tmp_path):
    with child(command(tmp_path, "--ready-json")) as process:
        assert json.loads(process.stdout.readline())["token"] is None


def test_stdout_stays_clean_whoever_prints():
    """Python, C code, child processes."""
    code = (
        "import os, subprocess, sys\nfrom web import sidecar\n"
        "alone = sidecar.take_stdout()\n"
        "print('python', flush=True); os.write(1, b'C\\n'); subprocess.run(['echo', 'child'])\n"
        "print(sidecar.ready_line('http://x', None), file=alone, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["url"] == "http://x"
    assert done.stderr.split() == ["python", "C", "child"]


@pytest.mark.parametrize("stdin", ["closed", "empty"])
def test_without_a_stdin_that_is_held_open_it_does_not_serve(tmp_path, stdin):
    line = command(tmp_path, "--exit-with-stdin")
    shell = ["sh", "-c", 'exec "$@" <&-', "sh", *line] if stdin == "closed" else line
    done = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    assert done.returncode == (2 if stdin == "closed" else 0)
    says = b"server.py: --exit-with-stdin takes a stdin" if stdin == "closed" else b"stdin is at its end"
    assert says in done.stderr
