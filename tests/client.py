"""The desktop client, from the contract alone: strict where its Rust parsers are strict.

Nothing of the service is imported. A status word that is not in the contract, 2.0 where an
integer belongs, null where a text belongs, a missing key: all of them raise WireError.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.client
import io
import json
import re
import time
import types
import typing
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

STALE_S = 15.0  # a running job that says nothing for so long counts as dead


class WireError(Exception):
    """An answer that the client's parsers don't take."""


# ---------------------------------------------------------------- what the contract names
@dataclass(frozen=True)
class Params:
    scale: int
    model: str
    denoise: Literal["low", "medium", "high"]
    output_format: Literal["jpg", "png", "webp"]
    jpeg_quality: int
    tile_size: int | None
    tile_pad: int | None
    batch_size: int | None
    device: Literal["auto", "cuda", "cpu"]


@dataclass(frozen=True)
class Metadata:
    title: str
    volume: str


@dataclass(frozen=True)
class JobState:
    job_id: str
    status: Literal["PENDING", "RUNNING", "SUCCESS", "FAILED"]
    processed: int
    total: int
    artifact_path: str | None
    artifact_hash: str | None
    message: str | None
    retries: int
    last_error: str | None
    params: Params
    metadata: Metadata
    cancelled: bool
    failed_pages: int
    current_page: str | None
    eta_seconds: float | None
    phase: Literal["queued", "staging", "inferring", "packing", "done"]
    seq: int
    created_at: str
    started_at: str | None
    finished_at: str | None

    @property
    def is_over(self) -> bool:
        return self.status in ("SUCCESS", "FAILED")


@dataclass(frozen=True)
class Accepted:
    job_id: str


@dataclass(frozen=True)
class JobList:
    jobs: list[JobState]
    next_cursor: str | None


@dataclass(frozen=True)
class Source:
    filename: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Item:
    filename: str
    sha256: str
    bytes: int
    width: int
    height: int
    mode: str
    source: Source
    status: Literal["upscaled", "carried"]
    error: str | None


@dataclass(frozen=True)
class Summary:
    processed: int
    failed: int


@dataclass(frozen=True)
class Report:
    schema_version: int
    job_id: str
    title: str
    volume: str
    processed: int
    total: int
    model: str
    outscale: int
    device: str
    precision: str
    engine: str
    weights_sha256: str
    params: Params
    summary: Summary
    items: list[Item]
    reconciliation: dict[str, Any] | None
    output_dir: str


@dataclass(frozen=True)
class FieldFault:
    field: str
    message: str


@dataclass(frozen=True)
class Problem:
    type: str
    title: str
    status: int
    detail: str
    code: str


SNAKE = {"keys": "snake_case"}  # metadata of fields that never were camelCase


def snake() -> Any:
    return dataclasses.field(metadata=SNAKE)


@dataclass(frozen=True)
class Model:
    name: str = snake()
    scale: int = snake()
    recommended_scale: int = snake()
    weights: str = snake()
    download_url: str = snake()
    available: bool = snake()
    source: str | None = snake()
    sha256: str | None = snake()


@dataclass(frozen=True)
class Health:
    status: str = snake()
    active_jobs: int = snake()
    registered_jobs: int = snake()
    default_model: str = snake()
    max_concurrency: int = snake()


# ---------------------------------------------------------------- parsing, as serde does it
def loads(text: str | bytes) -> Any:
    """Strict JSON. Raises WireError."""

    def refuse(name: str) -> None:
        raise WireError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise WireError(f"not JSON: {text[:80]!r}") from error


hints_of = functools.cache(typing.get_type_hints)


def parse(kind: Any, value: Any, where: str = "$") -> Any:
    """`value` as `kind`: unknown keys are ignored, anything else must fit. Raises WireError."""
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        rest = next(one for one in arguments if one is not types.NoneType)
        return None if value is None else parse(rest, value, where)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    if typing.get_origin(kind) is list and type(value) is list:
        return [parse(arguments[0], item, f"{where}[{n}]") for n, item in enumerate(value)]
    fits = {
        "int": type(value) is int and value >= 0,
        "float": type(value) in (int, float),
        "Literal": isinstance(value, str) and value in arguments,
        "dict": type(value) is dict,
    }.get(getattr(kind, "__name__", ""), type(value) is kind)
    if not fits:
        raise WireError(f"{where}: {value!r} is no {kind}")
    return value


def _record(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not dict:
        raise WireError(f"{where}: {value!r} is no object")
    values = {}
    for one in dataclasses.fields(kind):
        key = one.name if one.metadata == SNAKE else re.sub("_(.)", lambda m: m[1].upper(), one.name)
        if key not in value:
            raise WireError(f"{where}: {key} is missing")
        values[one.name] = parse(hints_of(kind)[one.name], value[key], f"{where}.{key}")
    return kind(**values)


# ---------------------------------------------------------------- talking
@dataclass(frozen=True)
class Reply:
    """One answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        if self.headers.get("content-type") != "application/json":
            raise WireError(f"{self.status} with {self.headers.get('content-type')}")
        return loads(self.body)

    def problem(self) -> Problem:
        """The refusal, whose status must be the answer's and whose detail must say something."""
        if self.headers.get("content-type") != "application/problem+json":
            raise WireError(f"{self.status} with {self.headers.get('content-type')}: {self.body[:80]!r}")
        problem: Problem = parse(Problem, loads(self.body))
        if problem.status != self.status or not problem.detail or not problem.code:
            raise WireError(f"{self.status} is told as {problem}")
        return problem

    def faults(self) -> dict[str, str]:
        """A refusal's bad fields and what is wrong with them."""
        self.problem()
        faults = parse(list[FieldFault], loads(self.body).get("errors", []))
        return {fault.field: fault.message for fault in faults}


