"""How soon a warm worker takes up a page, and how soon a cancelled one is free again.

    python tests/latency.py [--turns 20]

The real service and models, over HTTP and WebSocket on loopback. Prints a table; asserts nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from client import Client
from serving import png, volume

import jobs
import server
import settings

SIX_B = "RealESRGAN_x4plus_anime_6B"


class Stopwatch:
    """When each job's pages began to be dealt, as the job table tells its listeners (a
    WebSocket's watcher is told ten times a second at most)."""

    def __init__(self, service: server.Service) -> None:
        self.client = Client(service.url)
        self.dealt_s: dict[str, float] = {}
        service.table.listeners.append(self._look)

    def _look(self, job: jobs.Job) -> None:
        if job.phase == "inferring":
            self.dealt_s.setdefault(job.id, time.perf_counter())

    def start_s(self) -> float:
        """From a submit to its page, on a worker that has the model."""
        began_s = time.perf_counter()
        job = self.client.submit("small.zip")
        self.client.wait(job)
        return self.dealt_s[job] - began_s

    def cancel_s(self) -> float:
        """From a cancel amid a large page to the page of the job that waits behind it."""
        large = self.client.submit("large.zip", params={"model": SIX_B})
        self.client.wait(large, lambda state: state.phase == "inferring")
        time.sleep(2)
        behind = self.client.submit("small.zip", params={"model": SIX_B})
        began_s = time.perf_counter()
        self.client.call("POST", f"/jobs/{large}/cancel")
        self.client.wait(behind)
        return self.dealt_s[behind] - began_s


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--turns", type=int, default=20)
    turns = parser.parse_args().turns
    with (
        tempfile.TemporaryDirectory() as root,
        server.Service(settings.Config(storage_root=Path(root), port=0)) as service,
    ):
        watch = Stopwatch(service)
        client = watch.client
        client.call("PUT", "/incoming/small.zip", volume({"1.png": png()}))
        client.call("PUT", "/incoming/large.zip", volume({"1.png": png(1200, 1700)}))
        watch.start_s()  # starts the worker, loads the model
        client.wait(client.submit("small.zip", params={"model": SIX_B}))
        print("| what | median ms | worst ms | turns |\n| --- | --- | --- | --- |")
        measures = {"submit to page": watch.start_s, "cancel to next job's page": watch.cancel_s}
        for what, measure in measures.items():
            spent = [1000 * measure() for _ in range(turns)]
            print(f"| {what} | {statistics.median(spent):.0f} | {max(spent):.0f} | {turns} |", flush=True)


if __name__ == "__main__":
    main()
