"""Volumes that are no plain zip: RAR, 7z, PDF, and the reading order of an EPUB.

Map: kinds - Container (by a process of its own) - EPUB
Rule: what zip may not do, none of these may: the checks of names, sizes and links are storage's own.
Runs in: the worker; for pages whose working copy is gone and for uploads, the http-* and watch threads.
Standard library only: the libraries of the extra `formats` are imported in a child process alone,
which gives up its rights, and whose death costs the page that it was at (unpack.py).

    inputs.opened --> Container ==JSON lines==> unpack.py: rarfile, py7zr, pypdfium2
"""

from __future__ import annotations

import contextlib
import html.parser
import importlib.util
import io
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import xml.parsers.expat
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import storage
from files import inputs
from messages import Limits

KINDS = {"rar": "a RAR archive", "7z": "a 7z archive", "pdf": "a PDF"}
READER = ("-m", "files.unpack")
LIBRARIES, PROGRAMS = ("rarfile", "py7zr", "pypdfium2"), ("unrar", "unar", "bsdtar", "tar")  # see unpack.py
SILENCE_S = 300.0  # after which a reader is taken for hung
DEATHS = 20  # of readers of one archive, before the rest of its members is given up
TOOLS = (
    "its members are compressed, and unpacking RAR needs one of the programs unrar, unar or bsdtar on the "
    "PATH (Debian: apt install unar; Windows brings its own as tar.exe)"
)


def means() -> list[str]:
    """What is here of the libraries and programs that read these kinds."""
    libraries = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    return libraries + [name for name in PROGRAMS if shutil.which(name)]


class ExtraMissing(storage.InputUnusable):
    """A library that reads this kind is not installed."""

    code = "EXTRA_MISSING"


class ToolMissing(storage.InputUnusable):
    """A program that reads this kind is not installed."""

    code = "TOOL_MISSING"


class Died(Exception):
    """A reader ended without saying why."""


# ---------------------------------------------------------------- containers
@dataclass(frozen=True, slots=True)
class Member:
    """An entry of a container. file_size: bytes unpacked; of a PDF's page an estimate."""

    index: int
    name: str
    file_size: int
    is_folder: bool
    is_special: bool  # a link or a device


class Container:
    """An input of one of KINDS; each call reads it in a child process that ends with it."""

    def __init__(self, source: Path, head: bytes, name: str) -> None:
        """head: its first bytes; name: what people call it."""
        self.source = source
        self.name = name
        self.kind = storage.sniff(head)
        found = os.stat(source, follow_symlinks=False)
        self.identity = [found.st_dev, found.st_ino]  # what is read later must be this file
        self.size_bytes = found.st_size

    def members(self, limits: Limits) -> list[Member]:
        """Every entry, in the container's order. Raises InputUnusable's family."""
        found = []
        try:
            for event in self._ask("list", {}, limits):
                found.append(event)
                if len(found) > limits.entries:
                    what = "entries in the archive"
                    raise storage.LimitExceeded("entries", len(found), limits.entries, what)
        except Died as error:
            raise storage.InputUnread(f"{self.name} can't be read: {error}") from error
        raw = [bytes.fromhex(event["raw"]) for event in found if event["raw"]]
        decoded = iter(storage.decode_names(raw))
        return [
            Member(
                event["index"],
                next(decoded) if event["raw"] else event["name"],
                event["size"],
                event["folder"],
                event["special"],
            )
            for event in found
        ]

    def extract(self, targets: dict[int, Path], limits: Limits) -> Iterator[tuple[int, str | None]]:
        """Write members (by index) to files; yields (index, error) of each, in the container's order.

        What could be read stays beside an error. Raises InputUnusable's family for a container
        that can't be read at all, OSError where the disk refuses.
        """
        rest, deaths = dict(targets), 0
        while rest:
            at: int | None = None
            try:
                for event in self._ask("extract", rest, limits):
                    if event["event"] == "begin":
                        at = event["index"]
                    else:
                        del rest[event["index"]]
                        yield event["index"], event["error"]
                        at = None
                problem = "it is not in the archive any more"
            except Died as error:
                deaths += 1
                problem = str(error)
                if at is not None and deaths < DEATHS:
                    del rest[at]
                    yield at, problem
                    continue
            yield from ((index, problem) for index in rest)
            return

    def open(self, member: Member, limits: Limits) -> IO[bytes]:
        """One member's bytes. Raises ValueError for a damaged one, else as extract()."""
        with tempfile.TemporaryDirectory(prefix=storage.scratch_prefix("member")) as folder:
            target = Path(folder, "member")
            for _, error in self.extract({member.index: target}, limits):
                if error:
                    raise ValueError(error)
            copy = tempfile.TemporaryFile()
            with open(target, "rb") as file:
                shutil.copyfileobj(file, copy, storage.CHUNK_BYTES)
        copy.seek(0)
        return copy

    def _ask(self, action: str, targets: dict[int, Path], limits: Limits) -> Iterator[dict[str, Any]]:
        """The events of one reader. Raises Died, InputUnusable's family, OSError."""
        request = {
            "action": action,
            "kind": self.kind,
            "path": str(self.source.absolute()),
            "identity": self.identity,
            "limits": asdict(limits),
            "wanted": [[index, str(path.absolute())] for index, path in targets.items()],
        }
        for event in _events_of(request):
            if event["event"] == "done":
                return
            if event["event"] == "refused":
                raise self._refusal(event["code"], event["detail"])
            if event["event"] == "disk":
                raise OSError(event["errno"], event["detail"])
            yield event
        raise Died("its reader ended early")

    def _refusal(self, code: str, detail: str) -> storage.InputUnusable:
        name = self.name
        if code == "EXTRA_MISSING":
            return ExtraMissing(f'{name} is {detail}; reading those needs: pip install ".[formats]"')
        if code == "TOOL_MISSING":
            return ToolMissing(f"{name} is {KINDS[self.kind]}; {TOOLS}")
        if code == "ENCRYPTED":
            return storage.InputUnusable(f"{name} is encrypted; upload it without a password")
        return storage.InputUnusable(f"{name} is {detail}")


