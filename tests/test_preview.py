"""POST /preview: what it shows is what a job makes, and it is in no job's way. Also what is drawn of a
job's pages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from client import Client, Reply
from serving import BOUNDARY, form, png, queued, still, until, volume

import jobs
import messages
import server
import settings
from files import weightfiles
from web import api, asking, preview
from work.questions import WorkerDied

COMPACT = {"model": "realesr-animevideov3"}
CBZ = {"container": "cbz"}
NAMES = weightfiles.model_names(Path("none"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Service]:
    root = tmp_path_factory.mktemp("root")
    # In fp32, which needs no probing.
    config = settings.Config(storage_root=root, port=0, page_wait_s=100, precision="fp32")
    with server.Service(config) as running:
        running.dispatcher.ask("probe", messages.Probe()).result(180)  # a cold worker loads torch first
        yield running


@pytest.fixture
def client(service: server.Service) -> Client:
    return Client(service.url)


def colour(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    """A PNG with something to see in it."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return cv2.imencode(".png", cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))[
        1
    ].tobytes()


def pixels(data: bytes) -> Any:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def ask(client: Client, **request: Any) -> Any:
    """A preview of an input's page; its answer."""
    reply = client.call("POST", "/preview", request)
    assert reply.status == 200, reply.body
    return reply.json()


def send(client: Client, page: bytes, request: Any = None) -> Reply:
    """A preview of an image, as a form."""
    body = form(page)
    if request is not None:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="request"\r\n\r\n'
        body = head.encode() + json.dumps(request).encode() + b"\r\n" + body
    media = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return client.call("POST", "/preview", body, media)


def upload(client: Client, name: str, pages: dict[str, bytes]) -> dict[str, str]:
    client.call("PUT", f"/incoming/{name}", volume(pages))
    return {"type": "zip", "path": f"incoming/{name}"}


def test_a_page_of_an_upload_is_shown_as_a_job_makes_it_to_the_byte(service, client):
    pages = {f"{n}.png": colour(seed=n) for n in (1, 2, 10)}
    where = upload(client, "same.zip", pages)
    variants = [COMPACT, COMPACT | {"scale": 3, "outputFormat": "png"}]
    held = {path: path.read_bytes() for path in service.config.layout.incoming.rglob("*.zip")}
    answer = ask(client, input=where, page=3, variants=variants)
    assert (answer["page"], answer["name"], answer["pages"]) == (3, "10.png", 3)
    assert client.call("GET", answer["before"]).body == pages["10.png"]
    for params, told in zip(variants, answer["variants"], strict=True):
        job = client.submit("same.zip", params=params)
        assert client.watch(job)[0][-1].status == "SUCCESS"
        made = client.call("GET", f"/jobs/{job}/pages/3/after").body
        assert client.call("GET", told["after"]).body == made
        assert told["bytes"] == len(made) and pixels(made).shape[:2] == (told["height"], told["width"])
    assert {path: path.read_bytes() for path in held} == held


def test_a_part_of_a_page_is_that_part_of_the_whole_page(client):
    """At the edge and within."""
    page = colour(200, 152, 5)
    for x, y in ((0, 0), (61, 50)):
        crop = {"x": x, "y": y, "width": 80, "height": 64}
        for scale in (2, 3):
            params = COMPACT | {"scale": scale, "outputFormat": "png", "color": "keep"}
            whole = send(client, page, {"variants": [params]}).json()["variants"][0]
            part = send(client, page, {"variants": [params], "crop": crop}).json()
            before, after = (
                client.call("GET", url).body for url in (part["before"], part["variants"][0]["after"])
            )
            assert np.array_equal(pixels(before), pixels(page)[y : y + 64, x : x + 80])
            inside = np.s_[y * scale : (y + 64) * scale, x * scale : (x + 80) * scale]
            expected = pixels(client.call("GET", whole["after"]).body)[inside].astype(int)
            assert abs(pixels(after) - expected).max() <= 1


def test_a_part_of_a_page_is_computed_by_the_model_that_the_whole_page_calls_for(client):
    corner = np.full((40, 48, 3), 200, np.uint8)
    corner[:8, :8] = (0, 0, 255)
    page = cv2.imencode(".png", corner)[1].tobytes()
    grey_part = {"x": 24, "y": 24, "width": 16, "height": 16}
    for crop in (None, grey_part):
        told = send(client, page, {"variants": [{"model": "auto"}], "crop": crop}).json()["variants"][0]
        assert told["model"] == "RealESRGAN_x4plus_anime_6B"


