"""Uploads that lie still become jobs by themselves, where a setting asks for it.

Map: Memory (what was dealt with) - Watch (look, take)
Rule: nothing is submitted twice, whoever submitted it first, and nothing before it was seen
unchanged for still_s seconds and could be listed.
Runs in: the watch thread, which Service starts and ends.

    find_uploads --same stamp for still_s--> listed? --> new content? --> submissions.submit
                                                '--> refused, once         '--> watched.json
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import jobs
import storage
from files import inputs
from jobs import JobTable
from messages import Limits, Params
from storage import Layout
from work import submissions, uploads
from work.uploads import Upload

log = logging.getLogger("watch")

LONGEST_WAIT_S = 3600.0  # between two tries of what the disk, not the upload, stands in the way of
UNREAD_TRIES = 3  # of an upload whose reader ended without a reason
KEPT = 50_000  # uploads that are remembered after they left incoming/


@dataclass(slots=True)
class Waiting:
    """An upload that is not dealt with yet."""

    stamp: str
    since_s: float  # monotonic, when this stamp was first seen
    not_before_s: float = 0.0  # monotonic
    tries: int = 0
    told: str = ""  # why it waits, as the log said last


class Memory:
    """What was dealt with, by path: (stamp, content), kept in one file; of what was refused the stamp with
    the means of reading behind it, and no content. Lost, it costs a look at each upload: what is in the
    job table is still not submitted again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, tuple[str, str]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            kept = json.loads(path.read_bytes())["uploads"]
            self.known = {name: (str(stamp), str(content)) for name, (stamp, content) in kept.items()}

    def keep(self, path: str, stamp: str, content: str, present: Collection[str]) -> None:
        """Remember, on disk before it returns. Raises OSError."""
        self.known.pop(path, None)
        self.known[path] = (stamp, content)
        for old in [name for name in self.known if name not in present][: max(0, len(self.known) - KEPT)]:
            del self.known[old]
        storage.write_whole(self.path, json.dumps({"version": 1, "uploads": self.known}).encode())


