"""EPUB and PDF artifacts, as ebooklib, PDFium and pikepdf read them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import struct
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from client import Client
from drawn import colour, grey
from engines import COMPACT
from helpers import require
from serving import png, until, volume

import server
import settings
import storage
from commands import cli, verify
from engine import budgets, pages
from files import artifacts, books, containers, formats, inputs
from messages import Limits, Params
from work import submissions

DIRECTIONS = ("rtl", "ltr")


@pytest.fixture(autouse=True)
def installed() -> None:
    for module in ("img2pdf", "pikepdf", "pypdfium2", "ebooklib"):
        require(
            importlib.util.find_spec(module), f"{module} is not installed: pip install '.[formats]' ebooklib"
        )


def coded(pixels: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, pixels)[1].tobytes()


FILES = {
    "ch 1/表紙.jpg": coded(colour(90, 60), ".jpg"),
    "ch 1/2.png": coded(grey(90, 60), ".png"),
    "ch 1/10.png": coded(colour(60, 90), ".png"),
    "META-INF/11.jpg": coded(grey(90, 60), ".jpg"),
}


def packed(
    tmp_path: Path, container: str, files: dict[str, bytes] | None = None, direction: str = "rtl"
) -> Path:
    """An artifact of these pages, under the names that the service would give them."""
    files, outputs, items = files or FILES, tmp_path / "outputs", []
    for (name, data), stem in zip(files.items(), storage.output_stems(list(files)), strict=True):
        target = outputs / (stem + Path(name).suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        height, width = (0, 0) if image is None else image.shape[:2]
        facts = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        filename = target.relative_to(outputs).as_posix()
        size = {"width": width, "height": height, "source": {"filename": name} | facts}
        items.append({"filename": filename} | facts | size)
    report = {"jobId": "job", "title": "作品 <&>", "volume": "1\x00", "items": items}
    report["params"] = {"container": container, "readingDirection": direction}
    containers.pack(outputs, tmp_path / f"a.{container}", report)
    return tmp_path / f"a.{container}"


# ---------------------------------------------------------------- EPUB
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_epub_has_every_page_in_order_as_it_was(tmp_path, direction):
    from ebooklib import epub

    made = packed(tmp_path, "epub", direction=direction)
    book = epub.read_epub(made)
    assert (book.title, book.direction) == ("作品 <&> 1", direction)
    images = [item for item in book.get_items() if item.media_type.startswith("image/")]
    assert [item.get_content() for item in images] == list(FILES.values())
    spine = [book.get_item_with_id(name) for name, _ in book.spine]
    assert [item.get_name() for item in spine] == [f"page-{n:05d}.xhtml" for n in range(1, 5)]
    with zipfile.ZipFile(made) as archive:
        order = formats.spine_pages(made, archive.NameToInfo, archive.read, Limits())
    shown = [info.filename for info in order]
    assert shown == ["ch 1/表紙.jpg", "ch 1/2.png", "ch 1/10.png", "_META-INF/11.jpg"]


def test_an_epub_says_what_it_is_in_its_first_bytes(tmp_path):
    # OCF 3.3, 4.3: at byte 30 the name, right behind it the type, uncompressed.
    assert packed(tmp_path, "epub").read_bytes()[30:58] == b"mimetypeapplication/epub+zip"


def test_an_epubs_media_types_are_those_of_what_was_kept(tmp_path):
    from ebooklib import epub

    source = tmp_path / "in"
    source.mkdir()
    kept = {"1.png": ".jpg", "2.jpg": ".webp", "3.jpeg": ".jpg", "4.png": ".png", "5.webp": ".avif"}
    for name, suffix in kept.items():
        (source / name).write_bytes(coded(colour(60, 40), suffix)[:-60])  # too short to be read
    (source / "6.png").write_bytes(coded(colour(60, 40), ".png"))  # of bad pages alone none would be made
    flags = ["--model", COMPACT, "--precision", "fp32"]
    assert cli.main([str(source), str(tmp_path / "out.epub"), *flags]) == 1
    items = epub.read_epub(tmp_path / "out.epub").get_items()
    images = [item for item in items if item.media_type.startswith("image/")]
    assert [item.get_name() for item in images] == ["1.jpg", "2.webp", "3.jpeg", "4.png", "5.avif", "6.jpg"]
    assert [item.media_type for item in images] == [f"image/{storage.sniff(i.content)}" for i in images]


def test_wide_pages_and_the_cover_stand_alone(tmp_path):
    with zipfile.ZipFile(packed(tmp_path, "epub")) as archive:
        spine = archive.read("package.opf").decode().split("<spine")[1]
    alone = [line for line in spine.splitlines() if "page-spread-center" in line]
    assert [line.split('"')[1] for line in alone] == ["p1", "p3"]


def test_an_epub_proves_itself_and_what_it_was_made_of(tmp_path, capsys):
    made = packed(tmp_path, "epub")
    report, _, size_bytes = artifacts.prove_artifact(made)
    assert len(report["items"]) == 4 and size_bytes == made.stat().st_size
    (tmp_path / "in.zip").write_bytes(volume(FILES))
    assert verify.main(["verify", str(made), "--against", str(tmp_path / "in.zip")]) == verify.PROVED
    assert "all proved (4 pages, 8 other files, against in.zip)" in capsys.readouterr().out


def test_a_changed_document_of_an_epub_is_found(tmp_path, capsys):
    made = packed(tmp_path, "epub")
    made.write_bytes(made.read_bytes().replace(b'direction="rtl"', b'direction="ltr"'))
    assert verify.main(["verify", str(made)]) == verify.WRONG
    assert "package.opf" in capsys.readouterr().out
    with pytest.raises(storage.ArtifactDamaged):
        artifacts.prove_artifact(made)


# ---------------------------------------------------------------- PDF
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_pdf_holds_jpegs_and_pngs_as_they_are(tmp_path, direction):
    import pikepdf

    with pikepdf.open(packed(tmp_path, "pdf", direction=direction)) as pdf:
        assert pdf.Root.ViewerPreferences.Direction == {"rtl": "/R2L", "ltr": "/L2R"}[direction]
        streams = [next(iter(page.get_images().values())).read_raw_bytes() for page in pdf.pages]
        report = json.loads(pdf.attachments[storage.REPORT_NAME].get_file().read_bytes())
    assert streams[0] == FILES["ch 1/表紙.jpg"] and streams[3] == FILES["META-INF/11.jpg"]
    for stream, name in ((streams[1], "ch 1/2.png"), (streams[2], "ch 1/10.png")):
        assert stream in FILES[name]  # what its one IDAT holds
    assert [item["source"]["filename"] for item in report["items"]] == list(FILES)


def test_pdfium_shows_a_pdfs_pages(tmp_path):
    import pypdfium2

    with pypdfium2.PdfDocument(packed(tmp_path, "pdf")) as pdf:
        for page, data in zip(pdf, FILES.values(), strict=True):
            shown = page.render(scale=books.PDF_DPI / 72).to_numpy()
            wanted = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            height, width = wanted.shape[:2]  # PDFium rounds a part of a pixel up
            assert shown.shape[0] - height in (0, 1) and shown.shape[1] - width in (0, 1)
            # It draws on a grid that is not quite the image's: alike is what lies in each tenth.
            small = [
                cv2.resize(one[..., :3], (6, 9), interpolation=cv2.INTER_AREA) for one in (shown, wanted)
            ]
            assert np.abs(small[0].astype(int) - small[1]).mean() < 6


def test_no_page_is_left_out_of_a_pdf(tmp_path):
    """One that is no image is blank and attached; one that a PDF can't hold becomes a PNG."""
    import pikepdf

    files = {
        "1.jpg": coded(grey(90, 60), ".jpg"),
        "2.jpg": b"no image",
        "3.webp": coded(colour(90, 60), ".webp"),
    }
    with pikepdf.open(packed(tmp_path, "pdf", files)) as pdf:
        assert len(pdf.pages) == 3 and pdf.pages[0].mediabox == pdf.pages[1].mediabox
        assert pdf.attachments["2.jpg"].get_file().read_bytes() == b"no image"
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == [*files, storage.REPORT_NAME]


