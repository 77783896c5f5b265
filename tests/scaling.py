"""What a cluster costs and gives: measured for one and two workers here, computed for more.

    python tests/scaling.py [--pages 12] [--size 448x640] [--rounds 2]

Each worker has one thread, so that two fill two cores. Measured, warm, in seconds from the first page dealt
to the last one recorded: a volume by a service's own worker and by a cluster of one node, by turns; twice as
many pages by two workers of its own and by two nodes (ray.cluster_utils, on loopback); and what a page's way
costs. More workers: see simulate().
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
LINE_BYTES_S = 117e6  # of a network of 1 Gbit/s


def simulate(
    workers: int, pages: int, page_s: float, way_s: float, line_s: float, row_s: float, depth: int
) -> float:
    """Seconds for a queue of pages.

    The model: a worker computes one page at a time, each in page_s, and has `depth` pages at most, so that
    the next one is there while one computes. A page's way takes way_s beside the others' (calls, copies,
    the file: a thread each worker); line_s on the service's one line, and row_s in its one dispatcher thread
    (to record it and deal the next): both serve one page after the other, in order of arrival.
    """
    free = [0.0] * workers  # when a worker has computed what it has
    line = dispatcher = 0.0
    dealt = min(pages, depth * workers)
    events = [(n * row_s / 2, n, "send", n % workers) for n in range(dealt)]
    order = dealt
    while events:
        now, _, step, worker = heapq.heappop(events)
        if step in ("send", "back"):
            line = max(line, now) + line_s / 2
            following = (line + way_s / 2, "compute" if step == "send" else "record")
        elif step == "compute":
            free[worker] = max(free[worker], now) + page_s
            following = (free[worker], "back")
        else:
            dispatcher = max(dispatcher, now) + row_s
            if dealt == pages:
                continue
            dealt += 1
            following = (dispatcher, "send")
        order += 1
        heapq.heappush(events, (following[0], order, following[1], worker))
    return dispatcher


def volume_of(pages: int, width: int, height: int) -> bytes:
    """A zip of drawn pages."""
    from serving import png, volume

    return volume({f"{n:04}.png": png(width, height, n) for n in range(pages)})


def processor_s(of: Callable[[set[int]], Iterable[int]]) -> float:
    """Seconds of processor time so far of some among this process and all below it."""
    spent, children = {}, defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            values = path.read_text().rpartition(")")[2].split()
            children[int(values[1])].append(int(path.parent.name))
            spent[int(path.parent.name)] = (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
    found, due = {os.getpid()}, [os.getpid()]
    while due:
        below = children[due.pop()]
        found.update(below)
        due += below
    return sum(spent.get(pid, 0.0) for pid in of(found))


class Stopwatch:
    """When a service's jobs began to compute and had their last page; the processor time that they took;
    and its dispatcher's time a page."""

    def __init__(self, service: Any, client: Any, of: Callable[[set[int]], Iterable[int]]) -> None:
        self.client = client
        self.of = of  # see processor_s: which processes work for this service
        self.spent_s: list[float] = []  # processor time of each job
        self.service = service
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.busy_s: list[float] = []  # of the dispatcher, with pages
        service.table.listeners.append(self._listen)
        for name in ("_on_page", "_send_page", "_drop_ended_runs"):
            setattr(service.dispatcher, name, self._timed(getattr(service.dispatcher, name)))

    def _listen(self, job: Any) -> None:
        if job.phase == "inferring":
            self.began.setdefault(job.id, time.perf_counter())
            if job.processed == job.total:
                self.ended.setdefault(job.id, time.perf_counter())

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*values: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*values)
            finally:
                self.busy_s.append(time.perf_counter() - started)

        return timed

    def job(self, name: str) -> float:
        """Seconds for this volume."""
        before_s = processor_s(self.of)
        state = self.client.wait(self.client.submit(name))
        self.spent_s.append(processor_s(self.of) - before_s)
        assert (state.status, state.failed_pages) == ("SUCCESS", 0), state
        return self.ended[state.job_id] - self.began[state.job_id]


def measure_way(source: bytes, result: bytes) -> float:
    """Seconds for a page to an actor and back, and into a file."""
    import ray

    import storage

    class Echo:
        def give(self, batch: list[bytes]) -> None:
            self.batch = batch

        def collect(self, size: int) -> bytes:
            return os.urandom(size)

    actor = ray.remote(Echo).options(num_cpus=0).remote()
    tries = []
    with tempfile.TemporaryDirectory() as folder:
        for n in range(50):
            started = time.perf_counter()
            actor.give.remote([source])
            storage.write_whole(Path(folder, str(n)), ray.get(actor.collect.remote(len(result))))
            tries.append(time.perf_counter() - started)
    return statistics.median(tries)


def workers(service: Any) -> set[int]:
    """Process ids of a service's own workers."""
    return {slot.process.pid for slot in service.dispatcher.workers.values()}


