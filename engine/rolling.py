"""A page goes through a network a few rows at a time, as a processor likes it.

Map: Delay - dense blocks - the two networks - kinds of convolution - Roller
Rule: forward()'s arithmetic, nothing computed twice; memory depends on the page's width only.
Runs in: the worker process only (it loads torch). Knows nothing of pages and processes.

A convolution's result lags its input by a row (strips.py); whatever is added to a result or laid
beside it has to wait as long. (Fused-layer evaluation: Alwani et al., MICRO 2016.) In fp32 the
convolutions are nnpack.py's or winograd.py's where those were measured faster.
"""

from __future__ import annotations

import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import nnpack
from engine.enlarging import EnlargingStrip
from engine.models import RDB_SHARE, RRDB, OwnNetwork, ResidualDenseBlock, RRDBNet, SRVGGNetCompact
from engine.nnpack import NnpackStrip
from engine.strips import Scratch, Strip
from engine.winograd import WinogradStrip

StripMaker = Callable[[nn.Conv2d, Scratch], Strip]
EnlargingStripMaker = Callable[[nn.Conv2d, int], EnlargingStrip]


class Delay:
    """Rows that wait for a result which lags behind them."""

    def __init__(self) -> None:
        self.waiting: deque[Tensor] = deque()

    def push(self, x: Tensor) -> None:
        """Take rows in; they must not change afterwards."""
        self.waiting.append(x)

    def pull(self, rows: int) -> list[Tensor]:
        """The oldest `rows`, which leave, in the portions in which they came."""
        taken: list[Tensor] = []
        while rows:
            oldest = self.waiting.popleft()
            if oldest.shape[2] > rows:
                # Few wait in most networks: their own memory, or all that came with them stays held.
                self.waiting.appendleft(oldest[:, :, rows:].clone())
            taken.append(oldest[:, :, :rows])
            rows -= taken[-1].shape[2]
        return taken

    def add_to(self, x: Tensor, share: float = 1) -> Tensor:
        """A share of x plus the oldest rows, which leave, written over x."""
        first = 0
        for rows in self.pull(x.shape[2]):
            part = x[:, :, first : first + rows.shape[2]]
            torch.add(rows, part, alpha=share, out=part)
            first += rows.shape[2]
        return x


