"""Worker entries that break the real worker in one way each. For tests only.

What a page does is told by its width, so that no name or switch of the product is needed.
Entries must be importable by name: the worker process is spawned. FAULTS names a folder
in which they note what they did.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from pathlib import Path
from typing import Any

KILLER, CLUMSY, STOPPER, SLEEPER, WAITER = 40, 41, 42, 43, 44  # page widths in pixels


def note(what: str) -> int:
    """Write down that something happened; how often it has now."""
    path = Path(os.environ["FAULTS"], what)
    with path.open("a") as log:
        log.write("x")
    return path.stat().st_size


def by_width(conn: Any, choice: Any, slot: int) -> None:
    """The real worker, whose engine does what the page's width asks for."""
    import infer
    from engine import upscaling

    upscale = upscaling.NativeEngine.upscale

    def faulty(self: Any, pixels: Any, *rest: Any) -> Any:
        width = pixels.shape[1]
        if width == KILLER:
            note("killer")
            os.kill(os.getpid(), signal.SIGKILL)
        if width == CLUMSY and note("clumsy") == 1:
            raise ValueError("injected")
        if width == STOPPER and note("stopper") == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if width == SLEEPER and note("sleeper") == 1:
            time.sleep(600)
        return upscale(self, pixels, *rest)

    upscaling.NativeEngine.upscale = faulty  # type: ignore[method-assign]
    infer.FIRST_STEP_LIMIT_S = 6.0  # else a hang would be waited for ten minutes
    infer.worker_main(conn, choice, slot)


def deadly_decoder(conn: Any, choice: Any, slot: int) -> None:
    """The real worker, whose decoder dies of pages of a width, whatever they are decoded for."""
    import infer
    from engine import pages

    decode = pages._decode_upright

    def dying(data: bytes) -> Any:
        if pages.header_size(data)[0] == KILLER:
            note("killer")
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(data)

    pages._decode_upright = dying
    infer.worker_main(conn, choice, slot)


def full_disk(conn: Any, choice: Any, slot: int) -> None:
    """The real worker on a disk that is full until someone makes room."""
    import infer
    import storage

    write_whole = storage.write_whole

    def failing(target: Path, data: bytes) -> str:
        if not Path(os.environ["FAULTS"], "room").exists():
            raise OSError(28, "No space left on device")
        return write_whole(target, data)

    storage.write_whole = failing
    infer.worker_main(conn, choice, slot)


def cannot_boot(conn: Any, choice: Any, slot: int) -> None:
    """A worker whose imports fail."""
    from messages import BootFailed

    note("boots")
    conn.send(BootFailed("ImportError: no torch here (injected)"))
    raise SystemExit(3)


def prying(conn: Any, choice: Any, slot: int) -> None:
    """The real worker, in which the network code tries to reach another machine."""
    import errno
    import socket

    import infer
    from engine import upscaling

    upscale = upscaling.NativeEngine.upscale

    def prying(self: Any, *rest: Any) -> Any:
        try:
            socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
            note("socket")
        except OSError as error:
            note(errno.errorcode[error.errno or 0])
        return upscale(self, *rest)

    upscaling.NativeEngine.upscale = prying  # type: ignore[method-assign]
    infer.worker_main(conn, choice, slot)


def filling(conn: Any, choice: Any, slot: int) -> None:
    """The real worker, whose disk something fills to the last byte, once, just before a step."""
    import infer

    name, _, step = os.environ["FILL"].rpartition(".")
    module = importlib.import_module(name)
    real = getattr(module, step)

    def late(*arguments: Any, **named: Any) -> Any:
        if not Path(os.environ["FAULTS"], "filled").exists():
            note("filled")
            with open(os.environ["FILLER"], "wb", buffering=0) as filler:
                for size in (65536, 4096, 1):
                    try:
                        while filler.write(bytes(size)) == size:
                            pass
                    except OSError:
                        continue
        return real(*arguments, **named)

    setattr(module, step, late)
    infer.worker_main(conn, choice, slot)


