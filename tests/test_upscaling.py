"""upscaling.py: plans, engines, and what becomes of a page when memory or numbers run out."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from drawn import colour, grainy, grey, sixteen_bit
from engines import COMPACT, NO_FILES, SIX_B, apart, bundled, native, plan_for, settled, use_windows
from helpers import require

import storage
from engine import devices, models, pages, rolling, upscaling, windows
from engine.pages import PageError
from files import weightfiles
from messages import AUTO_MODEL, EngineChoice, Params, Plan

CHOICE = EngineChoice(model_root=NO_FILES)
CARD_PIXELS = {0: 10_000}  # of all windows in a batch


def engines() -> upscaling.Engines:
    """The engines of a worker that never ticks."""
    return upscaling.Engines(CHOICE, slot=0, tick=lambda: None)


def test_noise_falls_from_low_over_medium_to_high():
    page, engine = grainy(64, 64), native(COMPACT)
    noise = {
        kind: float(
            upscaling.upscale_page(engine, page, Params(denoise=kind)).astype(float)[16:-16, 16:-16].std()
        )
        for kind in ("low", "medium", "high")
    }
    assert noise["low"] > noise["medium"] + 1 > noise["high"] + 1.2, noise


def test_denoise_keeps_what_is_no_noise():
    page, engine = grey(64, 80), native(COMPACT)
    plain = upscaling.upscale_page(engine, page, Params()).astype(float)
    for kind in ("low", "high"):
        other = upscaling.upscale_page(engine, page, Params(denoise=kind)).astype(float)
        assert abs(other.mean() - plain.mean()) < 2 and np.abs(other - plain).mean() < 6


def test_a_16_bit_page_comes_out_as_its_8_bit_twin():
    page, engine = colour(40, 48), native(COMPACT)
    eight, sixteen = (engine.upscale(p, 2) for p in (page, sixteen_bit(page)))
    assert sixteen.dtype == np.uint8 and abs(sixteen.mean() - eight.mean()) < 1


def test_alpha_is_kept_for_png_and_laid_on_white_for_jpeg():
    page = np.dstack([colour(24, 32), np.zeros((24, 32), np.uint8)])
    assert (upscaling.upscale_page(native(COMPACT), page, Params(output_format="jpg")) > 250).all()
    assert (upscaling.upscale_page(native(COMPACT), page, Params(output_format="png"))[..., 3] < 5).all()


@pytest.fixture
def small_memory(monkeypatch):
    """A device that can't hold a window of more than 90 pixels' width."""
    to_input = upscaling.NativeEngine._to_input

    def limited(self, stack, white):
        if stack.shape[2] > 90:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return to_input(self, stack, white)

    monkeypatch.setattr(upscaling.NativeEngine, "_to_input", limited)


def test_out_of_memory_halves_the_tile_and_is_remembered(small_memory):
    page, plan, worker = grey(150, 150), plan_for(bundled(COMPACT), tile=128), engines()
    pixels, deviation = worker.compute(page, Params(model=COMPACT), plan)
    assert deviation in ("tile 32", "tile 64")
    assert worker.fitted[plan.model, "cpu", "fp32"][0] == int(deviation.split()[1])
    assert worker.compute(page, Params(model=COMPACT), plan)[1] == deviation
    window = upscaling.NativeEngine(bundled(COMPACT), replace(plan, tile=32), 0)
    assert apart(pixels, window.upscale(page, 2)) <= 1


@pytest.fixture
def card(monkeypatch) -> list[tuple[str, int]]:
    """A card that isn't there: a CUDA device with the CPU's arithmetic and memory for 10,000
    pixels of windows. Gives (device, tile) of each batch that was tried."""
    monkeypatch.setitem(devices.KINDS, "cuda", replace(devices.KINDS["cuda"], usable=lambda: [0]))
    monkeypatch.setattr(devices, "torch_device", lambda kind, slot: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", None)  # in a CUDA build nobody is to ask for the card's name
    tried = []

    def capped(self, stack, white):
        tried.append((self.plan.device, self.plan.tile))
        if self.plan.device == "cuda" and stack.shape[0] * stack.shape[1] * stack.shape[2] > CARD_PIXELS[0]:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return windows.to_input(stack, white, self.input_dtype)

    monkeypatch.setattr(upscaling.NativeEngine, "_to_input", capped)
    return tried


def on_card(tile: int) -> Plan:
    return plan_for(bundled(COMPACT), device="cuda", tile=tile, batch=2)


def test_a_card_out_of_memory_halves_the_tile_and_remembers_what_fitted(card):
    page, worker = grey(150, 150), engines()
    pixels, deviation = worker.compute(page, Params(model=COMPACT), on_card(128))
    assert deviation == "tile 32" and [tile for _, tile in card[:3]] == [128, 64, 32]
    card.clear()
    assert worker.compute(page, Params(model=COMPACT), on_card(128))[1] == "tile 32"
    assert {tile for _, tile in card} == {32}
    assert apart(pixels, native(COMPACT).upscale(page, 2)) <= 1


def test_a_page_that_no_card_holds_goes_to_the_cpu(card, monkeypatch):
    monkeypatch.setitem(CARD_PIXELS, 0, 0)
    page = grey(100, 90)
    pixels, deviation = engines().compute(page, Params(model=COMPACT), on_card(64))
    # There with the processor's own tile: columns of 32 would compute their halos many times over.
    assert deviation == "device cpu, tile 2560, batch 1" and card[:2] == [("cuda", 64), ("cuda", 32)]
    assert card[-1] == ("cpu", 2560) and apart(pixels, native(COMPACT).upscale(page, 2)) <= 1


def test_one_page_that_no_card_holds_makes_the_next_ones_no_smaller(card, monkeypatch):
    worker = engines()
    with monkeypatch.context() as tight:
        tight.setitem(CARD_PIXELS, 0, 0)
        assert "device cpu" in worker.compute(grey(100, 90), Params(model=COMPACT), on_card(64))[1]
    card.clear()
    assert worker.compute(grey(60, 60), Params(model=COMPACT), on_card(64))[1] is None
    assert {tile for _, tile in card} == {64}


def test_a_larger_tile_is_tried_again_after_a_while(card, monkeypatch):
    """Another program may have had the memory."""
    now, page, worker = [0.0], grey(150, 150), engines()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with monkeypatch.context() as tight:
        tight.setitem(CARD_PIXELS, 0, 10_000)
        assert worker.compute(page, Params(model=COMPACT), on_card(128))[1] == "tile 32"
    monkeypatch.setitem(CARD_PIXELS, 0, 1 << 30)
    assert worker.compute(page, Params(model=COMPACT), on_card(128))[1] == "tile 32"
    now[0] = upscaling.FITTED_S + 1
    assert worker.compute(page, Params(model=COMPACT), on_card(128))[1] is None


def test_what_a_card_has_free_is_asked_for_each_page(monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "keep_to_card", asked.append)
    engine = native(COMPACT)
    for pages_before in range(2):
        assert len(asked) == pages_before
        engine.upscale(grey(16, 16), 2)
    assert asked == [engine.device] * 2


@pytest.mark.parametrize("rolls", [True, False], ids=["rolling", "windows"])
def test_two_pages_at_a_time_are_what_they_are_one_by_one(rolls, monkeypatch):
    if not rolls:
        use_windows(monkeypatch)
    worker, plan = engines(), plan_for(bundled(COMPACT), tile=64)
    given = [grey(90, 100), colour(110, 70), grey(60, 60), colour(80, 120)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda page: worker.compute(page, Params(model=COMPACT), plan)[0], given))
    for page, result in zip(given, together, strict=True):
        assert np.array_equal(result, native(COMPACT, tile=64).upscale(page, 2))


def test_a_page_that_never_fits_fails_with_a_reason(monkeypatch):
    def never(*_):
        raise MemoryError

    monkeypatch.setattr(upscaling.NativeEngine, "_to_input", never)
    with pytest.raises(PageError, match="smallest tile"):
        engines().compute(grey(40, 40), Params(model=COMPACT), plan_for(bundled(COMPACT), tile=64))


def change_results(monkeypatch, change: Callable[[torch.dtype, torch.Tensor], torch.Tensor]) -> None:
    """Let change(dtype, y) stand for the y that a compact network of this dtype makes, whole or rolling."""
    forward, run = models.SRVGGNetCompact.forward, rolling.RollingCompact.run

    def whole(self, x):
        return change(self.dtype, forward(self, x))

    def rows(self, x, last, tick):
        return change(self.dtype, run(self, x, last, tick))

    monkeypatch.setattr(models.SRVGGNetCompact, "forward", whole)
    monkeypatch.setattr(rolling.RollingCompact, "run", rows)


def break_results(monkeypatch, value: float, only: torch.dtype | None = None) -> None:
    """Make networks of one dtype (or all) give a constant."""
    change_results(monkeypatch, lambda dtype, y: torch.full_like(y, value) if only in (None, dtype) else y)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_an_insane_result_is_computed_again_in_fp32(monkeypatch, value):
    break_results(monkeypatch, value, only=torch.bfloat16)
    page, plan = grey(40, 40), plan_for(bundled(COMPACT), precision="bf16")
    pixels, deviation = engines().compute(page, Params(model=COMPACT), plan)
    assert deviation == "precision fp32"
    assert apart(pixels, native(COMPACT).upscale(page, 2)) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_page_that_stays_insane_fails(monkeypatch, value):
    break_results(monkeypatch, value)
    with pytest.raises(PageError, match="unusable"):
        engines().compute(grey(40, 40), Params(model=COMPACT), plan_for(bundled(COMPACT)))


# The probe: what auto does when the fast path is broken, slow or missing, on purpose.
AUTO = replace(CHOICE, precision="auto")


def test_auto_takes_bf16_where_it_is_native_and_right(monkeypatch):
    monkeypatch.setattr(devices, "native_bf16", lambda: True)
    for name in (COMPACT, SIX_B):
        assert settled(Params(model=name), AUTO, bundled(name)).precision == "bf16"


def test_auto_stays_with_fp32_where_bf16_is_emulated(monkeypatch):
    monkeypatch.setattr(devices, "native_bf16", lambda: False)
    assert settled(Params(model=COMPACT), AUTO, bundled(COMPACT)).precision == "fp32"


@pytest.mark.parametrize("value", [float("nan"), 0.0, 0.5])
def test_auto_stays_with_fp32_where_bf16_is_wrong(monkeypatch, value):
    monkeypatch.setattr(devices, "native_bf16", lambda: True)
    break_results(monkeypatch, value, only=torch.bfloat16)
    assert settled(Params(model=COMPACT), AUTO, bundled(COMPACT)).precision == "fp32"


def test_auto_stays_with_fp32_where_bf16_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "native_bf16", lambda: True)

    def refused(dtype, y):
        if dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16' (injected)")
        return y

    change_results(monkeypatch, refused)
    assert settled(Params(model=COMPACT), AUTO, bundled(COMPACT)).precision == "fp32"


def drag(monkeypatch, slow: torch.dtype) -> None:
    """Let compact networks of one dtype take twice the time of the others."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def dragged(dtype, y):
        now[0] += 2.0 if dtype == slow else 1.0
        return y

    change_results(monkeypatch, dragged)


