"""Every path on disk: where things lie, what they may be called, how a file gets there whole.

Map: constants - errors - Layout - names - whole files - upkeep
Beside it: inputs.py (what comes in), artifacts.py (what goes out, and its proof), weightfiles.py
Rule: a file appears under its final name only when it is whole, synced and hashed.
Runs in: http-* threads, dispatcher, worker. Standard library only, but for the records in messages.py.

    incoming/x.zip --stage--> staging/<job>/00001.png --infer--> outputs/<t>/<v>/<job>/001.jpg
                                                                      |
                              artifacts/<t>-<v>-<job>.zip <---pack----+-- artifact-report.json
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import itertools
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from messages import Limits, setting_name

PROGRAM = Path(__file__).parent.absolute()  # the service's own files
# Whose code decides a page's bytes: where one of these changes, nothing comes from the cache any more.
PIPELINE = (
    "infer", "messages", "engine.budgets", "engine.community", "engine.devices", "engine.enlarging",
    "engine.imagekinds", "engine.models", "engine.nnpack", "engine.pages", "engine.rolling", "engine.screens",
    "engine.spreads", "engine.strips", "engine.upscaling", "engine.windows", "engine.winograd",
)  # fmt: skip
SUFFIXES = {  # of page files, by what sniff() calls their content
    "jpeg": (".jpg", ".jpeg"), "tiff": (".tif", ".tiff"), "png": (".png",), "webp": (".webp",),
    "bmp": (".bmp",), "gif": (".gif",), "avif": (".avif",), "jxl": (".jxl",),
}  # fmt: skip
PAGE_SUFFIXES = frozenset(suffix for each in SUFFIXES.values() for suffix in each)
JUNK_FOLDERS = frozenset({"__MACOSX", "@eaDir"})  # macOS's in archives, Synology's for thumbnails
ARCHIVE_SUFFIXES = frozenset({".zip", ".cbz", ".epub", ".rar", ".cbr", ".7z", ".cb7", ".pdf"})
PID_DIGITS = 7  # of a process at most
REPORT_NAME = "artifact-report.json"
EPUB_REPORT_NAME = f"META-INF/{REPORT_NAME}"
REPORT_BYTES = 256 << 20  # of 20,000 pages it has 12 MB
CHUNK_BYTES = 1 << 20
# Unmistakably ours, so that start-up may remove it wherever it lies.
TEMPORARY = re.compile(r"\.reichan-[0-9a-f]{32}\.tmp")
# What begins the names of folders among a job's pages, for what is unpacked on the way, and a book's parts.
UNPACKED, PARTS = ".unpacked-", ".parts-"
# Names that Windows gives to devices, in any folder and with any extension.
WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", "conin$", "conout$"}
    | {f"{port}{n}" for port in ("com", "lpt") for n in "0123456789\u00b9\u00b2\u00b3"}
)
# What an artifact may hold at its root beside pages, case-folded (books.py).
RESERVED = re.compile(re.escape(REPORT_NAME) + r"|mimetype|meta-inf|package\.opf|nav\.xhtml|page-\d+\.xhtml")
COMPONENT_BYTES = 200  # of the 255 that file systems allow: room for suffixes and " (2)"
OUR_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # not the page's fault
HELD = frozenset({errno.EACCES, errno.EAGAIN, errno.EDEADLK})  # from lock_file: another process has it


# ---------------------------------------------------------------- errors
WINDOWS_PATH = 248  # characters of a folder's path that Windows takes by itself; of a file's 260
LONG_PATHS = (
    "let Windows take long paths (LongPathsEnabled of "
    r"HKLM\SYSTEM\CurrentControlSet\Control\FileSystem to 1), or choose a shorter REICHAN_STORAGE_ROOT"
)


class StorageError(Exception):
    """Base of this file's errors; `code` is stable and goes to clients as it is."""

    code = "STORAGE"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class OutsideIncoming(StorageError):
    """The path names something that is not inside incoming/."""

    code = "OUTSIDE_INCOMING"


class InputMissing(StorageError):
    """The input, or one page of it, is no longer (or never was) there."""

    code = "INPUT_MISSING"


