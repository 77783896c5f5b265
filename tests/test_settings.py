"""settings.py: what the environment may say, and that a bad value stops the start with one line."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
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


VARIABLES = [
    ("STORAGE_ROOT", "elsewhere", {"storage_root": Path("elsewhere")}),
    ("MODEL_ROOT", "weights", {"model_root": Path("weights")}),
    ("BIND", "[::1]:9000", {"host": "::1", "port": 9000}),
    ("TOKEN", "a-token-of-mine", {"token": "a-token-of-mine"}),
    ("MAX_CONCURRENCY", "3", {"max_concurrency": 3}),
    ("CLUSTER", "head:6379", {"cluster": "head:6379"}),
    ("ALLOWED_ORIGINS", "https://a.home/, app://b", {"allowed_origins": ("https://a.home", "app://b")}),
    ("ALLOWED_HOSTS", "a.home,,b.home:8443", {"allowed_hosts": ("a.home", "b.home:8443")}),
    ("DEVICE", "CPU", {"device": "cpu"}),
    ("PRECISION", "bf16", {"precision": "bf16"}),
    ("CONVOLUTIONS", "winograd", {"convolutions": "winograd"}),
    ("ENGINE", "upstream", {"engine": "upstream"}),
    ("LOG", "json", {"log": "json"}),
    ("SANDBOX", "off", {"sandbox": False}),
    ("PAGE_WAIT_S", "7", {"page_wait_s": 7}),
    ("PAGE_CACHE_BYTES", "0", {"page_cache_bytes": 0}),
    ("WATCH_S", "60", {"watch_s": 60}),
    ("WATCH_PARAMS", '{"scale": 3}', {"watch_params": {"scale": 3}}),
    ("JOB_CACHE_BYTES", "4G", {"job_cache_bytes": 4 << 30}),
    ("MAX_UPLOAD_BYTES", "3k", {"upload_bytes": 3072}),
    ("RESERVE_BYTES", "0", {"reserve_bytes": 0}),
    ("CHECK_ROOM", "off", {"checks_room": False}),
]


@pytest.mark.parametrize(("name", "text", "values"), VARIABLES, ids=[name for name, _, _ in VARIABLES])
def test_each_variable_reaches_its_own_field_and_no_other(monkeypatch, name, text, values):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)  # Ray may not be installed
    assert config(**{name: text}) == replace(config(), **values) != config()


def test_no_variable_of_the_readme_is_left_out_here():
    text = Path(server.__file__).with_name("README.md").read_text(encoding="utf-8")
    here = {f"REICHAN_{name}" for name, _, _ in VARIABLES}
    here |= {*map(setting_name, settings.LIMIT_SETTINGS)}  # these and those of age: see below
    here |= {f"REICHAN_KEEP_{name.upper()}" for name in asdict(Keep())}
    of_the_hook = {"REICHAN_URL", "REICHAN_MOUNT"}
    assert here == {*re.findall("REICHAN_[A-Z_]*[A-Z]", text)} - of_the_hook


def test_a_flag_wins_over_the_variable_and_leaves_the_others():
    environ = {
        "REICHAN_BIND": "127.0.0.2:9000", "REICHAN_TOKEN": "the-variable-s",
        "REICHAN_STORAGE_ROOT": "variable", "REICHAN_MODEL_ROOT": "variable/models",
    }  # fmt: skip
    unchanged = settings.read_config(environ, server.parse_flags([]))
    for flag, text, values in (
        ("--host", "127.0.0.3", {"host": "127.0.0.3"}),
        ("--port", "0", {"port": 0}),  # any free one
        ("--token", "the-flag-s", {"token": "the-flag-s"}),
        ("--storage-root", "flag", {"storage_root": Path("flag")}),
        ("--model-root", "flag", {"model_root": Path("flag")}),
    ):
        found = settings.read_config(environ, server.parse_flags([flag, text]))
        assert found == replace(unchanged, **values) != unchanged


def test_every_limit_is_a_setting_of_its_own():
    for n, name in enumerate(settings.LIMIT_SETTINGS, 7):
        assert config(**{f"MAX_{name.upper()}": str(n)}).limits == replace(Limits(), **{name: n})
    assert {*settings.LIMIT_SETTINGS, "ratio_from_bytes"} == {*asdict(Limits())}
    assert config() == settings.Config(convolutions="auto")  # a Config made by hand measures nothing
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


@pytest.mark.parametrize("version, most", [((3, 12), settings.WINDOWS_WORKERS), ((3, 13), 64)])
def test_more_workers_than_windows_can_wait_for_stop_the_start(version, most, monkeypatch):
    monkeypatch.setattr(settings.sys, "platform", "win32")
    monkeypatch.setattr(settings.sys, "version_info", version)
    assert settings.read_concurrency(str(most)) == most
    with pytest.raises(settings.ConfigError, match="REICHAN_MAX_CONCURRENCY"):
        settings.read_concurrency(str(most + 1))


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
