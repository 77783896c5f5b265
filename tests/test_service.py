"""A volume through the whole service, as the desktop client sees it, and through crashes.

The client below is written from the contract alone, as strictly as the real one parses.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from serving import volume
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

import server
import settings
from web import routes

ROOT = Path(server.__file__).parent
MODEL = "realesr-animevideov3"
STATUSES = ("PENDING", "RUNNING", "SUCCESS", "FAILED")
STATE_TYPES: dict[str, tuple[type, ...]] = {
    "jobId": (str,), "status": (str,), "processed": (int,), "total": (int,),
    "artifactPath": (str, type(None)), "artifactHash": (str, type(None)), "message": (str, type(None)),
    "retries": (int,), "lastError": (str, type(None)), "params": (dict,), "metadata": (dict,),
    "cancelled": (bool,), "failedPages": (int,), "currentPage": (str, type(None)),
    "etaSeconds": (int, float, type(None)), "phase": (str,), "seq": (int,), "createdAt": (str,),
    "startedAt": (str, type(None)), "finishedAt": (str, type(None)),
}  # fmt: skip
PARAM_TYPES: dict[str, tuple[type, ...]] = {
    "scale": (int,), "model": (str,), "denoise": (str,), "outputFormat": (str,), "jpegQuality": (int,),
    "tileSize": (int, type(None)), "tilePad": (int, type(None)), "batchSize": (int, type(None)),
    "device": (str,),
}  # fmt: skip


def check_types(value: dict[str, Any], types: dict[str, tuple[type, ...]]) -> None:
    """Every key there, of exactly these types: True is no integer, 2.0 is none either."""
    for key, allowed in types.items():
        assert type(value[key]) in allowed, f"{key} is {value[key]!r}"


def strict_state(text: str | bytes) -> dict[str, Any]:
    """A JobState, parsed as a strict client does."""
    state: dict[str, Any] = json.loads(text)
    check_types(state, STATE_TYPES)
    check_types(state["params"], PARAM_TYPES)
    assert state["status"] in STATUSES
    assert state["processed"] >= 0 and state["total"] >= 0
    return state


class Client:
    """Speaks to one service."""

    def __init__(self, url: str) -> None:
        self.host = url.removeprefix("http://")

    def call(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers in lower case, body)."""
        line = http.client.HTTPConnection(self.host, timeout=30)
        try:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            if isinstance(body, dict):
                headers["Content-Type"] = "application/json"
            named = {key.replace("_", "-"): value for key, value in headers.items()}
            line.request(method, path, data, named, encode_chunked=isinstance(data, Iterator))
            answer = line.getresponse()
            found = {key.lower(): value for key, value in answer.getheaders()}
            return answer.status, found, answer.read()
        finally:
            line.close()

    def submit(self, path: str, kind: str = "zip", **params: Any) -> str:
        """Submit an input; the job's id."""
        body = {"title": "作品名", "volume": "01", "input": {"type": kind, "path": path}}
        status, _, text = self.call("POST", "/jobs", body | {"params": {"model": MODEL, **params}})
        assert status == 202, text
        return str(json.loads(text)["jobId"])

    def state(self, job: str) -> dict[str, Any]:
        """The job's state, strictly parsed."""
        status, _, text = self.call("GET", f"/jobs/{job}")
        assert status == 200, text
        return strict_state(text)

    def wait(self, job: str, until: Any = lambda s: s["status"] in ("SUCCESS", "FAILED")) -> dict[str, Any]:
        """Poll until the state is as wanted."""
        deadline = time.monotonic() + 300
        while not until(state := self.state(job)):
            assert time.monotonic() < deadline, state
            time.sleep(0.05)
        return state


def png(n: int, width: int = 32, height: int = 48) -> bytes:
    """A grey page, another one for each n."""
    rows = b"".join(b"\0" + bytes((x * (n + 2) + y * 5) % 251 for x in range(width)) for y in range(height))
    made = b"\x89PNG\r\n\x1a\n"
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        made += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return made


def check_artifact(data: bytes, state: dict[str, Any]) -> dict[str, Any]:
    """Every hash of an artifact; returns its report."""
    assert hashlib.sha256(data).hexdigest() == state["artifactHash"]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        report: dict[str, Any] = json.loads(archive.read("artifact-report.json"))
        assert archive.namelist() == ["artifact-report.json", *(i["filename"] for i in report["items"])]
        for item in report["items"]:
            page = archive.read(item["filename"])
            assert (hashlib.sha256(page).hexdigest(), len(page)) == (item["sha256"], item["bytes"])
    assert report["processed"] == report["total"] == len(report["items"])
    return report


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Service]:
    root = tmp_path_factory.mktemp("service")
    with server.Service(settings.Config(storage_root=root, port=0)) as running:
        yield running


