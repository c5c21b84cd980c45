"""Products with quantized weights: dense ones equal those of the dequantized matrix, in parts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mflux_vae.errors import SettingsError
from mflux_vae.kernels import quantized
from mflux_vae.kernels.quantized import PRODUCT_VARIABLE, Dense, is_dense, quantized_product
from mflux_vae.runtime import device
from mflux_vae_train.pipelines.quantization import quantize
from tests.helpers.peak_memory import peak_of

OUTPUTS, INPUTS, ROWS = 384, 256, 12
FLOAT, HALF = mx.float32, mx.bfloat16
LIMIT = {FLOAT: 1e-5, HALF: 8e-3}

pytestmark = pytest.mark.usefixtures("gpu_branch")


@pytest.mark.parametrize(
    ("kind", "gpu", "rows", "dtype", "group_size", "expected"),
    [
        ("mac", "applegpu_g13s", 1023, HALF, 64, Dense(False, False)),
        ("mac", "applegpu_g13s", 1024, HALF, 64, Dense(True, True)),
        ("mac", "applegpu_g16d", 4096, FLOAT, 64, Dense(True, True)),
        ("mac", "applegpu_g17s", 4096, HALF, 64, Dense(False, True)),
        ("mac", "applegpu_g20p", 4096, HALF, 64, Dense(False, True)),
        ("mac", "unknown", 4096, HALF, 64, Dense(True, True)),
        ("cuda", "sm_89", 7, HALF, 128, Dense(False, False)),
        ("cuda", "sm_89", 8, HALF, 64, Dense(True, True)),
        ("cuda", "sm_89", 1, FLOAT, 64, Dense(False, False)),
        ("cuda", "sm_89", 1, FLOAT, 128, Dense(True, True)),
        ("cpu", "x86_64", 1, FLOAT, 64, Dense(True, True)),
    ],
)
def test_which_products_are_dense(
    kind: str, gpu: str, rows: int, dtype: mx.Dtype, group_size: int, expected: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "kind", lambda: kind)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": gpu})
    assert is_dense(rows, dtype, group_size) == expected
    for choice, wanted in (("auto", expected), ("dense", Dense(True, True)), ("native", Dense(False, False))):
        monkeypatch.setenv(PRODUCT_VARIABLE, choice)
        assert is_dense(rows, dtype, group_size) == wanted


def test_unknown_choices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PRODUCT_VARIABLE, "fast")
    with pytest.raises(ValueError, match=PRODUCT_VARIABLE):
        is_dense(1, FLOAT, 64)
    with pytest.raises(SettingsError, match=PRODUCT_VARIABLE):
        quantize(nn.Linear(64, 64), 4, lambda path: True)


@pytest.mark.parametrize(
    ("dtype", "product"),
    [  # MLX's kernel for CPUs sums in half precision
        (FLOAT, Dense(True, True)),
        (HALF, Dense(True, True)),
        (FLOAT, Dense(False, True)),
        (FLOAT, Dense(False, False)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 128), (3, 32)])
def test_values_and_gradients_are_those_of_the_dequantized_matrix(
    bits: int, group_size: int, dtype: mx.Dtype, product: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "TILE_BYTES", 140 * dtype.size * INPUTS)  # 128 outputs, or 64 to 128 inputs
    monkeypatch.setattr(quantized, "is_dense", lambda *_: product)
    scheme: Any = {"group_size": group_size, "bits": bits}
    stored = mx.quantize(mx.random.normal((OUTPUTS, INPUTS), key=mx.random.key(0)).astype(dtype), **scheme)
    matrix = mx.dequantize(*stored, **scheme)
    x = mx.random.normal((3, ROWS // 3, INPUTS), key=mx.random.key(1)).astype(dtype)
    slope = mx.random.normal((3, ROWS // 3, OUTPUTS), key=mx.random.key(2)).astype(dtype)

    def both(x: mx.array, slope: mx.array) -> list[mx.array]:
        (y,), (gradient,) = mx.vjp(lambda x: quantized_product(x, *stored, **scheme), [x], [slope])
        return [y, gradient]

    expected = x.astype(FLOAT) @ matrix.astype(FLOAT).T, slope.astype(FLOAT) @ matrix.astype(FLOAT)
    for near, far in zip(both(x, slope), expected, strict=True):
        assert near.dtype == dtype and near.shape == far.shape
        near, far = (np.array(a.astype(FLOAT)) for a in (near, far))
        np.testing.assert_allclose(near, far, rtol=0, atol=LIMIT[dtype] * np.abs(far).max())


@pytest.mark.parametrize("compiled", [False, True])
def test_one_part_of_one_layer_is_dequantized_at_a_time(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    width, layers = 512, 12
    matrix = 4 * width**2
    monkeypatch.setattr(quantized, "TILE_BYTES", matrix // 4)
    stored = [mx.quantize(mx.random.normal((width, width), key=mx.random.key(i)) * 0.05) for i in range(layers)]
    x = mx.random.normal((32, width), key=mx.random.key(99))
    mx.eval(stored, x)

    def loss(x: mx.array) -> mx.array:
        for layer in stored:
            x = quantized_product(x, *layer, group_size=64, bits=4)
        return x.sum()

    run = mx.compile(mx.grad(loss)) if compiled else mx.grad(loss)
    # MLX allocates the results of ten operations ahead
    peak = peak_of(lambda: run(x))
    print(f"{peak / matrix:.1f} matrices")
    assert peak < 3 * matrix < layers * matrix / 3


@pytest.mark.parametrize("choice", ["dense", "native"])
def test_gradients_have_the_dtype_of_the_input(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PRODUCT_VARIABLE, choice)
    x, arrays = mx.ones((2, 64), HALF), mx.quantize(mx.ones((32, 64)), 64, 4)
    slope = mx.grad(lambda x: quantized_product(x, *arrays, group_size=64, bits=4).sum())(x)
    assert slope.dtype == HALF and mx.all(slope == 32)
