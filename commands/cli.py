"""One volume or image without the service: `python infer.py IN OUT`.

Map: arguments - one image - a volume - its record - progress
Rule: the service's own page pipeline; nothing that exists is overwritten, and what was
finished before an interruption is not computed again.
Runs in: a terminal (it loads torch).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import settings
import storage
from engine import budgets, devices, pages, rolling, spreads, upscaling
from files import artifacts, books, containers, inputs
from messages import CHOICES, RANGES, EngineChoice, Limits, Params, Plan, SourcePage, reported

DEFAULTS = Params()
CONTAINERS = {".zip": "zip", ".cbz": "cbz", ".epub": "epub", ".pdf": "pdf"}  # that are written
STAGING = ".staging"  # in OUT.partial: the pages as they came
LOCK = ".infer.lock"  # there, while a command is at work
JOURNAL = ".pages.jsonl"  # there, a line for each page that was done since the record was written
MARKS = (STAGING, LOCK, storage.REPORT_NAME, containers.INDEX)  # one of them is in every OUT.partial of ours
FORMATS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp", ".avif": "avif"}


class Usage(Exception):
    """A command that can't be carried out; says what to do instead."""


# ---------------------------------------------------------------- arguments
def parser() -> argparse.ArgumentParser:
    """Every flag, with what the service would take."""
    flags = argparse.ArgumentParser(prog="infer.py", description="Upscale one volume or image.")
    flags.add_argument("source", metavar="IN", type=Path, help="an image, a folder or an archive")
    kinds = ", ".join(CONTAINERS)
    flags.add_argument("target", metavar="OUT", type=Path, help=f"an image; a folder, or {kinds}")
    add = flags.add_argument
    bundled = f"{upscaling.LINE_ART_MODEL}, {upscaling.SCREENTONE_MODEL}, auto (by the page), your own"
    add("--model", default=DEFAULTS.model, help=f"{bundled} (%(default)s)")
    add("--model-root", type=Path, default=Path("models"), help="your own weights (%(default)s, here)")
    least, most, _ = RANGES["scale"]
    add("--scale", type=int, choices=range(least, most + 1), default=DEFAULTS.scale, help="(%(default)s)")
    add("--denoise", choices=CHOICES["denoise"], default=DEFAULTS.denoise, help="(%(default)s)")
    add("--format", choices=CHOICES["output_format"], help="jpg, or as OUT's suffix says")
    quality, of_lossy = DEFAULTS.jpeg_quality, "of JPEG, WebP and AVIF (%(default)s)"
    add("--quality", type=_within("jpeg_quality"), default=quality, metavar="1..100", help=of_lossy)
    add("--spreads", choices=CHOICES["spreads"], default=DEFAULTS.spreads, help="double pages (%(default)s)")
    direction = "of the halves, and in a book (%(default)s)"
    directions = CHOICES["reading_direction"]
    add("--reading-direction", choices=directions, default=DEFAULTS.reading_direction, help=direction)
    add("--max-page-bytes", type=_within("max_page_bytes"), metavar="BYTES", help="a page's, at most")
    add("--tile", type=_from_to(32, 65_536), metavar="PIXELS", help="of a tile, in the input")
    faster = "auto: reduced where it is native and near"
    add("--precision", choices=("auto", *upscaling.PRECISIONS), default="auto", help=faster)
    measured = "fp32 on a processor; auto: measured"
    add("--convolutions", choices=("auto", *rolling.KINDS), default="auto", help=measured)
    add("--device", choices=("auto", *devices.KINDS), default="auto", help="(%(default)s)")
    return flags


def _within(name: str) -> Any:
    """A number within the range of a field of Params."""
    low, high, _ = RANGES[name]
    return _from_to(low, high)


