"""Reads one RAR or 7z archive, or PDF, for formats.py: a process of its own, that may die of it.

Map: events - RAR - 7z - PDF - main
Rule: it tells facts and writes the members it was asked for; what they mean is decided in formats.py.
Runs in: a child process, without rights (sandbox.py), memory and file sizes bounded where the system can.

    stdin: one JSON line, the request; its end ends this process     stdout: one JSON line an event
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import math
import os
import re
import stat
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from files import sandbox

CHUNK_BYTES = 1 << 20
MEMORY_BYTES = 4 << 30  # of addresses: the largest window of 7-Zip's own settings is 1.5 GiB
POINTS_PER_INCH = 72
LEAST_DPI, MOST_DPI, DPI = 72.0, 300.0, 150.0  # of a page that is drawn; DPI where no image says more
NEARLY = 0.02  # of a page's side: what scanners' and printers' roundings leave
LIKE_LEVELS = 3.0  # mean difference of two decoders of one JPEG, in 8-bit levels
RECTANGLE_POINTS = 5
PDF_END_BYTES = 4096
RAR_3 = 29  # as its archives say which version they need
OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Wanted = dict[int, str]  # a member's index -> the file that it shall become


# ---------------------------------------------------------------- events
class Refused(Exception):
    """The archive as a whole can't be read; code: see formats.Container._refusal."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


def tell(event: str, **facts: Any) -> None:
    """Send one event."""
    print(json.dumps({"event": event} | facts), file=EVENTS, flush=True)


EVENTS: Any = None  # set by main: stdout, before a library may print there


def attempt(index: int, work: Callable[[], None]) -> None:
    """Do the work for one member; whatever it raises is that member's failure."""
    tell("begin", index=index)
    error = None
    try:
        work()
    except OSError as problem:
        if problem.errno in OUR_DISK:
            raise
        error = problem.strerror or str(problem)
    # What libraries raise for damaged data is beyond listing; nothing but this member depends on it.
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}".rstrip(": ")
    tell("end", index=index, error=error)


def copy(source: Any, target: str, size_bytes: int) -> None:
    """Write a member's bytes, no more than it said it holds. Raises ValueError for other than that."""
    left = size_bytes
    with open(target, "wb") as file:
        while left and (chunk := source.read(min(left, CHUNK_BYTES))):
            file.write(chunk)
            left -= len(chunk)
    if left:
        raise ValueError(f"it ends {left} bytes early")


