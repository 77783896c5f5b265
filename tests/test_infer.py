"""Tiles, plans, and what the engine does when memory or numbers run out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import colour, grainy, grey, sixteen_bit
from engines import COMPACT, NO_FILES, apart, bundled, native, plan_for

import infer
import pages
from messages import EngineChoice, Params
from pages import PageError

CHOICE = EngineChoice(model_root=NO_FILES)


def engines() -> infer.Engines:
    """The engines of a worker that never ticks."""
    return infer.Engines(CHOICE, slot=0, tick=lambda: None)


@pytest.mark.parametrize(
    "height, width, tile, halo, multiple",
    [
        (1, 1, 32, 18, 1),
        (100, 100, 100, 18, 1),
        (101, 203, 50, 7, 1),
        (7, 1000, 64, 48, 1),
        (64, 60, 30, 5, 4),
        (200, 4, 32, 0, 2),
    ],
)
def test_cores_cover_the_page_once_and_windows_lie_inside(height, width, tile, halo, multiple):
    seen, shapes = np.zeros((height, width), int), set()
    for core, window in infer.tiles(height, width, tile, halo, multiple):
        core.of(seen)[...] += 1
        assert 0 <= window.y0 <= core.y0 and core.y1 <= window.y1 <= height
        assert 0 <= window.x0 <= core.x0 and core.x1 <= window.x1 <= width
        assert core.y0 == 0 or core.y0 - window.y0 >= halo
        assert core.x1 == width or window.x1 - core.x1 >= min(halo, width - core.x1)
        assert not any(edge % multiple for edge in (window.y0, window.x0, window.y1, window.x1))
        shapes.add((window.y1 - window.y0, window.x1 - window.x0))
    assert (seen == 1).all() and len(shapes) == 1


@pytest.mark.parametrize("tile, halo", [(0, 1), (-3, 1), (32, -1)])
def test_impossible_tiles_are_refused(tile, halo):
    with pytest.raises(ValueError, match="tile"):
        list(infer.tiles(10, 10, tile, halo))


def test_noise_falls_from_low_over_medium_to_high():
    page, engine = grainy(64, 64), native(COMPACT)
    noise = {
        kind: float(
            infer.upscale_page(engine, page, Params(denoise=kind)).astype(float)[16:-16, 16:-16].std()
        )
        for kind in ("low", "medium", "high")
    }
    assert noise["low"] > noise["medium"] + 1 > noise["high"] + 1.2, noise


def test_denoise_keeps_what_is_no_noise():
    page, engine = grey(64, 80), native(COMPACT)
    plain = infer.upscale_page(engine, page, Params()).astype(float)
    for kind in ("low", "high"):
        other = infer.upscale_page(engine, page, Params(denoise=kind)).astype(float)
        assert abs(other.mean() - plain.mean()) < 2 and np.abs(other - plain).mean() < 6


def test_a_16_bit_page_comes_out_as_its_8_bit_twin():
    page, engine = colour(40, 48), native(COMPACT)
    eight, sixteen = (engine.upscale(p, 2) for p in (page, sixteen_bit(page)))
    assert sixteen.dtype == np.uint8 and abs(sixteen.mean() - eight.mean()) < 1


def test_alpha_is_kept_for_png_and_laid_on_white_for_jpeg():
    page = np.dstack([colour(24, 32), np.zeros((24, 32), np.uint8)])
    assert (infer.upscale_page(native(COMPACT), page, Params(output_format="jpg")) > 250).all()
    assert (infer.upscale_page(native(COMPACT), page, Params(output_format="png"))[..., 3] < 5).all()


@pytest.fixture
def small_memory(monkeypatch):
    """A device that can't hold a window of more than 90 pixels' width."""
    to_input = infer.NativeEngine._to_input

    def limited(self, stack):
        if stack.shape[2] > 90:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return to_input(self, stack)

    monkeypatch.setattr(infer.NativeEngine, "_to_input", limited)


def test_out_of_memory_halves_the_tile_and_is_remembered(small_memory):
    page, plan, worker = grey(150, 150), plan_for(bundled(COMPACT), tile=128), engines()
    pixels, deviation = worker.compute(page, Params(model=COMPACT), plan)
    assert deviation in ("tile 32", "tile 64")
    assert worker.fitted == {(plan.model, "cpu", "fp32"): int(deviation.split()[1])}
    assert worker.compute(page, Params(model=COMPACT), plan)[1] == deviation
    window = infer.NativeEngine(bundled(COMPACT), replace(plan, tile=32), 0)
    assert apart(pixels, window.upscale(page, 2)) <= 1


def test_a_page_that_never_fits_fails_with_a_reason(monkeypatch):
    def never(*_):
        raise MemoryError

    monkeypatch.setattr(infer.NativeEngine, "_to_input", never)
    with pytest.raises(PageError, match="smallest tile"):
        engines().compute(grey(40, 40), Params(model=COMPACT), plan_for(bundled(COMPACT), tile=64))


def break_results(monkeypatch, value: float, only: torch.dtype | None = None) -> None:
    """Make networks of one dtype (or all) give a constant."""
    forward = infer.SRVGGNetCompact.forward

    def broken(self, x, last=True):
        y = forward(self, x, last)
        return torch.full_like(y, value) if only in (None, x.dtype) else y

    monkeypatch.setattr(infer.SRVGGNetCompact, "forward", broken)


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


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(infer.DEVICES, "cuda", replace(infer.DEVICES["cuda"], count=lambda: 0))
    with pytest.raises(infer.DeviceMissing, match="cuda"):
        infer.make_plan(Params(model=COMPACT, device="cuda"), CHOICE, bundled(COMPACT), 0)


def test_params_override_the_plan():
    params = Params(model=COMPACT, tile_size=77, tile_pad=0, batch_size=3, device="cpu")
    plan = infer.make_plan(params, replace(CHOICE, precision="fp32"), bundled(COMPACT), 0)
    assert (plan.tile, plan.halo_px, plan.batch, plan.device, plan.precision) == (77, 0, 3, "cpu", "fp32")


def test_cancel_is_noticed_between_layers():
    ticks = []

    def tick():
        ticks.append(1)
        if len(ticks) == 5:
            raise infer.Cancelled

    model = bundled(COMPACT)
    with pytest.raises(infer.Cancelled):
        infer.NativeEngine(model, plan_for(model), 0, tick).upscale(grey(32, 32), 2)
    assert len(ticks) == 5


def test_a_page_takes_the_mode_of_its_source():
    engine = native(COMPACT)
    for source in (grey(20, 24), colour(20, 24)):
        assert pages.channels(engine.upscale(source, 3)) == pages.channels(source)
