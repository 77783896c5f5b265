"""live.py: what a watcher is told, and WebSockets over real sockets.

The jobs are rows of a real job table that the tests move by hand: no worker is needed.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from client import Client, JobState, loads, parse
from serving import dial, finished, queued, running, still, until
from websockets.exceptions import ConnectionClosed
from websockets.frames import Opcode
from websockets.sync.client import ClientConnection

import jobs
import server
from web import live
from web.live import StateFrame, Watcher
from work import submissions

HANDSHAKE = (
    "GET /ws/jobs{path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.fixture
def service(tmp_path) -> Iterator[server.Service]:
    with still(tmp_path) as running_service:
        yield running_service


@pytest.fixture
def client(service: server.Service) -> Client:
    return Client(service.url)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames without a gap, so that a test need not wait for them."""
    monkeypatch.setattr(live, "FRAME_GAP_S", 0.0)


def told(line: ClientConnection, limit_s: float = 5.0) -> JobState:
    """The next frame, as strictly as the client reads it."""
    state: JobState = parse(JobState, loads(line.recv(limit_s)))
    return state


def code_of(line: ClientConnection) -> int:
    """The code with which the service closes; frames before it don't matter."""
    try:
        while True:
            line.recv(10)
    except ConnectionClosed as closed:
        assert closed.rcvd is not None, closed
        return closed.rcvd.code


def progress(service: server.Service, job: jobs.Job, processed: int) -> None:
    assert service.table.change(job, state=jobs.RUNNING, processed=processed)


def end(service: server.Service, job: jobs.Job) -> jobs.Job:
    return jobs.advance(service.table, job, "fail", 3000.0, last_error="why", message="why")


# ---------------------------------------------------------------- Watcher
class Offered:
    """A job as Watcher.offer needs it."""

    def __init__(self, job_id: str) -> None:
        self.id = job_id


def offer(watcher: Watcher, job: str, seq: int, status: str = jobs.RUNNING) -> None:
    watcher.offer(Offered(job), StateFrame(job, seq, status, b""))  # type: ignore[arg-type]


def seqs(watcher: Watcher, now_s: float = 0.0) -> list[int]:
    return [frame.seq for frame in watcher.take(now_s)]


def test_of_several_states_that_wait_only_the_newest_is_sent():
    watcher = Watcher("a", -1)
    for seq in (3, 4, 7, 5):  # a late one comes last
        offer(watcher, "a", seq)
    assert seqs(watcher) == [7]
    assert seqs(watcher) == []


def test_a_terminal_state_is_never_replaced_by_a_newer_one():
    watcher = Watcher("a", -1)
    for seq, status in enumerate([jobs.RUNNING, jobs.FAILED, jobs.PENDING, jobs.RUNNING, jobs.SUCCESS], 1):
        offer(watcher, "a", seq, status)
    assert seqs(watcher) == [2, 5]


def test_states_of_many_jobs_are_sent_in_the_order_of_their_changes():
    watcher = Watcher(None, -1)
    for job, seq in (("b", 1), ("a", 2), ("c", 3), ("b", 4)):
        offer(watcher, job, seq)
    assert seqs(watcher) == [2, 3, 4]


def test_a_deleted_job_is_not_told_as_running_for_ever():
    """Though its end was never taken."""
    watcher = Watcher(None, -1)
    offer(watcher, "a", 1)
    offer(watcher, "b", 2)
    assert seqs(watcher) == [1, 2]
    offer(watcher, "a", 3, jobs.FAILED)
    watcher.drop("a")
    assert seqs(watcher, live.SILENCE_S + 1) == [2]


def test_what_the_client_knows_already_is_not_sent_again():
    watcher = Watcher("a", 5)
    offer(watcher, "a", 5)
    assert seqs(watcher) == []
    offer(watcher, "a", 6)
    assert seqs(watcher) == [6]


def test_a_watcher_of_one_job_hears_of_no_other():
    watcher = Watcher("a", -1)
    offer(watcher, "b", 1)
    assert not watcher.pending


@pytest.mark.parametrize(
    "statuses, over",
    [
        ([jobs.PENDING], False),
        ([jobs.RUNNING], False),
        ([jobs.SUCCESS], True),
        ([jobs.FAILED], True),
        ([jobs.FAILED, jobs.PENDING], False),
    ],
)
def test_a_watcher_is_finished_when_its_one_job_is_over(statuses, over):
    for job_id, after in (("a", -1), ("a", 9), (None, -1)):
        watcher = Watcher(job_id, after)
        for seq, status in enumerate(statuses, 1):
            offer(watcher, "a", seq, status)
        assert not watcher.is_finished()
        watcher.take(0.0)
        assert watcher.is_finished() == (over and job_id is not None)