def test_a_long_pdf_is_put_together_in_order(tmp_path, monkeypatch):
    import pikepdf

    monkeypatch.setattr(books, "PART_PAGES", 2)
    files = {f"{n}.jpg": coded(grey(20 + n, 20), ".jpg") for n in range(1, 6)}
    with pikepdf.open(packed(tmp_path, "pdf", files)) as pdf:
        images = [next(iter(page.get_images().values())) for page in pdf.pages]
        assert [int(image.Height) for image in images] == [21, 22, 23, 24, 25]


def test_a_pdf_takes_the_memory_of_a_few_pages_however_many_it_has(tmp_path, monkeypatch):
    require(os.path.exists("/proc/self/clear_refs"), "there is no /proc to read a peak from")
    monkeypatch.setattr(books, "PART_PAGES", 4)
    noise = np.random.default_rng(1).integers(0, 256, (1000, 1000, 3), np.uint8)
    page = coded(noise, ".jpg")
    files = {f"{n}.jpg": page + bytes([n]) for n in range(48)}  # else it holds one image, 48 times
    volume_bytes = len(page) * len(files)
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")
    before = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    pdf = packed(tmp_path, "pdf", files)
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert pdf.stat().st_size > volume_bytes
    assert (int(peak[1]) - int(before[1])) * 1024 < volume_bytes / 2


