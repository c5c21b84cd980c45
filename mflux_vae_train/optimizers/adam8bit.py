"""AdamW with moments of one byte each, quantized in blocks as in Dettmers et al. 2022 (arXiv:2110.02861).

A block of 256 values has one float32 scale, its largest magnitude: 2.03 bytes per weight instead of 8. A value is
scale * (code / 127)^4 with a sign for first moments and scale * (code / 255)^4 for second ones: finer near zero.

With rounding to nearest, a second moment that changes by a thousandth per update would never change its code. The
rounding threshold therefore takes all values in [0, 1) evenly over the updates: a Weyl sequence with the golden ratio,
a function of update and index only. Errors cancel on average, and a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import math

import mlx.core as mx

from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.optimizers.base import State

BLOCK = 256
SMALLEST = 4096
"""Arrays of fewer values, such as biases and norms, have float32 moments: little memory, large effect."""

LEVELS = (("m", 127), ("v", 255))
"""Moments and their largest codes."""

_GOLDEN, _OTHER = 0x9E3779B9, 0xC13FA9A9
"""2^32 times the fractional part of the golden ratio, and of another irrational number."""


class AdamW8bit(AdamW):
    """`AdamW` with quantized moments."""

    def init_state(self, weights: mx.array, state: State) -> None:
        if weights.size < SMALLEST:
            super().init_state(weights, state)
            return
        blocks = -(-weights.size // BLOCK)
        for name, dtype in (("m", mx.int8), ("v", mx.uint8)):
            state[name] = {"codes": mx.zeros((blocks, BLOCK), dtype), "scales": mx.zeros((blocks, 1))}

    def _in_one_call(self) -> bool:
        return False

    def moments(self, state: State, shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        if isinstance(state["m"], mx.array):
            return super().moments(state, shape)
        m, v = (_decode(state[name], levels).flatten()[: math.prod(shape)].reshape(shape) for name, levels in LEVELS)
        return m, v

    def store_moments(self, state: State, m: mx.array, v: mx.array) -> None:
        if isinstance(state["m"], mx.array):
            super().store_moments(state, m, v)
            return
        blocks = state["m"]["codes"].shape[0]
        threshold = self._thresholds(blocks)
        m, v = _to_blocks(m, blocks), _to_blocks(v, blocks)
        # a second moment of zero would be a divisor of zero: its code is at least 1
        for (name, levels), values, lowest in zip(LEVELS, (m, v), (0, 1), strict=True):
            size = mx.abs(values)
            scales = size.max(axis=1, keepdims=True)
            ratio = size / mx.maximum(scales, 1e-38)
            below = mx.floor(levels * mx.sqrt(mx.sqrt(ratio)))
            low, high = _power4(below / levels), _power4((below + 1) / levels)
            codes = below + ((ratio - low) > threshold * (high - low))
            codes = mx.minimum(mx.where(size > 0, mx.maximum(codes, lowest), 0), levels)
            dtype = state[name]["codes"].dtype
            state[name] = {"codes": (mx.sign(values) * codes).astype(dtype), "scales": scales}

    def _thresholds(self, blocks: int) -> mx.array:
        """(blocks, BLOCK) in [0, 1), different at each update and index."""
        indices = mx.arange(blocks * BLOCK, dtype=mx.uint32) * mx.array(_OTHER, mx.uint32)
        sequence = indices + self.step.astype(mx.uint32) * mx.array(_GOLDEN, mx.uint32)
        return ((sequence >> 8).astype(mx.float32) / 2**24).reshape(blocks, BLOCK)


def _to_blocks(values: mx.array, blocks: int) -> mx.array:
    """Any shape -> (blocks, BLOCK), padded with zeros."""
    return mx.pad(values.flatten(), (0, blocks * BLOCK - values.size)).reshape(blocks, BLOCK)


def _power4(x: mx.array) -> mx.array:
    return mx.square(mx.square(x))


def _decode(state: State, levels: int) -> mx.array:
    """(blocks, BLOCK) float32."""
    codes = state["codes"].astype(mx.float32)
    return mx.sign(codes) * _power4(codes / levels) * state["scales"]
