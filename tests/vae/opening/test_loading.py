"""Networks from folders, single files in every naming, whole models, presets and the hub; and back, to the bit."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae import AutoencoderKL, AutoencoderKLConfig, PlainAutoencoder, SettingsError, WeightsError, loading
from mflux_vae.networks.flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from mflux_vae.networks.tiny import AutoencoderTiny, AutoencoderTinyConfig
from mflux_vae.opening import hub
from mflux_vae.opening.families import FAMILIES
from mflux_vae.opening.presets import PRESETS
from mflux_vae.weights.diffusers import STEM
from mflux_vae.weights.files import open_weights, write_safetensors
from mflux_vae.weights.rules import from_mlx
from tests.vae.small import drawn, small_kl, small_plain
from tests.vae.writing_torch import of_arrays, write_old, write_zip

SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1, "scaling_factor": 0.5}
TINY = {"num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def kl(**changes: Any) -> nn.Module:
    """Of widths that 32 groups divide, so that a file tells its architecture."""
    return drawn(AutoencoderKL(AutoencoderKLConfig(**{**SMALL, **changes})))


def flux2(**changes: Any) -> nn.Module:
    network = AutoencoderKLFlux2(
        AutoencoderKLFlux2Config(block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, **changes)
    )
    variance = mx.arange(1, 17) / 8
    drawn(network)
    network.bn.running_var, network.bn.num_batches_tracked = variance, mx.array(7, mx.int64)
    return network


def tiny(**changes: Any) -> nn.Module:
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return drawn(AutoencoderTiny(AutoencoderTinyConfig(**{**TINY, **widths, **changes})))


NETWORKS = {
    "kl": kl,
    "no quant convolutions": lambda: kl(
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, latent_channels=16
    ),
    "attention in every level": lambda: kl(encoder_attention=(0, 1), decoder_attention=(1,)),
    "linear attention": lambda: kl(attention_type="linear", encoder_attention=(1,), decoder_attention=(1,)),
    "three levels": lambda: kl(block_out_channels=(32, 64, 96), layers_per_block=2, in_channels=1, out_channels=1),
    "another decoder": lambda: kl(decoder_block_out_channels=(64, 96)),
    "other quant convolutions": lambda: kl(z_channels=6),
    "no variances": lambda: kl(double_z=False),
    "pooling": lambda: kl(resample_with_conv=False),
    "a wider stem": lambda: kl(stem_channels=64),
    "flux2": flux2,
    "flux2, small decoder": lambda: flux2(decoder_block_out_channels=(32, 96)),
    "tiny": tiny,
    "tiny, wider": lambda: tiny(latent_channels=16, num_decoder_blocks=(3, 1), num_encoder_blocks=(2, 3)),
    "plain": lambda: small_plain(channels=(4, 6, 8)),
}


def parameters(network: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(network.parameters()))


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and mx.array_equal(a[key], b[key]) for key in a)


def named(network: nn.Module, naming: str = "diffusers") -> dict[str, mx.array]:
    own = parameters(network)
    return from_mlx(own, FAMILIES[type(network).__name__].rules(naming, own))


def arrays(network: nn.Module, naming: str = "diffusers", prefix: str = "") -> dict[str, np.ndarray]:
    """For files of torch's, without the counter, which is of another dtype."""
    return {prefix + key: np.array(mx.contiguous(value)) for key, value in named(network, naming).items() if value.ndim}


