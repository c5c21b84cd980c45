"""Drawing with a pipeline here and with one of diffusers, from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

STEPS = 5


def open_theirs(cls: Any, folder: Path) -> Any:
    """A pipeline of a class of diffusers, without progress bars."""
    pipeline = cls.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_ours(pipeline: Any, prompts: list[str], noise: np.ndarray, guidance: float) -> np.ndarray:
    """Images in [0, 1] from NHWC noise."""
    _, height, width, _ = noise.shape
    scale = pipeline.family.latent_scale
    drawn = pipeline.sample(
        pipeline.encode_prompts(prompts),
        size=(height * scale, width * scale),
        steps=STEPS,
        guidance=guidance,
        key=mx.zeros((len(prompts), 2), mx.uint32),
        latents=mx.array(noise),
    )
    return (np.array(drawn) + 1) / 2
