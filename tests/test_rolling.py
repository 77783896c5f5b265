"""A page in rows, beside the page as a whole."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from helpers import require
from test_models import NETWORKS

from engine import models, rolling
from engine.enlarging import EnlargingStrip
from engine.strips import Scratch, Strip


def page(height: int, seed: int = 1) -> torch.Tensor:
    """(1, 3, height, 12) noise, channels last."""
    noise = torch.rand(1, 3, height, 12, generator=torch.Generator().manual_seed(seed))
    return noise.contiguous(memory_format=torch.channels_last)


def page_of(results: torch.Tensor) -> torch.Tensor:
    """What a Roller gives, as forward() gives it."""
    shuffle = math.isqrt(results.shape[1] // 3)
    rows = results.unflatten(1, (shuffle, shuffle, 3))[0]  # (shuffle, shuffle, BGR, h, w)
    return rows.permute(2, 3, 0, 4, 1).flip(0).flatten(3, 4).flatten(1, 2)[None]


@pytest.fixture(params=rolling.KINDS, autouse=True)
def convolutions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kind of convolution, its strips as low as those of a wide page."""
    require(request.param in rolling.usable_kinds(), f"torch has no {request.param} here")
    monkeypatch.setattr(rolling.KINDS[request.param], "pixels", 16 * 12)
    return request.param


@pytest.fixture
def strip(convolutions: str) -> type[Strip]:
    return rolling.KINDS[convolutions]


@pytest.mark.parametrize("height", [4, 16, 20, 36, 148])
@pytest.mark.parametrize("kind", NETWORKS)
def test_rows_in_turn_are_those_of_the_whole_page(kind, height, convolutions, strip):
    network = NETWORKS[kind]
    with torch.inference_mode():
        parts = list(rolling.Roller(network, convolutions).roll(page(height)))
        assert torch.allclose(page_of(torch.cat(parts, 2)), network(page(height)), atol=1e-5)
    # The last come with all that waited for them, but never with the rest of the page.
    widest = max(conv.in_channels for conv in rolling.Roller(network, convolutions).kernels)
    at_once = strip.rows_at_once(12 // network.multiple, widest) * network.multiple
    assert max(part.shape[2] for part in parts) * network.shuffle <= (at_once + 5) * network.scale


@pytest.mark.parametrize("kind", NETWORKS)
def test_no_row_is_computed_twice(kind, convolutions, strip, monkeypatch):
    network, rows = NETWORKS[kind], Counter()
    convolve, corners = strip.convolve, EnlargingStrip.corners

    def counted(self, seen):
        result = convolve(self, seen)
        rows[id(self.conv)] += result.shape[2]
        return result

    def counted_corners(self, x, last):
        result = corners(self, x, last)
        rows[id(self.conv)] += 2 * result.shape[2] - self.above - last  # two halves lie beside the page
        return result

    monkeypatch.setattr(strip, "convolve", counted)
    monkeypatch.setattr(EnlargingStrip, "corners", counted_corners)
    roller = rolling.Roller(network, convolutions)
    with torch.inference_mode():
        list(roller.roll(page(60)))
        rolled = dict(rows)
        rolled[id(network.last)] = rolled.pop(id(roller.last))
        rows.clear()
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda conv, _, y: rows.update({id(conv): y.shape[2]}))
        network(page(60))
    for module in network.modules():
        module._forward_hooks.clear()
    assert rolled == rows


def test_what_is_made_of_the_weights_is_made_once(convolutions, strip, monkeypatch):
    made, kernels_of = [], strip.kernels_of
    monkeypatch.setattr(strip, "kernels_of", lambda conv: made.append(conv) or kernels_of(conv))
    roller = rolling.Roller(NETWORKS["compact x2"], convolutions)
    with torch.inference_mode():
        for height in (20, 36):
            list(roller.roll(page(height)))
    assert len(made) == 5


def test_pages_that_take_turns_do_not_mix(convolutions):
    network = NETWORKS["rrdb x4"]
    with torch.inference_mode():
        one = rolling.Roller(network, convolutions).roll(page(64, seed=1))
        begun = [next(one)]
        other = torch.cat(list(rolling.Roller(network, convolutions).roll(page(64, seed=2))), 2)
        whole = torch.cat([*begun, *one], 2)
        assert torch.allclose(page_of(other), network(page(64, seed=2)), atol=1e-5)
        assert torch.allclose(page_of(whole), network(page(64, seed=1)), atol=1e-5)


@pytest.mark.parametrize("height", [1, 16, 17, 40, 90])
def test_a_network_with_more_layers_than_a_strip_has_rows_waits_for_them(height, convolutions):
    network = models.SRVGGNetCompact(16, 30, 2)
    with torch.inference_mode():
        parts = list(rolling.Roller(network, convolutions).roll(page(height)))
        assert torch.allclose(page_of(torch.cat(parts, 2)), network(page(height)), atol=1e-5)


def test_memory_depends_on_the_width_only(convolutions, monkeypatch):
    rooms = []
    room, channels_of = Scratch.room, Scratch.channels

    def noted_room(self, planes, channels, rows, columns, dtype):
        rooms.append(rows)
        return room(self, planes, channels, rows, columns, dtype)

    def noted_channels(self, channels, rows, columns, dtype):
        rooms.append(rows)
        return channels_of(self, channels, rows, columns, dtype)

    monkeypatch.setattr(Scratch, "room", noted_room)
    monkeypatch.setattr(Scratch, "channels", noted_channels)
    network = models.RRDBNet(16, 2, 8, 4)
    with torch.inference_mode():
        list(rolling.Roller(network, convolutions).roll(page(112)))
        short = max(rooms)  # as many rows more as make whole strips of either height, 12 and 16
        list(rolling.Roller(network, convolutions).roll(page(1072)))
    assert max(rooms) == short
