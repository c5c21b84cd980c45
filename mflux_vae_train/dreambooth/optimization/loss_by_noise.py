"""The loss by noise level: how well little noise, much noise and what lies between is removed.

Within an update each range may have no sample or many. So that parts of an update can be averaged like every other
metric, sums and shares are measured, and made means where the update is complete.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

RANGES = 5
"""Of equal width, from no noise (0) to nothing else (1)."""

_SUM, _SHARE = "noise_sum_", "noise_share_"
NAME = "loss_noise_"
"""How the metrics begin that `joined` makes; what follows is the range in percent, such as 0-20."""


def split(errors: mx.array, sigma: mx.array) -> dict[str, mx.array]:
    """Errors and noise levels of samples, (B,) each -> scalars, whose averages `joined` understands."""
    which = mx.clip(mx.floor(sigma * RANGES), 0, RANGES - 1)
    parts: dict[str, mx.array] = {}
    for index in range(RANGES):
        inside = (which == index).astype(mx.float32)
        parts[f"{_SUM}{index}"] = (errors * inside).mean()
        parts[f"{_SHARE}{index}"] = inside.mean()
    return parts


def joined(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics with the mean error of each range that the update had a sample in."""
    kept = {name: value for name, value in metrics.items() if not name.startswith((_SUM, _SHARE))}
    for index in range(RANGES):
        if metrics.get(f"{_SHARE}{index}", 0.0) > 0:
            low, high = 100 * index // RANGES, 100 * (index + 1) // RANGES
            kept[f"{NAME}{low}-{high}"] = metrics[f"{_SUM}{index}"] / metrics[f"{_SHARE}{index}"]
    return kept
