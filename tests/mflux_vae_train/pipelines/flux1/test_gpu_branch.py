"""FLUX trains on Metal and CUDA as on a CPU: the code for them, run on the CPU."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.kernels import gpu_attention
from mflux_vae_train import lora
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.pipelines.flux1.packing import image_ids, text_ids
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer
from mflux_vae_train.training.step import MicroBatch, Step
from tests.helpers import gpu_branch
from tests.helpers.peak_memory import peak_of
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn, small_config

SIDE, TEXT = 8, 6


pytestmark = pytest.mark.usefixtures("uncompiled")
"""`test_compiled_update` covers compilation."""


def trained(updates: int, dtype: mx.Dtype, *, dora: bool = False) -> tuple[dict[str, np.ndarray], list[float]]:
    """Adapter and losses after some updates."""
    network = drawn(FluxTransformer(small_config(num_single_layers=1)), 0)
    network.set_dtype(dtype)
    lora.add_lora(network, ["*transformer_blocks.*"], rank=4, dora=dora)
    config, ids = network.config, (image_ids(SIDE, SIDE), text_ids(TEXT))
    shapes = {
        "latents": (2, SIDE**2 // 4, config.in_channels),
        "prompt": (2, TEXT, config.joint_attention_dim),
        "pooled": (2, config.pooled_projection_dim),
        "target": (2, SIDE**2 // 4, config.in_channels),
    }

    def loss(model: nn.Module, arrays: dict[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
        inputs = (arrays[name].astype(dtype) for name in ("latents", "prompt", "pooled"))
        velocity = model(*inputs, mx.array([0.3, 0.7]), *ids).astype(mx.float32)
        return mx.square(velocity - arrays["target"]).mean(), {}

    step, losses = Step(network, AdamW(), loss), []
    for update in range(updates):
        keys = mx.random.split(mx.random.key(update), len(shapes))
        arrays = {name: mx.random.normal(shapes[name], key=key) for name, key in zip(shapes, keys, strict=True)}
        losses.append(step(update, [MicroBatch(arrays=arrays, weight=2)], 1e-3)["loss"])
    return {name: np.array(array) for name, array in tree_flatten(network.trainable_parameters())}, losses


@pytest.mark.parametrize(("updates", "dora"), [(24, False), (4, True)])
def test_an_adapter_in_float32_equals_that_of_a_cpu(updates: int, dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_branch.force(monkeypatch, cpu=True)
    expected, _ = trained(updates, mx.float32, dora=dora)
    gpu_branch.force(monkeypatch)
    found, _ = trained(updates, mx.float32, dora=dora)
    assert found.keys() == expected.keys()
    # as a whole: AdamW magnifies the rounding of single gradients that are nearly zero
    ours, cpus = (np.concatenate([adapter[name].ravel() for name in expected]) for adapter in (found, expected))
    difference = float(np.linalg.norm(ours - cpus) / np.linalg.norm(cpus))
    print(f"relative difference {difference:.1e}")
    assert difference < 1e-5


def test_losses_in_bfloat16_are_those_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_branch.force(monkeypatch)
    (_, half), (_, full) = (trained(8, dtype) for dtype in (mx.bfloat16, mx.float32))
    assert np.mean(np.abs(np.subtract(half, full)) / full) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("double", "single"), [(2, 0), (0, 2)], ids=["double", "single"])
def test_what_a_block_keeps_grows_with_the_tokens_and_not_with_their_square(
    double: int, single: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_branch.force(monkeypatch)
    monkeypatch.setattr(gpu_attention, "MAX_SCORES", 1 << 17)
    text, width = 64, 2 * 32

    def peak(times: int, side: int) -> int:
        blocks = {"num_layers": max(double * times, 1), "num_single_layers": max(single * times, 1)}
        network = FluxTransformer(small_config(**blocks, attention_head_dim=32, axes_dims_rope=(8, 12, 12)))
        lora.add_lora(network, ["*transformer_blocks.*"], rank=4)
        mx.eval(network.parameters())
        config, shapes = network.config, (image_ids(side, side), text_ids(text))
        latents, prompt = mx.ones((1, side**2 // 4, config.in_channels)), mx.ones((1, text, config.joint_attention_dim))
        inputs = latents, prompt, mx.ones((1, config.pooled_projection_dim)), mx.array([0.5]), *shapes
        return peak_of(lambda: nn.value_and_grad(network, lambda net: net(*inputs).sum())(network)[1])

    kept = {side**2 // 4 + text: (peak(2, side) - peak(1, side)) / 2 for side in (16, 48)}
    per_token = [numbers / (4 * width * tokens) for tokens, numbers in kept.items()]
    print(f"kept by tokens, in units of the width: {dict(zip(kept, per_token, strict=True))}")
    scores = [2 * tokens / width for tokens in kept]  # of two heads
    assert per_token[1] - per_token[0] < 0.15 * (scores[1] - scores[0])
