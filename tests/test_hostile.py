"""Hostile inputs through the whole service, over a real socket and with a real worker.

Map: groups of checks.md - Tour (a service, what is on its disk) - archives - folders - images
Every input of make_hostile is sent once, in the group of its row in checks.md. After each
group `Tour.untouched` looks at what must hold whatever came in: the same worker is alive, the
files of another job are as they were, nothing lies outside its place, a good job succeeds.
What inputs and pages make of the same inputs, byte for byte: test_inputs.py, test_pages.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from client import Client
from helpers import require
from serving import png, until, volume

import server
import settings

MODEL = "realesr-animevideov3"
LIMIT_S = 240.0  # for a group: it takes seconds; nothing is timed by this
SCALE = 2

# Row of checks.md -> names in archives/; the first that fits counts, the last takes the rest.
ARCHIVE_GROUPS = {
    "A01 slips": r"slip_|ok_percent|ok_fullwidth|ok_dot|comment_fake|names_unicode_extra_slip",
    "A02 bombs": r"bomb_|many_entries|nested_deep|zip64_",
    "A05 encrypted": r"encrypted_",
    "A06 collisions": r".*_collide|dup_names|trailing_dot|file_dir_conflict|dir_",
    "A07 names": r"names_|reserved|illegal|control|long_|empty_component|deep_path",
    "A08 order": r"natural_sort|chapters|ok_baseline",
    "A09 junk": r"mac_windows|comicinfo|nested_",
    "A04 damaged": r".*",
}
# The same for images/. Each group is one job with a good page beside them.
IMAGE_GROUPS = {
    "I02 bombs": r"bomb_",
    "I04 orientation": r"exif_",
    "I08 cut": r"cut_|flip_|zero|bad_|tail_",
    "I09 I10 sizes": r"size_",
    "I01 kinds": r"ok_|anim",
    "I01 wrong names": r".*",
}


def grouped(groups: dict[str, str], names: Iterable[str]) -> dict[str, list[str]]:
    """group -> its names, every name in exactly one."""
    found: dict[str, list[str]] = {group: [] for group in groups}
    for name in names:
        found[next(group for group, pattern in groups.items() if re.match(pattern, name))].append(name)
    return found


class Tour:
    """One service for all groups, with a job whose files nobody may touch."""

    def __init__(self, service: server.Service, around: Path) -> None:
        self.service = service
        self.around = around  # the storage root lies some folders below it
        self.layout = service.config.layout
        self.client = Client(service.url)
        self.jobs: set[str] = set()
        self.sent = 0
        self.client.call("PUT", "/incoming/good.zip", volume({"1.png": png(), "2.png": png(shade=9)}))
        self.bystander = self.finish(self.submit("good.zip"))
        assert self.bystander["status"] == "SUCCESS"
        self.good_pages = self.pages_of(self.bystander)
        self.worker = self.worker_pid()
        self.files_before = self.fixed_files()

    # -- talking
    def submit(self, path: str, kind: str = "zip", title: str = "hostile", **params: Any) -> str:
        body = {"title": title, "volume": "1", "input": {"type": kind, "path": path}}
        body["params"] = {"model": MODEL, "scale": SCALE, "outputFormat": "png", **params}
        reply = self.client.call("POST", "/jobs", body)
        assert reply.status == 202, (path, reply.body)
        job: str = reply.json()["jobId"]
        self.jobs.add(job)
        return job

    def finish(self, job: str) -> dict[str, Any]:
        """The job's state once it is over, checked for what every end must tell."""
        deadline_s = time.monotonic() + LIMIT_S
        while (state := self.client.call("GET", f"/jobs/{job}").json())["status"] in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline_s, state
            time.sleep(0.02)
        if state["status"] == "FAILED":
            assert state["lastError"] and state["errorCode"] and state["artifactPath"] is None, state
            assert self.client.call("GET", f"/jobs/{job}/artifact").status == 409
        assert str(self.around) not in json.dumps(state, ensure_ascii=False)
        return dict(state)

    def send(self, path: Path) -> str:
        """Upload an archive under a name of ours; its own may be what an upload refuses."""
        self.sent += 1
        place = f"{self.sent:03d}{path.suffix}"
        assert self.client.call("PUT", f"/incoming/{place}", path.read_bytes()).status == 201
        return place

    def report(self, state: dict[str, Any]) -> dict[str, Any]:
        report: dict[str, Any] = self.client.call("GET", f"/jobs/{state['jobId']}/report").json()["report"]
        return report

    def artifact(self, state: dict[str, Any]) -> dict[str, bytes]:
        """name -> bytes, in the zip's order; every hash and every name checked."""
        data = self.client.call("GET", f"/jobs/{state['jobId']}/artifact").body
        assert hashlib.sha256(data).hexdigest() == state["artifactHash"]
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None
            report = json.loads(archive.read("artifact-report.json"))
            files = {name: archive.read(name) for name in archive.namelist()[1:]}
            assert archive.namelist() == ["artifact-report.json", *(i["filename"] for i in report["items"])]
        assert len({name.casefold() for name in files}) == len(report["items"]) == state["processed"]
        for item in report["items"]:
            assert not re.search(r'(^|/)\.{0,2}(/|$)|[<>:"\\|?*\x00-\x1f\u202a-\u202e]', item["filename"])
            assert hashlib.sha256(files[item["filename"]]).hexdigest() == item["sha256"]
            assert bool(item["error"]) == (item["status"] == "carried"), item
        return files

    def pages_of(self, state: dict[str, Any]) -> list[str]:
        return [item["sha256"] for item in self.report(state)["items"]]

    # -- what must hold
    def worker_pid(self) -> int | None:
        slot = self.service.dispatcher.workers.get(0)
        return slot.process.pid if slot else None

    def fixed_files(self) -> dict[str, tuple[int, int, str]]:
        """What no hostile job has any business with: the bystander's files, and all outside the root."""
        found = {}
        root = self.layout.root
        for path in self.around.rglob("*"):
            inside = path.is_relative_to(root)
            if path.is_symlink() or not path.is_file():
                continue
            if not inside or self.bystander["jobId"] in str(path) or path.name == "good.zip":
                found[str(path)] = self._facts(path)
        return found

    @staticmethod
    def _facts(path: Path) -> tuple[int, int, str]:
        facts = path.stat()
        return stat.S_IMODE(facts.st_mode), facts.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()

    def untouched(self, evil: str, canary: str) -> None:
        """After a group: see the file's header."""
        assert self.client.call("GET", "/health").json()["status"] == "ok"
        assert self.worker_pid() == self.worker, "the worker died"
        assert self.fixed_files() == self.files_before
        assert not os.path.lexists(canary)
        places = [Path("/"), Path("/tmp"), Path.cwd(), Path.home()]
        assert [place for place in places if os.path.lexists(place / evil)] == []
        top = {path.name for path in self.layout.root.iterdir() if not path.name.startswith("jobs.sqlite3")}
        assert top <= {"incoming", "staging", "outputs", "artifacts", "models", "previews", "lock"}
        until(lambda: not any(self.layout.staging.iterdir()), 30)
        for path in self.layout.outputs.rglob("*"):
            mode = path.lstat().st_mode
            parts = path.relative_to(self.layout.outputs).parts
            assert stat.S_ISDIR(mode) if len(parts) <= 3 else not stat.S_ISLNK(mode), path
            assert len(parts) < 3 or parts[2] in self.jobs, path
            if stat.S_ISREG(mode):
                assert stat.S_IMODE(mode) & 0o7133 == 0, oct(mode)
        again = self.finish(self.submit("good.zip"))
        assert (again["status"], self.pages_of(again)) == ("SUCCESS", self.good_pages)

    # -- memory of the worker, where the system tells it
    def forget_peak(self) -> int:
        """Start measuring anew; the worker's memory now, in bytes."""
        Path(f"/proc/{self.worker}/clear_refs").write_text("5")
        return self.peak()

    def peak(self) -> int:
        text = Path(f"/proc/{self.worker}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", text)
        assert match
        return int(match[1]) << 10


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tour]:
    around = tmp_path_factory.mktemp("around")
    root = around / "a/b/c/storage"  # "../../.." of a slip stays below `around`, and is seen
    root.mkdir(parents=True)
    for folder in (around, *root.parents[:3]):
        (folder / "001.png").write_bytes(b"not yours")
    with server.Service(settings.Config(storage_root=root, port=0, worker_idle_s=3600)) as service:
        yield Tour(service, around)


