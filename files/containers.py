"""What a cbz holds beside its pages: the input's other files, and its ComicInfo.xml brought up to date.

Map: keeping (while staging) - names - completing (before packing) - ComicInfo
Rule: nothing of it can lose the volume. A file that can't be kept is left out, and a ComicInfo.xml
that can't be read for certain is kept under a name that no reader opens; the report says why.
Runs in: the worker, the command line. Standard library only.

    input --keep--> outputs/<name>, .kept-files.json
                        '--complete--> ComicInfo.xml, report["files"] --artifacts.pack--> artifact

Kept files lie among the pages and not in the working copy, since a job whose every page is done
can be packed again without its input.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import xml.parsers.expat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import storage
from files import artifacts, inputs
from files.inputs import Entry
from messages import CONTAINER_FORMATS, Limits

INDEX = ".kept-files.json"  # hidden, like the next: no kept file can be called so
COMIC_INFO_AS_IT_CAME = ".comicinfo.xml"
COMIC_INFO = "ComicInfo.xml"
COMIC_INFO_UNREAD = "_ComicInfo.xml"
OWN_FILES = (INDEX, COMIC_INFO_AS_IT_CAME)
COMIC_INFO_BYTES = 4 << 20  # of 20,000 pages it has 2 MB
COMIC_INFO_DEPTH = 32
MEDIA_TYPES = {
    "zip": "application/zip",
    "cbz": "application/vnd.comicbook+zip",
    "epub": "application/epub+zip",
    "pdf": "application/pdf",
}


# ---------------------------------------------------------------- keeping
def keep(source: Path, outputs: Path, limits: Limits, reserve_bytes: int | None = None) -> Iterator[int]:
    """Copy an input's other files to `outputs`; yields the bytes so far after each.

    Nothing counts as kept before all are: then the index is written. One that is over a
    limit, or can't be read, is noted there with the reason.
    reserve_bytes: what must stay free beside them and their copy in the artifact; None: unchecked.
    Raises storage.InputUnusable's family, storage.NoRoom, and OSError where the disk refuses.
    """
    from files import formats

    outputs.mkdir(parents=True, exist_ok=True)
    _forget(outputs)
    with inputs.opened(source, limits) as archive:
        listing = inputs.list_input(source, limits, archive)
        room = limits.total_bytes
        if archive is None:  # of an archive, every entry counted already
            room -= sum(inputs.entry_bytes(page) for page in listing.pages)
        if reserve_bytes is not None:
            _check_room(outputs, listing.others, room, reserve_bytes)
        stems = storage.output_stems([page.name for page in listing.pages])
        info = comic_info_of(listing)
        names = kept_names([entry.name for entry in listing.others], stems)
        files, total_bytes = [], 0
        with formats.opener(listing.others, archive, limits, outputs) as open_entry:
            for entry, name in zip(listing.others, names, strict=True):
                target = COMIC_INFO_AS_IT_CAME if entry is info else name
                files.append(_keep_one(entry, open_entry, outputs, target, limits, room - total_bytes))
                total_bytes += files[-1]["bytes"] or 0
                yield total_bytes
    storage.write_whole(outputs / INDEX, json.dumps(files).encode())


def _check_room(outputs: Path, others: list[Entry], room: int, reserve_bytes: int) -> None:
    sizes = 0
    for entry in others:
        with contextlib.suppress(OSError):  # gone since: it will be left out
            sizes += inputs.entry_bytes(entry)
    needed, free = 2 * min(sizes, max(room, 0)), shutil.disk_usage(outputs).free
    if needed + reserve_bytes > free:
        raise storage.NoRoom(needed, free, reserve_bytes)


def is_kept(outputs: Path) -> bool:
    """Whether an earlier attempt kept everything, and it still is as it was."""
    try:
        files = _index(outputs)
    except (OSError, ValueError):
        return False
    return all(
        storage.file_is(outputs / file["filename"], file["sha256"]) for file in files if file["filename"]
    )


def left_out(outputs: Path) -> int:
    """How many files could not be kept."""
    return sum(file["filename"] is None for file in _index(outputs))


def kept_bytes(outputs: Path) -> int:
    """Of all that was kept."""
    return sum(file["bytes"] or 0 for file in _index(outputs))


def _index(outputs: Path) -> list[dict[str, Any]]:
    """Raises OSError, ValueError where it is gone or damaged."""
    files: list[dict[str, Any]] = json.loads((outputs / INDEX).read_bytes())
    is_list = isinstance(files, list)
    if not is_list or not all(isinstance(file, dict) and {"filename", "sha256"} <= {*file} for file in files):
        raise ValueError(f"{INDEX} is not an index")
    return files


def _forget(outputs: Path) -> None:
    """Remove what was kept of an earlier input: nothing of it may be in a new one's way."""
    storage.sweep_folders(outputs)  # of an attempt that was killed
    with contextlib.suppress(OSError, ValueError):
        for file in _index(outputs):
            if file["filename"]:
                storage.remove_file(outputs / file["filename"])
        storage.remove_file(outputs / INDEX)


