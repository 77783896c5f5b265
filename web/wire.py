"""HTTP/1.1 as bytes: strict heads, bounded bodies, deadlines, ranges. Knows nothing of jobs.

Map: limits - Refused - Headers, Request, Answer - parsing a head - Body - conditions and
     ranges - Turns (answers before files) - Peer, HttpServer (threads, cap, reaper) - Handler
     (one connection)
Rule: what is not exactly HTTP/1.1 is refused, and a refused connection is closed: two
readers must never disagree on where a request ends.
Runs in: http-accept, http-N (one a connection), http-reaper.

http.server's own parser reads many malformed requests as something else (bare CR, int()
lengths, chunked bodies as the next request); only its sockets and threads are used here.
"""

from __future__ import annotations

import collections
import contextlib
import email.utils
import http
import io
import itertools
import json
import logging
import os
import re
import select
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

log = logging.getLogger("http")

LINE_BYTES = 8 << 10
HEAD_BYTES = 64 << 10
FIELDS = 100
CHUNK_BYTES = 256 << 10
SENDERS = 4  # threads that copy a file to a socket at once
GIVE_WAY_S = 0.02  # for so long a request goes before them; most are answered in a few milliseconds
HEAD_S = 10.0  # for the whole head, however slowly it trickles
IDLE_S = 60.0  # between requests of a kept connection
STALL_S = 30.0  # grace of a body or an answer, in addition to its bytes at SLOWEST
SLOWEST_BYTES_S = 8 << 10  # below this rate a peer is holding a thread, not using it
LINGER_S = 1.0  # reading on after a refusal, so that its answer isn't lost to a reset

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])".encode())
FIELD = re.compile(rf"({TOKEN}):([\t -~\x80-\xff]*)".encode("latin-1"))
HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t -~]*)?\r\n")


class Refused(Exception):
    """A request that is answered with an error; `code` is stable, `detail` for people."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        headers: dict[str, str] | None = None,
        errors: list[tuple[str, str]] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.headers, self.errors, self.close = headers or {}, errors, close
        self.line = b""  # what was read of a line that is too long, or does not end as one

    def answer(self) -> Answer:
        """As application/problem+json (RFC 9457)."""
        problem: dict[str, Any] = {
            "type": "about:blank",
            "title": http.HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        if self.errors:
            problem["errors"] = [{"field": name, "message": message} for name, message in self.errors]
        answer = json_answer(problem, self.status)
        answer.headers |= {"Content-Type": "application/problem+json"} | self.headers
        return answer


def malformed(detail: str) -> Refused:
    """A request that is no HTTP/1.1: after it, nothing on the connection can be trusted."""
    return Refused(400, "MALFORMED", detail, close=True)


class Headers(list[tuple[str, str]]):
    """Field lines in order, names in lower case, values as latin-1 text."""

    def all(self, name: str) -> list[str]:
        """Every line of this name."""
        return [value for key, value in self if key == name]

    def one(self, name: str) -> str | None:
        """The only line of this name, None without one. Raises Refused for several."""
        values = self.all(name)
        if len(values) > 1:
            raise malformed(f"there are {len(values)} {name} fields")
        return values[0] if values else None


@dataclass(slots=True)
class Request:
    """One request; the body is still on the wire."""

    method: str
    segments: list[str]  # of the path, percent-decoded
    query: dict[str, str]
    headers: Headers
    host: str
    body: Body
    keep_alive: bool

    @property
    def path(self) -> str:
        """The path for people and logs."""
        return "/" + "/".join(self.segments)


@dataclass(slots=True)
class Answer:
    """One answer. body: bytes, or an open file of which length_bytes from offset are sent."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | BinaryIO = b""
    offset: int = 0
    length_bytes: int | None = None  # None: all of a bytes body

    def size_bytes(self) -> int:
        """Bytes of the body as sent."""
        if isinstance(self.body, bytes):
            return len(self.body)
        return self.length_bytes or 0


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def json_answer(value: Any, status: int = 200) -> Answer:
    """A JSON body; non-ASCII stays readable."""
    return Answer(status, {"Content-Type": "application/json"}, _to_json(value).encode("utf-8") + b"\n")


