"""Files and folders against torch, diffusers and latent-diffusion, live: written by one and opened by the other."""

from __future__ import annotations

import collections
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import safetensors.torch  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae import WeightsError  # noqa: E402
from mflux_vae.pretrained import loading  # noqa: E402
from mflux_vae.weights.formats.files import open_weights  # noqa: E402
from mflux_vae.weights.formats.torch_files import read_torch  # noqa: E402
from tests.mflux_vae.naming_samples import flux2, kl, tiny  # noqa: E402
from tests.parity.references.latent_diffusion import TheirAutoencoderKL  # noqa: E402

LIMIT = 1e-4
"""Largest difference, relative to the largest value."""

BUILDS = {
    "stable diffusion": kl,
    "flux.1": lambda: kl(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
    "attention in every level": lambda: kl(encoder_attention=(0, 1), decoder_attention=(1,)),
    "flux.2": flux2,
    "flux.2, small decoder": lambda: flux2(decoder_block_out_channels=(32, 96)),
    "taesd": tiny,
}


def parameters(network: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(network.parameters()))


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = parameters(a), parameters(b)
    return one.keys() == other.keys() and all(mx.array_equal(one[key], other[key]) for key in one)


def assert_same_numbers(ours: Any, theirs: Any) -> None:
    """Of encoding and decoding."""
    config = ours.config
    pixels = mx.random.uniform(-1, 1, (2, 16, 24, config.in_channels), key=mx.random.key(1))
    latents = mx.random.normal((2, 8, 12, config.latent_channels), key=mx.random.key(2))
    with torch.no_grad():
        encoded = theirs.encode(torch.from_numpy(np.array(pixels.transpose(0, 3, 1, 2))))
        decoded = theirs.decode(torch.from_numpy(np.array(latents.transpose(0, 3, 1, 2))))
    encoded = encoded.latents if hasattr(encoded, "latents") else getattr(encoded, "latent_dist", encoded).mean
    for mine, reference in (
        (ours.encode(pixels).mean, encoded),
        (ours.decode(latents), getattr(decoded, "sample", decoded)),
    ):
        expected = reference.numpy().transpose(0, 2, 3, 1)
        assert np.abs(np.array(mine) - expected).max() <= LIMIT * np.abs(expected).max()


def opened_by_diffusers(network: Any, folder: Path) -> Any:
    model, told = getattr(diffusers, type(network).__name__).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


# folders


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_diffusers_opens_our_folders(build, tmp_path: Path) -> None:
    network = build()
    loading.save_network(network, tmp_path / "saved")
    assert_same_numbers(network, opened_by_diffusers(network, tmp_path / "saved"))
    # and those that went through a single file, in its last naming
    naming = {"AutoencoderTiny": "taesd"}.get(type(network).__name__, "bfl")
    loading.convert(tmp_path / "saved", tmp_path / "one.safetensors", naming)
    loading.convert(tmp_path / "one.safetensors", tmp_path / "converted", "diffusers")
    assert_same_numbers(network, opened_by_diffusers(network, tmp_path / "converted"))


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"max_shard_size": "60KB"},
        {"safe_serialization": False},
        {"safe_serialization": False, "max_shard_size": "60KB"},
        {"variant": "fp16"},
        {"variant": "fp16", "max_shard_size": "60KB"},
    ],
    ids=["safetensors", "shards", "bin", "shards of bin", "variant", "shards of a variant"],
)
def test_we_open_diffusers_folders(build, how: dict[str, Any], tmp_path: Path) -> None:
    network = build()
    loading.save_network(network, tmp_path / "ours")
    theirs = opened_by_diffusers(network, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", **how)
    assert same(loading.open_network(tmp_path / "theirs"), network)
    assert loading.describe(tmp_path / "theirs").naming == "diffusers"


# single files


@pytest.mark.parametrize(
    ("name", "naming", "prefix"),
    [
        *(("stable diffusion", "compvis", prefix) for prefix in ("", "first_stage_model.", "vae.")),
        *(("flux.1", naming, prefix) for naming in ("compvis", "bfl") for prefix in ("", "vae.")),
        ("stable diffusion", "diffusers", ""),
    ],
)
def test_diffusers_single_file_loader_opens_our_files(name: str, naming: str, prefix: str, tmp_path: Path) -> None:
    network = BUILDS[name]()
    loading.save_network(network, tmp_path / "folder")
    loading.convert(tmp_path / "folder", tmp_path / "a.safetensors", naming)
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    safetensors.torch.save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "b.safetensors")
    theirs = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "b.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    ).eval()
    assert_same_numbers(network, theirs)
    assert same(loading.open_network(tmp_path / "b.safetensors"), network)


DDCONFIG = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "in_channels": 3,
    "resolution": 32,
    "double_z": True,
    "z_channels": 4,
}


