"""The worker process: each task and question is answered once, whatever befalls it; what is a hang."""

from __future__ import annotations

import hashlib
import math
import os
import queue
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
from drawn import colour
from serving import PARAMS, png, until, volume

import infer
import storage
from engine import devices, pages, survey
from messages import (
    CARD_LOST_STATUS,
    DIED_TWICE,
    ComputePage,
    EngineChoice,
    KnownPage,
    Limits,
    PageFailed,
    Params,
    Preview,
    Previewed,
    Probe,
    Probed,
    Settle,
    SourcePage,
    Stage,
    Survey,
    Surveyed,
    TaskFailed,
)
from work import workers


class Line:
    """The worker's end of its pipe."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def send(self, event: Any) -> None:
        """What the dispatcher hears."""
        self.events.put(event)


@pytest.fixture
def worker(tmp_path: Path) -> infer.Worker:
    """One that is given tasks by hand, and beats not."""
    choice = EngineChoice(device="cpu", precision="fp32", model_root=tmp_path)
    return infer.Worker(Line(), choice, 0)  # type: ignore[arg-type]


def answer(worker: infer.Worker, task: Any) -> Any:
    """The one event that this task is answered with."""
    worker._start(task)
    event = worker.conn.events.get(timeout=60)  # type: ignore[attr-defined]
    until(lambda: not worker.watch.steps)
    assert worker.conn.events.empty()  # type: ignore[attr-defined]
    return event


def page_of(tmp_path: Path) -> ComputePage:
    source = tmp_path / "1.png"
    source.write_bytes(png())
    params = Params(model="realesr-animevideov3")
    return ComputePage("job", 1, 1, source, tmp_path / "out", params, None, Limits())


def test_a_question_is_answered_whatever_it_stumbles_over(worker, tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(pages, "write_preview", broken)
    monkeypatch.setattr(survey, "survey", broken)
    monkeypatch.setattr(devices, "describe_devices", broken)
    preview = Preview("p", tmp_path / "1.png", tmp_path / "2.jpg", 64, Limits())
    assert answer(worker, preview) == Previewed("p", "MemoryError")
    asked = Survey("s", tmp_path / "v.zip", 1, tmp_path, (Params(),), Limits())
    assert answer(worker, asked) == Surveyed("s", error="MemoryError")
    assert answer(worker, Probe()) == Probed([], [])


class Ended(BaseException):
    """In place of the process's end."""


