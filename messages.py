"""What the dispatcher and a worker say to each other over the pipe; neither may import the other.

Map: settings - tasks (to the worker) - events (from the worker)
Rule: plain frozen records that unpickle without torch. Small ones: an event must fit the
pipe's buffer, so that no process can block another by dying in the middle of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------- settings
DIED_TWICE = "the worker process died twice while computing this page"  # why it is taken over as it is
AUTO_MODEL = "auto"  # in place of a model's name: the page decides (upscaling.choose_model)


# What the pages of an artifact may be, where it isn't just any file.
CONTAINER_FORMATS = {"epub": ("jpg", "png", "webp"), "pdf": ("jpg", "png")}


@dataclass(frozen=True, slots=True)
class Params:
    """The settings of a job, as accepted (README: POST /jobs)."""

    scale: int = 2
    model: str = "RealESRGAN_x4plus_anime_6B"
    denoise: str = "medium"
    output_format: str = "jpg"
    jpeg_quality: int = 95
    tile_size: int | None = None  # input pixels of a window's core
    tile_pad: int | None = None  # input pixels of halo
    batch_size: int | None = None  # windows computed at once, at most
    device: str = "auto"
    color: str = "auto"  # "gray": one channel always; "keep": as many as the file has
    target_width: int | None = None  # output pixels, in place of scale; with both the page fits in
    target_height: int | None = None
    spreads: str = "keep"  # of double pages: "split" into their halves, "rotate" (spreads.py)
    reading_direction: str = "rtl"
    profile: str | None = None  # of screens.SCREENS: its pixels and greys
    max_page_bytes: int | None = None  # see budgets.py
    max_artifact_bytes: int | None = None
    reduction: str = "auto"  # or "lanczos" (upstream's), "area" (see reduces_in_light)
    container: str = "zip"  # of the artifact: "cbz" (containers.py), "epub", "pdf" (books.py)
    split: str = "none"  # "volumes": each volume in the input became a job (volumes.py)

    @property
    def has_target(self) -> bool:
        """Whether the page's size is asked for in pixels, not as a factor."""
        return self.target_width is not None or self.target_height is not None

    @property
    def reduces_in_light(self) -> bool:
        """Whether the network's result is averaged in linear light: "area", and targets' default."""
        return self.reduction == "area" or (self.reduction == "auto" and self.has_target)


# What a field of Params may be.
CHOICES = {
    "denoise": ("low", "medium", "high"),
    "output_format": ("jpg", "png", "webp", "avif"),
    "device": ("auto", "cuda", "cpu"),
    "color": ("auto", "gray", "keep"),
    "reduction": ("auto", "lanczos", "area"),
    "container": ("zip", "cbz", "epub", "pdf"),
    "split": ("none", "volumes"),
    "spreads": ("keep", "split", "rotate"),
    "reading_direction": ("rtl", "ltr"),
}

RANGES = {  # name: (least, most, may be null)
    "scale": (1, 4, False),
    "jpeg_quality": (1, 100, False),
    "tile_size": (32, 1024, True),
    "tile_pad": (0, 128, True),
    "batch_size": (1, 16, True),
    "target_width": (16, 65_500, True),
    "target_height": (16, 65_500, True),
    "max_page_bytes": (4096, 1 << 40, True),
    "max_artifact_bytes": (1 << 16, 1 << 40, True),
}

OF_VOLUMES = ("container", "split")  # nothing that a single page (POST /pages) could have
LATER = (*OF_VOLUMES, "spreads", "reading_direction", "profile", "max_page_bytes", "max_artifact_bytes")


def reported(params: Params) -> dict[str, Any]:
    """Params as reports show them. A field of LATER is left out while it has its default: a job that does
    not use it gets byte for byte the report that it got before that field was there."""
    values, usual = asdict(params), Params()
    return {
        name: value
        for name, value in values.items()
        if name not in LATER or value != getattr(usual, name)
    }


@dataclass(frozen=True, slots=True)
class Plan:
    """How a job's pages are computed; stored with the job so that every attempt agrees."""

    model: str
    weights_sha256: str
    weights_source: str
    device: str
    precision: str
    engine: str
    tile: int  # input pixels
    halo_px: int
    batch: int
    convolutions: str = "direct"  # of rolling.KINDS; others are for fp32 on a processor
    machine: str = ""  # the processor or card, and libraries: another's pages may differ, and say so
    choices: tuple[Plan, ...] = ()  # with model "auto": one each, the page decides (upscaling.choose_model)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Plan:
        """From asdict()'s values."""
        return cls(**values | {"choices": tuple(map(cls.of, values.get("choices", ())))})


def camel(name: str) -> str:
    """snake_case -> camelCase."""
    head, *tail = name.split("_")
    return head + "".join(map(str.capitalize, tail))


