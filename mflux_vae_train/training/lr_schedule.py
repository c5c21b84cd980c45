"""Learning rate as a plain function of the optimizer update, 0-based."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

logger = logging.getLogger(__name__)

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "constant_with_warmup": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Share of the peak rate when a share `done` in [0, 1] of the time after warm-up has passed."""

RESTARTS, POLYNOMIAL = "cosine_with_restarts", "polynomial"
"""Two more shapes, which take a number: of cosines one after the other, and a power."""

POLYNOMIAL_END = 1e-7
"""Rate at which a polynomial ends, as in diffusers."""

STEP_DECAY = "step_decay"
"""A shape that does not depend on the length of the run."""


def learning_rate(
    *,
    peak: float,
    total: int,
    warmup: int = 0,
    shape: str = "constant",
    cycles: int = 1,
    power: float = 1.0,
    gamma: float = 1.0,
    step_size: int = 1,
) -> Callable[[int], float]:
    """Linear warm-up over `warmup` updates, then `shape` down to 0 at `total`; or a staircase.

    After the warm-up shapes are those of diffusers' `get_scheduler`. There the first update has a rate of zero and
    "constant" ignores a warm-up; here the first one learns, and every shape has a warm-up.

    rate(u) = peak (u + 1) / (warmup + 1) for u < warmup: already the first update learns, rate(warmup) is the
    peak. rate(u) = peak SHAPES[shape]((u - warmup) / (total - warmup)) from there on; the last update is
    total - 1. With the shape `STEP_DECAY` it is peak gamma^floor(u / step_size), as torch's ExponentialLR has it where
    `step_size` is an epoch, and its StepLR where it is several.

    A warm-up as long as the whole run would never reach the peak: it is shortened to a tenth, with a warning
    in the log. One that takes more than half of the run gets a warning only.
    """
    if warmup >= total:
        shorter = total // 10
        logger.warning("warm-up of %d updates does not fit a run of %d; shortened to %d", warmup, total, shorter)
        warmup = shorter
    elif warmup > total / 2:
        logger.warning("warm-up takes %d of %d updates; less leaves more time at the full rate", warmup, total)
    decay = _decay(shape, peak, cycles, power)

    def rate(update: int) -> float:
        if update < warmup:
            return peak * (update + 1) / (warmup + 1)
        if shape == STEP_DECAY:
            return peak * gamma ** (update // step_size)
        return peak * decay(min(1.0, (update - warmup) / (total - warmup)))

    return rate


def _decay(shape: str, peak: float, cycles: int, power: float) -> Callable[[float], float]:
    """Share of the time after warm-up -> share of the peak rate."""
    if shape == RESTARTS:
        return lambda done: 0.0 if done >= 1 else SHAPES["cosine"](cycles * done % 1.0)
    if shape == POLYNOMIAL:
        end = min(1.0, POLYNOMIAL_END / peak)
        return lambda done: end + (1.0 - end) * (1.0 - done) ** power
    return SHAPES["constant" if shape == STEP_DECAY else shape]
