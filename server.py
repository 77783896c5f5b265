"""The service: what it is made of, its start and its end.

Map: Service - demo - main
Rule: each thread and process that is begun here is ended here.
Runs in: main (signals). No torch, no numpy, no SQL.
Under it: settings.py (what was chosen), routes.py and api.py (REST), live.py (WebSocket).

    socket --wire--> Api ------> jobs.JobTable <---- dispatch ====> workers (infer)
            Upgrade |                | listeners
                    '--> live (asyncio) <--'
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cluster
import jobs
import logs
import settings
import storage
from files import weightfiles
from messages import EngineChoice
from web import api, sidecar, webpage, wire
from web.live import Live
from work import dispatch, rebuild, submissions
from work.watch import Watch

log = logging.getLogger("server")


# ---------------------------------------------------------------- the service
class Service:
    """Everything, started and ended together: `with Service(config) as service: service.url`.

    No state outside it: several may live in one process, each with its own storage root.
    Raises storage.AlreadyRunning, LockRefused, database.DatabaseUnusable, OSError (the port is taken).
    """

    def __init__(self, config: settings.Config, worker: Callable[..., None] | None = None) -> None:
        layout = config.layout
        self._ending = contextlib.ExitStack()
        self.made_token = False
        try:
            layout.create()
            self._ending.enter_context(storage.locked(layout))
            if not config.is_loopback and not config.token:
                config, self.made_token = replace(config, token=storage.keep_token(layout)), True
            self.config = config
            self.table = rebuild.open_table(layout.database)
            self._ending.callback(self.table.close)
            jobs.recover(self.table, layout, self.table.clock())
            choice = EngineChoice(
                config.device, config.precision, config.engine, layout.models, config.sandbox, config.log,
                convolutions=config.convolutions,
            )
            slots, limits = config.max_concurrency, config.limits
            kind = functools.partial(cluster.ClusterDispatcher, config.cluster) if config.cluster else None
            self.dispatcher = (kind or dispatch.Dispatcher)(
                self.table, layout, choice, slots, limits, config.worker_idle_s, worker, config.keep,
                config.reserve_bytes if config.checks_room else None, config.job_cache_bytes,
            )
            self.watch = self._watch(config) if config.watch_s else None
            self.live = Live(layout)
            self.table.listeners.append(self.live.publish)
            self.rebuild = rebuild.Rebuild(self.table, layout)
            self.api = api.Api(config, self.table, self.dispatcher, self.live, self.rebuild)
            self.http = self._listen(config)
        except BaseException:
            self._ending.close()
            raise
        self.api.connections = lambda: len(self.http.peers)

    def _listen(self, config: settings.Config) -> wire.HttpServer:
        """Raises ConfigError where the address can't be had."""
        try:
            return wire.HttpServer((config.host, config.port), self.api.handle, config.connections)
        except OSError as error:
            raise settings.ConfigError(
                f"can't listen on {config.host}, port {config.port}: {storage.reason_of(error)}; end "
                "what uses it, or choose another, like --port 8002 (--host for the address)"
            ) from error

    def _watch(self, config: settings.Config) -> Watch:
        """Raises ConfigError for REICHAN_WATCH_PARAMS that no job could have."""
        errors: list[tuple[str, str]] = []
        models = weightfiles.model_names(config.layout.models)
        params = submissions.parse_params(config.watch_params, models, errors)
        if params.split != "none":
            errors.append(("split", "is for requests: the watch takes each archive and folder by itself"))
        if errors:
            raise settings.ConfigError("REICHAN_WATCH_PARAMS: " + "; ".join(map(" ".join, errors)))
        return Watch(
            self.table, config.layout, config.limits, float(config.watch_s or 0), params,
            self.dispatcher.reserve_bytes, self.dispatcher.wake, make_room=self.dispatcher.cache.clear,
        )

    @property
    def url(self) -> str:
        """Where it listens; a wildcard bind is named by loopback."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.http.server_port}"

    def __enter__(self) -> Service:
        self.dispatcher.start()
        self.live.start()
        self.rebuild.start()
        self.http.start()
        if self.watch:
            self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.watch:
            self.watch.stop()
        # Work stops first, so that clients still hear of it; then the lines.
        self.dispatcher.stop()
        self.rebuild.stop()
        self.live.stop()
        self.http.stop()
        self._ending.close()


# ---------------------------------------------------------------- demo
def run_demo(service: Service) -> None:
    """Draw a volume, send it through the service's own interface, show how it goes."""
    from commands import submit

    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder, "reichan-sample.cbz")
        print("drawing a sample volume ...", flush=True)
        # In a process of its own: this one stays free of numpy and OpenCV.
        subprocess.run([sys.executable, storage.PROGRAM / "commands/sample.py", sample], check=True)
        _call(service, "PUT", "/incoming/reichan-sample.cbz", sample.read_bytes())
    body = {
        "title": "Reichan",
        "volume": "01",
        "input": {"type": "zip", "path": "incoming/reichan-sample.cbz"},
        # The small model: a machine without a GPU shows a result within a minute.
        "params": {"model": "realesr-animevideov3", "scale": 2},
    }
    job_id = _call(service, "POST", "/jobs", json.dumps(body).encode())["jobId"]
    line = submit.Line()
    while True:
        state = _call(service, "GET", f"/jobs/{job_id}")
        line.show(submit.describe(state))
        if state["status"] in (jobs.SUCCESS, jobs.FAILED):
            break
        time.sleep(0.25)
    line.end()
    if state["status"] == jobs.FAILED:
        print(f"the demo failed: {state['lastError']}", file=sys.stderr)
        return
    path = service.config.layout.root / state["artifactPath"]
    print(f"artifact  {path}\nsha256    {storage.sha256_file(path)}")
    print("still serving; stop with Ctrl-C", flush=True)


