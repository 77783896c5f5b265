"""Limits: through the service, to the reason a client reads. Their settings: test_settings.py."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from client import Client
from serving import png, until, volume

import server
import settings
from messages import Limits

GOOD = {"a/1.png": png(16, 16), "a/2.png": png(16, 16, 5)}


def zeros() -> bytes:
    """A blank page as a zip holds it: 70 MiB of nothing."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("1.png", bytes(70 << 20))
    return data.getvalue()


# setting, its value, the archive, the value that the refusal states
REFUSED = [
    ("entries", 1, volume(GOOD), 2),
    ("pages", 1, volume(GOOD), 2),
    ("entry_bytes", 60, volume(GOOD), max(map(len, GOOD.values()))),
    ("total_bytes", 80, volume(GOOD), sum(map(len, GOOD.values()))),
    ("depth", 1, volume(GOOD), 2),
    ("path_bytes", 6, volume(GOOD), 7),
    ("ratio", 100, zeros(), (70 << 20) // len(zeros())),
]


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[server.Service, Client]]:
    config = settings.Config(storage_root=tmp_path_factory.mktemp("root"), port=0, upload_bytes=1 << 20)
    with server.Service(config) as service:
        yield service, Client(service.url)


def under(service: server.Service, client: Client, limits: Limits, data: bytes, **params: Any) -> Any:
    """The end of a job over `data`, as a service with these limits would have it."""
    service.dispatcher.limits = limits
    client.call("PUT", "/incoming/v.zip", data)
    job = client.submit("v.zip", params={"model": "realesr-animevideov3", **params})
    until(lambda: client.state(job).is_over, 120)
    return client.state(job)


@pytest.mark.parametrize(("name", "allowed", "data", "value"), REFUSED, ids=[case[0] for case in REFUSED])
def test_an_archive_over_a_limit_fails_with_value_limit_and_setting(limited, name, allowed, data, value):
    """A03 of the checks."""
    service, client = limited
    state = under(service, client, replace(Limits(), **{name: allowed}), data)
    assert state.status == "FAILED"
    assert f": {value}, the limit is {allowed} (REICHAN_MAX_{name.upper()})" in state.last_error
    error_code = json.loads(client.call("GET", f"/jobs/{state.job_id}").body)["errorCode"]
    assert error_code == f"LIMIT_{name.upper()}"
    assert not (service.config.layout.staging / state.job_id).exists()


def wide(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, black."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes((1 + (width + 7) // 8) * height))),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


PAGES = [
    ("page_pixels", Limits(), 12_000, 10_000, 120_000_000, 100_000_000),
    ("output_pixels", Limits(), 9_000, 10_000, 1_440_000_000, 1_200_000_000),  # I03: at scale 4
    ("output_pixels", Limits(output_pixels=400), 6, 5, 480, 400),
]


@pytest.mark.parametrize(("name", "limits", "width", "height", "value", "allowed"), PAGES)
def test_a_page_over_a_limit_is_carried_with_value_limit_and_setting(
    limited, name, limits, width, height, value, allowed
):
    service, client = limited
    pages = {"1.png": png(4, 4), "2.png": wide(width, height)}
    state = under(service, client, limits, volume(pages), scale=4)
    assert (state.status, state.failed_pages) == ("SUCCESS", 1)
    assert f"{value} pixels, over the limit of {allowed}" in state.message
    assert f"(REICHAN_MAX_{name.upper()})" in state.message


@pytest.mark.parametrize("body", [bytes(2 << 20), iter([bytes(1 << 20)] * 2)], ids=["length", "chunked"])
def test_an_upload_over_the_limit_says_so(limited, body):
    _, client = limited
    problem = client.call("PUT", "/incoming/large.zip", body).problem()
    assert (problem.status, problem.code) == (413, "TOO_LARGE")
    assert "the limit is 1048576 (REICHAN_MAX_UPLOAD_BYTES)" in problem.detail