class InputUnusable(StorageError):
    """The input as a whole can't be a volume: damaged, encrypted or not an archive."""

    code = "INPUT_UNUSABLE"


class InputUnread(InputUnusable):
    """What was to read the input ended without a reason: killed, perhaps. Later it may go well."""


class UnsafeName(InputUnusable):
    """An entry's name or kind would reach outside its folder."""

    code = "UNSAFE_NAME"


class NoPages(InputUnusable):
    """Nothing in the input is a page."""

    code = "NO_PAGES"


class LimitExceeded(InputUnusable):
    """The input is larger than a limit; code and detail name which one, a field of Limits."""

    def __init__(self, limit: str, value: int, allowed: int, what: str) -> None:
        self.fact = f"{what}: {value}, the limit is {allowed}"
        super().__init__(f"{self.fact} ({setting_name(limit)})")
        self.code = f"LIMIT_{limit.upper()}"


class NoRoom(StorageError):
    """The disk can't hold what a job is expected to write."""

    code = "NO_ROOM"

    def __init__(self, needed: int, free: int, reserve: int) -> None:
        super().__init__(
            f"the job needs about {needed} bytes (working copy, pages, artifact); {free} are free, of which "
            f"{reserve} stay free (REICHAN_RESERVE_BYTES); make room and try again"
        )


class DiskRefused(StorageError):
    """The disk won't take what a job writes: no page's fault."""

    code = "DISK"

    def __init__(self, error: OSError) -> None:
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to it"
        if os.name == "nt" and len(str(error.filename or "")) >= WINDOWS_PATH:
            remedy = f"a path has more than {WINDOWS_PATH} characters: {LONG_PATHS}"
        super().__init__(f"the disk refused: {reason_of(error)}; {remedy} and resume the job")


class NameTaken(StorageError):
    """A folder lies where a file should go, or a file where a folder should."""

    code = "NAME_TAKEN"


class FilesInUse(StorageError):
    """Files that were to be removed are still there."""

    code = "FILES_IN_USE"


class OutputDamaged(StorageError):
    """A file in a job's folder of outputs is not the one recorded. page: its number; None: it is no page."""

    code = "OUTPUT_DAMAGED"

    def __init__(self, name: str, page: int | None) -> None:
        super().__init__(f"{name} on disk is not what was written there")
        self.page = page


class ArtifactDamaged(StorageError):
    """An artifact is not what its own report says."""

    code = "ARTIFACT_DAMAGED"


class WeightsRefused(StorageError):
    """A weights file is not the one it claims to be, or nobody vouched for it."""

    code = "MODEL_BAD"


class AlreadyRunning(StorageError):
    """Another service holds this storage root."""

    code = "ALREADY_RUNNING"


class LockRefused(StorageError):
    """The storage root's file system has no locks, as some network shares."""

    code = "NO_LOCKS"


def reason_of(problem: Exception) -> str:
    """What went wrong, without the path that str() of an OSError holds."""
    return problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)


def printable(text: str) -> str:
    """One line for a terminal, whatever a name from an archive holds: none of it may steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# ---------------------------------------------------------------- layout
@dataclass(frozen=True, slots=True)
class Layout:
    """The folders under the storage root."""

    root: Path
    models: Path

    incoming: Path = field(init=False)
    staging: Path = field(init=False)
    outputs: Path = field(init=False)
    artifacts: Path = field(init=False)
    previews: Path = field(init=False)
    cache: Path = field(init=False)
    database: Path = field(init=False)

    def __post_init__(self) -> None:
        for name in ("incoming", "staging", "outputs", "artifacts", "previews", "cache"):
            object.__setattr__(self, name, self.root / name)
        object.__setattr__(self, "database", self.root / "jobs.sqlite3")

    def create(self) -> None:
        """Make the folders that are missing. Raises OSError where that is forbidden."""
        for folder in (self.incoming, self.staging, self.outputs, self.artifacts, self.models):
            folder.mkdir(parents=True, exist_ok=True)

    def output_dir(self, title: str, volume: str, job_id: str) -> Path:
        """Folder of a job's pages; refuses to be led elsewhere by a link. Raises NameTaken."""
        folder = self.outputs
        for part in (slug(title), slug(volume), job_id):
            folder = folder / part
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise NameTaken(f"{self.relative(folder)} is a link or a file; remove it")
        return folder

    def artifact(self, title: str, volume: str, job_id: str, container: str = "zip") -> Path:
        """The artifact's path. container: see messages.Params."""
        return self.artifacts / f"{slug(title)}-{slug(volume)}-{job_id}.{container}"

    def relative(self, path: Path) -> str:
        """`path` from the storage root, with forward slashes, for people and clients."""
        return path.relative_to(self.root).as_posix()