def test_what_a_pdf_was_put_together_from_is_closed_before_it_is_removed(tmp_path, monkeypatch):
    """Windows removes no open file."""
    require(os.path.exists("/proc/self/fd"), "there is no /proc to see open files in")
    cleanup, opened = tempfile.TemporaryDirectory.cleanup, []

    def looked_at(folder: Any) -> None:
        links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        opened.append([link for link in links if link.startswith(os.path.realpath(folder.name))])
        cleanup(folder)

    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", looked_at)
    monkeypatch.setattr(books, "PART_PAGES", 2)
    packed(tmp_path, "pdf")
    assert opened == [[]]


def test_a_pdf_is_put_together_in_a_folder_whose_name_is_no_text(tmp_path):
    require(sys.platform == "linux", "names of any bytes are Linux'")
    place = tmp_path / os.fsdecode("漫画".encode("cp932"))
    place.mkdir()
    assert packed(place, "pdf").read_bytes() == packed(tmp_path, "pdf").read_bytes()


SPOT = np.full((300, 300), 255, np.uint8)  # in the mean, no turn of it differs
SPOT[20:28, 40:56] = 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("page", [colour(60, 40), SPOT], ids=["drawn", "sparse"])
def test_a_pdfs_jpeg_is_not_turned_by_the_exif_that_its_viewers_leave_alone(tmp_path, page, orientation):
    import img2pdf

    exif = struct.pack(">4sIHHHIHHI", b"MM\0*", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    plain = coded(page, ".jpg")
    jpeg = plain[:2] + struct.pack(">HH6s", 0xFFE1, 8 + len(exif), b"Exif") + exif + plain[2:]
    (tmp_path / "v.pdf").write_bytes(img2pdf.convert(jpeg, rotation=img2pdf.Rotation.none))
    list(inputs.stage_input(tmp_path / "v.pdf", tmp_path / "staging", Limits()))
    data = (tmp_path / "staging" / "00001.png").read_bytes()
    assert (data == jpeg) == (orientation == 1)
    got, wanted = pages.decode(data, 1, Limits()), pages.decode(plain, 1, Limits())
    assert got.shape == wanted.shape and np.abs(got.astype(int) - wanted).max() < 16


def test_a_page_of_one_pixel_is_a_page(tmp_path):
    import pikepdf

    with pikepdf.open(packed(tmp_path, "pdf", {"1.png": coded(grey(1, 1), ".png")})) as pdf:
        assert len(pdf.pages) == 1 and not set(pdf.attachments) - {storage.REPORT_NAME}


def test_a_strip_longer_than_a_pdfs_page_may_be_is_scaled_into_it(tmp_path):
    import pikepdf

    strip = {"1.png": coded(np.full((40_000, 8), 255, np.uint8), ".png")}
    with pikepdf.open(packed(tmp_path, "pdf", strip)) as pdf:
        assert float(pdf.pages[0].mediabox[3]) <= books.PDF_MOST_POINTS


def test_a_pdf_says_that_it_can_t_be_proved_here(tmp_path, capsys):
    made = packed(tmp_path, "pdf")
    assert verify.main(["verify", str(made)]) == verify.UNUSABLE
    out, err = capsys.readouterr()
    assert hashlib.sha256(made.read_bytes()).hexdigest() in out and "artifactHash" in err


# ---------------------------------------------------------------- both
@pytest.mark.parametrize("container", ["epub", "pdf"])
def test_the_same_pages_give_the_same_bytes(tmp_path, container):
    assert packed(tmp_path / "1", container).read_bytes() == packed(tmp_path / "2", container).read_bytes()


@pytest.mark.parametrize("container", ["epub", "pdf"])
def test_a_page_that_changed_on_disk_is_named(tmp_path, container):
    packed(tmp_path, container)
    report = json.loads((tmp_path / "outputs" / storage.REPORT_NAME).read_bytes())
    report.pop("book", None)
    (tmp_path / "outputs/ch 1/2.png").write_bytes(b"other")
    with pytest.raises(storage.OutputDamaged) as caught:
        containers.pack(tmp_path / "outputs", tmp_path / "b", report)
    assert caught.value.page == 2
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"container": "pdf", "outputFormat": "webp"}, "pdf holds jpg, png"),
        ({"container": "epub", "outputFormat": "avif"}, "epub holds jpg, png, webp"),
    ],
)
def test_what_a_book_can_t_hold_is_refused_at_once(params, says):
    errors: list[tuple[str, str]] = []
    submissions.parse_params(params, {}, errors)
    (refusal,) = [why for field, why in errors if field == "params.container"]
    assert says in refusal


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'img2pdf, pikepdf: pip install ".[formats]"' in str(books.refusal(Params(container="pdf")))
    assert books.refusal(Params(container="epub")) is None
    with pytest.raises(books.ExtraMissing, match="formats"):
        packed(tmp_path, "pdf")


