"""What in incoming/ is an upload, whole or still on its way; its title, volume and content.

Map: names - Upload - finding uploads - content and key
Rule: time stamps tell that something changed, never that it is finished: upload tools set them
to what the sender's file had.
Runs in: the watch thread; copyparty_hook.py, which Copyparty starts. Standard library only.

    incoming/作品名/01.cbz      an archive, anywhere       -> title 作品名, volume 01
    incoming/作品名 v02/001.jpg  a folder with pages in it -> title 作品名, volume 02
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import storage
from messages import Limits

TITLE_CHARACTERS = 300  # of a title, or a volume's name


# ---------------------------------------------------------------- names
def is_archive_name(name: str) -> bool:
    """Whether a file of this name is a volume by itself."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in storage.ARCHIVE_SUFFIXES and not storage.is_junk([name])


def title_and_volume(path: str, kind: str) -> tuple[str, str]:
    """Of an upload by its path below incoming/: the first folder is the title, what follows the volume.

    Without a folder the name's last number is the volume, 1 where there is none.
    """
    *folders, last = path.split("/")
    stem = os.path.splitext(last)[0] if kind == "zip" else last
    title, *rest = [_plain(part) for part in (*folders, stem)]
    numbered = storage.NUMBERED.fullmatch(rest[-1] if rest else title)
    if len(rest) > 1 or (rest and not numbered):
        return title, " ".join(rest)[:TITLE_CHARACTERS]
    if not rest and numbered:
        title = numbered["title"].strip() or title
    return title, numbered["number"] if numbered else "1"


def _plain(name: str) -> str:
    """A name as a title: no control characters, no half characters, not empty."""
    kept = "".join("_" if unicodedata.category(c) in ("Cc", "Cs") else c for c in name)
    return kept.strip()[:TITLE_CHARACTERS] or "_"


# ---------------------------------------------------------------- finding uploads
@dataclass(frozen=True, slots=True)
class Upload:
    """A volume in incoming/, as its folder tells without opening a file."""

    path: str  # below incoming/, "/" between folders
    kind: str  # "folder" or "zip", as in POST /jobs
    stamp: str  # of its files' names, sizes and times: another one after any change
    changed_s: float  # when a file of it was last changed or renamed, or it was moved here
    unfinished: str | None  # a file of it that is still being received


def find_uploads(incoming: Path, limits: Limits) -> Iterator[Upload]:
    """Every archive, and every topmost folder that holds a page, in order of their paths.

    Pages directly in incoming/ belong to nothing. Links are not followed, hidden files and folders
    (.hist of Copyparty) not looked at. Raises OSError.
    """
    yield from _find(incoming, (), limits, inside=False)


def find_upload(incoming: Path, path: str, limits: Limits) -> Upload | None:
    """The upload at this very path, if there is one; nothing else is looked at. Raises OSError."""
    parts = tuple(path.split("/"))
    place = incoming.joinpath(*parts)
    if place.is_dir():
        found = _in_folder(place, parts, _entries(place)[0], limits, inside=False)
    else:
        found = _in_folder(place.parent, parts[:-1], _entries(place.parent)[0], limits, inside=True)
    return next((upload for upload in found if upload.path == path), None)


def _find(folder: Path, parts: tuple[str, ...], limits: Limits, inside: bool) -> Iterator[Upload]:
    files, folders = _entries(folder)
    for upload in _in_folder(folder, parts, files, limits, inside):
        yield upload
        inside = inside or upload.kind == "folder"
    if len(parts) < limits.depth:
        for below in folders:
            yield from _find(folder / below, (*parts, below), limits, inside)


