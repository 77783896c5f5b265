"""survey.py: what a volume's headers tell, before anything of it is decoded."""

from __future__ import annotations

from dataclasses import replace

from serving import PARAMS, png

from engine import survey
from messages import Workload


def test_a_tally_counts_what_will_be_computed_and_what_stays():
    tally = survey.Tally(replace(PARAMS, target_width=100))
    for width in (50, 200):
        tally.add(png(width, 40)[:64], 1000)
    tally.add(b"no image", 5)
    # The third page tells nothing: it counts as one like the others.
    assert tally.workload(2) == Workload(1, 2000, 100 * 80, 1000, 1000)
    assert tally.workload(4) == Workload(2, 4000, 16_000, 2000, 2000)
    assert survey.Tally(PARAMS).workload(3) == Workload()


def test_a_tally_counts_a_page_in_the_cache_as_bytes():
    tally = survey.Tally(PARAMS)
    assert tally.add_cached(700) and not tally.add_cached(None)
    tally.add(png(50, 40)[:64], 1000)
    assert tally.workload(2) == Workload(1, 2000, 8000, 1000, carried_bytes=700, cached=1)
