"""Hostile WebSocket lines for fuzz.py: handshakes and frames by grammar, and how they must end.

Map: Case - listening (what RFC 6455 makes of a client's frames) - what the service may send -
     handshakes - frames - make
Rule: as in hostile_http: by seed and index alone, nothing of the service imported.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import hostile_http
from client import JobState, WireError, loads, parse
from hostile_http import HOLE, Violation, World, with_token

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
MESSAGE_BYTES = 64 << 10  # the service's limit for one message
SENT_CODES = frozenset((1000, 1001, 1002, 1007, 1008, 1009, 1011, 4404))


@dataclass(frozen=True)
class Case:
    """A handshake and what is sent behind it. over: the job is over or unknown, so that the
    service itself ends the line at once."""

    kind: str
    handshake: bytes
    frames: bytes
    count: int  # frames, as the generator counts them
    over: bool = False
    cuts: tuple[int, ...] = ()
    drop: bool = False  # reset instead of an orderly end

    @property
    def ends_itself(self) -> bool:
        """Whether its frames must bring the service to end the line."""
        codes = listening(self.frames).codes
        return self.kind != "odd handshake" and bool(codes) and None not in codes


# ---------------------------------------------------------------- what a client's frames mean
@dataclass
class Heard:
    """What a receiver makes of a stream: close codes that are right for its end (None: no close
    frame; no code at all: nothing was wrong), and the pings before that."""

    codes: set[int | None] = field(default_factory=set)
    pings: list[bytes] = field(default_factory=list)


def listening(data: bytes) -> Heard:
    """Read a client's frames as RFC 6455 says, up to the first that ends the line."""
    heard, at, message = Heard(), 0, -1  # bytes of the open fragmented message, -1: none is open
    while (header := _header(data, at)) is not None:
        first, masked, size, at = header
        opcode, final, control = first & 15, bool(first & 128), bool(first & 8)
        wrong = first & 112 or not masked or opcode in (3, 4, 5, 6, 7) or opcode > 10
        wrong = wrong or (control and (not final or size > 125)) or size >> 63
        wrong = wrong or (opcode == 0 and message < 0) or (opcode in (1, 2) and message >= 0)
        if wrong:
            heard.codes.add(1002)
        if size + max(0, message) > MESSAGE_BYTES:
            heard.codes.add(1009)
        whole = at + 4 * masked + size <= len(data)
        if heard.codes:
            if not whole and 1009 not in heard.codes:  # some judge a frame when all of it is there
                heard.codes.add(None)
            return heard
        payload = _unmasked(data[at : at + 4 + size])
        at += 4 + size
        if not whole:
            return heard
        if opcode == CLOSE:
            # Some end a line with 1002 whose message was still open, some answer the close as it is.
            heard.codes = _close_codes(payload) | ({1002} if message >= 0 else set())
            return heard
        if opcode == PING:
            heard.pings.append(payload)
        elif not control:
            message = -1 if final else max(0, message) + size
    return heard


def _header(data: bytes, at: int) -> tuple[int, bool, int, int] | None:
    """(first byte, masked, size, where the mask or payload starts) of the frame at `at`."""
    if at + 2 > len(data):
        return None
    first, second = data[at], data[at + 1]
    more = {126: 2, 127: 8}.get(second & 127, 0)
    # What is wrong in the first two bytes may be refused before the rest is there, or after.
    if at + 2 + more > len(data):
        return None
    size = int.from_bytes(data[at + 2 : at + 2 + more], "big") if more else second & 127
    return first, bool(second & 128), size, at + 2 + more


def _unmasked(data: bytes) -> bytes:
    mask = data[:4]
    return bytes(byte ^ mask[n % 4] for n, byte in enumerate(data[4:]))


def _close_codes(payload: bytes) -> set[int | None]:
    """The codes with which a client's close frame may be answered."""
    if not payload:
        return {1005}
    if len(payload) == 1:
        return {1002}
    code, wrong = int.from_bytes(payload[:2], "big"), set[int | None]()
    if not (3000 <= code <= 4999 or code in (*range(1000, 1004), *range(1007, 1015))):
        wrong.add(1002)
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        wrong |= {1002, 1007}
    return wrong or {code}


# ---------------------------------------------------------------- what the service may send
def judge(case: Case, data: bytes, world: World) -> tuple[int, int | None]:
    """(status of the handshake, close code or None). Raises Violation."""
    hostile_http.check_secrets(data, world)
    read = hostile_http.read_answer(data, is_head=False)
    if read is None:
        if data or b"\r\n\r\n" in case.handshake:
            raise Violation(f"no whole answer to the handshake: {data[:200]!r}")
        return 0, None
    answer, rest = read
    if answer.status != 101:
        hostile_http.judge(_as_http(case), data, world)
        return answer.status, None
    code, pongs = _check_frames(rest)
    heard = listening(case.frames)
    if heard.codes:
        _check_end(case, code, heard.codes)
    elif code is not None and not case.over:
        raise Violation(f"closed with {code}, though nothing was wrong")
    if not case.over and code is not None and pongs != heard.pings:
        raise Violation(f"{len(heard.pings)} pings were answered with {pongs}")
    return 101, code


