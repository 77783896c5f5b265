"""inputs.py: places in incoming/, folders and archives staged, hostile ones, manifests; on real files."""

from __future__ import annotations

import bz2
import io
import json
import os
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
from helpers import require
from ondisk import ESCAPES, EVIL, HERE, make_folder, make_zip, sha

import storage
from files import artifacts, inputs
from messages import Limits, SourcePage


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


# ---------------------------------------------------------------- places in incoming/
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


def test_a_path_too_long_for_the_file_system_is_outside_incoming(layout):
    path = "/".join(["d" * 200] * 20) + "/" + "x" * 70 + ".zip"
    with pytest.raises(storage.OutsideIncoming):
        inputs.resolve_incoming(layout, path)


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    "path", ["gone", "other", "漫" * 100, "/".join(["d" * 250] * 16 + ["e" * 75])], ids=range(4)
)
def test_an_input_that_is_not_there_or_of_another_kind_is_missing(layout, kind, path):
    (layout.incoming / "other").mkdir() if kind == "zip" else (layout.incoming / "other").write_bytes(b"")
    with pytest.raises((storage.InputMissing, storage.OutsideIncoming)):
        inputs.check_input(inputs.resolve_incoming(layout, path), kind, Limits())


# ---------------------------------------------------------------- staging
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
    "@eaDir/001.png/SYNOPHOTO_THUMB_M.jpg": b"x",
    "ch2/@eaDir/1.jpg/SYNOINDEX_MEDIA_INFO": b"x",
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


def test_an_archives_own_root_is_no_unsafe_name(tmp_path):
    source = make_zip(tmp_path / "v.zip", {"./": b"", "./1.png": b"page"})
    assert [page.name for page in stage(source, tmp_path / "staging")[0]] == ["1.png"]


def test_names_of_an_archive_without_the_utf8_flag_are_read_as_written(tmp_path):
    raw = "表紙/第01話.png".encode("cp932")
    plain = "x" * (len(raw) - 4) + ".png"  # as long: both headers take the raw name in its place
    source = make_zip(tmp_path / "v.zip", {plain: b"page"})
    source.write_bytes(source.read_bytes().replace(plain.encode(), raw))
    assert [page.name for page in stage(source, tmp_path / "staging")[0]] == ["表紙/第01話.png"]


def unicode_path(raw: bytes, name: bytes, version: int = 1) -> bytes:
    """Info-ZIP's Unicode Path field of an entry of this raw name, behind a field of another kind."""
    data = struct.pack("<BL", version, zlib.crc32(raw)) + name
    return struct.pack("<HHB", 0x5455, 1, 0) + struct.pack("<HH", 0x7075, len(data)) + data


def zip_by_winrar(path: Path, entries: list[tuple[str, str]]) -> Path:
    """A zip of (raw name, name in its Unicode Path field), each holding the latter."""
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate name")
        for raw, name in entries:
            info = zipfile.ZipInfo(raw)
            info.extra = unicode_path(raw.encode(), name.encode())
            archive.writestr(info, name)
    return path


