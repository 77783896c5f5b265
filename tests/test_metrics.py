"""GET /metrics as Prometheus reads it. A whole job's figures: test_commands.py."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from client import Client
from hypothesis import given
from prometheus_client.parser import text_string_to_metric_families
from serving import finished, queued, still

from messages import Beat
from work import metrics, workers

# Prometheus, "Metric and label naming": base units at the end of a name, "_total" on what only rises.
NAME = re.compile(r"(reichan|process)(_[a-z]+)+")
NO_BASE_UNITS = re.compile(r"_(ms|millis\w*|minutes|hours|kb|mb|gb|megabytes|percent)(_|$)")


@pytest.fixture
def service(tmp_path):
    with still(tmp_path) as service:
        yield service


def told(service):
    """name -> family, as a scrape finds them."""
    reply = Client(service.url).call("GET", "/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(reply.body.decode()))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def values(family):
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def test_names_and_units_are_as_prometheus_asks(service):
    for family in told(service).values():
        assert NAME.fullmatch(family.name) and not NO_BASE_UNITS.search(family.name)
        assert family.documentation.endswith(".") and family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")


def test_jobs_are_told_by_state_and_what_waits_is_told(service):
    finished(service)
    queued(service)
    found = told(service)
    assert values(found["reichan_jobs"]) == {
        ("PENDING",): 1, ("RUNNING",): 0, ("SUCCESS",): 1, ("FAILED",): 0,
    }  # fmt: skip
    assert values(found["reichan_queued_jobs"]) == {(): 1}


def test_uploads_and_answers_are_counted(service):
    client = Client(service.url)
    client.call("PUT", "/incoming/a.zip", b"x" * 1000)
    client.call("PUT", "/incoming/a.zip", b"x" * 23)
    client.call("GET", "/nothing")
    found = told(service)
    assert values(found["reichan_uploaded_bytes"]) == {(): 1023}
    assert values(found["reichan_http_requests"]) == {("201",): 1, ("204",): 1, ("404",): 1}


def test_a_card_s_memory_is_told_where_there_is_one(service):
    assert not told(service)["reichan_gpu_memory_used_bytes"].samples
    slots = [SimpleNamespace(card=card) for card in (("cuda:0", 3 << 30, 8 << 30), None)]
    for n, slot in enumerate(slots):
        service.dispatcher.workers[n] = slot
    found = told(service)
    service.dispatcher.workers.clear()
    assert values(found["reichan_gpu_memory_used_bytes"]) == {("cuda:0",): 3 << 30}
    assert values(found["reichan_gpu_memory_size_bytes"]) == {("cuda:0",): 8 << 30}
    assert values(found["reichan_workers"]) == {(): 2}


def test_a_beat_brings_the_card_s_memory_to_its_worker(service):
    slot = SimpleNamespace(card=None)
    service.dispatcher._on_event(slot, Beat(0.0, 1.0, ("cuda:1", 5, 9)))
    assert slot.card == ("cuda:1", 5, 9)


@pytest.mark.parametrize(
    ("capacity", "doom", "exitcode", "reason"),
    [(0, "no torch", 3, "boot"), (4, "cancel", -9, "cancel"), (4, "no sign of life", -9, "hung"),
     (4, None, -9, "signal"), (4, None, 1, "exit")],
)  # fmt: skip
def test_deaths_are_told_apart(capacity, doom, exitcode, reason):
    process = SimpleNamespace(exitcode=exitcode)
    slot = SimpleNamespace(capacity=capacity, doom=doom, process=process)
    assert workers.kind_of_death(slot) == reason
    assert reason in dict.fromkeys(key for key, in values_of(metrics.Metrics().worker_deaths))


def values_of(counted):
    return {tuple(labels.values()): value for _, labels, value in counted.family().samples}


@given(st.lists(st.floats(0, 2000), max_size=50))
def test_a_histogram_counts_each_value_in_every_bucket_that_holds_it(amounts):
    bounds = (0.5, 60.0, 600.0)
    histogram = metrics.Histogram("reichan_x_seconds", "X.", "model", bounds)
    for amount in amounts:
        histogram.observe(amount, "m")
    (family,) = text_string_to_metric_families(metrics.expose([histogram.family()]))
    found = {(s.name[17:], s.labels.get("le")): s.value for s in family.samples}
    if amounts:
        assert found.pop(("_sum", None)) == pytest.approx(sum(amounts), abs=1e-5)
        assert found.pop(("_count", None)) == len(amounts)
        bounds_told = {float(le): count for (_, le), count in found.items()}
        assert bounds_told == {b: sum(a <= b for a in amounts) for b in (*bounds, math.inf)}
    else:
        assert not found


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r"), max_size=30))
def test_any_model_s_name_survives_as_a_label(name):
    counter = metrics.Counter("reichan_x_total", "X.", "model")
    counter.add(2, name)
    counter.add(3, name)
    (family,) = text_string_to_metric_families(metrics.expose([counter.family()]))
    assert values(family) == {(name,): 5}
