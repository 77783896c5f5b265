"""A page goes through a network a few rows at a time, as a processor likes it.

Map: Strip (one convolution) - Delay - dense blocks - the two networks - roll
Rule: exactly forward()'s arithmetic, nothing computed twice; a convolution keeps the last two
rows that it saw, so that memory depends on the page's width only.
Runs in: the worker process only (it loads torch). Knows nothing of pages and processes.

A convolution's result lags its input by a row; whatever is added to a result or laid beside it
has to wait as long. (Fused-layer evaluation: Alwani et al., MICRO 2016.) What a layer gives is
written where the next one reads it: the convolutions themselves then take most of the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models import LEAK, RDB_SHARE, RRDB, OwnNetwork, ResidualDenseBlock, RRDBNet, SRVGGNetCompact

STRIP_PIXELS = 32_000  # of input at a time: more gain little (measured: bf16 and fp32, 2 cores)
TAIL_SHARE = 4  # a row of an RRDBNet's tail is sixteen times as large as one of its trunk


def rows_at_once(width: int) -> int:
    """Input rows of a strip of this width."""
    return min(64, max(8, STRIP_PIXELS // width))


class Scratch:
    """Room for one strip by its number of channels, used by one convolution after another:
    so it stays in the caches."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.rooms: dict[tuple[int, torch.dtype], Tensor] = {}

    def room(self, channels: int, rows: int, dtype: torch.dtype) -> Tensor:
        """(1, channels, rows, 1 + W + 1) channels last: what was left there, the outer columns zeros."""
        held = self.rooms.get((channels, dtype))
        if held is None or held.shape[2] < rows:
            held = self.rooms[channels, dtype] = zeros(channels, rows, self.width + 2, dtype)
        return held[:, :, :rows]