def test_a_worker_whose_card_is_lost_ends_and_fails_no_page(worker, tmp_path, monkeypatch):
    """In its process every page would fail from then on; another process may find the card again."""

    def end(status: int) -> None:
        raise Ended(status)

    def fallen(*_: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure (injected)")

    monkeypatch.setattr(os, "_exit", end)
    events = worker.conn.events  # type: ignore[attr-defined]
    page, settle = page_of(tmp_path), Settle("job", 1, Params(), None)
    monkeypatch.setattr(devices, "card_is_lost", lambda slot: False)
    worker._page_step(page, fallen)
    worker._file_step(settle, fallen)
    assert [type(events.get()) for _ in range(2)] == [PageFailed, TaskFailed]
    monkeypatch.setattr(devices, "card_is_lost", lambda slot: True)
    for step in (lambda: worker._page_step(page, fallen), lambda: worker._file_step(settle, fallen)):
        with pytest.raises(Ended, match=str(CARD_LOST_STATUS)):
            step()
    assert events.empty() and "card" in workers.exit_reason(CARD_LOST_STATUS)


def test_a_file_task_s_ticks_neither_limit_it_nor_stretch_what_a_device_may_take(monkeypatch):
    now, watch = [0.0], infer.Watch()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch.begin(math.inf)  # staging a large archive
    now[0] = 3000.0
    watch.tick()
    now[0] = 9000.0
    beat = watch.worst()
    assert beat.busy_s < beat.limit_s
    watch.end()
    watch.begin(infer.FIRST_STEP_LIMIT_S)  # a page on the device
    for _ in range(3):
        now[0] += 0.1
        watch.tick()
    now[0] += 61
    beat = watch.worst()
    assert beat.busy_s > beat.limit_s == 60


def test_what_the_machine_slept_is_no_step_s_fault(worker, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    naps = iter([1.0, 3600.0])

    def sleep(_: float) -> None:
        nap_s = next(naps, None)
        if nap_s is None:
            raise Ended
        now[0] += nap_s

    monkeypatch.setattr(time, "sleep", sleep)
    worker.watch.begin(300)
    with pytest.raises(Ended):
        worker._beat()
    beats = [worker.conn.events.get() for _ in range(3)]  # type: ignore[attr-defined]
    assert [round(beat.busy_s) for beat in beats] == [0, 1, 2]


def test_a_page_is_answered_once_it_is_on_disk(worker, tmp_path):
    done = answer(worker, page_of(tmp_path))
    assert (tmp_path / done.output).stat().st_size == done.size_bytes


def test_an_input_that_cannot_be_staged_fails_its_task_alone(worker, tmp_path):
    place = tmp_path / "v.zip"
    place.write_bytes(b"PK no zip")
    params = Params(model="realesr-animevideov3")
    folders = tmp_path / "staging", tmp_path / "outputs"
    stage = Stage("job", 1, place, *folders, params, None, (), None, Limits())
    failed = answer(worker, stage)
    assert isinstance(failed, TaskFailed) and failed.code == "INPUT_UNUSABLE"


@pytest.mark.parametrize("staged", ["00001.png", ""])
def test_a_job_that_is_finished_but_for_its_artifact_looks_at_its_input_only_if_that_is_another(
    worker, tmp_path, staged
):
    """`staged` is emptied where a resume names another input."""
    old, outputs = png(), tmp_path / "outputs"
    outputs.mkdir()
    (outputs / "1.jpg").write_bytes(b"page")
    source = SourcePage("1.png", staged, hashlib.sha256(old).hexdigest(), len(old), None)
    known = KnownPage(source, "1.jpg", hashlib.sha256(b"page").hexdigest())
    place = tmp_path / "v.zip"
    place.write_bytes(volume({"1.png": png(shade=9)}))
    stage = Stage("job", 1, place, tmp_path / "staging", outputs, Params(), None, (known,), None, Limits())
    found = [page for page in worker._staged_pages(stage, {"1.png": known}) if isinstance(page, SourcePage)]
    assert [page.sha256 == source.sha256 for page in found] == [bool(staged)]


def test_a_finished_job_with_two_pages_of_one_name_is_staged_anew(worker, tmp_path):
    """By its name only one of them is known."""
    data, outputs, known = [png(), png(shade=9)], tmp_path / "outputs", []
    outputs.mkdir()
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for n, page in enumerate(data):
            archive.writestr("1.png", page)
            digest = storage.write_whole(outputs / f"{n}.jpg", page)
            source = SourcePage("1.png", f"0000{n}.png", hashlib.sha256(page).hexdigest(), len(page), None)
            known.append(KnownPage(source, f"{n}.jpg", digest))
    folders = tmp_path / "staging", outputs
    stage = Stage("job", 1, tmp_path / "v.zip", *folders, Params(), None, tuple(known), None, Limits())
    found = worker._staged_pages(stage, {"1.png": known[1]})
    staged = [(folders[0] / page.staged).read_bytes() for page in found if isinstance(page, SourcePage)]
    assert staged == data


def test_a_hang_while_a_plan_is_settled_is_seen(worker, monkeypatch):
    """The rest of staging may take as long as the disk does."""
    seen = []
    monkeypatch.setattr(worker.engines, "plan", lambda params: seen.append(worker.watch.worst().limit_s))
    worker.watch.begin(math.inf)
    worker._settled(Params(), None)
    assert seen == [infer.SETTLE_LIMIT_S] and math.isinf(worker.watch.worst().limit_s)


def test_a_share_of_no_bytes_at_all_is_a_limit_too(tmp_path):
    page = page_of(tmp_path)
    shares = [(None, None), (0, None), (None, 5000), (7000, 5000), (0, 5000)]
    tasks = [replace(page, most_bytes=own, params=Params(max_page_bytes=each)) for own, each in shares]
    assert [infer._most_bytes(task) for task in tasks] == [None, 0, 5000, 5000, 0]


def kept(worker: infer.Worker, tmp_path: Path, name: str, data: bytes, **facts: Any) -> Any:
    """What becomes of a page of this name and content."""
    task = replace(page_of(tmp_path), source=tmp_path / name, **facts)
    task.source.write_bytes(data)
    return answer(worker, task)


@pytest.mark.parametrize("suffix", [".webp", ".avif", ".tiff", ".jpg", ".png"])
@pytest.mark.parametrize("container", ["pdf", "epub"])
def test_what_a_pdf_does_not_hold_as_it_is_is_written_anew_although_it_is_large_enough(
    worker, tmp_path, suffix, container
):
    data = cv2.imencode(suffix, colour(64, 48))[1].tobytes()
    params = replace(PARAMS, container=container, target_width=24, max_page_bytes=len(data))
    done = kept(worker, tmp_path, "2.png", data, params=params)
    stays = container == "epub" or suffix in (".jpg", ".png")
    assert (done.carried, done.error, done.model) == (stays, None, None)
    assert (done.width, done.height) == ((48, 64) if stays else (24, 32))
    written = (tmp_path / done.output).read_bytes()
    assert written == data if stays else storage.sniff(written) == "jpeg" and len(written) < len(data)
    tally = survey.Tally(params)
    tally.add(data[: survey.HEAD_BYTES], len(data))
    assert (tally.carried_bytes, tally.output_pixels) == ((len(data), 0) if stays else (0, 24 * 32))


@pytest.mark.parametrize(
    ("name", "content", "suffix"),
    [
        ("1.png", ".jpg", ".jpg"),
        ("1.jpg", ".webp", ".webp"),
        ("1.jpg", ".avif", ".avif"),
        ("1.jpeg", ".jpg", ".jpeg"),
        ("1.tif", ".tiff", ".tif"),
        ("1.png", ".png", ".png"),
        ("1.jpg", b"<html>", ".jpg"),
        ("1.webp", b"", ".webp"),
    ],
)
@pytest.mark.parametrize("carry", ["why", DIED_TWICE])
def test_a_page_that_is_kept_is_called_what_it_is(worker, tmp_path, name, content, suffix, carry):
    data = content if isinstance(content, bytes) else cv2.imencode(content, colour(64, 48))[1].tobytes()
    done = kept(worker, tmp_path, name, data, carry=carry)
    assert (done.output, done.error) == ("out" + suffix, carry)
    assert (tmp_path / done.output).read_bytes() == data