@pytest.mark.parametrize("slow, chosen", [(torch.float16, "fp32"), (torch.float32, "fp16")])
def test_auto_measures_a_card_before_it_takes_fp16(card, monkeypatch, slow, chosen):
    drag(monkeypatch, slow)
    monkeypatch.setattr(upscaling, "CARD_PROBE_SIDE", 96)  # the processor's arithmetic
    params = Params(model=COMPACT, device="cuda")
    assert settled(params, AUTO, bundled(COMPACT)).precision == chosen


def test_auto_measures_a_card_without_much_room_on_a_smaller_probe(card, monkeypatch):
    drag(monkeypatch, torch.float32)
    assert settled(Params(model=COMPACT, device="cuda"), AUTO, bundled(COMPACT)).precision == "fp16"
    assert [tile for _, tile in card[:3]] == [384, 192, 96]


def test_auto_measures_a_card_again_that_had_no_room_at_all(card, monkeypatch):
    drag(monkeypatch, torch.float32)
    asked = (Params(model=COMPACT, device="cuda"), AUTO, bundled(COMPACT), upscaling.Measured(slot=0))
    with monkeypatch.context() as tight:
        tight.setitem(CARD_PIXELS, 0, 0)
        assert upscaling.make_plan(*asked).precision == "fp32"
    assert upscaling.make_plan(*asked).precision == "fp16"


