"""The service beside its own description: Schemathesis draws requests from /openapi.json, by seed.

Every check of its runs but where schemathesis.toml says why not; schemathesis_hooks.py tells it
which jobs and inputs there are. By hand, for longer: raise --max-examples.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import fuzz
import plants
import pytest
from helpers import require

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fuzz.Target looks through /proc")


def examined(
    folder: Path, examples: int, plant: str = ""
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Schemathesis' verdict on a service, and what is wrong with the service afterwards."""
    command = Path(sys.executable).with_name("schemathesis")
    require(command.is_file(), "schemathesis is not installed")
    with contextlib.closing(fuzz.Target(folder / "service", plant)) as target:
        world = target.world
        environ = os.environ | {
            "FUZZ_TOKEN": world.token,
            "FUZZ_JOBS": ",".join((world.finished, world.partly, world.running)),
            "FUZZ_VICTIMS": ",".join(world.victims),
            "PYTHONPATH": str(HERE),
        }
        arguments = ["--config-file", str(HERE / "schemathesis.toml"), "run", "--no-color"]
        if plant:
            arguments += ["--max-failures", "1"]
        arguments += ["--max-examples", str(examples), f"http://127.0.0.1:{world.port}/openapi.json"]
        done = subprocess.run(
            [str(command), *arguments],
            cwd=folder, env=environ, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return done, target.faults()


def test_the_service_is_as_it_describes_itself(tmp_path):
    done, faults = examined(tmp_path, examples=40)
    assert (done.returncode, faults) == (0, []), done.stdout[-8000:]


@pytest.mark.parametrize(
    "plant, words",
    [
        (plants.a_route_that_raises_on_a_header, "Server error"),
        (plants.a_state_of_another_shape, "Response violates schema"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_disagreement_is_found(tmp_path, plant, words):
    done, _ = examined(tmp_path, 10, f"plants:{plant.__name__}")
    assert done.returncode == 1 and words in done.stdout, done.stdout[-8000:]
