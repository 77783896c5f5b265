"""The client in a terminal against a service on loopback. Here nobody works: jobs are moved by the
test. A real volume from end to end: test_commands.py."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import require
from serving import PLAN, finished, png, queued, running, still, until, volume

import jobs
import messages
import server
import settings
from commands import submit
from web import wire
from work import predict

ROOT = Path(server.__file__).parent
ARTIFACT = random.Random(7).randbytes(3 << 20)


@pytest.fixture
def service(tmp_path):
    with still(tmp_path / "root") as service:
        yield service


# Run from a shell's background, SIGINT is ignored and children inherit that.
HEEDING_CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import server
sys.exit(server.main())
"""


def start(service, *arguments):
    """The command in a process of its own."""
    command = [sys.executable, "-c", HEEDING_CTRL_C, "submit", *map(str, arguments), "--url", service.url]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONUTF8": "1"}, **pipes)


@contextlib.contextmanager
def started(service, *arguments):
    """start(), and an end for it even where the test fails."""
    with start(service, *arguments) as process:
        try:
            yield process
        finally:
            process.kill()


def run(service, *arguments, **environ):
    """The command in this process: (exit status, stdout, stderr)."""
    url = service if isinstance(service, str) else service.url
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = submit.main([*map(str, arguments), "--url", url], environ)
    return status, out.getvalue(), err.getvalue()


def sole_job(service):
    (job,) = service.table.page_of_jobs(None, "", 10, None)
    return job