# namings


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_every_naming_there_and_back_is_the_same_file_to_the_byte(build, tmp_path: Path) -> None:
    network = build()
    folder = tmp_path / "folder"
    loading.save_network(network, folder)
    namings = list(FAMILIES[type(network).__name__].tables)
    files = {naming: tmp_path / f"{naming}.safetensors" for naming in namings}
    for naming, file in files.items():
        assert loading.convert(folder, file, naming) == [file]
        opened = loading.open_network(file)
        assert opened.config == network.config and same(parameters(opened), parameters(network))
    for naming, following in zip(namings, [*namings[1:], namings[0]], strict=True):
        loading.convert(files[naming], tmp_path / "again.safetensors", following)
        assert (tmp_path / "again.safetensors").read_bytes() == files[following].read_bytes(), (naming, following)
    back = tmp_path / "back"
    assert loading.convert(files[namings[-1]], back, "diffusers") == [
        back / f"{STEM}.safetensors",
        back / "config.json",
    ]
    assert (back / f"{STEM}.safetensors").read_bytes() == (folder / f"{STEM}.safetensors").read_bytes()
    assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_the_architecture_follows_from_keys_and_shapes(build, tmp_path: Path) -> None:
    network = build()
    for naming in FAMILIES[type(network).__name__].tables:
        write_safetensors(tmp_path / "a.safetensors", named(network, naming))
        told = loading.describe(tmp_path / "a.safetensors")
        nested = any("quant_conv" in key for key in named(network))  # else both namings are one
        assert (told.family, told.naming) == (
            type(network).__name__,
            naming if nested or naming != "bfl" else "compvis",
        )
        opened = loading.open_network(tmp_path / "a.safetensors")
        assert same(parameters(opened), parameters(network))
        kept = {"scaling_factor", "sample_size"}
        recognised, expected = opened.config.to_dict(), network.config.to_dict()
        assert {key: value for key, value in recognised.items() if key not in kept} == {
            key: value for key, value in expected.items() if key not in kept
        }


