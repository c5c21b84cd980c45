"""Decomposition of the KL divergence: mutual information, total correlation, dimension-wise KL."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import mlx.core as mx

from mflux_vae.errors import SettingsError


class KLParts(NamedTuple):
    """Terms of the average KL divergence (Chen et al. 2018, arXiv:1802.04942, equation 2), in nats, (B,) each.

    The terms are estimates from one batch; their sum is exactly log q(z|x) - log p(z) of the sample.
    """

    mutual_information: mx.array
    total_correlation: mx.array
    dimension_wise_kl: mx.array


Sampling: TypeAlias = Literal["stratified", "weighted"]


def log_weights(batch: int, dataset_size: int, sampling: Sampling = "stratified") -> mx.array:
    """Logarithms of the weights W (B, B) with which samples of a batch represent the data set.

    q(z_i) is approximately sum_j W_ij q(z_i | x_j). "stratified", with M = B - 1: 1/N for the sample itself,
    (N - M) / (N M) for one other sample, 1/M for the others; every row sums to one. "weighted" (minibatch weighted
    sampling): 1 / (N B) for all.

    Raises:
        SettingsError: the data set is smaller than the batch, or unknown sampling.
    """
    if dataset_size < batch:
        raise SettingsError(f"dataset_size is {dataset_size}; at least {batch}, the batch size, is allowed")
    if sampling == "weighted":
        return mx.full((batch, batch), -math.log(dataset_size * batch))
    if sampling != "stratified":
        raise SettingsError(f"sampling is {sampling!r}; allowed are stratified, weighted")
    others = batch - 1
    if not others:
        return mx.zeros((1, 1))
    row = [-math.log(dataset_size), math.log((dataset_size - others) / (dataset_size * others))]
    row += [-math.log(others)] * (batch - 2)
    # row i is row 0, rotated to the right by i columns
    columns = (mx.arange(batch)[None] - mx.arange(batch)[:, None]) % batch
    return mx.array(row)[columns]


def decompose_kl(
    z: mx.array, mean: mx.array, logvar: mx.array, *, dataset_size: int | None = None, sampling: Sampling = "stratified"
) -> KLParts:
    """Estimate the terms of the average KL divergence from the prior.

    log q(z_i) = LSE_j [log W_ij + sum_d log q(z_id | x_j)], and the logarithm of the product of the marginals is
    sum_d LSE_j [log W_ij + log q(z_id | x_j)] (Chen et al. 2018, section 4 and appendix C).

    Args:
        z: one draw from each posterior, (B, D) or (B, ...), which is flattened.
        mean, logvar: posteriors, in the same shape.
        dataset_size: number of samples in the data set; None uses the batch size.
        sampling: see `log_weights`.
    """
    z, mean, logvar = (values.astype(mx.float32).reshape(len(values), -1) for values in (z, mean, logvar))
    weights = log_weights(z.shape[0], dataset_size or z.shape[0], sampling)
    conditional = _log_normal(z, mean, logvar).sum(axis=1)
    prior = _log_normal(z, mx.zeros_like(z), mx.zeros_like(z)).sum(axis=1)
    # (B, B, D): sample i under the posterior of sample j
    pairwise = _log_normal(z[:, None], mean[None], logvar[None])
    joint = mx.logsumexp(weights + pairwise.sum(axis=2), axis=1)
    product = mx.logsumexp(weights[..., None] + pairwise, axis=1).sum(axis=1)
    return KLParts(conditional - joint, joint - product, product - prior)


def _log_normal(z: mx.array, mean: mx.array, logvar: mx.array) -> mx.array:
    """Log density of the normal distribution, per component."""
    return -0.5 * (mx.square(z - mean) * mx.exp(-logvar) + logvar + math.log(2 * math.pi))