@pytest.fixture
def after(hostile: Any, tour: Tour) -> Iterator[None]:
    yield
    tour.untouched(hostile.make.EVIL, hostile.make.CANARY)


def entries(hostile: Any, kind: str) -> dict[str, dict[str, Any]]:
    return {entry["file"].split("/", 1)[1]: entry for entry in hostile.index if entry["kind"] == kind}


def verdict_of(state: dict[str, Any]) -> str:
    """A job's end in the words of the index."""
    if state["status"] == "FAILED":
        return "reject"
    return "page-error" if state["failedPages"] else "ok"


def judge(tour: Tour, hostile: Any, entry: dict[str, Any], state: dict[str, Any]) -> str | None:
    """What is wrong with a job's end, by the index's words; None if nothing is."""
    verdict = verdict_of(state)
    if verdict not in {entry["expect"], *entry.get("accept", ())}:
        return f"{verdict}: {state['lastError'] or state['message']}"
    if verdict == "reject":
        return None
    files, items = tour.artifact(state), tour.report(state)["items"]
    good = [item for item in items if item["status"] == "upscaled"]
    counted = (len(good), len(items) - len(good))
    if verdict == entry["expect"] and counted != (entry.get("pages", counted[0]), entry.get("bad", 0)):
        return f"{counted[0]} pages upscaled, {counted[1]} carried"
    unnamed = [item for item in items if item["error"] and f": {item['error']}" not in str(state["message"])]
    if unnamed:
        return f"{unnamed} is not named in {state['message']!r}"
    return compare(tour, hostile, state["jobId"], files, items, entry.get("order"))


