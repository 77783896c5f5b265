"""Hostile HTTP/1.1 for fuzz.py: requests by grammar and by mutation, and what may answer them.

Map: World, Case - reading (how many requests a strict reader finds) - answers and their rules -
     pieces of requests - kinds of cases - make
Rule: a case depends on the seed, its index and the World's names alone, so it can be sent again.
Nothing of the service is imported: a reader that shared its parser would share its faults.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

AUTH = b"\r\nAuthorization: Bearer "
HOLE = b"@" * 20  # stands for the token while a request is mutated
SUBMIT_PATHS = ("one.zip", "incoming/one.zip", "pages")


class Violation(Exception):
    """The service did what no input may make it do."""


@dataclass(frozen=True)
class World:
    """What the service under test holds; ids have one length, so that cases don't depend on them."""

    port: int
    token: str
    finished: str  # a job with artifact, pages and a preview
    partly: str  # finished, one page carried because it failed
    running: str
    etag: str  # of the finished job's artifact
    victims: tuple[str, ...]  # PENDING ones, free to be cancelled and deleted
    secrets: tuple[str, ...]  # texts that no answer may hold
    routes: tuple[tuple[str, str, tuple[str, ...]], ...] = ()  # method, path, names in the query


@dataclass(frozen=True)
class Case:
    """What is sent over one connection. meant: (method, whether it must be answered) of each
    request that a strict reader finds in it, at most."""

    kind: str
    data: bytes
    meant: tuple[tuple[str, bool], ...]
    requests: int  # as the generator counts them
    cuts: tuple[int, ...] = ()  # places at which it is sent in parts
    drop: bool = False  # reset right after sending


# ---------------------------------------------------------------- a strict reader
def reading(data: bytes) -> tuple[tuple[str, bool], ...]:
    """The requests that RFC 9112 finds in these bytes; after one that ends the connection, none.

    A service may be stricter and stop earlier. One that finds more was smuggled something.
    """
    found: list[tuple[str, bool]] = []
    at = 0
    while at < len(data):
        at += 2 * data.startswith(b"\r\n", at)
        end = data.find(b"\r\n\r\n", at)
        head = data[at : end if end >= 0 else len(data)]
        method = head.split(b" ", 1)[0].decode("latin-1")
        if end < 0:
            return (*found, (method, False))
        size, last = _framing(head)
        at = end + 4
        if size == "chunked":
            at, whole = _skip_chunks(data, at)
        else:
            at, whole = at + int(size), at + int(size) <= len(data)
        found.append((method, whole))
        if last or not whole:
            break
    return tuple(found)


def _framing(head: bytes) -> tuple[int | str, bool]:
    """(bytes of the body or "chunked", whether the connection must end with this request)."""
    line, *lines = head.split(b"\r\n")
    fields = [
        (name.strip().lower(), value.strip(b" \t")) for name, _, value in (t.partition(b":") for t in lines)
    ]
    lengths = [value for name, value in fields if name == b"content-length"]
    codings = [value.lower() for name, value in fields if name == b"transfer-encoding"]
    version = line.rsplit(b" ", 1)[-1]
    bare = b"\n" in head.replace(b"\r\n", b"") or b"\r" in head.replace(b"\r\n", b"")
    if bare or version not in (b"HTTP/1.0", b"HTTP/1.1") or (lengths and codings) or len(lengths) > 1:
        return 0, True
    if codings:
        return ("chunked", False) if codings == [b"chunked"] and version == b"HTTP/1.1" else (0, True)
    if lengths and not re.fullmatch(rb"[0-9]{1,15}", lengths[0]):
        return 0, True
    options = b",".join(value.lower() for name, value in fields if name == b"connection").split(b",")
    closes = b"close" in [option.strip() for option in options]
    return int(lengths[0]) if lengths else 0, version == b"HTTP/1.0" or closes


def _skip_chunks(data: bytes, at: int) -> tuple[int, bool]:
    """(where the body ends, whether it is whole and well formed)."""
    while match := re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n").match(data, at):
        size, at = int(match[1], 16), match.end()
        if size == 0:
            end = at - 2 if data.startswith(b"\r\n", at) else data.find(b"\r\n\r\n", at)
            return (end + 4, True) if end >= 0 else (len(data), False)
        if data[at + size : at + size + 2] != b"\r\n":
            break
        at += size + 2
    return len(data), False


