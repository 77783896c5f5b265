"""A cbz beside the contract's zip: order, ComicInfo.xml, other files; and what a hostile one can't do."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
from client import Client
from ondisk import sha
from serving import png, volume

import server
import settings
import storage
from commands import verify
from files import artifacts, containers, inputs, weightfiles
from messages import Limits
from web import reader
from work import rebuild

PAGES = {"001.png": png(shade=1), "ch2/002.png": png(shade=2), "ch2/010.png": png(shade=3)}
INFO = b"""\xef\xbb\xbf<?xml version="1.0" encoding="utf-8"?>
<ComicInfo xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
  <Title>\xe4\xbd\x9c\xe5\x93\x81 &amp; more</Title><!-- by hand -->
  <PageCount>99</PageCount>
  <Manga>YesAndRightToLeft</Manga>
  <Pages>
    <Page Image="0" Type="FrontCover" ImageWidth="32" ImageHeight='48' ImageSize="1" />
    <Page Image="2" Bookmark="an ImageWidth=&quot;1&quot; > in here"/>
    <Page Image="7" ImageWidth="5"/>
  </Pages>
</ComicInfo>
"""
OTHERS = {
    "ComicInfo.xml": INFO,
    "series.json": b"{}",
    "ch2/notes.txt": b"notes",
    "artifact-report.json": b"old",
}
LIMITS = Limits()
ITEMS = [{"width": 10 * n, "height": 100 * n, "bytes": 1000 * n} for n in (1, 2, 3)]


def brought_up_to_date(tmp_path: Path, data: bytes, items: list[dict[str, Any]] = ITEMS) -> bytes:
    (tmp_path / "in.xml").write_bytes(data)
    return containers.comic_info(tmp_path / "in.xml", items)


# ---------------------------------------------------------------- ComicInfo
def test_comic_info_gets_the_pages_sizes_and_stays_as_it_was_otherwise(tmp_path):
    expected = INFO.replace(b">99<", b">3<")
    expected = expected.replace(
        b"""ImageWidth="32" ImageHeight='48' ImageSize="1" />""",
        b'ImageWidth="10" ImageHeight="100" ImageSize="1000" />',
    )
    expected = expected.replace(
        b'in here"/>', b'in here" ImageWidth="30" ImageHeight="300" ImageSize="3000"/>'
    )
    assert brought_up_to_date(tmp_path, INFO) == expected
    assert brought_up_to_date(tmp_path, expected) == expected


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"<ComicInfo/>", b"<ComicInfo><PageCount>3</PageCount></ComicInfo>"),
        (b"<ComicInfo a='/>' />", b"<ComicInfo a='/>' ><PageCount>3</PageCount></ComicInfo>"),
        (b"<ComicInfo></ComicInfo>", b"<ComicInfo><PageCount>3</PageCount></ComicInfo>"),
        (b"<ComicInfo><PageCount/></ComicInfo>", b"<ComicInfo><PageCount>3</PageCount></ComicInfo>"),
        (
            b"<ComicInfo><Web/><Format>x</Format></ComicInfo>",
            b"<ComicInfo><Web/><PageCount>3</PageCount><Format>x</Format></ComicInfo>",
        ),
        (
            b"<ComicInfo><Web><PageCount>5</PageCount></Web ><Pages/></ComicInfo>",
            b"<ComicInfo><Web><PageCount>5</PageCount></Web ><PageCount>3</PageCount><Pages/></ComicInfo>",
        ),
        (
            b"<ComicInfo><!-- <PageCount>1</PageCount> --><![CDATA[<a>]]></ComicInfo>",
            b"<ComicInfo><PageCount>3</PageCount><!-- <PageCount>1</PageCount> -->"
            b"<![CDATA[<a>]]></ComicInfo>",
        ),
    ],
)
def test_a_missing_page_count_goes_where_the_schema_wants_it(tmp_path, data, expected):
    assert brought_up_to_date(tmp_path, data) == expected


@pytest.mark.parametrize("encoding", ["shift_jis", "gbk", "euc-jp", "utf-16-le", "utf-16-be", "utf-8"])
def test_comic_info_stays_in_its_own_encoding(tmp_path, encoding):
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    declared = encoding[:6] if mark else encoding
    text = f"<?xml version='1.0' encoding='{declared}'?><ComicInfo><Title>日本</Title></ComicInfo>"
    made = brought_up_to_date(tmp_path, mark + text.encode(encoding))
    title = "<Title>日本</Title>"
    assert made == mark + text.replace(title, title + "<PageCount>3</PageCount>").encode(encoding)


def test_a_page_that_nothing_decodes_has_no_size_rather_than_its_old_one(tmp_path):
    data = b'<ComicInfo><PageCount>1</PageCount><Pages><Page Image="0" ImageWidth="7"/></Pages></ComicInfo>'
    made = brought_up_to_date(tmp_path, data, [{"width": 0, "height": 0, "bytes": 12}])
    assert b'<Page Image="0" ImageSize="12"/>' in made


def test_what_it_says_of_a_page_stays_with_that_page_where_another_before_it_was_split(tmp_path):
    halves = "the right half of a double page", "the left half of a double page"
    names = {"1.png": None, "2-1.png": halves[0], "2-2.png": halves[1], "3-2.png": None}
    size = {"width": 1, "height": 1, "bytes": 1}
    sources = [{"source": {"filename": name, "sha256": ""}, "deviation": why} for name, why in names.items()]
    items = [size | source for source in sources]
    said = b'<Page Image="1" DoublePage="true"/><Page Image="2" Bookmark="Chapter 2"/><Page Image="3"/>'
    data = b"<ComicInfo><PageCount>3</PageCount><Pages>%b</Pages></ComicInfo>" % said
    sized = b'ImageWidth="1" ImageHeight="1" ImageSize="1"'
    made = brought_up_to_date(tmp_path, data, items)
    assert b'<Pages><Page Image="1" %b/><Page Image="3" Bookmark="Chapter 2" %b/>' % (sized, sized) in made
    assert b'<Page Image="3"/></Pages>' in made, "of a page that never came nothing is known"


def test_tens_of_thousands_of_pages_in_it_cost_no_more_than_reading_it(tmp_path):
    one = b'<Page Image="0"/>'
    data = b"<ComicInfo><Pages>" + one * 30_000 + b"</Pages></ComicInfo>"
    made = brought_up_to_date(tmp_path, data)
    sized = b'<Page Image="0" ImageWidth="10" ImageHeight="100" ImageSize="1000"/>'
    assert made == b"<ComicInfo><PageCount>3</PageCount><Pages>" + sized * 30_000 + b"</Pages></ComicInfo>"


BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">%s]>' % b"".join(
    b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(12)
)
HOSTILE = {
    "an entity bomb": BOMB + b"<ComicInfo><Title>&m;</Title></ComicInfo>",
    "an external entity": b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><ComicInfo>&e;</ComicInfo>',
    "an external DTD": b'<!DOCTYPE ComicInfo SYSTEM "http://127.0.0.1:9/x.dtd"><ComicInfo/>',
    "an encoding that lies": b'<?xml version="1.0" encoding="utf-8"?><ComicInfo>\x93\xfa</ComicInfo>',
    "a mark that lies": b'\xef\xbb\xbf<?xml version="1.0" encoding="utf-16"?><ComicInfo/>',
    "UTF-8 that calls itself UTF-16": b'<?xml version="1.0" encoding="utf-16"?><ComicInfo/>',
    "an unknown encoding": b'<?xml version="1.0" encoding="rot13"?><ComicInfo/>',
    "a codec of Python's": b'<?xml version="1.0" encoding="unicode_escape"?><ComicInfo/>',
    "half of UTF-16": b"\xff\xfe<\0C",
    "a huge one": b"<ComicInfo>" + b" " * containers.COMIC_INFO_BYTES + b"</ComicInfo>",
    "a deep one": b"<ComicInfo>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</ComicInfo>",
    "one that ends early": INFO[:200],
    "HTML": b"<html><p>not found",
    "another root": b"<Comic/>",
    "zeros": bytes(1000),
    "nothing": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_comic_info_that_is_not_read_for_certain_is_kept_where_no_reader_opens_it(tmp_path, what):
    packed = cbz(tmp_path, PAGES | {"ComicInfo.xml": HOSTILE[what]})
    (file,) = report_of(packed)["files"]
    assert list(packed) == [*PAGES, "_ComicInfo.xml", "artifact-report.json"]
    assert packed["_ComicInfo.xml"] == HOSTILE[what] and file["status"] == "kept"
    assert file["sha256"] == file["source"]["sha256"] == sha(HOSTILE[what])
    assert "not brought up to date" in file["error"]


def test_no_comic_info_is_ever_half_edited(tmp_path):
    """Changed anywhere, it is refused, or is XML that says the same but for the pages' sizes."""
    rng = random.Random(1)
    for _ in range(600):
        data = bytearray(INFO)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 2)] = rng.choice([b"", b"<", b'"', b">", b"/", b" ", b"\x80", b"&"])
        try:
            made = brought_up_to_date(tmp_path, bytes(data))
        except containers.ComicInfoError:
            continue
        root = ET.fromstring(made)
        assert root.findall("PageCount")[0].text == "3"
        for page in root.findall("Pages/Page"):
            if page.get("Image") in ("0", "1", "2"):
                item = ITEMS[int(page.get("Image"))]
                assert (page.get("ImageWidth"), page.get("ImageSize")) == (
                    str(item["width"]),
                    str(item["bytes"]),
                )
        before = ET.fromstring(bytes(data))
        assert [one.tag for one in before.iter() if one.tag != "PageCount"] == [
            one.tag for one in root.iter() if one.tag != "PageCount"
        ]


