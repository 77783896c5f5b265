"""How soon a warm worker takes up a page, and how soon a cancelled one is free again.

    python tests/latency.py [--turns 20]

The real service and models, over HTTP and WebSocket on loopback. Prints a table; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_service import Client, png, volume
from websockets.sync.client import connect

import server

COMPACT, SIX_B = "realesr-animevideov3", "RealESRGAN_x4plus_anime_6B"


def first_page_s(client: Client, job: str, since_s: float) -> float:
    """Seconds from `since_s` until a watcher is told that the job's pages are being dealt."""
    with connect(f"ws://{client.host}/ws/jobs/{job}") as line:
        for frame in line:
            if json.loads(frame)["phase"] in ("inferring", "packing", "done"):
                told_s = time.perf_counter()
                break
    client.wait(job)
    return told_s - since_s


def start_s(client: Client) -> float:
    """From a submit to its page, on a worker that has the model."""
    began_s = time.perf_counter()
    return first_page_s(client, client.submit("small.zip", model=COMPACT), began_s)


def cancel_s(client: Client) -> float:
    """From a cancel amid a large page to the page of the job that waits behind it."""
    large = client.submit("large.zip", model=SIX_B)
    client.wait(large, lambda state: state["phase"] == "inferring")
    time.sleep(2)
    behind = client.submit("small.zip", model=SIX_B)
    began_s = time.perf_counter()
    client.call("POST", f"/jobs/{large}/cancel")
    return first_page_s(client, behind, began_s)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--turns", type=int, default=20)
    turns = parser.parse_args().turns
    with (
        tempfile.TemporaryDirectory() as root,
        server.Service(server.Config(storage_root=Path(root), port=0)) as service,
    ):
        client = Client(service.url)
        client.call("PUT", "/incoming/small.zip", volume({"1.png": png(1)}))
        client.call("PUT", "/incoming/large.zip", volume({"1.png": png(1, 1200, 1700)}))
        start_s(client)  # starts the worker, loads the model
        client.wait(client.submit("small.zip", model=SIX_B))
        print("| what | median ms | worst ms | turns |\n| --- | --- | --- | --- |")
        for what, measure in (("submit to page", start_s), ("cancel to next job's page", cancel_s)):
            spent = [1000 * measure(client) for _ in range(turns)]
            print(f"| {what} | {statistics.median(spent):.0f} | {max(spent):.0f} | {turns} |", flush=True)


if __name__ == "__main__":
    main()
