"""Copyparty itself, with our incoming/ mounted in it at /incoming, and our hook."""

from __future__ import annotations

import base64
import hashlib
import http.server
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from client import Client, submission
from helpers import require
from serving import png, until, volume

import copyparty_hook
import server
import settings
from messages import Limits
from work import uploads

PASSWORD = "a password of Copyparty's"
# Copyparty takes its password in base64 for a bearer token, so that one token may do for both services.
TOKEN = base64.b64encode(PASSWORD.encode()).decode()
HOOK = Path(copyparty_hook.__file__)
CHUNK_BYTES = 1 << 20  # of Copyparty's resumable uploads of this size
COMPACT = {"model": "realesr-animevideov3"}


@dataclass
class Party:
    """Both services over one incoming/, and a client of each."""

    service: server.Service
    client: Client  # ours
    sender: Client  # Copyparty's
    incoming: Path

    def jobs(self) -> list[Any]:
        return self.client.call("GET", "/jobs").json()["jobs"]

    def finished(self, path: str) -> dict[str, Any]:
        """The one job of this input, once it is over."""

        def over() -> Any:
            found = [job for job in self.jobs() if self.service.table.get(job["jobId"]).input_path == path]
            assert len(found) <= 1
            return found if found and found[0]["status"] in ("SUCCESS", "FAILED") else None

        state: dict[str, Any] = until(over, 60)[0]
        assert state["status"] == "SUCCESS", state
        return state

    def pages(self, job: str) -> list[str]:
        """What the artifact holds, after its hash was checked."""
        data = self.client.call("GET", f"/jobs/{job}/artifact").body
        assert hashlib.sha256(data).hexdigest() == self.client.state(job).artifact_hash
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        return sorted(name for name in names if name != "artifact-report.json")


@pytest.fixture(scope="module")
def party(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Party]:
    require(importlib.util.find_spec("copyparty"), "copyparty is not installed")
    root = tmp_path_factory.mktemp("party")
    with server.Service(settings.Config(storage_root=root, port=0, token=TOKEN)) as service:
        incoming = service.config.layout.incoming
        with socket.create_server(("127.0.0.1", 0)) as line:  # Copyparty itself takes no port 0
            port = line.getsockname()[1]
        hooks = f"c,xau=f,j,{HOOK}:c,xiu=i1,j,{HOOK}"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "copyparty", "-i", "127.0.0.1", "-p", str(port), "-q", "--http-only"),
                *("-a", f"reichan:{PASSWORD}", "-v", f"{incoming}:/incoming:rwd,reichan:c,e2d,daw:{hooks}"),
            ],
            env=os.environ
            | {
                "REICHAN_URL": service.url, "REICHAN_TOKEN": TOKEN, "XDG_CONFIG_HOME": str(root / "config"),
                "REICHAN_WATCH_PARAMS": json.dumps(COMPACT),
            },
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            sender = Client(f"http://127.0.0.1:{port}", TOKEN)
            until(lambda: process.poll() is not None or answers(sender), 30)
            yield Party(service, Client(service.url, TOKEN), sender, incoming)
        finally:
            process.terminate()
            process.wait(15)


def answers(client: Client) -> bool:
    try:
        return client.call("GET", "/incoming/").status == 200
    except OSError:
        return False


def test_a_volume_put_as_the_desktop_client_does_is_submitted_and_finished(party):
    """Under a name that the hook leaves alone: the client submits by itself."""
    data = volume({"1.png": png(16, 16), "sub/2.png": png(16, 16, 1)})
    pieces = (data[at : at + 100] for at in range(0, len(data), 100))
    assert party.sender.upload("volume.bin", pieces, title="作品名").status == 201
    assert (party.incoming / "volume.bin").read_bytes() == data
    accepted = party.client.call("POST", "/jobs", submission("incoming/volume.bin"))
    job = accepted.json()["jobId"]
    assert party.client.watch(job)[0][-1].status == "SUCCESS"
    assert party.pages(job) == ["1.jpg", "sub/2.jpg"]


