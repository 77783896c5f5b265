"""wire.py: heads, bodies, ranges, deadlines and the connection cap, over real sockets.

Only hostile/http_cases.py (when it is there) needs a whole service.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import require
from serving import answers, dial, drain, exchange, still, until

from web import wire

HTTP_CASES = Path(__file__).parents[2] / "shared/hostile/http_cases.py"
HOST = b"Host: x\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST
CLOSE = b"Connection: close\r\n"
POST = b"POST / HTTP/1.1\r\n" + HOST
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
LIMIT = 100_000  # bytes of a body that echo() reads
Handle = Callable[[wire.Handler, wire.Request], wire.Answer | None]


def echo(_handler: wire.Handler, request: wire.Request) -> wire.Answer:
    """What was understood, as JSON; "/refuse" is refused with its body unread."""
    if request.segments == ["refuse"]:
        return wire.Refused(404, "TEST", "no").answer()
    try:
        body = request.body.read(LIMIT)
    except wire.Refused as refusal:
        request.keep_alive = not refusal.close
        return refusal.answer()
    return wire.json_answer(
        {
            "method": request.method,
            "segments": request.segments,
            "query": request.query,
            "host": request.host,
            "x": request.headers.one("x"),
            "body": hashlib.sha256(body).hexdigest() if len(body) > 100 else body.decode("latin-1"),
        }
    )


@contextlib.contextmanager
def serving(handle: Handle = echo, cap: int = 64) -> Iterator[wire.HttpServer]:
    http = wire.HttpServer(("127.0.0.1", 0), handle, cap)
    http.start()
    try:
        yield http
    finally:
        http.stop()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving() as http:
        yield http.server_port


def one(data: bytes) -> tuple[int, dict[str, str], bytes]:
    """The only answer there is: a second one would mean that a body was read as a request."""
    (answer,) = answers(data)
    return answer


def parsed(target: bytes = b"/", fields: bytes = b"") -> wire.Request:
    source = io.BufferedReader(io.BytesIO(b"GET " + target + b" HTTP/1.1\r\n" + HOST + fields + b"\r\n"))
    return wire.parse_head(wire.read_request_line(source), wire.read_fields(source), source)


# ---------------------------------------------------------------- heads
MALFORMED = {
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "no target": (b"GET HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "tabs": (b"GET\t/\tHTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "lower-case version": (b"GET / http/1.1\r\n" + HOST + b"\r\n", 400),
    "version 1.1x": (b"GET / HTTP/1.1x\r\n" + HOST + b"\r\n", 400),
    "version 9.9": (b"GET / HTTP/9.9\r\n" + HOST + b"\r\n", 505),
    "version 2.0": (b"PRI * HTTP/2.0\r\n\r\n", 505),
    "bare LF": (b"GET / HTTP/1.1\nHost: x\n\n", 400),
    "bare CR in a value": (GET + b"X: 1\rY: 2\r\n\r\n", 400),
    "NUL in a value": (GET + b"X: 1\x002\r\n\r\n", 400),
    "blanks before a forbidden byte": (GET + b"X:" + b" " * 8000 + b"\1\r\n\r\n", 400),
    "folded line": (GET + b"X: 1\r\n 2\r\n\r\n", 400),
    "space before the colon": (GET + b"X : 1\r\n\r\n", 400),
    "empty name": (GET + b": 1\r\n\r\n", 400),
    "bad name": (GET + b"X[]: 1\r\n\r\n", 400),
    "no colon": (GET + b"X\r\n\r\n", 400),
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (GET + HOST + b"\r\n", 400),
    "Host with a path": (b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n", 400),
    "Host with a user": (b"GET / HTTP/1.1\r\nHost: x@y\r\n\r\n", 400),
    "target without a slash": (b"GET x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "raw UTF-8 target": (b"GET /\xe6\xbc\xab HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "long line": (b"GET /" + b"a" * 8200 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "long value": (GET + b"X: " + b"a" * 8200 + b"\r\n\r\n", 431),
    "101 fields": (GET + b"X: 1\r\n" * 100 + b"\r\n", 431),
    "65 KiB of fields": (GET + (b"X: " + b"a" * 8000 + b"\r\n") * 9 + b"\r\n", 431),
    "length and chunked": (POST + b"Content-Length: 6\r\n" + CHUNKED + b"0\r\n\r\n" + GET + b"\r\n", 400),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    "signed length": (POST + b"Content-Length: +2\r\n\r\n{}", 400),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n", 400),
    "length 1_0": (POST + b"Content-Length: 1_0\r\n\r\n1234567890", 400),
    "Arabic digits": (POST + "Content-Length: ٢\r\n\r\n{}".encode(), 400),
    "length list": (POST + b"Content-Length: 2, 2\r\n\r\n{}", 400),
    "length 10^20": (POST + b"Content-Length: " + b"1" + b"0" * 20 + b"\r\n\r\n", 413),
    "two codings": (POST + b"Transfer-Encoding: chunked\r\n" + CHUNKED + b"0\r\n\r\n", 400),
    "gzip, chunked": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "xchunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
    "chunked in HTTP/1.0": (b"POST / HTTP/1.0\r\n" + CHUNKED + b"0\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_head_gets_one_refusal_and_the_connection_is_closed(port, name):
    sent, status = MALFORMED[name]
    found, headers, body = one(exchange(port, sent))
    assert (found, headers["content-type"]) == (status, "application/problem+json")
    assert headers["connection"] == "close" and b'"detail":"' in body


def test_a_head_just_within_every_limit_is_taken(port):
    line = b"GET /" + b"a" * (wire.LINE_BYTES - len(b"GET / HTTP/1.1")) + b" HTTP/1.1\r\n"
    for head in (line + HOST, GET + b"Y: 1\r\n" * 98, GET + (b"Y: " + b"a" * 8100 + b"\r\n") * 8):
        assert one(exchange(port, head + CLOSE + b"\r\n"))[0] == 200


def test_a_head_is_understood_as_it_was_sent():
    request = parsed(b"/jobs/a%20b/%E4%BD%9C?q=%25_+x&a=1&b", "X:\t 作品 \t\r\nx-Y:\r\n".encode())
    assert request.segments == ["jobs", "a b", "作"]
    assert request.query == {"q": "%_ x", "a": "1", "b": ""}
    assert request.headers.one("x").encode("latin-1").decode() == "作品"
    assert (request.headers.one("x-y"), request.headers.one("none"), request.host) == ("", None, "x")


def test_an_absolute_target_names_the_host():
    request = parsed(b"http://y:80/a?b=c")
    assert (request.host, request.segments, request.query) == ("y:80", ["a"], {"b": "c"})
    assert parsed(b"http://y").segments == [""]
    with pytest.raises(wire.Refused):
        parsed(b"http://u@y/")


BAD_PATHS = "/.. /a/./b /%2e%2e /a/%2E%2e/b /..%2f /a%2fb /a%5cb /\\x /%00 /a%0d%0aX /%7f /% /%zz /%ff"


@pytest.mark.parametrize("target", BAD_PATHS.split())
def test_a_path_that_a_file_system_could_misread_is_refused(target):
    with pytest.raises(wire.Refused) as refused:
        wire.parse_target(target)
    assert (refused.value.status, refused.value.code) == (400, "BAD_PATH")


def test_a_field_that_may_stand_once_is_refused_when_it_stands_twice():
    with pytest.raises(wire.Refused, match="there are 2 x fields"):
        parsed(fields=b"X: 1\r\nX: 2\r\n").headers.one("x")


# ---------------------------------------------------------------- bodies
def posted(fields: bytes, body: bytes = b"") -> bytes:
    return POST + CLOSE + fields + b"\r\n" + body


@pytest.mark.parametrize(
    "body, text",
    [
        (b"2\r\n{}\r\n0\r\n\r\n", "{}"),
        (b"1\r\n{\r\n001\r\n}\r\n0\r\n\r\n", "{}"),
        (b"A;name=value\r\n0123456789\r\n0\r\n\r\n", "0123456789"),
        (b"0\r\nTrailer: x\r\n\r\n", ""),
        (b"4\r\n\r\n\r\n\r\n0\r\n\r\n", "\r\n\r\n"),
    ],
)
def test_a_chunked_body_is_decoded(port, body, text):
    status, _, found = one(exchange(port, posted(CHUNKED[:-2], body)))
    assert status == 200 and f'"body":"{text}"'.replace("\r\n", "\\r\\n").encode() in found


@pytest.mark.parametrize("size", [*"0x2 +2 -2 2_0 g FFFFFFFFFFFFFFFFF 2;\x00".split(), "", " 2", "2 "])
def test_a_malformed_chunk_size_ends_the_connection(port, size):
    sent = posted(CHUNKED[:-2], size.encode() + b"\r\n{}\r\n0\r\n\r\n" + GET + b"\r\n")
    status, headers, _ = one(exchange(port, sent))
    assert (status, headers["connection"]) == (400, "close")


def test_a_chunk_longer_than_its_size_ends_the_connection(port):
    assert one(exchange(port, posted(CHUNKED[:-2], b"2\r\n{}0\r\n\r\n")))[0] == 400


def test_too_many_trailers_end_the_connection(port):
    assert one(exchange(port, posted(CHUNKED[:-2], b"0\r\n" + b"T: 1\r\n" * 101 + b"\r\n")))[0] == 431


def test_a_body_over_the_limit_is_refused_before_it_is_read(port):
    start_s = time.monotonic()
    assert one(exchange(port, posted(b"Content-Length: 10737418240\r\n")))[0] == 413
    assert time.monotonic() - start_s < wire.LINGER_S + 2


def test_a_chunked_body_over_the_limit_is_refused_where_it_passes_it(port):
    chunk = b"8000\r\n" + b"a" * 0x8000 + b"\r\n"
    status, headers, _ = one(exchange(port, posted(CHUNKED[:-2], chunk * 4)))
    assert (status, headers["connection"]) == (413, "close")


@pytest.mark.parametrize("part", [b"", b"5", b"50\r\n{}", b"2\r\n{}", b"2\r\n{}\r", b"2\r\n{}\r\n", b"0\r\n"])
def test_a_body_that_breaks_off_gets_no_answer(port, part):
    for fields in (b"Content-Length: 50\r\n", CHUNKED[:-2]):
        with dial(port) as line:
            line.sendall(posted(fields, part))
            line.shutdown(socket.SHUT_WR)
            assert drain(line) == b""


def test_one_byte_at_a_time_is_one_request(port):
    sent = POST + CLOSE + CHUNKED + b"2\r\n{}\r\n0\r\n\r\n"
    data = exchange(port, *(bytes([byte]) for byte in sent), pause_s=0.001)
    assert b'"body":"{}"' in one(data)[2]


def test_a_large_body_arrives_whole(port):
    body = bytes(range(256)) * 390
    found = one(exchange(port, posted(b"Content-Length: %d\r\n" % len(body), body)))[2]
    assert hashlib.sha256(body).hexdigest().encode() in found


# ---------------------------------------------------------------- kept connections
def test_pipelined_requests_are_answered_in_order(port):
    first = POST + b"Content-Length: 2\r\n\r\n{}"
    second = b"GET /two?n=2 HTTP/1.1\r\n" + HOST + b"\r\n"
    found = answers(exchange(port, first + second + GET + CLOSE + b"\r\n"))
    assert [status for status, _, _ in found] == [200, 200, 200]
    assert b'"body":"{}"' in found[0][2] and b'"segments":["two"]' in found[1][2]
    assert [headers.get("connection") for _, headers, _ in found] == [None, None, "close"]


def test_after_a_refused_small_body_the_next_request_is_answered_as_itself(port):
    refused = b"POST /refuse HTTP/1.1\r\n" + HOST + b"Content-Length: 40\r\n\r\n" + (GET + b"\r\n").ljust(40)
    found = answers(exchange(port, refused + b"GET /next HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n"))
    assert [status for status, _, _ in found] == [404, 200] and b'"next"' in found[1][2]


@pytest.mark.parametrize(
    "fields",
    [b"Content-Length: 300000\r\n\r\n", CHUNKED, b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n"],
)
def test_after_a_refused_body_that_may_be_long_the_connection_is_closed(port, fields):
    refused = b"POST /refuse HTTP/1.1\r\n" + HOST + fields
    status, headers, _ = one(exchange(port, refused + GET + b"\r\n"))
    assert (status, headers["connection"]) == (404, "close")


def test_a_body_on_get_is_never_read_as_a_request(port):
    inner = GET + b"\r\n"
    sent = GET + CLOSE + b"Content-Length: %d\r\n\r\n" % len(inner) + inner
    assert b"GET / HTTP/1.1" in one(exchange(port, sent))[2]


@pytest.mark.parametrize("head", [b"GET / HTTP/1.0\r\n", GET + b"Connection: Keep-Alive, Close\r\n"])
def test_a_connection_is_closed_where_the_client_expects_it(port, head):
    assert one(exchange(port, head + b"\r\n" + GET + b"\r\n"))[1]["connection"] == "close"


def test_one_empty_line_before_a_request_is_forgiven(port):
    assert one(exchange(port, b"\r\n" + GET + CLOSE + b"\r\n"))[0] == 200
    assert one(exchange(port, b"\r\n\r\n" + GET + CLOSE + b"\r\n"))[0] == 400


def test_head_has_the_headers_of_get_and_no_body(port):
    got = one(exchange(port, GET + CLOSE + b"\r\n"))
    head = exchange(port, GET.replace(b"GET", b"HEAD") + CLOSE + b"\r\n")
    assert head.endswith(b"\r\n\r\n")
    headers = one(head)[1]
    # The two bodies would differ by the method's name alone.
    assert int(headers["content-length"]) == len(got[2]) + len("HEAD") - len("GET")
    assert headers.keys() == got[1].keys()


HEAD = b"HEAD / HTTP/1.1\r\n" + HOST
REFUSED_HEADS = {
    "field": HEAD + b"X\r\n\r\n",
    "after an empty line": b"\r\n" + HEAD + b"X\r\n\r\n",
    "version": b"\r\nHEAD / HTTP/1.2\r\n\r\n",
    "bare LF": b"HEAD / HTTP/1.1\n\n",
    "long line": b"\r\nHEAD /" + b"a" * 9000,
    "long field": HEAD + b"X: " + b"a" * 9000,
    "both framings": HEAD + b"Content-Length: 2\r\n" + CHUNKED + b"0\r\n\r\n",
}


@pytest.mark.parametrize("name", REFUSED_HEADS)
def test_a_refused_head_has_no_body_whatever_is_wrong_and_however_it_arrives(port, name):
    sent = REFUSED_HEADS[name]
    for parts in ([sent], [sent[:1], sent[1:3], sent[3:]]):
        data = exchange(port, *parts, pause_s=0.02)
        assert data.startswith(b"HTTP/1.1 ") and data.endswith(b"\r\n\r\n")
        assert b"Content-Length: 0" not in data


def test_a_refusal_never_repeats_a_field_that_could_not_be_read(port):
    assert b"secret" not in one(exchange(port, GET + b"X: 1\r\nAuthorization : secret\r\n\r\n"))[2]


# ---------------------------------------------------------------- 100-continue
def test_a_client_that_waits_is_told_to_continue_when_its_body_is_wanted(port):
    with dial(port) as line:
        line.sendall(posted(b"Expect: 100-continue\r\nContent-Length: 2\r\n"))
        assert line.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.sendall(b"{}")
        assert b'"body":"{}"' in one(drain(line))[2]


def test_a_client_that_waits_is_refused_at_once_when_its_body_is_not_wanted(port):
    sent = posted(b"Expect: 100-continue\r\nContent-Length: 999999\r\n")
    assert one(exchange(port, sent))[0] == 413


# ---------------------------------------------------------------- ranges and conditions
ETAG, MODIFIED_S = "A", 1_700_000_000
LM, EARLIER, LATER = (
    f"Tue, 14 Nov 2023 22:13:{second} GMT" for second in (20, 18, 21)
)  # of MODIFIED_S, and beside it
WHOLE: tuple[int, str | None, bytes] = (200, None, b"hello world")
NOTHING: tuple[int, str | None, bytes] = (416, "bytes */11", b"")


def part(start: int, end: int) -> tuple[int, str | None, bytes]:
    return 206, f"bytes {start}-{end - 1}/11", b"hello world"[start:end]


# Go's fs_test.go and our own; where several answers are allowed, the one that this service gives.
RANGES: dict[str, tuple[int, str | None, bytes]] = {
    "bytes=0-4": part(0, 5),
    "bytes=2-": part(2, 11),
    "bytes=-5": part(6, 11),
    "bytes=3-7": part(3, 8),
    "bytes=5-1000": part(5, 11),
    "bytes=0-9": part(0, 10),
    "bytes=0-10": part(0, 11),
    "bytes=0-11": part(0, 11),
    "bytes=10-11": part(10, 11),
    "bytes=10-": part(10, 11),
    "bytes=-1000": part(0, 11),
    "Bytes=0-4": part(0, 5),
    "bytes=0-" + "9" * 40: part(0, 11),
    "bytes=-1" + "0" * 40: part(0, 11),
    "bytes=" + "0" * 40 + "2-4": part(2, 5),
    # Several ranges may be answered whole.
    "bytes=0-0,-2": WHOLE,
    "bytes=0-1,5-8": WHOLE,
    "bytes=0-1,5-": WHOLE,
    "bytes=0-,1-,2-,3-,4-": WHOLE,
    "bytes=" + ",".join(["0-0"] * 1000): WHOLE,
    # So may what is no byte range.
    "bytes=--6": WHOLE,
    "bytes=--0": WHOLE,
    "bytes=---0": WHOLE,
    "bytes=-6-": WHOLE,
    "bytes=": WHOLE,
    "bytes=-": WHOLE,
    "items=0-4": WHOLE,
    "bytes 0-4": WHOLE,
    "bytes=0-4;x": WHOLE,
    "bytes=4-0": WHOLE,
    "bytes=a-b": WHOLE,
    "bytes=+0-4": WHOLE,
    "bytes=0-4\xa0": WHOLE,
    "bytes=11-": NOTHING,
    "bytes=11-12": NOTHING,
    "bytes=12-12": NOTHING,
    "bytes=11-100": NOTHING,
    "bytes=100-": NOTHING,
    "bytes=100-1000": NOTHING,
    "bytes=-0": NOTHING,
    "bytes=1" + "0" * 40 + "-": NOTHING,
}
CONDITIONS: list[tuple[dict[str, str], int]] = [
    ({"If-None-Match": '"A"'}, 304),
    ({"If-None-Match": 'W/"A"'}, 304),
    ({"If-None-Match": '"baz", W/"A"'}, 304),
    ({"If-None-Match": "A"}, 304),  # bare, as the desktop client sends it
    ({"If-None-Match": "*"}, 304),
    ({"If-None-Match": '"a"'}, 200),
    ({"If-None-Match": '"AA"'}, 200),
    ({"If-None-Match": ","}, 200),
    ({"If-None-Match": '"A"', "Range": "bytes=0-4"}, 304),
    ({"If-None-Match": '"B"', "If-Modified-Since": LM}, 200),
    ({"If-Modified-Since": LM}, 304),
    ({"If-Modified-Since": LATER}, 304),
    ({"If-Modified-Since": EARLIER}, 200),
    ({"If-Modified-Since": "yesterday"}, 200),
    ({"If-Modified-Since": "Mon, 01 Jan 99999999999 00:00:00 GMT"}, 200),
    ({"If-Modified-Since": "Mon, 01 Jan 2024 00:00:00 +99999999999999999999"}, 200),
    ({"If-Match": '"Z", "A"'}, 200),
    ({"If-Match": "*"}, 200),
    ({"If-Match": '"B"'}, 412),
    ({"If-Match": 'W/"A"'}, 412),
    ({"If-Match": '"A"', "If-None-Match": '"A"'}, 304),
    ({"If-Unmodified-Since": LM}, 200),
    ({"If-Unmodified-Since": EARLIER}, 412),
    ({"Range": "bytes=0-4", "If-Range": '"A"'}, 206),
    ({"Range": "bytes=0-4", "If-Range": '"B"'}, 200),
    ({"Range": "bytes=0-4", "If-Range": 'W/"A"'}, 200),
    ({"Range": "bytes=0-4", "If-Range": LM}, 206),
    ({"Range": "bytes=0-4", "If-Range": LATER}, 200),
    ({"Range": "bytes=100-", "If-Range": '"B"'}, 200),
]


@pytest.fixture(scope="module")
def file_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Serves /11 (a file of 11 bytes) and /0 (an empty one), both with ETag A."""
    root = tmp_path_factory.mktemp("files")
    (root / "11").write_bytes(b"hello world")
    (root / "0").write_bytes(b"")

    def handle(_handler: wire.Handler, request: wire.Request) -> wire.Answer:
        file = open(root / request.segments[0], "rb")
        try:
            return wire.file_answer(request, file, ETAG, MODIFIED_S + 0.7, {"Content-Type": "text/plain"})
        except wire.Refused as refusal:
            assert file.closed
            return refusal.answer()

    with serving(handle) as http:
        yield http.server_port


