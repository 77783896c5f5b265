"""Hostile bytes against a real service on a real socket, by seed: requests, and WebSocket frames.

    python tests/fuzz.py --http 100000 --ws 20000 --seed 1

Prints what was sent and answered, and exits with 1 where an invariant was broken, naming seed and
index of the case; `--only http:INDEX` or `ws:INDEX` sends that one alone and shows it. What one
answer must be stands in hostile_http.py and hostile_ws.py; here is what must be true of the service
afterwards. Linux only (/proc).

Map: Target (a service in its own process) - sending - Tally, Round - the table - main
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import itertools
import logging
import multiprocessing
import os
import re
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hostile_http  # noqa: E402
import hostile_ws  # noqa: E402
from client import Client, JobList, parse  # noqa: E402
from hostile_http import Answer, Violation, World  # noqa: E402

TOKEN = "fuzz-Geheimnis-0123456789abcdef"
VICTIMS = 300
HANG_S = 8.0  # below the service's own deadlines: what only they end counts as a hang
SETTLE_S = 10.0  # for threads to notice that their clients are gone
BLOCK = 500  # cases between two looks at the service as a whole
RSS_MB = 32.0  # that a service may hold more than after its first requests
LINES = 4  # connections at once
MOST = 5  # violations that are shown


# ---------------------------------------------------------------- the service
def serve(conn: Any, root: Path, log: Path, plant: str) -> None:
    """Entry of the service's process: tells its World, ends when the other side does."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)  # what a thread dies of goes to stderr
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    from serving import still

    from web import api

    api.PREVIEW_S = 0.05  # nobody is there to draw one
    if plant:
        module, name = plant.split(":")
        getattr(importlib.import_module(module), name)()
    # A page for a reader would be waited for in vain.
    with still(root, token=TOKEN, page_wait_s=0) as service:
        conn.send(populated(service))
        with contextlib.suppress(EOFError):
            conn.recv()


def populated(service: Any) -> World:
    """Jobs in every state, so that every route has something to answer with."""
    from serving import finished, png, queued, running

    import jobs

    layout = service.config.layout
    (layout.incoming / "pages").mkdir()
    (layout.incoming / "pages/1.png").write_bytes(png())
    done = [finished(service, bytes(range(256)) * 400) for _ in range(2)]
    sha256 = hashlib.sha256(png()).hexdigest()
    for job in done:
        folder = layout.output_dir(job.title, job.volume, job.id)
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(png(64, 96))
        (layout.previews / job.id).mkdir(parents=True)
        (layout.previews / job.id / f"1-after-64-{sha256[:16]}.jpg").write_bytes(b"\xff\xd8\xff\xe0")
        facts = {"output": "1.png", "sha256": sha256, "bytes": 1, "width": 64, "height": 96, "mode": "L"}
        page = jobs.Page(job.id, 1, "1.png", "00001.png", sha256, 1, None, "1", "upscaled", **facts)
        bad = jobs.Page(
            job.id, 2, "2.png", "00002.png", sha256, 1, "damaged", "2", "carried", **facts, error="why"
        )
        service.table.replace_pages(job.id, [page, bad])
    service.table.change(done[1], state=jobs.SUCCESS, failed_pages=1)
    runs = running(service)
    victims = tuple(queued(service, f"victim {n}").id for n in range(VICTIMS))
    secrets = (TOKEN, str(layout.root), str(ROOT), "Traceback", "site-packages", 'File \\"', "sqlite3.")
    etag = str(done[0].artifact_hash)
    return World(service.http.server_port, TOKEN, done[0].id, done[1].id, runs.id, etag, victims, secrets)


@dataclass(frozen=True)
class Vitals:
    """What a leak shows in."""

    threads: int
    fds: int
    rss_mb: float

    def __str__(self) -> str:
        return f"{self.threads}, {self.fds}, {self.rss_mb:.0f}"


