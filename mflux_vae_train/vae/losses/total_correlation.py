"""The average divergence of posteriors from the prior, taken apart: what latents tell, share, and stray."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import mlx.core as mx

from mflux_vae.errors import SettingsError


class Parts(NamedTuple):
    """The average divergence from the prior, taken apart (Chen et al. 2018, arXiv 1802.04942, equation 2); (B,) each.

    Estimates from one batch: `mutual_information + total_correlation + dimension_wise_kl` is the sample's
    log q(z|x) - log p(z) exactly.
    """

    mutual_information: mx.array
    total_correlation: mx.array
    dimension_wise_kl: mx.array


Sampling: TypeAlias = Literal["stratified", "weighted"]


def log_weights(batch: int, dataset_size: int, sampling: Sampling = "stratified") -> mx.array:
    """Logarithms of the weights W with which the samples of a batch stand for the data set's. (B, B).

    q(z_i) is about sum_j W_ij q(z_i | x_j). "stratified", with M = B - 1: 1/N for the sample itself, (N - M) / (N M)
    for one other, 1/M for all the rest, so that every row sums to one. "weighted" (minibatch weighted sampling):
    1 / (N B) for all.

    Raises:
        SettingsError: a data set smaller than the batch, another kind of sampling.
    """
    if dataset_size < batch:
        raise SettingsError(f"dataset_size {dataset_size} is less than the batch of {batch}")
    if sampling == "weighted":
        return mx.full((batch, batch), -math.log(dataset_size * batch))
    if sampling != "stratified":
        raise SettingsError(f"sampling is stratified or weighted, not {sampling!r}")
    others = batch - 1
    if not others:
        return mx.zeros((1, 1))
    row = [-math.log(dataset_size), math.log((dataset_size - others) / (dataset_size * others))]
    row += [-math.log(others)] * (batch - 2)
    # row i is row 0, moved i places to the right
    places = (mx.arange(batch)[None] - mx.arange(batch)[:, None]) % batch
    return mx.array(row)[places]


def decomposition(
    z: mx.array, mean: mx.array, logvar: mx.array, *, dataset_size: int | None = None, sampling: Sampling = "stratified"
) -> Parts:
    """Estimate what the average divergence from the prior consists of.

    log q(z_i) = LSE_j [log W_ij + sum_d log q(z_id | x_j)], and the product of the marginals' logarithms
    sum_d LSE_j [log W_ij + log q(z_id | x_j)]: Chen et al. 2018, section 4 and appendix C.

    Args:
        z: (B, D), or (B, ...), of which every number counts as a component: one draw from each posterior.
        mean, logvar: of the posteriors, in the same shape.
        dataset_size: how many samples the data set has; None takes the batch for all of it.
        sampling: see `log_weights`.
    """
    z, mean, logvar = (values.astype(mx.float32).reshape(len(values), -1) for values in (z, mean, logvar))
    weights = log_weights(z.shape[0], dataset_size or z.shape[0], sampling)
    own = _log_normal(z, mean, logvar).sum(axis=1)
    prior = _log_normal(z, mx.zeros_like(z), mx.zeros_like(z)).sum(axis=1)
    # (B, B, D): of sample i under the posterior of sample j
    each = _log_normal(z[:, None], mean[None], logvar[None])
    joint = mx.logsumexp(weights + each.sum(axis=2), axis=1)
    product = mx.logsumexp(weights[..., None] + each, axis=1).sum(axis=1)
    return Parts(own - joint, joint - product, product - prior)


def _log_normal(z: mx.array, mean: mx.array, logvar: mx.array) -> mx.array:
    """Logarithm of the normal density, of each component."""
    return -0.5 * (mx.square(z - mean) * mx.exp(-logvar) + logvar + math.log(2 * math.pi))
