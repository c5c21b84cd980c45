"""Stable Diffusion's UNet: configuration, diffusers' predictions, checkpointing, initial weights, the code for GPUs."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError
from mflux_vae_train import lora
from mflux_vae_train.pipelines.stable_diffusion import unet as unet_module
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet, init_weights
from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig
from tests.helpers import gpu_branch
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn
from tests.mflux_vae_train.pipelines.stable_diffusion.small_unet import (
    COUNTS,
    DEEP,
    GOLDEN,
    PUBLISHED,
    SD1,
    SDXL,
    SIZES,
    SMALL,
    SSD,
    inputs,
)

OLD_FILE: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
"""Stable Diffusion 1.5's."""


def largest_difference(found: Any, expected: Any) -> float:
    """Relative to the largest expected number."""
    found, expected = np.array(found, dtype=np.float32), np.array(expected, dtype=np.float32)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_files_of_old_and_new_versions_are_read() -> None:
    assert UNetConfig.from_dict(OLD_FILE) == PUBLISHED["sd1.5"]
    nulls = dict.fromkeys(("upcast_attention", "dual_cross_attention", "num_class_embeds", "only_cross_attention"))
    new = {"attention_head_dim": [8] * 4, "cross_attention_dim": [768] * 4, "only_cross_attention": [False] * 4}
    assert UNetConfig.from_dict({**OLD_FILE, **nulls}) == PUBLISHED["sd1.5"]
    assert UNetConfig.from_dict({**OLD_FILE, **new}).down == PUBLISHED["sd1.5"].down


@pytest.mark.parametrize("config", [*SMALL.values(), *PUBLISHED.values()])
def test_config_round_trip(config: UNetConfig) -> None:
    assert UNetConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"in_channels": 9}, "inpainting"),
        ({"in_channels": 8}, "InstructPix2Pix"),
        ({"in_channels": 5}, "depth"),
        ({"out_channels": 8}, "channels"),
        ({"num_class_embeds": 1000}, "num_class_embeds"),
        ({"class_embed_type": "projection"}, "class_embed_type"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"only_cross_attention": [True, False, False, False]}, "only_cross_attention"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"encoder_hid_dim": 1024}, "encoder_hid_dim"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ({"addition_embed_type": "text"}, "addition_embed_type"),
        ({"addition_embed_type": "text_time"}, "projection_class_embeddings_input_dim"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}, "SimpleCrossAttnDownBlock2D"),
        ({"block_out_channels": [320, 640, 1280]}, "block_out_channels"),
        ({"attention_head_dim": [5, 10]}, "attention_head_dim"),
        ({"attention_head_dim": 7}, "attention_head_dim"),
        ({"norm_num_groups": 33}, "norm_num_groups"),
        ({"layers_per_block": 10**9}, "layers"),
        ({"transformer_layers_per_block": [[1, 1], [1, 2], [1, 1], 1]}, "reverse_transformer_layers_per_block"),
        ({"_class_name": "UNet2DModel"}, "UNet2DModel"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        UNetConfig.from_dict({**OLD_FILE, **changes})


def test_the_refiner_is_refused() -> None:
    refiner = {
        **PUBLISHED["sd2.1"].to_dict(),
        "block_out_channels": [384, 768, 1536, 1536],
        "attention_head_dim": [6, 12, 24, 24],
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 4,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    }
    with pytest.raises(SettingsError, match="refiner"):
        UNetConfig.from_dict(refiner)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_numbers_of_weights(name: str) -> None:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    parameters = tree_flatten(UNet(PUBLISHED[name]).parameters())
    assert (sum(value.size for _, value in parameters), len(parameters)) == COUNTS[name]
    assert mx.get_peak_memory() - before < 2**20


@pytest.mark.parametrize("name", SMALL)
def test_prediction_and_gradient_are_those_of_diffusers(name: str) -> None:
    golden = mx.load(str(GOLDEN))
    model = drawn(UNet(SMALL[name]), 11)
    latents, *rest = inputs(SMALL[name], SIZES[name])
    gradient = mx.grad(lambda x: mx.square(model(x, *rest)).mean())(latents)
    assert largest_difference(model(latents, *rest), golden[f"{name}.prediction"]) <= 1e-4
    assert largest_difference(gradient, golden[f"{name}.gradient"]) <= 1e-4


def test_gradient_checkpointing_changes_no_bit() -> None:
    model, given = drawn(UNet(SSD), 11), inputs(SSD, SIZES["ssd"])
    lora.add_lora(model, ["*.to_q", "*.to_v", "*.time_emb_proj", "*.ff.net.2"], rank=2, dropout=0.5)
    for layer in lora.layers(model).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape, scale=0.1, key=mx.random.key(3))

    trained, (latents, *rest) = model.trainable_parameters(), given

    def loss(parameters: dict[str, Any], x: mx.array) -> mx.array:
        model.update(parameters)
        return mx.square(model(x, *rest)).mean()

    def slopes() -> dict[str, mx.array]:
        # latents, too: outside of traces, a CPU computes with other kernels, whose rounding differs
        with lora.dropout_keys(model, mx.array([[1, 2], [3, 4]], mx.uint32)):
            value, (of_weights, of_latents) = mx.value_and_grad(loss, argnums=(0, 1))(trained, latents)
        model.update(trained)
        return {"loss": value, "latents": of_latents, **dict(tree_flatten(of_weights))}

    expected = slopes()
    model.gradient_checkpointing = True
    found = slopes()
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)