def test_a_silent_running_job_is_repeated_even_beside_a_busy_one():
    watcher = Watcher(None, -1)
    offer(watcher, "silent", 1)
    offer(watcher, "busy", 2)
    assert seqs(watcher, 0.0) == [1, 2]
    offer(watcher, "busy", 3)
    assert seqs(watcher, live.SILENCE_S - 1) == [3]
    assert watcher.quiet_s(live.SILENCE_S - 1) == 1
    assert seqs(watcher, live.SILENCE_S) == [1]
    offer(watcher, "silent", 4, jobs.SUCCESS)
    assert seqs(watcher, live.SILENCE_S + 1) == [4]
    assert seqs(watcher, 100.0) == [3]


def test_nothing_is_repeated_while_no_job_runs():
    watcher = Watcher("a", -1)
    offer(watcher, "a", 1, jobs.PENDING)
    assert seqs(watcher) == [1]
    assert watcher.quiet_s(0.0) is None and seqs(watcher, 1000.0) == []


# ---------------------------------------------------------------- frames
def test_the_first_frame_is_the_present_state_as_rest_gives_it(service, client):
    job = running(service, "作品名")
    with client.socket(f"/ws/jobs/{job.id}") as line:
        text = line.recv(5)
        assert isinstance(text, str) and "作品名" in text
        assert loads(text) == client.call("GET", f"/jobs/{job.id}").json()


def test_a_waiting_job_is_watched_until_it_is_over(service, client, quick):
    job = queued(service)
    with client.socket(f"/ws/jobs/{job.id}") as line:
        assert told(line).status == "PENDING"
        claimed = jobs.claim(service.table, 1.0)
        assert told(line).status == "RUNNING"
        progress(service, claimed, 1)
        assert told(line).processed == 1
        end(service, claimed)
        last = told(line)
        assert (last.status, last.last_error, last.phase) == ("FAILED", "why", "done")
        assert code_of(line) == 1000


def test_changes_are_merged_to_ten_frames_a_second_and_the_last_one_comes(service, client):
    job, states = running(service), []
    with client.socket(f"/ws/jobs/{job.id}") as line:
        states.append(told(line))
        start_s = time.monotonic()
        for n in range(1, 201):
            progress(service, job, n)
        end(service, job)
        with contextlib.suppress(ConnectionClosed):
            while True:
                states.append(told(line))
        took_s = time.monotonic() - start_s
    seen = [state.seq for state in states]
    assert seen == sorted(set(seen))
    assert (states[-1].status, states[-1].processed) == ("FAILED", 200)
    assert len(states) <= 3 + took_s / live.FRAME_GAP_S


def test_a_running_job_is_heard_of_though_nothing_changes(service, client, monkeypatch):
    assert live.SILENCE_S + live.FRAME_GAP_S < 10
    monkeypatch.setattr(live, "SILENCE_S", 0.2)
    job = running(service)
    until(lambda: not service.live._changed.is_set() and not service.live._woken)
    time.sleep(3 * live.FRAME_GAP_S)  # the rounds rest: what is heard now owes nothing to a change
    with client.socket(f"/ws/jobs/{job.id}") as line:
        first, second, third = told(line), told(line), told(line)
        assert first == second == third


def test_a_client_that_returns_gets_the_state_only_if_it_is_newer(service, client, quick):
    job = running(service)
    with client.socket(f"/ws/jobs/{job.id}?after={job.seq}") as line:
        with pytest.raises(TimeoutError):
            line.recv(0.3)
        progress(service, job, 1)
        assert told(line).processed == 1
    with client.socket(f"/ws/jobs/{job.id}?after={job.seq}") as line:
        assert told(line).processed == 1


def test_at_the_terminal_seq_there_is_nothing_more_to_say(service, client):
    job = finished(service)
    assert client.watch(job.id, after=job.seq) == ([], 1000)
    (last,), code = client.watch(job.id, after=job.seq - 1)
    assert (last.status, last.seq, code) == ("SUCCESS", job.seq, 1000)


@pytest.mark.parametrize("after", ["-1", "x", "1.5", ""])
def test_an_after_that_is_no_number_is_refused_before_the_handshake(client, after):
    reply = client.call("GET", f"/ws/jobs?after={after}")
    assert (reply.status, [*reply.faults()]) == (422, ["after"])


