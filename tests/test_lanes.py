"""lanes.py: two queues, by turns; a step that raises ends neither. And what rests in a worker's queues."""

from __future__ import annotations

import math
import queue
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving import PARAMS, PLAN, until

import infer
from engine import lanes, survey
from messages import Cancel, ComputePage, Dropped, EngineChoice, Limits, Pack, Survey, Surveyed


def test_lanes_take_turns_and_neither_starves():
    done: list[str] = []
    begun, gate, ended = threading.Event(), threading.Event(), threading.Event()
    both = lanes.Lanes(1, "lane")
    both.submit(lambda: (begun.set(), gate.wait()))
    assert begun.wait(10)
    for n in range(4):
        both.submit(done.append, f"rest{n}")
    for n in range(3):
        both.submit(done.append, f"first{n}", first=True)
    both.submit(ended.set)
    gate.set()
    assert ended.wait(10)
    assert done == ["first0", "rest0", "first1", "rest1", "first2", "rest2", "rest3"]


def test_a_step_that_raises_ends_no_lane(caplog):
    ended = threading.Event()
    both = lanes.Lanes(1, "lane")
    both.submit({}.__getitem__, 1)
    both.submit(ended.set)
    assert ended.wait(10) and "KeyError" in caplog.text


# ---------------------------------------------------------------- a worker's queues
@pytest.fixture
def worker(tmp_path: Path) -> infer.Worker:
    """One that is given tasks by hand; what it says is in conn.events."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    conn: Any = SimpleNamespace(events=events, send=events.put)
    return infer.Worker(conn, EngineChoice(device="cpu", model_root=tmp_path), 0)


def told(worker: infer.Worker) -> list[Any]:
    events = worker.conn.events  # type: ignore[attr-defined]
    return [events.get() for _ in range(events.qsize())]


def test_what_rests_of_a_cancelled_job_is_dropped_at_once_and_once_and_its_pixels_are_freed(worker, tmp_path):
    gate, ended, done = threading.Event(), threading.Event(), []
    for submit in (worker.device.submit, worker.files.submit):
        submit(gate.wait, 30)
    pixels = np.zeros((4, 4), np.uint8)
    held = weakref.ref(pixels)
    page = ComputePage("b", 1, 7, tmp_path / "1.png", tmp_path / "1", PARAMS, PLAN, Limits())
    worker._queue(worker.device.submit, page, lambda task, pixels: done.append(task), pixels)
    other = ComputePage("b", 2, 7, tmp_path / "1.png", tmp_path / "1", PARAMS, PLAN, Limits())
    worker._queue(worker.device.submit, other, done.append)
    worker._start(Pack("b", 1, tmp_path, tmp_path / "a.zip", {}))
    del pixels
    worker._cancel(Cancel("b", 1))
    assert told(worker) == [Dropped("b", 1, 7), Dropped("b", 1, 0)]
    assert held() is None
    worker._queue(worker.device.submit, page, done.append)  # a step of it that was under way ends
    assert told(worker) == [Dropped("b", 1, 7)]
    for submit in (worker.device.submit, worker.files.submit):
        submit(ended.set)
        gate.set()
        assert ended.wait(10)
        ended.clear()
    until(lambda: done)
    assert done == [other] and not told(worker) and not worker.resting


def test_a_survey_takes_its_time_and_no_page_waits_for_it(worker, tmp_path, monkeypatch):
    """All of a solid archive may have to be unpacked for its last page."""
    gate, seen = threading.Event(), []

    def slow(task: Survey) -> Surveyed:
        seen.append(worker.watch.worst().limit_s)
        gate.wait(10)
        return Surveyed(task.key)

    monkeypatch.setattr(survey, "survey", slow)
    worker._start(Survey("s", tmp_path / "v.7z", 0, tmp_path, (), Limits()))
    worker.decoders.submit(seen.append, "a page").result(10)
    until(lambda: len(seen) == 2)
    assert sorted(map(str, seen)) == ["a page", str(math.inf)]
    gate.set()
    until(lambda: told(worker) == [Surveyed("s")])
