"""Bugs planted into a service, one each, so that fuzz.py and its kin can show that they find them;
and what a test needs to see inside.

For tests only. Each function is named to fuzz.Target, which calls it in the service's own process
before the service starts; nothing of this is a switch in the product.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import fuzz

import jobs
import server
import storage
from files import inputs
from web import api, live, wire
from work import submissions


def wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Put wrapper(original, *arguments) in place of owner.name."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **named: wrapper(original, *arguments, **named))


# ---------------------------------------------------------------- no bugs
def opens_are_noted() -> None:
    """Every path that the process opens, lists or removes is written beside its storage root, in which
    a token lies that nobody should open."""
    notes: list[Any] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        watched = event in (
            "open",
            "os.listdir",
            "os.scandir",
            "os.remove",
            "os.rename",
            "os.mkdir",
            "os.rmdir",
        )
        if watched and notes and isinstance(arguments[0], (str, bytes, os.PathLike)):
            os.write(notes[0], os.fsencode(arguments[0]) + b"\n")

    def populated(real: Any, service: server.Service) -> Any:
        world = real(service)
        (service.config.layout.root / "token").write_text("a token that was kept here")
        path = service.config.layout.root.parent / "log-of-opens"
        notes.append(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600))
        return world

    sys.addaudithook(hook)
    wrapped(fuzz, "populated", populated)


def a_large_artifact() -> None:
    """The finished job's artifact has 500 MB, most of them a hole."""

    def populated(real: Any, service: server.Service) -> Any:
        world = real(service)
        job = service.table.get(world.finished)
        os.truncate(service.config.layout.artifact(job.title, job.volume, job.id), 500 << 20)
        service.table.change(job, state=jobs.SUCCESS, artifact_bytes=500 << 20)
        return world

    wrapped(fuzz, "populated", populated)


# ---------------------------------------------------------------- HTTP
def a_route_that_raises_on_a_header() -> None:
    def artifact(real: Any, self: Any, request: wire.Request, id: str) -> Any:
        return real(self, request, id) if not request.headers.all("if-range") else {}["if-range"]

    wrapped(api.Api, "artifact", artifact)


def chunks_that_become_requests() -> None:
    def framing(real: Any, headers: wire.Headers, minor: str) -> Any:
        return real(wire.Headers(field for field in headers if field[0] != "transfer-encoding"), minor)

    wrapped(wire, "_framing", framing)


def the_first_of_two_lengths_that_wins() -> None:
    def framing(real: Any, headers: wire.Headers, minor: str) -> Any:
        lengths = headers.all("content-length")[:1]
        rest = wire.Headers(field for field in headers if field[0] != "content-length")
        return real(wire.Headers([*rest, *(("content-length", one) for one in lengths)]), minor)

    wrapped(wire, "_framing", framing)


def a_descriptor_left_open_by_every_overlong_line() -> None:
    def read_line(real: Any, source: Any, too_long: int) -> Any:
        try:
            return real(source, too_long)
        except wire.Refused as refusal:
            if refusal.code == "LINE_TOO_LONG":
                os.open(os.devnull, os.O_RDONLY)
            raise

    wrapped(wire, "_read_line", read_line)


def a_thread_that_dies_of_a_header() -> None:
    def handle(real: Any, self: Any, handler: Any, request: wire.Request) -> Any:
        if request.headers.all("max-forwards"):
            raise RuntimeError("nobody catches this")
        return real(self, handler, request)

    wrapped(api.Api, "handle", handle)


def a_hang_on_many_trailers() -> None:
    def chunks(real: Any, self: wire.Body) -> Any:
        try:
            yield from real(self)
        except wire.Refused:
            time.sleep(600)

    wrapped(wire.Body, "_chunks", chunks)


def an_answer_that_tells_where_files_lie() -> None:
    def upload(real: Any, self: api.Api, request: wire.Request, path: str) -> Any:
        try:
            return real(self, request, path)
        except storage.NameTaken as error:
            raise storage.NameTaken(f"{error.detail}: {self.layout.root}/{path}") from error

    wrapped(api.Api, "upload", upload)


def a_log_that_keeps_the_token() -> None:
    def parse_head(real: Any, line: bytes, fields: list[bytes], source: Any) -> Any:
        try:
            return real(line, fields, source)
        except wire.Refused as refusal:
            if refusal.code == "MALFORMED":
                wire.log.info("malformed: %s", fields)
            raise

    wrapped(wire, "parse_head", parse_head)


def a_row_for_any_scale() -> None:
    def parse_params(real: Any, given: dict[str, Any], models: Any, errors: list[Any]) -> Any:
        return real({key: value for key, value in given.items() if key != "scale"}, models, errors)

    wrapped(submissions, "parse_params", parse_params)


def a_202_without_a_row() -> None:
    def submit(real: Any, table: jobs.JobTable, layout: Any, wanted: Any, *rest: Any) -> jobs.Job:
        job: jobs.Job = real(table, layout, wanted, *rest)
        if wanted.input_type == "folder":
            table.delete(job)
        return job

    wrapped(submissions, "submit", submit)


def an_upload_that_leaves_its_folder() -> None:
    def parse_target(_real: Any, target: str) -> Any:
        path, _, query = target.partition("?")
        pairs = [part.partition("=") for part in query.split("&") if part]
        return [wire._decoded(part) for part in path[1:].split("/")], {k: v for k, _, v in pairs}

    wrapped(wire, "parse_target", parse_target)

    def resolve_incoming(real: Any, layout: storage.Layout, path: str) -> Any:
        # One level up and no further: this must not reach what isn't the test's.
        return layout.root / path.rpartition("/")[2] if ".." in path else real(layout, path)

    wrapped(inputs, "resolve_incoming", resolve_incoming)
    wrapped(storage, "safe_component", lambda _real, name: name)
    wrapped(api.unicodedata, "normalize", lambda _real, _form, text: text.replace("..", "up"))


def a_state_of_another_shape() -> None:
    wrapped(submissions, "to_state", lambda real, *arguments: real(*arguments) | {"leftOut": "none"})


# ---------------------------------------------------------------- WebSocket
def a_line_that_dies_of_a_fragment() -> None:
    def hear(real: Any, self: live.WebSocketLine, frame: Any) -> None:
        if not frame.fin:
            raise AttributeError("nobody thought of fragments")
        real(self, frame)

    wrapped(live.WebSocketLine, "_hear", hear)


def a_line_that_hangs_on_a_fragment() -> None:
    stuck: set[int] = set()

    def hear(real: Any, self: live.WebSocketLine, frame: Any) -> None:
        if not frame.fin:
            stuck.add(id(self))
        real(self, frame)

    async def flush(real: Any, self: live.WebSocketLine) -> None:
        if id(self) in stuck:
            await asyncio.sleep(600)
        await real(self)

    wrapped(live.WebSocketLine, "_hear", hear)
    wrapped(live.WebSocketLine, "_flush", flush)


def pings_without_pongs() -> None:
    def data_to_send(real: Any, self: Any) -> list[bytes]:
        return [data for data in real(self) if data[:1] != b"\x8a"]

    wrapped(live.ServerProtocol, "data_to_send", data_to_send)


def a_watcher_that_is_never_forgotten() -> None:
    wrapped(live.Live, "forget", lambda _real, _self, _watcher: None)
