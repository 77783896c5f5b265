"""Each kind of convolution of a page in rows, beside a whole page's with twice the digits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import require
from torch import Tensor, nn
from torch.nn import functional as F

from engine import nnpack, rolling
from engine.models import LEAK
from engine.nnpack import NnpackStrip
from engine.strips import Scratch, Strip
from engine.winograd import WinogradStrip

HEIGHT = 11
# What rounding may cost, of the sum of all products' magnitudes (of that, unlike of the result,
# it is about as much with any weights and any number of channels): the fewer products, the more.
ROUNDING = {Strip: 5e-7, WinogradStrip: 1e-6, NnpackStrip: 5e-6}


@pytest.fixture(autouse=True)
def the_same_weights_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ROUNDING, autouse=True)
def kind(request: pytest.FixtureRequest) -> type[Strip]:
    if request.param is NnpackStrip:
        require(nnpack.is_ready(), "torch has no NNPACK here")
    kind: type[Strip] = request.param
    return kind


def noise(channels: int, height: int, width: int, seed: int = 1) -> Tensor:
    """(1, channels, height, width), -0.5 to 0.5, channels last."""
    x = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(seed)) - 0.5
    return x.contiguous(memory_format=torch.channels_last)


def exact(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution by all its multiplications, with twice the digits."""
    assert conv.bias is not None
    return F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)


def magnitude(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The largest sum, over one result's products and its bias, of their magnitudes."""
    assert conv.bias is not None
    weight, bias = conv.weight.double().abs(), conv.bias.double().abs()
    return F.conv2d(x.double().abs(), weight, bias, padding=1).max()


def assert_right(strip: Strip, result: Tensor, conv: nn.Conv2d, x: Tensor) -> None:
    """What a Strip gave for (1, C, H, W) is the convolution, but for rounding."""
    ours, expected = strip.narrow(result).double(), exact(conv, x)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= ROUNDING[type(strip)] * magnitude(conv, x)


def strip_of(kind: type[Strip], conv: nn.Conv2d, scratch: Scratch) -> Strip:
    return kind(conv, scratch, kind.kernels_of(conv))


def in_turn(strip: Strip, x: Tensor, rows: list[int], take: Callable[[Tensor], None]) -> Tensor:
    """A page's rows, so many at a time, through one strip."""
    parts = list(strip.widen(x).split(rows, 2))
    results = []
    for i, part in enumerate(parts, 1):
        take(part)
        results.append(strip.run(last=i == len(parts))[1])
    return torch.cat(results, 2)


def beside_the_page(phases: Tensor, width: int) -> Tensor:
    """What stands left and right of a page in a WinogradStrip's phases."""
    row = phases.permute(2, 1, 3, 0).flatten(2)  # rows, C, 4 * (columns + 1)
    return torch.cat([row[..., :1], row[..., 1 + width :]], 2)


# With 12 there are more than nnpack.FEW_CHANNELS, so that NNPACK computes them.
@pytest.mark.parametrize("cin", [5, 12])
@pytest.mark.parametrize("rows", [[11], [1] * 11, [5, 1, 5], [2, 9]], ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 32])
@torch.inference_mode()
def test_a_row_of_any_width_in_any_portions(kind, width, rows, cin):
    conv = nn.Conv2d(cin, 7, 3, padding=1)
    strip, x = strip_of(kind, conv, Scratch(width)), noise(cin, HEIGHT, width)
    result = in_turn(strip, x, rows, strip.take)
    assert_right(strip, result, conv, x)
    if kind is WinogradStrip:
        assert not beside_the_page(result, width).any()


@pytest.mark.parametrize("cin, cout", [(3, 64), (12, 64), (64, 64), (64, 48), (192, 64), (64, 3)])
@torch.inference_mode()
def test_the_error_is_that_of_rounding(kind, cin, cout):
    conv, width = nn.Conv2d(cin, cout, 3, padding=1), 41
    strip, x = strip_of(kind, conv, Scratch(width)), noise(cin, HEIGHT, width)
    assert_right(strip, in_turn(strip, x, [HEIGHT], strip.take), conv, x)


