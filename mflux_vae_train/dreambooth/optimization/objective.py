"""The DreamBooth objective: L = mean instance loss + weight * mean prior loss.

Equation 2 of Ruiz et al. (2023), in the form that diffusers uses. The pipeline defines the per-sample losses: noise
(`pipelines.noise` has the weighting schemes), target and schedule.

With output preservation, prior samples are the noised instance latents with the class prompt, and the target is the
prediction of the base model: weight * |v(x_t, class) - v_base(x_t, class)|^2.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mflux_vae.runtime.threads import exclusive
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.optimization import loss_by_noise
from mflux_vae_train.pipelines import checks
from mflux_vae_train.pipelines.capabilities import SupportsPrediction
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.training.step import Arrays, MicroBatch

BASE_PREDICTION = "base_prediction"
"""Key in a micro-batch: the prediction of the base model for the second half, (B / 2, ...)."""


def dreambooth_loss(
    pipeline: DiffusionPipeline,
    arrays: Arrays,
    *,
    guidance: float,
    prior_loss_weight: float | None,
    sampling: NoiseSampling | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Loss of one micro-batch, its instance and prior means, and the instance losses by noise level.

    Args:
        arrays: of `data.batches.micro_batches`, with output preservation after `add_base_prediction`.
        prior_loss_weight: None if the micro-batch has no prior samples.
        sampling: how noise levels are drawn; None for the pipeline's recommendation.
    """
    latents, conditioning, key = arrays["latents"], arrays["conditioning"], arrays["key"]
    if not isinstance(pipeline, SupportsPrediction):
        assert sampling is None and not {BASE_PREDICTION, "mask"} & arrays.keys()
        return combine(checks.loss(pipeline, latents, conditioning, key=key, guidance=guidance), prior_loss_weight)
    predicted = checks.predict(pipeline, latents, conditioning, key=key, guidance=guidance, sampling=sampling)
    if BASE_PREDICTION in arrays:
        instance_target, _ = mx.split(predicted.target, 2)
        predicted = predicted._replace(target=mx.concatenate([instance_target, arrays[BASE_PREDICTION]]))
    count = len(latents) // (1 if prior_loss_weight is None else 2)
    if sampling is not None and sampling.snr_gamma is not None:  # as in diffusers, of instance samples alone
        instance, prior = predicted.weight[:count], predicted.weight[count:]
        predicted = predicted._replace(weight=mx.concatenate([instance, mx.ones_like(prior)]))
    per_sample = predicted.loss(arrays.get("mask"))
    loss, parts = combine(per_sample, prior_loss_weight)
    return loss, parts | loss_by_noise.bin_sums(per_sample[:count] / predicted.weight[:count], predicted.sigma[:count])


def add_base_prediction(
    pipeline: DiffusionPipeline,
    adapted: nn.Module,
    batch: MicroBatch,
    *,
    guidance: float,
    sampling: NoiseSampling | None = None,
) -> MicroBatch:
    """Add the prediction for the second half with adapters disabled. No gradient flows through it.

    Args:
        adapted: all networks that have adapters.
    """
    assert isinstance(pipeline, SupportsPrediction)
    half = tree_map(lambda array: mx.split(array, 2)[1], batch.arrays)
    with lora.disabled(adapted):
        predicted = pipeline.predict(
            half["latents"], half["conditioning"], key=half["key"], guidance=guidance, sampling=sampling
        )
        with exclusive():
            mx.eval(predicted.prediction)
    return replace(batch, arrays={**batch.arrays, BASE_PREDICTION: predicted.prediction})


def combine(per_sample: mx.array, prior_loss_weight: float | None) -> tuple[mx.array, dict[str, mx.array]]:
    """Per-sample losses, instance samples first -> scalar loss, unweighted means."""
    if prior_loss_weight is None:
        instance = per_sample.mean()
        return instance, {"instance_loss": instance}
    instance, prior = (half.mean() for half in mx.split(per_sample, 2))
    return instance + prior_loss_weight * prior, {"instance_loss": instance, "prior_loss": prior}
