"""Learning rate as a plain function of the optimizer update, 0-based."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

logger = logging.getLogger(__name__)

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "constant_with_warmup": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Factor on the peak rate as a function of progress in [0, 1] after warm-up."""

RESTARTS, POLYNOMIAL = "cosine_with_restarts", "polynomial"
"""Shapes with a parameter: `cycles` and `power`."""

POLYNOMIAL_END = 1e-7
"""Final rate of a polynomial, as in diffusers."""

JUMP, NEGLIGIBLE = 1.2, 0.1
"""A rate that grows by more than this factor on resume jumps; below this share of the peak, updates change little."""

MIN_CYCLE = 4
"""Updates that a cycle of `RESTARTS` needs to resemble a cosine."""

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
    warn: Callable[[str], None] = logger.warning,
) -> Callable[[int], float]:
    """Update -> learning rate: linear warm-up over `warmup` updates, then `shape`, from `peak` to 0 at update `total`.

    rate(u) = peak (u + 1) / (warmup + 1) for u < warmup, then peak SHAPES[shape]((u - warmup) / (total - warmup)). With
    `STEP_DECAY` it is peak gamma^floor(u / step_size): torch's ExponentialLR if `step_size` is an epoch, and its StepLR
    if it is several.

    Shapes are those of diffusers' `get_scheduler`. Differences: the first update has a rate above zero, and "constant"
    has a warm-up, too.

    A warm-up as long as the run is shortened to a tenth of the run.

    Args:
        warn: receives each of `schedule_warnings`.
    """
    for line in schedule_warnings(total=total, warmup=warmup, shape=shape, cycles=cycles):
        warn(line)
    warmup = warmup if warmup < total else total // 10
    decay = _decay(shape, peak, cycles, power)

    def rate(update: int) -> float:
        if update < warmup:
            return peak * (update + 1) / (warmup + 1)
        if shape == STEP_DECAY:
            return peak * gamma ** (update // step_size)
        return peak * decay(min(1.0, (update - warmup) / (total - warmup)))

    return rate


def resume_warnings(
    schedule: Callable[[int], float], *, start: int, total: int, peak: float, last_rate: float | None, advice: str
) -> list[str]:
    """What the rates of a run that continues with other settings do, one line each: a jump back, or almost nothing.

    Args:
        start, total: the run continues after update `start` and ends after `total`.
        last_rate: of the update before, if it is known.
        advice: how to train further instead.
    """
    lines, first = [], schedule(start)
    if last_rate is not None and first > JUMP * last_rate:
        lines.append(
            f"the learning rate jumps from {last_rate:.2g} at update {start} back to {first:.2g}: the schedule is now"
            f" that of {total} updates"
        )
    if (highest := max(map(schedule, range(start, total)))) < NEGLIGIBLE * peak:
        lines.append(
            f"the learning rate of the remaining {total - start} updates is at most {highest:.2g} (peak {peak:g}): they"
            f" change little; to train further, {advice}"
        )
    return lines


def schedule_warnings(*, total: int, warmup: int = 0, shape: str = "constant", cycles: int = 1) -> list[str]:
    """One line for each part of a schedule that does not fit the length of the run."""
    lines = warmup_warnings(total=total, warmup=warmup)
    left = total - (warmup if warmup < total else total // 10)
    if shape == RESTARTS and cycles > max(1, left // MIN_CYCLE):
        lines.append(
            f"{cycles} cycles of the learning rate do not fit {left} updates after the warm-up: the rate of an update"
            f" is then arbitrary; use at most {max(1, left // MIN_CYCLE)}"
        )
    return lines


def warmup_warnings(*, total: int, warmup: int) -> list[str]:
    """A line if the warm-up does not fit the length of the run."""
    if warmup >= total:
        return [f"warm-up of {warmup} updates does not fit a run of {total}; shortened to {total // 10}"]
    if warmup > total / 2:
        return [f"warm-up takes {warmup} of {total} updates; a shorter one leaves more updates at the full rate"]
    return []


def _decay(shape: str, peak: float, cycles: int, power: float) -> Callable[[float], float]:
    """Progress after warm-up -> factor on the peak rate."""
    if shape == RESTARTS:
        return lambda progress: 0.0 if progress >= 1 else SHAPES["cosine"](cycles * progress % 1.0)
    if shape == POLYNOMIAL:
        end = min(1.0, POLYNOMIAL_END / peak)
        return lambda progress: end + (1.0 - end) * (1.0 - progress) ** power
    return SHAPES["constant" if shape == STEP_DECAY else shape]
