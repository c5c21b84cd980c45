"""FLUX.1 as a trainable pipeline: encodes images and prompts, predicts for the loss, samples images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mflux_vae_train.pipelines.capabilities import KohyaNaming, Use
from mflux_vae_train.pipelines.flow import files
from mflux_vae_train.pipelines.flow.pipeline import FlowPipeline
from mflux_vae_train.pipelines.flux1 import memory, naming
from mflux_vae_train.pipelines.flux1.configs import Configs
from mflux_vae_train.pipelines.flux1.packing import PATCH, VAE_FACTOR, image_ids, pack, text_ids, unpack
from mflux_vae_train.pipelines.flux1.parts import FAMILY
from mflux_vae_train.pipelines.flux1.prompts import CLIP, EMBEDS, POOLED, FluxPrompts
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer
from mflux_vae_train.pipelines.footprint import Footprint, Workload
from mflux_vae_train.pipelines.loading.snapshot import Snapshot
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.pipelines.text.clip import CLIPTextModel


class FluxPipeline(FlowPipeline):
    """FLUX.1 behind the `DiffusionPipeline` protocol.

    Args:
        parts: see `flux1.parts.flux_parts`.
    """

    adapter_prefix = "transformer"
    latent_scale = VAE_FACTOR
    prompts: FluxPrompts

    def __init__(
        self,
        parts: Parts,
        configs: Configs,
        *,
        name: str = "flux1",
        snapshot: Snapshot | None = None,
        base_model: str | None = None,
    ) -> None:
        self.configs, self.schedule = configs, configs.schedule
        self._guidance_embeds = configs.transformer.guidance_embeds
        prompts = FluxPrompts(parts, guidance_embeds=self._guidance_embeds)
        options: dict[str, Any] = {"name": name, "snapshot": snapshot, "base_model": base_model}
        super().__init__(parts, prompts, configs.recommended, **options)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: mx.Dtype | None = None, *, variant: str | None = None
    ) -> FluxPipeline:
        """Open a folder in diffusers' layout or saved by mflux. Weights are read when they are first used.

        Args:
            dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
            variant: of the weights files, such as "fp16".

        Raises:
            WeightsError: a file is missing or broken, or its tensors do not fit the network; all are listed.
            SettingsError: a configuration needs an unsupported option.
        """
        return files.open_local(FAMILY, cls, Path(folder), dtype=dtype, variant=variant)

    def _write(self, folder: Path, dtype: str) -> None:
        files.write(FAMILY, self.parts, self.configs, folder, dtype)

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype that the transformer computes in."""
        embedder: Any = self.denoiser.x_embedder
        return getattr(embedder, "linear", embedder).bias.dtype  # an adapter holds the layer as `linear`

    @property
    def latent_channels(self) -> int:
        return self.configs.transformer.in_channels // PATCH**2

    def _guidance_scale(self, guidance: float) -> float | None:
        """See `FlowPipeline`. If the model embeds guidance, there is none beside it."""
        return None if self._guidance_embeds else super()._guidance_scale(guidance)

    def _velocity(self, latents: mx.array, sigma: mx.array, conditioning: Conditioning, guidance: float) -> mx.array:
        """Latents at noise levels sigma (B,) -> velocity, float32; the transformer computes in `dtype`."""
        height, width = latents.shape[1:3]
        prompt, pooled = (conditioning[name].astype(self.dtype) for name in (EMBEDS, POOLED))
        velocity = self.denoiser(
            pack(latents).astype(self.dtype),
            prompt,
            pooled,
            sigma,
            image_ids(height, width),
            text_ids(prompt.shape[1]),
            mx.full(sigma.shape, guidance) if self._guidance_embeds else None,
        )
        return unpack(velocity.astype(mx.float32), height, width)

    def lora_targets(self) -> Sequence[str]:
        """Attention and feed-forward layers of all blocks."""
        return naming.PRESETS["attention+mlp"]

    # capabilities.SupportsMemoryControl

    def release(self, *uses: Use) -> None:
        """See `Parts.release`. The encoding of the empty prompt is kept if classifier-free guidance needs it."""
        if "prompts" in uses and self.prompts.t5.loaded is not None and not self._guidance_embeds:
            self.prompts.unconditional()  # encoded now
        super().release(*uses)

    def skeleton(self) -> nn.Module:
        """The transformer if it is loaded; else its layers with random weights, which are lazy."""
        return self._denoiser.loaded or FluxTransformer(self.configs.transformer)

    def footprint(self, work: Workload) -> Footprint:
        """Estimate what a run needs, from configurations alone."""
        length = self.prompts.tokens_if_known
        phases = memory.phases(self.configs, work, text_tokens=min(length, work.prompt_tokens or length))
        return files.footprint(FAMILY, self.configs, phases, self._snapshot)

    # capabilities.SupportsPromptLimit

    @property
    def prompt_limit(self) -> int | None:
        """See `FluxPrompts.limit`."""
        return self.prompts.limit

    @prompt_limit.setter
    def prompt_limit(self, tokens: int | None) -> None:
        self.prompts.limit = tokens

    # capabilities.SupportsTextEncoderTraining

    def encode_text_in_step(self, on: bool) -> None:
        """See `FluxPrompts.clip_in_step`."""
        self.prompts.clip_in_step = on

    def text_encoders_to_train(self) -> Mapping[str, nn.Module]:
        """CLIP, which stays loaded from now on. T5, forty times as large, is not trained."""
        return {CLIP: self.prompts.clip.keep()}

    def text_encoder_skeletons(self) -> Mapping[str, nn.Module]:
        """CLIP if it is loaded; else its layers with random weights, which are lazy."""
        return {CLIP: self.prompts.clip.loaded or CLIPTextModel(self.configs.text_encoder)}

    def text_encoder_targets(self) -> Mapping[str, Sequence[str]]:
        """The four projections of CLIP's attention, as in diffusers' scripts."""
        return {CLIP: naming.CLIP_ATTENTION}

    # capabilities.SupportsAdapterExport

    def lora_presets(self) -> Mapping[str, Sequence[str]]:
        return naming.PRESETS

    def kohya_naming(self) -> KohyaNaming:
        return naming.kohya_naming(self.configs.transformer, self.configs.text_encoder)

    def usage(self, adapter: str, prompt: str, *, dora: bool, text_encoder: bool) -> Mapping[str, str]:
        """See `naming.usage`."""
        return naming.usage(self.base_model, adapter, prompt, dora=dora, text_encoder=text_encoder)
