"""forms.py: a field of a form, read in one way or not at all."""

from __future__ import annotations

import pytest
from serving import BOUNDARY

from web import forms


def part(disposition: str, content: bytes = b"x", more: str = "") -> bytes:
    return f"--b\r\nContent-Disposition: {disposition}\r\n{more}\r\n".encode() + content + b"\r\n"


IMAGE = part('form-data; name="image"', b"PAGE")
OTHER = part("form-data; name=other", b"--b is no boundary within a line")


@pytest.mark.parametrize(
    "body",
    [
        IMAGE + b"--b--",
        IMAGE + b"--b--\r\n",
        OTHER + IMAGE + OTHER + b"--b--\r\n",
        part('FORM-DATA; filename="a;name=\\"x\\".png"; Name=image', b"PAGE") + b"--b--",
        part("form-data; name=image; filename*=UTF-8''%e4%bd%9c", b"PAGE") + b"--b--",
    ],
)
def test_forms_that_libraries_write_are_read(body):
    assert bytes(forms.field(body, b"b", "image")) == b"PAGE"


def test_a_page_may_hold_anything_but_the_boundary_line():
    content = b"\r\n--\r\n\r\n--a\r\n--\r\nb\r\n"
    assert bytes(forms.field(part("form-data; name=image", content) + b"--b--", b"b", "image")) == content


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b--",
        IMAGE,
        IMAGE + b"--b",
        IMAGE[:-7] + b"--b--",
        b"preamble\r\n" + IMAGE + b"--b--",
        IMAGE + b"--b--\r\nepilogue",
        IMAGE + IMAGE + b"--b--",
        OTHER + b"--b--",
        OTHER * 17 + IMAGE + b"--b--",
        IMAGE.replace(b"\r\n", b"\n") + b"--b--",
        b"--b\r\n\r\nPAGE\r\n--b--",
        b"--b \r\n" + IMAGE[5:] + b"--b--",
        part("form-data") + b"--b--",
        part("attachment; name=image") + b"--b--",
        part('form-data; name="image') + b"--b--",
        part("form-data; name=image; name=other") + b"--b--",
        part("form-data; name=image", more="Content-Disposition: form-data; name=image\r\n") + b"--b--",
        part("form-data; name=image", more="Content-Transfer-Encoding: base64\r\n") + b"--b--",
        part("form-data; name=image", more="no colon\r\n") + b"--b--",
        part("form-data; name=image", more="X: " + "x" * forms.HEAD_BYTES + "\r\n") + b"--b--",
    ],
)
def test_forms_that_could_be_read_in_two_ways_are_refused(body):
    with pytest.raises(forms.BadForm):
        forms.field(body, b"b", "image")


def test_the_boundary_is_what_content_type_says():
    assert forms.boundary_of(f"multipart/form-data; boundary={BOUNDARY}") == BOUNDARY.encode()
    assert forms.boundary_of('Multipart/Form-Data; charset=utf-8; boundary="a b"') == b"a b"
    assert forms.boundary_of("image/png") is None
    for bad in ("", "; boundary=", '; boundary="a "', "; boundary=" + "x" * 71, "; boundary=a; boundary=b"):
        with pytest.raises(forms.BadForm):
            forms.boundary_of("multipart/form-data" + bad)