@pytest.mark.parametrize("told, precision", [(True, "fp16"), (False, "fp32"), (None, "fp16")])
def test_a_card_is_asked_whether_it_bears_what_another_settled(card, monkeypatch, told, precision):
    """None: there was no room to tell, nor is it tried for each page."""
    asked: list[str] = []
    monkeypatch.setattr(upscaling, "faster_and_near", lambda *_: asked.append("probe") or told)
    worker, plan = upscaling.Engines(AUTO, 0, lambda: None), replace(on_card(64), precision="fp16")
    for _ in range(2):
        _, deviation = worker.compute(grey(60, 60), Params(model=COMPACT), plan)
        assert deviation == (None if precision == "fp16" else "precision fp32")
    assert asked == ["probe"]
    chosen = upscaling.Engines(replace(AUTO, precision="fp16"), 0, lambda: None)  # by the user
    assert chosen.compute(grey(60, 60), Params(model=COMPACT), plan)[1] is None and asked == ["probe"]
    monkeypatch.setattr(upscaling.Engines, "elsewhere", lambda *_: None)  # a plan by this very card
    own = upscaling.Engines(AUTO, 0, lambda: None)
    assert own.compute(grey(60, 60), Params(model=COMPACT), replace(plan, machine="this"))[1] is None
    assert asked == ["probe"]