# ---------------------------------------------------------------- networks
class RollingCompact:
    """An SRVGGNetCompact that takes its rows in turn."""

    def __init__(self, network: SRVGGNetCompact, strip: StripMaker, scratch: Scratch) -> None:
        self.dtype = network.dtype
        layers = list(network.body)
        self.strips = [strip(cast(nn.Conv2d, conv), scratch) for conv in layers[::2]]
        self.slopes = [cast(Tensor, prelu.weight) for prelu in layers[1::2]]
        # Adds the source to each of its pixel's results.
        self.under = torch.eye(3).flip(1).repeat(1, network.shuffle**2)
        self.source = Delay()

    def run(self, x: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """(1, 3, h, W) -> (1, shuffle**2 * 3, h', W), see Roller.roll."""
        self.source.push(x)
        out = self.strips[0].widen(x)
        for strip, slopes in zip(self.strips, [None, *self.slopes], strict=True):
            tick()
            if slopes is None:
                strip.take(out)
            else:
                strip.take_prelu(out.to(self.dtype), slopes)
            out = strip.run(last)[1]
            if not out.shape[2]:
                return out
        out = self.strips[-1].narrow(out)
        source = torch.cat(self.source.pull(out.shape[2]), 2)
        pixels, under = (x.permute(0, 2, 3, 1).flatten(0, 2).float() for x in (out, source))
        added = pixels.addmm_(under, self.under)  # (h' * W, shuffle**2 * 3)
        return torch.unflatten(added, 0, out.shape[2:]).permute(2, 0, 1)[None]


class RollingDense:
    """A ResidualDenseBlock that takes its rows in turn."""

    def __init__(self, block: ResidualDenseBlock, strip: StripMaker, scratch: Scratch) -> None:
        self.strips = [strip(conv, scratch) for conv in block.convs()]
        self.source = Delay()

    def run(self, x: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """(1, F, h, W) -> (1, F, h', W)."""
        self.source.push(x)
        self.strips[0].take(x)
        for strip, following in pairwise(self.strips):
            tick()
            following.take_beside(*strip.run(last))
        tick()
        return self.source.add_to(self.strips[-1].run(last)[1], RDB_SHARE)


class RollingRRDB:
    """An RRDB that takes its rows in turn."""

    def __init__(self, block: RRDB, strip: StripMaker, scratch: Scratch) -> None:
        self.blocks = [RollingDense(one, strip, scratch) for one in (block.rdb1, block.rdb2, block.rdb3)]
        self.source = Delay()

    def run(self, x: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """(1, F, h, W) -> (1, F, h', W)."""
        self.source.push(x)
        out = x
        for block in self.blocks:
            out = block.run(out, last, tick)
        return self.source.add_to(out, RDB_SHARE)


class RollingHead:
    """The first convolution of an RRDBNet; the last one of its trunk adds what `source` holds."""

    def __init__(self, network: RRDBNet, strip: StripMaker, scratch: Scratch) -> None:
        self.multiple = network.multiple
        self.dtype = network.dtype
        self.strip = strip(network.conv_first, scratch)
        self.source = Delay()

    def run(self, x: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """(1, 3, h, W) -> (1, F, h' / multiple, W / multiple)."""
        x = F.pixel_unshuffle(x, self.multiple) if self.multiple > 1 else x
        tick()
        self.strip.take(self.strip.widen(x))
        out = self.strip.run(last)[1].to(self.dtype)
        self.source.push(out)
        return out


class RollingBody:
    """The last convolution of an RRDBNet's trunk."""

    def __init__(self, network: RRDBNet, source: Delay, strip: StripMaker, scratch: Scratch) -> None:
        self.strip = strip(network.conv_body, scratch)
        self.source = source

    def run(self, x: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """(1, F, h, W) -> (1, F, h', W)."""
        tick()
        self.strip.take(x)
        return self.strip.narrow(self.source.add_to(self.strip.run(last)[1]))


class RollingTail:
    """What an RRDBNet does on the way to its output's size."""

    def __init__(
        self, network: RRDBNet, enlarging: EnlargingStripMaker, strip: StripMaker, width: int
    ) -> None:
        self.ups = [enlarging(network.conv_up1, width), enlarging(network.conv_up2, width * 2)]
        whole = Scratch(width * 4)
        self.hr = strip(network.conv_hr, whole)
        self.final = strip(network.conv_last, whole)

    def run(self, out: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """(1, F, h, W) -> (1, 3, h', 4 * W), BGR."""
        for up in self.ups:
            tick()
            out = up.run(out, last)
        tick()
        self.hr.take(self.hr.widen(out))
        out = self.hr.run(last)[1]
        tick()
        self.final.take_leaky(out)
        return self.final.narrow(self.final.run(last)[1])


class Stage(Protocol):
    """A part of a network that lags few rows behind its input."""

    def run(self, x: Tensor, last: bool, tick: Callable[[], None]) -> Tensor:
        """Take the next rows, of which `last` says whether the page ends with them; give what they allow."""
        ...


# ---------------------------------------------------------------- kinds of convolution
KINDS: dict[str, type[Strip]] = {"direct": Strip, "winograd": WinogradStrip, "nnpack": NnpackStrip}
SAMPLE_WIDTH = 600  # pixels
SAMPLES = 4  # of which the first warms up
# Fewer multiplications cost memory and the last bits of a result; and at a tie the choice shall not
# depend on the moment.
WORTH_IT = 0.85  # of the time


def usable_kinds() -> list[str]:
    """Those of KINDS that this torch has. How near fewer multiplications come was seen on x86 only."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["direct"]
    return [kind for kind in KINDS if kind != "nnpack" or nnpack.is_ready()]


def fastest_kind(network: OwnNetwork) -> str:
    """Which of KINDS takes the least time for an fp32 network here, measured: a second or two.

    Whether fewer multiplications gain depends on the caches, on who else uses them and on the
    number of cores: on machines of two cores NNPACK took 0.6 to 1.25 of the time of all of them.
    """
    seconds = seconds_a_row(network)
    best = min(seconds, key=lambda kind: seconds[kind])
    return best if seconds[best] < WORTH_IT * seconds["direct"] else "direct"


@torch.inference_mode()
def seconds_a_row(network: OwnNetwork) -> dict[str, float]:
    """Kind -> seconds that a network's convolutions take for a row of SAMPLE_WIDTH pixels."""
    convs = [module for module in network.body.modules() if isinstance(module, nn.Conv2d)]
    widest = max(conv.in_channels for conv in convs)
    if isinstance(network, RRDBNet):
        convs += [network.conv_hr, network.conv_last] * 16  # at four times the size
    alike = Counter((conv.in_channels, conv.out_channels) for conv in convs)
    one_each = {(conv.in_channels, conv.out_channels): conv for conv in convs}
    scratch, samples = Scratch(SAMPLE_WIDTH), []
    for name in usable_kinds():
        kind = KINDS[name]
        rows = kind.rows_at_once(SAMPLE_WIDTH, widest)
        x = torch.rand(1, widest, rows, SAMPLE_WIDTH).contiguous(memory_format=kind.layout)
        for shape, conv in one_each.items():
            strip = kind(conv, scratch, kind.kernels_of(conv))
            samples.append((name, shape, rows, strip, strip.widen(x)[:, : shape[0]]))
    taken: dict[tuple[str, tuple[int, int]], list[float]] = {}
    for _ in range(SAMPLES):  # in turn: no one finds in the caches what it left there
        for name, shape, rows, strip, x in samples:
            started = time.perf_counter()
            strip.take_leaky(x)
            strip.run(False)
            taken.setdefault((name, shape), []).append((time.perf_counter() - started) / rows)
    seconds = dict.fromkeys(usable_kinds(), 0.0)
    for (name, shape), spent in taken.items():
        seconds[name] += alike[shape] * min(spent[1:])
    return seconds


# ---------------------------------------------------------------- a page
def as_pixels(conv: nn.Conv2d, shuffle: int) -> nn.Conv2d:
    """A network's last convolution, its results for a pixel as the page takes them: (shuffle, shuffle,
    BGR) instead of (RGB, shuffle, shuffle). So none of them has to be sought out afterwards."""
    order = torch.arange(conv.out_channels).view(3, shuffle, shuffle).flip(0).permute(1, 2, 0).flatten()
    ordered = deepcopy(conv)
    for values in ordered.parameters():
        values.data = values.data[order]
    return ordered.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Roller:
    """A network that takes pages in rows. What is made of its weights is made once, for all pages."""

    def __init__(self, network: OwnNetwork, kind: str = "direct") -> None:
        """kind: of KINDS; all but "direct" are for fp32: fewer bits would not bear their sums."""
        self.network = network
        self.kind = KINDS[kind]
        self.last = as_pixels(network.last, network.shuffle)
        convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        convs = [self.last if conv is network.last else conv for conv in convs]
        self.kernels = {conv: self.kind.kernels_of(conv) for conv in convs}
        if isinstance(network, RRDBNet):
            for conv in (network.conv_up1, network.conv_up2):
                self.kernels[conv] = EnlargingStrip.kernels_of(conv, self.kind.layout)

    def roll(self, x: Tensor, tick: Callable[[], None] = lambda: None) -> Iterator[Tensor]:
        """(1, 3, H, W) RGB -> (1, shuffle**2 * 3, h, W * scale / shuffle) in turn, together forward(x)'s
        rows, not yet shuffled: for each pixel shuffle x shuffle results row by row, each BGR.

        x: channels last, W and H multiples of network.multiple. tick is called before each
        convolution. A convolution's sums may be ordered otherwise than in forward().
        """
        rows: Iterator[tuple[Tensor, bool]] = iter([(x, True)])
        for stage, at_once in self._stages(x.shape[3] // self.network.multiple):
            rows = _through(stage, at_once, rows, tick)
        return (part for part, _ in rows)

    def _stages(self, width: int) -> list[tuple[Stage, int]]:
        """The network's stages, each with the rows that it takes at a time."""
        network, scratch = self.network, Scratch(width)
        widest = max(conv.in_channels for conv in self.kernels)
        rows = self.kind.rows_at_once(width, widest)

        def strip(conv: nn.Conv2d, scratch: Scratch) -> Strip:
            conv = self.last if conv is network.last else conv
            return self.kind(conv, scratch, self.kernels[conv])

        def enlarging(conv: nn.Conv2d, width: int) -> EnlargingStrip:
            return EnlargingStrip(conv, self.kernels[conv], width, self.kind.layout)

        if isinstance(network, SRVGGNetCompact):
            return [(RollingCompact(network, strip, scratch), rows)]
        head = RollingHead(network, strip, scratch)
        blocks = [RollingRRDB(cast(RRDB, block), strip, scratch) for block in network.body]
        return [
            (head, rows * network.multiple),
            *((block, rows) for block in blocks),
            (RollingBody(network, head.source, strip, scratch), rows),
            (RollingTail(network, enlarging, strip, width), self.kind.tail_rows_at_once(width, widest)),
        ]


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