# ---------------------------------------------------------------- other files
def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def kept_of(tmp_path: Path, source: Path, limits: Limits = LIMITS) -> dict[str, Any]:
    """The report of a cbz made of this input, its pages carried; packed as tmp_path/a.cbz."""
    outputs, items = tmp_path / "out", []
    for _ in containers.keep(source, outputs, limits):
        pass
    with inputs.opened(source, limits) as archive:
        listing = inputs.list_input(source, limits, archive)
        for n, (page, stem) in enumerate(
            zip(listing.pages, storage.output_stems([page.name for page in listing.pages]), strict=True)
        ):
            with inputs.open_entry(page, archive, limits) as file:
                data = file.read()
            name = stem + os.path.splitext(page.name)[1]
            write(outputs, {name: data})
            items.append(ITEMS[n % 3] | {"filename": name, "sha256": sha(data)})
    report = {"params": {"container": "cbz"}, "items": items}
    containers.pack(outputs, tmp_path / "a.cbz", report)
    return artifacts.prove_artifact(tmp_path / "a.cbz")[0]


def cbz(tmp_path: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """The members of a cbz made of a folder with these files."""
    kept_of(tmp_path, write(tmp_path / "in", files))
    return members((tmp_path / "a.cbz").read_bytes())


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def report_of(packed: dict[str, bytes]) -> Any:
    return json.loads(packed["artifact-report.json"])


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_cbz_holds_pages_then_other_files_then_the_report(tmp_path, kind):
    files = PAGES | OTHERS | {".hidden": b"x", "__MACOSX/y.txt": b"y"}
    source = write(tmp_path / "in", files)
    if kind == "zip":
        source = tmp_path / "in.zip"
        source.write_bytes(volume(files))
    report = kept_of(tmp_path, source)
    packed = members((tmp_path / "a.cbz").read_bytes())
    names = ["_artifact-report.json", "ch2/notes.txt", "ComicInfo.xml", "series.json"]
    assert list(packed) == [*PAGES, *names, "artifact-report.json"]
    assert [packed[name] for name in (names[0], names[1], names[3])] == [b"old", b"notes", b"{}"]
    facts = {file["source"]["filename"]: file for file in report["files"]}
    assert facts["ComicInfo.xml"]["status"] == "updated"
    assert facts["ComicInfo.xml"]["source"] == {
        "filename": "ComicInfo.xml",
        "sha256": sha(INFO),
        "bytes": len(INFO),
    }
    assert all(facts[name]["sha256"] == sha(OTHERS[name]) for name in OTHERS if name != "ComicInfo.xml")


def test_the_same_input_gives_the_same_cbz_also_when_packing_was_killed(tmp_path, monkeypatch):
    source = write(tmp_path / "in", PAGES | OTHERS)
    report = kept_of(tmp_path, source)
    first = (tmp_path / "a.cbz").read_bytes()
    del report["files"]
    with monkeypatch.context() as patch:
        patch.setattr(storage, "sync_dir", lambda _: 1 / 0)  # after the report, before the archive
        with pytest.raises(ZeroDivisionError):
            containers.pack(tmp_path / "out", tmp_path / "a.cbz", report)
    shutil.rmtree(source)
    assert containers.is_kept(tmp_path / "out")
    containers.pack(tmp_path / "out", tmp_path / "a.cbz", report)
    assert (tmp_path / "a.cbz").read_bytes() == first


@pytest.mark.parametrize(
    "harm", ["changed", "gone", "no index", "an index that is none", "an index of another kind"]
)
def test_what_was_kept_is_believed_by_its_hash_alone(tmp_path, harm):
    kept_of(tmp_path, write(tmp_path / "in", PAGES | OTHERS))
    path = tmp_path / "out" / (containers.INDEX if "index" in harm else "series.json")
    path.unlink()
    if harm not in {"no index", "gone"}:
        path.write_bytes(b"[1]" if "another" in harm else b"[}")
    assert not containers.is_kept(tmp_path / "out")
    with pytest.raises(storage.OutputDamaged) as caught:
        containers.pack(tmp_path / "out", tmp_path / "b.cbz", {"params": {"container": "cbz"}, "items": []})
    assert caught.value.page is None and not (tmp_path / "b.cbz").exists()


def test_a_file_that_can_not_be_kept_is_left_out_and_the_reason_told(tmp_path):
    source = write(tmp_path / "in", PAGES | {"big.txt": bytes(5000), "small.txt": b"s", "z.txt": bytes(900)})
    (source / "link.txt").symlink_to("/etc/passwd")
    os.mkfifo(source / "pipe.txt")
    pages_bytes = sum(map(len, PAGES.values()))
    limits = Limits(entry_bytes=4000, total_bytes=pages_bytes + 500)
    files = {file["source"]["filename"]: file for file in kept_of(tmp_path, source, limits)["files"]}
    assert files.pop("small.txt")["status"] == "kept"
    assert {file["filename"] for file in files.values()} == {None} and len(files) == 4
    assert {file["status"] for file in files.values()} == {"left out"}
    assert "REICHAN_MAX_ENTRY_BYTES" in files["big.txt"]["error"]
    assert "REICHAN_MAX_TOTAL_BYTES" in files["z.txt"]["error"]
    assert containers.left_out(tmp_path / "out") == 4
    assert b"root:" not in (tmp_path / "a.cbz").read_bytes()


def test_others_that_do_not_fit_the_disk_are_refused_before_one_is_copied(tmp_path):
    source = write(tmp_path / "in", PAGES | OTHERS)
    with pytest.raises(storage.NoRoom):
        list(containers.keep(source, tmp_path / "out", Limits(), reserve_bytes=1 << 60))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "names, stems, expected",
    [
        (["a.txt", "A.TXT", "a.txt"], [], ["a.txt", "_A.TXT", "_2_a.txt"]),
        (["ch1", "x.jpg/y.txt"], ["ch1/001", "x"], ["_ch1", "_x.jpg/y.txt"]),
        (["artifact-report.json", "comicinfo.xml", "_ComicInfo.xml"], [],
         ["_artifact-report.json", "_2_comicinfo.xml", "__ComicInfo.xml"]),
        (["001.jpg.", "con.txt", "a:b.txt"], ["001"], ["001.jpg_", "_con.txt", "a_b.txt"]),
        (["a", "a/b.txt"], [], ["a", "_a/b.txt"]),
    ],
)  # fmt: skip
def test_a_kept_file_is_in_nobodys_way_and_passes_for_no_page(names, stems, expected):
    assert containers.kept_names(names, stems) == expected


