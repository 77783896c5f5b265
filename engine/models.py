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
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import storage
from engine.community import CommunityNetwork, network_of
from files import weightfiles

# ---------------------------------------------------------------- networks
# Module names are those of the published checkpoints, so that their keys fit one to one. How a
# processor runs them, a few rows at a time, is rolling.py's.
LEAK = 0.2  # slope of the leaky ReLUs
RDB_SHARE = 0.2  # of a residual that is added (ESRGAN: residual scaling)


def conv3x3(cin: int, cout: int) -> nn.Conv2d:
    """The only convolution that either network has."""
    return nn.Conv2d(cin, cout, 3, padding=1)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H*factor, W*factor), nearest neighbour."""
    return F.interpolate(x, scale_factor=factor, mode="nearest")


class SRVGGNetCompact(nn.Module):
    """Plain convolutions at input size, then one pixel shuffle (Real-ESRGAN, srvgg_arch)."""

    def __init__(self, features: int, convs: int, scale: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv3x3(3, features), nn.PReLU(features)]
        for _ in range(convs):
            layers += [conv3x3(features, features), nn.PReLU(features)]
        self.body = nn.Sequential(*layers, conv3x3(features, 3 * scale * scale))
        self.shape = (features, convs, scale)
        self.scale = scale
        self.shuffle = scale  # what the last convolution's results become larger by
        self.channels = 3
        self.multiple = 1
        self.halo_px = convs + 2  # the receptive field: tiles are exact

    @property
    def first(self) -> nn.Conv2d:
        """The convolution that sees the page."""
        return cast(nn.Conv2d, self.body[0])

    @property
    def last(self) -> nn.Conv2d:
        """The convolution that gives the page."""
        return cast(nn.Conv2d, self.body[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Of all layers after the first."""
        return self.last.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H*scale, W*scale), 0..1."""
        first, *rest = self.body
        out = first(x).to(self.dtype)
        for layer in rest:
            out = layer(out)
        return F.pixel_shuffle(out, self.shuffle) + enlarge(x, self.scale)


class ResidualDenseBlock(nn.Module):
    """Five convolutions, each seeing all results before it."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.features = features
        self.conv1 = conv3x3(features, growth)
        self.conv2 = conv3x3(features + growth, growth)
        self.conv3 = conv3x3(features + 2 * growth, growth)
        self.conv4 = conv3x3(features + 3 * growth, growth)
        self.conv5 = conv3x3(features + 4 * growth, features)

    def convs(self) -> tuple[nn.Conv2d, ...]:
        """All five, in order."""
        return self.conv1, self.conv2, self.conv3, self.conv4, self.conv5

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, H, W) -> the same shape."""
        seen = x
        for conv in self.convs()[:-1]:
            seen = torch.cat([seen, F.leaky_relu(conv(seen), LEAK, inplace=True)], 1)
        return torch.add(x, self.conv5(seen), alpha=RDB_SHARE)


class RRDB(nn.Module):
    """Residual in residual dense block (ESRGAN, Wang et al. 2018, figure 4)."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(features, growth)
        self.rdb2 = ResidualDenseBlock(features, growth)
        self.rdb3 = ResidualDenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, H, W) -> the same shape."""
        return torch.add(x, self.rdb3(self.rdb2(self.rdb1(x))), alpha=RDB_SHARE)


class RRDBNet(nn.Module):
    """The ESRGAN generator: blocks at input size, then two nearest-neighbour doublings.

    For scale 2 and 1 the input is first unshuffled by 2 or 4, as upstream does.
    """

    def __init__(self, features: int, blocks: int, growth: int, scale: int) -> None:
        super().__init__()
        self.shape = (features, blocks, growth, scale)
        self.scale = scale
        self.shuffle = 1
        self.channels = 3
        self.multiple = 4 // scale  # sides must be multiples of it
        self.conv_first = conv3x3(3 * self.multiple**2, features)
        self.body = nn.Sequential(*(RRDB(features, growth) for _ in range(blocks)))
        self.conv_body = conv3x3(features, features)
        self.conv_up1 = conv3x3(features, features)
        self.conv_up2 = conv3x3(features, features)
        self.conv_hr = conv3x3(features, features)
        self.conv_last = conv3x3(features, 3)
        # The receptive field is 15 pixels a block, yet what comes from afar fades:
        # measured on drawn and scanned pages, 8 a block keeps tiles within 1/255.
        self.halo_px = min(8 * blocks, 96) * self.multiple

    @property
    def first(self) -> nn.Conv2d:
        """The convolution that sees the page."""
        return self.conv_first

    @property
    def last(self) -> nn.Conv2d:
        """The convolution that gives the page."""
        return self.conv_last

    @property
    def dtype(self) -> torch.dtype:
        """Of all layers after the first."""
        return self.last.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H*scale, W*scale), 0..1."""
        if self.multiple > 1:
            x = F.pixel_unshuffle(x, self.multiple)
        first = self.conv_first(x).to(self.dtype)
        out = self.conv_body(self.body(first)) + first
        for up in (self.conv_up1, self.conv_up2):
            out = F.leaky_relu(up(enlarge(out, 2)), LEAK, inplace=True)
        out = F.leaky_relu(self.conv_hr(out), LEAK, inplace=True)
        return cast(Tensor, self.conv_last(out))