# ---------------------------------------------------------------- answers
STATUSES = {200, 201, 202, 204, 206, 304, 400, 401, 403, 404, 405, 409, 410, 412, 413, 414, 415, 416}
STATUSES |= {421, 422, 426, 431, 501, 503, 505, 507}
WHY_5XX = {501: {"CODING"}, 503: {"NO_PREVIEW", "TOO_MANY", "BUSY"}, 505: {"VERSION"}, 507: {"DISK_FULL"}}
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ([\t -~\x80-\xff]*)")


@dataclass(frozen=True)
class Answer:
    """One answer as a client reads it; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


def read_answer(data: bytes, is_head: bool) -> tuple[Answer, bytes] | None:
    """The first answer and the bytes behind it; None while it is not whole. Raises Violation."""
    head, gap, rest = data.partition(b"\r\n\r\n")
    if not gap:
        return None
    line, *lines = head.split(b"\r\n")
    match = re.fullmatch(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [A-Za-z' -]+", line)
    if not match:
        raise Violation(f"not a status line: {line[:80]!r}")
    headers: dict[str, str] = {}
    for text in lines:
        found = FIELD.fullmatch(text)
        if not found or found[1].lower().decode() in headers:
            raise Violation(f"not a header field, or there twice: {text[:80]!r}")
        headers[found[1].lower().decode()] = found[2].decode("latin-1")
    status = int(match[1])
    if status < 200 or status in (204, 304):
        if "content-length" in headers:
            raise Violation(f"{status} with a Content-Length")
        return Answer(status, headers, b""), rest
    if not re.fullmatch(r"[0-9]+", headers.get("content-length", "")):
        raise Violation(f"{status} without a Content-Length")
    size = 0 if is_head else int(headers["content-length"])
    return (Answer(status, headers, rest[:size]), rest[size:]) if len(rest) >= size else None


def judge(case: Case, data: bytes, world: World) -> list[Answer]:
    """All answers to a case, final ones. Raises Violation for what no input may lead to."""
    found: list[Answer] = []
    whole, left = data, list(case.meant)
    while data:
        read = read_answer(data, is_head=bool(left) and left[0][0] == "HEAD")
        if read is None:
            raise Violation(f"the answer breaks off: {data[:200]!r}")
        answer, data = read
        if answer.status == 100:
            if b"100-continue" not in case.data.lower():
                raise Violation("100 Continue, though nobody asked")
            continue
        if not left:
            raise Violation(f"{len(found) + 1} answers to {len(case.meant)} requests; the last: {answer}")
        method, _ = left.pop(0)
        check_answer(answer, method)
        found.append(answer)
        if answer.status == 101:
            break
        if answer.headers.get("connection") == "close":
            if data:
                raise Violation(f"bytes after the last answer: {data[:200]!r}")
            left.clear()
    if any(must for _, must in left) and not (found and found[-1].status == 101):
        raise Violation(f"{len(found)} answers, {len(left)} requests were left without one")
    check_secrets(whole, world)
    return found


def check_answer(answer: Answer, method: str) -> None:
    """The rules for one answer. Raises Violation."""
    status = answer.status
    if status == 101:
        return
    if status not in STATUSES:
        raise Violation(f"status {status}: {answer.body[:300]!r}")
    media = answer.headers.get("content-type", "")
    if status >= 400:
        if media != "application/problem+json":
            raise Violation(f"{status} as {media!r}")
        if method == "HEAD":
            return
        problem = loads(answer.body)
        if not isinstance(problem, dict) or problem.get("status") != status:
            raise Violation(f"{status} is told as {answer.body[:200]!r}")
        if not all(
            problem.get(name) and isinstance(problem[name], str) for name in ("title", "detail", "code")
        ):
            raise Violation(f"{status} without title, detail or code: {answer.body[:200]!r}")
        if status >= 500 and problem["code"] not in WHY_5XX[status]:
            raise Violation(f"{status} {problem['code']}: {problem['detail']}")
    elif media == "application/json" and method != "HEAD":
        loads(answer.body)


def check_secrets(data: bytes, world: World) -> None:
    """No answer tells of the machine. Raises Violation."""
    for secret in world.secrets:
        if secret.encode() in data:
            raise Violation(f"the answer holds {secret!r}: {data[:300]!r}")


def loads(data: bytes) -> Any:
    """Strict JSON. Raises Violation."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise Violation(f"not JSON ({error}): {data[:200]!r}") from error


