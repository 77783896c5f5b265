"""uploads.py: an upload's title and volume; which there are, and when: test_watch.py."""

from __future__ import annotations

import pytest

from work import uploads


@pytest.mark.parametrize(
    ("path", "kind", "title", "number"),
    [
        ("作品名/01.zip", "zip", "作品名", "01"),
        ("作品名 第01巻.cbz", "zip", "作品名", "01"),
        ("Title v02", "folder", "Title", "02"),
        ("Title - Vol. 3.zip", "zip", "Title", "3"),
        ("Title vol.10.5.zip", "zip", "Title", "10.5"),
        ("Agent 12345.zip", "zip", "Agent 12345", "1"),
        ("Love 2000 v1.zip", "zip", "Love 2000", "1"),
        ("Title/Title v02.cbz", "zip", "Title", "02"),
        ("T/Vol 01/ch1", "folder", "T", "Vol 01 ch1"),
        ("T/extra.zip", "zip", "T", "extra"),
        ("Title.zip", "zip", "Title", "1"),
        ("One_Piece_vol.12.zip", "zip", "One_Piece", "12"),
        ("作品名v02.cbz", "zip", "作品名", "02"),
        ("Rev 3.zip", "zip", "Rev", "3"),
        ("01.zip", "zip", "01", "01"),
        (f"{'漫' * 400}/1.zip", "zip", "漫" * 300, "1"),
    ],
)
def test_title_and_volume_come_from_the_path(path, kind, title, number):
    assert uploads.title_and_volume(path, kind) == (title, number)