class Watch:
    """Looks at incoming/ again and again. Owned by Service: start() once, stop() once."""

    def __init__(
        self,
        table: JobTable,
        layout: Layout,
        limits: Limits,
        still_s: float,
        params: Params,
        reserve_bytes: int | None,
        wake: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
        make_room: Callable[[], object] = lambda: None,
    ) -> None:
        from files import formats  # here: without a watch, the service starts without it

        self.table = table
        self.layout = layout
        self.limits = limits
        self.still_s = still_s
        self.params = params  # of every job it submits
        self.reserve_bytes = reserve_bytes  # see submissions.submit
        self.wake = wake
        self.monotonic = monotonic
        self.make_room = make_room  # for a submission that had none
        self.memory = Memory(layout.root / "watched.json")
        self.means = f"{formats.means()} {limits}"
        self.waiting: dict[str, Waiting] = {}  # by path
        self._stumbled = ""  # over what the last look did
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; nothing is submitted once this returned."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        every_s = min(max(self.still_s / 4, 0.1), 5.0)
        while not self._ended.wait(every_s):
            try:
                self.look()
                self._stumbled = ""
            except uploads.Interrupted:
                return
            # Around an attempt: what a look stumbles over must not end the looking.
            except Exception as error:
                if str(error) != self._stumbled:
                    log.exception("a look at incoming/ failed; others follow")
                self._stumbled = str(error)

    def look(self) -> None:
        """One look: new uploads begin to wait, still ones are taken."""
        found = {upload.path: upload for upload in uploads.find_uploads(self.layout.incoming, self.limits)}
        for path in self.waiting.keys() - found.keys():
            del self.waiting[path]
        for path, upload in found.items():
            if self._ended.is_set():
                return
            if self.memory.known.get(path, ("", ""))[0] in (upload.stamp, self._refused(upload)):
                self.waiting.pop(path, None)
                continue
            now_s = self.monotonic()
            waiting = self.waiting.get(path)
            if waiting is None or waiting.stamp != upload.stamp:
                self.waiting[path] = Waiting(upload.stamp, now_s)
            elif now_s - waiting.since_s >= self.still_s and now_s >= waiting.not_before_s:
                self._try(upload, waiting, found.keys())

    def _try(self, upload: Upload, waiting: Waiting, present: Collection[str]) -> None:
        if upload.unfinished:
            told = f"{upload.path!a} waits: {upload.unfinished!a} is still being received"
            self._tell(waiting, upload.unfinished, told)
            return
        try:
            content = self._content(upload)
            if content is None:
                return  # it changed meanwhile: the next look finds another stamp
            if self._take(upload, content):
                self.memory.keep(upload.path, upload.stamp, content, present)
            else:
                self.memory.keep(upload.path, self._refused(upload), "", present)
            self.waiting.pop(upload.path, None)
        except uploads.Interrupted:
            raise
        # Around an attempt: what one upload makes us stumble over must not keep the next ones waiting.
        except Exception as error:
            if isinstance(error, storage.NoRoom):
                self.make_room()
            waiting.tries += 1
            waiting.not_before_s = self.monotonic() + min(LONGEST_WAIT_S, 30.0 * 2 ** min(waiting.tries, 7))
            if not isinstance(error, (storage.StorageError, OSError, sqlite3.Error)):
                log.error("looking at %a stumbled", upload.path, exc_info=error)
            reason = storage.reason_of(error)
            # Free bytes, which NoRoom names, differ at each look.
            why = error.code if isinstance(error, storage.NoRoom) else reason
            told = f"{upload.path!a} can't be submitted now: {reason}; it is tried again later"
            self._tell(waiting, why, told)

    def _tell(self, waiting: Waiting, why: str, text: str) -> None:
        if waiting.told != why:
            waiting.told = why
            log.warning("%s", text)

    def _content(self, upload: Upload) -> str | None:
        """The content's hash, if that still is as it was found. Raises OSError, Interrupted."""
        incoming, goes_on = self.layout.incoming, lambda: not self._ended.is_set()
        content = uploads.content_of(incoming, upload, self.limits, goes_on)
        again = uploads.find_upload(incoming, upload.path, self.limits)
        is_same = again is not None and (again.stamp, again.unfinished) == (upload.stamp, None)
        return content if is_same else None

    def _refused(self, upload: Upload) -> str:
        """Its stamp where it was refused under these limits, and with these libraries and programs."""
        return f"{upload.stamp} {self.means}"

    def _take(self, upload: Upload, content: str) -> bool:
        """Submit an upload, unless this content was; False where it is refused. Raises storage.NoRoom,
        InputUnread, OSError, sqlite3.Error."""
        if self.memory.known.get(upload.path, ("", ""))[1] == content:
            return True  # sent once more, or touched
        if upload.path.endswith(storage.sent_ending(content)):
            return True  # of `server.py submit`, which submits it once it has told what it will take
        try:
            place = inputs.resolve_incoming(self.layout, "incoming/" + upload.path)
            with inputs.opened(place, self.limits) as archive:
                inputs.list_input(place, self.limits, archive)
            job = self._submit(upload, content)
        except storage.NoRoom:
            raise
        # Of the upload itself: it stays so until it changes, or what reads it here.
        except (storage.StorageError, jobs.JobError) as error:
            # What was killed may do better later; what dies of it each time does not.
            if isinstance(error, storage.InputUnread) and self.waiting[upload.path].tries < UNREAD_TRIES:
                raise
            log.warning("%s is not submitted: %s", ascii(upload.path), error.detail)
            return False
        if job:
            log.info("%s lay still: job %s", ascii(upload.path), job.id)
            self.wake()
        return True

    def _submit(self, upload: Upload, content: str) -> jobs.Job | None:
        title, volume = uploads.title_and_volume(upload.path, upload.kind)
        path = "incoming/" + upload.path
        wanted = submissions.Submission(title, volume, upload.kind, path, self.params, None)
        key = uploads.submission_key(upload.path, content)
        parts = upload.path.split("/")
        # A folder's job takes the pages from below it, but no archives.
        first = len(parts) if upload.kind == "zip" else 1
        holders = ["/".join(parts[:n]) for n in range(first, len(parts) + 1)]
        inside = upload.path if upload.kind == "zip" else None  # its volumes, see volumes.py

        def is_taken() -> bool:
            """Whether its sender, or the hook in Copyparty, was quicker."""
            newest_s = self.table.newest_submission(holders, inside)
            return bool(self.table.by_key(key)) or (newest_s is not None and newest_s >= upload.changed_s)

        room = self.limits, self.reserve_bytes
        ready = None if is_taken() else submissions.checked(self.layout, wanted, *room)
        with self.table.transaction():
            if ready and not is_taken():
                return submissions.insert(self.table, ready, key, "watch")
        log.info("%s is not submitted: a job of its sender has it", ascii(upload.path))
        return None