class Target:
    """A service in a process of its own, with jobs in every state, watched from outside.

    plant: "module:function", called in that process before the service starts; see plants.py.
    """

    def __init__(self, folder: Path, plant: str = "") -> None:
        folder.mkdir(parents=True)
        self.folder, self.log = folder, folder / "log"
        (folder / "canary").write_text("untouched")
        context = multiprocessing.get_context("spawn")
        self._conn, theirs = context.Pipe()
        arguments = (theirs, folder / "storage", self.log, plant)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        try:
            self._meet()
        except BaseException:
            self.close()
            raise

    def _meet(self) -> None:
        try:
            world: World = self._conn.recv()
        except EOFError:
            raise RuntimeError(f"the service did not start: {self.log.read_text()}") from None
        self.client = Client(f"http://127.0.0.1:{world.port}", TOKEN)
        self.world = replace(world, routes=self._routes())
        self.kept = {world.finished, world.partly, world.running}  # jobs that nothing may remove
        for index in range(60):  # whatever is made once, is made before the first look
            with contextlib.suppress(Violation):
                send(hostile_http.make(0, index, self.world).data, (), world.port)
        self.before = self._calm()
        self._log_at = self.log.stat().st_size
        self._beside = self._things_beside()
        self.known = {job.job_id for job in self.jobs()}
        self.submitted: set[str] = set()  # answered with 202 since then

    def close(self) -> None:
        """End it."""
        self._conn.close()
        self.process.kill()
        self.process.join()

    def _routes(self) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
        """As the service describes itself: a new route is fuzzed from its first day."""
        paths = self.client.call("GET", "/openapi.json").json()["paths"]
        return tuple(
            (
                method.upper(),
                path,
                tuple(one["name"] for one in operation["parameters"] if one["in"] == "query"),
            )
            for path, methods in paths.items()
            for method, operation in methods.items()
        )

    # -- looking
    def vitals(self) -> Vitals:
        """Now."""
        proc = Path(f"/proc/{self.process.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        threads, fds = (len(os.listdir(proc / name)) for name in ("task", "fd"))
        return Vitals(threads, fds, pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20))

    def _calm(self) -> Vitals:
        """When threads and descriptors have been as few as now for half a second."""
        fewest, since_s = self.vitals(), time.monotonic()
        while time.monotonic() - since_s < 0.5:
            time.sleep(0.02)
            now = self.vitals()
            if now.threads < fewest.threads or now.fds < fewest.fds:
                since_s = time.monotonic()
            fewest = Vitals(min(now.threads, fewest.threads), min(now.fds, fewest.fds), now.rss_mb)
        return fewest

    def leaks(self, limit_s: float | None = None) -> list[str]:
        """Threads and descriptors beyond those at the start, once the limit (SETTLE_S) has passed."""
        deadline_s = time.monotonic() + (SETTLE_S if limit_s is None else limit_s)
        while (now := self.vitals()).threads > self.before.threads or now.fds > self.before.fds:
            if time.monotonic() > deadline_s:
                return [f"a leak: {self.before} became {now}"]
            time.sleep(0.005)
        return []

    def outcry(self) -> list[str]:
        """What the log holds since the last look that it must not."""
        with open(self.log, "rb") as file:
            file.seek(self._log_at)
            text = file.read().decode("utf-8", "replace")
            self._log_at = file.tell()
        found = re.search(
            r"Traceback|request failed, number| (ERROR|CRITICAL) |Exception in|never retrieved|raised exc",
            text,
        )
        faults = [f"the log says: {text[max(0, found.start() - 200) :][:1500]}"] if found else []
        return faults + (["the log holds the token"] if TOKEN in text else [])

    def _things_beside(self) -> dict[str, str]:
        """What lies beside the storage root and directly in it, with hashes."""
        mine = {*self.folder.glob("log*"), *self.folder.glob("storage/jobs.sqlite3*")}
        found = {*self.folder.glob("*"), *self.folder.glob("storage/*")} - mine
        return {
            str(one): hashlib.sha256(one.read_bytes()).hexdigest() if one.is_file() else "" for one in found
        }

    def jobs(self) -> list[Any]:
        """Every row, as strictly as a client reads it."""
        found, cursor = [], ""
        while True:
            page: JobList = parse(JobList, self.client.call("GET", f"/jobs?limit=500{cursor}").json())
            found += page.jobs
            if page.next_cursor is None:
                return found
            cursor = f"&cursor={page.next_cursor}"

    def faults(self) -> list[str]:
        """What is wrong with the service as a whole."""
        if not self.process.is_alive():
            return [f"the service ended with {self.process.exitcode}", *self.outcry()]
        faults = []
        if self.client.call("GET", "/health").json()["status"] != "ok":
            faults.append("/health is not ok")
        faults += self.leaks()
        if b"reichan_watchers 0\n" not in self.client.call("GET", "/metrics").body:
            faults.append("watchers are left")
        if (rss_mb := self.vitals().rss_mb) > self.before.rss_mb + RSS_MB:
            faults.append(f"resident memory grew from {self.before.rss_mb:.0f} to {rss_mb:.0f} MB")
        if self._things_beside() != self._beside:
            faults.append(f"something was written where nothing belongs: {self._things_beside()}")
        return faults + self.outcry()

    def lost_or_made_up(self) -> list[str]:
        """Rows that no answer of 202 speaks of, and those of such answers that are gone."""
        rows = {job.job_id for job in self.jobs()}
        lost = (self.kept | self.submitted) - rows
        made_up = rows - self.known - self.submitted
        return [f"{len(ids)} jobs are {what}" for ids, what in ((lost, "lost"), (made_up, "made up")) if ids]


