"""POST /pages: one page for a manga reader, through the real worker, beside jobs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import faults
import numpy as np
import pytest
from client import Client, Reply
from serving import BOUNDARY, form, png, queued, still, until, volume

import jobs
import messages
import server
import settings
import storage
from web import asking, reader
from work import dispatch


def post(client: Client, page: bytes, query: str = "") -> Reply:
    """As Suwayomi does."""
    media = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return client.call("POST", f"/pages{query}", form(page), media)


def size_of(data: bytes) -> tuple[int, int]:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return pixels.shape[1], pixels.shape[0]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Service]:
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("faults")
        patched.setenv("FAULTS", str(folder))
        config = settings.Config(storage_root=tmp_path_factory.mktemp("root"), port=0, page_wait_s=100)
        with server.Service(config, worker=faults.by_width) as running:
            running.dispatcher.ask("probe", messages.Probe()).result(180)  # a cold worker loads torch first
            yield running


@pytest.fixture
def client(service: server.Service) -> Client:
    return Client(service.url)


def test_a_readers_page_comes_back_upscaled_as_a_form_or_plain(client):
    page = png(32, 48)
    for reply in (post(client, page), client.call("POST", "/pages", page, {"Content-Type": "image/png"})):
        assert (reply.status, reply.headers["content-type"]) == (200, "image/jpeg")
        assert reply.headers["x-reichan-page"] == "finished"
        assert size_of(reply.body) == (64, 96)
    chosen = post(client, page, "?scale=3&outputFormat=png&unknown=1")
    assert (chosen.headers["content-type"], size_of(chosen.body)) == ("image/png", (96, 144))


def test_it_is_the_page_that_a_job_makes(client):
    page = png(32, 40, shade=7)
    client.call("PUT", "/incoming/same.zip", volume({"1.png": page}))
    job = client.submit("same.zip")
    assert client.watch(job)[0][-1].status == "SUCCESS"
    assert post(client, page).body == client.call("GET", f"/jobs/{job}/pages/1/after").body


def test_asked_for_again_it_is_not_computed_again(service, client, monkeypatch):
    page = png(32, 44, shade=11)
    first = post(client, page)
    monkeypatch.setattr(service.dispatcher, "ask", lambda *_: pytest.fail("it was computed again"))
    assert post(client, page).body == first.body


@pytest.mark.parametrize(
    ("page", "query", "why"),
    [
        (png()[:-40], "", "damaged or cut off"),
        (b"<html>not found</html>", "", "no image"),
        (b"", "", "no image"),
        (png(), "?scale=9", "params.scale"),
        (png(), "?model=nobody", "params.model"),
        (png(), "?scale=2.0", "params.scale"),
    ],
)
def test_what_can_not_be_upscaled_comes_back_byte_for_byte(client, page, query, why):
    for _ in range(2):
        reply = post(client, page, query)
        assert (reply.status, reply.body) == (200, page)
        assert reply.headers["x-reichan-page"] == "original" and why in reply.headers["x-reichan-reason"]


def test_a_page_large_enough_already_comes_back_as_it_was(service, client):
    page = png(32, 52, shade=13)
    reply = post(client, page, "?targetWidth=16")
    assert (reply.headers["x-reichan-page"], reply.body) == ("finished", page)
    assert post(client, page, "?targetWidth=16").body == page


def test_a_page_that_takes_too_long_is_there_the_next_time(service, client, monkeypatch):
    page = png(32, 56, shade=17)
    monkeypatch.setattr(service.api.reader, "wait_s", 0.0)
    reply = post(client, page)
    assert (reply.status, reply.body) == (200, page) and "takes over" in reply.headers["x-reichan-reason"]
    until(lambda: post(client, page).headers["x-reichan-page"] == "finished")
    until(lambda: not leftovers(service))


def leftovers(service: server.Service) -> list[Path]:
    """Pages handed to a worker, and what it had not finished."""
    folder = service.config.layout.previews / "reader"
    return [path for path in folder.iterdir() if path.name.startswith((asking.SOURCE, ".reichan"))]


def test_a_page_that_kills_workers_is_left_alone_and_the_job_beside_it_ends_well(
    service, client, monkeypatch
):
    monkeypatch.setattr(asking, "DEATHS", 1)  # a new worker takes seconds
    killer = png(faults.KILLER, 24)
    client.call("PUT", "/incoming/beside.zip", volume({f"{n}.png": png(48, 48, n) for n in range(6)}))
    job = client.submit("beside.zip")
    until(lambda: client.state(job).processed > 0, 30)
    for why in ("the worker ended", "died twice"):
        reply = post(client, killer)
        assert reply.body == killer and why in reply.headers["x-reichan-reason"]
    assert (Path(os.environ["FAULTS"]) / "killer").stat().st_size == 1
    state = client.watch(job)[0][-1]
    assert (state.status, state.failed_pages) == ("SUCCESS", 0)
    assert not leftovers(service)


def test_pages_and_a_job_go_on_side_by_side(client):
    """Pages keep coming until the job is over: each is answered, and the job comes to its end."""
    client.call("PUT", "/incoming/long.zip", volume({f"{n}.png": png(48, 48, n) for n in range(8)}))
    job, shade = client.submit("long.zip"), 0
    while not client.state(job).is_over:
        assert post(client, png(16, 18, shade)).headers["x-reichan-page"] == "finished"
        shade += 1
    assert client.state(job).status == "SUCCESS"


def test_many_at_once_each_get_an_image(service, client):
    asked = [png(16, 16, shade) for shade in range(2 * asking.AT_ONCE)]
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = list(pool.map(lambda page: post(client, page), asked))
    assert {reply.status for reply in replies} == {200}
    for page, reply in zip(asked, replies, strict=True):
        assert reply.body == page or size_of(reply.body) == (32, 32)
    kept = {reply.headers.get("x-reichan-reason") for reply in replies} - {None}
    assert kept <= {f"{asking.AT_ONCE} pages are being computed already"}


def test_who_waits_is_answered_before_the_books_are_kept(service, client, monkeypatch):
    """A future wakes its waiters, then calls back: in between the page must be there already."""
    ended = service.api.reader._asked._ended
    held = []
    monkeypatch.setattr(service.api.reader._asked, "_ended", lambda *told: held.append(told))
    assert post(client, png(24, 28, 5)).headers["x-reichan-page"] == "finished"
    until(lambda: held)
    ended(*held[0])
    assert post(client, png(24, 28, 5)).headers["x-reichan-page"] == "finished"


def test_the_same_page_asked_for_by_several_is_computed_once(service, client, monkeypatch):
    asked, ask = [], service.dispatcher.ask
    monkeypatch.setattr(service.dispatcher, "ask", lambda key, task: (asked.append(key), ask(key, task))[1])
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _n: post(client, png(90, 90, 3)), range(6)))
    assert len(asked) == 1 and len({reply.body for reply in replies}) == 1


# ---------------------------------------------------------------- without a worker
def test_so_many_are_asked_for_at_once_and_no_more(tmp_path):
    with still(tmp_path, page_wait_s=0) as service:
        client = Client(service.url)
        replies = [post(client, png(16, 16, shade)) for shade in range(asking.AT_ONCE + 1)]
        *waits, full = [reply.headers["x-reichan-reason"] for reply in replies]
        assert all("takes over" in why for why in waits)
        assert full == f"{asking.AT_ONCE} pages are being computed already"
        assert replies[-1].body == png(16, 16, asking.AT_ONCE)
        # Asked for again, a page that is on its way is none more.
        assert "takes over" in post(client, png(16, 16, 0)).headers["x-reichan-reason"]


def test_what_is_no_page_at_all_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PAGE_BYTES", 10_000)
    with still(tmp_path, token="0123456789") as service:
        client = Client(service.url, "0123456789")
        assert post(Client(service.url), png()).status == 401
        assert post(client, bytes(10_001)).problem().status == 413
        assert client.call("POST", "/pages", b"", {"Content-Type": "image/png"}).problem().code == "NO_PAGE"
        json = {"Content-Type": "application/json"}
        assert client.call("POST", "/pages", b"{}", json).problem().status == 415
        media = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        reply = client.call("POST", "/pages", form(png(), name="file"), media)
        assert reply.problem().code == "BAD_FORM" and "'image'" in reply.problem().detail


def test_a_page_that_nobody_computes_is_waited_for_and_given_back(tmp_path):
    with still(tmp_path, page_wait_s=0) as service:
        reply = post(Client(service.url), png())
        assert reply.body == png() and "takes over 0 s" in reply.headers["x-reichan-reason"]


def test_the_services_end_frees_who_waits(tmp_path, monkeypatch):
    with still(tmp_path, page_wait_s=20) as service, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(service.dispatcher, "_deal", lambda: None)  # no worker takes it
        service.dispatcher.start()
        reply = pool.submit(post, Client(service.url), png(shade=1))
        until(lambda: service.api.reader._asked.underway)
        service.dispatcher.stop()
        assert reply.result().body == png(shade=1)
        assert "shutting down" in reply.result().headers["x-reichan-reason"]


@pytest.mark.parametrize("beside", [True, False])
def test_a_job_that_was_staging_is_not_blamed_for_what_a_readers_page_did(tmp_path, beside):
    """A page can kill as many workers as it likes: only without one beside it the job ends by that."""
    page = messages.ComputePage("key", 0, 1, tmp_path, tmp_path, messages.Params(), None, messages.Limits())
    with still(tmp_path) as service:
        job, dispatcher, layout = queued(service), service.dispatcher, service.config.layout
        tasks = {"key": page} if beside else {}
        for _ in range(dispatch.CARELESS_DEATHS):
            claimed = jobs.claim(service.table, 1000.0)
            run = dispatch.Run(claimed, layout.staging / job.id, layout.outputs)
            dispatcher.runs[job.id] = run
            slot = dispatch.WorkerSlot.__new__(dispatch.WorkerSlot)  # dead: without a process
            slot.tasks, slot.doom, slot.exclusive = {run.key(0): None, **tasks}, None, False
            dispatcher._lose(run, slot, "it was killed")
        assert service.table.get(job.id).state == (jobs.PENDING if beside else jobs.FAILED)


def test_a_disk_that_takes_no_page_costs_no_page(tmp_path, monkeypatch):
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    with still(tmp_path) as service:
        monkeypatch.setattr(Path, "write_bytes", full)
        reply = post(Client(service.url), png())
        assert reply.body == png() and "No space left" in reply.headers["x-reichan-reason"]
        assert not leftovers(service)


def test_the_cache_stays_within_its_bytes_and_keeps_what_is_used(tmp_path):
    cache = asking.Cache(tmp_path, 250)
    for key in ("a", "b"):
        (tmp_path / f"{key}.jpg").write_bytes(bytes(100))
        cache.add(f"{key}.jpg")
    cache.open("a").close()
    (tmp_path / "c.png").write_bytes(bytes(100))
    cache.add("c.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "c.png"]
    assert cache.open("b") is None and cache.held_bytes == 200
    (tmp_path / "c.png").unlink()
    assert cache.open("c") is None and cache.held_bytes == 100


def test_a_new_service_knows_its_cache_and_clears_what_was_under_way(tmp_path):
    for name in ("a.jpg", f"{asking.SOURCE}b.png", storage.new_temporary(tmp_path).name):
        (tmp_path / name).write_bytes(b"x")
    assert asking.Cache(tmp_path, 100).sizes == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_other_weights_or_settings_are_another_page(tmp_path):
    with still(tmp_path) as service:
        keys, params = set(), messages.Params()
        key = service.api.reader._key
        keys |= {key(b"a", params), key(b"b", params), key(b"a", messages.Params(scale=3))}
        (service.config.layout.models / "mine.safetensors").write_bytes(b"x")
        keys.add(key(b"a", params))
    assert len(keys) == 4


def test_params_of_a_query_are_those_of_a_job():
    models = {"realesr_animevideov3": "realesr-animevideov3"}
    found = reader.params_of({"scale": "4", "outputFormat": "webp", "jpegQuality": "80", "x": "y"}, models)
    assert (found.scale, found.output_format, found.jpeg_quality) == (4, "webp", 80)
    assert found.model == "realesr-animevideov3"
    with pytest.raises(jobs.InvalidFields):
        reader.params_of({"scale": "-1"}, models)
