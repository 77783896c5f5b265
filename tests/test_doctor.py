"""`server.py doctor`: one real look at this machine, and what it says of machines that are not well."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import COMPACT, NO_FILES, bundled, native
from helpers import require
from serving import still

import server
import settings
import storage
from commands import doctor
from files import weightfiles
from messages import EngineChoice

ROOT = Path(server.__file__).parent
WHEEL = {release.name: release.wheel_bin_sha256 for release in weightfiles.RELEASES}


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[str, Any]:
    """What the child really finds here, once; the large model's tile has a test of its own."""
    config = settings.Config(storage_root=tmp_path_factory.mktemp("doctor"), device="cpu", precision="fp32")
    found, why = doctor.measured(config, [COMPACT])
    assert found is not None, why
    return found


@pytest.fixture
def config(tmp_path) -> settings.Config:
    return settings.Config(storage_root=tmp_path / "storage", port=0)


def findings(checks) -> dict[str, str]:
    """topic -> what to do."""
    return {check.topic: check.remedy for check in checks if check.remedy}


def changed(facts, **values) -> dict[str, Any]:
    return {**facts, **values}


def test_what_a_file_can_t_hold_is_escaped_in_it():
    """As on Windows, where what is redirected is of one script."""
    code = "import server; server.escape_what_cannot_be_shown(); print('C:/山田')"
    environ = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=True)
    assert done.stdout.strip() == rb"C:/\u5c71\u7530"


# ---------------------------------------------------------------- this machine
def test_a_model_computes_the_stored_tile_here_and_tells_its_speed(facts):
    (run,) = facts["runs"]
    assert (run["model"], run["error"], run["device"], run["precision"]) == (COMPACT, None, "cpu", "fp32")
    assert run["worst"] <= 1 and run["pageS"] > 0


def test_a_page_that_finds_no_room_is_timed_as_the_service_computes_it(monkeypatch):
    import torch

    import infer
    from engine import upscaling

    upscale = upscaling.NativeEngine.upscale

    def limited(self, pixels, *more):
        if self.plan.tile > 64 and len(pixels) > 200:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return upscale(self, pixels, *more)

    monkeypatch.setattr(upscaling.NativeEngine, "upscale", limited)
    monkeypatch.setattr(infer, "settle_torch", lambda: None)  # it is for the whole process
    monkeypatch.setattr(doctor, "PAGE", (240, 96))
    monkeypatch.setattr(doctor, "WHOLE_PAGE_S", 1e9)
    (run,) = doctor.examine(EngineChoice("cpu", "fp32", model_root=NO_FILES), [COMPACT])["runs"]
    assert run["error"] is None and run["pageS"] > 0


@pytest.mark.parametrize("name", doctor.MODELS)
def test_our_engine_computes_the_stored_tile(name):
    assert doctor.apart(native(name).upscale(doctor.probe_colours(), 4), name)[0] <= 1


