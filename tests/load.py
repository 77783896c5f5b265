"""Many watchers, many jobs, many pages: what they do to the service, as one table of figures.

    python tests/load.py watchers [--idle 500] [--slow 50] [--pairs 7] [--pages 24] [--side 768]
    python tests/load.py jobs [--jobs 1000]
    python tests/load.py pages [--pages 10000]
    python tests/load.py race [--rounds 500]
    python tests/load.py events [--events 100000]
    python tests/load.py ranges [--ranges 100] [--mb 500]

Real service in a process of its own, real compact model, real sockets on loopback; --seed
makes every choice repeatable. Exit status 1 when a promise is broken. Linux only (reads /proc).
Map: table - the service's process - the crowd's process - clients - one function a subcommand
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import socket
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from client import Client, JobState, loads, parse
from figures import rss_mb
from kills import workers_of
from serving import dial, finished, png, running, still, volume
from websockets.exceptions import ConnectionClosed

import jobs
import server
import settings
from work import submissions

COMPACT = jobs.Params(model="realesr-animevideov3")
CONTEXT = multiprocessing.get_context("spawn")
TICK_S = 0.01  # between two looks at how late the service's loop is
RECYCLE_S = 30.0  # a slow reader is dropped after two missed pings; it comes back before that


# ---------------------------------------------------------------- the table
@dataclass(frozen=True)
class Line:
    """One row of the table: what was measured, and the promise it must keep."""

    what: str
    found: str
    promise: str = ""
    kept: bool = True
    timed: bool = False  # a busy machine can break it: never asserted in the suite


def show(lines: list[Line]) -> int:
    """Print the table; the exit status."""
    print("| what | measured | promised | |\n| --- | --- | --- | --- |")
    for line in lines:
        verdict = ("kept" if line.kept else "BROKEN") if line.promise else ""
        print(f"| {line.what} | {line.found} | {line.promise} | {verdict} |")
    return int(not all(line.kept for line in lines))


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def ms(values: list[float]) -> str:
    """Seconds as "p50 / p99 / worst" in milliseconds."""
    return " / ".join(f"{1000 * percentile(values, share):.1f}" for share in (0.5, 0.99, 1.0))


# ---------------------------------------------------------------- the service's process
def serve(conn: Connection, root: Path, chosen: dict[str, Any], observed: bool) -> None:
    """A service, and what only its own process can tell: each change's moment, the loop's lag."""
    changes: list[tuple[float, Any]] = []  # monotonic, which all processes share
    lags: list[float] = []
    config = settings.Config(storage_root=root, port=0, **chosen)
    with server.Service(config) as service:
        loop = service.live.loop

        def tick(due_s: float) -> None:
            lags.append(loop.time() - due_s)
            due_s = loop.time() + TICK_S
            loop.call_at(due_s, tick, due_s)

        if observed:
            service.table.listeners.insert(0, lambda job: changes.append((time.monotonic(), job)))
            loop.call_soon_threadsafe(tick, loop.time())
        conn.send(service.url)
        while True:
            match conn.recv():
                case "taken":
                    conn.send((list(changes), list(lags)))
                    changes.clear(), lags.clear()
                case ("copy", target):
                    with service.table.transaction():  # nothing is being written
                        for name in ("jobs.sqlite3", "jobs.sqlite3-wal"):
                            target.with_name(name).write_bytes((root / name).read_bytes())
                    conn.send(None)
                case _:
                    return


class Served:
    """The parent's end of serve()."""

    def __init__(self, conn: Connection, pid: int) -> None:
        self.conn = conn
        self.pid = pid
        self.client = Client(conn.recv())
        self.port = int(self.client.host.rpartition(":")[2])

    def ask(self, what: Any) -> Any:
        """Send a command, get its answer."""
        self.conn.send(what)
        return self.conn.recv()

    def threads_and_files(self) -> tuple[int, int]:
        """Threads and open file descriptors of the service."""
        return tuple(len(os.listdir(f"/proc/{self.pid}/{what}")) for what in ("task", "fd"))  # type: ignore[return-value]

    def cpu_s(self) -> float:
        """Processor time of the service so far, its worker not counted."""
        return cpu_s(self.pid)

    def worker_mb(self) -> float:
        """Resident memory of the worker."""
        return max((rss_mb(child) for child in workers_of(self.pid)), default=0.0)


