"""`python infer.py IN OUT`: every kind in and out, interruptions, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import pytest
from drawn import colour, grey
from engines import COMPACT, native
from helpers import require

from commands import cli, verify
from engine import pages, rolling, upscaling
from messages import Params

ROOT = Path(__file__).parents[1]
NAMES = ["第1話/001.png", "第1話/002.png", "第1話/010.png"]


@pytest.fixture
def volume(tmp_path):
    """A folder of three small pages."""
    folder = tmp_path / "in"
    for n, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        page = colour(24, 20 + n) if n else grey(24, 20)
        path.write_bytes(cv2.imencode(".png", page)[1].tobytes())
    return folder


def run(source: Path, target: Path, *flags: str) -> int:
    """The command line with the compact model in fp32, each convolution as it stands."""
    settled = ["--model", COMPACT, "--precision", "fp32", "--convolutions", "direct"]
    return cli.main([str(source), str(target), *settled, *flags])


def zipped(folder: Path, target: Path) -> Path:
    """The folder's files as an archive."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder).as_posix())
    return target


def contents(place: Path) -> dict[str, bytes]:
    """Name -> bytes of a volume, folder or archive."""
    if place.is_dir():
        return {p.relative_to(place).as_posix(): p.read_bytes() for p in place.rglob("*") if p.is_file()}
    with zipfile.ZipFile(place) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_folder_becomes_a_folder_of_the_pipelines_own_pages(volume, tmp_path):
    assert run(volume, tmp_path / "out", "--format", "png") == 0
    made = contents(tmp_path / "out")
    assert set(made) == {*NAMES, "artifact-report.json"}
    page = pages.decode((volume / NAMES[1]).read_bytes(), 2, cli.LIMITS)
    expected = upscaling.upscale_page(native(COMPACT), page, Params(output_format="png"))
    assert made[NAMES[1]] == pages.encode(expected, Params(output_format="png"))[0]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("source_kind", ["folder", "cbz"])
@pytest.mark.parametrize("target", ["out", "out.zip", "out.cbz"])
def test_every_kind_gives_the_same_pages(volume, tmp_path, source_kind, target):
    source = volume if source_kind == "folder" else zipped(volume, tmp_path / "in.cbz")
    assert run(source, tmp_path / target) == 0
    run(volume, tmp_path / "plain")
    made, plain = contents(tmp_path / target), contents(tmp_path / "plain")
    reports = [json.loads(found.pop("artifact-report.json")) for found in (made, plain)]
    if target == "out.cbz":  # says so, and what else it holds: nothing, here
        assert (reports[0]["params"].pop("container"), reports[0].pop("files")) == ("cbz", [])
    assert made == plain and reports[0] == reports[1]


