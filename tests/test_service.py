"""A volume through the whole service, as the desktop client sees it, and through crashes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from client import Client, Health, JobState, Model, check_artifact, parse, submission
from serving import png, until, volume

import server
import settings
from web import routes

ROOT = Path(server.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _as_many_threads_as_cores() -> Iterator[None]:
    """Workers as users have them; conftest.py gives those of the other files one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        yield


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Service]:
    root = tmp_path_factory.mktemp("service")
    with server.Service(settings.Config(storage_root=root, port=0)) as running:
        yield running


@pytest.fixture
def client(service: server.Service) -> Client:
    return Client(service.url)


def test_a_strict_client_goes_from_upload_to_a_checked_artifact(client):
    pages = {f"Ch 1/{n}.png": png(shade=n) for n in (1, 2, 10)} | {"notes.txt": b"x"}
    assert client.upload("tour.zip", [volume(pages)[:100], volume(pages)[100:]], "作品名").status == 201
    frames, code = client.frames(job := client.submit("incoming/tour.zip", params={"scale": 2}))
    last = [parse(JobState, frame) for frame in frames][-1]
    assert code == 1000
    told = {frame["seq"]: frame for frame in frames}
    assert [frame["seq"] for frame in frames if frame is told[frame["seq"]]] == sorted(told)
    # Told twice is only what stood still for some seconds, and then it is the same.
    assert all({**frame, "etaSeconds": 0} == {**told[frame["seq"]], "etaSeconds": 0} for frame in frames)
    assert (last.status, last.processed, frames[-1]["leftOut"]) == ("SUCCESS", 3, 1)
    reply, etag = client.call("GET", f"/jobs/{job}/artifact"), f'"{last.artifact_hash}"'
    assert reply.status == 200 and int(reply.headers["content-length"]) == len(reply.body)
    assert reply.headers["etag"] == etag
    report = check_artifact(reply.body, last)
    assert [item["filename"] for item in report["items"]] == ["Ch 1/1.jpg", "Ch 1/2.jpg", "Ch 1/10.jpg"]
    assert [item["source"]["sha256"] for item in report["items"]] == [
        hashlib.sha256(png(shade=n)).hexdigest() for n in (1, 2, 10)
    ]
    assert {(item["width"], item["height"], item["mode"]) for item in report["items"]} == {(64, 96, "L")}
    for tag in (last.artifact_hash, etag, "W/" + etag, "*"):
        assert client.call("GET", f"/jobs/{job}/artifact", None, {"If-None-Match": tag}).status == 304


def test_a_download_that_broke_off_is_joined_by_range(client):
    client.call("PUT", "/incoming/range.zip", volume({"1.png": png()}))
    state = client.wait(job := client.submit("range.zip"))
    path = f"/jobs/{job}/artifact"
    reply, tail = client.call("GET", path), {"Range": "bytes=100-"}
    whole = reply.body
    part = client.call("GET", path, None, tail | {"If-Range": reply.headers["etag"]})
    assert (part.status, whole[:100] + part.body) == (206, whole)
    assert part.headers["content-range"] == f"bytes 100-{len(whole) - 1}/{len(whole)}"
    assert client.call("GET", path, None, tail | {"If-Range": '"other"'}).body == whole
    assert client.call("HEAD", path).headers["content-length"] == str(len(whole))
    assert client.call("GET", path, None, {"Range": f"bytes={len(whole)}-"}).status == 416
    assert check_artifact(whole, state)["outscale"] == 2


@pytest.mark.parametrize(
    "scale, form, mode", [(1, "png", b"\x89PNG"), (3, "webp", b"RIFF"), (4, "jpg", b"\xff\xd8")]
)
def test_every_format_and_scale_comes_out_as_asked(client, scale, form, mode):
    client.call("PUT", "/incoming/form.zip", volume({"第1話/表紙.png": png()}))
    state = client.wait(job := client.submit("form.zip", params={"scale": scale, "outputFormat": form}))
    data = client.call("GET", f"/jobs/{job}/artifact").body
    item = check_artifact(data, state)["items"][0]
    assert (item["filename"], item["width"], item["height"]) == (f"第1話/表紙.{form}", 32 * scale, 48 * scale)
    assert zipfile.ZipFile(io.BytesIO(data)).read(item["filename"]).startswith(mode)


