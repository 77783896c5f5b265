"""Kill -9 the worker or the whole service at random moments, and look for anything lost.

    python tests/kills.py --kills 50 --seed 1
    python tests/kills.py --kills 20 --seed 1 --queued 100

The real service (`python server.py`, a process of its own) runs a small volume, with two bad
pages in it, undisturbed; then again and again with one to four kills a job, at moments chosen
by what is on disk, by the job's state, or by the clock. After each job `Trial.faults` says
what is not as it must be:

  - the job succeeded; its artifact has the promised hash, and the bytes of the undisturbed one
    but for the job's id; packed again from its pages it is the same file;
  - a page that was recorded when a kill came is still that very file (inode, time) with that
    very row: none was computed twice;
  - no *.tmp and no working copy is left, and the job table is whole (at each kill, too);
  - a worker whose service was killed is gone within 5 s.

With --queued the volume is one page, many jobs wait at once, and the kills come by the clock.
Prints a table; exit status 1 if there was a fault. Linux only (reads /proc).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from client import Client, JobState
from serving import png, until, volume

import jobs
import storage
from files import artifacts, database

ROOT = Path(__file__).resolve().parents[1]
PAGES = {f"{n:02d}.png": png(48, 64, n) for n in range(22)}
# A large one, or packing would be over before it can be struck.
BAD = {"07.jpg": b"no page at all" * (1 << 20), "15b.png": png(48, 64)[:-40]}
ALL = len(PAGES | BAD)
GONE_S = 5.0  # for a worker, after its service was killed
END_S = 120.0  # for a job; it takes a few, this one only ends a hang
# Kills of the worker in one job: a page alone in a worker that dies twice is carried, by design,
# and a third death amid staging or packing fails the job.
WORKER_KILLS = 2
PHASES = ("staging", "inferring", "packing", "tidy")
VICTIMS = ("worker", "service")


# ---------------------------------------------------------------- the service and its processes
def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers_of(pid: int) -> list[int]:
    """The worker processes of a service; multiprocessing's resource tracker is none."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


