"""devices.py: which cards are used, whose they are, and what is told of them; the cards are pretended."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from engine import devices


@pytest.mark.parametrize(
    "capability, built, usable",
    [
        ((8, 6), ["sm_80", "sm_86", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_86", "sm_90"], True),  # within its major version
        ((6, 1), ["sm_75", "sm_80", "sm_120"], False),  # a GTX 1080 with a build for CUDA 12.8
        ((7, 0), ["sm_75", "sm_80"], False),
        ((13, 0), ["sm_120", "compute_120"], True),  # compiled by the driver
        ((7, 0), ["sm_75", "compute_75"], False),
        ((12, 1), ["sm_90a", "sm_120a"], True),
        ((6, 1), [], True),  # nobody knows
    ],
)
def test_a_card_without_kernels_in_this_torch_is_not_used(monkeypatch, caplog, capability, built, usable):
    devices._has_kernels.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for name, value in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_capability", capability),
        ("get_arch_list", built),
        ("get_device_name", "a card"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert devices.KINDS["cuda"].usable() == ([0] if usable else [])
    assert ("no kernels for a card" in caplog.text) != usable
    devices._has_kernels.cache_clear()


def test_workers_share_the_cards_that_can_be_used(monkeypatch):
    monkeypatch.setitem(devices.KINDS, "cuda", replace(devices.KINDS["cuda"], usable=lambda: [0, 2]))
    assert [devices.torch_device("cuda", slot).index for slot in range(3)] == [0, 2, 0]
    monkeypatch.setitem(devices.KINDS, "cuda", replace(devices.KINDS["cuda"], usable=lambda: []))
    with pytest.raises(devices.DeviceMissing):
        devices.torch_device("cuda", 0)


def test_a_card_that_answers_no_more_is_told_from_one_that_is_full(monkeypatch):
    assert not devices.card_is_lost(0)  # of one that was never used nothing is asked
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(devices, "torch_device", lambda *_: torch.device("cpu"))
    assert not devices.card_is_lost(0)
    for error, lost in ((torch.OutOfMemoryError("full"), False), (RuntimeError("unspecified launch"), True)):

        def failing(*_, error=error, **__):
            raise error

        with monkeypatch.context() as broken:
            broken.setattr(torch, "ones", failing)
            assert devices.card_is_lost(0) == lost


def test_on_windows_torch_takes_no_more_than_a_card_has(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6, 8))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *of: asked.append(of))
    device = torch.device("cuda", 1)
    for platform, kind in (("linux", device), ("win32", torch.device("cpu")), ("win32", device)):
        devices.keep_to_card.cache_clear()
        monkeypatch.setattr(sys, "platform", platform)
        devices.keep_to_card(kind)
    devices.keep_to_card.cache_clear()
    assert asked == [(0.75, device)]


def test_a_card_s_memory_is_told_once_it_is_used_and_never_by_waking_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_has_kernels", lambda index: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("a card was woken"))
    assert devices.card_memory(3) is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 10))
    assert devices.card_memory(3) == ("cuda:1", 7, 10)

    def fallen(device):
        raise RuntimeError("the driver is gone (injected)")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fallen)
    assert devices.card_memory(3) is None