def _events_of(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One reader process from its start to its end."""
    # A thread a core would each take a piece of the memory that it may have.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *READER],
        cwd=storage.PROGRAM,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=environment,
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        process_group=0 if os.name == "posix" else None,  # a Ctrl-C is for us; it ends with its stdin
    ) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        heard, ended = [time.monotonic()], threading.Event()

        def watch() -> None:
            while not ended.wait(1):
                if time.monotonic() - heard[0] > SILENCE_S:
                    reader.kill()

        threading.Thread(target=watch, name="reader-watch", daemon=True).start()
        try:
            with contextlib.suppress(BrokenPipeError):
                reader.stdin.write(json.dumps(request) + "\n")
                reader.stdin.flush()
            for line in reader.stdout:
                heard[0] = time.monotonic()
                with contextlib.suppress(ValueError):  # the last line of one that was killed
                    event = json.loads(line)
                    yield event
        finally:
            ended.set()
            reader.kill()  # after its last event there is nothing that it could still do
            with contextlib.suppress(OSError):
                reader.stdin.close()


def is_container(head: bytes) -> bool:
    """Whether a file with these first bytes is one of KINDS."""
    return storage.sniff(head) in KINDS


class _Unpacked(io.FileIO):
    """A member that was unpacked; where that failed, reading it ends with the reason."""

    def __init__(self, path: Path, error: str | None) -> None:
        super().__init__(path)
        self.error = error

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises ValueError behind the last byte that could be had."""
        data = super().read(size) or b""
        if self.error and not data:
            raise ValueError(self.error)
        return data


@contextlib.contextmanager
def opener(
    entries: Sequence[inputs.Entry],
    archive: inputs.Archive | None,
    limits: Limits,
    room: Path | None = None,
) -> Iterator[Callable[[inputs.Entry], IO[bytes]]]:
    """inputs.open_entry() for each of these; a container's are unpacked first, all in one pass.

    room: the folder for that, else the system's own for temporary files. Raises as Container.extract().
    """
    if not isinstance(archive, Container):
        yield lambda entry: inputs.open_entry(entry, archive, limits)
        return
    prefix = storage.UNPACKED if room else storage.scratch_prefix("members")
    with tempfile.TemporaryDirectory(prefix=prefix, dir=room) as folder:
        members = [entry.member.index for entry in entries if isinstance(entry.member, Member)]
        paths = {index: Path(folder, str(index)) for index in members}
        errors = dict(archive.extract(paths, limits))

        def open_unpacked(entry: inputs.Entry) -> IO[bytes]:
            assert isinstance(entry.member, Member)
            path = paths[entry.member.index]
            path.touch()  # of a member that could not be read at all
            return cast("IO[bytes]", _Unpacked(path, errors[entry.member.index]))

        yield open_unpacked


# ---------------------------------------------------------------- EPUB
XML_BYTES = 16 << 20  # of a package document; of all pages' documents together, DOCUMENTS_BYTES
DOCUMENTS_BYTES = 64 << 20
CONTAINER = "META-INF/container.xml"
ENCRYPTION = "META-INF/encryption.xml"
IMAGE_TYPE = "image/"
DRAWING_TYPE = "image/svg"  # no page, but a document that may show one


def spine_pages(
    source: Path,
    members: Mapping[str, zipfile.ZipInfo],
    read: Callable[[zipfile.ZipInfo], bytes],
    limits: Limits,
) -> list[zipfile.ZipInfo] | None:
    """An EPUB's page images in reading order; None for a zip that is none.

    The order is the spine's (EPUB 3.3, 5.7); a cover that no document shows comes first. An image
    that stands in several documents counts once. members: by their names in NFC; read: a member's
    bytes, b"" where it is damaged. Raises InputUnusable for an EPUB whose pages are encrypted.
    """
    if CONTAINER not in members:
        return None
    left = DOCUMENTS_BYTES

    def text(name: str) -> bytes:
        nonlocal left
        info = members.get(name)
        if info is None or info.file_size > min(XML_BYTES, left):
            return b""
        left -= info.file_size
        return read(info)

    roots = _elements(text(CONTAINER), "rootfile")
    root = unicodedata.normalize("NFC", next((one["full-path"] for one in roots if "full-path" in one), ""))
    package = text(root)
    items = {one.get("id"): one for one in _elements(package, "item")}
    found: list[str] = []
    for reference in _elements(package, "itemref")[: limits.entries]:
        item = items.get(reference.get("idref"), {})
        name = _resolved(root, item.get("href", ""))
        kind = item.get("media-type", "")
        if kind.startswith(IMAGE_TYPE) and not kind.startswith(DRAWING_TYPE):
            found.append(name)
        else:
            found += [_resolved(name, link) for link in _images_in(text(name))]
    pages = [name for name in dict.fromkeys(found) if name in members]
    cover = _cover_of(package, items)
    cover_name = _resolved(root, cover) if cover else ""
    if pages and cover_name in members and cover_name not in pages:
        pages.insert(0, cover_name)
    locked = {_resolved("", one.get("URI", "")) for one in _elements(text(ENCRYPTION), "CipherReference")}
    if locked.intersection(pages):
        raise storage.InputUnusable(f"{source.name} is an EPUB with copy protection, which can't be read")
    return [members[name] for name in pages] or None


def _cover_of(package: bytes, items: dict[str | None, dict[str, str]]) -> str | None:
    """The cover's address: EPUB 3's property, else what the meta of older ones names."""
    for item in items.values():
        if "cover-image" in item.get("properties", "").split():
            return item.get("href")
    named = [one.get("content") for one in _elements(package, "meta") if one.get("name") == "cover"]
    return items.get(named[0], {}).get("href") if named else None


def _resolved(base: str, link: str) -> str:
    """The member that a link in the member `base` names, in NFC: macOS decomposes names, not links."""
    path = ""
    with contextlib.suppress(ValueError):  # "//[", say
        path = urllib.parse.unquote(urllib.parse.urlsplit(link).path) if ":" not in link[:12] else ""
    place = posixpath.normpath(posixpath.join(posixpath.dirname(base), path)) if path else ""
    return unicodedata.normalize("NFC", place)


class _Entities(Exception):
    """A document declares entities: they may grow without end."""


def _elements(data: bytes, name: str) -> list[dict[str, str]]:
    """The attributes of all elements of this local name; none of what is not well-formed or declares
    entities. What comes before a fault counts."""
    found: list[dict[str, str]] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if tag.rpartition(":")[2] == name:
            found.append(attributes)

    def refuse(*_: Any) -> None:
        raise _Entities

    parser = xml.parsers.expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EntityDeclHandler = refuse
    with contextlib.suppress(xml.parsers.expat.ExpatError, _Entities, LookupError, ValueError):
        parser.Parse(data, True)
    return found


class _Images(html.parser.HTMLParser):
    """Collects the addresses of images in a page's document, XHTML or SVG."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """Of img, and of SVG's image."""
        given = dict(attrs)
        if tag == "img":
            self.found.append(given.get("src") or "")
        elif tag.rpartition(":")[2] == "image":
            self.found.append(given.get("xlink:href") or given.get("href") or "")


def _images_in(document: bytes) -> list[str]:
    parser = _Images()
    bom = re.match(rb"\xff\xfe|\xfe\xff", document)
    with contextlib.suppress(AssertionError, ValueError):  # what its parser raises for odd declarations
        parser.feed(document.decode("utf-16" if bom else "utf-8", "replace"))
    return [link for link in parser.found if link]


def numbered(names: Sequence[str]) -> list[str]:
    """Names that sort into this order: as they are if they do already, else numbered."""
    if sorted(names, key=storage.natural_key) == list(names):
        return list(names)
    digits = len(str(len(names)))
    return [f"{n:0{digits}d}-{name.rpartition('/')[2]}" for n, name in enumerate(names, 1)]
