"""The moving average: its recursion with warm-up, and as parameters of a module."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.training.ema import EMA
from mflux_vae_train.training.step import Step
from tests.mflux_vae_train.training.tiny_model import Net, loss, window


def test_the_average_equals_the_recursion_with_warm_up() -> None:
    values = [3.0, -1.0, 2.0, 5.0]
    ema = EMA({"w": mx.array([1.0])}, decay=0.2)
    expected = 1.0
    for n, value in enumerate(values):
        ema.update({"w": mx.array([value])})
        keep = min(0.2, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
    np.testing.assert_allclose(ema.state["average"]["w"].item(), expected, rtol=1e-6)
    assert ema.state["updates"].item() == len(values)


def test_a_step_updates_it_and_it_can_be_swapped_in() -> None:
    net = Net()
    ema = EMA(net.trainable_parameters(), decay=0.9)
    step = Step(net, AdamW(), loss, ema=ema)
    start = dict(tree_flatten(net.parameters()))["out.weight"]
    for update in range(5):
        step(update, window(update), 1e-2)
    trained = dict(tree_flatten(net.parameters()))["out.weight"]
    x = mx.ones((1, 4))
    own = net(x)
    with ema.swapped_in(net):
        average = dict(tree_flatten(net.parameters()))["out.weight"]
        assert not mx.array_equal(net(x), own)
    assert mx.array_equal(net(x), own)
    # between where it started and where it is
    assert mx.abs(average - trained).sum() < mx.abs(start - trained).sum()
    assert mx.abs(average - trained).sum() > 0


def test_the_dtype_of_the_module_is_kept() -> None:
    layer = nn.Linear(2, 2)
    layer.set_dtype(mx.float16)
    ema = EMA(layer.trainable_parameters())
    assert ema.state["average"]["weight"].dtype == mx.float32
    with ema.swapped_in(layer):
        assert layer.weight.dtype == mx.float16


def test_a_decay_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay is 1\.0"):
        EMA({}, decay=1.0)