def library(name: str, what: str) -> Any:
    """A module of the extra. Raises Refused."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused("EXTRA_MISSING", f"{what} ({error})") from error


# ---------------------------------------------------------------- RAR
def open_rar(path: str) -> Any:
    """A rarfile.RarFile of this file alone. Raises Refused."""
    rarfile = library("rarfile", "a RAR archive")
    blocks: set[int] = set()
    if os.name == "nt":
        rarfile.BSDTAR_TOOL = "tar"  # Windows' own
    try:
        archive = rarfile.RarFile(path, part_only=True, info_callback=lambda block: blocks.add(block.type))
        encrypted = archive.needs_password()
    except rarfile.RarCannotExec as error:  # a RAR 3 comment is compressed too
        raise Refused("TOOL_MISSING", "compressed") from error
    except (rarfile.Error, OSError, ValueError, IndexError, OverflowError) as error:
        raise Refused("UNUSABLE", f"not a readable RAR archive ({error}); was it cut on the way?") from error
    if encrypted:
        raise Refused("ENCRYPTED", "encrypted")
    split = rarfile.RAR_FILE_SPLIT_BEFORE | rarfile.RAR_FILE_SPLIT_AFTER
    if any(info.flags & split for info in archive.infolist()):
        raise Refused("UNUSABLE", "one part of several; pack it as one archive")
    # Else the pages behind a cut would be missing, and nothing would say so. RAR 2 wrote no such block.
    old = all(
        isinstance(info, rarfile.Rar3Info) and info.extract_version < RAR_3 for info in archive.infolist()
    )
    if rarfile.RAR_BLOCK_ENDARC not in blocks and not (old and archive.infolist()):
        raise Refused("UNUSABLE", "a RAR archive without its end; was it cut on the way?")
    return archive


def list_rar(path: str, _wanted: Wanted) -> None:
    """Tell every member of a RAR archive."""
    rarfile = library("rarfile", "a RAR archive")
    archive = open_rar(path)
    infos = archive.infolist()
    packed = [info for info in infos if info.compress_type != rarfile.RAR_M0 and not info.is_dir()]
    if packed and not any(_tools(rarfile)):
        raise Refused("TOOL_MISSING", "compressed")
    for index, info in enumerate(infos):
        raw = None
        if isinstance(info, rarfile.Rar3Info) and not info.flags & rarfile.RAR_FILE_UNICODE:
            raw = info.orig_filename.hex()  # in a code page that nothing names
        special = info.is_symlink() or not (info.is_dir() or info.is_file() or info.file_redir)
        kind = {"folder": info.is_dir(), "special": special}
        tell("member", index=index, name=info.filename, raw=raw, size=info.file_size or 0, **kind)


def _tools(rarfile: Any) -> Iterator[Any]:
    """What unpacks RAR here, each set as rarfile's tool while it is asked for. Debian's 7z has no RAR
    in it; unar and bsdtar each fail on archives that the other reads."""

    class Tool(rarfile.ToolSetup):  # type: ignore[misc]
        """Who made the archive chose its names, and bsdtar has options that run a program."""

        def add_file_arg(self, cmdline: list[str], filename: str) -> None:
            if filename.startswith(("-", "@")):  # "@": to unrar, a file with a list of names
                raise ValueError("its name begins as an option of the unpacking program does; rename it")
            cmdline.append(filename)

    class Bsdtar(Tool):
        """rarfile 4.5 puts "--" behind "-f", which takes it for the archive's name."""

        def get_cmdline(self, key: str, pwd: None, nodash: bool = True) -> Any:
            return super().get_cmdline(key, pwd, nodash=True)

        def add_file_arg(self, cmdline: list[str], filename: str) -> None:
            cmdline.append("--")
            super().add_file_arg(cmdline, re.sub(r"([*?\[\]\\])", r"\\\1", filename))  # it takes patterns

    tools = (
        Tool(rarfile.UNRAR_CONFIG),
        Tool(rarfile.UNAR_CONFIG),
        Bsdtar(rarfile.BSDTAR_CONFIG),
    )
    for tool in tools:
        if tool.check():
            rarfile.CURRENT_SETUP = tool
            yield tool


def extract_rar(path: str, wanted: Wanted) -> None:
    """Write RAR members: each by itself, but a solid archive in one pass."""
    rarfile = library("rarfile", "a RAR archive")
    archive = open_rar(path)
    infos = dict(enumerate(archive.infolist()))
    # rarfile packs a single member into an archive of its own for the tools.
    rarfile.HACK_TMP_DIR = os.path.dirname(next(iter(wanted.values())))
    rest = dict(wanted)
    if archive.is_solid() and len(wanted) > 1 and not any(info.file_redir for info in infos.values()):
        for tool in _tools(rarfile):
            if not rest:
                break
            for index in _extract_solid(tool.open_cmdline(None, path, None), infos, rest):
                del rest[index]
                tell("begin", index=index)
                tell("end", index=index, error=None)
    for index, target in rest.items():

        def work(info: Any = infos[index], target: str = target) -> None:
            _extract_one(rarfile, archive, info, target)

        attempt(index, work)


def _extract_one(rarfile: Any, archive: Any, info: Any, target: str) -> None:
    """Write one member by the first tool that can; a member that is only stored needs none."""
    tools = iter(_tools(rarfile))
    next(tools, None)
    while True:
        try:
            with archive.open(info) as source:
                copy(source, target, info.file_size)
                source.read(1)  # at its end it compares the checksum
        except (rarfile.Error, ValueError):
            if not next(tools, None):
                raise
        else:
            return


