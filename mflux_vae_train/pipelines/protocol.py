"""What a diffusion pipeline offers a trainer, which knows nothing else of it but `capabilities`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn

Conditioning = Mapping[str, mx.array]
"""Encoded prompts: named arrays, batch first, of one shape for every prompt, so that rows can be mixed."""


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
    weighting_scheme: str | None = None
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
