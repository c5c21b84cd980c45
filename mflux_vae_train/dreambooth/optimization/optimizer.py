"""Which optimizer a run has, at which rates, and whether its updates are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mflux_vae import kernels
from mflux_vae.runtime.device import is_cpu
from mflux_vae_train.dreambooth.config import OPTIMIZER_FLAGS, DreamBoothSettings
from mflux_vae_train.optimizers import registry
from mflux_vae_train.optimizers.base import Optimizer
from mflux_vae_train.optimizers.grouped import Grouped
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.training.lr_schedule import learning_rate
from mflux_vae_train.training.step import Pass, sequential

COMPILED_FROM = 300
"""Updates on a CPU whose step is worth compiling, see `Step`."""

SMALL = 50_000_000
"""Parameters of networks whose activations may be there once for each core, and whose products keep but one busy."""


def worth_compiling(updates: int) -> bool:
    """Whether a run of so many updates gains by it."""
    return not is_cpu() or (updates >= COMPILED_FROM and kernels.compiles())


def at_once(denoiser: nn.Module) -> int:
    """How many micro-batches are computed side by side: of a small network on a CPU one on each core.

    Its products would keep no more of them busy.
    """
    size = sum(array.size for array in dict(tree_flatten(denoiser.parameters())).values())
    return kernels.streams() if is_cpu() and size <= SMALL else 1


def passes_of(denoiser: nn.Module) -> Callable[[Iterable[Pass]], Iterator[tuple[Any, Any]]]:
    """How `Step` computes those of an update."""
    return kernels.side_by_side if at_once(denoiser) > 1 else sequential


def finds_rate(settings: DreamBoothSettings) -> bool:
    """Whether the optimizer finds its own rate, one for all parameters."""
    return registry.OPTIMIZERS[settings.optimizer].finds_rate


def default_rate(settings: DreamBoothSettings, recommended: Recommended) -> float:
    """Peak learning rate where the user gives none: what the pipeline recommends is meant for AdamW."""
    if finds_rate(settings):
        return 1.0
    rate = recommended.learning_rate if settings.train_mode == "lora" else recommended.learning_rate_full
    return rate * (registry.OPTIMIZERS[settings.optimizer].rate_scale or 1.0)


TEXT_ENCODER_SHARE = 0.05
"""Of the denoiser's rate: as the defaults of diffusers' script, 5e-6 and 1e-4, have it."""


def optimizers_of(settings: DreamBoothSettings, text_encoder: str) -> optim.Optimizer:
    """`optimizer_of`, and where the text encoder learns another such one for it, behind the same schedule.

    Args:
        settings: with rates decided.
        text_encoder: first component of the paths of its parameters.
    """
    own = optimizer_of(settings)
    if not settings.train_text_encoder or finds_rate(settings):  # one rate for all parameters
        return own
    assert settings.text_encoder_lr is not None and settings.learning_rate is not None
    other = optimizer_of(replace(settings, adam_weight_decay=settings.adam_weight_decay_text_encoder))
    share = settings.text_encoder_lr / settings.learning_rate
    return Grouped([(other, share, lambda path, _: path.startswith(f"{text_encoder}.")), (own, 1.0, None)])


def optimizer_of(settings: DreamBoothSettings) -> Optimizer | Grouped:
    """The optimizer that `settings` describe; its rate is set by each update."""
    given = {option: getattr(settings, name) for name, option in OPTIMIZER_FLAGS.items()}
    return registry.build(settings.optimizer, **given)


def schedule_of(settings: DreamBoothSettings, *, peak: float, updates: int) -> Callable[[int], float]:
    """Update -> rate, over a run of so many."""
    return learning_rate(
        peak=peak,
        total=updates,
        warmup=settings.lr_warmup_steps,
        shape=settings.lr_scheduler,
        cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )
