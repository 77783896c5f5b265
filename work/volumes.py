"""Several volumes in one upload: which they are, and a job for each.

Map: find - submit
Rule: every page and archive belongs to exactly one volume, or nothing is submitted.
Runs in: http-* threads. Standard library only.

    series/v01/1.jpg, series/v02.cbz  --find-->  series/v01 (folder), series/v02.cbz (zip)
    all.zip: v01/1.jpg, v02.cbz       --find-->  all.zip/v01, all.zip/v02.cbz (zip), see inputs.located
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import storage
from files import inputs
from jobs import Job, JobTable
from messages import Limits
from storage import Layout
from work import submissions, uploads
from work.submissions import Submission

MOST = 1000  # jobs of one request
FILES = 500_000  # in a folder of volumes


# ---------------------------------------------------------------- find
@dataclass(frozen=True, slots=True)
class Item:
    """A page or an archive in an input."""

    parts: tuple[str, ...]  # of its name
    size_bytes: int
    is_archive: bool


@dataclass(frozen=True, slots=True)
class Volume:
    """What one job is to take."""

    parts: tuple[str, ...]  # of its path below the input; none: the input itself
    is_archive: bool
    sizes: list[tuple[str, int]]  # of its pages as far as they are known: name, bytes


def find(place: Path, limits: Limits) -> list[Volume]:
    """The volumes in a folder or archive, in natural order: what lies in the topmost folder that
    holds more than one thing. A folder is one with all below it, unless archives are.

    Raises storage.InputUnusable's family, also for a page beside volumes, storage.InputMissing.
    """
    with inputs.opened(place, limits) as archive:
        # What a folder holds in all is nothing to refuse: each volume is measured by itself.
        each = replace(limits, total_bytes=1 << 62, entries=max(limits.entries, FILES))
        listing = inputs.list_entries(place, limits if archive else each, archive)
    archives = [entry for entry in listing.others if uploads.is_archive_name(entry.name.rpartition("/")[2])]
    unfinished = storage.unfinished_of(entry.name for entry in listing.others)
    for entry in archives:
        if archive is None and storage.awaits(entry.name, unfinished):
            raise storage.InputUnusable(f"{entry.name[:200]!r} is still being received; try again then")
    items = [
        Item(tuple(entry.name.split("/")), inputs.entry_bytes(entry), entries is archives)
        for entries in (listing.pages, archives)
        for entry in entries
    ]
    if not items:
        raise storage.NoPages(f"{place.name} holds neither pages nor archives of pages")
    found = sorted(_volumes(items, ()), key=lambda volume: storage.natural_key("/".join(volume.parts)))
    if len(found) > MOST:
        raise storage.InputUnusable(f"{place.name} holds {len(found)} volumes; at most {MOST} go at once")
    return found


def _volumes(items: list[Item], above: tuple[str, ...]) -> Iterator[Volume]:
    """The volumes among what lies in one folder, `above`."""
    depth = len(above)
    folders: dict[str, list[Item]] = {}
    here = []
    for item in items:
        if len(item.parts) > depth + 1:
            folders.setdefault(item.parts[depth], []).append(item)
        else:
            here.append(item)
    if not here and len(folders) == 1:  # nothing but a cover around what matters
        ((name, below),) = folders.items()
        yield from _volumes(below, (*above, name))
        return
    page = next((item for item in here if not item.is_archive), None)
    if page and (folders or any(item.is_archive for item in here)):
        raise storage.InputUnusable(
            f"{'/'.join(page.parts)[:200]!r} lies beside volumes and belongs to none; move it into one"
        )
    if page:
        yield _volume_of(here, above)
        return
    for item in here:
        yield Volume(item.parts, True, [])
    for name, below in folders.items():
        if any(item.is_archive for item in below):
            yield from _volumes(below, (*above, name))
        else:
            yield _volume_of(below, (*above, name))


def _volume_of(pages: list[Item], parts: tuple[str, ...]) -> Volume:
    return Volume(parts, False, [(page.parts[-1], page.size_bytes) for page in pages])


def names_of(volumes: Sequence[Volume]) -> list[str]:
    """What to call them: their numbers where each has its own, else their names, else their paths."""
    paths = [
        (*volume.parts[:-1], os.path.splitext(volume.parts[-1])[0] if volume.is_archive else volume.parts[-1])
        for volume in volumes
    ]
    names = [parts[-1] for parts in paths]
    numbers = [match["number"] for match in map(storage.NUMBERED.fullmatch, names) if match]
    for shorter in (numbers, names):
        if len({*shorter}) == len(volumes):
            return [_as_text(name) for name in shorter]
    return [_as_text(" ".join(parts)) for parts in paths]


def _as_text(name: str) -> str:
    return name.strip()[: uploads.TITLE_CHARACTERS] or "_"


# ---------------------------------------------------------------- submit
def submit(
    table: JobTable,
    layout: Layout,
    wanted: Submission,
    key: str | None,
    body_hash: str,
    limits: Limits,
    reserve_bytes: int | None = None,
) -> list[Job]:
    """submissions.submit(), and where params.split asks for it a job for each volume: all, or none.

    Raises what that raises, and storage.InputUnusable's family.
    """
    if wanted.params.split == "none":
        return [submissions.submit(table, layout, wanted, key, body_hash, limits, reserve_bytes)]
    return submissions.submit_all(
        table, key, body_hash, lambda: list(_submissions(layout, wanted, limits, reserve_bytes))
    )


def _submissions(
    layout: Layout, wanted: Submission, limits: Limits, reserve_bytes: int | None
) -> Iterator[Submission]:
    path = submissions.checked_input(layout, wanted.input_path, wanted.input_type, limits)
    found = find(layout.incoming / path, limits)
    names = names_of(found) if len(found) > 1 else [wanted.volume]
    for volume, name in zip(found, names, strict=True):
        if reserve_bytes is not None:
            inputs.check_room(layout.root, volume.sizes, (), wanted.params, reserve_bytes)
        place = inputs.resolve_incoming(layout, "/".join(("incoming", path, *volume.parts)))
        kind = "zip" if volume.is_archive else wanted.input_type
        below = place.relative_to(layout.incoming).as_posix()
        yield replace(wanted, volume=name, input_type=kind, input_path=below)
