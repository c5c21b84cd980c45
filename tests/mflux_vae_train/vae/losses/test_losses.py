"""Losses agree with brute force in float64 numpy; the discriminator agrees with its definition."""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError
from mflux_vae_train.vae.losses import adversarial, elbo, total_correlation
from mflux_vae_train.vae.losses.elbo import BetaVAELoss, DisentangledVAELoss, VAELoss


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def arrays(*values: np.ndarray) -> list[mx.array]:
    return [mx.array(value, mx.float32) for value in values]


@pytest.fixture
def latents() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, mean and log variance of seven posteriors over three correlated components."""
    mean = drawn(7, 3) @ np.array([[1.0, 0.8, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    logvar = drawn(7, 3, seed=1) - 1
    return mean + np.exp(logvar / 2) * drawn(7, 3, seed=2), mean, logvar


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", ["mse", "l1", "bce"])
def test_reconstruction_errors_are_per_sample(name, reduction):
    output, target = (1 / (1 + np.exp(-drawn(3, 4, 5, 2, seed=seed))) for seed in (0, 1))
    errors = {
        "mse": (output - target) ** 2,
        "l1": abs(output - target),
        "bce": -(target * np.log(output) + (1 - target) * np.log(1 - output)),
    }
    expected = getattr(errors[name].reshape(3, -1), reduction)(axis=1)
    got = elbo.RECONSTRUCTION[name](*arrays(output, target), reduction=reduction)
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_cross_entropy_and_its_gradient_are_finite_at_0_and_1():
    output, target = mx.array([[0.0, 1.0, 0.0, 1.0]]), mx.array([[0.0, 1.0, 1.0, 0.0]])
    value, slope = mx.value_and_grad(lambda p: elbo.bce(p, target).sum())(output)
    assert 2 * 15.9 < value.item() < 2 * 16.7
    assert mx.isfinite(slope).all()


def test_kl_equals_the_integral(latents):
    _, mean, logvar = latents
    z = np.linspace(-20, 20, 40001)[:, None, None]
    log_q = -0.5 * ((z - mean) ** 2 / np.exp(logvar) + logvar + math.log(2 * math.pi))
    log_p = -0.5 * (z**2 + math.log(2 * math.pi))
    expected = (np.exp(log_q) * (log_q - log_p)).sum(axis=0) * 1e-3
    np.testing.assert_allclose(elbo.kl_terms(*arrays(mean, logvar)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(elbo.kl(*arrays(mean, logvar)), expected.sum(axis=1), rtol=1e-4)
    spatial = [values.reshape(7, 3, 1, 1) for values in arrays(mean, logvar)]
    np.testing.assert_allclose(elbo.kl(*spatial), expected.sum(axis=1), rtol=1e-4)


def test_components_below_free_bits_get_no_gradient():
    """The second of three components is below the limit; the first only for some samples."""
    mean = mx.array([[2.0, 0.01, 1.5], [0.1, -0.01, -1.5]])
    logvar = mx.zeros((2, 3))
    plain = np.array(elbo.kl_terms(mean, logvar))
    value, slope = mx.value_and_grad(lambda m: elbo.kl(m, logvar, free_bits=0.5).mean())(mean)
    assert value.item() == pytest.approx(np.maximum(plain.mean(axis=0), 0.5).sum(), rel=1e-6)
    np.testing.assert_allclose(slope, np.array(mean) / 2 * [1, 0, 1], atol=1e-7)


def test_active_units_are_counted():
    mean = np.concatenate([drawn(50, 2), 0.05 * drawn(50, 3)], axis=1)
    assert elbo.active_units(mx.array(mean, mx.float32)).item() == 2


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (1, 9), (2, 2), (4, 100), (5, 5), (128, 60000), (64, 24_000_000)])
def test_stratified_weights_agree_with_the_paper(batch, size):
    weights = np.exp(np.array(total_correlation.log_weights(batch, size), np.float64))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    others = batch - 1
    if others and size > 2:
        np.testing.assert_allclose(np.diag(weights), 1 / size, rtol=1e-5)
        away = weights[~np.eye(batch, dtype=bool)].reshape(batch, others)
        expected = [1 / others] * (batch - 2) + [(size - others) / (size * others)]
        for row in away:
            np.testing.assert_allclose(np.sort(row), np.sort(expected), rtol=1e-5)
        # every sample represents the others equally often
        np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)


def test_weighted_sampling_and_invalid_arguments():
    np.testing.assert_allclose(
        np.exp(total_correlation.log_weights(4, 10, "weighted")), np.full((4, 4), 1 / 40), rtol=1e-6
    )
    with pytest.raises(SettingsError, match="dataset_size"):
        total_correlation.log_weights(4, 3)
    with pytest.raises(SettingsError, match="sampling"):
        total_correlation.log_weights(4, 10, "other")  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", ["stratified", "weighted"])
def test_decomposition_agrees_with_loops_over_samples(latents, sampling):
    z, mean, logvar = latents
    batch, components, size = 7, 3, 50

    def density(i: int, j: int, d: int) -> float:
        variance = math.exp(logvar[j, d])
        return math.exp(-0.5 * (z[i, d] - mean[j, d]) ** 2 / variance) / math.sqrt(2 * math.pi * variance)

    def weight(i: int, j: int) -> float:
        if sampling == "weighted":
            return 1 / (size * batch)
        m = batch - 1
        return 1 / size if i == j else (size - m) / (size * m) if j == (i + 1) % batch else 1 / m

    expected = []
    for i in range(batch):
        conditional = math.prod(density(i, i, d) for d in range(components))
        joint = sum(weight(i, j) * math.prod(density(i, j, d) for d in range(components)) for j in range(batch))
        product = math.prod(sum(weight(i, j) * density(i, j, d) for j in range(batch)) for d in range(components))
        prior = math.prod(math.exp(-0.5 * z[i, d] ** 2) / math.sqrt(2 * math.pi) for d in range(components))
        expected.append((math.log(conditional / joint), math.log(joint / product), math.log(product / prior)))
    parts = total_correlation.decompose_kl(*arrays(z, mean, logvar), dataset_size=size, sampling=sampling)
    np.testing.assert_allclose(np.array(parts), np.array(expected).T, rtol=2e-4, atol=2e-5)


def test_dependent_components_have_more_total_correlation_than_independent_ones():
    shared = drawn(256, 1)
    narrow, noise = np.full((256, 2), -4.0), drawn(256, 2, seed=5)
    measured = []
    for mean in (np.repeat(shared, 2, axis=1), drawn(256, 2, seed=3)):
        z = mean + np.exp(narrow / 2) * noise
        parts = total_correlation.decompose_kl(*arrays(z, mean, narrow), dataset_size=256)
        measured.append(parts.total_correlation.mean().item())
    assert measured[0] > measured[1] + 0.5


def test_annealing():
    linear = partial(elbo.linear_beta, start=0.5, end=4.5, steps=100)
    assert [linear(step) for step in (0, 25, 50, 100, 10**6)] == [0.5, 1.5, 2.5, 4.5, 4.5]
    assert elbo.linear_beta(0, start=0.0, end=2.0, steps=0) == 2.0
    cyclical = partial(elbo.cyclical_beta, start=0.0, end=2.0, steps=100)
    assert [cyclical(step) for step in (0, 25, 50, 99, 100, 125)] == [0.0, 1.0, 2.0, 2.0, 0.0, 1.0]


@pytest.fixture
def case(latents):
    """recon_x, x, mu, log_var and z."""
    z, mean, logvar = latents
    output, target = (1 / (1 + np.exp(-drawn(7, 2, 2, 1, seed=seed))) for seed in (0, 1))
    return arrays(output, target, mean, logvar, z)


def test_loss_is_the_weighted_sum_and_differentiable(case):
    loss = VAELoss(beta=3.0, loss_type="bce")
    total, reconstruction, divergence = loss(*case[:4])
    assert total.item() == pytest.approx((reconstruction + 3 * divergence).item(), rel=1e-6)
    assert reconstruction.item() == pytest.approx(elbo.bce(*case[:2]).mean().item(), rel=1e-6)
    slopes = mx.grad(lambda *values: loss(*values)[0], argnums=(0, 2, 3))(*case[:4])
    assert all(mx.isfinite(slope).all() and mx.abs(slope).max() > 0 for slope in slopes)
    each = loss.per_sample(*case[:4], beta=mx.array(0.0))
    assert [values.shape for values in each] == [(7,)] * 3
    np.testing.assert_allclose(each[0], each[1])


def test_images_in_both_ranges_give_the_same_cross_entropy(case):
    signed = [value * 2 - 1 for value in case[:2]]
    a, b = VAELoss(loss_type="bce")(*case[:4]), VAELoss(loss_type="bce", signed=True)(*signed, *case[2:4])
    np.testing.assert_allclose(a[1], b[1], rtol=1e-4)


def test_perceptual_distance_gets_rgb_in_minus_one_to_one(case):
    seen = []

    def distance(output: mx.array, target: mx.array) -> mx.array:
        seen.extend([output, target])
        return mx.arange(7).astype(mx.float32)

    plain = VAELoss()(*case[:4])[1]
    with_it = VAELoss(perceptual=distance, perceptual_weight=2.0)(*case[:4])[1]
    assert with_it.item() == pytest.approx(plain.item() + 2 * 3, rel=1e-6)
    assert seen[0].shape == seen[1].shape == (7, 2, 2, 3)
    np.testing.assert_allclose(seen[0][..., 2:], case[0] * 2 - 1)


def test_beta_advances_with_every_call(case):
    loss = BetaVAELoss(beta_start=0.0, beta_end=4.0, beta_steps=4)
    weights = []
    for _ in range(6):
        total, reconstruction, divergence = loss(*case[:4])
        weights.append(((total - reconstruction) / divergence).item())
    assert weights == pytest.approx([0, 1, 2, 3, 4, 4], abs=1e-5)
    assert [loss.beta_at(step) for step in range(6)] == [0, 1, 2, 3, 4, 4]


def test_beta_tc_loss_weights_its_terms(case):
    loss = DisentangledVAELoss(beta=4.0, gamma=2.0, alpha=0.5, dataset_size=50)
    total, reconstruction, divergence, correlation = loss(*case)
    parts = [part.mean().item() for part in total_correlation.decompose_kl(case[4], *case[2:4], dataset_size=50)]
    expected = reconstruction.item() + 0.5 * parts[0] + 4 * parts[1] + 2 * parts[2]
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert correlation.item() == pytest.approx(parts[1], rel=1e-6)
    assert divergence.item() == pytest.approx(elbo.kl(*case[2:4]).mean().item(), rel=1e-6)
    slopes = mx.grad(lambda *values: loss(*values)[0], argnums=(0, 2, 3, 4))(*case)
    assert all(mx.isfinite(slope).all() for slope in slopes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VAELoss(loss_type="l3"), "loss_type"),
        (lambda: VAELoss(reduction="max"), "reduction"),
        (lambda: VAELoss(beta=-1), "beta"),
        (lambda: VAELoss(free_bits=float("nan")), "free_bits"),
        (lambda: BetaVAELoss(annealing="quadratic"), "annealing"),
        (lambda: BetaVAELoss(beta_steps=-1), "beta_steps"),
        (lambda: DisentangledVAELoss(gamma=-1), "gamma"),
        (lambda: DisentangledVAELoss(sampling="none"), "sampling"),
    ],
)
def test_invalid_loss_settings_are_rejected(build, message):
    with pytest.raises(SettingsError, match=message):
        build()


def test_discriminator_has_the_published_size_and_receptive_field():
    discriminator = adversarial.PatchDiscriminator()
    count = sum(value.size for _, value in tree_flatten(discriminator.trainable_parameters()))
    assert count == 2_765_633  # latent-diffusion's NLayerDiscriminator(3, 64, 3)
    assert discriminator(mx.zeros((2, 32, 48, 3))).shape == (2, 2, 4, 1)
    pixels = mx.random.uniform(-1, 1, (1, 96, 96, 3), key=mx.random.key(0))
    discriminator.eval()  # batch statistics would connect all pixels
    seen = mx.abs(mx.grad(lambda x: discriminator(x)[0, 5, 5, 0])(pixels)).sum(axis=(0, 3))
    rows = np.flatnonzero(np.array(seen).sum(axis=1))
    assert rows[-1] - rows[0] + 1 == 70


def test_hinge_losses():
    real, fake = mx.array([[2.0, 0.5], [-1.0, 0.0]]), mx.array([[-2.0, 0.5], [1.0, -1.0]])
    np.testing.assert_allclose(adversarial.hinge_loss(real, fake), [0.5 * (0.25 + 0.75), 0.5 * (1.5 + 1.0)])
    np.testing.assert_allclose(adversarial.generator_loss(fake), [0.75, 0.0])
    assert [adversarial.started(step, 10) for step in (0, 9, 10, 11)] == [0, 0, 1, 1]


def test_adaptive_weight_balances_gradients_and_has_no_gradient():
    weight = mx.array([[1.0, -2.0], [0.5, 3.0]])
    nll, generator = (lambda w: 6 * w.sum()), (lambda w: 2 * w.sum())
    found = adversarial.adaptive_weight(nll, generator, weight)
    assert found.item() == pytest.approx(0.5 * 12 / (4 + 1e-4), rel=1e-6)
    assert adversarial.adaptive_weight(nll, lambda w: 0 * w.sum(), weight, scale=1.0).item() == 1e4

    def total(w: mx.array) -> mx.array:
        return nll(w) + adversarial.adaptive_weight(lambda v: mx.square(v).sum(), generator, w) * generator(w)

    slope = mx.grad(total)(weight)
    expected = 6 + 2 * adversarial.adaptive_weight(lambda v: mx.square(v).sum(), generator, weight).item()
    np.testing.assert_allclose(slope, np.full((2, 2), expected), rtol=1e-6)


def test_discriminator_learns_to_tell_noise_from_zeros():
    mx.random.seed(0)
    discriminator = adversarial.PatchDiscriminator(1, 4, 1)
    real, fake = mx.zeros((2, 8, 8, 1)), mx.random.uniform(-1, 1, (2, 8, 8, 1), key=mx.random.key(1))
    loss = nn.value_and_grad(
        discriminator, lambda: adversarial.hinge_loss(discriminator(real), discriminator(fake)).mean()
    )
    first, slopes = loss()
    discriminator.update(nn.utils.tree_map(lambda p, g: p - 0.1 * g, discriminator.trainable_parameters(), slopes))
    assert loss()[0] < first
