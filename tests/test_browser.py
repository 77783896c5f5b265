"""The web page and /docs as people use them: in a real, headless Chromium.

Every page here must stay on this host, break no rule of its policy and throw no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import os
import re
import shutil
import sqlite3
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import drawn
import pytest
from client import Client
from helpers import require
from kills import Service
from serving import finished, png, queued, running, still, until, volume

import jobs
import server
import settings
from web import webpage
from work import volumes

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# It has no business outside, and asks for nothing there.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
TOKEN = "correct-horse-battery"
DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
HASTE = "() => { const wait = setTimeout; window.setTimeout = (work, ms) => wait(work, ms / 20); }"


# ---------------------------------------------------------------- a browser
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    require(CHROMIUM, "Chromium is not installed (Debian: chromium)")
    require(importlib.util.find_spec("playwright"), "playwright is not installed (pip install playwright)")
    from playwright.sync_api import sync_playwright

    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *root])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium) -> Iterator[Callable[..., Any]]:
    """Open a URL in a browser of its own: visit(url, locale="zh-CN", color_scheme="dark")."""
    wrong: list[str] = []

    def open_page(url: str, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": DESK, "locale": "en-US"} | options)
        stack.callback(context.close)
        context.set_default_timeout(20_000)
        page = context.new_page()
        host = urlsplit(url).netloc
        ours = (f"http://{host}/", f"ws://{host}/", f"blob:http://{host}/", "data:")
        page.on("request", lambda request: request.url.startswith(ours) or wrong.append(request.url))
        page.on("websocket", lambda line: line.url.startswith(ours) or wrong.append(line.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: "Content Security" in said.text and wrong.append(said.text))
        page.goto(url)
        return page

    with contextlib.ExitStack() as stack:
        yield open_page
    assert not wrong


def drop(page: Any, *paths: Path) -> None:
    """Files and folders let go over the page, as a file manager does it."""
    box = page.locator("#drop").bounding_box()
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    place = {"x": box["x"] + 30, "y": box["y"] + 30, "data": data}
    line = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        line.send("Input.dispatchDragEvent", {"type": kind, **place})
    line.detach()


def see(page: Any, text: str | re.Pattern[str], within: str = "body") -> Any:
    """Wait until this can be read; where."""
    found = page.locator(within).get_by_text(text).first
    found.wait_for()
    return found


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name)


def many(service: server.Service, count: int) -> None:
    """Jobs that wait, as many as asked."""
    (service.config.layout.incoming / "one.zip").write_bytes(volume({"1.png": png()}))
    facts = {"volume": "1", "input_type": "zip", "input_path": "one.zip", "params": jobs.Params()}
    with service.table.transaction():
        for n in range(count):
            service.table.insert({"id": f"{n:08x}-0000-4000-8000-000000000000", "title": f"t{n}", **facts})


def with_pages(service: server.Service, count: int, error: str | None = None) -> jobs.Job:
    """A job that succeeded with as many pages; the second was carried because of `error`."""
    job = running(service, "Long")
    pages = [
        jobs.Page(job.id, n, f"{n:05}.png", f"{n:05}.png", "0" * 64, 9, None, f"{n:05}", "upscaled",
                  f"{n:05}.jpg", "0" * 64, 9, 64, 96, "L")
        for n in range(1, count + 1)
    ]  # fmt: skip
    if error:
        pages[1] = jobs.replace(pages[1], status="carried", error=error)
    service.table.replace_pages(job.id, pages)
    facts = {"total": count, "processed": count, "failed_pages": 1 if error else 0, "artifact_hash": "0" * 64}
    return jobs.advance(service.table, job, "finish", 2000.0, **facts)


# ---------------------------------------------------------------- a volume's whole way
WIDTHS = "[...document.querySelectorAll('#sheet img')].map((one) => one.complete && one.naturalWidth)"


def draw_volume(folder: Path) -> Path:
    """Eight pages in a folder of their own, the first in colour; a page that is cut off; no page."""
    (folder / "第1話").mkdir(parents=True)
    for n in range(1, 9):
        page = drawn.colour(240, 160) if n == 1 else drawn.grey(240, 160)
        cv2.imencode(".png", page)[1].tofile(folder / "第1話" / f"{n}.png")
    (folder / "10.png").write_bytes((folder / "第1話" / "1.png").read_bytes()[:2000])
    (folder / "notes.txt").write_text("no page")
    return folder


def compare(page: Any) -> None:
    """Move the slider from one end to the other, by keys."""
    until(lambda: page.evaluate(WIDTHS) == [160, 320])
    slider = page.get_by_role("slider", name="Compare before and after")
    slider.press("End")
    before = page.locator("#sheet").screenshot()
    slider.press("Home")
    assert page.locator("#sheet").screenshot() != before
    for _ in range(30):
        slider.press("ArrowRight")
    clip = page.locator("#after").evaluate("(image) => getComputedStyle(image).clipPath")
    assert clip == "inset(0px 0px 0px 30%)"


def test_a_dropped_folder_is_upscaled_through_a_killed_service_compared_and_downloaded(tmp_path, visit):
    """The service is killed amid the job and started again: the page finds back by itself."""
    folder = draw_volume(tmp_path / "作品名 第3巻")
    service = Service(tmp_path / "root")
    try:
        service.command[service.command.index("0")] = service.client.host.rpartition(":")[2]
        page = visit(f"http://{service.client.host}/")
        see(page, "Connected")
        drop(page, folder)
        assert see(page, "9 pages").is_visible()
        assert page.get_by_label("Title").input_value() == "作品名"
        assert page.get_by_label("Volume", exact=True).input_value() == "3"
        page.get_by_label("Model").select_option("realesr-animevideov3")
        page.get_by_label("PNG").check()
        button(page, "Upscale this volume").click()
        see(page, re.compile(r"[1-9] of 9 pages"), "#running")
        service.kill()
        see(page, "Reconnecting")
        service.start()
        see(page, "Connected")
        see(page, "Done", "#jobs")
        assert see(page, "1 page kept as it was").is_visible()

        page.get_by_role("link", name="作品名 3", exact=True).press("Enter")
        state = service.client.state(page.url.rpartition("#")[2])
        assert (state.status, state.processed, state.params.output_format) == ("SUCCESS", 9, "png")
        shown = see(page, "10.png", "#trouble").locator("xpath=..").inner_text()
        assert len(shown) > len("10.png ") + 10, "the failed page's reason is not shown"
        button(page, "第1話/1.png").click()
        compare(page)

        with page.expect_download() as waiting:
            page.get_by_role("link", name="Download: 作品名 3").click()
        data = Path(waiting.value.path()).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        assert see(page, digest, "#facts").is_visible() and digest == state.artifact_hash
        names = zipfile.ZipFile(waiting.value.path()).namelist()
        assert sorted(names) == ["10.png", "artifact-report.json", *(f"第1話/{n}.png" for n in range(1, 9))]
    finally:
        service.end()


def test_a_dropped_archive_waits_and_is_cancelled_resumed_and_deleted_without_an_alert(tmp_path, visit):
    (tmp_path / "Yotsuba v02 (2004).cbz").write_bytes(volume({"1.png": png()}))
    with still(tmp_path / "root") as service:
        page = visit(service.url)
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        drop(page, tmp_path / "Yotsuba v02 (2004).cbz")
        button(page, "Upscale this volume").click()
        row = page.locator("#jobs li")
        see(page, "Waiting", "#jobs")
        job = next(service.table.changed_since(0))
        assert (job.title, job.volume, job.input_type) == ("Yotsuba", "02", "zip")
        row.get_by_role("button", name="Cancel").click()
        see(page, "Cancelled", "#jobs")
        row.get_by_role("button", name="Resume").click()
        see(page, "Waiting", "#jobs")
        row.get_by_role("button", name="Delete").click()
        button(page, "Keep").click()
        assert service.table.get(job.id).state == jobs.PENDING
        row.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        see(page, "Nothing here yet")
        assert not list(service.table.changed_since(0))


@pytest.mark.parametrize("container", ["zip", "cbz", "epub"])
def test_a_folder_s_other_files_go_along_for_a_cbz_which_the_page_asks_for(tmp_path, visit, container):
    files = {"1.png": png(), "ComicInfo.xml": b"<ComicInfo/>", "a/notes.txt": b"notes", ".hidden": b"x"}
    for name, data in files.items():
        (tmp_path / "Comic 1" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "Comic 1" / name).write_bytes(data)
    with still(tmp_path / "root") as service:
        page = visit(service.url)
        drop(page, tmp_path / "Comic 1")
        assert see(page, "1 page").is_visible()
        page.get_by_text("More settings").click()
        page.get_by_label(container.upper(), exact=True).check()
        if container == "epub":
            page.get_by_label("Left to right", exact=True).check()
        button(page, "Upscale this volume").click()
        see(page, "Waiting", "#jobs")
        job = next(service.table.changed_since(0))
        place = service.config.layout.incoming / job.input_path
        sent = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
        assert job.params.container == container
        assert job.params.reading_direction == ("ltr" if container == "epub" else "rtl")
        assert sent == ({"1.png"} if container != "cbz" else {"1.png", "ComicInfo.xml", "a/notes.txt"})


def test_a_folder_of_several_volumes_becomes_a_job_for_each(tmp_path, visit):
    for folder, names in {"A": ["v1.cbz", "v2.zip"], "B": ["v1/1.png", "v2/1.png", "v2/notes.txt"]}.items():
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_bytes(png() if "/" in name else volume({"1.png": png()}))
    with still(tmp_path / "root") as service:
        page = visit(service.url)
        drop(page, tmp_path / "A")
        several = page.get_by_label("Several volumes: a job for each")
        several.wait_for()
        assert several.is_checked()  # archives alone can't be one volume
        button(page, "Upscale this volume").click()
        see(page, "A 2", "#jobs")
        drop(page, tmp_path / "B")
        several.wait_for()
        assert not several.is_checked()
        several.check()
        button(page, "Upscale this volume").click()
        see(page, "B 2", "#jobs")
        made = [(job.title, job.volume, job.input_type) for job in service.table.changed_since(0)]
        assert made == [("A", "1", "zip"), ("A", "2", "zip"), ("B", "1", "folder"), ("B", "2", "folder")]


def test_what_others_do_is_seen_at_once(tmp_path, visit):
    with still(tmp_path) as service:
        page = visit(service.url)
        see(page, "Nothing here yet")
        job = running(service, "Live")
        service.table.change(job, state=jobs.RUNNING, total=24, processed=12, eta_s=60.0)
        see(page, re.compile(r"12 of 24 pages · 12 pages/min · .*left"), "#running")
        done = service.table.get(job.id)
        jobs.advance(service.table, done, "fail", 2000.0, last_error="every page failed")
        see(page, "every page failed", "#jobs")


def test_the_queue_is_paused_and_a_volume_put_first_by_keys_in_both_languages(tmp_path, visit):
    with still(tmp_path) as service:
        held = running(service, "Held")
        first, second = queued(service, "First"), queued(service, "Second")
        page = visit(service.url)
        button(page, "Pause: Queue").press("Enter")
        see(page, "The queue is paused")
        see(page, "paused", "#running")
        assert service.table.is_paused and service.table.get(held.id).state == jobs.RUNNING
        button(page, "Start next: Second 1").press("Enter")
        see(page, "Second 1 starts next.")
        see(page, "priority 1", "#jobs")
        button(page, "中文").press("Enter")
        button(page, "排到最前：First 1").press("Enter")
        see(page, "优先级 2", "#jobs")
        button(page, "继续：队列").press("Enter")
        page.locator("#paused").wait_for(state="hidden")
        turns = [jobs.claim(service.table, 1000.0) for _ in range(2)]
        assert [job and job.id for job in turns] == [first.id, second.id]


def test_what_is_deleted_in_another_window_is_gone_when_somebody_comes_back_to_this_one(tmp_path, visit):
    with still(tmp_path) as service:
        kept, gone = queued(service, "Kept"), queued(service, "Gone")
        home, open_page = visit(service.url), visit(f"{service.url}/#{gone.id}")
        see(home, "Gone 1", "#jobs")
        see(open_page, "Gone 1", "#title")
        assert Client(service.url).call("DELETE", f"/jobs/{gone.id}").status == 204
        for page in (home, open_page):
            page.evaluate("lookedAt = 0; dispatchEvent(new Event('focus'))")
        until(lambda: home.locator("#jobs li").count() == 1)
        see(home, "Kept 1", "#jobs")
        see(open_page, "This volume is not there any more.")
        see(open_page, "Kept 1", "#jobs")
        # What is heard while the list is read anew is not lost by it.
        home.evaluate("lookedAt = 0; dispatchEvent(new Event('focus'))")
        jobs.cancel(service.table, kept.id, 1.0)
        see(home, "Cancelled", "#jobs")


def test_what_is_cancelled_to_be_deleted_in_another_window_goes_from_this_one_too(tmp_path, visit):
    with still(tmp_path) as service:
        queued(service, "Kept")
        gone = queued(service, "Gone")
        home = visit(service.url)
        see(home, "Gone 1", "#jobs")
        until(lambda: home.locator("#line").get_attribute("data-up"))
        home.evaluate("lookedAt = Date.now()")  # it looks again by itself after 20 s
        cancelled = jobs.cancel(service.table, gone.id, 1.0)
        see(home, "Cancelled", "#jobs")
        assert service.table.delete(cancelled)
        until(lambda: home.locator("#jobs li").count() == 1)
        see(home, "Kept 1", "#jobs")


def test_a_volumes_page_acts_on_that_volume_also_after_another_was_looked_at(tmp_path, visit):
    with still(tmp_path) as service:
        first, second = queued(service, "First"), queued(service, "Second")
        page = visit(f"{service.url}/#{first.id}")
        see(page, "First 1", "#title")
        page.evaluate(f"location.hash = '{second.id}'")
        see(page, "Second 1", "#title")
        page.locator("#one .actions").get_by_role("button", name="Cancel").click()
        until(lambda: service.table.get(second.id).cancelled)
        assert service.table.get(first.id).state == jobs.PENDING


def test_the_first_key_leads_to_the_content_and_not_to_a_volume_of_that_name(tmp_path, visit):
    with still(tmp_path) as service:
        page = visit(service.url)
        see(page, "Nothing here yet")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main" and page.locator("#home").is_visible()


def test_a_volume_is_called_gone_by_a_service_that_says_so_and_by_no_proxy(tmp_path, visit):
    with still(tmp_path) as service:
        job = with_pages(service, 1)
        page = visit(f"{service.url}/#{job.id}")
        page.route(f"**/jobs/{job.id}", lambda route: route.fulfill(status=502))
        with page.expect_response(f"**/jobs/{job.id}"):
            page.reload()
        see(page, "00001.png", "#shelf")
        assert page.url.endswith(job.id) and not page.get_by_text("is not there any more").count()
        page.evaluate("location.hash = '00000000-0000-4000-8000-000000000000'")
        see(page, "This volume is not there any more.")
        until(lambda: page.url.endswith("#"))


def test_a_click_that_the_service_does_not_hear_is_to_be_made_again(tmp_path, visit):
    with still(tmp_path) as service:
        queued(service, "Unheard")
        page = visit(service.url)
        for name, place in (("Pause: Queue", "**/queue/pause"), ("Cancel: Unheard 1", "**/jobs/*/cancel")):
            page.route(place, lambda route: route.abort())
            button(page, name).click()
            see(page, "The service does not answer; please try again.", "#notes")
            page.locator("#notes p").evaluate("(said) => said.remove()")


def test_pages_that_are_computed_again_do_not_leave_the_list_empty(tmp_path, visit):
    with still(tmp_path) as service:
        job = with_pages(service, 4, error="it is damaged")
        page = visit(f"{service.url}/#{job.id}")
        button(page, "Show only these").click()
        until(lambda: page.locator("#shelf li").count() == 1)
        page.locator("#one .actions").get_by_role("button", name="Retry failed pages").click()
        until(lambda: page.locator("#shelf li").count() == 4)


def test_a_books_formats_are_those_that_it_holds(tmp_path, visit):
    with still(tmp_path) as service:
        page = visit(service.url)
        page.get_by_label("AVIF").check()
        page.get_by_text("More settings").click()
        assert not page.get_by_label("Left to right", exact=True).is_visible(), "of a zip's pages nobody asks"
        page.get_by_label("PDF", exact=True).check()
        assert page.get_by_label("Left to right", exact=True).is_visible()
        assert page.get_by_label("JPEG").is_checked()
        disabled = [page.get_by_label(name, exact=True).is_disabled() for name in ("PNG", "WebP", "AVIF")]
        assert disabled == [False, True, True]
        page.get_by_label("EPUB", exact=True).check()
        assert not page.get_by_label("WebP").is_disabled()


def test_a_model_of_ones_own_stays_chosen_until_a_worker_knows_of_it(tmp_path, visit):
    with still(tmp_path) as service:
        page = visit(service.url)
        # Before the page's own script: the one that is there writes what it has once it knows the models.
        page.add_init_script("localStorage.setItem('settings', JSON.stringify({ model: 'mine' }))")
        with page.expect_response("**/health"):
            page.reload()
        until(lambda: page.locator("#model option").count() > 3)
        assert page.get_by_label("Model").input_value() == "mine"


def test_a_name_that_only_this_system_holds_is_no_hindrance(tmp_path, visit):
    require(os.name == "posix", "Windows holds no such name")
    (tmp_path / "Who? v02.cbz").write_bytes(volume({"1.png": png()}))
    with still(tmp_path / "root") as service:
        page = visit(service.url)
        drop(page, tmp_path / "Who? v02.cbz")
        button(page, "Upscale this volume").click()
        see(page, "Who? 02", "#jobs")
        (job,) = service.table.changed_since(0)
        assert re.fullmatch(r"Who_ v02 [0-9-]{15}\.cbz", job.input_path) and job.title == "Who?"


def test_a_file_that_went_is_no_lost_line(tmp_path, visit):
    (tmp_path / "Gone 1.cbz").write_bytes(volume({"1.png": png()}))
    with still(tmp_path / "root") as service:
        page = visit(service.url)
        drop(page, tmp_path / "Gone 1.cbz")
        (tmp_path / "Gone 1.cbz").unlink()
        button(page, "Upscale this volume").click()
        see(page, "Gone 1.cbz could not be read.", "#uploads")


def test_what_is_no_volume_is_refused_with_its_name(tmp_path, visit):
    (tmp_path / "notes.docx").write_bytes(b"%PDF")
    with still(tmp_path / "root") as service:
        page = visit(service.url)
        drop(page, tmp_path / "notes.docx")
        see(page, "notes.docx is not a folder of pages")
        assert not page.locator("#start").is_visible()


def test_an_upload_whose_line_is_lost_goes_on_with_the_file_that_was_under_way(tmp_path, visit):
    (tmp_path / "Lost 1").mkdir()
    for n in range(1, 4):
        (tmp_path / f"Lost 1/{n}.png").write_bytes(png(shade=n))
    with still(tmp_path / "root") as service:
        page = visit(service.url)
        sent: list[str] = []

        def lose_the_second(route: Any) -> None:
            sent.append(route.request.url.rpartition("/")[2])
            route.abort() if len(sent) in (2, 3) else route.continue_()

        page.route("**/incoming/**", lose_the_second)
        drop(page, tmp_path / "Lost 1")
        button(page, "Upscale this volume").click()
        see(page, "The service does not answer; trying again", "#uploads")
        see(page, "Waiting", "#jobs")
        assert sent == ["1.png", "2.png", "2.png", "2.png", "3.png"]
        place = service.config.layout.incoming / next(service.table.changed_since(0)).input_path
        assert [path.read_bytes() for path in sorted(place.iterdir())] == [png(shade=n) for n in range(1, 4)]


def test_an_upload_waits_for_a_service_behind_a_proxy_and_one_that_never_succeeds_says_why(
    tmp_path, visit, monkeypatch
):
    def damaged(*_: Any) -> None:
        raise sqlite3.DatabaseError("malformed")

    (tmp_path / "Late 1.cbz").write_bytes(volume({"1.png": png()}))
    with still(tmp_path / "root") as service:
        page = visit(service.url)
        see(page, "Connected")
        page.evaluate(HASTE)
        away = [502, 504]
        page.route("**/incoming/**", lambda route: route.fulfill(status=away.pop()), times=2)
        with monkeypatch.context() as patch:
            patch.setattr(volumes, "submit", damaged)
            drop(page, tmp_path / "Late 1.cbz")
            button(page, "Upscale this volume").click()
            see(page, "the job table is damaged; restart the service", "#uploads")
            button(page, "Try again").wait_for()
            assert page.get_by_text("the job table is damaged; restart the service").is_visible()
        button(page, "Try again").click()
        see(page, "Waiting", "#jobs")


def test_volumes_that_were_stopped_while_they_were_submitted_are_cancelled(tmp_path, visit, monkeypatch):
    (tmp_path / "A").mkdir()
    for name in ("v1.cbz", "v2.cbz"):
        (tmp_path / "A" / name).write_bytes(volume({"1.png": png()}))
    stopped, submit = threading.Event(), volumes.submit
    monkeypatch.setattr(volumes, "submit", lambda *given: stopped.wait(20) and submit(*given))
    with still(tmp_path / "root") as service:
        page = visit(service.url)
        drop(page, tmp_path / "A")
        button(page, "Upscale this volume").click()
        see(page, "Submitting", "#uploads")
        page.locator("#uploads").get_by_role("button", name="Stop").click()
        stopped.set()
        until(lambda: [job.cancelled for job in service.table.changed_since(0)] == [True, True])
        until(lambda: not page.locator("#uploads .volume").count())


def test_a_page_that_the_service_refuses_is_named_with_the_reason_and_nothing_is_submitted(tmp_path, visit):
    (tmp_path / "Bad").mkdir()
    (tmp_path / "Bad/aux.png").write_bytes(png())
    with still(tmp_path / "root") as service:
        page = visit(service.url)
        drop(page, tmp_path / "Bad")
        button(page, "Upscale this volume").click()
        see(page, "aux.png: a name that some file systems can't hold", "#uploads")
        assert button(page, "Try again").is_visible() and not list(service.table.changed_since(0))
        page.locator("#uploads").get_by_role("button", name="Remove").click()
        assert not page.locator("#uploads .volume").count()


# ---------------------------------------------------------------- token, words
def test_the_token_is_asked_for_once_and_stands_in_no_address(tmp_path, visit):
    with still(tmp_path, token=TOKEN) as service:
        finished(service)
        page = visit(service.url)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.get_by_role("textbox", name="Token").fill("guess")
        button(page, "Open").click()
        see(page, "That is not the token.")
        page.get_by_role("textbox", name="Token").fill(TOKEN)
        page.keyboard.press("Enter")
        see(page, "Connected")
        with page.expect_download() as waiting:
            page.get_by_role("link", name="Download").click()
        assert Path(waiting.value.path()).read_bytes() == b"hello world"
        page.reload()
        see(page, "Connected")
        assert not page.get_by_role("dialog").is_visible() and not any(TOKEN in url for url in asked)
        button(page, "Sign out").click()
        page.get_by_role("dialog").wait_for()


def test_a_chinese_browser_reads_chinese_and_the_switch_is_remembered(tmp_path, visit):
    with still(tmp_path) as service:
        queued(service)
        page = visit(service.url, locale="zh-CN")
        see(page, "已连接")
        see(page, "等待中", "#jobs")
        assert page.locator("html").get_attribute("lang") == "zh-CN"
        button(page, "English").click()
        see(page, "Waiting", "#jobs")
        page.reload()
        see(page, "Connected")


def test_light_and_dark_follow_the_system_until_they_are_switched_which_is_remembered(tmp_path, visit):
    with still(tmp_path) as service:
        page = visit(service.url, color_scheme="dark")
        paper = "getComputedStyle(document.documentElement).backgroundColor"
        dark = page.evaluate(paper)
        page.emulate_media(color_scheme="light")
        light = page.evaluate(paper)
        button(page, "Dark").click()
        assert light != dark == page.evaluate(paper)
        page.reload()
        assert button(page, "Light").is_visible() and page.evaluate(paper) == dark


def test_both_languages_have_the_same_words():
    script = webpage.INDEX.read_text(encoding="utf-8")
    english, chinese = (
        set(re.findall(r"(\w+): \"", re.search(rf"  {lang}: {{(.*?)\n  }}", script, re.DOTALL)[1]))
        for lang in ("en", "zh")
    )
    used = set(re.findall(r"data-t=\"(\w+)\"|\bt\(\"(\w+)\"", script))
    assert english == chinese and {one or other for one, other in used} <= english


# ---------------------------------------------------------------- everybody, and everything at once
@pytest.fixture(scope="module")
def axe() -> str:
    spec = importlib.util.find_spec("axe_playwright_python")
    require(spec, "axe is not installed (pip install axe-playwright-python)")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "axe.min.js").read_text(encoding="utf-8")


def check_for_all(page: Any, axe: str) -> None:
    """Nothing that axe calls more than minor."""
    # Through the driver, which the page's policy does not bind.
    found = page.evaluate(f"async () => {{ {axe}; return (await axe.run()).violations; }}")
    bad = [one for one in found if one["impact"] in ("serious", "critical", "moderate")]
    assert not bad, [(one["id"], [node["html"] for node in one["nodes"]]) for one in bad]


@pytest.mark.parametrize("scheme, size", [*itertools.product(("light", "dark"), ("desk", "phone"))])
def test_axe_finds_nothing_serious(tmp_path, visit, axe, scheme, size):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(png())
    with still(tmp_path / "root") as service:
        long = with_pages(service, 40, "the file is cut off")
        jobs.cancel(service.table, queued(service, "Cancelled").id, 1.0)
        running(service, "Running")
        queued(service, "Waiting")
        page = visit(service.url, color_scheme=scheme, viewport=DESK if size == "desk" else PHONE)

        see(page, "Waiting", "#jobs")
        drop(page, tmp_path / "a")
        page.get_by_text("More settings").click()
        see(page, "Upscale this volume")
        check_for_all(page, axe)
        page.locator("#jobs").get_by_role("button", name="Delete").first.click()
        check_for_all(page, axe)
        button(page, "Keep").click()
        page.goto(f"{service.url}/#{long.id}")
        see(page, "the file is cut off", "#trouble")
        check_for_all(page, axe)


def test_a_page_of_a_dropped_zip_is_previewed_before_and_it_is_the_one_that_the_job_makes(
    tmp_path, visit, axe
):
    """By keys alone; the zip is read by the browser, nothing of it was sent yet."""
    pages = {f"第1話/{n}.png": png(60, 80, n) for n in (1, 2, 10)}
    with zipfile.ZipFile(tmp_path / "Seen v01.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {"notes.txt": b"no page", **pages}.items():
            archive.writestr(name, data)
    config = settings.Config(storage_root=tmp_path / "root", port=0, precision="fp32")  # needs no probing
    with server.Service(config) as service:
        page = visit(service.url)
        see(page, "Connected")
        page.get_by_label("Model").select_option("realesr-animevideov3")
        page.get_by_label("PNG").check()
        drop(page, tmp_path / "Seen v01.zip")
        button(page, "Preview: Seen v01.zip").press("Enter")
        page.set_default_timeout(60_000)  # a cold worker loads torch first
        see(page, re.compile(r"realesr-animevideov3, .* The whole volume: about .*, judged by this page"))
        assert (
            page.get_by_label("Page", exact=True).locator("option:checked").inner_text().startswith("2 / 3")
        )
        until(lambda: page.evaluate(WIDTHS) == [60, 120])
        page.get_by_role("dialog").get_by_role("button", name="Next").press("Enter")
        assert page.get_by_label("Page", exact=True).input_value() == "2"
        see(page, "judged by 2 pages of previews")
        until(lambda: page.evaluate(WIDTHS) == [60, 120])
        page.get_by_role("slider", name="Compare before and after").press("Home")
        clip = page.locator("#after").evaluate("(image) => getComputedStyle(image).clipPath")
        assert clip == "inset(0px 0px 0px 0%)"
        check_for_all(page, axe)
        sources = [page.locator(f"#{side}").get_attribute("src") for side in ("before", "after")]
        before, after = (page.request.get(f"{service.url}/{source}").body() for source in sources)
        assert before == pages["第1話/10.png"] and not list(service.config.layout.incoming.iterdir())
        page.keyboard.press("Escape")
        button(page, "Upscale this volume").press("Enter")
        see(page, "Done", "#jobs")
        job = next(service.table.changed_since(0))
        assert page.request.get(f"{service.url}/jobs/{job.id}/pages/3/after").body() == after
        page.get_by_role("link", name="Seen 01", exact=True).press("Enter")
        until(lambda: page.evaluate(WIDTHS) == [60, 120])


def test_a_preview_that_fails_says_why_in_the_readers_language(tmp_path, visit, axe):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(b"no image")
    (tmp_path / "empty.zip").write_bytes(b"no zip")
    with still(tmp_path / "root") as service:
        page = visit(service.url, locale="zh-CN", viewport=PHONE, color_scheme="dark")
        see(page, "已连接")
        drop(page, tmp_path / "a", tmp_path / "empty.zip")
        button(page, "预览：a").click()
        see(page, "无法预览：what was sent is no JPEG")
        check_for_all(page, axe)
        button(page, "关闭").click()
        button(page, "预览：empty.zip").click()
        see(page, "无法在此列出 empty.zip 中的页面")


def test_a_preview_that_no_worker_can_make_now_says_why_and_is_asked_for_again(tmp_path, visit, monkeypatch):
    def lost(_key: str, _task: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(jobs.JobError("the worker process can't start: no torch here"))
        return future

    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(png())
    with still(tmp_path / "root", page_wait_s=0) as service:
        page = visit(service.url)
        see(page, "Connected")
        drop(page, tmp_path / "a")
        with monkeypatch.context() as patch:
            patch.setattr(service.dispatcher, "ask", lost)
            button(page, "Preview: a").click()
            see(page, "the worker process can't start: no torch here", "#preview")
        see(page, "Computing this page", "#preview")  # it only takes its time


def test_three_thousand_jobs_are_a_screenful_of_rows(tmp_path, visit):
    with still(tmp_path) as service:
        many(service, 3000)
        page = visit(service.url)
        see(page, "t2999", "#jobs")
        rows = page.locator("#jobs li")
        assert rows.count() < 40

        def is_at_the_end() -> bool:
            page.mouse.wheel(0, 100_000)
            return bool(page.get_by_role("link", name="t0 1", exact=True).count())

        until(is_at_the_end, 30)
        assert rows.count() < 40 and rows.last.get_attribute("aria-setsize") == "3000"
        page.get_by_role("searchbox", name="Search").fill("T1234")
        until(lambda: rows.count() == 1)
        assert rows.inner_text().startswith("t1234 1")


def test_ten_thousand_pages_are_a_screenful_of_rows(tmp_path, visit):
    with still(tmp_path) as service:
        job = with_pages(service, 10_000, "no decoder reads it")
        page = visit(f"{service.url}/#{job.id}")
        rows = page.locator("#shelf li")
        see(page, "00001.png", "#shelf")
        page.locator("#shelf").evaluate("(area) => area.scrollTo(0, 1e9)")
        see(page, "10000.png", "#shelf")
        assert rows.count() < 30
        button(page, "Show only these").click()
        see(page, "Kept as it was: no decoder reads it")
        assert rows.count() == 1


# ---------------------------------------------------------------- /docs
def test_docs_try_a_request_out_with_the_token(tmp_path, visit):
    with still(tmp_path, token=TOKEN) as service:
        queued(service, "Tried")
        page = visit(f"{service.url}/docs")
        button(page, "Authorize").click()
        page.get_by_label("Value").first.fill(TOKEN)
        page.locator(".auth-btn-wrapper button.authorize").first.click()
        page.locator(".btn-done").first.click()
        page.locator("#operations-Jobs-list_jobs .opblock-summary-control").click()
        page.locator("#operations-Jobs-list_jobs .execute").click()
        answer = page.locator("#operations-Jobs-list_jobs .live-responses-table")
        answer.get_by_text("200", exact=True).wait_for()
        assert '"Tried"' in answer.inner_text()