def _extract_solid(command: list[str], infos: dict[int, Any], wanted: Wanted) -> Iterator[int]:
    """Yields the members that came out whole, by their checksums, of all that a tool prints in a row.

    One by one, each would cost the unpacking of all that stand before it.
    """
    wanted, last = dict(wanted), max(wanted)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as tool:
        assert tool.stdout is not None
        for index, info in infos.items():
            if info.is_dir():
                continue
            left, crc = info.file_size, 0
            with open(wanted.get(index, os.devnull), "wb") as file:
                while left and (chunk := tool.stdout.read(min(left, CHUNK_BYTES))):
                    left -= len(chunk)
                    crc = zlib.crc32(chunk, crc)
                    file.write(chunk)
            if left:
                break
            # Archives may have BLAKE2 in place of it; then each member is read by itself.
            if index in wanted and info.CRC == crc:
                yield index
            if index == last:
                break
        tool.kill()


# ---------------------------------------------------------------- 7z
def open_7z(file: BinaryIO) -> Any:
    """A py7zr.SevenZipFile. Raises Refused."""
    py7zr = library("py7zr", "a 7z archive")
    try:
        archive = py7zr.SevenZipFile(file)
        encrypted = archive.needs_password()
    except py7zr.PasswordRequired as error:
        raise Refused("ENCRYPTED", "encrypted") from error
    # It parses what may be anything, and raises what that made of it.
    except Exception as error:
        raise Refused("UNUSABLE", f"not a readable 7z archive ({error}); was it cut on the way?") from error
    if encrypted:
        raise Refused("ENCRYPTED", "encrypted")
    return archive


def list_7z(path: str, _wanted: Wanted) -> None:
    """Tell every member of a 7z archive."""
    with open(path, "rb") as file:
        for index, info in enumerate(open_7z(file).files):
            special = info.is_symlink or info.is_junction or info.is_socket or not info.is_file
            kind = {"folder": info.is_directory, "special": special and not info.is_directory}
            tell("member", index=index, name=info.filename, raw=None, size=info.uncompressed, **kind)


def extract_7z(path: str, wanted: Wanted) -> None:
    """Write 7z members in the archive's order, each of its solid blocks once.

    Through py7zr's Worker, since its extract() gives a block up at the first wrong checksum, and
    with it all pages that stand behind a bad one.
    """
    with open(path, "rb") as file:
        archive = open_7z(file)
        blocks: dict[int, list[tuple[int, Any]]] = {}
        for index, info in enumerate(archive.files):
            if info.folder is not None:
                blocks.setdefault(id(info.folder), []).append((index, info))
            elif index in wanted:
                attempt(index, open(wanted[index], "wb").close)
        if archive.header.main_streams is None:
            return
        positions = [archive.afterheader + at for at in archive.header.main_streams.packinfo.packpositions]
        for n, folder in enumerate(archive.header.main_streams.unpackinfo.folders):
            members = blocks.get(id(folder), [])
            last = max((at for at, (index, _) in enumerate(members) if index in wanted), default=-1)
            file.seek(positions[n])
            _extract_block(archive, members[: last + 1], wanted, positions[n + 1])


class Writer:
    """A member on its way to its file, or, for one that is only passed by, to nowhere."""

    def __init__(self, target: str | None) -> None:
        self.file = open(target, "wb") if target else None

    def write(self, data: bytes) -> int:
        """Take the next bytes."""
        return self.file.write(data) if self.file else len(data)


