"""Gradient checkpointing (arXiv:1604.06174): a block keeps its inputs alone, and computes again in the backward pass.

MLX evaluates a graph in an order of its own, and with `mx.checkpoint` nothing keeps it from computing all blocks again
before the first of them is done with its gradients. Here the graph itself says the order: a block's second forward pass
depends on the gradient of its output, and the gradient of its input, for which the block before it waits, on those of
its weights. So one block's activations are there at a time, last block first, whoever evaluates what.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def checkpointed(block: nn.Module, *arrays: mx.array, **constants: Any) -> Any:
    """`block(*arrays, **constants)`, an array or a tuple of arrays, differentiable in `arrays` and what is trainable.

    A layer of the block may read what was set for one forward pass, such as the keys of a dropout. It then has a method
    `capture_keys()`, which gives a context manager factory: within the context the layer reads what it would read now.
    """
    own = dict(tree_flatten(block.trainable_parameters()))
    names = list(own)
    settings = [layer.capture_keys() for layer in block.modules() if hasattr(layer, "capture_keys")]

    def forward(*values: mx.array) -> Any:
        block.update(tree_unflatten(list(zip(names, values[: len(names)], strict=True))))
        with ExitStack() as stack:
            for setting in settings:
                stack.enter_context(setting())
            return block(*values[len(names) :], **constants)

    run: Any = mx.custom_function(forward)

    @run.vjp
    def backward(primals: Sequence[mx.array], cotangents: Any, _: Any) -> list[mx.array]:
        given = list(cotangents) if isinstance(cotangents, list | tuple) else [cotangents]
        # first the gradient of the output is there, then the block is computed again ...
        _, slopes = mx.vjp(forward, mx.depends(list(primals), given), given)
        block.update(tree_unflatten(list(own.items())))
        weights, inputs = slopes[: len(names)], slopes[len(names) :]
        # ... then the gradients of its weights, and with them its activations are done for
        return [*weights, *(mx.depends([slope], weights)[0] for slope in inputs)] if weights else slopes

    result = run(*own.values(), *arrays)
    block.update(tree_unflatten(list(own.items())))  # tracing leaves its placeholders
    return result
