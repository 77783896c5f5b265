"""Half the multiplications, beside all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import winograd
from engine.models import LEAK
from engine.strips import Scratch
from engine.winograd import WinogradStrip

HEIGHT = 11


def noise(channels: int, height: int, width: int, seed: int = 1) -> Tensor:
    """(1, channels, height, width), -0.5 to 0.5, channels last."""
    x = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(seed)) - 0.5
    return x.contiguous(memory_format=torch.channels_last)


def exact(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution by all its multiplications, with twice the digits."""
    assert conv.bias is not None
    return F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)


def strip_of(conv: nn.Conv2d, scratch: Scratch) -> WinogradStrip:
    return WinogradStrip(conv, scratch, winograd.kernels_of(conv))


def in_turn(strip: WinogradStrip, x: Tensor, rows: list[int], take: Callable[[Tensor], None]) -> Tensor:
    """A page's rows, so many at a time, through one strip."""
    parts = list(strip.widen(x).split(rows, 2))
    results = []
    for i, part in enumerate(parts, 1):
        take(part)
        results.append(strip.run(last=i == len(parts))[1])
    return torch.cat(results, 2)


def beside_the_page(phases: Tensor, width: int) -> Tensor:
    """What stands left and right of a page in its phases."""
    row = phases.permute(2, 1, 3, 0).flatten(2)  # rows, C, 4 * (columns + 1)
    return torch.cat([row[..., :1], row[..., 1 + width :]], 2)


@pytest.mark.parametrize("rows", [[11], [1] * 11, [5, 1, 5], [2, 9]], ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 32])
@torch.inference_mode()
def test_a_row_of_any_width_in_any_portions(width, rows):
    conv = nn.Conv2d(5, 7, 3, padding=1)
    strip, x = strip_of(conv, Scratch(width)), noise(5, HEIGHT, width)
    phases = in_turn(strip, x, rows, strip.take)
    assert torch.allclose(strip.narrow(phases).double(), exact(conv, x), atol=2e-6)
    assert not beside_the_page(phases, width).any()


@pytest.mark.parametrize("cin, cout", [(3, 64), (64, 64), (64, 48), (192, 64), (64, 3)])
@torch.inference_mode()
def test_the_error_is_that_of_fp32(cin, cout):
    conv, width = nn.Conv2d(cin, cout, 3, padding=1), 41
    strip, x = strip_of(conv, Scratch(width)), noise(cin, HEIGHT, width)
    ours = strip.narrow(in_turn(strip, x, [HEIGHT], strip.take))
    assert (ours - exact(conv, x)).abs().max() < 5e-6 * exact(conv, x).abs().max()


@torch.inference_mode()
def test_what_a_row_held_before_is_forgotten():
    conv, scratch = nn.Conv2d(4, 4, 3, padding=1), Scratch(10)
    spoilt = strip_of(conv, scratch)
    in_turn(spoilt, noise(4, HEIGHT, 10).mul_(float("inf")), [HEIGHT], spoilt.take)
    strip, x = strip_of(conv, scratch), noise(4, HEIGHT, 10, seed=2)
    assert torch.allclose(
        strip.narrow(in_turn(strip, x, [4, 7], strip.take)).double(), exact(conv, x), atol=2e-6
    )


@torch.inference_mode()
def test_rows_through_leaky_relu():
    conv, x = nn.Conv2d(4, 6, 3, padding=1), noise(4, HEIGHT, 13)
    strip = strip_of(conv, Scratch(13))
    ours = strip.narrow(in_turn(strip, x, [6, 5], strip.take_leaky))
    assert torch.allclose(ours.double(), exact(conv, F.leaky_relu(x, LEAK)), atol=2e-6)


@torch.inference_mode()
def test_rows_beside_what_another_strip_saw():
    first, second = nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
    scratch, x = Scratch(13), noise(4, HEIGHT, 13)
    one, two = strip_of(first, scratch), strip_of(second, scratch)

    def both(part: Tensor) -> None:
        one.take(part)
        two.take_beside(*one.run(last=True))

    ours = two.narrow(in_turn(two, x, [HEIGHT], both))
    beside = torch.cat([x, F.leaky_relu(exact(first, x).float(), LEAK)], 1)
    assert torch.allclose(ours.double(), exact(second, beside), atol=2e-6)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
@torch.inference_mode()
def test_rows_at_twice_their_size(width):
    conv, x = nn.Conv2d(4, 3, 3, padding=1), noise(4, HEIGHT, width)
    before, strip = strip_of(conv, Scratch(width)), strip_of(conv, Scratch(2 * width))
    strip.take_enlarged(before.widen(x))
    ours = strip.narrow(strip.run(last=True)[1])
    enlarged = F.interpolate(x, scale_factor=2, mode="nearest")
    assert torch.allclose(ours.double(), exact(conv, enlarged), atol=2e-6)


@pytest.mark.parametrize("machine, gains", [("x86_64", True), ("AMD64", True), ("arm64", False)])
def test_where_it_is_taken(machine, gains, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert winograd.pays(torch.float32) == gains
    assert not winograd.pays(torch.bfloat16)
