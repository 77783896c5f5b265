"""WebSockets: who watches which job, and what they are told.

Map: StateFrame, Watcher (what is to be sent) - Live (the loop) - WebSocketLine (one socket)
Rule: a slow reader never slows a job: newer states replace older ones that wait.
Runs in: ws-loop. publish(), end(), offer() and adopt() may be called by any thread.

    JobTable --publish--> [news] --ten rounds a second--> Watcher [newest frame per job] --> socket

Changes are merged before they are encoded, and encoded once for all: what many watchers
cost is a look and a send each, at most ten times a second, and nothing in the thread that works.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import itertools
import json
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass

from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import SEND_EOF, State
from websockets.server import ServerProtocol

import jobs
from jobs import Job
from storage import Layout
from work import submissions

log = logging.getLogger("live")

FRAME_GAP_S = 0.1  # between rounds: at most ten frames a second to one watcher
ROUND_LINES = 50  # told before other things on the loop have their turn
SILENCE_S = 8.0  # a running job is heard of at least every 10 s
LOOK_S = 1.0  # between looks for running jobs that were silent
PING_S = 20.0  # between pings, and for the answer to one
CLOSE_S = 5.0  # for the other side's close frame
MESSAGE_BYTES = 64 << 10  # of a client's message
MESSAGES = 100  # that a client may send in MESSAGES_S; they are ignored anyway
MESSAGES_S = 10.0
# Left in a socket's buffer before the next frame: where everything is written later (Windows' proactor),
# one frame at a time would be one a round.
BUFFERED_BYTES = 16 << 10 if os.name == "nt" else 0
READ_BYTES = 8 << 10  # parsed in one go: some thousand of the smallest frames, a few ms


@dataclass(frozen=True)
class StateFrame:
    """One JobState, ready to send."""

    job_id: str
    seq: int
    status: str
    text: bytes

    @functools.cached_property
    def wire(self) -> bytes:
        """The text as a WebSocket frame: made once, since a server's frames are the same for all."""
        return Frame(Opcode.TEXT, self.text).serialize(mask=False)

    @property
    def is_terminal(self) -> bool:
        """Whether the job is over in it."""
        return self.status in (jobs.SUCCESS, jobs.FAILED)


class Watcher:
    """One WebSocket's share of the changes. Newer states replace older ones that were not
    sent yet, so a slow reader skips; a terminal one is never replaced.

    offer() and drop() may be called by any thread, the rest belongs to the loop.
    """

    def __init__(self, job_id: str | None, after: int) -> None:
        self.job_id = job_id  # None: all jobs
        self.after = after  # the client knows everything up to this seq
        self.unknown = False  # the job does not exist: close 4404
        self.pending: dict[str, list[StateFrame]] = {}
        self.running: dict[str, StateFrame] = {}  # last frame of jobs that run, for SILENCE_S
        self.heard_s: dict[str, float] = {}  # when the client last heard of each of them
        self.gone: set[str] = set()  # jobs that were deleted since the last take
        self.is_over = False  # the last frame taken was a terminal one
        self.sent: dict[str, int] = {}  # job -> seq of the last frame
        self.lock = threading.Lock()

    def offer(self, job: Job, frame: StateFrame) -> None:
        """A job changed."""
        if self.job_id not in (None, job.id):
            return
        with self.lock:
            waiting = self.pending.setdefault(frame.job_id, [])
            if waiting and waiting[-1].seq >= frame.seq:
                return
            if waiting and not waiting[-1].is_terminal:
                waiting.pop()
            waiting.append(frame)

    def drop(self, job_id: str) -> None:
        """A job was deleted."""
        with self.lock:
            self.pending.pop(job_id, None)
            self.gone.add(job_id)

    def take(self, now_s: float) -> list[StateFrame]:
        """What is to be sent now: news in order of seq, then running jobs silent for SILENCE_S."""
        with self.lock:
            waiting, self.pending = self.pending, {}
            gone, self.gone = self.gone, set()
        for job_id in gone:  # how it ended may never have been taken
            self.running.pop(job_id, None)
            self.heard_s.pop(job_id, None)
        frames = [frame for states in waiting.values() for frame in states]
        if len(frames) > 1:
            frames.sort(key=lambda frame: frame.seq)
        chosen = [frame for frame in frames if self._is_news(frame, now_s)]
        for job_id, heard_s in self.heard_s.items():
            if now_s - heard_s >= SILENCE_S:
                chosen.append(self.running[job_id])
                self.heard_s[job_id] = now_s
        if self.job_id is None and len(self.sent) > 10_000:
            self.sent.clear()  # of jobs long over; their frames don't come back
        return chosen

    def _is_news(self, frame: StateFrame, now_s: float) -> bool:
        """Remember a frame; whether the client has yet to hear of it."""
        job_id = frame.job_id
        is_news = frame.seq > self.after and frame.seq > self.sent.get(job_id, -1)
        if is_news:
            self.sent[job_id] = frame.seq
        if frame.status == jobs.RUNNING:
            self.running[job_id] = frame
            self.heard_s[job_id] = now_s if is_news else self.heard_s.get(job_id, now_s)
        else:
            self.running.pop(job_id, None)
            self.heard_s.pop(job_id, None)
        self.is_over = frame.is_terminal
        return is_news

    def quiet_s(self, now_s: float) -> float | None:
        """How long nothing need be sent unless something changes; None while no job runs."""
        return max(0.0, min(self.heard_s.values()) + SILENCE_S - now_s) if self.heard_s else None

    def is_finished(self) -> bool:
        """Whether this watcher's one job is over and its client knows."""
        return self.job_id is not None and self.is_over and not self.pending


