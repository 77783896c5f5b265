"""`python storage.py verify`: every hash, line by line, with the standard library alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from ondisk import sha
from serving import png, volume

from commands import verify
from files import artifacts

ROOT = Path(__file__).parents[1]
SOURCES = {"1.png": png(shade=1), "v/2.png": png(shade=2), "v/10.png": png(shade=3)}
OTHERS = {"notes.txt": b"notes", "old.json": b"{}"}


def facts(name: str, data: bytes) -> dict[str, object]:
    return {"filename": name, "sha256": sha(data), "bytes": len(data)}


def made(tmp_path: Path, kind: str) -> Path:
    """An artifact of the sources, whose pages are the sources backwards."""
    outputs, files = tmp_path / "outputs", []
    for name, data in (SOURCES | OTHERS).items():
        (outputs / name).parent.mkdir(parents=True, exist_ok=True)
        (outputs / name).write_bytes(data[::-1] if name in SOURCES else data)
    items = [facts(name, data[::-1]) | {"source": facts(name, data)} for name, data in SOURCES.items()]
    files = [facts(name, data) | {"source": facts(name, data)} for name, data in OTHERS.items()]
    lost = {"filename": None, "source": {"filename": "big.txt"}, "error": "left out"}
    report = {"items": items} | ({"files": [*files, lost]} if kind == "cbz" else {})
    artifacts.pack(outputs, tmp_path / f"a.{kind}", report)
    return tmp_path / f"a.{kind}"


def inputs(tmp_path: Path, changes: dict[str, bytes | None] | None = None) -> list[Path]:
    """The sources as folder and as archive, with changes; None takes a file away."""
    files = {name: data for name, data in (SOURCES | OTHERS | (changes or {})).items() if data is not None}
    for name, data in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in.zip").write_bytes(volume(files))
    return [tmp_path / "in", tmp_path / "in.zip"]


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """Exit status, and the lines that name something wrong."""
    status = verify.main(["verify", *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    return status, [line for line in lines if line.startswith(("WRONG", "SOURCE"))]


@pytest.mark.parametrize("kind", ["zip", "cbz"])
def test_a_whole_artifact_is_proved_alone_and_against_its_input(tmp_path, capsys, kind):
    artifact = made(tmp_path, kind)
    assert told(capsys, artifact) == (0, [])
    for source in inputs(tmp_path):
        assert told(capsys, artifact, "--against", source) == (0, [])


def rewritten(artifact: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Put other members into an artifact, in a zip that is itself in order."""
    with zipfile.ZipFile(artifact) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    artifact.write_bytes(volume(members))


@pytest.mark.parametrize("kind", ["zip", "cbz"])
@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: m.update({"v/2.png": b"other"}), ["v/2.png: is not what was packed"]),
        (lambda m: m.pop("1.png"), ["1.png: is missing"]),
        (lambda m: m.update({"new.png": b"x"}), ["new.png: is not in the report"]),
        (lambda m: m.update({"1.png": m.pop("1.png")}), ["lists the files in another order"]),
        (
            lambda m: (m.pop("1.png"), m.update({"v/2.png": b"", "a\x1b[2Jb": b""})),
            ["1.png: is missing", "v/2.png: is not", "a\\x1b[2Jb: is not in the report"],
        ),
        (lambda m: m.pop("artifact-report.json"), ["is no artifact with a report"]),
        (lambda m: m.update({"artifact-report.json": b"{"}), ["is no artifact with a report"]),
        (lambda m: m.update({"artifact-report.json": b'{"items": [[]]}'}), ["is no artifact with a report"]),
        (lambda m: m.update({"artifact-report.json": b"[" * 100_000}), ["is no artifact with a report"]),
    ],
)
def test_each_thing_that_is_wrong_has_its_line(tmp_path, capsys, kind, change, says):
    artifact = made(tmp_path, kind)
    rewritten(artifact, change)
    status, lines = told(capsys, artifact)
    assert status == 1 and len(lines) == len(says)
    assert all(any(part in line for line in lines) for part in says), lines