def is_well_formed(body: dict[str, Any]) -> bool:
    """Whether a POST /jobs body keeps the README's rules: only such a one may make a row."""
    source, params = body.get("input"), body.get("params") or {}
    if not isinstance(source, dict) or not isinstance(params, dict):
        return False
    for text in (body.get("title"), body.get("volume")):
        if not isinstance(text, str) or not text.strip() or len(text) > 300:
            return False
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
            return False
    path = str(source.get("path")).replace("\\", "/")
    names = [part for part in path.split("/") if part not in ("", ".")]
    kind = {("one.zip",): "zip", ("pages",): "folder"}.get(tuple(names[names[:1] == ["incoming"] :]))
    if ".." in names or path.startswith("/") or kind is None or source.get("type") != kind:
        return False
    return all(_is_param(name, value) for name, value in params.items())


def _is_param(name: str, value: Any) -> bool:
    name = re.sub("_(.)", lambda match: match[1].upper(), name)
    ranges = {"scale": (1, 4), "jpegQuality": (1, 100), "tileSize": (32, 1024), "tilePad": (0, 128)}
    ranges |= {"batchSize": (1, 16), "targetWidth": (16, 65500), "targetHeight": (16, 65500)}
    choices = {"denoise": "low medium high", "outputFormat": "jpg png webp", "device": "auto cuda cpu"}
    choices |= {"color": "auto gray keep", "reduction": "auto lanczos area"}
    if name in ranges:
        if value is None:
            return name not in ("scale", "jpegQuality")
        return type(value) is int and ranges[name][0] <= value <= ranges[name][1]
    return value in choices[name].split() if name in choices else name != "model" or isinstance(value, str)


# ---------------------------------------------------------------- pieces
@dataclass(frozen=True)
class Draft:
    """A request before it becomes bytes; None as body: no framing at all."""

    method: str
    target: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    body: bytes | None = None
    version: bytes = b"HTTP/1.1"
    chunks: tuple[int, ...] = ()  # sizes in which the body is sent; none: with a length
    route: str = ""


def render(draft: Draft) -> bytes:
    """The bytes of a draft."""
    lines = [draft.method.encode("latin-1") + b" " + draft.target + b" " + draft.version]
    lines += [name + b": " + value for name, value in draft.fields]
    body = draft.body or b""
    if draft.chunks:
        lines.append(b"Transfer-Encoding: chunked")
        body = chunked(body, draft.chunks)
    elif draft.body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(body: bytes, sizes: Sequence[int]) -> bytes:
    """A body in chunks of these sizes, then of the last one."""
    data, at, n = b"", 0, 0
    while at < len(body):
        piece = body[at : at + sizes[min(n, len(sizes) - 1)]]
        data += b"%x\r\n%s\r\n" % (len(piece), piece)
        at, n = at + len(piece), n + 1
    return data + b"0\r\n\r\n"