class Cutter:
    """A proxy that ends artifacts after so many bytes, and as many uploads as it is told amid
    their bytes; it notes the heads of requests."""

    def __init__(self, port: int, cuts: list[int], uploads: int) -> None:
        self.port, self.cuts, self.uploads = port, cuts, uploads
        self.heads: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._serve(self.listener.accept()[0])

    def _serve(self, line: socket.socket) -> None:
        with line, socket.create_connection(("127.0.0.1", self.port)) as behind:
            head, gap, body = line.recv(65536).partition(b"\r\n\r\n")
            self.heads.append(head.decode())
            behind.sendall(head + b"\r\nConnection: close" + gap + body)
            found = re.search(rb"Content-Length: (\d+)", head)
            left = int(found[1]) - len(body) if found else 0
            if head.startswith(b"PUT") and self.uploads:
                self.uploads -= 1
                behind.sendall(line.recv(left // 2))
                return
            while left and (piece := line.recv(min(left, 65536))):
                behind.sendall(piece)
                left -= len(piece)
            left = self.cuts.pop(0) if self.cuts and b"GET" in head and b"/artifact" in head else 1 << 40
            while left and (piece := behind.recv(min(left, 65536))):
                line.sendall(piece)
                left -= len(piece)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


@contextlib.contextmanager
def cutting(service, *cuts: int, uploads: int = 0) -> Iterator[Cutter]:
    cutter = Cutter(service.http.server_port, list(cuts), uploads)
    try:
        yield cutter
    finally:
        cutter.close()


# ---------------------------------------------------------------- submitting
def test_a_folder_is_uploaded_as_one_zip_and_submitted(service, tmp_path):
    folder = tmp_path / "よつばと 第03巻"
    (folder / "ch1").mkdir(parents=True)
    pages = {"1.png": png(), "ch1/2.png": png(shade=9)}
    for name, data in pages.items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("no page")
    (folder / ".hidden.png").write_bytes(b"no page")
    status, out, _ = run(service, folder, "--scale", "3", "--format", "png", "--param", "color=keep")
    job = sole_job(service)
    assert (status, out.split()[:2]) == (0, ["job", job.id])
    assert (job.title, job.volume) == ("よつばと", "03")
    assert (job.params.scale, job.params.output_format, job.params.color) == (3, "png", "keep")
    with zipfile.ZipFile(service.config.layout.incoming / job.input_path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == pages


def test_a_folder_of_which_a_part_can_not_be_read_is_refused_not_shortened(tmp_path, monkeypatch):
    for name in ("1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    scandir, look = os.scandir, Path.stat

    def locked(place):
        if str(place).endswith("b"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", locked)
        with pytest.raises(submit.Failure, match=r"the folder .*b can't be read: Permission denied"):
            submit.Input.of(tmp_path)

    def hidden(path, **rest):
        if path.name == "2.png":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, **rest)

    monkeypatch.setattr(Path, "stat", hidden)
    with pytest.raises(PermissionError):
        submit.Input.of(tmp_path)
    monkeypatch.undo()
    (tmp_path / "b").rename(tmp_path / ".b")  # as a disk's own .Trashes
    (tmp_path / "loop.png").symlink_to("loop.png")
    monkeypatch.setattr(os, "scandir", locked)
    assert [name for name, _ in submit.Input.of(tmp_path).files or ()] == ["1.png"]


@pytest.mark.parametrize("flag", ["--container=cbz", "--param=container=cbz"])
def test_for_a_cbz_a_folder_s_other_files_go_along_and_it_is_downloaded_as_one(service, tmp_path, flag):
    files = {"1.png": png(), "ComicInfo.xml": b"<ComicInfo/>", "ch1/notes.txt": b"notes"}
    for name, data in files.items():
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / name).write_bytes(data)
    (tmp_path / "v" / ".DS_Store").write_bytes(b"left behind")
    assert run(service, tmp_path / "v", flag)[0] == 0
    job = sole_job(service)
    assert job.params.container == "cbz"
    with zipfile.ZipFile(service.config.layout.incoming / job.input_path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files
    assert service.table.delete(job)
    made = finished(service, ARTIFACT, "cbz")
    assert run(service, "--job", made.id, "--download", tmp_path)[0] == 0
    assert (tmp_path / "t 1.cbz").read_bytes() == ARTIFACT


def test_volumes_in_a_folder_are_uploaded_at_once_and_each_is_a_job(service, tmp_path):
    files = {"S v1.cbz": volume({"1.png": png()}), "S v2/1.png": png(), "about.txt": b"no volume"}
    for name, data in files.items():
        (tmp_path / "S" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "S" / name).write_bytes(data)
    status, out, _ = run(service, tmp_path / "S", "--split", "volumes")
    jobs_there = service.table.page_of_jobs(None, "", 10, None)[::-1]
    assert [(job.title, job.volume) for job in jobs_there] == [("S", "1"), ("S", "2")]
    ids = [job.id for job in jobs_there]
    assert status == 0 and [line.split()[-1] for line in out.splitlines()[:2]] == ids
    assert all(f"--job {one} " in out for one in ids)
    assert run(service, tmp_path / "S", "--split", "volumes")[1] == out
    (place,) = {job.input_path.partition("/")[0] for job in jobs_there}
    with zipfile.ZipFile(service.config.layout.incoming / place) as archive:
        assert set(archive.namelist()) == {"S v1.cbz", "S v2/1.png"}


def test_of_several_volumes_each_is_followed_and_the_worst_is_the_exit_status(service, tmp_path):
    done = finished(service, ARTIFACT)
    lost = jobs.advance(service.table, running(service), "fail", 2000.0, last_error="no room")
    given = submit.parser().parse_args(["--job", "-", "--download", str(tmp_path)])
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = submit.follow(submit.Service(service.url, None), [lost.id, done.id], given, submit.Line())
    assert (status, (tmp_path / "t 1.zip").read_bytes()) == (submit.JOB_FAILED, ARTIFACT)
    assert "no room" in told.getvalue() and f"--job {lost.id}" in told.getvalue()


def test_the_same_command_again_finds_its_job_and_uploads_nothing(service, tmp_path):
    (tmp_path / "v.cbz").write_bytes(volume({"1.png": png()}))
    first, again = (run(service, tmp_path / "v.cbz")[1].split()[1] for _ in range(2))
    assert first == again == sole_job(service).id
    uploaded = service.dispatcher.metrics.uploaded.family().samples[0][2]
    assert uploaded == (tmp_path / "v.cbz").stat().st_size
    other = run(service, tmp_path / "v.cbz", "--again")[1].split()[1]
    assert other != first
    assert service.dispatcher.metrics.uploaded.family().samples[0][2] == uploaded


def test_a_job_that_was_cancelled_goes_on_by_the_same_command(service, tmp_path):
    (tmp_path / "v.zip").write_bytes(volume({"1.png": png()}))
    job = run(service, tmp_path / "v.zip")[1].split()[1]
    jobs.cancel(service.table, job, 1.0)
    (service.config.layout.incoming / service.table.get(job).input_path).unlink()  # to be sent again
    assert run(service, tmp_path / "v.zip")[0] == 0
    assert (service.table.get(job).state, service.table.get(job).retries) == ("PENDING", 1)


def ended(service, job_id: str, **facts: object) -> jobs.Job:
    """The waiting job, over; its artifact was never on disk."""
    job = jobs.claim(service.table, 1000.0)
    assert job.id == job_id and service.table.change(job, state=jobs.RUNNING, plan=PLAN, total=1)
    made = {"artifact_hash": "0" * 64, "artifact_bytes": 1, "processed": 1}
    return jobs.advance(service.table, service.table.get(job_id), "finish", 2000.0, **made, **facts)


def test_a_volume_whose_artifact_was_removed_by_age_is_made_again_by_the_same_command(service, tmp_path):
    (tmp_path / "v.zip").write_bytes(volume({"1.png": png()}))
    made = [run(service, tmp_path / "v.zip")[1].split()[1]]
    for _ in range(2):
        job = ended(service, made[-1])
        assert run(service, tmp_path / "v.zip")[1].split()[1] == job.id  # its artifact is there
        assert service.table.change(job, artifact_removed_s=3000.0)
        (service.config.layout.incoming / job.input_path).unlink()  # to be sent again
        fresh, again = (run(service, tmp_path / "v.zip")[1].split()[1] for _ in range(2))
        assert fresh == again and fresh not in made
        assert service.table.get(fresh).state == jobs.PENDING
        made.append(fresh)


def test_a_priority_is_given_to_the_same_job_whether_it_was_there_or_not(service, tmp_path):
    (tmp_path / "v.zip").write_bytes(volume({"1.png": png()}))
    job = run(service, tmp_path / "v.zip", "--priority", "7")[1].split()[1]
    assert sole_job(service).priority == 7
    service.table.pause(True)
    status, _, err = run(service, tmp_path / "v.zip", "--priority", "-2")
    assert status == 0 and "the queue is paused" in err
    assert (sole_job(service).id, sole_job(service).priority) == (job, -2)
    run(service, "--job", job, "--priority", "3")
    assert sole_job(service).priority == 3


def test_a_folder_s_zip_has_the_same_bytes_at_every_reading_and_is_never_held(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(os.urandom(3 << 20))
    source = submit.Input.of(tmp_path)
    one, two = (hashlib.sha256(b"".join(source.pieces())).hexdigest() for _ in range(2))
    assert one == two
    assert max(map(len, source.pieces())) <= submit.PIECE_BYTES


def test_names_in_an_old_code_page_become_text(service, tmp_path):
    require(sys.platform == "linux", "other systems take no such names")

    def old(name: str) -> str:
        return os.fsdecode(name.encode("cp932"))

    folder = tmp_path / old("よつばと 第03巻")
    (folder / old("第1話")).mkdir(parents=True)
    (folder / old("第1話") / old("ページ.png")).write_bytes(png())
    for flags in ([], ["--title", old("よつばと"), "--volume", old("上")]):
        assert run(service, folder, *flags)[0] == 0
        job = sole_job(service)
        assert (job.title, job.volume) == ("よつばと", "上" if flags else "03")
        with zipfile.ZipFile(service.config.layout.incoming / job.input_path) as archive:
            assert archive.namelist() == ["第1話/ページ.png"]
        assert service.table.delete(jobs.cancel(service.table, job.id, 1.0))
    (tmp_path / old("よつばと 第04巻.cbz")).write_bytes(volume({"1.png": png()}))
    assert run(service, tmp_path / old("よつばと 第04巻.cbz"))[0] == 0
    assert (sole_job(service).title, sole_job(service).volume) == ("よつばと", "04")


@pytest.mark.parametrize(
    ("name", "title", "number"),
    [("Yotsuba v03.cbz", "Yotsuba", "03"), ("One_Piece_vol.12.zip", "One_Piece", "12"),
     ("よつばと 第03巻", "よつばと", "03"), ("20th Century 07.zip", "20th Century", "07"),
     ("Yotsuba v03.5.cbz", "Yotsuba", "03.5"), ("よつばと 第3.5巻", "よつばと", "3.5"),
     ("Akira", "Akira", "01"), ("12", "12", "01"), ("Agent 12345", "Agent 12345", "01")],
)  # fmt: skip
def test_title_and_volume_come_from_the_name(name, title, number):
    assert submit.title_and_volume(name) == (title, number)


def test_an_upload_that_breaks_off_is_sent_again(service, tmp_path):
    (tmp_path / "v.zip").write_bytes(volume({"1.png": os.urandom(2 << 20)}))
    with cutting(service, uploads=2) as cutter:
        assert run(cutter.url, tmp_path / "v.zip")[0] == 0
    assert sum(head.startswith("PUT") for head in cutter.heads) == 3
    stored = service.config.layout.incoming / sole_job(service).input_path
    assert stored.read_bytes() == (tmp_path / "v.zip").read_bytes()


def test_an_upload_that_breaks_off_late_is_sent_again_too(monkeypatch):
    """Patience begins with what it is for, not with the upload."""
    minutes = iter(range(1000))
    clock = SimpleNamespace(monotonic=lambda: 60.0 * next(minutes), sleep=lambda _: None)
    monkeypatch.setattr(submit, "time", clock)
    tries = iter([ConnectionResetError(), "sent", *[ConnectionResetError()] * 9])

    def send() -> str:
        clock.monotonic()
        if isinstance(one := next(tries), Exception):
            raise one
        return str(one)

    assert submit.patiently(send, "the upload", 100.0) == "sent"
    with pytest.raises(submit.Failure, match="the upload failed"):
        submit.patiently(send, "the upload", 100.0)
    assert 5 < len(list(tries)) < 9


# ---------------------------------------------------------------- refusals
def test_a_volume_that_is_too_large_is_refused_amid_its_upload(tmp_path):
    (tmp_path / "v.zip").write_bytes(bytes(8 << 20))
    with still(tmp_path / "root", upload_bytes=1 << 20) as service:
        status, _, err = run(service, tmp_path / "v.zip")
        assert list(service.config.layout.incoming.iterdir()) == []
    assert status == 2 and "413" in err and "REICHAN_MAX_UPLOAD_BYTES" in err


def test_a_refusal_names_each_bad_field(service, tmp_path):
    (tmp_path / "v.zip").write_bytes(volume({"1.png": png()}))
    status, _, err = run(service, tmp_path / "v.zip", "--scale", "9", "--model", "nope")
    assert status == 2 and "422" in err
    assert re.search(r"params\.scale: .*1 to 4", err) and re.search(r"params\.model: .*realesr", err)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["nowhere.zip"], "is not there"), ([], "either a PATH or a --job"), (["."], "holds no pages"),
     (["server.py"], "is no folder and no .7z, "), (["--job", "none", "--watch"], "there is no job"),
     (["v.zip", "--param", "x"], "KEY=VALUE"),
     (["v.zip", "--param", "outputFormt=png"], "is 'outputFormat' meant"),
     (["v.zip", "--priority", "101"], "-100 to 100")],
)  # fmt: skip
def test_what_can_t_be_done_is_said_in_one_line(service, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "server.py").touch()
    (tmp_path / "v.zip").write_bytes(volume({"1.png": png()}))
    status, _, err = run(service, *arguments)
    assert status == 2 and says in err and "Traceback" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "says"),
    [("ftp://books", "not like http://192.168.1.10:8001"), ("http://books:eighty", "eighty"),
     ("http://[::1:8001", "Invalid IPv6 URL"), ("http://books..home:8001", "label empty")],
)  # fmt: skip
def test_an_address_that_is_none_is_said_in_one_line(url, says):
    status, _, err = run(url, "--job", "x")
    assert status == 2 and says in err and err.count("\n") == 1