class Service:
    """`python server.py` on one storage root, to be killed and started again."""

    def __init__(self, root: Path, command: tuple[str, ...] = (str(ROOT / "server.py"),)) -> None:
        self.root = root
        self.command = [sys.executable, *command, "--port", "0", "--storage-root", str(root)]
        self.layout = storage.Layout(root, root / "models")
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Start it, and wait until it serves."""
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "http://" in line, f"the service did not start: {line!r}"
        self.client = Client(line.split()[2])

    def workers(self) -> list[int]:
        """Its worker processes now."""
        return workers_of(self.process.pid) if self.process else []

    def kill(self) -> None:
        """Kill -9, the workers left to themselves."""
        if self.process:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def end(self) -> int | None:
        """SIGTERM; the exit status."""
        if self.process is None:
            return None
        self.process.terminate()
        try:
            return self.process.wait(30)
        finally:
            self.kill()

    @contextlib.contextmanager
    def frozen_table(self) -> Iterator[jobs.JobTable]:
        """A copy of the job table as it lies on disk; the service must be killed or stopped.
        Opening it fails unless it is whole."""
        with tempfile.TemporaryDirectory() as folder:
            for path in self.root.glob("jobs.sqlite3*"):
                if path.name.endswith(("sqlite3", "-wal")):
                    shutil.copy(path, folder)
            table = jobs.JobTable(Path(folder, "jobs.sqlite3"))
            try:
                yield table
            finally:
                table.close()


# ---------------------------------------------------------------- moments
class Scene:
    """What can be seen of one job from outside."""

    def __init__(self, service: Service, job: str) -> None:
        self.service, self.job = service, job
        layout = service.layout
        self.staging = layout.staging / job
        self.artifact = layout.artifact("作品名", "01", job)
        self.outputs = layout.output_dir("作品名", "01", job)

    def count(self, folder: Path, suffix: str = "") -> int:
        """Files in a folder."""
        with contextlib.suppress(OSError):
            return sum(name.endswith(suffix) for name in os.listdir(folder))
        return 0

    def has_report(self) -> bool:
        return (self.outputs / storage.REPORT_NAME).exists()

    def has_zip(self) -> bool:
        return self.artifact.exists()

    def zip_begun(self) -> bool:
        return self.has_zip() or self.count(self.artifact.parent, ".tmp") > 0

    def is_over(self) -> bool:
        return self.service.client.state(self.job).is_over


@dataclass(frozen=True)
class Moment:
    """A moment to strike at: once `reached` holds, within `delay_s` seconds, or when the phase ends."""

    phase: str
    what: str
    reached: Callable[[Scene, int], bool]  # the second: a number of pages, drawn
    delay_s: float


# What is reached stays so until the end: none can be missed.
MOMENTS = (
    Moment("staging", "the 202 was sent", lambda scene, n: True, 0.05),
    Moment("staging", "the worker boots", lambda scene, n: bool(scene.service.workers()), 3.0),
    Moment("staging", "n pages are copied", lambda scene, n: scene.count(scene.staging) >= n, 0.01),
    Moment("staging", "the model loads", lambda scene, n: scene.count(scene.staging) > 0, 0.3),
    Moment("inferring", "n pages are there", lambda scene, n: scene.count(scene.outputs) >= n, 0.03),
    Moment("inferring", "n pages are there, a while", lambda scene, n: scene.count(scene.outputs) >= n, 0.3),
    Moment("packing", "the last page is there", lambda scene, n: scene.count(scene.outputs) >= ALL, 0.05),
    Moment("packing", "the report is there", lambda scene, n: scene.has_report(), 0.04),
    Moment("packing", "the zip is begun", lambda scene, n: scene.zip_begun(), 0.02),
    Moment("packing", "the zip is there", lambda scene, n: scene.has_zip(), 0.0),
    Moment("tidy", "the job is over", lambda scene, n: scene.has_zip() and scene.is_over(), 0.01),
    Moment("tidy", "the zip is there, a while", lambda scene, n: scene.has_zip(), 0.05),
)


# By what is seen at the end of a phase; n: pages that were there when the moment was reached.
PHASE_ENDS: dict[str, Callable[[Scene, int], bool]] = {
    "staging": lambda scene, n: scene.count(scene.outputs) > n,
    "inferring": lambda scene, n: scene.count(scene.outputs) >= ALL,
    "packing": lambda scene, n: scene.has_zip(),
    "tidy": lambda scene, n: False,
}


def draw_moments(kills: int, rng: random.Random) -> list[list[tuple[Moment, str]]]:
    """`kills` moments with their victims, phases and victims evenly, as the kills of some jobs."""
    wanted = [(PHASES[i % 4], VICTIMS[i // 4 % 2]) for i in range(kills)]
    rng.shuffle(wanted)
    drawn: list[list[tuple[Moment, str]]] = []
    while wanted:
        of_job, wanted = wanted[: (size := rng.randint(1, 4))], wanted[size:]
        of_job.sort(key=lambda one: PHASES.index(one[0]))
        while of_job:  # what one job can't take is another's
            taken: list[tuple[str, str]] = []
            for one in list(of_job):
                too_many = sum(victim == "worker" for _, victim in taken) == WORKER_KILLS
                if not (one[1] == "worker" and too_many) and "tidy" not in [phase for phase, _ in taken]:
                    taken.append(one)
                    of_job.remove(one)
            drawn.append(
                [(rng.choice([m for m in MOMENTS if m.phase == phase]), victim) for phase, victim in taken]
            )
    return drawn


# ---------------------------------------------------------------- one job and its kills
@dataclass(frozen=True)
class Trace:
    """A page that was recorded: its row's facts, and which file it is."""

    sha256: str
    seconds: float | None
    inode: int
    time_ns: int


@dataclass(frozen=True)
class Kill:
    """What was killed, and in which phase the job really was then."""

    victim: str
    phase: str


@dataclass
class Tally:
    """All that happened."""

    kills: list[Kill] = field(default_factory=list)
    recorded: int = 0  # pages on record at a kill, all kills together
    recomputed: int = 0
    slowest_end_s: float = 0.0  # of a worker whose service was killed
    jobs: int = 0
    faults: list[str] = field(default_factory=list)


