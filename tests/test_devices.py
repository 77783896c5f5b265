"""devices.py: which cards are used, whose they are, and what is told of them; the cards are pretended."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

import infer
from engine import devices
from messages import EngineChoice


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
    for error, lost in (
        (torch.OutOfMemoryError("full"), False),
        (torch.AcceleratorError("CUDA error: out of memory"), False),  # another program filled it
        (RuntimeError("unspecified launch"), True),
    ):

        def failing(*_, error=error, **__):
            raise error

        with monkeypatch.context() as broken:
            broken.setattr(torch, "ones", failing)
            assert devices.card_is_lost(0) == lost


@pytest.mark.parametrize(
    "built, capability, sure", [("12.8", (7, 0), True), ("12.8", (6, 1), False), (None, (9, 0), False)]
)
def test_what_multiplies_fp16_itself_is_not_measured(monkeypatch, built, capability, sure):
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: capability)
    monkeypatch.setitem(devices.KINDS, "cuda", replace(devices.KINDS["cuda"], usable=lambda: [0]))
    assert devices.surely_faster("cuda", 0) == sure
    assert not devices.surely_faster("mps", 0) and not devices.surely_faster("xpu", 0)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "GET was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "Invalid buffer size: 9.75 GiB",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes",
    ],
)
def test_out_of_memory_is_known_however_it_is_said(words):
    assert devices.out_of_memory(RuntimeError(words))
    assert not devices.out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_on_windows_torch_takes_no_more_than_a_card_has(monkeypatch):
    asked, device = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *of: asked.append(of))
    # Free, and held by torch, of 8 bytes: beside a game, with a page, without the game, and told too much.
    for free, held in ((1, 0), (1, 1), (7, 1), (8, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 8))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, held=held: held)
        for platform, kind in (("linux", device), ("win32", torch.device("cpu")), ("win32", device)):
            monkeypatch.setattr(sys, "platform", platform)
            devices.keep_to_card(kind)
    assert asked == [(share, device) for share in (0.125, 0.25, 1.0, 1.0)]


def test_a_card_s_memory_is_told_once_it_is_used_and_never_by_waking_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_has_kernels", lambda index: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("a card was woken"))
    assert devices.card_memory(3) is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # as after get_device_capability
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    assert devices.card_memory(3) is None
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 10))
    assert devices.card_memory(3) == ("cuda:1", 7, 10)

    def fallen(device):
        raise RuntimeError("the driver is gone (injected)")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fallen)
    assert devices.card_memory(3) is None


@pytest.mark.parametrize("device, threads", [("cpu", 1), ("cuda", 2), ("auto", 2), ("xpu", 1)])
def test_a_worker_takes_as_many_pages_at_once_as_the_device_that_was_chosen(monkeypatch, device, threads):
    for kind, indices in (("cuda", [0]), ("xpu", [])):
        row = replace(devices.KINDS[kind], usable=lambda indices=indices: indices)
        monkeypatch.setitem(devices.KINDS, kind, row)
    started = []
    monkeypatch.setattr(infer, "Lanes", lambda count, name: started.append(count))
    infer.Worker(None, EngineChoice(device=device), 0)
    assert started == [threads]


@pytest.mark.parametrize(
    ("chosen", "silent", "own", "asked"),
    [
        ("auto", {}, [0, 1, 2, 0], [0, 1, 2, 0]),
        ("auto", {0: "uncorrectable ECC error encountered"}, [1, 1, 2, 1], [0, 1, 1, 2, 0, 1]),
        ("cuda", {1: "busy", 2: "busy"}, [0, 0, 0, 0], [0, 1, 2, 2, 0, 0]),
        ("auto", {0: "out of memory"}, [0, 1, 2, 0], [0, 1, 2, 0]),  # another program filled it
        ("auto", dict.fromkeys(range(3), "busy"), [2, 0, 1, 2], [0, 1, 1, 2, 2, 0, 0, 1]),
        ("cpu", {0: "busy"}, [0, 1, 2, 0], []),  # nobody will use one
    ],
)
def test_a_worker_has_its_card_or_where_that_fails_the_next_that_answers(
    monkeypatch, chosen, silent, own, asked
):
    seen = []

    def ones(_, device):
        seen.append(device.index)
        if device.index in silent:
            raise torch.AcceleratorError(f"CUDA error: {silent[device.index]} (injected)")
        return torch.zeros(1)

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setitem(devices.KINDS, "cuda", replace(devices.KINDS["cuda"], usable=lambda: range(3)))
    found = []
    for slot in range(4):
        monkeypatch.setattr(devices, "SILENT", set())  # each in its own process
        devices.leave_out_silent(EngineChoice(device=chosen), slot)
        found.append(devices.torch_device("cuda", slot).index)
    assert (found, seen) == (own, asked)


@pytest.mark.parametrize("cards", [[], [0]])
def test_where_there_is_no_other_card_none_is_asked_whether_it_answers(monkeypatch, cards):
    monkeypatch.setattr(torch, "ones", lambda *_, **__: pytest.fail("a card was woken"))
    monkeypatch.setitem(devices.KINDS, "cuda", replace(devices.KINDS["cuda"], usable=lambda: cards))
    devices.leave_out_silent(EngineChoice(), 0)
    assert not devices.SILENT