class Refusal(Exception):
    """The service answered with an error where success was expected."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.status} {problem.code}: {problem.detail}")
        self.problem = problem


class Client:
    """Speaks to one service; a connection a request."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.host = url.removeprefix("http://")
        self.always = {"Authorization": f"Bearer {token}"} if token else {}

    def call(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str | bytes] | None = None
    ) -> Reply:
        """Any request. A dict is sent as JSON, an iterable of bytes in chunks."""
        sent: dict[str, str | bytes] = {**self.always, **(headers or {})}
        if isinstance(body, (dict, list)):
            body = json.dumps(body, ensure_ascii=False).encode()
            sent = {"Content-Type": "application/json", **sent}
        chunked = body is not None and not isinstance(body, bytes)
        if chunked:
            sent["Transfer-Encoding"] = "chunked"
        line = http.client.HTTPConnection(self.host, timeout=30)
        try:
            line.request(method, path, body, sent, encode_chunked=chunked)  # type: ignore[arg-type]
            answer = line.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, found, answer.read())
        finally:
            line.close()

    def ask(self, kind: Any, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        """A request whose answer must be `kind`. Raises Refusal, WireError."""
        reply = self.call(method, path, body)
        if reply.status >= 400:
            raise Refusal(reply.problem())
        if reply.status != status:
            raise WireError(f"{method} {path}: {reply.status} instead of {status}")
        return parse(kind, reply.json())

    def upload(self, name: str, pieces: Iterable[bytes], title: str = "") -> Reply:
        """As the client sends a volume: chunked, its title as raw UTF-8 in a header."""
        return self.call("PUT", f"/incoming/{name}", iter(pieces), {"X-Reichan-Title": title.encode()})

    def submit(
        self, path: str, kind: str = "zip", params: Mapping[str, Any] | None = None, **more: Any
    ) -> str:
        """Submit an input, for the small model unless `params` names one; the new job's id.

        `more`: other keys of the body.
        """
        body = submission(path, kind) | more
        body["params"] |= params or {}
        accepted: Accepted = self.ask(Accepted, "POST", "/jobs", body, 202)
        return accepted.job_id

    def state(self, job: str) -> JobState:
        state: JobState = self.ask(JobState, "GET", f"/jobs/{job}")
        return state

    def full_state(self, job: str) -> dict[str, Any]:
        """A job's state with all its keys, those beyond the contract too; strictly read all the same."""
        full: dict[str, Any] = self.ask(dict, "GET", f"/jobs/{job}")
        parse(JobState, full)
        return full

    def wait(
        self,
        job: str,
        until: Callable[[JobState], object] = lambda state: state.is_over,
        limit_s: float = 300.0,
    ) -> JobState:
        """Poll until the job's state is as wanted; that state."""
        deadline_s = time.monotonic() + limit_s
        while not until(state := self.state(job)):
            assert time.monotonic() < deadline_s, state
            time.sleep(0.05)
        return state

    def post(self, job: str, action: str, body: Any = None) -> JobState:
        """Cancel or resume."""
        state: JobState = self.ask(JobState, "POST", f"/jobs/{job}/{action}", body)
        return state

    def socket(self, path: str, **options: Any) -> ClientConnection:
        """An open WebSocket."""
        headers = {**self.always, **options.pop("headers", {})}
        options = {"proxy": None, "compression": None, "ping_interval": None} | options
        return connect(f"ws://{self.host}{path}", additional_headers=headers, **options)

    def frames(self, job: str, after: int | None = None) -> tuple[list[Any], int]:
        """Every frame until the service closes, as JSON with all its keys, and the close code."""
        query = "" if after is None else f"?after={after}"
        frames: list[Any] = []
        with self.socket(f"/ws/jobs/{job}{query}") as line:
            try:
                while True:
                    frames.append(loads(line.recv(STALE_S)))
            except ConnectionClosed as closed:
                return frames, closed.rcvd.code if closed.rcvd else 1006

    def watch(self, job: str, after: int | None = None) -> tuple[list[JobState], int]:
        """Every frame until the service closes, strictly read, and the close code."""
        frames, code = self.frames(job, after)
        return [parse(JobState, frame) for frame in frames], code


def submission(path: str, kind: str = "zip") -> dict[str, Any]:
    """A POST /jobs body with the small model."""
    return {
        "title": "作品名",
        "volume": "01",
        "input": {"type": kind, "path": path},
        "params": {"model": "realesr-animevideov3"},
    }


def check_artifact(data: bytes, state: JobState) -> dict[str, Any]:
    """Every hash of a job's artifact, and that its report is one; the report, with all its keys."""
    assert hashlib.sha256(data).hexdigest() == state.artifact_hash, state
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        told: dict[str, Any] = loads(archive.read("artifact-report.json"))
        report: Report = parse(Report, told)
        names = ["artifact-report.json", *(item.filename for item in report.items)]
        assert archive.namelist() == names, archive.namelist()
        for item in report.items:
            page = archive.read(item.filename)
            assert (hashlib.sha256(page).hexdigest(), len(page)) == (item.sha256, item.bytes), item
    assert report.processed == report.total == len(report.items), report
    return told