def zeros(channels: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """(1, channels, rows, width) channels last."""
    return torch.zeros(1, channels, rows, width, dtype=dtype).to(memory_format=torch.channels_last)


class Strip:
    """One 3x3 convolution and the rows that it is about to see.

    The zeros beside the page lie there beside the rows: asked to imagine them, oneDNN's bf16
    kernels take 1.7 times as long for a page of an odd width (measured: 827, with AMX).
    """

    def __init__(self, conv: nn.Conv2d, scratch: Scratch) -> None:
        self.conv = conv
        self.scratch = scratch
        self.kept = zeros(conv.in_channels, 2, scratch.width + 2, conv.weight.dtype)
        self.held = 1  # rows of kept; above the page there are zeros
        self.seen = self.kept

    def room(self, rows: int) -> Tensor:
        """Where its next input is to be written: (1, cin, rows, W).

        Until then another Strip of as many channels must not ask for its own.
        """
        self.seen = self.scratch.room(self.conv.in_channels, self.held + rows + 1, self.kept.dtype)
        self.seen[:, :, : self.held] = self.kept[:, :, : self.held]
        return self.seen[:, :, self.held : self.held + rows, 1:-1]

    def run(self, last: bool) -> tuple[Tensor, Tensor]:
        """(the rows of its input that the result belongs to, the result), of what room() holds.

        Both have as many rows as were written; one less for the page's first rows, one more for
        its last; none as long as there are too few. The first is a view, good until the next room().
        """
        if last:
            self.seen[:, :, -1] = 0
        seen = self.seen if last else self.seen[:, :, :-1]
        self.held = min(2, seen.shape[2])
        self.kept[:, :, : self.held] = seen[:, :, -2:]
        centre = seen[:, :, 1:-1, 1:-1]
        if not centre.shape[2]:
            return centre, seen.new_empty(1, self.conv.out_channels, *centre.shape[2:])
        return centre, F.conv2d(seen, self.conv.weight, self.conv.bias)


class Delay:
    """Rows that wait for a result which lags behind them."""

    def __init__(self) -> None:
        self.waiting: deque[Tensor] = deque()

    def push(self, x: Tensor) -> None:
        """Take rows in; they must not change afterwards."""
        self.waiting.append(x)

    def pull(self, rows: int) -> Tensor:
        """The oldest `rows`, which leave."""
        taken: list[Tensor] = []
        while rows or not taken:
            oldest = self.waiting.popleft()
            if oldest.shape[2] > rows:
                self.waiting.appendleft(oldest[:, :, rows:])
            taken.append(oldest[:, :, :rows])
            rows -= taken[-1].shape[2]
        return taken[0] if len(taken) == 1 else torch.cat(taken, 2)


def leak_into(room: Tensor, x: Tensor) -> None:
    """room = leaky_relu(x)."""
    torch.ops.aten.leaky_relu.out(x, LEAK, out=room)


def enlarge_into(room: Tensor, x: Tensor) -> None:
    """room = x at twice its size, nearest neighbour."""
    pairs = torch.unflatten(torch.unflatten(room, 3, (-1, 2)), 2, (-1, 2))
    pairs.copy_(x[:, :, :, None, :, None])


# ---------------------------------------------------------------- networks
class RollingCompact:
    """An SRVGGNetCompact that takes its rows in turn."""

    def __init__(self, network: SRVGGNetCompact, scratch: Scratch) -> None:
        self.scale = network.scale
        self.dtype = network.dtype
        layers = list(network.body)
        self.strips = [Strip(cast(nn.Conv2d, conv), scratch) for conv in layers[::2]]
        self.slopes = [cast(Tensor, prelu.weight) for prelu in layers[1::2]]
        self.source = Delay()

    def run(self, x: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """(1, 3, h, W) -> (1, 3, h' * scale, W * scale)."""
        self.source.push(x)
        out = x
        for strip, slopes in zip(self.strips, [*self.slopes, None], strict=True):
            tick()
            strip.room(out.shape[2]).copy_(out)
            out = strip.run(last)[1]
            if not out.shape[2]:
                return out
            if slopes is not None:
                out = F.prelu(out.to(self.dtype), slopes)
        # The source under each of its pixel's results: added before the shuffle it takes a fifth of the time.
        source = self.source.pull(out.shape[2]).permute(0, 2, 3, 1)
        under = source.repeat_interleave(self.scale**2, 3).permute(0, 3, 1, 2)
        return F.pixel_shuffle(under.add_(out), self.scale)


class RollingDense:
    """A ResidualDenseBlock that takes its rows in turn."""

    def __init__(self, block: ResidualDenseBlock, scratch: Scratch) -> None:
        self.features = block.features
        self.strips = [Strip(conv, scratch) for conv in block.convs()]

    def run(self, x: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """(1, F, h, W) -> (1, F, h', W)."""
        self.strips[0].room(x.shape[2]).copy_(x)
        for strip, following in pairwise(self.strips):
            tick()
            centre, grown = strip.run(last)
            room = following.room(grown.shape[2])
            room[:, : centre.shape[1]] = centre
            leak_into(room[:, centre.shape[1] :], grown)
        tick()
        centre, out = self.strips[-1].run(last)
        return torch.add(centre[:, : self.features], out, alpha=RDB_SHARE)


class RollingRRDB:
    """An RRDB that takes its rows in turn."""

    def __init__(self, block: RRDB, scratch: Scratch) -> None:
        self.blocks = [RollingDense(one, scratch) for one in (block.rdb1, block.rdb2, block.rdb3)]
        self.source = Delay()

    def run(self, x: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """(1, F, h, W) -> (1, F, h', W)."""
        self.source.push(x)
        out = x
        for block in self.blocks:
            out = block.run(out, last, tick)
        return torch.add(self.source.pull(out.shape[2]), out, alpha=RDB_SHARE)


class RollingHead:
    """The first convolution of an RRDBNet; the last one of its trunk adds what `source` holds."""

    def __init__(self, network: RRDBNet, scratch: Scratch) -> None:
        self.multiple = network.multiple
        self.dtype = network.dtype
        self.strip = Strip(network.conv_first, scratch)
        self.source = Delay()

    def run(self, x: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """(1, 3, h, W) -> (1, F, h' / multiple, W / multiple)."""
        x = F.pixel_unshuffle(x, self.multiple) if self.multiple > 1 else x
        tick()
        self.strip.room(x.shape[2]).copy_(x)
        out = self.strip.run(last)[1].to(self.dtype)
        self.source.push(out)
        return out


class RollingBody:
    """The last convolution of an RRDBNet's trunk."""

    def __init__(self, network: RRDBNet, source: Delay, scratch: Scratch) -> None:
        self.strip = Strip(network.conv_body, scratch)
        self.source = source

    def run(self, x: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """(1, F, h, W) -> (1, F, h', W)."""
        tick()
        self.strip.room(x.shape[2]).copy_(x)
        out = self.strip.run(last)[1]
        return out.add_(self.source.pull(out.shape[2]))


class RollingTail:
    """What an RRDBNet does on the way to its output's size."""

    def __init__(self, network: RRDBNet, width: int) -> None:
        self.widths = [Scratch(width * factor) for factor in (2, 4)]
        half, whole = self.widths
        self.ups = [Strip(network.conv_up1, half), Strip(network.conv_up2, whole)]
        self.hr = Strip(network.conv_hr, whole)
        self.final = Strip(network.conv_last, whole)

    def run(self, out: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """(1, F, h, W) -> (1, 3, h', 4 * W)."""
        for strip in self.ups:
            tick()
            enlarge_into(strip.room(2 * out.shape[2]), out)
            out = strip.run(last)[1]
            if strip is not self.ups[-1]:
                out = F.leaky_relu_(out, LEAK)
        for strip in (self.hr, self.final):
            tick()
            leak_into(strip.room(out.shape[2]), out)
            out = strip.run(last)[1]
        return out


class Stage(Protocol):
    """A part of a network that lags few rows behind its input."""

    def run(self, x: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """Take the next rows, of which `last` says whether the page ends with them; give what they allow."""
        ...


def stages_of(network: OwnNetwork, width: int) -> list[tuple[Stage, int]]:
    """A network's stages, each with the rows that it takes at a time."""
    scratch, rows = Scratch(width), rows_at_once(width)
    if isinstance(network, SRVGGNetCompact):
        return [(RollingCompact(network, scratch), rows)]
    head = RollingHead(network, scratch)
    blocks = [RollingRRDB(cast(RRDB, block), scratch) for block in network.body]
    return [
        (head, rows * network.multiple),
        *((block, rows) for block in blocks),
        (RollingBody(network, head.source, scratch), rows),
        (RollingTail(network, width), rows // TAIL_SHARE),
    ]


def roll(network: OwnNetwork, x: Tensor, tick: Callable[[], None] = lambda: None) -> Iterator[Tensor]:
    """(1, 3, H, W) -> (1, 3, h, W*scale) in turn, together forward(x)'s rows.

    x: channels last, W and H multiples of network.multiple. tick is called before each
    convolution. A convolution's sums may be ordered otherwise than in forward().
    """
    rows: Iterator[tuple[Tensor, bool]] = iter([(x, True)])
    for stage, at_once in stages_of(network, x.shape[3] // network.multiple):
        rows = _through(stage, at_once, rows, tick)
    return (part for part, _ in rows)


def _through(
    stage: Stage, at_once: int, rows: Iterator[tuple[Tensor, bool]], tick: Callable[[], None]
) -> Iterator[tuple[Tensor, bool]]:
    for block, last in rows:
        # The last rows come with those that waited for them: more than are good at a time.
        parts = torch.split(block, at_once, 2)
        for i, part in enumerate(parts, 1):
            at_end = last and i == len(parts)
            out = stage.run(part, at_end, tick)
            if out.shape[2]:
                yield out, at_end
