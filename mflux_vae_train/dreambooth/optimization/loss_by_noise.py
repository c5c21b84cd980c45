"""Loss by noise level: the mean error at low, medium and high noise.

An update may have no sample in a bin, or many. So each micro-batch measures sums and shares, which are averaged like
every other metric, and means are taken once the update is complete.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

BINS = 5
"""Bins of equal width over noise levels from 0 (no noise) to 1 (noise alone)."""

_SUM, _SHARE = "noise_sum_", "noise_share_"
PREFIX = "loss_noise_"
"""Prefix of the metrics that `bin_means` returns, followed by the bin in percent, such as 0-20."""


def bin_sums(errors: mx.array, sigma: mx.array) -> dict[str, mx.array]:
    """Errors (B,) and noise levels (B,) of samples -> scalars for `bin_means`."""
    bins = mx.clip(mx.floor(sigma * BINS), 0, BINS - 1)
    sums: dict[str, mx.array] = {}
    for index in range(BINS):
        inside = (bins == index).astype(mx.float32)
        sums[f"{_SUM}{index}"] = (errors * inside).mean()
        sums[f"{_SHARE}{index}"] = inside.mean()
    return sums


def bin_means(metrics: Mapping[str, float]) -> dict[str, float]:
    """Replace the sums among the metrics with the mean error of each bin that has a sample."""
    means = {name: value for name, value in metrics.items() if not name.startswith((_SUM, _SHARE))}
    for index in range(BINS):
        if metrics.get(f"{_SHARE}{index}", 0.0) > 0:
            low, high = 100 * index // BINS, 100 * (index + 1) // BINS
            means[f"{PREFIX}{low}-{high}"] = metrics[f"{_SUM}{index}"] / metrics[f"{_SHARE}{index}"]
    return means
