"""What a volume comes as: a folder or an archive, which pages it holds, and its working copy.

Map: Entry, Listing - places in incoming/ - what an input holds - room - staging - manifest
Rule: nothing is unpacked or read whole before its size is known to be within the limits.
Runs in: http-N threads and the watch (checks, before a job is taken), the worker (staging).

    incoming/x.cbz --located--> [volume in it] --opened--> archive --list_input--> entries in page order
                                                            '--stage_input--> staging/<job>/, hashed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import struct
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import storage
from messages import Limits, Params, SourcePage

if TYPE_CHECKING:
    from files import formats  # at run time only where an input is one of them


@dataclass(frozen=True, slots=True)
class Entry:
    """A page (or other file) inside an input, before it is copied."""

    name: str
    path: Path  # the file, or the archive that holds it
    member: zipfile.ZipInfo | formats.Member | None


@dataclass(frozen=True, slots=True)
class Listing:
    """What an input holds, pages in natural order (an EPUB's are called so that it is the reading order)."""

    pages: list[Entry]
    left_out: int  # files that are no pages
    manifest: dict[str, Any] | None
    others: list[Entry] = field(default_factory=list)  # those files; a folder's names as they are


ZIP_END_BYTES = 76 + 22 + 65_535  # zip64's records, the end record, its longest comment
UNICODE_PATH = 0x7075  # an entry's extra field
ENTRY_BYTES = 1024  # of a zip's directory, for an entry with a long name, on the average

Archive: TypeAlias = "zipfile.ZipFile | formats.Container"
Named: TypeAlias = "tuple[zipfile.ZipInfo | formats.Member, str]"  # an entry, and what it is called


# ---------------------------------------------------------------- places in incoming/
def resolve_incoming(layout: storage.Layout, path: str) -> Path:
    """The place inside incoming/ that a client's path names, existing or not.

    With or without the prefix "incoming/". Raises OutsideIncoming.
    """
    trimmed = path.replace("\\", "/")
    try:
        parts = storage.member_parts(trimmed, Limits())
    except storage.LimitExceeded as error:  # no setting: this is a request's path, not an archive's
        raise storage.OutsideIncoming(
            f"{path[:80]!a} is not a path inside incoming/: {error.fact}"
        ) from error
    except storage.InputUnusable as error:
        raise storage.OutsideIncoming(
            f"{path[:80]!a} is not a path inside incoming/: {error.detail}"
        ) from error
    if parts[0] == "incoming":
        parts = parts[1:]
    if any(unicodedata.category(c) in ("Cc", "Cs") for part in parts for c in part):
        raise storage.OutsideIncoming("the path holds control characters or broken Unicode")
    try:
        place = layout.incoming.joinpath(*parts).resolve().relative_to(layout.incoming.resolve())
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(layout.incoming / place)
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long, elsewhere
        place = Path()
    if not place.parts:
        raise storage.OutsideIncoming(f"{path[:80]!a} is not a path inside incoming/")
    # Without its links, so that staging may refuse one that was put there later.
    return layout.incoming / place


def check_input(place: Path, kind: str, limits: Limits) -> None:
    """Raises InputMissing unless `place` is there, of the kind "folder" or "zip"; for one inside an
    archive InputUnusable's family too."""
    what = "folder" if kind == "folder" else "archive"
    try:
        there = place.is_dir() if kind == "folder" else place.is_file()
    except OSError:  # a name too long for the file system
        there = False
    if not there and not (kind == "zip" and _is_inside(place, limits)):
        raise storage.InputMissing(f"there is no {what} {place.name[:80]!r} in incoming/; upload it first")


def located(source: Path) -> tuple[Path, str]:
    """(what is on disk, path inside it): of `all.zip/v01`, a folder in an archive, ("all.zip", "v01").

    The second is "" where the input is all of the first, or isn't there at all.
    """
    on_disk = next((place for place in (source, *source.parents) if os.path.lexists(place)), source)
    if on_disk == source or not on_disk.is_file():
        return source, ""
    return on_disk, source.relative_to(on_disk).as_posix()


def _is_nested(inside: str) -> bool:
    """Whether a path inside an archive names an archive; else a folder."""
    return os.path.splitext(inside)[1].lower() in storage.ARCHIVE_SUFFIXES


def _folder_in(source: Path) -> list[str]:
    """The components of the folder in an archive that an input is; none for all of the archive."""
    inside = located(source)[1]
    return inside.split("/") if inside and not _is_nested(inside) else []


def _is_inside(place: Path, limits: Limits) -> bool:
    on_disk, inside = located(place)
    if not inside:
        return False
    with _opened_archive(on_disk, limits) as archive:
        names = [_plain(name) for _, name in _checked(archive, limits)]
        return any(name == inside if _is_nested(inside) else name.startswith(inside + "/") for name in names)


def _plain(name: str) -> str:
    """An entry's name as located() gives it, if it is a safe one."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def list_entries(source: Path, limits: Limits, archive: Archive | None) -> Listing:
    """What list_input() lists, pages or none."""
    return list_folder(source, limits) if archive is None else list_archive(source, archive, limits)


# ---------------------------------------------------------------- what an input holds
def list_input(source: Path, limits: Limits, archive: Archive | None = None) -> Listing:
    """The pages of a folder, or of an opened archive. Raises InputUnusable's family."""
    listing = list_entries(source, limits, archive)
    if not listing.pages:
        raise storage.NoPages(
            f"{source.name} holds no page ({', '.join(sorted(storage.PAGE_SUFFIXES))}); "
            f"{listing.left_out} other files were left out"
        )
    if len(listing.pages) > limits.pages:
        raise storage.LimitExceeded("pages", len(listing.pages), limits.pages, "pages in the input")
    return listing


@contextlib.contextmanager
def opened(source: Path, limits: Limits) -> Iterator[Archive | None]:
    """The archive at `source`, or None where it is a folder. Of a place inside an archive (see
    located) the archive; an archive in it is unpacked to a temporary file, within the limits.

    Raises InputMissing, InputUnusable; OSError where there is no room for that file.
    """
    on_disk, inside = located(source)
    if on_disk.is_symlink():  # put there after the submit, or it would be resolved
        raise storage.InputUnusable(f"{source.name} is a link, not the input itself")
    if on_disk.is_dir():
        yield None
        return
    with _opened_archive(on_disk, limits) as archive:
        if not _is_nested(inside):
            yield archive
            return
        with tempfile.TemporaryFile() as copy:
            _unpack(archive, inside, copy, limits)
            with _as_archive(copy, inside, None, limits) as nested:
                yield nested


@contextlib.contextmanager
def _opened_archive(place: Path, limits: Limits) -> Iterator[Archive]:
    try:
        file = storage.open_regular(place)
    except FileNotFoundError as error:
        raise storage.InputMissing(f"{place.name} is no longer in incoming/") from error
    except OSError as error:
        raise storage.InputUnusable(f"{place.name} can't be opened: {storage.reason_of(error)}") from error
    with file, _as_archive(file, place.name, place, limits) as archive:
        yield archive


@contextlib.contextmanager
def _as_archive(file: IO[bytes], name: str, place: Path | None, limits: Limits) -> Iterator[Archive]:
    """place: where the file lies; None for one without a name on disk."""
    from files import formats

    file.seek(0)
    head = file.read(16)
    if formats.is_container(head) and place is None:  # its reader needs a name
        with tempfile.TemporaryDirectory(prefix=storage.scratch_prefix("archive")) as folder:
            place = Path(folder, "archive")
            file.seek(0)
            with open(place, "xb") as copy:
                shutil.copyfileobj(file, copy, storage.CHUNK_BYTES)
            yield formats.Container(place, head, name)
    elif formats.is_container(head):
        assert place is not None
        yield formats.Container(place, head, name)
    else:
        with _as_zip(file, name, limits) as archive:
            yield archive


def _as_zip(file: IO[bytes], name: str, limits: Limits) -> zipfile.ZipFile:
    try:
        _check_directory(file, limits)
        return zipfile.ZipFile(file)
    except UnicodeDecodeError as error:
        raise storage.InputUnusable(f"{name} has an entry whose name is broken UTF-8") from error
    # zipfile raises more than BadZipFile on damaged files.
    except (zipfile.BadZipFile, OSError, ValueError, IndexError, NotImplementedError) as error:
        raise storage.InputUnusable(
            f"{name} is not a readable zip archive ({error}); was it cut on the way?"
        ) from error


def _check_directory(file: IO[bytes], limits: Limits) -> None:
    """Raises LimitExceeded for a zip of too many entries, before zipfile makes an object of each.

    Counts what begins as an entry of its directory (APPNOTE 4.3.12 to 4.3.16), where zipfile will look
    for that. What is no zip is left to zipfile's words.
    """
    size_bytes = file.seek(0, os.SEEK_END)
    file.seek(max(0, size_bytes - ZIP_END_BYTES))
    tail = file.read()
    plain = len(tail) - 22  # of an archive without a comment
    at = plain if tail[plain:].startswith(b"PK\5\6") and tail.endswith(b"\0\0") else tail.rfind(b"PK\5\6")
    length_bytes, end = int.from_bytes(tail[at + 12 : at + 16], "little"), size_bytes - len(tail) + at
    if tail[max(0, at - 20) :].startswith(b"PK\6\7") and tail[max(0, at - 76) :].startswith(b"PK\6\6"):
        length_bytes, end = int.from_bytes(tail[at - 36 : at - 28], "little"), end - 76  # zip64
    if at < 0 or length_bytes > end:
        return
    found = length_bytes // ENTRY_BYTES
    if found <= limits.entries:
        file.seek(end - length_bytes)
        found = file.read(length_bytes).count(b"PK\1\2")
    if found > limits.entries:
        raise storage.LimitExceeded("entries", found, limits.entries, "entries in the archive")


def _unpack(archive: Archive, inside: str, copy: IO[bytes], limits: Limits) -> None:
    """Copy an archive out of another."""
    entry = _entry_at(archive, inside, limits)
    try:
        with open_entry(entry, archive, limits) as file:
            while chunk := file.read(storage.CHUNK_BYTES):
                copy.write(chunk)
    except ENTRY_ERRORS as error:
        if isinstance(error, OSError) and error.errno in storage.OUR_DISK:
            raise
        raise storage.InputUnusable(f"{inside} can't be unpacked: {storage.reason_of(error)}") from error


def _entry_at(archive: Archive, inside: str, limits: Limits) -> Entry:
    """The entry of this name, once the whole archive passed its checks. Raises InputUnusable's family."""
    for entry, name in _checked(archive, limits):
        if _plain(name) == inside and not _is_special(entry):
            return Entry(name, Path(inside), entry)
    raise storage.InputMissing(f"{inside} is no longer in the archive")


def _checked(archive: Archive, limits: Limits) -> list[Named]:
    """All entries with their names, once number, sizes and places are within the limits."""
    if not isinstance(archive, zipfile.ZipFile):
        members = archive.members(limits)
        _check_sizes(members, archive.size_bytes, limits)
        return [(member, member.name) for member in members]
    infos = archive.infolist()
    if len(infos) > limits.entries:
        raise storage.LimitExceeded("entries", len(infos), limits.entries, "entries in the archive")
    assert archive.fp is not None
    _check_sizes(infos, archive.fp.seek(0, os.SEEK_END), limits)
    _check_overlap(infos)
    return list(zip(infos, _entry_names(infos), strict=True))


def _is_special(entry: zipfile.ZipInfo | formats.Member) -> bool:
    """Whether it is a link or a device."""
    if not isinstance(entry, zipfile.ZipInfo):
        return entry.is_special
    kind = stat.S_IFMT(entry.external_attr >> 16)
    return entry.create_system == 3 and kind not in (0, stat.S_IFREG, stat.S_IFDIR)


def _files_below(root: Path, limits: Limits) -> Iterator[tuple[Path, int, list[tuple[str, str]]]]:
    """(path, bytes, storage.unfinished_of its folder) of each file. Raises LimitExceeded, InputUnusable where
    a folder can't be read: its pages would be missing, and nobody told."""

    def refuse(error: OSError) -> None:
        name = ascii(os.path.relpath(error.filename or root, root))
        raise storage.InputUnusable(f"the folder {name} can't be read: {storage.reason_of(error)}") from error

    seen = 0
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        depth = len(Path(folder).relative_to(root).parts) + 1
        if depth > limits.depth:  # here and not later: os.walk recurses until Python 3.12
            raise storage.LimitExceeded("depth", depth, limits.depth, "nested folders")
        # os.walk doesn't enter linked folders; what they hold is not ours to count.
        subfolders[:] = [name for name in subfolders if not storage.is_junk([name])]
        unfinished = storage.unfinished_of(files)
        for name in files:
            seen += 1
            if seen > limits.entries:
                raise storage.LimitExceeded("entries", seen, limits.entries, "files in the folder")
            path = Path(folder, name)
            try:
                size_bytes = path.lstat().st_size
            except FileNotFoundError:  # it went since the folder was read
                continue
            yield path, size_bytes, unfinished


def list_folder(root: Path, limits: Limits) -> Listing:
    """Look through a folder without following links. Raises LimitExceeded, UnsafeName, InputUnusable."""
    found: list[tuple[bytes, Path]] = []
    others: list[tuple[bytes, Path]] = []
    reserved = total_bytes = 0
    manifest = None
    for path, size_bytes, unfinished in _files_below(root, limits):
        raw = os.fsencode(path.relative_to(root).as_posix())
        if storage.is_page_name([path.name]):
            # Copyparty reserves a page's name with an empty file while it receives the page.
            if not size_bytes and storage.awaits(path.name, unfinished):
                reserved += 1
                continue
            found.append((raw, path))
            total_bytes += size_bytes
        elif not storage.is_junk([path.name]):
            others.append((raw, path))
            if path == root / "manifest.json":
                manifest = read_manifest(path)
    if total_bytes > limits.total_bytes:
        raise storage.LimitExceeded("total_bytes", total_bytes, limits.total_bytes, "bytes in the folder")
    names = storage.decode_names([raw for raw, _ in found])
    pages = [
        Entry("/".join(storage.member_parts(name, limits)), path, None)
        for name, (_, path) in zip(names, found, strict=True)
    ]
    kept_apart = zip(storage.decode_names([raw for raw, _ in others]), others, strict=True)
    beside = [Entry(name, path, None) for name, (_, path) in kept_apart]
    return Listing(_in_order(pages), len(beside) + reserved, manifest, _in_order(beside))


def _in_order(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: storage.natural_key(entry.name))


def list_archive(source: Path, archive: Archive, limits: Limits) -> Listing:
    """List an archive, refusing it whole if any entry lies or leads outside; of a folder in it (see
    located) what that holds, by names without it."""
    pages: list[Entry] = []
    others: list[Entry] = []
    manifest = None
    named = _checked(archive, limits)
    for entry, parts in _files_in(source, named, limits):
        found = Entry("/".join(parts), source, entry)
        if storage.is_page_name(parts):
            if isinstance(entry, zipfile.ZipInfo) and entry.flag_bits & 1:
                raise storage.InputUnusable(f"{source.name} is encrypted; upload it without a password")
            pages.append(found)
        elif not storage.is_junk(parts):
            others.append(found)
            if parts == ["manifest.json"] and entry.file_size <= MANIFEST_BYTES:
                manifest = found  # the last of several; each reading may take a process
    shown = pages
    if isinstance(archive, zipfile.ZipFile):
        shown = _in_reading_order(source, archive, named, pages, limits)
    members = {page.member for page in shown}
    others += [page for page in pages if page.member not in members]
    read = manifest and parse_manifest(_read_member(archive, manifest, limits))
    return Listing(_in_order(shown), len(others), read or None, _in_order(others))


def _files_in(
    source: Path, named: Sequence[Named], limits: Limits
) -> Iterator[tuple[zipfile.ZipInfo | formats.Member, list[str]]]:
    """The files of an archive, or of the folder in it that the input is: entries and their paths there."""
    folder = _folder_in(source)
    for entry, name in named:
        if _is_special(entry):
            raise storage.UnsafeName(f"entry {name[:80]!a} is a link or a device, not a file")
        if re.fullmatch(r"\.[./\\]*", name) and ".." not in name:
            continue  # "./", the archive's own root
        parts = storage.member_parts(name, limits)
        is_folder = name.endswith(("/", "\\")) if isinstance(entry, zipfile.ZipInfo) else entry.is_folder
        if not is_folder and parts[: len(folder)] == folder and parts != folder:
            yield entry, parts[len(folder) :]


def _in_reading_order(
    source: Path, archive: zipfile.ZipFile, named: Sequence[Named], pages: list[Entry], limits: Limits
) -> list[Entry]:
    """The pages of an EPUB that its documents show, in their order; of another zip all of them."""
    from files import formats

    def read(info: zipfile.ZipInfo) -> bytes:
        return _read_member(archive, Entry(info.filename, source, info), limits)

    members = {
        unicodedata.normalize("NFC", _plain(name)): info
        for info, name in named
        if isinstance(info, zipfile.ZipInfo) and not name.endswith(("/", "\\"))
    }
    order = formats.spine_pages(source, members, read, limits)
    if order is None:
        return pages
    held = {page.member: page for page in pages}
    shown = [held[info] for info in order if info in held]
    names = formats.numbered([page.name for page in shown])
    return [Entry(name, page.path, page.member) for name, page in zip(names, shown, strict=True)] or pages


def _entry_names(infos: Sequence[zipfile.ZipInfo]) -> list[str]:
    # Without the UTF-8 flag zipfile decoded as code page 437, which is reversible.
    plain = {
        i: info.orig_filename.encode("cp437") for i, info in enumerate(infos) if not info.flag_bits & 0x800
    }
    told = {i: name for i, raw in plain.items() if (name := _unicode_path(infos[i].extra, raw))}
    unsure = [i for i in plain if i not in told]
    told |= zip(unsure, storage.decode_names([plain[i] for i in unsure]), strict=True)
    return [told.get(i, info.orig_filename) for i, info in enumerate(infos)]


def _unicode_path(extra: bytes, raw: bytes) -> str:
    """The name in Info-ZIP's Unicode Path field (APPNOTE 4.6.9), if it is of this raw name; else "".

    WinRAR and WinZip put there what their code page has no letters for; the raw name has `_` instead.
    """
    at, begin = 0, struct.pack("<BL", 1, zlib.crc32(raw))
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        data, at = extra[at + 4 : at + 4 + length], at + 4 + length
        if kind == UNICODE_PATH and data.startswith(begin):
            with contextlib.suppress(UnicodeDecodeError):
                return data[len(begin) :].decode("utf-8")
    return ""


def _check_sizes(
    infos: Sequence[zipfile.ZipInfo | formats.Member], archive_bytes: int, limits: Limits
) -> None:
    largest = max((info.file_size for info in infos), default=0)
    if largest > limits.entry_bytes:
        raise storage.LimitExceeded("entry_bytes", largest, limits.entry_bytes, "bytes in one entry")
    total = sum(info.file_size for info in infos)
    if total > limits.total_bytes:
        raise storage.LimitExceeded(
            "total_bytes", total, limits.total_bytes, "bytes in the archive, unpacked"
        )
    ratio = total // max(1, archive_bytes)
    if total > limits.ratio_from_bytes and ratio > limits.ratio:
        raise storage.LimitExceeded("ratio", ratio, limits.ratio, "times the archive's size when unpacked")


def _check_overlap(infos: Sequence[zipfile.ZipInfo]) -> None:
    """zipfile itself looks for this only from 3.11.8 on (CVE-2024-0450)."""
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise storage.InputUnusable(f"entries overlap at {info.orig_filename[:80]!a}: a zip bomb")
        end = info.header_offset + 30 + len(info.orig_filename) + info.compress_size


# Bytes a pixel takes on disk: sources rather low and results rather high, so that an estimate
# from file sizes errs to the safe side. An archive counts as PNG until it is listed.
SOURCE_DENSITY = {
    ".jpg": 0.15,
    ".jpeg": 0.15,
    ".webp": 0.1,
    ".gif": 0.2,
    ".png": 0.3,
    ".bmp": 1.0,
    ".tif": 0.3,
    ".tiff": 0.3,
    ".avif": 0.06,
    ".jxl": 0.1,
}

OUTPUT_DENSITY = {"jpg": 0.25, "webp": 0.25, "avif": 0.2, "png": 0.6}


# ---------------------------------------------------------------- room
def output_bytes(name: str, size_bytes: int, params: Params) -> float:
    """What a page of this name and size is expected to become. A target size counts as scale 2."""
    density = SOURCE_DENSITY.get(os.path.splitext(name)[1].lower(), SOURCE_DENSITY[".png"])
    scale = 2 if params.has_target else params.scale
    lossless = params.output_format in ("webp", "avif") and params.jpeg_quality == 100
    return size_bytes / density * scale**2 * OUTPUT_DENSITY["png" if lossless else params.output_format]


def check_room(
    folder: Path,
    sizes: Iterable[tuple[str, int]],
    done: Container[str],
    params: Params,
    reserve: int,
    others_bytes: int = 0,
) -> None:
    """Raises NoRoom unless the disk of `folder` holds a working copy, the pages that are not
    `done`, and the artifact. sizes: names and bytes of the input's pages; others_bytes: what
    the artifact will hold beside them."""
    needed = float(others_bytes)
    copies = 3 if params.container == "pdf" else 2  # of each page: it is put together from pieces
    for name, size_bytes in sizes:
        page = output_bytes(name, size_bytes, params)
        needed += size_bytes + page * (copies - (name in done))
    free = shutil.disk_usage(folder).free
    if needed + reserve > free:
        raise storage.NoRoom(round(needed), free, reserve)


def input_sizes(place: Path, limits: Limits) -> list[tuple[str, int]]:
    """Names and sizes of an input's files before it is listed: an archive counts as a whole,
    a file too large to be taken as a page counts for nothing."""
    if place.is_file():
        return [(place.name, place.stat().st_size)]
    sizes = []
    for folder, _, files in os.walk(place):
        for name in filter(lambda name: storage.is_page_name([name]), files):
            with contextlib.suppress(FileNotFoundError):  # since the folder was read
                sizes.append((name, Path(folder, name).lstat().st_size))
    return [(name, size_bytes) for name, size_bytes in sizes if size_bytes <= limits.entry_bytes]


# ---------------------------------------------------------------- staging
def stage_input(
    source: Path,
    staging: Path,
    limits: Limits,
    check: Callable[[list[tuple[str, int]]], None] = lambda _: None,
) -> Iterator[SourcePage | Listing]:
    """Copy the input's pages to `staging`; yields each page, then the Listing.

    check: gets the pages' names and sizes before anything is written, and may raise.

    Staged files are called by their number: no name from an archive touches the disk.
    Raises InputUnusable's family before anything is written, OSError when the disk is full.
    """
    with opened(source, limits) as archive:
        listing = list_input(source, limits, archive)
        shutil.rmtree(staging, ignore_errors=True)  # Windows leaves what is being shown just now
        sizes = [(page.name, entry_bytes(page)) for page in listing.pages]
        check([(name, size_bytes) for name, size_bytes in sizes if size_bytes <= limits.entry_bytes])
        staging.mkdir(parents=True, exist_ok=True)
        suffixes = [os.path.splitext(entry.name)[1].lower() for entry in listing.pages]
        targets = [staging / f"{n:05d}{suffix}" for n, suffix in enumerate(suffixes, 1)]
        if archive is None or isinstance(archive, zipfile.ZipFile):
            for entry, target in zip(listing.pages, targets, strict=True):
                yield _stage_page(entry, archive, target, limits)
        else:
            yield from _stage_members(listing.pages, archive, targets, limits)
        storage.sync_dir(staging)
    yield listing


def entry_bytes(entry: Entry) -> int:
    """How large an entry says it is. Raises InputUnusable where its file is gone."""
    if entry.member:
        return entry.member.file_size
    try:
        return entry.path.lstat().st_size
    except OSError as error:
        raise storage.InputUnusable(f"{entry.name[:200]!a} is gone: {storage.reason_of(error)}") from error


def read_entry(
    entry: Entry, open_entry: Callable[[Entry], IO[bytes]], limits: Limits, most: int | None = None
) -> bytes:
    """A page's bytes, or its first `most` ones. Raises InputUnusable. open_entry: see formats.opener."""
    try:
        with open_entry(entry) as file:
            return file.read(most) if most is not None else b"".join(_pieces_of(file, limits))
    except ENTRY_ERRORS as problem:
        raise storage.InputUnusable(
            f"{entry.name} can't be read from the input: {storage.reason_of(problem)}"
        ) from problem


def _stage_page(entry: Entry, archive: Archive | None, target: Path, limits: Limits) -> SourcePage:
    digest, size_bytes, error = hashlib.sha256(), 0, None
    with open(target, "wb") as copy:
        try:
            with open_entry(entry, archive, limits) as source:
                for chunk in _pieces_of(source, limits):
                    size_bytes += len(chunk)
                    digest.update(chunk)
                    copy.write(chunk)
        except ENTRY_ERRORS as problem:
            if isinstance(problem, OSError) and problem.errno in storage.OUR_DISK:
                raise
            # What could be read stays: the page is carried as far as it exists.
            error = f"can't be read from the input: {storage.reason_of(problem)}"
        # No sync: a later attempt believes a staged page by its hash only.
    target.chmod(0o600)
    return SourcePage(entry.name, target.name, digest.hexdigest(), size_bytes, error)


def _stage_members(
    entries: Sequence[Entry], archive: formats.Container, targets: Sequence[Path], limits: Limits
) -> Iterator[SourcePage]:
    """Pages of a container, which is unpacked once, in its own order."""
    # A container's pages have members of its own, no others.
    members = [entry.member for entry in entries if not isinstance(entry.member, zipfile.ZipInfo)]
    indexes = [member.index for member in members if member]
    wanted = dict(zip(indexes, targets, strict=True))
    errors: dict[int, str | None] = {}
    total_bytes = 0
    for index, error in archive.extract(wanted, limits):
        errors[index] = error and f"can't be read from the input: {error}"
        with contextlib.suppress(FileNotFoundError):
            total_bytes += wanted[index].stat().st_size
        if total_bytes > limits.total_bytes:  # of a PDF's pages nothing said so before
            raise storage.LimitExceeded("total_bytes", total_bytes, limits.total_bytes, "bytes in the pages")
    for entry, index, target in zip(entries, indexes, targets, strict=True):
        target.touch()  # of a member that could not be read at all
        target.chmod(0o600)
        size_bytes = target.stat().st_size
        yield SourcePage(entry.name, target.name, storage.sha256_file(target), size_bytes, errors[index])


# Everything that reading one entry of a hostile archive was seen to raise.
ENTRY_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    ValueError,
    IndexError,
    storage.LimitExceeded,
)