def test_thousands_of_files_of_one_name_are_named_at_once():
    names = containers.kept_names(["readme.txt"] * 20_000, ["1"])
    assert len({storage.fold(name) for name in names}) == 20_000


@pytest.mark.parametrize(
    "others, pages, found",
    [
        (["ComicInfo.xml", "v/ComicInfo.xml"], ["v/1.png"], "ComicInfo.xml"),
        (["v/comicinfo.XML", "readme.txt"], ["v/1.png", "v/w/2.png"], "v/comicinfo.XML"),
        (["v/ComicInfo.xml"], ["v/1.png", "w/2.png"], None),
        (["v/ComicInfo.xml", "v/w/ComicInfo.xml"], ["v/w/2.png"], None),
        (["MyComicInfo.xml"], ["1.png"], None),
    ],
)
def test_the_comic_info_at_the_root_of_the_pages_is_the_volumes(others, pages, found):
    entries = [[inputs.Entry(name, Path(), None) for name in names] for names in (pages, others)]
    entry = containers.comic_info_of(inputs.Listing(entries[0], 0, None, entries[1]))
    assert (entry and entry.name) == found


# ---------------------------------------------------------------- through the service
@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[server.Service, Client, Path]]:
    """A service whose cbz can be written while a file "room" is there."""
    root = tmp_path_factory.mktemp("cbz")
    (root / "room").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTS", str(root))
        config = settings.Config(storage_root=root / "storage", port=0)
        with server.Service(config, faults.no_room_for_a_cbz) as service:
            yield service, Client(service.url), root / "room"