# fmt: off
INNER = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
NUMBERS = [
    "0", "-1", "1", "007", "2.5", "1e9", "0x10", "+1", "١", "9" * 19, "9" * 400, "", " 1", "NaN", "null",
]
DOTS = [
    "..", ".", "...", "%2e%2e", "%2E.", ".%2e", "..%2f..%2fetc%2fpasswd", "..%5c..%5cwin.ini", "%252e%252e",
]
SEGMENTS = [
    "%00", "a%00.zip", "%0d%0aX:%201", "%0a", "%7f", "%ff", "%c0%ae%c0%ae", "%", "%z", "%4", "%u0041", "",
    "\\", "..\\..", "CON", "nul.png", "a:b", "C:", "~", "~root", "*", "?", "#", ";x=1", "a;b", "$(id)", "'--",
    "%27%20OR%201=1--", "<script>", "%3Cscript%3E", "a" * 300, "%E4%BD%9C" * 100, "%F0%9F%98%80", "%E2%80%AE",
    "%EF%BC%8E%EF%BC%8E", "incoming", "jobs.sqlite3", "token", "lock", ".hidden", "x.tmp", "%ED%A0%80",
    "%F4%90%80%80", "a%2fb", "%2f", "%5c", "{id}", "smuggled", "%EF%BB%BF", "x" * 4000,
]
TARGETS = [
    b"", b"*", b"/", b"//", b"///", b"//evil.example/", b"localhost:80", b"http://localhost/health",
    b"http://localhost", b"HTTP://LOCALHOST/jobs", b"https://localhost/health", b"http://evil.example/health",
    b"http://user@localhost/", b"http:/health", b"http://", b"http://localhost:99999999/",
    b"http://[::1]/health", b"/health?", b"/health?a=%00&b=%ff", b"/health#x", b"/jobs?limit=1&limit=2",
    b"/jobs?" + b"a=1&" * 1500, b"/jobs?q=" + b"%E4%BD%9C" * 500, b"/jobs?q=%25%5F%5C", b"/jobs?q='%00",
    b"/jobs?=&&==", b"/jobs?q[]=1", b"/\xe6\xbc\xab", b"/health\x00", b"/he alth", b"/health\t",
    b"/" + b"a" * 8170, b"/" + b"a/" * 4000,
]
METHODS = [
    "HEAD", "OPTIONS", "TRACE", "CONNECT", "PATCH", "PUT", "POST", "get", "M-SEARCH", "PRI", "X" * 300,
    "GE\tT", "", "\xff", "G\0T",
]
VERSIONS = [
    b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.10", b"HTTP/1.2", b"http/1.1", b"HTTP/1.1 ", b"",
    b"HTTP/11", b"HTTP/1.1\t", b"HTTPS/1.1", b"HTTP/1,1", b"RTSP/1.0",
]
ODD_FIELDS: list[bytes] = [
    b"Host: evil.example", b"Host: localhost", b"Host:", b"Host: localhost:99999999", b"Host: a@b",
    b"Host: [::1", b"Connection: close", b"Connection: keep-alive, close", b"Connection: Content-Length",
    b"Connection: \xff", b"Expect: 100-continue", b"Expect: 100-Continue", b"Expect: 200-ok", b"Expect:",
    b"Upgrade: h2c", b"Upgrade: websocket", b"Upgrade: websocket\r\nConnection: Upgrade", b"Range: bytes=0-4",
    b"Range: bytes=-5", b"Range: bytes=99999999-", b"Range: bytes=0-0,-1", b"Range: bytes=--1",
    b"Range: items=0-1", b"Range: bytes=5-2", b"Range: bytes=" + b"9" * 60 + b"-",
    b"Range: bytes=0-\r\nRange: bytes=1-", b'If-None-Match: "x"', b"If-None-Match: *",
    b"If-None-Match: " + b'W/"' * 200, b'If-Match: "x"', b"If-Match: *", b'If-Match: "a", "b"',
    b'If-Range: "x"', b"If-Range: Tue, 14 Nov 2023 22:13:20 GMT", b"If-Range: \xff",
    b"If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT", b"If-Modified-Since: 99999999999999999999",
    b"If-Unmodified-Since: Fri, 32 Foo 99999 99:99:99 +9999", b"If-Modified-Since: " + b"1 " * 500,
    b"Origin: null", b"Origin: https://evil.example", b"Origin: tauri://localhost",
    b"Origin: " + b"\xff" * 40, b"Sec-Fetch-Site: cross-site", b"Referer: https://evil.example/",
    b"X-Forwarded-For: 127.0.0.1", b"Content-Type: text/plain", b"Content-Type: application/json",
    b"Content-Type: application/json;charset=utf-16", b"Content-Type: multipart/form-data; boundary=x",
    b"Content-Type: \x80", b"Content-Encoding: gzip", b"Authorization: Basic YTpi", b"Authorization: Bearer",
    b"Authorization: Bearer " + b"x" * 4000, b"Authorization: \xff", b"Cookie: reichan_session=" + b"0" * 64,
    b"Cookie: " + b"a=b; " * 1000, b"Cookie: reichan_session=\xff\xfe", b"Idempotency-Key: k",
    b"Idempotency-Key: " + b"k" * 256, b"Idempotency-Key: \xe4\xbd\x9c", b"Idempotency-Key:",
    b"Repr-Digest: sha-256=:AAAA:", b"Repr-Digest: sha-256=x", b"Repr-Digest: md5=:AA==:",
    b"Repr-Digest: sha-256=:\xff:", b"X-Reichan-Title: \xe4\xbd\x9c\xe5\x93\x81",
    b"X-HTTP-Method-Override: DELETE", b"X-Original-URL: /../token", b"X\0Y: 1", b"X Y: 1", b": 1", b"X",
    b"X :1", b" X: 1", b"X: 1\r\n folded", b"X: a\rb", b"X: a\nb", b"X: \x7f\x01", b"X: \xff\xfe\x80", b"X:",
    b"X:1", b"X" * 8300 + b": 1", b"X: " + b"v" * 8300, b"(X): 1", b"X: 1\r\n" * 120,
    (b"X: " + b"v" * 7000 + b"\r\n") * 10, b"Trailer: X", b"TE: trailers", b"Max-Forwards: 0", b"Via: 1.1 x",
]
LENGTHS = [
    b"+2", b"-1", b"0x2", b"2, 2", b"2,2", b"", b"2 2", b"1e3", b"1" + b"0" * 20, b"1_0", "２".encode(),
    b"00000002", b"2\x0b", b"2;", b"999999999999999", b"17179869185", b"0",
]
CODINGS = [
    b"Chunked", b"chunked ", b"xchunked", b"chunked, chunked", b"gzip, chunked", b"identity", b"\x0bchunked",
    b"chunked;q=1", b"", b"chunked\x00", b'"chunked"', b"chunked,", b"chunked, identity",
]
SIZES = [
    b"0x2", b"+2", b"-2", b" 2", b"2 ", b"2;a=b", b"2;", b'2;a="\r\n"', b"02", b"0" * 15 + b"2", b"F" * 16,
    b"G", b"", b"2\n", b"2\r", b"2_0", b"1", b"3", b"2;" + b"x" * 300, b"7FFFFFFFFFFFFFFF", b"2\t", b"2\0",
]
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b"\xff\xfe", b"\r\n\r\n", b": ", b" HTTP/1.1\r\n", b"Content-Length: 5\r\n",
    b"%2e%2e/", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b"GET / HTTP/1.1\r\n", b"HEAD ", b"{", b'"',
    b"9" * 40, b"\xc0\xae", b"..", b"/", b"\\", b"%00", b"%", b"?", b"#", b";", b",", b" ", b"\t", b"\x1b[2J",
    b"\xed\xa0\x80", INNER,
]
# fmt: on


