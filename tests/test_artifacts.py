"""artifacts.py: the report and the pages in an artifact, byte for byte; on real files."""

from __future__ import annotations

import json
import os
import shutil
import stat
import unicodedata
import zipfile
from pathlib import Path

import pytest
from ondisk import JOB, files_below, make_folder, make_zip, sha

import storage
from files import artifacts


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if storage.TEMPORARY.fullmatch(path.name)]


PAGES = {"ch2/1.jpg": b"page three", "001.jpg": b"page one", "漫画.jpg": b"page two"}


def make_outputs(outputs: Path) -> dict:
    make_folder(outputs, PAGES)
    return {"jobId": JOB, "items": [{"filename": name, "sha256": sha(data)} for name, data in PAGES.items()]}


def test_an_artifact_holds_report_and_pages_in_the_reports_order(tmp_path):
    report = make_outputs(tmp_path / "out")
    digest, size_bytes = artifacts.pack(tmp_path / "out", tmp_path / "a.zip", report)
    data = (tmp_path / "a.zip").read_bytes()
    assert (digest, size_bytes) == (sha(data), len(data))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        infos = archive.infolist()
        assert archive.testzip() is None
        assert [info.filename for info in infos] == ["artifact-report.json", *PAGES]
        assert [archive.read(name) for name in PAGES] == list(PAGES.values())
        assert json.loads(archive.read("artifact-report.json")) == report
    assert (tmp_path / "out/artifact-report.json").read_bytes() == artifacts.report_bytes(report)


def test_an_artifact_says_nothing_of_when_or_where_it_was_made(tmp_path):
    artifacts.pack(tmp_path / "out", tmp_path / "a.zip", make_outputs(tmp_path / "out"))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for info in archive.infolist():
            assert (info.date_time, info.compress_type) == ((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED)
            assert (info.extra, info.create_system) == (b"", 3)
            assert info.external_attr >> 16 == stat.S_IFREG | 0o644
            assert bool(info.flag_bits & 0x800) == (not info.filename.isascii())


def test_the_same_pages_give_the_same_bytes(tmp_path):
    first = artifacts.pack(tmp_path / "out", tmp_path / "a.zip", make_outputs(tmp_path / "out"))
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path, (1, 1))
    elsewhere = make_outputs(tmp_path / "other/out")
    assert artifacts.pack(tmp_path / "other/out", tmp_path / "b.zip", elsewhere) == first
    assert artifacts.pack(tmp_path / "out", tmp_path / "a.zip", elsewhere) == first
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "missing"])
def test_a_page_that_is_not_what_was_recorded_is_named_and_no_artifact_appears(tmp_path, damage):
    report = make_outputs(tmp_path / "out")
    path = tmp_path / "out/001.jpg"
    path.unlink()
    if damage != "missing":
        path.write_bytes({"flipped": b"page onf", "cut": b"page on", "emptied": b""}[damage])
    with pytest.raises(storage.OutputDamaged, match=r"001\.jpg") as caught:
        artifacts.pack(tmp_path / "out", tmp_path / "a.zip", report)
    assert caught.value.page == 2
    assert not (tmp_path / "a.zip").exists() and temporaries(tmp_path) == []


def test_a_failed_pack_leaves_the_artifact_that_was_there(tmp_path):
    report = make_outputs(tmp_path / "out")
    artifacts.pack(tmp_path / "out", tmp_path / "a.zip", report)
    before = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "out/001.jpg").unlink()
    with pytest.raises(storage.OutputDamaged):
        artifacts.pack(tmp_path / "out", tmp_path / "a.zip", report)
    assert (tmp_path / "a.zip").read_bytes() == before


def test_packing_leaves_just_what_the_report_lists(tmp_path):
    report = make_outputs(tmp_path / "out")
    make_folder(tmp_path / "out", {"001.png": b"once carried", "ch2/x.tmp": b"x"})
    artifacts.pack(tmp_path / "out", tmp_path / "a.zip", report)
    assert files_below(tmp_path / "out") == {"artifact-report.json", *PAGES}


def test_a_page_whose_name_the_disk_spells_otherwise_is_no_stray(tmp_path):
    """A folder that was there as `Extras`, on a disk that ignores case; HFS+ decomposes names."""
    there = ["Extras/1.jpg", unicodedata.normalize("NFD", "が/é.jpg"), "extras/1.png", "が/e.jpg"]
    make_folder(tmp_path, dict.fromkeys(there, b"page"))
    artifacts.remove_strays(tmp_path, {"extras/1.jpg", "が/é.jpg"})
    assert files_below(tmp_path) == {*there[:2]}
    (tmp_path / "extras/1.jpg").write_bytes(b"page")
    if len(files_below(tmp_path)) == 3:  # this disk tells them apart
        artifacts.remove_strays(tmp_path, {"extras/1.jpg", "が/é.jpg"})
        assert files_below(tmp_path) == {"extras/1.jpg", there[1]}


def test_no_page_can_take_the_reports_place(tmp_path):
    names = ["artifact-report.json/1.png", "artifact-report.png", "2.png"]
    pages = {stem + ".jpg": b"page" for stem in storage.output_stems(names)}
    make_folder(tmp_path / "out", pages)
    items = [{"filename": name, "sha256": sha(b"page")} for name in pages]
    artifacts.pack(tmp_path / "out", tmp_path / "a.zip", {"items": items})
    assert len(zipfile.ZipFile(tmp_path / "a.zip").namelist()) == 4


SPOILED = {
    "a byte of a page": lambda path: path.write_bytes(path.read_bytes().replace(b"page", b"pagE", 1)),
    "its end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "nothing but a report": lambda path: make_zip(path, {storage.REPORT_NAME: b'{"items": [{}]}'}),
    "no report": lambda path: make_zip(path, {"1.jpg": b"page"}),
    "a report that is a list": lambda path: make_zip(path, {storage.REPORT_NAME: b"[]"}),
    "no zip": lambda path: path.write_bytes(b"no zip"),
}


def test_an_artifact_is_proved_by_its_own_report(tmp_path):
    report = make_outputs(tmp_path / "out")
    digest, size_bytes = artifacts.pack(tmp_path / "out", tmp_path / "a.zip", report)
    assert artifacts.prove_artifact(tmp_path / "a.zip") == (report, digest, size_bytes)
    for what, spoil in SPOILED.items():
        shutil.copy(tmp_path / "a.zip", tmp_path / "b.zip")
        spoil(tmp_path / "b.zip")
        with pytest.raises(storage.ArtifactDamaged):
            print(what, artifacts.prove_artifact(tmp_path / "b.zip"))


def test_packing_again_takes_away_what_a_killed_packing_left_and_nothing_else(tmp_path):
    report = make_outputs(tmp_path / "out")
    foreign = tmp_path / f".reichan-{'0' * 32}.tmp"  # another job's, perhaps being written
    for left in (foreign, storage.own_temporary(tmp_path / "a.zip")):
        left.write_bytes(b"half")
    artifacts.pack(tmp_path / "out", tmp_path / "a.zip", report)
    assert temporaries(tmp_path) == [foreign]
