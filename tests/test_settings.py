"""settings.py: what the environment may say, and that a bad value stops the start with one line."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import server
import settings
from messages import Limits, setting_name
from work.retention import Keep

ROOT = Path(server.__file__).parent
NO_FLAGS = argparse.Namespace(
    storage_root=None, model_root=None, host=None, port=None, token=None, demo=False
)


def config(**environ: str) -> settings.Config:
    return settings.read_config({f"REICHAN_{name}": value for name, value in environ.items()}, NO_FLAGS)


def test_every_limit_is_a_setting_of_its_own():
    for n, name in enumerate(settings.LIMIT_SETTINGS, 7):
        assert config(**{f"MAX_{name.upper()}": str(n)}).limits == replace(Limits(), **{name: n})
    assert {*settings.LIMIT_SETTINGS, "ratio_from_bytes"} == {*asdict(Limits())}
    assert config() == settings.Config(convolutions="auto")  # a Config made by hand measures nothing
    assert config(MAX_UPLOAD_BYTES="3k").upload_bytes == 3072
    assert config(MAX_ENTRY_BYTES=" 2G ").limits.entry_bytes == 2 << 30


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "1KB", "9" * 17, "9000T0", "\u0663"])
def test_a_limit_that_is_no_number_stops_the_start_and_is_named(text):
    with pytest.raises(settings.ConfigError, match="REICHAN_MAX_PAGES must be a whole number"):
        config(MAX_PAGES=text)


def test_a_bound_that_is_passed_is_told():
    with pytest.raises(settings.ConfigError, match="from 0 to 86400"):
        config(WATCH_S="100000")


def test_a_mistyped_name_in_the_watch_s_params_stops_the_start_and_tells_the_likely_one():
    with pytest.raises(settings.ConfigError, match="no 'scal'; is 'scale' meant"):
        config(WATCH_PARAMS='{"scal": 3}')
    for name in ("jpegQuality", "jpeg_quality", "profile"):
        value = '"kobo-sage"' if name == "profile" else "90"
        assert name in config(WATCH_PARAMS=f'{{"{name}": {value}}}').watch_params


def test_a_port_that_is_taken_is_said_with_a_way_out(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(settings.ConfigError, match=f"port {port}: .*--port"):
            server.Service(settings.Config(storage_root=tmp_path, port=port))


def test_the_readme_states_every_limit():
    text = Path(server.__file__).with_name("README.md").read_text(encoding="utf-8")
    for name in (*settings.LIMIT_SETTINGS, "upload_bytes"):
        assert f"`{setting_name(name)}`" in text, name


@pytest.mark.parametrize("name", ["outputs_days", "artifacts_days", "jobs_days"])
def test_each_age_is_a_setting_and_a_bad_one_stops_the_start(name):
    variable = f"REICHAN_KEEP_{name.upper()}"
    assert settings.read_config({variable: "30"}, NO_FLAGS).keep == Keep(**{name: 30})
    assert settings.read_config({}, NO_FLAGS).keep == Keep()
    for text in ("0", "-1", "1.5", "forever", "40000"):
        with pytest.raises(settings.ConfigError, match=variable):
            settings.read_config({variable: text}, NO_FLAGS)
    assert f"`{variable}`" in Path(server.__file__).with_name("README.md").read_text(encoding="utf-8")


def test_an_unknown_form_of_log_stops_the_start_with_one_line():
    with pytest.raises(settings.ConfigError, match="REICHAN_LOG must be one of text, json"):
        settings.read_config({"REICHAN_LOG": "xml"}, server.parse_flags([]))


def test_without_ray_the_start_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(settings.ConfigError, match=r'pip install -e ".\[cluster\]"'):
        settings.read_config({"REICHAN_CLUSTER": "auto"}, NO_FLAGS)


@pytest.mark.parametrize("text", ["here", "host", "host:port", "ray://host:1"])
def test_a_bad_address_stops_the_start(text):
    with pytest.raises(settings.ConfigError, match="REICHAN_CLUSTER must be auto or the host:port"):
        settings.read_config({"REICHAN_CLUSTER": text}, NO_FLAGS)


@pytest.mark.parametrize(
    "environ, flags",
    [
        ({"REICHAN_MAX_CONCURRENCY": "0"}, []),
        ({"REICHAN_BIND": "nonsense"}, []),
        ({"REICHAN_PRECISION": "fp8"}, []),
        ({"REICHAN_ALLOWED_ORIGINS": "*"}, []),
        ({}, ["--token", "short"]),
    ],
)
def test_a_bad_setting_stops_the_start_with_one_line(tmp_path, environ, flags):
    command = [
        sys.executable,
        str(ROOT / "server.py"),
        "--port",
        "0",
        "--storage-root",
        str(tmp_path / "s"),
        *flags,
    ]
    done = subprocess.run(
        command, env=os.environ | environ, capture_output=True, text=True, timeout=30, check=False
    )
    assert (
        done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("server.py: ")
    )
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.9.9.9"])
def test_a_host_that_only_this_machine_can_reach_is_loopback(host):
    assert config(BIND=f"{host}:8001").is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.168.1.2", "books.example"])
def test_any_other_host_is_the_network(host):
    assert not config(BIND=f"{host}:8001").is_loopback