def test_an_image_is_previewed_as_the_body_as_well(client):
    page = colour(seed=7)
    plain = client.call(
        "POST", "/preview?model=realesr-animevideov3&scale=1", page, {"Content-Type": "image/png"}
    )
    told = plain.json()
    assert told["variants"] == send(client, page, {"variants": [COMPACT | {"scale": 1}]}).json()["variants"]
    assert told["page"] is None and told["variants"][0]["prediction"] is None


def test_a_volumes_time_and_size_follow_from_a_page_and_then_from_a_like_volume(client):
    """The error of both predictions is shown under -s."""
    params = COMPACT | {"outputFormat": "webp"}
    pages = {f"{n}.png": colour(160, 120, n) for n in range(6)}
    where = upload(client, "like.zip", pages)
    answer = ask(client, input=where, variants=[params])
    assert (answer["page"], answer["name"]) == (4, "3.png")  # the one in the middle
    shown = answer["variants"][0]["prediction"]
    assert (shown["basis"], shown["basisPages"]) == ("preview", 1)
    kept = []
    for name in ("like.zip", "next.zip"):
        upload(client, name, pages)
        job = client.submit(name, params=params)
        client.watch(job)
        report = client.call("GET", f"/jobs/{job}/report").json()
        kept.append(report["prediction"])
        print("predicted:", kept[-1])
        assert kept[-1]["actualMinutes"] * 60 == pytest.approx(report["timings"]["wallSeconds"], abs=0.5)
        size_bytes = len(client.call("GET", f"/jobs/{job}/artifact").body)
        assert kept[-1]["actualMegabytes"] == round(size_bytes / 1e6, 3)
    first, second = kept
    assert (first["megabytes"], first["basis"]) == (shown["megabytes"], "preview")
    # What it took until the pages were staged is known by then, and counted.
    assert shown["minutes"] <= first["minutes"] < shown["minutes"] + first["actualMinutes"]
    assert (second["basis"], second["basisPages"]) == ("volumes", 6)
    assert abs(second["megabytesErrorPercent"]) < 1
    # But for staging, which each did for itself.
    assert second["minutes"] == pytest.approx(first["actualMinutes"], abs=0.02)
    # An image, with what is known of its volume, rests on the same.
    facts = {"pages": 6, "pixels": 6 * 160 * 120}
    told = send(client, pages["0.png"], {"variants": [params], "volume": facts}).json()["variants"][0]
    assert (told["prediction"]["basis"], told["prediction"]["basisPages"]) == ("volumes", 12)


def test_of_volumes_that_become_a_job_each_the_middle_one_is_shown_and_foretold(client):
    middle = {f"{n}.png": colour(seed=20 + n) for n in (1, 2)}
    pages = {"v1/1.png": png(), "v2.cbz": volume(middle), "v10/1.png": png()}
    where, params = upload(client, "series.zip", pages), COMPACT | {"split": "volumes"}
    answer = ask(client, input=where, variants=[params])
    assert (answer["volume"], answer["volumes"], answer["pages"]) == ("v2.cbz", 3, 2)
    assert client.call("GET", answer["before"]).body == middle["2.png"]
    alone = ask(client, input=where | {"path": f"{where['path']}/v2.cbz"}, variants=[COMPACT])
    assert (alone["volume"], alone["volumes"]) == (None, None)
    for key in ("after", "prediction"):
        assert alone["variants"][0][key] == answer["variants"][0][key]
    beside = upload(client, "beside.zip", pages | {"1.png": png()})
    problem = client.call("POST", "/preview", {"input": beside, "variants": [params]}).problem()
    assert problem.status == 422 and "belongs to none" in problem.detail


def test_a_cbz_is_foretold_with_its_other_files(service, client):
    where = upload(client, "with.zip", {"1.png": colour(seed=31), "notes.txt": b"\0" * 500_000})
    zipped, cbz = (
        one["prediction"] for one in ask(client, input=where, variants=[COMPACT, COMPACT | CBZ])["variants"]
    )
    assert cbz["megabytes"] - zipped["megabytes"] == pytest.approx(0.5, abs=0.002)
    assert cbz["minutes"] == zipped["minutes"]
    job = client.submit("with.zip", params=COMPACT | CBZ)
    client.watch(job)
    told = jobs.parsed(service.table.get(job).forecast)
    for workload in (told["workload"], told["measured"]["workload"]):
        assert (workload["pages"], workload["other_bytes"]) == (1, 500_000)


def test_asked_for_again_it_is_not_computed_again(service, client, monkeypatch):
    page = colour(seed=11)
    first = send(client, page, {"variants": [COMPACT]}).json()
    monkeypatch.setattr(service.dispatcher, "ask", lambda *_: pytest.fail("it was computed again"))
    assert send(client, page, {"variants": [COMPACT]}).json() == first


