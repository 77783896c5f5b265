"""node.py: the actor of a cluster's node, without the cluster."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import png, until

import storage
from messages import ComputePage, EngineChoice, Limits, PageDone, Params, Plan, Settle, Settled, TaskFailed
from work.node import CODE, MODELS, Declined, Node, Spooled, Weights, can_follow, code_hash
from work.workers import run_worker

PLAN = Plan("m", "a" * 64, "wheel", "cuda", "fp16", "native", 512, 18, 4)


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> Iterator[tuple[Node, Callable[..., list[Any]]]]:
    """What runs on a node, and how to have it compute a page by a plan: the events that come of it."""
    place = tmp_path_factory.mktemp("node")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(place))
        choice = EngineChoice(device="cpu", precision="fp32", model_root=place)
        made = Node(choice, run_worker, code_hash())
    worker = made.worker.process
    usual = Params(model="realesr-animevideov3")

    def ended(*kinds: type) -> list[Any]:
        found: list[Any] = []
        until(lambda: [found.extend(made.collect()), any(isinstance(one, kinds) for one, _ in found)][1], 60)
        return [one for one in found if isinstance(one[0], kinds)]

    def compute(source: str = "1.png", params: Params = usual, **changes: Any) -> list[Any]:
        made.worker.post(Settle("job", 1, params, None))
        plan = replace(ended(Settled)[0][0].plan, **changes)
        made.give([(ComputePage("job", 1, 1, Path(source), Path("1"), params, plan, Limits()), png())])
        return ended(PageDone, Declined)

    yield made, compute
    made.close()
    assert not worker.is_alive() and not [*place.glob("reichan-node-*")]


def test_a_page_of_another_machine_than_the_plan_s_says_so(node):
    ((event, data),) = node[1](machine="a card")
    assert isinstance(event, PageDone) and hashlib.sha256(data).hexdigest() == event.sha256
    assert event.deviation.startswith("on ") and "torch" in event.deviation


def test_so_does_a_page_that_no_network_made(node):
    params = Params(model="realesr-animevideov3", profile="kobo-touch", target_width=16)
    ((event, _),) = node[1](params=params, machine="a card")
    assert event.deviation.startswith("reduced from 32x48, by no network; on ")


def test_half_a_double_page_is_half_of_it_on_a_node_too(node):
    ((whole, _),), ((half, _),) = node[1](), node[1](source="1.left.png")
    assert (2 * half.width, half.height) == (whole.width, whole.height)
    assert (whole.deviation, half.deviation) == (None, "the left half of a double page")


def test_a_node_that_would_compute_otherwise_gives_the_page_back(node):
    ((event, data),) = node[1](precision="bf16")
    assert (event.code, data) == (None, None) and "in fp32, not by" in event.detail
    assert not [*node[0].spool.iterdir()]


def test_a_node_has_the_weights_that_the_service_has(tmp_path):
    node = object.__new__(Node)  # without its worker
    node.spool = tmp_path
    for name, data in (("own.pth", b"1"), ("Own.safetensors", b"2"), ("other.pth", b"3"), ("", None)):
        node._keep_weights(Weights("other" if name == "other.pth" else "own", name, b"trusted"), data)
    here = {path.name: path.read_bytes() for path in (tmp_path / MODELS).iterdir()}
    assert here == {"other.pth": b"3", "trusted.sha256": b"trusted"}


def bare_node(spool: Path) -> Node:
    """A node without its worker."""
    node = object.__new__(Node)
    node.spool, node.pages, node.news, node.own = spool, {}, deque(), {}
    node.lock = threading.RLock()
    node.changed = threading.Condition(node.lock)
    node.is_lost, node.beat, node.held, node.asked = False, None, [], []
    node.folders = 0
    return node


def test_a_page_outside_any_job_that_finds_no_room_is_asked_for_elsewhere(tmp_path):
    """Not declined, as a job's is: nobody waits for that."""
    node = bare_node(tmp_path / "full")
    node.give([(ComputePage("single", 0, 1, Path("1.png"), Path("1"), Params(), None, Limits()), png())])
    ((event, data),) = node.collect()
    assert (type(event), event.job_id, event.code, data) == (TaskFailed, "single", "DISK", None)


@pytest.mark.parametrize("plan", [PLAN, None])
def test_a_page_that_cannot_be_read_back_goes_elsewhere_and_is_not_forgotten(tmp_path, plan):
    node = bare_node(tmp_path)
    task = ComputePage("job", 1, 1, Path("1.png"), Path("1"), Params(), plan, Limits())
    node.pages["job", 1, 1] = Spooled(task, tmp_path / "gone")
    node._on_event(PageDone("job", 1, 1, "page.jpg", "0" * 64, 1, 1, 1, "L", 0.1))
    ((event, data),) = node.collect()
    assert (type(event), event.code, data) == (Declined if plan else TaskFailed, "DISK", None)


def test_a_node_whose_worker_ended_takes_nothing_any_more(tmp_path):
    node = bare_node(tmp_path)
    node.is_lost = True
    task = ComputePage("job", 1, 1, Path("1.png"), Path("1"), Params(), None, Limits())
    node.give([(task, png())])
    assert not node.pages and not node.news and not list(tmp_path.iterdir())


def test_a_node_with_another_version_of_the_service_is_refused():
    assert {*storage.PIPELINE} < {*CODE}
    with pytest.raises(RuntimeError, match="another version"):
        Node(EngineChoice(), run_worker, "0" * 64)


@pytest.mark.parametrize(
    ("own", "follows"),
    [
        ({}, True),
        ({"tile": 256, "batch": 1, "machine": "another"}, True),  # the plan's are taken
        ({"weights_sha256": "b" * 64}, False),
        ({"device": "cpu", "precision": "fp32"}, False),
        ({"precision": "fp32"}, False),  # an older card, on which fp16 even gave black pages
        ({"engine": "upstream"}, False),
    ],
)
def test_a_node_follows_a_plan_that_it_could_have_made(own, follows):
    assert can_follow(PLAN, replace(PLAN, **own)) == follows
    auto = replace(PLAN, model="auto", choices=(PLAN, replace(PLAN, weights_sha256="c" * 64)))
    mine = replace(auto, choices=(auto.choices[1], replace(PLAN, **own)))
    assert can_follow(auto, mine) == follows
