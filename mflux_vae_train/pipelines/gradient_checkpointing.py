"""Gradient checkpointing (arXiv:1604.06174): keep a block's inputs, and run the block again in the backward pass.

MLX chooses the order in which a graph is evaluated; with `mx.checkpoint` it may run all blocks again before the first
of them has its gradients. Here dependencies in the graph fix the order: the second forward pass of a block depends on
the gradient of its output, and the gradient of its input, which the previous block waits for, on the gradients of its
weights. So only one block's activations exist at a time, the last block's first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def block_runner(checkpointing: bool) -> Callable[..., Any]:
    """A function that calls a block: `checkpointed`, or plain."""
    return checkpointed if checkpointing else _call


def _call(block: nn.Module, *arrays: mx.array, **constants: Any) -> Any:
    return block(*arrays, **constants)


def checkpointed(block: nn.Module, *arrays: mx.array, **constants: Any) -> Any:
    """`block(*arrays, **constants)`: an array or tuple of arrays, differentiable in `arrays` and trainable weights.

    A layer that reads state of one forward pass, such as the keys of a dropout, has a method `capture_keys()`. It
    returns a function whose context managers make the layer read the present state again.
    """
    weights = dict(tree_flatten(block.trainable_parameters()))
    names = list(weights)
    contexts = [layer.capture_keys() for layer in block.modules() if hasattr(layer, "capture_keys")]

    def forward(*values: mx.array) -> Any:
        block.update(tree_unflatten(list(zip(names, values[: len(names)], strict=True))))
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return block(*values[len(names) :], **constants)

    run: Any = mx.custom_function(forward)

    @run.vjp
    def backward(primals: Sequence[mx.array], cotangents: Any, _: Any) -> list[mx.array]:
        output_gradients = list(cotangents) if isinstance(cotangents, list | tuple) else [cotangents]
        # wait for the output's gradient, then run the block again ...
        _, gradients = mx.vjp(forward, mx.depends(list(primals), output_gradients), output_gradients)
        block.update(tree_unflatten(list(weights.items())))
        of_weights, of_inputs = gradients[: len(names)], gradients[len(names) :]
        # ... and finish the gradients of its weights, which frees its activations, before passing gradients on
        if not of_weights:
            return gradients
        return [*of_weights, *(mx.depends([gradient], of_weights)[0] for gradient in of_inputs)]

    result = run(*weights.values(), *arrays)
    block.update(tree_unflatten(list(weights.items())))  # tracing leaves placeholders
    return result