def test_a_page_too_large_becomes_nothing_that_its_book_can_t_hold():
    asked = []

    def encode(params: Params) -> tuple[bytes, str, str | None]:
        asked.append(params.output_format)
        return b"x" * 1000, ".jpg", None

    for container, allowed in (("pdf", {"jpg"}), ("epub", {"jpg", "webp"})):
        asked.clear()
        budgets.fitted(encode, Params(container=container), 10)
        assert set(asked) == allowed


# ---------------------------------------------------------------- through the service, and the command line
def test_jobs_end_as_books(tmp_path):
    import pikepdf
    from ebooklib import epub

    with server.Service(settings.Config(storage_root=tmp_path, port=0, precision="fp32")) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume({"1.png": png(shade=3), "2.png": png(shade=9)}))
        for container in ("epub", "pdf"):
            params = {"model": COMPACT, "container": container, "readingDirection": "ltr"}
            body = {"title": "t", "volume": "1", "input": {"type": "zip", "path": "v.zip"}, "params": params}
            job = client.call("POST", "/jobs", body).json()["jobId"]
            path = f"/jobs/{job}"
            state = until(lambda path=path: (s := client.call("GET", path).json())["finishedAt"] and s, 60)
            assert (state["status"], state["message"]) == ("SUCCESS", None)
            answer = client.call("GET", f"{path}/artifact")
            assert answer.headers["content-type"] == containers.MEDIA_TYPES[container]
            assert f".{container}" in answer.headers["content-disposition"]
            assert hashlib.sha256(answer.body).hexdigest() == state["artifactHash"]
            (tmp_path / f"got.{container}").write_bytes(answer.body)
    assert epub.read_epub(tmp_path / "got.epub").direction == "ltr"
    with pikepdf.open(tmp_path / "got.pdf") as pdf:
        assert len(pdf.pages) == 2 and pdf.Root.ViewerPreferences.Direction == "/L2R"


def test_the_command_line_splits_spreads_into_a_book(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    spread = np.full((60, 88), 255, np.uint8)
    spread[10:50, 10:34], spread[10:50, 54:78] = 40, 120
    (folder / "1.png").write_bytes(coded(grey(60, 40), ".png"))
    (folder / "2.png").write_bytes(coded(spread, ".png"))
    flags = ["--model", COMPACT, "--precision", "fp32", "--spreads", "split"]
    assert cli.main([str(folder), str(tmp_path / "out.epub"), *flags]) == 0
    with zipfile.ZipFile(tmp_path / "out.epub") as archive:
        pages = [name for name in archive.namelist() if name.endswith(".jpg")]
        right = cv2.imdecode(np.frombuffer(archive.read("2-1.jpg"), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert pages == ["1.jpg", "2-1.jpg", "2-2.jpg"] and abs(int(right[60, 44]) - 120) < 12
    assert verify.main(["verify", str(tmp_path / "out.epub"), "--against", str(folder)]) == verify.PROVED
