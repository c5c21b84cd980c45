"""8-bit moments: close to float32, without drift, reproducible."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.optimizers.adam8bit import SMALLEST, AdamW8bit

SHAPE = (48, 100)  # 18.75 blocks: the last one is not full


def updates(optimizer: AdamW, gradients: list[np.ndarray]) -> np.ndarray:
    parameters = {"w": mx.zeros(gradients[0].shape)}
    optimizer.init(parameters)
    for gradient in gradients:
        optimizer.learning_rate = 1e-2
        parameters = optimizer.apply_gradients({"w": mx.array(gradient, mx.float32)}, parameters)
        mx.eval(parameters, optimizer.state)
    return np.array(parameters["w"])


def noisy(count: int, scale: np.ndarray | float = 1.0) -> list[np.ndarray]:
    draws = np.random.default_rng(0)
    return [scale * (0.3 + draws.normal(size=SHAPE)) for _ in range(count)]


def test_weights_are_close_to_those_with_float32_moments() -> None:
    # gradients of very different sizes within a block
    gradients = noisy(60, 10.0 ** np.random.default_rng(1).uniform(-2, 0, SHAPE))
    exact, coded = updates(AdamW(), gradients), updates(AdamW8bit(), gradients)
    away = np.sqrt(np.mean((coded - exact) ** 2)) / np.sqrt(np.mean(exact**2))
    assert away < 0.1
    assert np.corrcoef(coded.flat, exact.flat)[0, 1] > 0.995


def test_second_moments_decay_at_the_right_rate() -> None:
    """A change of a thousandth per update is less than the distance of two codes; rounding to nearest would lose it."""
    loud, quiet = np.ones(SHAPE), np.full(SHAPE, 0.01)
    quiet[:, :2] = 1.0  # the block's scale stays what it is
    optimizers = AdamW(), AdamW8bit()
    for optimizer in optimizers:
        updates(optimizer, [loud] * 5 + [quiet] * 400)
    exact, coded = (optimizer.moments(optimizer.state["w"], SHAPE)[1] for optimizer in optimizers)
    fell = float(coded[:, 2:].mean() / exact[:, 2:].mean())
    assert fell == pytest.approx(1.0, rel=0.05)


def test_a_tiny_gradient_beside_a_large_one_does_not_divide_by_zero() -> None:
    gradient = np.full(SHAPE, 1e-9)
    gradient[:, 0] = 1.0
    moved = updates(AdamW8bit(weight_decay=0.0), [gradient] * 20)
    assert np.isfinite(moved).all() and np.abs(moved).max() <= 20 * 1e-2 * 1.1


def test_small_arrays_keep_float32() -> None:
    optimizer = AdamW8bit()
    assert optimizer.state_bytes(mx.zeros(SMALLEST - 1)) == 8 * (SMALLEST - 1)
    gradients = [np.random.default_rng(0).normal(size=(3, 4))] * 5
    assert np.array_equal(updates(AdamW(), gradients), updates(AdamW8bit(), gradients))


def test_rounding_is_a_function_of_the_update() -> None:
    one, two = (updates(AdamW8bit(), noisy(10)) for _ in range(2))
    assert np.array_equal(one, two)
