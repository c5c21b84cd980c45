"""Gradient checkpointing (arXiv:1604.06174): blocks keep only their input and are recomputed in the backward pass."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.networks.layers import batch_statistics, fold_statistics
from mflux_vae_train.vae.network.dropout import capture_keys

logger = logging.getLogger(__name__)


def recompute_blocks(network: nn.Module) -> int:
    """Recompute every block of encoder and decoder in the backward pass, in training mode.

    Each block gets a subclass of its class. Parameters, their names and results do not change. Networks whose halves
    are lists of layers (`TAEHV`) keep all results, with a warning: their blocks take two arrays.

    Returns:
        number of blocks.
    """
    blocks: list[Any] = []
    for half in (half for half in network.children().values() if isinstance(half, nn.Module)):
        children: Any = tree_flatten(half.children(), is_leaf=lambda node: isinstance(node, nn.Module))
        blocks += [block for _, block in children if block.children()]
    if not blocks:
        logger.warning("gradient checkpointing has no effect: %s has no block to compute again", type(network).__name__)
    for block in blocks:
        kind: Any = type(block)
        block.__class__ = _recomputed_class(kind)
    return len(blocks)


@cache
def _recomputed_class(kind: Any) -> Any:
    def call(self: Any, x: Any, *settings: Any) -> Any:
        if not self.training:
            return kind.__call__(self, x, *settings)

        keys = capture_keys(self)

        def inner(parameters: Any, x: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
            self.update(parameters)
            with keys():
                return kind.__call__(self, x, *settings), batch_statistics(self)

        parameters = self.trainable_parameters()
        y, statistics = mx.checkpoint(inner)(parameters, x)
        self.update(parameters)  # tracing leaves placeholders
        fold_statistics(self, statistics)
        return y

    # callers must not run the layers of a stage one by one
    members = {"__call__": call, "steps": lambda self: [self], "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), members)