def _call(service: Service, method: str, path: str, data: bytes | None = None) -> Any:
    headers = {"Content-Type": "application/json" if method == "POST" else "application/octet-stream"}
    if service.config.token:
        headers["Authorization"] = f"Bearer {service.config.token}"
    request = urllib.request.Request(service.url + path, data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy
    with opener.open(request, timeout=30) as answer:
        text = answer.read()
    return json.loads(text) if text else None


# ---------------------------------------------------------------- main
def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="server.py",
        description="Manga Upscale Service. Without a command it serves.",
        epilog="server.py submit PATH: a client in the terminal, see server.py submit --help",
    )
    add = parser.add_argument
    add("command", nargs="?", choices=("doctor",), help="look whether all that a start needs is there")
    add("--demo", action="store_true", help="upscale a drawn sample volume, then go on serving")
    add("--host", help="address to listen on (REICHAN_BIND; 127.0.0.1)")
    add("--port", type=int, help="port, 0 for any free one (REICHAN_BIND; 8001)")
    add("--storage-root", help="where everything is kept (REICHAN_STORAGE_ROOT; ./storage)")
    add("--model-root", help="folder with weights (REICHAN_MODEL_ROOT; <storage root>/models)")
    add("--token", help="access token that clients must send (REICHAN_TOKEN)")
    add("--ready-json", action="store_true", help="print nothing but one line of JSON, once it serves")
    add("--exit-with-stdin", action="store_true", help="end when stdin does: with the program that holds it")
    return parser.parse_args(arguments)


def examine(flags: argparse.Namespace) -> int:
    """`server.py doctor`, with the settings that a start would have."""
    from commands import doctor

    try:
        return doctor.run(settings.read_config(os.environ, flags))
    except settings.ConfigError as error:
        print(f"server.py: {error}", file=sys.stderr)
        return 2


def escape_what_cannot_be_shown() -> None:
    """Paths come in any script, a terminal or a file that this is redirected to may be of one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> int:
    """Serve until Ctrl-C or SIGTERM. Exit status 2 for what the person at the keyboard can mend."""
    escape_what_cannot_be_shown()
    if sys.argv[1:2] == ["submit"]:
        from commands import submit

        return submit.main(sys.argv[2:], os.environ)
    flags = parse_flags()
    if flags.command == "doctor":
        return examine(flags)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        config = settings.read_config(os.environ, flags)
        logs.setup(config.log, "service")
        if flags.exit_with_stdin:
            sidecar.call_at_end_of_stdin(ended.set)
        parent = sidecar.take_stdout() if flags.ready_json else None
        service = Service(config)
    except (settings.ConfigError, storage.StorageError, jobs.JobError, OSError, sqlite3.Error) as error:
        print(f"server.py: {error}", file=sys.stderr)
        return 2
    sidecar.let_clicks_be()
    with service:
        if parent:
            with contextlib.suppress(OSError):  # it may be gone already
                print(sidecar.ready_line(service.url, service.config.token), file=parent, flush=True)
        else:
            print(f"serving on {service.url}  (stop with Ctrl-C)", flush=True)
            if service.made_token:
                print(f"access token: {service.config.token}", flush=True)
        if not webpage.can_try_out():
            log.warning("/docs shows a table only: pip install flask-swagger-ui")
        if flags.demo:
            threading.Thread(target=run_demo, args=(service,), name="demo", daemon=True).start()
        # Short waits: on Windows an endless one would not let Ctrl-C through.
        while not ended.wait(0.5):
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