@pytest.mark.parametrize(
    "changes", [{}, {"attn_resolutions": [16, 32]}, {"attn_type": "linear"}, {"z_channels": 6}], ids=str
)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_latent_diffusions_checkpoints_open(changes: dict[str, Any], new: bool, tmp_path: Path) -> None:
    """A checkpoint as its trainer leaves it: recognised without its configuration, the same with it."""
    torch.manual_seed(0)
    ddconfig = DDCONFIG | changes
    theirs = TheirAutoencoderKL(4, **ddconfig).eval()
    state = theirs.state_dict() | {"loss.logvar": torch.zeros(())}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=new)
    recognised = loading.open_network(tmp_path / "a.ckpt")
    told = loading.open_network(tmp_path / "a.ckpt", config={"ddconfig": ddconfig, "embed_dim": 4})
    assert same(recognised, told)
    with torch.no_grad():
        latents = torch.randn(1, 4, 8, 8)
        expected = theirs.decode(latents).numpy().transpose(0, 2, 3, 1)
    for network in (recognised, told):
        found = np.array(network.decode(mx.array(latents.numpy().transpose(0, 2, 3, 1))))
        assert np.abs(found - expected).max() <= LIMIT * np.abs(expected).max()
    loading.convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors", "compvis")
    theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "b.safetensors"), strict=True)
    back = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(value, back[key]) for key, value in state.items() if not key.startswith("loss."))


def test_taesds_halves_as_its_repository_has_them(tmp_path: Path) -> None:
    network = tiny()
    loading.save_network(network, tmp_path / "folder")
    theirs = opened_by_diffusers(network, tmp_path / "folder")
    # diffusers' layers are TAESD's own Sequential; the decoder's has a clamp before its first
    torch.save(theirs.encoder.layers.state_dict(), tmp_path / "taesd_encoder.pth")
    decoder = {
        f"{int(key.split('.')[0]) + 1}.{key.split('.', 1)[1]}": v
        for key, v in theirs.decoder.layers.state_dict().items()
    }
    torch.save(decoder, tmp_path / "taesd_decoder.pth")
    assert_same_numbers(loading.open_network(tmp_path / "taesd_decoder.pth"), theirs)


# torch's files

BASE = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
STATE = collections.OrderedDict(
    plain=BASE.clone(),
    transposed=BASE.t(),
    strided=BASE[1:4, ::2],
    last=BASE[-1],
    half=BASE.half(),
    brain=BASE.bfloat16()[:, 3],
    double=BASE.double() / 2,
    whole=torch.arange(5),
    small=torch.arange(5, dtype=torch.int8),
    bytes=torch.arange(250, 255, dtype=torch.uint8),
    truth=torch.tensor([True, False]),
    scalar=torch.tensor(3.5),
    nothing=torch.zeros(0, 3),
    kernel=torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    learnt=torch.nn.Parameter(torch.ones(2, 2)),
)


def numbers(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    return tensor.numpy()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torchs_files_are_read_to_the_bit(new: bool, protocol: int, tmp_path: Path) -> None:
    norm = torch.nn.BatchNorm2d(4)
    content = {
        "state_dict": STATE,
        "norm": norm.state_dict(),
        "optimizer": torch.optim.Adam(norm.parameters()).state_dict(),
        "epoch": 3,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "size": torch.Size([1, 2]),
        "score": np.float64(0.5),
        "names": {"a": [1, (2.5, None)], "b": {1, 2}},
    }
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    read = read_torch(tmp_path / "a.pt")
    expected = {f"state_dict.{key}": value for key, value in STATE.items()}
    expected |= {f"norm.{key}": value for key, value in norm.state_dict().items()}
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        found, wanted = read[key].load(), numbers(value)
        assert read[key].dtype == str(value.dtype).removeprefix("torch.")
        if value.dtype == torch.bfloat16:
            assert found.dtype == mx.bfloat16
            found = found.view(mx.uint16)
        wanted = wanted.astype(np.float32) if value.dtype == torch.float64 else wanted
        assert np.array(found).dtype == wanted.dtype
        np.testing.assert_array_equal(np.array(found), wanted, err_msg=key)


def test_torch_refuses_or_reads_the_same(tmp_path: Path) -> None:
    """What torch's own reader for weights only takes, ours takes, too."""
    torch.save(STATE, tmp_path / "a.pt")
    theirs = torch.load(tmp_path / "a.pt", weights_only=True)
    ours, _ = open_weights(tmp_path / "a.pt")
    assert list(theirs) and theirs.keys() == ours.keys()


class Hostile:
    """Calls when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


ATTACKS = {
    "system": lambda trap: Hostile(os.system, f"touch {trap}"),
    "open": lambda trap: Hostile(open, str(trap), "w"),
    "eval": lambda trap: Hostile(eval, f"open({str(trap)!r}, 'w')"),
    "exec": lambda trap: Hostile(exec, f"open({str(trap)!r}, 'w')"),
    "pickle in a pickle": lambda trap: Hostile(pickle.loads, pickle.dumps(Hostile(open, str(trap), "w"))),
    "torch.load": lambda trap: Hostile(torch.load, str(trap)),
    "mkdir": lambda trap: Hostile(os.mkdir, str(trap)),
    "a module": lambda trap: torch.nn.Linear(2, 2),
    "a partial": lambda trap: __import__("functools").partial(open, str(trap), "w"),
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_what_torch_saves_of_hostile_objects_is_refused_without_effects(attack, new: bool, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    torch.save({"a": torch.ones(2), "b": attack(trap)}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(WeightsError, match="refers to") as caught:
        loading.open_network(tmp_path / "a.pt")
    assert not trap.exists() and "\n" not in str(caught.value)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="TorchScript"):
        loading.open_network(tmp_path / "a.pt")


def test_metadata_of_ours_do_not_disturb_others(tmp_path: Path) -> None:
    loading.save_network(kl(), tmp_path / "folder")
    loading.convert(tmp_path / "folder", tmp_path / "a.safetensors", "compvis")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["mflux_vae.config"])["_class_name"] == "AutoencoderKL"