@pytest.fixture
def client(service: server.Service) -> Client:
    return Client(service.url)


def test_a_strict_client_goes_from_upload_to_a_checked_artifact(client):
    pages = {f"Ch 1/{n}.png": png(n) for n in (1, 2, 10)} | {"notes.txt": b"x"}
    chunks = iter([volume(pages)[:100], volume(pages)[100:]])
    title = "作品名".encode().decode("latin-1")
    assert client.call("PUT", "/incoming/tour.zip", chunks, X_Reichan_Title=title)[0] == 201
    job, frames = client.submit("incoming/tour.zip", scale=2), []
    with connect(f"ws://{client.host}/ws/jobs/{job}") as line:
        frames = [strict_state(frame) for frame in line]
        assert line.close_code == 1000
    told = {frame["seq"]: frame for frame in frames}
    assert [frame["seq"] for frame in frames if frame is told[frame["seq"]]] == sorted(told)
    # Told twice is only what stood still for some seconds, and then it is the same.
    assert all({**frame, "etaSeconds": 0} == {**told[frame["seq"]], "etaSeconds": 0} for frame in frames)
    assert (frames[-1]["status"], frames[-1]["processed"], frames[-1]["leftOut"]) == ("SUCCESS", 3, 1)
    status, headers, data = client.call("GET", f"/jobs/{job}/artifact")
    assert status == 200 and int(headers["content-length"]) == len(data)
    assert headers["etag"] == f'"{frames[-1]["artifactHash"]}"'
    report = check_artifact(data, frames[-1])
    assert [item["filename"] for item in report["items"]] == ["Ch 1/1.jpg", "Ch 1/2.jpg", "Ch 1/10.jpg"]
    assert [item["source"]["sha256"] for item in report["items"]] == [
        hashlib.sha256(png(n)).hexdigest() for n in (1, 2, 10)
    ]
    assert {(item["width"], item["height"], item["mode"]) for item in report["items"]} == {(64, 96, "L")}
    for tag in (frames[-1]["artifactHash"], headers["etag"], "W/" + headers["etag"], "*"):
        assert client.call("GET", f"/jobs/{job}/artifact", If_None_Match=tag)[0] == 304


def test_a_download_that_broke_off_is_joined_by_range(client):
    client.call("PUT", "/incoming/range.zip", volume({"1.png": png(1)}))
    state = client.wait(job := client.submit("range.zip"))
    path = f"/jobs/{job}/artifact"
    _, headers, whole = client.call("GET", path)
    status, part_headers, tail = client.call("GET", path, Range="bytes=100-", If_Range=headers["etag"])
    assert (status, whole[:100] + tail) == (206, whole)
    assert part_headers["content-range"] == f"bytes 100-{len(whole) - 1}/{len(whole)}"
    assert client.call("GET", path, Range="bytes=100-", If_Range='"other"')[2] == whole
    assert client.call("HEAD", path)[1]["content-length"] == str(len(whole))
    assert client.call("GET", path, Range=f"bytes={len(whole)}-")[0] == 416
    assert check_artifact(whole, state)["outscale"] == 2


@pytest.mark.parametrize(
    "scale, form, mode", [(1, "png", b"\x89PNG"), (3, "webp", b"RIFF"), (4, "jpg", b"\xff\xd8")]
)
def test_every_format_and_scale_comes_out_as_asked(client, scale, form, mode):
    client.call("PUT", "/incoming/form.zip", volume({"第1話/表紙.png": png(3)}))
    state = client.wait(job := client.submit("form.zip", scale=scale, outputFormat=form))
    data = client.call("GET", f"/jobs/{job}/artifact")[2]
    item = check_artifact(data, state)["items"][0]
    assert (item["filename"], item["width"], item["height"]) == (f"第1話/表紙.{form}", 32 * scale, 48 * scale)
    assert zipfile.ZipFile(io.BytesIO(data)).read(item["filename"]).startswith(mode)


