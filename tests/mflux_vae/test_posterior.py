"""The diagonal Gaussian: its draws, its divergence, its gradients."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae import DiagonalGaussian
from mflux_vae.posterior import LOGVAR_RANGE


def drawn(seed: int = 0, batch: int = 3) -> DiagonalGaussian:
    return DiagonalGaussian.from_moments(2 * mx.random.normal((batch, 4, 5, 6), key=mx.random.key(seed)))


def test_moments_are_split_and_the_variance_is_bounded() -> None:
    moments = mx.array([[1.0, -2.0, 50.0, -50.0]])
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.mode().tolist() == posterior.mean.tolist() == [[1.0, -2.0]]
    assert posterior.logvar.tolist() == [[LOGVAR_RANGE[1], LOGVAR_RANGE[0]]]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_moments_give_a_float32_posterior(dtype: mx.Dtype) -> None:
    posterior = DiagonalGaussian.from_moments(mx.full((2, 64, 64, 8), 0.5, dtype=dtype))
    assert posterior.sample(mx.random.key(0)).dtype == posterior.kl().dtype == mx.float32
    expected = 0.5 * (0.25 + np.exp(0.5) - 1 - 0.5) * 64 * 64 * 4
    np.testing.assert_allclose(posterior.kl(), [expected] * 2, rtol=1e-3)


def test_a_key_decides_the_draw() -> None:
    posterior = drawn()
    one, again, other = (posterior.sample(mx.random.key(seed)) for seed in (1, 1, 2))
    assert mx.array_equal(one, again)
    assert not mx.array_equal(one, other)


def test_draws_have_the_posteriors_mean_and_variance() -> None:
    posterior = DiagonalGaussian(mx.full((20_000, 2), 3.0), mx.broadcast_to(mx.log(mx.array([0.25, 4.0])), (20_000, 2)))
    draws = np.array(posterior.sample(mx.random.key(0)))
    np.testing.assert_allclose(draws.mean(axis=0), [3, 3], atol=0.05)
    np.testing.assert_allclose(draws.var(axis=0), [0.25, 4], rtol=0.05)


def test_divergence_is_the_formula_per_sample_and_never_negative() -> None:
    posterior = drawn()
    mean, logvar = np.array(posterior.mean, np.float64), np.array(posterior.logvar, np.float64)
    expected = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(posterior.kl(), expected, rtol=1e-5)
    assert posterior.kl().shape == (3,) and (expected > 0).all()
    standard = DiagonalGaussian(mx.zeros((2, 3)), mx.zeros((2, 3)))
    assert standard.kl().tolist() == [0, 0]


def test_draws_pass_gradients_to_mean_and_variance() -> None:
    key = mx.random.key(3)

    def total(mean: mx.array, logvar: mx.array) -> mx.array:
        return DiagonalGaussian(mean, logvar).sample(key).sum()

    mean, logvar = mx.zeros((4,)), mx.array([0.0, 1.0, -1.0, 2.0])
    of_mean, of_logvar = mx.grad(total, argnums=(0, 1))(mean, logvar)
    assert of_mean.tolist() == [1] * 4
    expected = 0.5 * np.array(DiagonalGaussian(mean, logvar).sample(key))
    np.testing.assert_allclose(of_logvar, expected, rtol=1e-5)