def test_a_cbz_holds_the_other_files_and_its_comic_info_is_brought_up_to_date(volume, tmp_path):
    (volume / "ComicInfo.xml").write_bytes(b"<ComicInfo><PageCount>9</PageCount></ComicInfo>")
    (volume / "notes.txt").write_bytes(b"notes")
    assert run(volume, tmp_path / "out.cbz", "--format", "png") == 0
    made = contents(tmp_path / "out.cbz")
    assert list(made) == [*NAMES, "ComicInfo.xml", "notes.txt", "artifact-report.json"]
    assert made["notes.txt"] == b"notes" and b"<PageCount>3</PageCount>" in made["ComicInfo.xml"]
    sizes = [(i["width"], i["height"]) for i in json.loads(made["artifact-report.json"])["items"]]
    assert sizes == [(40, 48), (42, 48), (44, 48)]
    assert verify.main(["verify", str(tmp_path / "out.cbz"), "--against", str(volume)]) == 0
    run(volume, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {*(n[:-3] + "jpg" for n in NAMES), "artifact-report.json"}


def test_one_image_takes_its_format_from_the_name(volume, tmp_path):
    assert run(volume / NAMES[0], tmp_path / "page.webp", "--scale", "3") == 0
    assert cv2.imread(str(tmp_path / "page.webp"), cv2.IMREAD_UNCHANGED).shape[:2] == (72, 60)


def test_a_bad_page_is_carried_and_told(volume, tmp_path, capsys):
    (volume / NAMES[1]).write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert run(volume, tmp_path / "out.cbz") == 1
    made = contents(tmp_path / "out.cbz")
    assert made[NAMES[1]] == (volume / NAMES[1]).read_bytes()
    errors = [item["error"] for item in json.loads(made["artifact-report.json"])["items"]]
    assert errors[0] is None and errors[1] and errors[2] is None
    assert "002.png: kept as it is" in capsys.readouterr().err


def interrupt_at(monkeypatch, page: int) -> list[int]:
    """Let Ctrl-C come when the n-th page is computed; returns the pages computed so far."""
    compute, computed = upscaling.Engines.compute, []

    def interrupted(self, *arguments):
        if len(computed) + 1 == page:
            raise KeyboardInterrupt
        computed.append(1)
        return compute(self, *arguments)

    monkeypatch.setattr(upscaling.Engines, "compute", interrupted)
    return computed


def test_an_interrupted_volume_goes_on(volume, tmp_path, monkeypatch, capsys):
    run(volume, tmp_path / "whole.cbz")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert run(volume, tmp_path / "out.cbz") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out.cbz").exists()
    with monkeypatch.context() as patch:
        computed = interrupt_at(patch, 99)
        assert run(volume, tmp_path / "out.cbz") == 0
    assert len(computed) == 2  # the first page was recorded, the second still being written
    assert (tmp_path / "out.cbz").read_bytes() == (tmp_path / "whole.cbz").read_bytes()


@pytest.mark.parametrize("model", [COMPACT, "auto"])
def test_a_volume_that_goes_on_keeps_the_convolutions_that_were_measured_first(
    volume, tmp_path, monkeypatch, model
):
    require("winograd" in rolling.usable_kinds(), "fewer multiplications are for x86")
    flags = ["--convolutions", "auto", "--model", model]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        patch.setattr(rolling, "fastest_kind", lambda network: "winograd")
        assert run(volume, tmp_path / "out", *flags) == 130
    with monkeypatch.context() as patch:
        computed = interrupt_at(patch, 99)
        patch.setattr(rolling, "fastest_kind", lambda network: "direct")
        assert run(volume, tmp_path / "out", *flags) == 0
    assert len(computed) == 2
    plan = json.loads(contents(tmp_path / "out")["artifact-report.json"])["plan"]
    assert {one["convolutions"] for one in plan["choices"] or [plan]} == {"winograd"}


@pytest.mark.parametrize("change", ["source", "output", "settings", "convolutions"])
def test_nothing_is_kept_that_no_longer_fits(volume, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        run(volume, tmp_path / "out")
    flags = []
    if change == "source":
        (volume / NAMES[0]).write_bytes(cv2.imencode(".png", grey(26, 22))[1].tobytes())
    elif change == "output":
        (tmp_path / "out.partial" / NAMES[0]).with_suffix(".jpg").write_bytes(b"garbage")
    elif change == "convolutions":
        require("winograd" in rolling.usable_kinds(), "fewer multiplications are for x86")
        flags = ["--convolutions", "winograd"]
    else:
        flags = ["--format", "png"]
    assert run(volume, tmp_path / "out", *flags) == 0
    run(volume, tmp_path / "plain", *flags)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


@pytest.mark.parametrize(
    "source, target, flags, says",
    [
        ("in", "in/out", [], "lies in the input"),
        ("nowhere", "out", [], "is not there"),
        ("in", "there", [], "exists"),
        ("in", "out.png", [], "is a volume"),
        ("in/第1話/001.png", "out.cbz", [], "is one page"),
        ("in/第1話/001.png", "out.png", ["--format", "jpg"], "leave one out"),
        ("in", "out", ["--model", "nothing"], "no weights"),
        ("empty.cbz", "out", [], "not a readable zip"),
        ("in", "out.cbr", [], "can't be written"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(volume, tmp_path, capsys, source, target, flags, says):
    (tmp_path / "there").mkdir()
    (tmp_path / "empty.cbz").write_bytes(b"")
    before = contents(volume)
    assert run(tmp_path / source, tmp_path / target, *flags) == 2
    assert says in capsys.readouterr().err
    assert contents(volume) == before and not list(tmp_path.glob("*.partial"))


def test_the_command_itself_runs(volume, tmp_path):
    command = [sys.executable, "infer.py", str(volume), str(tmp_path / "out.cbz"), "--model", COMPACT]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "[3/3] 100%" in done.stderr and set(contents(tmp_path / "out.cbz")) >= {"artifact-report.json"}