def test_a_card_is_waited_for_without_a_core_and_on_its_own_stream(monkeypatch):
    """What torch.Event does instead: see _mark."""
    done: list[Any] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self, stream: str) -> None:
            self.n = done.append(stream) or sum(isinstance(one, str) for one in done)

        def synchronize(self) -> None:
            done.append(self.n)

    engine, queued = native(COMPACT), deque()
    engine.device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    for _ in range(3):
        engine._keep_one_queued(queued)
    assert done == ["stream of cuda:1"] * 2 + [1, "stream of cuda:1", 2]


def test_a_worker_measures_a_precision_once_and_not_for_each_job(monkeypatch):
    asked = []
    monkeypatch.setattr(upscaling, "faster_and_near", lambda model, *_: asked.append(model.name) or True)
    engines = upscaling.Engines(AUTO, 0, lambda: None)
    for params in (Params(model=COMPACT), Params(model=COMPACT, tile_size=64), Params(model=SIX_B)):
        assert engines.plan(params).precision == "bf16"
    assert asked == [COMPACT, SIX_B]


def test_auto_of_more_models_than_are_kept_loads_them_once_and_not_for_each_page(tmp_path, monkeypatch):
    files = [tmp_path / f"{height}p_MangaJaNai.safetensors" for height in (1200, 1400, 1600)]
    for file in files:
        file.write_bytes(b"weights")
    loaded = []
    monkeypatch.setattr(upscaling, "load_model", lambda found: loaded.append(found.name) or bundled(COMPACT))
    worker = upscaling.Engines(replace(AUTO, model_root=tmp_path, precision="fp32"), 0, lambda: None)
    plan = worker.plan(Params(model=AUTO_MODEL))
    assert len(plan.choices) == len(loaded) == 3 > worker.KEPT
    assert worker.plan(Params(model=AUTO_MODEL)) == plan and len(loaded) == 3
    files[0].write_bytes(b"other weights")
    worker.plan(Params(model=AUTO_MODEL))
    assert len(loaded) == 6
    for quality in range(1, 40):
        worker.plan(Params(model=AUTO_MODEL, jpeg_quality=quality))
    assert len(worker.settled) == worker.SETTLED_KEPT