def code_hash(modules: Iterable[str]) -> str:
    """Of the program's own source of these modules ("storage", "files.inputs")."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(PROGRAM.joinpath(*module.split(".")).with_suffix(".py").read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- names
def natural_key(name: str) -> tuple[tuple[str, ...], str]:
    """Sort key: folders one by one, numbers by value, letters case-blind (1, 2, 10)."""
    return tuple(map(_natural_part, name.split("/"))), name


def _natural_part(part: str) -> str:
    return re.sub(r"\d+", _natural_number, unicodedata.normalize("NFKC", part).casefold())


def _natural_number(found: re.Match[str]) -> str:
    """Before all text, and by length, then digits: int() refuses very long ones."""
    digits = found[0].lstrip("0")
    return f"\0{chr(min(len(digits), sys.maxunicode))}{digits}"


def cut_bytes(text: str, limit: int) -> str:
    """`text` shortened to at most `limit` UTF-8 bytes, never inside a character."""
    return text.encode("utf-8")[:limit].decode("utf-8", "ignore")


def slug(text: str) -> str:
    """One safe folder level for a title or volume: letters of any script stay."""
    kept = "".join(
        # M: the vowel signs without which Hindi or Thai can't be read
        c if c.isalnum() or c in "-_." or unicodedata.category(c).startswith("M") else "-"
        for c in unicodedata.normalize("NFC", text)
    )
    kept = cut_bytes(re.sub(r"-{2,}", "-", kept), 80).strip("-. ")
    return safe_component(kept or "untitled")


def sent_ending(sha256: str) -> str:
    """How the name of an archive ends that `server.py submit` sends; sha256: the archive's own, in hex."""
    return f"-{sha256[:16]}.zip"


def safe_component(name: str) -> str:
    """`name` as one path component that every file system here can hold."""
    name = unicodedata.normalize("NFC", name)
    # Cc, Cf, Cs, Co, Cn: controls, bidi marks, surrogates, unassigned: nothing people type.
    name = "".join("_" if c in '<>:"/\\|?*' or unicodedata.category(c).startswith("C") else c for c in name)
    stem, dot, suffix = name.rpartition(".")
    if dot and len(suffix) <= 5:
        name = cut_bytes(stem, COMPONENT_BYTES - len((dot + suffix).encode())) + dot + suffix
    else:
        name = cut_bytes(name, COMPONENT_BYTES)
    name = name.rstrip(". ")
    if name.split(".")[0].strip().casefold() in WINDOWS_DEVICES:
        name = "_" + name
    return name or "_"


