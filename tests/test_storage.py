"""storage.py: layout, names, whole files, upkeep; on real files."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import stat
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from ondisk import ESCAPES, HERE, JOB, files_below, make_folder, sha

import storage
from messages import Limits


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


def test_a_file_that_is_to_come_is_found_by_the_name_that_it_will_have():
    names = ["a.zip.part", ".b.zip.PARTIAL", "b.zip", "c.zip.part", "c.zip.extra.part", "ab.zip.part", "d.x"]
    unfinished = storage.unfinished_of(names)
    found = {name: storage.awaits(name, unfinished) for name in ("a.zip", "b.zip", "c.zip", "b", "zip", "d")}
    assert found == {
        "a.zip": "a.zip.part", "b.zip": ".b.zip.PARTIAL", "c.zip": "c.zip.extra.part", "b": ".b.zip.PARTIAL",
        "zip": None, "d": None,
    }  # fmt: skip


def test_the_key_that_names_are_sorted_by_takes_little_more_memory_than_they_do():
    name = "1a" * 2000
    (part,), _ = storage.natural_key(name)
    assert sys.getsizeof(part) < 3 * len(name)


@pytest.mark.parametrize("number, kind", [(errno.ENOLCK, "LockRefused"), (errno.EAGAIN, "AlreadyRunning")])
def test_a_file_system_without_locks_is_no_second_service(layout, monkeypatch, number, kind):
    def refuse(_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(storage, "lock_file", refuse)
    with pytest.raises(getattr(storage, kind)), storage.locked(layout):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="there no process can be asked for")
def test_what_a_killed_process_left_among_the_system_s_temporary_files_goes_and_nothing_else(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    kept = {f"{storage.scratch_prefix('archive')}a", "reichan-of-somebody-else", f"reichan-a-{'9' * 30}-b"}
    for name in (*kept, f"reichan-archive-{dead.pid}-a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "archive").touch()
    storage.sweep_scratch()
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_only_what_is_being_received_counts_as_unfinished():
    taken = "x.zip.PARTIAL-1732500000.123456-1.2.3.4"
    for name in ("x.zip.PARTIAL", ".x.zip.PARTIAL", taken, "a.part", "b.TMP"):
        assert storage.is_unfinished(name), name
    for name in ("x.zip", "partial.zip", "x.partial-cut.zip", ".tmp", "part", "1.png"):
        assert not storage.is_unfinished(name), name


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


def test_no_name_steers_a_terminal():
    assert storage.printable("作品 1.jpg: \x1b]0;owned\x07\x1b[2J\u202egpj\n") == (
        "作品 1.jpg: \\x1b]0;owned\\x07\\x1b[2J\\u202egpj\\n"
    )