class Live:
    """The asyncio loop that owns every WebSocket. websockets' Sans-I/O protocol does the
    talking; asyncio's streams move the bytes."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.loop = asyncio.new_event_loop()
        self.watchers: set[Watcher] = set()
        self.lock = threading.Lock()  # of watchers and _news
        self.stopping = False
        self._news: dict[str, list[Job]] = {}  # states that no watcher was offered yet, as in Watcher
        self._woken = False  # a round is due already
        self._changed = asyncio.Event()
        self._lines: set[WebSocketLine] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self.loop.run_forever, name="ws-loop", daemon=True)

    def start(self) -> None:
        """Run the loop in its thread."""
        self._rounds = asyncio.run_coroutine_threadsafe(self._tell_for_ever(), self.loop)
        self._thread.start()

    def stop(self) -> None:
        """Close every WebSocket with 1001, then the loop. Once is enough."""
        if self.stopping:
            return
        self.stopping = True
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._close_all(), self.loop).result(CLOSE_S + 1)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(2)
        if not self._thread.is_alive():
            self.loop.close()

    def count(self) -> int:
        """Open WebSockets."""
        return len(self.watchers)

    # -- any thread
    def add(self, watcher: Watcher) -> None:
        """From now on it gets every change."""
        with self.lock:
            self.watchers.add(watcher)

    def forget(self, watcher: Watcher) -> None:
        """It gets nothing any more."""
        with self.lock:
            self.watchers.discard(watcher)

    def publish(self, job: Job) -> None:
        """A job changed: listener of the job table. Never blocks."""
        with self.lock:
            waiting = self._news.setdefault(job.id, [])
            if waiting and not waiting[-1].is_over:
                waiting.pop()
            waiting.append(job)
        self._wake()

    def end(self, job_id: str) -> None:
        """A job was deleted: its watchers still hear how it ended, and wait for nothing more. Those of
        all jobs hear nothing: they would take it for one that is there."""
        with self.lock:
            unheard = [(job, self.frame(job)) for job in self._news.pop(job_id, [])]
            for watcher in self.watchers:
                if watcher.job_id == job_id:
                    for job, frame in unheard:
                        watcher.offer(job, frame)
                    watcher.unknown = True
                elif watcher.job_id is None:
                    watcher.drop(job_id)
        self._wake()

    def frame(self, job: Job) -> StateFrame:
        """The job's state as a frame."""
        text = json.dumps(submissions.to_state(job, self.layout), ensure_ascii=False, separators=(",", ":"))
        return StateFrame(job.id, job.seq, job.state, text.encode("utf-8"))

    def adopt(self, sock: socket.socket, buffered: bytes, protocol: ServerProtocol, watcher: Watcher) -> None:
        """Take a connection whose handshake is done; `buffered` was read off it already."""

        def let_go(task: asyncio.Task[None] | None = None) -> None:
            # Not in the task: one that is cancelled before its first step runs none of its code.
            if task:
                self._tasks.discard(task)
            self.forget(watcher)
            sock.close()

        def begin() -> None:
            if self.stopping:
                let_go()
                return
            task = self.loop.create_task(self._serve(sock, buffered, protocol, watcher))
            self._tasks.add(task)
            task.add_done_callback(let_go)

        try:
            self.loop.call_soon_threadsafe(begin)
        except RuntimeError:  # the loop is closed: the service ends
            let_go()

    def _wake(self) -> None:
        """See to it that a round follows. The flag falls before a round takes the news: what
        comes too late for it makes the next one."""
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the service ends
                self.loop.call_soon_threadsafe(self._changed.set)

    # -- the loop
    async def _tell_for_ever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if self._lines else None):
                    await self._changed.wait()
            self._changed.clear()
            self._woken = False
            # Around a round: a state that can't be told must not silence all the others.
            try:
                await self._tell_all()
            except Exception:
                log.exception("watchers could not be told")
            await asyncio.sleep(FRAME_GAP_S)

    async def _tell_all(self) -> None:
        self._distribute()
        for n, line in enumerate([*self._lines], 1):
            if line.tell(time.monotonic()):
                self._changed.set()  # more for it at the next round
            if n % ROUND_LINES == 0:
                await asyncio.sleep(0)

    def _distribute(self) -> None:
        """Offer the news to those whom they concern."""
        with self.lock:
            news, self._news = self._news, {}
            watchers = list(self.watchers)
        for job in sorted(itertools.chain.from_iterable(news.values()), key=lambda job: job.seq):
            concerned = [watcher for watcher in watchers if watcher.job_id in (None, job.id)]
            if concerned:
                frame = self.frame(job)
                for watcher in concerned:
                    watcher.offer(job, frame)

    async def _close_all(self) -> None:
        self._rounds.cancel()
        self._distribute()  # what the end did to the jobs
        for line in self._lines:
            line.tell(time.monotonic())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(
        self, sock: socket.socket, buffered: bytes, protocol: ServerProtocol, watcher: Watcher
    ) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
        except OSError:
            return  # the peer is gone
        # Little is buffered for a slow reader: what waits here can't be replaced any more.
        writer.transport.set_write_buffer_limits(high=64 << 10)
        line = WebSocketLine(reader, writer, protocol, watcher)
        try:
            await line.greet()
            self._distribute()  # older than the present state that it was offered, some of it
            line.tell(time.monotonic())
            self._lines.add(line)
            # A round, for what the line did not take at once, and so that the looks for silence begin.
            self._changed.set()
            await line.run(buffered)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await line.close(CloseCode.GOING_AWAY, "the service is stopping")
        except OSError:
            pass  # the peer is gone
        finally:
            self._lines.discard(line)
            self.forget(watcher)  # before the peer can see that it was let go
            writer.transport.abort()