# ---------------------------------------------------------------- valid requests
def fill(r: random.Random, world: World, path: str, method: str) -> bytes:
    """A route's path with its variables filled in."""
    shared = (world.finished, world.finished, world.partly, world.running)
    changes = method == "DELETE" or path.endswith(("/cancel", "/resume"))
    job = r.choice(world.victims if changes or r.random() < 0.15 else shared)
    if r.random() < 0.05:
        job = "00000000-0000-0000-0000-000000000000"
    name = f"{r.choice(['up', 'Ordner/ä', 'a/b/c'])}-{r.randrange(20)}.{r.choice(['zip', 'png'])}"
    if r.random() < 0.1:
        climbing = ["..%2fclimbs.zip", "a/%2e%2e/%2e%2e/climbs.zip"]
        # File or folder? And what must stay inside incoming/.
        name = r.choice(["a", "a/b", "both", "both/x", "both/x/y", "up-1.zip/x.png", *climbing])
    quoted = "".join(c if c.isascii() else "".join(f"%{b:02X}" for b in c.encode()) for c in name)
    values = {"{id}": job, "{n}": r.choice("11112239"), "{path}": quoted}
    for hole, value in values.items():
        path = path.replace(hole, value)
    return path.encode()


def submission(r: random.Random) -> dict[str, Any]:
    """A POST /jobs body that the service takes."""
    path = r.choice(SUBMIT_PATHS)
    body: dict[str, Any] = {
        "title": r.choice(["作品名", "A title", "x" * 300, "<script>", "é"]),
        "volume": r.choice(["01", "第1巻"]),
        "input": {"type": "folder" if path == "pages" else "zip", "path": path},
    }
    if r.random() < 0.8:
        body["params"] = {"model": "realesr-animevideov3", "scale": r.randint(1, 4), "outputFormat": "png"}
    if r.random() < 0.2:
        body["manifest"] = {"version": 1, "files": [{"source": "a", "target": "1.png"}]}
    return body


QUERY_VALUES: dict[str, list[str]] = {
    "status": ["SUCCESS", "PENDING", "nothing", ""],
    "q": ["a", "%25", "%E4%BD%9C", ""],
    "limit": ["1", "500", *NUMBERS],
    "cursor": ["5", *NUMBERS],
    "w": ["64", "64", "16", "4096", *NUMBERS],
    "after": ["0", *NUMBERS],
}