def _from_to(low: int, high: int) -> Any:
    def number(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return int(text)

    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every page was upscaled; 1: some were carried over as they are; 2: nothing could
    be done; 130: interrupted."""
    given = parser().parse_args(arguments)
    try:
        limits = settings.Given(os.environ).set_of(Limits, "MAX", settings.LIMIT_SETTINGS)
        check_places(given.source, given.target)
        params = params_of(given)
        choice = EngineChoice(
            given.device, given.precision, "native", given.model_root, convolutions=given.convolutions
        )
        engines = upscaling.Engines(choice, 0, lambda: None)
        plan = engines.plan(params)
        if is_image(given.source):
            upscale_image(given.source, given.target, params, plan, engines, limits)
            return 0
        return Volume(given.source, given.target, params, plan, engines, limits).run()
    except (Usage, settings.ConfigError, storage.StorageError, pages.PageError, OSError) as error:
        text = str(getattr(error, "detail", None) or error)
        print("infer.py: " + storage.printable(text), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the next page", file=sys.stderr)
        return 130
    # Around everything: by itself Python would end with 1, which says that OUT is there.
    except Exception:
        traceback.print_exc()
        print("infer.py: OUT is not written; the same command goes on with what is missing", file=sys.stderr)
        return 2


def is_image(source: Path) -> bool:
    """Whether IN is a single page: any file that isn't called an archive."""
    return source.is_file() and source.suffix.lower() not in storage.ARCHIVE_SUFFIXES


def check_places(source: Path, target: Path) -> None:
    """Raises Usage where OUT would touch the input, or anything that exists."""
    if not source.exists():
        raise Usage(f"{source} is not there")
    check_free(target)
    inside, outside = target.resolve(), source.resolve()
    if inside == outside or (source.is_dir() and outside in inside.parents):
        raise Usage(f"{target} lies in the input; choose a place outside of it")
    if is_image(source) and target.suffix.lower() not in FORMATS:
        raise Usage(f"{target} must end in one of {', '.join(FORMATS)}, since {source.name} is one page")
    if not is_image(source) and target.suffix.lower() in FORMATS:
        raise Usage(f"{target} can't be an image, since {source.name} is a volume")
    if target.suffix.lower() in storage.ARCHIVE_SUFFIXES - CONTAINERS.keys():
        kinds = ", ".join(CONTAINERS)
        raise Usage(f"{target} can't be written; OUT may be a folder, or end in one of {kinds}")
    if not is_image(source):
        check_work(source, work_of(target))


def check_free(target: Path) -> None:
    """Raises Usage where OUT is there."""
    if target.exists():
        raise Usage(f"{target} exists; remove it or choose another name")


def work_of(target: Path) -> Path:
    """Where a volume's pages are gathered until all of them are there."""
    return target.with_name(target.name + ".partial")


def check_work(source: Path, work: Path) -> None:
    """Raises Usage where gathering pages would write over the input, or empty what isn't ours."""
    inside, outside = source.resolve(), work.resolve()
    if inside == outside or outside in inside.parents:
        where = "is" if inside == outside else "lies in"
        raise Usage(f"{source} {where} {work}, where pages would be gathered; choose another OUT")
    is_free = not os.path.lexists(work) or (work.is_dir() and not os.listdir(work))
    if not is_free and not any((work / mark).exists() for mark in MARKS):
        why = "pages would be gathered there, and what it holds is not from an earlier try"
        raise Usage(f"{work} exists: {why}; rename it, or choose another OUT")


def params_of(given: argparse.Namespace) -> Params:
    """The job that the flags ask for. Raises Usage where OUT's suffix and --format disagree."""
    by_name = FORMATS.get(given.target.suffix.lower())
    if by_name and given.format and by_name != given.format:
        raise Usage(f"OUT is called {given.target.suffix}, --format says {given.format}; leave one out")
    params = Params(
        scale=given.scale,
        model=given.model,
        denoise=given.denoise,
        output_format=given.format or by_name or "jpg",
        jpeg_quality=given.quality,
        tile_size=given.tile,
        device=given.device,
        container=CONTAINERS.get(given.target.suffix.lower(), "zip"),
        spreads=given.spreads,
        reading_direction=given.reading_direction,
        max_page_bytes=given.max_page_bytes,
    )
    if why := books.refusal(params):
        raise Usage(why)
    return params


# ---------------------------------------------------------------- one image
def upscale_image(
    source: Path, target: Path, params: Params, plan: Plan, engines: upscaling.Engines, limits: Limits
) -> None:
    """Raises PageError; nothing is written then."""
    page = pages.decode_page(source.read_bytes(), params, limits)
    result, _ = engines.compute(page.pixels, params, upscaling.plan_for(plan, page.pixels))
    data, suffix, why = budgets.fitted(
        lambda tried: pages.encode(result, tried, page.profile), params, params.max_page_bytes
    )
    if FORMATS[suffix] != params.output_format:
        raise pages.PageError(f"{why}; call OUT {target.stem}{suffix}")
    storage.write_whole(target, data)
    if why:
        print(storage.printable(f"{target}: {why}"), file=sys.stderr)


# ---------------------------------------------------------------- a volume
def _untimed(plan: Plan, choice: EngineChoice) -> Plan:
    """The plan without what another measurement might settle otherwise, where it is left to measuring."""
    # "auto" settles for one of these: any other in an earlier report need not run here.
    measured = ("fp32", devices.KINDS[plan.device].fast_precision)
    return replace(
        plan,
        precision="" if choice.precision == "auto" and plan.precision in measured else plan.precision,
        convolutions="" if choice.convolutions == "auto" else plan.convolutions,
        choices=tuple(_untimed(one, choice) for one in plan.choices),
    )


def _anywhere(plan: Plan) -> Plan:
    """The plan without the machine that settled it."""
    return replace(plan, machine="", choices=tuple(map(_anywhere, plan.choices)))


def _changes(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what of now was otherwise."""
    return [f"{key} {was.get(key)}, now {now[key]}" for key in now if was.get(key) != now[key]]


def _differences(was: Plan, now: Plan) -> list[str]:
    """In words, what of a plan, and of those that it chooses among, was otherwise."""
    told = _changes(asdict(replace(was, choices=())), asdict(replace(now, choices=())))
    if len(was.choices) != len(now.choices):
        told.append("other models to choose from")
    for one, other in zip(was.choices, now.choices, strict=False):
        told += [f"{other.model}: {each}" for each in _differences(one, other)]
    return told


@contextlib.contextmanager
def _its_own_failure() -> Iterator[None]:
    """Whatever a page does to a decoder or a driver is that page's PageError. Raises Usage where the card is
    lost."""
    try:
        yield
    except (pages.PageError, storage.StorageError, OSError):
        raise
    except Exception as error:
        if devices.card_is_lost(0):
            raise Usage("the card no longer answers; the same command goes on once it does") from error
        raise pages.PageError(f"{type(error).__name__}: {error}") from error


@dataclass(slots=True)
class Volume:
    """A volume on its way. Its finished pages lie in OUT.partial until all of them are."""

    source: Path
    target: Path
    params: Params
    plan: Plan
    engines: upscaling.Engines
    limits: Limits
    items: list[dict[str, Any]] = field(default_factory=list)
    # Output path without suffix -> item of an earlier try, of pages that this one has not reached.
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Where pages are gathered."""
        return work_of(self.target)

    def run(self) -> int:
        """Compute what is missing, then put OUT in place; see main for the status."""
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            with self._locked():
                check_free(self.target)  # another command may have ended meanwhile
                self._gather()
                self._pack()
            self._put_in_place()
            return int(any(item["error"] for item in self.items))
        finally:
            self._remove_empty()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Two commands of one OUT would mix their pages. Raises Usage."""
        place = self.work / LOCK
        file = open(place, "a+b")
        try:
            storage.lock_file(file)
        except OSError as error:  # or a file system without locks, as some network shares: it goes on
            if error.errno in storage.HELD:
                file.close()
                raise Usage(f"another infer.py is at work on {self.target}") from None
        try:
            yield
        finally:
            file.close()
            with contextlib.suppress(OSError):
                place.unlink()

    def _remove_empty(self) -> None:
        """Of a folder with nothing in it nothing is to be gone on with."""
        with contextlib.suppress(OSError):
            if os.listdir(self.work) == [STAGING]:
                (self.work / STAGING).rmdir()
            self.work.rmdir()

    def _gather(self) -> None:
        """Have each page's result in OUT.partial, and on record. Raises Usage where OUT would be useless."""
        staging = self.work / STAGING
        is_folder = self.source.is_dir()  # asked now: a disk that is gone is none
        self.earlier = self._known()
        sources = self._staged(staging)
        stems = storage.output_stems([page.name for page in sources])
        print(f"{self.plan.model} on {self.plan.device}, {self.plan.precision}", file=sys.stderr)
        progress = Progress(len(sources))
        unread: list[SourcePage] = []
        # One page is encoded and written while the next is computed.
        before: Future[dict[str, Any]] | None = None
        with self._journal() as journal, ThreadPoolExecutor(1, "encode") as encoder:
            try:
                for page, stem in zip(sources, stems, strict=True):
                    item = self.earlier.get(stem)
                    if page.error and (is_folder or item):
                        unread.append(page)  # what an earlier try made of it stays
                        continue
                    if item and self._still_done(item, page):
                        self._count(before, progress)
                        before = None
                        self.items.append(item)
                        progress.skip()
                    else:
                        computed = self._compute(staging / page.staged, page)
                        self._count(before, progress)
                        values = (page, staging / page.staged, stem, *computed)
                        before = encoder.submit(self._write_down, journal, *values)
                    self.earlier.pop(stem, None)
            finally:
                self._count(before, progress)
        shutil.rmtree(staging, ignore_errors=True)  # Windows may keep a file a moment; see _put_in_place
        if unread:
            raise Usage(
                f"{len(unread)} of {len(sources)} pages could not be read, the first is {unread[0].name}: "
                f"{unread[0].error}. The others wait in {self.work}: see to those, or take them out of "
                f"{self.source}, and give the same command again"
            )
        if all(item["error"] for item in self.items):
            raise Usage(f"no page could be upscaled; the first: {self.items[0]['error']}")

    def _staged(self, staging: Path) -> list[SourcePage]:
        """The pages as they came, copied; beside them what else a cbz holds."""
        staging.mkdir(parents=True, exist_ok=True)  # first, being a mark: what follows may be interrupted
        if self.params.container == "cbz":
            collections.deque(containers.keep(self.source, self.work, self.limits), maxlen=0)
        staged = inputs.stage_input(self.source, staging, self.limits)
        each = spreads.divided(staged, staging, self.params, self.limits)
        return [page for page in each if isinstance(page, SourcePage)]

    def _compute(self, path: Path, page: SourcePage) -> tuple[pages.Decoded | None, str | None, str | None]:
        """(the page upscaled, deviation, error). Raises Usage where no other page would fare better."""
        try:
            if page.error:
                raise pages.PageError(page.error)
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != page.sha256:
                raise Usage(f"{path} is not as it was written: another program is at work there")
            with _its_own_failure():
                read = pages.decode_page(data, self.params, self.limits)
                read = replace(read, pixels=spreads.taken(read.pixels, storage.mark_of(page.staged)))
                plan = upscaling.plan_for(self.plan, read.pixels)
                result, deviation = self.engines.compute(read.pixels, self.params, plan)
                return replace(read, pixels=result), deviation, None
        except pages.PageError as error:
            return None, None, str(error)

    def _write(
        self,
        page: SourcePage,
        path: Path,
        stem: str,
        done: pages.Decoded | None,
        deviation: str | None,
        error: str | None,
    ) -> dict[str, Any]:
        data = path.read_bytes()
        suffix = pages.kept_suffix(data, path.suffix)
        if done is not None:
            try:
                with _its_own_failure():
                    data, suffix, other = budgets.fitted(
                        lambda params: pages.encode(done.pixels, params, done.profile),
                        self.params,
                        self.params.max_page_bytes,
                    )
                elsewhere = self.engines.elsewhere(self.plan)
                deviations = (storage.part_of(path.name), deviation, other, elsewhere)
                deviation = "; ".join(filter(None, deviations)) or None
            except pages.PageError as problem:
                error = str(problem)
        if error:
            half = None
            with contextlib.suppress(pages.PageError), _its_own_failure():
                half = spreads.half_of(data, storage.mark_of(path.name), self.limits)
            data, suffix = half or (data, suffix)
            deviation = storage.part_of(path.name) if half else None
        height, width = done.pixels.shape[:2] if done is not None and not error else self._size_of(data)
        digest = storage.write_whole(self.work / (stem + suffix), data)
        return {
            "filename": stem + suffix,
            "sha256": digest,
            "bytes": len(data),
            "width": width,
            "height": height,
            "source": page.name,
            "sourceSha256": page.sha256,
            "error": error,
            "deviation": deviation,
        }

    def _size_of(self, data: bytes) -> tuple[int, int]:
        """(height, width) of a page that stays as it was; zeros where nothing decodes it."""
        try:
            with _its_own_failure():
                height, width = pages.decode(data, 1, self.limits).shape[:2]
                return height, width
        except pages.PageError:
            return 0, 0

    # ------------------------------------------------------------ its record
    def _chosen(self) -> dict[str, str]:
        """What was asked for of that which "auto" leaves to measuring."""
        return {"precision": self.engines.choice.precision, "convolutions": self.engines.choice.convolutions}

    def _report(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "params": reported(self.params),
            "chosen": self._chosen(),
            "plan": asdict(self.plan),
            "items": items,
        }

    def _known(self) -> dict[str, dict[str, Any]]:
        """Output path without suffix -> item of a page that an earlier try upscaled, by whose plan this one
        goes on. Raises Usage where it would compute otherwise: what is done would be lost."""
        record = self.work / storage.REPORT_NAME
        if not record.exists():
            return {}
        data = record.read_bytes()
        try:
            report = json.loads(data)
            earlier, chosen = Plan.of(report["plan"]), report.get("chosen")
            asked = asdict(DEFAULTS) | report["params"]
            items = [*report["items"], *self._journaled()]
            found = {os.path.splitext(item["filename"])[0]: item for item in items}
        except (ValueError, KeyError, TypeError) as error:
            why = f"{record} can't be understood, so nothing in {self.work} can be gone on with"
            raise Usage(f"{why}: remove that folder to begin anew, or choose another OUT") from error
        found = {stem: item for stem, item in found.items() if not item.get("error")}
        other = _changes(asked, asdict(self.params)) or self._otherwise(earlier, chosen)
        if found and other:
            raise Usage(
                f"{self.work} holds {len(found)} pages made otherwise ({'; '.join(other)}): give the command "
                "as it was then, or remove that folder to begin anew"
            )
        self.plan = earlier if found else self.plan
        return found

    def _journaled(self) -> list[Any]:
        """The journal's items, as far as it is whole."""
        items: list[Any] = []
        with contextlib.suppress(FileNotFoundError, ValueError):  # the last line may be torn
            for line in (self.work / JOURNAL).read_bytes().splitlines():
                items.append(json.loads(line))
        return items

    @contextlib.contextmanager
    def _journal(self) -> Iterator[BinaryIO]:
        """The record as it was found, and an empty journal for what is done from now on: a page costs a line,
        however many there are."""
        report = self._report([*self.earlier.values()])
        storage.write_whole(self.work / storage.REPORT_NAME, artifacts.report_bytes(report))
        with open(self.work / JOURNAL, "wb") as journal:
            yield journal

    def _otherwise(self, earlier: Plan, chosen: object) -> list[str]:
        """In what this machine would not compute as planned then. chosen: see _chosen, then."""
        choice, was, now = self.engines.choice, _anywhere(earlier), _anywhere(self.plan)
        # What was measured then, by this machine as it is, holds for the volume.
        is_measured = earlier.machine == self.plan.machine and chosen == self._chosen()
        if is_measured and _untimed(was, choice) == _untimed(now, choice):
            return []
        return _differences(was, now)

    def _still_done(self, item: dict[str, Any], page: SourcePage) -> bool:
        is_its = (item.get("source"), item.get("sourceSha256")) == (page.name, page.sha256)
        return is_its and storage.file_is(self.work / item["filename"], item["sha256"])

    def _write_down(self, journal: BinaryIO, *values: Any) -> dict[str, Any]:
        """Write a page, see _write, then its line."""
        item = self._write(*values)
        journal.write(json.dumps(item).encode() + b"\n")
        journal.flush()
        os.fsync(journal.fileno())
        return item

    def _count(self, written: Future[dict[str, Any]] | None, progress: Progress) -> None:
        """A page is on disk, and in the journal."""
        if written:
            self.items.append(written.result())
            progress.page(self.items[-1])

    def _pack(self) -> None:
        """Make of OUT.partial what OUT is to be."""
        report = self._report(self.items)
        if self._is_archive():
            containers.pack(self.work, self.target, report)
            return
        storage.write_whole(self.work / storage.REPORT_NAME, artifacts.report_bytes(report))
        names = {item["filename"] for item in self.items}
        artifacts.remove_strays(self.work, {storage.REPORT_NAME, LOCK, *names})

    def _put_in_place(self) -> None:
        """Without the lock: Windows moves and removes nothing that is open."""
        if not self._is_archive():
            shutil.rmtree(self.work / STAGING, ignore_errors=True)
            storage.patiently(os.replace, self.work, self.target)
            return
        try:
            storage.patiently(shutil.rmtree, self.work)
        except OSError as error:  # the volume is there, and whole
            print(f"{self.work} is not needed any more, and stays: {error}", file=sys.stderr)

    def _is_archive(self) -> bool:
        return self.target.suffix.lower() in CONTAINERS


# ---------------------------------------------------------------- progress
class Progress:
    """One line that moves in a terminal, one line a page elsewhere. On stderr."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.computed = total, 0, 0
        self.started = time.monotonic()

    def skip(self) -> None:
        """A page was finished by an earlier run; looking at it tells nothing of how long others take."""
        self.done += 1
        if not self.computed:
            self.started = time.monotonic()

    def page(self, item: dict[str, Any]) -> None:
        """A page is finished now."""
        self.done += 1
        self.computed += 1
        rate = self.computed / max(time.monotonic() - self.started, 1e-3)
        left_s = int((self.total - self.done) / rate)
        left = f"{left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02}"
        line = (
            f"[{self.done}/{self.total}] {self.done / self.total:4.0%} {60 * rate:.1f} pages/min ETA {left}"
        )
        live = sys.stderr.isatty()
        if item["error"]:
            kept = f"{line} {item['source']}: kept as it is: {item['error']}"
            print(storage.printable(kept), file=sys.stderr)
        elif live:
            bar = "#" * (20 * self.done // self.total)
            end = "\n" if self.done == self.total else "\r"  # see submit.Line.show
            print(f"{line} [{bar:<20}]", end=end, file=sys.stderr, flush=True)
        else:
            print(storage.printable(f"{line} {item['source']}"), file=sys.stderr)