class WebSocketLine:
    """One connection: a task that reads, one that pings; the loop's rounds tell it the news."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        protocol: ServerProtocol,
        watcher: Watcher,
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.protocol = protocol
        self.watcher = watcher
        self.backlog: collections.deque[StateFrame] = collections.deque()  # taken, not written yet
        self.ponged = asyncio.Event()
        self.closing = asyncio.Event()  # a close frame went out
        self.received: collections.deque[float] = collections.deque(maxlen=MESSAGES)

    async def greet(self) -> None:
        """Send the handshake's answer."""
        await self._flush()

    async def run(self, buffered: bytes) -> None:
        """Until the job is over, the peer leaves, or it stops answering."""
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(job) for job in (self._read(buffered), self._ping(), self._leave())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for end in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(end, Exception) and not isinstance(end, OSError):
                    log.error("a WebSocket broke off", exc_info=end)

    def tell(self, now_s: float) -> bool:
        """Write what is due, while the peer reads it. Whether there is more."""
        if self.protocol.state is not State.OPEN or self.writer.is_closing():
            return False
        if not self.backlog and (self.watcher.pending or self.watcher.quiet_s(now_s) == 0):
            self.backlog.extend(self.watcher.take(now_s))
        # What the socket doesn't take at once waits here, where the next states can overtake it.
        while self.backlog and self.writer.transport.get_write_buffer_size() <= BUFFERED_BYTES:
            self.writer.write(self.backlog.popleft().wire)
        if not self.backlog and self.watcher.is_finished():
            self._say_goodbye(CloseCode.NORMAL_CLOSURE, "")
        elif self.watcher.unknown and not (self.backlog or self.watcher.pending):
            self._say_goodbye(4404, "there is no such job")
        return bool(self.backlog or self.watcher.pending)

    def _say_goodbye(self, code: int, reason: str) -> None:
        """Send a close frame; the reading task ends the line when the peer has answered."""
        self.protocol.send_close(code, reason)
        self._write_out()

    async def _leave(self) -> None:
        """The peer has some seconds to answer our close frame."""
        await self.closing.wait()
        await asyncio.sleep(CLOSE_S)

    async def _read(self, buffered: bytes) -> None:
        data = buffered
        while True:
            if data:
                self.protocol.receive_data(data)
            for event in self.protocol.events_received():
                if isinstance(event, Frame):
                    self._hear(event)
            await self._flush()
            if self.protocol.close_expected():
                await self._read_out()
                return
            data = await self._more()
            if not data:
                self.protocol.receive_eof()
                await self._flush()
                return

    async def _read_out(self) -> None:
        """Wait a little for the peer to end the line as well; what it still sends is not for us."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                while data := await self._more():
                    self.protocol.receive_data(data)
                    await self._flush()

    async def _more(self) -> bytes:
        # read() gives way only where nothing waits: a flood would stop every other line.
        await asyncio.sleep(0)
        return await self.reader.read(READ_BYTES)

    def _hear(self, frame: Frame) -> None:
        """Messages mean nothing here; too many of them are a nuisance."""
        if frame.opcode is Opcode.PONG:
            self.ponged.set()
            return
        now_s = time.monotonic()
        if frame.opcode is Opcode.CLOSE or self.protocol.state is not State.OPEN:
            return
        if len(self.received) == MESSAGES and now_s - self.received[0] < MESSAGES_S:
            self.protocol.fail(CloseCode.POLICY_VIOLATION, "too many messages")
        else:
            self.received.append(now_s)

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            self.ponged.clear()
            if self.protocol.state is not State.OPEN:
                return
            self.protocol.send_ping(os.urandom(4))
            try:
                async with asyncio.timeout(PING_S):
                    await self._flush()
                    await self.ponged.wait()
            except TimeoutError:
                return  # asleep or gone: run() ends the connection

    async def close(self, code: int, reason: str) -> None:
        """Close when the tasks are gone already: send the frame, wait a little for the end."""
        if self.protocol.state is State.OPEN:
            self.protocol.send_close(code, reason)
        async with asyncio.timeout(CLOSE_S):
            await self._flush()
            # Its own close frame must be read as one: only then is the line ended from here.
            await self._read_out()

    async def _flush(self) -> None:
        self._write_out()
        await self.writer.drain()

    def _write_out(self) -> None:
        """Hand on what the protocol has to say."""
        writes = self.protocol.data_to_send()
        # In one write: asyncio warns in the log of each that a lost connection doesn't take.
        if data := b"".join(writes):
            self.writer.write(data)
        if SEND_EOF in writes and self.writer.can_write_eof():
            self.writer.write_eof()
        if self.protocol.state is not State.OPEN:
            self.closing.set()