def json_list_answer(name: str, items: Iterable[Any]) -> Answer:
    """As json_answer({name: [*items]}) for very many items: encoded in one go, 10,000 pages would
    hold up every other thread, and stand in memory three times."""
    data = b",".join(_to_json(item).encode("utf-8") for item in items)
    return Answer(200, {"Content-Type": "application/json"}, b'{"%b":[%b]}\n' % (name.encode(), data))


def head_bytes(answer: Answer, close: bool) -> bytes:
    """Everything of an answer up to its body. close: it is the connection's last one."""
    headers = {"Date": email.utils.formatdate(usegmt=True)} | answer.headers
    if answer.status not in (204, 304):
        headers["Content-Length"] = str(answer.size_bytes())
    if close:
        headers["Connection"] = "close"
    lines = [f"HTTP/1.1 {answer.status} {http.HTTPStatus(answer.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


# ---------------------------------------------------------------- parsing a head
def read_request_line(source: io.BufferedReader) -> bytes:
    """Without its CRLF. Raises Refused, EOFError."""
    # One empty line before a request is tolerated (RFC 9112, 2.2).
    return _read_line(source, 414) or _read_line(source, 414)


def read_fields(source: io.BufferedReader) -> list[bytes]:
    """The field lines up to the empty one, without their CRLF. Raises Refused, EOFError."""
    fields: list[bytes] = []
    left = HEAD_BYTES
    while True:
        text = _read_line(source, 431)
        if not text:
            return fields
        left -= len(text) + 2
        fields.append(text)
        if len(fields) > FIELDS or left < 0:
            raise Refused(
                431, "HEAD_TOO_LARGE", f"more than {FIELDS} fields or {HEAD_BYTES} bytes", close=True
            )


def _read_line(source: io.BufferedReader, too_long: int) -> bytes:
    line = source.readline(LINE_BYTES + 2)
    if not line.endswith(b"\n"):
        if len(line) <= LINE_BYTES:
            raise EOFError
        refusal = Refused(too_long, "LINE_TOO_LONG", f"a line is over {LINE_BYTES} bytes", close=True)
    elif not line.endswith(b"\r\n"):
        refusal = malformed("a line does not end with CRLF")
    else:
        return line[:-2]
    refusal.line = line
    raise refusal


def parse_head(line: bytes, fields: list[bytes], body_source: io.BufferedReader) -> Request:
    """Raises Refused for anything that two parsers could read differently."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise malformed("the request line is not: METHOD target HTTP/1.1")
    method, target, major, minor = (part.decode("ascii") for part in match.groups())
    if (major, minor) not in (("1", "0"), ("1", "1")):
        raise Refused(505, "VERSION", f"HTTP/{major}.{minor} is not spoken here", close=True)
    headers = Headers()
    for n, text in enumerate(fields, 1):
        found = FIELD.fullmatch(text)
        if not found:
            # Its text stays out of the log: it may be a misspelt Authorization.
            raise malformed(f"header field {n} is not: name, colon, value")
        headers.append((found[1].decode("ascii").lower(), found[2].strip(b" \t").decode("latin-1")))
    host = headers.one("host")
    target, absolute_host = _origin_form(target)
    if host is None and minor == "1":
        raise malformed("HTTP/1.1 without a Host field")
    if host is not None and not HOST.fullmatch(host):
        raise malformed("the Host field is not a name with an optional port")
    segments, query = parse_target(target)
    connection = ",".join(headers.all("connection")).lower()
    keep_alive = minor == "1" and "close" not in [part.strip() for part in connection.split(",")]
    body = Body(body_source, *_framing(headers, minor))
    return Request(method, segments, query, headers, absolute_host or host or "", body, keep_alive)


def _origin_form(target: str) -> tuple[str, str | None]:
    if not target.lower().startswith("http://"):
        return target, None
    authority, slash, path = target[7:].partition("/")
    if not HOST.fullmatch(authority):
        raise malformed("the target's authority is not a host")
    return slash + path or "/", authority


def parse_target(target: str) -> tuple[list[str], dict[str, str]]:
    """Path segments and query, percent-decoded once. Raises Refused.

    An encoded slash, a dot segment or a control character would make the path mean
    something else to a file system: none of them is ever legitimate here.
    """
    path, _, query = target.partition("?")
    if not path.startswith("/"):
        raise malformed("the target is not a path")
    segments = [_decoded(part) for part in path[1:].split("/")]
    for part in segments:
        if part in (".", "..") or any(c in "/\\" or c < " " or c == "\x7f" for c in part):
            raise Refused(400, "BAD_PATH", "the path holds a dot segment, a slash or a control character")
    pairs = [part.partition("=") for part in query.split("&") if part]
    return segments, {_decoded(k.replace("+", " ")): _decoded(v.replace("+", " ")) for k, _, v in pairs}


def _decoded(text: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise Refused(400, "BAD_PATH", "a percent sign without two hex digits")
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise Refused(400, "BAD_PATH", "percent-encoded bytes that are not UTF-8") from None


def _framing(headers: Headers, minor: str) -> tuple[int | None, bool]:
    """(Content-Length or None, chunked). Raises Refused."""
    lengths, codings = headers.all("content-length"), headers.all("transfer-encoding")
    if codings:
        if lengths or minor == "0" or len(codings) > 1:
            raise malformed("Transfer-Encoding beside a length, twice, or in HTTP/1.0")
        if codings[0].lower() != "chunked":
            raise Refused(501, "CODING", "only the transfer coding chunked is known", close=True)
        return None, True
    if not lengths:
        return None, False
    if len(lengths) > 1 or not re.fullmatch(r"[0-9]+", lengths[0]):
        raise malformed("Content-Length is not one whole number")
    if len(lengths[0]) > 15:
        raise Refused(413, "TOO_LARGE", "the body is too large", close=True)
    return int(lengths[0]), False


# ---------------------------------------------------------------- body
class Body:
    """A request's body, read in pieces. before_read runs once, before the first byte; after_read
    once it was read to its end."""

    def __init__(self, source: io.BufferedReader, length: int | None, chunked: bool) -> None:
        self.source = source
        self.length = length  # None: chunked, or no body
        self.chunked = chunked
        self.before_read: Callable[[], None] = lambda: None
        self.progress: Callable[[int], None] = lambda _count: None
        self.after_read: Callable[[], None] = lambda: None
        self.done = not chunked and not length  # read to its end

    def pieces(self, limit_bytes: int, setting: str = "") -> Iterator[bytes]:
        """The body in order. Raises Refused (413 over the limit, 400 damaged), EOFError cut off.

        setting: the environment variable that holds the limit, for the refusal.
        """
        self.refuse_over(limit_bytes, setting)
        if self.done:
            return
        seen = 0
        try:
            self.before_read()
            for piece in self._chunks() if self.chunked else self._plain(self.length or 0):
                seen += len(piece)
                if seen > limit_bytes:
                    raise self._too_large(limit_bytes, seen, setting)
                self.progress(seen)
                yield piece
        except OSError as error:  # a reset is a cut-off too: nobody is left to be told of it
            raise EOFError from error
        self.done = True
        self.after_read()

    def refuse_over(self, limit_bytes: int, setting: str = "") -> None:
        """Raises Refused 413 where the body says itself that it is over the limit."""
        if (self.length or 0) > limit_bytes:
            raise self._too_large(limit_bytes, self.length or 0, setting)

    def read(self, limit_bytes: int) -> bytes:
        """The whole body. Raises as pieces() does."""
        data = bytearray()  # no list: a chunk may have one byte
        for piece in self.pieces(limit_bytes):
            data += piece
        return bytes(data)

    def _too_large(self, limit_bytes: int, size_bytes: int, setting: str) -> Refused:
        known = f"{size_bytes} bytes" if self.length else f"at least {size_bytes} bytes"
        named = f" ({setting})" if setting else ""
        return Refused(
            413, "TOO_LARGE", f"the body has {known}, the limit is {limit_bytes}{named}", close=True
        )

    def _plain(self, left: int) -> Iterator[bytes]:
        while left:
            # read1: what is there now; read would wait for a full piece.
            piece = self.source.read1(min(left, CHUNK_BYTES))
            if not piece:
                raise EOFError
            left -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while True:
            size = CHUNK_SIZE.fullmatch(self._chunk_line(256))
            if not size:
                raise malformed("a chunk's size is not a hexadecimal number")
            left = int(size[1], 16)
            if left == 0:
                break
            yield from self._plain(left)
            if self._chunk_line(2) != b"\r\n":
                raise malformed("a chunk does not end with CRLF")
        for _ in range(FIELDS):  # trailers: read, and ignored
            if not _read_line(self.source, 431):
                return
        raise Refused(431, "HEAD_TOO_LARGE", f"more than {FIELDS} trailers", close=True)

    def _chunk_line(self, limit: int) -> bytes:
        """A line, or what of it fits. Raises EOFError: one that just ends is a cut, no malformed one."""
        line = self.source.readline(limit)
        if len(line) < limit and not line.endswith(b"\n"):
            raise EOFError
        return line


# ---------------------------------------------------------------- conditions and ranges
def _tags(value: str) -> list[tuple[bool, str]]:
    """(weak, opaque tag) of an entity-tag list; bare ones, which the desktop client sends,
    count as quoted."""
    found = re.findall(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"|([^",\s]+)', value)
    return [(bool(weak), tag or bare) for weak, tag, bare in found]


def _date(value: str | None) -> float | None:
    """An HTTP date as seconds since the epoch; None for anything else."""
    with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):
        return email.utils.parsedate_to_datetime(value or "").timestamp()
    return None


def not_modified(headers: Headers, etag: str, modified_s: int) -> bool:
    """Whether the client's copy is current (304). Raises Refused 412. RFC 9110, 13.2.2."""
    match = ", ".join(headers.all("if-match"))
    if match:
        if match.strip() != "*" and (False, etag) not in _tags(match):
            raise Refused(412, "CHANGED", "the file is not the one that If-Match names")
    elif (limit := _date(headers.one("if-unmodified-since"))) is not None and modified_s > limit:
        raise Refused(412, "CHANGED", "the file changed since then")
    none_match = ", ".join(headers.all("if-none-match"))
    if none_match:
        return none_match.strip() == "*" or etag in [tag for _, tag in _tags(none_match)]
    since = _date(headers.one("if-modified-since"))
    return since is not None and modified_s <= since


def wanted_range(headers: Headers, etag: str, modified_s: int, size: int) -> tuple[int, int] | None:
    """Half-open (start, end) for 206, None for the whole file. Raises Refused 416.

    Several ranges, or anything that is no byte range, is answered whole: RFC 9110, 14.2.
    """
    value = headers.one("range")
    if value is None or size == 0:
        return None
    condition = headers.one("if-range")
    if condition is not None:
        same_tag = (False, etag) in _tags(condition)
        if not same_tag and _date(condition) != modified_s:
            return None
    match = re.fullmatch(r"bytes=[ \t]*([0-9]*)-([0-9]*)[ \t]*", value, re.IGNORECASE)
    if not match or match.groups() == ("", ""):
        return None
    # No file has 18 digits: what is longer means "beyond the end" just as well.
    first, last = (part and (part.lstrip("0")[:18] or "0") for part in match.groups())
    if first:
        start, end = int(first), min(int(last or size), size - 1) + 1
        if last and int(last) < start:
            return None
    else:
        start, end = max(0, size - int(last)), size
    if start >= size or (not first and not int(last)):
        raise Refused(416, "RANGE", f"the file has {size} bytes", {"Content-Range": f"bytes */{size}"})
    return start, end


def file_answer(
    request: Request, file: BinaryIO, etag: str, modified_s: float, headers: dict[str, str]
) -> Answer:
    """A file as 200, 206 or 304, as the request's conditions ask. Owns the file.

    Raises Refused 412, 416.
    """
    size, moment = os.fstat(file.fileno()).st_size, int(modified_s)
    common = {
        "ETag": f'"{etag}"',
        "Last-Modified": email.utils.formatdate(moment, usegmt=True),
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
    }
    try:
        if not_modified(request.headers, etag, moment):
            file.close()
            return Answer(304, common)
        part = wanted_range(request.headers, etag, moment, size)
    except Refused:
        file.close()
        raise
    if part is None:
        return Answer(200, common | headers, file, 0, size)
    start, end = part
    where = {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
    return Answer(206, common | headers | where, file, start, end - start)


# ---------------------------------------------------------------- server
class Turns:
    """Whose turn it is to send a piece of a file: SENDERS threads at a time, requests before them.

    Files that are sent as fast as the processor can copy leave nothing of it to the requests that
    came meanwhile: among a hundred downloads at once, a state would wait for half a second. No
    request goes first for longer than GIVE_WAY_S: neither a slow client nor one whose answer takes
    its time stops a download, and many requests only slow it down.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._places = threading.Semaphore(SENDERS)
        self._ended = threading.Condition()
        self._begun: dict[int, float] = {}  # connection -> until when it goes first

    def begin(self, number: int) -> None:
        """This connection has a request, or is new and about to send one."""
        with self._ended:
            self._begun[number] = self.clock() + GIVE_WAY_S

    def end(self, number: int) -> None:
        """It is answered, but for the file, or gone."""
        with self._ended:
            self._begun.pop(number, None)
            if not self._begun:
                self._ended.notify_all()

    def __enter__(self) -> None:
        """A turn; to be short, and never to wait for a client."""
        self._places.acquire()
        if self._begun:  # with a place taken: no more than SENDERS threads wake up to look
            self._give_way()

    def __exit__(self, *_: object) -> None:
        self._places.release()

    def _give_way(self) -> None:
        with self._ended:
            now_s = self.clock()
            self._begun = {number: until_s for number, until_s in self._begun.items() if until_s > now_s}
            latest_s = max(self._begun.values(), default=now_s)
            self._ended.wait_for(lambda: not self._begun, latest_s - now_s)


@dataclass(slots=True)
class Peer:
    """One connection, as the reaper sees it."""

    sock: socket.socket
    number: int
    phase: str = "idle"  # idle, head, body, answer
    deadline_s: float = 0.0  # monotonic

    def enter(self, phase: str, limit_s: float) -> None:
        """The connection may stay in this phase for so long."""
        self.phase, self.deadline_s = phase, time.monotonic() + limit_s


class HttpServer(ThreadingHTTPServer):
    """Accepts connections, one thread each, no more than `cap`.

    At the cap the oldest connection that is still sending its head makes room, else the oldest
    that idles; where all are at work the new one is told 503. The reaper shuts down what passed
    its deadline.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512
    # On Windows SO_REUSEADDR would let a second service take over the same port.
    allow_reuse_address = os.name != "nt"

    def __init__(
        self, address: tuple[str, int], handle: Callable[[Handler, Request], Answer | None], cap: int
    ) -> None:
        self.handle = handle
        self.cap = cap
        self.peers: dict[int, Peer] = {}
        self.peers_lock = threading.Lock()
        self.turns = Turns()
        self._refused: collections.deque[tuple[float, socket.socket]] = collections.deque()  # until when open
        self._numbers = itertools.count(1)
        self._closing = threading.Event()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)  # type: ignore[arg-type]  # built in _serve

    def server_bind(self) -> None:
        """Without the reverse DNS query of http.server's own."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(self.allow_reuse_address))
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def start(self) -> None:
        """Serve in threads of its own."""
        threading.Thread(target=self.serve_forever, name="http-accept", daemon=True).start()
        threading.Thread(target=self._reap, name="http-reaper", daemon=True).start()

    def stop(self) -> None:
        """Stop accepting and end every connection."""
        self._closing.set()
        ending = threading.Thread(target=self.shutdown, name="http-shutdown")
        ending.start()
        # Wakes serve_forever on Linux; where a socket that listens has no such call it looks twice a second.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        ending.join()
        self.server_close()
        with self.peers_lock:
            peers = list(self.peers.values())
        for peer in peers:
            _shut(peer.sock)
        while self._refused:
            self._refused.popleft()[1].close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """One thread for this connection, if there is room."""
        peer = Peer(request, next(self._numbers))
        peer.enter("head", HEAD_S)
        with self.peers_lock:
            full = len(self.peers) >= self.cap
            waiting = [p for p in self.peers.values() if p.phase in ("head", "idle")] if full else []
            oldest = min(waiting, key=lambda p: (p.phase == "idle", p.number), default=None)
            if oldest:
                # Gone at once, not when its thread notices: the next one must evict another.
                del self.peers[oldest.number]
            if not full or oldest:
                self.peers[peer.number] = peer
        if full and not oldest:
            self._turn_away(request)
            return
        if oldest:
            _shut(oldest.sock)
        self.turns.begin(peer.number)
        threading.Thread(
            target=self._serve, args=(request, client_address, peer), name=f"http-{peer.number}", daemon=True
        ).start()

    def _turn_away(self, sock: socket.socket) -> None:
        """Tell a connection that there is no room, without waiting for it."""
        detail = f"all {self.cap} connections are in use; try again"
        answer = Refused(503, "BUSY", detail, {"Retry-After": "1"}).answer()
        assert isinstance(answer.body, bytes)
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            sock.send(head_bytes(answer, close=True) + answer.body)
            sock.shutdown(socket.SHUT_WR)
        # Closed at once, it would be reset by what it sent, and its answer could be lost.
        self._refused.append((time.monotonic() + LINGER_S, sock))
        if len(self._refused) > self.cap:
            self._refused.popleft()[1].close()

    def _serve(self, request: socket.socket, client_address: Any, peer: Peer) -> None:
        try:
            Handler(request, client_address, self, peer)
        except OSError:
            pass  # the peer went away: nobody is left to tell
        finally:
            self.turns.end(peer.number)
            with self.peers_lock:
                self.peers.pop(peer.number, None)
            self.shutdown_request(request)

    def _reap(self) -> None:
        while not self._closing.wait(0.5):
            now_s = time.monotonic()
            with self.peers_lock:
                late = [peer for peer in self.peers.values() if peer.deadline_s < now_s]
            for peer in late:
                log.debug("connection %d was too slow in phase %s", peer.number, peer.phase)
                _shut(peer.sock)  # its thread wakes up with an error or an end of file
            with contextlib.suppress(IndexError):
                while self._refused[0][0] < now_s:
                    self._refused.popleft()[1].close()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


# ---------------------------------------------------------------- one connection
class Handler(BaseHTTPRequestHandler):
    """Reads requests off one connection and sends the answers that server.handle gives.

    An answer of None means that the socket was handed over and is no longer ours.
    """

    server: HttpServer
    rfile: io.BufferedReader

    def __init__(self, request: Any, client_address: Any, server: HttpServer, peer: Peer) -> None:
        self.peer = peer
        super().__init__(request, client_address, server)

    def handle(self) -> None:
        """Until either side closes."""
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while self._one_request():
            pass

    def finish(self) -> None:
        """Close the buffers; the socket itself is the server's to close."""
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def _one_request(self) -> bool:
        """Serve one request; False when the connection is to be closed."""
        if self.peer.phase != "head":
            self.peer.enter("idle", IDLE_S)
        line = b""
        try:
            if not self.rfile.peek(1):
                return False
            self.server.turns.begin(self.peer.number)
            self.peer.enter("head", HEAD_S)
            line = read_request_line(self.rfile)
            request = parse_head(line, read_fields(self.rfile), self.rfile)
        except EOFError:
            return False
        except Refused as refusal:
            log.info("refused before routing: %d %s", refusal.status, refusal.detail)
            # Whatever else is wrong with it: after HEAD a body would be read as another answer.
            head_only = (line or refusal.line).startswith(b"HEAD ")
            self._send(refusal.answer(), head_only, close=True)
            self._linger()
            return False
        request.body.before_read = lambda: self._begin_body(request)
        return self._answer(request)

    def _answer(self, request: Request) -> bool:
        self._await_answer()
        request.body.after_read = self._await_answer  # what the body's own time leaves is too little
        try:
            answer = self.server.handle(self, request)
        except EOFError:
            return False  # the body was cut off: nobody to answer
        if answer is None:
            return False
        small = (request.body.length or 0) <= CHUNK_BYTES and not request.body.chunked
        # A client that waits for "100 Continue" may never send its body after a refusal.
        if not request.body.done and (not small or request.headers.all("expect")):
            request.keep_alive = False
        close = not request.keep_alive or answer.headers.pop("Connection", "") == "close"
        self._send(answer, request.method == "HEAD", close)
        if close:
            if not request.body.done:
                self._linger()
            return False
        if not request.body.done:
            with contextlib.suppress(EOFError, Refused):
                request.body.read(CHUNK_BYTES)
        return request.body.done

    def _await_answer(self) -> None:
        self.peer.enter("answer", 120.0)  # until the first byte; a preview waits for a worker

    def _begin_body(self, request: Request) -> None:
        started_s = time.monotonic()
        self.peer.enter("body", STALL_S)

        def progress(seen: int) -> None:
            # Neither a pause over STALL_S nor a trickle below SLOWEST is waited for.
            on_the_whole_s = started_s + STALL_S + seen / SLOWEST_BYTES_S
            self.peer.enter("body", min(STALL_S, on_the_whole_s - time.monotonic()))

        request.body.progress = progress
        if (request.headers.one("expect") or "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _send(self, answer: Answer, head_only: bool, close: bool) -> None:
        head, body = head_bytes(answer, close), answer.body
        whole = memoryview(head + body if isinstance(body, bytes) and not head_only else head)
        try:
            for at in range(0, len(whole), CHUNK_BYTES):
                piece = whole[at : at + CHUNK_BYTES]
                self.peer.enter("answer", STALL_S + len(piece) / SLOWEST_BYTES_S)
                self.wfile.write(piece)
            self.server.turns.end(self.peer.number)
            if not isinstance(body, bytes) and not head_only:
                self._send_file(body, answer.offset, answer.size_bytes())
        finally:
            if not isinstance(body, bytes):
                body.close()

    def _send_file(self, file: BinaryIO, offset: int, size: int) -> None:
        # Where there is sendfile the kernel copies: no buffer a client, and no other thread waits.
        kernel_copies = hasattr(os, "sendfile")
        step = self._sendfile if kernel_copies else self._copy
        self.connection.setblocking(not kernel_copies)
        try:
            while size:
                piece = min(size, CHUNK_BYTES)
                self.peer.enter("answer", STALL_S + piece / SLOWEST_BYTES_S)
                while piece:
                    sent = step(file, offset, piece)
                    if not sent:
                        raise OSError("the file became shorter while it was sent")
                    offset, size, piece = offset + sent, size - sent, piece - sent
        finally:
            self.connection.setblocking(True)

    def _copy(self, file: BinaryIO, offset: int, size: int) -> int:
        """Send some bytes of a file; how many."""
        with self.server.turns:
            file.seek(offset)
            piece = file.read(size)
        return self.wfile.write(piece)

    def _sendfile(self, file: BinaryIO, offset: int, size: int) -> int:
        """As _copy(). While the peer takes nothing, another connection has the turn."""
        while True:
            with self.server.turns, contextlib.suppress(BlockingIOError):
                return os.sendfile(self.connection.fileno(), file.fileno(), offset, size)
            writable = select.poll()
            writable.register(self.connection, select.POLLOUT)
            writable.poll()  # returns as well when the reaper shuts the connection down

    def _linger(self) -> None:
        """Say that no more comes, and read a little on: closing with unread bytes makes the
        system reset the connection, and the peer may lose the answer with it."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_S)
            deadline_s = time.monotonic() + LINGER_S
            while time.monotonic() < deadline_s and self.connection.recv(CHUNK_BYTES):
                pass

    def hand_over(self) -> tuple[socket.socket, bytes]:
        """(the socket, bytes already read off it) for another owner; this thread lets go.

        Raises EOFError when the peer is gone already.
        """
        self.connection.setblocking(False)  # or peek would wait for bytes when there are none
        try:
            buffered = self.rfile.peek() or b""
        except OSError as error:
            raise EOFError from error
        return socket.socket(fileno=self.connection.detach()), buffered
