"""For Copyparty: submits an upload to the service once it is whole (README: Copyparty).

Map: settings - which uploads - submitting - main
Rule: the service decides; a hook that runs twice, or beside REICHAN_WATCH_S, makes one job.
Runs in: Copyparty's process tree, once an upload (xau) or once a pause (xiu). Standard library only.

    xau=f,j,/path/copyparty_hook.py    an archive: at once, its facts as JSON in the argument
    xiu=i30,j,/path/copyparty_hook.py  all: after 30 s without uploads, a JSON list on standard input
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from messages import Limits, misspelt
from work import uploads
from work.uploads import Upload

TRIES = 5  # while the service is starting, or its disk is full; 1, 2, 4, 8 s apart
ANSWER_S = 30.0


# ---------------------------------------------------------------- which uploads
def received(arguments: list[str], standard_input: str) -> list[tuple[Path, str]]:
    """(file, virtual path) of what Copyparty tells of: one JSON object, or a list of them."""
    told: Any = json.loads(arguments[0] if arguments else standard_input)
    items = told if isinstance(told, list) else [told]
    return [(Path(item["ap"]), str(item["vp"]).strip("/")) for item in items]


def volumes(files: list[tuple[Path, str]], mount: str, at_once: bool) -> Iterator[tuple[Path, Upload]]:
    """(incoming/, upload) of the volumes that these files belong to, each once.

    mount: the virtual folder that is incoming/. at_once: a file has just arrived, more may follow: only
    an archive is a volume by then. Raises OSError.
    """
    seen = set()
    for file, virtual in files:
        head, _, path = virtual.partition(mount + "/") if mount else ("", "", virtual)
        if head or not path:
            continue  # of another share
        incoming = file.parents[path.count("/")]
        upload = _volume_of(incoming, path, at_once)
        if upload and not upload.unfinished and upload.path not in seen:
            seen.add(upload.path)
            yield incoming, upload


def _volume_of(incoming: Path, path: str, at_once: bool) -> Upload | None:
    if uploads.is_archive_name(path.rpartition("/")[2]):
        return uploads.find_upload(incoming, path, Limits())
    parts = path.split("/")[:-1] if not at_once else []
    # The topmost folder that holds a page, as the watch would take it.
    found = (uploads.find_upload(incoming, "/".join(parts[:n]), Limits()) for n in range(1, len(parts) + 1))
    return next((upload for upload in found if upload), None)


# ---------------------------------------------------------------- submitting
def submit(url: str, token: str, incoming: Path, upload: Upload, params: dict[str, Any]) -> str:
    """The job's id. Raises urllib.error.HTTPError for a refusal, OSError."""
    title, volume = uploads.title_and_volume(upload.path, upload.kind)
    source = {"type": upload.kind, "path": f"incoming/{upload.path}"}
    body = {"title": title, "volume": volume, "input": source, "params": params}
    content = uploads.content_of(incoming, upload, Limits())
    headers = {
        "Content-Type": "application/json",
        "Idempotency-Key": uploads.submission_key(upload.path, content),
    } | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(f"{url}/jobs", json.dumps(body).encode(), headers, method="POST")
    # The service is this machine's or the LAN's: no proxy in between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for wait_s in (*(2.0**n for n in range(TRIES - 1)), None):
        try:
            with opener.open(request, timeout=ANSWER_S) as answer:
                return str(json.load(answer)["jobId"])
        except urllib.error.HTTPError as error:
            if error.code not in (503, 507) or wait_s is None:
                raise
        except OSError:
            if wait_s is None:
                raise
        time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return f"{error.code} {json.load(error)['detail']}"
    return str(error)


# ---------------------------------------------------------------- main
def main(arguments: list[str], environ: dict[str, str]) -> int:
    """Exit status 1 if an upload could not be submitted; the reason goes to Copyparty's log."""
    url = environ.get("REICHAN_URL", "http://127.0.0.1:8001").rstrip("/")
    mount = environ.get("REICHAN_MOUNT", "incoming").strip("/")
    params = json.loads(environ.get("REICHAN_WATCH_PARAMS") or "{}")
    if why := misspelt(params):
        print(f"REICHAN_WATCH_PARAMS: {why}", file=sys.stderr)
        return 1
    at_once = bool(arguments)  # xau; xiu tells on standard input, and paths below its own share
    told = received(arguments, "" if at_once else sys.stdin.read())
    status = 0
    for incoming, upload in volumes(told, mount if at_once else "", at_once):
        try:
            job = submit(url, environ.get("REICHAN_TOKEN", ""), incoming, upload, params)
            print(f"{upload.path!a}: job {job}", file=sys.stderr)
        except urllib.error.HTTPError as error:
            if error.code == 409:  # the same content was submitted, under another title perhaps
                continue
            print(f"{upload.path!a} was refused: {_reason(error)}", file=sys.stderr)
            status = 1
        except OSError as error:
            print(f"{upload.path!a} could not be submitted to {url}: {_reason(error)}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
