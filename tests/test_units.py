"""What starts the service elsewhere: the systemd unit; start_service.bat, as far as reading it tells."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import require

import server
from commands import doctor

ROOT = Path(server.__file__).parent
UNIT = ROOT / "contrib/manga-upscale.service"
BAT = ROOT / "start_service.bat"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, as if this checkout lay where it says."""
    require(shutil.which("systemd-analyze"), "systemd-analyze is not there")
    text = UNIT.read_text().replace("/opt/manga-upscale/.venv/bin/python", sys.executable)
    copy = tmp_path / UNIT.name
    copy.write_text(text.replace("/opt/manga-upscale", str(ROOT)))
    return copy


def analyzed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "--no-pager", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_systemd_takes_the_unit_without_a_word(unit):
    done = analyzed("verify", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    broken = unit.read_text().replace("KillMode=mixed", "KillMode=gently")
    unit.write_text(broken)
    assert "kill mode" in analyzed("verify", unit).stderr  # else the line above would prove nothing


def test_the_unit_leaves_the_service_little_to_reach(unit):
    """systemd's own measure: 0 is nothing, 10 all; a unit without hardening has 9.2."""
    done = analyzed("security", "--offline=true", unit)
    level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert level and float(level[1]) < 2.5, done.stdout + done.stderr


def test_a_bad_setting_is_no_reason_to_start_again():
    """main() ends with 2 there, and the unit names that number."""
    assert "RestartPreventExitStatus=2" in UNIT.read_text().splitlines()
    command = [sys.executable, str(ROOT / "server.py"), "--port", "70000"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 2


def test_the_batch_file_has_the_line_ends_and_labels_that_cmd_needs():
    data = BAT.read_bytes()
    assert data.count(b"\n") == data.count(b"\r\n") and data.isascii()
    text = data.decode()
    jumps = set(re.findall(r"goto (\w+)", text))
    assert jumps and jumps <= set(re.findall(r"^:(\w+)", text, re.MULTILINE))


def test_a_package_that_is_only_about_to_be_installed_is_not_taken_for_installed(tmp_path):
    """setuptools writes its .egg-info before pip has fetched a dependency."""
    code = re.search(r'python\.exe (-P -c "import importlib[^"]+")', BAT.read_text(encoding="utf-8"))
    folder = tmp_path / "manga_upscale_service.egg-info"
    folder.mkdir()
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: manga-upscale-service\nVersion: 9\n")
    for arguments, is_found in ((shlex.split(code[1])[1:], True), (shlex.split(code[1]), False)):
        command = [sys.executable, "-S", *arguments]  # without this environment's own packages
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=False)
        assert (done.returncode == 0) == is_found, done.stderr


def test_commands_of_the_readme_are_quoted_as_every_shell_reads_them():
    """cmd knows no single quotes, and takes > and < for files."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^pip .*", text, re.MULTILINE)
    assert len(commands) > 5 and not [one for one in commands if "'" in one]


def test_a_cuda_build_is_asked_for_within_the_tested_versions():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    [torch] = [one for one in dependencies if one.startswith("torch")]
    cuda = re.compile(r'pip install "(torch[^"]+)" --index-url (\S+)')
    asked = [cuda.search(path.read_text(encoding="utf-8")) for path in (BAT, ROOT / "README.md")]
    assert [match and match[1] for match in asked] == [torch, torch]
    # The same builds everywhere, the first for cards before the RTX 20 series.
    builds = re.findall(r"set CUDA=(\w+)", BAT.read_text(encoding="utf-8"))
    urls = [asked[0][2].replace("%CUDA%", build) for build in builds]
    assert urls == [doctor.OLD_CARDS_BUILD, doctor.CUDA_BUILD] and asked[1][2] == doctor.CUDA_BUILD
    assert f"`{builds[0]}` in place of `{builds[1]}`" in (ROOT / "README.md").read_text(encoding="utf-8")