def _as_http(case: Case) -> hostile_http.Case:
    data = case.handshake + case.frames
    return hostile_http.Case(case.kind, data, hostile_http.reading(data), 1)


def _check_end(case: Case, code: int | None, right: set[int | None]) -> None:
    if case.over:
        right = right | {1000, 4404}
    if code not in right:
        raise Violation(f"closed with {code}, not with one of {right}")


def _check_frames(data: bytes) -> tuple[int | None, list[bytes]]:
    """(close code, pongs) of what the service sent: each frame exact, each text a JobState."""
    at, code, pongs = 0, None, []
    while at < len(data):
        header = _header(data, at)
        if header is None or (code is not None and header[0] != 128 | PONG):
            raise Violation(f"half a frame, or one after the close: {data[at:][:100]!r}")
        first, masked, size, at = header
        payload = data[at : at + size]
        at += size
        if masked or len(payload) < size or first not in (128 | TEXT, 128 | CLOSE, 128 | PING, 128 | PONG):
            raise Violation(f"a frame that no server may send: {first:#x}, {size} bytes, masked: {masked}")
        if first & 15 == TEXT:
            try:
                parse(JobState, loads(payload))
            except WireError as error:
                raise Violation(str(error)) from error
        elif first & 15 == PONG:
            pongs.append(payload)
        elif first & 15 == CLOSE:
            code = int.from_bytes(payload[:2], "big") if payload else 1005
            if (
                payload
                and code not in SENT_CODES
                and not 3000 <= code <= 4999
                and code not in range(1003, 1015)
            ):
                raise Violation(f"close code {code}")
    return code, pongs


# ---------------------------------------------------------------- handshakes
# fmt: off
ODD_LINES = [
    b"Sec-WebSocket-Version: 12", b"Sec-WebSocket-Version: 13, 8", b"Sec-WebSocket-Version:",
    b"Sec-WebSocket-Version: x", b"Sec-WebSocket-Key: abc", b"Sec-WebSocket-Key:",
    b"Sec-WebSocket-Key: " + b"A" * 300, b"Sec-WebSocket-Key: \xff",
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", b"Sec-WebSocket-Protocol: chat, x",
    b"Sec-WebSocket-Protocol: ,,", b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
    b"Sec-WebSocket-Extensions: ;;;\xff", b"Sec-WebSocket-Extensions: " + b"x, " * 1000, b"Upgrade: h2c",
    b"Upgrade: websocket, h2c", b"Connection: close", b"Connection: Upgrade, close", b"Origin: null",
    b"Origin: https://evil.example", b"Origin: tauri://localhost", b"Host: evil.example",
    b"Content-Length: 6", b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Upgrade:",
]
# fmt: on
HANDSHAKE = [
    b"Host: localhost",
    b"Authorization: Bearer " + HOLE,
    b"Upgrade: websocket",
    b"Connection: Upgrade",
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    b"Sec-WebSocket-Version: 13",
]


def handshake(r: random.Random, world: World, odd: bool) -> tuple[bytes, bool]:
    """(the request, whether the service itself ends the line)."""
    path, over = r.choice(
        [
            ("/ws/jobs", False),
            (f"/ws/jobs?after={r.randrange(2000)}", False),
            (f"/ws/jobs/{world.running}", False),
            (f"/ws/jobs/{world.finished}", True),
            ("/ws/jobs/none", True),
        ]
    )
    lines = [f"GET {path} HTTP/1.1".encode(), *HANDSHAKE]
    for _ in range(r.choice([1, 2]) if odd else 0):
        at = r.randrange(1, len(lines) + 1)
        lines[at : at + r.randint(0, 1)] = [r.choice(ODD_LINES)]
    return with_token(b"\r\n".join(lines) + b"\r\n\r\n", world), over


# ---------------------------------------------------------------- frames
def frame(
    r: random.Random, opcode: int, payload: bytes = b"", first: int = 128, masked: bool = True, form: int = 0
) -> bytes:
    """One frame. first: FIN and RSV bits; form: 126 or 127 forces that form of the length."""
    size = len(payload)
    form = form or (size if size < 126 else 126 if size < 65536 else 127)
    head = bytes([first | opcode, 128 * masked | form])
    head += size.to_bytes({126: 2, 127: 8}.get(form, 0), "big") if form > 125 else b""
    if not masked:
        return head + payload
    mask = r.randbytes(4)
    whole = int.from_bytes(payload, "big") ^ int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return head + mask + whole.to_bytes(size, "big")