def test_a_grey_page_saved_in_colour_comes_out_grey_and_the_report_says_how_grey_it_was(client):
    grey = np.arange(32 * 48, dtype=np.uint32).reshape(48, 32) % 251
    pages = {"grey.webp": np.dstack([grey] * 3), "ivory.png": np.dstack([grey * 0.97, grey * 0.99, grey])}
    files = {
        name: cv2.imencode(Path(name).suffix, page.astype(np.uint8), [cv2.IMWRITE_WEBP_QUALITY, 90])[1]
        for name, page in pages.items()
    }
    client.call("PUT", "/incoming/g.zip", volume({name: data.tobytes() for name, data in files.items()}))
    state = client.wait(job := client.submit("g.zip"))
    grey_item, ivory = check_artifact(client.call("GET", f"/jobs/{job}/artifact")[2], state)["items"]
    assert grey_item["mode"] == "L" and grey_item["colorSpread"] <= 1
    assert ivory["mode"] == "RGB" and 6 <= ivory["colorSpread"] <= 8


def test_a_folder_is_an_input_and_a_manifest_is_reconciled(client, service):
    folder = service.config.layout.incoming / "folder"
    folder.mkdir()
    for n in (1, 2):
        (folder / f"{n}.png").write_bytes(png(n))
    (folder / "manifest.json").write_text(json.dumps({"files": [{"target": "1.png"}, {"target": "3.png"}]}))
    state = client.wait(job := client.submit("folder", "folder"))
    report = json.loads(client.call("GET", f"/jobs/{job}/report")[2])["report"]
    assert report["reconciliation"] == {"expected": 2, "matched": 1, "missing": ["3.png"], "extra": ["2.png"]}
    assert "manifest" in state["message"]


def test_a_bad_page_is_carried_and_the_volume_goes_on(client):
    bad = png(2)[:-30]
    client.call("PUT", "/incoming/bad.zip", volume({"1.png": png(1), "2.png": bad, "3.png": png(3)}))
    state = client.wait(job := client.submit("bad.zip"))
    assert (state["status"], state["failedPages"], state["processed"]) == ("SUCCESS", 1, 3)
    assert "2.png" in state["message"]
    report = check_artifact(client.call("GET", f"/jobs/{job}/artifact")[2], state)
    assert [item["status"] for item in report["items"]] == ["upscaled", "carried", "upscaled"]
    assert report["items"][1]["sha256"] == hashlib.sha256(bad).hexdigest()


def test_a_volume_of_bad_pages_fails_and_has_no_artifact(client):
    client.call("PUT", "/incoming/allbad.zip", volume({"1.png": b"no", "2.jpg": b""}))
    state = client.wait(job := client.submit("allbad.zip"))
    assert (state["status"], state["errorCode"], state["artifactPath"]) == (
        "FAILED",
        "ALL_PAGES_FAILED",
        None,
    )
    assert client.call("GET", f"/jobs/{job}/artifact")[0] == 409


def test_a_cancelled_job_keeps_its_pages_and_resume_computes_the_rest(client, service):
    client.call("PUT", "/incoming/long.zip", volume({f"{n}.png": png(n, 120, 160) for n in range(12)}))
    job = client.submit("long.zip")
    client.wait(job, lambda state: state["processed"] >= 2)
    state = strict_state(client.call("POST", f"/jobs/{job}/cancel")[2])
    assert (state["status"], state["cancelled"], state["message"]) == ("FAILED", True, "Cancelled by user")
    assert service.dispatcher.wait_released(job, 5)
    done = [
        page for page in json.loads(client.call("GET", f"/jobs/{job}/pages")[2])["pages"] if page["sha256"]
    ]
    folder = next(service.config.layout.outputs.glob(f"*/*/{job}"))
    before = {page["filename"]: (folder / page["filename"]).stat().st_mtime_ns for page in done}
    body = {"inputPath": "incoming/long.zip", "inputType": "zip"}
    state = strict_state(client.call("POST", f"/jobs/{job}/resume", body)[2])
    assert (state["status"], state["retries"], state["message"]) == ("PENDING", 1, None)
    state = client.wait(job)
    assert state["status"] == "SUCCESS" and len(before) >= 2
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    check_artifact(client.call("GET", f"/jobs/{job}/artifact")[2], state)


def test_a_killed_worker_costs_no_finished_page_and_changes_no_byte(client, service):
    client.call("PUT", "/incoming/kill.zip", volume({f"{n}.png": png(n, 120, 160) for n in range(10)}))
    calm = client.wait(client.submit("kill.zip"))
    job = client.submit("kill.zip")
    state = client.wait(job, lambda state: state["processed"] >= 3)
    done = {p["n"]: p["sha256"] for p in json.loads(client.call("GET", f"/jobs/{job}/pages")[2])["pages"]}
    os.kill(service.dispatcher.workers[0].process.pid, signal.SIGKILL)
    state = client.wait(job)
    assert state["status"] == "SUCCESS" and state["failedPages"] == 0 and len(done) == 10
    data = client.call("GET", f"/jobs/{job}/artifact")[2]
    report = check_artifact(data, state)
    undisturbed = check_artifact(client.call("GET", f"/jobs/{calm['jobId']}/artifact")[2], calm)
    for different in ("jobId", "outputDir"):
        report.pop(different), undisturbed.pop(different)
    assert report == undisturbed