OwnNetwork = SRVGGNetCompact | RRDBNet
Network = OwnNetwork | CommunityNetwork


# ---------------------------------------------------------------- weights to models
@dataclass(frozen=True, slots=True)
class Model:
    """A loaded network: fp32, on the CPU, ready to be copied to a device."""

    name: str
    network: Network
    scale: int
    halo_px: int | None  # None: to be measured, see community.measured_halo
    multiple: int
    weights_sha256: str
    source: str

    @property
    def architecture(self) -> str:
        """What its network is called."""
        own = type(self.network).__name__
        return self.network.architecture if isinstance(self.network, CommunityNetwork) else own


NCNN_FP16_FLAG = 0x01306B47  # before weights stored as fp16 (ncnn, modelbin.cpp)

# What trainers lay around a network's tensors.
WRAPPERS = ("params_ema", "params-ema", "params", "model_state_dict", "state_dict", "model", "net")

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


def load_model(file: weightfiles.WeightsFile) -> Model:
    """Read, check and build. Raises storage.WeightsRefused with what is wrong with the file."""
    data, companion, digest = weightfiles.read_weights(file)
    try:
        if companion:
            network: Network = _from_ncnn(data.decode("ascii"), companion)
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
    for wrapper in WRAPPERS:
        if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapper), Mapping):
            tensors = tensors[wrapper]
    if not isinstance(tensors, Mapping) or not tensors:
        raise storage.WeightsRefused("the file holds no named tensors")
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise storage.WeightsRefused(f"{key} is not a dense tensor")
    return dict(tensors)


def _from_tensors(tensors: dict[str, Tensor]) -> Network:
    """The network that a checkpoint's keys and shapes describe, loaded exactly."""
    renamed = {}
    for old, tensor in tensors.items():
        key = old
        for pattern, new in OLD_KEYS:
            key = re.sub("^" + pattern, new, key)
        renamed[key] = tensor
    network: OwnNetwork | None = _empty_rrdbnet(renamed) or _empty_compact(renamed)
    if network is None:
        return network_of(tensors)
    for key, tensor in renamed.items():
        if not tensor.is_floating_point():
            raise storage.WeightsRefused(f"{key} is not a floating-point tensor")
    network.load_state_dict({key: tensor.float() for key, tensor in renamed.items()}, strict=True)
    return network