def test_an_unknown_job_closes_with_4404(client):
    for name in ("none", "00000000-0000-0000-0000-000000000000", "%F0%9F%98%80"):
        assert client.watch(name) == ([], 4404)


def test_every_job_is_seen_on_the_common_line(service, client, quick):
    first = running(service, "first")
    with client.socket("/ws/jobs") as line:
        assert told(line).metadata.title == "first"
        second = queued(service, "second")
        assert told(line).metadata.title == "second"
        end(service, first)
        assert (told(line).status, service.table.get(second.id).state) == ("FAILED", "PENDING")
        progress(service, jobs.claim(service.table, 1.0), 1)
        until(lambda: told(line).processed == 1)
    with client.socket(f"/ws/jobs?after={first.seq}") as line:
        assert [told(line).status, told(line).status] == ["FAILED", "RUNNING"]


def test_a_client_that_returns_to_all_jobs_misses_none_however_many_changed(service, client, quick):
    first = running(service, "still running")
    for n in range(600):
        queued(service, str(n))
    with client.socket(f"/ws/jobs?after={first.seq}", max_queue=None) as line:
        titles = [told(line).metadata.title for _ in range(600)]
        assert titles == [str(n) for n in range(600)]
        progress(service, first, 1)
        assert told(line).processed == 1


def test_a_waiting_job_that_is_deleted_is_over_for_its_watchers(service, client):
    job, other = queued(service), queued(service)
    with client.socket(f"/ws/jobs/{job.id}") as line, client.socket(f"/ws/jobs/{other.id}") as beside:
        told(line), told(beside)
        assert client.call("DELETE", f"/jobs/{job.id}").status == 204
        state = told(line)
        assert (state.status, state.cancelled) == ("FAILED", True)
        assert code_of(line) == 1000
        with pytest.raises(TimeoutError):
            beside.recv(0.3)


def test_a_job_that_ends_and_is_deleted_at_once_still_ends_for_its_watchers(service, client, monkeypatch):
    """And for those of all jobs it is gone: they would show a job that nobody finds."""
    job, other = running(service), None
    with client.socket(f"/ws/jobs/{job.id}") as line, client.socket("/ws/jobs") as everyone:
        told(line), told(everyone)
        monkeypatch.setattr(live, "FRAME_GAP_S", 0.5)
        progress(service, job, 1)  # a round; the next one is half a second away
        assert told(line).processed == told(everyone).processed == 1
        end(service, job)
        submissions.delete(service.table, service.config.layout, job.id)
        service.live.end(job.id)
        other = queued(service)
        assert told(line).status == "FAILED" and code_of(line) == 1000
        assert told(everyone).job_id == other.id


def test_a_job_that_is_deleted_with_nothing_left_to_say_closes_with_4404(service, client):
    job = queued(service)
    with client.socket(f"/ws/jobs/{job.id}") as line:
        told(line)
        service.live.end(job.id)
        assert code_of(line) == 4404


def test_a_client_that_returns_gets_all_it_missed_though_nothing_changes(service, client, monkeypatch):
    for _ in range(40):
        queued(service)
    tell, full = live.WebSocketLine.tell, [-1]  # the socket takes nothing at first

    def at_first_nothing(line: live.WebSocketLine, now_s: float) -> bool:
        monkeypatch.setattr(live, "BUFFERED_BYTES", full.pop() if full else 0)
        return tell(line, now_s)

    monkeypatch.setattr(live.WebSocketLine, "tell", at_first_nothing)
    until(lambda: not service.live._woken)
    with client.socket("/ws/jobs?after=0") as line:
        assert len({told(line).job_id for _ in range(40)}) == 40


def test_a_resumed_job_goes_on_for_its_watchers_of_all_jobs(service, client, quick):
    job = end(service, running(service))
    with client.socket("/ws/jobs") as line:
        submissions.resume(service.table, service.config.layout, job.id, None, service.config.limits)
        state = told(line)
        if state.status == "FAILED":  # how it ended before, if that was still on its way
            state = told(line)
        assert (state.status, state.retries, state.last_error) == ("PENDING", 1, None)