def test_refusals_say_what_is_wrong(client):
    good = {"title": "t", "volume": "1", "input": {"type": "zip", "path": "none.zip"}}
    client.call("PUT", "/incoming/here.zip", volume({"1.png": png(1)}))
    here = good | {"input": {"type": "zip", "path": "here.zip"}}
    table = [
        ("POST", "/jobs", good, 422, "INPUT_MISSING"),
        ("POST", "/jobs", good | {"input": {"type": "zip", "path": "../x"}}, 422, "OUTSIDE_INCOMING"),
        ("POST", "/jobs", here | {"params": {"scale": 2.0}}, 422, "INVALID_FIELDS"),
        ("POST", "/jobs", here | {"params": {"model": "none"}}, 422, "INVALID_FIELDS"),
        ("POST", "/jobs", here | {"title": ""}, 422, "INVALID_FIELDS"),
        ("GET", "/jobs/none", None, 404, "UNKNOWN_JOB"),
        ("GET", "/nothing", None, 404, "NO_ROUTE"),
        ("PATCH", "/jobs", None, 405, "METHOD"),
        ("GET", "/jobs?limit=0", None, 422, "INVALID_FIELDS"),
        ("PUT", "/incoming/con.zip", b"x", 422, "UNSAFE_NAME"),
        ("GET", "/ws/jobs", None, 426, "UPGRADE"),
    ]
    for method, path, body, status, code in table:
        found, headers, text = client.call(method, path, body)
        assert (found, json.loads(text)["code"]) == (status, code), (method, path, body, text)
        assert headers["content-type"] == "application/problem+json" and json.loads(text)["detail"]


def test_an_idempotency_key_makes_one_job_of_two_requests(client):
    client.call("PUT", "/incoming/key.zip", volume({"1.png": png(1)}))
    body = {
        "title": "k",
        "volume": "1",
        "input": {"type": "zip", "path": "key.zip"},
        "params": {"model": MODEL},
    }
    first = client.call("POST", "/jobs", body, Idempotency_Key="a")
    again = client.call("POST", "/jobs", body, Idempotency_Key="a")
    assert (first[0], first[2]) == (202, again[2])
    assert client.call("POST", "/jobs", body | {"title": "other"}, Idempotency_Key="a")[0] == 409
    job = json.loads(first[2])["jobId"]
    client.wait(job)
    assert client.call("DELETE", f"/jobs/{job}")[0] == 204
    assert client.call("GET", f"/jobs/{job}")[0] == 404


def test_pages_before_and_after_can_be_looked_at(client):
    client.call("PUT", "/incoming/look.zip", volume({"1.png": png(1)}))
    client.wait(job := client.submit("look.zip"))
    status, headers, data = client.call("GET", f"/jobs/{job}/pages/1/before")
    assert (status, headers["content-type"], data) == (200, "image/png", png(1))
    for side in ("before", "after"):
        status, headers, data = client.call("GET", f"/jobs/{job}/pages/1/{side}?w=16")
        assert (status, headers["content-type"], data[:2]) == (200, "image/jpeg", b"\xff\xd8"), data
    client.call("PUT", "/incoming/look.zip", volume({"1.png": png(2)}))
    assert client.call("GET", f"/jobs/{job}/pages/1/before")[0] == 410


