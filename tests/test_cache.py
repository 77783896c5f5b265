"""The cache of finished pages: only what is new is computed, and nobody can tell from the bytes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from client import Client, check_artifact
from engines import COMPACT
from serving import PLAN, png, still, volume

import jobs
import server
import settings
import storage
from engine import devices, models
from files import cache, inputs
from messages import Limits, PageDone, Params

KEY = "ab" * 32
FACTS = {"suffix": ".png", "width": 2, "height": 3, "mode": "L", "color_spread": 0.0, "model": "m"}
OTHERS = {str: "other", int: 7, type(None): 5, tuple: (PLAN,)}  # a value of each type that no field has


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Service]:
    """A service with a cache. Its tests have pages of their own each, by their shade."""
    root = tmp_path_factory.mktemp("root")
    config = settings.Config(storage_root=root, model_root=root / "models", port=0, job_cache_bytes=1 << 30)
    with server.Service(replace(config, page_wait_s=100)) as service:
        yield service


@pytest.fixture
def client(running: server.Service) -> Client:
    return Client(running.url)


def reused(client: Client) -> int:
    """Pages that came from the cache so far, as /metrics tells it."""
    text = client.call("GET", "/metrics").body.decode()
    return int(re.search(r'reichan_pages_total{status="cached"} (\d+)', text)[1])


def made(client: Client, pages: dict[str, bytes], **params: Any) -> tuple[str, dict[str, bytes], int]:
    """Of a volume of these pages: (job's id, files of its artifact, pages from the cache). The report
    is without the names of the job."""
    before = reused(client)
    client.call("PUT", "/incoming/v.zip", volume(pages))
    state = client.wait(job := client.submit("v.zip", params=params))
    data = client.call("GET", f"/jobs/{job}/artifact").body
    report = check_artifact(data, state)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    report = {key: value for key, value in report.items() if key not in ("jobId", "outputDir")}
    return job, files | {storage.REPORT_NAME: json.dumps(report).encode()}, reused(client) - before


def entries(root: Path) -> list[Path]:
    return sorted(root.glob("cache/*/*.page"))


def test_a_repeated_volume_is_taken_from_the_cache_and_is_the_same_to_the_byte(client):
    pages = {f"{n}.png": png(shade=n) for n in range(3)}
    first, computed, from_cache = made(client, pages)
    assert from_cache == 0
    assert client.call("DELETE", f"/jobs/{first}").status == 204
    assert made(client, pages)[1:] == (computed, 3)


def test_an_extended_volume_costs_its_new_pages_after_a_restart_too(running, client, tmp_path):
    made(client, {"1.png": png(shade=11), "2.png": png(shade=12)})
    extended = {"a/9.png": png(shade=12), "b/3.png": png(shade=13), "1.png": png(shade=11)}
    assert made(client, extended)[2] == 2
    shutil.copytree(running.config.layout.cache, tmp_path / "cache")
    config = replace(running.config, storage_root=tmp_path)
    with server.Service(config) as another:
        assert made(Client(another.url), extended | {"new.png": png(shade=14)})[2] == 3
        assert len(another.dispatcher.cache.sizes) == len(entries(tmp_path))


@pytest.mark.parametrize(("suffix", "n"), [("page", 21), ("json", 22)])
def test_a_damaged_entry_is_dropped_and_its_page_computed_anew(running, client, suffix, n):
    before = set(entries(running.config.storage_root))
    first, expected, _ = made(client, {"1.png": png(shade=n)})
    client.call("DELETE", f"/jobs/{first}")  # the entry is a link to its page
    (entry,) = set(entries(running.config.storage_root)) - before
    data = bytearray(entry.with_suffix(f".{suffix}").read_bytes())
    data[len(data) // 2] ^= 1
    entry.with_suffix(f".{suffix}").write_bytes(data)
    assert made(client, {"1.png": png(shade=n)})[1:] == (expected, 0)
    assert made(client, {"1.png": png(shade=n)})[1:] == (expected, 1)


def test_a_changed_weight_file_never_hits(running, client):
    weights = running.config.model_root / "own.safetensors"
    weights.parent.mkdir(exist_ok=True)
    torch.manual_seed(0)
    network = models.SRVGGNetCompact(8, 1, 2)
    safetensors.torch.save_file(network.state_dict(), weights)
    _, before, _ = made(client, {"1.png": png(shade=31)}, model="own", outputFormat="png")
    with torch.no_grad():
        network.body[-1].bias.add_(0.1)
    safetensors.torch.save_file(network.state_dict(), weights)
    os.utime(weights, (1, 1))  # as an older file put back; its bytes count
    _, after, from_cache = made(client, {"1.png": png(shade=31)}, model="own", outputFormat="png")
    assert from_cache == 0 and before["1.png"] != after["1.png"]


@pytest.mark.parametrize("record", [Params(), PLAN], ids=["params", "plan"])
def test_every_field_of_params_and_plan_decides(record):
    def key(one: Any) -> str:
        params, plan = (one, PLAN) if isinstance(one, Params) else (Params(), one)
        return cache.key_of("0" * 64, params, plan, Limits(), "")

    others = [replace(record, **{f.name: OTHERS[type(getattr(record, f.name))]}) for f in fields(record)]
    assert len({key(record), *map(key, others)}) == 1 + len(others)


def test_source_limits_and_program_decide(tmp_path):
    given = ("0" * 64, Params(), PLAN, Limits(), devices.program(0))
    others = [("1" * 64, *given[1:]), (*given[:3], Limits(page_pixels=1), given[4]), (*given[:4], "other")]
    others += [(*given, ("left", None)), (*given, ("right", None)), (*given, (None, 4096))]
    assert len({cache.key_of(*one) for one in (given, *others)}) == 7


def kept_pages(root: Path, *names: str) -> list[str]:
    """Entries of 100 bytes a page, the first the least recently used; their keys."""
    store, keys = cache.PageCache(root, ""), [name * 64 for name in names]
    page = root.parent / "page"
    for age, key in enumerate(reversed(keys)):
        page.unlink(missing_ok=True)
        page.write_bytes(key.encode()[:1] * 100)
        assert store.keep(key, page, storage.sha256_file(page), 100, FACTS)
        os.utime(cache._paths(root, key)[1], (1000 - age, 1000 - age))
    return keys


def test_the_bound_holds_and_the_least_recently_used_goes_first(tmp_path):
    root = tmp_path / "cache"
    a, b, c = kept_pages(root, "a", "b", "c")
    keeper = cache.Keeper(root, 10_000)
    keeper.load()
    assert list(keeper.sizes) == [a, b, c]
    keeper.used(a)
    keeper.most_bytes = 2 * keeper.sizes[a]
    (d,) = kept_pages(root, "d")
    keeper.used(d)
    found = {key for key in (a, b, c, d) if cache.PageCache(root, "").find(key)}
    assert found == set(keeper.sizes) == {a, d}
    there = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert there == keeper.bytes <= keeper.most_bytes


def test_what_a_crash_left_is_no_entry_and_goes_at_the_next_start(tmp_path):
    root = tmp_path / "cache"
    a, b = kept_pages(root, "a", "b")
    cache._paths(root, a)[1].unlink()  # killed before the record
    cache._paths(root, b)[1].with_name(".reichan-" + "0" * 32 + ".tmp").write_bytes(b"x")
    assert cache.PageCache(root, "").find(a) is None
    keeper = cache.Keeper(root, 10_000)
    keeper.load()
    assert list(keeper.sizes) == [b]
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == [f"{b}.json", f"{b}.page"]


def test_an_entry_under_another_key_is_none(tmp_path):
    root = tmp_path / "cache"
    (a,) = kept_pages(root, "a")
    for old, new in zip(cache._paths(root, a), cache._paths(root, KEY), strict=True):
        new.parent.mkdir(exist_ok=True)
        old.rename(new)
    assert cache.PageCache(root, "").find(KEY) is None


def test_where_there_are_no_links_pages_are_copied(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError("no links on this file system")

    monkeypatch.setattr(os, "link", refuse)
    (a,) = kept_pages(tmp_path / "cache", "a")
    (tmp_path / "page").write_bytes(b"edited since")
    entry = cache.PageCache(tmp_path / "cache", "").find(a)
    assert entry and entry.data == b"a" * 100


def test_a_disk_without_room_is_offered_the_cache_first(tmp_path, monkeypatch):
    def check_room(*_: Any) -> None:
        if entries(tmp_path):
            raise storage.NoRoom(2, 1, 0)

    monkeypatch.setattr(inputs, "check_room", check_room)
    kept_pages(tmp_path / "cache", "a", "b")
    with still(tmp_path, job_cache_bytes=1 << 20) as resting:
        resting.dispatcher.cache.load()
        client = Client(resting.url)
        client.call("PUT", "/incoming/v.zip", volume({"1.png": png()}))
        assert client.submit("v.zip")
        assert not entries(tmp_path) and resting.dispatcher.cache.bytes == 0


def test_an_upload_that_has_no_room_is_offered_it_too(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda _: 0 if entries(tmp_path) else 1 << 40)
    kept_pages(tmp_path / "cache", "a")
    with still(tmp_path, job_cache_bytes=1 << 20) as resting:
        resting.dispatcher.cache.load()
        assert Client(resting.url).call("PUT", "/incoming/v.zip", b"zip").status == 201
        assert not entries(tmp_path)


def test_switched_off_it_removes_what_was_there_and_nothing_else(tmp_path):
    kept_pages(tmp_path / "cache", "a", "b")
    theirs = tmp_path / "cache/aa/notes.txt"
    theirs.touch()
    cache.Keeper(tmp_path / "cache", 0).load()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [theirs]
    assert not (tmp_path / "cache/bb").exists()


def test_cached_pages_are_no_measure_of_computing(running, client):
    def computed() -> float:
        samples = running.dispatcher.metrics.page_seconds.family().samples
        return sum(value for suffix, _, value in samples if suffix == "_count")

    before = computed()
    assert [made(client, {"1.png": png(shade=41), "2.png": png(shade=42)})[2] for _ in range(2)] == [0, 2]
    assert computed() - before == 2


def test_a_volume_is_foretold_and_measured_by_the_pages_that_are_new(running, client):
    for pages, computed, cached in ((range(2), 2, 0), (range(3), 1, 2), (range(3), 0, 3)):
        job, _, taken = made(client, {f"{n}.png": png(shade=60 + n) for n in pages})
        told = jobs.parsed(running.table.get(job).forecast)
        for workload in (told["workload"], told["measured"]["workload"]):
            assert (workload["pages"], workload["cached"]) == (computed, cached) and taken == cached
            assert workload["input_pixels"] == computed * 32 * 48
            assert bool(workload["carried_bytes"]) == bool(cached)


def test_a_readers_page_and_a_previews_go_past_it(running, client):
    made(client, {"1.png": png(shade=51)})
    before = entries(running.config.storage_root), reused(client)
    reply = client.call("POST", "/pages", png(shade=51), {"Content-Type": "image/png"})
    assert (reply.status, reply.headers["x-reichan-page"]) == (200, "finished")
    whole = {"input": {"type": "zip", "path": "v.zip"}, "variants": [{"model": COMPACT}]}
    part = whole | {"crop": {"x": 0, "y": 0, "width": 16, "height": 16}}
    made_of = [client.call("POST", "/preview", asked).json()["variants"][0] for asked in (whole, part)]
    assert [one["width"] for one in made_of] == [64, 32]
    assert (entries(running.config.storage_root), reused(client)) == before


def test_a_page_that_deviated_from_its_plan_is_not_kept(tmp_path):
    (tmp_path / "1.png").write_bytes(b"page")
    done = PageDone("job", 1, 1, "1.png", "0" * 64, 4, 1, 1, "L", 0.1, cache_key=KEY)
    store = cache.PageCache(tmp_path / "cache", "")
    assert store.take(tmp_path / "1.png", replace(done, deviation="smaller windows")).cache_key is None
    half = replace(done, deviation="the left half")
    assert store.take(tmp_path / "1.png", half, "the left half").cache_key == KEY
    assert store.take(tmp_path / "1.png", done).cache_key == KEY
    assert len(entries(tmp_path)) == 1


# What infer imports beside storage.PIPELINE, and why that decides no byte of a page.
HARMLESS = {
    "storage", "files.artifacts", "files.cache", "files.containers", "files.inputs",  # bytes as they are
    "files.weightfiles",  # a plan has their hashes
    "logs", "engine.lanes", "files.sandbox",  # words, order of work, rights
    "engine.survey",  # counts, for predictions
}  # fmt: skip


def test_the_program_is_all_code_that_decides_a_page(tmp_path):
    """Here too belongs a new module: into PIPELINE, or above with its reason."""
    source = storage.PROGRAM
    parts = tomllib.loads((source / "pyproject.toml").read_text())["tool"]["setuptools"]
    ours = {*parts["py-modules"]}
    for package in parts["packages"]:
        ours |= {f"{package}.{path.stem}" for path in (source / package).glob("*.py")}
    code = f"import infer, sys; print(*(sys.modules.keys() & {ours}))"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=source, encoding="utf-8").split()
    assert {*loaded} == {*storage.PIPELINE} | HARMLESS
