"""Gradients of a tape equal those of `mx.grad` for all kinds of functions."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mflux_vae import kernels
from mflux_vae.kernels.overrides import overridable
from mflux_vae.networks.layers import (
    Attention,
    BatchNorm,
    Conv2d,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
    avg_pool_2x,
    norm_silu_conv,
)
from mflux_vae_train.training.tape import Tape, Variable, value_of


class Network(nn.Module):
    """Functions with closed-form gradients and others, a parameter used twice, an unused one."""

    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(3)
        self.first = Conv2d(3, 8, 3, padding=1)
        self.block = ResnetBlock(8, 12, 4)
        self.attention = Attention(12, 4)
        self.down, self.up = Downsample(12), Upsample(12)
        self.norm, self.batch = GroupNorm(4, 12), BatchNorm(12)
        self.last = Conv2d(12, 3, 3, padding=1)
        self.unused = mx.ones((2,))
        self.heads = nn.Linear(3, 5)

    def __call__(self, x: Any) -> Any:
        x = self.attention(self.block(self.first(x * 0.5 + 0.5)))
        x = kernels.leaky_relu(self.batch(self.up(self.down(x))), 0.2) - avg_pool_2x(kernels.upsample_nearest_2x(x))
        x = norm_silu_conv(self.norm, self.last, x)
        x = self.first(x)[..., :3] * 2 + kernels.tanh(x) / 3
        return _heads(x, self.heads)


@overridable
def _heads(x: mx.array, linear: nn.Module) -> mx.array:
    y: mx.array = linear(x)
    return y


def along(y: mx.array) -> mx.array:
    return (y * mx.cos(mx.arange(y.size).reshape(y.shape))).sum()


def traced(network: nn.Module, x: mx.array) -> Any:
    parameters = network.trainable_parameters()

    def loss(parameters: Any) -> mx.array:
        network.update(parameters)
        return along(network(x))

    gradients = mx.grad(loss)(parameters)
    network.update(parameters)
    return gradients


def taped(network: nn.Module, x: mx.array) -> Any:
    tape = Tape(network.trainable_parameters())
    y = network(tape.constant(x))
    return tape.gradients([(y, mx.grad(along)(value_of(y)))])


def agree(ours: Any, theirs: Any) -> None:
    assert [name for name, _ in tree_flatten(ours)] == [name for name, _ in tree_flatten(theirs)]
    largest = max(float(mx.abs(b).max()) for _, b in tree_flatten(theirs))
    for (name, a), (_, b) in zip(tree_flatten(ours), tree_flatten(theirs), strict=True):
        assert float(mx.abs(a - b).max()) <= 1e-5 * largest, name


@pytest.fixture
def x() -> mx.array:
    return mx.random.normal((2, 8, 6, 3), key=mx.random.key(1))


def test_all_parameters(x: mx.array) -> None:
    network = Network()
    network.train()
    ours = taped(network, x)
    agree(ours, traced(network, x))
    assert not mx.any(ours["unused"]).item()
    parameters = dict(tree_flatten(network.parameters()))
    assert all(type(array) is mx.array for array in parameters.values())
    mx.eval(parameters)  # no placeholders of a trace


def test_frozen_parameters_need_no_gradient(x: mx.array) -> None:
    network = Network()
    network.freeze()
    network.last.unfreeze()
    tape = Tape(network.trainable_parameters())
    inner = network.block(network.first(tape.constant(x)))
    assert isinstance(inner, Variable) and inner.slot is None
    agree(taped(network, x), traced(network, x))


def test_a_checkpointed_part_is_computed_again(x: mx.array) -> None:
    network = Network()
    network.eval()
    calls = []

    def part(x: Any) -> Any:
        calls.append(type(x.slot))
        return network.block(x)

    def through(tape: Tape, recompute: bool) -> Any:
        y = network.first(tape.constant(x))
        y = tape.checkpoint(part, y, network.block.trainable_parameters()) if recompute else network.block(y)
        y = network.attention(y)
        return tape.gradients([(y, mx.ones(y.shape))])

    parameters = network.trainable_parameters()
    agree(through(Tape(parameters), True), through(Tape(parameters), False))
    assert len(calls) == 2
