"""The DreamBooth objective: the pipeline's per-sample loss, averaged over instance and prior samples apart.

L = mean_instance + weight * mean_prior (Ruiz et al. 2023, equation 2, in the form diffusers uses): a weighted
sum of per-sample losses. Which noise, target or schedule lies behind one is the pipeline's business.
"""

from __future__ import annotations

import mlx.core as mx

from mflux_vae_train.dreambooth.data import CONDITIONING
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.step import Arrays


def dreambooth_loss(
    pipeline: DiffusionPipeline, arrays: Arrays, *, guidance: float, prior_loss_weight: float | None
) -> tuple[mx.array, dict[str, mx.array]]:
    """Loss of one micro-batch, and the means it is made of.

    Args:
        arrays: as `data.micro_batch` makes them.
        prior_loss_weight: None where the micro-batch has no prior samples.
    """
    conditioning = {
        name.removeprefix(CONDITIONING): array for name, array in arrays.items() if name.startswith(CONDITIONING)
    }
    per_sample = pipeline.loss(arrays["latents"], conditioning, key=arrays["key"], guidance=guidance)
    return combine(per_sample, prior_loss_weight)


def combine(per_sample: mx.array, prior_loss_weight: float | None) -> tuple[mx.array, dict[str, mx.array]]:
    """Per-sample losses, the instance's before as many of the prior's -> scalar loss, unweighted parts."""
    if prior_loss_weight is None:
        instance = per_sample.mean()
        return instance, {"instance_loss": instance}
    instance, prior = (half.mean() for half in mx.split(per_sample, 2))
    return instance + prior_loss_weight * prior, {"instance_loss": instance, "prior_loss": prior}