def submit(client: Client, name: str, **params: Any) -> str:
    asked = {"model": "realesr-animevideov3", "outputFormat": "png"} | params
    return client.submit(name, params=asked)


def end_of(client: Client, job: str) -> str:
    return client.watch(job)[0][-1].status


def test_a_job_may_be_delivered_as_a_cbz(world, tmp_path):
    service, client, _ = world
    client.upload("whole.cbz", [volume(PAGES | OTHERS)])
    job = submit(client, "whole.cbz", container="cbz")
    assert end_of(client, job) == "SUCCESS"
    state, reply = client.call("GET", f"/jobs/{job}").json(), client.call("GET", f"/jobs/{job}/artifact")
    assert state["artifactPath"].endswith(f"{job}.cbz") and state["params"]["container"] == "cbz"
    assert reply.headers["content-type"] == "application/vnd.comicbook+zip"
    assert reply.headers["content-disposition"].endswith("%2001.cbz")
    packed = members(reply.body)
    assert list(packed)[:3] == list(PAGES) and list(packed)[-1] == "artifact-report.json"
    root = ET.fromstring(packed["ComicInfo.xml"])
    first = root.find("Pages/Page")
    assert root.findtext("PageCount") == "3" and root.findtext("Manga") == "YesAndRightToLeft"
    sizes = {"ImageWidth": "64", "ImageHeight": "96", "ImageSize": str(len(packed["001.png"]))}
    assert first.attrib == {"Image": "0", "Type": "FrontCover"} | sizes
    assert (packed["series.json"], state["leftOut"]) == (b"{}", 0)
    assert client.call("GET", f"/jobs/{job}/report").json()["report"] == report_of(packed)
    path = service.config.layout.root / state["artifactPath"]
    source = service.config.layout.incoming / "whole.cbz"
    assert verify.main(["verify", str(path), "--against", str(source)]) == 0
    # The table lost, the job is rebuilt from it.
    report, digest, size_bytes = artifacts.prove_artifact(path)
    again, pages = rebuild.job_of(report, digest, size_bytes, 0.0)
    assert again.params.container == "cbz" and [page.output for page in pages] == list(PAGES)
    assert client.call("DELETE", f"/jobs/{job}").status == 204 and not path.exists()


