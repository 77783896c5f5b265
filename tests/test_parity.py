"""Our engine beside the reference, and tiles beside whole pages: at most 1/255 apart."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from drawn import PAGES, colour
from engines import COMPACT, SIX_B, apart, bundled, native, plan_for, use_windows
from helpers import require
from reference import CASES, Case, compute

from engine import rolling, upscaling
from messages import Params


@pytest.fixture(autouse=True)
def _as_many_threads_as_cores() -> Iterator[None]:
    """As users compute; conftest.py gives the other files one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def engine_of(model: str, way: str) -> upscaling.NativeEngine:
    """An engine of the whole page; way: one of rolling.KINDS or "windows"."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "windows":
            use_windows(patch)
            return native(model)
        return native(model, convolutions=way)


@pytest.mark.parametrize("way", [*rolling.KINDS, "windows"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_is_within_one_level_of_the_stored_reference(case: Case, way):
    require(way == "windows" or way in rolling.usable_kinds(), f"torch has no {way} here")
    params = Params(scale=case.outscale, output_format="png")
    ours = upscaling.upscale_page(engine_of(case.model, way), PAGES[case.page](), params)
    assert apart(ours, case.stored()) <= 1


@pytest.mark.parametrize(
    "model, height, width, tile, outscale",
    [
        (COMPACT, 190, 230, 64, 4),
        (COMPACT, 190, 230, 64, 3),
        (COMPACT, 190, 230, 64, 2),
        (SIX_B, 56, 152, 56, 2),  # as wide as two of its halos and a tile
    ],
)
def test_tiles_are_within_one_level_of_the_whole_page(model, height, width, tile, outscale, monkeypatch):
    page = colour(height, width)
    columns = native(model, tile=tile).upscale(page, outscale)
    use_windows(monkeypatch)
    whole = native(model).upscale(page, outscale)
    assert apart(columns, whole) <= 1
    assert apart(native(model, tile=tile).upscale(page, outscale), whole) <= 1


def test_the_compact_models_tiles_are_its_whole_page(monkeypatch):
    use_windows(monkeypatch)
    page = colour(150, 210)
    assert apart(native(COMPACT, tile=50, batch=3).upscale(page, 4), native(COMPACT).upscale(page, 4)) <= 1


@pytest.mark.parametrize("name, least_db", [(COMPACT, 48), (SIX_B, 48)])
@pytest.mark.parametrize("rolls", [True, False], ids=["rolling", "windows"])
def test_bf16_stays_near_fp32(name, least_db, rolls, monkeypatch):
    if not rolls:
        use_windows(monkeypatch)
    page = colour(60, 70)
    exact = native(name).upscale(page, 2).astype(float)
    near = native(name, precision="bf16").upscale(page, 2)
    assert 10 * np.log10(255**2 / ((exact - near) ** 2).mean()) > least_db


@pytest.mark.parametrize("name", ["colour", "grey16", "alpha"])
def test_the_reference_package_itself_agrees_today(name):
    require(importlib.util.find_spec("realesrgan"), "the reference package realesrgan is not installed")
    case = Case(COMPACT, name, 2)
    ours = upscaling.upscale_page(native(COMPACT), PAGES[name](), Params(scale=2, output_format="png"))
    assert apart(ours, compute(case)) <= 1


def test_the_upstream_engine_runs_the_reference_package():
    require(importlib.util.find_spec("realesrgan"), "the reference package realesrgan is not installed")
    import upstream_shim

    upstream_shim.install()
    model, page = bundled(COMPACT), PAGES["colour"]()
    engine = upscaling.UpstreamEngine(model, plan_for(model, engine="upstream", tile=0), slot=0)
    assert apart(engine.upscale(page, 2), Case(COMPACT, "colour", 2).stored()) <= 1
