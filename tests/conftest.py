"""Fixtures of several test files."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
from helpers import require
from serving import until

import engine  # noqa: F401  before a test file loads torch, see there: several pytest processes share the cores
import storage

# The same bytes from every service that a test starts as a command: which convolutions are fastest,
# two of them may measure differently.
os.environ.setdefault("REICHAN_CONVOLUTIONS", "direct")

# Of several pytest processes each computes with one thread, and so do the workers that it starts: threads
# beyond the cores would wait for each other (three processes, 2 cores, all tests: 494 s for 576).
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

forked.settle()

# Files that take most of a minute or more.
LONG = {
    "test_browser", "test_checks_http", "test_cluster", "test_crashes", "test_dispatch", "test_fuzz",
    "test_hostile", "test_kills", "test_machine", "test_measuring", "test_parity", "test_schemathesis",
    "test_service", "test_upscaling",
}  # fmt: skip
MAKE_HOSTILE = Path(__file__).parents[2] / "shared/hostile/make_hostile.py"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: else one process would have the last of them to itself at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@dataclass(frozen=True)
class Hostile:
    """Hostile inputs on disk, with what must become of each."""

    root: Path
    index: list[dict[str, Any]]
    make: SimpleNamespace  # make_hostile itself, for its drawn pages


def make_hostile(root: Path, kinds: str) -> Path:
    """Hostile inputs of the kinds ("archive,image"), written into root, which is made."""
    require(MAKE_HOSTILE.is_file(), f"{MAKE_HOSTILE} is not there")
    require(importlib.util.find_spec("PIL"), "Pillow is not installed")
    command = [sys.executable, str(MAKE_HOSTILE), str(root), "--only", kinds]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return root


def made_once(root: Path, make: Callable[[Path], object]) -> Path:
    """A folder that the first of several processes makes; the others wait for it."""
    claim = root.with_suffix(".claimed")
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        until(lambda: root.exists() or not claim.exists(), 180)
        return root if root.exists() else made_once(root, make)  # to fail, or skip, here as it did there
    try:
        make(whole := root.with_suffix(".made"))
        return whole.rename(root)
    except BaseException:
        claim.unlink()
        raise


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one for all pytest processes; theirs lie beside each other
        place = place.parent
    root = made_once(place / "hostile", lambda root: make_hostile(root, "archive,image,folder"))
    # run_path, since an import would leave a __pycache__ in a folder that is not ours.
    make = SimpleNamespace(**runpy.run_path(str(MAKE_HOSTILE)))
    return Hostile(root, json.loads((root / "index.json").read_text()), make)


@pytest.fixture
def layout(tmp_path: Path) -> storage.Layout:
    layout = storage.Layout(tmp_path / "root", tmp_path / "models")
    layout.create()
    return layout


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    require(sys.platform == "linux" and os.geteuid() == 0, "mounting a tmpfs takes root on Linux")
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"no tmpfs can be mounted: {done.stderr}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
