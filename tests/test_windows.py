"""windows.py: tiles; what a card does to pixels, beside what OpenCV does to them on the processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn import colour, grey, sixteen_bit
from engines import apart

from engine import pages, windows

SIZES = [(1, 1), (3, 40), (17, 9), (60, 33)]


@pytest.mark.parametrize("scale, outscale", [(4, 1), (4, 2), (4, 3), (2, 1), (2, 3), (1, 4), (3, 2), (2, 2)])
@pytest.mark.parametrize("height, width", SIZES)
def test_lanczos_on_a_device_is_opencvs_to_the_last_bit(scale, outscale, height, width):
    rng = np.random.default_rng(height)
    for shape in ((height * scale, width * scale), (height * scale, width * scale, 3)):
        noise = rng.integers(0, 256, shape, dtype=np.uint8)
        wanted = windows.reduce_to(noise, windows.Box(0, 0, height, width), outscale)
        ours = windows.reduce_on_device(torch.from_numpy(noise)[None].float(), 255, scale, outscale)[0]
        assert np.array_equal(ours.numpy(), wanted)


@pytest.mark.parametrize(
    "height, width, tile, halo, multiple",
    [
        (1, 1, 32, 18, 1),
        (100, 100, 100, 18, 1),
        (101, 203, 50, 7, 1),
        (7, 1000, 64, 48, 1),
        (64, 60, 30, 5, 4),
        (200, 4, 32, 0, 2),
    ],
)
def test_cores_cover_the_page_once_and_windows_lie_inside(height, width, tile, halo, multiple):
    seen, shapes = np.zeros((height, width), int), set()
    for core, window in windows.tiles(height, width, tile, halo, multiple):
        core.of(seen)[...] += 1
        assert 0 <= window.y0 <= core.y0 and core.y1 <= window.y1 <= height
        assert 0 <= window.x0 <= core.x0 and core.x1 <= window.x1 <= width
        assert core.y0 == 0 or core.y0 - window.y0 >= halo
        assert core.x1 == width or window.x1 - core.x1 >= min(halo, width - core.x1)
        assert not any(edge % multiple for edge in (window.y0, window.x0, window.y1, window.x1))
        shapes.add((window.y1 - window.y0, window.x1 - window.x0))
    assert (seen == 1).all() and len(shapes) == 1


@pytest.mark.parametrize("tile, halo", [(0, 1), (-3, 1), (32, -1)])
def test_impossible_tiles_are_refused(tile, halo):
    with pytest.raises(ValueError, match="tile"):
        list(windows.tiles(10, 10, tile, halo))


@pytest.mark.parametrize("height, width, tile, halo", [(1, 1, 32, 32), (100, 203, 64, 10), (65, 200, 40, 0)])
def test_grid_tiles_cover_a_page_once_and_cut_it_on_the_grid(height, width, tile, halo):
    seen = np.zeros((height, width), int)
    for core, window in windows.grid_tiles(height, width, tile, halo, 32):
        core.of(seen)[...] += 1
        assert window.y0 == max(0, core.y0 - -(-halo // 32) * 32) and window.x1 >= min(core.x1 + halo, width)
        for box in (core, window):
            assert box.y0 % 32 == box.x0 % 32 == 0
            assert (box.y1 % 32 == 0 or box.y1 == height) and (box.x1 % 32 == 0 or box.x1 == width)
    assert (seen == 1).all()


def test_a_16_bit_page_is_reduced_within_one_level():
    page = sixteen_bit(colour(40, 48))
    wanted = windows.reduce_to(page, windows.Box(0, 0, 10, 12), 2)
    ours = windows.reduce_on_device(torch.from_numpy(page.astype(np.float32))[None], 65_535, 4, 2)[0]
    assert apart(ours.numpy(), wanted) <= 1


PAGES = [grey(8, 9), colour(8, 9), sixteen_bit(grey(8, 9)), sixteen_bit(colour(8, 9))]


@pytest.mark.parametrize("page", PAGES, ids=["grey", "colour", "grey16", "colour16"])
def test_pixels_survive_the_way_to_a_tensor_and_back(page):
    white = pages.levels(page)
    sent = windows.upload(page, torch.device("cpu"))
    x = windows.to_input(sent[None], white, torch.float32)
    assert x.shape == (1, 3, 8, 9) and 0 <= float(x.min()) and float(x.max()) <= 1
    back = windows.to_levels(x.permute(0, 2, 3, 1).flip(3), white, grey=page.ndim == 2)[0]
    assert np.array_equal(windows.download(back).numpy().astype(page.dtype), page)


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("colours", [(), (3,)], ids=["grey", "colour"])
def test_results_are_laid_side_by_side_as_by_a_pixel_shuffle(factor, colours):
    results = torch.rand(5, 7, factor**2, *colours).mul_(255).round_()
    laid = windows.shuffle(results, torch.uint8)
    channels = results.view(5, 7, factor**2, -1).permute(3, 2, 0, 1)  # (C, factor**2, h, w)
    expected = torch.nn.functional.pixel_shuffle(channels.flatten(0, 1)[None], factor)[0].permute(1, 2, 0)
    assert laid.dtype == torch.uint8 and torch.equal(laid.float(), expected.reshape(laid.shape))