def valid(r: random.Random, world: World) -> Draft:
    """A request of one of the service's routes, as a well-behaved client sends it."""
    # The only upload is one route of many, and the one that writes where a client says.
    kind = r.choice(["POST", "PUT"])
    busy = [route for route in world.routes if route[0] == kind]
    method, path, query = r.choice(busy if busy and r.random() < 0.2 else world.routes)
    target = fill(r, world, path, method)
    if query and r.random() < 0.6:
        names = r.sample(query, r.randint(1, len(query)))
        pairs = [f"{name}={r.choice(QUERY_VALUES.get(name, NUMBERS))}".replace(" ", "+") for name in names]
        target += b"?" + "&".join(pairs).encode("ascii", "ignore")
    fields = [(b"Host", b"localhost"), (b"Authorization", b"Bearer " + HOLE)]
    body: bytes | None = None
    if method == "POST" and path in ("/jobs", "/jobs/{id}/resume"):
        fields.append((b"Content-Type", b"application/json"))
        value = submission(r) if path == "/jobs" else {"inputPath": "one.zip", "inputType": "zip"}
        body = json.dumps(value, ensure_ascii=r.random() < 0.5).encode()
    elif method == "PUT":
        body = r.randbytes(r.choice([0, 1, 300, 300, 5000]))
    if path.startswith("/ws"):
        key = b"AAAAAAAAAAAAAAAAAAAAAA=="
        fields += [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")]
        fields += [(b"Sec-WebSocket-Key", key), (b"Sec-WebSocket-Version", b"13")]
    if method == "GET" and r.random() < 0.15:
        method = "HEAD"
    chunks = (r.choice([1, 7, 100, 10_000]),) if body is not None and r.random() < 0.3 else ()
    return Draft(method, target, tuple(fields), body, chunks=chunks, route=path)


def posted(r: random.Random, world: World) -> Draft:
    """A valid request with a body."""
    body = json.dumps(submission(r)).encode() if r.random() < 0.4 else INNER
    fields = ((b"Host", b"localhost"), (b"Authorization", b"Bearer " + HOLE))
    return Draft("POST", b"/jobs", (*fields, (b"Content-Type", b"application/json")), body)


# ---------------------------------------------------------------- kinds
def as_it_is(r: random.Random, world: World) -> bytes:
    """A valid request."""
    return render(valid(r, world))


def mutated(r: random.Random, world: World) -> bytes:
    """A valid request after byte flips, cuts, insertions, repetitions and splices."""
    data = bytearray(render(valid(r, world)))
    for _ in range(r.choice([1, 1, 1, 2, 3, 6])):
        a = r.randrange(len(data) + 1)
        b = min(len(data), a + r.choice([1, 2, 5, 20, 100]))
        change = r.randrange(7)
        if change == 0 and a < len(data):
            data[a] ^= 1 << r.randrange(8)
        elif change == 1 and a < len(data):
            data[a] = r.randrange(256)
        elif change == 2:
            del data[a:b]
        elif change == 3:
            data[a:a] = data[a:b] * r.choice([1, 1, 2, 30])
        elif change == 4:
            data[a:a] = r.choice(TOKENS)
        elif change == 5:
            data[a:b] = r.randbytes(r.choice([1, 4, 50]))
        else:
            other = render(valid(r, world))
            data[a:] = other[r.randrange(len(other)) :]
        if not data:
            break
    return bytes(data[: r.randrange(len(data) + 1)] if r.random() < 0.1 else data)


def odd_fields(r: random.Random, world: World) -> bytes:
    """A valid request with fields that don't belong there, or twice, or none at all."""
    head, gap, body = render(valid(r, world)).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    for _ in range(r.choice([1, 1, 2, 4])):
        change = r.random()
        at = r.randint(1, len(lines))
        if change < 0.75:
            lines.insert(at, r.choice(ODD_FIELDS))
        elif change < 0.85:
            lines.insert(at, lines[r.randrange(len(lines))])
        elif change < 0.95 and len(lines) > 1:
            del lines[r.randrange(1, len(lines))]
        else:
            at = r.randrange(len(lines))
            lines[at] = r.choice([bytes.upper, bytes.lower, bytes.swapcase])(lines[at])
    return b"\r\n".join(lines) + gap + body


def framed(r: random.Random, world: World) -> bytes:
    """Lengths and codings that contradict each other or themselves, bodies that look like requests."""
    draft = posted(r, world)
    body = draft.body or b""
    head = render(replace(draft, body=None))[:-2]  # without the empty line
    length, coding = b"Content-Length: %d\r\n" % len(body), b"Transfer-Encoding: chunked\r\n"
    chunks = chunked(body, (r.choice([1, 5, 1000]),))
    size = r.choice(SIZES)
    odd_chunk = size + b"\r\n" + r.choice([b"{}", INNER]) + r.choice([b"\r\n", b"", b"\n"]) + b"0\r\n\r\n"
    trailers = r.choice(
        [b"X: 1\r\n", b"Content-Length: 5\r\n", b"bad\r\n", b"X: 1\r\n" * 120, b"\n", b"X: " + b"a" * 9000]
    )
    shapes: list[Callable[[], bytes]] = [
        lambda: length + coding + r.choice([b"\r\n" + chunks, b"\r\n0\r\n\r\n" + INNER]),
        lambda: coding + length + b"\r\n" + chunks,
        lambda: length + length + b"\r\n" + body,
        lambda: length + b"Content-Length: %d\r\n\r\n" % r.randrange(60) + body,
        lambda: b"Content-Length: " + r.choice(LENGTHS) + b"\r\n\r\n" + r.choice([b"{}", body, INNER]),
        lambda: b"Transfer-Encoding: " + r.choice(CODINGS) + b"\r\n\r\n" + chunks,
        lambda: coding + coding + b"\r\n" + chunks,
        lambda: coding + b"\r\n" + odd_chunk + r.choice([b"", INNER]),
        lambda: coding + b"\r\n" + chunks[:-2] + trailers + b"\r\n",
        lambda: coding + b"\r\n" + chunks[: r.randrange(len(chunks))],
        lambda: coding + b"\r\n" + b"%x\r\n%s\r\n0\r\n\r\n" % (len(INNER), INNER),
        lambda: b"Content-Length: %d\r\n\r\n" % (len(body) + r.choice([-5, -1, 1, 50])) + body,
        lambda: b"Expect: 100-continue\r\n" + length + b"\r\n" + r.choice([body, b"", body[:3]]),
        lambda: b"\r\n" + body,
    ]
    data = head + r.choice(shapes)()
    if r.random() < 0.2:
        data = data.replace(
            b"POST /jobs", r.choice([b"GET /health", b"PUT /incoming/framed.zip", b"HEAD /health"]), 1
        )
    return data


def odd_target(r: random.Random, world: World) -> bytes:
    """Dot segments and odd spellings in every place of every route; targets that are no path."""
    draft = valid(r, world)
    if r.random() < 0.3:
        return render(replace(draft, target=r.choice(TARGETS)))
    path, mark, query = draft.target.partition(b"?")
    parts = path.split(b"/")
    for _ in range(r.choice([1, 1, 2])):
        at = r.randrange(1, len(parts) + 1)
        segment = r.choice(DOTS if r.random() < 0.4 else SEGMENTS + NUMBERS).encode("utf-8", "surrogatepass")
        parts[at : at + r.randint(0, 1)] = [segment] * r.choice([1, 1, 1, 5])
    if r.random() < 0.2:
        query = b"&".join(
            f"{r.choice([*QUERY_VALUES])}={r.choice(NUMBERS + SEGMENTS)}".encode() for _ in range(3)
        )
        mark = b"?"
    target = b"/".join(parts) + mark + query
    return render(replace(draft, target=(b"http://localhost" if r.random() < 0.1 else b"") + target))


def odd_line(r: random.Random, world: World) -> bytes:
    """Methods and versions that nobody speaks."""
    draft = valid(r, world)
    if r.random() < 0.6:
        draft = replace(draft, method=r.choice(METHODS))
    if r.random() < 0.6:
        draft = replace(draft, version=r.choice(VERSIONS))
    return r.choice([b"", b"", b"\r\n", b"\r\n\r\n", b" "]) + render(draft)


# fmt: off
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2.5, 1e308, 2**63, 10**30, "", " ", "\0", "\u202e", "..", "x" * 5000,
    "../../etc/passwd", "/etc/passwd", "C:\\x", "a\nb", "\ufeff", [], {}, [[]], [None], {"": {}}, "２", "CON",
    "🀄",  # in a path: nothing that was uploaded is called so
]
RAW = [
    b"NaN", b"Infinity", b"-0", b"1e999", b"9" * 5000, b'"\\ud800"', b'"\\u0000"', b"[" * 3000, b"\xff",
    b"'x'", b"{}{}", b"", b"01", b"0x1", b"nul", b'"\x01"', b"// x", b'{"a":1,}', b'{"title":1,"title":"x"}',
    b"{" * 100 + b"}" * 100,
]
# fmt: on


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(value, key), *places(inner)]]


