"""A UNet with few layers in a training step: its peak of memory, measured and estimated."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from benchmarks.gpu.flux_stack import filled
from mflux_vae.runtime.device import compute_dtype
from mflux_vae_train import lora
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.pipelines.footprint import Precision, Workload, training_phase
from mflux_vae_train.pipelines.quantization import stored_bytes
from mflux_vae_train.pipelines.stable_diffusion import memory, naming
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet
from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig
from mflux_vae_train.training.step import Arrays, MicroBatch, Step

RANK = 16


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One to be measured: a UNet, the side of its latents, and how it is trained."""

    config: UNetConfig
    side: int = 32
    batch: int = 1
    recompute: bool = False
    full: bool = False


def measured(stack: Stack, updates: int = 2) -> int:
    """Bytes at the peak of the last of some updates."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    network, config, batch = filled(UNet(stack.config)), stack.config, stack.batch
    if not stack.full:
        lora.add_lora(network, naming.PRESETS["attention"], rank=RANK)
    network.gradient_checkpointing = stack.recompute
    latents = (batch, stack.side, stack.side, config.in_channels)
    arrays = {
        "latents": mx.random.normal(latents),
        "text": mx.random.normal((batch, memory.TEXT_TOKENS, config.cross_attention_dim)),
        "target": mx.random.normal(latents),
    }

    def loss(model: nn.Module, given: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        inputs = (given[name].astype(compute_dtype()) for name in ("latents", "text"))
        latents, text = inputs
        predicted = model(latents, mx.full((batch,), 500), text).astype(mx.float32)
        return mx.square(predicted - given["target"]).mean(), {}

    step = Step(network, AdamW(), loss)
    for update in range(updates):
        mx.clear_cache()
        mx.reset_peak_memory()
        step(update, [MicroBatch(arrays=arrays, weight=batch)], 1e-4)
    return mx.get_peak_memory() - before


def estimated(stack: Stack) -> int:
    """The same, by `memory`."""
    here, network = Precision.here(), UNet(stack.config)
    weights = stored_bytes(network, here.width)
    trained = weights // here.width
    if not stack.full:
        trained = RANK * sum(lora.matching(network, naming.PRESETS["attention"]).values())
    matrix = mx.zeros((16, 16), compute_dtype() if stack.full else mx.float32)
    state = AdamW().state_bytes(matrix) / matrix.size
    work = Workload(resolution=8 * stack.side, trained=trained, adapter=not stack.full, state_bytes=state)
    activations = memory.training_bytes(
        stack.config, (stack.side,) * 2, stack.batch, here, checkpointing=stack.recompute, full=stack.full
    )
    return training_phase(work, here, weights=weights, activations=activations, operations=0).peak