def member_parts(name: str, limits: Limits) -> list[str]:
    """The components of an archive entry's name, none of which leads elsewhere.

    Raises UnsafeName for absolute, drive, parent and NUL names in any spelling,
    LimitExceeded for too long or too deep ones.
    """
    shown = ascii(name[:80])
    if "\0" in name:
        raise UnsafeName(f"an entry's name holds a NUL character: {shown}")
    name = name.replace("\\", "/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise UnsafeName(f"an entry's name is absolute: {shown}")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise UnsafeName(f"an entry's name leads outside the archive: {shown}")
    size_bytes = len(name.encode("utf-8", "surrogatepass"))
    if size_bytes > limits.path_bytes:
        raise LimitExceeded("path_bytes", size_bytes, limits.path_bytes, "bytes in an entry's name")
    if len(parts) > limits.depth:
        raise LimitExceeded("depth", len(parts), limits.depth, "nested folders")
    return parts


def is_page_name(parts: Sequence[str]) -> bool:
    """Whether a file of this name is a page; what file managers leave behind is not."""
    return not is_junk(parts) and os.path.splitext(parts[-1])[1].lower() in PAGE_SUFFIXES


def is_junk(parts: Sequence[str]) -> bool:
    """Whether a file is hidden, or what a file manager left behind: neither page nor left out."""
    return any(part.startswith(".") or part in JUNK_FOLDERS for part in parts)


# "Title v03", "Title - Vol. 10.5", "作品名 第03巻". Each run of separators is looked at once, from its
# beginning: a name may be long, and someone else's.
NUMBERED = re.compile(
    r"(?P<title>.*?)(?<![\s_.,\-])[\s_.,\-]*+(?:(?<![a-z])(?:v|vol|volume)\.?|第)?[\s_\-]*+"
    r"(?<!\d)(?P<number>\d{1,4}(?:\.\d)?)\s*+[巻卷集]?",
    re.IGNORECASE,
)


# What tools call a file that they are still receiving: Copyparty (x.zip.PARTIAL, and with a time and
# an address behind it where that is taken), browsers, WinSCP, aria2, torrents; our own .tmp.
UNFINISHED = re.compile(
    r".+\.(?:partial(?:-\d+\.\d{6}-.+)?|part|filepart|crdownload|download|tmp|temp|aria2|!ut|!qb)",
    re.IGNORECASE,
)


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is still being received."""
    return UNFINISHED.fullmatch(name) is not None


def unfinished_of(names: Iterable[str]) -> list[tuple[str, str]]:
    """(without leading dots, name) of each file that is still being received, sorted, for awaits()."""
    return sorted((name.lstrip("."), name) for name in names if is_unfinished(name))


def awaits(name: str, unfinished: Sequence[tuple[str, str]]) -> str | None:
    """The unfinished file that is to become the file of this name."""
    at = bisect.bisect_left(unfinished, (name + ".",))
    found = unfinished[at : at + 1]
    return found[0][1] if found and found[0][0].startswith(name + ".") else None


# The name of a working copy of which only a part is a page (spreads.py).
MARK = re.compile(r".+\.(?P<mark>left|right|clockwise|anticlockwise)\.\w+")
HALVES = {"left": "the left half of a double page", "right": "the right half of a double page"}


def half_number(name: str, deviation: str | None) -> int | None:
    """1 or 2 where a page of a report is a half of a double page, by its name in the input and what the
    report says of it; None for all others."""
    if not any(half in (deviation or "") for half in HALVES.values()):
        return None
    return 1 if os.path.splitext(name)[0].endswith("-1") else 2


def mark_of(staged: str) -> str | None:
    """What is to be taken of a working copy, by its name; None: all of it."""
    match = MARK.fullmatch(staged)
    return match["mark"] if match else None


def part_of(staged: str) -> str | None:
    """What a page is of its scan, in words; None: all of it, upright."""
    mark = mark_of(staged)
    return HALVES.get(mark, f"turned {mark}") if mark else None


def whole_name(name: str, staged: str) -> str:
    """The name in the input of a page, or of the double page that it is a half of."""
    if mark_of(staged) not in HALVES:
        return name
    stem, suffix = os.path.splitext(name)
    return stem[:-2] + suffix


def output_stems(names: Sequence[str]) -> list[str]:
    """Distinct output paths without suffix for source names, in their order.

    The first of several names with one stem keeps it; the next are called after their
    whole name (001.jpg, 001.png.jpg), then numbered. Case and Unicode form count as
    equal, since some file systems think so. Deterministic.
    """
    safe = [[safe_component(part) for part in name.split("/")] for name in names]
    for parts in safe:
        if len(parts) > 1 and RESERVED.fullmatch(fold(parts[0])):
            parts[0] = "_" + parts[0]  # the report itself must go there, or what makes an EPUB one
    folders = {fold("/".join(parts[:i])) for parts in safe for i in range(1, len(parts))}
    taken: set[str] = set()
    # Counted on, so that thousands of pages of one name don't take millions of looks.
    numbers: dict[str, Iterator[int]] = {}

    def is_free(stem: str) -> bool:
        key = fold(stem)
        return key not in taken and not any(key + suffix in folders for suffix in PAGE_SUFFIXES)

    stems = []
    for parts in safe:
        whole = "/".join(parts)
        bare = os.path.splitext(whole)[0]
        more = numbers.setdefault(fold(bare), itertools.count(2))
        candidates = itertools.chain((bare, whole), (f"{bare} ({n})" for n in more))
        stems.append(next(filter(is_free, candidates)))
        taken.add(fold(stems[-1]))
    return stems


def fold(path: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", path.casefold())


def decode_names(raw: Sequence[bytes]) -> list[str]:
    """Names of unknown encoding as text: UTF-8, else Shift-JIS or GBK, else code page 437.

    Old archivers write the author's code page without saying which. The choice is made
    over all names at once, since one name alone is often valid in both.
    """
    foreign = [name for name in raw if not _decodes(name, "utf-8")]
    order = sorted(("cp932", "gbk"), key=lambda enc: -sum(_plausible(n, enc) for n in foreign))
    return [
        next(name.decode(enc) for enc in ("utf-8", *order, "cp437") if _decodes(name, enc)) for name in raw
    ]


def _decodes(name: bytes, encoding: str) -> bool:
    try:
        name.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _plausible(name: bytes, encoding: str) -> float:
    """How much a decoding looks like a title: common CJK for it, odd marks against it."""
    if not _decodes(name, encoding):
        return -4.0
    score = 0.0
    for c in name.decode(encoding):
        if "\u3040" <= c <= "\u30ff":  # kana: never by accident
            score += 2
        elif "\u4e00" <= c <= "\u9fff":
            # The first half of the block's common rows is what people write; the
            # standards' second levels hold the rare ones, which wrong guesses hit.
            score += 1 if c.encode("gb2312", "ignore")[:1] < b"\xd8" else -0.5
        elif "\uff61" <= c <= "\uff9f" or "\ue000" <= c <= "\uf8ff":  # half-width kana, private use
            score -= 1
    return score


# ---------------------------------------------------------------- whole files
# First bytes of what people put into archives (and of what gets called .jpg by mistake).
MAGICS = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"BM", "bmp"),
    (b"GIF8", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"\xff\x0a", "jxl"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "jxl"),
    (b"PK\x03\x04", "zip"),
    (b"Rar!", "rar"),
    (b"7z\xbc\xaf", "7z"),
    (b"%PDF", "pdf"),
    (b"%!PS", "PostScript"),
    (b"8BPS", "Photoshop"),
    (b"<", "markup (HTML, SVG)"),
)


def sniff(data: bytes) -> str:
    """What the first bytes say a file is: "png", "jpeg", "webp"...; "" where they say nothing."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    if data[4:8] == b"ftyp":
        return f"an ISO media file ({data[8:12].decode('latin-1')})"
    return next((kind for magic, kind in MAGICS if data.startswith(magic)), "")


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, but no link (one put there after the submit must not lead
    elsewhere) and no pipe (opening one must not wait for a writer). Raises OSError."""
    flags = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    file = os.fdopen(os.open(path, os.O_RDONLY | flags), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as source:
        return sha256_of(source)


def file_is(path: Path, sha256: str | None) -> bool:
    """Whether `path` is a file with this hash."""
    try:
        return sha256_file(path) == sha256
    except OSError:
        return False


def sha256_of(file: IO[bytes]) -> str:
    """Hex SHA-256 of what is left of an open file, read in pieces."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(target: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a file that becomes `target` if the block ends well, and vanishes if not.

    temporary: where it is kept until then, on target's file system (see new_temporary,
    own_temporary); what a crash left of it is written over, and target's folder is made only for
    a whole file. Synced before the rename and after it: a crash leaves the old file or the new one.
    """
    temporary = temporary or new_temporary(target.parent)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    remove_file(temporary)
    _being_written.add(temporary)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        patiently(os.replace, temporary, target)
        sync_dir(target.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            patiently(os.unlink, temporary)
        _being_written.discard(temporary)


_being_written: set[Path] = set()  # temporaries of this process, which no sweep may take for a dead one's


def new_temporary(folder: Path) -> Path:
    """A name in `folder` that is nobody's."""
    return folder / f".reichan-{secrets.token_hex(16)}.tmp"


