"""What there is to compute on: kinds of devices, a worker's own, and what is known of it.

Map: DeviceKind, KINDS - a worker's device - out of memory, lost - what there is, for people - what pages
    are alike to the bit for (program)
Rule: a table, not branches: what differs between kinds of devices is a field of DeviceKind.
Runs in: the worker process only (it loads torch).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

import storage
from messages import EngineChoice

log = logging.getLogger("devices")


class DeviceMissing(storage.StorageError):
    """The device that was asked for is not here."""

    code = "DEVICE_MISSING"


# ---------------------------------------------------------------- kinds
@dataclass(frozen=True, slots=True)
class DeviceKind:
    """One row a kind of device: which there are, and what to try on them.

    usable: torch's indices of those that it can compute on here.
    tile, batch: input pixels of a window's core and windows at once, for (compact, RRDB)
    networks. On cards the first fills a large one with 1 GB, the second takes 5 GB, since
    its halo costs less the larger the window; out of memory halves them. On a processor the
    rows of a 6B window that all layers keep take 1 MB a pixel of its width.
    window: sides of a window, with its halo, of a network of another architecture. It goes back to
    network scale as a whole: 4x and 64 channels of fp32 are 420 MB of each layer at 320.
    rolls: whether a window is as high as the page and computed a few rows at a time, each
    row once. Caches gain by it; a card would wait for the many small steps.
    pages: computed at a time, by a thread each: a card takes up the next page while the
    last one's pixels come back.
    """

    usable: Callable[[], Sequence[int]]
    fast_precision: str
    tile: tuple[int, int] = (512, 864)
    batch: tuple[int, int] = (4, 1)
    window: int = 512
    rolls: bool = False
    pages: int = 2


def _cuda_cards() -> list[int]:
    """Without those that this build of torch has no kernels for: the driver answers for them, and the
    first operation fails."""
    here = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [index for index in here if _has_kernels(index)]


@functools.cache
def _has_kernels(index: int) -> bool:
    """By torch.cuda's own rules (_check_cubins): code for sm_86 runs on 8.6 and 8.9, and compute_90 is
    compiled by the driver for whatever is newer."""
    if torch.version.cuda is None:  # ROCm
        return True
    major, minor = torch.cuda.get_device_capability(index)
    built = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))
    if not built or any(
        (int(first) == major and int(second) <= minor)
        or (kind == "compute" and (int(first), int(second)) <= (major, minor))
        for kind, first, second in built
    ):
        return True
    log.warning(
        "torch %s has no kernels for %s (compute capability %d.%d): it is not used (README: GPU)",
        torch.__version__,
        torch.cuda.get_device_name(index),
        major,
        minor,
    )
    return False


def _xpu_cards() -> Sequence[int]:
    here = hasattr(torch, "xpu") and torch.xpu.is_available()
    return range(torch.xpu.device_count() if here else 0)


# In the order in which "auto" prefers them. ROCm builds answer as CUDA.
KINDS = {
    "cuda": DeviceKind(_cuda_cards, "fp16"),
    "xpu": DeviceKind(_xpu_cards, "fp16"),
    # One page at a time: two threads on Metal can end the process (pytorch issue 197805), as does a
    # tensor of 4 GiB (issue 149325): one of fp32 at four times a window's size has 2.
    "mps": DeviceKind(lambda: range(torch.backends.mps.is_available()), "fp16", (512, 512), pages=1),
    "cpu": DeviceKind(lambda: range(1), "bf16", (2560, 1280), (1, 1), window=320, rolls=True, pages=1),
}


def pick_device(asked: str) -> str:
    """The device kind for "auto" or a name. Raises DeviceMissing."""
    if asked == "auto":
        return next(name for name, kind in KINDS.items() if kind.usable())
    if asked not in KINDS or not KINDS[asked].usable():
        raise DeviceMissing(
            f"no {asked} device is usable here (torch {torch.__version__}); use device auto or cpu, "
            "or install the torch build for this card (README: GPU)"
        )
    return asked


def device_count(choice: EngineChoice) -> int:
    """How many devices workers of this choice can share; 1 where what was asked for is missing."""
    with contextlib.suppress(DeviceMissing):
        return max(1, len(KINDS[pick_device(choice.device)].usable()))
    return 1


def kinds_for(choice: EngineChoice) -> list[DeviceKind]:
    """The kinds of devices that workers of this choice compute on, unless a job names another."""
    return [row for kind, row in KINDS.items() if choice.device in ("auto", kind) and row.usable()]


def native_bf16() -> bool:
    """Whether this processor multiplies bf16 itself; elsewhere it is emulated and slow."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def surely_faster(kind: str, slot: int) -> bool:
    """Whether a worker's device multiplies its fast precision itself: then there is nothing to measure,
    which another page on the device could falsify. NVIDIA's do from Volta on."""
    if kind != "cuda" or torch.version.cuda is None:
        return kind == "cpu" and native_bf16()
    return torch.cuda.get_device_capability(torch_device(kind, slot)) >= (7, 0)


# ---------------------------------------------------------------- a worker's device
CARDS = ("cuda", "xpu")  # kinds of which a machine may have several
SILENT: set[torch.device] = set()  # cards that leave_out_silent() found, in this process


def torch_device(kind: str, slot: int) -> torch.device:
    """Worker slot i takes the i-th usable device modulo their number, or the next that is not SILENT."""
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    cards = [torch.device(kind, index) for index in KINDS[kind].usable()]
    own = slot % max(1, len(cards))
    for card in cards[own:] + cards[:own]:
        if card not in SILENT:
            return card
    raise DeviceMissing(f"there is no {kind} device any more")