def compare(
    tour: Tour, hostile: Any, job: str, files: dict[str, bytes], items: list[Any], order: list[int] | None
) -> str | None:
    """What is wrong with the upscaled pages beside their sources (I13); None if nothing is."""
    numbers = []
    for n, item in enumerate(items, 1):
        if item["status"] == "carried":
            continue
        before = tour.client.call("GET", f"/jobs/{job}/pages/{n}/before").body
        source, result = decoded(before), decoded(files[item["filename"]])
        if hashlib.sha256(before).hexdigest() != item["source"]["sha256"]:
            return f"page {n} before is not its source"
        if result.shape[:2] != (source.shape[0] * SCALE, source.shape[1] * SCALE):
            return f"{item['filename']} is {result.shape}, its source {source.shape}"
        if source.shape[1] == 96:  # it carries its number
            numbers.append((hostile.make.read_number(source), hostile.make.read_number(result)))
    if any(one != other for one, other in numbers):
        return f"pages were swapped: {numbers}"
    return None if order in (None, [n for n, _ in numbers]) else f"in the order {numbers}"


def decoded(data: bytes) -> Any:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    return pixels


# ---------------------------------------------------------------- archives
@pytest.mark.parametrize("group", ARCHIVE_GROUPS)
def test_archives_end_as_their_index_says(hostile, tour, after, group):
    known = entries(hostile, "archive")
    light = [name for name, entry in known.items() if not entry.get("heavy")]  # test_inputs stages that one
    names = grouped(ARCHIVE_GROUPS, light)[group]
    assert names
    sent = {name: tour.submit(tour.send(hostile.root / "archives" / name)) for name in names}
    wrong = {name: judge(tour, hostile, known[name], tour.finish(job)) for name, job in sent.items()}
    assert {name: fault for name, fault in wrong.items() if fault} == {}


def test_bombs_of_all_kinds_cost_the_worker_no_memory(hostile, tour, after):
    """A02 and I02: the archives, and the images that claim to be huge."""
    require(os.path.exists("/proc/self/clear_refs"), "there is no /proc to read a peak from")
    before = tour.forget_peak()
    for name in entries(hostile, "archive"):
        if name.startswith("bomb_"):
            assert tour.finish(tour.submit(tour.send(hostile.root / "archives" / name)))["status"] == "FAILED"
    assert tour.peak() - before < 64 << 20
    names = ("png_60000.png", "png_900mpx.png", "jpg_65500.jpg")
    state = tour.finish(folder_job(tour, {n: hostile.root / "images" / f"bomb_{n}" for n in names}))
    assert (state["failedPages"], state["total"]) == (3, 4)
    assert tour.peak() - before < 100 << 20


