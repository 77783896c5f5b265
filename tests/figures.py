"""Print the figures that the README quotes; asserts nothing, since machines differ.

    python tests/figures.py [--pages 300]

Start: from the process's start to the first 200 of /health, and the idle process's memory.
Memory: resident size of service and worker while a volume of small pages runs through.
Linux only (reads /proc); uses a storage root of its own and removes it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kills import workers_of

ROOT = Path(__file__).resolve().parents[1]


def rss_mb(pid: int) -> float:
    """Resident memory of a process in MB, 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def start_service(folder: str) -> tuple[subprocess.Popen[str], str, float]:
    """(process, url, seconds until /health answered)."""
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "server.py"), "--port", "0", "--storage-root", folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    url = re.search(r"http://\S+", process.stdout.readline())
    assert url is not None, "the service did not start"
    call(url[0] + "/health")
    return process, url[0], time.perf_counter() - started


def call(url: str, method: str = "GET", data: bytes | None = None) -> Any:
    """One request, its JSON."""
    media = "application/json" if method == "POST" else "application/octet-stream"
    request = urllib.request.Request(url, data, {"Content-Type": media}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def small_page(n: int) -> bytes:
    """A grey PNG of 48x64 pixels, drawn without any library."""
    rows = b"".join(b"\0" + bytes((x * n + y * 7) % 256 for x in range(48)) for y in range(64))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 48, 64, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    made = b"\x89PNG\r\n\x1a\n"
    for kind, data in [*chunks, (b"IEND", b"")]:
        made += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return made


def measure_start(repeats: int) -> None:
    """Readiness and idle memory, medians."""
    seconds, memory = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            process, _, ready_s = start_service(folder)
            try:
                time.sleep(1)
                seconds.append(ready_s)
                memory.append(rss_mb(process.pid))
            finally:
                process.terminate()
                process.wait(20)
    print(
        f"start: ready after {statistics.median(seconds):.2f} s "
        f"({min(seconds):.2f}-{max(seconds):.2f}, {repeats} starts), "
        f"idle process {statistics.median(memory):.0f} MB"
    )


def measure_volume(pages: int) -> None:
    """Memory at each tenth of a volume, in both processes."""
    with tempfile.TemporaryDirectory() as folder:
        process, url, _ = start_service(folder)
        try:
            archive = Path(folder, "pages.zip")
            with zipfile.ZipFile(archive, "w") as volume:
                for n in range(pages):
                    volume.writestr(f"{n:05d}.png", small_page(n))
            call(url + "/incoming/pages.zip", "PUT", archive.read_bytes())
            body = {"title": "Figures", "volume": "1", "input": {"type": "zip", "path": "pages.zip"}}
            body["params"] = {"model": "realesr-animevideov3"}  # type: ignore[assignment]
            job = call(url + "/jobs", "POST", json.dumps(body).encode())["jobId"]
            watch_volume(process.pid, f"{url}/jobs/{job}", pages)
        finally:
            process.terminate()
            process.wait(20)


def watch_volume(pid: int, job_url: str, pages: int) -> None:
    """Print memory as the volume goes on, then how far it rose after the first tenth."""
    step, seen, state = max(1, pages // 10), [], {"status": "PENDING"}
    while state["status"] in ("PENDING", "RUNNING"):
        state = call(job_url)
        if state["processed"] >= step * (len(seen) + 1):
            worker = max((rss_mb(child) for child in workers_of(pid)), default=0.0)
            seen.append((state["processed"], rss_mb(pid), worker))
            print(f"  page {seen[-1][0]:5d}: service {seen[-1][1]:4.0f} MB, worker {seen[-1][2]:5.0f} MB")
        time.sleep(0.05)
    service, worker = (seen[-1][i] - seen[0][i] for i in (1, 2))
    print(
        f"volume of {pages} pages: {state['status']}; from page {seen[0][0]} to the end "
        f"the service grew by {service:+.1f} MB, the worker by {worker:+.1f} MB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=300)
    parser.add_argument("--starts", type=int, default=7)
    chosen = parser.parse_args()
    measure_start(chosen.starts)
    measure_volume(chosen.pages)