def test_what_takes_too_long_goes_on_and_is_there_the_next_time(service, client, monkeypatch):
    page = colour(seed=13)
    monkeypatch.setattr(service.api.previews, "wait_s", 0.0)
    reply = send(client, page, {"variants": [COMPACT]})
    assert reply.problem().code == "PREVIEW_SLOW" and reply.headers["retry-after"] == "2"
    until(lambda: send(client, page, {"variants": [COMPACT]}).status == 200, 30)


def test_a_page_large_enough_already_is_shown_as_it_is(client):
    page = colour(seed=17)
    request = {"variants": [COMPACT | {"targetWidth": 32}], "volume": {"pages": 5}}
    told = send(client, page, request).json()["variants"][0]
    assert told["carried"] and client.call("GET", told["after"]).body == page


@pytest.mark.parametrize(
    ("page", "request_", "status", "why"),
    [
        (colour()[:-200], {}, 422, "damaged or cut off"),
        (b"<html>", {}, 422, "no JPEG"),
        (colour(), {"crop": {"x": 60, "y": 0, "width": 8, "height": 8}}, 422, "leave it"),
        (colour(), {"variants": []}, 422, "1 to 4"),
        (colour(), {"variants": [{}] * 5}, 422, "1 to 4"),
        (colour(), {"variants": [COMPACT, {"scale": 9}]}, 422, "variants[1].scale"),
        (colour(), {"variants": ["x"]}, 422, "variants[0]"),
        (colour(), {"volume": {"pages": 0}}, 422, "volume"),
        (colour(), {"volume": {"pages": 1, "pixels": 1.5}}, 422, "volume.pixels"),
        (colour(), {"crop": {"x": 0, "y": 0, "width": 7, "height": 8}}, 422, "crop"),
        (
            colour(),
            {"variants": [{"targetWidth": 99}], "crop": {"x": 0, "y": 0, "width": 8, "height": 8}},
            422,
            "scale",
        ),
        (colour(), "no object", 422, "object"),
    ],
)
def test_what_can_not_be_previewed_is_refused_with_the_reason(client, page, request_, status, why):
    if isinstance(request_, dict) and "variants" not in request_:
        request_ = request_ | {"variants": [COMPACT]}
    problem = send(client, page, request_).problem()
    assert problem.status == status and why in problem.detail, problem


def test_an_input_that_is_none_is_refused_with_the_reason(service, client):
    where = upload(client, "two.zip", {"1.png": colour(), "2.png": b"damaged"})
    refused = {
        "has 2 pages, no page 3": {"input": where, "page": 3},
        "upload it first": {"input": {"type": "zip", "path": "incoming/none.zip"}},
        "not a path inside": {"input": {"type": "zip", "path": "../jobs.sqlite3"}},
        "input: is required": {},
        "page: must be": {"input": where, "page": 0},
        "not an image": {"input": where, "page": 2},
    }
    for why, request in refused.items():
        problem = client.call("POST", "/preview", request).problem()
        assert problem.status == 422 and why in problem.detail, problem


def test_a_preview_comes_between_a_jobs_pages_and_the_job_ends_well(client):
    """Asked again and again until the job is over; at least one comes before its end."""
    upload(client, "long.zip", {f"{n}.png": png(96, 96, n) for n in range(12)})
    job, between, seed = client.submit("long.zip"), 0, 100
    while not client.state(job).is_over:
        assert send(client, colour(16, 16, seed), {"variants": [COMPACT]}).status == 200
        between += client.state(job).processed < 12
        seed += 1
    assert client.state(job).status == "SUCCESS" and client.state(job).failed_pages == 0 and between


# ---------------------------------------------------------------- without a worker
def test_previews_under_way_are_bounded_and_a_token_is_asked_for(tmp_path):
    with still(tmp_path, token="0123456789", page_wait_s=0) as service:
        client = Client(service.url, "0123456789")
        assert send(Client(service.url), png()).status == 401
        codes = [send(client, png(shade=n)).problem().code for n in range(asking.AT_ONCE + 1)]
        assert codes == ["PREVIEW_SLOW"] * asking.AT_ONCE + ["BUSY"]
        assert client.call("GET", f"/preview/{'0' * 32}").problem().code == "UNKNOWN_PREVIEW"
        broken = client.call("POST", "/preview", b"{", {"Content-Type": "application/json"})
        assert broken.problem().code == "NOT_JSON"
        assert client.call("POST", "/preview", b"x", {"Content-Type": "text/plain"}).problem().status == 415
        media = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        assert client.call("POST", "/preview", form(png())[:-9], media).problem().code == "BAD_FORM"