def _keep_one(
    entry: Entry,
    open_entry: Callable[[Entry], IO[bytes]],
    outputs: Path,
    name: str,
    limits: Limits,
    room: int,
) -> dict[str, Any]:
    """A line of the index: as in the report, but for what complete() adds."""
    digest, size_bytes, error = hashlib.sha256(), 0, None
    target = outputs / name
    try:
        storage.member_parts(entry.name, limits)
        with open_entry(entry) as file:
            target.parent.mkdir(parents=True, exist_ok=True)
            storage.remove_file(target)
            with open(target, "xb") as copy:
                while chunk := file.read(storage.CHUNK_BYTES):
                    size_bytes += len(chunk)
                    if size_bytes > min(room, limits.entry_bytes):
                        over = "total_bytes" if size_bytes > room else "entry_bytes"
                        raise storage.LimitExceeded(over, size_bytes, min(room, limits.entry_bytes), "bytes")
                    digest.update(chunk)
                    copy.write(chunk)
        # No sync: before it is packed, and before a later attempt believes it, it is hashed.
    except (*inputs.ENTRY_ERRORS, storage.UnsafeName) as problem:
        if isinstance(problem, OSError) and problem.errno in storage.OUR_DISK:
            raise
        with contextlib.suppress(OSError):
            storage.remove_file(target)
        error = f"left out: {storage.reason_of(problem)}"
    source = {"filename": entry.name.encode("utf-8", "replace").decode()}
    facts = {"sha256": digest.hexdigest(), "bytes": size_bytes}
    if error:
        nothing = {"filename": None, "sha256": None, "bytes": None}
        return nothing | {"source": source, "status": "left out", "error": error}
    return {"filename": name} | facts | {"source": source | facts, "status": "kept", "error": None}


# ---------------------------------------------------------------- names
def comic_info_of(listing: inputs.Listing) -> Entry | None:
    """The input's ComicInfo.xml: the one at its root, else the only one in a folder with all pages."""
    found = [entry for entry in listing.others if _last(entry).casefold() == COMIC_INFO.casefold()]
    at_root = [entry for entry in found if "/" not in entry.name]
    if at_root:
        return at_root[0]
    if len(found) == 1:
        folder = found[0].name[: -len(COMIC_INFO)]
        if all(page.name.startswith(folder) for page in listing.pages):
            return found[0]
    return None


def _last(entry: Entry) -> str:
    return entry.name.rpartition("/")[2]


