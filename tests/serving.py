"""Services and tiny volumes for the tests of the HTTP side. Nothing here loads torch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import socket
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs
import server
import settings
from messages import Params, Plan
from work import submissions

PLAN = Plan("realesr-animevideov3", "0" * 64, "wheel", "cpu", "fp32", "native", 512, 18, 1)
PARAMS = Params(model=PLAN.model)
BOUNDARY = "6c1c3b2e-9f0a-4ce8-8b7e-2d1f0a9d3c11"  # as OkHttp makes them


def png(width: int = 32, height: int = 48, shade: int = 0) -> bytes:
    """A small grey page; another one for each shade."""
    rows = b"".join(b"\0" + bytes((shade + 5 * x + 3 * y) % 256 for x in range(width)) for y in range(height))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def volume(pages: dict[str, bytes]) -> bytes:
    """A zip of these files."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, page in pages.items():
            archive.writestr(name, page)
    return data.getvalue()


def form(page: bytes, name: str = "image") -> bytes:
    """A form as OkHttp's MultipartBody writes Suwayomi's page."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="conversion123.png"\r\n'
    head += f"Content-Type: image/png\r\nContent-Length: {len(page)}\r\n\r\n"
    return head.encode() + page + f"\r\n--{BOUNDARY}--\r\n".encode()


@contextlib.contextmanager
def still(root: Path, **chosen: Any) -> Iterator[server.Service]:
    """A service that answers while nobody works: jobs stay as the test moves them."""
    service = server.Service(settings.Config(storage_root=root, port=0, **chosen))
    service.live.start()
    service.http.start()
    try:
        yield service
    finally:
        service.__exit__()


def queued(service: server.Service, title: str = "t", container: str = "zip") -> jobs.Job:
    """A PENDING job, made without HTTP."""
    layout = service.config.layout
    (layout.incoming / "one.zip").write_bytes(volume({"1.png": png()}))
    wanted = submissions.Submission(title, "1", "zip", "one.zip", jobs.Params(container=container), None)
    return submissions.submit(service.table, layout, wanted, None, "", service.config.limits)


def running(service: server.Service, title: str = "t", container: str = "zip") -> jobs.Job:
    """A job that the test itself claimed; there must be no other PENDING one."""
    job = queued(service, title, container)
    claimed = jobs.claim(service.table, 1000.0)
    assert claimed is not None and claimed.id == job.id
    assert service.table.change(claimed, state=jobs.RUNNING, plan=PLAN, total=1, phase="inferring")
    return service.table.get(job.id)


def finished(service: server.Service, artifact: bytes = b"hello world", container: str = "zip") -> jobs.Job:
    """A job that succeeded, with this artifact on disk."""
    job = running(service, container=container)
    path = service.config.layout.artifact(job.title, job.volume, job.id, container)
    path.write_bytes(artifact)
    digest = hashlib.sha256(artifact).hexdigest()
    facts = {"artifact_hash": digest, "artifact_bytes": len(artifact), "processed": 1}
    return jobs.advance(service.table, job, "finish", 2000.0, **facts)


def until(condition: Callable[[], Any], limit_s: float = 10.0) -> Any:
    """Wait for something to become true; what it became."""
    deadline_s = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "it never became true"
        time.sleep(0.01)
    return found


def dial(port: int) -> socket.socket:
    """A connection to a loopback port."""
    line = socket.create_connection(("127.0.0.1", port), timeout=10)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


def drain(line: socket.socket, limit_s: float = 10.0) -> bytes:
    """Everything until the other side closes. Raises TimeoutError where it doesn't."""
    line.settimeout(limit_s)
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := line.recv(65536):
            data += piece
    return data


def exchange(port: int, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Send, then read until the server closes."""
    with dial(port) as line:
        with contextlib.suppress(OSError):  # it may close while we still talk
            for part in parts:
                line.sendall(part)
                time.sleep(pause_s)
        return drain(line)


def answers(data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """(status, headers in lower case, body) of each answer; all bytes must belong to one."""
    found = []
    while data:
        head, gap, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        assert gap and first.startswith("HTTP/1.1 "), head
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        size = int(headers.get("content-length", "0"))
        found.append((int(first[9:12]), headers, data[:size]))
        data = data[size:]
    return found
