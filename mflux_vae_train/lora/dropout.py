"""Dropout in front of adapters, a function of the random keys in a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn


class DropoutKeys:
    """The keys of the current micro-batch, shared by the adapted layers of one module."""

    rows: mx.array | None = None

    @contextmanager
    def using(self, rows: mx.array | None) -> Iterator[None]:
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before


class KeyedDropout(nn.Module):
    """Dropout whose mask for sample i depends only on its key and this layer; the identity if no keys are set.

    mlx.nn's Dropout draws from the global generator: masks would depend on the other samples and on earlier draws, and
    change when a run is resumed or accumulates differently.
    """

    def __init__(self, p: float, salt: int, keys: DropoutKeys) -> None:
        super().__init__()
        self.p, self.salt, self._keys = p, salt, keys

    def __call__(self, x: mx.array) -> mx.array:
        rows = self._keys.rows
        if self.p == 0 or rows is None:
            return x
        keep = 1 - self.p
        keys = rows ^ mx.array([self.salt, 0], mx.uint32)
        masks = mx.vmap(lambda key: mx.random.bernoulli(keep, x.shape[1:], key))(keys)
        return x * masks.astype(x.dtype) * (1 / keep)

    def capture_keys(self) -> Callable[[], AbstractContextManager[None]]:
        """For gradient checkpointing: returns a factory of contexts with the current keys."""
        return partial(self._keys.using, self._keys.rows)
