"""Where FLUX.1's networks are stored: see `flow.family`."""

from __future__ import annotations

from mflux_vae.vae import VAE
from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae.weights.keymaps.rules import to_mlx
from mflux_vae_train.pipelines.flow import files
from mflux_vae_train.pipelines.flow.family import Family, NetworkFiles
from mflux_vae_train.pipelines.flux1 import keys
from mflux_vae_train.pipelines.flux1.configs import GATED, PUBLISHED, REPOSITORIES, config_from_tensors
from mflux_vae_train.pipelines.flux1.packing import PATCH, VAE_FACTOR
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.text import clip, t5
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer


def is_quantized_layer(path: str) -> bool:
    """Layers of the transformer's blocks. The embedders are small, and sensitive to rounding."""
    return path.startswith(("transformer_blocks.", "single_transformer_blocks."))


def is_quantized_text_layer(path: str) -> bool:
    """Layers of T5's blocks. CLIP has only 0.1 billion parameters and is not quantized."""
    return path.startswith("encoder.block.")


FAMILY = Family(
    class_name="FluxPipeline",
    version="0.30.0",  # the first with FLUX
    networks={
        "transformer": NetworkFiles(
            build=FluxTransformer,
            read_config=FluxTransformerConfig.from_dict,
            entry=("diffusers", "FluxTransformer2DModel"),
            stem=STEM,
            named=keys.our_names,
            quantized=is_quantized_layer,
            single_file="flux1-*.safetensors",  # Black Forest Labs' names, such as flux1-schnell.safetensors
        ),
        "text_encoder": NetworkFiles(
            build=clip.CLIPTextModel,
            read_config=clip.CLIPTextConfig.from_dict,
            entry=("transformers", "CLIPTextModel"),
            named=clip.published_names,
        ),
        "text_encoder_2": NetworkFiles(
            build=t5.T5Encoder,
            read_config=t5.T5Config.from_dict,
            entry=("transformers", "T5EncoderModel"),
            named=lambda tensors: t5.published_names(to_mlx(tensors, keys.MFLUX_T5)),
            quantized=is_quantized_text_layer,
        ),
    },
    tokenizers={"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"},
    vae_class="AutoencoderKL",
    latent_scale=VAE_FACTOR,
    latent_inputs=PATCH**2,
    text_widths=lambda configs: (configs.transformer.joint_attention_dim, configs.text_encoder_2.d_model),
    recognizes=keys.is_flux1,
    config_from_tensors=config_from_tensors,
    published=PUBLISHED,
    derives_from=lambda transformer, *_: REPOSITORIES["dev" if transformer.guidance_embeds else "schnell"],
    names=REPOSITORIES,
    gated=GATED,
    vae_file="ae.safetensors",
    mflux_vae=keys.MFLUX_VAE,
)


def flux_parts(
    *,
    transformer: FluxTransformer | Lazy[FluxTransformer],
    vae: VAE | Lazy[VAE],
    text_encoder: clip.CLIPTextModel | Lazy[clip.CLIPTextModel],
    text_encoder_2: t5.T5Encoder | Lazy[t5.T5Encoder],
    tokenizer: LazyTokenizer,
    tokenizer_2: LazyTokenizer,
) -> Parts:
    """Parts by diffusers' names: `text_encoder` and `tokenizer` are CLIP's, the others T5's."""
    networks = {"transformer": transformer, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    return files.parts_of(FAMILY, networks, vae, {"tokenizer": tokenizer, "tokenizer_2": tokenizer_2})