def test_a_source_that_became_a_link_after_the_submit_is_refused(hostile, tmp_path):
    """A10, for the archive itself and for a folder on the way to it."""
    with waiting(tmp_path / "root") as (service, client, begin):
        incoming = service.config.layout.incoming
        for place in ("a.zip", "deep/b.zip"):
            client.call("PUT", f"/incoming/{place}", volume({"1.png": png()}))
        jobs = [client.submit(place) for place in ("a.zip", "deep/b.zip")]
        secret = tmp_path / "secret"
        secret.mkdir()
        for name in ("a.zip", "b.zip"):
            (secret / name).write_bytes(volume({"1.png": png(shade=50)}))
        (incoming / "a.zip").unlink()
        (incoming / "a.zip").symlink_to(secret / "a.zip")
        shutil.rmtree(incoming / "deep")
        (incoming / "deep").symlink_to(secret)
        begin()
        for job in jobs:
            until(lambda job=job: client.state(job).is_over, 120)
            assert "link" in (client.state(job).last_error or "")
        assert not any(path.is_file() for path in service.config.layout.outputs.rglob("*"))


def test_a_page_that_grows_while_it_is_staged_is_reported_as_it_was_read(tour, after):
    """A11: whatever was read, its hash is what the report states."""
    place = tour.layout.incoming / "growing"
    place.mkdir()
    for n in range(60):
        (place / f"{n}.png").write_bytes(png(16, 16, n))
    stop = threading.Event()

    def grow() -> None:
        while not stop.is_set():
            for path in place.iterdir():
                with path.open("ab") as file:
                    file.write(bytes(64))  # behind IEND: the picture stays

    grower = threading.Thread(target=grow)
    grower.start()
    try:
        state = tour.finish(tour.submit("growing", "folder"))
    finally:
        stop.set()
        grower.join()
    assert state["status"] == "SUCCESS"
    for item in tour.report(state)["items"]:
        source = item["source"]
        read = (place / source["filename"]).read_bytes()[: source["bytes"]]
        assert hashlib.sha256(read).hexdigest() == source["sha256"]
    shutil.rmtree(place)


def test_outputs_never_go_through_a_link(tour, after, tmp_path):
    """A13, at the title and at the volume."""
    (tour.layout.outputs / "linked").symlink_to(tmp_path)
    (tour.layout.outputs / "half").mkdir()
    (tour.layout.outputs / "half/1").symlink_to(tmp_path)
    try:
        for title in ("linked", "half"):
            state = tour.finish(tour.submit("good.zip", title=title))
            assert (state["status"], state["errorCode"]) == ("FAILED", "NAME_TAKEN")
    finally:
        (tour.layout.outputs / "linked").unlink()
        shutil.rmtree(tour.layout.outputs / "half")
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def waiting(root: Path) -> Iterator[tuple[server.Service, Client, Callable[[], None]]]:
    """A service that takes jobs, and starts to work when the third value is called."""
    service = server.Service(settings.Config(storage_root=root, port=0))
    service.live.start()
    service.http.start()
    try:
        yield service, Client(service.url), service.dispatcher.start
    finally:
        service.__exit__()


# ---------------------------------------------------------------- folders
def test_folders_end_as_their_index_says(hostile, tour, after):
    """A08, A12: natural order; links, loops, pipes are neither followed nor waited for."""
    known, sent = entries(hostile, "folder"), {}
    for name in known:
        place = tour.layout.incoming / f"folder-{name}"
        subprocess.run(["cp", "-a", hostile.root / "folders" / name, place], check=True)
        sent[name] = tour.submit(place.name, "folder")
    wrong = {name: judge(tour, hostile, known[name], tour.finish(job)) for name, job in sent.items()}
    assert {name: fault for name, fault in wrong.items() if fault} == {}


def test_pipes_sockets_and_huge_files_are_no_input(tour, after, tmp_path, monkeypatch):
    """A12 for the input itself and inside a folder; the sparse file of 8 GiB."""
    incoming = tour.layout.incoming
    os.mkfifo(incoming / "pipe.zip")
    (incoming / "odd").mkdir()
    (incoming / "odd/1.png").write_bytes(png())
    (incoming / "odd/2.png").touch()
    os.truncate(incoming / "odd/2.png", 8 << 30)
    monkeypatch.chdir(incoming / "odd")  # the address of a socket has 108 bytes
    with socket.socket(socket.AF_UNIX) as line:
        line.bind("3.png")
        body = {"title": "t", "volume": "1", "input": {"type": "zip", "path": "pipe.zip"}}
        assert tour.client.call("POST", "/jobs", body).status == 422
        state = tour.finish(tour.submit("odd", "folder"))
    assert (state["status"], state["total"], state["failedPages"]) == ("SUCCESS", 3, 2)
    errors = [item["error"] for item in tour.report(state)["items"]]
    assert "536870912" in errors[1] and errors[2]
    shutil.rmtree(incoming / "odd")
    (incoming / "pipe.zip").unlink()


