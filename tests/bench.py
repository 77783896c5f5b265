"""Measure the worker's pipeline beside the loop that a user of RealESRGANer runs.

    python tests/bench.py --encoders
    python tests/bench.py --memory --models NAME --size 3000x2000 [--pages 1]
    python tests/bench.py --openvino 200 1200 [--models NAME ...]
    python tests/bench.py [--models NAME ...] [--pages 2] [--size 1170x827] [--pairs 3] [--out bench.json]

Same pages, same JPEG settings, one run: upstream and ours take turns in processes that stay
warm, so that a machine's moods meet both. Pixels are compared before encoding. Prints a
table and writes it as JSON. Needs the reference packages (README: engines). Asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import engine  # noqa: E402, F401, I001  before torch, as in the service: see there
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import upstream_shim  # noqa: E402

import infer  # noqa: E402
import storage  # noqa: E402
from commands import sample  # noqa: E402
from engine import devices, pages, rolling, upscaling, windows  # noqa: E402
from engine.models import Model  # noqa: E402
from engine.pages import Pixels  # noqa: E402
from engine.windows import Box  # noqa: E402
from messages import (  # noqa: E402
    ComputePage,
    EngineChoice,
    Limits,
    PageDone,
    Params,
    Plan,
    Ready,
)

JPEG = [
    *(cv2.IMWRITE_JPEG_QUALITY, 95),
    *(cv2.IMWRITE_JPEG_OPTIMIZE, 1),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
]
OPENVINO = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
CONTEXT = multiprocessing.get_context("spawn")


# ---------------------------------------------------------------- what is measured
def write_pages(folder: Path, count: int, height: int, width: int) -> list[Path]:
    """The demo's drawn pages, in colour as a scan of paper is, at a given size."""
    rng = np.random.default_rng(1)
    paths = []
    samples = [
        cv2.resize(sample.sample_page(n), (width, height), interpolation=cv2.INTER_AREA) for n in (1, 2, 3)
    ]
    for n in range(count):
        drawn = samples[n % 3]
        colour = drawn if drawn.ndim == 3 else cv2.cvtColor(drawn, cv2.COLOR_GRAY2BGR)
        scan = np.clip(colour * (0.94, 0.97, 0.99) + rng.normal(0, 2, colour.shape), 0, 255)
        paths.append(folder / f"{n:03}.png")
        cv2.imwrite(str(paths[-1]), scan.astype(np.uint8))
    return paths


def upstream_main(conn: Connection, model: Model, plan: Plan) -> None:
    """Answer each list of (source, target) when all of them are written; ends with the pipe."""
    upstream_shim.install()
    upsampler = upscaling.UpstreamEngine(model, plan, 0).engine
    while work := conn.recv():
        for source, target in work:
            page = cv2.imread(str(source), cv2.IMREAD_UNCHANGED)
            cv2.imwrite(str(target), upsampler.enhance(page, outscale=2)[0], JPEG)
        conn.send("done")


