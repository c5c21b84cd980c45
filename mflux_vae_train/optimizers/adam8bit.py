"""AdamW whose moments take a byte each: block-wise quantised, as in Dettmers et al. 2022 (arXiv:2110.02861).

A block of 256 values has one float32 scale, its largest magnitude; together 2.03 bytes per weight instead of 8. A value
is the fourth power of its code's share of 127 (first moments, with a sign) or of 255 (second ones): finer towards zero.

Rounded to the nearest, a second moment that changes by a thousandth per update would never leave its code. Rounding
therefore goes up or down by a threshold that takes every value in [0, 1) evenly over the updates (a Weyl sequence with
the golden ratio, a function of update and place alone): on average nothing is lost, and a resumed run is the same run.
"""

from __future__ import annotations

import math

import mlx.core as mx

from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.optimizers.base import State

BLOCK = 256
SMALLEST = 4096
"""Arrays of fewer values, such as biases and norms, keep float32 moments: they matter more than they weigh."""

LEVELS = (("m", 127), ("v", 255))
"""Moments, and their largest codes."""

_GOLDEN, _OTHER = 0x9E3779B9, 0xC13FA9A9
"""2^32 times the golden ratio's fraction, and times that of another irrational number."""


class AdamW8bit(AdamW):
    """`AdamW` on quantised moments."""

    def start(self, weights: mx.array, state: State) -> None:
        if weights.size < SMALLEST:
            super().start(weights, state)
            return
        blocks = -(-weights.size // BLOCK)
        for name, dtype in (("m", mx.int8), ("v", mx.uint8)):
            state[name] = {"codes": mx.zeros((blocks, BLOCK), dtype), "scales": mx.zeros((blocks, 1))}

    def moments(self, state: State, shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        if isinstance(state["m"], mx.array):
            return super().moments(state, shape)
        m, v = (_decoded(state[name], levels).flatten()[: math.prod(shape)].reshape(shape) for name, levels in LEVELS)
        return m, v

    def keep(self, state: State, m: mx.array, v: mx.array) -> None:
        if isinstance(state["m"], mx.array):
            super().keep(state, m, v)
            return
        blocks = state["m"]["codes"].shape[0]
        threshold = self._thresholds(blocks)
        m, v = _in_blocks(m, blocks), _in_blocks(v, blocks)
        # A second moment of zero beside a first that is none would be a division by zero: it stays at code 1 or more.
        for (name, levels), values, least in zip(LEVELS, (m, v), (0, 1), strict=True):
            size = mx.abs(values)
            scales = size.max(axis=1, keepdims=True)
            share = size / mx.maximum(scales, 1e-38)
            below = mx.floor(levels * mx.sqrt(mx.sqrt(share)))
            low, high = _fourth(below / levels), _fourth((below + 1) / levels)
            codes = below + ((share - low) > threshold * (high - low))
            codes = mx.minimum(mx.where(size > 0, mx.maximum(codes, least), 0), levels)
            dtype = state[name]["codes"].dtype
            state[name] = {"codes": (mx.sign(values) * codes).astype(dtype), "scales": scales}

    def _thresholds(self, blocks: int) -> mx.array:
        """(blocks, BLOCK) in [0, 1), other ones at each update and place."""
        places = mx.arange(blocks * BLOCK, dtype=mx.uint32) * mx.array(_OTHER, mx.uint32)
        turned = places + self.step.astype(mx.uint32) * mx.array(_GOLDEN, mx.uint32)
        return ((turned >> 8).astype(mx.float32) / 2**24).reshape(blocks, BLOCK)


def _in_blocks(values: mx.array, blocks: int) -> mx.array:
    """Any shape -> (blocks, BLOCK), filled up with zeros."""
    return mx.pad(values.flatten(), (0, blocks * BLOCK - values.size)).reshape(blocks, BLOCK)


def _fourth(x: mx.array) -> mx.array:
    return mx.square(mx.square(x))


def _decoded(state: State, levels: int) -> mx.array:
    """(blocks, BLOCK) float32."""
    codes = state["codes"].astype(mx.float32)
    return mx.sign(codes) * _fourth(codes / levels) * state["scales"]