def fetched(port: int, name: str, fields: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    """The answer to GET, once HEAD was seen to get the same headers and no body."""
    lines = b"".join(f"{key}: {value}\r\n".encode("latin-1") for key, value in fields.items())
    rest = f" /{name} HTTP/1.1\r\n".encode() + HOST + CLOSE + lines + b"\r\n"
    got = one(exchange(port, b"GET" + rest))
    head = exchange(port, b"HEAD" + rest)
    assert head.endswith(b"\r\n\r\n")
    status, headers, _ = one(head)
    assert (status, {**headers, "date": ""}) == (got[0], {**got[1], "date": ""})
    return got


@pytest.mark.parametrize("value", RANGES, ids=lambda value: value[:30])
def test_a_range_is_answered_with_its_bytes_its_place_and_its_status(file_port, value):
    status, headers, body = fetched(file_port, "11", {"Range": value})
    found = (status, headers.get("content-range"), body if status != 416 else b"")
    assert found == RANGES[value]
    assert status == 416 or int(headers["content-length"]) == len(body)


@pytest.mark.parametrize("fields, wanted", CONDITIONS, ids=str)
def test_a_condition_is_weighed_as_rfc_9110_says(file_port, fields, wanted):
    status, headers, body = fetched(file_port, "11", fields)
    assert status == wanted
    assert body == {200: b"hello world", 206: b"hello", 304: b""}.get(status, body)
    # What is refused says nothing of the file; what is unchanged says which file, not what kind.
    named = {"etag", "last-modified", "cache-control"} & headers.keys()
    assert named == (set() if status == 412 else {"etag", "last-modified", "cache-control"})
    assert ("content-type" in headers, "content-length" in headers) == (status != 304, status != 304)


def test_a_whole_file_names_its_version(file_port):
    status, headers, body = fetched(file_port, "11", {})
    assert (status, body) == (200, b"hello world")
    assert (headers["etag"], headers["last-modified"], headers["accept-ranges"]) == ('"A"', LM, "bytes")


@pytest.mark.parametrize("value", ["bytes=0-", "bytes=0-4", "bytes=-5", "bytes=5-"])
def test_any_range_of_an_empty_file_is_the_whole_of_it(file_port, value):
    status, headers, body = fetched(file_port, "0", {"Range": value})
    assert (status, headers["content-length"], body) == (200, "0", b"")


@pytest.mark.parametrize("has_sendfile", [True, False])
def test_a_large_range_arrives_byte_for_byte_with_the_kernels_help_and_without(
    tmp_path, monkeypatch, has_sendfile
):
    if not has_sendfile:
        monkeypatch.delattr(os, "sendfile", raising=False)
    data = random.Random(1).randbytes(3 * wire.CHUNK_BYTES + 5)
    (tmp_path / "file").write_bytes(data)

    def handle(_handler: wire.Handler, request: wire.Request) -> wire.Answer:
        return wire.file_answer(request, open(tmp_path / "file", "rb"), "A", 0, {})

    with serving(handle) as http:
        answer = exchange(http.server_port, GET + CLOSE + b"Range: bytes=7-\r\n\r\n")
    status, _, body = one(answer)
    assert (status, body) == (206, data[7:])


def test_those_who_take_nothing_of_a_file_keep_it_from_nobody(tmp_path):
    size = 32 << 20  # more than a socket holds
    with open(tmp_path / "file", "wb") as file:
        file.truncate(size)

    def handle(_handler: wire.Handler, request: wire.Request) -> wire.Answer:
        return wire.file_answer(request, open(tmp_path / "file", "rb"), "A", 0, {})

    with serving(handle) as http, contextlib.ExitStack() as idlers:
        for _ in range(2 * wire.SENDERS):
            line = idlers.enter_context(socket.create_connection(("127.0.0.1", http.server_port), timeout=10))
            line.sendall(GET + CLOSE + b"\r\n")
            assert line.recv(12) == b"HTTP/1.1 200"
        assert len(one(exchange(http.server_port, GET + CLOSE + b"\r\n"))[2]) == size


# ---------------------------------------------------------------- answers before files
def entering(turns: wire.Turns) -> threading.Event:
    """Set once a thread that wants a turn has it."""
    entered = threading.Event()

    def enter() -> None:
        with turns:
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    return entered


def test_a_file_waits_until_every_request_that_goes_before_it_is_over(monkeypatch):
    monkeypatch.setattr(wire, "GIVE_WAY_S", 3600.0)
    turns = wire.Turns()
    turns.begin(1)
    turns.begin(2)
    entered = entering(turns)
    turns.end(1)
    assert not entered.wait(0.1)
    turns.end(2)
    assert entered.wait(10)


def test_a_request_goes_before_files_for_its_time_only(monkeypatch):
    monkeypatch.setattr(wire, "GIVE_WAY_S", 3600.0)
    now_s = 0.0
    turns = wire.Turns(lambda: now_s)
    turns.begin(1)
    now_s = 3600.0
    assert entering(turns).wait(10)
    turns.begin(2)
    entered = entering(turns)
    assert not entered.wait(0.1)
    turns.end(2)  # while the first still has no answer
    assert entered.wait(10)


def test_no_more_than_so_many_send_at_once():
    turns = wire.Turns()
    with contextlib.ExitStack() as held:
        for _ in range(wire.SENDERS):
            held.enter_context(turns)
        entered = entering(turns)
        assert not entered.wait(0.1)
    assert entered.wait(10)


@pytest.fixture
def slow_answer(tmp_path: Path) -> Iterator[tuple[wire.HttpServer, threading.Event]]:
    """A server that answers /slow once the event is set, any other GET with a file of 11 bytes;
    it reads the body of a POST, and takes over what asks for /socket."""
    (tmp_path / "file").write_bytes(b"hello world")
    goes_on = threading.Event()

    def handle(handler: wire.Handler, request: wire.Request) -> wire.Answer | None:
        if request.segments == ["slow"]:
            assert goes_on.wait(30)
        if request.segments == ["socket"]:
            handler.hand_over()[0].close()
            return None
        if request.method == "POST" or request.segments == ["slow"]:
            return echo(handler, request)
        return wire.file_answer(request, open(tmp_path / "file", "rb"), "A", 0, {})

    with serving(handle) as http:
        yield http, goes_on
        goes_on.set()


def test_a_request_is_answered_before_the_files_of_others_are_sent(slow_answer, monkeypatch):
    monkeypatch.setattr(wire, "GIVE_WAY_S", 3600.0)
    http, goes_on = slow_answer
    with dial(http.server_port) as asker, dial(http.server_port) as reader:
        asker.sendall(b"GET /slow HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n")
        until(lambda: [peer.phase for peer in http.peers.values()].count("answer"))
        reader.sendall(GET + CLOSE + b"\r\n")
        with pytest.raises(TimeoutError):
            drain(reader, 0.3)
        goes_on.set()
        assert one(drain(asker))[0] == 200
        assert drain(reader).endswith(b"hello world")


OVER = {
    "closed without a word": b"",
    "half a head": GET,
    "malformed": b"GET\r\n\r\n",
    "HEAD": b"HEAD / HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n",
    "half a body": POST + b"Content-Length: 9\r\n\r\nhalf",
    "handed over": b"GET /socket HTTP/1.1\r\n" + HOST + b"\r\n",
}


@pytest.mark.parametrize("sent", OVER.values(), ids=OVER)
def test_a_request_that_is_over_or_gone_keeps_no_file_back(slow_answer, monkeypatch, sent):
    monkeypatch.setattr(wire, "GIVE_WAY_S", 3600.0)
    http, _ = slow_answer
    with dial(http.server_port) as line:
        line.sendall(sent)
        line.shutdown(socket.SHUT_WR)
        drain(line)
    assert exchange(http.server_port, GET + CLOSE + b"\r\n").endswith(b"hello world")


def test_a_kept_connection_goes_first_again_only_with_its_next_request(slow_answer, monkeypatch):
    monkeypatch.setattr(wire, "GIVE_WAY_S", 3600.0)
    http, _ = slow_answer
    with dial(http.server_port) as kept, dial(http.server_port) as reader:
        kept.sendall(POST + b"Content-Length: 0\r\n\r\n")
        assert kept.recv(1000).startswith(b"HTTP/1.1 200")
        reader.sendall(GET + b"\r\n")
        until(lambda: reader.recv(1000).endswith(b"hello world"))
        kept.sendall(GET[:9])
        until(lambda: [peer.phase for peer in http.peers.values()].count("head"))
        reader.sendall(GET + CLOSE + b"\r\n")
        with pytest.raises(TimeoutError):
            drain(reader, 0.3)


@pytest.mark.parametrize(
    "sent",
    [b"", GET, POST + b"Content-Length: 9\r\n\r\nhalf", b"GET /slow HTTP/1.1\r\n" + HOST + b"\r\n"],
    ids=["silent", "half a head", "half a body", "an answer that takes its time"],
)
def test_whoever_is_slow_keeps_no_file_back(slow_answer, sent):
    http, _ = slow_answer
    with dial(http.server_port) as line:
        line.sendall(sent)
        until(lambda: http.peers)
        assert exchange(http.server_port, GET + CLOSE + b"\r\n").endswith(b"hello world")


# ---------------------------------------------------------------- deadlines
@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every deadline small."""
    for name, value in {"HEAD_S": 0.4, "IDLE_S": 0.4, "STALL_S": 0.4, "LINGER_S": 0.2}.items():
        monkeypatch.setattr(wire, name, value)


def seconds_until_closed(line: socket.socket, trickle: bytes = b"") -> float:
    """How long the server keeps the connection while `trickle` is sent every 50 ms."""
    start_s = time.monotonic()
    line.settimeout(0.05)
    while time.monotonic() - start_s < 10:
        try:
            if trickle:
                line.sendall(trickle)
            if not line.recv(1000):
                break
        except TimeoutError:
            pass
        except OSError:
            break
    return time.monotonic() - start_s


@pytest.mark.parametrize("start", [b"", b"GET / HT", GET, GET + b"X: "])
def test_a_head_that_trickles_is_cut_off_by_its_total_deadline(hasty, start):
    with serving() as http, dial(http.server_port) as line:
        line.sendall(start)
        assert seconds_until_closed(line, b"a" if start else b"") < 3
        until(lambda: not http.peers)


def test_a_kept_connection_is_closed_when_it_stays_idle(hasty):
    with serving() as http, dial(http.server_port) as line:
        line.sendall(GET + b"\r\n")
        assert line.recv(1000).startswith(b"HTTP/1.1 200")
        assert 0.2 < seconds_until_closed(line) < 3


@pytest.mark.parametrize("trickle", [b"", b"a"])
def test_a_body_that_stalls_or_trickles_is_cut_off(hasty, trickle):
    with serving() as http, dial(http.server_port) as line:
        line.sendall(posted(b"Content-Length: 90000\r\n", b"a"))
        assert seconds_until_closed(line, trickle) < 3
        until(lambda: not http.peers)


def test_a_body_that_keeps_coming_may_take_longer_than_a_stall(hasty):
    body = b"a" * 8000
    with serving() as http:
        parts = [posted(b"Content-Length: 80000\r\n"), *[body] * 10]
        # 80 kB/s for 1 s: no pause as long as STALL_S, and far above SLOWEST_BYTES_S.
        assert one(exchange(http.server_port, *parts, pause_s=0.1))[0] == 200


def test_an_answer_may_be_waited_for_longer_than_a_body_may_stall(hasty):
    """A page for a reader: sent at once, computed for half a minute."""

    def handle(_handler: wire.Handler, request: wire.Request) -> wire.Answer:
        body = request.body.read(100)
        time.sleep(1.5)  # the reaper looks twice a second
        return wire.Answer(200, {}, body)

    with serving(handle) as http:
        answer = exchange(http.server_port, posted(b"Content-Length: 4\r\n", b"page"))
        assert one(answer)[0::2] == (200, b"page")


def test_an_answer_held_in_memory_may_take_longer_than_a_stall(hasty):
    body = bytes(range(256)) * (16 << 12)  # 16 MiB: more than sockets hold

    def handle(_handler: wire.Handler, _request: wire.Request) -> wire.Answer:
        return wire.Answer(200, {}, body)

    with serving(handle) as http, dial(http.server_port) as line:
        line.sendall(GET + CLOSE + b"\r\n")
        got, start_s = bytearray(), time.monotonic()
        while piece := line.recv(1 << 20):
            got += piece
            time.sleep(0.05)
        assert time.monotonic() - start_s > 2 * wire.STALL_S
    assert got.endswith(body)


@contextlib.contextmanager
def serving_a_file(root: Path) -> Iterator[tuple[wire.HttpServer, list[io.BufferedReader]]]:
    """A server of one file that no socket's buffer holds, and what it opened."""
    (root / "large").write_bytes(bytes(32 << 20))
    opened: list[io.BufferedReader] = []

    def handle(_handler: wire.Handler, request: wire.Request) -> wire.Answer:
        opened.append(open(root / "large", "rb"))
        return wire.file_answer(request, opened[-1], "A", 0, {})

    with serving(handle) as http:
        yield http, opened


def test_a_client_that_never_reads_frees_its_thread_and_file(hasty, tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "SLOWEST_BYTES_S", 64 << 20)
    with serving_a_file(tmp_path) as (http, opened), dial(http.server_port) as line:
        line.sendall(GET + b"\r\n")
        until(lambda: opened and not http.peers)
        assert opened[0].closed


def test_a_client_that_resets_mid_answer_frees_its_thread_and_file(tmp_path):
    with serving_a_file(tmp_path) as (http, opened):
        with dial(http.server_port) as line:
            line.sendall(GET + b"\r\n")
            line.recv(1000)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: opened and not http.peers)
        assert opened[0].closed
        assert one(exchange(http.server_port, GET.replace(b"GET", b"HEAD") + CLOSE + b"\r\n"))[0] == 200


