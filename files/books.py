"""An artifact as an EPUB or a PDF: the pages as they are, in their order, in the reading direction.

Map: what each holds - EPUB - PDF
Rule: a page's file goes in byte for byte where the format can show it; no page is ever left out.
Runs in: the worker, the command line; http-* threads (refusal). Standard library only, but for what is
imported where a PDF is written: img2pdf and pikepdf of the extra `formats`.

    report + outputs --epub--> mimetype, META-INF/, package.opf, nav.xhtml, page-*.xhtml, images
                     --pdf---> a page an image, the report attached
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import html
import importlib.util
import logging
import os
import posixpath
import tempfile
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import storage
from files import artifacts
from messages import CONTAINER_FORMATS, Limits, Params

LIMITS = Limits(page_pixels=Limits().output_pixels)  # of what was written here
LIBRARIES = ("img2pdf", "pikepdf")
MEDIA_TYPES = {
    ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp",
    # Only of pages that had to stay as they were; few readers know the last ones.
    ".gif": "image/gif", ".bmp": "image/bmp", ".avif": "image/avif", ".jxl": "image/jxl",
    ".tif": "image/tiff", ".tiff": "image/tiff",
}  # fmt: skip
UNKNOWN_SIZE = (1000, 1500)  # of a page that nothing decodes, where no other page says more


class ExtraMissing(storage.StorageError):
    """The libraries that write this container are not installed."""

    code = "EXTRA_MISSING"


# ---------------------------------------------------------------- what each holds
def refusal(params: Params) -> str | None:
    """Why these params can't become what they ask for; None where they can."""
    allowed = CONTAINER_FORMATS.get(params.container)
    if allowed and params.output_format not in allowed:
        return f"{params.container} holds {', '.join(allowed)}; set outputFormat to one of them"
    return _missing() if params.container == "pdf" else None


def _missing() -> str | None:
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    return f'a PDF needs {", ".join(missing)}: pip install ".[formats]"' if missing else None