class Trial:
    """One job, submitted, killed at moments, and looked at."""

    def __init__(self, service: Service, tally: Tally, job: str) -> None:
        self.service = service
        self.tally = tally
        self.job = job
        self.scene = Scene(service, job)
        self.traces: dict[int, Trace] = {}
        self.workers: list[int] = []  # of the service, as last seen: a strike has no time to look
        self.found: list[str] = []  # faults
        self.orphans: dict[int, float] = {}  # worker -> when its service was killed

    # -- killing
    def strike(self, moment: Moment, victim: str, rng: random.Random) -> None:
        """Wait for the moment, kill, start again what was killed."""
        n, delay_s = rng.randint(1, len(PAGES)), rng.uniform(0, moment.delay_s)
        started_s = looked_s = time.monotonic()
        while not moment.reached(self.scene, n):
            now_s = time.monotonic()
            if now_s - looked_s > 0.2:
                self.workers, looked_s = self.service.workers(), now_s
            if now_s - started_s > END_S:
                self.found.append(f"it never came that {moment.what}")
                return
            time.sleep(0.0002)
        strike_s, there = time.monotonic() + delay_s, self.scene.count(self.scene.outputs)
        while time.monotonic() < strike_s and not PHASE_ENDS[moment.phase](self.scene, there):
            time.sleep(0.0002)
        self.kill(victim)

    def kill(self, victim: str) -> None:
        """Kill now. A worker is waited for; where none will come, it is the service's turn."""
        if not self.workers:
            self.workers = self.service.workers()
        if victim == "worker" and not self.workers:
            until(lambda: self.service.workers() or self.scene.is_over(), 60)
            self.workers = self.service.workers()
            victim = "worker" if self.workers else "service"
        phase = self.kill_worker(self.workers[0]) if victim == "worker" else self.kill_service()
        self.workers = []
        self.tally.kills.append(Kill(victim, phase))

    def kill_worker(self, pid: int) -> str:
        """Kill the worker; the phase in which it died."""
        os.kill(pid, signal.SIGSTOP)  # what is read now is how it dies
        state = self.service.client.state(self.job)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not is_alive(pid))
        listed = self.service.client.call("GET", f"/jobs/{self.job}/pages").json()["pages"]
        self._trace([(page["n"], page["filename"], page["sha256"], page["seconds"]) for page in listed])
        return self._phase(state.status, state.phase)

    def kill_service(self) -> str:
        """Kill the service and start it again at once; the phase in which it died."""
        self.service.kill()
        self.orphans |= dict.fromkeys(self.workers, time.monotonic())
        try:
            with self.service.frozen_table() as table:
                job, pages = table.get(self.job), table.pages(self.job)
        except database.DatabaseDamaged as error:
            self.found.append(f"the job table after a kill: {error.detail}")
            self.service.start()
            return "staging"
        phase = self._phase(job.state, job.phase)
        self._trace([(page.n, page.output, page.sha256, page.seconds) for page in pages])
        self.service.start()
        self._wait_for_orphans()
        return phase

    def _phase(self, status: str, phase: str) -> str:
        if status == "SUCCESS":
            return "tidy"
        return "staging" if phase == "queued" else phase

    def _wait_for_orphans(self) -> None:
        for pid, killed_s in self.orphans.items():
            while is_alive(pid) and time.monotonic() - killed_s < 2 * GONE_S:
                time.sleep(0.01)
            spent_s = time.monotonic() - killed_s
            self.tally.slowest_end_s = max(self.tally.slowest_end_s, spent_s)
            if spent_s > GONE_S:
                self.found.append(f"a worker outlived its service by {spent_s:.1f} s")
        self.orphans.clear()

    def _trace(self, rows: list[tuple[int, str | None, str | None, float | None]]) -> None:
        """Note the pages that are recorded now, or that they are no longer what they were."""
        now = {}
        for n, output, sha256, seconds in rows:
            if output is None or sha256 is None:
                continue
            try:
                stat = (self.scene.outputs / output).stat()
            except FileNotFoundError:
                self.found.append(f"page {n} is recorded, and its file is not there")
                continue
            now[n] = Trace(sha256, seconds, stat.st_ino, stat.st_mtime_ns)
        self.tally.recorded += len(now)
        for n, trace in self.traces.items():
            if now.get(n) != trace:
                self.tally.recomputed += 1
                self.found.append(f"page {n} was recorded as {trace}, and now it is {now.get(n)}")
        self.traces |= now

    # -- looking
    def wait(self) -> JobState:
        """Until the job is over and tidied."""
        client = self.service.client
        until(self.scene.is_over, END_S)
        with contextlib.suppress(AssertionError):  # then faults() says so
            until(lambda: not self.scene.staging.exists())
        return client.state(self.job)

    def artifact(self) -> bytes:
        """The artifact's bytes, over HTTP."""
        return self.service.client.call("GET", f"/jobs/{self.job}/artifact").body

    def faults(self, state: JobState, artifact: bytes, expected: list[tuple[Any, ...]]) -> list[str]:
        """What is not as it must be after the job's end; expected: contents() of an undisturbed run."""
        self._check_end(state, artifact)
        if (state.status, state.failed_pages) == ("SUCCESS", len(BAD)):
            self._check_artifact(artifact, expected)
        listed = self.service.client.call("GET", f"/jobs/{self.job}/pages").json()["pages"]
        before, self.tally.recorded = self.tally.recorded, 0
        self._trace([(page["n"], page["filename"], page["sha256"], page["seconds"]) for page in listed])
        self.tally.recorded = before
        return self.found

    def _check_end(self, state: JobState, artifact: bytes) -> None:
        if (state.status, state.failed_pages) != ("SUCCESS", len(BAD)):
            self.found.append(f"it ended {state.status}: {state.failed_pages} failed; {state.message}")
        if hashlib.sha256(artifact).hexdigest() != state.artifact_hash:
            self.found.append("the artifact does not have the promised hash")
        left = [path.name for path in self.service.root.rglob("*.tmp")]
        left += [path.name for path in self.service.layout.staging.iterdir()]
        if left:
            self.found.append(f"left behind: {left}")

    def _check_artifact(self, artifact: bytes, expected: list[tuple[Any, ...]]) -> None:
        for ours, theirs in zip(contents(artifact), expected, strict=False):
            if ours != theirs:
                self.found.append(f"{ours[0]} in the artifact is not that of an undisturbed run")
        if len(contents(artifact)) != len(expected):
            self.found.append("the artifact has other entries than that of an undisturbed run")
        with tempfile.TemporaryDirectory() as folder:
            copy, again = Path(folder, "outputs"), Path(folder, "again.zip")
            shutil.copytree(self.scene.outputs, copy)
            report = json.loads((copy / storage.REPORT_NAME).read_text(encoding="utf-8"))
            try:
                artifacts.pack(copy, again, report)
            except storage.OutputDamaged as error:
                self.found.append(error.detail)
                return
            if again.read_bytes() != artifact:
                self.found.append("packed again, the artifact is another one")