def misspelt(names: Iterable[str]) -> str | None:
    """What is wrong with the first of these keys that params have not: a request's are passed over, but
    who sets them for many volumes, or by hand, has only mistyped them."""
    known = [name for field in fields(Params) for name in (field.name, camel(field.name))]
    for name in names:
        if name not in known:
            import difflib  # every process imports this file

            near = difflib.get_close_matches(name, known, 1)
            return f"params have no {name!r}" + (f"; is {near[0]!r} meant?" if near else "")
    return None


@dataclass(frozen=True, slots=True)
class Limits:
    """What an input may hold; checked before a byte of it is written. See setting_name."""

    entries: int = 20_000
    pages: int = 20_000
    entry_bytes: int = 512 << 20
    total_bytes: int = 16 << 30
    ratio: int = 200  # of the whole archive; a blank bitmap alone may pass 1000:1
    ratio_from_bytes: int = 64 << 20  # below this total no ratio can hurt
    depth: int = 32
    path_bytes: int = 4096
    page_pixels: int = 100_000_000
    output_pixels: int = 1_200_000_000


CARD_LOST_STATUS = 17  # with which a worker ends whose card answers it no longer


def setting_name(limit: str) -> str:
    """The environment variable that sets a field of Limits, for people to raise it."""
    return f"REICHAN_MAX_{limit.upper()}"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """What the person running the service chose for every worker."""

    device: str = "auto"
    precision: str = "auto"
    engine: str = "native"
    model_root: Path = Path("models")
    sandbox: bool = True  # whether workers give up rights they don't need
    log: str = "text"  # of logs.FORMS
    cache_root: Path | None = None  # of cache.PageCache; None: every page is computed
    cache_program: str = ""  # its program where pages are not computed by this worker, see PageCache
    convolutions: str = "direct"  # see Plan; "auto": what takes the least time, measured


@dataclass(frozen=True, slots=True)
class Workload:
    """What a volume asks of a machine: its pages' sizes, as their headers and a job's params say."""

    pages: int = 0  # that will be computed
    input_pixels: int = 0  # of those, as of the three below
    output_pixels: int = 0
    source_bytes: int = 0
    carried_bytes: int = 0  # of pages that are large enough already, or lie in the cache
    other_bytes: int = 0  # of the other files, where a cbz holds them
    cached: int = 0  # pages that the cache holds, as it was known before the first was computed


Crop = tuple[int, int, int, int]  # x, y, width, height; input pixels of the page as it is looked at


# ---------------------------------------------------------------- tasks
@dataclass(frozen=True, slots=True)
class Probe:
    """Task: tell devices and usable weights."""


@dataclass(frozen=True, slots=True)
class SourcePage:
    """One page of the input, copied to staging."""

    name: str  # as in the input, "/" between folders, valid Unicode
    staged: str  # file name in the staging folder
    sha256: str
    size_bytes: int
    error: str | None = None  # why the staged bytes are not the whole page


@dataclass(frozen=True, slots=True)
class KnownPage:
    """What the job table already holds of a page, for an attempt that goes on."""

    source: SourcePage
    output: str | None  # relative to the job's output folder; None while pending
    output_sha256: str | None


@dataclass(frozen=True, slots=True)
class Stage:
    """Task: make the working copy, list its pages, settle the plan."""

    job_id: str
    attempt: int
    source: Path
    staging: Path
    outputs: Path
    params: Params
    plan: Plan | None
    known: tuple[KnownPage, ...]
    manifest: dict[str, Any] | None
    limits: Limits
    settled: Plan | None = None  # by another machine (cluster.py), which computes; None: by this worker
    reserve_bytes: int | None = None  # that must stay free beside what the job needs; None: unchecked


@dataclass(frozen=True, slots=True)
class Settle:
    """Task: settle a job's plan, for a machine that stages it and computes nothing. plan: its last one."""

    job_id: str
    attempt: int
    params: Params
    plan: Plan | None


@dataclass(frozen=True, slots=True)
class ComputePage:
    """Task: one page from staging to outputs. `carry` says why it is only copied.

    Without a plan it is a page outside any job: job_id is the key of the question (Dispatcher.ask),
    the worker settles the plan, and PageDone, PageFailed or TaskFailed is the answer.
    """

    job_id: str
    attempt: int
    n: int
    source: Path
    target_stem: Path  # without the suffix: a carried page has that of its content
    params: Params
    plan: Plan | None
    limits: Limits
    carry: str | None = None
    most_bytes: int | None = None  # its share of the artifact, see budgets.shares
    crop: Crop | None = None  # only this part of the page