def kept_names(names: Sequence[str], stems: Sequence[str]) -> list[str]:
    """Distinct safe paths for other files, in the way of no page, report or ComicInfo.xml.

    stems: the pages' output paths without suffix. A name that is taken gets "_" before
    it, then "_2_". Deterministic.
    """
    files = {storage.fold(name) for name in (storage.REPORT_NAME, COMIC_INFO, COMIC_INFO_UNREAD)}
    files |= {storage.fold(stem + suffix) for stem in stems for suffix in storage.PAGE_SUFFIXES}
    folders = {folder for stem in stems for folder in _folders(storage.fold(stem))}
    tries: dict[str, int] = {}  # so that a thousand files of one name don't take a million looks
    kept = []
    for name in names:
        parts = [storage.safe_component(part) for part in name.split("/")]
        if os.path.splitext(parts[-1])[1].lower() in storage.PAGE_SUFFIXES:
            parts[-1] += "_"  # made safe, it would pass for a page
        plain = "/".join(parts)
        n = tries.get(storage.fold(plain), 0)
        while True:
            path = ("", "_")[n] + plain if n < 2 else f"_{n}_{plain}"
            key = storage.fold(path)
            above = _folders(key)
            n += 1
            if key not in files and key not in folders and not files.intersection(above):
                break
        tries[storage.fold(plain)] = n
        files.add(key)
        folders.update(above)
        kept.append(path)
    return kept


def _folders(path: str) -> list[str]:
    """The folders on the way to a path."""
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


# ---------------------------------------------------------------- completing
def pack(outputs: Path, artifact: Path, report: dict[str, Any]) -> tuple[str, int]:
    """artifacts.pack() for any container; the report's params name it.

    Raises storage.OutputDamaged, books.ExtraMissing.
    """
    if report["params"].get("container") in CONTAINER_FORMATS:
        from files import books

        return books.pack(outputs, artifact, report)
    if report["params"].get("container") != "cbz":
        return artifacts.pack(outputs, artifact, report)
    return artifacts.pack(outputs, artifact, complete(outputs, report), OWN_FILES)