def dying_amid_the_zip(conn: Any, choice: Any, slot: int) -> None:
    """The real worker, which is killed each time when it has packed one page of two."""
    import infer
    from files import artifacts

    packing = artifacts._pack_output

    def dying(archive: Any, outputs: Path, item: Any, n: int | None) -> None:
        if n == 2:
            note("packing")
            os.kill(os.getpid(), signal.SIGKILL)
        packing(archive, outputs, item, n)

    artifacts._pack_output = dying
    infer.worker_main(conn, choice, slot)


def no_room_for_a_cbz(conn: Any, choice: Any, slot: int) -> None:
    """The real worker, which can't write a cbz until someone makes room."""
    import infer
    import storage

    replacing = storage.replacing

    def failing(target: Path, temporary: Path | None = None) -> Any:
        if target.suffix == ".cbz" and not Path(os.environ["FAULTS"], "room").exists():
            raise OSError(28, "No space left on device")
        return replacing(target, temporary)

    storage.replacing = failing
    infer.worker_main(conn, choice, slot)


def losing_its_working_copy(conn: Any, choice: Any, slot: int) -> None:
    """The real worker, whose second staged page vanishes, once, just before it is read."""
    import infer

    decode = infer.Worker._decode

    def late(self: Any, task: Any) -> None:
        if task.n == 2 and note("decoding") == 1:
            task.source.unlink()
        decode(self, task)

    infer.Worker._decode = late  # type: ignore[method-assign]
    infer.worker_main(conn, choice, slot)


def with_leave(conn: Any, choice: Any, slot: int) -> None:
    """The real worker, in which pages of the width WAITER wait until there is a file `go`."""
    import infer
    from engine import upscaling

    upscale = upscaling.NativeEngine.upscale

    def patient(self: Any, pixels: Any, *rest: Any) -> Any:
        while pixels.shape[1] == WAITER and not Path(os.environ["FAULTS"], "go").exists():
            time.sleep(0.02)
        return upscale(self, pixels, *rest)

    upscaling.NativeEngine.upscale = patient  # type: ignore[method-assign]
    infer.worker_main(conn, choice, slot)


def without_spandrel(conn: Any, choice: Any, slot: int) -> None:
    """The real worker where the extra models is not installed."""
    import sys

    import infer

    sys.modules["spandrel"] = None  # type: ignore[assignment]
    infer.worker_main(conn, choice, slot)


def two_devices(conn: Any, choice: Any, slot: int) -> None:
    """The real worker, on a machine that says it has two processors; pages wait for "go"."""
    from dataclasses import replace

    import infer
    from engine import devices, upscaling

    upscale = upscaling.NativeEngine.upscale

    def waiting(self: Any, *rest: Any) -> Any:
        note(f"page on {slot}")
        while not Path(os.environ["FAULTS"], "go").exists():
            time.sleep(0.02)
        return upscale(self, *rest)

    upscaling.NativeEngine.upscale = waiting  # type: ignore[method-assign]
    devices.KINDS["cpu"] = replace(devices.KINDS["cpu"], usable=lambda: range(2))
    infer.worker_main(conn, choice, slot)


def held_up(conn: Any, choice: Any, slot: int) -> None:
    """The real worker, whose pages wait before they are decoded: for "go", or for a "pass" of their own."""
    import functools

    import infer
    from engine import upscaling

    decode = infer.Worker._decode

    @functools.wraps(decode)
    def waiting(self: Any, task: Any) -> None:
        folder = Path(os.environ["FAULTS"])
        while not (folder / "go").exists() and not any(map(taken, folder.glob("pass*"))):
            if (task.job_id, task.attempt) in self.cancelled:
                raise upscaling.Cancelled
            time.sleep(0.02)
        decode(self, task)

    infer.Worker._decode = waiting  # type: ignore[method-assign]
    infer.worker_main(conn, choice, slot)


def held_up_on_unlike_machines(conn: Any, choice: Any, slot: int) -> None:
    """held_up, where each worker says that its machine is another one."""
    from engine import devices

    describe, which = devices.describe_machine, note("machine")
    devices.describe_machine = lambda *of: f"{describe(*of)}, machine {which}"
    held_up(conn, choice, slot)


def taken(path: Path) -> bool:
    """Whether this process, and no other, took the file away."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