def test_what_found_no_room_to_be_measured_is_settled_anew_for_the_next_page(monkeypatch):
    told = [None, None, True, True]
    monkeypatch.setattr(upscaling, "faster_and_near", lambda *_: told.pop(0))
    worker = upscaling.Engines(AUTO, 0, lambda: None)
    assert [worker.plan(Params(model=AUTO_MODEL)).precision for _ in range(3)] == ["fp32", "bf16", "bf16"]


# Which convolutions a processor computes in fp32.
MEASURED = EngineChoice(model_root=NO_FILES, precision="fp32", convolutions="auto")


@pytest.mark.parametrize("fast", rolling.KINDS)
@pytest.mark.parametrize("name", [COMPACT, SIX_B])
def test_the_convolutions_that_take_the_least_time_are_taken(name, fast, monkeypatch):
    require(fast in rolling.usable_kinds(), f"torch has no {fast} here")
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for kind, strip in rolling.KINDS.items():

        def dragged(self, seen, kind=kind, convolve=strip.convolve):
            result = convolve(self, seen)
            now[0] += result.shape[2] * (1.0 if kind == fast else 1.5)
            return result

        monkeypatch.setattr(strip, "convolve", dragged)
        monkeypatch.setattr(strip, "pixels", 12 * rolling.SAMPLE_WIDTH)
    plan = settled(Params(model=name), MEASURED, bundled(name))
    assert plan.convolutions == fast
    engine = upscaling.NativeEngine(bundled(name), plan, 0)
    assert engine.roller.kind is rolling.KINDS[fast]


@pytest.mark.parametrize(
    "seconds, kind",
    [
        ({"direct": 1.0, "winograd": 0.9, "nnpack": 0.9}, "direct"),  # not worth it
        ({"direct": 1.0, "winograd": 0.7, "nnpack": 0.6}, "nnpack"),
        ({"direct": 1.0, "winograd": 0.7}, "winograd"),
        ({"direct": 1.0, "winograd": 1.2, "nnpack": 1.4}, "direct"),
    ],
)
def test_fewer_multiplications_must_gain_enough(seconds, kind, monkeypatch):
    monkeypatch.setattr(rolling, "seconds_a_row", lambda network: seconds)
    assert rolling.fastest_kind(bundled(COMPACT).network) == kind


def test_only_fp32_on_a_processor_has_a_choice_of_convolutions(card, monkeypatch):
    def never(network):
        pytest.fail("nothing was to be measured")

    monkeypatch.setattr(rolling, "seconds_a_row", never)
    for device, precision in (("cuda", "fp32"), ("cpu", "bf16")):
        asked = replace(MEASURED, precision=precision)
        plan = settled(Params(model=COMPACT, device=device), asked, bundled(COMPACT))
        assert (plan.device, plan.precision, plan.convolutions) == (device, precision, "direct")


def test_a_worker_measures_convolutions_once_and_not_for_each_job(monkeypatch):
    require("winograd" in rolling.usable_kinds(), "fewer multiplications are for x86")
    asked = []
    monkeypatch.setattr(rolling, "fastest_kind", lambda network: asked.append(1) or "winograd")
    engines = upscaling.Engines(MEASURED, 0, lambda: None)
    for params in (Params(model=COMPACT), Params(model=COMPACT, tile_size=64), Params(model=SIX_B)):
        assert engines.plan(params).convolutions == "winograd"
    assert len(asked) == 2