# ---------------------------------------------------------------- images
def folder_job(tour: Tour, files: dict[str, Path], **params: Any) -> str:
    """A job over these files and one good page, which comes first."""
    tour.sent += 1
    place = tour.layout.incoming / f"images-{tour.sent}"
    place.mkdir()
    (place / "0 good.png").write_bytes(png())
    for name, path in files.items():
        shutil.copyfile(path, place / name)
    return tour.submit(place.name, "folder", **params)


def images_of(tour: Tour, hostile: Any, names: Iterable[str], **params: Any) -> dict[str, Any]:
    """source name -> the upscaled pixels, or the reason that the page was carried."""
    known = entries(hostile, "image")
    files = {name: hostile.root / known[name]["file"] for name in names}
    state = tour.finish(folder_job(tour, files, **params))
    assert state["status"] == "SUCCESS", state
    outputs, found = tour.artifact(state), {}
    for item in tour.report(state)["items"]:
        name, data = item["source"]["filename"], outputs[item["filename"]]
        if item["status"] == "upscaled":
            found[name] = decoded(data)
            assert b"Exif" not in data and b"eXIf" not in data, name
        else:
            found[name] = item["error"]
            assert data == files[name].read_bytes(), name  # carried as it came
    return found


@pytest.mark.parametrize("group", IMAGE_GROUPS)
def test_images_end_as_their_index_says(hostile, tour, after, group):
    known = entries(hostile, "image")
    names = grouped(IMAGE_GROUPS, known)[group]
    assert names
    found, wrong = images_of(tour, hostile, names), {}
    for name in names:
        entry, result = known[name], found.get(name)
        verdict = "reject" if result is None else "page-error" if isinstance(result, str) else "ok"
        if verdict not in {entry["expect"], *entry.get("accept", ())}:
            wrong[name] = verdict
        elif verdict == "ok" and "size" in entry:
            size = [result.shape[1] // SCALE, result.shape[0] // SCALE]
            if size != entry["size"] or any(side % SCALE for side in result.shape[:2]):
                wrong[name] = size
    assert wrong == {} and not isinstance(found["0 good.png"], str)


def test_depth_alpha_and_colour_survive_the_way_through(hostile, tour, after):
    """I05, I06, I07, as JPEG: nothing black, nothing negated, grey stays grey."""
    names = (
        "ok_grey8.png ok_grey16.png ok_rgb8.png ok_rgb16.png ok_rgba.png ok_rgba16.png "
        "ok_all_transparent.png ok_cmyk.jpg ok_rgb.jpg"
    ).split()
    found = images_of(tour, hostile, names, outputFormat="jpg")
    twins = [
        ("ok_grey16.png", "ok_grey8.png", 1.0),
        ("ok_rgb16.png", "ok_rgb8.png", 1.0),
        ("ok_rgba16.png", "ok_rgba.png", 1.0),
        ("ok_cmyk.jpg", "ok_rgb.jpg", 4.0),  # another colour space, not another picture
    ]
    for one, other, apart in twins:
        # Over all channels: the index draws its 16-bit pages with red and blue the other way round.
        assert abs(found[one].mean() - found[other].mean()) <= apart, one
    assert found["ok_all_transparent.png"].min() > 250
    assert found["ok_grey8.png"].ndim == 2 and found["ok_rgb8.png"].ndim == 3


def test_a_page_over_a_formats_sides_is_written_in_another(hostile, tour, after):
    """I09: WebP ends at 16,383 pixels, and no file of 0 bytes appears."""
    found = images_of(tour, hostile, ["size_5000x16.png", "size_16384x8.png"], outputFormat="webp", scale=4)
    assert {name: found[name].shape[:2] for name in found if name.startswith("size_")} == {
        "size_5000x16.png": (64, 20_000),
        "size_16384x8.png": (32, 65_536),
    }
