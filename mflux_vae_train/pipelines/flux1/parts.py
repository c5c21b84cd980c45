"""The parts of a FLUX.1 pipeline, and which of their layers `quantize` changes."""

from __future__ import annotations

from mflux_vae.vae import VAE
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.text.clip import CLIPTextModel
from mflux_vae_train.pipelines.text.t5 import T5Encoder
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer


def is_quantized_layer(path: str) -> bool:
    """Layers of the transformer's blocks. The embedders are small, and sensitive to rounding."""
    return path.startswith(("transformer_blocks.", "single_transformer_blocks."))


def is_quantized_text_layer(path: str) -> bool:
    """Layers of T5's blocks. CLIP has only 0.1 billion parameters and is not quantized."""
    return path.startswith("encoder.block.")


def flux_parts(
    *,
    transformer: FluxTransformer | Lazy[FluxTransformer],
    vae: VAE | Lazy[VAE],
    text_encoder: CLIPTextModel | Lazy[CLIPTextModel],
    text_encoder_2: T5Encoder | Lazy[T5Encoder],
    tokenizer: LazyTokenizer,
    tokenizer_2: LazyTokenizer,
) -> Parts:
    """Parts by diffusers' names: `text_encoder` and `tokenizer` are CLIP's, the others T5's."""
    return Parts(
        networks={
            "transformer": Lazy.of(transformer),
            "text_encoder": Lazy.of(text_encoder),
            "text_encoder_2": Lazy.of(text_encoder_2),
        },
        vae=Lazy.of(vae),
        tokenizers={"tokenizer": tokenizer, "tokenizer_2": tokenizer_2},
        quantized={"transformer": is_quantized_layer, "text_encoder_2": is_quantized_text_layer},
    )