def complete(outputs: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report with "files": what was kept, ComicInfo.xml as this volume needs it.

    Raises storage.OutputDamaged where what was kept is gone.
    """
    try:
        files = _index(outputs)
    except (OSError, ValueError) as error:
        raise storage.OutputDamaged(INDEX, None) from error
    return report | {"files": [_completed(outputs, file, report["items"]) for file in files]}


def _completed(outputs: Path, file: dict[str, Any], items: list[dict[str, Any]]) -> dict[str, Any]:
    if file["filename"] != COMIC_INFO_AS_IT_CAME:
        return file
    path = outputs / COMIC_INFO_AS_IT_CAME
    if not storage.file_is(path, file["sha256"]):
        raise storage.OutputDamaged(COMIC_INFO_AS_IT_CAME, None)
    try:
        data, facts = comic_info(path, items), {"filename": COMIC_INFO, "status": "updated"}
    except ComicInfoError as error:
        data = path.read_bytes()
        why = f"not brought up to date, and so not called {COMIC_INFO}: {error}"
        facts = {"filename": COMIC_INFO_UNREAD, "error": why}
    digest = storage.write_whole(outputs / facts["filename"], data)
    return file | facts | {"sha256": digest, "bytes": len(data)}


def packed_files(outputs: Path) -> list[dict[str, Any]] | None:
    """The "files" of the report beside a job's pages; None where it is gone."""
    try:
        files: list[dict[str, Any]] = json.loads((outputs / storage.REPORT_NAME).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files


# ---------------------------------------------------------------- ComicInfo
class ComicInfoError(Exception):
    """A ComicInfo.xml that can't be read for certain."""


# What declarations name, and Python decodes without surprises in time or meaning.
ENCODINGS = frozenset(
    "utf-8 utf-16 us-ascii iso-8859-1 iso-8859-15 windows-1250 windows-1251 windows-1252 shift_jis"
    " windows-31j cp932 euc-jp gb2312 gbk gb18030 big5 euc-kr".split()
)
PYTHON_NAMES = {"windows-31j": "cp932", "shift_jis": "cp932"}
BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
DECLARED = re.compile(rb"<\?xml\s[^>]*?encoding\s*=\s*[\"']([A-Za-z][\w.-]{0,39})[\"']")
# The start of an element at an offset that expat gave: it is well-formed from there on.
ATTRIBUTE = rb"\s+[^\s=/>]+\s*=\s*(?:\"[^\"]*\"|'[^']*')"
TAG = re.compile(rb"<(?P<name>[^\s/>]+)(?P<attributes>(?:%b)*)\s*(?P<empty>/?)>" % ATTRIBUTE)
END_TAG = re.compile(rb"</[^>]*>")
# The elements that the schema puts before PageCount.
BEFORE_PAGE_COUNT = frozenset(
    "Title Series Number Count Volume AlternateSeries AlternateNumber AlternateCount Summary Notes Year"
    " Month Day Writer Penciller Inker Colorist Letterer CoverArtist Editor Translator Publisher Imprint"
    " Genre Tags Web".split()
)


def comic_info(path: Path, items: Sequence[Mapping[str, Any]]) -> bytes:
    """A ComicInfo.xml with PageCount, and each Page's ImageWidth, ImageHeight and ImageSize, as
    these items of a report have them, and its Image where pages before it were split; all else in it
    stays byte for byte.

    Raises ComicInfoError: it is too large, no XML in its encoding, has a DOCTYPE (whose
    entities may grow without end or read other files), or is no ComicInfo.
    """
    if path.stat().st_size > COMIC_INFO_BYTES:
        raise ComicInfoError(f"it has over {COMIC_INFO_BYTES} bytes")
    bom, text, encoding = _decoded(path.read_bytes())
    data = text.encode()
    edits = _Edits(data, items)
    edits.find()
    parts, done = [], 0  # joined at last: there may be a hundred thousand
    for start, end, new in sorted(edits.found):
        parts += [data[done:start], new]
        done = end
    return bom + b"".join([*parts, data[done:]]).decode().encode(encoding)


def _decoded(data: bytes) -> tuple[bytes, str, str]:
    """(byte order mark, text, its encoding). Raises ComicInfoError."""
    bom, encoding = next(((mark, name) for mark, name in BOMS if data.startswith(mark)), (b"", ""))
    # Of UTF-16 a declaration has every second byte.
    match = DECLARED.match(data[len(bom) : len(bom) + 400].replace(b"\0", b""))
    declared = match[1].decode("ascii").lower() if match else encoding[:6] or "utf-8"
    if declared not in ENCODINGS:
        raise ComicInfoError(f"its encoding {declared} is not one that is known here")
    if bom and declared != encoding[:6]:  # readers differ in what they believe then
        raise ComicInfoError(f"it calls itself {declared}, and begins as {encoding}")
    encoding = encoding or PYTHON_NAMES.get(declared, declared)
    try:
        text = data[len(bom) :].decode(encoding)
        exact = text.encode(encoding) == data[len(bom) :]
        text.encode()
    except UnicodeError as error:
        raise ComicInfoError(f"it is not in its own encoding, {encoding}") from error
    if not exact:
        raise ComicInfoError(f"its {encoding} can't be written again as it was")
    return bom, text, encoding


class _Edits:
    """Where a ComicInfo.xml has to change: (start, end, new bytes), none over another."""

    def __init__(self, data: bytes, items: Sequence[Mapping[str, Any]]) -> None:
        self.data = data
        self.items = items
        # Its pages are those that came: of the halves of a double page the first one stands for it.
        self.firsts = [n for n, item in enumerate(items) if _half_of(item) != 2]
        self.found: list[tuple[int, int, bytes]] = []
        self._path: list[str] = []
        self._begins: list[int] = []
        self._has_count = False
        self._count_at = 0  # where a missing PageCount belongs
        self._parser = xml.parsers.expat.ParserCreate("utf-8", " ")  # whatever the declaration says
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end

    def find(self) -> None:
        """Raises ComicInfoError."""
        try:
            self._parser.Parse(self.data, True)
        except xml.parsers.expat.ExpatError as error:
            raise ComicInfoError(f"it is no XML: {error}") from error

    def _doctype(self, *_: object) -> None:
        raise ComicInfoError("it has a DOCTYPE")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        at = self._parser.CurrentByteIndex
        name = name.rpartition(" ")[2]  # without the namespace
        self._path.append(name)
        self._begins.append(at)
        if len(self._path) > COMIC_INFO_DEPTH:
            raise ComicInfoError("it is nested too deeply")
        if len(self._path) == 1:
            tag = self._tag(at)
            if tag["name"] != b"ComicInfo":
                raise ComicInfoError(f"its root is {name[:40]!a}")
            self._count_at = tag.end()
        elif self._path == ["ComicInfo", "Pages", "Page"]:
            self._page(at, attributes.get("Image", ""))

    def _end(self, _: str) -> None:
        name, begin, at = self._path.pop(), self._begins.pop(), self._parser.CurrentByteIndex
        if len(self._path) == 1:
            tag = self._tag(begin)
            # Of an empty element expat tells the end of its tag, not where that begins.
            end = tag.end() if tag["empty"] else self._closing(at).end()
            if name == "PageCount":
                self._has_count = True
                self.found.append((begin, end, self._page_count()))
            elif name in BEFORE_PAGE_COUNT:
                self._count_at = end
        elif not self._path and not self._has_count:
            tag = self._tag(begin)
            if tag["empty"]:  # <ComicInfo/>: nothing can stand in it before it has an end
                opened = self.data[begin : tag.start("empty")] + b">"
                self.found.append((begin, tag.end(), opened + self._page_count() + b"</ComicInfo>"))
            else:
                self.found.append((self._count_at, self._count_at, self._page_count()))

    def _page_count(self) -> bytes:
        return b"<PageCount>%d</PageCount>" % len(self.items)

    def _page(self, at: int, image: str) -> None:
        came = int(image) if re.fullmatch(r"[0-9]{1,6}", image) else len(self.firsts)
        if came >= len(self.firsts):
            return  # it speaks of no page that is here
        n = self.firsts[came]
        item = self.items[n]
        # A carried page that nothing decodes has no size: better none than the old one.
        values = {"ImageWidth": item["width"], "ImageHeight": item["height"], "ImageSize": item["bytes"]}
        if n != came:
            values["Image"] = n
        if _half_of(item):
            values["DoublePage"] = None
        attributes = self._tag(at)["attributes"]
        for name, value in values.items():
            new = b' %b="%d"' % (name.encode(), value) if value else b""
            old = re.compile(rb"\s+%b\s*=\s*(?:\"[^\"]*\"|'[^']*')" % name.encode())
            attributes, times = _replaced(attributes, old, new)
            attributes += b"" if times else new
        start, end = self._tag(at).span("attributes")
        self.found.append((start, end, attributes))

    def _tag(self, at: int) -> re.Match[bytes]:
        tag = TAG.match(self.data, at)
        if tag is None:
            raise ComicInfoError("it is XML of an unusual kind")
        return tag

    def _closing(self, at: int) -> re.Match[bytes]:
        tag = END_TAG.match(self.data, at)
        if tag is None:
            raise ComicInfoError("it is XML of an unusual kind")
        return tag


def _half_of(item: Mapping[str, Any]) -> int | None:
    """See storage.half_number."""
    deviation = item.get("deviation")
    return storage.half_number(artifacts.source_of(item)[0], deviation) if deviation else None


def _replaced(attributes: bytes, old: re.Pattern[bytes], new: bytes) -> tuple[bytes, int]:
    """Replace an attribute, and not what looks like it inside another's value."""
    parts, times = [], 0
    for attribute in re.findall(ATTRIBUTE, attributes):
        if old.fullmatch(attribute):
            parts.append(new)
            times += 1
        else:
            parts.append(attribute)
    return b"".join(parts), times