def leave_out_silent(choice: EngineChoice, slot: int) -> None:
    """Let this worker pass over a card that is listed and fails at the least operation (a memory error,
    another program's exclusive use): all its jobs would fail there, one after the other.

    Only at its start: any later the beats would wake a card that is not used.
    """
    for kind in CARDS:
        left = len(KINDS[kind].usable()) if choice.device in ("auto", kind) else 0
        while left > 1 and not _answers(card := torch_device(kind, slot)):  # the last one is taken as it is
            SILENT.add(card)
            left -= 1


def _answers(card: torch.device) -> bool:
    try:
        torch.ones(1, device=card).item()
    except RuntimeError as error:
        if not out_of_memory(error):
            log.error("%s does not answer, the next card is used: %s", card, error)
            return False
    return True


def keep_to_card(device: torch.device) -> None:
    """On Windows, let torch use what it holds of a card and what is free there now, and no more: the driver
    would go on in the computer's memory, many times slower, and never say that the card's is used up."""
    if device.type == "cuda" and sys.platform == "win32":
        free, whole = torch.cuda.mem_get_info(device)
        share = (free + torch.cuda.memory_reserved(device)) / whole
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)


def card_memory(slot: int) -> tuple[str, int, int] | None:
    """(device, bytes in use by all programs, bytes in all) of this worker's card, once it uses it."""
    for kind in CARDS:
        module = getattr(torch, kind, None)
        if module is not None and module.is_initialized():
            # A driver that fell over, or can't tell.
            with contextlib.suppress(RuntimeError, AttributeError, DeviceMissing):
                device = torch_device(kind, slot)
                # Telling which cards can be used initializes CUDA too; asking for a card's memory takes some.
                if module.memory_reserved(device):
                    free, whole = module.mem_get_info(device)
                    return str(device), whole - free, whole
    return None


# ---------------------------------------------------------------- out of memory, lost
# How drivers and libraries say it that raise no OutOfMemoryError: CUDA, cuDNN and cuBLAS, cuDNN that
# finds no room for any of its ways, these two for a thread's first handle, Level Zero, Metal, torch's
# allocator on Linux and on Windows.
NO_MEMORY = re.compile(
    r"out of memory|alloc(ation)?_failed|unable to find an engine|cu(dnn|blas)_status_not_initialized"
    r"|out_of_(device_|host_)?(memory|resources)|can't allocate memory|not enough memory|invalid buffer size",
    re.IGNORECASE,
)


def out_of_memory(error: Exception) -> bool:
    """Whether a computation failed for want of memory, the device's or the computer's."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(NO_MEMORY.search(str(error)))


def card_is_lost(slot: int) -> bool:
    """Whether this worker's card, once it was used, fails at the least operation: after a driver's reset
    or an illegal access, CUDA refuses whatever the process asks from then on."""
    for kind in CARDS:
        module = getattr(torch, kind, None)
        if module is not None and module.is_initialized():
            try:
                torch.ones(1, device=torch_device(kind, slot)).item()
            except (RuntimeError, DeviceMissing) as error:
                return not out_of_memory(error)  # another program may have filled it
    return False


# ---------------------------------------------------------------- what it is
def describe_devices() -> list[dict[str, Any]]:
    """Every usable device, the one that "auto" takes first."""
    found = []
    for kind, row in KINDS.items():
        for index in row.usable():
            name, memory_bytes = kind, None
            if kind == "cuda":
                properties = torch.cuda.get_device_properties(index)
                name, memory_bytes = properties.name, properties.total_memory
            elif kind == "cpu":
                name = f"{os.cpu_count()} cores"
            found.append({"device": kind, "index": index, "name": name, "memoryBytes": memory_bytes})
    return found


@functools.cache
def describe_machine(device: str, slot: int) -> str:
    """What, beside the plan's other values, decides the last bit of a page: in words, then by a hash."""
    whole = hashlib.sha256(program(slot).encode()).hexdigest()[:8]
    libraries = f"torch {torch.__version__}, OpenCV {cv2.__version__}, program {whole}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name(torch_device(device, slot))}, {libraries}"
    if device != "cpu":
        return f"{device}, {libraries}"
    features = [torch.backends.cpu.get_cpu_capability()]
    for feature in ("amx_tile", "avx512_bf16"):
        if getattr(torch.cpu, f"_is_{feature}_supported", bool)():
            features.append(feature.upper())
    return f"{platform.machine()} {'+'.join(features)}, {libraries}"


def program(slot: int) -> str:
    """What computes in this worker: the code of the pipeline, its libraries, the hardware. Pages are
    promised to be alike to the bit where all of it is."""
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    versions = [torch.__version__, torch.version.cuda, cudnn, cv2.__version__, np.__version__, sys.version]
    for library in ("spandrel", "pillow", "pillow-jxl-plugin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{library} {importlib.metadata.version(library)}")
    processor = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        processor += sorted({line.strip() for line in lines if line.startswith(("model name", "flags"))})
    # Cards of several kinds may be here: a worker takes back only what its own would compute.
    devices = [
        (row["device"], row["name"])
        for row in describe_devices()
        if row["index"] == (torch_device(row["device"], slot).index or 0)
    ]
    return str([storage.code_hash(storage.PIPELINE), versions, processor, torch.get_num_threads(), devices])
