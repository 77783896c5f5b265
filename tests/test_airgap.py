"""No network: a whole job where there is none, and a whole job that asks for none."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from client import Client
from helpers import require
from serving import png, volume

import server

ROOT = Path(server.__file__).parent

# Loaded by every Python process of the service at its start: notes whom it talks to.
WATCH = """
import json, os, sys
def note(event, arguments):
    if event == "import" and arguments[0] == "torch":
        told = "torch"
    elif event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        told = arguments[1] if isinstance(arguments[1], (tuple, type(None))) else "unix"
    elif event.startswith("socket.get") and event != "socket.gethostname":
        told = arguments[0]
    elif event == "urllib.Request":
        told = arguments[0]
    else:
        return
    line = json.dumps([os.getpid(), event, told], default=repr).encode() + b"\\n"
    to = os.open(os.environ["WATCHED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(to, line)
    os.close(to)
sys.addaudithook(note)
"""


def is_local(told: object) -> bool:
    """A Unix socket, or a loopback address as a number: nothing that a resolver is asked for."""
    host = told[0] if isinstance(told, list) else told
    if host in ("unix", None):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def test_a_whole_job_opens_no_socket_but_loopback_and_resolves_no_name(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    log = tmp_path / "watched"
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "WATCHED": str(log)}
    command = [sys.executable, "-u", str(ROOT / "server.py"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--storage-root", str(tmp_path / "root")],
        env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        client = Client(process.stdout.readline().split()[2])
        client.call("PUT", "/incoming/v.zip", volume({"1.png": png(16, 16), "2.png": b"bad"}))
        job = client.submit("v.zip")
        assert client.watch(job)[0][-1].status == "SUCCESS"
        for path in (f"/jobs/{job}/artifact", "/models", "/devices", "/docs", "/", "/metrics"):
            assert client.call("GET", path).status == 200
    finally:
        process.terminate()
        process.wait(15)
        process.stdout.close()
    noted = [json.loads(line) for line in log.read_text().splitlines()]
    workers = {pid for pid, event, told in noted if told == "torch"}
    assert workers and process.pid not in workers  # the worker was watched too
    assert [process.pid, "socket.bind"] in [item[:2] for item in noted]
    assert [item for item in noted if item[1] != "import" and not is_local(item[2])] == []


def test_the_watch_sees_what_it_must(tmp_path):
    """Else the test above could not fail."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    log = tmp_path / "watched"
    code = (
        "import socket, contextlib\n"
        "with contextlib.suppress(OSError): socket.getaddrinfo('name.invalid', 80)\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "with contextlib.suppress(OSError): s.connect(('192.0.2.1', 9))\n"
    )
    environ = os.environ | {"PYTHONPATH": str(tmp_path), "WATCHED": str(log)}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=60)
    noted = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event for _, event, told in noted if not is_local(told)] == [
        "socket.getaddrinfo", "socket.connect",
    ]  # fmt: skip


def test_a_whole_job_runs_where_only_loopback_exists():
    require(shutil.which("unshare") and shutil.which("ip"), "unshare and ip (iproute2) are not there")
    up = ["unshare", "-n", "ip", "link", "set", "lo", "up"]
    able = subprocess.run(up, capture_output=True, check=False)
    require(able.returncode == 0, "a network namespace takes root")
    test = "tests/test_service.py::test_a_strict_client_goes_from_upload_to_a_checked_artifact"
    inside = 'ip link set lo up && exec "$0" -m pytest -q -p no:cacheprovider "$1"'
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", inside, sys.executable, test],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
