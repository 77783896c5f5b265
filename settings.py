"""What the person running the service chose: environment variables and flags, read once.

Map: ConfigError - Config - Given (values from text) - read_config and what it reads
Rule: no other file of the service reads a REICHAN_ variable; a bad value stops the start with one line
that names it.
Runs in: the main thread, before anything else; then everybody reads the frozen Config.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import logs
from messages import Limits, misspelt
from storage import Layout
from work.retention import Keep

TAURI_ORIGINS = (
    "tauri://localhost",
    "http://tauri.localhost",
    "https://tauri.localhost",
    "http://localhost:1420",
)
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
WINDOWS_WORKERS = 31  # pipe and process of each, and one pipe more: WaitForMultipleObjects takes 63


class ConfigError(Exception):
    """A setting that can't be used; the message is the one line shown at start."""


@dataclass(frozen=True)
class Config:
    """Every setting, read once in main(); see the README for their meaning."""

    storage_root: Path = Path("storage")
    model_root: Path | None = None  # None: <storage_root>/models
    host: str = "127.0.0.1"
    port: int = 8001
    max_concurrency: int = 1
    cluster: str | None = None  # "auto" or a Ray head's host:port; None: this machine alone
    token: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    device: str = "auto"
    precision: str = "auto"
    engine: str = "native"
    convolutions: str = "direct"  # the environment's default is auto: two services may measure differently
    sandbox: bool = True
    log: str = "text"
    limits: Limits = field(default_factory=Limits)
    keep: Keep = field(default_factory=Keep)
    worker_idle_s: float = 120.0
    connections: int = 256
    watchers: int = 2000
    upload_bytes: int = 16 << 30
    reserve_bytes: int = 64 << 20  # of free space, which no upload and no job may be expected to use
    checks_room: bool = True
    page_wait_s: int = 25  # for POST /pages; Suwayomi gives up after 30
    page_cache_bytes: int = 1 << 30  # of its finished pages
    watch_s: int | None = None  # for which an upload must lie still to become a job; None: never
    watch_params: dict[str, Any] = field(default_factory=dict)  # of those jobs, as in POST /jobs
    job_cache_bytes: int = 0  # of finished pages kept for other jobs; 0: none

    @property
    def layout(self) -> Layout:
        """The folders below storage_root."""
        root = self.storage_root.absolute()
        return Layout(root, (self.model_root or root / "models").absolute())

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the bind address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


CHOICES = {
    "device": ("auto", "cuda", "xpu", "mps", "cpu"),
    "precision": ("auto", "fp32", "fp16", "bf16"),
    "engine": ("native", "upstream"),
    "convolutions": ("auto", "direct", "winograd", "nnpack"),
    "sandbox": ("on", "off"),
    "log": logs.FORMS,
    "check_room": ("on", "off"),
}


# Fields of Limits that have a setting; ratio_from_bytes only says where ratio begins to matter.
LIMIT_SETTINGS = tuple(item.name for item in fields(Limits) if item.name != "ratio_from_bytes")

MOST = 1 << 53  # of a setting that has no other bound
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def whole(name: str, text: str, least: int = 1, most: int = MOST) -> int:
    """A setting's whole number, with K, M, G or T of 1024. Raises ConfigError."""
    match = re.fullmatch(r"([0-9]{1,16})([KMGT]?)", text.upper())
    value = int(match[1]) * UNITS[match[2]] if match else -1
    if not least <= value <= most:
        bound = f" to {most}" if most < MOST else ""
        raise ConfigError(
            f"{name} must be a whole number from {least}{bound}, like 20000 or 512M, not {text!r}"
        )
    return value


