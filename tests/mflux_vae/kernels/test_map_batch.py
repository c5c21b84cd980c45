"""`map_batch` matches a single call on the whole batch, also inside traces."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mflux_vae import kernels
from mflux_vae.kernels.cpu import parallel
from mflux_vae.runtime import device

WIDTH = 24


@pytest.fixture(params=[1, 2, 3])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(device, "cores", lambda: request.param)
    monkeypatch.setattr(parallel, "_MAP_BATCH_ROWS", 40)
    yield request.param


def weights() -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(0), 3)
    return {
        "gain": 1 + 0.1 * mx.random.normal((WIDTH,), key=keys[0]),
        "up": mx.random.normal((3 * WIDTH, WIDTH), key=keys[1]) / 4,
        "down": mx.random.normal((WIDTH, WIDTH), key=keys[2]) / 4,
    }


def block(w: dict[str, mx.array], x: mx.array, mask: mx.array) -> mx.array:
    """A small transformer block that uses every kernel with a separate implementation inside `map_batch`."""
    normed = kernels.layer_norm(x, w["gain"], w["gain"], 1e-6)
    q, k, v = (a[:, None] for a in mx.split(normed @ w["up"].T, 3, axis=-1))
    x = x + kernels.attention(q, k, v, scale=0.2, mask=mask)[:, 0]
    return x + kernels.gelu_tanh(kernels.rms_norm(x, w["gain"], 1e-6) @ w["down"].T) * kernels.quick_gelu(x)


def inputs(batch: int, length: int, masks: int) -> tuple[mx.array, mx.array]:
    """Samples and `masks` masks: one per sample, or one for all."""
    keys = mx.random.split(mx.random.key(batch), 2)
    x = mx.random.normal((batch, length, WIDTH), key=keys[0])
    return x, mx.where(mx.random.uniform(shape=(masks, 1, length, length), key=keys[1]) < 0.3, -1e9, 0.0)


def assert_close(ours: mx.array, theirs: mx.array, limit: float) -> None:
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=0, atol=limit * float(mx.abs(theirs).max()))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(1, 7), length=st.sampled_from([1, 9, 16, 50]), mask_per_sample=st.booleans())
def test_parts_match_the_whole_batch(cores: int, batch: int, length: int, mask_per_sample: bool) -> None:
    w, (x, mask) = weights(), inputs(batch, length, batch if mask_per_sample else 1)
    with kernels.deferred():
        expected = block(w, x, mask)
    ours = kernels.map_batch(lambda x, mask: block(w, x, mask), x, mask)
    assert_close(ours, expected, 3e-6)


def test_gradients_of_arguments_and_captured_arrays(cores: int) -> None:
    w, (x, mask) = weights(), inputs(5, 9, 1)

    def loss(w: dict[str, mx.array], x: mx.array) -> mx.array:
        return mx.square(kernels.map_batch(lambda x, mask: block(w, x, mask), x, mask)).sum()

    def expected(w: dict[str, mx.array], x: mx.array) -> mx.array:
        return mx.square(block(w, x, mask)).sum()

    for argument in (0, 1):
        ours, theirs = mx.grad(loss, argument)(w, x), mx.grad(expected, argument)(w, x)
        for name in w if argument == 0 else ():
            assert_close(ours[name], theirs[name], 1e-5)
        if argument == 1:
            assert_close(ours, theirs, 1e-5)
    traced = mx.compile(lambda x: kernels.map_batch(lambda x: x @ w["down"], x))
    assert_close(traced(x), x @ w["down"], 1e-6)


def test_errors_of_the_function_propagate(cores: int) -> None:
    def broken(x: mx.array) -> mx.array:
        raise ValueError(f"unexpected {x.ndim} axes")

    with pytest.raises(ValueError, match="3 axes"):
        kernels.map_batch(broken, mx.zeros((4, 3, 2)))
    assert_close(kernels.map_batch(mx.square, mx.ones((4, 3, 2))), mx.ones((4, 3, 2)), 0)
    assert not parallel._local.in_map_batch