def test_who_has_no_token_uploads_nothing(party):
    for token in (None, PASSWORD, TOKEN[::-1]):
        reply = Client(f"http://{party.sender.host}", token).upload("stranger.zip", [b"x"])
        assert reply.status in (401, 403)
    assert not (party.incoming / "stranger.zip").exists()


def test_the_hook_submits_a_finished_archive_by_itself_and_once(party):
    data = volume({"1.png": png(16, 16, 2)})
    assert party.sender.upload("%E4%BD%9C%E5%93%81%E5%90%8D/03.cbz", [data]).status == 201
    state = party.finished("作品名/03.cbz")
    assert state["metadata"] == {"title": "作品名", "volume": "03"}
    assert state["params"]["model"] == COMPACT["model"]
    assert party.pages(state["jobId"]) == ["1.jpg"]
    # The same once more: Copyparty calls the hook again, and the service knows the content.
    assert party.sender.upload("%E4%BD%9C%E5%93%81%E5%90%8D/03.cbz", [data]).status == 201
    assert run_hook(party, "作品名/03.cbz") == 0
    assert party.finished("作品名/03.cbz")["jobId"] == state["jobId"]


def run_hook(party: Party, path: str, **environ: str) -> int:
    """The hook as Copyparty starts it after an upload; its exit status."""
    told = {"ap": str(party.incoming / path), "vp": f"incoming/{path}"}
    known = {"REICHAN_URL": party.service.url, "REICHAN_TOKEN": TOKEN}
    command = [sys.executable, str(HOOK), json.dumps(told)]
    environment = os.environ | known | {"REICHAN_WATCH_PARAMS": json.dumps(COMPACT)} | environ
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60).returncode


class Resumable:
    """One file on its way by Copyparty's protocol for resumable uploads (its docs/devnotes.md)."""

    def __init__(self, sender: Client, folder: str, name: str, data: bytes) -> None:
        self.sender, self.folder = sender, folder
        self.chunks = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
        self.hashes = [
            base64.urlsafe_b64encode(hashlib.sha512(chunk).digest()[:33]).decode() for chunk in self.chunks
        ]
        self.about = {"name": name, "size": len(data), "lmod": 1_000_000_000, "hash": self.hashes}

    def handshake(self) -> dict[str, Any]:
        reply = self.sender.call("POST", f"/incoming/{self.folder}", dict(self.about))
        assert reply.status == 200, reply.body
        told: dict[str, Any] = json.loads(reply.body)
        return told

    def send(self, n: int, wark: str) -> None:
        headers = {
            "X-Up2k-Hash": self.hashes[n], "X-Up2k-Wark": wark, "Content-Type": "application/octet-stream",
        }  # fmt: skip
        assert self.sender.call("POST", f"/incoming/{self.folder}", self.chunks[n], headers).status == 200


def padded(page: bytes) -> bytes:
    """A page large enough to be sent in two chunks; what follows its end says nothing."""
    return page + bytes(CHUNK_BYTES)


def test_an_interrupted_upload_is_no_page_and_is_submitted_once_it_was_resumed(party):
    (party.incoming / "R v01").mkdir()
    (party.incoming / "R v01/1.png").write_bytes(png(16, 16, 3))
    page = Resumable(party.sender, "R v01".replace(" ", "%20"), "2.png", padded(png(16, 16, 4)))
    told = page.handshake()
    page.send(0, told["wark"])
    left = sorted(path.name for path in (party.incoming / "R v01").iterdir())
    assert left == ["1.png", "2.png", "2.png.PARTIAL"]  # of which 2.png is empty: the name is reserved
    [upload] = [one for one in uploads.find_uploads(party.incoming, Limits()) if one.path == "R v01"]
    assert upload.unfinished == "2.png.PARTIAL"
    # Submitted by hand all the same, the unfinished page is none: not even one that could not be read.
    job = party.client.submit("R v01", kind="folder", title="by hand")
    assert party.client.watch(job)[0][-1].status == "SUCCESS"
    assert party.pages(job) == ["1.jpg"]
    assert party.client.call("GET", f"/jobs/{job}").json()["leftOut"] == 2
    assert party.client.call("DELETE", f"/jobs/{job}").status == 204
    # The sender comes back, is told what is missing, and sends that.
    assert page.handshake()["hash"] == [page.hashes[1]]
    page.send(1, told["wark"])
    state = party.finished("R v01")
    assert state["metadata"] == {"title": "R", "volume": "01"}
    assert party.pages(state["jobId"]) == ["1.jpg", "2.jpg"]


