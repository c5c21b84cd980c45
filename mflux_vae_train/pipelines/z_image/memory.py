"""Estimates of Z-Image's memory and operations, from its configurations alone.

Bytes of weights are exact. Activations are counted as in `flow.memory`. A noise refiner sees the tokens of the image
and a context refiner those of the caption: together they count as one block.
"""

from __future__ import annotations

from functools import partial

from mflux_vae_train.pipelines.flow import memory
from mflux_vae_train.pipelines.footprint import Phase, Precision, Workload, weight_bytes
from mflux_vae_train.pipelines.text import qwen3_memory
from mflux_vae_train.pipelines.z_image.configs import SIZE_MULTIPLE, Configs
from mflux_vae_train.pipelines.z_image.family import is_quantized_layer, text_encoder
from mflux_vae_train.pipelines.z_image.packing import padded
from mflux_vae_train.pipelines.z_image.transformer import ZImageTransformer, ZImageTransformerConfig

KEPT = {4: (17.3,), 2: (17.3,)}
"""Kept by a block, per token and D: inputs of norms, of SwiGLU and of layers with an adapter, queries, keys, values. By
bytes of a number: float32 was measured on a CPU at full width, half precision with the code for GPUs."""

WORKING = {4: (34.0, 42.0), 2: (74.0, 82.0)}
"""Temporary, per token and D, while a block's feed-forward layers are differentiated: by bytes of a number, without and
with gradient checkpointing. In half precision some gradients are float32, which counts twice."""


def phases(configs: Configs, work: Workload, *, text_tokens: int, precision: Precision | None = None) -> list[Phase]:
    """The phases of a run in order.

    Args:
        text_tokens: per prompt.
        precision: None for this machine's.
    """
    here, config, text_tokens = precision or Precision.here(), configs.transformer, padded(text_tokens)
    costs = Costs(
        transformer=weight_bytes(ZImageTransformer, config, here.width, work.quantize, is_quantized_layer),
        activations=activations(config),
        operations=partial(forward_operations, config),
        text_tokens=text_tokens,
        image_token=SIZE_MULTIPLE,
        largest_layer=largest_layer(config),
        largest_embedding=configs.text_encoder.vocab_size * configs.text_encoder.hidden_size,
        guided=work.guidance > 0,
    )
    prompts = qwen3_memory.text_encoding(text_encoder, configs.text_encoder, work, text_tokens, here)
    return memory.phases(costs, work, configs.vae, prompts, here)


class Costs(memory.Costs):
    """Tokens of images are padded, too."""

    def tokens(self, shape: tuple[int, int]) -> tuple[int, int]:
        image, text = super().tokens(shape)
        return padded(image), text


def activations(config: ZImageTransformerConfig) -> memory.Activations:
    """Activations of the transformer."""
    return memory.Activations(
        width=config.dim,
        heads=config.n_heads,
        blocks=(config.n_layers + config.n_refiner_layers,),
        kept=KEPT,
        working=WORKING,
    )


def largest_layer(config: ZImageTransformerConfig) -> int:
    """Weights of a layer of a block's feed-forward layers."""
    return config.dim * config.feed_forward


def forward_operations(config: ZImageTransformerConfig, tokens: tuple[int, int]) -> float:
    """Multiplications and additions of the matrix products in a forward pass with one sample."""
    width, length = config.dim, sum(tokens)
    layers = (4 * width**2 + 3 * width * config.feed_forward) * length
    refiners = config.n_refiner_layers * (layers + 2 * sum(count**2 for count in tokens) * width)
    return 2.0 * (config.n_layers * (layers + 2 * length**2 * width) + refiners)