def test_convolutions_that_were_chosen_are_taken_unmeasured_or_refused(monkeypatch):
    require("winograd" in rolling.usable_kinds(), "fewer multiplications are for x86")
    monkeypatch.setattr(rolling.nnpack, "is_ready", lambda: False)
    chosen = replace(MEASURED, convolutions="winograd")
    plan = settled(Params(model=COMPACT), chosen, bundled(COMPACT))
    assert plan.convolutions == "winograd"
    with pytest.raises(upscaling.EngineMissing, match="REICHAN_CONVOLUTIONS"):
        missing = replace(MEASURED, convolutions="nnpack")
        settled(Params(model=COMPACT), missing, bundled(COMPACT))
    # A cluster's node may lack what the plan was settled with.
    page, elsewhere = grey(40, 48), plan_for(bundled(COMPACT), convolutions="nnpack")
    pixels, deviation = engines().compute(page, Params(model=COMPACT), elsewhere)
    assert deviation == "convolutions direct" and apart(pixels, native(COMPACT).upscale(page, 2)) == 0


def test_a_plan_that_was_settled_elsewhere_or_before_an_update_is_known():
    here = engines()
    plan = here.plan(Params(model=COMPACT))
    before = replace(plan, machine=plan.machine.replace("torch ", "torch 1."))
    of_a_card = replace(before, device="xpu")  # which this machine lacks
    assert [here.elsewhere(one) for one in (plan, before, of_a_card)] == [None, *[f"on {plan.machine}"] * 2]


@pytest.mark.parametrize("name", [COMPACT, SIX_B])
def test_an_engine_that_is_dropped_gives_its_memory_back_at_once(name):
    engine = upscaling.NativeEngine(bundled(name), plan_for(bundled(name)), 0)
    engine.upscale(grey(16, 16), 2)
    network = weakref.ref(engine.network)
    gc.disable()
    try:
        del engine
        assert network() is None
    finally:
        gc.enable()


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(devices.KINDS, "cuda", replace(devices.KINDS["cuda"], usable=lambda: []))
    with pytest.raises(devices.DeviceMissing, match="cuda"):
        settled(Params(model=COMPACT, device="cuda"), CHOICE, bundled(COMPACT))


def test_params_override_the_plan():
    params = Params(model=COMPACT, tile_size=77, tile_pad=0, batch_size=3, device="cpu")
    plan = settled(params, replace(CHOICE, precision="fp32"), bundled(COMPACT))
    assert (plan.tile, plan.halo_px, plan.batch, plan.device, plan.precision) == (77, 0, 3, "cpu", "fp32")


def test_cancel_is_noticed_between_layers():
    ticks = []

    def tick():
        ticks.append(1)
        if len(ticks) == 5:
            raise upscaling.Cancelled

    model = bundled(COMPACT)
    with pytest.raises(upscaling.Cancelled):
        upscaling.NativeEngine(model, plan_for(model), 0, tick).upscale(grey(32, 32), 2)
    assert len(ticks) == 5


def test_a_page_takes_the_mode_of_its_source():
    engine = native(COMPACT)
    for source in (grey(20, 24), colour(20, 24)):
        assert pages.channels(engine.upscale(source, 3)) == pages.channels(source)


