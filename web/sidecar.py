"""The service as a child of another program: what it tells its parent, and when it ends with it.

Map: take_stdout, ready_line - call_at_end_of_stdin
Rule: a parent, however it dies, closes its end of our stdin; that is all we rely on, on any system.
Runs in: main; a thread that does nothing but wait for the end of stdin.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable
from typing import TextIO

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


def call_at_end_of_stdin(ended: Callable[[], None]) -> None:
    """Call `ended` from a thread once stdin is at its end. Raises OSError where there is no stdin."""
    try:
        stdin = os.dup(0)
    except OSError as error:
        raise OSError("--exit-with-stdin takes a stdin that its parent holds open: a pipe") from error
    # On Windows a child that inherits a pipe which is being read hangs at its start; on all systems a
    # worker has no business with our parent.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(stdin, 4096):
                pass
        log.info("stdin is at its end, and so the service ends")
        ended()

    threading.Thread(target=wait, name="stdin", daemon=True).start()
