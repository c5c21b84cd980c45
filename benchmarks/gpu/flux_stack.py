"""A stack of FLUX blocks in a training step: its peak of memory, measured and estimated, and its time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mflux_vae.runtime.device import compute_dtype
from mflux_vae_train import lora
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.pipelines.flux1 import memory, naming
from mflux_vae_train.pipelines.flux1.family import is_quantized_layer
from mflux_vae_train.pipelines.flux1.packing import image_ids, text_ids
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig
from mflux_vae_train.pipelines.footprint import Precision, Workload, dequantized_bytes, learning_bytes
from mflux_vae_train.pipelines.quantization import quantize, stored_bytes
from mflux_vae_train.training.step import Arrays, MicroBatch, Step

N = TypeVar("N", bound=nn.Module)

RANK = 16


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One to be measured: blocks, heads of 128, side of the latents, text tokens, and how it is held."""

    double: int = 1
    single: int = 1
    heads: int = 24
    side: int = 32
    text: int = 64
    batch: int = 1
    bits: int | None = None
    recompute: bool = False

    @property
    def config(self) -> FluxTransformerConfig:
        return FluxTransformerConfig(
            num_layers=self.double, num_single_layers=self.single, num_attention_heads=self.heads
        )


def measured(stack: Stack) -> int:
    """Bytes at the peak of the second update."""
    return updated(stack)[0]


def updated(stack: Stack) -> tuple[int, float]:
    """Bytes at the peak, and seconds, of the second update of a LoRA on every layer of the blocks."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    network = filled(FluxTransformer(stack.config))
    if stack.bits:
        quantize(network, stack.bits, is_quantized_layer)
    lora.add_lora(network, naming.PRESETS["attention+mlp"], rank=RANK)
    network.gradient_checkpointing = stack.recompute
    arrays, batch = _arrays(stack), stack.batch

    def loss(model: nn.Module, given: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        return mx.square(_velocity(model, stack, given) - given["target"]).mean(), {}

    step = Step(network, AdamW(), loss)
    for update in range(2):
        mx.clear_cache()
        mx.reset_peak_memory()
        start = time.perf_counter()
        step(update, [MicroBatch(arrays=arrays, weight=batch)], 1e-4)
    return mx.get_peak_memory() - before, time.perf_counter() - start


def forward(stack: Stack) -> Callable[[], mx.array]:
    """A forward pass without adapters."""
    network, arrays = filled(FluxTransformer(stack.config)), _arrays(stack)
    mx.eval(arrays)
    return lambda: _velocity(network, stack, arrays)


def _arrays(stack: Stack) -> dict[str, mx.array]:
    batch, config, latents = stack.batch, stack.config, (stack.batch, stack.side**2 // 4, stack.config.in_channels)
    return {
        "latents": mx.random.normal(latents),
        "prompt": mx.random.normal((batch, stack.text, config.joint_attention_dim)),
        "pooled": mx.random.normal((batch, config.pooled_projection_dim)),
        "target": mx.random.normal(latents),
    }


def _velocity(model: nn.Module, stack: Stack, arrays: Arrays) -> mx.array:
    inputs = (arrays[name].astype(compute_dtype()) for name in ("latents", "prompt", "pooled"))
    levels, ids = mx.full((stack.batch,), 0.5), (image_ids(stack.side, stack.side), text_ids(stack.text))
    return model(*inputs, levels, *ids).astype(mx.float32)


def estimated(stack: Stack) -> int:
    """The same, by `memory`."""
    here = Precision.here()
    network = FluxTransformer(stack.config)
    matched = lora.matching(network, naming.PRESETS["attention+mlp"])
    trained = RANK * sum(matched.values())
    weights = stored_bytes(network, here.width, stack.bits, is_quantized_layer)
    tokens = stack.side**2 // 4 + stack.text
    work = memory.activations(stack.config).training_bytes(tokens, stack.batch, here, checkpointing=stack.recompute)
    if stack.bits:
        work += dequantized_bytes(memory.largest_layer(stack.config), here)
    return weights + learning_bytes(Workload(resolution=16, trained=trained), here) + work


def filled(network: N) -> N:
    """The network with weights that cost little to compute, one layer after the other, in the dtype of this device."""
    dtype = compute_dtype()

    def values(array: mx.array) -> mx.array:
        spread = ((mx.arange(array.size) % 997).astype(mx.float32) / 997 - 0.5) * 0.05
        return spread.reshape(array.shape).astype(dtype)

    network.update(tree_map(values, network.parameters()))
    for _, array in tree_flatten(network.parameters()):
        mx.eval(array)
    return network
