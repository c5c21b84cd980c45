"""Text of training metrics: for the progress bar and for log lines."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from mflux_vae.utils.formatting import size_text
from mflux_vae_train.training.hooks import Record


class Progress:
    """Fields of the progress bar: error, KL, active dimensions, images per second (smoothed), peak memory.

    Args:
        images: images per update.
    """

    def __init__(self, images: int) -> None:
        self._images, self._speed = images, 0.0

    def __call__(self, record: Record) -> dict[str, str]:
        speed = self._images / max(record.seconds, 1e-9)
        self._speed = 0.9 * self._speed + 0.1 * speed if self._speed else speed
        metrics = record.metrics
        return {
            "rec": f"{metrics['rec']:.4g}",
            "KL": f"{metrics['kl']:.4g}",
            "active": f"{metrics['active']:.0f}",
            "images/s": f"{self._speed:.3g}",
            "peak memory": size_text(mx.get_peak_memory()),
        }


def metrics_text(metrics: Mapping[str, float], units: int) -> str:
    """Metrics with units in one line.

    Args:
        metrics: all or some of the metrics of `Validation.measure`.
        units: number of latent dimensions or channels.
    """
    formats = {
        "loss": "loss {:.4g}",
        "rec": "rec {:.4g}",
        "kl": "KL {:.4g} nats",
        "psnr": "PSNR {:.2f} dB",
        "tc": "TC {:.3g} nats",
        "active": f"{{:.0f}} of {units} units active",
    }
    return ", ".join(formats.get(name, f"{name} {{:.4g}}").format(value) for name, value in metrics.items())
