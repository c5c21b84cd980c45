"""Estimates of FLUX.2 klein's memory and operations, from its configurations alone.

Bytes of weights are exact. The constants of the activations come from reading the blocks and from measuring stacks of
blocks with 8 heads on a CPU (4 with the code for GPUs), as in `flux1.memory`; a test repeats the measurement.

Measured at full size (random weights of the base 4B, MLX 0.32.4 on a CPU, float32): with `--quantize 4
--gradient_checkpointing --resolution 64 --max_sequence_length 64 --train_batch_size 1`, an update had its peak of 4.3
GB; the estimate was 4.6 GB. The process held 6.8 GB with MLX's cache of freed memory.
"""

from __future__ import annotations

from functools import partial

from mflux_vae_train.pipelines.flow import memory
from mflux_vae_train.pipelines.flux2.configs import SIZE_MULTIPLE, Configs
from mflux_vae_train.pipelines.flux2.family import is_quantized_layer, text_encoder
from mflux_vae_train.pipelines.flux2.transformer import Flux2Transformer, Flux2TransformerConfig
from mflux_vae_train.pipelines.footprint import Phase, Precision, Workload, weight_bytes
from mflux_vae_train.pipelines.text import qwen3_memory
from mflux_vae_train.pipelines.text.qwen3_prompts import KLEIN_TAPS

KEPT = {4: (17.0, 14.0), 2: (20.0, 22.0)}
"""Kept by a double and by a single block, per token and D: inputs of norms, of SwiGLU and of layers with an adapter,
queries, keys, values. By bytes of a number: float32 was measured on a CPU, half precision with the code for GPUs."""

WORKING = {4: (44.0, 44.0), 2: (100.0, 90.0)}
"""Temporary, per token and D, while a block's feed-forward layers are differentiated: by bytes of a number, without and
with gradient checkpointing. In half precision, measured at one point only, without compilation, some gradients are
float32, which counts twice."""


def phases(configs: Configs, work: Workload, *, text_tokens: int, precision: Precision | None = None) -> list[Phase]:
    """The phases of a run in order.

    Args:
        text_tokens: per prompt.
        precision: None for this machine's.
    """
    here = precision or Precision.here()
    config = configs.transformer
    costs = memory.Costs(
        transformer=weight_bytes(Flux2Transformer, config, here.width, work.quantize, is_quantized_layer),
        activations=activations(config),
        operations=partial(forward_operations, config),
        text_tokens=text_tokens,
        image_token=SIZE_MULTIPLE,
        largest_layer=largest_layer(config),
        largest_embedding=configs.text_encoder.vocab_size * configs.text_encoder.hidden_size,
        guided=work.guidance > 1 and not configs.is_distilled,
    )
    encoding = qwen3_memory.text_encoding(
        text_encoder, configs.text_encoder, work, text_tokens, here, states=len(KLEIN_TAPS)
    )
    return memory.phases(costs, work, configs.vae, encoding, here)


def activations(config: Flux2TransformerConfig) -> memory.Activations:
    """Activations of the transformer."""
    return memory.Activations(
        width=config.width,
        heads=config.num_attention_heads,
        blocks=(config.num_layers, config.num_single_layers),
        kept=KEPT,
        working=WORKING,
    )


def forward_operations(config: Flux2TransformerConfig, tokens: tuple[int, int]) -> float:
    """Multiplications and additions of the matrix products in a forward pass with one sample.

    Args:
        tokens: of the image, and of the prompt.
    """
    width, length = config.width, sum(tokens)
    blocks = config.num_layers + config.num_single_layers
    layers = (4 * width + 3 * config.mlp_width) * width * length  # equal in both kinds of blocks
    return 2.0 * blocks * (layers + 2 * length**2 * width)


def largest_layer(config: Flux2TransformerConfig) -> int:
    """Weights of a single block's first layer."""
    return (3 * config.width + 2 * config.mlp_width) * config.width