@pytest.mark.parametrize("kind", ["zip", "cbz"])
def test_a_file_that_stands_twice_is_told(tmp_path, capsys, kind):
    artifact = made(tmp_path, kind)
    with zipfile.ZipFile(artifact, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("1.png", archive.read("1.png"))
    assert told(capsys, artifact) == (1, ["WRONG  1.png: is there 2 times"])


@pytest.mark.parametrize("kind", ["zip", "cbz"])
def test_a_page_that_stands_in_the_report_twice_is_told(tmp_path, capsys, kind):
    artifact = made(tmp_path, kind)

    def listed_twice(members: dict[str, bytes]) -> None:
        report = json.loads(members["artifact-report.json"])
        report["items"].append(report["items"][0])
        members["artifact-report.json"] = json.dumps(report).encode()

    rewritten(artifact, listed_twice)
    status, lines = told(capsys, artifact)
    assert status == 1 and "WRONG  1.png: is in the report more than once" in lines


@pytest.mark.parametrize("kind", ["zip", "cbz"])
def test_each_source_that_differs_has_its_line(tmp_path, capsys, kind):
    artifact = made(tmp_path, kind)
    changes = {
        "1.png": None,
        "v/2.png": png(shade=9),
        "v/3.png": png(),
        "notes.txt": b"new",
        "big.txt": b"big",
    }
    for source in inputs(tmp_path, changes):
        status, lines = told(capsys, artifact, "--against", source)
        expected = {"1.png: is not in the input", "v/2.png: differs", "v/3.png: is in the input, and not"}
        expected |= {"notes.txt: differs"} if kind == "cbz" else set()
        assert status == 1 and len(lines) == len(expected)
        assert all(any(part in line for line in lines) for part in expected), lines


def test_two_pages_of_one_name_are_told_apart_by_hash(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive, pytest.warns(UserWarning):
        archive.writestr("1.png", b"one")
        archive.writestr("1.png", b"two")
    pages = {"1.png": b"2", "1.png.png": b"1"}
    sources = [facts("1.png", b"two"), facts("1.png", b"one")]
    items = [
        facts(name, page) | {"source": source}
        for (name, page), source in zip(pages.items(), sources, strict=True)
    ]
    for name, page in pages.items():
        (tmp_path / name).write_bytes(page)
    (tmp_path / "outputs").mkdir()
    for name in pages:
        (tmp_path / name).rename(tmp_path / "outputs" / name)
    artifacts.pack(tmp_path / "outputs", tmp_path / "a.zip", {"items": items})
    assert told(capsys, tmp_path / "a.zip", "--against", tmp_path / "in.zip") == (0, [])


@pytest.mark.parametrize("kind", ["zip", "cbz"])
def test_no_damage_ends_in_a_traceback_and_none_to_a_page_is_missed(tmp_path, capsys, kind):
    artifact = made(tmp_path, kind)
    data, rng = artifact.read_bytes(), random.Random(3)
    for _ in range(150):
        at = rng.randrange(len(data))
        artifact.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        assert told(capsys, artifact)[0] in (0, 1)
    page = SOURCES["v/2.png"][::-1]
    for at in range(data.index(page), data.index(page) + len(page), 7):
        artifact.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        status, lines = told(capsys, artifact)
        assert status == 1 and len(lines) == 1 and "v/2.png" in lines[0]
    for length in range(0, len(data), 97):
        artifact.write_bytes(data[:length])
        assert told(capsys, artifact)[0] == 1


def test_what_can_not_be_looked_at_is_exit_status_2(tmp_path, capsys):
    artifact = made(tmp_path, "zip")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.zip").write_bytes(b"no zip")
    os.mkfifo(tmp_path / "pipe")
    assert told(capsys, tmp_path / "nowhere.zip")[0] == 2
    assert told(capsys, tmp_path / "pipe")[0] == 2
    for against in ("nowhere", "empty", "no.zip"):
        assert told(capsys, artifact, "--against", tmp_path / against)[0] == 2
    with pytest.raises(SystemExit) as ended:
        verify.main(["verify"])
    assert ended.value.code == 2


def test_the_command_needs_nothing_but_the_standard_library(tmp_path):
    """-S: nothing of what pip installed can be imported."""
    artifact = made(tmp_path, "cbz")
    command = [sys.executable, "-S", str(ROOT / "storage.py"), "verify", str(artifact), "--against"]
    done = subprocess.run([*command, str(inputs(tmp_path)[0])], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert sha(artifact.read_bytes()) in done.stdout and "all proved (3 pages, 2 other files" in done.stdout
    code = "import json, sys; from commands import verify; print(json.dumps(sorted(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, cwd=ROOT, check=True)
    assert not {"socket", "ssl", "urllib.request"} & {*json.loads(loaded.stdout)}
