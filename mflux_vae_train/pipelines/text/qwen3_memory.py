"""Estimates of Qwen3's memory and operations, from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable

from mflux_vae_train.pipelines.footprint import FULL, Phase, Precision, Workload, dequantized_bytes, weight_bytes
from mflux_vae_train.pipelines.text.qwen3 import Qwen3Config, Qwen3Encoder, is_quantized_text_layer

WORKING = 7.0
"""Temporary float32 numbers per token, in units of the width plus that of the feed-forward layers. Measured with layers
of Qwen3-4B and 256 or 512 tokens: 5.0 to 6.5 on a CPU; 7.0 with the code for GPUs, run on the CPU in bfloat16, not
compiled. It was not measured on a GPU."""


def text_encoding(
    build: Callable[[Qwen3Config], Qwen3Encoder],
    config: Qwen3Config,
    work: Workload,
    length: int,
    precision: Precision,
    *,
    states: int = 1,
) -> Phase:
    """The phase in which prompts are encoded.

    Args:
        build: as in `NetworkFiles.build`, the same function at every call.
        length: tokens per prompt.
        states: hidden states that are kept of each token.
    """
    weights = weight_bytes(build, config, precision.width, work.quantize, is_quantized_text_layer)
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    rows = min(work.prompts, work.prompts_per_batch) * length
    activations = int(WORKING * FULL * (width + inner) * rows) + states * width * FULL * rows
    layer = 2 * width * head * (config.num_attention_heads + config.num_key_value_heads) + 3 * width * inner
    layer += 2 * length * config.num_attention_heads * head
    operations = 2.0 * work.prompts * length * len(build(config).model.layers) * layer
    dequantized = dequantized_bytes(width * inner, precision) if work.quantize else 0
    return Phase("text encoding", weights, activations + dequantized, operations)


def stored_bytes(config: Qwen3Config, width: int) -> int:
    """Bytes of the published file, which holds all layers and the head, with `width` bytes per number."""
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * width
    return weight_bytes(Qwen3Encoder, config, width) + head
