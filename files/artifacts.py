"""What proves a volume: its report, and the artifact that holds it beside the pages.

Map: report - pack - prove_artifact - strays
Rule: the same pages and report give the same bytes; a hash speaks of what lies on the disk.
Runs in: the worker (pack); whatever reads an artifact.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import storage
from files import inputs


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
    return storage.EPUB_REPORT_NAME if "book" in report else storage.REPORT_NAME


def entry_order(report: dict[str, Any]) -> list[str]:
    """An artifact's names in their order. In a cbz the pages come first, as readers expect; in an EPUB
    its documents, the first of which says what it is."""
    names = [item["filename"] for item in members_of(report)]
    if "book" in report:
        pages = len(report["items"])
        return [*names[pages:], *names[:pages], storage.EPUB_REPORT_NAME]
    return [*names, storage.REPORT_NAME] if "files" in report else [storage.REPORT_NAME, *names]


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
    storage.write_whole(outputs / storage.REPORT_NAME, data)
    pages = len(report["items"])
    numbered = {item["filename"]: (n, item) for n, item in enumerate(members_of(report), 1)}
    with storage.replacing(artifact, storage.own_temporary(artifact)) as file:
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
        digest, size_bytes = storage.sha256_file(Path(file.name)), file.tell()
    remove_strays(outputs, {storage.REPORT_NAME, *beside, *numbered})
    return digest, size_bytes


def _pack_output(archive: zipfile.ZipFile, outputs: Path, item: dict[str, Any], n: int | None) -> None:
    """Copy a file into the archive, a piece at a time: what a cbz holds beside its pages may be large."""
    info, digest = _zip_info(item["filename"]), hashlib.sha256()
    try:
        with open(outputs / item["filename"], "rb") as file:
            info.file_size = os.fstat(file.fileno()).st_size
            with archive.open(info, "w") as entry:
                while chunk := file.read(storage.CHUNK_BYTES):
                    digest.update(chunk)
                    entry.write(chunk)
    except FileNotFoundError:
        digest = hashlib.sha256()
    if digest.hexdigest() != item["sha256"]:
        raise storage.OutputDamaged(item["filename"], n)


def prove_artifact(artifact: Path) -> tuple[dict[str, Any], str, int]:
    """(its own report, hex SHA-256, bytes) of an artifact that is whole: everything in it has the
    hash that the report names, and nothing else is in it. Raises ArtifactDamaged."""
    try:
        with storage.open_regular(artifact) as file:
            digest, size_bytes = storage.sha256_of(file), file.tell()
            with zipfile.ZipFile(file) as archive:
                report = read_report(archive)
                fault = next(faults_of(archive, report), None)
                if archive.namelist() != entry_order(report):
                    fault = fault or (artifact.name, "does not hold what its report lists, in its order")
    except (*inputs.ENTRY_ERRORS, TypeError, KeyError, AttributeError) as error:
        raise storage.ArtifactDamaged(f"{artifact.name} can't be read: {error}") from error
    if fault:
        raise storage.ArtifactDamaged(f"{artifact.name}: {fault[0]} {fault[1]}")
    return report, digest, size_bytes


def read_report(archive: zipfile.ZipFile) -> dict[str, Any]:
    """An artifact's own report. Raises KeyError where there is none, ValueError, ENTRY_ERRORS."""
    name = storage.EPUB_REPORT_NAME if storage.EPUB_REPORT_NAME in archive.NameToInfo else storage.REPORT_NAME
    with inputs.open_member(archive, archive.getinfo(name)) as file:
        data = file.read(storage.REPORT_BYTES + 1)
    report = json.loads(data) if len(data) <= storage.REPORT_BYTES else None
    if not isinstance(report, dict) or not isinstance(report.get("items"), list):
        raise ValueError(f"its {storage.REPORT_NAME} is not a report")
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
            with inputs.open_member(archive, archive.getinfo(name)) as file:
                found = storage.sha256_of(file)
        except inputs.ENTRY_ERRORS as error:
            yield name, f"can't be read: {storage.reason_of(error)}"
            continue
        if found != item["sha256"]:
            yield name, f"is not what was packed: its SHA-256 is {found}, not {item['sha256']}"
    for name, times in there.items():
        if name not in listed and name != report_entry(report):
            yield name, "is not in the report"
        elif times > 1:
            yield name, f"is there {times} times"


def source_of(item: Mapping[str, Any]) -> tuple[str, str]:
    """(name, SHA-256) of what a report's page was made of; the command line's reports say it in two keys."""
    source = item["source"]
    if isinstance(source, dict):
        return str(source["filename"]), str(source["sha256"])
    return str(source), str(item["sourceSha256"])


def _zip_info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
    return info


def remove_strays(outputs: Path, wanted: set[str]) -> None:
    """Leave in a job's own folder just what its report lists (a page once carried may
    lie there under its old suffix after a resume)."""
    # Some disks keep a folder's old case, or decompose names: pages would pass for strays.
    kept = {storage.fold(name): outputs / name for name in wanted}
    for folder, _, files in os.walk(outputs):
        for name in files:
            path = Path(folder, name)
            page = kept.get(storage.fold(path.relative_to(outputs).as_posix()))
            if page is None or (page.exists() and not page.samefile(path)):
                with contextlib.suppress(PermissionError):  # on Windows, while it is read; it harms nothing
                    storage.remove_file(path)
