"""The scripts that measure what the README quotes, in their smallest form: they still run, and print what
they promise. How much time anything took is not looked at."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from engines import COMPACT
from helpers import require

HERE = Path(__file__).parent


def printed(script: str, *arguments: str) -> str:
    """What it prints, once it has ended well."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bench_has_pages_computed_by_both_engines_and_compares_them(tmp_path):
    require(importlib.util.find_spec("realesrgan"), "the reference package realesrgan is not installed")
    require(Path("/proc/self/status").is_file(), "nothing tells a process's peak here")
    report = tmp_path / "bench.json"
    sizes = ("--size", "64x48", "--pages", "5", "--pairs", "1")
    shown = printed("bench.py", "--models", COMPACT, *sizes, "--out", str(report))
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["model"], row["precision"], row["overlap"]) == (COMPACT, "fp32", 0)
    assert row["max difference"] <= 1 and row["PSNR dB"] > 60
    assert min(row[key] for key in ("ratio", "share of peak", "peak MB", "upstream peak MB")) > 0
    assert len(re.findall(rf"^\| (?:ours|upstream) \| {COMPACT} ", shown, re.MULTILINE)) == 2


def test_bench_tells_a_workers_memory():
    require(Path("/proc/self/status").is_file(), "nothing tells a process's peak here")
    shown = printed("bench.py", "--memory", "--models", COMPACT, "--size", "64x48", "--pages", "2")
    idle, one, all_ = map(int, shown.strip("| \n").split(" | ")[-3:])
    assert 0 < idle <= one <= all_


@pytest.mark.parametrize(
    ("script", "arguments", "pattern"),
    [
        ("latency.py", ["--turns", "1"], r"\| submit to page \| \d+ .*\n\| cancel .* page \| \d+ "),
        ("foretold.py", ["--pages", "1", "--basis", "preview"], r"preview .* megabytes +\S+, were +\S+ "),
    ],
    ids=["latency.py", "foretold.py"],
)
def test_a_script_runs_the_service(script: str, arguments: list[str], pattern: str):
    assert re.search(pattern, printed(script, *arguments))


def test_scaling_measures_a_cluster_of_one_and_of_two():
    require(importlib.util.find_spec("ray") and sys.platform == "linux", "Ray is not installed: .[cluster]")
    shown = printed("scaling.py", "--pages", "1", "--rounds", "1", "--size", "64x48")
    assert re.search(r"overhead of the cluster: \S+%, with two workers \S+%\n", shown)
    assert shown.count(" 64 workers ") == 2