# ---------------------------------------------------------------- cap
def test_at_the_cap_the_oldest_connection_without_a_head_makes_room():
    with serving(cap=3) as http, contextlib.ExitStack() as stack:
        lines = [stack.enter_context(dial(http.server_port)) for _ in range(3)]
        lines[0].sendall(b"GET / HT")
        until(lambda: len(http.peers) == 3)
        assert one(exchange(http.server_port, GET + CLOSE + b"\r\n"))[0] == 200
        assert drain(lines[0]) == b""
        lines[1].sendall(GET + CLOSE + b"\r\n")
        assert one(drain(lines[1]))[0] == 200


def test_at_the_cap_with_every_connection_busy_a_new_one_is_told_503():
    free = threading.Event()

    def handle(handler: wire.Handler, request: wire.Request) -> wire.Answer:
        free.wait(10)
        return echo(handler, request)

    with serving(handle, cap=2) as http, contextlib.ExitStack() as stack:
        lines = [stack.enter_context(dial(http.server_port)) for _ in range(2)]
        for line in lines:
            line.sendall(GET + CLOSE + b"\r\n")
        until(lambda: [peer.phase for peer in http.peers.values()] == ["answer", "answer"])
        status, headers, body = one(exchange(http.server_port, GET + b"\r\n"))
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert headers["content-type"] == "application/problem+json" and b'"code":"BUSY"' in body
        free.set()
        assert [one(drain(line))[0] for line in lines] == [200, 200]