# ---------------------------------------------------------------- slow and unruly clients
def test_a_reader_that_sleeps_slows_nobody_and_skips_to_the_newest_state(service, client, quick):
    job = running(service)
    with dial(service.http.server_port) as asleep, client.socket(f"/ws/jobs/{job.id}") as line:
        asleep.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asleep.sendall(HANDSHAKE.format(path="").encode())
        until(lambda: service.live.count() == 2)
        start_s = time.monotonic()
        for n in range(1, 1001):
            progress(service, job, n)
        assert time.monotonic() - start_s < 10
        while told(line).processed < 1000:
            pass
        waiting = [len(watcher.pending.get(job.id, ())) for watcher in service.live.watchers]
        assert max(waiting) <= 1


def test_publishing_to_a_reader_that_sleeps_takes_no_time(service, client, quick):
    job = running(service)
    watcher = Watcher(None, -1)
    service.live.add(watcher)  # nobody takes its frames
    for n in range(1, 1001):
        progress(service, job, n)
    until(lambda: watcher.pending[job.id][-1].seq == service.table.get(job.id).seq)
    (frame,) = watcher.take(0.0)
    assert json.loads(frame.text)["processed"] == 1000


def test_messages_are_ignored_within_the_limit_and_closed_with_1008_beyond(service, client, monkeypatch):
    monkeypatch.setattr(live, "MESSAGES", 20)
    job = running(service)
    with client.socket(f"/ws/jobs/{job.id}") as line, client.socket(f"/ws/jobs/{job.id}") as other:
        for n in range(20):
            line.send(["{", b"\xff\x00", '{"type":"nothing"}', ""][n % 4])
        told(line)
        progress(service, job, 1)
        assert told(line).processed == 1
        line.send("one too many")
        assert code_of(line) == 1008
        assert told(other).seq <= told(other).seq


def test_a_flood_during_progress_is_closed_with_1008_all_the_same(service, client, quick):
    job, stop = running(service), threading.Event()

    def change() -> None:
        while not stop.wait(0.001):
            progress(service, job, 1)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with client.socket("/ws/jobs") as line:
            with contextlib.suppress(ConnectionClosed):
                for _ in range(10 * live.MESSAGES):
                    line.send("x")
            assert code_of(line) == 1008
    finally:
        stop.set()
        changer.join()
    until(lambda: service.live.count() == 0)


@pytest.mark.parametrize(
    "frame, code",
    [
        (b"\x81\x02hi", 1002),  # not masked
        (b"\x81\xfe\xff\xff" + bytes(4) + bytes(65535), None),  # within the limit
        (b"\x82\xff" + (65537).to_bytes(8, "big") + bytes(4) + bytes(65537), 1009),
        (b"\x82\xff" + (1 << 62).to_bytes(8, "big") + bytes(4), 1009),
        (b"\x01\xfe\xff\xff" + bytes(4) + bytes(65535) + b"\x80\x82" + bytes(4) + b"ab", 1009),  # in parts
        (b"\x81\x82" + bytes(4) + b"\xff\xfe", None),  # no UTF-8: never looked at
        (b"\x83\x80" + bytes(4), 1002),  # reserved opcode
        (b"\xc1\x80" + bytes(4), 1002),  # compressed, though that was not agreed
        (b"\x88\x82" + bytes(4) + b"\x03\xe8", 1000),  # the client's own close
    ],
)
def test_a_frame_that_breaks_the_protocol_is_closed_with_its_code(service, client, frame, code):
    job = running(service)
    with client.socket(f"/ws/jobs/{job.id}") as other, client.socket(f"/ws/jobs/{job.id}") as line:
        told(line)
        line.socket.sendall(frame)
        if code is None:
            progress(service, job, 1)
            assert told(line).processed == 1
        else:
            assert code_of(line) == code
        told(other)  # the others go on
        assert client.call("GET", "/health").status == 200


def test_compression_is_never_agreed_so_that_no_message_can_explode(service, client):
    with client.socket("/ws/jobs", compression="deflate") as line:
        assert line.protocol.extensions == []


def test_a_client_that_answers_pings_stays_and_one_that_sleeps_is_dropped(service, client, monkeypatch):
    monkeypatch.setattr(live, "PING_S", 0.7)
    running(service)
    with client.socket("/ws/jobs") as awake, dial(service.http.server_port) as asleep:
        asleep.sendall(HANDSHAKE.format(path="").encode())
        until(lambda: service.live.count() == 2)
        asleep.settimeout(5)
        heard, until_s = b"", time.monotonic() + 20
        with contextlib.suppress(ConnectionResetError):
            while piece := asleep.recv(1000):
                heard += piece
                assert time.monotonic() < until_s  # else pings could go on for ever
        assert bytes([0x80 | Opcode.PING, 4]) in heard
        assert service.live.count() == 1
        told(awake)


