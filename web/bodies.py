"""What a request carries, read strictly: a JSON body, a query's number, a digest.

Map: JSON bodies - queries and fields
Rule: what is returned can be stored, sent and read again; all else is a Refused that names its fault.
Runs in: http-N threads.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any

from jobs import InvalidFields
from web.wire import Refused, Request

BODY_BYTES = 32 << 20  # of a JSON request; a manifest of 100,000 pages has 10 MB
JSON_DEPTH = 64  # of a manifest; it is stored, and read again in any thread


# ---------------------------------------------------------------- JSON bodies
def json_body(request: Request, optional: bool = False) -> dict[str, Any]:
    """The body as a JSON object. Raises Refused 400, 413, 415."""
    media = (request.headers.one("content-type") or "").partition(";")[0].strip().lower()
    # Of a chunked body only its end tells that it is empty.
    read_first = optional and not media and request.body.chunked
    data = request.body.read(BODY_BYTES) if read_first else b""
    has_body = bool(data) if read_first else request.body.chunked or bool(request.body.length)
    # A web page can send text/plain anywhere without asking; application/json it can't.
    if ((has_body or not optional) and media not in ("application/json", "")) or (has_body and not media):
        raise Refused(415, "MEDIA_TYPE", "send the body as Content-Type: application/json")
    if not read_first:
        data = request.body.read(BODY_BYTES)
    return {} if optional and not data else json_object(data)


def json_object(data: bytes) -> dict[str, Any]:
    """Raises Refused 400, 422."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
        # Half a surrogate pair and 1e999 pass as JSON, but nothing can store or send them.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise Refused(400, "NOT_JSON", f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise Refused(422, "INVALID_FIELDS", "the body must be a JSON object")
    if _depth(value) > JSON_DEPTH:
        raise Refused(400, "NOT_JSON", f"the body is nested over {JSON_DEPTH} levels deep")
    return value


def _depth(value: dict[str, Any]) -> int:
    """Levels of a JSON object: what is parsed in a shallow stack must be readable in a deep one."""
    level: list[Any] = [value]  # the objects and arrays of one level
    depth = 0
    while level:
        depth += 1
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
    return depth


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


# ---------------------------------------------------------------- queries and fields
def whole_number(query: dict[str, str], name: str, schema: Mapping[str, Any]) -> int | None:
    """The query's number of this name, in its schema's bounds; None without one. Raises InvalidFields."""
    text = query.get(name)
    if text is None:
        return None
    least, most = schema["minimum"], schema["maximum"]
    if not re.fullmatch(r"[0-9]{1,19}", text) or not least <= int(text) <= most:
        raise InvalidFields([(name, f"must be a whole number from {least} to {most}")])
    return int(text)


def digest_of(request: Request) -> bytes | None:
    """The sha-256 of Repr-Digest, if there is one (RFC 9530)."""
    value = request.headers.one("repr-digest")
    if value is None:
        return None
    match = re.search(r"(?:^|,)\s*sha-256=(?::([^:]*):)?", value)
    try:
        return base64.b64decode(match[1] or "?", validate=True) if match else None
    except (binascii.Error, ValueError):
        raise Refused(400, "DIGEST", "Repr-Digest is not sha-256=:base64:") from None
