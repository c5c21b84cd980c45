"""Networks from folders, single files in every naming and whole models; and back, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mflux_vae import PlainAutoencoder, SettingsError, WeightsError
from mflux_vae.networks.tiny import AutoencoderTiny
from mflux_vae.pretrained import loading
from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.weights.formats.files import open_weights, write_safetensors
from mflux_vae.weights.keymaps.diffusers import STEM
from tests.mflux_vae.naming_samples import NETWORKS, arrays, flux2, kl, lazily, named, parameters, same, tiny
from tests.mflux_vae.small_models import drawn, small_kl, small_plain
from tests.mflux_vae.weights.torch_writer import of_arrays, write_old, write_zip

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
        kept = {"scaling_factor", "sample_size", "temperal_downsample"}
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
    with pytest.raises(WeightsError, match=f"taesd_{other}"):
        loading.open_network(tmp_path / f"taesd_{opened}{suffix}")


def test_comfyuis_names_of_taesds_halves(tmp_path: Path) -> None:
    network = tiny()
    write_safetensors(
        tmp_path / "a.safetensors", {f"taesd_{key}": value for key, value in named(network, "taesd").items()}
    )
    assert same(parameters(loading.open_network(tmp_path / "a.safetensors")), parameters(network))


# what is no autoencoder


def test_files_without_an_autoencoder_say_what_they_hold(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"model.layers.0.weight": mx.ones(2), "lm_head.weight": mx.ones(2)})
    with pytest.raises(WeightsError, match=r"lm_head\.weight"):
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
    with pytest.raises(WeightsError, match=r"multiple of 32"):
        loading.open_network(tmp_path / "a.safetensors")
    opened = loading.open_network(tmp_path / "a.safetensors", config=network.config.to_dict())
    assert same(parameters(opened), parameters(network))


def test_half_an_autoencoder_names_what_is_missing(tmp_path: Path) -> None:
    for half in ("encoder", "decoder"):
        part = {key: value for key, value in named(kl()).items() if key.startswith(half)}
        write_safetensors(tmp_path / "a.safetensors", part)
        with pytest.raises(WeightsError, match=r"missing"):
            loading.open_network(tmp_path / "a.safetensors")


def test_targets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    loading.save_network(kl(), tmp_path / "a")
    for naming, target, dtype, told in (
        ("taesd", "b", None, "taesd"),
        ("compvis", "b", None, "safetensors"),
        ("diffusers", "b", "int8", "int8"),
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
    with pytest.raises(WeightsError, match=r"2 weights files"):
        loading.open_network(tmp_path)


def test_folders_and_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no autoencoder"):
        loading.open_network(tmp_path)
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(WeightsError, match="nor a weights file"):
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


def test_plain_networks_still_need_no_table() -> None:
    assert isinstance(small_plain(), PlainAutoencoder) and list(FAMILIES["PlainAutoencoder"].tables) == ["diffusers"]


@pytest.mark.parametrize("source", [None, 5, ""])
def test_a_model_without_a_name_is_refused(source):
    with pytest.raises(WeightsError, match="the model is"):
        loading.open_network(source)