@contextmanager
def process(main: Callable[..., None], *arguments: Any) -> Iterator[tuple[Connection, BaseProcess]]:
    """A spawned process and its pipe; ended at the close."""
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=main, args=(theirs, *arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        yield ours, child
    finally:
        ours.send(None)
        child.join(10)
        child.kill()


class Ours:
    """The service's worker, fed as the dispatcher feeds it."""

    def __init__(self, conn: Connection, plan: Plan) -> None:
        self.conn, self.plan = conn, plan
        self.params = Params(model=plan.model, jpeg_quality=95)
        self.capacity = next(e for e in self._events() if isinstance(e, Ready)).capacity

    def _events(self) -> Iterator[object]:
        while True:
            yield self.conn.recv()

    def run(self, sources: list[Path], folder: Path) -> float:
        """Seconds from the first page given to the last one durable on disk."""
        waiting = [
            ComputePage("bench", 1, n, source, folder / source.stem, self.params, self.plan, Limits())
            for n, source in enumerate(sources, 1)
        ]
        started, done = time.perf_counter(), 0
        for task in waiting[: self.capacity]:
            self.conn.send(task)
        given = min(self.capacity, len(waiting))
        for event in self._events():
            if isinstance(event, PageDone):
                done += 1
                if given < len(waiting):
                    self.conn.send(waiting[given])
                    given += 1
            elif type(event).__name__ in ("PageFailed", "TaskFailed"):
                raise SystemExit(f"the worker could not compute a page: {event}")
            if done == len(waiting):
                break
        return time.perf_counter() - started


def run_upstream(conn: Connection, sources: list[Path], folder: Path) -> float:
    """Seconds for the loop over all pages."""
    started = time.perf_counter()
    conn.send([(source, folder / f"{source.stem}.jpg") for source in sources])
    conn.recv()
    return time.perf_counter() - started


# ---------------------------------------------------------------- figures
def peak_mb(child: BaseProcess) -> float | None:
    """The most memory a process ever held, where Linux tells it."""
    try:
        status = Path(f"/proc/{child.pid}/status").read_text()
    except OSError:
        return None
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def flops_per_pixel(model: Model) -> float:
    """Floating-point operations of all convolutions, an input pixel, counted on a small page."""
    total = 0

    def count(layer: Any, _inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += 2 * layer.weight.numel() * output.shape[2] * output.shape[3]

    convs = [m for m in model.network.modules() if isinstance(m, torch.nn.Conv2d)]
    hooks = [conv.register_forward_hook(count) for conv in convs]
    with torch.inference_mode():
        model.network(torch.zeros(1, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    return total / 256


def matrix_flops(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product: what the processor can be asked for."""
    a, b = (torch.rand(2048, 2048).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds)


def overlap_share(model: Model, plan: Plan, height: int, width: int) -> float:
    """Pixels computed more than once, as a share of the page's."""
    if devices.KINDS[plan.device].rolls:
        across = windows.spans(width, plan.tile, plan.halo_px, model.multiple)
        computed = height * sum(x1 - x0 for *_, x0, x1 in across)
    else:
        boxes = windows.tiles(height, width, plan.tile, plan.halo_px, model.multiple)
        computed = sum((w.y1 - w.y0) * (w.x1 - w.x0) for _, w in boxes)
    return computed / (height * width) - 1


def compare(model: Model, plan: Plan, source: Path) -> tuple[int, float]:
    """(largest difference, PSNR in dB) of a page's upper third, ours beside upstream's."""
    upstream_shim.install()
    page = cv2.imread(str(source), cv2.IMREAD_UNCHANGED)
    page = page[: len(page) // 3]
    theirs = upscaling.UpstreamEngine(model, upstream_plan(plan), 0).upscale(page, 2).astype(np.int16)
    apart = np.abs(upscaling.NativeEngine(model, plan, 0).upscale(page, 2) - theirs)
    error = float((apart.astype(np.float64) ** 2).mean())
    return int(apart.max()), 10 * float(np.log10(255**2 / error)) if error else float("inf")


def upstream_plan(plan: Plan) -> Plan:
    """What RealESRGANer does when nobody sets a tile: whole pages in fp32."""
    return replace(plan, engine="upstream", precision="fp32", tile=0, halo_px=0)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    found = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    return {
        "processor": found[1] if found else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": cv2.__version__,
    }


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def encoders(height: int = 2340, width: int = 1654, turns: int = 5) -> str:
    """What a page costs in each format, grey and in colour: a Markdown table."""
    grey = cv2.resize(sample.sample_page(1), (width, height), interpolation=cv2.INTER_CUBIC)
    grey = grey if grey.ndim == 2 else cv2.cvtColor(grey, cv2.COLOR_BGR2GRAY)
    rows = ["| format | channels | ms | MB |", "| --- | --- | --- | --- |"]
    for form, quality in (("jpg", 95), ("png", 95), ("webp", 95), ("webp", 100)):
        for pixels in (grey, cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)):
            params, seconds = Params(output_format=form, jpeg_quality=quality), []
            for _ in range(turns):
                started = time.perf_counter()
                data = pages.encode(pixels, params)[0]
                seconds.append(time.perf_counter() - started)
            ms = 1000 * statistics.median(seconds)
            rows.append(f"| {form} {quality} | {pages.channels(pixels)} | {ms:.0f} | {len(data) / 1e6:.2f} |")
    return "\n".join(rows)


class PageNetwork(torch.nn.Module):
    """A network from 8-bit levels to 8-bit levels, so that OpenVINO does all between them."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        """(1, h, w, 3) -> (1, h * scale, w * scale, 3), uint8, the channels' order kept."""
        y = self.network((levels.float() / 255).permute(0, 3, 1, 2).flip(1)).flip(1)
        return (y.permute(0, 2, 3, 1).clamp(0, 1) * 255).round().to(torch.uint8)


class OpenVINOEngine(upscaling.NativeEngine):
    """Strips as wide as the page through OpenVINO (pip install openvino), which compiles a network
    for a shape; plan.tile: rows of a strip, without its halo. For 8-bit colour pages."""

    def __init__(self, model: Model, plan: Plan) -> None:
        super().__init__(model, replace(plan, precision="fp32"), 0)  # it rounds to others by itself
        self.hint = OPENVINO[plan.precision]
        self.compiled: dict[tuple[int, ...], Any] = {}

    def _run(self, strip: Pixels) -> Pixels:
        import openvino

        if strip.shape not in self.compiled:
            network, example = PageNetwork(self.model.network), torch.from_numpy(strip[None].copy())
            converted = openvino.convert_model(network, example_input=example, input=[[1, *strip.shape]])
            hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": self.hint}
            self.compiled[strip.shape] = openvino.Core().compile_model(converted, "CPU", hints)
        computed: Pixels = self.compiled[strip.shape](np.ascontiguousarray(strip)[None])[0][0]
        return computed

    def _strips(self, network: Any, page: Pixels) -> Iterator[tuple[Box, Box, Pixels]]:
        height, width = page.shape[:2]
        for y0, y1, wy0, wy1 in windows.spans(height, self.plan.tile, self.plan.halo_px):
            window = Box(wy0, 0, wy1, width)
            yield Box(y0, 0, y1, width), window, self._run(window.of(page))


def beside_openvino(model: Model, arguments: argparse.Namespace) -> list[list[str]]:
    """Rows (engine, model, precision, pages/min, ratio, overlap, PSNR, max difference): engines alone,
    one page, taking turns; OpenVINO with strips of each of some heights. Both beside fp32."""
    choice = choice_of(arguments.precisions[0], arguments)
    plan = upscaling.make_plan(Params(model=model.name), choice, model, upscaling.Measured(0))
    height, width = map(int, arguments.size.split("x"))
    with tempfile.TemporaryDirectory() as name:
        page = cv2.imread(str(write_pages(Path(name), 1, height, width)[0]), cv2.IMREAD_UNCHANGED)
    plans = {f"OpenVINO, {rows} rows": replace(plan, tile=rows) for rows in arguments.openvino}
    engines: dict[str, upscaling.Engine] = {"ours": upscaling.NativeEngine(model, plan, 0)}
    engines |= {key: OpenVINOEngine(model, theirs) for key, theirs in plans.items()}
    seconds: dict[str, list[float]] = {key: [] for key in engines}
    for turn in range(arguments.pairs + 1):
        results = {}
        for key, one in engines.items():
            started = time.perf_counter()
            results[key] = one.upscale(page, 2)
            if turn:  # the first one compiles
                seconds[key].append(time.perf_counter() - started)
    exact_engine = upscaling.NativeEngine(model, replace(plan, precision="fp32"), 0)
    exact = exact_engine.upscale(page, 2).astype(np.int16)
    rows = []
    for key, spent in seconds.items():
        ratios = [own / theirs for own, theirs in zip(seconds["ours"], spent, strict=True)]
        strips = windows.spans(height, plans[key].tile, plan.halo_px) if key in plans else [(0, 0, 0, height)]
        apart = np.abs(results[key] - exact)
        rows.append([key, model.name, plan.precision, f"{60 / statistics.median(spent):.2f}"])
        rows[-1].append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        rows[-1].append(f"{sum(end - start for *_, start, end in strips) / height - 1:.0%}")
        rows[-1].append(f"{10 * np.log10(255**2 / max((apart.astype(np.float64) ** 2).mean(), 1e-9)):.1f}")
        rows[-1].append(str(int(apart.max())))
    return rows


# ---------------------------------------------------------------- a comparison
def choice_of(precision: str, arguments: argparse.Namespace) -> EngineChoice:
    """What a worker is told: the models of the wheel."""
    return EngineChoice(
        precision=precision, model_root=ROOT / "no-such-folder", convolutions=arguments.convolutions
    )


def measure(model: Model, choice: EngineChoice, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model in one precision beside upstream."""
    plan = upscaling.make_plan(Params(model=model.name), choice, model, upscaling.Measured(0))
    height, width = map(int, arguments.size.split("x"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = write_pages(folder, arguments.pages, height, width)
        small = folder / "small"
        small.mkdir()
        warm = write_pages(small, 1, 64, 48)
        with (
            process(infer.worker_main, choice, 0) as (our_pipe, our_process),
            process(upstream_main, model, upstream_plan(plan)) as (their_pipe, their_process),
        ):
            ours = Ours(our_pipe, plan)
            ours.run(warm, small)
            run_upstream(their_pipe, warm, small)
            pairs, rates = [], []  # seconds; what the processor could be asked for beside each pair
            for _ in range(arguments.pairs):
                pairs.append((run_upstream(their_pipe, sources, folder), ours.run(sources, folder)))
                rates.append(
                    (matrix_flops(torch.float32), matrix_flops(upscaling.PRECISIONS[plan.precision]))
                )
                print(f"  {model.name}: upstream {pairs[-1][0]:.1f} s, ours {pairs[-1][1]:.1f} s", flush=True)
            peaks = (peak_mb(their_process), peak_mb(our_process))
        difference, psnr = compare(model, plan, sources[0])
    operations = flops_per_pixel(model) * height * width * arguments.pages
    theirs, mine = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = [upstream / own for upstream, own in pairs]
    shares = [
        [operations / taken / rate for taken, rate in zip(pair, beside, strict=True)]
        for pair, beside in zip(pairs, rates, strict=True)
    ]
    their_share, our_share = (statistics.median(column) for column in zip(*shares, strict=True))
    return {
        "model": model.name,
        "precision": plan.precision,
        "convolutions": plan.convolutions,
        "device": plan.device,
        "upstream pages/min": 60 * arguments.pages / theirs,
        "ours pages/min": 60 * arguments.pages / mine,
        "ratio": statistics.median(ratios),
        "ratio min": min(ratios),
        "ratio max": max(ratios),
        "upstream share of peak": their_share,
        "share of peak": our_share,
        "overlap": overlap_share(model, plan, height, width),
        "overlap at 1200x1700": overlap_share(model, plan, 1700, 1200),
        "upstream peak MB": peaks[0],
        "peak MB": peaks[1],
        "PSNR dB": psnr,
        "max difference": difference,
    }


def memory(model: Model, choice: EngineChoice, arguments: argparse.Namespace) -> list[str]:
    """Peaks of a worker: before, after its first page, after all of them."""
    height, width = map(int, arguments.size.split("x"))
    plan = upscaling.make_plan(Params(model=model.name), choice, model, upscaling.Measured(0))
    with (
        tempfile.TemporaryDirectory() as name,
        process(infer.worker_main, choice, 0) as (pipe, child),
    ):
        ours = Ours(pipe, plan)
        peaks = [peak_mb(child)]
        sources = write_pages(Path(name), arguments.pages, height, width)
        for part in (sources[:1], sources[1:]):
            if part:
                ours.run(part, Path(name))
            peaks.append(peak_mb(child))
    figures = (f"{peak or 0:.0f}" for peak in peaks)
    return [model.name, plan.precision, arguments.size, str(arguments.pages), *figures]


def print_table(lines: list[list[str]]) -> None:
    """Markdown; the first line is the head."""
    lines.insert(1, ["---"] * len(lines[0]))
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The figures as a Markdown table, two lines a model: upstream, ours."""
    head = ("engine", "model", "precision", "pages/min", "ratio", "share of peak", "overlap", "peak MB")
    lines = [[*head, "PSNR dB", "max difference"]]
    for row in rows:
        theirs = [f"{row['upstream pages/min']:.2f}", "1", f"{row['upstream share of peak']:.0%}"]
        ours = [
            f"{row['ours pages/min']:.2f}",
            f"{row['ratio']:.2f} ({row['ratio min']:.2f}-{row['ratio max']:.2f})",
            f"{row['share of peak']:.0%}",
            f"{row['overlap']:.0%}",
            f"{row['peak MB'] or 0:.0f}",
            f"{row['PSNR dB']:.1f}",
            str(row["max difference"]),
        ]
        lines += [
            ["upstream", row["model"], "fp32", *theirs, "0%", f"{row['upstream peak MB'] or 0:.0f}", "", ""],
            ["ours", row["model"], f"{row['precision']}, {row['convolutions']}", *ours],
        ]
    return lines


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", default=["realesr-animevideov3", "RealESRGAN_x4plus_anime_6B"])
    parser.add_argument("--precisions", nargs="+", default=["fp32"], help="fp32, bf16, fp16, auto")
    parser.add_argument("--convolutions", choices=("auto", *rolling.KINDS), default="auto")
    parser.add_argument("--pages", type=int, default=2)
    parser.add_argument("--size", default="1170x827", help="height x width, input pixels")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="where to write the JSON")
    parser.add_argument("--openvino", type=int, nargs="+", metavar="ROWS", help="only beside OpenVINO's")
    parser.add_argument("--memory", action="store_true", help="only the worker's peaks")
    parser.add_argument("--encoders", action="store_true", help="only what each format costs")
    arguments = parser.parse_args()
    infer.settle_torch()  # what is computed in this process too is beside fp32 that is fp32
    if arguments.encoders:
        print(encoders())
        return
    choices = [choice_of(precision, arguments) for precision in arguments.precisions]
    engines = upscaling.Engines(choices[0], 0, lambda: None)
    models = [engines.model(name) for name in arguments.models]
    if arguments.memory:
        head = ["model", "precision", "height x width", "pages", "idle MB", "peak MB after one", "after all"]
        peaks = [memory(model, choice, arguments) for choice in choices for model in models]
        print_table([head, *peaks])
        return
    if arguments.openvino:
        head = ["engine", "model", "precision", "pages/min", "ratio to ours", "overlap"]
        found = [row for model in models for row in beside_openvino(model, arguments)]
        print_table([[*head, "PSNR dB", "max difference"], *found])
        return
    rows = [measure(model, choice, arguments) for choice in choices for model in models]
    report = {key: getattr(arguments, key) for key in ("size", "pages", "pairs")}
    report |= {"machine": machine(), "threads": torch.get_num_threads()}
    print(json.dumps(report))
    print_table(table(rows))
    if arguments.out:
        storage.write_whole(arguments.out, json.dumps(report | {"rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
