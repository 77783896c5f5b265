"""Short forms of tests/load.py: what must hold on any machine, however busy; nothing timed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import load
import pytest
from helpers import require
from load import Line
from serving import running, still

import jobs
from work import submissions


@pytest.mark.parametrize(
    ("what", "numbers"),
    [
        (load.watchers, {"idle": 60, "slow": 8, "pairs": 1, "pages": 6, "side": 64}),
        (load.many_jobs, {"jobs": 30}),
        (load.many_pages, {"pages": 300}),
        (load.race, {"rounds": 20}),
        (load.events, {"events": 3000}),
        (load.ranges, {"ranges": 20, "mb": 40}),
    ],
)
def test_a_small_load_breaks_no_promise(what: Callable[..., list[Line]], numbers: dict[str, int]):
    require(Path("/proc/self/fd").is_dir(), "/proc is not there")
    here = set(os.listdir("/proc/self/task"))
    lines = what(**numbers, seed=1)
    assert [line for line in lines if not line.kept and not line.timed] == []
    assert sum(bool(line.promise) for line in lines) >= 3
    assert len(set(os.listdir("/proc/self/task")) - here) <= 1  # no thread of ours is left


def test_what_a_change_costs_does_not_grow_with_the_manifest(tmp_path, monkeypatch):
    with still(tmp_path) as service:
        job = running(service)
        names = [f"{n}.png" for n in range(1000)]
        long = {"expected": 1000, "matched": 0, "missing": names, "extra": names}
        assert service.table.change(job, state=jobs.RUNNING, manifest={"files": names}, reconciliation=long)
        read, loads = [], json.loads
        monkeypatch.setattr(jobs.json, "loads", lambda text: read.append(len(text)) or loads(text))
        assert service.table.change(job, state=jobs.RUNNING, processed=1)
        row = service.table.get(job.id)
        submissions.to_state(row, service.config.layout)
        assert read and max(read) < 1000
        assert jobs.parsed(row.reconciliation) == long


def test_a_broken_promise_is_shown_and_is_the_exit_status(capsys):
    lines = [Line("a", "1", "2", True), Line("b", "3", "4", False), Line("c", "5")]
    assert (load.show(lines), load.show(lines[:1])) == (1, 0)
    assert "| b | 3 | 4 | BROKEN |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "share", "expected"), [([3.0, 1.0, 2.0], 0.5, 2.0), ([1.0], 0.99, 1.0), (range(100), 0.99, 98)]
)
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(values, share, expected):
    assert load.percentile(list(values), share) == expected