def test_a_broken_off_put_is_left_under_its_name_and_becomes_no_job(party):
    """Copyparty writes a plain PUT under its final name at once: only its content tells."""
    data = volume({"1.png": png(64, 64)})
    with socket.create_connection(party.sender.host.split(":")) as line:
        head = f"PUT /incoming/broken.zip HTTP/1.1\r\nHost: {party.sender.host}\r\n"
        head += f"Authorization: Bearer {TOKEN}\r\nContent-Length: {len(data)}\r\n\r\n"
        line.sendall(head.encode() + data[:-60])
        until((party.incoming / "broken.zip").exists)
    # By the time that a later upload has its job, a hook that was called for this one has ended too.
    assert party.sender.upload("later.zip", [volume({"1.png": png(16, 16, 5)})]).status == 201
    party.finished("later.zip")
    assert "broken" not in [job["metadata"]["title"] for job in party.jobs()]
    assert run_hook(party, "broken.zip") == 0  # were it called: submitted, and the job says what is wrong
    [job] = [job for job in party.jobs() if job["metadata"]["title"] == "broken"]
    assert "cut on the way" in party.client.watch(job["jobId"])[0][-1].last_error


def test_what_copyparty_keeps_beside_the_uploads_is_nobodys_page(party):
    kept = [path for path in (party.incoming / ".hist").rglob("*") if path.is_file()]
    assert any(path.name.startswith("up2k.") for path in kept)
    found = [upload.path for upload in uploads.find_uploads(party.incoming, Limits())]
    assert not [path for path in found if path.startswith(".hist")]


def test_a_hook_that_can_do_nothing_says_why_by_its_status(party, monkeypatch):
    (party.incoming / "hook.zip").write_bytes(volume({"1.png": png()}))
    assert run_hook(party, "hook.zip", REICHAN_TOKEN="wrong-token") == 1
    assert run_hook(party, "not-there.zip") == 0
    assert run_hook(party, "page.png") == 0  # one page is no volume
    monkeypatch.setattr(copyparty_hook.time, "sleep", lambda _s: None)
    told = json.dumps({"ap": str(party.incoming / "hook.zip"), "vp": "incoming/hook.zip"})
    with socket.create_server(("127.0.0.1", 0)) as line:
        nobody = f"http://127.0.0.1:{line.getsockname()[1]}"
    assert copyparty_hook.main([told], {"REICHAN_URL": nobody}) == 1
    elsewhere = json.dumps({"ap": str(party.incoming / "hook.zip"), "vp": "other/hook.zip"})
    assert copyparty_hook.main([elsewhere], {"REICHAN_URL": nobody}) == 0


def test_the_hook_waits_for_a_service_that_is_starting(party, monkeypatch):
    """Refused twice with 503, then answered."""
    (party.incoming / "late.zip").write_bytes(volume({"1.png": png()}))
    seen: list[dict[str, str]] = []

    class Starting(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(dict(self.headers))
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(202 if len(seen) == 3 else 503)
            body = b'{"jobId": "a"}' if len(seen) == 3 else b"{}"
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(copyparty_hook.time, "sleep", lambda _s: None)
    told = json.dumps({"ap": str(party.incoming / "late.zip"), "vp": "incoming/late.zip"})
    with http.server.HTTPServer(("127.0.0.1", 0), Starting) as starting:
        thread = threading.Thread(target=starting.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{starting.server_port}"
        assert copyparty_hook.main([told], {"REICHAN_URL": url, "REICHAN_TOKEN": "t"}) == 0
        starting.shutdown()
        thread.join()
    assert len(seen) == 3 and len({headers["Idempotency-Key"] for headers in seen}) == 1
    assert seen[0]["Authorization"] == "Bearer t"
