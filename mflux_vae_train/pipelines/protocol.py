"""The interface of a trainable diffusion pipeline. Optional features are in `capabilities`.

A complete pipeline: images of one colour, a rectified flow in pixel space without prompts.

    import mlx.core as mx
    import mlx.nn as nn
    from mflux_vae_train.plugin import DreamBooth, Recommended

    class Plain:
        name, adapter_prefix = "plain", "transformer"
        recommended = Recommended(
            resolution=16, size_multiple=1, learning_rate=1e-2, learning_rate_full=1e-3, guidance=1.0, steps=4, rank=2
        )

        def __init__(self):
            self.denoiser = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 3))

        def encode_images(self, pixels):
            return pixels.mean(axis=(1, 2))

        def encode_prompts(self, prompts):
            return {"length": mx.array([[len(prompt)] for prompt in prompts])}

        def loss(self, latents, conditioning, *, key, guidance):
            noise = mx.vmap(lambda one: mx.random.normal(latents.shape[1:], key=one))(key)
            return (self.denoiser((latents + noise) / 2) - (noise - latents)).square().mean(axis=1)

        def sample(self, conditioning, *, size, steps, guidance, key):
            x = mx.vmap(lambda one: mx.random.normal((3,), key=one))(key)
            for _ in range(steps):
                x = x - self.denoiser(x) / steps
            return mx.broadcast_to(mx.tanh(x)[:, None, None], (len(x), *size, 3))

        def lora_targets(self):
            return ["layers.*"]

Register it as an entry point, see `registry`, or train the object:

    settings = DreamBooth.Settings(
        model="plain", instance_data_dir="photos", instance_prompt="a photo of sks dog", max_train_steps=100
    )
    adapter = DreamBooth(Plain()).train(settings).result

`DreamBooth` and the registry refuse an object with missing members or other signatures, and the run one whose methods
return something else; the error names the member, what came and what is expected. Optional features, such as masks and
output preservation through `predict`, are in `capabilities`.
`tests/contracts/pipeline_contract.py` tests the properties that trainers rely on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn

Conditioning = Mapping[str, mx.array]
"""Encoded prompts: named arrays (B, ...) whose shapes do not depend on the prompts, so that rows can be mixed."""


@dataclass(frozen=True, kw_only=True)
class Recommended:
    """Defaults of a pipeline for settings that the user leaves open.

    Attributes:
        resolution: side of a training image in pixels; a multiple of `size_multiple`.
        size_multiple: sides of images must be multiples of this many pixels.
        learning_rate: peak rate for LoRA.
        learning_rate_full: peak rate for training all weights.
        guidance: classifier-free or embedded guidance scale for class images and previews.
        steps: denoising steps for class images and previews.
        rank: LoRA rank.
        caption_dropout: fraction of training captions replaced by the empty prompt; 0 if guidance does not need it.
        prior_loss_weight: weight of the prior-preservation loss.
        weighting_scheme: one of `noise.SCHEMES`; None if the pipeline lacks `predict`.
        most_guidance: guidance above this degrades images of a distilled model; None for no limit.
        usual_guidance: range without a warning; None for the range usual with most models.
        train_instead: the model to train if this one was distilled from it to few steps; training this one warns.
        assistant_lora: an adapter that makes such a model trainable, for ``--assistant_lora``.

    Raises:
        ValueError: an empty range of guidance.
    """

    resolution: int
    size_multiple: int
    learning_rate: float
    learning_rate_full: float
    guidance: float
    steps: int
    rank: int
    caption_dropout: float = 0.0
    prior_loss_weight: float = 1.0
    weighting_scheme: str | None = None
    most_guidance: float | None = None
    usual_guidance: tuple[float, float] | None = None
    train_instead: str | None = None
    assistant_lora: str | None = None

    def __post_init__(self) -> None:
        if self.usual_guidance is not None:
            low, high = self.usual_guidance
            if low > high:
                raise ValueError(f"usual_guidance is {self.usual_guidance}")


@runtime_checkable
class DiffusionPipeline(Protocol):
    """A trainable text-to-image pipeline.

    Images are (B, H, W, 3) float32 in [-1, 1]. Latents have the shape that `encode_images` returns, batch first.
    Each `key` holds one random key per sample, (B, 2) uint32: results for sample i depend on `key[i]` and not on the
    rest of the batch.

    Attributes:
        name: for logs and messages.
        adapter_prefix: first component of LoRA keys in the PEFT file, e.g. ``transformer`` or ``unet``.
    """

    name: str
    recommended: Recommended
    adapter_prefix: str

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained. Its parameter paths are diffusers'."""
        ...

    def encode_images(self, pixels: mx.array) -> mx.array:
        """Images -> latents, scaled for the denoiser; deterministic."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> conditioning. The empty prompt is the unconditional one."""
        ...

    def loss(self, latents: mx.array, conditioning: Conditioning, *, key: mx.array, guidance: float) -> mx.array:
        """Denoising loss of each sample (B,), float32; differentiable in `denoiser`."""
        ...

    def sample(
        self, conditioning: Conditioning, *, size: tuple[int, int], steps: int, guidance: float, key: mx.array
    ) -> mx.array:
        """Conditioning -> images; `size` is (height, width) in pixels."""
        ...

    def lora_targets(self) -> Sequence[str]:
        """Linear layers that LoRA adapts by default: fnmatch patterns of module paths in `denoiser`."""
        ...
