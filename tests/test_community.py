"""Networks of other architectures beside spandrel's own call on the whole page: at most 1/255 apart.

The weights are made here: small networks, drawn by a seed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import faults
import numpy as np
import pytest
import safetensors.torch
import torch
from client import Client
from drawn import colour, grey
from engines import NO_FILES, apart, plan_for, settled
from helpers import require
from serving import png, until, volume

import infer
import server
import settings
import storage
from engine import community, devices, models, upscaling
from engine.pages import Pixels
from files import weightfiles
from messages import EngineChoice, Params


@pytest.fixture(autouse=True)
def _spandrel() -> None:
    require(importlib.util.find_spec("spandrel"), "the extra models is not installed")


SWIN = {"embed_dim": 32, "num_heads": (2,), "upscale": 2, "upsampler": "pixelshuffledirect", "img_size": 32}
BLOCK = {"num_filters": 8, "num_blocks": 1}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ESRGAN x2, grey": ("ESRGAN", {"in_nc": 1, "out_nc": 1, "scale": 2, **BLOCK}),
    "ESRGAN x1": ("ESRGAN", {"in_nc": 3, "out_nc": 3, "scale": 1, **BLOCK}),
    "ESRGAN x2, to grey": ("ESRGAN", {"in_nc": 3, "out_nc": 1, "scale": 2, **BLOCK}),
    "SPAN": ("SPAN", {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 8, "upscale": 2}),
    "SwinIR": ("SwinIR", {"depths": (2,), "window_size": 8, **SWIN}),
    "DAT": ("DAT", {"depth": (2,), "split_size": (8, 32), "expansion_factor": 2.0, **SWIN}),
    "SAFMN": ("SAFMN", {"dim": 8, "n_blocks": 1, "ffn_scale": 2.0, "upscaling_factor": 2}),
}
WHOLE = {"num_feat": 16, "block_num": 1, "window_size": 8, "res_num": 1, "up_scale": 2, "pe": True}


def architecture(name: str) -> Any:
    """A network's class, of spandrel's."""
    community.package()  # whose import does without torchvision
    return getattr(importlib.import_module(f"spandrel.architectures.{name}"), name)


@functools.cache
def weights(kind: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """A small network's tensors, whose results have a page's mean and contrast."""
    name, arguments = NETWORKS.get(kind, ("OmniSR", WHOLE))
    torch.manual_seed(seed)
    network = architecture(name)(**arguments).eval()
    last = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    x = torch.from_numpy(grey(64, 64)).float().expand(1, arguments.get("in_nc", 3), -1, -1) / 255
    with torch.inference_mode():
        last.weight *= 0.2 / network(x).std()
        last.bias += x.mean() - network(x).mean()
    return {key: tensor.clone().contiguous() for key, tensor in network.state_dict().items()}


def loaded(root: Path, kind: str, name: str = "theirs") -> models.Model:
    """The model that a file of these weights makes."""
    safetensors.torch.save_file(weights(kind), root / f"{name}.safetensors")
    return models.load_model(weightfiles.find_weights(root)[weightfiles.model_key(name)])


def theirs(kind: str, page: Pixels) -> Pixels:
    """spandrel's own call on the whole page, in fp32, rounded."""
    descriptor = community.package().ModelLoader().load_from_state_dict(dict(weights(kind)))
    planes = page[..., ::-1] if page.ndim == 3 else np.dstack([page] * 3)
    x = torch.from_numpy(planes.transpose(2, 0, 1).copy())[None].float() / 255
    if descriptor.input_channels == 1:
        y = torch.cat([descriptor(plane[None]) for plane in x[0].split(1)], 1)
    else:
        y = descriptor(x).expand(-1, 3, -1, -1)
    rgb = (y[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    if page.ndim == 2:
        return np.rint(rgb @ np.float32([0.299, 0.587, 0.114])).astype(np.uint8)
    return np.rint(rgb).astype(np.uint8)[..., ::-1]


HALOS: dict[str, int] = {}


def halo(model: models.Model) -> int:
    """As measured, once."""
    if model.weights_sha256 not in HALOS:
        HALOS[model.weights_sha256] = upscaling.halo_for(model, "cpu", 0)
    return HALOS[model.weights_sha256]


def ours(model: models.Model, page: Pixels, **changes: Any) -> Pixels:
    """Our engine's page at the network's own scale."""
    plan = plan_for(model, **{"halo_px": halo(model)} | changes)
    return upscaling.NativeEngine(model, plan, 0).upscale(page, model.scale)


@pytest.mark.parametrize("draw", [grey, colour])
@pytest.mark.parametrize("kind", NETWORKS)
def test_tiles_are_spandrels_whole_page(tmp_path, kind, draw):
    page = draw(101, 130)
    model, wanted = loaded(tmp_path, kind), theirs(kind, page)
    assert wanted.std() > 10  # or there were nothing to compare
    assert apart(ours(model, page, tile=64), wanted) <= 1


def test_without_its_halo_a_tile_shows(tmp_path):
    page = colour(101, 130)
    result = ours(loaded(tmp_path, "SPAN"), page, tile=64, halo_px=0)
    assert apart(result, theirs("SPAN", page)) > 1


def test_a_network_that_sees_all_it_is_given_is_spandrels_page_in_one_window(tmp_path):
    model, page = loaded(tmp_path, "OmniSR"), colour(37, 45)
    assert apart(ours(model, page), theirs("OmniSR", page)) <= 1
    assert halo(model) == community.LARGEST_HALO_PX


def test_a_page_smaller_than_a_network_takes_is_padded_as_spandrel_does(tmp_path):
    page = colour(5, 3)
    assert apart(ours(loaded(tmp_path, "DAT"), page), theirs("DAT", page)) <= 1


def test_a_model_is_told_by_its_tensors(tmp_path):
    told = [(model.architecture, model.scale, model.network.channels) for model in (
        loaded(tmp_path, "ESRGAN x2, grey"), loaded(tmp_path, "SwinIR"), loaded(tmp_path, "ESRGAN x1"),
    )]  # fmt: skip
    assert told == [("ESRGAN", 2, 1), ("SwinIR", 2, 3), ("ESRGAN", 1, 3)]


def test_convolutions_alone_are_computed_channels_last(tmp_path):
    layouts = [loaded(tmp_path, kind).network.layout for kind in ("SPAN", "ESRGAN x2, grey", "SwinIR")]
    assert layouts == [torch.channels_last, torch.channels_last, torch.contiguous_format]


def test_a_network_that_can_t_have_channels_last_is_computed_without(tmp_path, monkeypatch):
    span, page = architecture("SPAN"), colour(40, 40)
    forward = span.forward
    monkeypatch.setattr(span, "forward", lambda self, x: forward(self, x.view(1, -1).view(x.shape)))
    model = loaded(tmp_path, "SPAN")
    assert model.network.layout == torch.contiguous_format
    assert apart(ours(model, page), theirs("SPAN", page)) <= 1


@pytest.mark.parametrize("asked, kind, got", [
    ("fp16", "DAT", "fp32"), ("fp16", "SPAN", "fp16"), ("bf16", "DAT", "bf16"), ("fp32", "DAT", "fp32"),
])  # fmt: skip
def test_a_precision_is_taken_only_where_the_descriptor_has_it(tmp_path, monkeypatch, asked, kind, got):
    monkeypatch.setattr(upscaling, "halo_for", lambda *_: 32)
    model, choice = loaded(tmp_path, kind), EngineChoice(model_root=NO_FILES, precision=asked)
    params = Params(model=model.name, batch_size=4)
    plan = settled(params, choice, model)
    assert (plan.precision, plan.tile, plan.batch) == (got, 256, 1)


def test_auto_takes_bf16_only_where_it_is_faster(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "native_bf16", lambda: True)
    now, slow = [0.0], [torch.bfloat16]
    monkeypatch.setattr(infer.time, "perf_counter", lambda: now[0])
    forward = community.CommunityNetwork.forward

    def timed(self: community.CommunityNetwork, x: torch.Tensor) -> torch.Tensor:
        now[0] += 2.0 if self.dtype == slow[0] else 1.0
        return forward(self, x)

    monkeypatch.setattr(community.CommunityNetwork, "forward", timed)
    monkeypatch.setattr(upscaling, "halo_for", lambda *_: 32)
    model, choice = loaded(tmp_path, "SPAN"), EngineChoice(model_root=NO_FILES, precision="auto")
    plans = []
    for slow[0] in (torch.bfloat16, torch.float32):
        plans.append(settled(Params(model=model.name), choice, model))
    assert [plan.precision for plan in plans] == ["fp32", "bf16"]


def test_bf16_stays_near_fp32(tmp_path):
    model, page = loaded(tmp_path, "SPAN"), colour(60, 70)
    exact, near = (ours(model, page, precision=kind).astype(float) for kind in ("fp32", "bf16"))
    assert 10 * np.log10(255**2 / ((exact - near) ** 2).mean()) > upscaling.PROBE_PSNR_DB


def test_a_halo_is_measured_once_a_worker(tmp_path, monkeypatch):
    loaded(tmp_path, "SPAN")
    asked = []
    monkeypatch.setattr(upscaling, "halo_for", lambda model, *_: asked.append(model.name) or 32)
    worker = upscaling.Engines(EngineChoice(model_root=tmp_path, precision="fp32"), 0, lambda: None)
    assert {worker.plan(Params(model="theirs", jpeg_quality=q)).halo_px for q in (90, 95)} == {32}
    assert asked == ["theirs"]


def test_a_halo_that_a_card_has_no_room_to_measure_is_measured_on_the_processor(tmp_path, monkeypatch):
    model, measured, asked = loaded(tmp_path, "SPAN"), community.measured_halo, []
    wanted = halo(model)

    def full(network: community.CommunityNetwork, place: torch.device) -> int:
        if asked[-1] == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return measured(network, place)

    monkeypatch.setattr(devices, "torch_device", lambda kind, _: asked.append(kind) or torch.device("cpu"))
    monkeypatch.setattr(community, "measured_halo", full)
    assert upscaling.halo_for(model, "cuda", 0) == wanted
    assert asked == ["cuda", "cpu"]


def test_two_pages_at_a_time_are_what_each_is_alone(tmp_path, monkeypatch):
    """SPAN pads a kernel while it adds up its weights: there the two threads of a card are made to meet."""
    model, page = loaded(tmp_path, "SPAN"), colour(40, 40)
    engine = upscaling.NativeEngine(model, plan_for(model, halo_px=0), 0)
    alone, pad, meeting = engine.upscale(page, 2), torch.nn.functional.pad, threading.Barrier(2, timeout=0.5)

    def meet(*of: Any) -> torch.Tensor:
        with contextlib.suppress(threading.BrokenBarrierError):  # the other one waits for its turn
            time.sleep(0.02 * meeting.wait())
        return pad(*of)

    monkeypatch.setattr(torch.nn.functional, "pad", meet)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda _: engine.upscale(page, 2), range(2)))
    assert [apart(result, alone) for result in together] == [0, 0]


