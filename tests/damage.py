"""Change one byte of a finished service's job table, start on it, and look for anything lost.

    python tests/damage.py --flips 2000 --seed 1

The job table of a real run: volumes that succeeded, one that failed, one that waits. Each time
one byte, drawn anywhere in the file, gets another value. Then the table is opened as a start
does it, artifacts that no job claims are looked through, and every job is compared with what
it was. Prints how often what happened; exit status 1 if a finished job was lost or is another.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from client import Client
from serving import png, volume

import jobs
import server
import settings
from messages import Limits
from storage import Layout
from work import rebuild, submissions

PAGES = {f"Ch 1/{n}.png": png(16, 16, n) for n in range(3)} | {"bad.png": b"bad"}
VOLATILE = ("createdAt", "startedAt", "finishedAt", "message", "seq", "retries", "prediction")


def make(root: Path) -> None:
    """Run a few small volumes to their ends, and leave one waiting."""
    with server.Service(settings.Config(storage_root=root, port=0)) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume(PAGES))
        client.call("PUT", "/incoming/bad.zip", volume({"bad.png": b"bad"}))
        params = {"model": "auto", "targetWidth": 20, "outputFormat": "png"}
        for path, more in (("v.zip", {}), ("v.zip", {"params": params}), ("bad.zip", {}), ("v.zip", {})):
            assert client.watch(client.submit(path, title=f"巻 {len(more)}", **more))[0][-1].is_over
    table = rebuild.open_table(root / "jobs.sqlite3")
    wanted = submissions.Submission("waits", "1", "zip", "v.zip", jobs.Params(), None)
    layout = Layout(root, root / "models")
    submissions.submit(table, layout, wanted, "key", "", Limits())
    table.close()


@dataclass(frozen=True)
class Known:
    """Jobs and pages of a table, without what is new after a rebuild by design."""

    jobs: dict[str, jobs.Job]
    pages: dict[str, list[jobs.Page]]

    @classmethod
    def of(cls, table: jobs.JobTable) -> Known:
        found = table.page_of_jobs(None, "", 1000, None)
        pages = {job.id: table.pages(job.id) for job in found}
        return cls({job.id: replace(job, seq=0) for job in found}, pages)

    def ids(self, *states: str) -> list[str]:
        return [job.id for job in self.jobs.values() if job.state in states]

    def is_as_before(self, job_id: str, before: Known, layout: Layout) -> bool:
        """Whether a finished job is what it was, as far as clients can use it."""
        if job_id not in self.jobs:
            return False
        states, reports = [], []
        for known in (self, before):
            job = known.jobs[job_id]
            state = submissions.to_state(job, layout)
            states.append({key: value for key, value in state.items() if key not in VOLATILE})
            reports.append((submissions.to_report(job, known.pages[job_id], layout), job.artifact_bytes))
        return states[0] == states[1] and reports[0] == reports[1]


def start_on(data: bytes, layout: Layout) -> tuple[Known, bool, int, int]:
    """(what the table holds, whether the old one was set aside, jobs read from it, jobs rebuilt)
    after a start on a job table of these bytes."""
    for left in layout.root.glob("jobs.sqlite3*"):
        left.unlink()
    layout.database.write_bytes(data)
    table = rebuild.open_table(layout.database)
    try:
        search = rebuild.Rebuild(table, layout)
        search._run()
        known = Known.of(table)
    finally:
        table.close()
    if table.set_aside:
        assert table.set_aside.read_bytes()[: len(data)] == data, "the damaged file was changed"
    return known, table.set_aside is not None, table.salvaged, search.found


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    rng, counts, faults = random.Random(given.seed), Counter[str](), []
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root)
        logging.disable(logging.CRITICAL)
        layout = Layout(root, root / "models")
        good = layout.database.read_bytes()
        before = start_on(good, layout)[0]
        for _ in range(given.flips):
            at, change = rng.randrange(len(good)), rng.randrange(1, 256)
            data = bytearray(good)
            data[at] ^= change
            known, is_aside, salvaged, rebuilt = start_on(bytes(data), layout)
            lost = [one for one in before.ids("SUCCESS") if not known.is_as_before(one, before, layout)]
            faults += [f"byte {at} ^ {change}: finished job {one} is lost or another" for one in lost]
            waiting = [one for one in before.ids("PENDING", "FAILED") if one not in known.jobs]
            counts["set aside" if is_aside else "without effect"] += 1
            counts["jobs read from a table set aside"] += salvaged
            counts["jobs rebuilt from their artifacts"] += rebuilt
            counts["jobs lost that had no artifact"] += len(waiting)
            if not is_aside and known != before:
                faults.append(f"byte {at} ^ {change}: not noticed")
    print(f"{given.flips} flips in {len(good)} bytes, {len(before.jobs)} jobs each time, seed {given.seed}")
    for what in ("without effect", "set aside"):
        print(f"  {what}: {counts.pop(what)}")
    for what, number in counts.items():
        print(f"    {what}: {number}")
    print(f"finished jobs lost or changed, damage not noticed: {len(faults)}")
    print("\n".join([*faults, f"{time.monotonic() - started_s:.0f} s"]))
    return 1 if faults else 0


def state_of(client: Client, job: str) -> dict[str, Any]:
    """What clients can learn of a job that must survive: state, pages, report, artifact's hash."""
    state: dict[str, Any] = client.call("GET", f"/jobs/{job}").json()
    listed = client.call("GET", f"/jobs/{job}/pages").json()["pages"]
    artifact = client.call("GET", f"/jobs/{job}/artifact")
    digest = hashlib.sha256(artifact.body).hexdigest()
    return {
        "state": {key: value for key, value in state.items() if key not in VOLATILE},
        "pages": [{**page, "seconds": None} for page in listed],
        "report": client.call("GET", f"/jobs/{job}/report").json()["report"],
        "artifact": (artifact.status, artifact.headers.get("etag"), digest),
    }


if __name__ == "__main__":
    sys.exit(main())
