"""One convolution of a page that comes a few rows at a time.

Map: Scratch - Strip
Rule: a convolution keeps the last two rows that it saw, so nothing is computed twice and memory
depends on the page's width only.
Runs in: the worker process only (it loads torch). Knows nothing of networks, pages and processes.

A convolution's result lags its input by a row. What a layer gives is written where the next one
reads it: the convolutions themselves then take most of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models import LEAK


class Scratch:
    """Room for one strip by its shape, used by one convolution after another: so it stays in the caches."""

    def __init__(self, width: int) -> None:
        self.width = width  # of the rows, in pixels
        self.rooms: dict[tuple[int, int, int, torch.dtype], Tensor] = {}
        self.flat: dict[tuple[int, torch.dtype], Tensor] = {}

    def room(self, planes: int, channels: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """(planes, channels, rows, columns) channels last: what was left there, at first zeros."""
        key = (planes, channels, columns, dtype)
        held = self.rooms.get(key)
        if held is None or held.shape[2] < rows:
            held = self.rooms[key] = zeros(planes, channels, rows, columns, dtype)
        return held[:, :, :rows]

    def channels(self, channels: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """(1, channels, rows, columns), one channel after another: whatever was left there."""
        values = channels * rows * columns
        held = self.flat.get((channels, dtype))
        if held is None or len(held) < values:
            held = self.flat[channels, dtype] = torch.empty(values, dtype=dtype)
        return held[:values].view(1, channels, rows, columns)


def zeros(planes: int, channels: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(planes, channels, rows, columns) channels last."""
    return torch.zeros(planes, rows, columns, channels, dtype=dtype).permute(0, 3, 1, 2)


class Strip:
    """One 3x3 convolution and the rows that it is about to see.

    The zeros beside the page lie there beside the rows: asked to imagine them, oneDNN's bf16
    kernels take 1.7 times as long for a page of an odd width (measured: 827, with AMX).
    """

    pixels = 32_000  # of input at a time: more gain little (measured: bf16 and fp32, 2 cores)
    layout = torch.channels_last  # of (1, C, rows, W)
    planes = 1
    margin = 1  # zeros on either side of a row

    def __init__(self, conv: nn.Conv2d, scratch: Scratch, kernels: Any) -> None:
        """kernels: what kernels_of makes of conv."""
        self.conv = conv
        self.kernels = kernels
        self.scratch = scratch
        self.columns = self.columns_of(scratch.width)
        self.kept = zeros(self.planes, conv.in_channels, 2, self.columns, conv.weight.dtype)
        self.held = 1  # rows of kept; above the page there are zeros
        self.seen = self.kept

    @staticmethod
    def kernels_of(conv: nn.Conv2d) -> Any:
        """What a Strip makes of the weights, once for all pages."""
        return conv.weight

    @classmethod
    def rows_at_once(cls, width: int, widest: int) -> int:
        """Rows that are best taken at a time: their width, the most channels that a convolution sees."""
        return min(64, max(8, cls.pixels // width))

    @classmethod
    def tail_rows_at_once(cls, width: int, widest: int) -> int:
        """Rows that an RRDBNet's tail takes at a time, each to become sixteen times as large."""
        return cls.rows_at_once(width, widest) // 4

    @classmethod
    def columns_of(cls, width: int) -> int:
        """Columns of what it sees of rows of this width."""
        return cls.margin + width + cls.margin

    def inside(self, rows: Tensor) -> Tensor:
        """Rows without the zeros beside them."""
        return rows[..., self.margin : self.margin + self.scratch.width]

    # Its input, in one of four forms. Until run() another Strip of as many channels must not
    # ask for its own.
    def take(self, x: Tensor) -> None:
        """The next rows: (1, cin, rows, W)."""
        self.inside(self.room(x.shape[2])).copy_(x)

    def take_prelu(self, x: Tensor, slopes: Tensor) -> None:
        """The next rows: prelu(x), of as many slopes as channels."""
        self.take(F.prelu(x, slopes))

    def take_leaky(self, x: Tensor) -> None:
        """The next rows: leaky_relu(x)."""
        torch.ops.aten.leaky_relu.out(x, LEAK, out=self.inside(self.room(x.shape[2])))

    def take_beside(self, centre: Tensor, x: Tensor) -> None:
        """The next rows: what run() of another Strip gives, its result through leaky_relu."""
        room = self.room(x.shape[2])
        inherited = centre.shape[1]
        room[:, :inherited] = centre
        torch.ops.aten.leaky_relu.out(x, LEAK, out=self.inside(room[:, inherited:]))

    def room(self, rows: int) -> Tensor:
        """Where its next input is to be written: (planes, cin, rows, columns)."""
        planes, channels, _, columns = self.kept.shape
        self.seen = self.scratch.room(planes, channels, self.held + rows + 1, columns, self.kept.dtype)
        self.seen[:, :, : self.held] = self.kept[:, :, : self.held]
        return self.seen[:, :, self.held : self.held + rows]

    def run(self, last: bool) -> tuple[Tensor, Tensor]:
        """(the rows of what it saw that the result belongs to, the result), of what it took.

        Both have as many rows as were taken; one less for the page's first rows, one more for
        its last; none as long as there are too few. The first is a view, good until a Strip of
        as many channels takes its rows.
        """
        seen = self.rows_seen(last)
        self.held = min(2, seen.shape[2])
        self.kept[:, :, : self.held] = seen[:, :, -2:]
        self.seen = self.kept  # a Scratch that has grown must not live on here
        centre = seen[:, :, 1:-1]
        return centre, self.convolve(seen) if centre.shape[2] else self.result(0)

    def rows_seen(self, last: bool) -> Tensor:
        """What room() was asked for and what was kept before; zeros below the page's last rows."""
        if last:
            self.seen[:, :, -1] = 0
        return self.seen if last else self.seen[:, :, :-1]

    def convolve(self, seen: Tensor) -> Tensor:
        """(planes, cin, rows + 2, columns) -> (1, cout, rows, W)."""
        return F.conv2d(seen, self.kernels, self.conv.bias)

    def result(self, rows: int) -> Tensor:
        """Room for a result: (1, cout, rows, W)."""
        return self.kept.new_empty(1, self.conv.out_channels, rows, self.scratch.width)

    # Between two convolutions of a kind rows may lie as suits them.
    def widen(self, x: Tensor) -> Tensor:
        """(1, C, rows, W) as this Strip takes it."""
        return x

    def narrow(self, x: Tensor) -> Tensor:
        """What it gives, as (1, C, rows, W)."""
        return x