def _in_folder(
    folder: Path,
    parts: tuple[str, ...],
    files: list[os.DirEntry[str]],
    limits: Limits,
    inside: bool,
) -> Iterator[Upload]:
    """The archives right in a folder, and the folder itself if it holds a page.

    inside: it lies in a folder that is an upload itself; only archives count there.
    """
    arriving = storage.unfinished_of(entry.name for entry in files)
    for entry in files:
        if is_archive_name(entry.name):
            partial = storage.awaits(entry.name, arriving)
            yield _upload((*parts, entry.name), "zip", [(entry.name, entry)], partial)
    if parts and not inside and any(storage.is_page_name([entry.name]) for entry in files):
        held = list(_files_below(folder, limits.depth))
        partial = next((name for name, _ in held if storage.is_unfinished(name.rpartition("/")[2])), None)
        whole = [item for item in held if not storage.is_unfinished(item[0])]
        yield _upload(parts, "folder", whole, partial, _moved_s(folder, len(parts)))


def _entries(folder: Path) -> tuple[list[os.DirEntry[str]], list[str]]:
    """(regular files, names of folders) of a folder, sorted; of what went or is forbidden, nothing."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return [], []
    files = [entry for entry in entries if entry.is_file(follow_symlinks=False)]
    seen = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return files, [name for name in seen if not storage.is_junk([name])]


def _files_below(folder: Path, depth: int, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(name, entry) of the pages below a folder, and of what is still being received there."""
    files, folders = _entries(folder)
    for entry in files:
        if storage.is_page_name([entry.name]) or storage.is_unfinished(entry.name):
            yield prefix + entry.name, entry
    for below in folders if depth else ():
        yield from _files_below(folder / below, depth - 1, f"{prefix}{below}/")


def _moved_s(folder: Path, depth: int) -> float:
    """When a folder, or one of the `depth` that hold it, was moved here; 0 where that does not show.

    A folder that is renamed gets another ctime, as does one in which something is made or removed; but
    only the latter gets another mtime too.
    """
    moved_s = 0.0
    for place in (folder, *folder.parents)[:depth] if os.name != "nt" else ():
        with contextlib.suppress(OSError):
            stat = place.stat()
            moved_s = max(moved_s, stat.st_ctime if stat.st_ctime_ns > stat.st_mtime_ns else 0.0)
    return moved_s


def _upload(
    parts: tuple[str, ...],
    kind: str,
    held: list[tuple[str, os.DirEntry[str]]],
    unfinished: str | None,
    changed_s: float = 0.0,
) -> Upload:
    digest = hashlib.sha256()
    for name, entry in held:
        try:
            stat = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue  # the next look finds another stamp
        facts = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\n"
        digest.update(facts.encode("utf-8", "surrogateescape"))
        # Windows keeps the time of creation there, sometimes that of a file of this name before.
        changed_s = max(changed_s, stat.st_ctime, stat.st_mtime if os.name == "nt" else 0.0)
    return Upload("/".join(parts), kind, digest.hexdigest(), changed_s, unfinished)


# ---------------------------------------------------------------- content and key
class Interrupted(Exception):
    """Reading an upload was given up."""


def content_of(
    incoming: Path, upload: Upload, limits: Limits, goes_on: Callable[[], bool] = lambda: True
) -> str:
    """Hex SHA-256 of an archive, or of a folder's pages and their names, whatever their times.

    goes_on: asked now and then. Raises OSError, Interrupted once it says no.
    """
    place = incoming.joinpath(*upload.path.split("/"))
    if upload.kind == "zip":
        return _sha256(place, goes_on)
    digest = hashlib.sha256()
    for name, entry in _files_below(place, limits.depth):
        if not storage.is_unfinished(entry.name):
            line = f"{name}\0{_sha256(Path(entry.path), goes_on)}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _sha256(path: Path, goes_on: Callable[[], bool]) -> str:
    digest = hashlib.sha256()
    with storage.open_regular(path) as file:
        while piece := file.read(storage.CHUNK_BYTES):
            if not goes_on():
                raise Interrupted
            digest.update(piece)
    return digest.hexdigest()


def submission_key(path: str, content: str) -> str:
    """The Idempotency-Key of this content at this path, whoever submits it: two who saw the same
    upload finish make one job."""
    return "upload-" + hashlib.sha256(f"{path}\0{content}".encode("utf-8", "surrogateescape")).hexdigest()