@torch.inference_mode()
def test_what_a_row_held_before_is_forgotten(kind):
    conv, scratch = nn.Conv2d(12, 4, 3, padding=1), Scratch(10)
    spoilt = strip_of(kind, conv, scratch)
    in_turn(spoilt, noise(12, HEIGHT, 10).mul_(float("inf")), [HEIGHT], spoilt.take)
    strip, x = strip_of(kind, conv, scratch), noise(12, HEIGHT, 10, seed=2)
    assert_right(strip, in_turn(strip, x, [4, 7], strip.take), conv, x)


@torch.inference_mode()
def test_a_scratch_that_has_grown_is_not_held(kind):
    conv, scratch = nn.Conv2d(12, 4, 3, padding=1), Scratch(10)
    strip = strip_of(kind, conv, scratch)
    strip.take(strip.widen(noise(12, HEIGHT, 10)))
    before = strip.seen.untyped_storage().data_ptr()
    strip.run(last=False)
    assert strip.seen.untyped_storage().data_ptr() != before


@torch.inference_mode()
def test_rows_through_leaky_relu(kind):
    conv, x = nn.Conv2d(12, 6, 3, padding=1), noise(12, HEIGHT, 13)
    strip = strip_of(kind, conv, Scratch(13))
    result = in_turn(strip, x, [6, 5], strip.take_leaky)
    assert_right(strip, result, conv, F.leaky_relu(noise(12, HEIGHT, 13), LEAK))


@torch.inference_mode()
def test_rows_through_prelu(kind):
    conv, x, slopes = nn.Conv2d(12, 6, 3, padding=1), noise(12, HEIGHT, 13), torch.linspace(-2, 2, 12)
    strip = strip_of(kind, conv, Scratch(13))
    result = in_turn(strip, x, [6, 5], lambda part: strip.take_prelu(part, slopes))
    assert_right(strip, result, conv, F.prelu(x, slopes))


@torch.inference_mode()
def test_rows_beside_what_another_strip_saw(kind):
    first, second = nn.Conv2d(12, 2, 3, padding=1), nn.Conv2d(14, 3, 3, padding=1)
    scratch, x = Scratch(13), noise(12, HEIGHT, 13)
    one, two = strip_of(kind, first, scratch), strip_of(kind, second, scratch)

    def both(part: Tensor) -> None:
        one.take(part)
        two.take_beside(*one.run(last=True))

    result = in_turn(two, x, [HEIGHT], both)
    beside = torch.cat([x, F.leaky_relu(exact(first, x).float(), LEAK)], 1)
    assert_right(two, result, second, beside)


@pytest.mark.parametrize("width", [1, 300, 827, 2000, 8000, 40_000])
@pytest.mark.parametrize("widest", [24, 64, 192])
def test_rows_at_a_time_are_whole_groups(width, widest):
    rows = NnpackStrip.rows_at_once(width, widest)
    tail = NnpackStrip.tail_rows_at_once(width, widest)
    assert rows % nnpack.STEP == 0 and 4 * tail % nnpack.STEP == 0
    assert rows == nnpack.STEP or rows * width * widest <= NnpackStrip.values


@pytest.mark.parametrize("machine, is_x86", [("x86_64", True), ("AMD64", True), ("arm64", False)])
@pytest.mark.parametrize("torch_has_nnpack", [True, False])
def test_which_are_usable_where(machine, is_x86, torch_has_nnpack, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.nnpack, "is_available", lambda: torch_has_nnpack)
    fewer = ["winograd", *(["nnpack"] if torch_has_nnpack else [])]
    assert rolling.usable_kinds() == ["direct", *(fewer if is_x86 else [])]
