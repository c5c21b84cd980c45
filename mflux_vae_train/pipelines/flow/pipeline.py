"""Base of pipelines of a `Family`, whose transformer predicts the velocity of a rectified flow."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae.runtime.threads import thread_safe
from mflux_vae_train.pipelines.capabilities import SupportsTrimming, Use
from mflux_vae_train.pipelines.decoding import decode
from mflux_vae_train.pipelines.flow import files
from mflux_vae_train.pipelines.flow.family import Family
from mflux_vae_train.pipelines.flow.predict import check_sampling, predict
from mflux_vae_train.pipelines.flow.sample import sample
from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule
from mflux_vae_train.pipelines.footprint import Footprint, Phase, Workload
from mflux_vae_train.pipelines.loading.snapshot import Snapshot
from mflux_vae_train.pipelines.noise import NoiseSampling, Prediction, normal
from mflux_vae_train.pipelines.parts import Parts, PartsPipeline
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.pipelines.text.prompts import LimitedPromptEncoder

P = TypeVar("P", bound="FlowPipeline")


class FlowPipeline(PartsPipeline):
    """A rectified flow. Images have one token per `recommended.size_multiple` pixels of height and width.

    Args:
        parts: see `flow.files.parts_of`.
        configs: see `Family`.
    """

    adapter_prefix = "transformer"
    family: ClassVar[Family]
    prompts_class: ClassVar[Any]
    """Parts -> `prompts`."""
    prompts: LimitedPromptEncoder
    schedule: FlowMatchSchedule

    def __init__(
        self,
        parts: Parts,
        configs: Any,
        *,
        name: str | None = None,
        snapshot: Snapshot | None = None,
        base_model: str | None = None,
    ) -> None:
        self.configs, self.schedule = configs, configs.schedule
        options: Mapping[str, Any] = {
            "name": name or self.family.class_name,
            "snapshot": snapshot,
            "base_model": base_model,
        }
        super().__init__(parts, self._new_prompts(parts), configs.recommended, **options)

    def _new_prompts(self, parts: Parts) -> LimitedPromptEncoder:
        prompts: LimitedPromptEncoder = self.prompts_class(parts)
        return prompts

    @classmethod
    def from_pretrained(
        cls: type[P], folder: str | Path, dtype: mx.Dtype | None = None, *, variant: str | None = None
    ) -> P:
        """Open a folder in diffusers' layout or saved by mflux. Weights are read when they are first used.

        Args:
            dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
            variant: of the weights files, such as "fp16".

        Raises:
            WeightsError: a file is missing or broken, or its tensors do not fit the network; all are listed.
            SettingsError: a configuration needs an unsupported option.
        """
        return files.open_local(cls.family, cls, Path(folder), dtype=dtype, variant=variant)

    def _write(self, folder: Path, dtype: str) -> None:
        files.write(self.family, self.parts, self.configs, folder, dtype)

    @property
    def latent_channels(self) -> int:
        """Channels of latents."""
        channels: int = self.configs.transformer.in_channels
        return channels // self.family.latent_inputs

    @abstractmethod
    def _phases(self, work: Workload, text_tokens: int) -> list[Phase]:
        """The phases of a run with so many tokens per prompt."""

    @abstractmethod
    def _velocity(self, latents: mx.array, sigma: mx.array, conditioning: Conditioning, guidance: float) -> mx.array:
        """Latents at noise levels sigma (B,) -> velocity e - x0, float32; the transformer computes in `dtype`."""

    @property
    def _is_guided(self) -> bool:
        """Whether classifier-free guidance is possible."""
        return True

    def _guidance_scale(self, guidance: float) -> float | None:
        """Scale of classifier-free guidance for `sample`; None for no guidance."""
        return guidance if self._is_guided and guidance > 1 else None

    def _sigmas(self, steps: int, image_tokens: int) -> Sequence[float]:
        """Noise levels of sampling, from 1 to 0."""
        levels: list[float] = self.schedule.sigmas(steps, image_tokens).tolist()
        return levels

    def predict(
        self,
        latents: mx.array,
        conditioning: Conditioning,
        *,
        key: mx.array,
        guidance: float,
        sampling: NoiseSampling | None = None,
    ) -> Prediction:
        """Velocity at a random noise level, and its target; see `flow.predict`.

        Args:
            guidance: as in `loss`.
            sampling: None for the recommended scheme.
        """
        conditioning = self.prompts.finish(conditioning)
        height, width = (
            side * self.family.latent_scale // self.recommended.size_multiple for side in latents.shape[1:3]
        )
        return predict(
            lambda noisy, sigma: self._velocity(noisy, sigma, conditioning, guidance),
            latents,
            key=key,
            schedule=self.schedule,
            sampling=sampling or NoiseSampling(scheme=self.recommended.weighting_scheme or "uniform"),
            image_tokens=height * width,
        )

    @thread_safe
    def sample(
        self,
        conditioning: Conditioning,
        *,
        size: tuple[int, int],
        steps: int,
        guidance: float,
        key: mx.array,
        latents: mx.array | None = None,
    ) -> mx.array:
        """Conditioning -> images (B, H, W, 3) in [-1, 1], float32.

        Guidance is an input of the transformer if the model was trained so; otherwise it is classifier-free with the
        negative prompt, which is empty by default.

        Args:
            size: (height, width) in pixels, multiples of `recommended.size_multiple`.
            key: (B, 2); row i determines the initial noise of sample i.
            latents: initial noise, of the shape that `encode_images` returns, to use instead.

        Raises:
            SettingsError: another size, or no step.
        """
        (height, width), multiple = size, self.recommended.size_multiple
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise SettingsError(f"{self.name} draws sizes that are multiples of {multiple}, not {height}x{width}")
        if latents is None:
            latents = normal(
                key, (height // self.family.latent_scale, width // self.family.latent_scale, self.latent_channels)
            )
        scale_of_guidance = self._guidance_scale(guidance)
        if scale_of_guidance is not None:
            conditioning = self.prompts.with_unconditional(conditioning)
        conditioning = self.prompts.finish(conditioning)
        mx.eval(conditioning)
        if isinstance(self, SupportsTrimming):
            conditioning = self.trim(conditioning)
        drawn = sample(
            lambda noisy, sigma: self._velocity(noisy, sigma, conditioning, guidance),
            latents,
            self._sigmas(steps, height * width // multiple**2),
            guidance=scale_of_guidance,
        )
        return decode(self.vae, drawn)

    def reads_negative_prompt(self, guidance: float) -> bool:
        """Whether guidance is classifier-free."""
        return self._guidance_scale(guidance) is not None

    # capabilities.SupportsNoiseCheck

    def check_sampling(self, sampling: NoiseSampling) -> None:
        """See `flow.predict.check_sampling`."""
        check_sampling(sampling)

    # capabilities.SupportsMemoryControl

    def release(self, *uses: Use) -> None:
        """See `Parts.release`. The encoding of the negative prompt is kept if guidance may need it."""
        if "prompts" in uses and self._is_guided and self.prompts.is_loaded:
            self.prompts.unconditional()  # encoded now
        super().release(*uses)

    def skeleton(self) -> nn.Module:
        """The transformer if it is loaded; else its layers with random weights, which are lazy."""
        loaded: nn.Module | None = self._denoiser.loaded
        return loaded or self.family.networks["transformer"].build(self.configs.transformer)

    def footprint(self, work: Workload) -> Footprint:
        """Estimate what a run needs, from configurations alone."""
        length = self.prompts.tokens_if_known
        phases = self._phases(work, min(length, work.prompt_tokens or length))
        return files.footprint(self.family, self.configs, phases, self._snapshot)

    # capabilities.SupportsPromptLimit

    @property
    def prompt_limit(self) -> int | None:
        """See `LimitedPromptEncoder.limit`."""
        return self.prompts.limit

    @prompt_limit.setter
    def prompt_limit(self, tokens: int | None) -> None:
        self.prompts.limit = tokens