def test_a_grey_page_saved_in_colour_comes_out_grey_and_the_report_says_how_grey_it_was(client):
    grey = np.arange(32 * 48, dtype=np.uint32).reshape(48, 32) % 251
    pages = {"grey.webp": np.dstack([grey] * 3), "ivory.png": np.dstack([grey * 0.97, grey * 0.99, grey])}
    files = {
        name: cv2.imencode(Path(name).suffix, page.astype(np.uint8), [cv2.IMWRITE_WEBP_QUALITY, 90])[1]
        for name, page in pages.items()
    }
    client.call("PUT", "/incoming/g.zip", volume({name: data.tobytes() for name, data in files.items()}))
    state = client.wait(job := client.submit("g.zip"))
    grey_item, ivory = check_artifact(client.call("GET", f"/jobs/{job}/artifact").body, state)["items"]
    assert grey_item["mode"] == "L" and grey_item["colorSpread"] <= 1
    assert ivory["mode"] == "RGB" and 6 <= ivory["colorSpread"] <= 8


def test_a_folder_is_an_input_and_a_manifest_is_reconciled(client, service):
    folder = service.config.layout.incoming / "folder"
    folder.mkdir()
    for n in (1, 2):
        (folder / f"{n}.png").write_bytes(png(shade=n))
    (folder / "manifest.json").write_text(json.dumps({"files": [{"target": "1.png"}, {"target": "3.png"}]}))
    state = client.wait(job := client.submit("folder", "folder"))
    report = client.call("GET", f"/jobs/{job}/report").json()["report"]
    assert report["reconciliation"] == {"expected": 2, "matched": 1, "missing": ["3.png"], "extra": ["2.png"]}
    assert "manifest" in state.message


def test_a_bad_page_is_carried_and_the_volume_goes_on(client):
    bad = png(shade=2)[:-30]
    pages = {"1.png": png(shade=1), "2.png": bad, "3.png": png(shade=3)}
    client.call("PUT", "/incoming/bad.zip", volume(pages))
    state = client.wait(job := client.submit("bad.zip"))
    assert (state.status, state.failed_pages, state.processed) == ("SUCCESS", 1, 3)
    assert "2.png" in state.message
    report = check_artifact(client.call("GET", f"/jobs/{job}/artifact").body, state)
    assert [item["status"] for item in report["items"]] == ["upscaled", "carried", "upscaled"]
    assert report["items"][1]["sha256"] == hashlib.sha256(bad).hexdigest()
    assert client.call("GET", f"/jobs/{job}/pages/2/before?w=16").problem().code == "NO_PREVIEW"
    assert client.call("GET", f"/jobs/{job}/pages/4/before").problem().code == "UNKNOWN_PAGE"


def test_a_volume_of_bad_pages_fails_and_has_no_artifact(client):
    client.call("PUT", "/incoming/allbad.zip", volume({"1.png": b"no", "2.jpg": b""}))
    state = client.wait(job := client.submit("allbad.zip"))
    assert (state.status, state.artifact_path) == ("FAILED", None)
    assert client.full_state(job)["errorCode"] == "ALL_PAGES_FAILED"
    assert client.call("GET", f"/jobs/{job}/artifact").status == 409


def test_a_cancelled_job_keeps_its_pages_and_resume_computes_the_rest(client, service):
    client.call("PUT", "/incoming/long.zip", volume({f"{n}.png": png(120, 160, n) for n in range(12)}))
    job = client.submit("long.zip")
    client.wait(job, lambda state: state.processed >= 2)
    state = client.post(job, "cancel")
    assert (state.status, state.cancelled, state.message) == ("FAILED", True, "Cancelled by user")
    assert service.dispatcher.wait_released(job, 5)
    assert client.call("GET", f"/jobs/{job}/pages/12/after").problem().code == "NOT_THERE_YET"
    half = client.call("POST", f"/jobs/{job}/resume", {"inputPath": "long.zip"})
    assert half.faults().keys() == {"inputPath"}
    done = [page for page in client.call("GET", f"/jobs/{job}/pages").json()["pages"] if page["sha256"]]
    folder = next(service.config.layout.outputs.glob(f"*/*/{job}"))
    before = {page["filename"]: (folder / page["filename"]).stat().st_mtime_ns for page in done}
    body = {"inputPath": "incoming/long.zip", "inputType": "zip"}
    state = client.post(job, "resume", body)
    assert (state.status, state.retries, state.message) == ("PENDING", 1, None)
    state = client.wait(job)
    assert state.status == "SUCCESS" and len(before) >= 2
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    check_artifact(client.call("GET", f"/jobs/{job}/artifact").body, state)