def test_where_no_service_is_it_says_how_to_start_one(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    status, _, err = run(url, "--job", "x")
    assert status == 2 and "python server.py" in err


def test_a_token_is_taken_from_flag_or_environment(tmp_path):
    with still(tmp_path, token="secret-token") as service:
        job = queued(service).id
        assert run(service, "--job", job)[0] == 0  # tells how to watch it; asks nothing yet
        status, _, err = run(service, "--job", job, "--watch")
        assert status == 2 and "the access token is missing or wrong" in err
        jobs.cancel(service.table, job, 1.0)
        assert run(service, "--job", job, "--watch", REICHAN_TOKEN="secret-token")[0] == 3
        assert run(service, "--job", job, "--watch", "--token", "secret-token")[0] == 3


# ---------------------------------------------------------------- predictions
def test_a_prediction_is_told_after_the_upload_and_before_the_job(service, tmp_path, monkeypatch):
    """By the command's settings, and patiently: the first question is answered with "ask again"."""
    (tmp_path / "v.zip").write_bytes(volume({f"{n}.png": png(shade=n) for n in range(3)}))
    asked, told = [], {"minutes": 12.3, "megabytes": 84.25, "basis": "volumes", "basisPages": 48}

    def of_input(source, wanted):
        assert source.place.is_file() and not service.table.page_of_jobs(None, "", 10, None)
        asked.append(wanted)
        if len(asked) == 1:
            raise wire.Refused(503, "PREVIEW_SLOW", "ask again")
        return {"variants": [{"prediction": told}]}

    monkeypatch.setattr(service.api.previews, "of_input", of_input)
    status, out, _ = run(service, tmp_path / "v.zip", "--predict", "--scale", "3")
    assert status == 0 and out.startswith(
        "predicted 12.3 min and 84.2 MB, from 48 pages of volumes like it\njob"
    )
    assert [one.variants[0].scale for one in asked] == [3, 3]
    assert sole_job(service).params.scale == 3


def test_a_prediction_of_several_volumes_names_the_one_that_it_is_of():
    told = {"minutes": 2.0, "megabytes": 40.0, "basis": "preview", "basisPages": 1}
    answer = {"volumes": 12, "volume": "v06.cbz", "variants": [{"prediction": told}]}
    words = "2.0 min and 40.0 MB, from 1 page of a preview"
    assert submit.of_preview(answer) == f"{words}, for each of 12 volumes that is like v06.cbz"
    assert (
        submit.of_preview(answer | {"volumes": 1}) == submit.of_preview(answer | {"volumes": None}) == words
    )


def test_a_preview_that_fails_keeps_no_volume_from_being_submitted(service, tmp_path, monkeypatch):
    (tmp_path / "v.zip").write_bytes(volume({"1.png": png()}))

    def of_input(*_):
        raise wire.Refused(422, "NO_PREVIEW", "no preview: the page is damaged")

    monkeypatch.setattr(service.api.previews, "of_input", of_input)
    status, out, _ = run(service, tmp_path / "v.zip", "--predict")
    assert status == 0 and "predicted nothing" in out and "the page is damaged" in out and sole_job(service)


def test_a_watch_tells_what_was_predicted_and_what_became_of_it(service):
    job = running(service)
    rate = predict.Rate(1e-6, 2.0, 0.25, None, 48, "volumes")
    told = predict.forecast(messages.Workload(10, 10_000_000, 40_000_000), rate)
    with start(service, "--job", job.id, "--watch") as process:
        until(service.live.count)
        service.table.change(job, state=jobs.RUNNING, forecast=told)
        facts = told | {"actualSeconds": 10.0, "actualBytes": 8_000_000}
        jobs.advance(service.table, service.table.get(job.id), "finish", 3000.0, forecast=facts)
        out, _ = process.communicate(timeout=30)
    assert "predicted 0.2 min and 10.0 MB, from 48 pages of volumes like it" in out
    assert "took      0.2 min (predicted +20%), 8.0 MB (predicted +25%)" in out
    shared = predict.to_json(facts | {"fromCache": 3})
    assert submit.become(shared) == "took      0.2 min (with pages of other jobs), 8.0 MB (predicted +25%)"


# ---------------------------------------------------------------- watching
def test_a_watch_shows_each_change_and_ends_with_the_job(service):
    job = running(service)
    with started(service, "--job", job.id, "--watch") as process:
        until(service.live.count)
        jobs.advance(service.table, job, "fail", 3000.0, last_error="no room (injected)")
        _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "0/1 pages  inferring" in err and err.endswith("failed: no room (injected)\n")


def test_ctrl_c_leaves_the_job_and_says_how_to_watch_it_again(service):
    job = running(service)
    with started(service, "--job", job.id, "--watch") as process:
        until(service.live.count)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"submit --job {job.id} --url {service.url} --watch" in err and "Traceback" not in err
    assert service.table.get(job.id).state == "RUNNING"


def test_a_watch_outlives_a_restart_of_the_service(tmp_path):
    with still(tmp_path) as service:
        job, port = queued(service), service.http.server_port
        process = start(service, "--job", job.id, "--watch")
        until(service.live.count)
    config = settings.Config(storage_root=tmp_path, port=port)
    service = server.Service(config)
    service.live.start()
    service.http.start()
    try:
        until(service.live.count, 30)
        jobs.cancel(service.table, job.id, 5000.0)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        service.__exit__()
    assert process.returncode == 3 and "Cancelled by user" in err


# ---------------------------------------------------------------- downloading
def test_a_download_that_breaks_twice_goes_on_where_it_broke(service, tmp_path):
    job = finished(service, ARTIFACT)
    with cutting(service, 1_000_000, 1_000_000) as cutter:
        status, out, _ = run(cutter.url, "--job", job.id, "--download", tmp_path / "to")
    assert status == 0 and hashlib.sha256(ARTIFACT).hexdigest() in out
    assert [path.read_bytes() for path in (tmp_path / "to").iterdir()] == [ARTIFACT]
    fetched = [head for head in cutter.heads if "GET" in head and "/artifact" in head]
    begins = [int(found[1]) for head in fetched if (found := re.search(r"Range: bytes=(\d+)-", head))]
    assert len(fetched) == 3 and 900_000 < begins[0] < 1_000_000 < begins[1] < 2_000_000
    assert all(f'If-Range: "{job.artifact_hash}"' in head for head in fetched[1:])


@pytest.mark.parametrize(
    "left",
    [b"", ARTIFACT[:99], b"wrong" * 99, ARTIFACT, ARTIFACT + b"more"],
    ids=["nothing", "its beginning", "other bytes", "all of it", "more than it"],
)
def test_what_an_earlier_try_left_is_gone_on_with_only_if_it_is_the_beginning(service, tmp_path, left):
    job = finished(service, ARTIFACT)
    (tmp_path / f".{job.artifact_hash[:32]}.part").write_bytes(left)
    assert run(service, "--job", job.id, "--download", tmp_path)[0] == 0
    assert (tmp_path / "t 1.zip").read_bytes() == ARTIFACT
    assert not list(tmp_path.glob(".*.part"))


def test_a_download_never_replaces_another_file_and_isn_t_repeated(service, tmp_path):
    job = finished(service, ARTIFACT)
    (tmp_path / "t 1.zip").write_bytes(b"mine")
    for _ in range(2):
        status, out, _ = run(service, "--job", job.id, "--download", tmp_path)
        assert status == 0 and f"t 1 ({job.artifact_hash[:8]}).zip" in out
    assert (tmp_path / "t 1.zip").read_bytes() == b"mine"
    codes = service.dispatcher.metrics.requests.family().samples
    # Twice /health, the job and HEAD; once GET.
    assert {labels["code"]: value for _, labels, value in codes} == {"200": 7}


def test_an_artifact_that_can_not_be_kept_here_is_told_as_that_and_ends_no_other_s_turn(
    service, tmp_path, monkeypatch
):
    job = finished(service, ARTIFACT)

    def held(*_: Path) -> None:
        raise PermissionError(13, "in use by another program")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", held)
        status, _, err = run(service, "--job", job.id, "--download", tmp_path / "to")
        given = submit.parser().parse_args(["--job", job.id, "--download", str(tmp_path / "to")])
        with contextlib.redirect_stderr(io.StringIO()) as told:
            both = submit.follow(submit.Service(service.url, None), [job.id] * 2, given, submit.Line())
    assert status == both == 4 and "can't be kept in" in err and "try again with" in err
    assert told.getvalue().count("in use by another program") == 2
    assert run(service, "--job", job.id, "--download", tmp_path / "to")[0] == 0
    (tmp_path / "file").write_bytes(b"mine")
    status, _, err = run(service, "--job", job.id, "--download", tmp_path / "file")
    assert status == 2 and "is a file" in err


def test_an_artifact_that_is_not_what_its_job_promises_is_refused(service, tmp_path):
    job = finished(service, ARTIFACT)
    path = service.config.layout.artifact(job.title, job.volume, job.id)
    path.write_bytes(b"x" + ARTIFACT[1:])
    status, _, err = run(service, "--job", job.id, "--download", tmp_path / "to")
    assert status == 4 and "is not the artifact" in err and "try again with" in err
    path.unlink()
    status, _, err = run(service, "--job", job.id, "--download", tmp_path / "to")
    assert status == 4 and "no longer on disk" in err
    assert "the volume's PATH and --again makes it anew" in err and f"--job {job.id}" not in err
    assert list((tmp_path / "to").iterdir()) == []


def test_an_artifact_that_is_gone_is_made_anew_by_again_and_no_job_is_named_to_be_asked_for_it(
    service, tmp_path
):
    (tmp_path / "v.zip").write_bytes(volume({"1.png": png()}))
    job = ended(service, run(service, tmp_path / "v.zip")[1].split()[1])
    status, _, err = run(service, tmp_path / "v.zip", "--download", tmp_path / "to")
    assert status == 4 and "ARTIFACT_GONE" in err
    assert "the same command with --again" in err and "--job" not in err
    given = submit.parser().parse_args([str(tmp_path / "v.zip"), "--download", str(tmp_path / "to")])
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = submit.follow(submit.Service(service.url, None), [job.id] * 2, given, submit.Line())
    assert status == 4 and told.getvalue().count("the same command with --again") == 2
    assert "--job" not in told.getvalue()


@pytest.mark.parametrize("away", ["no line", "503"])
def test_pages_kept_as_they_were_are_asked_for_patiently(service, monkeypatch, away):
    job = ended(service, queued(service).id, failed_pages=1)
    ask, refused = submit.Service.ask, []

    def flaky(self, method, path, *rest):
        if path.endswith("/pages") and not refused:
            refused.append(path)
            raise ConnectionRefusedError if away == "no line" else submit.Refusal(503, {})
        return ask(self, method, path, *rest)

    monkeypatch.setattr(submit.Service, "ask", flaky)
    status, out, _ = run(service, "--job", job.id, "--watch")
    assert (status, len(refused)) == (1, 1) and job.artifact_hash in out


def test_a_service_that_stays_away_after_the_job_is_no_failure_to_submit_it(service, monkeypatch):
    job = ended(service, queued(service).id, failed_pages=1)
    ask = submit.Service.ask

    def away(self, method, path, *rest):
        if path.endswith("/pages"):
            raise submit.Refusal(503, {})
        return ask(self, method, path, *rest)

    monkeypatch.setattr(submit.Service, "ask", away)
    monkeypatch.setattr(submit.patiently, "__defaults__", (0.1,))
    status, _, err = run(service, "--job", job.id, "--watch")
    assert status == 4 and f"try again with\n  python server.py submit --job {job.id}" in err


def test_a_client_s_process_loads_nothing_of_the_service_but_storage():
    ours = {"jobs", "work", "server", "torch", "numpy"}
    code = f"import sys; from commands import submit; print(*({ours} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


class Terminal(io.StringIO):
    """What a terminal shows of what is written to it."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        rows, column = [""], 0
        for character in self.getvalue():
            if character == "\r":
                column = 0
            elif character == "\n":
                rows.append("")
                column = 0
            else:
                rows[-1] = rows[-1][:column] + character + rows[-1][column + 1 :]
                column += 1
        return rows


def test_a_line_of_the_log_takes_the_place_of_the_bar_which_is_drawn_again_below(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    line = submit.Line()
    line.show("[#####...............] 1/4 pages")
    print("a line of the log, longer than the bar", file=sys.stderr)
    for text in ("[#####...............] 1/4 pages", "[##########] done"):
        line.show(text)
    line.end()
    told = [row.rstrip() for row in terminal.screen()]
    assert told == ["a line of the log, longer than the bar", "[##########] done", ""]