def odd_json(r: random.Random, world: World) -> bytes:
    """A body that is JSON of another shape, or almost JSON."""
    draft = posted(r, world)
    value = submission(r)
    for _ in range(r.choice([1, 1, 2, 3])):
        holder, key = r.choice(places(value) or [({}, "")])
        change = r.randrange(4)
        if change == 0:
            holder[key] = r.choice(VALUES)
        elif change == 1 and holder:
            del holder[key]
        elif change == 2 and isinstance(holder, dict):
            holder[r.choice(["tile_size", "jpegQuality", "denoise", "color", "x", ""])] = r.choice(VALUES)
        elif holder:
            holder[key] = {"a": holder[key]}
    body = json.dumps(value, ensure_ascii=r.random() < 0.5).encode("utf-8", "surrogatepass")
    if r.random() < 0.3:
        at = r.randrange(len(body) + 1)
        body = r.choice(
            [r.choice(RAW), body[:at], body[:at] + r.choice(RAW) + body[at:], b"\xef\xbb\xbf" + body]
        )
    elif r.random() < 0.03:
        body = json.dumps(value).encode("utf-16")
    if r.random() < 0.2:
        draft = replace(
            draft, target=b"/jobs/%s/resume" % world.victims[r.randrange(len(world.victims))].encode()
        )
    return render(replace(draft, body=body))


