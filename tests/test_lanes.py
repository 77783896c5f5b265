"""lanes.py: two queues, by turns; a step that raises ends neither."""

from __future__ import annotations

import threading

from engine import lanes


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
