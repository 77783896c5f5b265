"""A convolution of rows at twice their size, beside one of rows that were enlarged."""

from __future__ import annotations

import pytest
import torch
from test_strips import magnitude
from torch import Tensor, nn
from torch.nn import functional as F

from engine.enlarging import EnlargingStrip
from engine.models import LEAK

LAYOUTS = [torch.channels_last, torch.contiguous_format]


def page(height: int, width: int) -> Tensor:
    """(1, 12, height, width), -0.5 to 0.5."""
    return torch.rand(1, 12, height, width, generator=torch.Generator().manual_seed(1)) - 0.5


def conv_of(dtype: torch.dtype) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(12, 5, 3, padding=1, dtype=dtype)


def in_turn(conv: nn.Conv2d, x: Tensor, rows: list[int], layout: torch.memory_format) -> list[Tensor]:
    """A page's rows, so many at a time."""
    kernels = EnlargingStrip.kernels_of(conv, layout)
    strip = EnlargingStrip(conv, kernels, x.shape[3], layout)
    parts = x.contiguous(memory_format=layout).split(rows, 2)
    return [strip.run(part, last=i == len(parts)) for i, part in enumerate(parts, 1)]


def enlarged(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="nearest")), LEAK)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("rows", [[11], [1] * 11, [5, 1, 5], [2, 9]], ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 8, 23])
@torch.inference_mode()
def test_the_same_as_of_enlarged_rows_in_any_portions(width, rows, layout):
    conv, x = conv_of(torch.float64), page(11, width).double()
    parts = in_turn(conv, x, rows, layout)
    lag = [1, *([0] * (len(rows) - 1))]
    lag[-1] -= 1
    assert [part.shape[2] for part in parts] == [2 * n - less for n, less in zip(rows, lag, strict=True)]
    assert torch.allclose(torch.cat(parts, 2), enlarged(conv, x), rtol=0, atol=1e-12)


# In fp32 the sums' rounding tells, in bf16 that of the weights and of the result.
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype, most_eps", [(torch.float32, 4), (torch.bfloat16, 0.5)], ids=str)
@torch.inference_mode()
def test_results_lie_as_asked_and_are_as_exact_as_their_type(dtype, most_eps, layout):
    conv, x = conv_of(dtype), page(11, 9).to(dtype)
    part = in_turn(conv, x, [11], layout)[0]
    assert part.dtype == dtype
    assert part.stride(1 if layout == torch.channels_last else 3) == 1
    conv, x = conv.double(), x.double()
    error = (part.double() - enlarged(conv, x)).abs().max()
    assert error <= most_eps * torch.finfo(dtype).eps * magnitude(conv, F.interpolate(x, scale_factor=2))


def test_added_weights_keep_a_kernels_sum_in_bf16():
    """So that a flat page stays as bright as it was."""
    conv = conv_of(torch.bfloat16)
    kernels = EnlargingStrip.kernels_of(conv, torch.channels_last)
    assert kernels.dtype == torch.bfloat16
    sums = conv.weight.double().sum((2, 3)).repeat(4, 1)
    # The smallest tap takes on what is left: a step of its own is what can't be mended.
    steps = kernels.double().abs().amin((2, 3)) * torch.finfo(torch.bfloat16).eps
    assert ((kernels.double().sum((2, 3)) - sums).abs() <= steps).all()
