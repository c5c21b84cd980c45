"""Estimates of FLUX.1's memory and operations, from its configurations alone.

Bytes of weights are exact. Activations are counted in numbers per token, in units of the width D: those that a block
keeps for its backward pass, and those that exist while one block is differentiated. The constants come from reading
the blocks and from measuring stacks of blocks at full width; a test repeats the measurement.

Measured at full size (random weights, MLX 0.32.4 on a CPU, float32): schnell with `--quantize 4
--gradient_checkpointing --resolution 64 --max_sequence_length 64 --train_batch_size 1` had its peak of 9.58 GB in the
update; the estimate was 9.7 GB. The process held 11.9 GB with MLX's cache of freed memory.

For Metal and CUDA the code for them was measured on the CPU, in bfloat16, with a compiled update and the order of
evaluation that MLX has on Metal (MLX_BFS_MAX_WIDTH=20). It was not measured on a Mac.
"""

from __future__ import annotations

from functools import partial

from mflux_vae_train.pipelines.flow import memory
from mflux_vae_train.pipelines.flux1.configs import Configs
from mflux_vae_train.pipelines.flux1.family import is_quantized_layer, is_quantized_text_layer
from mflux_vae_train.pipelines.flux1.packing import PATCH, VAE_FACTOR
from mflux_vae_train.pipelines.flux1.transformer import MLP_RATIO, FluxTransformer, FluxTransformerConfig
from mflux_vae_train.pipelines.footprint import FULL, Phase, Precision, Workload, clip_bytes, weight_bytes
from mflux_vae_train.pipelines.text.clip import CLIPTextModel
from mflux_vae_train.pipelines.text.t5 import T5Encoder

KEPT = {4: (13.5, 17.5), 2: (18.5, 17.0)}
"""Kept by a double and by a single block, per token and D: inputs of norms, of GELU and of layers with an adapter,
queries, keys, values. By bytes of a number: float32 was measured on a CPU, half precision with the code for GPUs."""

WORKING = {4: (52.5, 52.5), 2: (85.0, 75.0)}
"""Temporary, per token and D, while a block's feed-forward layers are differentiated: by bytes of a number, without and
with gradient checkpointing. In half precision some gradients are float32, which counts twice."""

T5_WORKING = 6.0
"""Temporary in T5, per token, in units of its width plus that of its feed-forward layers."""


def phases(configs: Configs, work: Workload, *, text_tokens: int, precision: Precision | None = None) -> list[Phase]:
    """The phases of a run in order.

    Args:
        text_tokens: per prompt, for T5.
        precision: None for this machine's.
    """
    here = precision or Precision.here()
    config = configs.transformer
    clip = weight_bytes(CLIPTextModel, configs.text_encoder, here.width) if work.text_encoder else 0
    together = work.batch * work.joined_micro_batches
    costs = memory.Costs(
        transformer=weight_bytes(FluxTransformer, config, here.width, work.quantize, is_quantized_layer) + clip,
        activations=activations(config),
        operations=partial(forward_operations, config),
        text_tokens=text_tokens,
        image_token=VAE_FACTOR * PATCH,
        largest_layer=largest_layer(config),
        largest_embedding=configs.text_encoder_2.vocab_size * configs.text_encoder_2.d_model,
        text_training=clip_bytes(configs.text_encoder, together) if work.text_encoder else 0,
        guided=work.guidance > 1 and not config.guidance_embeds,
    )
    return memory.phases(costs, work, configs.vae, _prompts(configs, work, text_tokens, here), here)


def activations(config: FluxTransformerConfig) -> memory.Activations:
    """Activations of the transformer."""
    return memory.Activations(
        width=config.width,
        heads=config.num_attention_heads,
        blocks=(config.num_layers, config.num_single_layers),
        kept=KEPT,
        working=WORKING,
    )


def largest_layer(config: FluxTransformerConfig) -> int:
    """Weights of a single block's last layer."""
    return (1 + MLP_RATIO) * config.width**2


def forward_operations(config: FluxTransformerConfig, tokens: tuple[int, int]) -> float:
    """Multiplications and additions of the matrix products in a forward pass with one sample."""
    width, length = config.width, sum(tokens)
    blocks = config.num_layers + config.num_single_layers
    layers = (4 + 2 * MLP_RATIO) * width**2 * length  # equal in both kinds of blocks
    return 2.0 * blocks * (layers + 2 * length**2 * width)


def _prompts(configs: Configs, work: Workload, length: int, here: Precision) -> Phase:
    t5, clip = configs.text_encoder_2, configs.text_encoder
    weights = weight_bytes(T5Encoder, t5, here.width, work.quantize, is_quantized_text_layer)
    weights += weight_bytes(CLIPTextModel, clip, here.width)
    rows = min(work.prompts, work.prompts_per_batch) * length
    bias = t5.num_heads * length**2 * here.width
    activations = int(T5_WORKING * FULL * (t5.d_model + t5.d_ff) * rows) + 2 * bias
    inner = t5.num_heads * t5.d_kv
    layer = 4 * t5.d_model * inner + 3 * t5.d_model * t5.d_ff
    return Phase("text encoding", weights, activations, 2.0 * work.prompts * length * t5.num_layers * layer)
