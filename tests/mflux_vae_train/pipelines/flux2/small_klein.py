"""A whole FLUX.2 klein pipeline of some ten thousand random weights, for tests."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mflux_vae import VAE, AutoencoderKLFlux2, AutoencoderKLFlux2Config
from mflux_vae_train.pipelines.flow import files
from mflux_vae_train.pipelines.flux2.configs import PUBLISHED, Configs, published_repository
from mflux_vae_train.pipelines.flux2.family import FAMILY
from mflux_vae_train.pipelines.flux2.pipeline import Flux2KleinPipeline
from mflux_vae_train.pipelines.flux2.transformer import Flux2Transformer, Flux2TransformerConfig
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.text.qwen3 import Qwen3Config, Qwen3Encoder
from mflux_vae_train.pipelines.text.qwen3_prompts import KleinPrompts
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn
from tests.mflux_vae_train.pipelines.text.qwen_folder import write_qwen_tokenizer

HIDDEN, TEXT_TOKENS = 16, 48
TAPS = (1, 2, 3)


def _text_encoder(config: Qwen3Config) -> Qwen3Encoder:
    return Qwen3Encoder(config, max(TAPS))


class SmallKlein(Flux2KleinPipeline):
    """With a text encoder of a few layers, which diffusers opens, too, but no registered pipeline."""

    family = replace(
        FAMILY,
        networks={**FAMILY.networks, "text_encoder": replace(FAMILY.networks["text_encoder"], build=_text_encoder)},
    )
    prompts_class = staticmethod(partial(KleinPrompts, taps=TAPS))


RECOMMENDED = Recommended(
    resolution=64,
    size_multiple=16,
    learning_rate=1e-3,
    learning_rate_full=1e-4,
    guidance=2.5,
    steps=3,
    rank=4,
    caption_dropout=0.1,
    prior_loss_weight=0.5,
    weighting_scheme="logit_normal",
)


def small_config(**changes) -> Flux2TransformerConfig:
    return Flux2TransformerConfig(
        **{
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 3 * HIDDEN,
            "axes_dims_rope": (4, 4, 4, 4),
        }
        | changes
    )


def small_pipeline(
    folder: Path,
    *,
    distilled: bool = False,
    recommended: Recommended | None = None,
    base_model: str | None = None,
    kind: type[Flux2KleinPipeline] = SmallKlein,
) -> Flux2KleinPipeline:
    """Build a pipeline from random weights; the tokenizer's files go into `folder`.

    Args:
        kind: `Flux2KleinPipeline` for a text encoder with as many layers as klein reads.
    """
    vocabulary = write_qwen_tokenizer(folder / "tokenizer")
    vae = AutoencoderKLFlux2Config(
        latent_channels=4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    known = PUBLISHED[published_repository(small_config(), distilled)]
    configs = Configs(
        transformer=small_config(),
        text_encoder=Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=HIDDEN,
            intermediate_size=24,
            num_hidden_layers=4 if kind is SmallKlein else 28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        ),
        vae=vae.to_dict(),
        is_distilled=distilled,
        recommended=recommended or known.recommended,
    )
    whole = drawn(Qwen3Encoder(configs.text_encoder), 1)
    encoder = kind.family.networks["text_encoder"].build(configs.text_encoder)
    encoder.load_weights(list(encoder.take(dict(tree_flatten(whole.parameters()))).items()))
    parts = files.parts_of(
        kind.family,
        {"transformer": drawn(Flux2Transformer(configs.transformer), 2), "text_encoder": encoder},
        VAE(network=positive(drawn(AutoencoderKLFlux2(vae), 3))),
        {"tokenizer": LazyTokenizer(folder / "tokenizer")},
    )
    pipeline = kind(parts, configs, name="small", base_model=base_model)
    pipeline.prompt_limit = TEXT_TOKENS
    return pipeline


def positive(network: AutoencoderKLFlux2) -> AutoencoderKLFlux2:
    """With statistics that a training could have left."""
    network.bn.running_var = mx.abs(network.bn.running_var) + 0.5
    return network