def _pieces_of(file: IO[bytes], limits: Limits) -> Iterator[bytes]:
    """An entry's bytes to their end: what the entry says of their number is an estimate in a PDF, and a
    file may grow meanwhile. Raises LimitExceeded."""
    size_bytes = 0
    while chunk := file.read(storage.CHUNK_BYTES):
        size_bytes += len(chunk)
        _check_entry(size_bytes, limits)
        yield chunk


def _check_entry(size_bytes: int, limits: Limits) -> None:
    if size_bytes > limits.entry_bytes:
        raise storage.LimitExceeded("entry_bytes", size_bytes, limits.entry_bytes, "bytes in a page")


def open_entry(entry: Entry, archive: Archive | None, limits: Limits) -> IO[bytes]:
    """An entry's bytes, to be read in pieces. Raises ENTRY_ERRORS."""
    if isinstance(entry.member, zipfile.ZipInfo):
        assert isinstance(archive, zipfile.ZipFile)
        return open_member(archive, entry.member)
    if entry.member is not None:
        assert archive is not None and not isinstance(archive, zipfile.ZipFile)
        return archive.open(entry.member, limits)
    file = storage.open_regular(entry.path)
    try:
        _check_entry(os.fstat(file.fileno()).st_size, limits)
    except storage.LimitExceeded:
        file.close()
        raise
    return file


