"""What the real RealESRGANer makes of the drawn pages, kept in tests/reference/.

    python tests/reference.py            compute and store
    python tests/reference.py --check    compute and compare; exits 1 where they differ

Needs the reference packages (see upstream_shim.py); the tests that read the stored
values do not. The reference gets the very tensors that our engine loads.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it must find models.py

import upstream_shim
from drawn import PAGES
from engines import COMPACT, SIX_B, apart, bundled

from engine.pages import Pixels

FOLDER = Path(__file__).parent / "reference"
THIN = ("tall", "wide")  # stored at outscale 2 only: four times as large they are mere bytes


@dataclass(frozen=True, slots=True)
class Case:
    """One page through one model."""

    model: str
    page: str
    outscale: int

    def __str__(self) -> str:
        return f"{self.model}-{self.page}-x{self.outscale}"

    @property
    def path(self) -> Path:
        """Where its result is stored."""
        return FOLDER / f"{self}.png"

    def stored(self) -> Pixels:
        """The reference's result, as it came."""
        return cv2.imread(str(self.path), cv2.IMREAD_UNCHANGED)


CASES = [
    Case(model, page, outscale)
    for model, page, outscale in itertools.product((COMPACT, SIX_B), PAGES, (4, 2))
    if outscale == 2 or page not in THIN
] + [
    Case(model, page, outscale)
    for model, page, outscale in itertools.product((COMPACT, SIX_B), ("odd", "grey16"), (1, 3))
]


@functools.cache
def upstream(model: str) -> Any:
    """RealESRGANer with a bundled model's tensors, untiled. Raises ImportError."""
    upstream_shim.install()
    from basicsr.archs.rrdbnet_arch import RRDBNet
    from realesrgan import RealESRGANer
    from realesrgan.archs.srvgg_arch import SRVGGNetCompact

    # As upstream's own inference_realesrgan.py builds them.
    networks = {
        COMPACT: lambda: SRVGGNetCompact(3, 3, num_feat=64, num_conv=16, upscale=4, act_type="prelu"),
        SIX_B: lambda: RRDBNet(3, 3, num_feat=64, num_block=6, num_grow_ch=32, scale=4),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        torch.save({"params": bundled(model).network.state_dict()}, path)
        return RealESRGANer(
            scale=4,
            model_path=str(path),
            model=networks[model](),
            tile=0,
            pre_pad=0,
            half=False,
            device=torch.device("cpu"),
        )


def compute(case: Case) -> Pixels:
    """The reference's result, computed now. Raises ImportError."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what depth it guessed
        pixels: Pixels = upstream(case.model).enhance(PAGES[case.page](), outscale=case.outscale)[0]
    return pixels


def main() -> int:
    """Store or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    FOLDER.mkdir(exist_ok=True)
    strays = sorted(set(FOLDER.iterdir()) - {case.path for case in CASES})
    failures = [f"{path.name}: of no case" for path in strays]
    for case in CASES:
        now = compute(case)
        if not check:
            cv2.imwrite(str(case.path), now, [cv2.IMWRITE_PNG_COMPRESSION, 9])
        elif not case.path.is_file():
            failures.append(f"{case}: not stored")
        # Processors differ in the last bit, which rounding can make one level.
        elif (difference := apart(case.stored(), now)) > 1:
            failures.append(f"{case}: off by {difference:.1f}/255")
    print("\n".join(failures) or f"{len(CASES)} cases {'are current' if check else 'stored'}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
