"""A client of the service in a terminal: `python server.py submit PATH`.

Map: arguments - Service (requests) - the input - submitting - watching - downloading - main
Rule: the job belongs to the service; whatever ends here, the same command finds it again.
Runs in: a process of its own. Standard library and websockets; nothing of the service but names of pages.

    PATH --hash--> Idempotency-Key --POST /jobs--> there already? else PUT /incoming, POST again
         --WS /ws/jobs/{id}--> progress --GET artifact, Range--> .part --hash--> DIR/title volume.zip
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import errno
import functools
import hashlib
import http.client
import io
import json
import math
import os
import re
import shlex
import shutil
import ssl
import stat
import subprocess
import sys
import time
import urllib.parse
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import storage
from messages import misspelt

ALL_WELL, SOME_CARRIED, NOTHING_DONE, JOB_FAILED, NOT_FETCHED, INTERRUPTED = 0, 1, 2, 3, 4, 130
STATUSES = """exit status: 0 submitted, or with --watch finished; 1 finished, some pages kept as they were;
2 nothing was done (the command, the input, the service's refusal, no service); 3 the job failed; 4 the
service was lost on the way, or its artifact could not be fetched whole; 130 interrupted (the job goes on)"""
ARCHIVES = tuple(sorted(storage.ARCHIVE_SUFFIXES))
MANIFEST = "manifest.json"
OVER = ("SUCCESS", "FAILED")
MOST_PRIORITY = 100
PIECE_BYTES = 1 << 20
ANSWER_S = 60.0  # for an answer to begin, and between two pieces
PATIENCE_S = 20.0  # with broken lines, without any progress
PREVIEW_S = 600.0  # for a preview's page, which a slow machine computes while it says to ask again
FRAME_WAIT_S = 0.5
RESTART_S = 300.0  # with a service that is away while its job is watched
PARAMS = {  # flag: (key of params, type, help)
    "--model": ("model", str, "a name from GET /models, or auto"),
    "--scale": ("scale", int, "1 to 4"),
    "--format": ("outputFormat", str, "jpg, png, webp or avif"),
    "--quality": ("jpegQuality", int, "1 to 100"),
    "--denoise": ("denoise", str, "low, medium or high"),
    "--color": ("color", str, "auto, gray or keep"),
    "--width": ("targetWidth", int, "output pixels, in place of a scale"),
    "--height": ("targetHeight", int, "output pixels, in place of a scale"),
    "--device": ("device", str, "auto, cuda or cpu"),
    "--container": ("container", str, "zip; cbz: with a folder's other files; epub; pdf"),
    "--spreads": ("spreads", str, "double pages: keep, split or rotate"),
    "--reading-direction": ("readingDirection", str, "rtl or ltr"),
    "--profile": ("profile", str, "an e-reader, for its pixels and greys"),
    "--max-page-bytes": ("maxPageBytes", int, "of a page, by quality first"),
    "--max-artifact-bytes": ("maxArtifactBytes", int, "of the whole artifact"),
    "--split": ("split", str, "volumes: a job for each volume in PATH, archives among them"),
}


class Failure(Exception):
    """Why it ends here, for the person at the keyboard; `status` is the exit status."""

    def __init__(self, text: str, status: int = NOTHING_DONE) -> None:
        super().__init__(text)
        self.status = status


class Refusal(Failure):
    """The service said no."""

    def __init__(self, status_code: int, problem: dict[str, Any]) -> None:
        self.code = str(problem.get("code", ""))
        self.status_code = status_code
        faults = [f"\n  {one.get('field')}: {one.get('message')}" for one in problem.get("errors") or ()]
        what = problem.get("detail") or http.client.responses.get(status_code, "")
        super().__init__(f"the service refused ({status_code} {self.code}): {what}{''.join(faults)}")


# ---------------------------------------------------------------- arguments
def parser() -> argparse.ArgumentParser:
    """Every flag."""
    flags = argparse.ArgumentParser(
        prog="server.py submit", description="Submit a volume to a running service.", epilog=STATUSES
    )
    add = flags.add_argument
    add("path", metavar="PATH", nargs="?", type=Path, help="a folder of pages, or " + ", ".join(ARCHIVES))
    add("--job", metavar="ID", help="in place of PATH: a job that was submitted before")
    add("--url", default="http://127.0.0.1:8001", help="the service (%(default)s)")
    add("--token", help="its access token (REICHAN_TOKEN)")
    add("--title", help="else from PATH's name")
    add("--volume", help="else from PATH's name, or 01")
    for flag, (key, kind, text) in PARAMS.items():
        add(flag, dest=key, type=kind, help=text, metavar=flag[2:].upper())
    add("--param", action="append", default=[], metavar="KEY=VALUE", help="any other of params")
    add("--priority", type=int, metavar="N", help="-100 to 100: of waiting jobs the highest starts first")
    add("--predict", action="store_true", help="first compute one page, and tell how long it will take")
    add("--again", action="store_true", help="a new job, also where the same one was submitted before")
    add("--watch", action="store_true", help="show how it goes, until it is over")
    add("--download", metavar="DIR", type=Path, help="watch, then fetch the artifact into this folder")
    return flags


def params_of(given: argparse.Namespace) -> dict[str, Any]:
    """What was asked for; the service has its own defaults for the rest. Raises Failure."""
    params = {key: getattr(given, key) for key, _, _ in PARAMS.values() if getattr(given, key) is not None}
    for item in given.param:
        key, sign, value = item.partition("=")
        if not sign:
            raise Failure(f"--param takes KEY=VALUE, not {item!r}")
        try:
            params[key] = json.loads(value)
        except ValueError:
            params[key] = value
    if why := misspelt(params):
        raise Failure(why)
    return params


def check(given: argparse.Namespace) -> None:
    """Raises Failure for flags that don't go together, or can't be."""
    if (given.path is None) == (given.job is None):
        raise Failure("name either a PATH or a --job")
    if given.priority is not None and abs(given.priority) > MOST_PRIORITY:
        raise Failure(f"--priority takes -{MOST_PRIORITY} to {MOST_PRIORITY}, not {given.priority}")
    if given.download and given.download.exists() and not given.download.is_dir():
        raise Failure(f"--download takes a folder, and {given.download} is a file")


def as_text(names: Sequence[str]) -> list[str]:
    """Names from the disk or the command line. On Linux those in an old code page, as old archives
    have them, come as no text that could be sent."""
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        return storage.decode_names([os.fsencode(name) for name in names])
    return list(names)


def title_and_volume(name: str) -> tuple[str, str]:
    """From the input's name: the last number in it is the volume."""
    stem = os.path.splitext(name)[0] if name.lower().endswith(ARCHIVES) else name
    found = storage.NUMBERED.fullmatch(stem)
    if found and found["title"].strip():
        return found["title"].strip(), found["number"]
    return stem.strip() or "untitled", "01"


# ---------------------------------------------------------------- requests
class Service:
    """One service over HTTP; a connection a request. Raises Refusal, OSError, HTTPException."""

    def __init__(self, url: str, token: str | None) -> None:
        try:
            parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
            self.host, self.port = parts.hostname or "", parts.port
        except ValueError as error:
            raise Failure(f"--url {url}: {error}") from error
        if parts.scheme not in ("http", "https") or not self.host:
            raise Failure(f"--url {url} is not like http://192.168.1.10:8001")
        self.secure = parts.scheme == "https"
        self.base = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{self.base}"
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def _connect(self) -> http.client.HTTPConnection:
        if self.secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self.host, self.port, timeout=ANSWER_S, context=context)
        return http.client.HTTPConnection(self.host, self.port, timeout=ANSWER_S)

    @contextlib.contextmanager
    def open(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer whose body is still to be read. Raises Refusal for an error."""
        line = self._connect()
        try:
            # A refusal may come, and the line end, before all of the body was taken.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, ConnectionAbortedError):
                line.request(method, self.base + path, body, {**self.headers, **(headers or {})})
            answer = line.getresponse()
            if answer.status >= 400:
                raise Refusal(answer.status, _json_object(answer.read(1 << 20)))
            yield answer
        finally:
            line.close()

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """A request and its JSON."""
        if isinstance(body, dict):
            body = json.dumps(body, ensure_ascii=False).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        with self.open(method, path, body, headers) as answer:
            return _json_object(answer.read())

    def check(self) -> dict[str, Any]:
        """Its health. Raises Failure unless one of ours is there: else a misspelt address would be
        waited for."""
        try:
            health = self.ask("GET", "/health")
        except (OSError, http.client.HTTPException) as error:
            raise Failure(f"no service at {self.url}: {_reason(error)}") from error
        except UnicodeError as error:  # a host's name, or a token, that no request can hold
            raise Failure(f"{self.url} can't be asked, or not with this token: {error}") from error
        except Refusal as refusal:
            raise Failure(f"no service at {self.url}: {refusal}") from refusal
        if "registered_jobs" not in health:
            raise Failure(f"what answers at {self.url} is no Manga Upscale Service")
        return health

    def socket(self, path: str) -> Any:
        """An open WebSocket."""
        from websockets.sync.client import connect  # not needed before

        address = ("wss" if self.secure else "ws") + self.url[self.url.index(":") :] + path
        return connect(address, additional_headers=self.headers, proxy=None, open_timeout=ANSWER_S)


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class Moved(Exception):
    """Broken off, yet further than before."""


def patiently(what: Callable[[], Any], doing: str, patience_s: float = PATIENCE_S) -> Any:
    """Call until it succeeds: a line may break, a service may be starting again.

    Raises Refusal, and Failure once patience_s passed since the first failure after the begin, or after the
    last Moved: a try may itself take hours."""
    pause_s, until_s = 0.25, math.inf
    while True:
        try:
            return what()
        except Moved:
            pause_s, until_s = 0.25, math.inf
        except Refusal as refusal:
            until_s = min(until_s, time.monotonic() + patience_s)
            if refusal.status_code not in (502, 503, 504) or time.monotonic() > until_s:
                raise
        except (OSError, http.client.HTTPException) as error:
            until_s = min(until_s, time.monotonic() + patience_s)
            if time.monotonic() > until_s or isinstance(error, ssl.SSLCertVerificationError):
                raise Failure(f"{doing} failed: {_reason(error)}", NOT_FETCHED) from error
        time.sleep(pause_s)
        pause_s = min(8.0, 2 * pause_s)


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nothing answers there; start it with: python server.py"
    return str(error) or type(error).__name__


# ---------------------------------------------------------------- the input
class Sink(io.RawIOBase):
    """What a zip is written to, and its bytes are taken from: nothing of it is kept."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def writable(self) -> bool:
        """It is; that it can't be sought back in makes zipfile write each size after its bytes."""
        return True

    def write(self, data: Any) -> int:
        """Hold until taken."""
        self.pieces.append(bytes(data))
        return len(self.pieces[-1])

    def take(self) -> Iterator[bytes]:
        """What was written since."""
        pieces, self.pieces = self.pieces, []
        yield from pieces


@dataclasses.dataclass(frozen=True)
class Input:
    """What is to be uploaded: the same bytes at each reading, unless someone changes the files."""

    path: Path
    name: str  # for people, and for the upload's own
    files: tuple[tuple[str, Path], ...] | None  # of a folder: (name in the zip, file)

    @classmethod
    def of(cls, path: Path, params: Mapping[str, Any] | None = None) -> Input:
        """What the service needs of it for these params. Raises Failure."""
        name = path.absolute().name
        if path.is_dir():
            found = list(_files_below(path, params or {}))
            if not any(storage.is_page_name(file.parts[-1:]) or _is_archive(file) for _, file in found):
                raise Failure(f"{path} holds no pages ({', '.join(sorted(storage.PAGE_SUFFIXES))})")
            name, *names = as_text([name, *(name for name, _ in found)])
            return cls(path, name, tuple(zip(names, (file for _, file in found), strict=True)))
        if not path.is_file():
            raise Failure(f"{path} is not there")
        if not name.lower().endswith(ARCHIVES):
            known = ", ".join(ARCHIVES)
            raise Failure(f"{path} is no folder and no {known}; for a single image: python infer.py")
        return cls(path, as_text([os.path.splitext(name)[0]])[0], None)

    def pieces(self) -> Iterator[bytes]:
        """All bytes of the archive, a little at a time; a folder becomes one on the way."""
        if self.files is None:
            with self.path.open("rb") as file:
                yield from _pieces_of(file)
            return
        sink = Sink()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
            for name, path in self.files:
                info = zipfile.ZipInfo(name)  # with a fixed time: the same pages are the same upload
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                with path.open("rb") as file, archive.open(info, "w", force_zip64=True) as entry:
                    for piece in _pieces_of(file):
                        entry.write(piece)
                        yield from sink.take()
        yield from sink.take()


def _is_archive(file: Path) -> bool:
    return file.name.lower().endswith(ARCHIVES)


def _files_below(folder: Path, params: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """(name in the zip, file) of what the service needs. Raises Failure where a folder can't be read: its
    pages would be missing, and nobody told."""

    def refuse(error: OSError) -> None:
        raise Failure(f"the folder {error.filename} can't be read: {storage.reason_of(error)}") from error

    with_others, with_archives = params.get("container") == "cbz", params.get("split") == "volumes"
    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not storage.is_junk([name]))
        for name in sorted(names):
            path = Path(where, name)
            parts = path.relative_to(folder).parts
            wanted = with_others or (with_archives and _is_archive(path)) or storage.is_page_name(parts)
            if (wanted or parts == (MANIFEST,)) and not storage.is_junk(parts) and _is_file(path):
                yield "/".join(parts), path


def _is_file(path: Path) -> bool:
    """As Path.is_file(), which from Python 3.14 on says no also of what it may not look at."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):  # a link to nothing, or to itself
            raise
        return False


def _pieces_of(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES):
        yield piece


# ---------------------------------------------------------------- progress
class Line:
    """One line on stderr that moves in a terminal; elsewhere a line where there is something new."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.last = ""
        self.width = 0  # of what stands there, to be covered
        self.told_s = 0.0

    def bar(self, label: str, done: int, total: int) -> None:
        """How far a number of bytes has come."""
        now_s = time.monotonic()
        if done < total and now_s - self.told_s < (0.1 if self.live else 5.0):
            return
        self.told_s = now_s
        share, size = done / total if total else 1.0, f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
        self.show(f"{label} [{'#' * int(20 * share):.<20}] {share:4.0%}  {size}")

    def show(self, text: str) -> None:
        """This instead of what stood there."""
        text = storage.printable(text)
        if text == self.last and not self.live:
            return
        self.last = text
        if self.live:
            text = text[: max(20, shutil.get_terminal_size().columns - 1)]
            covered, self.width = max(self.width, len(text)), len(text)
            text = text.ljust(covered)
        # The cursor goes back at once: a line of the log takes this one's place instead of following it.
        print(text, end="\r" if self.live else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        """What was shown last stays."""
        if self.live and self.last:
            print(file=sys.stderr, flush=True)
        self.last, self.width, self.told_s = "", 0, 0.0


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


# ---------------------------------------------------------------- submitting
def hashed(source: Input, line: Line) -> tuple[str, int]:
    """(hex SHA-256, bytes) of what will be sent."""
    digest, size = hashlib.sha256(), 0
    for piece in source.pieces():
        digest.update(piece)
        size += len(piece)
        if time.monotonic() - line.told_s > 0.2 and line.live:
            line.told_s = time.monotonic()
            line.show(f"reading {size / 1e6:.1f} MB")
    return digest.hexdigest(), size


def upload(service: Service, source: Input, path: str, sha256: str, size: int, line: Line) -> None:
    """Send it, from the beginning at each try. Raises Failure."""

    def told() -> Iterator[bytes]:
        sent = 0
        for piece in source.pieces():
            yield piece
            sent += len(piece)
            line.bar("uploading", sent, size)
        if sent != size:
            raise Failure(f"{source.path} changed while it was read; try again")

    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    headers = {"Repr-Digest": f"sha-256=:{digest}:", "Content-Length": str(size)}
    patiently(lambda: service.ask("PUT", "/" + urllib.parse.quote(path), told(), headers), "the upload")
    line.end()


def submit(service: Service, given: argparse.Namespace, line: Line) -> list[str]:
    """The job's id, or each volume's; the same command gives the same, without a second upload.
    Raises Failure."""
    params = params_of(given)
    source = Input.of(given.path, params)
    title, volume = title_and_volume(source.name)
    sha256, size = hashed(source, line)
    path = "incoming/" + storage.cut_bytes(storage.slug(source.name), 80) + storage.sent_ending(sha256)
    title, volume = as_text([given.title or title, given.volume or volume])
    body = {"title": title, "volume": volume, "input": {"type": "zip", "path": path}, "params": params}

    def with_input(ask: Callable[[], dict[str, Any]], patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """Ask; where the input is not there (any more), send it and ask again."""
        try:
            return dict(patiently(ask, f"submitting to {service.url}", patience_s))
        except Refusal as refusal:
            if refusal.code != storage.InputMissing.code:
                raise
        upload(service, source, path, sha256, size, line)
        return dict(patiently(ask, "submitting", patience_s))

    if given.predict:
        foretell(service, body, with_input, line)
    key = str(uuid.uuid4()) if given.again else key_of(sha256, body)
    states = submitted(service, body, key, with_input)
    for state in states:
        if state["status"] == "FAILED":  # one that was there before, cancelled perhaps: it is wanted again
            with_input(functools.partial(service.ask, "POST", f"/jobs/{state['jobId']}/resume"))
    return [str(state["jobId"]) for state in states]


def key_of(*facts: Any) -> str:
    """The Idempotency-Key that follows from what is submitted."""
    return "submit-" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def foretell(
    service: Service, body: dict[str, Any], with_input: Callable[..., dict[str, Any]], line: Line
) -> None:
    """Print what the volume will take. Raises Failure."""
    wanted = {"input": body["input"], "variants": [body["params"]]}
    line.show("computing a page ...")
    try:
        answer = with_input(functools.partial(service.ask, "POST", "/preview", wanted), PREVIEW_S)
        line.end()
        print(f"predicted {of_preview(answer)}")
    except Refusal as refusal:
        line.end()
        print(f"predicted nothing: {refusal}")  # a page may be damaged; the others can be good


def submitted(
    service: Service, body: dict[str, Any], key: str, with_input: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
    """The state of each job that this key makes, or made before. Raises Failure."""
    while True:
        headers = {"Idempotency-Key": key}
        answer = with_input(functools.partial(service.ask, "POST", "/jobs", body, headers))
        jobs = [str(job) for job in answer.get("jobIds") or [answer["jobId"]]]
        asked = (functools.partial(service.ask, "GET", f"/jobs/{job}") for job in jobs)
        states = [dict(patiently(ask, "asking about the job")) for ask in asked]
        if not any(is_removed(state) for state in states):
            return states
        # What it made was removed by age; of several volumes all are made again, as a key makes all. The
        # next key follows from this one: the same command then finds what is made now.
        key = key_of(key, jobs)


def is_removed(state: dict[str, Any]) -> bool:
    """Whether a finished job's artifact was removed by age."""
    return bool(state["status"] == "SUCCESS" and state["artifactHash"] and state["artifactPath"] is None)


def prioritize(service: Service, jobs: list[str], priority: int) -> None:
    """Not part of what is submitted: with another priority the same volume is still the same job."""
    for job in jobs:
        path = f"/jobs/{urllib.parse.quote(job, safe='')}/priority"
        patiently(functools.partial(service.ask, "POST", path, {"priority": priority}), "the priority")


# ---------------------------------------------------------------- watching
def describe(state: dict[str, Any]) -> str:
    """A job's state as one line with a bar."""
    done, total = state["processed"], state["total"]
    if not total:
        return f"{state['status'].lower()}, {state['phase']}"
    left = f"  ETA {clock(state['etaSeconds'])}" if state["etaSeconds"] else ""
    failed = f"  {state['failedPages']} failed" if state["failedPages"] else ""
    return f"[{'#' * (20 * done // total):.<20}] {done}/{total} pages  {state['phase']}{left}{failed}"


def foretold(told: dict[str, Any]) -> str:
    """A prediction in words, with what it rests on."""
    pages = f"{told['basisPages']} page{'' if told['basisPages'] == 1 else 's'}"
    basis = f"{pages} of volumes like it" if told["basis"] == "volumes" else f"{pages} of a preview"
    return f"{told['minutes']:.1f} min and {told['megabytes']:.1f} MB, from {basis}"


def of_preview(answer: dict[str, Any]) -> str:
    """What a preview foretells, in words."""
    told = answer["variants"][0]["prediction"]
    if not told:
        return "nothing: no page is to be computed"
    several = (answer.get("volumes") or 1) > 1
    like = f", for each of {answer['volumes']} volumes that is like {answer['volume']}" if several else ""
    return f"{foretold(told)}{like}"


def become(told: dict[str, Any] | None) -> str:
    """What came of a prediction; nothing where there was none, or the job had to begin again."""
    if not told or told["actualMinutes"] is None:
        return ""
    minutes, megabytes = (told[f"{name}ErrorPercent"] for name in ("minutes", "megabytes"))
    how_far = "with pages of other jobs" if minutes is None else f"predicted {minutes:+.0f}%"
    return (
        f"took      {told['actualMinutes']:.1f} min ({how_far}), "
        f"{told['actualMegabytes']:.1f} MB (predicted {megabytes or 0.0:+.0f}%)"
    )


def frames_of(socket: Any) -> Iterator[str]:
    """What comes, in short waits: on Windows an endless one would not let Ctrl-C through. Raises
    ConnectionClosed."""
    while True:
        try:
            frame = str(socket.recv(timeout=FRAME_WAIT_S))
        except TimeoutError:
            continue
        yield frame


def watch(service: Service, job: str, line: Line) -> dict[str, Any]:
    """Show a job's changes until it is over; its last state. Raises Failure."""
    from websockets.exceptions import ConnectionClosed, InvalidHandshake

    def ask() -> dict[str, Any]:
        return service.ask("GET", f"/jobs/{urllib.parse.quote(job, safe='')}")

    foreseen = None

    def show(state: dict[str, Any]) -> None:
        nonlocal foreseen
        told = state.get("prediction")
        if told and foreseen is None:
            line.end()
            print(f"predicted {foretold(told)}", flush=True)
            foreseen = told
        line.show(describe(state))

    state = dict(patiently(ask, "asking about the job"))
    while state["status"] not in OVER:
        show(state)
        # What breaks the line, a restart for example, shows in the question after it.
        with contextlib.suppress(OSError, ConnectionClosed, InvalidHandshake):
            with service.socket(f"/ws/jobs/{job}?after={state['seq']}") as socket:
                for frame in frames_of(socket):
                    state = json.loads(frame)
                    show(state)
        if state["status"] not in OVER:
            line.show("the line is lost; calling again ...")
            time.sleep(0.5)
            state = patiently(ask, "watching", RESTART_S)
    line.show(describe(state))
    line.end()
    outcome = become(state.get("prediction"))
    if outcome:
        print(outcome, flush=True)
    return state


# ---------------------------------------------------------------- downloading
def download(service: Service, state: dict[str, Any], folder: Path, line: Line) -> Path:
    """The artifact in `folder`, whole by its hash. A .part of an earlier try is gone on with.
    Raises Failure."""
    sha256, path = state["artifactHash"], f"/jobs/{state['jobId']}/artifact"
    folder.mkdir(parents=True, exist_ok=True)

    def ask_name() -> str:
        try:
            with service.open("HEAD", path) as answer:
                return name_of(answer.headers["Content-Disposition"] or "")
        except Refusal:  # which has no body to say why
            with service.open("GET", path):
                raise

    target = place_for(folder, str(patiently(ask_name, "the download")), sha256)
    if target.exists():
        return target
    part = folder / f".{sha256[:32]}.part"
    for _ in range(2):  # what an earlier try left may not be the beginning of this
        patiently(lambda: fetch(service, path, sha256, part, line), "the download")
        line.end()
        if storage.sha256_file(part) == sha256:
            storage.patiently(os.replace, part, target)
            return target
        storage.remove_file(part)
    raise Failure(f"what arrived twice is not the artifact: its SHA-256 is not {sha256}", NOT_FETCHED)


def fetch(service: Service, path: str, sha256: str, part: Path, line: Line) -> None:
    """What is missing of `part`. Raises Moved, or what broke the line, where some still is."""
    begin = part.stat().st_size if part.exists() else 0
    headers = {"If-Range": f'"{sha256}"', "Range": f"bytes={begin}-"} if begin else {}
    try:
        opened = service.open("GET", path, None, headers)
        with opened as answer, part.open("ab" if answer.status == 206 else "wb") as file:
            at = start = begin if answer.status == 206 else 0
            total = at + int(answer.headers["Content-Length"])
            if answer.status == 206 and answer.headers["Content-Range"] != f"bytes {at}-{total - 1}/{total}":
                raise Failure("the service sent another range than was asked for", NOT_FETCHED)
            why: Exception = http.client.IncompleteRead(b"")
            try:
                while piece := answer.read1(PIECE_BYTES):
                    file.write(piece)
                    at += len(piece)
                    line.bar("downloading", at, total)
            except (OSError, http.client.HTTPException) as error:
                why = error
            if at < total:
                line.show(f"the line broke at {at} of {total} bytes")
                raise Moved if at > start else why
            file.flush()
            os.fsync(file.fileno())
    except Refusal as refusal:
        if refusal.status_code != 416:  # all of it, or too much, is there: the hash tells
            raise


def name_of(disposition: str) -> str:
    """The name that an RFC 6266 header gives, as one that any file system holds."""
    found = re.search(r"filename\*=UTF-8''([^;\s]+)", disposition)
    return storage.safe_component(urllib.parse.unquote(found[1])) if found else ""


def place_for(folder: Path, name: str, sha256: str) -> Path:
    """Where the artifact goes; what is there already stays, unless it is the same. Raises Failure."""
    stem, dot, suffix = (name or "artifact.zip").rpartition(".")
    for target in (folder / f"{stem}{dot}{suffix}", folder / f"{stem} ({sha256[:8]}){dot}{suffix}"):
        if not target.exists() or storage.sha256_file(target) == sha256:
            return target
    raise Failure(f"{target} exists, and is another file; remove it", NOT_FETCHED)


# ---------------------------------------------------------------- main
def again(service: Service, job: str, given: argparse.Namespace) -> str:
    """The command that watches a job from anywhere."""
    words = ["python", "server.py", "submit", "--job", job, "--url", service.url, "--watch"]
    words += ["--download", str(given.download)] if given.download else []
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def hint(service: Service, job: str, given: argparse.Namespace, failure: Failure) -> str:
    """What to do about a failure, for the person at the keyboard."""
    if isinstance(failure, Refusal) and failure.status_code == http.HTTPStatus.GONE:
        how = "the same command with --again" if given.path else "submit with the volume's PATH and --again"
        return f"{how} makes it anew"
    return f"try again with\n  {again(service, job, given)}"


def tell_kept(service: Service, job: str) -> None:
    """Name the pages that were kept as they were, and why. Raises Failure."""
    asked = functools.partial(service.ask, "GET", f"/jobs/{job}/pages")
    for page in patiently(asked, "asking about the pages")["pages"]:
        if page["error"]:
            print(storage.printable(f"kept as it was: {page['name']}: {page['error']}"), file=sys.stderr)


def closing(service: Service, state: dict[str, Any], given: argparse.Namespace, line: Line) -> int:
    """Tell how a job ended, fetch what it made; the exit status. Raises Failure."""
    if state["status"] == "FAILED":
        raise Failure(f"job {state['jobId']} failed: {state['lastError'] or state['message']}", JOB_FAILED)
    if state["message"]:
        print(storage.printable(state["message"]), file=sys.stderr)
    try:
        if state["failedPages"]:
            tell_kept(service, state["jobId"])
        place = download(service, state, given.download, line) if given.download else None
    except Refusal as refusal:
        refusal.status = NOT_FETCHED
        raise
    except OSError as error:  # of files here: requests have their own
        raise Failure(f"the artifact can't be kept in {given.download}: {error}", NOT_FETCHED) from error
    if place:
        print(f"artifact  {place}")
    print(f"sha256    {state['artifactHash']}")
    return SOME_CARRIED if state["failedPages"] else ALL_WELL


def follow(service: Service, jobs: Sequence[str], given: argparse.Namespace, line: Line) -> int:
    """Watch one job after the other to its end; the worst exit status. Raises Failure, of one job alone."""
    status = ALL_WELL
    for job in jobs:
        try:
            status = max(status, closing(service, watch(service, job, line), given, line))
        except Failure as failure:
            if len(jobs) == 1:
                raise
            line.end()
            print(f"submit: {storage.printable(str(failure))}", file=sys.stderr)
            print(hint(service, job, given, failure), file=sys.stderr)
            status = max(status, failure.status)
    return status


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """See STATUSES."""
    given = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in any script, terminals in one
    line, jobs, service = Line(), [given.job] if given.job else [], None
    try:
        check(given)
        service = Service(given.url, given.token or environ.get("REICHAN_TOKEN", "").strip() or None)
        is_paused = service.check().get("paused", False)
        jobs = jobs or submit(service, given, line)
        if given.priority is not None:
            prioritize(service, jobs, given.priority)
        print(*(f"job       {job}" for job in jobs), sep="\n", flush=True)
        if is_paused:
            print(f"the queue is paused; it goes on with POST {service.url}/queue/resume", file=sys.stderr)
        if given.watch or given.download:
            return follow(service, jobs, given, line)
        for job in jobs:
            print(f"watch it  {again(service, job, given)}")
        return ALL_WELL
    except Failure as failure:
        line.end()
        print(f"submit: {storage.printable(str(failure))}", file=sys.stderr)
        if failure.status == NOT_FETCHED and jobs and service:
            print(hint(service, jobs[0], given, failure), file=sys.stderr)
        return failure.status
    except OSError as error:  # of files here: requests have their own
        line.end()
        print(f"submit: {error}", file=sys.stderr)
        return NOTHING_DONE
    except KeyboardInterrupt:
        line.end()
        if jobs and service:
            for job in jobs:
                print(f"the job goes on; watch it with\n  {again(service, job, given)}", file=sys.stderr)
        else:
            print("interrupted; nothing was submitted", file=sys.stderr)
        return INTERRUPTED