def open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    """A member's bytes, to be read in pieces. Raises ENTRY_ERRORS."""
    # zipfile unpacks the other methods in one go, however little the entry says it holds:
    # 300 bytes of bzip2 became 300 MB of memory.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise NotImplementedError(f"compression method {info.compress_type} is not supported")
    return archive.open(info)


def _read_member(archive: Archive, entry: Entry, limits: Limits) -> bytes:
    """b"" where it can't be read."""
    try:
        with open_entry(entry, archive, limits) as file:
            return file.read(entry_bytes(entry))  # read() without a size would trust the stream
    except ENTRY_ERRORS:
        return b""


def staged_pages_intact(staging: Path, pages: Iterable[SourcePage]) -> bool:
    """Whether an earlier attempt's working copy is complete, by hash."""
    return all(storage.file_is(staging / page.staged, page.sha256) for page in pages)


def read_source_page(source: Path, name: str, sha256: str, limits: Limits) -> bytes:
    """One page's bytes straight from the input, once staging is gone.

    Raises InputMissing when the input went or changed.
    """
    try:
        with opened(source, limits) as archive:
            for entry in list_input(source, limits, archive).pages:
                if entry.name == name:
                    with open_entry(entry, archive, limits) as file:
                        data = b"".join(_pieces_of(file, limits))
                    if hashlib.sha256(data).hexdigest() == sha256:
                        return data
    except (*ENTRY_ERRORS, storage.InputUnusable) as error:
        raise storage.InputMissing(
            f"{name} can't be read from the input any more: {storage.reason_of(error)}"
        ) from error
    raise storage.InputMissing(f"{name} is no longer in the input as it was")


