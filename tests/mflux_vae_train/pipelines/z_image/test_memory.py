"""What Z-Image is estimated to take: beside what a stack of its blocks took, and at full size."""

from __future__ import annotations

import gc
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest

from benchmarks.gpu.flux_stack import filled
from mflux_vae.runtime.device import compute_dtype
from mflux_vae_train import lora
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.pipelines.footprint import Precision, Workload, dequantized_bytes, learning_bytes
from mflux_vae_train.pipelines.quantization import quantize, stored_bytes
from mflux_vae_train.pipelines.z_image import memory, naming
from mflux_vae_train.pipelines.z_image.configs import OF_BASE, OF_TURBO
from mflux_vae_train.pipelines.z_image.family import is_quantized_layer
from mflux_vae_train.pipelines.z_image.packing import padded
from mflux_vae_train.pipelines.z_image.transformer import ZImageTransformer, ZImageTransformerConfig
from mflux_vae_train.training.step import Arrays, MicroBatch, Step
from tests.helpers import gpu_branch

RANK = 16
HALF = Precision(width=2, fused=True)
"""Metal and CUDA."""


def stack(blocks: int, heads: int = 30) -> ZImageTransformerConfig:
    sizes = {"dim": 128 * heads, "n_heads": heads, "n_kv_heads": heads}
    return ZImageTransformerConfig(n_layers=blocks, n_refiner_layers=0, **sizes)


def measured(config: ZImageTransformerConfig, *, side: int, text: int, bits: int | None, checkpointing: bool) -> int:
    """Bytes at the peak of the second update of a LoRA on the attention of every block."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    network = filled(ZImageTransformer(config))
    if bits:
        quantize(network, bits, is_quantized_layer)
    lora.add_lora(network, naming.PRESETS["attention"], rank=RANK)
    network.gradient_checkpointing = checkpointing
    arrays = {
        "latents": mx.random.normal((1, side, side, config.in_channels)),
        "caption": mx.random.normal((1, text, config.cap_feat_dim)),
        "lengths": mx.array([text // 2]),
    }

    def loss(model: nn.Module, given: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        inputs = (given[name].astype(compute_dtype()) for name in ("latents", "caption"))
        latents, caption = inputs
        velocity = model(latents, mx.array([0.5]), caption, given["lengths"]).astype(mx.float32)
        return mx.square(velocity - given["latents"]).mean(), {}

    step = Step(network, AdamW(), loss)
    for update in range(2):
        mx.clear_cache()
        mx.reset_peak_memory()
        step(update, [MicroBatch(arrays=arrays, weight=1)], 1e-4)
    return mx.get_peak_memory() - before


def estimated(config: ZImageTransformerConfig, *, side: int, text: int, bits: int | None, checkpointing: bool) -> int:
    """The same, by `memory`."""
    here, network = Precision.here(), ZImageTransformer(config)
    trained = RANK * sum(lora.matching(network, naming.PRESETS["attention"]).values())
    weights = stored_bytes(network, here.width, bits, is_quantized_layer)
    tokens = padded(side**2 // 4) + padded(text)
    work = memory.activations(config).training_bytes(tokens, 1, here, checkpointing=checkpointing)
    work += dequantized_bytes(memory.largest_layer(config), here) if bits else 0
    return weights + learning_bytes(Workload(resolution=16, trained=trained), here) + work


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_a_small_stack_matches_the_estimate(checkpointing: bool) -> None:
    options = {"side": 16, "text": 32, "bits": None, "checkpointing": checkpointing}
    found, expected = measured(stack(2, 2), **options), estimated(stack(2, 2), **options)
    assert expected == pytest.approx(found, rel=0.15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("blocks", "bits", "side"), [(1, None, 32), (2, None, 16), (2, 4, 32)])
def test_memory_of_a_full_width_stack_matches_the_estimate(
    blocks: int, bits: int | None, side: int, checkpointing: bool
) -> None:
    options = {"side": side, "text": 64, "bits": bits, "checkpointing": checkpointing}
    found, expected = measured(stack(blocks), **options), estimated(stack(blocks), **options)
    print(f"measured {found / 1e6:.0f} MB, estimated {expected / 1e6:.0f} MB")
    assert expected == pytest.approx(found, rel=0.15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_a_stack_on_a_gpu_matches_the_estimate(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_branch.force(monkeypatch)
    options = {"side": 32, "text": 64, "bits": None, "checkpointing": checkpointing}
    found, expected = measured(stack(2, 4), **options), estimated(stack(2, 4), **options)
    print(f"measured {found / 1e6:.0f} MB, estimated {expected / 1e6:.0f} MB")
    assert expected == pytest.approx(found, rel=0.15)


def test_full_size_fits_where_it_should() -> None:
    work = Workload(resolution=512, trained=16 * 1_044_480, class_images=10, guidance=4.0, batch=2)
    small = replace(work, quantize=4, gradient_checkpointing=True)
    phases = memory.phases(OF_BASE, small, text_tokens=512, precision=HALF)
    assert [phase.name for phase in phases] == ["text encoding", "class images", "latents", "training", "previews"]
    assert all(phase.peak < 12e9 for phase in phases), {phase.name: phase.peak / 1e9 for phase in phases}
    whole = {phase.name: phase for phase in memory.phases(OF_BASE, work, text_tokens=512, precision=HALF)}
    assert whole["training"].weights > 12.3e9 and whole["text encoding"].weights > 7.7e9
    unguided = memory.phases(OF_TURBO, replace(work, guidance=0.0), text_tokens=512, precision=HALF)
    assert unguided[1].operations < 0.6 * whole["class images"].operations
    shorter = memory.phases(OF_BASE, work, text_tokens=64, precision=HALF)
    assert shorter[3].work < 0.8 * whole["training"].work