def cpu_s(pid: int) -> float:
    """Processor time of a process so far, in user and kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def child(main: Callable[..., None], *arguments: Any) -> Iterator[tuple[Connection, Any]]:
    """A spawned process and its pipe; told to end (None) at the close."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=main, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        yield ours, process
    finally:
        with contextlib.suppress(OSError):
            ours.send(None)
        process.join(20)
        if process.is_alive():
            process.kill()
            process.join()


@contextlib.contextmanager
def served(root: Path, observed: bool = False, **chosen: Any) -> Iterator[Served]:
    """A service in a process of its own."""
    with child(serve, root, chosen, observed) as (conn, process):
        yield Served(conn, process.pid)


# ---------------------------------------------------------------- the crowd's process
HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Lurker:
    """A watcher that costs little: it answers pings and counts frames, or hardly reads."""

    def __init__(self, port: int, path: str, bytes_s: int | None) -> None:
        self.port, self.path, self.bytes_s = port, path, bytes_s  # None: reads all
        self.frames, self.told_end = 0, False
        self.connect()

    def connect(self) -> None:
        """Open a new line and ask to watch."""
        self.line = socket.socket()
        if self.bytes_s is not None:
            self.line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.line.settimeout(10)
        self.line.connect(("127.0.0.1", self.port))
        self.line.sendall(HANDSHAKE.format(path=self.path).encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.line.recv(1)
        assert b" 101 " in head, head
        self.line.setblocking(False)
        self.buffer, self.since_s = b"", time.monotonic()

    def read(self) -> None:
        """What came: count frames, answer pings."""
        try:
            data = self.line.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.buffer += data
        while len(self.buffer) >= 2:
            size, start = self.buffer[1], 2
            if size == 126:
                size, start = int.from_bytes(self.buffer[2:4], "big"), 4
            if len(self.buffer) < start + size:
                return
            if self.buffer[0] == 0x89:  # a ping; a mask of zeros leaves its bytes as they are
                self.line.send(bytes([0x8A, 0x80 | size]) + bytes(4) + self.buffer[start : start + size])
            self.frames += self.buffer[0] == 0x81
            self.told_end |= self.buffer.find(b'"status":"SUCCESS"', 0, start + size) > 0
            self.buffer = self.buffer[start + size :]

    def live(self) -> None:
        """A second of its life."""
        if self.bytes_s is None:
            self.read()
        elif time.monotonic() - self.since_s > RECYCLE_S:
            self.line.close()
            self.connect()
        elif self.bytes_s:
            with contextlib.suppress(OSError):
                self.line.recv(self.bytes_s)


def crowd(conn: Connection) -> None:
    """Lurkers that look up once a second, so that they cost little beside what they cost the
    service. (port, [(path, bytes a second)]) adds some, "left" counts and closes them, once all were told
    of the end or 10 s have passed."""
    lurkers: list[Lurker] = []
    while True:
        if not conn.poll(1.0):
            for one in lurkers:
                one.live()
            continue
        match conn.recv():
            case (port, wishes):
                lurkers += [Lurker(port, path, bytes_s) for path, bytes_s in wishes]
                conn.send(len(lurkers))
            case "left":
                readers = [one for one in lurkers if one.bytes_s is None]
                until_s = time.monotonic() + 10
                while not all(one.told_end for one in readers) and time.monotonic() < until_s:
                    for one in readers:
                        one.read()
                    time.sleep(0.02)
                conn.send((sum(one.told_end for one in readers), sum(one.frames for one in readers)))
                for one in lurkers:
                    one.line.close()
                lurkers.clear()
            case None:
                return


# ---------------------------------------------------------------- clients
class Listener(threading.Thread):
    """A good watcher of one job, or of all: what it was told, and when."""

    def __init__(self, client: Client, path: str) -> None:
        super().__init__(daemon=True)
        self.client, self.path = client, path
        self.told: list[tuple[float, JobState]] = []  # monotonic
        self.opened = threading.Event()
        self.start()
        assert self.opened.wait(30)

    def run(self) -> None:
        """Until the service or stop() closes the line."""
        with (
            self.client.socket(self.path, max_queue=None) as self.line,
            contextlib.suppress(ConnectionClosed),
        ):
            self.opened.set()
            while True:
                text = self.line.recv()
                self.told.append((time.monotonic(), parse(JobState, loads(text))))

    def stop(self) -> list[tuple[float, JobState]]:
        """Hang up; what was told."""
        self.line.close()
        self.join(10)
        return self.told


class Returner(threading.Thread):
    """Watches all jobs over a line that breaks all the time, and comes back with ?after=."""

    def __init__(self, client: Client, seed: int) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.rng = random.Random(seed)
        self.ended = threading.Event()
        self.states: list[JobState] = []
        self.lines = 0
        self.after = 0

    def run(self) -> None:
        """Short lines, cut without a word, with pauses between."""
        while not self.ended.is_set():
            self._listen(self.rng.uniform(0.05, 0.6))
            time.sleep(self.rng.uniform(0.0, 0.3))

    def _listen(self, for_s: float) -> None:
        self.lines += 1
        until_s = time.monotonic() + for_s
        with self.client.socket(f"/ws/jobs?after={self.after}") as line, contextlib.suppress(TimeoutError):
            while (left_s := until_s - time.monotonic()) > 0:
                self.states.append(parse(JobState, loads(line.recv(left_s))))
                self.after = max(self.after, self.states[-1].seq)
            line.socket.shutdown(socket.SHUT_RDWR)

    def stop(self) -> list[JobState]:
        """Come back once more, for what was missed; all states."""
        self.ended.set()
        self.join(10)
        self._listen(1.0)
        return self.states


def upload(client: Client, name: str, count: int, side: int, seed: int) -> None:
    """A volume of grey square pages, another one for each seed."""
    pages = {f"{n:05}.png": png(side, side, seed + n) for n in range(count)}
    assert client.call("PUT", f"/incoming/{name}", volume(pages)).status in (201, 204)


def ended(client: Client, job: str, limit_s: float = 1800.0, pause_s: float = 0.2) -> JobState:
    """Wait for a job's end."""
    until_s = time.monotonic() + limit_s
    while not (state := client.state(job)).is_over:
        assert time.monotonic() < until_s, state
        time.sleep(pause_s)
    return state


# ---------------------------------------------------------------- watchers: row L03
LEAD = 3  # pages before the measured ones, while the watchers connect


@dataclass
class Watched:
    """One run of the job, with a crowd or without."""

    page_s: float  # seconds a page
    cpu_s: float  # processor time of the service a page, its worker not counted
    delays_s: list[float]  # from a change to the good watcher
    lags_s: list[float]
    memory_mb: float  # of the service, at the end of the job
    told_end: int  # idle watchers that were
    frames: int  # that they got


def watch_job(service: Served, lurkers: Connection, idle: int, slow: int) -> Watched:
    """Run the job once. The crowd: half watches all jobs, half this one."""

    def open_half(path: str) -> None:
        wishes = [(path, None)] * (idle // 2) + [(path, 0), (path, 1)] * (slow // 4)
        lurkers.send((service.port, wishes))
        lurkers.recv()

    open_half("/ws/jobs")
    service.ask("taken")
    job = service.client.submit("watched.zip")
    good = Listener(service.client, f"/ws/jobs/{job}")
    open_half(f"/ws/jobs/{job}")
    began_s = service.cpu_s()
    assert ended(service.client, job).status == "SUCCESS"
    spent_s, memory_mb = service.cpu_s() - began_s, rss_mb(service.pid)
    good.join(10)
    lurkers.send("left")
    told_end, frames = lurkers.recv()
    changes, lags = service.ask("taken")
    made_s = {change.seq: moment for moment, change in changes}
    pages = {c.processed: moment for moment, c in reversed(changes) if c.phase == "inferring"}
    told_s = {told.seq: moment for moment, told in reversed(good.told)}  # a silent job is told again
    return Watched(
        (pages[max(pages)] - pages[LEAD]) / (max(pages) - LEAD),
        spent_s / max(pages),
        [moment - made_s[seq] for seq, moment in told_s.items() if seq in made_s],
        lags,
        memory_mb,
        told_end,
        frames,
    )


def watchers(idle: int, slow: int, pairs: int, pages: int, side: int, seed: int) -> list[Line]:
    """The same job with and without a crowd of watchers, in turns."""
    rng = random.Random(seed)
    runs: dict[bool, list[Watched]] = {True: [], False: []}
    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder), observed=True) as service,
        child(crowd) as (lurkers, _),
    ):
        client = service.client
        upload(client, "watched.zip", pages, side, seed)
        ended(client, client.submit("watched.zip"))
        returner = Returner(client, seed)
        returner.start()
        for _ in range(pairs):
            for crowded in rng.sample([True, False], 2):
                runs[crowded].append(watch_job(service, lurkers, crowded * idle, crowded * slow))
        states = returner.stop()
        listed = json.loads(client.call("GET", "/jobs?limit=500").body)["jobs"]
    told = [run.told_end for run in runs[True]]
    frames = sum(run.frames for run in runs[True])
    return [
        loss_line(runs, f"speed lost to {idle} idle watchers and {slow} slow readers"),
        *(line for crowded in (False, True) for line in run_lines(runs[crowded], crowded)),
        Line("idle watchers told of the end", f"{min(told)} of {idle // 2 * 2} each time", "all",
             min(told) == idle // 2 * 2),
        Line("frames that they got", f"{frames}"),
        *returner_lines(states, returner.lines, {one["jobId"] for one in listed}),
    ]  # fmt: skip


def loss_line(runs: dict[bool, list[Watched]], what: str) -> Line:
    """How much slower the job was beside the crowd: the median of pairs, with their spread."""
    losses = [1 - alone.page_s / beside.page_s for alone, beside in zip(runs[False], runs[True], strict=True)]
    loss = statistics.median(losses)
    spread = f"{min(losses):+.1%} to {max(losses):+.1%}, {len(losses)} pairs"
    return Line(what, f"{loss:+.1%} ({spread})", "< 5%", loss < 0.05, True)


def run_lines(runs: list[Watched], crowded: bool) -> list[Line]:
    """What runs of one kind say."""
    name = "beside the crowd" if crowded else "alone"
    delays = [delay for run in runs for delay in run.delays_s]
    lags = [lag for run in runs for lag in run.lags_s]
    page_ms = 1000 * statistics.median(run.page_s for run in runs)
    cpu_ms = 1000 * statistics.median(run.cpu_s for run in runs)
    return [
        Line(f"a page, {name}; the service's processor time for it", f"{page_ms:.0f} ms; {cpu_ms:.1f} ms"),
        Line(f"change to good watcher, {name}: p50 / p99 / worst", f"{ms(delays)} ms",
             "p99 < 250 ms", percentile(delays, 0.99) < 0.25, True),
        Line(f"lag of the WebSocket loop, {name}: p50 / p99 / worst", f"{ms(lags)} ms",
             "p99 < 50 ms", percentile(lags, 0.99) < 0.05, True),
        Line(f"memory of the service, {name}: first / last run",
             f"{runs[0].memory_mb:.0f} / {runs[-1].memory_mb:.0f} MB"),
    ]  # fmt: skip


def returner_lines(states: list[JobState], lines: int, known: set[str]) -> list[Line]:
    """Whether a watcher that kept coming back missed anything."""
    seqs = [state.seq for state in states]
    over = [state.job_id for state in states if state.is_over]
    once = {*over} == known and len(over) == len(known)
    return [
        Line(f"ends told to a watcher that came back {lines} times", f"{len({*over})} of {len(known)}",
             "all, once each", once),
        Line("seq of what it was told", "rises" if seqs == sorted(seqs) else "falls", "rises",
             seqs == sorted(seqs)),
    ]  # fmt: skip


# ---------------------------------------------------------------- jobs: rows L01, L05, C14
@dataclass(frozen=True)
class Sample:
    """What the service holds at one moment."""

    threads: int
    files: int
    service_mb: float
    worker_mb: float
    wal_mb: float


def sample(service: Served, root: Path) -> Sample:
    """Look once."""
    wal = root / "jobs.sqlite3-wal"
    wal_mb = wal.stat().st_size / (1 << 20) if wal.exists() else 0.0
    return Sample(*service.threads_and_files(), rss_mb(service.pid), service.worker_mb(), wal_mb)


def growth_lines(samples: list[Sample], what: str) -> list[Line]:
    """From the first sample, taken when all was warm, to the last."""
    first, last = samples[0], samples[-1]
    grown_mb = last.service_mb - first.service_mb, last.worker_mb - first.worker_mb
    wal_mb = max(one.wal_mb for one in samples)
    flat = last.threads <= first.threads + 2 and last.files <= first.files + 4
    return [
        Line(f"threads and open files, {what}",
             f"{first.threads} to {last.threads}, {first.files} to {last.files}", "flat", flat),
        Line(f"memory of the service, {what}", f"{first.service_mb:.0f} MB {grown_mb[0]:+.1f} MB", "< +20 MB",
             grown_mb[0] < 20),
        Line(f"memory of the worker, {what}", f"{first.worker_mb:.0f} MB {grown_mb[1]:+.1f} MB", "< +20 MB",
             grown_mb[1] < 20),
        Line("write-ahead log of the job table, largest", f"{wal_mb:.1f} MB", "< 64 MB", wal_mb < 64),
    ]  # fmt: skip


def copy_is_whole(service: Served, copy: Path, acknowledged: list[str]) -> bool:
    """Take the database as it is on disk now; whether it is sound and knows every job so far."""
    service.ask(("copy", copy))
    with contextlib.closing(sqlite3.connect(copy)) as db:
        sound = db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return sound and {*acknowledged} <= {row[0] for row in db.execute("SELECT id FROM jobs")}


class Throughput:
    """Submits jobs and sees them through, with samples and copies of the database on the way."""

    def __init__(self, service: Served, root: Path, count: int, seed: int) -> None:
        self.service, self.root, self.count = service, root, count
        self.listener = Listener(service.client, "/ws/jobs")
        self.ids: list[str] = []
        self.samples: list[Sample] = []
        self.copies: list[bool] = []  # were they whole
        # Moments, told by how many jobs were submitted or done.
        self.copy_at = sorted(random.Random(seed).choices(range(2 * count), k=50), reverse=True)

    def ended(self) -> list[str]:
        """Ids of those of its jobs that were told to be over, in that order."""
        ours = {*self.ids}
        return [s.job_id for _, s in list(self.listener.told) if s.is_over and s.job_id in ours]

    def run(self) -> None:
        """Submit all, wait for all."""
        for n in range(self.count):
            self.ids.append(self.service.client.submit("three.zip", title=f"job {n}"))
            if n % 10 == 0:
                self._look()
        while len(self.ended()) < self.count:
            time.sleep(0.1)
            self._look()

    def _look(self) -> None:
        done = len(self.ended())
        if done * 20 >= self.count * (len(self.samples) + 1):
            self.samples.append(sample(self.service, self.root))
        while self.copy_at and len(self.ids) + done >= self.copy_at[-1]:
            self.copy_at.pop()
            copy = self.root.with_name(f"{self.root.name}-copy") / "jobs.sqlite3"
            copy.parent.mkdir(exist_ok=True)
            self.copies.append(copy_is_whole(self.service, copy, self.ids))


def many_jobs(jobs: int, seed: int) -> list[Line]:
    """Jobs of three tiny pages, submitted faster than they are done."""
    with tempfile.TemporaryDirectory() as folder, served(Path(folder, "root")) as service:
        root, client = Path(folder, "root"), service.client
        upload(client, "three.zip", 3, 16, seed)
        warm_up = client.submit("three.zip")
        ended(client, warm_up)
        through, began_s = Throughput(service, root, jobs, seed), time.monotonic()
        through.run()
        took_s, told = time.monotonic() - began_s, through.listener.stop()
        # The warm-up's end may be told to those who come within a round of it.
        over = [state for _, state in told if state.is_over and state.job_id != warm_up]
        whole = sum(
            zip_is_whole((root / state.artifact_path).read_bytes(), state.artifact_hash, 3)
            for state in over
            if state.artifact_path and state.artifact_hash
        )
        left = [*root.glob("staging/*"), *root.rglob("*.tmp")]
    fifo = [state.job_id for state in over] == through.ids
    return [
        Line("jobs done, with a whole artifact", f"{whole} of {jobs}", "all", whole == jobs == len(over)),
        Line("their order", "as submitted" if fifo else "another", "as submitted", fifo),
        Line("jobs a minute", f"{60 * jobs / took_s:.0f}"),
        *growth_lines(through.samples, f"from job {jobs // 20} to {jobs}"),
        Line("copies of the database amid the run, sound and with every acknowledged job",
             f"{sum(through.copies)} of {len(through.copies)}", "all", all(through.copies)),
        Line("files left in staging, temporary files", f"{len(left)}", "none", not left),
    ]  # fmt: skip


def zip_is_whole(data: bytes, sha256: str, pages: int) -> bool:
    """Whether an artifact is what its hash says, and holds what its report lists, each once."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        items = json.loads(archive.read("artifact-report.json"))["items"]
        hashes = [hashlib.sha256(archive.read(item["filename"])).hexdigest() for item in items]
        names = ["artifact-report.json", *(item["filename"] for item in items)]
        return (
            hashlib.sha256(data).hexdigest() == sha256
            and hashes == [item["sha256"] for item in items]
            and archive.namelist() == names
            and len({*names}) == pages + 1
        )


# ---------------------------------------------------------------- pages: row L02
def many_pages(pages: int, seed: int) -> list[Line]:
    """One job of very many tiny pages, asked after all the time."""
    status_s: list[float] = []
    listed_s: list[float] = []
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as service:
        root, client = Path(folder), service.client
        upload(client, "many.zip", pages, 16, seed)
        files = [{"source": f"scan/{n}.png", "target": f"{n:05}.png"} for n in range(pages)]
        job = client.submit("many.zip", manifest={"version": 1, "files": files})
        listener = Listener(client, f"/ws/jobs/{job}")
        while not (state := timed(status_s, lambda: client.state(job))).is_over:
            if state.processed * 10 >= pages * (len(samples) + 1):
                samples.append(sample(service, root))
                timed(listed_s, lambda: client.call("GET", f"/jobs/{job}/pages"))
            time.sleep(0.02)
        listener.join(10)
        samples.append(sample(service, root))
        whole = state.artifact_hash is not None and zip_is_whole(
            client.call("GET", f"/jobs/{job}/artifact").body, state.artifact_hash, pages
        )
        report = timed(listed_s, lambda: client.call("GET", f"/jobs/{job}/report")).json()["report"]
    told = listener.told
    worst = max(sum(at_s <= other_s < at_s + 1 for other_s, _ in told) for at_s, _ in told)
    first, last = (rate(told, pages * share // 10, pages * (share + 1) // 10) for share in (1, 8))
    return [
        Line("pages done, artifact whole", f"{state.processed} of {pages}, {whole}", "all",
             state.status == "SUCCESS" and state.processed == pages and whole),
        Line("of them in the manifest", f"{report['reconciliation']['matched']}", "all",
             report["reconciliation"]["matched"] == pages),
        Line("pages a second, second and ninth tenth", f"{first:.1f}, {last:.1f}", "within a fifth",
             last > 0.8 * first, True),
        Line(f"status answer ({len(status_s)} times): p50 / p99 / worst", f"{ms(status_s)} ms",
             "p99 < 50 ms", percentile(status_s, 0.99) < 0.05, True),
        Line("list of all pages, report: worst", f"{1000 * max(listed_s):.0f} ms", "< 5 s",
             max(listed_s) < 5, True),
        Line("frames to a watcher, most in a second", f"{worst}", "<= 11", worst <= 11, True),
        *growth_lines(samples[:-1], f"from page {pages // 10} to {pages // 10 * 9}"),
        Line("memory of service and worker after packing",
             f"{samples[-1].service_mb:.0f}, {samples[-1].worker_mb:.0f} MB"),
    ]  # fmt: skip


def timed(into_s: list[float], call: Callable[[], Any]) -> Any:
    """The call's result; its duration is added to `into_s`."""
    began_s = time.monotonic()
    result = call()
    into_s.append(time.monotonic() - began_s)
    return result


def rate(told: list[tuple[float, JobState]], first: int, last: int) -> float:
    """Pages a second between two counts of finished ones."""
    start, end = (next((at_s, s.processed) for at_s, s in told if s.processed >= n) for n in (first, last))
    return (end[1] - start[1]) / (end[0] - start[0]) if end[0] > start[0] else math.nan


# ---------------------------------------------------------------- race: rows X03, L06
def race_once(service: server.Service, path: str, rng: random.Random, moment_s: list[float]) -> str:
    """Submit, cancel about when it ends, see that what is left is whole; the state it ended in.

    moment_s: holds the guess of when it ends, mended by each round, so that both outcomes come.
    """
    table, layout = service.table, service.config.layout
    wanted = submissions.Submission("race", "1", "zip", path, COMPACT, None)
    job = submissions.submit(table, layout, wanted, None, "", service.config.limits)
    service.dispatcher.wake()
    time.sleep(moment_s[0] * rng.uniform(0.8, 1.2))
    jobs.cancel(table, job.id, table.clock())
    service.dispatcher.wake()
    assert service.dispatcher.wait_released(job.id, 20)
    job, artifact = table.get(job.id), layout.artifact("race", "1", job.id)
    if job.state == jobs.SUCCESS:
        assert not job.cancelled and zip_is_whole(artifact.read_bytes(), job.artifact_hash or "", job.total)
    else:
        assert job.state == jobs.FAILED and job.cancelled and job.artifact_hash is None
        assert not artifact.exists()
    assert not (layout.staging / job.id).exists()
    moment_s[0] *= 0.95 if job.state == jobs.SUCCESS else 1 / 0.95
    return job.state


def race(rounds: int, seed: int) -> list[Line]:
    """A cancel beside the end of its job, over and over."""
    rng, moment_s, ends = random.Random(seed), [0.1], Counter[str]()
    with (
        tempfile.TemporaryDirectory() as folder,
        server.Service(settings.Config(storage_root=Path(folder), port=0)) as service,
    ):
        client = Client(service.url)
        upload(client, "race.zip", 2, 16, seed)
        ended(client, client.submit("race.zip"))
        # More rounds where no race came about: one end alone says nothing.
        while ends.total() < rounds or (len(ends) < 2 and ends.total() < 300):
            ends[race_once(service, "race.zip", rng, moment_s)] += 1
        left = [*Path(folder).glob("staging/*"), *Path(folder).rglob("*.tmp")]
        artifacts = len([*Path(folder).glob("artifacts/*")])
        after = ended(client, client.submit("race.zip")).status
    return [
        Line("rounds: done with a whole artifact, cancelled without any",
             f"{ends[jobs.SUCCESS]}, {ends[jobs.FAILED]} of {ends.total()}", "both came", len(ends) == 2),
        Line("artifacts on disk beside the first job's", f"{artifacts - 1}", "of jobs that are done",
             artifacts - 1 == ends[jobs.SUCCESS]),
        Line("files left in staging, temporary files", f"{len(left)}", "none", not left),
        Line("a job after all that", after, "SUCCESS", after == jobs.SUCCESS),
    ]  # fmt: skip


# ---------------------------------------------------------------- events: rows L05, W05
def events(events: int, seed: int) -> list[Line]:
    """Changes of one job as fast as the table takes them, beside watchers that never read."""
    with tempfile.TemporaryDirectory() as folder, still(Path(folder)) as service:
        job, wal = running(service), Path(folder, "jobs.sqlite3-wal")
        lurkers = [Lurker(service.http.server_port, path, 0) for path in ("/ws/jobs", f"/ws/jobs/{job.id}")]
        good = Listener(Client(service.url), f"/ws/jobs/{job.id}")
        before_mb, largest, began_s = rss_mb(os.getpid()), 0, time.monotonic()
        for n in range(1, events + 1):
            assert service.table.change(job, state=jobs.RUNNING, processed=n)
            if n % 1000 == 0:
                largest = max(largest, wal.stat().st_size)
        took_s, grown_mb = time.monotonic() - began_s, rss_mb(os.getpid()) - before_mb
        jobs.advance(service.table, job, "fail", 3000.0, processed=events)
        good.join(30)
        for one in lurkers:
            one.line.close()
    last, frames = good.told[-1][1], len(good.told)
    return [
        Line("changes, and of them a second", f"{events}, {events / took_s:.0f}"),
        Line("write-ahead log, largest", f"{largest / (1 << 20):.1f} MB", "< 64 MB", largest < 64 << 20),
        Line("memory beside two watchers that never read", f"{grown_mb:+.1f} MB", "< +20 MB", grown_mb < 20),
        Line("frames to a good watcher, a second", f"{frames / took_s:.1f}", "<= 10",
             frames <= 10 * took_s + 3, True),
        Line("the last one", f"{last.status} at {last.processed}", "the end",
             (last.status, last.processed) == ("FAILED", events)),
    ]  # fmt: skip


# ---------------------------------------------------------------- ranges: row D10
def ranges(ranges: int, mb: int, seed: int) -> list[Line]:
    """Ranges of one large artifact to many clients at once."""
    rng, status_s, memory_mb = random.Random(seed), [], []
    with tempfile.TemporaryDirectory() as folder:
        with still(Path(folder)) as service:
            job = finished(service)
            path = service.config.layout.artifact(job.title, job.volume, job.id)
            os.truncate(path, mb << 20)
            assert service.table.change(job, state=jobs.SUCCESS, artifact_bytes=mb << 20)
        with served(Path(folder)) as service:
            client, size = service.client, (mb << 20) // 8
            before_mb = rss_mb(service.pid)
            starts = [rng.randrange(0, (mb << 20) - size) for _ in range(ranges)]
            # Elsewhere: beside so many reading threads this one would wait for its own interpreter.
            with child(read_ranges, service.port, job.id, starts, size) as (conn, _):
                while not conn.poll(0.02):
                    timed(status_s, lambda: client.state(job.id))
                    memory_mb.append(rss_mb(service.pid))
                whole = conn.recv().count(size)
    grown_mb = max(memory_mb) - before_mb
    return [
        Line(f"ranges of {size >> 20} MB of an artifact of {mb} MB, at once", f"{whole} of {ranges} whole",
             "all", whole == ranges),
        Line("memory of the service, at most", f"{before_mb:.0f} MB {grown_mb:+.1f} MB", "< +64 MB",
             grown_mb < 64),
        Line(f"status answer ({len(status_s)} times): p50 / p99 / worst", f"{ms(status_s)} ms",
             "p99 < 200 ms", percentile(status_s, 0.99) < 0.2, True),
    ]  # fmt: skip


def read_ranges(conn: Connection, port: int, job: str, starts: list[int], size: int) -> None:
    """Read all of them at once; sends how many bytes each got."""
    with ThreadPoolExecutor(len(starts)) as pool:
        conn.send(list(pool.map(lambda start: read_range(port, job, start, size), starts)))


def read_range(port: int, job: str, start: int, size: int) -> int:
    """Bytes of the body that came."""
    room = bytearray(256 << 10)
    with dial(port) as line:
        line.settimeout(60)
        line.sendall(
            f"GET /jobs/{job}/artifact HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Range: bytes={start}-{start + size - 1}\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            head += line.recv(4096)
        assert head.startswith(b"HTTP/1.1 206 "), head
        came = len(head.partition(b"\r\n\r\n")[2])
        while count := line.recv_into(room):
            came += count
    return came


# ---------------------------------------------------------------- command line
def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(required=True)

    def command(name: str, what: Callable[..., list[Line]], **numbers: int) -> None:
        one = commands.add_parser(name, help=(what.__doc__ or "").splitlines()[0])
        for option, default in {**numbers, "seed": 1}.items():
            one.add_argument(f"--{option}", type=int, default=default)
        one.set_defaults(what=what)

    command("watchers", watchers, idle=500, slow=50, pairs=7, pages=24, side=768)
    command("jobs", many_jobs, jobs=1000)
    command("pages", many_pages, pages=10_000)
    command("race", race, rounds=500)
    command("events", events, events=100_000)
    command("ranges", ranges, ranges=100, mb=500)
    chosen = vars(parser.parse_args())
    began_s = time.monotonic()
    status = show(chosen.pop("what")(**chosen))
    print(f"\n{' '.join(sys.argv[1:])}: {time.monotonic() - began_s:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