def own_temporary(target: Path) -> Path:
    """The one temporary of a file that has one writer at a time, so that it is found after a crash."""
    name = hashlib.sha256(target.name.encode("utf-8", "surrogateescape")).hexdigest()
    return target.parent / f".reichan-{name[:32]}.tmp"


def write_whole(target: Path, data: bytes) -> str:
    """Write a file atomically; returns its hex SHA-256."""
    with replacing(target) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def sync_dir(folder: Path) -> None:
    """Make renames in `folder` durable. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def patiently(operation: Any, *paths: Path) -> None:
    """Run a rename or delete; on Windows, virus scanners and readers hold files briefly."""
    for wait_s in (0.05, 0.1, 0.2, 0.4, 0.8):
        try:
            operation(*paths)
            return
        except PermissionError:
            if os.name != "nt":
                raise
            time.sleep(wait_s)
    operation(*paths)


# ---------------------------------------------------------------- upkeep
def remove_tree(folder: Path) -> None:
    """Remove a job's own folder, and parents of it that became empty below outputs/."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
    for parent in list(folder.parents)[:2]:
        if parent.name in ("outputs", "staging", "previews"):
            break
        with contextlib.suppress(OSError):
            parent.rmdir()


def remove_file(path: Path) -> None:
    """Remove a file if it is there. Raises PermissionError on Windows while it is read."""
    with contextlib.suppress(FileNotFoundError):
        patiently(os.unlink, path)


