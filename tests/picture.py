"""Draw the README's picture: parts of two sample pages, enlarged plainly and upscaled.

python tests/picture.py docs/before-after.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commands import sample
from engine import models, upscaling
from files import weightfiles
from messages import EngineChoice, Params

PARTS = ((0, 500, 80), (1, 560, 30))  # page, top, left
HEIGHT, WIDTH, MARGIN = 150, 210, 24  # input pixels; the margin is cut off again
SHOWN = 0.55  # of the four-fold size


def main(target: str) -> None:
    """Write the picture."""
    model = models.load_model(weightfiles.find_weights(Path("no-model-root"))["realesrgan_x4plus_anime_6b"])
    params = Params(scale=4, output_format="png")
    plan = upscaling.make_plan(params, EngineChoice(), model, upscaling.Measured(0))
    engine = upscaling.NativeEngine(model, plan, 0)
    rows = []
    for n, top, left in PARTS:
        page = sample.sample_page(n)
        wide = page[top - MARGIN : top + HEIGHT + MARGIN, left - MARGIN : left + WIDTH + MARGIN]
        upscaled = upscaling.upscale_page(engine, wide, params)
        after = upscaled[4 * MARGIN : -4 * MARGIN, 4 * MARGIN : -4 * MARGIN]
        inner = wide[MARGIN:-MARGIN, MARGIN:-MARGIN]
        before = cv2.resize(inner, (4 * WIDTH, 4 * HEIGHT), interpolation=cv2.INTER_CUBIC)
        size = (round(4 * WIDTH * SHOWN), round(4 * HEIGHT * SHOWN))
        pair = [cv2.resize(part, size, interpolation=cv2.INTER_AREA) for part in (before, after)]
        pair = [part if part.ndim == 3 else cv2.cvtColor(part, cv2.COLOR_GRAY2BGR) for part in pair]
        rows.append(np.hstack([pair[0], np.full((pair[0].shape[0], 8, 3), 255, np.uint8), pair[1]]))
    gap = np.full((8, rows[0].shape[1], 3), 255, np.uint8)
    cv2.imwrite(target, np.vstack([rows[0], gap, rows[1]]), [cv2.IMWRITE_JPEG_QUALITY, 90])


if __name__ == "__main__":
    main(sys.argv[1])
