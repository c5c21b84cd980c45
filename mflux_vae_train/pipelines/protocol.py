"""What a diffusion pipeline offers a trainer, which knows nothing else of it but `capabilities`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError

Conditioning = Mapping[str, mx.array]
"""Encoded prompts: named arrays, batch first, of one shape for every prompt, so that rows can be mixed."""


WeightingScheme = Literal["none", "uniform", "logit_normal", "mode", "cosmap", "sigma_sqrt", "flux_shift", "schnell"]
"""How training draws and weights noise levels, see `NoiseSampling`."""


@dataclass(frozen=True, kw_only=True)
class NoiseSampling:
    """How training draws noise levels, and what an error at each of them counts (Esser et al. 2024, section 3.1).

    With u in [0, 1) and a noise level of 1 - u, so that a large u means little noise, as in diffusers' scripts:

    - ``none``, ``uniform``: u is uniform.
    - ``logit_normal``: u = sigmoid(N(logit_mean, logit_std)).
    - ``mode``: u = 1 - r - mode_scale (cos^2(pi r / 2) - 1 + r), r uniform.
    - ``cosmap``: u uniform, error times 2 / (pi (1 - 2 s + 2 s^2)) at noise level s.
    - ``sigma_sqrt``: u uniform, error times s^-2.
    - ``flux_shift``: as logit_normal, then moved towards noise, the more the larger the picture.
    - ``schnell``: one of the four levels 1/4, 2/4, 3/4, 1 that FLUX.1 schnell was distilled to.

    Attributes:
        logit_mean: above 0 means less noise (in kohya's scripts, which draw the noise level itself, more).
        mode_scale: from -1 to 2 / (pi - 2), outside of which levels would leave [0, 1].

    Raises:
        SettingsError: an unknown scheme.
    """

    scheme: WeightingScheme = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __post_init__(self) -> None:
        if self.scheme not in get_args(WeightingScheme):
            known = ", ".join(get_args(WeightingScheme))
            raise SettingsError(f"weighting scheme {self.scheme!r} is unknown; known are {known}")


class Prediction(NamedTuple):
    """What a denoiser says of noised latents, and what it should have said. All float32.

    Attributes:
        prediction, target: of the latents' shape (B, ...).
        weight: what a sample's squared error counts (B,).
        sigma: its noise level (B,), from 0 for none to 1 for nothing else.
    """

    prediction: mx.array
    target: mx.array
    weight: mx.array
    sigma: mx.array

    def loss(self, places: mx.array | None = None) -> mx.array:
        """Weighted squared error, averaged over each sample: (B,).

        Args:
            places: what each place counts in the average, (B, h, w, 1) for latents (B, h, w, C), not negative; where
                no place of a sample counts, its loss is 0.
        """
        squared = mx.square(self.prediction - self.target)
        if places is None:
            return self.weight * squared.flatten(1).mean(axis=1)
        total = mx.maximum(places.flatten(1).mean(axis=1), 1e-6)
        return self.weight * (squared * places).flatten(1).mean(axis=1) / total


@dataclass(frozen=True, kw_only=True)
class Recommended:
    """What a pipeline recommends where the user leaves a setting open.

    Attributes:
        resolution: side of a training image in pixels; a multiple of `size_multiple`.
        size_multiple: sides of images are multiples of this many pixels; others are refused.
        learning_rate: peak rate for LoRA.
        learning_rate_full: peak rate for training all weights.
        guidance: classifier-free (or embedded) guidance for class images and previews.
        steps: denoising steps for class images and previews.
        rank: LoRA rank.
        caption_dropout: share of training captions replaced by the empty prompt; 0 where guidance needs none.
        prior_loss_weight: weight of the prior-preservation term.
        weighting_scheme: how training draws and weights noise levels; None where there is no `predict`.
        most_guidance: guidance above this harms pictures, as the model was distilled to do without; None for no such.
        usual_guidance: from and to; other guidance is remarked on. None for what is usual with most models.
    """

    resolution: int
    size_multiple: int
    learning_rate: float
    learning_rate_full: float
    guidance: float
    steps: int
    rank: int
    caption_dropout: float
    prior_loss_weight: float = 1.0
    weighting_scheme: WeightingScheme | None = None
    most_guidance: float | None = None
    usual_guidance: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.usual_guidance is not None:
            low, high = self.usual_guidance
            if low > high:
                raise ValueError(f"usual_guidance is {self.usual_guidance}")


@runtime_checkable
class DiffusionPipeline(Protocol):
    """A trainable text-to-image pipeline.

    Images are (B, H, W, 3) in [-1, 1], latents what `encode_images` returns, batch first. Every `key` is one
    random key per sample, (B, 2) uint32: sample i depends on `key[i]` alone, whatever it shares a batch with.
    """

    name: str
    recommended: Recommended
    adapter_prefix: str
    """First component of a LoRA key in the PEFT file, e.g. ``transformer`` or ``unet``."""

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained. Its parameter paths are the ones diffusers uses."""
        ...

    def encode_images(self, pixels: mx.array) -> mx.array:
        """(B, H, W, 3) in [-1, 1] -> latents, scaled for the denoiser; no randomness."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> conditioning. The empty prompt is the unconditional one."""
        ...

    def loss(self, latents: mx.array, conditioning: Conditioning, *, key: mx.array, guidance: float) -> mx.array:
        """The denoising objective, one value per sample (B,), float32; differentiable in `denoiser`."""
        ...

    def sample(
        self, conditioning: Conditioning, *, size: tuple[int, int], steps: int, guidance: float, key: mx.array
    ) -> mx.array:
        """Conditioning -> images (B, H, W, 3) in [-1, 1], float32; `size` is (height, width) in pixels."""
        ...

    def lora_targets(self) -> Sequence[str]:
        """Patterns (fnmatch over module paths of `denoiser`) of the linear layers that LoRA adapts by default."""
        ...
