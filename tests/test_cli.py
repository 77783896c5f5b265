"""`python infer.py IN OUT`: every kind in and out, interruptions, refusals."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn import colour, grey
from engines import COMPACT, native
from helpers import require

import storage
from commands import cli, verify
from engine import devices, pages, rolling, upscaling
from files import containers, inputs
from messages import Limits, Params, SourcePage

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
    page = pages.decode((volume / NAMES[1]).read_bytes(), 2, Limits())
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


def test_one_image_is_no_larger_than_asked(tmp_path, capsys):
    page = np.random.default_rng(7).integers(0, 256, (64, 64), np.uint8)
    cv2.imwrite(str(tmp_path / "in.png"), page)
    assert run(tmp_path / "in.png", tmp_path / "large.jpg") == 0
    most = (tmp_path / "large.jpg").stat().st_size // 2
    assert run(tmp_path / "in.png", tmp_path / "small.jpg", "--max-page-bytes", str(most)) == 0
    assert 0 < (tmp_path / "small.jpg").stat().st_size <= most
    assert "small.jpg: for its size written as jpg, quality" in capsys.readouterr().err
    assert run(tmp_path / "in.png", tmp_path / "small.png", "--max-page-bytes", str(most)) == 2
    assert "call OUT small." in capsys.readouterr().err and not (tmp_path / "small.png").exists()


def test_a_bad_page_is_carried_and_told(volume, tmp_path, capsys):
    (volume / NAMES[1]).write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert run(volume, tmp_path / "out.cbz") == 1
    made = contents(tmp_path / "out.cbz")
    assert made[NAMES[1]] == (volume / NAMES[1]).read_bytes()
    errors = [item["error"] for item in json.loads(made["artifact-report.json"])["items"]]
    assert errors[0] is None and errors[1] and errors[2] is None
    assert "002.png: kept as it is" in capsys.readouterr().err


def test_a_bad_page_is_called_what_it_is_and_done_anew_by_the_next_try(volume, tmp_path, monkeypatch):
    bad = cv2.imencode(".jpg", colour(24, 20))[1].tobytes()[:-40]
    (volume / NAMES[0]).write_bytes(bad)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert run(volume, tmp_path / "out", "--format", "png") == 130
    assert (tmp_path / "out.partial" / NAMES[0]).with_suffix(".jpg").read_bytes() == bad
    assert run(volume, tmp_path / "out", "--format", "png") == 1
    named = {Path(NAMES[0]).with_suffix(".jpg").as_posix(), *NAMES[1:]}
    assert set(contents(tmp_path / "out")) == {*named, "artifact-report.json"}
    assert run(volume, tmp_path / "out.zip", "--format", "png") == 1
    assert verify.main(["verify", str(tmp_path / "out.zip"), "--against", str(volume)]) == 0


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
    assert len(computed) == 1  # the page amid which it came
    assert (tmp_path / "out.cbz").read_bytes() == (tmp_path / "whole.cbz").read_bytes()


def test_a_page_that_is_done_anew_makes_no_later_one_forgotten(volume, tmp_path, monkeypatch):
    first = volume / NAMES[0]
    for n in (4, 5):
        (first.parent / f"01{n}.png").write_bytes(cv2.imencode(".png", grey(24, 20 + n))[1].tobytes())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)  # four of five are recorded
        assert run(volume, tmp_path / "out") == 130
    first.write_bytes(cv2.imencode(".png", grey(26, 22))[1].tobytes())
    for stop, status in ((2, 130), (99, 0)):
        with monkeypatch.context() as patch:
            computed = interrupt_at(patch, stop)
            assert run(volume, tmp_path / "out") == status
    assert len(computed) == 1  # the fifth
    run(volume, tmp_path / "plain")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_page_costs_a_line_of_the_journal_and_a_torn_one_costs_that_page(volume, tmp_path, monkeypatch):
    written: list[Path] = []
    whole = storage.write_whole

    def counted(target: Path, data: bytes) -> str:
        written.append(target)
        return whole(target, data)

    monkeypatch.setattr(storage, "write_whole", counted)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert run(volume, tmp_path / "out") == 130
    assert [path.name for path in written].count("artifact-report.json") == 1
    journal = tmp_path / "out.partial" / cli.JOURNAL
    first, second = journal.read_bytes().splitlines(keepends=True)
    assert json.loads(first)["source"] == NAMES[0] and json.loads(second)["source"] == NAMES[1]
    journal.write_bytes(first + second[:40])
    with monkeypatch.context() as patch:
        computed = interrupt_at(patch, 2)
        assert run(volume, tmp_path / "out") == 130 and len(computed) == 1
    computed = interrupt_at(monkeypatch, 99)
    assert run(volume, tmp_path / "out") == 0 and len(computed) == 1
    run(volume, tmp_path / "plain")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_page_added_beside_one_of_its_name_takes_no_other_page_s_place(volume, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        run(volume, tmp_path / "out")
    added = cv2.imencode(".jpg", grey(26, 22))[1].tobytes()
    (volume / NAMES[0]).with_suffix(".jpg").write_bytes(added)  # is called as 001.png was
    write = cli.Volume._write

    def slowly(*arguments):
        time.sleep(0.3)  # while what the other page left is looked at
        return write(*arguments)

    monkeypatch.setattr(cli.Volume, "_write", slowly)
    assert run(volume, tmp_path / "out") == 0
    run(volume, tmp_path / "plain")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


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
    assert len(computed) == 1
    plan = json.loads(contents(tmp_path / "out")["artifact-report.json"])["plan"]
    assert {one["convolutions"] for one in plan["choices"] or [plan]} == {"winograd"}


@pytest.mark.parametrize("model", [COMPACT, "auto"])
@pytest.mark.parametrize("first, kept", [(False, "fp32"), (True, "bf16")])
def test_a_volume_that_goes_on_keeps_the_precision_that_was_measured_first(
    volume, tmp_path, monkeypatch, model, first, kept
):
    flags = ["--precision", "auto", "--model", model]
    for page, pays, status in ((3, first, 130), (99, not first, 0)):
        with monkeypatch.context() as patch:
            computed = interrupt_at(patch, page)
            patch.setattr(upscaling, "faster_and_near", lambda *_, pays=pays: pays)
            assert run(volume, tmp_path / "out", *flags) == status
    assert len(computed) == 1
    plan = json.loads(contents(tmp_path / "out")["artifact-report.json"])["plan"]
    assert {one["precision"] for one in plan["choices"] or [plan]} == {kept}


@pytest.mark.parametrize(
    "change", [{"precision": "bf16", "machine": "another"}, {"precision": "bf16"}, {"precision": "none"}]
)
def test_a_volume_does_not_go_on_by_a_precision_that_was_not_measured_here(
    volume, tmp_path, monkeypatch, capsys, change
):
    monkeypatch.setattr(upscaling, "faster_and_near", lambda *_: False)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert run(volume, tmp_path / "out", "--precision", "auto") == 130
    record = tmp_path / "out.partial" / "artifact-report.json"
    report = json.loads(record.read_bytes())
    report["plan"] |= change
    report["chosen"] |= {"precision": change["precision"]} if change["precision"] == "bf16" else {}
    record.write_text(json.dumps(report))
    was = contents(tmp_path / "out.partial")
    assert run(volume, tmp_path / "out", "--precision", "auto") == 2
    assert f"precision {change['precision']}, now " in capsys.readouterr().err
    assert contents(tmp_path / "out.partial").items() >= was.items()


def test_a_volume_goes_on_with_another_version_and_says_of_which_pages(volume, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert run(volume, tmp_path / "out") == 130
    record = tmp_path / "out.partial" / "artifact-report.json"
    record.write_bytes(record.read_bytes().replace(b'"machine": "', b'"machine": "another '))
    assert run(volume, tmp_path / "out") == 0
    report = json.loads(contents(tmp_path / "out")["artifact-report.json"])
    assert report["plan"]["machine"].startswith("another ")
    deviations = [item["deviation"] for item in report["items"]]
    assert deviations[0] is None and deviations[-1].startswith("on ")


@pytest.mark.parametrize(
    ("first", "then", "says"),
    [
        ([], ["--format", "png"], "output_format jpg, now png"),
        ([], ["--convolutions", "winograd"], "convolutions direct, now winograd"),
        (["--max-page-bytes", "50000"], [], "max_page_bytes 50000, now None"),
        (["--spreads", "split", "--reading-direction", "ltr"], ["--spreads", "split"], "ltr, now rtl"),
    ],
)
def test_pages_made_otherwise_are_not_thrown_away_for_a_mistyped_flag(
    volume, tmp_path, monkeypatch, capsys, first, then, says
):
    require(then[-1:] != ["winograd"] or "winograd" in rolling.usable_kinds(), "fewer products are for x86")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        run(volume, tmp_path / "out", *first)
    assert run(volume, tmp_path / "out", *then) == 2
    assert says in (told := capsys.readouterr().err) and "begin anew" in told
    computed = interrupt_at(monkeypatch, 99)
    assert run(volume, tmp_path / "out", *first) == 0 and len(computed) == 1


def test_pages_that_failed_hold_nobody_to_the_settings_with_which_they_did(volume, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(upscaling.Engines, "compute", lambda *_: 1 / 0)
        assert run(volume, tmp_path / "out") == 2
    assert run(volume, tmp_path / "out", "--format", "png") == 0


def test_a_record_that_cannot_be_read_is_not_written_over(volume, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        run(volume, tmp_path / "out")
    record = tmp_path / "out.partial" / "artifact-report.json"
    kept = record.read_bytes()
    record.write_bytes(b"{")
    assert run(volume, tmp_path / "out") == 2 and "can't be understood" in capsys.readouterr().err
    record.write_bytes(kept)
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == cli.JOURNAL:
            raise PermissionError(13, "in use by another program", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        assert run(volume, tmp_path / "out") == 2
    computed = interrupt_at(monkeypatch, 99)
    assert run(volume, tmp_path / "out") == 0 and len(computed) == 1


def test_a_volume_that_another_command_has_finished_meanwhile_is_not_written_over(
    volume, tmp_path, monkeypatch, capsys
):
    def meanwhile(*_: object) -> None:
        (tmp_path / "out.cbz").write_bytes(b"another's")

    monkeypatch.setattr(cli, "check_places", meanwhile)
    assert run(volume, tmp_path / "out.cbz") == 2 and "exists" in capsys.readouterr().err
    assert (tmp_path / "out.cbz").read_bytes() == b"another's"
    assert not (tmp_path / "out.cbz.partial").exists()


def test_of_two_commands_at_work_on_one_volume_the_second_is_refused(volume, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    with open(tmp_path / "out.partial" / cli.LOCK, "a+b") as file:
        storage.lock_file(file)
        assert run(volume, tmp_path / "out") == 2
    assert "another infer.py is at work" in capsys.readouterr().err
    assert run(volume, tmp_path / "out") == 0  # of a command that was killed nothing is left but the file
    assert not (tmp_path / "out" / cli.LOCK).exists()


def test_a_page_that_another_program_wrote_over_is_not_taken_for_the_input_s(
    volume, tmp_path, monkeypatch, capsys
):
    stage = inputs.stage_input

    def meddled(source: Path, staging: Path, *rest: object) -> list[SourcePage]:
        staged = list(stage(source, staging, *rest))
        shutil.copy(staging / staged[2].staged, staging / staged[1].staged)
        return staged

    monkeypatch.setattr(inputs, "stage_input", meddled)
    assert run(volume, tmp_path / "out") == 2
    assert "another program is at work" in capsys.readouterr().err


def test_pages_that_could_not_be_read_are_waited_for(volume, tmp_path, monkeypatch, capsys):
    """A share that goes away at night: what was read is done, and nothing is packed without the others."""
    opened = inputs.open_entry

    def failing(entry: inputs.Entry, *rest: object) -> object:
        if entry.name != NAMES[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(entry, *rest)

    def gone(source: Path, *rest: object) -> list[SourcePage]:
        staged = list(stage(source, *rest))
        source.rename(tmp_path / "unplugged")
        return staged

    stage = inputs.stage_input
    with monkeypatch.context() as away:
        away.setattr(inputs, "open_entry", failing)
        away.setattr(inputs, "stage_input", gone)
        assert run(volume, tmp_path / "out.cbz") == 2
    (tmp_path / "unplugged").rename(volume)
    told = capsys.readouterr().err
    assert f"2 of 3 pages could not be read, the first is {NAMES[1]}" in told
    assert not (tmp_path / "out.cbz").exists()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert run(volume, tmp_path / "out.cbz") == 130
        patch.setattr(inputs, "open_entry", failing)  # now also of a page that is done
        assert run(volume, tmp_path / "out.cbz") == 2
    computed = interrupt_at(monkeypatch, 99)
    assert run(volume, tmp_path / "out.cbz") == 0 and len(computed) == 1
    assert verify.main(["verify", str(tmp_path / "out.cbz"), "--against", str(volume)]) == 0


def test_a_volume_of_bad_pages_is_no_volume(volume, tmp_path, capsys):
    for name in NAMES:
        (volume / name).write_bytes(b"no picture")
    assert run(volume, tmp_path / "out") == 2
    assert "no page could be upscaled" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_fault_amid_a_page_is_that_page_s_and_any_other_is_no_status_of_success(
    volume, tmp_path, monkeypatch, capsys
):
    compute = upscaling.Engines.compute

    def faulty(self: upscaling.Engines, pixels: np.ndarray, *rest: object) -> object:
        if pixels.shape[1] == 21:
            raise RuntimeError("a driver's fault (injected)")
        return compute(self, pixels, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(upscaling.Engines, "compute", faulty)
        assert run(volume, tmp_path / "out") == 1
        with monkeypatch.context() as encoder:
            encoder.setattr(pages, "encode", lambda *_: 1 / 0)
            assert run(volume, tmp_path / "none") == 2
        patch.setattr(devices, "card_is_lost", lambda slot: True)
        assert run(volume, tmp_path / "other") == 2
        patch.setattr(cli, "check_places", lambda *_: 1 / 0)
        assert run(volume, tmp_path / "third") == 2
    told = capsys.readouterr().err
    assert "kept as it is: RuntimeError: a driver's fault" in told and "the card no longer answers" in told
    assert "ZeroDivisionError" in told and not (tmp_path / "other").exists()


def test_the_service_s_limits_hold_and_can_be_raised(volume, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REICHAN_MAX_PAGES", "2")
    assert run(volume, tmp_path / "out") == 2
    assert "REICHAN_MAX_PAGES" in capsys.readouterr().err
    monkeypatch.setenv("REICHAN_MAX_PAGES", "many")
    assert run(volume, tmp_path / "out") == 2
    assert "must be a whole number" in capsys.readouterr().err
    monkeypatch.setenv("REICHAN_MAX_PAGES", "3")
    assert run(volume, tmp_path / "out") == 0


@pytest.mark.parametrize("change", ["source", "output"])
def test_nothing_is_kept_that_no_longer_fits(volume, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        run(volume, tmp_path / "out")
    if change == "source":
        (volume / NAMES[0]).write_bytes(cv2.imencode(".png", grey(26, 22))[1].tobytes())
    else:
        (tmp_path / "out.partial" / NAMES[0]).with_suffix(".jpg").write_bytes(b"garbage")
    assert run(volume, tmp_path / "out") == 0
    run(volume, tmp_path / "plain")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_volume_that_is_done_is_no_failure_for_what_the_system_does_not_let_go_of(
    volume, tmp_path, monkeypatch, capsys
):
    remove = shutil.rmtree

    def held(place: Path, **rest: bool) -> None:
        if str(place).endswith(".partial"):
            raise PermissionError(13, "in use by another program", str(place))
        remove(place, **rest)

    monkeypatch.setattr(shutil, "rmtree", held)
    assert run(volume, tmp_path / "out.cbz") == 0
    told = capsys.readouterr().err
    assert "out.cbz.partial is not needed any more" in told and "in use" in told
    assert verify.main(["verify", str(tmp_path / "out.cbz"), "--against", str(volume)]) == 0


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


@pytest.mark.parametrize("source", ["out.partial", "out.partial/volume.cbz", "out.partial/in"])
def test_an_input_where_pages_would_be_gathered_is_refused(volume, tmp_path, capsys, source):
    place = tmp_path / source
    if source.endswith(".cbz"):
        place.parent.mkdir()
        zipped(volume, place)
    else:
        shutil.copytree(volume, place)
    (tmp_path / "out.partial" / "artifact-report.json").write_bytes(b"of an earlier run")
    before = contents(tmp_path / "out.partial")
    assert run(place, tmp_path / "out") == 2
    assert "pages would be gathered" in capsys.readouterr().err
    assert contents(tmp_path / "out.partial") == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_someone_s_own_is_not_emptied_for_pages_to_be_gathered(volume, tmp_path, capsys, is_folder):
    theirs = tmp_path / "out.partial" / "notes.txt" if is_folder else tmp_path / "out.partial"
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_bytes(b"mine")
    assert run(volume, tmp_path / "out") == 2
    assert "rename it, or choose another OUT" in capsys.readouterr().err
    assert theirs.read_bytes() == b"mine"
    theirs.unlink()
    assert run(volume, tmp_path / "out") == 0


def test_an_interruption_while_other_files_are_kept_is_gone_on_with(volume, tmp_path, monkeypatch):
    (volume / "notes.txt").write_bytes(b"notes")
    keep_one = containers._keep_one

    def interrupted(*arguments):
        keep_one(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(containers, "_keep_one", interrupted)
        assert run(volume, tmp_path / "out.cbz") == 130
    assert (tmp_path / "out.cbz.partial" / "notes.txt").is_file()
    assert run(volume, tmp_path / "out.cbz") == 0
    assert contents(tmp_path / "out.cbz")["notes.txt"] == b"notes"


def test_the_command_itself_runs(volume, tmp_path):
    command = [sys.executable, "infer.py", str(volume), str(tmp_path / "out.cbz"), "--model", COMPACT]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "[3/3] 100%" in done.stderr and set(contents(tmp_path / "out.cbz")) >= {"artifact-report.json"}
