"""Adapters on a GPU multiply in the dtype of the activations, and compute what mlx-lm's layers do."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner import dora as mlx_dora
from mlx_lm.tuner import lora as mlx_lora

from mflux_vae_train import lora
from tests.helpers.peak_memory import peak_of

pytestmark = pytest.mark.usefixtures("gpu_branch")

LIMIT = {mx.float32: 1e-5, mx.bfloat16: 3e-2}


def layer_of(dtype: mx.Dtype, *, dora: bool, bits: int | None) -> nn.Module:
    net = nn.Module()
    net.only = nn.Linear(64, 48)
    net.set_dtype(dtype)
    if bits:
        net.only = net.only.to_quantized(64, bits)
    lora.add_lora(net, ["only"], rank=4, alpha=8.0, dora=dora)
    layer = net.only
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1)) * 0.1
    return layer


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_a_layer_computes_what_mlx_lm_does(dtype: mx.Dtype, dora: bool, bits: int | None) -> None:
    layer = layer_of(dtype, dora=dora, bits=bits)
    theirs = mlx_dora.DoRALinear if dora else mlx_lora.LoRALinear
    x = mx.random.normal((2, 7, 64), key=mx.random.key(2)).astype(dtype)
    away = mx.random.normal((2, 7, 48), key=mx.random.key(3))

    def results(function) -> dict[str, mx.array]:
        def loss(trained: dict[str, mx.array], x: mx.array) -> mx.array:
            layer.update(trained)
            return (function(layer, x).astype(mx.float32) * away).sum()

        trained = {name: layer[name] for name in ("lora_a", "lora_b", "m") if name in layer}
        of_trained, of_x = mx.grad(loss, argnums=(0, 1))(trained, x)
        layer.update(trained)
        return {"y": function(layer, x), "x": of_x, **of_trained}

    ours, expected = results(type(layer).__call__), results(theirs.__call__)
    assert ours.keys() == expected.keys() and {"lora_a", "lora_b"} < ours.keys()
    for name, far in expected.items():
        near = ours[name]
        assert near.dtype == far.dtype == (mx.float32 if name in ("lora_a", "lora_b", "m") else dtype)
        near, far = (np.array(a.astype(mx.float32)) for a in (near, far))
        np.testing.assert_allclose(near, far, rtol=0, atol=LIMIT[dtype] * np.abs(far).max(), err_msg=name)


def test_no_float32_copy_of_an_input_is_kept() -> None:
    x = mx.zeros((1024, 128), mx.bfloat16)

    def peak(layers: int) -> int:
        net = nn.Module()
        net.layers = [nn.Linear(128, 128) for _ in range(layers)]
        net.set_dtype(mx.bfloat16)
        lora.add_lora(net, ["layers.*"], rank=4)
        mx.eval(net.parameters(), x)

        def loss(trained: dict) -> mx.array:
            net.update(trained)
            y = x
            for layer in net.layers:
                y = layer(y)
            return y.astype(mx.float32).sum()

        return peak_of(lambda: mx.grad(loss)(net.trainable_parameters()))

    assert (peak(24) - peak(8)) / 16 < 1.5 * x.nbytes
