"""Workers forked from a process that has loaded torch, in place of spawned ones that load it themselves.

Loading it takes two seconds of a processor, of some two hundred workers a third of what the suite cost. So
come those of services that a test has in its own process; those of services that it starts as commands
(`python server.py`) are spawned, as everybody's are.
"""

from __future__ import annotations

import os
import sys
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from work import workers


class Process(ForkServerProcess):
    """One that sees the environment of the moment, as a spawned one does."""

    def __init__(self, *arguments: Any, **facts: Any) -> None:
        super().__init__(*arguments, **facts)
        self.environ = dict(os.environ)

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self.environ)
        super().run()


class Context(ForkServerContext):
    """multiprocessing's own, of such processes."""

    Process = Process


def settle() -> None:
    """For all workers of this process from here on. Linux alone: elsewhere they are spawned."""
    if sys.platform == "linux":
        context = Context()
        context.set_forkserver_preload(["infer"])
        workers.CONTEXT = context
