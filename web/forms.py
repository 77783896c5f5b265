"""One field of a multipart/form-data body (RFC 7578), strictly.

Map: BadForm, NoField - boundary_of - field
Rule: what two parsers could read differently is refused: a form is small, and written by a library.
Runs in: http-* threads. Standard library only; pure functions.
"""

from __future__ import annotations

import re

PARTS = 16  # of a form
HEAD_BYTES = 4096  # of one part
PLAIN = ("binary", "8bit", "7bit")  # content transfer encodings that change nothing
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'\s*;\s*({_TOKEN}\*?)=(?:({_TOKEN})|"((?:[^"\\\r\n]|\\.)*)")')
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")  # RFC 2046, 5.1.1


class BadForm(ValueError):
    """The body is no form, or has no such field; the text says what is wrong with it."""


class NoField(BadForm):
    """The form is well-formed, and has no field of this name."""


def _parameters(text: str) -> tuple[str, dict[str, str]]:
    """A field's value before the first ";", in lower case, and its parameters. Raises BadForm."""
    value, semicolon, rest = text.partition(";")
    rest, found = semicolon + rest, {}
    at = 0
    while at < len(rest.rstrip()):
        match = _PARAMETER.match(rest, at)
        if not match or match[1].lower() in found:
            raise BadForm("a parameter in a header is malformed, or there twice")
        found[match[1].lower()] = match[2] if match[2] is not None else match[3]
        at = match.end()
    return value.strip().lower(), found


def boundary_of(content_type: str) -> bytes | None:
    """The boundary of a multipart/form-data body, None for any other type. Raises BadForm."""
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        return None
    boundary = _parameters(content_type)[1].get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise BadForm("multipart/form-data without a boundary of 1 to 70 characters")
    return boundary.encode("ascii")


def field(body: bytes, boundary: bytes, name: str) -> memoryview:
    """The content of the one field of this name; other fields are looked past. Raises BadForm."""
    # With a line end before it the first boundary looks like all others.
    mark, at, found = b"\r\n--" + boundary, 2 + len(boundary), None
    if not body.startswith(mark[2:]):
        raise BadForm("the body does not begin with the boundary that Content-Type names")
    for _ in range(PARTS):
        if body.startswith(b"--", at):
            if body[at + 2 :] not in (b"", b"\r\n"):
                raise BadForm("something follows the last boundary")
            if found is None:
                raise NoField(f"the form has no field {name!r}")
            return found
        head_end = body.find(b"\r\n\r\n", at, at + HEAD_BYTES)
        end = body.find(mark, head_end + 4) if head_end >= 0 else -1
        if not body.startswith(b"\r\n", at) or end < 0:
            raise BadForm("a part of the form is cut off, or has no head")
        if _name_of(body[at + 2 : head_end]) == name:
            if found is not None:
                raise BadForm(f"the form has several fields {name!r}")
            found = memoryview(body)[head_end + 4 : end]
        at = end + len(mark)
    raise BadForm(f"the form has over {PARTS} parts")


def _name_of(head: bytes) -> str:
    names = []
    for line in head.decode("utf-8", "replace").split("\r\n"):
        key, colon, value = line.partition(":")
        if not colon or not re.fullmatch(_TOKEN, key):
            raise BadForm("a part's head is not: name, colon, value")
        if key.lower() == "content-disposition":
            kind, parameters = _parameters(value)
            if kind != "form-data" or "name" not in parameters:
                raise BadForm("a part is no form-data, or has no name")
            names.append(parameters["name"])
        # Whoever decodes it stores other bytes than whoever doesn't.
        if key.lower() == "content-transfer-encoding" and value.strip().lower() not in PLAIN:
            raise BadForm("a part is encoded for mail; send it as it is")
    if len(names) != 1:
        raise BadForm("a part has no Content-Disposition, or several")
    return names[0]
