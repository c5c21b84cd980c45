"""Adapters at a strength: 0 is the base model, 1 the adapter."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mflux_vae_train import lora
from tests.mflux_vae_train.training.tiny_model import Net

X = mx.array(np.linspace(-1, 1, 12).reshape(3, 4), mx.float32)


def adapted(dora: bool) -> Net:
    net = Net()
    lora.add_lora(net, ["blocks.*"], rank=2, alpha=3.0, dora=dora)
    net.update(tree_map(lambda x: x + 0.1, net.trainable_parameters()))
    return net


@pytest.mark.parametrize("dora", [False, True])
def test_a_scale_moves_the_weights_from_the_base_to_the_adapter(dora: bool) -> None:
    base, net, whole = Net(), adapted(dora), adapted(dora)
    trained = net(X)
    lora.fuse(whole)
    for factor in (-0.5, 0.3, 2.0):
        moved = Net()
        for index, layer in enumerate(moved.blocks):
            there: nn.Linear = whole.blocks[index]
            layer.weight = layer.weight + factor * (there.weight - layer.weight)
            layer.bias = there.bias
        with lora.scaled(net, factor):
            assert mx.allclose(net(X), moved(X), atol=1e-5)
    for factor, expected in ((0.0, base(X)), (1.0, trained)):
        with lora.scaled(net, factor):
            assert mx.array_equal(net(X), expected)
    assert mx.array_equal(net(X), trained), "restored"


def test_the_scale_before_is_restored_after_an_error() -> None:
    net = adapted(False)
    before = [layer.scale for layer in lora.layers(net).values()]
    with pytest.raises(RuntimeError), lora.scaled(net, 0.5):
        raise RuntimeError
    assert [layer.scale for layer in lora.layers(net).values()] == before
