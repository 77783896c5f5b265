"""fuzz.py's short form: a clean service passes, and each planted bug is found and named by its case."""

from __future__ import annotations

import re
import sys

import fuzz
import plants
import pytest

require_linux = pytest.mark.skipif(sys.platform != "linux", reason="it looks at the service through /proc")

PLANTS = {  # the bug: (kind of cases that must find it, what is said of it)
    plants.a_route_that_raises_on_a_header: ("http", "status 500"),
    plants.chunks_that_become_requests: ("http", "answers to|without one"),
    plants.the_first_of_two_lengths_that_wins: ("http", "answers to|without one|202 for"),
    plants.a_descriptor_left_open_by_every_overlong_line: ("http", "does it: a leak"),
    plants.a_thread_that_dies_of_a_header: ("http", "without one"),
    plants.a_hang_on_many_trailers: ("http", "a hang"),
    plants.an_answer_that_tells_where_files_lie: ("http", "the answer holds"),
    plants.a_log_that_keeps_the_token: ("http", "the log holds the token"),
    plants.a_row_for_any_scale: ("http", "202 for"),
    plants.a_202_without_a_row: ("http", "jobs are lost"),
    plants.an_upload_that_leaves_its_folder: ("http", "where nothing belongs"),
    plants.a_line_that_dies_of_a_fragment: ("ws", "the log says|closed with None"),
    plants.a_line_that_hangs_on_a_fragment: ("ws", "a hang"),
    plants.pings_without_pongs: ("ws", "pings were answered"),
    plants.a_watcher_that_is_never_forgotten: ("ws", "watchers are left"),
}


@require_linux
def test_a_service_withstands_two_thousand_requests_and_five_hundred_sequences_of_frames():
    tallies = fuzz.fuzz({"http": 2000, "ws": 3000}, seed=7)
    print(fuzz.table(tallies))
    assert [tally.faults for tally in tallies.values()] == [[], []]
    assert tallies["http"].sent >= 2000 and tallies["ws"].cases >= 500
    # It must not pass by being refused at the door: every kind of answer occurred.
    answers = tallies["http"].answers | tallies["ws"].answers
    assert {"101", "200", "201", "202", "204", "206", "304", "400", "404", "409", "412", "416", "422"} <= {
        *answers
    }
    assert {"1000", "1002", "1007", "1009", "4404"} <= {*answers}


@require_linux
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant, monkeypatch):
    monkeypatch.setattr(fuzz, "HANG_S", 1.5)
    monkeypatch.setattr(fuzz, "SETTLE_S", 1.0)
    monkeypatch.setattr(fuzz, "BLOCK", 150)
    kind, words = PLANTS[plant]
    faults = fuzz.fuzz({kind: 3000}, seed=1, plant=f"plants:{plant.__name__}")[kind].faults
    assert any(re.search(words, fault) for fault in faults), faults
