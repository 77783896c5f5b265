"""Print how far the predictions of minutes and megabytes are off; asserts nothing, since machines differ.

    python tests/foretold.py --pages 12 --model realesr-animevideov3 --format webp

By a service that is started anew each time, as a user meets it:
    preview: one page of a volume was shown, then the volume runs
    volumes: one volume ran, then another, of other detail and more colour
The volumes are drawn: sample.py's pages at 827x1170, cut, turned and grained differently, as JPEG.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import sys
import tempfile
import time
import urllib.error
import zipfile
from typing import Any

import cv2
import figures
import numpy as np

sys.path.insert(0, str(figures.ROOT))
from commands import sample

WIDTH, HEIGHT = 827, 1170
# Of a volume: (every how manieth page is in colour, least part of a drawing that a page shows, grain).
KINDS = {"plain": (6, 0.7, 1.0), "rich": (3, 0.5, 3.0)}


@functools.cache
def drawing(n: int) -> Any:
    """One of the sample's pages as it is drawn, three times as large as it is shown there."""
    page = np.full((sample.H * sample.S, sample.W * sample.S, 3), sample.PAPER, np.uint8)
    (sample.cover, sample.page_one, sample.page_two, sample.page_three)[n](page)
    return page


def page(kind: str, n: int) -> bytes:
    """Page n of a volume of this kind, a JPEG."""
    every, least, grain = KINDS[kind]
    rng = np.random.default_rng([len(kind), n])
    in_colour = n % every == 0
    drawn = drawing(0 if in_colour else 1 + int(rng.integers(3)))
    part = rng.uniform(least, 1)
    height, width = (int(side * part) for side in drawn.shape[:2])
    y, x = (
        int(rng.uniform(0, side - size)) for side, size in zip(drawn.shape, (height, width), strict=False)
    )
    shown = drawn[y : y + height, x : x + width][:, :: rng.choice((-1, 1))]
    shown = cv2.resize(shown, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    shown = shown if in_colour else cv2.cvtColor(shown, cv2.COLOR_BGR2GRAY)
    worn = shown + rng.normal(0, grain, shown.shape[:2])[(...,) + (None,) * (shown.ndim - 2)]
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(80, 93))]
    done, data = cv2.imencode(".jpg", np.clip(worn, 0, 255).astype(np.uint8), quality)
    assert done
    return bytes(data)


def upload(url: str, kind: str, pages: int) -> dict[str, str]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as volume:
        for n in range(pages):
            volume.writestr(f"{n:03d}.jpg", page(kind, n))
    figures.call(f"{url}/incoming/{kind}.zip", "PUT", archive.getvalue())
    return {"type": "zip", "path": f"{kind}.zip"}


def run(url: str, where: dict[str, str], params: dict[str, Any]) -> Any:
    """The volume's last state."""
    body = {"title": "Foretold", "volume": where["path"], "input": where, "params": params}
    job = figures.call(url + "/jobs", "POST", json.dumps(body).encode())["jobId"]
    state = {"status": "PENDING"}
    while state["status"] in ("PENDING", "RUNNING"):
        time.sleep(0.2)
        state = figures.call(f"{url}/jobs/{job}")
    assert state["status"] == "SUCCESS", state
    return state


def look(url: str, asked: bytes) -> None:
    """A preview; asked for again while the service says that it goes on."""
    while True:
        try:
            figures.call(url + "/preview", "POST", asked)
            return
        except urllib.error.HTTPError as refusal:
            if refusal.code != 503:
                raise


def tell(basis: str, state: dict[str, Any]) -> None:
    told = state["prediction"]
    assert told["basis"] == basis, told
    print(
        f"{basis:8}  minutes {told['minutes']:6.3f}, were {told['actualMinutes']:6.3f} "
        f"({told['minutesErrorPercent']:+.1f}%)   megabytes {told['megabytes']:6.2f}, "
        f"were {told['actualMegabytes']:6.2f} ({told['megabytesErrorPercent']:+.1f}%)",
        flush=True,
    )


def measure(basis: str, first: str, pages: int, params: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        process, url, _ = figures.start_service(folder)
        try:
            if basis == "preview":
                where = upload(url, first, pages)
                asked = json.dumps({"input": where, "variants": [params]}).encode()
                look(url, asked)
            else:
                run(url, upload(url, first, pages), params)
                where = upload(url, next(kind for kind in KINDS if kind != first), pages)
            tell(basis, run(url, where, params))
        finally:
            process.terminate()
            process.wait(20)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=12)
    parser.add_argument("--model", default="realesr-animevideov3")
    parser.add_argument("--format", default="webp")
    parser.add_argument("--first", choices=KINDS, default="plain")
    parser.add_argument("--basis", choices=("preview", "volumes"), nargs="*", default=["preview", "volumes"])
    chosen = parser.parse_args()
    for one in chosen.basis:
        measure(one, chosen.first, chosen.pages, {"model": chosen.model, "outputFormat": chosen.format})