def test_those_turned_away_are_let_go_in_the_end(hasty):
    with serving(cap=0) as http, contextlib.ExitStack() as stack:
        lines = [stack.enter_context(dial(http.server_port)) for _ in range(5)]
        assert [one(drain(line))[0] for line in lines] == [503] * 5
        until(lambda: not http._refused)


def test_two_hundred_half_requests_do_not_keep_a_good_one_waiting(monkeypatch):
    monkeypatch.setattr(wire, "HEAD_S", 60.0)  # it must not be their own end that makes room
    before = threading.active_count()
    with serving(cap=100) as http, contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(dial(http.server_port)).sendall(b"G")
        start_s = time.monotonic()
        assert one(exchange(http.server_port, GET + CLOSE + b"\r\n"))[0] == 200
        assert time.monotonic() - start_s < 10
        until(lambda: len(http.peers) <= 100)
    until(lambda: threading.active_count() <= before)


def test_below_the_cap_nobody_is_refused():
    with serving(cap=60) as http:
        found: list[int] = []
        ask = lambda: found.append(one(exchange(http.server_port, GET + CLOSE + b"\r\n"))[0])  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [200] * 60


def test_stopping_ends_every_connection():
    with serving() as http, dial(http.server_port) as line:
        line.sendall(GET + b"\r\n")
        line.recv(1000)
        until(lambda: http.peers)
        http.stop()
        assert drain(line) == b""
        with pytest.raises(ConnectionRefusedError):
            dial(http.server_port)