# ---------------------------------------------------------------- sending
def send(data: bytes, cuts: Iterable[int], port: int, drop: bool = False, half: bool = True) -> bytes:
    """All that comes back until the service closes. Raises Violation where it doesn't.

    cuts: send in parts; drop: reset at once; half: say that no more is sent.
    """
    deadline_s = time.monotonic() + HANG_S
    with socket.create_connection(("127.0.0.1", port), timeout=HANG_S) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found = b""
        try:
            for a, b in itertools.pairwise((0, *cuts, len(data))):
                line.sendall(data[a:b])
            if drop:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return b""
            if half:
                line.shutdown(socket.SHUT_WR)
        except TimeoutError:
            raise Violation(f"it does not read: {HANG_S} s") from None
        except OSError:
            pass  # it closed while we talked
        try:
            while piece := line.recv(1 << 18):
                found += piece
                line.settimeout(max(0.01, deadline_s - time.monotonic()))
        except TimeoutError:
            raise Violation(f"a hang: not closed after {HANG_S} s; so far {found[:200]!r}") from None
        except ConnectionResetError:
            pass
        return found


@dataclass
class Tally:
    """What was sent and what came of it."""

    cases: int = 0
    sent: int = 0  # requests or frames
    answers: Counter[str] = field(default_factory=Counter)  # by status, or close code
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    vitals: str = ""  # the service's, before and after


class Round:
    """Cases of one kind ("http" or "ws") against one target, a block at a time."""

    def __init__(self, target: Target, kind: str, seed: int) -> None:
        self.target, self.kind, self.seed = target, kind, seed
        self.tally = Tally()
        self.lock = threading.Lock()  # of tally

    def make(self, index: int) -> Any:
        """Case `index`."""
        maker = hostile_http.make if self.kind == "http" else hostile_ws.make
        return maker(self.seed, index, self.target.world)

    def try_one(self, index: int) -> None:
        """Send a case and judge what comes back."""
        try:
            case = self.make(index)
            outcome, sent = (self._http if self.kind == "http" else self._ws)(case)
        except (Violation, OSError) as problem:
            with self.lock:
                self.tally.faults.append(f"{self.kind}:{index} --seed {self.seed}: {problem}")
            return
        with self.lock:
            self.tally.cases += 1
            self.tally.sent += sent
            self.tally.answers.update(outcome)

    def _http(self, case: hostile_http.Case) -> tuple[list[str], int]:
        data = send(case.data, case.cuts, self.target.world.port, case.drop)
        if case.drop:
            return ["dropped"], case.requests
        answers = hostile_http.judge(case, data, self.target.world)
        for answer in answers:
            self._note_row(case, answer)
        return [str(answer.status) for answer in answers] or ["closed, no request was whole"], case.requests

    def _note_row(self, case: hostile_http.Case, answer: Answer) -> None:
        if answer.status != 202:
            return
        job_id = hostile_http.loads(answer.body)["jobId"]
        with self.lock:
            self.target.submitted.add(job_id)
        if case.kind == "odd_json":
            body = hostile_http.loads(case.data.partition(b"\r\n\r\n")[2])
            if not hostile_http.is_well_formed(body):
                raise Violation(f"202 for {body}"[:500])

    def _ws(self, case: hostile_ws.Case) -> tuple[list[str], int]:
        data = case.handshake + case.frames
        half = not (case.ends_itself and case.count % 2)
        data = send(data, case.cuts, self.target.world.port, case.drop, half)
        if case.drop:
            return ["dropped"], case.count
        status, code = hostile_ws.judge(case, data, self.target.world)
        return [f"no 101: {status}" if status != 101 else str(code or "none: the client left")], case.count

    # -- blocks
    def block(self, indices: Iterable[int], lines: int = LINES) -> None:
        """These cases over several lines at once, then a look at the service."""
        began_s, waiting = time.monotonic(), iter(indices)

        def work() -> None:
            while len(self.tally.faults) < MOST:
                with self.lock:
                    index = next(waiting, None)
                if index is None:
                    return
                self.try_one(index)

        with ThreadPoolExecutor(lines) as threads:
            for line in [threads.submit(work) for _ in range(lines)]:
                line.result()
        self.tally.seconds += time.monotonic() - began_s
        self.tally.faults += [] if self.tally.faults else self.target.faults()

    def run(self, wanted: int, folder: Path, plant: str = "") -> Tally:
        """Blocks until so many requests or frames were sent, or something broke.

        folder: for the fresh services of a search; plant: what is planted there as well.
        """
        tally, start = self.tally, 0
        while tally.sent < wanted and not tally.faults:
            indices = range(start, start + BLOCK)
            self.block(indices)
            if tally.faults and not any(fault.startswith(self.kind) for fault in tally.faults):
                tally.faults.append(self.narrow(indices, folder, plant))
            start += BLOCK
        tally.faults += [] if tally.faults else self.target.lost_or_made_up()
        tally.vitals = f"{self.target.before} before, {self.target.vitals()} after"
        return tally

    def narrow(self, indices: Iterable[int], folder: Path, plant: str) -> str:
        """The first case after which a fresh service is not as it was: one at a time."""
        with contextlib.closing(Target(folder, plant)) as fresh:
            again = Round(fresh, self.kind, self.seed)
            for index in indices:
                again.try_one(index)
                faults = [*again.tally.faults, *fresh.outcry(), *fresh.leaks(1.0)]
                if faults:
                    return f"{self.kind}:{index} --seed {self.seed} does it: {faults[0]}"
        return "no single case does it; several together"

    def show(self, index: int) -> None:
        """Send one case, print it and its answer."""
        case = self.make(index)
        print(case)
        data = case.data if self.kind == "http" else case.handshake + case.frames
        print(send(data, case.cuts, self.target.world.port))
        self.block([index], 1)


