"""FLUX.2 klein as a trainable pipeline: encodes images and prompts, predicts for the loss, samples images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mflux_vae_train.pipelines.capabilities import KohyaNaming
from mflux_vae_train.pipelines.flow.pipeline import FlowPipeline
from mflux_vae_train.pipelines.flux2 import memory, naming
from mflux_vae_train.pipelines.flux2.family import FAMILY
from mflux_vae_train.pipelines.flux2.transformer import image_ids, text_ids
from mflux_vae_train.pipelines.footprint import Phase, Workload
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.pipelines.text.qwen3_prompts import EMBEDS, KleinPrompts


class Flux2KleinPipeline(FlowPipeline):
    """FLUX.2 klein behind the `DiffusionPipeline` protocol. A latent is a token."""

    family = FAMILY
    prompts_class = KleinPrompts

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype that the transformer computes in. Norms are neither quantized nor adapted."""
        blocks = [*self.denoiser.transformer_blocks, *self.denoiser.single_transformer_blocks]
        dtype: mx.Dtype = blocks[0].attn.norm_q.weight.dtype
        return dtype

    @property
    def _is_guided(self) -> bool:
        """Not if the model is distilled."""
        return not self.configs.is_distilled

    def _velocity(self, latents: mx.array, sigma: mx.array, conditioning: Conditioning, guidance: float) -> mx.array:
        """Latents at noise levels sigma (B,) -> velocity, float32; the transformer computes in `dtype`."""
        prompt = conditioning[EMBEDS].astype(self.dtype)
        velocity = self.denoiser(
            latents.flatten(1, 2).astype(self.dtype),
            prompt,
            sigma,
            image_ids(*latents.shape[1:3]),
            text_ids(prompt.shape[1]),
        )
        return velocity.astype(mx.float32).reshape(latents.shape)

    def _phases(self, work: Workload, text_tokens: int) -> list[Phase]:
        return memory.phases(self.configs, work, text_tokens=text_tokens)

    def lora_targets(self) -> Sequence[str]:
        """The layers that diffusers' script adapts."""
        return naming.PRESETS["attention"]

    # capabilities.SupportsAdapterExport

    def lora_presets(self) -> Mapping[str, Sequence[str]]:
        return naming.PRESETS

    def kohya_naming(self) -> KohyaNaming:
        return naming.kohya_naming(self.configs.transformer)

    def usage(self, adapter: str, prompt: str, *, dora: bool, text_encoder: bool) -> Mapping[str, str]:
        """See `naming.usage`."""
        return naming.usage(self.base_model, adapter, prompt, self.recommended, dora=dora)