def test_folders_whose_raw_names_are_one_are_told_apart_by_the_unicode_path_field(tmp_path):
    """As WinRAR writes what its code page lacks."""
    names = [f"{folder}/{n}.png" for folder in ("上", "中", "下") for n in (1, 2)]
    source = zip_by_winrar(tmp_path / "v.zip", [(f"_/{name[2:]}", name) for name in names])
    staged, _ = stage(source, tmp_path / "staging")
    assert [page.name for page in staged] == sorted(names, key=storage.natural_key)
    for page in staged:
        assert (tmp_path / "staging" / page.staged).read_text() == page.name
    staged, _ = stage(source / "中", tmp_path / "staging")
    assert [(page.name, page.sha256) for page in staged] == [
        ("1.png", sha("中/1.png".encode())), ("2.png", sha("中/2.png".encode()))
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/x.png", "C:x.png", "x\0.png"], ids=ascii)
def test_a_name_of_the_unicode_path_field_leads_nowhere_else(tmp_path, name):
    source = zip_by_winrar(tmp_path / "v.zip", [("1.png", name)])
    with pytest.raises(storage.UnsafeName):
        stage(source, tmp_path / "staging")
    assert not (tmp_path / "staging").exists()


PATHS = [
    ("_.png", unicode_path(b"_.png", "上.png".encode()), "上.png"),
    ("é.png", unicode_path(b"\x82.png", "上.png".encode()), "上.png"),
    ("_.png", unicode_path(b"-.png", "上.png".encode()), "_.png"),
    ("_.png", unicode_path(b"_.png", "上.png".encode(), version=2), "_.png"),
    ("_.png", unicode_path(b"_.png", b"\xff.png"), "_.png"),
    ("_.png", unicode_path(b"_.png", b""), "_.png"),
    ("_.png", unicode_path(b"_.png", b"")[:-2], "_.png"),
    ("表紙.png".encode("cp932").decode("cp437"), unicode_path(b"other", b"x.png"), "表紙.png"),
]


@pytest.mark.parametrize(("raw", "extra", "want"), PATHS, ids=range(len(PATHS)))
def test_a_unicode_path_field_counts_where_it_is_of_the_raw_name_and_is_utf8(raw, extra, want):
    info, other = zipfile.ZipInfo(raw), zipfile.ZipInfo("第01話.png".encode("cp932").decode("cp437"))
    info.extra = extra
    assert inputs._entry_names([info, other]) == [want, "第01話.png"]


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


def test_an_empty_page_whose_bytes_arrive_beside_it_is_left_out(tmp_path):
    """As Copyparty does it. One that is merely empty is a page, and says so."""
    for name in ("1.png", "2.png", "2.png.PARTIAL", "22.png", "3.png", ".3.png.PARTIAL"):
        (tmp_path / name).write_bytes(b"" if name in ("2.png", "22.png", "3.png") else b"x")
    listing = inputs.list_folder(tmp_path, Limits())
    assert [page.name for page in listing.pages] == ["1.png", "22.png"]
    assert listing.left_out == 3


def test_a_full_disk_ends_the_attempt_and_is_not_blamed_on_a_page(tmp_path, monkeypatch):
    require(os.path.exists("/dev/full"), "there is no /dev/full")
    source = make_folder(tmp_path / "v", {"1.png": b"p" * storage.CHUNK_BYTES})
    full = lambda path, mode: open("/dev/full" if mode == "wb" else path, mode)  # noqa: E731
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
    inputs.check_input(source, "zip", Limits())
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
        inputs.check_input(source, "zip", Limits())
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
    started_s = time.process_time()  # whatever else the machine computes
    tracemalloc.start()
    with pytest.raises(storage.InputUnusable):
        stage(hostile.root / "archives" / name, tmp_path / "staging")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20 and time.process_time() - started_s < 2
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


@pytest.mark.parametrize("comment", [b"", b"a comment"])
@pytest.mark.parametrize("before", [b"", b"#!self-extracting\n"])
def test_too_many_entries_are_refused_before_the_archive_is_opened(tmp_path, monkeypatch, comment, before):
    """zipfile makes an object of each, a kilobyte or so, before anybody can count them."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for n in range(101):
            archive.writestr(f"{n}.png", b"")
        archive.comment = comment
    source = tmp_path / "v.zip"
    source.write_bytes(before + data.getvalue())
    with inputs.opened(source, Limits(entries=101)) as opened:
        assert opened is not None
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(storage.LimitExceeded, match="entries in the archive: 101"), inputs.opened(
        source, Limits(entries=100)
    ):
        pass


def test_too_many_entries_of_a_zip64_are_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 50)
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        for n in range(101):
            archive.writestr(f"{n}.png", b"")
    assert b"PK\6\7" in (tmp_path / "v.zip").read_bytes()
    with pytest.raises(storage.LimitExceeded, match="entries in the archive: 101"), inputs.opened(
        tmp_path / "v.zip", Limits(entries=100)
    ):
        pass


def test_twenty_thousand_pages_of_one_name_are_named_at_once():
    names = ["a.png"] * 20_000
    started_s = time.process_time()
    stems = storage.output_stems(names)
    assert time.process_time() - started_s < 10 and len({*stems}) == len(names)  # it took ten minutes
    assert stems[:4] == ["a", "a.png", "a (2)", "a (3)"]


def test_a_folder_of_which_a_part_can_not_be_read_is_refused_not_shortened(tmp_path, monkeypatch):
    for name in ("1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"page")
    scandir = os.scandir

    def locked(place):
        if str(place).endswith("b"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(storage.InputUnusable, match="the folder 'b' can't be read: Permission denied"):
        inputs.list_folder(tmp_path, Limits())


def test_a_file_that_goes_while_its_folder_is_looked_at_is_no_fault_of_the_disk(tmp_path, monkeypatch):
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"page")
    lstat = Path.lstat

    def gone(path):
        if path.name == "2.png":
            raise FileNotFoundError(2, "No such file or directory")
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", gone)
    assert [entry.name for entry in inputs.list_folder(tmp_path, Limits()).pages] == ["1.png"]
    assert inputs.input_sizes(tmp_path, Limits()) == [("1.png", 4)]
    with pytest.raises(storage.InputUnusable, match=r"'2\.png' is gone"):
        inputs.entry_bytes(inputs.Entry("2.png", tmp_path / "2.png", None))
