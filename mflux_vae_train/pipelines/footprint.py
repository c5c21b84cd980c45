"""Estimates of memory and time: what a run does with a pipeline, and what that needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Properties of a run that determine its memory and time.

    Attributes:
        resolution: side of generated images in pixels.
        trained: number of trained weights.
        shape: height and width of the largest training image; None for a square of `resolution`.
        adapter: whether the trained weights are an adapter.
        state_bytes: optimizer state per trained weight.
        batch: samples in a forward and backward pass, prior samples included.
        micro_batches: passes in an update; `concurrent_micro_batches` of them run at the same time.
        prompts: number of prompts to encode, `prompts_per_batch` at a time.
        prompt_tokens: tokens per prompt at most; None for as many as the model reads.
        class_images: number of class images to generate before training.
        images: generated at once, in previews and class images, with this `guidance` and number of `steps`.
        previews: whether previews are drawn.
        quantize: bits of the frozen weights; None for the pipeline's precision.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        text_encoder: whether a text encoder is trained, and stays loaded.
        fuse: whether the adapter is fused into the weights after the training, and the whole pipeline saved.
    """

    resolution: int
    trained: int
    shape: tuple[int, int] | None = None
    adapter: bool = True
    state_bytes: float = 8
    batch: int = 1
    micro_batches: int = 1
    concurrent_micro_batches: int = 1
    prompts: int = 4
    prompts_per_batch: int = 16
    prompt_tokens: int | None = None
    class_images: int = 0
    images: int = 1
    guidance: float = 1.0
    steps: int = 4
    previews: bool = True
    quantize: int | None = None
    gradient_checkpointing: bool = False
    text_encoder: bool = False
    fuse: bool = False

    @property
    def trained_shape(self) -> tuple[int, int]:
        """Height and width of the largest training image."""
        return self.shape or (self.resolution, self.resolution)


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        name: such as "training".
        weights: bytes held throughout.
        work: further bytes at the peak.
        operations: multiplications and additions, in training those of one update; 0 if unknown.
    """

    name: str
    weights: int
    work: int
    operations: float

    @property
    def peak(self) -> int:
        return self.weights + self.work


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Estimate for a run.

    Attributes:
        phases: in the order of the run.
        download: bytes to download.
        cache: folder of downloads.
        access: what the user has to do before the download, such as accepting a licence; None for nothing.
    """

    phases: Sequence[Phase]
    download: int = 0
    cache: Path | None = None
    access: str | None = None

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)

    @property
    def work(self) -> int:
        """Bytes besides weights that a phase needs at most."""
        return max(phase.work for phase in self.phases)
