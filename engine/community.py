"""Networks of other architectures than our two, through spandrel (the extra `.[models]`).

Map: the package - CommunityNetwork - how far a network sees
Rule: nothing is read here: models.py hands over tensors whose file was checked. What a descriptor says
of channels, sizes and precisions is kept to; what it does not say is measured.
Runs in: the worker process only (it loads torch). Knows nothing of pages and processes.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import storage
from engine import windows

log = logging.getLogger("community")

EXTRA = 'pip install ".[models]"'
# Windows of attention lie on a grid that starts at the page's corner, and 32 is a multiple of its step
# in all architectures known (8, 16; 32 in DAT's long windows): a tile's windows must start on it too.
GRID_PX = 32
HALOS_PX = (32, 64)  # that are tried, in turn
LARGEST_HALO_PX = 96  # of a network that sees further, or the whole of what it is given
CORE_PX = 32  # side of what is compared
NEAR = 0.5 / 255  # half a level: with rounding, a tile's edge is then at most one level off


class ExtraMissing(storage.WeightsRefused):
    """A weights file needs a package that is not installed."""


# ---------------------------------------------------------------- the package
@functools.cache
def package() -> types.ModuleType:
    """spandrel, imported at first need. Raises ExtraMissing.

    It imports torchvision for two networks that are nothing for pages (LaMa paints holes, RestoreFormer
    faces). That takes seconds, and torchvision's wheel from PyPI can't be imported beside a CPU build of
    torch; so it finds names without anything behind them instead.
    """
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    stand_ins = {name: types.ModuleType(name) for name in names if name not in sys.modules}
    for module in stand_ins.values():
        for name in ("InterpolationMode", "rotate", "normalize"):
            setattr(module, name, None)
    sys.modules.update(stand_ins)
    try:
        import spandrel
    except ImportError as error:
        raise ExtraMissing(
            f"neither an RRDBNet nor an SRVGGNetCompact (by its keys); other architectures need the extra "
            f"models: {EXTRA} ({error})"
        ) from error
    finally:
        for name in stand_ins:
            del sys.modules[name]
    package: types.ModuleType = spandrel
    return package


def network_of(tensors: Mapping[str, Tensor]) -> CommunityNetwork:
    """The network that a checkpoint describes, loaded exactly.

    Raises ExtraMissing, WeightsRefused; spandrel's own errors for a file that only looks like a network.
    """
    spandrel = package()
    whole = {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}
    try:
        descriptor = spandrel.ModelLoader().load_from_state_dict(whole)
    except spandrel.UnsupportedModelError:
        raise storage.WeightsRefused(
            f"of no architecture that spandrel {spandrel.__version__} knows (by its keys)"
        ) from None
    kind, purpose = descriptor.architecture.name, descriptor.purpose
    if purpose not in ("SR", "Restoration"):
        raise storage.WeightsRefused(f"a network for {purpose} ({kind}) is nothing for pages")
    channels = (descriptor.input_channels, descriptor.output_channels)
    if channels not in ((3, 3), (1, 1), (3, 1)):
        raise storage.WeightsRefused(f"a network ({kind}) from {channels[0]} channels to {channels[1]}")
    return CommunityNetwork(descriptor)


# ---------------------------------------------------------------- the network
class CommunityNetwork(nn.Module):
    """A network that is called as its descriptor says, with the interface of our own two."""

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.net: nn.Module = descriptor.model
        self.descriptor = descriptor  # pads to what sizes the network takes, and cuts that off again
        self.architecture: str = descriptor.architecture.name
        self.scale: int = descriptor.scale
        self.channels: int = descriptor.input_channels
        self.multiple = 1  # of a page's sides: see descriptor
        self.halo_px = None  # unknown: see measured_halo
        self.layout = self._pick_layout()

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, and of what it takes."""
        return next(self.net.parameters()).dtype

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether it is known to compute in this precision."""
        named = {torch.float16: "supports_half", torch.bfloat16: "supports_bfloat16"}.get(dtype)
        return named is None or bool(getattr(self.descriptor, named))

    @torch.inference_mode()
    def _pick_layout(self) -> torch.memory_format:
        """Channels last where convolutions are all and it runs so: an ESRGAN in bf16 takes 0.4 the time."""
        if any(isinstance(module, nn.Linear) for module in self.modules()):
            return torch.contiguous_format
        probe = torch.zeros(1, self.channels, 64, 64)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            self.descriptor(probe.contiguous(memory_format=torch.channels_last))
        except RuntimeError:  # it view()s what it computes
            self.net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            return torch.contiguous_format
        return torch.channels_last

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), or (B, 1, H, W) grey for one of one channel -> (B, 3, H*scale, W*scale), 0..1.

        A network of one channel computes a colour page's three by turns.
        """
        images = x.contiguous().flatten(0, 1).unsqueeze(1) if self.channels == 1 else x
        images = images.contiguous(memory_format=self.layout)
        # One at a time, as the descriptor demands.
        y = torch.cat([self.descriptor(image) for image in torch.split(images, 1)])
        if self.channels == 1:
            y = y.reshape(len(x), -1, *y.shape[2:])
        return y if y.shape[1] == 3 else y.repeat(1, 3, 1, 1)


# ---------------------------------------------------------------- how far it sees
@torch.inference_mode()
def measured_halo(network: CommunityNetwork, device: torch.device) -> int:
    """Input pixels around a tile beyond which a page changes nothing that shows in it, on a drawn page.

    A descriptor doesn't tell it. A network that sees further than the largest that is tried (or all that
    it is given, as channel attention does) gets LARGEST_HALO_PX.
    """
    margin = LARGEST_HALO_PX
    page = torch.from_numpy(windows.probe_page(CORE_PX + 2 * margin)).to(device).float() / 255
    x = page.expand(1, network.channels, -1, -1)

    def core(halo: int) -> Tensor:
        """The probe's middle, computed with so much around it."""
        window = slice(margin - halo, margin + CORE_PX + halo)
        inner = slice(halo * network.scale, (halo + CORE_PX) * network.scale)
        y: Tensor = network(x[..., window, window])
        return y[..., inner, inner]

    wanted = core(margin)
    for halo in HALOS_PX:
        if float((core(halo) - wanted).abs().max()) <= NEAR:
            return halo
    log.warning("%s sees further than %d pixels: tiles may show", network.architecture, HALOS_PX[-1])
    return LARGEST_HALO_PX
