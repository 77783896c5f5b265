"""Who gets which page: dealing by the dispatcher's own rules, to workers that only let time pass."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import JobTable
from messages import EngineChoice
from storage import Layout
from work.dispatch import Dispatcher
from work.runs import Run
from work.workers import FAILURES, REST_S, Slot, quickest


class Card(Slot):
    """A worker that takes page_s for each of its pages, one after the other."""

    def __init__(self, index: int, page_s: float, capacity: int) -> None:
        super().__init__(index)
        self.page_s, self.capacity = page_s, capacity
        self.queue: deque[tuple[str, int, int]] = deque()
        self.done_s = 0.0  # when its present page will be done
        self.took = 0

    def post(self, item: Any) -> None:
        """A task: its key."""
        if not self.queue:
            self.done_s = time.monotonic() + self.page_s
        self.queue.append(item)

    def kill(self, why: str) -> None:
        """Nobody does."""


class House:
    """A dispatcher with these cards, and its jobs. Its time is ours."""

    def __init__(self, root: Path, cards: list[Card], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.cards = 1000.0, cards
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        layout = Layout(root, root / "models")
        layout.create()
        self.dispatcher = Dispatcher(JobTable(layout.database), layout, EngineChoice(), slots=9)
        self.dispatcher.workers = dict(enumerate(cards))  # type: ignore[arg-type]
        monkeypatch.setattr(self.dispatcher, "_send_page", self.send)
        monkeypatch.setattr(self.dispatcher, "_hire", lambda: None)
        for card in cards:
            card.used_s = self.now_s
        self.served: list[str] = []

    def job(self, job_id: str, pages: int, alone: bool = False) -> Run:
        """A job whose pages are to be dealt."""
        run = Run(SimpleNamespace(id=job_id, attempt=1), Path(), Path(), file_task=None)  # type: ignore[arg-type]
        (run.alone if alone else run.todo).extend(range(1, pages + 1))
        self.dispatcher.runs[job_id] = run
        return run

    def send(self, run: Run, slot: Slot, n: int, _carry: str | None) -> None:
        """As Dispatcher._send_page, whose pages are rows."""
        run.in_flight.add(n)
        slot.give(run.key(n), run.key(n))  # type: ignore[arg-type]

    def step(self) -> bool:
        """Deal, then go to the next moment at which a page is done. Whether there was one."""
        self.dispatcher._deal()
        busy = [card for card in self.cards if card.queue]
        if not busy:
            return False
        card = min(busy, key=lambda card: card.done_s)
        self.now_s = card.done_s
        key = card.queue.popleft()
        card.took += 1
        card.count_page(self.now_s)
        card.free(key)
        card.done_s = self.now_s + card.page_s
        self.dispatcher.runs[key[0]].in_flight.discard(key[2])
        self.served.append(key[0])
        return True

    def run(self) -> float:
        """Seconds until nothing is left."""
        began_s = self.now_s
        while self.step():
            pass
        return self.now_s - began_s


@pytest.mark.parametrize("depth", [4, 18])
@pytest.mark.parametrize("pages", [40, 200])
@pytest.mark.parametrize("slower", [2, 3, 6, 10])
def test_a_slower_card_beside_a_fast_one_makes_no_volume_slower(
    depth, pages, slower, tmp_path, monkeypatch
):
    house = House(tmp_path, [Card(0, 1.0, depth), Card(1, float(slower), depth)], monkeypatch)
    run = house.job("a", pages)
    took_s, best_s = house.run(), pages * slower / (slower + 1)
    assert not run.todo and house.cards[1].took
    # What the slow one takes before its pace is known may be more than its share of a short volume.
    assert took_s <= max(best_s + 2 * slower, 3 * slower)


@pytest.mark.parametrize("depth", [4, 18])
def test_cards_that_are_alike_share_a_volume(depth, tmp_path, monkeypatch):
    house = House(tmp_path, [Card(n, 1.0, depth) for n in range(3)], monkeypatch)
    house.job("a", 90)
    assert house.run() <= 31 and {card.took for card in house.cards} <= {29, 30, 31}


def test_a_card_that_was_slow_for_a_while_is_tried_again(tmp_path, monkeypatch):
    """Its pace is not believed for ever: something else may have used it."""
    fast, other = Card(0, 1.0, 4), Card(1, 50.0, 4)
    house = House(tmp_path, [fast, other], monkeypatch)
    house.job("a", 600)
    while other.took < 5:
        assert house.step()
    other.page_s, before = 1.0, other.took
    rest = 600 - fast.took - before
    began_s = house.now_s
    house.run()
    assert house.now_s - began_s < 0.75 * rest and other.took > rest // 4


def test_jobs_whose_pages_must_be_alone_take_turns_at_one_worker(tmp_path, monkeypatch):
    house = House(tmp_path, [Card(0, 1.0, 4)], monkeypatch)
    for job_id in "abc":
        house.job(job_id, 2, alone=True)
    house.run()
    assert sorted(house.served) == list("aabbcc") and not house.cards[0].tasks


def test_no_page_waits_for_ever_behind_those_that_must_be_alone(tmp_path, monkeypatch):
    house = House(tmp_path, [Card(0, 1.0, 4), Card(1, 1.0, 4)], monkeypatch)
    for job_id in "abc":
        house.job(job_id, 3, alone=True)
    house.job("d", 20)
    house.run()
    assert {job_id: house.served.count(job_id) for job_id in "abcd"} == {"a": 3, "b": 3, "c": 3, "d": 20}


def test_a_worker_on_which_pages_fail_leaves_them_to_others_for_a_while():
    """One that lacks a plugin, or memory, fails at once: it would always be the first that has room."""
    bad, good = Card(0, 1.0, 4), Card(1, 1.0, 3)
    for _ in range(FAILURES):
        assert quickest([bad, good], 100, 0.0) is bad
        bad.count_failure(0.0)
    assert quickest([bad, good], 100, 1.0) is good
    good.tasks = dict.fromkeys("123")  # type: ignore[assignment]
    assert quickest([bad, good], 100, 1.0) is None
    assert quickest([bad], 100, 1.0) is bad  # rather it than nobody
    good.tasks = {}
    assert quickest([bad, good], 100, REST_S + 1) is bad
    bad.count_failure(REST_S + 1)
    assert quickest([bad, good], 100, REST_S + 2) is good
    bad.count_page(REST_S + 3)
    bad.tasks = good.tasks = {}
    assert quickest([bad, good], 100, REST_S + 3) is bad


def test_a_page_that_failed_is_tried_on_another_worker(tmp_path, monkeypatch):
    house = House(tmp_path, [Card(0, 1.0, 3), Card(1, 1.0, 3)], monkeypatch)
    run = house.job("job", 1, alone=True)
    assert house.dispatcher._emptied(run) is house.cards[0]
    run.failed_on[1] = 0
    assert house.dispatcher._emptied(run) is house.cards[1]
    house.cards[1].tasks = {"busy": None}  # type: ignore[dict-item]
    assert house.dispatcher._emptied(run) is None and house.cards[1].kept_for == "job"
    house.cards[1].tasks = {}
    assert house.dispatcher._emptied(run) is house.cards[1]
    del house.dispatcher.workers[1]
    assert house.dispatcher._emptied(run) is house.cards[0]