def _extract_block(archive: Any, members: list[tuple[int, Any]], wanted: Wanted, end: int) -> None:
    broken: str | None = None  # why nothing can be had any more from here on
    for index, info in members:

        def work(index: int = index, info: Any = info) -> None:
            nonlocal broken
            if broken:
                raise ValueError(f"the archive is damaged before it ({broken})")
            writer = Writer(wanted.get(index))
            try:
                crc = archive.worker.decompress(
                    archive.fp, info.folder, writer, info.uncompressed, info.compressed, end
                )
            except Exception as error:
                if isinstance(error, OSError) and error.errno in OUR_DISK:
                    raise
                broken = f"{type(error).__name__}: {error}"
                raise
            finally:
                if writer.file:
                    writer.file.close()
            if info.crc32 is not None and crc != info.crc32:
                raise ValueError("its checksum is wrong")

        if index in wanted:
            attempt(index, work)
        else:
            with contextlib.suppress(Exception):
                work()


# ---------------------------------------------------------------- PDF
def open_pdf(path: str) -> Any:
    """A pypdfium2.PdfDocument. Raises Refused."""
    pdfium = library("pypdfium2", "a PDF")
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - PDF_END_BYTES))
        # Else PDFium would repair a cut one, and the pages behind the cut would be missing.
        if b"%%EOF" not in file.read():
            raise Refused("UNUSABLE", "a PDF without its end; was it cut on the way?")
    try:
        return pdfium.PdfDocument(path)
    except pdfium.PdfiumError as error:
        if getattr(error, "err_code", None) == pdfium.raw.FPDF_ERR_PASSWORD:
            raise Refused("ENCRYPTED", "encrypted") from error
        raise Refused("UNUSABLE", f"not a readable PDF ({error}); was it cut on the way?") from error


def list_pdf(path: str, _wanted: Wanted) -> None:
    """Tell a PDF's pages; their sizes are estimates."""
    count = len(open_pdf(path))
    share = os.path.getsize(path) // max(1, count)
    for index in range(count):
        name = f"{index + 1:0{max(3, len(str(count)))}d}.png"
        tell("member", index=index, name=name, raw=None, size=share, folder=False, special=False)
        if index > LIMITS["entries"]:
            return  # more than will be taken


LIMITS: dict[str, int] = {}  # of the request


def extract_pdf(path: str, wanted: Wanted) -> None:
    """Write PDF pages as images."""
    document = open_pdf(path)
    for index, target in wanted.items():

        def work(index: int = index, target: str = target) -> None:
            data = page_image(document, index)
            with open(target, "wb") as file:
                file.write(data)

        attempt(index, work)


def page_image(document: Any, index: int) -> bytes:
    """A PDF's page as the bytes of one image: the one it consists of, as it is where that
    is a JPEG, its pixels as PNG otherwise; else the page, drawn."""
    page = document[index]
    try:
        objects = list(page.get_objects())
        images = [one for one in objects if one.type == RAW.FPDF_PAGEOBJ_IMAGE]
        for image in images:
            _check_pixels(*image.get_px_size())
        turn = _turn_of(page, images[0]) if _is_one_image(page, objects, images) else None
        if turn is None:
            return _drawn(page, images)
        return _taken(images[0], turn)
    finally:
        page.close()


RAW: Any = None  # pypdfium2.raw, set by main


def _check_pixels(width: int, height: int) -> None:
    if width * height > LIMITS["page_pixels"]:
        limit = LIMITS["page_pixels"]
        raise ValueError(f"{width}x{height} are {width * height} pixels, over the limit of {limit} a page")


def _is_one_image(page: Any, objects: list[Any], images: list[Any]) -> bool:
    """Whether all that is to be seen on a page is one opaque image; text laid over for searching isn't."""
    visible = [one for one in objects if one.type not in (RAW.FPDF_PAGEOBJ_FORM, RAW.FPDF_PAGEOBJ_TEXT)]
    texts = [one for one in objects if one.type == RAW.FPDF_PAGEOBJ_TEXT]
    if len(images) != 1 or len(visible) != 1 or RAW.FPDFPageObj_HasTransparency(images[0]):
        return False
    if any(RAW.FPDFTextObj_GetTextRenderMode(one) != RAW.FPDF_TEXTRENDERMODE_INVISIBLE for one in texts):
        return False
    for n in range(RAW.FPDFPage_GetAnnotCount(page)):
        note = RAW.FPDFPage_GetAnnot(page, n)
        kind = RAW.FPDFAnnot_GetSubtype(note)
        RAW.FPDFPage_CloseAnnot(note)
        if kind not in (RAW.FPDF_ANNOT_LINK, RAW.FPDF_ANNOT_POPUP):
            return False
    return not _is_clipped(images[0]) and _is_opaque(images[0])