def _empty_rrdbnet(tensors: Mapping[str, Tensor]) -> RRDBNet | None:
    """The RRDBNet that these tensors fill; None where they are of another network, or of an RRDBNet
    with other channels or another tail than ours."""
    first, last = tensors.get("conv_first.weight"), tensors.get("conv_last.weight")
    dense = tensors.get("body.0.rdb1.conv1.weight")
    if first is None or last is None or dense is None or "conv_up2.weight" not in tensors:
        return None
    scale = {3: 4, 12: 2, 48: 1}.get(first.shape[1])
    more = any(key.endswith(("conv1x1.weight", "conv_up3.weight")) for key in tensors)
    if scale is None or last.shape[0] != 3 or more:
        return None
    blocks = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("body."))
    _check_number(blocks, tensors)
    return RRDBNet(first.shape[0], blocks, dense.shape[0], scale)


def _check_number(layers: int, tensors: Mapping[str, Tensor]) -> None:
    """Raises WeightsRefused for a name that counts more layers than there can be, before they are made."""
    if layers > len(tensors):
        raise storage.WeightsRefused(f"its names count {layers} layers, but it holds {len(tensors)} tensors")


def _empty_compact(tensors: Mapping[str, Tensor]) -> SRVGGNetCompact | None:
    """The SRVGGNetCompact that these tensors fill; None where they are of another network, or of one
    with other channels or another activation than ours."""
    if not all(re.match(r"body\.\d+\.", key) for key in tensors):
        return None
    last = max(int(key.split(".")[1]) for key in tensors)
    _check_number(last, tensors)
    shapes = [tuple(tensors.get(f"body.{n}.weight", torch.empty(0)).shape) for n in (0, 1, last)]
    if [len(shape) for shape in shapes] != [4, 1, 4] or shapes[0][1] != 3:
        return None
    scale = math.isqrt(shapes[2][0] // 3)
    return SRVGGNetCompact(shapes[0][0], last // 2 - 1, scale) if shapes[2][0] == 3 * scale**2 else None


def _from_ncnn(param: str, blob: bytes) -> OwnNetwork:
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
        network: OwnNetwork = SRVGGNetCompact(64, convs - 2, 4)
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


def copy_network(network: Network, dtype: torch.dtype = torch.float32) -> Network:
    """A second instance with the same tensors, rounded to dtype.

    For bf16 the first convolution stays in fp32, and takes its input so: bf16 shifts a page's levels
    by up to half a step, and on screentone the 6B model makes several dB of that. It is 0.3% of the
    arithmetic at most.
    """
    if isinstance(network, CommunityNetwork):
        return deepcopy(network).to(dtype)  # no hooks on it; it may hold more than its tensors tell
    copy = type(network)(*network.shape)
    copy.load_state_dict(network.state_dict())
    for module in copy.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = round_kernels(module.weight.data, dtype)
    copy.to(dtype)
    if dtype == torch.bfloat16:
        copy.first.float().load_state_dict(network.first.state_dict())
    return copy.eval().requires_grad_(False)


def round_kernels(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(cout, cin, kh, kw) -> the same values in dtype, each kernel's sum as near as dtype allows.

    What neighbouring pixels have in common meets a kernel's sum. Its taps are rounded from the
    largest to the smallest, each taking on what the rounding before it left (error diffusion, in
    the order in which the steps between values shrink). On a page with screentone the 6B model in bf16
    is 5 dB nearer to fp32 so than with each tap rounded by itself (README, Speed).
    """
    kernels = weight.flatten(2)
    order = kernels.abs().argsort(2, descending=True)
    ranked = kernels.gather(2, order)
    rounded = torch.empty_like(ranked, dtype=dtype)
    left = torch.zeros_like(ranked[..., 0])
    for tap in range(ranked.shape[2]):
        wanted = ranked[..., tap] + left
        rounded[..., tap] = wanted
        left = wanted - rounded[..., tap]
    return torch.empty_like(rounded).scatter(2, order, rounded).view(weight.shape)
