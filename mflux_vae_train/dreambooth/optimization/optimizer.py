"""The optimizer of a run, its learning rates, and how its updates are executed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mflux_vae.runtime.device import is_cpu
from mflux_vae_train.dreambooth.config import OPTIMIZER_FLAGS, DreamBoothSettings
from mflux_vae_train.optimizers import registry
from mflux_vae_train.optimizers.base import Optimizer
from mflux_vae_train.optimizers.grouped import Grouped
from mflux_vae_train.pipelines.footprint import Workload
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.training.lr_schedule import learning_rate

SMALL, PIXELS = 50_000_000, 1 << 20
"""Parameters of a network and pixels of the samples up to which a CPU computes several micro-batches as one."""

TEXT_ENCODER_SHARE = 0.05
"""Text encoders' share of the denoiser's learning rate with an adapter: 5e-6 and 1e-4 are diffusers' defaults."""


def joined_micro_batches(denoiser: nn.Module, settings: DreamBoothSettings, work: Workload) -> int:
    """Micro-batches that are computed as one: those of an update on a CPU, if network and images are small, else 1.

    Small operations keep one core busy, and each costs time to start. Activations take more memory.

    Args:
        work: with `batch`, `micro_batches` and `shape`.
    """
    size = sum(array.size for array in dict(tree_flatten(denoiser.parameters())).values())
    if not is_cpu() or size > SMALL or settings.exact_micro_batches or work.exact_micro_batches:
        return 1
    pixels = work.batch * math.prod(work.shape or (work.resolution, work.resolution))
    return max(1, min(work.micro_batches, PIXELS // pixels))


def finds_rate(settings: DreamBoothSettings) -> bool:
    """Whether the optimizer estimates the learning rate, one for all parameters."""
    return registry.OPTIMIZERS[settings.optimizer].finds_rate


def default_rate(settings: DreamBoothSettings, recommended: Recommended) -> float:
    """Default peak learning rate. The pipeline recommends one for AdamW, which is scaled for other optimizers."""
    if finds_rate(settings):
        return 1.0
    rate = recommended.learning_rate if settings.train_mode == "lora" else recommended.learning_rate_full
    return rate * (registry.OPTIMIZERS[settings.optimizer].rate_scale or 1.0)


def build_optimizers(settings: DreamBoothSettings, text_encoders: Sequence[str]) -> optim.Optimizer:
    """The optimizer of all trained networks. Text encoders have a separate rate and weight decay.

    Args:
        settings: with learning rates resolved.
        text_encoders: first components of their parameter paths.
    """
    optimizer = build_optimizer(settings)
    if not text_encoders or finds_rate(settings):
        return optimizer
    assert settings.text_encoder_lr is not None and settings.learning_rate is not None
    other = build_optimizer(replace(settings, adam_weight_decay=settings.adam_weight_decay_text_encoder))
    share = settings.text_encoder_lr / settings.learning_rate
    return Grouped([(other, share, lambda path, _: path.partition(".")[0] in text_encoders), (optimizer, 1.0, None)])


def build_optimizer(settings: DreamBoothSettings) -> Optimizer | Grouped:
    """The optimizer that the settings describe. `Step` sets its rate at each update."""
    options = {option: getattr(settings, name) for name, option in OPTIMIZER_FLAGS.items()}
    return registry.build(settings.optimizer, **options)


def build_schedule(settings: DreamBoothSettings, *, peak: float, updates: int) -> Callable[[int], float]:
    """Update -> learning rate, over a run of `updates`."""
    return learning_rate(
        peak=peak,
        total=updates,
        warmup=settings.lr_warmup_steps,
        shape=settings.lr_scheduler,
        cycles=settings.lr_num_cycles,
        power=settings.lr_power,
        warn=lambda _: None,  # `config_warnings` has them
    )