def test_a_client_that_vanishes_is_forgotten(service, client):
    queued(service)
    with client.socket("/ws/jobs") as line:
        until(lambda: service.live.count() == 1)
        line.socket.shutdown(socket.SHUT_RDWR)
        until(lambda: service.live.count() == 0)


def test_beyond_the_most_watchers_a_new_one_is_told_503(tmp_path):
    with still(tmp_path, watchers=1) as service, Client(service.url).socket("/ws/jobs"):
        until(lambda: service.live.count() == 1)
        with dial(service.http.server_port) as line:
            line.sendall(HANDSHAKE.format(path="").encode())
            assert line.recv(1000).startswith(b"HTTP/1.1 503 ")


# ---------------------------------------------------------------- handshake
@pytest.mark.parametrize(
    "old, new, status",
    [
        ("Version: 13", "Version: 12", 400),
        ("Upgrade: websocket", "Upgrade: h2c", 426),
        ("Connection: Upgrade", "Connection: close", 426),
        ("Key: AAAAAAAAAAAAAAAAAAAAAA==", "Key: abc", 400),
        ("Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n", "", 400),
        ("Upgrade: websocket\r\n", "", 426),
        ("GET", "POST", 405),
        ("\r\n\r\n", "\r\nOrigin: https://evil.example\r\n\r\n", 403),
        ("\r\n\r\n", "\r\nOrigin: null\r\n\r\n", 403),
        ("\r\n\r\n", "\r\nOrigin: tauri://localhost\r\n\r\n", 101),
        ("Host: localhost", "Host: evil.example", 421),
        ("/ws/jobs", "/ws/nothing/here", 404),
    ],
)
def test_a_handshake_that_is_wrong_is_refused_before_101(service, old, new, status):
    with dial(service.http.server_port) as line:
        sent = HANDSHAKE.format(path="").replace(old, new, 1)
        assert sent != HANDSHAKE.format(path="")
        line.sendall(sent.encode())
        assert line.recv(1000).startswith(f"HTTP/1.1 {status} ".encode())
    until(lambda: service.live.count() == 0)


def test_a_frame_sent_together_with_the_handshake_is_not_lost(service):
    with dial(service.http.server_port) as line:
        line.sendall(HANDSHAKE.format(path="").encode() + b"\x89\x84" + bytes(4) + b"ping")
        line.settimeout(5)
        data = b""
        while not data.endswith(b"\x8a\x04ping"):
            data += line.recv(1000) or pytest.fail("it closed")


# ---------------------------------------------------------------- the end
def test_stopping_says_1001_to_every_client_and_soon(service, client):
    job = running(service)
    with client.socket("/ws/jobs") as line, client.socket(f"/ws/jobs/{job.id}") as other:
        start_s = time.monotonic()
        stopper = threading.Thread(target=service.live.stop)
        stopper.start()
        assert [code_of(line), code_of(other)] == [1001, 1001]
        stopper.join()
    # Both answered, so nothing was waited for.
    assert time.monotonic() - start_s < live.CLOSE_S / 2


def test_the_last_state_is_told_before_the_end(service, client, monkeypatch):
    monkeypatch.setattr(live, "FRAME_GAP_S", 1.0)
    job = running(service)
    with client.socket(f"/ws/jobs/{job.id}") as line:
        told(line)
        progress(service, job, 1)
        progress(service, job, 2)
        service.live.stop()
        heard = []
        with pytest.raises(ConnectionClosed):
            while True:
                heard.append(told(line).processed)
    assert heard[-1] == 2


def test_stopping_does_not_wait_long_for_a_client_that_sleeps(service, monkeypatch):
    monkeypatch.setattr(live, "CLOSE_S", 0.5)
    with dial(service.http.server_port) as line:
        line.sendall(HANDSHAKE.format(path="").encode())
        until(lambda: service.live.count() == 1)
        start_s = time.monotonic()
        service.live.stop()
        assert time.monotonic() - start_s < 3


def test_two_services_in_one_process_share_nothing(tmp_path):
    with still(tmp_path / "a") as one, still(tmp_path / "b") as two:
        job = running(one, "only in a")
        with Client(one.url).socket("/ws/jobs") as line, Client(two.url).socket("/ws/jobs") as other:
            assert told(line).job_id == job.id
            progress(one, job, 1)
            assert told(line).processed == 1
            with pytest.raises(TimeoutError):
                other.recv(0.3)
        assert Client(two.url).watch(job.id) == ([], 4404)
        assert two.table.counts()["RUNNING"] == 0
