"""A convolution of rows at twice their size, with four ninths of its multiplications.

Map: EnlargingStrip
Rule: leaky_relu(conv(interpolate(x))), but for rounding; like a Strip it computes nothing twice.
Runs in: the worker process only (it loads torch). Knows nothing of networks, pages and processes.

At twice their size (nearest neighbour) two of the three pixels that a kernel sees of a row are one
pixel, so their weights can be added beforehand: each result takes 2x2 products, of rows that were
never enlarged. (Sub-pixel convolution: Shi et al., CVPR 2016, and their note on its equivalence to a
deconvolution.) The four pixels around a corner of the small pixels see the same four of them, so
one convolution gives all four results.

    +-----+-----+
    | a a | b b |   the four results x, of the corner where a, b, c and d meet
    | a x | x b |
    +-----+-----+
    | c x | x d |
    | c c | d d |
    +-----+-----+
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models import LEAK, round_kernels

# Which taps of three see the first and the second of two small pixels, from the large pixel
# before the border between them, and from the one behind it.
TAPS = (((1, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 1, 1)))


class EnlargingStrip:
    """A 3x3 convolution, and leaky_relu, of rows at twice their size that come a few at a time."""

    def __init__(self, conv: nn.Conv2d, kernels: Tensor, width: int, layout: torch.memory_format) -> None:
        """kernels: what kernels_of makes of conv; width: of the rows it takes, in pixels."""
        self.conv = conv
        self.kernels = kernels
        self.layout = layout
        self.bias = None if conv.bias is None else conv.bias.repeat(4)
        self.kept = kernels.new_zeros(1, conv.in_channels, 1, width)
        self.above = 1  # rows of the results that are still above the page

    @staticmethod
    def kernels_of(conv: nn.Conv2d, layout: torch.memory_format) -> Tensor:
        """(4 * cout, cin, 2, 2), a corner's results one after another."""
        taps = torch.tensor(TAPS, dtype=torch.float64)
        corners = torch.einsum("aik,bjl,ockl->abocij", taps, taps, conv.weight.detach().double())
        return round_kernels(corners.flatten(0, 2), conv.weight.dtype).contiguous(memory_format=layout)

    def run(self, x: Tensor, last: bool) -> Tensor:
        """(1, cin, rows, W) -> (1, cout, rows', 2 * W): twice as many rows, less one for the page's
        first rows, one more for its last."""
        corners = torch.unflatten(self.corners(x, last), 1, (2, 2, -1))
        *_, channels, rows, columns = corners.shape
        size = (1, channels, 2 * rows, 2 * columns)
        results = torch.empty(size, dtype=x.dtype, memory_format=self.layout)
        pairs = torch.unflatten(torch.unflatten(results, 3, (-1, 2)), 2, (-1, 2))
        torch.ops.aten.leaky_relu.out(corners.permute(0, 3, 4, 1, 5, 2), LEAK, out=pairs)
        above, self.above = self.above, 0
        return results[:, :, above : 2 * rows - last, 1:-1]

    def corners(self, x: Tensor, last: bool) -> Tensor:
        """(1, cin, rows, W) -> (1, 4 * cout, rows', W + 1): all corners above and beside the pixels,
        those below them for the page's last rows."""
        below = [torch.zeros_like(self.kept)] if last else []
        seen = F.pad(torch.cat([self.kept, x, *below], 2), (1, 1))
        self.kept = x[:, :, -1:].clone()
        return F.conv2d(seen, self.kernels, self.bias)
