"""Gradient checkpointing (arXiv:1604.06174): blocks keep their input alone, and compute again in the backward pass."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.networks.layers import batch_statistics, fold_statistics
from mflux_vae_train.training.tape import Variable
from mflux_vae_train.vae.network.dropout import capture_keys


def recompute_blocks(network: nn.Module) -> int:
    """Make every block of encoder and decoder that consists of layers a recomputed one, in training mode.

    The blocks get a class of their own, derived from what they were; parameters, their names and results stay.

    Returns:
        how many there are.
    """
    blocks: list[Any] = []
    for half in network.children().values():
        children: Any = tree_flatten(half.children(), is_leaf=lambda node: isinstance(node, nn.Module))
        blocks += [block for _, block in children if block.children()]
    for block in blocks:
        kind: Any = type(block)
        block.__class__ = _recomputing(kind)
    return len(blocks)


@cache
def _recomputing(kind: Any) -> Any:
    def call(self: Any, x: Any, *settings: Any) -> Any:
        if not self.training:
            return kind.__call__(self, x, *settings)

        keys = capture_keys(self)
        if isinstance(x, Variable):
            seen: list[dict[str, mx.array]] = []

            def part(x: Variable) -> Any:
                with keys():
                    y = kind.__call__(self, x, *settings)
                seen.append(batch_statistics(self))
                return y

            taped = x.tape.checkpoint(part, x, self.trainable_parameters())
            fold_statistics(self, seen[0])
            return taped

        def inner(parameters: Any, x: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
            self.update(parameters)
            with keys():
                return kind.__call__(self, x, *settings), batch_statistics(self)

        own = self.trainable_parameters()
        y, statistics = mx.checkpoint(inner)(own, x)
        self.update(own)  # tracing leaves its placeholders
        fold_statistics(self, statistics)
        return y

    # a stage must not be gone through layer by layer any more
    members = {"__call__": call, "steps": lambda self: [self], "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), members)