def _is_clipped(image: Any) -> bool:
    """Whether a clip takes a part of an image away: anything but rectangles around it."""
    clip = RAW.FPDFPageObj_GetClipPath(image)
    left, bottom, right, top = image.get_bounds()
    slack = NEARLY * max(right - left, top - bottom)
    for path in range(max(0, RAW.FPDFClipPath_CountPaths(clip)) if clip else 0):
        points = []
        for n in range(RAW.FPDFClipPath_CountPathSegments(clip, path)):
            x, y = ctypes.c_float(), ctypes.c_float()
            RAW.FPDFPathSegment_GetPoint(RAW.FPDFClipPath_GetPathSegment(clip, path, n), x, y)
            points.append((x.value, y.value))
        inside = [left + slack < x < right - slack or bottom + slack < y < top - slack for x, y in points]
        if len(points) > RECTANGLE_POINTS or any(inside):
            return True
    return False


def _is_opaque(image: Any) -> bool:
    """Whether nothing shines through an image; masks are told by drawing it, small."""
    pixels = image.get_bitmap(render=True, scale_to_original=False).to_numpy()
    # Its edges are smoothed.
    return pixels.ndim < 3 or pixels.shape[2] < 4 or bool((pixels[2:-2, 2:-2, 3] == 255).all())


def _is_whole(page: Any, image: Any) -> bool:
    """Whether an image lies within its page: no part of it is cut away."""
    left, bottom, right, top = image.get_bounds()
    x0, y0, x1, y1 = page.get_cropbox()
    across, up = NEARLY * (x1 - x0), NEARLY * (y1 - y0)
    return bool(left >= x0 - across and right <= x1 + across and bottom >= y0 - up and top <= y1 + up)


