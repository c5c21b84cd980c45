"""The DreamBooth objective: per-sample losses of the pipeline, averaged over instance and prior samples apart.

L = mean_instance + weight * mean_prior (Ruiz et al. 2023, equation 2, in the form diffusers uses): a weighted
sum of per-sample losses. Which noise, target or schedule lies behind one is the pipeline's business.

Where the model's output is preserved instead of class pictures, a prior sample is an instance's noised latents with the
class prompt, and its target what the base model predicts there: weight * |v(x_t, class) - v_base(x_t, class)|^2.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mflux_vae_train import lora
from mflux_vae_train.dreambooth.optimization import loss_by_noise
from mflux_vae_train.pipelines.capabilities import SupportsPrediction
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.training.step import Arrays, MicroBatch

BASE = "base_prediction"
"""In a micro-batch: what the base model predicts for its second half (B / 2, ...)."""


def dreambooth_loss(
    pipeline: DiffusionPipeline,
    arrays: Arrays,
    *,
    guidance: float,
    prior_loss_weight: float | None,
    sampling: NoiseSampling | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Loss of one micro-batch, the means it is made of, and the instance samples' errors by noise level.

    Args:
        arrays: as `data.micro_batches` makes them, and `add_base_prediction` completes.
        prior_loss_weight: None where the micro-batch has no prior samples.
        sampling: how noise levels are drawn; None as the pipeline recommends.
    """
    latents, conditioning, key = arrays["latents"], arrays["conditioning"], arrays["key"]
    if not isinstance(pipeline, SupportsPrediction):
        assert sampling is None and not {BASE, "mask"} & arrays.keys()
        return combine(pipeline.loss(latents, conditioning, key=key, guidance=guidance), prior_loss_weight)
    predicted = pipeline.predict(latents, conditioning, key=key, guidance=guidance, sampling=sampling)
    if BASE in arrays:
        instance_target, _ = mx.split(predicted.target, 2)
        predicted = predicted._replace(target=mx.concatenate([instance_target, arrays[BASE]]))
    per_sample = predicted.loss(arrays.get("mask"))
    loss, parts = combine(per_sample, prior_loss_weight)
    instances = len(per_sample) // (1 if prior_loss_weight is None else 2)
    unweighted = per_sample[:instances] / predicted.weight[:instances]
    return loss, {**parts, **loss_by_noise.bin_sums(unweighted, predicted.sigma[:instances])}


def add_base_prediction(
    pipeline: DiffusionPipeline,
    adapted: nn.Module,
    batch: MicroBatch,
    *,
    guidance: float,
    sampling: NoiseSampling | None = None,
) -> MicroBatch:
    """The micro-batch with what the pipeline predicts for its second half while the adapters are off.

    Outside of any differentiation: to the step it is a constant like the latents.

    Args:
        adapted: all networks that have adapters.
    """
    assert isinstance(pipeline, SupportsPrediction)
    half = tree_map(lambda array: mx.split(array, 2)[1], batch.arrays)
    with lora.disabled(adapted):
        predicted = pipeline.predict(
            half["latents"], half["conditioning"], key=half["key"], guidance=guidance, sampling=sampling
        )
        mx.eval(predicted.prediction)
    return replace(batch, arrays={**batch.arrays, BASE: predicted.prediction})


def combine(per_sample: mx.array, prior_loss_weight: float | None) -> tuple[mx.array, dict[str, mx.array]]:
    """Per-sample losses, the instance's before as many of the prior's -> scalar loss, unweighted parts."""
    if prior_loss_weight is None:
        instance = per_sample.mean()
        return instance, {"instance_loss": instance}
    instance, prior = (half.mean() for half in mx.split(per_sample, 2))
    return instance + prior_loss_weight * prior, {"instance_loss": instance, "prior_loss": prior}
