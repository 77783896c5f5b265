"""Networks, and the weights files that fill them.

Map: networks - weights to models - readers of the three file formats
Rule: what a file holds is told from its keys and shapes, never from its name.
Runs in: the worker process only (it loads torch). Knows nothing of pages and processes.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import storage


# ---------------------------------------------------------------- networks
# Module names are those of the published checkpoints, so that their keys fit one to one.
#
# Every network runs in two ways with the same code. Whole: forward(x), as anywhere. Rolling:
# the page comes a few rows at a time, and each convolution keeps the last two rows that it
# saw, so that nothing is ever computed twice and memory depends on the page's width only.
# Rolling, a convolution's result lags its input by a row; whatever is added to a result or
# laid beside it has to wait as long. (Fused-layer evaluation: Alwani et al., MICRO 2016.)
class Conv3x3(nn.Conv2d):
    """The only convolution that either network has; pads with zeros at the page's edges only."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(cin, cout, 3, padding=1)
        self.kept: Tensor | None = None  # rows that the next result still needs

    def forward(self, x: Tensor, last: bool = True) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, cin, H, W) -> (x's rows that the result belongs to, the result).

        last: the page ends with x. Both results have H rows when x is the whole page,
        one less for its first rows, one more for its last; none as long as x is too short.
        """
        if self.kept is None and last:
            return x, super().forward(x)
        above = x.new_zeros(_row_of(x)) if self.kept is None else self.kept
        padded = stack_rows(above, x, *([x.new_zeros(_row_of(x))] if last else []))
        self.kept = None if last else padded[:, :, -2:].clone()
        if padded.shape[2] < 3:
            return x[:, :, :0], x.new_empty(x.shape[0], self.out_channels, 0, x.shape[3])
        return padded[:, :, 1:-1], F.conv2d(padded, self.weight, self.bias, padding=(0, 1))


class Delay(nn.Module):
    """Rows that wait for a result which lags behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def forward(self, x: Tensor, rows: int) -> Tensor:
        """Take x's rows in, give the oldest `rows` out."""
        waiting = x if self.kept is None else stack_rows(self.kept, x)
        self.kept = waiting[:, :, rows:].clone() if rows < waiting.shape[2] else None
        return waiting[:, :, :rows]


def _row_of(x: Tensor) -> tuple[int, int, int, int]:
    return (x.shape[0], x.shape[1], 1, x.shape[3])


def stack_rows(*parts: Tensor) -> Tensor:
    """(B, C, H_i, W) -> (B, C, sum of H_i, W), channels last (torch.cat may lose that for one row)."""
    batch, channels, _, width = parts[0].shape
    rows = sum(part.shape[2] for part in parts)
    stacked = torch.empty(
        (batch, channels, rows, width),
        dtype=parts[0].dtype,
        device=parts[0].device,
        memory_format=torch.channels_last,
    )
    at = 0
    for part in parts:
        stacked[:, :, at : at + part.shape[2]] = part
        at += part.shape[2]
    return stacked


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Nearest neighbour; takes no rows, too, which F.interpolate does not."""
    if not x.shape[2]:
        return x.new_empty(x.shape[0], x.shape[1], 0, x.shape[3] * factor)
    return F.interpolate(x, scale_factor=factor, mode="nearest")


class SRVGGNetCompact(nn.Module):
    """Plain convolutions at input size, then one pixel shuffle (Real-ESRGAN, srvgg_arch)."""

    def __init__(self, features: int, convs: int, scale: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv3x3(3, features), nn.PReLU(features)]
        for _ in range(convs):
            layers += [Conv3x3(features, features), nn.PReLU(features)]
        self.body = nn.Sequential(*layers, Conv3x3(features, 3 * scale * scale))
        self.source = Delay()
        self.shape = (features, convs, scale)
        self.scale = scale
        self.multiple = 1
        self.halo_px = convs + 2  # the receptive field: tiles are exact
        self.stages = (Stage(self.forward, 16),)

    def forward(self, x: Tensor, last: bool = True) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H*scale, W*scale), 0..1."""
        out = x
        for layer in self.body:
            out = layer(out, last)[1] if isinstance(layer, Conv3x3) else layer(out)
        return F.pixel_shuffle(out, self.scale) + enlarge(self.source(x, out.shape[2]), self.scale)


class ResidualDenseBlock(nn.Module):
    """Five convolutions, each seeing all results before it."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.features = features
        for i in range(4):
            setattr(self, f"conv{i + 1}", Conv3x3(features + i * growth, growth))
        self.conv5 = Conv3x3(features + 4 * growth, features)

    def forward(self, x: Tensor, last: bool = True) -> Tensor:
        """(B, F, H, W) -> the same shape."""
        seen = x
        for conv in list(self.children())[:4]:
            seen, grown = conv(seen, last)
            seen = torch.cat([seen, F.leaky_relu(grown, 0.2, inplace=True)], 1)
        seen, out = self.conv5(seen, last)
        return cast(Tensor, out.mul_(0.2).add_(seen[:, : self.features]))


class RRDB(nn.Module):
    """Residual in residual dense block (ESRGAN, Wang et al. 2018, figure 4)."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(features, growth)
        self.rdb2 = ResidualDenseBlock(features, growth)
        self.rdb3 = ResidualDenseBlock(features, growth)
        self.source = Delay()

    def forward(self, x: Tensor, last: bool = True) -> Tensor:
        """(B, F, H, W) -> the same shape."""
        out = self.rdb3(self.rdb2(self.rdb1(x, last), last), last)
        return cast(Tensor, out.mul_(0.2).add_(self.source(x, out.shape[2])))


class RRDBNet(nn.Module):
    """The ESRGAN generator: blocks at input size, then two nearest-neighbour doublings.

    For scale 2 and 1 the input is first unshuffled by 2 or 4, as upstream does.
    """

    def __init__(self, features: int, blocks: int, growth: int, scale: int) -> None:
        super().__init__()
        self.shape = (features, blocks, growth, scale)
        self.scale = scale
        self.multiple = 4 // scale  # sides must be multiples of it
        self.conv_first = Conv3x3(3 * self.multiple**2, features)
        self.body = nn.Sequential(*(RRDB(features, growth) for _ in range(blocks)))
        self.conv_body = Conv3x3(features, features)
        self.conv_up1 = Conv3x3(features, features)
        self.conv_up2 = Conv3x3(features, features)
        self.conv_hr = Conv3x3(features, features)
        self.conv_last = Conv3x3(features, 3)
        self.source = Delay()
        # The receptive field is 15 pixels a block, yet what comes from afar fades:
        # measured on drawn and scanned pages, 8 a block keeps tiles within 1/255.
        self.halo_px = min(8 * blocks, 96) * self.multiple
        # A row of the tail is sixteen times as large as one of the trunk.
        self.stages = (Stage(self.trunk, 16 * self.multiple), Stage(self.tail, 4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H*scale, W*scale), 0..1."""
        return self.tail(self.trunk(x))

    def trunk(self, x: Tensor, last: bool = True) -> Tensor:
        """(B, 3, H, W) -> (B, F, H / multiple, W / multiple)."""
        if self.multiple > 1:
            x = F.pixel_unshuffle(x, self.multiple)
        first = self.conv_first(x, last)[1]
        out = first
        for block in self.body:
            out = block(out, last)
        out = self.conv_body(out, last)[1]
        return cast(Tensor, out + self.source(first, out.shape[2]))

    def tail(self, out: Tensor, last: bool = True) -> Tensor:
        """(B, F, H, W) -> (B, 3, 4*H, 4*W)."""
        for up in (self.conv_up1, self.conv_up2):
            out = F.leaky_relu(up(enlarge(out, 2), last)[1], 0.2, inplace=True)
        out = F.leaky_relu(self.conv_hr(out, last)[1], 0.2, inplace=True)
        return cast(Tensor, self.conv_last(out, last)[1])


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a network, and how many of its input rows fit the caches when it rolls."""

    run: Callable[[Tensor, bool], Tensor]
    rows: int


def roll(network: Network, x: Tensor) -> Iterator[Tensor]:
    """(1, 3, H, W) -> (1, 3, h, W*scale) in turn, together forward(x)'s rows.

    Exactly forward()'s arithmetic; a convolution's sums may be ordered otherwise.
    """
    for module in network.modules():
        if isinstance(module, (Conv3x3, Delay)):
            module.kept = None  # of a page that was given up
    rows: Iterator[tuple[Tensor, bool]] = iter([(x, True)])
    for stage in network.stages:
        rows = _through(stage, rows)
    return (part for part, _ in rows)


def _through(stage: Stage, rows: Iterator[tuple[Tensor, bool]]) -> Iterator[tuple[Tensor, bool]]:
    for block, last in rows:
        parts = torch.split(block, stage.rows, 2)
        for i, part in enumerate(parts, 1):
            at_end = last and i == len(parts)
            out = stage.run(part, at_end)
            if out.shape[2]:
                yield out, at_end


Network = SRVGGNetCompact | RRDBNet


# ---------------------------------------------------------------- weights to models
@dataclass(frozen=True, slots=True)
class Model:
    """A loaded network: fp32, on the CPU, ready to be copied to a device."""

    name: str
    network: Network
    scale: int
    halo_px: int
    multiple: int
    weights_sha256: str
    source: str


NCNN_FP16_FLAG = 0x01306B47  # before weights stored as fp16 (ncnn, modelbin.cpp)

# Key names of ESRGAN's first releases -> those in use since.
OLD_KEYS = (
    (r"model\.0\.", "conv_first."),
    (r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
    (r"model\.1\.sub\.\d+\.(?=weight|bias)", "conv_body."),
    (r"model\.3\.", "conv_up1."),
    (r"model\.6\.", "conv_up2."),
    (r"model\.8\.", "conv_hr."),
    (r"model\.10\.", "conv_last."),
    (r"RRDB_trunk\.(\d+)\.RDB(\d)\.", r"body.\1.rdb\2."),
    (r"trunk_conv\.", "conv_body."),
    (r"upconv1\.", "conv_up1."),
    (r"upconv2\.", "conv_up2."),
    (r"HRconv\.", "conv_hr."),
)


def load_model(file: storage.WeightsFile) -> Model:
    """Read, check and build. Raises storage.WeightsRefused with what is wrong with the file."""
    data, companion, digest = storage.read_weights(file)
    try:
        if companion:
            network = _from_ncnn(data.decode("ascii"), companion)
        else:
            network = _from_tensors(_read_tensors(file.path.suffix, data))
    except storage.WeightsRefused:
        raise
    # The readers' own errors are of many kinds; each means this file is no such model.
    except Exception as error:
        raise storage.WeightsRefused(f"{file.path.name} can't be loaded: {error}") from error
    return Model(
        file.name,
        network.eval().requires_grad_(False),
        network.scale,
        network.halo_px,
        network.multiple,
        digest,
        file.source,
    )


def _read_tensors(suffix: str, data: bytes) -> dict[str, Tensor]:
    if suffix == ".safetensors":
        tensors: Any = safetensors.torch.load(data)
    else:
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for wrapper in ("params_ema", "params"):
        if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapper), Mapping):
            tensors = tensors[wrapper]
    if not isinstance(tensors, Mapping) or not tensors:
        raise storage.WeightsRefused("the file holds no named tensors")
    for key, tensor in tensors.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not dense or not tensor.is_floating_point():
            raise storage.WeightsRefused(f"{key} is not a dense floating-point tensor")
    return dict(tensors)


def _from_tensors(tensors: dict[str, Tensor]) -> Network:
    """The network that a checkpoint's keys and shapes describe, loaded exactly."""
    renamed = {}
    for old, tensor in tensors.items():
        key = old
        for pattern, new in OLD_KEYS:
            key = re.sub("^" + pattern, new, key)
        renamed[key] = tensor.float()
    if "conv_first.weight" in renamed:
        network = _empty_rrdbnet(renamed)
    elif "body.0.weight" in renamed:
        network = _empty_compact(renamed)
    else:
        raise storage.WeightsRefused("neither an RRDBNet nor an SRVGGNetCompact (by its keys)")
    network.load_state_dict(renamed, strict=True)
    return network


def _empty_rrdbnet(tensors: Mapping[str, Tensor]) -> Network:
    features, cin = tensors["conv_first.weight"].shape[:2]
    growth = tensors["body.0.rdb1.conv1.weight"].shape[0]
    blocks = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("body."))
    scale = {3: 4, 12: 2, 48: 1}.get(cin)
    if scale is None:
        raise storage.WeightsRefused(f"an RRDBNet of {cin} input channels is not supported")
    return RRDBNet(features, blocks, growth, scale)