def of_its_own(service: Any, _: set[int]) -> set[int]:
    """The processes that work for a service without a cluster."""
    return {os.getpid(), *workers(service)}


def report(ring: Any, given: argparse.Namespace) -> None:
    """All measurements over a cluster that is up, and what follows from them."""
    import ray
    from test_cluster import NODE, serving

    width, height = map(int, given.size.split("x"))
    local_s, one_s, both_s, two_s = [], [], [], []
    with (
        serving(ring.place / "local", None) as here,
        serving(ring.place / "both", None, max_concurrency=2) as twice,
        serving(ring.place / "far", ring.address) as beyond,
    ):
        local, both = (Stopwatch(*one, partial(of_its_own, one[0])) for one in (here, twice))
        far = Stopwatch(*beyond, lambda all_: all_ - workers(local.service) - workers(both.service))
        for client in (local.client, both.client, far.client):
            for name, pages in (("few", 4), ("one", given.pages), ("two", 2 * given.pages)):
                client.call("PUT", f"/incoming/{name}.zip", volume_of(pages, width, height))
        ring.ray.add_node(**NODE)
        local.job("few.zip"), far.job("few.zip")  # warm
        local.spent_s.clear(), far.spent_s.clear()
        for _ in range(given.rounds):
            local_s.append(local.job("one.zip"))
            one_s.append(far.job("one.zip"))
        ring.ray.add_node(**NODE)
        while sum(node.capacity > 0 for node in beyond[0].dispatcher.nodes.values()) < 2:
            time.sleep(0.1)
        one_spent_s = far.spent_s
        far.spent_s = []
        far.job("few.zip"), both.job("one.zip")
        far.busy_s.clear(), far.spent_s.clear(), both.spent_s.clear()
        for _ in range(given.rounds):
            both_s.append(both.job("two.zip"))
            two_s.append(far.job("two.zip"))
        row_s = sum(far.busy_s) / (2 * given.pages * given.rounds)
        depth = next(iter(beyond[0].dispatcher.nodes.values())).capacity
        result = next(ring.place.glob("far/outputs/**/0000.jpg")).read_bytes()
        source = volume_of(1, width, height)
    ray.init(ring.address, log_to_driver=False)
    way_s = measure_way(source, result)
    ray.shutdown()
    local_m, one_m, both_m, two_m = map(statistics.median, (local_s, one_s, both_s, two_s))
    page_s, line_s = local_m / given.pages, (len(source) + len(result)) / LINE_BYTES_S
    print(f"pages of {given.size}: {len(source)} bytes in, {len(result)} out; {given.pages} a worker")
    named = {"own worker": local_s, "cluster of 1": one_s, "2 own workers": both_s, "cluster of 2": two_s}
    for name, each in named.items():
        print(f"{name}: {', '.join(f'{one:.2f}' for one in each)} s")
    one, two = (100 * (far / near - 1) for far, near in ((one_m, local_m), (two_m, both_m)))
    print(f"overhead of the cluster: {one:+.1f}%, with two workers {two:+.1f}%")
    costs = ((one_spent_s, local.spent_s), (far.spent_s, both.spent_s))
    one, two = (100 * (sum(far_s) / sum(near_s) - 1) for far_s, near_s in costs)
    print(f"in processor time: {one:+.1f}%, with two workers {two:+.1f}%; Ray's processes for "
          "three machines are among it")  # fmt: skip
    print(f"from 1 to 2 workers: efficiency {one_m / two_m:.0%}, without a cluster {local_m / both_m:.0%}")
    print(f"a page: {page_s:.3f} s, its way {1e3 * way_s:.1f} ms, 1 Gbit/s {1e3 * line_s:.1f} ms, "
          f"dispatcher {1e3 * row_s:.2f} ms")  # fmt: skip
    table(page_s, way_s, line_s, row_s, depth)


def table(page_s: float, way_s: float, line_s: float, row_s: float, depth: int) -> None:
    """The simulated efficiencies, for this page and for one that a card computes 20 times as fast."""
    print("simulated efficiency, 10,000 pages:")
    for name, seconds in (("this page", page_s), ("page on a card, 1/20", page_s / 20)):
        alone = simulate(1, 10_000, seconds, way_s, line_s, row_s, depth)
        for workers in (2, 4, 8, 16, 32, 64):
            took = simulate(workers, 10_000, seconds, way_s, line_s, row_s, depth)
            print(f"  {name}: {workers} workers {alone / took / workers:.0%}")


def main() -> None:
    """Measure, simulate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=12, help="of a volume, for each worker")
    parser.add_argument("--size", default="448x640", help="of a page, in pixels")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    import test_cluster

    with tempfile.TemporaryDirectory(prefix="ring-") as place:
        os.environ.update(test_cluster.SETTINGS | {"TMPDIR": place})
        ring = test_cluster.Ring(Path(place))
        ring.start()
        try:
            report(ring, given)
        finally:
            ring.stop()


if __name__ == "__main__":
    main()
