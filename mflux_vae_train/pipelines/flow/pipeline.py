"""Base of pipelines whose denoiser is a transformer that predicts the velocity of a rectified flow."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx

from mflux_vae.errors import SettingsError
from mflux_vae.runtime.threads import thread_safe
from mflux_vae_train.pipelines.decoding import decode
from mflux_vae_train.pipelines.flow.predict import check_sampling, predict
from mflux_vae_train.pipelines.flow.sample import sample
from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule
from mflux_vae_train.pipelines.noise import NoiseSampling, Prediction, normal
from mflux_vae_train.pipelines.parts import PartsPipeline
from mflux_vae_train.pipelines.protocol import Conditioning


class FlowPipeline(PartsPipeline):
    """A rectified flow. Images have one token per `recommended.size_multiple` pixels of height and width."""

    schedule: FlowMatchSchedule
    latent_scale: ClassVar[int]
    """Pixels of an image per latent, in height and in width."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of latents."""

    @abstractmethod
    def _velocity(self, latents: mx.array, sigma: mx.array, conditioning: Conditioning, guidance: float) -> mx.array:
        """Latents at noise levels sigma (B,) -> velocity e - x0, float32; the transformer computes in `dtype`."""

    def _guidance_scale(self, guidance: float) -> float | None:
        """Scale of classifier-free guidance for `sample`; None for no guidance."""
        return guidance if guidance > 1 else None

    def _without_padding(self, conditioning: Conditioning) -> Conditioning:
        """Conditioning for `sample`, without what no row needs."""
        return conditioning

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
        height, width = (side * self.latent_scale // self.recommended.size_multiple for side in latents.shape[1:3])
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
        empty prompt.

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
            latents = normal(key, (height // self.latent_scale, width // self.latent_scale, self.latent_channels))
        scale_of_guidance = self._guidance_scale(guidance)
        if scale_of_guidance is not None:
            conditioning = self.prompts.with_unconditional(conditioning)
        conditioning = self.prompts.finish(conditioning)
        mx.eval(conditioning)
        conditioning = self._without_padding(conditioning)
        drawn = sample(
            lambda noisy, sigma: self._velocity(noisy, sigma, conditioning, guidance),
            latents,
            self._sigmas(steps, height * width // multiple**2),
            guidance=scale_of_guidance,
        )
        return decode(self.vae, drawn)

    # capabilities.SupportsNoiseCheck

    def check_sampling(self, sampling: NoiseSampling) -> None:
        """See `flow.predict.check_sampling`."""
        check_sampling(sampling)
