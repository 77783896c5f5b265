"""sandbox.py: what a worker can't do any more, in processes of their own and in a real worker."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import faults
import pytest
from client import Client
from helpers import require
from serving import png, volume

import server
import settings
from files import sandbox

HERE = Path(server.__file__).parent
LINUX = sys.platform.startswith("linux") and platform.machine() in sandbox.MACHINES

# Runs in a child: what each attempt gives, as a name of errno or "ok".
ATTEMPTS = """
import ctypes, errno, json, os, platform, resource, socket, subprocess, sys, threading
from files import sandbox
libc = ctypes.CDLL(None, use_errno=True)
def opened(family, kind=socket.SOCK_STREAM):
    try:
        socket.socket(family, kind).close()
        return "ok"
    except OSError as error:
        return errno.errorcode[error.errno]
def called(name):
    number = sandbox.REFUSED[name][platform.machine() == "aarch64"]
    arguments = [ctypes.c_long(-1)] * 6
    done = libc.syscall(ctypes.c_long(number), *arguments)
    return "ok" if done >= 0 else errno.errorcode[ctypes.get_errno()]
def attempts():
    found = {str(family): opened(family) for family in (2, 10, 17, 40)}
    found["datagram"] = opened(socket.AF_INET, socket.SOCK_DGRAM)
    found["unix"] = opened(socket.AF_UNIX)
    found["netlink"] = opened(socket.AF_NETLINK, socket.SOCK_RAW)
    socket.socketpair()
    return found
if sys.argv[1] == "elsewhere":
    sys.platform = "darwin"
if os.getuid() == 0 and "nobody" in sys.argv:
    os.setresuid(65534, 65534, 65534)
told, go = {}, threading.Event()
def early():
    go.wait()
    told["early thread"] = attempts()
thread = threading.Thread(target=early, daemon=True)
thread.start()
told["dropped"] = sandbox.drop_rights()
go.set()
thread.join()
told["main"] = attempts()
if sys.argv[1] == "plain":
    told["calls"] = {name: called(name) for name in sandbox.REFUSED if name not in ("iopl", "ioperm")}
    told["file"] = open("/proc/self/maps").read(1) != ""
    command = ["/bin/sh", "-c", "cat /proc/self/status; ulimit -c"]
    told["child"] = subprocess.run(command, capture_output=True, text=True).stdout
print(json.dumps(told))
"""
REFUSED = {"2": "EPERM", "10": "EPERM", "17": "EPERM", "40": "EPERM", "datagram": "EPERM"}
LOCAL = {"unix": "ok", "netlink": "ok"}


def attempt(*arguments: str) -> dict:
    require(LINUX, "only Linux on x86-64 and ARM64 has this filter")
    command = [sys.executable, "-c", ATTEMPTS, *arguments]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("user", ["nobody", "as I am"])
def test_dropped_rights_are_gone_in_every_thread_and_child(user):
    told = attempt("plain", user)
    assert told["dropped"] and told["file"]
    assert told["main"] == told["early thread"] == REFUSED | LOCAL
    assert told["calls"] == dict.fromkeys(told["calls"], "EPERM") and len(told["calls"]) > 30
    assert re.search(r"NoNewPrivs:\s+1", told["child"]) and re.search(r"Seccomp:\s+2", told["child"])
    assert told["child"].splitlines()[-1] == "0"


def test_elsewhere_nothing_happens():
    told = attempt("elsewhere")
    assert (told["dropped"], told["main"]["2"]) == (False, "ok")


@pytest.mark.parametrize("machine", ["riscv64", platform.machine()])
def test_what_can_t_be_dropped_is_logged_and_no_error(monkeypatch, caplog, machine):
    def refused(machine: str) -> None:
        sandbox.filter_program(machine)
        raise OSError(22, "the filter was refused")

    monkeypatch.setattr(sandbox, "_install", refused)
    monkeypatch.setattr(sandbox.platform, "machine", lambda: machine)
    monkeypatch.setattr(sandbox.sys, "platform", "linux")
    import resource

    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        assert sandbox.drop_rights() is False
    assert "keeps its rights" in caplog.text


@pytest.mark.parametrize("machine", sandbox.MACHINES)
def test_a_program_ends_in_an_answer_and_no_jump_leaves_it(machine):
    steps = sandbox.filter_program(machine)
    count = len(steps) // 8
    assert len(steps) % 8 == 0 and count < 4096  # BPF_MAXINSNS
    for at in range(count):
        code, if_true, if_false = steps[8 * at], steps[8 * at + 2], steps[8 * at + 3]
        assert code in (sandbox.LOAD, sandbox.EQUAL, sandbox.AT_LEAST, sandbox.RETURN)
        assert at + 1 + max(if_true, if_false) < count or code == sandbox.RETURN


@pytest.mark.parametrize("on", [True, False])
def test_a_real_worker_has_no_network_and_computes_its_pages(tmp_path, monkeypatch, on):
    require(LINUX, "only Linux on x86-64 and ARM64 has this filter")
    monkeypatch.setenv("FAULTS", str(tmp_path))
    config = settings.Config(storage_root=tmp_path / "root", port=0, sandbox=on)
    with server.Service(config, faults.prying) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume({"1.png": png(), "2.png": png(shade=9)}))
        states, _ = client.watch(client.submit("v.zip"))
        assert (states[-1].status, states[-1].failed_pages) == ("SUCCESS", 0)
        pid = service.dispatcher.workers[0].process.pid
        threads = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    found = {re.search(r"Seccomp:\s+(\d)", text)[1] for text in threads}
    assert {path.name for path in tmp_path.iterdir()} - {"root"} == {"EPERM" if on else "socket"}
    assert found == {"2" if on else Path("/proc/self/status").read_text().split("Seccomp:")[1].split()[0]}
    assert len(threads) > 3 and os.getpid() != pid