# ---------------------------------------------------------------- manifest
MANIFEST_BYTES = 16 << 20


def parse_manifest(data: bytes) -> dict[str, Any] | None:
    """A manifest from its bytes; None where it is none (a stray file of that name)."""
    try:
        manifest = json.loads(data)
        return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), list) else None
    except (ValueError, RecursionError):
        return None


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest file at `path`, if it is one and not too large."""
    try:
        with storage.open_regular(path) as file:
            data = file.read(MANIFEST_BYTES + 1)
    except OSError:
        return None
    return parse_manifest(data) if len(data) <= MANIFEST_BYTES else None


def find_manifest(source: Path, inside: dict[str, Any] | None) -> dict[str, Any] | None:
    """The input's manifest: at its root, else beside it as <archive>.manifest.json."""
    return inside or read_manifest(source.with_name(source.name + ".manifest.json"))


def reconcile(manifest: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Compare a manifest's files with the pages found; names in both are matched."""
    expected = []
    for item in manifest["files"]:
        target = item.get("target") or item.get("source") if isinstance(item, dict) else item
        if isinstance(target, str):
            target = target.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
            expected.append("/".join(p for p in target.replace("\\", "/").split("/") if p not in ("", ".")))
    wanted, present = {storage.fold(name) for name in expected}, {storage.fold(name) for name in names}
    return {
        "expected": len(expected),
        "matched": sum(storage.fold(name) in present for name in expected),
        "missing": sorted((n for n in expected if storage.fold(n) not in present), key=storage.natural_key),
        "extra": sorted((n for n in names if storage.fold(n) not in wanted), key=storage.natural_key),
    }