def test_samples_of_a_batch_are_independent() -> None:
    model = drawn(UNet(SDXL), 11)
    latents, timesteps, text, (pooled, time_ids) = inputs(SDXL, (6, 8), batch=3)
    together = model(latents, timesteps, text, (pooled, time_ids))
    alone = model(latents[1:2], timesteps[1:2], text[1:2], (pooled[1:2], time_ids[1:2]))
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-4, atol=1e-5)


def test_sizes_are_required_only_if_embedded() -> None:
    for config, others in ((SD1, SDXL), (SDXL, SD1)):
        model = UNet(config)
        latents, timesteps, text = inputs(config, (8, 8))[:3]
        with pytest.raises(ValueError, match="time ids"):
            model(latents, timesteps, text, *inputs(others, (8, 8))[3:])


def test_initial_weights_are_a_function_of_the_key() -> None:
    models = [UNet(DEEP) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        init_weights(model, mx.random.key(seed))
    first, same, other = (dict(tree_flatten(model.parameters())) for model in models)
    assert all(mx.array_equal(first[name], same[name]) for name in first)
    assert not mx.array_equal(first["conv_in.weight"], other["conv_in.weight"])
    assert all(bool((first[name] == 1).all()) for name in first if "norm" in name and name.endswith("weight"))
    convolution = first["mid_block.resnets.0.conv1.weight"]
    assert float(mx.abs(convolution).max()) == pytest.approx((9 * 16) ** -0.5, rel=0.01)


@pytest.mark.parametrize("config", [SD1, SSD], ids=["sd1", "ssd"])
def test_gradient_reaches_every_parameter(config: UNetConfig) -> None:
    model, given = drawn(UNet(config), 3), inputs(config, (6, 5))
    _, gradients = nn.value_and_grad(model, lambda: mx.square(model(*given)).mean())()
    found = dict(tree_flatten(gradients))
    assert found.keys() == dict(tree_flatten(model.parameters())).keys()
    assert all(bool(mx.isfinite(gradient).all()) for gradient in found.values())
    assert not [name for name, gradient in found.items() if not float(mx.abs(gradient).max()) > 0]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["sd2", "no middle"])
def test_the_code_for_gpus_in_float32_equals_that_of_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (latents, *rest) = drawn(UNet(SMALL[name]), 11), inputs(SMALL[name], SIZES[name])

    def results() -> tuple[mx.array, mx.array]:
        gradient = mx.grad(lambda x: mx.square(model(x, *rest)).mean())(latents)
        return model(latents, *rest), gradient

    gpu_branch.force(monkeypatch, cpu=True)
    expected = results()
    gpu_branch.force(monkeypatch)
    for ours, cpus in zip(results(), expected, strict=True):
        assert largest_difference(ours, cpus) < 1e-5


@pytest.mark.usefixtures("gpu_branch", "uncompiled")
@pytest.mark.parametrize("name", ["sd2", "ssd"])
def test_activations_in_bfloat16_stay_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SMALL[name]
    model = drawn(UNet(config), 11)
    exact = model(*inputs(config, SIZES[name]))
    model.set_dtype(mx.bfloat16)
    given = inputs(config, SIZES[name], dtype=mx.bfloat16)
    dtypes = set()

    def call(block: nn.Module, *arrays: mx.array) -> mx.array:
        y: mx.array = block(*arrays)
        dtypes.update(array.dtype for array in (*arrays, y))
        return y

    monkeypatch.setattr(unet_module, "_call", call)
    half = model(*given)
    assert dtypes == {mx.bfloat16} == {half.dtype}
    assert float(mx.abs(half - exact).max() / mx.abs(exact).max()) < 0.1


def test_a_training_step_can_be_compiled() -> None:
    """Nothing is evaluated while it is traced; the compiler for CPUs, which takes a minute, does not run."""
    model, given = drawn(UNet(SDXL), 11), inputs(SDXL, (5, 4))
    model.gradient_checkpointing = True

    def loss(*arrays: mx.array) -> mx.array:
        return mx.square(model(*arrays[:3], arrays[3:])).mean()

    value, slope = mx.compile(mx.value_and_grad(loss))(*given[:3], *given[3])
    assert value.shape == () and slope.shape == given[0].shape


@pytest.mark.slow
def test_a_compiled_call_gives_the_same() -> None:
    model, given = drawn(UNet(SDXL), 11), inputs(SDXL, (5, 4))
    compiled = mx.compile(lambda *arrays: model(*arrays[:3], arrays[3:]))
    assert largest_difference(compiled(*given[:3], *given[3]), model(*given)) < 1e-5