def test_the_stored_value_is_what_the_plain_network_makes(facts):
    import torch

    page = torch.from_numpy(doctor.probe_colours()[..., ::-1].copy())
    with torch.inference_mode():
        y = bundled(COMPACT).network(page.permute(2, 0, 1)[None] / 255.0)
    plain = (y.clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()[..., ::-1]
    assert doctor.apart(plain, COMPACT)[0] <= 1
    assert doctor.apart(np.roll(plain, 4, 1), COMPACT)[0] > 50


def test_models_are_named_with_their_hashes(facts):
    assert {model["name"]: model["sha256"] for model in facts["models"]} == WHEEL
    assert not findings(doctor.check_models(facts))


def test_a_well_machine_has_no_finding_and_status_0(facts, config, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "measured", lambda config: (facts, ""))
    monkeypatch.setattr(doctor, "nvidia_cards", lambda: ([], None))
    assert doctor.run(config) == 0
    out = capsys.readouterr().out
    assert out.endswith("all is well\n") and "->" not in out
    topics = ("storage", "port", "token", "torch", "device", "model", "tile", "speed")
    assert all(f"ok   {topic}" in out for topic in topics)
    assert not config.storage_root.exists()  # it only looks


def test_a_broken_torch_is_a_finding_of_the_command_with_status_1(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart is missing (injected)')")
    command = [sys.executable, str(ROOT / "server.py"), "doctor", "--port", "0"]
    command += ["--storage-root", str(tmp_path / "storage")]
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "computing does not work: ImportError: libcudart is missing (injected)" in done.stdout
    assert "-> pip install -e ." in done.stdout and done.stdout.endswith("1 to mend\n")


def test_a_bad_setting_is_said_in_one_line_with_status_2():
    command = [sys.executable, str(ROOT / "server.py"), "doctor"]
    environ = os.environ | {"REICHAN_DEVICE": "tpu"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "REICHAN_DEVICE must be one of" in done.stderr


# ---------------------------------------------------------------- cards
def planted(tmp_path, monkeypatch, text: str, status: int = 0) -> None:
    """An nvidia-smi that answers so."""
    require(os.name == "posix", "a shell script stands for the driver's program")
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def test_a_processor_s_torch_beside_an_nvidia_card_is_told_with_the_command_that_mends_it(
    facts, tmp_path, monkeypatch
):
    planted(tmp_path, monkeypatch, "NVIDIA RTX 4090, 550.54, 24564 MiB")
    cards, trouble = doctor.nvidia_cards()
    assert (cards, trouble) == (["NVIDIA RTX 4090, 550.54, 24564 MiB"], None)
    mends = findings(doctor.check_cards(cards, changed(facts, torch="2.13.0+cpu", cuda=None)))
    assert mends["torch"].startswith("pip install --force-reinstall") and "/whl/cu" in mends["torch"]


def test_a_card_that_a_cuda_build_can_t_use_points_at_the_driver(facts):
    broken = changed(facts, cuda="12.8", cudaError="the driver is too old (injected)")
    (check,) = doctor.check_cards(["NVIDIA GTX 1080, 470.1, 8119 MiB"], broken)
    assert "too old" in check.text and "update the NVIDIA driver" in check.remedy


def test_a_card_in_use_is_no_finding(facts):
    card = {"device": "cuda", "index": 0, "name": "NVIDIA RTX 4090", "memoryBytes": 24 << 30}
    used = changed(facts, cuda="12.8", devices=[card, *facts["devices"]])
    assert not findings(doctor.check_cards(["NVIDIA RTX 4090, 550.54, 24564 MiB"], used))
    assert any("NVIDIA RTX 4090, 25.8 GB" in check.text for check in doctor.check_torch(used))


def test_a_driver_that_fell_over_is_a_finding(tmp_path, monkeypatch):
    planted(tmp_path, monkeypatch, "Failed to initialize NVML: Driver/library version mismatch", 18)
    assert "driver" in findings(doctor.check_driver(*doctor.nvidia_cards()))


def test_a_torch_outside_the_tested_range_is_a_finding(facts):
    assert findings(doctor.check_torch(changed(facts, torch="2.9.1")))
    assert findings(doctor.check_torch(changed(facts, torch="2.14.0a0+cu130")))
    assert not findings(doctor.check_torch(changed(facts, torch="2.10.0+cu128")))


# ---------------------------------------------------------------- models and tiles
def test_lacking_and_refused_weights_are_findings(facts):
    refused = {"name": "mine", "source": "model-root", "available": False, "error": "a pickle (injected)"}
    checks = list(doctor.check_models(changed(facts, models=[*facts["models"][1:], refused])))
    told = [check.text for check in checks if check.remedy]
    assert [facts["models"][0]["name"] in told[0], "a pickle (injected)" in told[1]] == [True, True]


@pytest.mark.parametrize(
    ("values", "is_right"),
    [({"worst": 1}, True), ({"worst": 2}, False), ({"worst": 9, "psnr": 45.0, "precision": "fp16"}, True),
     ({"worst": 255, "psnr": 4.0, "precision": "fp16"}, False), ({"worst": None}, True),
     ({"worst": 3, "psnr": 60.0, "source": "model-root"}, True), ({"error": "out of memory"}, False)],
)  # fmt: skip
def test_a_tile_is_judged_by_what_its_precision_allows(facts, values, is_right):
    assert (not findings(doctor.check_run(facts["runs"][0] | values))) == is_right


def test_own_weights_are_run_but_not_compared():
    assert doctor.is_known(COMPACT, WHEEL[COMPACT])
    assert not doctor.is_known(COMPACT, "0" * 64)


# ---------------------------------------------------------------- storage, port, token
def test_a_storage_root_that_can_t_be_used_is_a_finding(config, tmp_path, monkeypatch):
    config.storage_root.write_text("a file")
    assert findings(doctor.check_storage(config)) == {"storage": "remove it, or set REICHAN_STORAGE_ROOT"}
    config.storage_root.unlink()
    config.layout.create()
    assert not findings(doctor.check_storage(config))

    def refuse(**_):
        raise PermissionError(13, "Permission denied (injected)")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert findings(doctor.check_storage(config))["storage"].startswith("let this user write there")


def test_a_storage_root_on_a_drive_that_is_gone_is_a_finding(config, monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda path: False)  # as on Windows, where Z:\\ itself is gone
    checks = list(doctor.check_storage(config))
    assert findings(checks) == {"storage": "choose another REICHAN_STORAGE_ROOT"}
    assert "is on a drive that is not there" in checks[-1].text


def test_a_disk_without_room_is_a_finding(config, monkeypatch):
    usage = shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 30)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage)
    assert "make room" in findings(doctor.check_storage(config))["storage"]


def test_a_small_disk_is_told_by_its_free_space(config, disk):
    config = dataclasses.replace(config, storage_root=disk)
    (check,) = [check for check in doctor.check_storage(config) if check.remedy]
    assert check.text == "0.0 GB free"


def test_the_port_s_owner_is_told(config, tmp_path):
    with still(tmp_path / "other") as service:
        ours = dataclasses.replace(config, port=service.http.server_port)
        (check,) = doctor.check_port(ours)
        assert check.remedy is None and "this service, version" in check.text
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stranger.settimeout(10)
        thread = threading.Thread(target=lambda: [stranger.accept()[0].close()])
        thread.start()
        theirs = dataclasses.replace(config, port=stranger.getsockname()[1])
        (check,) = doctor.check_port(theirs)
        thread.join()
    assert check.remedy and "another program" in check.text
    assert not findings(doctor.check_port(config))


def test_a_program_at_the_port_that_speaks_no_http_is_a_stranger(config):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stranger.settimeout(10)

        def greet() -> None:
            with stranger.accept()[0] as line:
                line.recv(65536)
                line.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        (check,) = doctor.check_port(dataclasses.replace(config, port=stranger.getsockname()[1]))
        thread.join()
    assert check.remedy and "another program" in check.text


def test_a_service_that_holds_the_storage_root_elsewhere_is_told(tmp_path):
    with still(tmp_path) as service:
        mends = findings(doctor.check_port(dataclasses.replace(service.config, port=0)))
    assert "needs its own REICHAN_STORAGE_ROOT" in mends["storage"]


def test_a_token_others_can_read_is_a_finding_and_no_token_is_ever_shown(config):
    require(os.name == "posix", "modes of files")
    config.layout.create()
    storage.keep_token(config.layout)
    open_to_all = dataclasses.replace(config, host="0.0.0.0")
    assert not findings(doctor.check_token(open_to_all))
    kept = config.layout.root / "token"
    kept.chmod(0o644)
    checks = list(doctor.check_token(open_to_all))
    assert findings(checks) == {"token": f"chmod 600 {kept}"}
    assert kept.read_text().strip() not in str(checks)
    with_token = dataclasses.replace(config, token="secret-token")
    assert "secret-token" not in str(list(doctor.check_token(with_token)))


def test_looking_loads_no_torch():
    code = "from commands import doctor; import sys; print(*({'torch', 'numpy', 'cv2'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