# ---------------------------------------------------------------- what is not here
@pytest.mark.parametrize("fault", ["ImportError", "RuntimeError"])
def test_where_the_reference_engine_is_missing_or_broken_its_error_says_how(monkeypatch, tmp_path, fault):
    (tmp_path / "basicsr.py").write_text(f"raise {fault}('operator torchvision::nms does not exist')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "basicsr"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    plan = replace(plan_for(bundled(COMPACT)), engine="upstream")
    with pytest.raises(upscaling.EngineMissing, match=r'nms does not exist.*pip install -e "\.\[upstream\]"'):
        engines().engine(plan)


# The reference prints an error that a tile meets, and pastes the tile before in its place.
def second_tile_fails(monkeypatch, error: RuntimeError) -> None:
    """Let the second call of the reference's compact network fail."""
    require(importlib.util.find_spec("realesrgan"), "the reference package realesrgan is not installed")
    import upstream_shim

    upstream_shim.install()
    from realesrgan.archs.srvgg_arch import SRVGGNetCompact

    forward, called = SRVGGNetCompact.forward, []

    def failing(self, x):
        called.append(x.shape)
        if len(called) == 2:
            raise error
        return forward(self, x)

    monkeypatch.setattr(SRVGGNetCompact, "forward", failing)


def test_a_tile_of_the_reference_engine_that_finds_no_room_makes_them_smaller(monkeypatch):
    second_tile_fails(monkeypatch, torch.OutOfMemoryError("CUDA out of memory (injected)"))
    page, plan = colour(40, 100), plan_for(bundled(COMPACT), engine="upstream", tile=64)
    pixels, deviation = engines().compute(page, Params(model=COMPACT), plan)
    assert deviation == "tile 32" and apart(pixels, native(COMPACT).upscale(page, 2)) <= 1


def test_a_tile_of_the_reference_engine_that_fails_fails_its_page(monkeypatch):
    second_tile_fails(monkeypatch, RuntimeError("CUDA error: unspecified launch failure (injected)"))
    plan = plan_for(bundled(COMPACT), engine="upstream", tile=64)
    with pytest.raises(upscaling.UpstreamFailed, match="unspecified launch"):
        engines().compute(colour(40, 100), Params(model=COMPACT), plan)


def test_auto_without_a_model_to_choose_asks_for_a_name(monkeypatch):
    monkeypatch.setattr(weightfiles, "find_weights", lambda root: {})
    with pytest.raises(storage.WeightsRefused, match="name one"):
        engines().plan(Params(model=AUTO_MODEL))


def test_weights_that_changed_while_a_job_ran_compute_none_of_its_pages():
    with pytest.raises(storage.WeightsRefused, match="changed while the job ran"):
        engines().engine(replace(plan_for(bundled(COMPACT)), weights_sha256="0" * 64))


# ---------------------------------------------------------------- a worker's process
def in_a_worker(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What Python says of the code, once a worker's libraries are loaded and settled."""
    command = [sys.executable, "-c", f"import infer; infer.settle_torch(); {code}"]
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | environment
    return subprocess.run(command, env=env, cwd=storage.PROGRAM, capture_output=True, text=True, check=True)


def test_a_worker_computes_the_same_bytes_each_time_and_loads_no_compiler_for_it():
    said = in_a_worker(
        "import sys, torch; print(torch.are_deterministic_algorithms_enabled(),"
        " torch.is_deterministic_algorithms_warn_only_enabled(), 'torch._inductor' in sys.modules)"
    )
    assert said.stdout.split() == ["True", "True", "False"]


@pytest.mark.parametrize(
    "code",
    [
        "from commands import cli; cli.main = tell; runpy.run_path('infer.py', run_name='__main__')",
        "sys.path.append('tests'); sys.argv = ['bench.py', '--encoders']; import bench;"
        "bench.encoders = tell; bench.main()",
    ],
    ids=["infer.py", "bench.py"],
)
def test_a_command_computes_as_a_worker_does(code):
    told = "torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled()"
    code = f"import runpy, sys, engine, torch; tell = lambda: print({told}) or 0; {code}"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=storage.PROGRAM, capture_output=True, text=True, check=True)
    assert said.stdout.split()[:2] == ["False", "True"]


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings libgomp on Linux alone")
@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "77"}])
def test_threads_that_wait_leave_the_processor_to_others_or_do_as_somebody_set(given):
    said = in_a_worker("pass", OMP_DISPLAY_ENV="verbose", **given)
    assert f"GOMP_SPINCOUNT = '{given.get('GOMP_SPINCOUNT', 2000)}'" in said.stderr
