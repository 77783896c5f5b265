"""Free space: a job that can't fit never starts, one that ran out of it loses nothing."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from types import SimpleNamespace

import faults
import pytest
from client import Client
from serving import png, queued, still, until, volume

import server
import settings
import storage
from files import inputs
from messages import Limits, Params

PAGES = {f"{n}.png": png(24, 24, n) for n in range(4)}


@pytest.mark.parametrize(
    ("sizes", "params", "expected"),
    [
        ([("a.jpg", 300)], Params(scale=1), 300 + 2 * 500),
        ([("a.jpg", 300)], Params(scale=2), 300 + 2 * 2000),
        ([("a.PNG", 300), ("b.png", 300)], Params(scale=2, output_format="png"), 600 + 2 * 4800),
        ([("a.zip", 300)], Params(scale=1, output_format="webp", jpeg_quality=100), 300 + 2 * 600),
        ([("done.jpg", 300)], Params(scale=1), 300 + 500),
        ([], Params(), 0),
    ],
)
def test_the_estimate_is_copy_pages_and_artifact(tmp_path, monkeypatch, sizes, params, expected):
    for free in (expected + 10, expected + 9):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if free == expected + 10:
            inputs.check_room(tmp_path, sizes, {"done.jpg"}, params, 10)
        else:
            with pytest.raises(storage.NoRoom, match=f"about {expected} bytes.*; {free} are free"):
                inputs.check_room(tmp_path, sizes, {"done.jpg"}, params, 10)


def test_a_file_too_large_to_be_a_page_needs_no_room(tmp_path):
    (tmp_path / "1.png").write_bytes(bytes(10))
    (tmp_path / "2.png").touch()
    os.truncate(tmp_path / "2.png", 8 << 30)
    assert inputs.input_sizes(tmp_path, Limits(entry_bytes=10)) == [("1.png", 10)]


def test_a_submit_that_cannot_fit_is_507_and_no_row_and_a_repeat_still_gives_its_job(tmp_path, monkeypatch):
    with still(tmp_path, reserve_bytes=1000) as service:
        client = Client(service.url)
        (service.config.layout.incoming / "v.zip").write_bytes(bytes(500))
        job = queued(service)
        assert service.table.counts()["PENDING"] == 1
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4000))
        body = {"title": "t", "volume": "1", "input": {"type": "zip", "path": "v.zip"}}
        problem = client.call("POST", "/jobs", body).problem()
        assert (problem.status, problem.code) == (507, "NO_ROOM")
        assert "4000 are free" in problem.detail and "REICHAN_RESERVE_BYTES" in problem.detail
        assert service.table.counts()["PENDING"] == 1 and service.table.get(job.id).id == job.id
        service.dispatcher.reserve_bytes = None  # REICHAN_CHECK_ROOM=off
        assert client.call("POST", "/jobs", body).status == 202


def test_a_job_that_no_longer_fits_when_its_turn_comes_fails_before_a_page_is_copied(disk):
    """Bitmaps in a zip are small at the submit, and not once they are listed."""
    with server.Service(settings.Config(storage_root=disk, port=0, reserve_bytes=0)) as service:
        client = Client(service.url)
        blank = b"BM" + bytes(6 << 20)
        with zipfile.ZipFile(data := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("1.bmp", blank)
        client.call("PUT", "/incoming/v.zip", data.getvalue())
        state = client.watch(job := client.submit("v.zip"))[0][-1]
        assert state.status == "FAILED" and "the job needs about" in state.last_error
        assert not (service.config.layout.staging / job).exists()


@pytest.mark.parametrize("step", ["files.inputs._stage_page", "storage.write_whole", "files.artifacts.pack"])
def test_a_disk_that_is_really_full_fails_the_job_and_a_resume_loses_nothing(
    disk, tmp_path, monkeypatch, step
):
    filler = disk / "filler"
    for name, value in (("FAULTS", tmp_path), ("FILL", step), ("FILLER", filler)):
        monkeypatch.setenv(name, str(value))
    config = settings.Config(storage_root=disk, port=0, reserve_bytes=0)
    with server.Service(config, faults.filling) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume(PAGES))
        job = client.submit("v.zip")
        until(lambda: job in service.dispatcher.unrecorded or client.state(job).is_over, 120)
        assert filler.stat().st_size > 1 << 20
        assert not list(config.layout.artifacts.iterdir())
        pages = [page for page in service.table.pages(job) if page.status == "upscaled"]
        assert len(pages) == (4 if step == "files.artifacts.pack" else 0)
        folder = next(config.layout.outputs.glob(f"*/*/{job}"), disk)
        before = {page.output: (folder / page.output).stat().st_mtime_ns for page in pages}
        filler.unlink()
        until(lambda: client.state(job).is_over, 60)
        failed = service.table.get(job)
        assert (failed.state, failed.error_code) == ("FAILED", "DISK")
        assert "make room and resume" in failed.last_error
        client.post(job, "resume")
        state = client.watch(job)[0][-1]
        assert (state.status, state.failed_pages) == ("SUCCESS", 0)
        assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
        assert storage.sha256_file(disk / state.artifact_path) == state.artifact_hash
        assert not list(disk.rglob("*.tmp"))
        until(lambda: not list(config.layout.staging.iterdir()))  # it goes a turn after the end was told
