"""A 3x3 convolution in fp32 with half the multiplications, where torch lacks NNPACK (nnpack.py).

Map: WinogradStrip
Rule: a Strip to whoever uses it; results differ from a Strip's by rounding alone.
Runs in: the worker process only (it loads torch). Knows nothing of networks, pages and processes.

Winograd's F(4, 3) (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016),
along the rows only: four neighbouring results of a row take six products instead of twelve. Rows can
then still come in any number, and each of the six is a plain convolution of three rows by one
column, which oneDNN does at nearly its full rate. (Down the columns too it would be a quarter of
the products; the additions and the memory that they go through then take the gain away.)

    phases: every fourth pixel --six sums of six pixels--> planes --3x1--> products --four sums--> phases
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models import LEAK
from engine.strips import Scratch, Strip

STEP = 4  # results of a group
# A kernel's polynomial at the points that the planes stand for, with the sums' constants divided out.
KERNEL_TO_PLANES = {
    "0": (1 / 4, 0, 0),
    "infinity": (0, 0, 1),
    "1": (-1 / 6, -1 / 6, -1 / 6),
    "-1": (-1 / 6, 1 / 6, -1 / 6),
    "2": (1 / 24, 1 / 12, 1 / 6),
    "-2": (1 / 24, -1 / 12, 1 / 6),
}
ONE = list(KERNEL_TO_PLANES).index("1")

Kernels = tuple[Tensor, ...]  # a convolution's, one for each plane: (cout, cin, 3, 1)


class WinogradStrip(Strip):
    """A Strip that sees its rows as six planes.

    What it takes and gives are phases: (4, C, rows, columns + 1), of a row that begins with a
    zero: pixel x stands in phase (x + 1) % 4, column (x + 1) // 4; zeros are beside the page.
    """

    # Of input at a time. Twice as many gain up to 6% on two cores; what the sums go through, some
    # 1.5 KB a pixel and 64 channels, would then no longer fit the caches that many cores share.
    pixels = 16_000
    planes = len(KERNEL_TO_PLANES)

    def __init__(self, conv: nn.Conv2d, scratch: Scratch, kernels: Kernels) -> None:
        super().__init__(conv, scratch, kernels)
        # Added to the product for point 1, which enters each of the four results once, with factor 1.
        self.biases = [conv.bias if plane == ONE else None for plane in range(self.planes)]

    @staticmethod
    def kernels_of(conv: nn.Conv2d) -> Kernels:
        """The kernel as the planes take it, reckoned with twice the digits."""
        matrix = torch.tensor(list(KERNEL_TO_PLANES.values()), dtype=torch.float64)
        kernels = torch.einsum("pk,oiyk->poiy", matrix, conv.weight.detach().double())[..., None]
        return tuple(
            kernel.to(conv.weight.dtype, memory_format=torch.channels_last) for kernel in kernels.unbind()
        )

    @classmethod
    def columns_of(cls, width: int) -> int:
        """Groups of four that cover a row."""
        return -(-width // STEP)

    def take(self, x: Tensor) -> None:
        """See Strip."""
        self.to_planes(x, self.room(x.shape[2]))

    def take_leaky(self, x: Tensor) -> None:
        """See Strip; x changes."""
        self.take(F.leaky_relu_(x, LEAK))

    def take_beside(self, centre: Tensor, x: Tensor) -> None:
        """See Strip; x changes."""
        room = self.room(x.shape[2])
        inherited = centre.shape[1]
        room[:, :inherited] = centre
        self.to_planes(F.leaky_relu_(x, LEAK), room[:, inherited:])

    def to_planes(self, x: Tensor, planes: Tensor) -> None:
        """Phases (4, C, rows, columns + 1) -> planes (6, C, rows, columns).

        A group's pixels p0 to p5, the last two being the next one's first, give 4*p0 - 5*p2 + p4,
        4*p1 - 5*p3 + p5, (p4 - 4*p2) +- (p3 - 4*p1) and (p4 - p2) +- 2*(p3 - p1).
        """
        here, following = x[..., :-1], x[..., 1:]
        steps = self.scratch.room(STEP, x.shape[1], x.shape[2], self.columns, x.dtype)
        torch.sub(here[2:], here[:2], out=steps[:2])
        torch.sub(following[:2], here[2:], out=steps[2:])
        torch.sub(steps[2:], steps[:2], alpha=4, out=planes[:2])
        odd, even = steps[1:2], steps[2:3]
        torch.add(even, odd, alpha=2, out=planes[4:5])
        torch.sub(even, odd, alpha=2, out=planes[5:6])
        torch.sub(here[3:], here[1:2], alpha=4, out=odd)
        torch.sub(following[:1], here[2:3], alpha=4, out=even)
        torch.add(even, odd, out=planes[2:3])
        torch.sub(even, odd, out=planes[3:4])

    def convolve(self, seen: Tensor) -> Tensor:
        """(6, cin, rows + 2, columns) -> (4, cout, rows, columns + 1), phases."""
        zero, infinity, one, minus_one, two, minus_two = (
            F.conv2d(plane, kernel, bias)
            for plane, kernel, bias in zip(seen.chunk(self.planes), self.kernels, self.biases, strict=True)
        )
        sum1, sum2 = torch.add(one, minus_one), torch.add(two, minus_two)
        gap1, gap2 = one.sub_(minus_one), two.sub_(minus_two)
        phases = self.result(zero.shape[2])
        here, following = phases[..., :-1], phases[..., 1:]
        torch.add(zero.add_(sum1), sum2, out=here[1:2])
        torch.add(gap1, gap2, alpha=2, out=here[2:3])
        torch.add(sum1, sum2, alpha=4, out=here[3:])
        torch.add(infinity.add_(gap1), gap2, alpha=8, out=following[:1])
        self.clear(phases)
        return phases

    def result(self, rows: int) -> Tensor:
        """Room for a result: (4, cout, rows, columns + 1)."""
        return self.phases(self.conv.out_channels, rows)

    def phases(self, channels: int, rows: int) -> Tensor:
        """Room for phases: (4, channels, rows, columns + 1) channels last."""
        shape = (STEP, channels, rows, self.columns + 1)
        return torch.empty(shape, dtype=self.kept.dtype, memory_format=torch.channels_last)

    def clear(self, phases: Tensor) -> None:
        """Zeros beside the page."""
        phases[0, ..., 0] = 0
        for i, phase in enumerate(phases):
            phase[..., -(-(self.scratch.width + 1 - i) // STEP) :] = 0

    def widen(self, x: Tensor) -> Tensor:
        """(1, C, rows, W) -> phases."""
        phases = self.phases(x.shape[1], x.shape[2])
        for i, phase in enumerate(phases):
            pixels = x[0, ..., (i - 1) % STEP :: STEP]
            first = int(i == 0)
            phase[..., first : first + pixels.shape[2]] = pixels
        self.clear(phases)
        return phases

    def narrow(self, x: Tensor) -> Tensor:
        """Phases -> (1, C, rows, W)."""
        return from_phases(x, self.scratch.width)


def from_phases(phases: Tensor, width: int) -> Tensor:
    """(4, C, rows, columns + 1) -> (1, C, rows, width) channels last."""
    rows = phases.permute(2, 3, 0, 1).flatten(1, 2)[:, 1 : 1 + width]
    return rows.permute(2, 0, 1)[None]
