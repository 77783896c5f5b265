"""No pattern that reads what someone else wrote takes time that grows faster than its text.

While one is matched nothing else runs in the process: a line of blanks once stopped a whole service.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import storage

FOLDERS = ("", "web", "work", "files")
CHARACTERS = 8000  # of a line of HTTP
MOST_S = 0.4  # of the processor's time; to look at a run once from each of its places takes over a second
OWN = ("database.py", "openapi.py", "webpage.py", "settings.py")  # theirs read what the owner wrote, or we
BEGINS = ("", "X:", "image/", "application/octet-stream", "bytes=", "sha-256=:", ';a="', "T ", "a.left.")
PIECES = (" ", "\t", "_", "-", ".", ",", ":", ";", '"', "'", "=", "/", "%", "1", "a", "v", "第", "<", "\\")
PAIRS = ("1 ", " 1", "a ", ", ", ";a=", 'W/"', "v ", "v1", ".1", "a.", ".left.", "-1", ":1", '"a"', "<?xml ")
ENDS = ("\1", "\n")


def patterns() -> Iterator[tuple[str, re.Pattern[Any], str]]:
    """(where, a pattern, a method by which it is used) of those that have names, and those in calls."""
    files = [path for folder in FOLDERS for path in sorted((storage.PROGRAM / folder).glob("*.py"))]
    sources = {path: path.read_text(encoding="utf-8") for path in files}
    used = set(re.findall(r"\b([A-Z_]+)\.(\w+)", "\n".join(sources.values())))
    for path, text in sources.items():
        if "\nimport re\n" not in text:
            continue
        module = importlib.import_module(".".join(path.relative_to(storage.PROGRAM).with_suffix("").parts))
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern):
                yield from ((f"{path.name} {name}", value, method) for known, method in used if known == name)
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Call(ast.Attribute(ast.Name("re"), method), [ast.Constant(value), *_]):
                    yield f"{path.name} line {node.lineno}", re.compile(value), method


def main() -> None:
    """Print each pattern before it is used, at last how many there were; AssertionError for a slow one."""
    texts = [
        begin + (piece * CHARACTERS)[:CHARACTERS] + end
        for begin in BEGINS for piece in (*PIECES, *PAIRS) for end in ENDS
    ]  # fmt: skip
    encoded = [text.encode() for text in texts]
    count = 0
    for where, pattern, method in patterns():
        if method == "compile" or where.startswith(OWN):
            continue
        count += 1
        print(where, method, flush=True)
        match = getattr(pattern, method if method in ("fullmatch", "match", "search") else "findall")
        for text in encoded if isinstance(pattern.pattern, bytes) else texts:
            began_s = time.process_time()
            match(text)
            assert time.process_time() - began_s < MOST_S, (text[:20], text[-20:])
    print(count)


def test_no_pattern_takes_much_longer_for_a_longer_text():
    code = "import sys; sys.path[:0] = ['tests', '.']; import test_patterns; test_patterns.main()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=storage.PROGRAM, capture_output=True, check=False, text=True,
            timeout=120,
        )  # fmt: skip
    except subprocess.TimeoutExpired as slow:
        raise AssertionError((slow.stdout or b"").decode().splitlines()[-1]) from None
    lines = done.stdout.splitlines()
    assert done.returncode == 0, lines[-1:] + done.stderr.splitlines()[-3:]
    assert int(lines[-1]) > 20
