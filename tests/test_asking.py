"""asking.py: what is with the workers; the folder of answers: test_reader.py."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import JobError
from web import asking
from work.questions import WorkerDied


def asked(error: Exception | None, times: int) -> tuple[asking.Asked, list[Any]]:
    """What is known of a question that ended so, as often."""
    made = asking.Asked(SimpleNamespace(ask=lambda key, question: Future()))
    answers: list[Any] = []
    for _ in range(times):
        future = made.ask("key", None, answers.append)
        future.set_exception(error) if error else future.cancel()
    return made, answers


@pytest.mark.parametrize(
    ("error", "deadly"), [(WorkerDied("it ended"), True), (JobError("it can't start"), False), (None, False)]
)
def test_only_what_workers_died_of_is_not_asked_again(error, deadly):
    made, answers = asked(error, asking.DEATHS)
    assert (made.is_deadly("key"), made.underway) == (deadly, {}) and answers == [None] * asking.DEATHS
    assert not asked(error, asking.DEATHS - 1)[0].is_deadly("key")


def test_only_the_newest_outcomes_are_remembered(monkeypatch):
    monkeypatch.setattr(asking, "REMEMBERED", 2)
    kept: asking.Newest[int] = asking.Newest()
    for n, key in enumerate("abc"):
        kept[key] = n
    assert kept == {"b": 1, "c": 2}
