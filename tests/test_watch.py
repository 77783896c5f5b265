"""Uploads that become jobs by themselves: which, when, and how often."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import require
from serving import png, queued, still, until, volume

import jobs
import server
import settings
import storage
from files import inputs
from messages import Limits, Params
from work import submissions, uploads, watch

STILL_S = 30.0


class Watched:
    """A service whose incoming/ a test looks at by hand, with a clock of its own."""

    def __init__(self, service: server.Service) -> None:
        self.service = service
        self.incoming = service.config.layout.incoming
        self.now_s = 1000.0
        self.woken = 0
        self.restart()

    def restart(self) -> None:
        """As after a restart: nothing is known but what lies on disk."""
        table, config = self.service.table, self.service.config
        self.watch = watch.Watch(
            table, config.layout, config.limits, STILL_S, Params(model="realesr-animevideov3"), None,
            self._wake, lambda: self.now_s,
        )  # fmt: skip

    def _wake(self) -> None:
        self.woken += 1

    def put(self, path: str, data: bytes) -> Path:
        place = self.incoming / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        return place

    def look(self, after_s: float = STILL_S) -> list[str]:
        """Look, let time pass, look again; input paths of all jobs there are then."""
        self.watch.look()
        self.now_s += after_s
        self.watch.look()
        found = self.service.table.page_of_jobs(None, "", 100, None)
        return [job.input_path for job in reversed(found)]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with still(tmp_path) as service:
        yield Watched(service)


def test_an_upload_that_lay_still_becomes_a_job_once(watched):
    watched.put("作品名/03.cbz", volume({"1.png": png()}))
    assert watched.look(STILL_S - 1) == []
    assert watched.look(1) == ["作品名/03.cbz"]
    job = watched.service.table.in_state(jobs.PENDING)[0]
    assert (job.title, job.volume, job.input_type) == ("作品名", "03", "zip")
    assert job.params.model == "realesr-animevideov3"
    assert watched.woken == 1
    assert len(watched.look()) == 1


def test_an_upload_that_grows_waits_until_it_rests(watched):
    data = volume({"1.png": png()})
    for size in (len(data) // 3, len(data) // 2):
        watched.put("t/1.zip", data[:size])
        assert watched.look(STILL_S - 1) == []
    watched.put("t/1.zip", data)
    assert watched.look(STILL_S - 1) == []
    assert watched.look() == ["t/1.zip"]


def test_an_upload_is_found_by_its_path_as_a_look_at_all_finds_it(watched):
    for name in ("T/1.zip", "T/ch1/1.png", "T/ch1/more/2.png", "T/ch1/bonus.cbz", "U v1/1.png"):
        watched.put(name, png())
    found = list(uploads.find_uploads(watched.incoming, Limits()))
    assert [one.path for one in found] == ["T/1.zip", "T/ch1/bonus.cbz", "T/ch1", "U v1"]
    assert [uploads.find_upload(watched.incoming, one.path, Limits()) for one in found] == found
    for other in ("T", "T/ch1/1.png", "nothing/there.zip"):
        assert uploads.find_upload(watched.incoming, other, Limits()) is None


def test_a_folder_is_one_volume_with_all_below_it(watched):
    for name in ("Title v02/001.png", "Title v02/extra/002.png", "D/Vol 1/ch1/1.png", "D/Vol 1/ch2/1.png"):
        watched.put(name, png())
    watched.put("Title v02/more/bonus.zip", volume({"1.png": png()}))
    watched.put("loose.png", png())
    found = watched.look()
    assert sorted(found) == ["D/Vol 1/ch1", "D/Vol 1/ch2", "Title v02", "Title v02/more/bonus.zip"]
    titles = {job.input_path: (job.title, job.volume) for job in watched.service.table.in_state(jobs.PENDING)}
    assert titles["Title v02"] == ("Title", "02")
    assert titles["D/Vol 1/ch2"] == ("D", "Vol 1 ch2")


@pytest.mark.parametrize(
    "partial",
    [
        *("x/2.png.PARTIAL", "x/.2.png.PARTIAL", "x/2.png.PARTIAL-1732500000.123456-ab3de"),
        *("x/sub/2.png.part", "x/2.tmp"),
    ],
)
def test_a_folder_with_an_unfinished_file_waits_and_says_so_once(watched, caplog, partial):
    watched.put("x/1.png", png())
    rest = watched.put(partial, png()[:40])
    assert watched.look() == [] and watched.look() == []
    assert caplog.text.count("still being received") == 1
    rest.rename(rest.with_name("2.png"))
    assert watched.look() == ["x"]


def test_an_archive_whose_parts_still_arrive_beside_it_waits(watched):
    """Copyparty may reserve the name first, and fill the .PARTIAL."""
    watched.put("t/1.zip", b"")
    rest = watched.put("t/1.zip.PARTIAL", volume({"1.png": png()}))
    watched.put("t/10.zip", volume({"1.png": png()}))
    assert watched.look() == ["t/10.zip"]
    rest.replace(rest.with_name("1.zip"))
    assert watched.look() == ["t/10.zip", "t/1.zip"]


def test_what_tools_keep_for_themselves_is_no_upload(watched):
    for name in (".hist/th/aa/cc.jpg", ".hist/up2k.zip", "__MACOSX/t/1.png", "t/.thumbs/1.png", "t/._1.zip"):
        watched.put(name, png())
    if sys.platform != "win32":
        elsewhere = watched.service.config.layout.root / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "1.png").write_bytes(png())
        (watched.incoming / "linked").symlink_to(elsewhere, target_is_directory=True)
    assert watched.look() == []


def test_a_restart_submits_nothing_again_even_what_was_deleted_since(watched):
    watched.put("t/1.zip", volume({"1.png": png()}))
    watched.put("u/1.png", png())
    assert len(watched.look()) == 2
    for job in watched.service.table.in_state(jobs.PENDING):
        watched.service.table.delete(job)
    watched.restart()
    assert watched.look() == []


def test_a_lost_memory_costs_no_second_job(watched):
    watched.put("t/1.zip", volume({"1.png": png()}))
    watched.look()
    watched.watch.memory.path.write_bytes(b'{"uploads": [')
    watched.restart()
    assert watched.look() == ["t/1.zip"]
    assert json.loads(watched.watch.memory.path.read_bytes())["uploads"].keys() == {"t/1.zip"}


def test_sent_again_it_is_a_job_only_with_other_content(watched):
    first, second = volume({"1.png": png()}), volume({"1.png": png(shade=9)})
    watched.put("t/1.zip", first)
    assert len(watched.look()) == 1
    os.utime(watched.put("t/1.zip", first), (1, 1))
    assert len(watched.look()) == 1
    watched.put("t/1.zip", second)
    assert watched.look() == ["t/1.zip", "t/1.zip"]
    watched.put("t/1.zip", second)
    watched.restart()
    assert len(watched.look()) == 2


def test_what_its_sender_submitted_is_left_to_its_sender(watched):
    queued(watched.service)  # one.zip, as a client does: uploaded, then submitted
    assert watched.look() == ["one.zip"]
    watched.put("one.zip", volume({"1.png": png(shade=3)}))
    assert watched.look() == ["one.zip", "one.zip"]


def test_a_submitted_folder_covers_what_lies_below_it(watched):
    watched.put("T/ch1/1.png", png())
    wanted = submissions.Submission("T", "1", "folder", "T", Params(), None)
    submissions.submit(watched.service.table, watched.service.config.layout, wanted, None, "", Limits())
    assert watched.look() == ["T"]


def test_a_folder_that_is_moved_in_is_new_however_old_its_files_are(watched):
    require(sys.platform != "win32", "there a folder's move leaves no trace")
    right = watched.incoming.parent / "right"
    right.mkdir()
    (right / "1.png").write_bytes(png(shade=7))
    time.sleep(0.05)
    watched.put("T/01/1.png", png())
    assert watched.look() == ["T/01"]
    shutil.rmtree(watched.incoming / "T/01")
    time.sleep(0.05)
    right.rename(watched.incoming / "T/01")
    assert watched.look() == ["T/01", "T/01"]


def test_what_the_submit_command_sends_is_left_to_it(watched):
    """It foretells what the volume will take first, which may last longer than an upload must lie still."""
    data = volume({"1.png": png()})
    watched.put(f"v{storage.sent_ending(hashlib.sha256(data).hexdigest())}", data)
    watched.put(f"v{storage.sent_ending('0' * 64)}", data)  # by its name alone
    assert watched.look() == [f"v{storage.sent_ending('0' * 64)}"]


def test_one_upload_that_nobody_can_look_at_keeps_no_other_waiting(watched, monkeypatch, caplog):
    watched.put("a.zip", volume({"1.png": png()}))
    watched.put("b.zip", volume({"1.png": png(shade=1)}))
    listed = inputs.list_input

    def stumbling(place: Path, *of: Any) -> Any:
        if place.name == "a.zip":
            raise ValueError("nobody foresaw this (injected)")
        return listed(place, *of)

    with monkeypatch.context() as broken:
        broken.setattr(inputs, "list_input", stumbling)
        assert watched.look() == ["b.zip"]
        assert "looking at 'a.zip' stumbled" in caplog.text
    assert watched.look(watch.LONGEST_WAIT_S) == ["b.zip", "a.zip"]


def test_a_refused_upload_is_told_once_and_tried_again_when_it_changes(watched, caplog):
    data = volume({"1.png": png()})
    watched.put("t/1.zip", data[:-30])  # as a broken-off PUT leaves it under its name
    assert [watched.look() for _ in range(3)] == [[], [], []]
    watched.restart()
    assert watched.look() == []
    assert caplog.text.count("t/1.zip' is not submitted: 1.zip is not a readable zip archive") == 1
    watched.put("t/1.zip", data)
    assert watched.look() == ["t/1.zip"]


def test_what_could_not_be_read_here_is_tried_again_once_that_changed_or_it_is_sent_again(watched, caplog):
    data = volume({f"{n}.png": png(shade=n) for n in range(3)})
    watched.watch.limits = Limits(pages=2)
    watched.put("t/1.zip", data)
    assert watched.look() == [] and "the limit is 2" in caplog.text
    watched.watch.limits = watched.service.config.limits
    assert watched.look() == []  # nobody knows of it
    watched.put("t/1.zip", data)  # the same once more
    assert watched.look() == ["t/1.zip"]
    watched.watch.limits = Limits(pages=2)
    watched.put("u/1.zip", volume({f"{n}.png": png(shade=n) for n in range(3, 6)}))
    assert watched.look() == ["t/1.zip"]
    watched.watch.means = "another program"
    watched.watch.limits = watched.service.config.limits
    assert watched.look() == ["t/1.zip", "u/1.zip"]


def test_an_upload_that_was_tried_for_months_is_still_tried_hourly(watched, monkeypatch):
    watched.put("t/1.zip", volume({"1.png": png()}))
    with monkeypatch.context() as patch:
        patch.setattr(uploads, "content_of", lambda *_: (_ for _ in ()).throw(PermissionError()))
        watched.look()
        watched.watch.waiting["t/1.zip"].tries = 5000
        assert watched.look(watch.LONGEST_WAIT_S) == []
    assert watched.look(watch.LONGEST_WAIT_S) == ["t/1.zip"]


def test_a_full_disk_is_waited_for_and_told_once(watched, caplog, monkeypatch):
    watched.put("t/1.zip", volume({"1.png": png()}))
    watched.watch.reserve_bytes = 1 << 60
    # As beside any other program, there are never twice as many.
    free = itertools.count(1 << 40, 4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    asked: list[int] = []
    watched.watch.make_room = lambda: asked.append(1)
    assert [watched.look() for _ in range(4)] == [[]] * 4
    assert caplog.text.count("can't be submitted now") == 1
    assert asked  # for room that something else may give up
    watched.watch.reserve_bytes = None
    assert watched.look(watch.LONGEST_WAIT_S) == ["t/1.zip"]


def test_what_changes_while_it_is_read_waits_again(watched, monkeypatch):
    place = watched.put("t/1.zip", volume({"1.png": png()}))
    real = uploads.content_of

    def slow(*arguments: Any) -> str:
        content = real(*arguments)
        place.write_bytes(volume({"1.png": png(), "2.png": png(shade=1)}))
        return content

    with monkeypatch.context() as patched:
        patched.setattr(uploads, "content_of", slow)
        assert watched.look() == []
    assert watched.look() == ["t/1.zip"]


def test_an_upload_whose_reader_was_killed_is_tried_again(watched, monkeypatch, caplog):
    watched.put("t/1.zip", volume({"1.png": png()}))

    def kill(*_: Any) -> Any:
        raise storage.InputUnread("1.zip can't be read: its reader ended early")

    with monkeypatch.context() as patched:
        patched.setattr(inputs, "list_input", kill)
        assert watched.look() == [] and "its reader ended early; it is tried again later" in caplog.text
    assert watched.look(watch.LONGEST_WAIT_S) == ["t/1.zip"]
    watched.put("t/2.zip", volume({"1.png": png(shade=1)}))
    monkeypatch.setattr(inputs, "list_input", kill)
    for _ in range(watch.UNREAD_TRIES + 2):
        watched.look(watch.LONGEST_WAIT_S)
    assert "t/2.zip' is not submitted" in caplog.text and not watched.watch.waiting


def test_what_goes_on_arriving_while_it_is_read_waits_again(watched, monkeypatch):
    watched.put("t v1/1.png", png())
    real = uploads.content_of

    def slow(*arguments: Any) -> str:
        content = real(*arguments)
        watched.put("t v1/2.png.PARTIAL", b"\x89PNG")
        return content

    with monkeypatch.context() as patched:
        patched.setattr(uploads, "content_of", slow)
        assert watched.look() == []
    assert watched.look() == []
    (watched.incoming / "t v1/2.png.PARTIAL").rename(watched.incoming / "t v1/2.png")
    assert watched.look() == ["t v1"]


def test_names_that_no_job_can_have_are_refused_not_stumbled_over(watched, caplog):
    require(sys.platform == "linux", "names of any bytes are Linux'")
    os.makedirs(os.fsencode(watched.incoming) + b"/\xff\xfe")
    (watched.incoming / os.fsdecode(b"\xff\xfe") / "1.png").write_bytes(png())
    (watched.incoming / "a\nb.zip").write_bytes(volume({"1.png": png()}))
    assert watched.look() == []
    assert caplog.text.count("is not submitted") == 2


def test_the_thread_has_a_name_and_ends_with_the_service(tmp_path):
    """And it is off unless asked for. The worker never starts: nothing can become a job's page."""

    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    with still(tmp_path / "off") as service:
        assert service.watch is None
    with still(tmp_path / "on", watch_s=1) as service:
        (service.config.layout.incoming / "t.zip").write_bytes(volume({"1.png": png()}))
        service.watch.still_s = 0.2
        service.watch.start()
        assert "watch" in names()
        until(lambda: service.table.counts()[jobs.PENDING] == 1)
    assert "watch" not in names()


def test_settings_are_checked_at_the_start(tmp_path):
    flags = server.parse_flags(["--storage-root", str(tmp_path), "--port", "0"])

    def config(**environ: str) -> settings.Config:
        return settings.read_config({f"REICHAN_{name}": text for name, text in environ.items()}, flags)

    assert config().watch_s is None
    good = config(WATCH_S="30", WATCH_PARAMS='{"scale": 3, "model": "auto"}')
    with still(tmp_path, watch_s=good.watch_s, watch_params=good.watch_params) as service:
        params = service.watch.params
        assert (service.watch.still_s, params.scale, params.model) == (30, 3, "auto")
    for bad in ({"WATCH_S": "soon"}, {"WATCH_S": "-1"}, {"WATCH_PARAMS": "[1]"}, {"WATCH_PARAMS": "{"}):
        with pytest.raises(settings.ConfigError):
            config(**bad)
    with pytest.raises(settings.ConfigError, match=r"params\.scale"):
        server.Service(config(WATCH_S="30", WATCH_PARAMS='{"scale": 9}'))
