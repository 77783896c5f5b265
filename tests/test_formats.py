"""RAR, 7z, PDF and EPUB: archives by other programs, and what must not get through any of them."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
import pytest
from client import Client
from drawn import colour, grey
from helpers import require
from serving import png, until

import server
import settings
import storage
from commands import verify
from files import containers, formats, inputs
from messages import Limits, SourcePage
from work import volumes

ROOT = Path(__file__).parents[1]
PAGES = {f"ch1/{n}.png": png(shade=9 * n) for n in (1, 2, 10)}
# By WinRAR, from the tests of rarfile (ISC licence, Marko Kreen): two or more members each.
WINRAR = {
    "rar3-solid": """
        UmFyIRoHADvQcwgADQAAAAAAAAArNHSAkCwAXAAAAAAIAAADoua3xbBmzD4dMwoApIEAAHN0ZXN0MS50eHQAwBEMzP6MnrD+
        MYGrrLG7QHeoCmTWSzeDwQe8AeCFku77th0ACCAACIjpeAzSDAdhOkF4S7Nun1IK2sonQLrnC2SKYnH7uACRnlAv2FX/+sZY
        6+vE14h+VJaHH03s2RZ0kJAsAA4AAAAACAAAA6Lmt8WwZsw+HTMKAKSBAABzdGVzdDIudHh0AMCxIACIB+vyCmn6/JTe0MQ9
        ewBABwA=
    """,
    "rar5-solid": """
        UmFyIRoHAQAJ78hvCwEFBwQGAQGAgIAA3vVwchwCAroABIAQtoMCoua3xYAbAQpzdGVzdDEudHh0waw3REQj+iP2l/1iU1G+
        TJGBQQKMwQN5XL9Ho6otoDaT3aBYAEACANRQBHb2xH8y6p8ypcTM14PfABDoLYkcAgKNAASAELaDAqLmt8XAGwEKc3Rlc3Qy
        LnR4dEUVCmABAAgD37f79vwdd1ZRAwUEAA==
    """,
    "rar5-evil-symlink-traversal": """
        UmFyIRoHAQAzkrXlCgEFBgAFAQGAgAAu1g9EJQIDEgAEAO3DAgAAAACAAAECdXAKAxM+UQJqEzImFwYFAQECLi5/IjYIKgID
        C5cABJcApIMCR30ywIAAAQx1cC9wd25lZC50eHQKAxM+UQJqrNEsF1pJUFNMSVAtVklBLVNZTUxJTkstT0sKHXdWUQMFBAA=
    """,
    "rar3-comment-psw": """
        UmFyIRoHAM+QcwAADQAAAAAAAADSmXoAgCMAFgAAAAsAAAADvFDsdQAAAAAdMwMAAAAAAENNVAwAi+zL9lbBSCmPAOW/5v/w
        0Gtqdnpt1nQklDMAEAAAAAAAAAADAAAAAGxQYj0dMwkApIEAAGZpbGUxLnR4dLMOLwEQH2W9AMDh8N4nMZ14bG1Nam0XgByn
        QZl6EIAjABYAAAALAAAAA0g/bxAAAAAAHTMDAAAAAIBDTVQMAIvsy/Y2kFYseA8mb83/7NSLl8K9FLx0JJQzABAAAAAAAAAA
        AwAAAABsUGI9HTMJAKSBAABmaWxlMi50eHSzDi8BEB9lvQDA4fDeJzGdeGxtTWptF4Acp3ygehCAIwAWAAAACwAAAAOmkNoC
        AAAAAB0zAwAAAACAQ01UEBDL7Inkc0FIsM/ZJxfi/uuBj1cq9MQ9ewBABwA=
    """,
}


LINES = b"".join(b"%03d\n" % n for n in range(512))  # what each member of the solid samples holds


@pytest.fixture(autouse=True)
def installed() -> None:
    for module in ("rarfile", "py7zr", "pypdfium2"):
        require(importlib.util.find_spec(module), f"{module} is not installed: pip install '.[formats]'")


def stage(source: Path, staging: Path, **limits: Any) -> tuple[list[SourcePage], inputs.Listing]:
    *staged, listing = inputs.stage_input(source, staging, Limits(**limits))
    assert isinstance(listing, inputs.Listing)
    return [page for page in staged if isinstance(page, SourcePage)], listing


def staged_bytes(source: Path, staging: Path, **limits: Any) -> dict[str, bytes]:
    return {page.name: (staging / page.staged).read_bytes() for page in stage(source, staging, **limits)[0]}


def refusal(source: Path, **limits: Any) -> storage.InputUnusable:
    staging = source.with_name("refused")
    with pytest.raises(storage.InputUnusable) as caught:
        stage(source, staging, **limits)
    assert not staging.exists() or not any(staging.iterdir())
    assert str(source.parent) not in caught.value.detail
    return caught.value


# ---------------------------------------------------------------- making them
def seven_zip(target: Path, files: dict[str, bytes], *flags: str) -> Path:
    require(shutil.which("7z"), "7z is not installed")
    folder = target.with_name(target.name + ".d")
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    command = ["7z", "a", "-bd", "-t7z", *flags, str(target.absolute()), "."]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return target


def vint(n: int) -> bytes:
    data = b""
    while n > 127:
        data, n = data + bytes([n & 127 | 128]), n >> 7
    return data + bytes([n])


def rar_block(kind: int, body: bytes, data: bytes | None = None, extra: bytes = b"") -> bytes:
    flags = (1 if extra else 0) | (2 if data is not None else 0)
    sizes = (vint(len(extra)) if extra else b"") + (vint(len(data)) if data is not None else b"")
    head = vint(kind) + vint(flags) + sizes + body + extra
    head = vint(len(head)) + head
    return struct.pack("<I", zlib.crc32(head)) + head + (data or b"")


STORED, PACKED, SOLID = 0, 3 << 7, 4  # RAR 5: methods of a member, a flag of an archive


def rar(
    target: Path,
    files: dict[str, bytes],
    sizes: dict[str, int] | None = None,
    how: int = STORED,
    flags: int = 0,
) -> Path:
    """A RAR 5 archive. sizes: what members say of themselves against the truth."""
    blocks = [b"Rar!\x1a\x07\x01\x00", rar_block(1, vint(flags))]
    for name, data in files.items():
        size = (sizes or {}).get(name, len(data))
        plain = (
            vint(4) + vint(size) + vint(0o100644) + struct.pack("<I", zlib.crc32(data)) + vint(how) + vint(1)
        )
        blocks.append(rar_block(2, plain + vint(len(name.encode())) + name.encode(), data))
    target.write_bytes(b"".join([*blocks, rar_block(5, vint(0))]))
    return target


def winrar(target: Path, name: str, rename: bytes = b"") -> Path:
    """A sample; `rename` takes the place of b"txt" in its names, and the headers' checksums follow."""
    data = bytearray(base64.b64decode(WINRAR[name]))
    if rename:
        at = 7
        while (found := data.find(b".txt", at)) >= 0:
            data[found + 1 : found + 4] = rename
            at = found + 4
        fix_rar3(data) if name.startswith("rar3") else fix_rar5(data)
    target.write_bytes(data)
    return target


