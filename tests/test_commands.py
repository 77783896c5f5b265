"""One volume from a folder on disk to a checked artifact, with nothing but the commands: the service as
a desktop app's child, `server.py submit` as the client; what log and metrics told of it; and its end
when that app is killed. The story is told once; each test looks at one side of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from client import Client
from helpers import require
from kills import is_alive, workers_of
from prometheus_client.parser import text_string_to_metric_families
from serving import png, until

import server

ROOT = Path(server.__file__).parent
MODEL = "realesr-animevideov3"
PAGE_LINE = re.compile(r" in \d+\.\d\d s$")  # once a page
# A desktop app: starts the service, repeats its line to the test, and goes on with other things.
APP = """
import subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
sys.stdout.buffer.write(child.stdout.readline())
sys.stdout.flush()
time.sleep(600)
"""


@dataclass
class Story:
    job: str
    status: int
    out: str
    err: str
    downloads: list[Path]
    log: list[dict[str, Any]]
    metrics: dict[str, dict[tuple[str, ...], float]]  # sample -> values of its labels -> value
    processes: list[int]  # that ran when the app was killed


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    require(sys.platform == "linux", "processes are found in /proc")
    root = tmp_path_factory.mktemp("commands")
    pages = root / "Reichan v02"
    pages.mkdir()
    for n in (1, 2, 10):
        (pages / f"{n}.png").write_bytes(png(16, 24, n))
    (pages / "3.jpg").write_bytes(b"no page at all")
    serve = [sys.executable, str(ROOT / "server.py"), "--port", "0", "--storage-root", str(root / "storage")]
    serve += ["--ready-json", "--exit-with-stdin"]
    environ = os.environ | {"REICHAN_LOG": "json", "REICHAN_TOKEN": "secret-token"}
    command = [sys.executable, "-c", APP, *serve]
    with (root / "log").open("wb") as log:
        app = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=log)
    try:
        ready = json.loads(app.stdout.readline())
        command = [sys.executable, str(ROOT / "server.py"), "submit", str(pages), "--url", ready["url"]]
        command += ["--model", MODEL, "--format", "png", "--download", str(root / "to")]
        done = subprocess.run(
            command, env=environ, capture_output=True, encoding="utf-8", timeout=300, check=False
        )
        scrape = Client(ready["url"], ready["token"]).call("GET", "/metrics").body.decode()
        processes = [ready["pid"], *workers_of(ready["pid"])]
        assert all(map(is_alive, processes))
    finally:
        os.kill(app.pid, signal.SIGKILL)
        app.wait()
        app.stdout.close()
    metrics: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(scrape):
        for sample in family.samples:
            metrics.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    until(lambda: not any(map(is_alive, processes)), 20)
    lines = list(map(json.loads, (root / "log").read_text().splitlines()))
    job = done.stdout.split()[1] if done.stdout else ""
    downloads = list((root / "to").iterdir())
    yield Story(job, done.returncode, done.stdout, done.stderr, downloads, lines, metrics, processes)


def test_submit_brings_the_whole_volume_and_its_status_tells_of_the_bad_page(story):
    (artifact,) = story.downloads
    with zipfile.ZipFile(artifact) as archive:
        report, *pages = archive.namelist()
        items = json.loads(archive.read(report))["items"]
        hashes = [hashlib.sha256(archive.read(name)).hexdigest() for name in pages]
    assert [item["sha256"] for item in items] == hashes
    assert pages == ["1.png", "2.png", "3.jpg", "10.png"]
    assert artifact.name == "Reichan 02.zip"
    assert story.status == 1
    assert f"sha256    {hashlib.sha256(artifact.read_bytes()).hexdigest()}\n" in story.out


def test_its_progress_goes_to_stderr_with_each_page_kept_as_it_was(story):
    assert "4/4 pages  done  1 failed" in story.err
    assert "kept as it was: 3.jpg: " in story.err
    assert [line.split()[0] for line in story.out.splitlines()] == ["job", "artifact", "sha256"]


def test_every_line_of_service_and_worker_is_json(story):
    (plan,) = [line for line in story.log if line["process"] == "worker-0"]
    assert plan["job"] == story.job and plan["message"].startswith(f"{MODEL} on ")
    assert all(line.keys() >= {"time", "level", "process", "logger", "message"} for line in story.log)


def test_the_log_follows_the_job_and_each_page(story):
    told = [(line.get("page"), line["message"]) for line in story.log if line.get("job") == story.job]
    moves = [message.partition(" (")[0] for page, message in told if page is None]
    assert moves[0].startswith("submitted: Reichan, 02, from ")
    assert [move for move in moves if "->" in move] == ["PENDING -> RUNNING", "RUNNING -> SUCCESS"]
    finished = {page: message for page, message in told if page and PAGE_LINE.search(message)}
    assert finished.keys() == {1, 2, 3, 4}
    assert finished[3].startswith("3.jpg kept as it is: ")


def test_no_line_holds_the_token(story):
    assert not [line for line in story.log if "secret-token" in str(line)]


def test_the_metrics_count_pages_failures_and_bytes(story):
    metrics = story.metrics
    assert metrics["reichan_pages_total"] == {("upscaled",): 3, ("carried",): 1, ("cached",): 0}
    assert metrics["reichan_page_failures_total"][("decode",)] == 1
    assert sum(metrics["reichan_page_failures_total"].values()) == 1
    assert metrics["reichan_jobs_finished_total"] == {("SUCCESS",): 1}
    assert metrics["reichan_artifact_bytes_total"] == {(): story.downloads[0].stat().st_size}
    assert sum(metrics["reichan_worker_deaths_total"].values()) == 0


def test_the_metrics_hold_a_histogram_of_page_seconds_by_model(story):
    metrics = story.metrics
    assert metrics["reichan_page_duration_seconds_count"] == {(MODEL,): 3}
    buckets = metrics["reichan_page_duration_seconds_bucket"]
    assert buckets[(MODEL, "+Inf")] == 3
    assert sorted(buckets.values()) == list(buckets.values())  # bounds rise, and so do counts
    assert metrics["reichan_page_duration_seconds_sum"][(MODEL,)] > 0


def test_a_parent_killed_with_minus_nine_took_service_and_worker_along(story):
    assert len(story.processes) == 2  # both were seen alive before, and gone after
    assert not any(map(is_alive, story.processes))