class Given:
    """The environment's REICHAN_*; names are given without that prefix. Raises ConfigError."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

    def text(self, name: str, default: str = "") -> str:
        """A setting as it is."""
        return self.environ.get(f"REICHAN_{name}", "").strip() or default

    def several(self, name: str) -> tuple[str, ...]:
        """A list, separated by commas."""
        return tuple(part.strip().rstrip("/") for part in self.text(name).split(",") if part.strip())

    def choice(self, name: str) -> str:
        """One of CHOICES, the first where nothing is set."""
        value = self.text(name.upper(), CHOICES[name][0]).lower()
        if value not in CHOICES[name]:
            raise ConfigError(f"REICHAN_{name.upper()} must be one of {', '.join(CHOICES[name])}")
        return value

    def whole(self, name: str, default: str, least: int = 1, most: int = MOST) -> int:
        """A whole number, see whole()."""
        return whole(f"REICHAN_{name}", self.text(name, default), least, most)

    def set_of(self, kind: type[Any], prefix: str, names: Iterable[str], most: int = MOST) -> Any:
        """A record of whole numbers; its own defaults where nothing is set."""
        found = {name: f"{prefix}_{name.upper()}" for name in names}
        return kind(**{n: self.whole(name, "", most=most) for n, name in found.items() if self.text(name)})


def read_watch_params(text: str) -> dict[str, Any]:
    """REICHAN_WATCH_PARAMS; a model can only be checked once the model root is known. Raises ConfigError."""
    try:
        given = json.loads(text or "{}")
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise ConfigError(f'REICHAN_WATCH_PARAMS must be a JSON object like {{"scale": 2}}, not {text!a}')
    if why := misspelt(given):
        raise ConfigError(f"REICHAN_WATCH_PARAMS: {why}")
    return given


def read_config(environ: Mapping[str, str], flags: argparse.Namespace) -> Config:
    """Config from REICHAN_* and the flags, which override them. Raises ConfigError."""
    given = Given(environ)
    host, port = split_bind(given.text("BIND", "127.0.0.1:8001"))
    if flags.port is not None and not 0 <= flags.port <= 65535:
        raise ConfigError(f"--port must be a number from 0 to 65535, not {flags.port}")
    model_root = flags.model_root or given.text("MODEL_ROOT")
    return Config(
        storage_root=Path(flags.storage_root or given.text("STORAGE_ROOT", "storage")),
        model_root=Path(model_root) if model_root else None,
        host=flags.host or host,
        port=port if flags.port is None else flags.port,
        max_concurrency=read_concurrency(given.text("MAX_CONCURRENCY", "1")),
        cluster=read_cluster(given.text("CLUSTER")),
        token=read_token(flags.token or given.text("TOKEN")),
        allowed_origins=read_origins(given.several("ALLOWED_ORIGINS")),
        allowed_hosts=given.several("ALLOWED_HOSTS"),
        device=given.choice("device"),
        precision=given.choice("precision"),
        engine=given.choice("engine"),
        convolutions=given.choice("convolutions"),
        sandbox=given.choice("sandbox") == "on",
        log=given.choice("log"),
        limits=given.set_of(Limits, "MAX", LIMIT_SETTINGS),
        keep=given.set_of(Keep, "KEEP", (item.name for item in fields(Keep)), most=36_500),
        reserve_bytes=given.whole("RESERVE_BYTES", "64M", least=0),
        checks_room=given.choice("check_room") == "on",
        job_cache_bytes=given.whole("JOB_CACHE_BYTES", "0", least=0),
        upload_bytes=given.whole("MAX_UPLOAD_BYTES", "16G"),
        page_wait_s=given.whole("PAGE_WAIT_S", "25", most=100),
        page_cache_bytes=given.whole("PAGE_CACHE_BYTES", "1G", least=0),
        watch_s=given.whole("WATCH_S", "0", least=0, most=86_400) or None,
        watch_params=read_watch_params(given.text("WATCH_PARAMS")),
    )


def read_concurrency(text: str) -> int:
    """REICHAN_MAX_CONCURRENCY. Raises ConfigError."""
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise ConfigError(f"REICHAN_MAX_CONCURRENCY must be a whole number from 1 to 64, not {text!r}")
    if int(text) > WINDOWS_WORKERS and sys.platform == "win32" and sys.version_info < (3, 13):
        why = "Python before 3.13 can't wait for more worker processes on Windows"
        raise ConfigError(f"REICHAN_MAX_CONCURRENCY can be {WINDOWS_WORKERS} at most here, since {why}")
    return int(text)


def read_token(text: str) -> str | None:
    """REICHAN_TOKEN. Raises ConfigError."""
    if text and not re.fullmatch(r"[!-~]{8,512}", text):
        raise ConfigError("the token must be 8 to 512 printable ASCII characters without spaces")
    return text or None


def read_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """REICHAN_ALLOWED_ORIGINS. Raises ConfigError."""
    for origin in origins:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*]+", origin):
            raise ConfigError(f"REICHAN_ALLOWED_ORIGINS: {origin!r} is not an origin like https://manga.home")
    return origins


def read_cluster(text: str) -> str | None:
    """REICHAN_CLUSTER. Raises ConfigError."""
    if not text:
        return None
    if text != "auto" and not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:/\[\]\s]+):[0-9]{1,5}", text):
        raise ConfigError(f"REICHAN_CLUSTER must be auto or the host:port of a Ray head, not {text!r}")
    if importlib.util.find_spec("ray") is None:
        raise ConfigError('REICHAN_CLUSTER needs Ray, which is not installed: pip install -e ".[cluster]"')
    return text


def split_bind(bind: str) -> tuple[str, int]:
    """ "host:port" or "[v6]:port". Raises ConfigError."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]\s]+):([0-9]{1,5})", bind)
    if not match or int(match[2]) > 65535:
        raise ConfigError(f"REICHAN_BIND must be host:port, not {bind!r}")
    return match[1].strip("[]"), int(match[2])