def fix_rar3(data: bytearray) -> None:
    at = 7
    while at < len(data):
        _, _, flags, size = struct.unpack_from("<HBHH", data, at)
        struct.pack_into("<H", data, at, zlib.crc32(data[at + 2 : at + size]) & 0xFFFF)
        at += size + (struct.unpack_from("<I", data, at + 7)[0] if flags & 0x8000 else 0)


def fix_rar5(data: bytearray) -> None:
    at = 8
    while at < len(data):
        size, begin = read_vint(data, at + 4)
        struct.pack_into("<I", data, at, zlib.crc32(data[at + 4 : begin + size]))
        _, place = read_vint(data, begin)
        flags, place = read_vint(data, place)
        place = read_vint(data, place)[1] if flags & 1 else place
        at = begin + size + (read_vint(data, place)[0] if flags & 2 else 0)


def read_vint(data: bytearray, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def rename_in_7z(path: Path, old: str, new: str) -> Path:
    """Another name of the same length in a 7z whose header is plain (-mhc=off)."""
    data = bytearray(path.read_bytes())
    before, after = old.encode("utf-16-le"), new.encode("utf-16-le")
    assert len(before) == len(after) and data.count(before) == 1
    at = data.find(before)
    data[at : at + len(after)] = after
    offset, size = struct.unpack_from("<QQ", data, 12)
    struct.pack_into("<I", data, 28, zlib.crc32(data[32 + offset : 32 + offset + size]))
    struct.pack_into("<I", data, 8, zlib.crc32(data[12:32]))
    path.write_bytes(data)
    return path


def encoded(pixels: np.ndarray, suffix: str = ".jpg") -> bytes:
    return cv2.imencode(suffix, pixels)[1].tobytes()


def decoded(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def pdf(target: Path, content: bytes, box: tuple[int, int] = (200, 300), more: bytes = b"") -> Path:
    """A PDF of one page with this content, by hand."""
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 %d %d]/Contents 4 0 R/Resources<<%b>>>>" % (*box, more)
    stream = b"<</Length %d>>stream\n%b\nendstream" % (len(content), content)
    bodies = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>", page, stream]
    data, offsets = b"%PDF-1.4\n", []
    for n, body in enumerate(bodies, 1):
        offsets.append(len(data))
        data += b"%d 0 obj%b\nendobj\n" % (n, body)
    table = b"".join(b"%010d 00000 n \n" % at for at in offsets)
    start = len(data)
    data += b"xref\n0 5\n0000000000 65535 f \n" + table
    target.write_bytes(data + b"trailer<</Size 5/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % start)
    return target


def img2pdf(target: Path, *images: bytes, **layout: Any) -> Path:
    require(importlib.util.find_spec("img2pdf"), "img2pdf is not installed")
    import img2pdf as tool

    target.write_bytes(tool.convert(list(images), **layout))
    return target


# ---------------------------------------------------------------- 7z
METHODS = {
    "stored": ["-mx0"],
    "solid": ["-mx9", "-ms=on"],
    "ppmd": ["-m0=PPMd"],
    "bzip2": ["-m0=BZip2"],
}


@pytest.mark.parametrize("method", METHODS)
def test_pages_of_a_7z_come_out_as_7zip_packed_them(method, tmp_path):
    files = PAGES | {"ch1/notes.txt": b"text", "empty.png": b"", "manifest.json": b'{"files": ["1.png"]}'}
    source = seven_zip(tmp_path / "v.cb7", files, *METHODS[method])
    pages, listing = stage(source, tmp_path / "staging")
    assert [page.name for page in pages] == ["ch1/1.png", "ch1/2.png", "ch1/10.png", "empty.png"]
    assert [page.error for page in pages] == [None] * 4
    assert [(tmp_path / "staging" / page.staged).read_bytes() for page in pages] == [*PAGES.values(), b""]
    assert (listing.left_out, listing.manifest) == (2, {"files": ["1.png"]})


def test_a_flipped_byte_in_a_stored_7z_costs_its_page_alone(tmp_path):
    source = seven_zip(tmp_path / "v.7z", PAGES, "-mx0")
    data = bytearray(source.read_bytes())
    data[data.find(PAGES["ch1/2.png"]) + 60] ^= 1
    source.write_bytes(data)
    pages, _ = stage(source, tmp_path / "staging")
    assert [bool(page.error) for page in pages] == [False, True, False]
    assert "checksum" in pages[1].error
    assert (tmp_path / "staging" / pages[2].staged).read_bytes() == PAGES["ch1/10.png"]


def test_damage_in_a_solid_block_costs_what_stands_behind_it(tmp_path):
    noise = np.random.RandomState(1)
    files = {f"{n}.bmp": noise.bytes(30_000) for n in range(1, 6)}
    source = seven_zip(tmp_path / "v.7z", files, "-mx9", "-ms=on")
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 0xFF
    source.write_bytes(data)
    pages, _ = stage(source, tmp_path / "staging")
    whole = [page.name for page in pages if not page.error]
    assert whole[:2] == ["1.bmp", "2.bmp"] and len(whole) < 5
    for page in pages:
        if not page.error:
            assert (tmp_path / "staging" / page.staged).read_bytes() == files[page.name]


def test_a_7z_name_that_leads_out_is_refused(tmp_path):
    source = seven_zip(tmp_path / "v.7z", {"a.png": b"1", "bb/evil.png": b"2"}, "-mhc=off")
    error = refusal(rename_in_7z(source, "bb/evil", "../evil"))
    assert error.code == "UNSAFE_NAME" and not (tmp_path / "evil.png").exists()


def test_a_link_in_a_7z_is_refused(tmp_path):
    folder = tmp_path / "v.7z.d"
    folder.mkdir()
    (folder / "link.png").symlink_to("/etc/hostname")
    assert refusal(seven_zip(tmp_path / "v.7z", {"a.png": b"1"}, "-snl")).code == "UNSAFE_NAME"


# ---------------------------------------------------------------- RAR
def test_pages_of_a_rar_come_out_as_they_went_in(tmp_path):
    source = rar(tmp_path / "v.cbr", PAGES | {"notes.txt": b"text"})
    pages, listing = stage(source, tmp_path / "staging")
    assert [page.name for page in pages] == list(PAGES) and listing.left_out == 1
    assert [(tmp_path / "staging" / page.staged).read_bytes() for page in pages] == list(PAGES.values())


def unpackers() -> None:
    require(shutil.which("unar") and shutil.which("bsdtar"), "unar or bsdtar is not installed")


# unar 1.10 takes the second sample for a part of several.
@pytest.mark.parametrize(
    ("name", "tool"),
    [("rar3-solid", "unar"), ("rar3-solid", "both"), ("rar5-solid", "bsdtar"), ("rar5-solid", "both")],
)
def test_solid_archives_by_winrar_come_out_whole(name, tool, tmp_path, monkeypatch):
    unpackers()
    if tool != "both":
        if (name, tool) == ("rar5-solid", "unar"):
            pytest.skip("unar 1.10 takes this sample for a part of several")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    source = winrar(tmp_path / "v.rar", name, b"png")
    pages, _ = stage(source, tmp_path / "staging")
    found = [(page.name, page.error, (tmp_path / "staging" / page.staged).read_bytes()) for page in pages]
    assert found == [("stest1.png", None, LINES), ("stest2.png", None, LINES)]


def test_a_solid_archive_that_one_program_unpacks_is_given_to_no_other(tmp_path, monkeypatch):
    unpackers()
    (tmp_path / "bin").mkdir()
    for tool in ("unar", "bsdtar"):
        place = tmp_path / "bin" / tool
        place.write_text(f'#!/bin/sh\necho {tool} "$@" >> {tmp_path}/calls\nexec {shutil.which(tool)} "$@"\n')
        place.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    pages, _ = stage(winrar(tmp_path / "v.rar", "rar3-solid", b"png"), tmp_path / "staging")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert not any(page.error for page in pages)
    assert len({call.split()[0] for call in calls if "v.rar" in call}) == 1, calls


def test_a_bad_member_of_a_rar_is_a_page_error(tmp_path):
    source = rar(tmp_path / "v.rar", PAGES)
    data = bytearray(source.read_bytes())
    data[data.find(PAGES["ch1/2.png"]) + 60] ^= 1
    source.write_bytes(data)
    pages, _ = stage(source, tmp_path / "staging")
    assert [bool(page.error) for page in pages] == [False, True, False]
    with pytest.raises(storage.InputUnusable, match=r"ch1/2\.png can't be read .*: .{5}"):
        looked_at(source)


def looked_at(source: Path) -> list[bytes]:
    """Each page, as a preview reads it."""
    with inputs.opened(source, Limits()) as archive:
        found = inputs.list_input(source, Limits(), archive).pages
        with formats.opener(found, archive, Limits()) as open_entry:
            return [inputs.read_entry(entry, open_entry, Limits()) for entry in found]


@pytest.mark.parametrize("tool", ["unar", "bsdtar", "both"])
@pytest.mark.parametrize(("flags", "size_bytes"), [(SOLID, 60), (0, 21 << 20)], ids=["solid", "large"])
def test_a_name_of_a_rar_is_no_option_of_what_unpacks_it(flags, size_bytes, tool, tmp_path, monkeypatch):
    unpackers()
    program, mark = shutil.which("touch"), tmp_path / "executed"
    if tool != "both":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for option in (f'--use-compress-program={program} "{mark}" x.png', "@x.png", "-x.png"):
        source = rar(tmp_path / "v.rar", {option: bytes(60)}, {option: size_bytes}, PACKED, flags)
        [page], _ = stage(source, tmp_path / "staging")
        assert page.error and not mark.exists()


def test_rars_that_lead_out_are_locked_or_cut_are_refused(tmp_path):
    names = ["../evil.png", "/evil.png", "C:\\evil.png", "a/../../evil.png", "a\\..\\..\\evil.png"]
    for n, name in enumerate(names):
        assert refusal(rar(tmp_path / f"{n}.rar", {"1.png": b"1", name: b"2"})).code == "UNSAFE_NAME", name
    assert refusal(winrar(tmp_path / "v.rar", "rar5-evil-symlink-traversal")).code == "UNSAFE_NAME"
    assert not list(tmp_path.glob("**/evil.png")) and not (tmp_path.parent / "evil.png").exists()


@pytest.mark.parametrize("tools", [True, False])
def test_an_encrypted_rar_is_refused_as_what_it_is(tools, tmp_path, monkeypatch):
    """Its comment is compressed: without a tool it can't even be opened."""
    if tools:
        unpackers()
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    error = refusal(winrar(tmp_path / "v.rar", "rar3-comment-psw"))
    assert error.code == ("INPUT_UNUSABLE" if tools else "TOOL_MISSING")
    assert ("encrypted" in error.detail) is tools


def test_a_cut_rar_is_refused_wherever_it_was_cut(tmp_path):
    whole, cut = rar(tmp_path / "v.rar", PAGES).read_bytes(), tmp_path / "cut.rar"
    behind_the_first = whole.find(PAGES["ch1/1.png"]) + len(PAGES["ch1/1.png"])
    for size in (9, 200, behind_the_first, len(whole) - 8):
        cut.write_bytes(whole[:size])
        assert "cut on the way" in refusal(cut).detail
    (tmp_path / "v.rar").write_bytes(base64.b64decode(WINRAR["rar3-solid"])[:-7])
    assert "cut on the way" in refusal(tmp_path / "v.rar").detail


def test_old_names_without_a_code_page_are_read(tmp_path):
    head = struct.pack("<HBHH", 0, 0x73, 0, 13) + bytes(6)
    name, data = "漫画/第01話.png".encode("cp932"), b"page"
    facts = struct.pack("<IIBIIBBHI", 4, 4, 2, zlib.crc32(data), 0, 20, 0x30, len(name), 32)
    block = struct.pack("<HBHH", 0, 0x74, 0x8000, 7 + len(facts) + len(name)) + facts + name + data
    archive = bytearray(b"Rar!\x1a\x07\x00" + head + block)
    fix_rar3(archive)
    (tmp_path / "v.rar").write_bytes(archive)
    assert staged_bytes(tmp_path / "v.rar", tmp_path / "staging") == {"漫画/第01話.png": data}


# ---------------------------------------------------------------- limits, of both
@pytest.mark.parametrize("make", [seven_zip, rar])
def test_each_limit_of_zip_holds(make, tmp_path):
    source = make(tmp_path / "v.x", {"a/b/c/1.bmp": bytes(300_000), "2.png": b"2", "3.png": b"3"})
    over = {"entries": 2, "pages": 2, "depth": 3, "path_bytes": 10}
    over |= {"entry_bytes": 299_999, "total_bytes": 300_001}
    for limit, value in over.items():
        error = refusal(source, **{limit: value})
        assert error.code == f"LIMIT_{limit.upper()}" and str(value) in error.detail, limit
    stage(source, tmp_path / "staging", entry_bytes=300_000, total_bytes=300_002, depth=4, path_bytes=11)


def test_a_bomb_is_refused_by_its_ratio_before_it_is_unpacked(tmp_path):
    source = seven_zip(tmp_path / "v.7z", {"1.bmp": bytes(3 << 20)}, "-mx9")
    assert refusal(source, ratio_from_bytes=1 << 20).code == "LIMIT_RATIO"
    source = rar(tmp_path / "v.rar", {"1.bmp": b"x"}, {"1.bmp": 1 << 40})
    assert refusal(source).code == "LIMIT_ENTRY_BYTES"


def test_a_member_is_never_longer_than_it_said(tmp_path):
    source = rar(tmp_path / "v.rar", {"1.bmp": bytes(50_000), "2.png": b"two"}, {"1.bmp": 10})
    pages, _ = stage(source, tmp_path / "staging")
    assert pages[0].error and pages[0].size_bytes <= 10
    assert (pages[1].error, pages[1].size_bytes) == (None, 3)


def test_locked_and_cut_7z_are_refused(tmp_path):
    for flags in (["-psecret"], ["-psecret", "-mhe=on"]):
        source = seven_zip(tmp_path / f"{len(flags)}.7z", PAGES, *flags)
        assert "encrypted" in refusal(source).detail
    whole = seven_zip(tmp_path / "v.7z", PAGES).read_bytes()
    for size in (8, 20, 32, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.7z").write_bytes(whole[:size])
        assert "7z" in refusal(tmp_path / "cut.7z").detail


# ---------------------------------------------------------------- PDF
def test_images_of_a_pdf_are_taken_as_they_are(tmp_path):
    jpeg, lossless = encoded(colour(60, 40)), grey(60, 40)
    bilevel = np.where(lossless > 128, 255, 0).astype(np.uint8)
    progressive = cv2.imencode(".jpg", grey(60, 40), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    images = [jpeg, encoded(lossless, ".png"), encoded(bilevel, ".png"), progressive]
    source = img2pdf(tmp_path / "v.pdf", *images, encoded(colour(30, 20), ".png"))
    found = staged_bytes(source, tmp_path / "staging")
    assert list(found) == ["001.png", "002.png", "003.png", "004.png", "005.png"]
    assert found["001.png"] == jpeg and found["004.png"] == progressive
    assert np.array_equal(decoded(found["002.png"]), lossless)
    assert np.array_equal(decoded(found["003.png"]), bilevel)
    assert np.array_equal(decoded(found["005.png"]), colour(30, 20))


def test_an_image_within_margins_is_taken_and_one_that_is_cut_off_is_drawn(tmp_path):
    require(importlib.util.find_spec("img2pdf"), "img2pdf is not installed")
    import img2pdf as tool

    jpeg = encoded(colour(60, 40))
    layout = tool.get_layout_fun(
        pagesize=(200, 300), imgsize=((tool.ImgSize.abs, 100), (tool.ImgSize.abs, 150))
    )
    source = img2pdf(tmp_path / "v.pdf", jpeg, layout_fun=layout)
    assert staged_bytes(source, tmp_path / "s1") == {"001.png": jpeg}
    layout = tool.get_layout_fun(
        pagesize=(200, 300), imgsize=((tool.ImgSize.abs, 400), (tool.ImgSize.abs, 600))
    )
    found = staged_bytes(img2pdf(tmp_path / "w.pdf", jpeg, layout_fun=layout), tmp_path / "s2")["001.png"]
    assert found != jpeg and decoded(found).shape == (300, 200, 3)  # 72 dpi, the least


def with_pikepdf(source: Path, change: Callable[[Any], None], **saving: Any) -> Path:
    require(importlib.util.find_spec("pikepdf"), "pikepdf is not installed")
    import pikepdf

    target = source.with_name("changed-" + source.name)
    with pikepdf.open(source) as document:
        change(document)
        document.save(target, **saving)
    return target


def test_a_page_of_a_pdf_is_previewed_whole_though_its_size_was_an_estimate(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (200, 300), np.uint8)
    images = [encoded(one, ".jpg") for one in (grey(30, 20), noise, grey(30, 21))]
    assert looked_at(img2pdf(tmp_path / "v.pdf", *images)) == images


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_page_is_the_image_turned_pixel_for_pixel(degrees, tmp_path):
    source = img2pdf(tmp_path / "v.pdf", encoded(colour(60, 40), ".png"))
    turned = with_pikepdf(source, lambda document: document.pages[0].rotate(degrees, relative=True))
    found = decoded(staged_bytes(turned, tmp_path / "staging")["001.png"])
    assert np.array_equal(found, np.rot90(colour(60, 40), -degrees // 90))


def test_what_stands_beside_a_jpeg_in_the_pdf_counts(tmp_path):
    require(importlib.util.find_spec("pikepdf"), "pikepdf is not installed")
    import pikepdf

    jpeg = encoded(colour(60, 40))

    def invert(document: Any) -> None:
        image = next(iter(document.pages[0].get_images().values()))
        image.Decode = [1, 0, 1, 0, 1, 0]

    def overlay(document: Any) -> None:
        page = document.pages[0]
        page.contents_add(b"q 1 0 0 rg 5 5 10 10 re f Q")

    def mask(document: Any) -> None:
        image = next(iter(document.pages[0].get_images().values()))
        facts = {"Subtype": image.Subtype, "ColorSpace": pikepdf.Name.DeviceGray}
        facts |= {"Width": 40, "Height": 60, "BitsPerComponent": 8}
        image.SMask = document.make_stream(bytes(60 * 40), **facts)

    source = img2pdf(tmp_path / "v.pdf", jpeg)
    inverted = staged_bytes(with_pikepdf(source, invert), tmp_path / "s1")["001.png"]
    assert np.abs(decoded(inverted).astype(int) - (255 - decoded(jpeg).astype(int))).mean() < 3
    drawn = decoded(staged_bytes(with_pikepdf(source, overlay), tmp_path / "s2")["001.png"])
    assert (drawn.reshape(-1, 3) == (0, 0, 255)).all(axis=1).any()
    assert (decoded(staged_bytes(with_pikepdf(source, mask), tmp_path / "s3")["001.png"]) == 255).all()


def test_a_page_without_an_image_is_drawn_at_150_dpi_on_white(tmp_path):
    source = pdf(tmp_path / "v.pdf", b"0 0 1 rg 0 0 100 150 re f", (200, 300))
    page = decoded(staged_bytes(source, tmp_path / "staging")["001.png"])
    assert page.shape == (625, 417, 3)
    assert page[620, 5].tolist() == [255, 0, 0] and page[5, 5].tolist() == [255, 255, 255]
    assert page[620, 412].tolist() == [255, 255, 255]


def test_a_huge_pdf_page_or_image_is_that_pages_error(tmp_path):
    huge = pdf(tmp_path / "v.pdf", b"", (14_400, 14_400))
    pages, _ = stage(huge, tmp_path / "s1")
    assert "over the limit of 100000000" in (pages[0].error or "")
    source = img2pdf(tmp_path / "w.pdf", encoded(grey(30, 20)), encoded(grey(90, 80)), encoded(grey(40, 10)))
    pages, _ = stage(source, tmp_path / "s2", page_pixels=7199)
    assert [bool(page.error) for page in pages] == [False, True, False]


def test_limits_and_locks_of_pdfs(tmp_path):
    source = img2pdf(tmp_path / "v.pdf", *[encoded(grey(30, 20 + n)) for n in range(4)])
    assert refusal(source, pages=3).code == "LIMIT_PAGES"
    assert refusal(source, entries=3).code == "LIMIT_ENTRIES"
    with pytest.raises(storage.LimitExceeded, match="in the pages"):
        stage(pdf(tmp_path / "w.pdf", b"", (900, 900)), tmp_path / "s1", total_bytes=1200)
    require(importlib.util.find_spec("pikepdf"), "pikepdf is not installed")
    import pikepdf

    locked = with_pikepdf(source, lambda _: None, encryption=pikepdf.Encryption(user="a", owner="b"))
    assert "encrypted" in refusal(locked).detail
    for n, data in enumerate((b"%PDF-1.4 nothing %%EOF", source.read_bytes()[:-1000])):
        (tmp_path / f"{n}.pdf").write_bytes(data)
        assert "cut on the way" in refusal(tmp_path / f"{n}.pdf").detail


# ---------------------------------------------------------------- EPUB
def epub(target: Path, spine: list[str], documents: dict[str, str], **more: Any) -> Path:
    """An EPUB by hand: documents by name below OEBPS/, shown in the order of `spine`."""
    items = "".join(f'<item id="{name}" href="{name}"{more.get("kind", "")}/>' for name in documents)
    order = "".join(f'<itemref idref="{name}"/>' for name in spine)
    package = f"<package><manifest>{items}{more.get('items', '')}</manifest><spine>{order}</spine></package>"
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr("META-INF/container.xml", '<c><rootfile full-path="OEBPS/p.opf"/></c>')
        archive.writestr("OEBPS/p.opf", more.get("doctype", "") + package)
        for name, text in documents.items():
            archive.writestr(f"OEBPS/{name}", text)
        for name, data in more.get("files", {}).items():
            archive.writestr(name, data)
    return target


IMAGES = {f"OEBPS/{name}.png": png(shade=n) for n, name in enumerate("abcde")}


def test_an_epub_by_ebooklib_gives_its_pages_in_the_order_of_its_spine(tmp_path):
    require(importlib.util.find_spec("ebooklib"), "ebooklib is not installed")
    from ebooklib import epub as maker

    book = maker.EpubBook()
    book.set_cover("zcover.png", png(shade=100), create_page=False)
    chapters = []
    for n, name in enumerate(["c", "a", "b"]):
        book.add_item(maker.EpubImage(name, f"img/{name}.png", "image/png", png(shade=n)))
        chapter = maker.EpubHtml(name, f"text/{n}.xhtml", title=name)
        chapter.content = f'<p><img src="../img/{name}.png" alt="&nbsp;"/></p>'
        book.add_item(chapter)
        chapters.append(chapter)
    book.add_item(maker.EpubImage("logo", "img/logo.png", "image/png", png(shade=50)))
    book.spine = chapters
    book.add_item(maker.EpubNcx())
    maker.write_epub(str(tmp_path / "v.epub"), book)
    found = staged_bytes(tmp_path / "v.epub", tmp_path / "staging")
    assert list(found) == ["1-zcover.png", "2-c.png", "3-a.png", "4-b.png"]
    assert list(found.values()) == [png(shade=100), png(shade=0), png(shade=1), png(shade=2)]


def test_names_that_sort_into_the_spines_order_stay(tmp_path):
    documents = {"1.xhtml": '<img src="a.png"/>', "2.svg": '<svg><image xlink:href="./b.png"/></svg>'}
    source = epub(tmp_path / "v.epub", ["1.xhtml", "2.svg"], documents, files=IMAGES)
    pages, listing = stage(source, tmp_path / "staging")
    assert [page.name for page in pages] == ["OEBPS/a.png", "OEBPS/b.png"]
    assert listing.left_out == 3 + 5  # images that no page shows, and what is no image


SHOWN = {"é.png": png(shade=10), "漫/が.png": png(shade=20), "c.png": png(shade=30)}  # in the spine's order


@pytest.mark.parametrize("links", ["NFC", "NFD"])
@pytest.mark.parametrize("names", ["NFC", "NFD"])
@pytest.mark.parametrize("says_utf8", [True, False])
def test_pages_of_an_epub_are_found_by_names_that_are_spelled_otherwise(tmp_path, names, links, says_utf8):
    """macOS decomposes names; some archivers write UTF-8 and do not say so."""
    files = {unicodedata.normalize(names, f"OEBPS/{name}"): data for name, data in SHOWN.items()}
    documents = {f"{n}.xhtml": f'<img src="{quote(unicodedata.normalize(links, name))}"/>'
                 for n, name in enumerate(SHOWN)}  # fmt: skip
    source = epub(tmp_path / "v.epub", list(documents), documents, files=files)
    if not says_utf8:
        without_utf8_flag(source)
    pages, listing = stage(source, tmp_path / "staging")
    assert [(tmp_path / "staging" / page.staged).read_bytes() for page in pages] == list(SHOWN.values())
    assert listing.left_out == 3 + len(documents)


def without_utf8_flag(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for header, flags_at in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
        for found in list(re.finditer(header, data)):
            data[found.start() + flags_at] &= ~8
    path.write_bytes(data)


def test_svg_documents_of_an_epub_are_looked_through_for_their_images(tmp_path):
    documents = {f"{name}.svg": f'<svg><image xlink:href="{name}.png"/></svg>' for name in "cab"}
    source = epub(
        tmp_path / "v.epub", list(documents), documents, files=IMAGES, kind=' media-type="image/svg+xml"'
    )
    assert list(staged_bytes(source, tmp_path / "staging")) == ["1-c.png", "2-a.png", "3-b.png"]


BOMB = '<!DOCTYPE p [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE p SYSTEM "file:///etc/passwd">'


@pytest.mark.parametrize("doctype", [BOMB, "<broken ", "\0"])
def test_an_epub_whose_order_cant_be_read_is_taken_as_a_zip(doctype, tmp_path):
    documents = {"1.xhtml": '<img src="b.png"/>'}
    source = epub(tmp_path / "v.epub", ["1.xhtml"], documents, files=IMAGES, doctype=doctype)
    assert [page.name for page in stage(source, tmp_path / "staging")[0]] == list(IMAGES)


def test_an_epubs_links_reach_nothing_but_its_own_images(tmp_path):
    links = [
        "../../../etc/passwd",
        "file:///etc/passwd",
        "http://example.org/x.png",
        "//x/y.png",
        "%2e%2e/b.png",
    ]
    text = "".join(f'<img src="{link}"/>' for link in links) + '<img src="c.png"/>'
    source = epub(tmp_path / "v.epub", ["1.xhtml"], {"1.xhtml": text}, files=IMAGES, doctype=OUTSIDE)
    assert list(staged_bytes(source, tmp_path / "staging")) == ["OEBPS/c.png"]
    evil = epub(tmp_path / "w.epub", ["1.xhtml"], {"1.xhtml": text}, files=IMAGES | {"../evil.png": b"x"})
    assert refusal(evil).code == "UNSAFE_NAME"


def test_links_of_an_epub_that_are_none_show_nothing(tmp_path):
    documents = {"1.xhtml": '<img src="//[a"/><img src="b.png"/>'}
    source = epub(tmp_path / "v.epub", ["1.xhtml"], documents, files=IMAGES)
    assert list(staged_bytes(source, tmp_path / "staging")) == ["OEBPS/b.png"]


def test_an_epub_that_repeats_its_documents_is_read_no_further_than_an_archive_may_hold(
    tmp_path, monkeypatch
):
    read = []
    images_in = formats._images_in
    monkeypatch.setattr(formats, "_images_in", lambda data: read.append(1) or images_in(data))
    source = epub(tmp_path / "v.epub", ["1.xhtml"] * 5000, {"1.xhtml": '<img src="b.png"/>'}, files=IMAGES)
    assert len(staged_bytes(source, tmp_path / "staging", entries=50)) == 1 and len(read) == 50


@pytest.mark.parametrize("pack", [seven_zip, rar])
def test_of_many_manifests_one_is_read(pack, tmp_path, monkeypatch):
    """Each takes a process."""
    pages, made = {"1.png": png()}, {"files": [{"target": "1.png"}]}
    source = pack(tmp_path / "v.7z", pages | {"manifest.json": json.dumps(made).encode()})
    members = formats.Container.members
    monkeypatch.setattr(
        formats.Container, "members", lambda *of: [member for member in members(*of) for _ in range(9)]
    )
    opened = []
    read = formats.Container.open
    monkeypatch.setattr(formats.Container, "open", lambda *of: opened.append(1) or read(*of))
    with inputs.opened(source, Limits()) as archive:
        assert inputs.list_archive(source, archive, Limits()).manifest == made
    assert len(opened) == 1


def test_an_epub_with_locked_pages_is_refused(tmp_path):
    locked = {"META-INF/encryption.xml": '<e><CipherReference URI="OEBPS/a.png"/></e>'}
    source = epub(tmp_path / "v.epub", ["1"], {"1": '<img src="a.png"/>'}, files=IMAGES | locked)
    assert "protection" in refusal(source).detail


# ---------------------------------------------------------------- readers
SAMPLES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "rarfile": ("RAR", lambda path: rar(path, PAGES)),
    "py7zr": ("7z", lambda path: seven_zip(path, PAGES)),
    "pypdfium2": ("PDF", lambda path: pdf(path, b"")),
}


@pytest.mark.parametrize("module", SAMPLES)
def test_without_the_extra_the_error_names_it(module, tmp_path, monkeypatch):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / f"{module}.py").write_text("raise ImportError('not installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    kind, make = SAMPLES[module]
    error = refusal(make(tmp_path / "volume.x"))
    assert error.code == "EXTRA_MISSING" and kind in error.detail
    assert 'pip install ".[formats]"' in error.detail


def test_without_a_program_that_unpacks_rar_only_stored_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refusal(winrar(tmp_path / "v.rar", "rar5-solid", b"png"))
    assert error.code == "TOOL_MISSING" and "unar" in error.detail
    assert len(stage(rar(tmp_path / "v.rar", PAGES), tmp_path / "staging")[0]) == len(PAGES)


def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Readers that do this first."""
    script = tmp_path / "reader.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"import os, time\nfrom files import unpack\n{first}\nunpack.main()\n"
    )
    monkeypatch.setattr(formats, "READER", (str(script),))


def test_a_reader_that_dies_of_a_page_costs_that_page(tmp_path, monkeypatch):
    source = img2pdf(tmp_path / "v.pdf", *[encoded(grey(30, 20 + n)) for n in range(3)])
    wrapped = """\
        real = unpack.page_image
        unpack.page_image = lambda document, n: os.kill(os.getpid(), 11) if n == 1 else real(document, n)"""
    reader(tmp_path, monkeypatch, textwrap.dedent(wrapped))
    pages, _ = stage(source, tmp_path / "staging")
    assert [page.error for page in pages] == [
        None,
        "can't be read from the input: its reader ended early",
        None,
    ]


def test_a_reader_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "SILENCE_S", 1.0)
    reader(tmp_path, monkeypatch, "unpack.check_same = lambda *_: time.sleep(600)")
    assert "ended early" in refusal(pdf(tmp_path / "v.pdf", b"")).detail


def test_readers_have_no_network_and_bounded_memory(tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    tried = f"""\
        import socket, resource
        def tell(*_):
            try: socket.socket(); verdict = "open"
            except OSError: verdict = "closed"
            open({str(seen)!r}, "w").write(verdict + " " + str(resource.getrlimit(resource.RLIMIT_AS)[0]))
        unpack.check_same = tell"""
    require(sys.platform == "linux", "the sandbox is Linux's")
    reader(tmp_path, monkeypatch, textwrap.dedent(tried))
    stage(pdf(tmp_path / "v.pdf", b""), tmp_path / "staging")
    assert seen.read_text() == f"closed {4 << 30}"


def test_an_input_replaced_after_it_was_opened_is_not_read(tmp_path):
    source = rar(tmp_path / "v.rar", PAGES)
    with inputs.opened(source, Limits()) as archive:
        source.unlink()
        source.symlink_to(rar(tmp_path / "other.rar", PAGES))
        with pytest.raises(storage.InputUnusable, match="not the file"):
            inputs.list_input(source, Limits(), archive)


def test_the_service_imports_nothing_of_it(tmp_path):
    names = {"files.formats", "files.unpack", "rarfile", "py7zr", "pypdfium2"}
    code = f"import server, sys; print(sorted({names} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------- the whole service
def end_of(client: Client, job: str) -> dict[str, Any]:
    def over() -> dict[str, Any] | None:
        state: dict[str, Any] = client.call("GET", f"/jobs/{job}").json()
        return state if state["status"] in ("SUCCESS", "FAILED") else None

    found: dict[str, Any] = until(over, 60)
    return found


def test_a_volume_of_each_kind_goes_through_the_service(tmp_path):
    files = {name.split("/")[1]: data for name, data in PAGES.items()}
    inputs = {
        "v.cbr": rar(tmp_path / "v.cbr", files),
        "v.cb7": seven_zip(tmp_path / "v.cb7", files),
        "v.pdf": img2pdf(tmp_path / "v.pdf", *files.values()),
        "v.epub": epub(
            tmp_path / "v.epub", ["1"], {"1": '<img src="b.png"/><img src="a.png"/>'}, files=IMAGES
        ),
    }
    with server.Service(settings.Config(storage_root=tmp_path / "root", port=0, precision="fp32")) as service:
        client = Client(service.url)
        for name, path in inputs.items():
            assert client.call("PUT", f"/incoming/{name}", path.read_bytes()).status == 201
            body = {"title": name, "volume": "1", "input": {"type": "zip", "path": name}}
            body["params"] = {"model": "realesr-animevideov3", "scale": 1, "outputFormat": "png"}
            job = client.call("POST", "/jobs", body).json()["jobId"]
            state = end_of(client, job)
            assert (state["status"], state["failedPages"]) == ("SUCCESS", 0), state
            with zipfile.ZipFile(io.BytesIO(client.call("GET", f"/jobs/{job}/artifact").body)) as artifact:
                pages = artifact.namelist()[1:]
            expected = {"v.epub": ["1-b.png", "2-a.png"], "v.pdf": ["001.png", "002.png", "003.png"]}
            assert pages == expected.get(name, list(files)), name
            before = client.call("GET", f"/jobs/{job}/pages/1/before").body  # its working copy is gone
            assert decoded(before).shape == (48, 32)
    assert not any(os.scandir(tmp_path / "root/staging"))


# ---------------------------------------------------------------- beside pages, several volumes
def a_7z(target: Path, files: dict[str, bytes]) -> Path:
    import py7zr

    with py7zr.SevenZipFile(target, "w") as archive:
        for name, data in files.items():
            archive.writestr(data, name)
    return target


def test_a_cbz_keeps_what_a_7z_held_beside_its_pages(tmp_path):
    source = a_7z(tmp_path / "v.cb7", PAGES | {"ComicInfo.xml": b"<ComicInfo/>", "notes.txt": b"n"})
    list(containers.keep(source, tmp_path / "outputs", Limits()))
    kept = json.loads((tmp_path / "outputs" / containers.INDEX).read_bytes())
    assert [(file["source"]["filename"], file["status"]) for file in kept] == [
        ("ComicInfo.xml", "kept"), ("notes.txt", "kept")
    ]  # fmt: skip
    assert (tmp_path / "outputs" / "notes.txt").read_bytes() == b"n"
    assert not list((tmp_path / "outputs").glob(storage.UNPACKED + "*"))


def test_a_damaged_file_beside_the_pages_is_left_out_with_its_reason(tmp_path):
    source = rar(tmp_path / "v.cbr", PAGES | {"notes.txt": b"what was noted"})
    source.write_bytes(source.read_bytes().replace(b"what was noted", b"what was nopes"))
    list(containers.keep(source, tmp_path / "outputs", Limits()))
    (notes,) = json.loads((tmp_path / "outputs" / containers.INDEX).read_bytes())
    assert notes["status"] == "left out" and notes["filename"] is None and notes["error"]


@pytest.mark.parametrize("pack", [a_7z, rar])
def test_volumes_of_every_kind_in_one_input_are_told_apart(tmp_path, pack):
    archives = {
        f"v{n}{suffix}": pack(tmp_path / "a", PAGES).read_bytes() for n, suffix in ((1, ".cb7"), (2, ".cbr"))
    }
    inner = {**archives, "v3/1.png": PAGES["ch1/1.png"]}
    folder = tmp_path / "series"
    for name, data in (inner | {"v4.pdf": b"%PDF", "v5.epub": b"PK"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    found = volumes.find(folder, Limits())
    assert ["/".join(volume.parts) for volume in found] == ["v1.cb7", "v2.cbr", "v3", "v4.pdf", "v5.epub"]
    outer = pack(tmp_path / "all", inner)
    for volume in volumes.find(outer, Limits()):
        wanted = set(PAGES) if volume.is_archive else {"1.png"}
        assert set(staged_bytes(outer.joinpath(*volume.parts), tmp_path / "staging")) == wanted
        inputs.check_input(outer.joinpath(*volume.parts), "zip", Limits())
    with pytest.raises(storage.InputMissing):
        inputs.check_input(outer / "v9.cbr", "zip", Limits())


def test_a_container_proves_what_was_made_of_it(tmp_path):
    source = rar(tmp_path / "v.rar", PAGES)
    sources = verify.Sources([(name, hashlib.sha256(data).hexdigest()) for name, data in PAGES.items()], None)
    with inputs.opened(source, verify.ANY) as archive:
        assert list(verify.source_faults(source, archive, sources)) == []
        other = replace(sources, expected=[("ch1/1.png", "0" * 64), *sources.expected[1:]])
        ((name, fault),) = verify.source_faults(source, archive, other)
    assert name == "ch1/1.png" and "differs" in fault