def test_a_killed_worker_costs_no_finished_page_and_changes_no_byte(client, service):
    client.call("PUT", "/incoming/kill.zip", volume({f"{n}.png": png(120, 160, n) for n in range(10)}))
    calm = client.wait(client.submit("kill.zip"))
    job = client.submit("kill.zip")
    state = client.wait(job, lambda state: state.processed >= 3)
    done = [page for page in client.call("GET", f"/jobs/{job}/pages").json()["pages"] if page["sha256"]]
    folder = next(service.config.layout.outputs.glob(f"*/*/{job}"))
    before = {page["filename"]: (folder / page["filename"]).stat().st_mtime_ns for page in done}
    os.kill(service.dispatcher.workers[0].process.pid, signal.SIGKILL)
    state = client.wait(job)
    assert state.status == "SUCCESS" and state.failed_pages == 0 and len(before) >= 3
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    data = client.call("GET", f"/jobs/{job}/artifact").body
    report = check_artifact(data, state)
    undisturbed = check_artifact(client.call("GET", f"/jobs/{calm.job_id}/artifact").body, calm)
    for different in ("jobId", "outputDir"):
        report.pop(different), undisturbed.pop(different)
    assert report == undisturbed


def test_refusals_say_what_is_wrong(client):
    client.call("PUT", "/incoming/here.zip", volume({"1.png": png()}))
    here = submission("here.zip")
    table = [
        ("POST", "/jobs", submission("none.zip"), 422, "INPUT_MISSING"),
        ("POST", "/jobs", submission("../x"), 422, "OUTSIDE_INCOMING"),
        ("POST", "/jobs", here | {"params": {"scale": 2.0}}, 422, "INVALID_FIELDS"),
        ("POST", "/jobs", here | {"params": {"model": "none"}}, 422, "INVALID_FIELDS"),
        ("POST", "/jobs", here | {"title": ""}, 422, "INVALID_FIELDS"),
        ("POST", "/jobs", submission("x" * 300 + ".zip"), 422, "OUTSIDE_INCOMING"),
        ("POST", "/jobs", json.loads('{"a":' * 70 + "1" + "}" * 70), 400, "NOT_JSON"),
        ("GET", "/jobs/none", None, 404, "UNKNOWN_JOB"),
        ("GET", "/nothing", None, 404, "NO_ROUTE"),
        ("PATCH", "/jobs", None, 405, "METHOD"),
        ("GET", "/jobs?limit=0", None, 422, "INVALID_FIELDS"),
        ("GET", "/jobs?status=DONE", None, 422, "INVALID_FIELDS"),
        ("PUT", "/incoming/con.zip", b"x", 422, "UNSAFE_NAME"),
        ("PUT", "/incoming/here.zip/x.zip", b"x", 409, "NAME_TAKEN"),
        ("GET", "/ws/jobs", None, 426, "UPGRADE"),
    ]
    for method, path, body, status, code in table:
        problem = client.call(method, path, body).problem()
        assert (problem.status, problem.code) == (status, code), (method, path, body, problem)


def test_an_idempotency_key_makes_one_job_of_two_requests(client):
    client.call("PUT", "/incoming/key.zip", volume({"1.png": png()}))
    body, key = submission("key.zip"), {"Idempotency-Key": "a"}
    first, again = (client.call("POST", "/jobs", body, key) for _ in range(2))
    assert (first.status, first.body) == (202, again.body)
    assert client.call("POST", "/jobs", body | {"title": "other"}, key).status == 409
    client.wait(job := first.json()["jobId"])
    assert client.call("DELETE", f"/jobs/{job}").status == 204
    assert client.call("GET", f"/jobs/{job}").status == 404


def test_pages_before_and_after_can_be_looked_at(client):
    client.call("PUT", "/incoming/look.zip", volume({"1.png": png(shade=1)}))
    client.wait(job := client.submit("look.zip"))
    reply = client.call("GET", f"/jobs/{job}/pages/1/before")
    assert (reply.status, reply.headers["content-type"], reply.body) == (200, "image/png", png(shade=1))
    for side in ("before", "after"):
        reply = client.call("GET", f"/jobs/{job}/pages/1/{side}?w=16")
        found = (reply.status, reply.headers["content-type"], reply.body[:2])
        assert found == (200, "image/jpeg", b"\xff\xd8"), reply.body
    client.call("PUT", "/incoming/look.zip", volume({"1.png": png(shade=2)}))
    assert client.call("GET", f"/jobs/{job}/pages/1/before").status == 410