def leaky(r: random.Random, world: World) -> bytes:
    """The real token in a field that is spelt wrong: neither answer nor log may repeat it."""
    token = world.token.encode()
    line = r.choice(
        [b"Authorization : Bearer ", b"Author\0ization: ", b" Bearer ", b"Authorization\t:", b"\xffX: "]
    )
    return b"GET /jobs HTTP/1.1\r\nHost: localhost\r\n" + line + token + b"\r\n\r\n"


def conditional(r: random.Random, world: World) -> bytes:
    """A download with conditions and ranges, right, wrong and contradictory."""
    path = r.choice(["artifact", "artifact", "pages/1/after", "pages/1/before", "pages/1/after?w=64"])
    tag = r.choice(['"%s"', "%s", 'W/"%s"', '"x", "%s"']) % r.choice([world.etag, world.etag[:9], "*"])
    date = r.choice(
        [
            "Thu, 01 Jan 1970 00:33:20 GMT",
            "Thu, 01 Jan 1970 00:33:19 GMT",
            "now",
            "Thu, 01 Jan 2099 00:00:00 GMT",
        ]
    )
    first, last = (r.choice(["", "0", "5", "102399", "102400", "9" * 30]) for _ in range(2))
    fields = [
        f"Range: bytes={first}-{last}",
        r.choice([f"If-None-Match: {tag}", f"If-Match: {tag}", f"If-Range: {tag}", f"If-Range: {date}"]),
        r.choice([f"If-Modified-Since: {date}", f"If-Unmodified-Since: {date}"]),
    ]
    chosen = "\r\n".join(r.sample(fields, r.choice([1, 1, 2, 3])))
    target = f"/jobs/{r.choice([world.finished, world.partly])}/{path}"
    head = f"{r.choice(['GET', 'GET', 'HEAD'])} {target} HTTP/1.1\r\nHost: localhost\r\n{chosen}"
    return head.encode() + AUTH + HOLE + b"\r\n\r\n"


KINDS: dict[Callable[[random.Random, World], bytes], int] = {
    as_it_is: 12,
    mutated: 34,
    odd_fields: 15,
    framed: 14,
    odd_target: 12,
    odd_line: 5,
    odd_json: 7,
    conditional: 7,
    leaky: 1,
}


def with_token(data: bytes, world: World) -> bytes:
    """The token in the first Authorization field, as long as that is one."""
    head, gap, rest = data.partition(b"\r\n\r\n")
    before, field_start, after = head.partition(AUTH)
    if not field_start or not after.startswith(HOLE):
        return data
    return before + field_start + world.token.encode() + after[len(HOLE) :] + gap + rest


def make(seed: int, index: int, world: World) -> Case:
    """Case `index` of this seed."""
    r = random.Random(f"{seed}/http/{index}")
    kinds = r.choices([*KINDS], [*KINDS.values()], k=r.randint(2, 6) if r.random() < 0.12 else 1)
    data = b"".join(with_token(kind(r, world), world) for kind in kinds)
    cuts = (
        tuple(sorted(r.randrange(len(data) + 1) for _ in range(r.choice([1, 2, 5]))))
        if r.random() < 0.15
        else ()
    )
    drop = r.random() < 0.03 and b"POST" not in data  # else nobody knows whether it made a row
    name = "+".join(kind.__name__ for kind in kinds)
    return Case(name, data, reading(data), len(kinds), cuts, drop)