def pack(outputs: Path, artifact: Path, report: dict[str, Any]) -> tuple[str, int]:
    """artifacts.pack() for these two. Raises storage.OutputDamaged, ExtraMissing."""
    if report["params"]["container"] == "pdf":
        return _pack_pdf(outputs, artifact, report)
    made = documents(report, artifact.stem)
    facts = [
        {"filename": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in made.items()
    ]
    return artifacts.pack(outputs, artifact, report | {"book": facts}, made=made)


def _title(report: dict[str, Any], otherwise: str) -> str:
    named = (str(report.get(key) or "") for key in ("title", "volume"))
    return " ".join(filter(None, named)) or otherwise


def _is_rtl(report: dict[str, Any]) -> bool:
    return bool(report["params"].get("readingDirection", report["params"].get("reading_direction")) != "ltr")


def _sizes(items: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Width and height of each page; one that nothing decodes is taken for as large as another."""
    known = [(item["width"], item["height"]) for item in items if item["width"] and item["height"]]
    usual = known[0] if known else UNKNOWN_SIZE
    return [(item["width"] or usual[0], item["height"] or usual[1]) for item in items]


# ---------------------------------------------------------------- EPUB
MIMETYPE = "application/epub+zip"
CONTAINER = """<?xml version="1.0" encoding="utf-8"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="package.opf" media-type="application/oebps-package+xml"/></rootfiles>
</container>
"""
PACKAGE = """<?xml version="1.0" encoding="utf-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:identifier id="id">urn:uuid:{identifier}</dc:identifier>
<dc:title>{title}</dc:title>
<dc:language>und</dc:language>
<meta property="dcterms:modified">1980-01-01T00:00:00Z</meta>
<meta property="rendition:layout">pre-paginated</meta>
<meta property="rendition:spread">landscape</meta>
<meta name="cover" content="i1"/>
</metadata>
<manifest>
<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
{manifest}
</manifest>
<spine page-progression-direction="{direction}">
{spine}
</spine>
</package>
"""
NAVIGATION = """<?xml version="1.0" encoding="utf-8"?>
<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops">
<head><title>{title}</title></head>
<body><nav epub:type="toc"><ol>
{links}
</ol></nav></body>
</html>
"""
PAGE = """<?xml version="1.0" encoding="utf-8"?>
<html xmlns="http://www.w3.org/1999/xhtml">
<head><title>{n}</title><meta name="viewport" content="width={width}, height={height}"/>
<style>html, body {{ margin: 0; padding: 0 }} img {{ display: block }}</style></head>
<body><img src="{image}" alt="{n}" width="{width}" height="{height}"/></body>
</html>
"""


def documents(report: dict[str, Any], name: str) -> dict[str, bytes]:
    """What an EPUB holds beside images and report, in the archive's order (EPUB 3.3, fixed layout).

    name: what the book is called where the report has no title. The same report, the same bytes.
    """
    items = report["items"]
    title = _as_text(_title(report, name))
    made = {"mimetype": MIMETYPE, "META-INF/container.xml": CONTAINER}
    manifest, spine, links, shown = [], [], [], {}
    for n, (item, (width, height)) in enumerate(zip(items, _sizes(items), strict=True), 1):
        image = urllib.parse.quote(item["filename"])
        media = MEDIA_TYPES.get(posixpath.splitext(item["filename"])[1].lower(), "application/octet-stream")
        cover = ' properties="cover-image"' if n == 1 else ""
        document = f"page-{n:05d}.xhtml"
        manifest.append(f'<item id="i{n}" href="{image}" media-type="{media}"{cover}/>')
        manifest.append(f'<item id="p{n}" href="{document}" media-type="application/xhtml+xml"/>')
        # A cover stands alone, and so does what is two pages already.
        alone = ' properties="rendition:page-spread-center"' if n == 1 or width > height else ""
        spine.append(f'<itemref idref="p{n}"{alone}/>')
        links.append(f'<li><a href="{document}">{n}</a></li>')
        shown[document] = PAGE.format(n=n, width=width, height=height, image=image)
    made["package.opf"] = PACKAGE.format(
        identifier=_identifier(report),
        title=title,
        manifest="\n".join(manifest),
        spine="\n".join(spine),
        direction="rtl" if _is_rtl(report) else "ltr",
    )
    made["nav.xhtml"] = NAVIGATION.format(title=title, links="\n".join(links))
    return {name: text.encode() for name, text in (made | shown).items()}


def _as_text(text: str) -> str:
    """Text for XML: without what it can't hold (XML 1.0, 2.2), not even escaped."""
    kept = (c for c in text if c >= " " and not "\ud800" <= c <= "\udfff" and c not in "\ufffe\uffff")
    return html.escape("".join(kept)) or "_"


def _identifier(report: dict[str, Any]) -> uuid.UUID:
    """The job's; the command line has no jobs, and its pages' hashes stand for it."""
    try:
        return uuid.UUID(report["jobId"])
    except (KeyError, TypeError, ValueError):
        return uuid.uuid5(uuid.NAMESPACE_OID, "".join(item["sha256"] for item in report["items"]))


# ---------------------------------------------------------------- PDF
PDF_DPI = 150.0  # what a pixel becomes on paper; readers fit pages to the screen anyway
PDF_MOST_POINTS, POINTS_PER_INCH = 14_400, 72  # a page's side at most (ISO 32000, annex C); in an inch
ROUNDING = 1.0001  # so that the longest page is no hair above that
PART_PAGES, MOST_PARTS = 16, 256  # put together on disk: a volume in memory may be gigabytes


def _pack_pdf(outputs: Path, artifact: Path, report: dict[str, Any]) -> tuple[str, int]:
    """artifacts.pack() as a PDF. JPEGs go in byte for byte, a PNG's pixels as they are packed; what no
    PDF can hold goes in as a PNG; what nothing decodes leaves a blank page and is attached."""
    if why := _missing():
        raise ExtraMissing(why)
    import pikepdf

    items = report["items"]
    data = artifacts.report_bytes(report)
    storage.write_whole(outputs / storage.REPORT_NAME, data)
    storage.sweep_folders(outputs)
    with (
        _pictures_of_any_size(),
        tempfile.TemporaryDirectory(prefix=storage.PARTS, dir=outputs, ignore_cleanup_errors=True) as folder,
        storage.replacing(artifact, storage.own_temporary(artifact)) as file,
    ):
        unshown = _write_parts(outputs, Path(folder), items)
        attached = {storage.REPORT_NAME: data} | {name: (outputs / name).read_bytes() for name in unshown}
        direction = pikepdf.Name.R2L if _is_rtl(report) else pikepdf.Name.L2R
        _join_parts(Path(folder), file, direction, _title(report, artifact.stem), attached)
        file.flush()
        os.fsync(file.fileno())
        digest, size_bytes = storage.sha256_file(Path(file.name)), file.tell()
    artifacts.remove_strays(outputs, {storage.REPORT_NAME, *(item["filename"] for item in items)})
    return digest, size_bytes


def _join_parts(
    folder: Path, file: IO[bytes], direction: Any, title: str, attached: dict[str, bytes]
) -> None:
    """Write one PDF of all in a folder. The parts are open until this returns, which on Windows keeps the
    folder from going."""
    import pikepdf

    parts = sorted(str(path.absolute()) for path in folder.iterdir())
    with contextlib.ExitStack() as held:
        if all(map(_is_utf8, parts)):
            # "-": an output, of which nothing is made.
            job = pikepdf.Job(["pikepdf", "--empty", "--pages", *parts, "--", "-"])
            pdf = held.enter_context(job.create_pdf())
        else:  # qpdf opens no others; this way all images are in memory at once
            pdf = held.enter_context(pikepdf.new())
            for part in parts:
                opened = pikepdf.open(held.enter_context(open(part, "rb")))
                pdf.pages.extend(held.enter_context(opened).pages)
        pdf.Root.ViewerPreferences = pikepdf.Dictionary(Direction=direction)
        pdf.docinfo["/Title"] = title.encode("utf-8", "replace").decode()
        for name, content in attached.items():
            pdf.attachments[name] = pikepdf.AttachedFileSpec(pdf, content, filename=name)
        # Streams as they are: what was a JPEG stays that JPEG.
        as_is = {"stream_decode_level": pikepdf.StreamDecodeLevel.none, "compress_streams": False}
        pdf.save(file, deterministic_id=True, **as_is)


def _is_utf8(path: str) -> bool:
    try:
        return os.fsencode(path) == path.encode()
    except UnicodeEncodeError:  # bytes that are no text
        return False


@contextlib.contextmanager
def _pictures_of_any_size() -> Iterator[None]:
    """Without Pillow's own limit, which is below the service's (Limits.output_pixels)."""
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _write_parts(outputs: Path, folder: Path, items: Sequence[dict[str, Any]]) -> list[str]:
    """Write all pages as PDFs of some pages each, named in order; returns the files that none can show.

    Raises storage.OutputDamaged.
    """
    import img2pdf

    logging.getLogger("img2pdf").setLevel(logging.ERROR)  # it speaks of every page with an alpha channel
    sizes = _sizes(items)
    longest = max(max(size) for size in sizes)
    dpi = max(PDF_DPI, longest * POINTS_PER_INCH / PDF_MOST_POINTS * ROUNDING)
    settings = {
        "layout_fun": img2pdf.get_fixed_dpi_layout_fun((dpi, dpi)),
        "rotation": img2pdf.Rotation.ifvalid,
        "first_frame_only": True,
        "nodate": True,
        "engine": img2pdf.Engine.internal,  # the other refuses pages of less than 3 points
    }
    unshown: list[str] = []
    each = max(PART_PAGES, -(-len(items) // MOST_PARTS))
    for first in range(0, len(items), each):
        images = []
        for n, item in enumerate(items[first : first + each], first + 1):
            image = _image_of(_read(outputs, item, n), settings)
            if image is None:
                unshown.append(item["filename"])
                image = _blank(sizes[n - 1])
            images.append(image)
        with open(folder / f"{first:05d}.pdf", "xb") as part:
            img2pdf.convert(images, outputstream=part, **settings)
        gc.collect()  # its documents refer to themselves, and hold these images until they are sought
    return unshown


def _read(outputs: Path, item: dict[str, Any], n: int) -> bytes:
    try:
        data: bytes = (outputs / item["filename"]).read_bytes()
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != item["sha256"]:
        raise storage.OutputDamaged(item["filename"], n)
    return data


def _image_of(data: bytes, settings: dict[str, Any]) -> bytes | None:
    """The image as a PDF can hold it: as it is, else as a PNG over white; None for what can't be decoded."""
    import img2pdf

    from engine import pages

    if storage.sniff(data) in pages.PDF_KINDS:
        try:
            img2pdf.convert(data, **settings)
        # It raises errors of its own, of Pillow and of zlib; a file that it can't take is decoded here.
        except Exception:
            pass
        else:
            return data
    try:
        pixels = pages.flatten(pages.to_eight_bit(pages.decode(data, 1, LIMITS)))
        return pages.encode(pixels, Params(output_format="png"))[0]
    except pages.PageError:
        return None


def _blank(size: tuple[int, int]) -> bytes:
    """A white PNG."""
    import numpy as np

    from engine import pages

    white = np.full(size[::-1], 255, np.uint8)
    data: bytes = pages.encode(white, Params(output_format="png"))[0]
    return data
