"""The service and what started it: what it tells a parent, when it ends with it, a console's clicks.

Map: take_stdout, ready_line - let_clicks_be - call_at_end_of_stdin
Rule: a parent, however it dies, closes its end of our stdin; that is all we rely on, on any system.
Runs in: main; a thread that does nothing but wait for the end of stdin.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import TextIO

from files import sandbox

log = logging.getLogger("sidecar")


def take_stdout() -> TextIO:
    """stdout for the caller alone: what anyone else prints, child processes included, goes to stderr."""
    alone = os.fdopen(os.dup(1), "w", encoding="ascii", newline="\n")
    with contextlib.suppress(OSError):  # there may be no stderr
        os.dup2(2, 1)
    return alone


def ready_line(url: str, token: str | None) -> str:
    """One line of JSON: where the service is, what to send as bearer token (null: none), its process."""
    return json.dumps({"url": url, "token": token, "pid": os.getpid()})


def let_clicks_be() -> None:
    """On Windows a click into the console holds up whoever writes there, and so all work, until a key is
    pressed (QuickEdit): not in this one."""
    if sys.platform == "win32":
        stdin, quick_edit, extended = -10, 0x40, 0x80
        kernel, mode = ctypes.windll.kernel32, ctypes.c_uint32()
        console = kernel.GetStdHandle(stdin)
        if kernel.GetConsoleMode(console, ctypes.byref(mode)):
            kernel.SetConsoleMode(console, (mode.value & ~quick_edit) | extended)


def call_at_end_of_stdin(ended: Callable[[], None]) -> None:
    """Call `ended` from a thread once stdin is at its end. Raises OSError where there is no stdin."""
    try:
        stdin = sandbox.take_stdin()  # nor has a worker any business with our parent
    except OSError as error:
        raise OSError("--exit-with-stdin takes a stdin that its parent holds open: a pipe") from error

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(stdin, 4096):
                pass
        log.info("stdin is at its end, and so the service ends")
        ended()

    threading.Thread(target=wait, name="stdin", daemon=True).start()