# ---------------------------------------------------------------- the rest
def test_a_socket_is_handed_over_with_the_bytes_already_read():
    taken: list[tuple[socket.socket, bytes]] = []

    def handle(handler: wire.Handler, _request: wire.Request) -> None:
        taken.append(handler.hand_over())

    with serving(handle) as http, dial(http.server_port) as line:
        line.sendall(GET + b"\r\nfirst")
        until(lambda: taken and not http.peers)
        sock, buffered = taken[0]
        line.sendall(b"second")
        sock.settimeout(5)
        assert (buffered, sock.recv(100)) == (b"first", b"second")
        sock.sendall(b"answer")
        assert line.recv(100) == b"answer"
        sock.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it looks twice a second")
def test_a_server_ends_without_waiting_for_its_next_look(monkeypatch):
    look = wire.HttpServer.serve_forever
    monkeypatch.setattr(wire.HttpServer, "serve_forever", lambda self: look(self, 60.0))
    began_s = time.monotonic()
    with serving(lambda *_: None):
        pass
    assert time.monotonic() - began_s < 30


def test_a_refusal_is_a_problem_that_names_the_fields():
    answer = wire.Refused(422, "CODE", "detail", {"X": "y"}, [("a.b", "wrong")]).answer()
    assert (answer.status, answer.headers) == (422, {"Content-Type": "application/problem+json", "X": "y"})
    assert answer.body == (
        b'{"type":"about:blank","title":"Unprocessable Entity","status":422,"detail":"detail",'
        b'"code":"CODE","errors":[{"field":"a.b","message":"wrong"}]}\n'
    )


def test_the_service_withstands_the_hostile_http_cases(tmp_path):
    require(HTTP_CASES.is_file(), f"{HTTP_CASES} is not there")
    command = [sys.executable, str(HTTP_CASES), "--get", "/health", "--post", "/jobs", "--ws", "/ws/jobs"]
    subprocess.run([*command, "--emit", str(tmp_path / "cases.json")], check=True, timeout=60)
    names = {case["id"] for case in json.loads((tmp_path / "cases.json").read_text())}
    with still(tmp_path / "root") as service:
        command += ["--run", f"127.0.0.1:{service.http.server_port}"]

        def told(share: list[str]) -> str:
            chosen = [word for name in share for word in ("--only", name)]
            done = subprocess.run(
                [*command, *chosen], capture_output=True, text=True, timeout=300, check=False
            )
            return done.stdout

        with ThreadPoolExecutor(4) as threads:  # nearly all of a case is a wait
            shares = [sorted(names)[n::4] for n in range(4)]
            for share, result in zip(shares, threads.map(told, shares), strict=True):
                assert result == f"{len(share)} passed, 0 failed\n"
        assert service.table.counts() == dict.fromkeys(("PENDING", "RUNNING", "SUCCESS", "FAILED"), 0)