def lying(r: random.Random, size: int) -> bytes:
    """A frame that announces more than follows."""
    return bytes([130, 255]) + struct.pack(">Q", size) + bytes(4) + r.randbytes(10)


Frames = Callable[[random.Random], bytes]
GOOD: list[Frames] = [
    lambda r: frame(r, TEXT, b'{"type":"x"}'),
    lambda r: frame(
        r, TEXT, r.choice([b"", b"\xff\xfe", "作品".encode(), b"\xed\xa0\x80", b"x" * 126, b"x" * 65536])
    ),
    lambda r: frame(r, BINARY, r.randbytes(r.choice([0, 1, 125, 126, 127, 5000]))),
    lambda r: frame(r, TEXT, b"ab", form=r.choice([126, 127])),
    lambda r: frame(r, PING, r.randbytes(r.choice([0, 4, 125]))),
    lambda r: frame(r, PONG, r.randbytes(r.choice([0, 4, 125]))),
    lambda r: frame(r, TEXT, b"a", 0) + frame(r, 0, b"b"),
    lambda r: frame(r, BINARY, b"a", 0) + frame(r, PING, b"in between") + frame(r, 0, b"b", 0) + frame(r, 0),
    lambda r: frame(r, TEXT, b"", 0) + frame(r, 0, b"", 0) + frame(r, 0, b""),
]
BAD: list[Frames] = [
    lambda r: frame(r, TEXT, b"hi", masked=False),
    lambda r: frame(r, r.choice([CLOSE, PING, TEXT]), b"", masked=False),
    lambda r: frame(r, r.choice([3, 4, 5, 6, 7, 11, 12, 13, 14, 15])),
    lambda r: frame(r, r.choice([TEXT, PING, CLOSE]), b"x" * 2, r.choice([192, 160, 144, 240])),
    lambda r: frame(r, r.choice([PING, PONG, CLOSE]), b"x" * r.choice([126, 127, 70000])),
    lambda r: frame(r, r.choice([PING, PONG, CLOSE]), b"", 0),
    lambda r: frame(r, 0, b"continues nothing", r.choice([0, 128])),
    lambda r: frame(r, TEXT, b"a", 0) + frame(r, TEXT, b"b"),
    lambda r: frame(r, BINARY, b"x" * r.choice([65537, 70000])),
    lambda r: lying(r, r.choice([65537, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1])),
    lambda r: lying(r, r.choice([1 << 63, (1 << 64) - 1])),
    lambda r: frame(r, TEXT, b"x" * 40000, 0) + frame(r, 0, b"x" * 40000),
    lambda r: frame(r, TEXT, b"\xca\x48\xcd\xc9\xc9\x07\x00", 192),
]
ENDS: list[Frames] = [
    lambda r: frame(r, CLOSE, struct.pack(">H", r.choice([1000, 1001, 1011, 3000, 4000, 4999]))),
    lambda r: frame(r, CLOSE),
    lambda r: frame(r, CLOSE, struct.pack(">H", 1000) + r.choice([b"bye", "終".encode(), b"x" * 123])),
    lambda r: frame(r, CLOSE, b"x"),
    lambda r: frame(
        r, CLOSE, struct.pack(">H", r.choice([0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535]))
    ),
    lambda r: frame(r, CLOSE, struct.pack(">H", 1000) + r.choice([b"\xff", b"\xed\xa0\x80", b"\xc0\xaf"])),
    lambda r: frame(r, CLOSE, struct.pack(">H", 1000)) + frame(r, TEXT, b"too late"),
    lambda r: b"",
    lambda r: frame(r, TEXT, b"cut off")[: r.randrange(1, 13)],
]


def make(seed: int, index: int, world: World) -> Case:
    """Case `index` of this seed."""
    r = random.Random(f"{seed}/ws/{index}")
    odd = r.random() < 0.1
    shaking, over = handshake(r, world, odd)
    pieces = [r.choice(GOOD)(r) for _ in range(r.choice([0, 1, 2, 4, 8, 12]))]
    if r.random() < 0.6:
        pieces.insert(r.randrange(len(pieces) + 1), r.choice(BAD)(r))
    pieces.append(r.choice(ENDS)(r))
    frames = bytearray(b"".join(pieces))
    mutations = r.choice([1, 1, 3]) if r.random() < 0.15 and frames else 0
    for _ in range(mutations):
        frames[r.randrange(len(frames))] ^= 1 << r.randrange(8)
    size = len(shaking) + len(frames)
    cuts = tuple(sorted(r.randrange(size + 1) for _ in range(r.choice([1, 3])))) if r.random() < 0.3 else ()
    kind = "odd handshake" if odd else "mutated frames" if mutations else "frames"
    return Case(kind, shaking, bytes(frames), len(pieces), over, cuts, r.random() < 0.05)