@dataclass(frozen=True, slots=True)
class Pack:
    """Task: prove the pages on disk and zip them beside their report."""

    job_id: str
    attempt: int
    outputs: Path
    artifact: Path
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Preview:
    """Task: a reduced image for the web page, or a part of a page as it is."""

    key: str
    source: Path
    target: Path
    width: int
    limits: Limits
    crop: Crop | None = None  # then a PNG of it, not reduced


@dataclass(frozen=True, slots=True)
class Survey:
    """Task: look through an input in incoming/, and copy one of its pages."""

    key: str
    source: Path
    n: int  # the page, from 1; 0: the middle one, since a cover is like no other page
    folder: Path  # for the copy
    variants: tuple[Params, ...]  # each is told its Workload
    limits: Limits


@dataclass(frozen=True, slots=True)
class Cancel:
    """Not a task: stop what is under way for this attempt, say nothing more of it."""

    job_id: str
    attempt: int


Task = Probe | Stage | Settle | ComputePage | Pack | Preview | Survey


# ---------------------------------------------------------------- events
@dataclass(frozen=True, slots=True)
class Ready:
    """Event: the worker is up and takes this many pages at once."""

    capacity: int
    devices: int = 1  # of the kind it computes on, in its machine


@dataclass(frozen=True, slots=True)
class BootFailed:
    """Event, the last one: the worker's imports failed."""

    detail: str


@dataclass(frozen=True, slots=True)
class Beat:
    """Event, every second: alive; the present tile took busy_s and may take limit_s."""

    busy_s: float
    limit_s: float
    card: tuple[str, int, int] | None = None  # its device; bytes in use there, by anyone, and in all


@dataclass(frozen=True, slots=True)
class Probed:
    """Event: answer to Probe; plain JSON values."""

    devices: list[dict[str, Any]]
    models: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Settled:
    """Event: answer to Settle."""

    job_id: str
    attempt: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class StagedPage:
    """Event: a page was staged; one event each, so that no message outgrows a pipe."""

    job_id: str
    attempt: int
    page: SourcePage
    output_ok: bool  # its recorded output was found on disk, hash and all


@dataclass(frozen=True, slots=True)
class Staged:
    """Event: staging is complete."""

    job_id: str
    attempt: int
    plan: Plan
    left_out: int | None  # None: an earlier attempt counted
    reconciliation: dict[str, Any] | None
    workload: Workload | None = None  # of a first attempt


@dataclass(frozen=True, slots=True)
class PageDone:
    """Event: the page is on disk under its final name, upscaled or carried as it was.

    error says why it had to be carried; without one it was large enough already.
    """

    job_id: str
    attempt: int
    n: int
    output: str  # file name, to be joined to the folder of target_stem
    sha256: str
    size_bytes: int
    width: int
    height: int
    mode: str  # "L", "RGB", "RGBA"; "" for a carried page that no decoder reads
    seconds: float
    error: str | None = None
    deviation: str | None = None  # how its computation differed from the plan
    color_spread: float | None = None  # see pages.colour_spread; None where nothing decoded it
    carried: bool = False
    model: str | None = None  # that computed it
    cache_key: str | None = None  # under which the cache holds it
    cached: bool = False  # it was taken from there
    input_pixels: int = 0  # that went through the network
    device_s: float = 0.0  # of seconds, those on the device
    plan: Plan | None = None  # of a page outside any job: what the worker settled


@dataclass(frozen=True, slots=True)
class PageFailed:
    """Event: the page could not be computed; nothing was written."""

    job_id: str
    attempt: int
    n: int
    error: str
    step: str  # "decode", "infer", "reduce", "encode"; "carry": even the original could not be taken over


@dataclass(frozen=True, slots=True)
class Packed:
    """Event: the artifact is in place."""

    job_id: str
    attempt: int
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """Event: the job can't go on (bad input, bad weights, no disk).

    n: the task's page, 0 for stage and pack. page: a finished one that is damaged on disk.
    """

    job_id: str
    attempt: int
    n: int
    code: str
    detail: str
    trace: str | None = None
    page: int | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """Event: a cancelled task was given up; n as in TaskFailed."""

    job_id: str
    attempt: int
    n: int


@dataclass(frozen=True, slots=True)
class Previewed:
    """Event: the preview is in place, or error says why not."""

    key: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Surveyed:
    """Event: answer to Survey; where there is an error, it is all."""

    key: str
    file: str = ""  # name of the copy, by its content's hash
    name: str = ""  # of the page in the input
    n: int = 0
    count: int = 0  # pages in the input
    workloads: tuple[Workload, ...] = ()  # one each for Survey.variants
    error: str | None = None


def to_json(record: Any) -> str:
    """A record as compact JSON, for the job table."""
    return json.dumps(asdict(record), ensure_ascii=False, separators=(",", ":"))
