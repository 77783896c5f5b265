"""A 3x3 convolution in fp32 with a fifth of the multiplications.

Map: is_ready - NnpackStrip
Rule: a Strip to whoever uses it; results differ from a Strip's by rounding alone.
Runs in: the worker process only (it loads torch). Knows nothing of networks, pages and processes.

torch brings NNPACK (Dukhan, github.com/Maratyszcza/NNPACK) for Linux, and lets a processor use it
where oneDNN can't compute. Its 3x3 convolution is Winograd's F(6x6, 3x3) (Lavin and Gray, CVPR
2016): 36 results of 64 products instead of 324, the sums in registers. On AVX2 it took half of
oneDNN's time (winograd.py: three quarters). It wants a channel's rows together, many at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.strips import Scratch, Strip

STEP = 6  # rows and columns of a group of results
FEW_CHANNELS = 8  # of input or output: oneDNN is faster (measured: 3 of either; 12 of input no longer)


def is_ready() -> bool:
    """Whether torch has NNPACK for this processor. Asked before its first use: that makes it ready."""
    return bool(torch.backends.nnpack.is_available())  # type: ignore[no-untyped-call]


class NnpackStrip(Strip):
    """A Strip whose channels lie one after another; NNPACK imagines the zeros beside the page."""

    # Input pixels at a time. Each call first transforms the kernels, 1 to 2 ms. On two cores, beside this
    # value: compact 1.3 times as long with 32,000, 1.15 with 64,000, longer with 260,000 too; 6B 1.1 times
    # with 40,000.
    pixels = 110_000
    values = 15_000_000  # of input at a time, so that a 6B page 2000 wide needs less than 2 GB
    layout = torch.contiguous_format
    margin = 0

    def __init__(self, conv: nn.Conv2d, scratch: Scratch, kernels: Tensor) -> None:
        super().__init__(conv, scratch, kernels)
        self.kept = self.kept.contiguous()

    @staticmethod
    def kernels_of(conv: nn.Conv2d) -> Tensor:
        """(cout, cin, 3, 3), each kernel's rows together."""
        return conv.weight.detach().contiguous()

    @classmethod
    def rows_at_once(cls, width: int, widest: int) -> int:
        """See Strip; whole groups."""
        pixels = min(cls.pixels, cls.values // widest)
        return STEP * max(1, pixels // width // STEP)

    @classmethod
    def tail_rows_at_once(cls, width: int, widest: int) -> int:
        """See Strip; whole groups at four times the size."""
        return STEP // 2 * max(1, cls.rows_at_once(width * 4, widest) // (STEP * 2))

    def room(self, rows: int) -> Tensor:
        """See Strip."""
        _, channels, _, width = self.kept.shape
        self.seen = self.scratch.channels(channels, self.held + rows, width, self.kept.dtype)
        self.seen[:, :, : self.held] = self.kept[:, :, : self.held]
        return self.seen[:, :, self.held :]

    def take_prelu(self, x: Tensor, slopes: Tensor) -> None:
        """See Strip; in one pass, a channel being one piece of memory."""
        inside = self.room(x.shape[2])
        for channel, slope in enumerate(slopes.tolist()):
            torch.ops.aten.leaky_relu.out(x[:, channel], slope, out=inside[:, channel])

    def rows_seen(self, last: bool) -> Tensor:
        """See Strip."""
        if not last:
            return self.seen
        return torch.cat([self.seen, torch.zeros_like(self.seen[:, :, :1])], 2)

    def convolve(self, seen: Tensor) -> Tensor:
        """(1, cin, rows + 2, W) -> (1, cout, rows, W)."""
        if min(self.conv.in_channels, self.conv.out_channels) <= FEW_CHANNELS:
            return F.conv2d(seen, self.kernels, self.conv.bias, padding=(0, 1))
        return torch._nnpack_spatial_convolution(seen, self.kernels, self.conv.bias, (0, 1))