def sweep_temporaries(folder: Path) -> int:
    """Remove unfinished files of a killed process below `folder`; returns how many."""
    removed = 0
    for where, _, files in os.walk(folder):
        for path in (Path(where, name) for name in files if TEMPORARY.fullmatch(name)):
            if path not in _being_written:
                remove_file(path)
                removed += 1
    return removed


def sweep_folders(outputs: Path) -> None:
    """Remove folders of a killed process among a job's pages."""
    for folder in (*outputs.glob(f"{UNPACKED}*"), *outputs.glob(f"{PARTS}*")):
        shutil.rmtree(folder, ignore_errors=True)


def scratch_prefix(kind: str) -> str:
    """Begins the names of our folders in the system's own for temporary files; says whose they are."""
    return f"reichan-{kind}-{os.getpid()}-"


def sweep_scratch() -> None:
    """Remove those of processes that were killed; none on Windows, where none can be asked for."""
    for left in Path(tempfile.gettempdir()).glob("reichan-*-*-*"):
        pid = left.name.split("-")[2]
        if pid.isdecimal() and len(pid) <= PID_DIGITS and not _is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 is no question, but Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def free_bytes(layout: Layout) -> int:
    """Free space under the storage root."""
    return shutil.disk_usage(layout.root).free


def keep_token(layout: Layout) -> str:
    """The token kept under the storage root; made on first use, readable to its owner only."""
    path = layout.root / "token"
    with contextlib.suppress(FileNotFoundError):
        if kept := path.read_text(encoding="ascii").strip():
            return kept
    token = secrets.token_urlsafe(32)
    with replacing(path) as file:
        os.chmod(file.name, 0o600)  # before anything stands in it
        file.write(token.encode() + b"\n")
    return token


@contextlib.contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """Hold the storage root for one service; the lock ends with the process, however it dies.

    Raises AlreadyRunning, and LockRefused where the file system has no locks.
    """
    file = open(layout.root / "lock", "a+b")
    try:
        try:
            lock_file(file)
        except OSError as error:
            if error.errno in HELD:
                raise AlreadyRunning(f"another service already uses {layout.root}") from None
            raise LockRefused(
                f"files can't be locked in {layout.root} ({reason_of(error)}), so nothing would keep "
                "a second service out; choose another REICHAN_STORAGE_ROOT, on a disk of this machine"
            ) from error
        yield
    finally:
        file.close()


if sys.platform == "win32":
    import msvcrt

    def lock_file(file: BinaryIO) -> None:
        """Lock it until it is closed, by whatever ends this process. Raises OSError, see HELD."""
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def lock_file(file: BinaryIO) -> None:
        """Lock it until it is closed, by whatever ends this process. Raises OSError, see HELD."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


if __name__ == "__main__":
    from commands import verify

    sys.exit(verify.main())