def test_a_zip_holds_what_it_always_held(world):
    _, client, _ = world
    client.upload("plain.zip", [volume(PAGES | OTHERS)])
    job = submit(client, "plain.zip")
    assert end_of(client, job) == "SUCCESS"
    reply = client.call("GET", f"/jobs/{job}/artifact")
    assert reply.headers["content-type"] == "application/zip"
    report = report_of(packed := members(reply.body))
    assert list(packed) == ["artifact-report.json", *PAGES]
    assert "container" not in report["params"] and "files" not in report and report["leftOut"] == 4


def test_a_cbz_that_found_no_room_is_finished_without_its_input(world):
    service, client, room = world
    client.upload("twice.zip", [volume(PAGES | OTHERS)])
    room.unlink()
    job = submit(client, "twice.zip", container="cbz")
    assert end_of(client, job) == "FAILED"
    room.touch()
    layout = service.config.layout
    (layout.incoming / "twice.zip").rename(layout.incoming / "moved.zip")
    client.post(job, "resume")
    assert end_of(client, job) == "SUCCESS"
    other = submit(client, "moved.zip", container="cbz")
    assert end_of(client, other) == "SUCCESS"
    one, two = (members(client.call("GET", f"/jobs/{one}/artifact").body) for one in (job, other))
    changed = one.pop("artifact-report.json").replace(job.encode(), other.encode())
    assert changed == two.pop("artifact-report.json") and one == two