def _empty_compact(tensors: Mapping[str, Tensor]) -> Network:
    last = max(int(key.split(".")[1]) for key in tensors)
    if tensors.get("body.1.weight", torch.empty(0)).ndim != 1:
        raise storage.WeightsRefused("an SRVGGNetCompact without PReLU is not supported")
    scale = math.isqrt(tensors[f"body.{last}.weight"].shape[0] // 3)
    return SRVGGNetCompact(tensors["body.0.weight"].shape[0], last // 2 - 1, scale)


def _from_ncnn(param: str, blob: bytes) -> Network:
    """An ncnn pair whose layers stand in forward order: they fill our layers one to one."""
    shapes = []  # (values, are they behind a flag?) in file order
    convs = 0
    for line in param.splitlines()[2:]:
        kind, *words = line.split()
        fields = dict(word.split("=", 1) for word in words if re.match(r"\d+=", word))
        if kind == "Convolution":
            shapes += [(int(fields["6"]), True), (int(fields["0"]), False)]
            convs += 1
        elif kind == "PReLU":
            shapes.append((int(fields["0"]), False))
    if "PixelShuffle" in param:
        network: Network = SRVGGNetCompact(64, convs - 2, 4)
    else:
        network = RRDBNet(64, (convs - 6) // 15, 32, 4)
    tensors = _ncnn_arrays(shapes, blob)
    network.load_state_dict(
        {
            key: torch.from_numpy(array).reshape(mine.shape)
            for (key, mine), array in zip(network.state_dict().items(), tensors, strict=True)
        }
    )
    return network


def _ncnn_arrays(shapes: list[tuple[int, bool]], blob: bytes) -> Iterator[npt.NDArray[np.float32]]:
    at = 0
    for count, flagged in shapes:
        if flagged:
            if struct.unpack_from("<I", blob, at)[0] != NCNN_FP16_FLAG:
                raise storage.WeightsRefused("weights that are not fp16")
            yield np.frombuffer(blob, np.float16, count, at + 4).astype(np.float32)
            at += 4 + (2 * count + 3) // 4 * 4  # padded to four bytes
        else:
            yield np.frombuffer(blob, np.float32, count, at).copy()
            at += 4 * count
    if at != len(blob):
        raise storage.WeightsRefused("the file is longer than its layers")


def copy_network(network: Network) -> Network:
    """A second instance with the same tensors (deepcopy would copy hooks along)."""
    copy = type(network)(*network.shape)
    copy.load_state_dict(network.state_dict())
    return copy.eval().requires_grad_(False)
