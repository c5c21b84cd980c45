"""A stack of FLUX.2 blocks in a training step: its peak of memory, measured and estimated."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from benchmarks.gpu.flux_stack import filled
from mflux_vae.runtime.device import compute_dtype
from mflux_vae_train import lora
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.pipelines.flux2 import memory, naming
from mflux_vae_train.pipelines.flux2.transformer import Flux2Transformer, Flux2TransformerConfig, image_ids, text_ids
from mflux_vae_train.pipelines.footprint import Precision, Workload, learning_bytes
from mflux_vae_train.pipelines.quantization import stored_bytes
from mflux_vae_train.training.step import Arrays, MicroBatch, Step

RANK = 16


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Blocks, heads of 128, side of the latents, text tokens, and whether blocks are computed again."""

    double: int = 1
    single: int = 1
    heads: int = 24
    side: int = 16
    text: int = 256
    recompute: bool = False

    @property
    def config(self) -> Flux2TransformerConfig:
        return Flux2TransformerConfig(
            num_layers=self.double, num_single_layers=self.single, num_attention_heads=self.heads
        )


def measured(stack: Stack) -> int:
    """Bytes at the peak of the second update of the default LoRA."""
    gc.collect()
    mx.clear_cache()
    before, dtype = mx.get_active_memory(), compute_dtype()
    network = filled(Flux2Transformer(stack.config))
    lora.add_lora(network, naming.PRESETS["attention"], rank=RANK)
    network.gradient_checkpointing = stack.recompute
    shapes = {"latents": (1, stack.side**2, 128), "prompt": (1, stack.text, 7680), "target": (1, stack.side**2, 128)}
    arrays = {name: mx.random.normal(shape, key=mx.random.key(0)) for name, shape in shapes.items()}
    ids = image_ids(stack.side, stack.side), text_ids(stack.text)

    def loss(model: nn.Module, given: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        velocity = model(given["latents"].astype(dtype), given["prompt"].astype(dtype), mx.full((1,), 0.5), *ids)
        return mx.square(velocity.astype(mx.float32) - given["target"]).mean(), {}

    step = Step(network, AdamW(), loss)
    for update in range(2):
        mx.clear_cache()
        mx.reset_peak_memory()
        step(update, [MicroBatch(arrays=arrays, weight=1)], 1e-4)
    return mx.get_peak_memory() - before


def estimated(stack: Stack) -> int:
    """The same, by `memory`."""
    here, network = Precision.here(), Flux2Transformer(stack.config)
    trained = RANK * sum(lora.matching(network, naming.PRESETS["attention"]).values())
    tokens = stack.side**2 + stack.text
    work = memory.activations(stack.config).training_bytes(tokens, 1, here, checkpointing=stack.recompute)
    return stored_bytes(network, here.width) + learning_bytes(Workload(resolution=16, trained=trained), here) + work