def test_cancel_is_noticed_between_layers_of_any_network(tmp_path):
    def tick() -> None:
        raise upscaling.Cancelled

    model = loaded(tmp_path, "SwinIR")
    with pytest.raises(upscaling.Cancelled):
        upscaling.NativeEngine(model, plan_for(model, halo_px=32), 0, tick).upscale(grey(32, 32), 2)


def test_the_reference_engine_says_that_it_has_no_such_network(tmp_path, monkeypatch):
    model = loaded(tmp_path, "SPAN")
    for name in ("basicsr.archs.rrdbnet_arch", "realesrgan", "realesrgan.archs.srvgg_arch"):
        stand_in = type(torch)(name)
        stand_in.__dict__.update(RRDBNet=None, RealESRGANer=None, SRVGGNetCompact=None)
        monkeypatch.setitem(importlib.import_module("sys").modules, name, stand_in)
    with pytest.raises(upscaling.EngineMissing, match="SPAN"):
        upscaling.UpstreamEngine(model, plan_for(model, engine="upstream", halo_px=32), 0)


# ---------------------------------------------------------------- files
def test_a_pth_of_any_architecture_is_vouched_for_first(tmp_path):
    path = tmp_path / "theirs.pth"
    torch.save({"state_dict": weights("SwinIR")}, path)
    file = weightfiles.find_weights(tmp_path)["theirs"]
    with pytest.raises(storage.WeightsRefused, match=r"trusted\.sha256"):
        models.load_model(file)
    (tmp_path / "trusted.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    assert models.load_model(file).architecture == "SwinIR"


def test_what_no_architecture_fits_is_refused(tmp_path):
    four = {"in_nc": 4, "out_nc": 4, "num_filters": 8, "num_blocks": 1, "scale": 2}
    torch.manual_seed(1)
    esrgan = architecture("ESRGAN")(**four).state_dict()
    short = {key: tensor for key, tensor in weights("SPAN").items() if key != "conv_cat.bias"}
    lies = {
        "no architecture": {"encoder.weight": torch.zeros(3)},
        "4 channels": esrgan,
        "conv_cat.bias": short,
    }
    for told, tensors in lies.items():
        safetensors.torch.save_file(tensors, tmp_path / "odd.safetensors")
        with pytest.raises(storage.WeightsRefused, match=told):
            models.load_model(weightfiles.find_weights(tmp_path)["odd"])


# ---------------------------------------------------------------- through the service
@pytest.fixture
def model_root(tmp_path: Path) -> Path:
    """A model root with a grey model of MangaJaNai's kind: ESRGAN's first key names, one channel, x2."""
    root = tmp_path / "models"
    root.mkdir()
    loaded(root, "ESRGAN x2, grey", "2x_MangaJaNai_1200p_V1")
    return root


def test_a_volume_goes_through_a_model_that_auto_chose(tmp_path, model_root):
    page = grey(90, 70)
    data = cv2.imencode(".png", page)[1].tobytes()
    with server.Service(
        settings.Config(storage_root=tmp_path / "root", port=0, model_root=model_root, precision="fp32")
    ) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume({"1.png": data}))
        job = client.submit("v.zip", params={"model": "auto", "outputFormat": "png"})
        assert client.watch(job)[0][-1].status == "SUCCESS"
        artifact = client.call("GET", f"/jobs/{job}/artifact").body
        until(lambda: client.call("GET", "/models").json()["probed"], 60)
        listed = {one["name"]: one for one in client.call("GET", "/models").json()["models"]}
    with zipfile.ZipFile(io.BytesIO(artifact)) as archive:
        report = json.loads(archive.read("artifact-report.json"))
        result = cv2.imdecode(np.frombuffer(archive.read("1.png"), np.uint8), cv2.IMREAD_UNCHANGED)
    assert report["items"][0]["model"] == "2x_MangaJaNai_1200p_V1"
    assert apart(result, theirs("ESRGAN x2, grey", page)) <= 1
    facts = listed["2x_MangaJaNai_1200p_V1"]
    told = {key: facts[key] for key in ("architecture", "license", "scale", "error")}
    assert told == {"architecture": "ESRGAN", "license": None, "scale": 2, "error": None}
    assert listed["RealESRGAN_x4plus"]["license"] == "BSD-3-Clause"


def test_without_the_extra_the_job_fails_and_names_it(tmp_path, model_root, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    config = settings.Config(storage_root=tmp_path / "root", port=0, model_root=model_root)
    with server.Service(config, faults.without_spandrel) as service:
        client = Client(service.url)
        client.call("PUT", "/incoming/v.zip", volume({"1.png": png()}))
        job = client.submit("v.zip", params={"model": "2x_MangaJaNai_1200p_V1"})
        state = client.watch(job)[0][-1]
        assert (state.status, service.table.get(job).error_code) == ("FAILED", "MODEL_BAD")
    assert 'pip install ".[models]"' in state.message
