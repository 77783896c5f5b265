"""`python storage.py verify ARTIFACT [--against INPUT]`: prove a finished volume without the service.

Map: main - an artifact against its own report - a report against an input
Rule: changes nothing, asks nobody, and needs the standard library alone (of an input that is a RAR, 7z or
PDF, what formats.py needs). What it can't prove it names.
Runs in: a terminal.

    artifact --every hash--> its report --every source's hash--> folder or archive it was made of
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import storage
from files import artifacts, inputs
from files.inputs import Entry
from messages import Limits


class NotProvable(storage.StorageError):
    """An artifact of a kind that holds its report, and not its pages' files."""


PROVED, WRONG, UNUSABLE = 0, 1, 2  # exit statuses
# Nothing is written, and all is read in pieces: what a service with higher limits took is proved too.
ANY = Limits(
    *(1 << 62,) * 6, depth=Limits().depth, path_bytes=1 << 30, page_pixels=1 << 62, output_pixels=1 << 62
)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all is proved; 1: something is not as its report says, a line each; 2: it can't be looked at."""
    flags = argparse.ArgumentParser(prog="storage.py", description="Prove a finished volume, offline.")
    command = flags.add_subparsers(required=True, metavar="verify").add_parser("verify")
    kinds = "a .zip, .cbz or .epub of the service's"
    command.add_argument("artifact", metavar="ARTIFACT", type=Path, help=kinds)
    command.add_argument("--against", metavar="INPUT", type=Path, help="the folder or archive it was made of")
    given = flags.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return verify(given.artifact, given.against)
    except (OSError, storage.StorageError) as error:
        print(f"storage.py: {getattr(error, 'detail', None) or error}", file=sys.stderr)
        return UNUSABLE


def verify(artifact: Path, against: Path | None) -> int:
    """Print what is wrong, then the result. Raises OSError, storage.StorageError for what isn't there."""
    if artifact.is_dir():
        raise NotProvable(f"{artifact} is a folder; what is proved is the artifact, a .zip, .cbz or .epub")
    faults = 0
    with storage.open_regular(artifact.resolve(strict=True)) as file:
        digest, size_bytes = storage.sha256_of(file), file.tell()
        file.seek(0)
        if storage.sniff(file.read(16)) == "pdf":
            print(f"sha256 {digest} of {artifact.name}, {size_bytes} bytes")
            raise NotProvable(
                f"{artifact.name} is a PDF, whose pages this can't prove one by one; all of it is as it was"
                " made if that sha256 is the job's artifactHash"
            )
        try:
            with zipfile.ZipFile(file) as archive:
                report = artifacts.read_report(archive)
                for name, fault in artifact_faults(archive, report):
                    _say("WRONG", name, fault)
                    faults += 1
            members = artifacts.members_of(report)
            sources = sources_of(report)
        except (*inputs.ENTRY_ERRORS, TypeError, KeyError, AttributeError) as error:
            _say("WRONG", artifact.name, f"is no artifact with a report: {storage.reason_of(error)}")
            return WRONG
    checked = f"{len(report['items'])} pages"
    if len(members) > len(report["items"]):
        checked += f", {len(members) - len(report['items'])} other files"
    if against is not None:
        source = against.resolve()
        with inputs.opened(source, ANY) as opened:
            for name, fault in source_faults(source, opened, sources):
                _say("SOURCE", name, fault)
                faults += 1
        checked += f", against {against.name}"
    print(f"sha256 {digest} of {artifact.name}, {size_bytes} bytes")
    print(f"{faults} faults ({checked})" if faults else f"all proved ({checked})")
    return WRONG if faults else PROVED


def _say(what: str, name: str, fault: str) -> None:
    """One line, whatever an archive's names hold."""
    print(storage.printable(f"{what:6} {name}: {fault}"))


# ---------------------------------------------------------------- an artifact against its own report
def artifact_faults(archive: zipfile.ZipFile, report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong with it); raises as artifacts.faults_of() does."""
    found = list(artifacts.faults_of(archive, report))
    yield from found
    names = Counter(item["filename"] for item in artifacts.members_of(report))
    for name in (name for name, times in names.items() if times > 1):
        yield name, "is in the report more than once"
    if not found and archive.namelist() != artifacts.entry_order(report):
        yield storage.REPORT_NAME, "lists the files in another order"


# ---------------------------------------------------------------- a report against an input
@dataclass(frozen=True, slots=True)
class Sources:
    """What a report says an artifact was made of."""

    expected: list[tuple[str, str]]  # name, SHA-256
    left_out: set[str] | None  # other files that are not in it; None: of a zip, whichever there are


def sources_of(report: dict[str, Any]) -> Sources:
    """Raises TypeError, KeyError, AttributeError where the report makes no sense."""
    others = [file for file in report.get("files", ()) if file["filename"]]
    expected = [artifacts.source_of(item) for item in (*_whole_scans(report["items"]), *others)]
    if "files" not in report:
        return Sources(expected, None)
    return Sources(expected, {file["source"]["filename"] for file in report["files"] if not file["filename"]})


def source_faults(
    source: Path, archive: inputs.Archive | None, sources: Sources
) -> Iterator[tuple[str, str]]:
    """(name in the input, how it differs from what the report says of it).

    Raises storage.InputUnusable's family.
    """
    from files import formats

    listing = inputs.list_input(source, ANY, archive)
    entries = list(listing.pages)
    if sources.left_out is not None:
        entries += [entry for entry in listing.others if _shown(entry) not in sources.left_out]
    there: defaultdict[str, list[str]] = defaultdict(list)
    with formats.opener(entries, archive, ANY) as open_entry:
        for entry in entries:
            there[_shown(entry)].append(_sha256_as_staged(entry, open_entry))
    # Of several entries of one name each may stand for one page: those that fit are taken first.
    missed = []
    for name, sha256 in sources.expected:
        if sha256 in there[name]:
            there[name].remove(sha256)
        else:
            missed.append((name, sha256))
    for name, sha256 in missed:
        if there[name]:
            yield name, f"differs: its SHA-256 is {there[name].pop()}, the report says {sha256}"
        else:
            yield name, f"is not in the input; the report says SHA-256 {sha256}"
    for name, left in there.items():
        for _ in left:
            yield name, "is in the input, and not in the report"


def _whole_scans(items: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The items, but one for the two halves of a double page, under its name (see spreads.py)."""
    for item in items:
        name, sha256 = artifacts.source_of(item)
        number = storage.half_number(name, item.get("deviation"))
        if number is None:
            yield item
        elif number == 1:
            stem, suffix = os.path.splitext(name)
            yield {"source": {"filename": stem[:-2] + suffix, "sha256": sha256}}


def _shown(entry: Entry) -> str:
    return entry.name.encode("utf-8", "replace").decode()


def _sha256_as_staged(entry: Entry, open_entry: Callable[[Entry], IO[bytes]]) -> str:
    """As the service took it: of a damaged entry, what could be read."""
    digest = hashlib.sha256()
    try:
        with open_entry(entry) as file:
            while chunk := file.read(storage.CHUNK_BYTES):
                digest.update(chunk)
    except inputs.ENTRY_ERRORS:
        pass
    return digest.hexdigest()
