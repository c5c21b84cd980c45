"""Adapters of Stable Diffusion in the namings of diffusers, kohya's scripts and ComfyUI: the same weight changes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mflux_vae.errors import WeightsError
from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae_train import lora
from mflux_vae_train.lora.dialects import A, B
from mflux_vae_train.lora.targets import dimensions, linears
from mflux_vae_train.pipelines.stable_diffusion import naming
from mflux_vae_train.pipelines.stable_diffusion.configs import SD_1, SD_2, SD_2_BASE, SDXL, Configs
from mflux_vae_train.pipelines.stable_diffusion.files import keys
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet
from mflux_vae_train.pipelines.text import clip
from mflux_vae_train.pipelines.text.clip_naming import CLIP_ATTENTION
from tests.mflux_vae_train.pipelines.stable_diffusion.files.small_models import small_configs

RANK = 3


def networks(configs: Configs) -> dict[str, nn.Module]:
    found = {"unet": UNet(configs.unet), "text_encoder": clip.CLIPTextModel(configs.text_encoder)}
    if configs.text_encoder_2 is not None:
        found["text_encoder_2"] = clip.CLIPTextModelWithProjection(configs.text_encoder_2)
    return found


def names(configs: Configs) -> dict[str, dict]:
    its = naming.kohya_naming(configs)
    return {prefix: {**its.read_only.get(prefix, {}), **modules} for prefix, modules in its.modules.items()}


@cache
def skeletons(kind: str) -> dict[str, nn.Module]:
    return networks(small_configs(kind))


@cache
def matrices(kind: str) -> dict[str, tuple[mx.array, mx.array]]:
    """(A, B) of the attention layers of all networks, by network and path."""
    draws, found = np.random.default_rng(0), {}
    for prefix, network in skeletons(kind).items():
        layers = linears(network)
        for path in lora.matching(network, naming.ATTENTION if prefix == "unet" else CLIP_ATTENTION):
            outputs, inputs = dimensions(layers[path])
            shapes = (RANK, inputs), (outputs, RANK)
            found[f"{prefix}.{path}"] = tuple(mx.array(draws.standard_normal(s, np.float32)) for s in shapes)
    return found


def read(kind: str, tensors: Mapping[str, mx.array], path: Path) -> dict[str, np.ndarray]:
    """Weight changes that a file makes, by network and path."""
    write_safetensors(path, dict(tensors), {})
    files = lora.read_adapter(path, skeletons(kind), names(small_configs(kind)))
    return {
        f"{prefix}.{layer}": np.array(alpha / file.ranks[layer] * file.tensors[layer + B] @ file.tensors[layer + A])
        for prefix, file in files.items()
        for layer, alpha in file.alphas.items()
    }


def kohya(name: str, xl: bool) -> str:
    prefix, _, path = name.partition(".")
    starts = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if xl else "lora_te_", "text_encoder_2": "lora_te2_"}
    return starts[prefix] + path.replace(".", "_")


def spelled(kind: str, dialect: str) -> dict[str, mx.array]:
    """The adapter of `matrices` in another spelling, with alpha twice the rank where it states one."""
    tensors, xl = {}, kind == "sdxl"
    original = {ours: theirs for theirs, ours, _ in keys.transformers(small_configs(kind).unet)}
    for name, (down, up) in matrices(kind).items():
        layer, ends = name, ("lora_A.weight", "lora_B.weight")
        of_text = name.startswith("text_encoder")
        if dialect.startswith("diffusers"):
            middle = "lora_linear_layer" if of_text else "lora"
            ends = f"{middle}.down.weight", f"{middle}.up.weight"
            if "processor" in dialect and not of_text:
                head, _, last = name.removesuffix(".0").rpartition(".")
                layer, ends = f"{head}.processor.{last}_lora", ("down.weight", "up.weight")
            if "without prefix" in dialect:
                layer = layer.removeprefix("unet.")
        elif dialect == "oldest of text":
            if of_text:
                head, _, last = name.removesuffix("_proj").rpartition(".")
                layer, ends = f"{head}.to_{last}_lora", ("down.weight", "up.weight")
        elif dialect != "PEFT":
            ends = "lora_down.weight", "lora_up.weight"
            layer = kohya(name, xl)
            if "original" in dialect and not of_text:
                block = next(ours for ours in original if name.startswith(f"unet.{ours}."))
                layer = name.replace(f"unet.{block}", original[block])
                layer = f"diffusion_model.{layer}" if "dots" in dialect else f"lora_unet_{layer.replace('.', '_')}"
            tensors[f"{layer}.alpha"] = mx.array(2.0 * RANK)
        if dialect == "kernels":
            down, up = down[..., None, None], up[..., None, None]
        tensors |= {f"{layer}.{end}": tensor for end, tensor in zip(ends, (down, up), strict=True)}
    return tensors


DIALECTS = (
    *(
        "PEFT",
        "diffusers before PEFT",
        "diffusers, processor",
        "diffusers, processor, without prefix",
        "oldest of text",
    ),
    *("kohya", "kohya, original", "kohya, original, dots", "kernels"),
)


@pytest.mark.parametrize(("kind", "dialect"), [("sd2", one) for one in DIALECTS] + [("sdxl", one) for one in DIALECTS])
def test_every_spelling_is_the_same_adapter(kind: str, dialect: str, tmp_path: Path) -> None:
    found, expected = read(kind, spelled(kind, dialect), tmp_path / "a.safetensors"), matrices(kind)
    assert found.keys() == expected.keys()
    factor = 2.0 if ("kohya" in dialect or dialect == "kernels") else 1.0
    for name, (a, b) in expected.items():
        np.testing.assert_allclose(found[name], factor * np.array(b @ a), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_what_is_written_for_kohya_is_read_back(kind: str, tmp_path: Path) -> None:
    configs, tensors = small_configs(kind), {}
    trained = networks(configs)
    for prefix, network in trained.items():
        patterns = naming.PRESETS["attention+mlp+proj+resnets"] if prefix == "unet" else CLIP_ATTENTION
        lora.add_lora(network, patterns, rank=2, alpha=1.0)
        for index, layer in enumerate(lora.layers(network).values()):
            layer.lora_b = mx.sin(mx.arange(layer.lora_b.size) + index).reshape(layer.lora_b.shape)
        tensors |= lora.kohya_tensors(network, naming.kohya_naming(configs).modules[prefix])
    starts = {name.split(".")[0].split("_text_model")[0].split("_blocks")[0] for name in tensors}
    assert {"lora_unet_input", "lora_te1", "lora_te2"} <= starts if kind == "sdxl" else "lora_unet_down" in starts
    conv, proj = "down_blocks_0_resnets_0_conv1", "down_blocks_1_attentions_0_proj_in"
    if kind == "sdxl":
        conv, proj = "input_blocks_1_0_in_layers_2", "input_blocks_4_1_proj_in"
    shapes = [tensors[f"lora_unet_{name}.lora_{end}.weight"].shape for name in (conv, proj) for end in ("down", "up")]
    ones = (1, 1) if kind == "sd1" else ()
    assert shapes == [(2, 4, 3, 3), (4, 2, 1, 1), (2, 8, *ones), (8, 2, *ones)]
    found = read(kind, tensors, tmp_path / "a.safetensors")
    for prefix, network in trained.items():
        for name, layer in lora.layers(network).items():
            expected = layer.scale * (layer.lora_a @ layer.lora_b).T
            np.testing.assert_allclose(found.pop(f"{prefix}.{name}"), expected, rtol=1e-4, atol=1e-5)
    assert not found


@pytest.mark.parametrize(
    ("configs", "unet", "text", "version", "some"),
    [
        (SD_1, 192, [72], "sd_v1", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"),
        (SD_2_BASE, 192, [138], "sd_v2", "lora_unet_mid_block_attentions_0_proj_in"),
        (SD_2, 192, [138], "sd_v2_v", "lora_te_text_model_encoder_layers_22_mlp_fc2"),
        (SDXL, 722, [72, 192], "sdxl_base_v1-0", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
    ],
)
def test_the_modules_of_kohyas_scripts(configs: Configs, unet: int, text: list, version: str, some: str) -> None:
    its = naming.kohya_naming(configs)
    modules = {prefix: list(names) for prefix, names in its.modules.items()}
    inside = [name for name, (path,) in its.modules["unet"].items() if ".attentions." in path]
    assert [len(inside), *map(len, list(modules.values())[1:])] == [unet, *text]
    assert [
        f"lora_unet_{name}" in modules["unet"] for name in ("down_blocks_0_resnets_1_conv2", "input_blocks_3_0_op")
    ] == ([configs is not SDXL, configs is SDXL])
    assert any(some in names for names in modules.values())
    assert its.metadata["ss_base_model_version"] == version
    assert its.metadata["ss_v2"] == str("v2" in version)
    assert its.metadata["modelspec.architecture"].startswith("stable-diffusion-")


@pytest.mark.parametrize(("configs", "attention", "mlp"), [(SD_1, 128, 160), (SDXL, 560, 700)])
def test_the_presets_have_the_layers_of_diffusers_scripts(configs: Configs, attention: int, mlp: int) -> None:
    unet = UNet(configs.unet)
    of_sdxl = {name: naming.PRESETS[name] for name in naming.PRESETS if configs is SDXL or name != "b-lora"}
    matched = {name: lora.matching(unet, patterns) for name, patterns in of_sdxl.items()}
    assert (len(matched["attention"]), len(matched["attention+mlp"])) == (attention, mlp)
    assert sum(matched["attention"].values()) == (199_296 if configs is SD_1 else 1_451_520)
    assert len(matched["attention+mlp+proj"]) == (192 if configs is SD_1 else 722)
    modules = naming.kohya_naming(configs).modules["unet"]
    named = {path for (path,) in modules.values()}
    assert named >= {*matched["attention+mlp+proj+resnets"]}
    assert all("conv_shortcut" in path for path in named - {*matched["attention+mlp+proj+resnets"]})
    # two of SDXL's eleven transformers, each with ten blocks of eight layers
    assert len(matched.get("b-lora", ())) == (0 if configs is SD_1 else 160)


def test_magnitudes_of_kohyas_dora_are_those_of_outputs(tmp_path: Path) -> None:
    configs = small_configs("sd2")
    tensors = spelled("sd2", "kohya")
    down = next(key for key in tensors if key.endswith("attn2_to_k.lora_down.weight"))
    start = down.removesuffix("lora_down.weight")
    outputs, inputs = tensors[f"{start}lora_up.weight"].shape[0], tensors[down].shape[1]
    one = {key: value for key, value in tensors.items() if key.startswith(start)}
    write_safetensors(tmp_path / "a.safetensors", one | {f"{start}dora_scale": mx.arange(1.0, outputs + 1)[:, None]})
    trained = {"unet": UNet(configs.unet)}
    lora.load_adapter(trained, tmp_path / "a.safetensors", names(configs))
    (layer,) = lora.layers(trained["unet"]).values()
    np.testing.assert_array_equal(layer.m, np.arange(1.0, outputs + 1))
    write_safetensors(tmp_path / "a.safetensors", one | {f"{start}dora_scale": mx.ones((1, inputs))})
    with pytest.raises(WeightsError, match="DoRA with magnitudes of inputs"):
        lora.load_adapter({"unet": UNet(configs.unet)}, tmp_path / "a.safetensors", names(configs))


def test_layers_that_a_unet_lacks_are_unknown(tmp_path: Path) -> None:
    tensors = spelled("sd1", "kohya")
    name = "lora_unet_down_blocks_0_resnets_1_conv_shortcut"  # its channels do not change
    tensors |= {f"{name}.lora_down.weight": mx.ones((1, 4, 1, 1)), f"{name}.lora_up.weight": mx.ones((4, 1, 1, 1))}
    with pytest.raises(WeightsError, match=rf"unknown {name}"):
        read("sd1", tensors, tmp_path / "a.safetensors")


def test_usage_names_the_class_and_the_file() -> None:
    for configs, dora in ((SD_1, False), (SDXL, True)):
        found = naming.usage(None, "adapter.safetensors", "a photo", configs, dora=dora)
        assert configs.class_name in found["diffusers"] and "adapter.safetensors" in found["diffusers"]
        assert f"num_inference_steps={configs.recommended.steps}" in found["diffusers"]
        assert ("--fuse" in found["ComfyUI and AUTOMATIC1111"]) == dora
        assert "clip" not in "".join(found.values())


def test_clip_skip_is_stated_as_each_program_counts() -> None:
    found = naming.usage(None, "adapter.safetensors", "a photo", SD_1, dora=False, clip_skip=1)
    assert "clip_skip=1" in found["diffusers"] and "clip skip to 2" in found["ComfyUI and AUTOMATIC1111"]
    assert naming.kohya_naming(SD_1, 1).metadata["ss_clip_skip"] == "2"
    assert "ss_clip_skip" not in naming.kohya_naming(SD_1).metadata