# ---------------------------------------------------------------- the table
def fuzz(wanted: dict[str, int], seed: int, plant: str = "") -> dict[str, Tally]:
    """So many requests ("http") and frames ("ws") against one service."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(Target(Path(folder, "first"), plant)) as target:
            return {
                kind: Round(target, kind, seed).run(count, Path(folder, f"narrow-{kind}"), plant)
                for kind, count in wanted.items()
            }


def table(tallies: dict[str, Tally]) -> str:
    """What was sent, answered and found, as Markdown."""
    rows = ["| what | requests | frames |", "| --- | --- | --- |"]
    columns = [tallies.get(kind, Tally()) for kind in ("http", "ws")]

    def row(what: str, *values: object) -> None:
        rows.append(f"| {what} | {' | '.join(map(str, values))} |")

    row("sent", *(f"{tally.sent:,}" for tally in columns))
    row("over connections", *(f"{tally.cases:,}" for tally in columns))
    row("seconds", *(f"{tally.seconds:.0f}" for tally in columns))
    row("a second", *(f"{tally.sent / max(0.001, tally.seconds):.0f}" for tally in columns))
    for name, words in {"hangs": "a hang", "leaks": "a leak", "tracebacks": "the log says"}.items():
        row(name, *(sum(words in fault for fault in tally.faults) for tally in columns))
    row("the service: threads, descriptors, MB", *(tally.vitals for tally in columns))
    row("violations of any kind", *(len(tally.faults) for tally in columns))
    row("answers", *(", ".join(f"{k}: {n:,}" for k, n in sorted(tally.answers.items())) for tally in columns))
    return "\n".join(rows)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--http", type=int, default=0, metavar="REQUESTS")
    parser.add_argument("--ws", type=int, default=0, metavar="FRAMES")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", metavar="KIND:INDEX", help="send one case and show it")
    parser.add_argument("--plant", default="", metavar="MODULE:FUNCTION", help="a bug that must be found")
    flags = parser.parse_args()
    if flags.only:
        kind, _, index = flags.only.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.closing(Target(Path(folder, "first"), flags.plant)) as target:
                one = Round(target, kind, flags.seed)
                one.show(int(index))
                tallies = {kind: one.tally}
    else:
        wanted = {kind: count for kind, count in (("http", flags.http), ("ws", flags.ws)) if count}
        tallies = fuzz(wanted, flags.seed, flags.plant)
    print(table(tallies))
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    print(*faults, sep="\n\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