def test_namings_are_the_published_ones() -> None:
    """A few keys of latent-diffusion's, Black Forest Labs' and TAESD's files, as they are written there."""
    deep = kl(block_out_channels=(32, 32, 64), decoder_attention=(2,), encoder_attention=(2,))
    theirs = named(deep, "compvis")
    for key, shape in {
        "encoder.down.0.downsample.conv.weight": (32, 32, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (64, 32, 1, 1),
        "encoder.down.2.attn.0.q.weight": (64, 64, 1, 1),
        "encoder.mid.attn_1.norm.weight": (64,),
        "encoder.mid.block_2.conv2.bias": (64,),
        "decoder.up.2.upsample.conv.weight": (64, 64, 3, 3),
        "decoder.up.2.attn.1.proj_out.weight": (64, 64, 1, 1),
        "decoder.up.1.block.0.nin_shortcut.weight": (32, 64, 1, 1),
        "decoder.up.0.block.1.norm1.weight": (32,),
        "decoder.norm_out.bias": (32,),
        "quant_conv.weight": (8, 8, 1, 1),
    }.items():
        assert theirs[key].shape == shape, key
    assert "decoder.up.0.upsample.conv.weight" not in theirs and "encoder.down.2.downsample.conv.weight" not in theirs
    nested = named(flux2(), "bfl")
    assert {"encoder.quant_conv.weight", "decoder.post_quant_conv.bias", "bn.running_mean"} <= nested.keys()
    assert "quant_conv.weight" not in nested
    layers = named(AutoencoderTiny(), "taesd")
    assert {"encoder.0.weight", "encoder.1.conv.4.bias", "encoder.14.weight"} <= layers.keys()
    assert {"decoder.1.weight", "decoder.3.conv.0.weight", "decoder.19.bias"} <= layers.keys()
    assert layers["decoder.7.weight"].shape == (64, 64, 3, 3) and "decoder.7.bias" not in layers
    assert not any(key.startswith("decoder.0.") for key in layers)


def test_a_linear_kernel_is_read_where_a_convolution_is_usual(tmp_path: Path) -> None:
    network = kl()
    theirs = {
        k: v.reshape(v.shape[:2]) if ".attn_1." in k and v.ndim == 4 else v
        for k, v in named(network, "compvis").items()
    }
    write_safetensors(tmp_path / "a.safetensors", theirs)
    assert same(
        parameters(loading.open_network(tmp_path / "a.safetensors", config=write_config(tmp_path, network))),
        parameters(network),
    )
    theirs = {k: v[:, :, None, None] if ".attentions." in k and v.ndim == 2 else v for k, v in named(network).items()}
    write_safetensors(tmp_path / "b.safetensors", theirs)
    assert same(parameters(loading.open_network(tmp_path / "b.safetensors")), parameters(network))


def write_config(folder: Path, network: nn.Module) -> Path:
    (folder / "c.json").write_text(json.dumps(network.config.to_dict()))
    return folder / "c.json"


# whole models and torch's files

TEXT_ENCODER = {
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": np.ones((2, 2), np.float32)
}
WRAPPERS = {
    "first_stage_model.": {
        "model.diffusion_model.input_blocks.0.0.weight": np.ones((2, 2), np.float32),
        **TEXT_ENCODER,
    },
    "vae.": {
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": np.ones((2, 2), np.float32)
    },
    "state_dict.": {"optimizer.0.exp_avg": np.ones(2, np.float32)},
    "module.": {},
    "": {"loss.discriminator.main.0.weight": np.ones((2, 2), np.float32), "loss.logvar": np.ones((), np.float32)},
}


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("how", ["safetensors", "zip", "old"])
def test_an_autoencoder_is_found_in_a_whole_model(prefix: str, how: str, tmp_path: Path) -> None:
    network = kl()
    content = {**arrays(network, "compvis", prefix), **WRAPPERS[prefix]}
    if how == "safetensors":
        path = tmp_path / "model.safetensors"
        write_safetensors(path, {key: mx.array(value) for key, value in content.items()})
    else:
        tensors, storages = of_arrays(content, old=how == "old")
        path = (write_old if how == "old" else write_zip)(
            tmp_path / "model.ckpt", {"state_dict": tensors, "epoch": 1}, storages
        )
    told = loading.describe(path, config=network.config.to_dict())
    assert (told.naming, told.tensors) == ("compvis", len(named(network)) + 2 * (prefix == ""))
    assert same(parameters(loading.open_network(path, config=network.config.to_dict())), parameters(network))


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    averaged, last = kl(), drawn(kl(), seed=1)
    content = {**arrays(averaged, prefix="ema."), **arrays(last, prefix="model.")}
    tensors, storages = of_arrays(content)
    write_zip(tmp_path / "a.pt", tensors, storages)
    assert same(parameters(loading.open_network(tmp_path / "a.pt")), parameters(averaged))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_its_bits(dtype: str, tmp_path: Path) -> None:
    network = kl()
    loading.save_network(network, tmp_path / "full")
    loading.convert(tmp_path / "full", tmp_path / "half.safetensors", "compvis", dtype)
    assert {stored.dtype for stored in open_weights(tmp_path / "half.safetensors")[0].values()} == {dtype}
    loading.convert(tmp_path / "half.safetensors", tmp_path / "back", "diffusers")
    loading.save_network(network, tmp_path / "direct", dtype)
    back, direct = (tmp_path / name / f"{STEM}.safetensors" for name in ("back", "direct"))
    assert back.read_bytes() == direct.read_bytes()
    # the same through torch's file
    bits = {key: np.array(value.astype(getattr(mx, dtype)).view(mx.uint16)) for key, value in named(network).items()}
    bits = bits if dtype == "bfloat16" else {key: value.view(np.float16) for key, value in bits.items()}
    tensors, storages = of_arrays(bits)
    write_zip(tmp_path / "half.pt", tensors, storages)
    loading.convert(tmp_path / "half.pt", tmp_path / "torch", "diffusers", config=network.config.to_dict())
    assert (tmp_path / "torch" / f"{STEM}.safetensors").read_bytes() == direct.read_bytes()


# TAESD's halves


@pytest.mark.parametrize("opened", ["encoder", "decoder"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_taesds_halves_are_read_together(opened: str, suffix: str, tmp_path: Path) -> None:
    network = tiny()
    content = arrays(network, "taesd")
    for half in ("encoder", "decoder"):
        part = {key.removeprefix(f"{half}."): value for key, value in content.items() if key.startswith(half)}
        path = tmp_path / f"taesd_{half}{suffix}"
        if suffix == ".pth":
            tensors, storages = of_arrays(part)
            write_zip(path, tensors, storages)
        else:
            write_safetensors(path, {key: mx.array(value) for key, value in part.items()})
    read = loading.open_network(tmp_path / f"taesd_{opened}{suffix}")
    assert read.config == network.config and same(parameters(read), parameters(network))
    assert same(parameters(loading.open_network(tmp_path)), parameters(network))
    assert loading.convert(tmp_path, tmp_path / "out", "taesd") == [
        tmp_path / "out" / "taesd_encoder.safetensors",
        tmp_path / "out" / "taesd_decoder.safetensors",
    ]
    assert same(parameters(loading.open_network(tmp_path / "out")), parameters(network))
    other = {"encoder": "decoder", "decoder": "encoder"}[opened]
    (tmp_path / f"taesd_{other}{suffix}").unlink()
    with pytest.raises(WeightsError, match=rf"is TAESD's {opened}; put its {other} beside it, as taesd_{other}"):
        loading.open_network(tmp_path / f"taesd_{opened}{suffix}")


def test_comfyuis_names_of_taesds_halves(tmp_path: Path) -> None:
    network = tiny()
    write_safetensors(
        tmp_path / "a.safetensors", {f"taesd_{key}": value for key, value in named(network, "taesd").items()}
    )
    assert same(parameters(loading.open_network(tmp_path / "a.safetensors")), parameters(network))


# scaling


def lazily(path: Path, name: str, naming: str, **metadata: str) -> Path:
    """A file with the keys and shapes of a preset."""
    network = FAMILIES[PRESETS[name].family].network(PRESETS[name].config)
    return write_blank(path, {key: value.shape for key, value in named(network, naming).items()}, **metadata)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_recognised_at_its_full_size(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    for naming in FAMILIES[preset.family].tables:
        path = lazily(tmp_path / f"{naming}.safetensors", name, naming)
        told = loading.describe(path)
        nested = preset.config.to_dict().get("use_quant_conv")
        assert (told.family, told.naming) == (preset.family, naming if nested or naming != "bfl" else "compvis")
        alike = told.config | {
            key: preset.config.to_dict().get(key) for key in (*SCALING, "sample_size", "force_upcast")
        }
        expected = {key: preset.config.to_dict().get(key) for key in alike}
        assert alike == expected
        chosen = loading.describe(path, config=name)
        assert chosen.config == preset.config.to_dict() and chosen.assumed is None
        # presets that differ in nothing but their purpose have the first one's name
        assert PRESETS[chosen.preset].config.to_dict().get("scaling_factor") == chosen.config.get("scaling_factor")


SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@pytest.mark.parametrize(
    ("file", "like", "others", "metadata", "expected"),
    [
        ("model.safetensors", "sd1", {"conditioner.embedders.1.model.ln_final.weight": (2,)}, {}, "sdxl"),
        ("model.safetensors", "sd1", {"cond_stage_model.model.ln_final.weight": (2,)}, {}, "sd2"),
        ("xl.safetensors", "sd1", {"cond_stage_model.transformer.text_model.x": (2,)}, {}, "sd1"),
        ("model.safetensors", "flux1", {"model.diffusion_model.joint_blocks.0.x": (2,)}, {}, "sd3"),
        ("model.safetensors", "sd3", {"model.diffusion_model.double_blocks.0.x": (2,)}, {}, "flux1"),
        ("vae.safetensors", "sd1", {}, {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}, "sdxl"),
        ("vae.safetensors", "sd1", {}, {"modelspec.architecture": "stable-diffusion-v1/vae"}, "sd1"),
        ("vae.safetensors", "sd3", {}, {"modelspec.architecture": "stable-diffusion-v3-medium"}, "sd3"),
        ("sdxl_vae.safetensors", "sd1", {}, {}, "sdxl"),
        ("sdxl-vae-fp16-fix.safetensors", "sd1", {}, {}, "sdxl-fp16-fix"),
        ("sd_xl_base_1.0.safetensors", "sd1", {}, {}, "sdxl"),
        ("playground-v2.5.safetensors", "sd1", {}, {}, "playground"),
        ("vae-ft-mse-840000-ema-pruned.safetensors", "sd1", {}, {}, "sd-vae-ft-mse"),
        ("ae.safetensors", "sd3", {}, {}, "flux1"),
        ("sd3.5_vae.safetensors", "flux1", {}, {}, "sd3"),
        ("z_image_vae.safetensors", "sd3", {}, {}, "z-image"),
        ("kl-f8-d16.safetensors", "kl-f8-d16", {}, {}, "kl-f8-d16"),
        ("x.safetensors", "flux2-small-decoder", {}, {}, "flux2-small-decoder"),
        ("x.safetensors", "cogview4", {}, {}, "cogview4"),
    ],
)
def test_scaling_follows_from_what_lies_beside(
    file: str, like: str, others: dict, metadata: dict, expected: str, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    prefix = "first_stage_model." if others else ""
    path = lazily(folder / file, like, "compvis", **metadata)
    if others:
        network = FAMILIES["AutoencoderKL"].network(PRESETS[like].config)
        shapes = {prefix + key: value.shape for key, value in named(network, "compvis").items()}
        path = write_blank(folder / file, {**shapes, **others})
    told = loading.describe(path)
    assert (told.preset, told.assumed) == (expected, None)
    assert told.config == PRESETS[expected].config.to_dict()


def write_blank(path: Path, shapes: dict[str, tuple[int, ...]], **metadata: str) -> Path:
    """A sparse file of zeros, which needs no place on a disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    first = 0
    for key, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [first, first + size]}
        first += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + first)
    return path


@pytest.mark.parametrize(
    ("like", "taken", "others"),
    [("sd1", "sd1", "'sdxl' or 'sdxl-fp16-fix' or 'playground'"), ("flux1", "sd3", "'flux1' or 'z-image'")],
)
def test_what_nothing_tells_is_assumed_and_said(like: str, taken: str, others: str, tmp_path: Path) -> None:
    told = loading.describe(lazily(tmp_path / "x.safetensors", like, "diffusers"))
    assert told.preset == taken
    assert (
        told.assumed is not None and f"taken as those of {taken}; if they are not, say config={others}" in told.assumed
    )
    assert loading.describe(tmp_path / "x.safetensors", config="flux" if like == "flux1" else "sdxl").assumed is None


def test_an_assumption_is_logged_once_it_matters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = kl()
    write_safetensors(tmp_path / "a.safetensors", named(network))
    with caplog.at_level(logging.INFO, "mflux_vae"):
        opened = loading.open_network(tmp_path / "a.safetensors")
        assert "nothing tells how its latents are scaled; taken times 0.18215" in caplog.text
        caplog.clear()
        assert opened.config.scaling_factor == 0.18215
        assert (
            loading.open_network(tmp_path / "a.safetensors", config=network.config.to_dict()).config == network.config
        )
        loading.convert(
            tmp_path / "a.safetensors", tmp_path / "b.safetensors", "compvis", config=network.config.to_dict()
        )
        assert loading.open_network(tmp_path / "b.safetensors").config == network.config
        assert not caplog.records


# configurations

DDCONFIG = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": [16],
    "in_channels": 3,
    "resolution": 32,
    "double_z": True,
    "z_channels": 4,
}
YAML = """
model:
  target: ldm.models.autoencoder.AutoencoderKL
  params:
    embed_dim: 4
    monitor: val/rec_loss
    ddconfig:
      double_z: True
      z_channels: 4
      resolution: 32
      in_channels: 3
      out_ch: 3
      ch: 32
      ch_mult: [1, 2]
      num_res_blocks: 1
      attn_resolutions: [16]
"""


def test_latent_diffusions_configurations_are_accepted_as_they_stand(tmp_path: Path) -> None:
    network = kl(encoder_attention=(1,), decoder_attention=(1,), scaling_factor=1.0, sample_size=32)
    write_safetensors(tmp_path / "a.safetensors", named(network, "compvis"))
    (tmp_path / "a.yaml").write_text(YAML)
    for config in (DDCONFIG, {"ddconfig": DDCONFIG, "embed_dim": 4}, tmp_path / "a.yaml", str(tmp_path / "a.yaml")):
        opened = loading.open_network(tmp_path / "a.safetensors", config=config)
        assert opened.config == network.config and same(parameters(opened), parameters(network))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("nothing", "config nothing: no such file, nor a preset"),
        ("a.json", r"a\.json: not readable as JSON"),
        ("a.yaml", r"a\.yaml: is no YAML"),
        ("b.yaml", r"b\.yaml: not a table of settings"),
        ({"ch": 32}, "ddconfig: .* missing"),
        ({"_class_name": "VQModel"}, "'VQModel' are not known"),
        ({**kl().config.to_dict(), "block_out_channels": [32, 96]}, "misshapen: .*is .*expected"),
        (small_plain().config.to_dict(), "missing: .*unknown: "),
    ],
)
def test_configurations_that_do_not_fit_are_refused(config: Any, told: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", named(kl()))
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "a.yaml").write_text("a: [1")
    (tmp_path / "b.yaml").write_text("- 1")
    config = str(tmp_path / config) if isinstance(config, str) and "." in config else config
    with pytest.raises((SettingsError, WeightsError), match=told) as caught:
        loading.open_network(tmp_path / "a.safetensors", config=config)
    assert "\n" not in str(caught.value)


ODD = (None, 0, -1, 1.5, 2**40, "", "x", [], {}, [0], [-8], ["a"], [1.5], [2**40], True, float("nan"), 1e300, [[1]])


@pytest.mark.parametrize("name", FAMILIES)
def test_no_configuration_ends_in_a_traceback(name: str) -> None:
    family, refused = FAMILIES[name], 0
    usual = family.config().to_dict()
    for key in usual:
        for value in ODD:
            try:
                family.build({**usual, key: value})
            except SettingsError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 50


# what is no autoencoder


def test_files_without_an_autoencoder_say_what_they_hold(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"model.layers.0.weight": mx.ones(2), "lm_head.weight": mx.ones(2)})
    with pytest.raises(
        WeightsError, match=r"no autoencoder of a known kind; its 2 tensors begin with lm_head\.weight, model\.layers"
    ):
        loading.open_network(tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "b.safetensors", {f"layer{i}.a.b": mx.ones(2) for i in range(20)})
    with pytest.raises(WeightsError, match=r"layer0\.a, .*, \.\.\.$"):
        loading.open_network(tmp_path / "b.safetensors")


def test_a_network_of_another_kind_lists_what_differs(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", named(kl(), "compvis"))
    with pytest.raises(WeightsError, match=r"missing: .*unknown: "):
        loading.open_network(tmp_path / "a.safetensors", config=small_plain().config.to_dict())


def test_every_wrong_key_is_named(tmp_path: Path) -> None:
    tensors = named(kl(), "compvis")
    del tensors["encoder.norm_out.weight"]
    tensors["encoder.extra.weight"] = mx.ones(3)
    tensors["decoder.conv_out.bias"] = mx.ones(5)
    write_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(WeightsError) as caught:
        loading.open_network(tmp_path / "a.safetensors")
    for part in (
        "1 missing: encoder.conv_norm_out.weight",
        "1 unknown: encoder.extra.weight",
        "1 misshapen: decoder.conv_out.bias is (5,), expected (3,)",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(WeightsError, match="missing"):
        loading.convert(tmp_path / "a.safetensors", tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_norms_that_leave_no_trace_are_asked_for(tmp_path: Path) -> None:
    network = small_kl()
    write_safetensors(tmp_path / "a.safetensors", named(network))
    with pytest.raises(WeightsError, match=r"8 channels are no multiple of 32.*give its configuration"):
        loading.open_network(tmp_path / "a.safetensors")
    opened = loading.open_network(tmp_path / "a.safetensors", config=network.config.to_dict())
    assert same(parameters(opened), parameters(network))


def test_half_an_autoencoder_names_what_is_missing(tmp_path: Path) -> None:
    for half in ("encoder", "decoder"):
        part = {key: value for key, value in named(kl()).items() if key.startswith(half)}
        write_safetensors(tmp_path / "a.safetensors", part)
        with pytest.raises(WeightsError, match=r"\d+ missing: |not recognised"):
            loading.open_network(tmp_path / "a.safetensors")


def test_targets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    loading.save_network(kl(), tmp_path / "a")
    for naming, target, dtype, told in (
        ("taesd", "b", None, "AutoencoderKL has the namings diffusers, compvis, bfl, not 'taesd'"),
        ("compvis", "b", None, "let its name end in .safetensors"),
        ("diffusers", "b", "int8", "float32, float16, bfloat16, not 'int8'"),
    ):
        with pytest.raises(SettingsError, match=told):
            loading.convert(tmp_path / "a", tmp_path / target, naming, dtype)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


# folders


def test_older_folders_are_read_too(tmp_path: Path) -> None:
    network = kl()
    loading.save_network(network, tmp_path)
    whole = tmp_path / f"{STEM}.safetensors"
    whole.rename(tmp_path / f"{STEM}.fp16.safetensors")
    assert same(parameters(loading.open_network(tmp_path)), parameters(network))
    (tmp_path / f"{STEM}.fp16.safetensors").unlink()
    tensors, storages = of_arrays(arrays(network))
    write_zip(tmp_path / f"{STEM}.bin", tensors, storages)
    assert same(parameters(loading.open_network(tmp_path)), parameters(network))


def test_a_folder_without_configuration_has_one_file(tmp_path: Path) -> None:
    network = kl()
    write_safetensors(tmp_path / "vae.safetensors", named(network, "compvis"))
    assert same(parameters(loading.open_network(tmp_path)), parameters(network))
    write_safetensors(tmp_path / "other.safetensors", named(network))
    with pytest.raises(WeightsError, match=r"config\.json: no such file; of its 2 weights files, name the one"):
        loading.open_network(tmp_path)


def test_folders_and_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json: no such file; nor are there weights"):
        loading.open_network(tmp_path)
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(WeightsError, match="nor are there weights"):
        loading.open_network(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="no such weights file"):
        loading.open_network("/dev/null")
    with pytest.raises(WeightsError, match="no such file or folder"):
        loading.open_network(tmp_path / ("x" * 5000))


def test_tensors_are_read_when_they_are_used(tmp_path: Path) -> None:
    """A sparse file of 800 MB: what is opened is not read."""
    path = lazily(tmp_path / "a.safetensors", "cogview4", "compvis")
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    network = loading.open_network(path, config="cogview4")
    assert mx.get_peak_memory() - before < 2**22
    assert sum(value.size for value in parameters(network).values()) == 406_100_643


# the hub

TREE = {
    "owner/pipeline": ("model_index.json", "vae/config.json", f"vae/{STEM}.safetensors", f"unet/{STEM}.safetensors"),
    "stabilityai/sdxl-vae": ("config.json", f"{STEM}.safetensors", "sdxl_vae.safetensors"),
    "owner/old": ("config.json", f"{STEM}.bin"),
    "owner/single": ("flux_vae.safetensors", "README.md"),
    "owner/empty": ("config.json",),
}


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Repositories in a folder; downloading copies what matches into a cache, and is written down."""
    from fnmatch import fnmatch

    network, cache, asked = kl(), tmp_path / "cache", []
    tensors, storages = of_arrays(arrays(network))

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], revision: str | None) -> str:
        if repo_id not in TREE:
            raise huggingface_hub.errors.RepositoryNotFoundError(
                "404", response=SimpleNamespace(headers={}, request=None)
            )
        root = cache / repo_id
        root.mkdir(parents=True, exist_ok=True)
        for name in TREE[repo_id]:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                asked.append(f"{repo_id}/{name}")
                path = root / name
                path.parent.mkdir(exist_ok=True)
                if path.suffix == ".json":
                    path.write_text(json.dumps(network.config.to_dict()))
                elif path.suffix == ".bin":
                    write_zip(path, tensors, storages)
                else:
                    write_safetensors(path, named(network))
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(network=network, asked=asked)


@pytest.mark.parametrize(
    ("source", "weights"),
    [
        ("owner/pipeline", f"owner/pipeline/vae/{STEM}.safetensors"),
        ("owner/pipeline/vae", f"owner/pipeline/vae/{STEM}.safetensors"),
        ("sdxl", f"stabilityai/sdxl-vae/{STEM}.safetensors"),
        ("SD-XL", f"stabilityai/sdxl-vae/{STEM}.safetensors"),
        ("stabilityai/sdxl-vae", f"stabilityai/sdxl-vae/{STEM}.safetensors"),
        ("stabilityai/sdxl-vae/sdxl_vae.safetensors", "stabilityai/sdxl-vae/sdxl_vae.safetensors"),
        ("owner/old", f"owner/old/{STEM}.bin"),
        ("owner/single/flux_vae.safetensors", "owner/single/flux_vae.safetensors"),
    ],
)
def test_the_hub_gives_the_autoencoder_and_nothing_else(
    source: str, weights: str, fake_hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert same(parameters(loading.open_network(source)), parameters(fake_hub.network))
    assert {name for name in fake_hub.asked if not name.endswith(".json")} == {weights}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("owner/nothing", "owner/nothing: no such file or folder here, and no such repository on the hub"),
        ("owner/single", "has no vae/config.json; name one of its files: owner/single/FILE"),
        ("owner/pipeline/unet", "has no unet/config.json"),
        ("owner/empty", rf"has no {STEM}\.safetensors"),
        ("nothing", "nothing: no such file or folder; known presets: sd1, "),
        ("./owner/pipeline", "no such file or folder; known presets"),
        ("models/vae.safetensors", "no such file or folder; known presets"),
        ("a/b/c.txt", "no such repository"),
    ],
)
def test_what_the_hub_does_not_have_is_said(
    source: str, told: str, fake_hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=told):
        loading.open_network(source)


def http(kind: type[Exception]) -> Exception:
    return kind("Client error 403\nmore", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (lambda: http(huggingface_hub.errors.GatedRepoError), "a/b: is gated; accept its conditions.*hf auth login"),
        (
            lambda: http(huggingface_hub.errors.HfHubHTTPError),
            r"the download failed \(Client error 403\); the same command",
        ),
        (
            lambda: huggingface_hub.errors.LocalEntryNotFoundError("x"),
            "not in the cache, and the hub cannot be reached",
        ),
        (lambda: huggingface_hub.errors.OfflineModeIsEnabled("x"), "not in the cache, and the hub cannot be reached"),
        (lambda: huggingface_hub.errors.HFValidationError("x"), "no name of a repository"),
        (lambda: ConnectionResetError("reset by peer"), r"failed \(reset by peer\); the same command resumes it"),
        (lambda: OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_downloads_that_fail_say_why(error, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(WeightsError, match=told) as caught:
        hub.fetch("a/b")
    assert "\n" not in str(caught.value)


def test_plain_networks_still_need_no_table() -> None:
    assert isinstance(small_plain(), PlainAutoencoder) and list(FAMILIES["PlainAutoencoder"].tables) == ["diffusers"]