def test_the_service_tells_of_its_models_devices_and_itself(client):
    deadline = time.monotonic() + 60
    while not (found := json.loads(client.call("GET", "/models")[2]))["probed"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    names = {model["name"]: model for model in found["models"]}
    for name in ("RealESRGAN_x4plus_anime_6B", MODEL, "RealESRGAN_x4plus"):
        assert names[name]["available"] and names[name]["source"] == "wheel" and names[name]["scale"] == 4
    devices = json.loads(client.call("GET", "/devices")[2])["devices"]
    assert "cpu" in [device["device"] for device in devices]
    health = json.loads(client.call("GET", "/health")[2])
    assert (health["status"], health["default_model"]) == ("ok", "RealESRGAN_x4plus_anime_6B")
    assert b'reichan_jobs{state="SUCCESS"}' in client.call("GET", "/metrics")[2]
    paths = json.loads(client.call("GET", "/openapi.json")[2])["paths"]
    assert {route.path.replace("...", "") for route in routes.ROUTES} == set(paths)


def test_foreign_hosts_and_origins_are_refused(client):
    assert client.call("GET", "/health", Host="evil.example")[0] == 421
    body = {"title": "t", "volume": "1", "input": {"type": "zip", "path": "x.zip"}}
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        status, headers, _ = client.call("POST", "/jobs", body, Origin=origin)
        assert status == 403 and "access-control-allow-origin" not in headers
    for origin in settings.TAURI_ORIGINS:
        status, headers, _ = client.call(
            "OPTIONS", "/jobs", Origin=origin, Access_Control_Request_Method="POST"
        )
        assert (status, headers["access-control-allow-origin"], headers["vary"]) == (204, origin, "Origin")


def test_a_token_is_asked_for_and_a_cookie_stands_for_it(tmp_path):
    with server.Service(settings.Config(storage_root=tmp_path, port=0, token="secret-token")) as running:
        client = Client(running.url)
        assert client.call("GET", "/health")[0] == 200
        refused = {
            client.call("GET", "/jobs", **extra)[2] for extra in ({}, {"Authorization": "Bearer wrong"})
        }
        assert len(refused) == 1 and json.loads(refused.pop())["status"] == 401
        status, headers, _ = client.call("POST", "/session", Authorization="Bearer secret-token")
        cookie = headers["set-cookie"].split(";")[0]
        assert (
            status == 204
            and "secret-token" not in cookie
            and "HttpOnly; SameSite=Strict" in headers["set-cookie"]
        )
        assert client.call("GET", "/jobs", Cookie=cookie)[0] == 200


def test_bound_to_the_network_the_service_makes_a_token(tmp_path):
    with server.Service(settings.Config(storage_root=tmp_path, host="0.0.0.0", port=0)) as running:
        token = (tmp_path / "token").read_text().strip()
        assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
        assert Client(running.url).call("GET", "/jobs")[0] == 401
        assert Client(running.url).call("GET", "/jobs", Authorization=f"Bearer {token}")[0] == 200


def test_an_unknown_job_closes_the_websocket_with_4404(client):
    with connect(f"ws://{client.host}/ws/jobs/none") as line:
        with pytest.raises(ConnectionClosedError):
            line.recv(10)
        assert line.close_code == 4404


def start(root: Path) -> tuple[subprocess.Popen[str], Client]:
    """A service process of its own."""
    command = [sys.executable, str(ROOT / "server.py"), "--port", "0", "--storage-root", str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "http://" in line, line
    return process, Client(line.split()[2])


def test_importing_the_server_loads_no_torch():
    code = "import server, sys; sys.exit(bool({'torch', 'cv2', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_sigterm_ends_it_and_a_second_service_is_refused_the_same_root(tmp_path):
    process, client = start(tmp_path)
    try:
        command = [sys.executable, str(ROOT / "server.py"), "--port", "0", "--storage-root", str(tmp_path)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert second.returncode == 2 and "another service" in second.stderr
        assert client.call("GET", "/health")[0] == 200
        process.terminate()
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()


def test_two_services_in_one_process_know_nothing_of_each_other(tmp_path, client):
    with server.Service(settings.Config(storage_root=tmp_path, port=0)) as other:
        client.call("PUT", "/incoming/mine.zip", volume({"1.png": png(1)}))
        job = client.submit("mine.zip")
        assert Client(other.url).call("GET", f"/jobs/{job}")[0] == 404
        assert json.loads(Client(other.url).call("GET", "/jobs")[2]) == {"jobs": [], "nextCursor": None}
    assert client.wait(job)["status"] == "SUCCESS"


def test_the_demo_prints_an_artifact_and_its_hash(tmp_path):
    command = [sys.executable, "-u", str(ROOT / "server.py"), "--demo", "--port", "0", "--storage-root"]
    process = subprocess.Popen(
        [*command, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        printed = ""
        while "still serving" not in printed and (line := process.stdout.readline()):
            printed += line
        path = printed.split("artifact  ")[1].splitlines()[0]
        digest = printed.split("sha256    ")[1].split()[0]
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
        with zipfile.ZipFile(path) as archive:
            assert archive.namelist() == ["artifact-report.json", *(f"00{n}.jpg" for n in range(4))]
        process.terminate()
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