def contents(artifact: bytes) -> list[tuple[Any, ...]]:
    """An artifact's entries, in order, with all that a zip says of them; the job's id left out."""
    found: list[tuple[Any, ...]] = []
    with zipfile.ZipFile(io.BytesIO(artifact)) as archive:
        for info in archive.infolist():
            data = archive.read(info)
            if info.filename == storage.REPORT_NAME:
                job = json.loads(data)["jobId"].encode()
                assert data.count(job) == 2  # jobId, outputDir
                data = data.replace(job, b"JOB")
            found.append((info.filename, info.date_time, info.external_attr, info.compress_type, data))
    return found


# ---------------------------------------------------------------- runs
def undisturbed(service: Service, tally: Tally) -> list[tuple[Any, ...]]:
    """Upload the volume, run it once; what its artifact holds."""
    service.client.call("PUT", "/incoming/v.zip", volume(PAGES | BAD))
    trial = Trial(service, tally, service.client.submit("v.zip"))
    state, artifact = trial.wait(), trial.artifact()
    found = trial.faults(state, artifact, contents(artifact))
    assert not found, found
    return contents(artifact)


def run(
    service: Service,
    plans: list[list[tuple[Moment, str]]],
    rng: random.Random,
    tell: Callable[[str], None] = lambda line: None,
) -> Tally:
    """A job for each plan of kills."""
    tally = Tally()
    expected = undisturbed(service, tally)
    for plan in plans:
        trial = Trial(service, tally, service.client.submit("v.zip"))
        for moment, victim in plan:
            trial.strike(moment, victim, rng)
        state = trial.wait()
        found = trial.faults(state, trial.artifact(), expected)
        tally.jobs += 1
        tally.faults += [f"job {tally.jobs} ({trial.job}): {fault}" for fault in found]
        if not found:
            service.client.call("DELETE", f"/jobs/{trial.job}")
        told = ", ".join(f"{victim} when {moment.what}" for moment, victim in plan)
        tell(f"{len(tally.kills)} kills: {told}: {'; '.join(found) or 'survived'}")
    return tally


