"""checks.md, rows H, R, D, W and O: what its neighbours (test_wire, test_live, test_service,
test_fuzz) leave open, against a real service over real sockets.

Nobody works in these services: jobs stay as the test moves them. Where memory, threads or
descriptors are counted the service has a process of its own (fuzz.Target, Linux only).
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fuzz
import pytest
from client import Client, Reply, submission
from serving import answers, dial, drain, exchange, finished, png, queued, running, still, until, volume
from websockets.exceptions import ConnectionClosed

import jobs
import server
import settings
import storage
from files import inputs
from web import api, live, refusals, routes, wire
from work import submissions

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="it looks at the service through /proc")
NOBODY = "00000000-0000-0000-0000-000000000000"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
HANDSHAKE = (
    b"GET /ws/jobs HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[server.Service]:
    with still(tmp_path) as one:
        (one.config.layout.incoming / "one.zip").write_bytes(volume({"1.png": png()}))
        yield one


@pytest.fixture
def client(service: server.Service) -> Client:
    return Client(service.url)


@contextlib.contextmanager
def target(folder: Path, plant: str = "") -> Iterator[fuzz.Target]:
    with contextlib.closing(fuzz.Target(folder / "target", plant)) as one:
        yield one


def is_well(port: int) -> bool:
    ((status, _, _),) = answers(exchange(port, GET))
    return status == 200


def rows(service: server.Service) -> int:
    return sum(service.table.counts().values())


# ---------------------------------------------------------------- H: parsing
@on_linux
def test_h05_enormous_heads_cost_no_memory(tmp_path):
    shapes = {
        b"GET /health HTTP/1.1\r\n" + b"X: 1\r\n" * 20_000: 431,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + (b"X: " + b"a" * 8000 + b"\r\n") * 250: 431,
        b"GET /" + b"a" * 2_000_000: 414,
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 2_000_000: 431,
    }
    with target(tmp_path) as one:
        before_mb = one.vitals().rss_mb
        for data, status in shapes.items():
            for _ in range(10):
                ((found, headers, _),) = answers(fuzz.send(data, (), one.world.port))
                assert (found, headers["connection"]) == (status, "close")
        assert one.vitals().rss_mb - before_mb < 10
        assert one.faults() == []


def test_h07_an_upgrade_sent_byte_by_byte_is_routed_right_and_others_are_served_meanwhile(service):
    port = service.http.server_port
    with dial(port) as line:
        for byte in HANDSHAKE:
            line.sendall(bytes([byte]))
            if byte == ord("\n"):
                assert is_well(port)
        assert line.recv(100).startswith(b"HTTP/1.1 101 ")


def test_h08_two_hundred_trickling_heads_end_by_their_deadline_and_a_good_request_does_not_wait(
    service, monkeypatch
):
    monkeypatch.setattr(wire, "HEAD_S", 2.5)
    before, port = threading.active_count(), service.http.server_port
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(dial(port)) for _ in range(200)]
        began_s = time.monotonic()
        while lines:
            assert time.monotonic() - began_s < 20 and is_well(port)
            lines = [line for line in lines if trickle(line)]
            time.sleep(0.1)
    until(lambda: not service.http.peers and threading.active_count() <= before)


def trickle(line: socket.socket) -> bool:
    """Send one byte more; whether the line is still open."""
    line.setblocking(False)
    try:
        line.sendall(b"G")
        return line.recv(100) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


@on_linux
def test_h10_a_thousand_half_open_connections_keep_no_good_request_from_its_answer(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    try:
        with target(tmp_path) as one, contextlib.ExitStack() as stack:
            for n in range(1000):
                stack.enter_context(dial(one.world.port)).sendall(b"GET /health HTTP/1.1\r\nX: "[: n % 26])
                if n % 50 == 0:
                    assert is_well(one.world.port)
            assert one.vitals().threads < 300
            assert all(is_well(one.world.port) for _ in range(100))
            stack.close()
            assert one.faults() == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_h10_connections_that_idle_make_room_but_not_before_those_that_send_a_head(tmp_path):
    with still(tmp_path, connections=3) as service, contextlib.ExitStack() as stack:
        port = service.http.server_port
        idle, busy, half = (stack.enter_context(dial(port)) for _ in range(3))
        for line in (idle, busy):
            line.sendall(GET.replace(b"Connection: close\r\n", b""))
            assert line.recv(1000).startswith(b"HTTP/1.1 200 ")
        half.sendall(b"GET /hea")
        until(lambda: [peer.phase for peer in service.http.peers.values()] == ["idle", "idle", "head"])
        assert is_well(port) and drain(half) == b""  # the half head went first
        assert is_well(port)  # in the place that it left
        third, fourth = (stack.enter_context(dial(port)) for _ in range(2))
        third.sendall(b"GET /hea")
        fourth.sendall(GET)
        assert b" 200 OK" in drain(fourth)
        busy.sendall(GET)
        assert b" 200 OK" in drain(busy)


def test_h11_a_handler_that_raises_is_a_500_with_a_number_that_the_log_explains(
    service, client, monkeypatch, caplog
):
    def report(_self: api.Api, _request: wire.Request, id: str) -> None:
        raise ZeroDivisionError(f"secret of {id} in {service.config.storage_root}")

    monkeypatch.setattr(api.Api, "report", report)
    reply = client.call("GET", f"/jobs/{NOBODY}/report")
    problem = reply.problem()
    assert (reply.status, problem.code) == (500, "INTERNAL")
    assert not any(word in reply.body for word in (b"secret", b"Zero", b"Traceback", b"/", b".py"))
    number = problem.detail.split()[-1]
    assert number in caplog.text and "ZeroDivisionError" in caplog.text
    assert is_well(service.http.server_port)


# ---------------------------------------------------------------- R: routes and payloads
def post(client: Client, body: bytes, media: str | None = "application/json", path: str = "/jobs") -> Reply:
    return client.call("POST", path, body, {"Content-Type": media} if media else {"X": "1"})


def test_r02_a_body_of_another_type_is_415_and_makes_no_row(service, client):
    good = json.dumps(submission("one.zip")).encode()
    for media in ("text/plain", "multipart/form-data; boundary=x", "application/jsonx", "", None):
        for path in ("/jobs", f"/jobs/{queued(service).id}/resume"):
            before = rows(service)
            assert post(client, good, media, path).problem().status == 415, media
            assert rows(service) == before
    assert post(client, good, "Application/JSON; charset=utf-8").status == 202


@pytest.mark.parametrize("path", ["POST /jobs", "POST /jobs/{}/resume", "PUT /incoming/large.zip"])
def test_r03_ten_terabytes_are_refused_before_a_byte_is_sent(service, path):
    path = path.format(queued(service).id)
    sent = f"{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    data = exchange(service.http.server_port, f"{sent}Content-Length: {10 << 40}\r\n\r\n".encode())
    ((status, headers, _),) = answers(data)
    assert (status, headers["connection"]) == (413, "close")


WRONG_PARAMS: list[tuple[str, list[Any]]] = [
    ("scale", [0, 5, 2.5, 2.0, "2", True, None, [2], -1, 10**30]),
    ("jpegQuality", [0, 101, "95", None, 95.0]),
    ("tileSize", [31, 1025, "64", False, 64.5]),
    ("tilePad", [-1, 129, "x"]),
    ("batchSize", [0, 17, {}]),
    ("targetWidth", [15, 65501, "100"]),
    ("targetHeight", [0, 1e300]),
    ("denoise", ["LOW", "", None, 1, ["low"]]),
    ("outputFormat", ["gif", "jpeg", None, {}]),
    ("device", ["gpu", "cuda:0", None]),
    ("color", ["grey", 0]),
    ("reduction", ["nearest", None]),
    ("model", ["none", "../x", "", None, 4, ["realesr-animevideov3"]]),
]


@pytest.mark.parametrize(
    "name, values", WRONG_PARAMS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_r04_a_parameter_out_of_range_or_of_another_type_is_422_and_named(service, client, name, values):
    snake = {"jpegQuality": "jpeg_quality", "tileSize": "tile_size", "outputFormat": "output_format"}.get(
        name, name
    )
    for value in values:
        for key in {name, snake}:
            body = submission("one.zip") | {"params": {"model": "realesr-animevideov3", key: value}}
            reply = client.call("POST", "/jobs", body)
            assert (reply.status, [*reply.faults()]) == (422, [f"params.{name}"]), (key, value)
    assert rows(service) == 0


WRONG_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"title": None}, "title"),
    ({"title": "  "}, "title"),
    ({"title": 1}, "title"),
    ({"title": "x" * 301}, "title"),
    ({"volume": ["1"]}, "volume"),
    ({"input": None}, "input"),
    ({"input": "one.zip"}, "input"),
    ({"input": {"type": "rar", "path": "one.zip"}}, "input.type"),
    ({"input": {"type": ["zip"], "path": "one.zip"}}, "input.type"),
    ({"input": {"type": "zip", "path": 1}}, "input.path"),
    ({"input": {"type": "zip"}}, "input.path"),
    ({"params": []}, "params"),
    ({"params": "x"}, "params"),
    ({"manifest": []}, "manifest"),
    ({"manifest": {"files": {}}}, "manifest"),
]


@pytest.mark.parametrize("change, field", WRONG_BODIES, ids=str)
def test_r04_a_field_of_another_shape_is_422_and_named(service, client, change, field):
    reply = client.call("POST", "/jobs", submission("one.zip") | change)
    assert (reply.status, field in reply.faults(), rows(service)) == (422, True, 0)


def test_r04_unknown_keys_are_ignored_and_limits_of_lists_are_whole_numbers(service, client):
    body = submission("one.zip") | {"x": 1, "": {"a": [None]}}
    body["params"] |= {"unknown": "value", "Scale": 9}
    assert client.call("POST", "/jobs", body).status == 202
    for query, field in {
        "limit=-1": "limit",
        "limit=501": "limit",
        "limit=abc": "limit",
        "cursor=x": "cursor",
    }.items():
        reply = client.call("GET", f"/jobs?{query}")
        assert (reply.status, [*reply.faults()]) == (422, [field])
    assert client.call("GET", f"/jobs?limit={10**9}").status == 422
    assert client.call("GET", "/jobs?limit=500&x=y&q=%25").status == 200


OUTSIDE = [
    "../one.zip",
    "incoming/../../x",
    "..\\one.zip",
    "/etc/passwd",
    "C:\\x.zip",
    "c:one.zip",
    "\\\\host\\share\\x.zip",
    "incoming/../jobs.sqlite3",
    "./../token",
    "one.zip/../../x",
    "a\0b.zip",
    "a\nb.zip",
    "\u202e",
    "incoming",
    "incoming/",
    ".",
    "/",
    "link.zip",
    "linked/one.zip",
    "x" * 300,
    "d/" * 40 + "x.zip",
    "none.zip",
    "one.zip/x",
    "file:///etc/passwd",
    "．．/one.zip",
    "%2e%2e/one.zip",
    "~root/x",
]


@pytest.mark.parametrize("kind", ["zip", "folder"])
@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: ascii(path)[:24])
def test_r05_an_input_that_is_not_in_incoming_is_422_and_makes_no_row(service, client, tmp_path, path, kind):
    incoming = service.config.layout.incoming
    with contextlib.suppress(OSError):  # Windows may not let us make links
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside/one.zip").write_bytes(volume({"1.png": png()}))
        (incoming / "link.zip").symlink_to(tmp_path / "outside/one.zip")
        (incoming / "linked").symlink_to(tmp_path / "outside")
    reply = client.call("POST", "/jobs", submission(path, kind))
    assert (reply.status, [*reply.faults()], rows(service)) == (422, ["input.path"], 0)
    job = queued(service)
    service.table.change(job, state=jobs.FAILED)
    reply = client.call("POST", f"/jobs/{job.id}/resume", {"inputPath": path, "inputType": kind})
    assert (reply.status, [*reply.faults()]) == (422, ["inputPath"])
    assert service.table.get(job.id).state == "FAILED"


@on_linux
def test_r06_no_path_that_a_client_can_spell_is_opened_but_uploads_and_what_became_of_them(tmp_path):
    names = [
        "..",
        "%2e%2e",
        "..%2f..%2fetc%2fpasswd",
        "....//",
        "..%5c..%5cx",
        "%00",
        "%2fetc%2fpasswd",
        "C:%5cx",
        "../token",
        "..%2ftoken",
    ]
    with target(tmp_path, "plants:opens_are_noted") as one:
        world = one.world
        holes = ("{id}", "{n}", "{path}", "artifact", "incoming")
        paths = {path.replace(hole, name) for _, path, _ in world.routes for name in names for hole in holes}
        for path, method in itertools.product(sorted(paths), ("GET", "PUT", "DELETE", "POST")):
            job = NOBODY if method == "DELETE" else world.finished
            spelt = path.replace("{id}", job).replace("{n}", "1")
            head = f"{method} {spelt} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n"
            fields = f"Authorization: Bearer {world.token}\r\n\r\n"
            fuzz.send((head + fields).encode(), (), world.port)
        for path in OUTSIDE:
            for kind in ("zip", "folder"):
                one.client.call("POST", "/jobs", submission(path, kind))
        assert one.faults() == []
        lines = (tmp_path / "target/log-of-opens").read_text().splitlines()
    opened = {Path(os.path.normpath(line)) for line in lines}  # incoming/../token lies not in incoming
    assert (tmp_path / "target/storage/token").is_file()  # something that must not be opened
    held = ("incoming", "outputs", "artifacts", "previews", "models")
    mine = [tmp_path / "target/storage" / name for name in held]
    # Its own page, and what sqlite and the standard library read of themselves.
    mine += [Path(server.__file__).parent, Path(sys.prefix), Path(sys.base_prefix)]
    assert [path for path in opened if not any(path.is_relative_to(folder) for folder in mine)] == []
    assert len(opened) > 3  # the watch saw something


TITLES = [
    "..",
    ".",
    "CON",
    "nul.txt",
    "a/b",
    "a\\b",
    "../../x",
    "作" * 300,
    "é" * 300,
    "\u202egnp.exe",
    "a.",
    " x ",
    "-",
]
TITLES += [
    "<script>alert(1)</script>",
    'quo"te',
    "100%",
    "~",
    "$(id)",
    "😀" * 100,
    "aux .",
    "x" * 300,
    "\ufeff",
    "ａ/ｂ",
]


@pytest.mark.parametrize("title", TITLES, ids=lambda title: ascii(title)[:24])
def test_r07_r08_r11_any_title_is_one_safe_folder_level_and_one_header_line(service, client, title):
    layout = service.config.layout
    job_id = client.submit("one.zip", title=title, volume=title)
    job = jobs.claim(service.table, 1.0)
    assert job is not None and job.id == job_id
    folder, artifact = layout.output_dir(title, title, job_id), layout.artifact(title, title, job_id)
    assert len(folder.relative_to(layout.outputs).parts) == 3 and artifact.parent == layout.artifacts
    for name in folder.relative_to(layout.outputs).parts:
        assert name == storage.safe_component(name)
    assert len(artifact.name.encode()) <= 255
    folder.mkdir(parents=True)
    artifact.write_bytes(b"zip")
    digest = hashlib.sha256(b"zip").hexdigest()
    jobs.advance(service.table, job, "finish", 2.0, artifact_hash=digest, artifact_bytes=3)
    reply = client.call("GET", f"/jobs/{job_id}/artifact")
    assert (reply.status, reply.body, reply.headers["x-content-type-options"]) == (200, b"zip", "nosniff")
    disposition = reply.headers["content-disposition"]
    plain, _, extended = disposition.removeprefix('attachment; filename="').partition("\"; filename*=UTF-8''")
    assert (
        disposition.isascii() and not set(plain) & set('"\\%;\r\n') and not set(extended) & set("\"'\\;,<> ")
    )
    assert client.state(job_id).metadata.title == title.strip()


@pytest.mark.parametrize("title", ["a\r\nX: y", "a\nb", "a\0b", "\x7f", "\x1b[2J", "\x85", ""])
def test_r11_a_title_with_controls_never_gets_as_far_as_a_header(service, client, title):
    reply = client.call("POST", "/jobs", submission("one.zip") | {"title": title})
    assert (reply.status, [*reply.faults()], rows(service)) == (422, ["title"], 0)


HOSTILE_IDS = [
    NOBODY,
    "1",
    "%20",
    "'%20OR%201=1--",
    "x" * 4000,
    "%E4%BD%9C",
    "None",
    "null",
    "*",
    "%F0%9F%98%80",
]


def test_r09_an_unknown_job_is_404_on_every_route_that_names_one(service, client):
    for route in routes.ROUTES:
        if "{id}" not in route.path or route.handler == "watch_job":
            continue
        for name in HOSTILE_IDS:
            path = route.path.replace("{id}", name).replace("{n}", "1")
            assert client.call(route.method, path).problem().code == "UNKNOWN_JOB", (route.method, path)
    job = finished(service)
    for n in ("0", "-1", "1e1", "999999999", "9" * 30, "x", "%20", "01"):
        for side in ("before", "after"):
            assert client.call("GET", f"/jobs/{job.id}/pages/{n}/{side}").problem().status == 404


def test_r09_a_wrong_method_is_405_and_told_the_right_ones_on_every_route(service, client):
    methods = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW")
    for path in {route.path for route in routes.ROUTES}:
        allowed = {route.method for route in routes.ROUTES if route.path == path} | {"OPTIONS"}
        allowed |= {"HEAD"} if "GET" in allowed else set()
        spelt = path.replace("{id}", NOBODY).replace("{n}", "1").replace("{path...}", "x.zip")
        for method in {*methods} - allowed:
            reply = client.call(method, spelt)
            assert (reply.status, reply.headers["allow"]) == (405, ", ".join(sorted(allowed))), (method, path)
            assert method == "HEAD" or reply.problem().code == "METHOD"
        reply = client.call("OPTIONS", spelt)
        assert (reply.status, reply.headers["allow"]) == (204, ", ".join(sorted(allowed)))
    assert client.call("OPTIONS", "/nothing").problem().code == "NO_ROUTE"


def test_r10_twenty_submits_with_one_key_make_one_row(service, client):
    def submit(key: str, **more: Any) -> Reply:
        return client.call("POST", "/jobs", submission("one.zip") | more, {"Idempotency-Key": key})

    with ThreadPoolExecutor(20) as pool:
        found = {reply.json()["jobId"] for reply in pool.map(submit, ["k"] * 20)}
    assert len(found) == rows(service) == 1
    assert submit("k", title="another").problem().code == "IDEMPOTENCY_KEY_REUSED"
    assert submit("other").json()["jobId"] not in found and rows(service) == 2
    for key in ("", "k" * 256):
        assert [*submit(key).faults()] == ["Idempotency-Key"]


def test_a_repeated_key_is_answered_though_the_disk_is_full_by_now(service, client, monkeypatch):
    def submit(key: str) -> Reply:
        return client.call("POST", "/jobs", submission("one.zip"), {"Idempotency-Key": key})

    first = submit("k").json()
    monkeypatch.setattr(storage, "free_bytes", lambda _layout: 0)
    assert submit("k").json() == first
    assert submit("another").problem().code == "DISK_FULL"


@pytest.mark.parametrize("action", ["submit", "resume"])
def test_the_job_table_answers_while_an_archive_is_opened(service, client, monkeypatch, action):
    """It may take a reader minutes."""
    incoming = service.config.layout.incoming
    (incoming / "all.zip").write_bytes(volume({"v/1.png": png(), "w/1.png": png()}))
    job = jobs.cancel(service.table, queued(service).id, 1.0)
    opening, go = threading.Event(), threading.Event()
    opened = inputs._opened_archive

    def slowly(*of: Any) -> Any:
        opening.set()
        assert go.wait(10)
        return opened(*of)

    monkeypatch.setattr(inputs, "_opened_archive", slowly)
    with ThreadPoolExecutor(1) as pool:
        if action == "submit":
            asked = pool.submit(client.call, "POST", "/jobs", submission("all.zip/v"))
        else:
            body = {"inputPath": "all.zip/v", "inputType": "zip"}
            asked = pool.submit(client.call, "POST", f"/jobs/{job.id}/resume", body)
        assert opening.wait(10)
        answered = client.call("GET", "/health").status
        go.set()
        assert (answered, asked.result().status // 100) == (200, 2)


def test_an_empty_body_is_empty_however_it_is_framed(service, client):
    job = jobs.cancel(service.table, queued(service).id, 1.0)
    path = f"/jobs/{job.id}/resume"
    assert client.call("POST", path, iter([b"x"])).problem().status == 415
    assert client.call("POST", path, iter([])).json()["status"] == "PENDING"


def test_a_waiting_job_is_cancelled_before_its_files_go(service, client, monkeypatch):
    """Else it could start while they do, and find its finished pages gone."""
    job = queued(service)
    claimed = []
    remove = submissions.remove_files

    def amid(*of: Any) -> None:
        claimed.append(jobs.claim(service.table, 1.0))
        remove(*of)

    monkeypatch.setattr(submissions, "remove_files", amid)
    assert client.call("DELETE", f"/jobs/{job.id}").status == 204
    assert claimed == [None]


def failing(error: OSError) -> Callable[..., Any]:
    """A function that raises it."""

    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_files_that_cannot_be_removed_keep_their_job(service, client, monkeypatch):
    job = finished(service)
    outputs = service.config.layout.output_dir(job.title, job.volume, job.id)
    outputs.mkdir(parents=True)
    with monkeypatch.context() as held:
        held.setattr(storage, "remove_tree", lambda folder: None)
        problem = client.call("DELETE", f"/jobs/{job.id}").problem()
        assert (problem.status, problem.code) == (409, "FILES_IN_USE")
    with monkeypatch.context() as held:  # its artifact, which a reader has open on Windows
        held.setattr(storage, "remove_file", failing(PermissionError(errno.EACCES, "in use")))
        problem = client.call("DELETE", f"/jobs/{job.id}").problem()
        assert (problem.status, problem.code) == (409, "FILES_IN_USE")
    with monkeypatch.context() as held:  # a worker far away, which has not obeyed yet
        held.setattr(service.dispatcher, "wait_released", lambda *_, **__: False)
        held.setattr(service.dispatcher, "is_held", lambda _: True)
        problem = client.call("DELETE", f"/jobs/{job.id}").problem()
        assert (problem.status, problem.code) == (409, "FILES_IN_USE")
    assert client.call("GET", f"/jobs/{job.id}").status == 200
    assert client.call("DELETE", f"/jobs/{job.id}").status == 204


def test_requests_leave_nothing_behind_while_no_worker_answers(service, client):
    for _ in range(20):
        assert client.call("GET", "/models").json()["probed"] is False
        assert client.call("GET", "/devices").json() == {"devices": [], "probed": False}
    ((_, question),) = service.dispatcher.questions._open.values()
    assert len(question._done_callbacks) == 1


# ---------------------------------------------------------------- uploads
def test_an_upload_that_breaks_off_or_is_refused_leaves_nothing_not_even_a_folder(service, client):
    incoming, port = service.config.layout.incoming, service.http.server_port
    before = sorted(incoming.rglob("*"))
    head = b"PUT /incoming/new/deep/v.zip HTTP/1.1\r\nHost: localhost\r\n"
    for rest in (b"Content-Length: 90\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"):
        with dial(port) as line:
            line.sendall(head + rest)
            line.shutdown(socket.SHUT_WR)
            assert drain(line) == b""
    wrong = {"Repr-Digest": "sha-256=:" + "A" * 43 + "=:"}
    assert client.call("PUT", "/incoming/new/deep/v.zip", b"hello", wrong).problem().code == "DIGEST"
    assert sorted(incoming.rglob("*")) == before
    assert client.call("PUT", "/incoming/new/deep/v.zip", b"hello").status == 201
    assert (incoming / "new/deep/v.zip").read_bytes() == b"hello"


def test_an_upload_of_unknown_length_leaves_the_reserve_to_the_jobs(service, client, monkeypatch):
    """Else the job that writes meanwhile is the one that fails."""
    monkeypatch.setattr(api, "ROOM_LOOK_BYTES", 1 << 10)
    reserve, incoming = service.config.reserve_bytes, service.config.layout.incoming
    written = lambda: sum(path.stat().st_size for path in incoming.rglob("*.tmp"))  # noqa: E731
    least = [1 << 40]

    def free_bytes(_: Any) -> int:
        least.append(reserve + (4 << 20) - written())
        return least[-1]

    monkeypatch.setattr(storage, "free_bytes", free_bytes)
    before = sorted(incoming.rglob("*"))
    pieces = b"".join(b"100000\r\n" + bytes(1 << 20) + b"\r\n" for _ in range(16)) + b"0\r\n\r\n"
    head = b"PUT /incoming/v.zip HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with dial(service.http.server_port) as line:
        with contextlib.suppress(OSError):  # it is answered, and closed, before all was sent
            line.sendall(head + pieces)
        answer = drain(line)
    assert answer == b"" or b" 507 " in answer.split(b"\r\n")[0]
    assert reserve - (2 << 20) < min(least) < reserve and sorted(incoming.rglob("*")) == before


def test_a_file_that_a_program_has_open_is_409_and_no_fault_of_the_disk(service, client, monkeypatch):
    monkeypatch.setattr(refusals, "IN_USE", (PermissionError,))  # as on Windows
    monkeypatch.setattr(storage, "replacing", failing(PermissionError(errno.EACCES, "in use")))
    assert client.call("PUT", "/incoming/v.zip", b"x").problem().code == "FILES_IN_USE"


def test_two_uploads_that_want_a_file_and_a_folder_of_one_name_get_201_and_409(service, client, monkeypatch):
    replacing = storage.replacing

    @contextlib.contextmanager
    def outrun(place: Path, temporary: Path | None = None) -> Iterator[Any]:
        with replacing(place, temporary) as file:
            yield file
            monkeypatch.setattr(storage, "replacing", replacing)
            assert client.call("PUT", f"/incoming/{quicker}", b"first").status == 201

    for slower, quicker in (("a", "a/b"), ("c/d", "c")):
        monkeypatch.setattr(storage, "replacing", outrun)
        assert client.call("PUT", f"/incoming/{slower}", b"second").problem().code == "NAME_TAKEN"
        assert (service.config.layout.incoming / quicker).read_bytes() == b"first"
    assert not [*service.config.layout.root.rglob("*.tmp")]


# ---------------------------------------------------------------- D: artifacts
def test_d03_etag_and_repr_digest_are_the_zips_hash_also_of_a_part_and_after_a_restart(tmp_path):
    found = []
    with still(tmp_path) as service:
        job = finished(service, b"some artifact")
        found.append(Client(service.url).call("HEAD", f"/jobs/{job.id}/artifact").headers)
    with still(tmp_path) as service:
        for wanted in ({}, {"Range": "bytes=1-3"}):
            found.append(Client(service.url).call("GET", f"/jobs/{job.id}/artifact", None, wanted).headers)
    digest = hashlib.sha256(b"some artifact")
    assert [headers["etag"] for headers in found] == [f'"{digest.hexdigest()}"'] * 3
    coded = base64.b64encode(digest.digest()).decode()
    assert [headers["repr-digest"] for headers in found] == [f"sha-256=:{coded}:"] * 3
    assert len({headers["last-modified"] for headers in found}) == 1


def test_d04_a_download_cut_at_twenty_places_is_joined_to_the_artifact(service, client):
    data = random.Random(1).randbytes(1 << 20)
    job, joined = finished(service, data), b""
    head = f'GET /jobs/{job.id}/artifact HTTP/1.1\r\nHost: localhost\r\nIf-Range: "{job.artifact_hash}"\r\n'
    for end in sorted(random.Random(2).sample(range(1, len(data)), 20)):
        with dial(service.http.server_port) as line:
            line.sendall(f"{head}Range: bytes={len(joined)}-\r\n\r\n".encode())
            file = line.makefile("rb")
            assert file.readline().startswith(b"HTTP/1.1 206 ")
            while file.readline() != b"\r\n":
                pass
            joined += file.read(end - len(joined))  # and no further: the line is cut
    reply = client.call("GET", f"/jobs/{job.id}/artifact", None, {"Range": f"bytes={len(joined)}-"})
    assert hashlib.sha256(joined + reply.body).hexdigest() == job.artifact_hash


@pytest.mark.parametrize("change", ["rebuilt", "deleted"])
def test_d05_a_download_under_way_ends_whole_whatever_becomes_of_the_artifact(service, client, change):
    old, new = bytes(16 << 20), b"new artifact"
    job = finished(service, old)
    path = service.config.layout.artifact(job.title, job.volume, job.id)
    with dial(service.http.server_port) as line:
        line.sendall(
            f"GET /jobs/{job.id}/artifact HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        begun = line.recv(1000)
        if change == "rebuilt":
            digest = storage.write_whole(path, new)
            service.table.change(job, state="SUCCESS", artifact_hash=digest, artifact_bytes=len(new))
        else:
            assert client.call("DELETE", f"/jobs/{job.id}").status == 204
        ((status, headers, body),) = answers(begun + drain(line))
    assert (status, headers["etag"], body) == (200, f'"{job.artifact_hash}"', old)
    conditions = {"Range": "bytes=4-", "If-Range": f'"{job.artifact_hash}"'}
    reply = client.call("GET", f"/jobs/{job.id}/artifact", None, conditions)
    assert (reply.status, reply.body) == (200, new) if change == "rebuilt" else reply.status == 404


def test_d06_an_unfinished_job_has_no_artifact_and_says_its_state(service, client):
    running_job = running(service)
    waiting = queued(service)
    failed = jobs.cancel(service.table, queued(service).id, 1.0)
    for job, state in ((running_job, "RUNNING"), (waiting, "PENDING"), (failed, "FAILED")):
        # Something that looks like one doesn't change that.
        service.config.layout.artifact(job.title, job.volume, job.id).write_bytes(b"PK partial")
        for method in ("GET", "HEAD"):
            reply = client.call(method, f"/jobs/{job.id}/artifact")
            assert reply.status == 409 and "etag" not in reply.headers
        assert state in client.call("GET", f"/jobs/{job.id}/artifact").problem().detail


@pytest.mark.parametrize(
    "damage, code",
    [
        (lambda path: path.unlink(), "ARTIFACT_GONE"),
        (lambda path: os.truncate(path, 5), "ARTIFACT_DAMAGED"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "ARTIFACT_DAMAGED"),
        (lambda path: (path.unlink(), path.mkdir()), "ARTIFACT_GONE"),
        (
            lambda path: (path.rename(path.with_suffix(".x")), path.symlink_to(path.with_suffix(".x"))),
            "ARTIFACT_GONE",
        ),
    ],
    ids=["deleted", "truncated", "longer", "a folder", "a link"],
)
def test_d07_d08_an_artifact_that_is_gone_or_damaged_is_410_and_the_row_stays(service, client, damage, code):
    job = finished(service)
    damage(service.config.layout.artifact(job.title, job.volume, job.id))
    for fields in ({}, {"Range": "bytes=0-1"}, {"If-None-Match": f'"{job.artifact_hash}"'}):
        assert client.call("GET", f"/jobs/{job.id}/artifact", None, fields).problem().code == code
    assert client.state(job.id).artifact_hash == job.artifact_hash


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_what_cannot_be_opened_now_is_not_told_as_gone(service, client, monkeypatch, number):
    """410 is for good, and asks for the volume to be made again."""
    job = finished(service)
    with monkeypatch.context() as broken:
        broken.setattr(storage, "open_regular", failing(OSError(number, os.strerror(number))))
        reply = client.call("GET", f"/jobs/{job.id}/artifact")
        assert (reply.status, reply.problem().code) == (503, "DISK") and reply.headers["retry-after"]
    assert client.call("GET", f"/jobs/{job.id}/artifact").status == 200


@on_linux
def test_d10_a_hundred_ranges_at_once_of_a_large_artifact_cost_no_memory(tmp_path):
    part, size = 4 << 20, 500 << 20
    with target(tmp_path, "plants:a_large_artifact") as one:
        head = f"GET /jobs/{one.world.finished}/artifact HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Authorization: Bearer {one.world.token}\r\n"

        def fetch(n: int) -> int:
            start = n * (size - part) // 99
            with dial(one.world.port) as line:
                line.sendall(f"{head}Range: bytes={start}-{start + part - 1}\r\n\r\n".encode())
                ((status, _, body),) = answers(drain(line, 60))
            return len(body) if status == 206 else -status

        peak, over = [0.0], threading.Event()

        def watch() -> None:
            while not over.wait(0.01):
                peak[0] = max(peak[0], one.vitals().rss_mb)
                assert is_well(one.world.port)

        with ThreadPoolExecutor(101) as pool:
            watching = pool.submit(watch)
            found = [*pool.map(fetch, range(100))]
            over.set()
            watching.result()
        assert found == [part] * 100
        print(f"resident memory grew by {peak[0] - one.before.rss_mb:.1f} MB at most")
        assert peak[0] - one.before.rss_mb < 40  # of the 400 MB that were sent
        assert one.faults() == []


# ---------------------------------------------------------------- W: WebSockets
def test_w03_w_without_the_token_a_handshake_ends_before_101(tmp_path):
    with still(tmp_path, token="secret-token") as service:
        session = (
            Client(service.url, "secret-token").call("POST", "/session").headers["set-cookie"].split(";")[0]
        )
        table = {
            "": 401,
            "Authorization: Bearer wrong-token\r\n": 401,
            f"Cookie: {session}0\r\n": 401,
            "Sec-WebSocket-Protocol: secret-token\r\n": 401,
            "Authorization: Bearer secret-token\r\n": 101,
            f"Cookie: a=b; {session}\r\n": 101,
        }
        for field, status in table.items():
            with dial(service.http.server_port) as line:
                line.sendall(HANDSHAKE[:-2] + field.encode() + b"\r\n")
                assert line.recv(100).startswith(f"HTTP/1.1 {status} ".encode()), field
        until(lambda: service.live.count() == 0)


@on_linux
def test_w05_ten_thousand_events_for_a_client_that_never_reads_wait_as_one(service, client, monkeypatch):
    monkeypatch.setattr(live, "FRAME_GAP_S", 0.0)
    job = running(service)
    with dial(service.http.server_port) as asleep, client.socket("/ws/jobs") as awake:
        asleep.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asleep.sendall(HANDSHAKE)
        until(lambda: service.live.count() == 2)
        before_mb = rss_mb()
        for n in range(1, 10_001):
            service.live.publish(dataclasses.replace(job, seq=job.seq + n, processed=n))
        assert max(len(w.pending.get(job.id, ())) for w in [*service.live.watchers]) <= 1
        while json.loads(awake.recv(10))["processed"] < 10_000:
            pass
        assert rss_mb() - before_mb < 20


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="there is no way to stop a process")
def test_w09_a_client_whose_process_is_stopped_is_dropped_by_its_pings(service, monkeypatch):
    assert live.PING_S * 2 < 45
    monkeypatch.setattr(live, "PING_S", 0.7)
    code = (
        "import sys, threading; from websockets.sync.client import connect\n"
        "with connect(sys.argv[1], proxy=None) as line: print('there', flush=True); threading.Event().wait()"
    )
    url = service.url.replace("http", "ws") + "/ws/jobs"
    process = subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        time.sleep(3 * live.PING_S)
        assert service.live.count() == 1  # awake it answers
        process.send_signal(signal.SIGSTOP)
        until(lambda: service.live.count() == 0)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_w10_a_flood_of_messages_is_cut_off_after_a_few_and_others_go_on(service, client, monkeypatch):
    heard: list[Any] = []
    hear = live.WebSocketLine._hear
    monkeypatch.setattr(live.WebSocketLine, "_hear", lambda line, frame: (heard.append(1), hear(line, frame)))
    job = running(service)
    with client.socket("/ws/jobs") as other, dial(service.http.server_port) as line:
        line.sendall(HANDSHAKE)
        until(lambda: service.live.count() == 2)
        with contextlib.suppress(OSError):
            line.sendall((b"\x81\x80" + bytes(4)) * 10_000)
            line.shutdown(socket.SHUT_WR)
        assert b"\x88\x13\x03\xf0too many messages" in drain(line)
        assert len(heard) <= live.MESSAGES + live.READ_BYTES // 6 + 1
        service.live.publish(dataclasses.replace(job, seq=job.seq + 1, processed=1))
        until(lambda: json.loads(other.recv(5))["processed"] == 1)


@pytest.mark.parametrize(
    "ending", [b"\x81\x02hi", b"\x88\x82\0\0\0\0\x03\xe8", (b"\x81\x80" + bytes(4)) * 200]
)
def test_w10_a_client_that_does_not_end_a_line_that_is_over_is_ended(service, monkeypatch, ending):
    monkeypatch.setattr(live, "CLOSE_S", 0.5)
    with dial(service.http.server_port) as line:
        line.sendall(HANDSHAKE)
        until(lambda: service.live.count() == 1)
        line.sendall(ending)
        began_s = time.monotonic()
        with contextlib.suppress(OSError):  # it talks on, and never closes
            while service.live.count() and time.monotonic() - began_s < 10:
                line.sendall(b"\x81\x80" + bytes(4))
                time.sleep(0.01)
        until(lambda: service.live.count() == 0, 1.0)


def test_a_flood_of_pings_whose_sender_leaves_fills_no_log(service, caplog):
    for _ in range(5):
        with dial(service.http.server_port) as line, contextlib.suppress(OSError):
            line.sendall(HANDSHAKE)
            until(lambda: service.live.count() == 1)
            line.sendall((b"\x89\x80" + bytes(4)) * 100_000)
        until(lambda: service.live.count() == 0)
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_a_line_that_breaks_off_by_a_fault_of_ours_is_logged_and_forgotten(
    service, client, monkeypatch, caplog
):
    def hear(_line: live.WebSocketLine, _frame: Any) -> None:
        raise AttributeError("injected")

    monkeypatch.setattr(live.WebSocketLine, "_hear", hear)
    with client.socket("/ws/jobs") as line:
        line.send("x")
        with pytest.raises(ConnectionClosed):
            line.recv(5)
    until(lambda: service.live.count() == 0)
    assert "a WebSocket broke off" in caplog.text and "AttributeError: injected" in caplog.text


# ---------------------------------------------------------------- O: who may ask
def ask(
    service: server.Service, *fields: str, method: str = "GET", path: str = "/jobs"
) -> tuple[int, dict[str, str]]:
    head = "\r\n".join(
        [f"{method} {path} HTTP/1.1", *fields, "Connection: close", "Content-Length: 0", "", ""]
    )
    ((status, headers, _),) = answers(exchange(service.http.server_port, head.encode("latin-1")))
    return status, headers


OWN = ["localhost", "127.0.0.1", "[::1]", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]:{port}"]
FOREIGN = ["evil.example", "evil.example:{port}", "localhost.evil.example", "127.0.0.1.nip.io", "0.0.0.0"]
FOREIGN += ["127.0.0.2", "[::ffff:127.0.0.1]", "localhost.", "169.254.169.254"]


@pytest.mark.parametrize("host", OWN + FOREIGN)
def test_o01_only_loopbacks_own_names_are_answered_on_http_and_websocket(service, host):
    spelt = f"Host: {host.format(port=service.http.server_port)}"
    assert ask(service, spelt)[0] == (200 if host in OWN else 421)
    with dial(service.http.server_port) as line:
        line.sendall(HANDSHAKE.replace(b"Host: localhost", spelt.encode()))
        assert line.recv(100)[9:12] == (b"101" if host in OWN else b"421")


@pytest.mark.parametrize(
    ("host", "is_let_in"),
    [
        ("manga.home", True),
        ("MANGA.HOME:443", True),
        ("localhost", True),
        ("other.home:8443", True),
        ("other.home", False),  # named with its port, it is meant with it
        ("evil.manga.home", False),
    ],
)
def test_o01_a_host_behind_a_proxy_is_let_in_by_its_name(tmp_path, host, is_let_in):
    with still(tmp_path, allowed_hosts=("Manga.home", "other.home:8443")) as service:
        assert ask(service, f"Host: {host}")[0] == (200 if is_let_in else 421)
        with dial(service.http.server_port) as line:
            line.sendall(HANDSHAKE.replace(b"localhost", host.encode()))
            assert line.recv(100)[9:12] == (b"101" if is_let_in else b"421")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1:1"]
)
def test_o02_o04_another_sites_preflight_gets_no_permission_and_its_request_nothing_done(service, origin):
    fields = ("Host: localhost", f"Origin: {origin}", "Access-Control-Request-Method: POST")
    _, headers = ask(service, *fields, method="OPTIONS")
    assert not [name for name in headers if name.startswith("access-control")]
    job = queued(service)
    for method, path in (
        ("POST", f"/jobs/{job.id}/cancel"),
        ("DELETE", f"/jobs/{job.id}"),
        ("PUT", "/incoming/x.zip"),
    ):
        status, headers = ask(service, *fields[:2], method=method, path=path)
        assert status == 403 and "access-control-allow-origin" not in headers
    assert (
        service.table.get(job.id).state == "PENDING"
        and not (service.config.layout.incoming / "x.zip").exists()
    )
    assert ask(service, "Host: localhost", "Sec-Fetch-Site: cross-site", method="POST")[0] == 403
    assert "access-control-allow-origin" not in ask(service, *fields[:2])[1]  # it may ask, and not read


@pytest.mark.parametrize("origin", settings.TAURI_ORIGINS)
def test_o03_the_apps_preflight_is_answered_with_its_own_origin(service, origin):
    fields = ("Host: localhost", f"Origin: {origin}", "Access-Control-Request-Method: PUT")
    status, headers = ask(service, *fields, method="OPTIONS", path="/incoming/x.zip")
    assert (status, headers["access-control-allow-origin"], headers["vary"]) == (204, origin, "Origin")
    assert {"PUT", "DELETE"} <= {*headers["access-control-allow-methods"].split(", ")}
    assert ask(service, *fields[:2])[1]["access-control-allow-origin"] == origin


def test_o03_an_allowed_origin_may_ask_act_and_read_and_no_other_may(tmp_path):
    with still(tmp_path, allowed_origins=("https://manga.home",)) as service:
        cancel = {"method": "POST", "path": f"/jobs/{queued(service).id}/cancel"}
        for origin, status in (("http://manga.home", 403), ("https://manga.home", 200)):
            fields = ("Host: localhost", f"Origin: {origin}")
            is_let_in = status == 200
            _, headers = ask(service, *fields, "Access-Control-Request-Method: POST", method="OPTIONS")
            assert headers.get("access-control-allow-origin") == (origin if is_let_in else None)
            found, headers = ask(service, *fields, **cancel)
            assert found == status
            assert headers.get("access-control-allow-origin") == (origin if is_let_in else None)
            with dial(service.http.server_port) as line:
                line.sendall(HANDSHAKE[:-2] + f"Origin: {origin}\r\n\r\n".encode())
                assert line.recv(100)[9:12] == (b"101" if is_let_in else b"403")


def test_a_page_that_is_not_listed_yet_is_no_unknown_page(service):
    job, client = queued(service), Client(service.url)
    for side in ("before", "after"):
        assert client.call("GET", f"/jobs/{job.id}/pages/1/{side}").problem().code == "NOT_STAGED"


def test_o05_every_wrong_token_gets_the_same_401(tmp_path):
    token = "right-token-1234"
    wrong = [None, "", token[:-1], token + "x", token.upper(), f"{token} x", "\xff" * 16, "x" * 8000]
    with still(tmp_path, token=token) as service:
        client, bodies = Client(service.url), set()
        for given in wrong:
            for scheme in ("Bearer", "Basic", ""):
                fields = {} if given is None else {"Authorization": f"{scheme} {given}".encode("latin-1")}
                reply = client.call("GET", "/jobs", None, fields)
                assert reply.status == 401 and reply.headers["www-authenticate"].startswith("Bearer ")
                bodies.add(reply.body)
        assert len(bodies) == 1
        for route in routes.ROUTES:
            path = route.path.replace("{id}", NOBODY).replace("{n}", "1").replace("{path...}", "x.zip")
            assert (client.call(route.method, path).status == 401) != route.open, path
        assert client.call("GET", "/jobs", None, {"Authorization": f"bearer {token}"}).status == 200
        assert not [*service.config.layout.incoming.iterdir()]


def test_o07_a_misspelt_authorization_is_repeated_neither_to_the_client_nor_to_the_log(tmp_path, caplog):
    caplog.set_level("DEBUG")
    with still(tmp_path, token="secret-token") as service:
        for spelt in (
            "Authorization : Bearer secret-token",
            " Bearer secret-token",
            "Authorization\tBearer secret-token",
        ):
            data = exchange(
                service.http.server_port, f"GET / HTTP/1.1\r\nHost: localhost\r\n{spelt}\r\n\r\n".encode()
            )
            assert data.startswith(b"HTTP/1.1 400 ") and b"secret" not in data
        Client(service.url, "secret-token").call("POST", "/session")
        Client(service.url, "secret-tokem").call("GET", "/jobs")
    assert caplog.text and "secret" not in caplog.text
