"""A small network and its data for tests of the training core."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mflux_vae_train.randomness import Stream, rng, sample_keys
from mflux_vae_train.training.step import MicroBatch


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.blocks = [nn.Linear(4, 8), nn.Linear(8, 4)]
        self.out = nn.Linear(4, 3, bias=False)
        draw = rng(seed, Stream.INIT)
        self.apply(lambda x: mx.array(draw.normal(size=x.shape) * 0.5, mx.float32))

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.blocks:
            x = x + 0.1 if x.shape[-1] == 8 else x
            x = mx.tanh(block(x))
        return self.out(x)


def loss(model: nn.Module, arrays: Mapping[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
    """Mean squared error of noisy inputs; the noise of a sample comes from its key."""
    noise = mx.vmap(lambda key: mx.random.normal((4,), key=key))(arrays["key"])
    error = mx.square(model(arrays["x"] + 0.1 * noise) - arrays["y"]).mean(axis=-1)
    return error.mean(), {"largest": error.max()}


def batch(samples: list[int], update: int = 0, seed: int = 0) -> MicroBatch:
    draws = [rng(seed, Stream.DATA_ORDER, update, i).normal(size=7) for i in samples]
    rows = np.stack(draws).astype(np.float32)
    keys = sample_keys(seed, Stream.NOISE, update, samples)
    return MicroBatch(arrays={"x": mx.array(rows[:, :4]), "y": mx.array(rows[:, 4:]), "key": keys}, weight=len(samples))


def window(update: int) -> list[MicroBatch]:
    """Two micro-batches, the second one smaller."""
    return [batch([0, 1], update), batch([2], update)]