def run_queued(service: Service, queued: int, kills: int, seed: int) -> Tally:
    """Kill so many times, by the clock, while many jobs of one page wait and run."""
    rng, tally = random.Random(seed), Tally()
    few = {"1.png": PAGES["01.png"], "2.jpg": b"no page", "3.png": BAD["15b.png"]}
    service.client.call("PUT", "/incoming/one.zip", volume(few))
    trials = [Trial(service, tally, service.client.submit("one.zip")) for _ in range(queued)]
    expected: list[tuple[Any, ...]] = []
    for n in range(kills):
        goal = queued * n // kills  # so many are over before the next kill
        until(lambda goal=goal: sum(trial.scene.has_zip() for trial in trials) >= goal, END_S)
        time.sleep(rng.uniform(0, 0.5))
        present = next((trial for trial in trials if not trial.scene.is_over()), trials[-1])
        present.kill(VICTIMS[n % 2])
    for trial in trials:
        trial.wait()
    for trial in trials:
        state, artifact = trial.wait(), trial.artifact()
        expected = expected or contents(artifact)
        found = trial.faults(state, artifact, expected)
        tally.jobs += 1
        tally.faults += [f"job {tally.jobs} ({trial.job}): {fault}" for fault in found]
    service.end()
    with service.frozen_table() as table:
        attempts = [job.attempt for job in table.in_state("SUCCESS")]
    if len(attempts) != queued or sum(attempts) - queued > kills:
        tally.faults.append(f"{queued} jobs, {kills} kills, and attempts {sorted(attempts)}")
    return tally


def table_of(tally: Tally) -> str:
    """What happened, as Markdown."""
    counts = Counter(tally.kills)
    lines = ["| killed in | worker | service | all |", "| --- | --- | --- | --- |"]
    for phase in PHASES:
        numbers = [counts[Kill(victim, phase)] for victim in VICTIMS]
        lines.append(f"| {phase} | {numbers[0]} | {numbers[1]} | {sum(numbers)} |")
    totals = [sum(kill.victim == victim for kill in tally.kills) for victim in VICTIMS]
    lines.append(f"| all | {totals[0]} | {totals[1]} | {sum(totals)} |")
    bad = len({fault.split(":")[0] for fault in tally.faults})
    lines += [
        "",
        f"{tally.jobs} jobs, {sum(totals)} kills; jobs with a fault: {bad}",
        f"pages on record at the kills: {tally.recorded}; computed again: {tally.recomputed}",
        f"a worker whose service was killed was gone after {tally.slowest_end_s:.2f} s at most",
    ]
    return "\n".join(lines + tally.faults)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--queued", type=int, default=0, help="jobs of one page that wait at once")
    parser.add_argument("--quiet", action="store_true", help="the table alone")
    given = parser.parse_args()
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder))
        try:
            if given.queued:
                tally = run_queued(service, given.queued, given.kills, given.seed)
            else:
                tell = (lambda line: None) if given.quiet else (lambda line: print(line, file=sys.stderr))
                rng = random.Random(given.seed)
                tally = run(service, draw_moments(given.kills, rng), rng, tell)
            service.end()
        finally:
            service.kill()
    print(table_of(tally))
    print(f"seed {given.seed}, {time.monotonic() - started_s:.0f} s")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
