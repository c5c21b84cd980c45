"""Adapters for FLUX.2 klein under the names of other programs."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mflux_vae.errors import WeightsError
from mflux_vae_train import lora
from mflux_vae_train.pipelines.flux2 import naming
from mflux_vae_train.pipelines.flux2.configs import BASE_4B, DISTILLED_4B, PUBLISHED
from mflux_vae_train.pipelines.flux2.transformer import Flux2Transformer
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn
from tests.mflux_vae_train.pipelines.flux2.small_klein import small_config

TIME = "time_guidance_embed.timestep_embedder.linear_1"


def adapted(*patterns: str) -> Flux2Transformer:
    network = drawn(Flux2Transformer(small_config()), 0)
    lora.add_lora(network, patterns, rank=2)
    for number, layer in enumerate(lora.layers(network).values()):
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    return network


def products(network: Flux2Transformer) -> dict[str, mx.array]:
    return {path: layer.scale * layer.lora_a @ layer.lora_b for path, layer in lora.layers(network).items()}


def peft(network: Flux2Transformer) -> dict[str, mx.array]:
    return {name.removeprefix("x."): tensor for name, tensor in lora.adapter_tensors(network, "x").items()}


def kohya(network: Flux2Transformer) -> dict[str, mx.array]:
    modules = naming.kohya_naming(network.config).modules["transformer"]
    return lora.kohya_tensors(network, modules)


def bfl(network: Flux2Transformer) -> dict[str, mx.array]:
    """Black Forest Labs' names, with dots."""
    dotted = {"double_blocks_0_": "double_blocks.0.", "img_attn_": "img_attn.", "txt_attn_": "txt_attn."}
    dotted |= {"single_blocks_0_": "single_blocks.0.", "single_blocks_1_": "single_blocks.1."}
    named = {}
    for name, tensor in kohya(network).items():
        for theirs, ours in dotted.items():
            name = name.replace(theirs, ours)
        named[name.removeprefix("lora_unet_")] = tensor
    return named


def mflux(network: Flux2Transformer) -> dict[str, mx.array]:
    short = {"to_out.0.": "to_out.", "timestep_embedder.linear_1": "linear_1"}
    named = {}
    for name, tensor in peft(network).items():
        for ours, theirs in short.items():
            name = name.replace(ours, theirs)
        named[name] = tensor
    return named


@pytest.mark.parametrize(
    ("names", "prefix"),
    [(peft, "transformer."), (peft, ""), (mflux, "transformer."), (bfl, "diffusion_model."), (bfl, "")],
)
def test_adapters_of_other_programs_are_read(names, prefix: str, tmp_path: Path) -> None:
    extra = () if names is bfl else (TIME,)
    network = adapted(*naming.PRESETS["attention+mlp"], *extra)
    tensors = {f"{prefix}{name}": tensor for name, tensor in names(network).items()}
    check(network, tensors, tmp_path / "a.safetensors")


def test_kohyas_naming_is_read(tmp_path: Path) -> None:
    network = adapted(*naming.PRESETS["attention+mlp"])
    tensors = kohya(network)
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in tensors
    assert tensors["lora_unet_single_blocks_1_linear1.lora_down.weight"].shape == (2, 32)
    check(network, tensors, tmp_path / "a.safetensors")


def check(network: Flux2Transformer, tensors: dict[str, mx.array], file: Path) -> None:
    """The file is read with the same products of matrices."""
    mx.save_safetensors(str(file), tensors)
    found = drawn(Flux2Transformer(small_config()), 0)
    names = naming.kohya_naming(found.config)
    known = {"transformer": {**names.modules["transformer"], **names.read_only["transformer"]}}
    lora.load_adapter({"transformer": found}, file, known)
    expected = products(network)
    assert products(found).keys() == expected.keys()
    for path, product in products(found).items():
        assert mx.allclose(product, expected[path], rtol=1e-5, atol=1e-6), path


def test_an_adapter_of_flux1_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    shape = {"lora_A": (2, 3072), "lora_B": (3072, 2)}
    key = "transformer.single_transformer_blocks.0.attn.to_q"
    mx.save_safetensors(str(file), {f"{key}.{name}.weight": mx.zeros(size) for name, size in shape.items()})
    with pytest.raises(WeightsError, match=r"a\.safetensors"):
        lora.load_adapter({"transformer": Flux2Transformer(small_config())}, file)


def test_usage_draws_with_the_distilled_model() -> None:
    texts = naming.usage(BASE_4B, "a.safetensors", "a dog", PUBLISHED[BASE_4B].recommended, dora=False)
    assert texts.keys() == {"diffusers", "mflux", "ComfyUI"}
    assert all(DISTILLED_4B in text for text in texts.values())
    assert all("4 steps" in text or "steps 4" in text for text in texts.values())


@pytest.mark.parametrize(("repository", "steps"), [(BASE_4B, 50), (DISTILLED_4B, 4)])
def test_usage_of_a_folder_has_the_steps_of_its_model(repository: str, steps: int) -> None:
    text = naming.usage(None, "a.safetensors", "a dog", PUBLISHED[repository].recommended, dora=False)["diffusers"]
    assert "path/to" in text and f"num_inference_steps={steps}," in text
