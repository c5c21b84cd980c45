"""Prodigy against its formula in numpy, and on problems of different scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae_train.optimizers.prodigy import Prodigy


def reference(
    weights: list[np.ndarray],
    gradients: Callable[[int, list[np.ndarray]], list[np.ndarray]],
    rates: list[float],
    *,
    beta3: float | None = None,
    weight_decay: float = 0.0,
    decouple: bool = True,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
) -> tuple[list[np.ndarray], float]:
    """The authors' algorithm in float64, for several arrays at once: weights at the end, and d.

    Args:
        gradients: (update, weights) -> their gradients.
    """
    beta1, beta2, d0, eps = 0.9, 0.999, 1e-6, 1e-8
    beta3 = beta2**0.5 if beta3 is None else beta3
    w, d, r = [one.astype(np.float64) for one in weights], d0, 0.0
    w0 = [one.copy() for one in w]
    m, v, s = ([np.zeros_like(one) for one in w] for _ in range(3))
    for n, rate in enumerate(rates, 1):
        each = gradients(n, w)
        gamma = d * rate * ((1 - beta2**n) ** 0.5 / (1 - beta1**n) if use_bias_correction else 1.0)
        g = [one if decouple else one + weight_decay * x for one, x in zip(each, w, strict=True)]
        inner = sum(float((one * (x0 - x)).sum()) for one, x0, x in zip(g, w0, w, strict=True))
        r = beta3 * r + d / d0 * gamma * inner
        for i, one in enumerate(g):
            m[i] = beta1 * m[i] + (1 - beta1) * d * one
            v[i] = beta2 * v[i] + (1 - beta2) * d * d * one * one
            s[i] = beta3 * s[i] + d / d0 * (d if safeguard_warmup else gamma) * one
        d = max(d, r / sum(float(np.abs(one).sum()) for one in s))
        for i in range(len(w)):
            if decouple:
                w[i] = w[i] - weight_decay * gamma * w[i]
            w[i] = w[i] - gamma * m[i] / (np.sqrt(v[i]) + d * eps)
    return w, d


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decouple": False},
        {"use_bias_correction": True},
        {"safeguard_warmup": True, "beta3": 0.95},
    ],
)
def test_it_equals_the_formula(options: dict[str, Any]) -> None:
    draws = np.random.default_rng(0)
    goal = [draws.normal(size=(4, 3)), draws.normal(size=5)]
    weights = [np.zeros_like(one) for one in goal]  # the first steps, of 1e-6, would be lost in float32 beside a 1
    noise = [[0.1 * draws.normal(size=one.shape) for one in goal] for _ in range(121)]
    rates = [min(1.0, (n + 1) / 10) for n in range(120)]

    def slopes(n: int, now: list[np.ndarray]) -> list[np.ndarray]:
        return [w - to + extra for w, to, extra in zip(now, goal, noise[n], strict=True)]  # of |w - goal|^2 / 2

    expected, d = reference(weights, slopes, rates, **options)
    optimizer = Prodigy(**options)
    parameters: Any = {"a": mx.array(weights[0], mx.float32), "deeper": {"b": mx.array(weights[1], mx.float32)}}
    optimizer.init(parameters)
    for n, rate in enumerate(rates, 1):
        optimizer.learning_rate = rate
        a, b = slopes(n, [np.array(parameters["a"]), np.array(parameters["deeper"]["b"])])
        gradients = {"a": mx.array(a, mx.float32), "deeper": {"b": mx.array(b, mx.float32)}}
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    assert d > 1e-3, "the estimate never grew: nothing was compared"
    assert float(optimizer.distance) == pytest.approx(d, rel=1e-3)
    for ours, theirs in zip((parameters["a"], parameters["deeper"]["b"]), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_without_a_gradient_nothing_changes() -> None:
    optimizer = Prodigy()
    parameters = {"w": mx.ones(3)}
    after = optimizer.apply_gradients({"w": mx.zeros(3)}, parameters)
    assert mx.array_equal(after["w"], parameters["w"]) and float(optimizer.distance) == pytest.approx(1e-6)


def test_it_finds_the_rate_of_a_problem_of_any_scale() -> None:
    for scale in (0.01, 100.0):
        optimizer = Prodigy()
        parameters = {"w": mx.zeros(8)}
        goal = mx.full(8, scale)
        for _ in range(300):
            gradient = {"w": parameters["w"] - goal}
            parameters = optimizer.apply_gradients(gradient, parameters)
            mx.eval(parameters, optimizer.state)
        assert float(mx.abs(parameters["w"] - goal).max()) < 0.2 * scale