def test_the_service_tells_of_its_models_devices_and_itself(client):
    found = until(lambda: (told := client.call("GET", "/models").json())["probed"] and told, 60)
    names = {model.name: model for model in parse(list[Model], found["models"])}
    for name in ("RealESRGAN_x4plus_anime_6B", "realesr-animevideov3", "RealESRGAN_x4plus"):
        assert names[name].available and names[name].source == "wheel" and names[name].scale == 4
    devices = client.call("GET", "/devices").json()["devices"]
    assert "cpu" in [device["device"] for device in devices]
    health = client.ask(Health, "GET", "/health")
    assert (health.status, health.default_model) == ("ok", "RealESRGAN_x4plus_anime_6B")
    assert b'reichan_jobs{state="SUCCESS"}' in client.call("GET", "/metrics").body
    paths = client.call("GET", "/openapi.json").json()["paths"]
    assert {route.path.replace("...", "") for route in routes.ROUTES} == set(paths)


def test_a_token_is_asked_for_and_a_cookie_stands_for_it(tmp_path):
    with server.Service(settings.Config(storage_root=tmp_path, port=0, token="secret-token")) as running:
        client = Client(running.url)
        assert client.call("GET", "/health").status == 200
        refused = [one.call("GET", "/jobs") for one in (client, Client(running.url, "wrong"))]
        assert refused[0].body == refused[1].body and [one.problem().status for one in refused] == [401, 401]
        reply = Client(running.url, "secret-token").call("POST", "/session")
        cookie, attributes = reply.headers["set-cookie"].split(";", 1)
        assert reply.status == 204 and "secret-token" not in cookie
        assert "HttpOnly; SameSite=Strict" in attributes
        assert client.call("GET", "/jobs", None, {"Cookie": cookie}).status == 200


def test_bound_to_the_network_the_service_makes_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr(settings.Config, "is_loopback", False)  # so that no test is heard outside
    with server.Service(settings.Config(storage_root=tmp_path, port=0)) as running:
        token = (tmp_path / "token").read_text().strip()
        assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
        assert Client(running.url).call("GET", "/jobs").status == 401
        assert Client(running.url, token).call("GET", "/jobs").status == 200


def test_the_token_that_was_made_is_the_second_line_printed(tmp_path):
    # As bound to the network, while nothing is: no test is heard outside.
    code = "import settings, server, sys; settings.Config.is_loopback = False; sys.exit(server.main())"
    command = [sys.executable, "-c", code, "--port", "0", "--storage-root", str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            first = process.stdout.readline()
            process.terminate()
            assert process.wait(15) == 0
        finally:
            process.kill()
        printed = process.stdout.read()
    assert first.startswith("serving on http://127.0.0.1:")
    assert printed == f"access token: {(tmp_path / 'token').read_text().strip()}\n"


def start(root: Path) -> tuple[subprocess.Popen[str], Client]:
    """A service process of its own."""
    command = [sys.executable, str(ROOT / "server.py"), "--port", "0", "--storage-root", str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "http://" in line, line
    return process, Client(line.split()[2])


def test_importing_the_server_loads_no_torch():
    code = "import server, sys; sys.exit(bool({'torch', 'cv2', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_sigterm_ends_it_and_a_second_service_is_refused_the_same_root(tmp_path):
    process, client = start(tmp_path)
    try:
        command = [sys.executable, str(ROOT / "server.py"), "--port", "0", "--storage-root", str(tmp_path)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert second.returncode == 2 and "another service" in second.stderr
        assert client.call("GET", "/health").status == 200
        process.terminate()
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()


def test_two_services_in_one_process_know_nothing_of_each_other(tmp_path, client):
    with server.Service(settings.Config(storage_root=tmp_path, port=0)) as other:
        client.call("PUT", "/incoming/mine.zip", volume({"1.png": png()}))
        job = client.submit("mine.zip")
        assert Client(other.url).call("GET", f"/jobs/{job}").status == 404
        assert Client(other.url).call("GET", "/jobs").json() == {"jobs": [], "nextCursor": None}
    assert client.wait(job).status == "SUCCESS"


def test_the_demo_prints_an_artifact_and_its_hash(tmp_path):
    command = [sys.executable, "-u", str(ROOT / "server.py"), "--demo", "--port", "0", "--storage-root"]
    process = subprocess.Popen(
        [*command, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        printed = ""
        while "still serving" not in printed and (line := process.stdout.readline()):
            printed += line
        bars = [line for line in printed.splitlines() if line.startswith("[")]
        assert bars[-1] == f"[{'#' * 20}] 4/4 pages  done" and len(bars) == len({*bars})
        path = printed.split("artifact  ")[1].splitlines()[0]
        digest = printed.split("sha256    ")[1].split()[0]
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
        with zipfile.ZipFile(path) as archive:
            assert archive.namelist() == ["artifact-report.json", *(f"00{n}.jpg" for n in range(4))]
        process.terminate()
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