def _turn_of(page: Any, image: Any) -> int | None:
    """Quarter turns, clockwise, that make an image stand as on its page; None where turns don't."""
    if not _is_whole(page, image):
        return None
    outer = image.container.get_matrix() if image.container else None
    matrix = image.get_matrix()
    a, b, c, d = matrix.a, matrix.b, matrix.c, matrix.d
    if outer is not None:
        return None  # in a form, whose own matrix counts too
    width, height = image.get_px_size()
    straight, lying = max(abs(a), abs(d)), max(abs(b), abs(c))
    if lying < 1e-3 * straight and a > 0 and d > 0:
        turn, aspect = 0, (a / width) / (d / height)
    elif straight < 1e-3 * lying and b < 0 and c > 0:  # (0, b, c, 0): a quarter clockwise
        turn, aspect = 1, (c / height) / (-b / width)
    elif lying < 1e-3 * straight and a < 0 and d < 0:
        turn, aspect = 2, (a / width) / (d / height)
    elif straight < 1e-3 * lying and b > 0 and c < 0:
        turn, aspect = 3, (-c / height) / (b / width)
    else:
        return None
    if not 1 - NEARLY < aspect < 1 + NEARLY:
        return None  # its pixels are no squares on the page
    return int(turn + page.get_rotation() // 90) % 4


def _taken(image: Any, turn: int) -> bytes:
    """An embedded image: its own bytes if they are a JPEG that shows the same, else its pixels."""
    import cv2
    import numpy as np

    from engine import pages

    bitmap = image.get_bitmap()
    pixels = bitmap.to_numpy().copy()  # (H, W) or (H, W, 1 | 3 | 4) uint8, BGR
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels = pixels[..., :3]  # opaque, see _is_one_image
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if not turn and list(image.get_filters()) == ["DCTDecode"]:
        data = bytes(image.get_data())
        with contextlib.suppress(pages.PageError):
            decoded, beside = pages.stored(data)
            # In a PDF it means nothing; the file would be turned by it.
            turned = pages.exif_orientation(beside.get(cv2.IMAGE_METADATA_EXIF, b"")) != 1
            # A colour space, an inversion or four inks stand beside it in the PDF.
            if not turned and decoded.shape == pixels.shape:
                if float(cv2.absdiff(decoded, pixels).mean()) < LIKE_LEVELS:
                    return data
    return _png(np.ascontiguousarray(np.rot90(pixels, -turn)))


def _drawn(page: Any, images: list[Any]) -> bytes:
    """A page drawn on white, with as many pixels as its sharpest image has, between the bounds."""
    width, height = page.get_size()
    dpi = DPI
    if images:
        dpi = min(MOST_DPI, max(LEAST_DPI, *map(_dpi_of, images)))
    scale = dpi / POINTS_PER_INCH
    _check_pixels(math.ceil(width * scale), math.ceil(height * scale))
    pixels = page.render(scale=scale).to_numpy()[..., :3]
    return _png(pixels)


def _dpi_of(image: Any) -> float:
    left, bottom, right, top = image.get_bounds()
    width, height = image.get_px_size()
    sizes = (max(width, height), max(right - left, top - bottom))
    return float(sizes[0] / max(sizes[1], 1.0) * POINTS_PER_INCH)


def _png(pixels: Any) -> bytes:
    import cv2
    import numpy as np

    done, data = cv2.imencode(".png", np.ascontiguousarray(pixels), [cv2.IMWRITE_PNG_COMPRESSION, 3])
    if not done:
        raise ValueError("it could not be written as PNG")
    return bytes(data.tobytes())


# ---------------------------------------------------------------- main
READERS = {
    "rar": {"list": list_rar, "extract": extract_rar},
    "7z": {"list": list_7z, "extract": extract_7z},
    "pdf": {"list": list_pdf, "extract": extract_pdf},
}


def settle(limits: dict[str, int]) -> None:
    """Bounds that hold for this process and the tools that it starts."""
    LIMITS.update(limits)
    sandbox.drop_rights()
    if os.name == "posix":
        import resource

        bounds = ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, limits["entry_bytes"]))
        for what, most in bounds:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(what, (most, resource.getrlimit(what)[1]))
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead


def check_same(path: str, identity: list[int]) -> None:
    """Raises Refused unless the path still is the file that formats.py saw, and no link to another."""
    found = os.stat(path, follow_symlinks=False)
    if identity != [found.st_dev, found.st_ino] or not stat.S_ISREG(found.st_mode):
        raise Refused("UNUSABLE", "not the file any more that it was")


def main() -> int:
    """Answer one request."""
    global EVENTS, RAW  # noqa: PLW0603 - one request a process
    EVENTS = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    parent = os.fdopen(sandbox.take_stdin(), encoding="utf-8")
    request = json.loads(parent.readline())
    # The parent's end of the pipe closes with it, however it ends.
    threading.Thread(target=lambda: (parent.read(), os._exit(3)), name="parent", daemon=True).start()
    settle(request["limits"])
    try:
        if request["kind"] == "pdf":
            RAW = library("pypdfium2", "a PDF").raw
        check_same(request["path"], request["identity"])
        wanted = {int(index): target for index, target in request["wanted"]}
        READERS[request["kind"]][request["action"]](request["path"], wanted)
        tell("done")
    except Refused as error:
        tell("refused", code=error.code, detail=str(error))
    except OSError as error:
        tell("disk", errno=error.errno, detail=error.strerror or str(error))
    EVENTS.flush()
    os._exit(0)  # without the finalizers of libraries, which were seen to fail on damaged documents


if __name__ == "__main__":
    sys.exit(main())
