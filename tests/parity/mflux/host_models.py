"""mflux's model objects with small networks of its real classes and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import VAE
from tests.mflux_vae import small_models
from tests.mflux_vae.small_models import small_kl
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn
from tests.mflux_vae_train.pipelines.text.qwen_folder import write_qwen_tokenizer
from tests.parity.mflux import TINY

PROMPT = "a photo of sks dog"
SIZE = 32


def _new(kind: Any) -> Any:
    """A model object without its constructor, which loads files."""
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.bits, model.lora_paths, model.lora_scales = None, None, None
    return model


def _small_vae(scaling: float = 0.3611, shift: float = 0.1159) -> Any:
    network = small_kl(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    object.__setattr__(network.config, "scaling_factor", scaling)
    object.__setattr__(network.config, "shift_factor", shift)
    return VAE(network=network).as_mflux()


def _ready(model: Any, bits: int | None) -> Any:
    """Draw the weights, and quantize what mflux quantizes."""
    for seed, part in enumerate(model.children().values()):
        if isinstance(part, nn.Module) and part is not model.vae:
            frequencies = part.rotary_emb.inv_freq if "rotary_emb" in part else None
            drawn(part, seed)
            if frequencies is not None:
                part.rotary_emb.inv_freq = frequencies
    if bits:
        model.bits = bits
        nn.quantize(model, bits=bits, class_predicate=_quantizes)
    mx.eval(model.parameters())
    return model


def _quantizes(path: str, layer: Any) -> bool:
    return not path.startswith("vae.") and hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 64 == 0


def flux1(_: Path, bits: None = None) -> Any:
    """`Flux1` with one single block, whose width mflux fixes; T5 has one block, and CLIP one layer."""
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.common.tokenizer import LanguageTokenizer
    from mflux.models.flux.flux_initializer import FluxInitializer
    from mflux.models.flux.model.flux_text_encoder.clip_encoder.clip_encoder import CLIPEncoder
    from mflux.models.flux.model.flux_text_encoder.t5_encoder.t5_encoder import T5Encoder
    from mflux.models.flux.model.flux_transformer.transformer import Transformer
    from mflux.models.flux.variants.txt2img.flux import Flux1
    from transformers import PreTrainedTokenizerFast

    mx.random.seed(0)
    model = _new(Flux1)
    FluxInitializer._init_config(model, ModelConfig.schnell())
    model.transformer = Transformer(model.model_config, num_transformer_blocks=0, num_single_transformer_blocks=1)
    t5, clip = T5Encoder(), CLIPEncoder()
    t5.t5_blocks, t5.shared = t5.t5_blocks[:1], nn.Embedding(600, 4096)
    for name in ("wi_0", "wi_1"):
        t5.t5_blocks[0].ff.DenseReluDense[name] = nn.Linear(4096, 64, bias=False)
    t5.t5_blocks[0].ff.DenseReluDense.wo = nn.Linear(64, 4096, bias=False)
    clip.text_model.encoder.layers = clip.text_model.encoder.layers[:1]
    model.t5_text_encoder, model.clip_text_encoder, model.vae = t5, clip, _small_vae()

    def tokenizer(name: str, length: int) -> Any:
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        if name == "tokenizer":
            special = dict.fromkeys(special, "<|endoftext|>") | {"bos_token": "<|startoftext|>"}
        file = str(TINY / name / "tokenizer.json")
        return LanguageTokenizer(PreTrainedTokenizerFast(tokenizer_file=file, **special), max_length=length)

    model.tokenizers = {"t5": tokenizer("tokenizer_2", 16), "clip": tokenizer("tokenizer", 77)}
    mx.eval(model.parameters())  # as they are: drawing 200 million normal numbers takes long
    return model


def qwen_tokenizer(folder: Path, **options: Any) -> Any:
    from mflux.models.common.tokenizer import LanguageTokenizer
    from transformers import Qwen2TokenizerFast

    write_qwen_tokenizer(folder / "tokenizer")
    return LanguageTokenizer(
        Qwen2TokenizerFast.from_pretrained(folder / "tokenizer"), 512, use_chat_template=True, **options
    )


def z_image(folder: Path, bits: int | None = None) -> Any:
    """`ZImage`, Turbo, with two blocks."""
    from mflux.models.common.compute_precision import ComputePrecision
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.z_image.model.z_image_text_encoder.text_encoder import TextEncoder
    from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer
    from mflux.models.z_image.variants.z_image import ZImage
    from mflux.models.z_image.z_image_initializer import ZImageInitializer

    model = _new(ZImage)
    ZImageInitializer._init_config(model, ModelConfig.z_image_turbo())
    model.compute_precision, model.float32, model.vae = ComputePrecision(), False, _small_vae()
    model.transformer = ZImageTransformer(
        dim=192, n_layers=2, n_refiner_layers=1, n_heads=4, cap_feat_dim=64, axes_dims=[16, 16, 16]
    )
    model.text_encoder = TextEncoder(300, 64, 3, 4, 2, 128, head_dim=16)
    model.tokenizers = {"z_image": qwen_tokenizer(folder, chat_template_kwargs={"enable_thinking": True})}
    return _ready(model, bits)


def latents(model: Any, noise: mx.array) -> mx.array:
    """mflux's latents of a square image -> (B, H, W, C)."""
    name = type(model).__name__
    if name == "Flux1":
        from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator

        return FluxLatentCreator.unpack_latents(noise, SIZE, SIZE).reshape(1, 16, SIZE // 8, -1).transpose(0, 2, 3, 1)
    if name == "ZImage":
        return noise.transpose(1, 2, 3, 0)
    return noise.reshape(1, SIZE // 16, SIZE // 16, -1)


def klein(folder: Path, bits: int | None = None) -> Any:
    """`Flux2Klein`, a base model, with one block of each kind; its text encoder has the 27 layers that are read."""
    from mflux.models.common.compute_precision import ComputePrecision
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.flux2.flux2_initializer import Flux2Initializer
    from mflux.models.flux2.model.flux2_text_encoder.qwen3_text_encoder import Qwen3TextEncoder
    from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer
    from mflux.models.flux2.model.flux2_vae.decoder.decoder import Flux2Decoder
    from mflux.models.flux2.model.flux2_vae.encoder.encoder import Flux2Encoder
    from mflux.models.flux2.model.flux2_vae.vae import Flux2VAE
    from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein

    model = _new(Flux2Klein)
    Flux2Initializer._init_config(model, ModelConfig.flux2_klein_base_4b())
    model.compute_precision, model.vae = ComputePrecision(), Flux2VAE()
    small: Any = {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    model.vae.encoder, model.vae.decoder = Flux2Encoder(**small), Flux2Decoder(**small)
    small_models.drawn(model.vae, 3)
    model.transformer = Flux2Transformer(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=192,
        axes_dims_rope=(4, 4, 4, 4),
    )
    model.text_encoder = Qwen3TextEncoder(300, 64, 28, 4, 2, 64, head_dim=16)
    model.tokenizers = {"qwen3": qwen_tokenizer(folder, chat_template_kwargs={"enable_thinking": False})}
    return _ready(model, bits)