def test_volumes_in_an_archive_become_volumes_with_all_that_was_theirs(world):
    """One is a folder in it, one a cbz with its ComicInfo.xml; each is shown and proved like any other."""
    service, client, _ = world
    inner = volume({"1.png": png(), "ComicInfo.xml": b"<ComicInfo/>"})
    client.upload("all.zip", [volume({"S/v1/2.png": png(), "S/v1/10.png": png(), "S/v2.cbz": inner})])
    params = {"model": "realesr-animevideov3", "container": "cbz", "split": "volumes"}
    asked = {"title": "t", "volume": "-", "input": {"type": "zip", "path": "all.zip"}, "params": params}
    jobs = client.call("POST", "/jobs", asked).json()["jobIds"]
    assert [end_of(client, job) for job in jobs] == ["SUCCESS"] * 2
    packed = []
    for job, inside in zip(jobs, ("S/v1", "S/v2.cbz"), strict=True):
        state = client.call("GET", f"/jobs/{job}").json()
        artifact, source = service.config.layout.root / state["artifactPath"], f"all.zip/{inside}"
        against = str(service.config.layout.incoming / source)
        assert verify.main(["verify", str(artifact), "--against", against]) == 0
        assert client.call("GET", f"/jobs/{job}/pages/1/before").status == 200
        packed.append(members(client.call("GET", f"/jobs/{job}/artifact").body))
        assert report_of(packed[-1])["params"]["split"] == "volumes"
    assert list(packed[0]) == ["2.jpg", "10.jpg", "artifact-report.json"]
    assert list(packed[1]) == ["1.jpg", "ComicInfo.xml", "artifact-report.json"]
    assert packed[1]["ComicInfo.xml"] == b"<ComicInfo><PageCount>1</PageCount></ComicInfo>"
    assert [report_of(one)["volume"] for one in packed] == ["1", "2"]


def test_a_container_of_another_kind_is_refused(world):
    body = {"title": "t", "volume": "1", "input": {"type": "zip", "path": "plain.zip"}}
    for container in ("cbr", "", None, 1):
        reply = world[1].call("POST", "/jobs", body | {"params": {"container": container}})
        assert reply.status == 422 and "params.container" in reply.faults()


def test_a_single_page_has_no_container():
    models = {weightfiles.model_key(reader.DEFAULTS.model): reader.DEFAULTS.model}
    assert reader.params_of({"container": "cbr"}, models) == reader.DEFAULTS
    assert "container" not in reader.PARAMETERS


def test_a_side_over_a_formats_limit_is_written_as_png_and_the_report_says_so(world):
    _, client, _ = world
    client.upload("strip.zip", [volume({"1.png": png(4100, 2), "2.png": png(16_380, 2)})])
    for wanted, limit in (("webp", 16_383), ("jpg", 65_500)):
        job = submit(client, "strip.zip", outputFormat=wanted, scale=4)
        assert end_of(client, job) == "SUCCESS"
        items = client.call("GET", f"/jobs/{job}/report").json()["report"]["items"]
        for item in items:
            over = item["width"] > limit
            assert item["filename"].endswith(".png" if over else f".{wanted}")
            why = f"written as png: {item['width']} px is over the {limit} px that {wanted} allows"
            assert item["deviation"] == (why if over else None) and item["status"] == "upscaled"
        assert items[1]["width"] == 65_520 and items[1]["filename"].endswith(".png")