def test_a_page_that_worker_after_worker_dies_of_is_left_alone(tmp_path, monkeypatch):
    """What becomes of jobs beside it: tests/test_reader.py, by the same dispatcher."""

    def lost(_key: str, _task: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(WorkerDied("the worker ended"))
        return future

    with still(tmp_path) as service:
        client = Client(service.url)
        monkeypatch.setattr(service.dispatcher, "ask", lost)
        problems = [send(client, png()).problem() for _ in range(asking.DEATHS + 1)]
        assert [problem.status for problem in problems] == [503] * asking.DEATHS + [422]
        assert "died of this page" in problems[-1].detail
        assert send(client, png(shade=1)).problem().status == 503


def test_the_copy_that_a_jobs_page_is_drawn_from_stays_until_no_worker_will_read_it(tmp_path, monkeypatch):
    """Whoever gave up before; a second one's own, which nobody will read, goes at once."""
    monkeypatch.setattr(api, "PREVIEW_S", 0.0)
    with still(tmp_path) as service:
        job, client, questions = queued(service), Client(service.url), service.dispatcher.questions
        digest = hashlib.sha256(png()).hexdigest()
        page = jobs.Page(job.id, 1, "1.png", "00001.png", digest, len(png()), None, "1")
        service.table.replace_pages(job.id, [page])
        place, folder = f"/jobs/{job.id}/pages/1/before?w=16", service.config.layout.previews / job.id
        for _ in range(asking.DEATHS):
            assert [client.call("GET", place).status for _ in range(2)] == [503, 503]
            ((key, task),) = questions.unanswered()
            assert [*folder.iterdir()] == [task.source] and task.source.read_bytes() == png()
            questions.disappoint(key, WorkerDied("the worker ended"))
            assert not [*folder.iterdir()]
        assert client.call("GET", place).status == 422 and not [*folder.iterdir()]


def test_who_waits_is_freed_by_the_services_end(tmp_path):
    with still(tmp_path, page_wait_s=60) as service:
        service.dispatcher.start()
        waiting = threading.Timer(0.3, service.dispatcher.stop)
        waiting.start()
        assert "shutting down" in send(Client(service.url), png()).problem().detail
        waiting.join()


def test_images_are_kept_within_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "CACHE_BYTES", 3 * len(png()))
    with still(tmp_path, page_wait_s=0) as service:
        keys = [service.api.previews.keep(memoryview(png(shade=n))).key for n in range(5)]
        kept = [key for key in keys if service.api.previews.image(key) is not None]
        assert keys[-1] in kept and len(kept) <= 3
        held = service.config.layout.previews.rglob("*.png")
        assert sum(path.stat().st_size for path in held) <= preview.CACHE_BYTES


def test_of_an_images_volume_what_is_not_told_is_like_its_page():
    params = messages.Params(scale=3)
    done = messages.PageDone("k", 0, 1, "1.jpg", "", 9, 30, 60, "L", 1.0, input_pixels=200)
    load = preview.workload_of({"pages": 5}, done, params, 70, None)
    assert load == messages.Workload(5, 1000, 9000, 350)
    assert preview.workload_of({"pages": 5}, done, params, 70, (0, 0, 8, 8)) is None
    told = {"pages": 5, "pixels": 700, "bytes": 11}
    assert preview.workload_of(told, done, params, 70, (0, 0, 8, 8)) == messages.Workload(5, 700, 6300, 11)
    aimed = messages.Params(target_width=30)
    assert preview.workload_of(told, done, aimed, 70, None).output_pixels == 700 * 9
    carried = messages.PageDone("k", 0, 1, "1.jpg", "", 9, 30, 60, "L", 0.0, carried=True)
    assert preview.workload_of({"pages": 5}, carried, aimed, 70, None) == messages.Workload(carried_bytes=350)
    reduced = dataclasses.replace(done, input_pixels=0)  # for a screen, of a page that was large enough
    expected = messages.Workload(output_pixels=5 * done.width * done.height, source_bytes=350)
    assert preview.workload_of({"pages": 5}, reduced, aimed, 70, None) == expected


def test_every_fault_of_a_request_is_named():
    with pytest.raises(jobs.InvalidFields) as refused:
        preview.parse({"variants": [{"scale": 0}, 5], "crop": 1, "page": "1"}, NAMES, has_image=False)
    assert {name for name, _ in refused.value.errors} == {
        "variants[0].scale",
        "variants[1]",
        "crop",
        "input",
        "page",
    }
    assert preview.parse({}, NAMES, has_image=True).variants == (messages.Params(),)
