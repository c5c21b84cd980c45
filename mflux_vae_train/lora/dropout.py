"""Dropout in front of adapters, as a function of keys that a micro-batch brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn


class DropoutKeys:
    """Where the adapted layers of one module look for this micro-batch's keys."""

    rows: mx.array | None = None

    @contextmanager
    def using(self, rows: mx.array | None) -> Iterator[None]:
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before


class KeyedDropout(nn.Module):
    """Dropout whose mask for sample i depends on (its key, this layer) alone; the identity where no keys are set.

    mlx.nn's Dropout draws from the global generator: a mask would depend on what else is in the batch and on
    all draws before, and a resumed run or one that accumulates differently would not be the same run.
    """

    def __init__(self, p: float, salt: int, keys: DropoutKeys) -> None:
        super().__init__()
        self.p, self.salt, self._keys = p, salt, keys

    def __call__(self, x: mx.array) -> mx.array:
        rows = self._keys.rows
        if self.p == 0 or rows is None:
            return x
        keep = 1 - self.p
        own = rows ^ mx.array([self.salt, 0], mx.uint32)
        masks = mx.vmap(lambda key: mx.random.bernoulli(keep, x.shape[1:], key))(own)
        return x * masks.astype(x.dtype) * (1 / keep)

    def capture_keys(self) -> Callable[[], AbstractContextManager[None]]:
        """For a layer that computes itself again later: a context with the keys that are set now."""
        return partial(self._keys.using, self._keys.rows)
