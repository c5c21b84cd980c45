"""Named objects whose state is read as a tree and restored strictly.

A tree is nested dicts and lists with arrays and plain JSON values (str, int, float, bool, None) as leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae.errors import TrainingError
from mflux_vae.utils.formatting import summarize

Tree = Any


@dataclass(frozen=True, kw_only=True)
class Stateful:
    """One named object of a checkpoint.

    Attributes:
        read: returns the current tree.
        write: restores a tree of the same structure.
    """

    read: Callable[[], Tree]
    write: Callable[[Tree], object]


def parameters(module: nn.Module) -> Stateful:
    """The trainable parameters of a module."""
    return Stateful(read=module.trainable_parameters, write=module.update)


def buffers(module: nn.Module) -> Stateful:
    """The arrays of a module that are not trainable, such as running statistics."""
    return Stateful(read=lambda: buffer_tree(module), write=module.update)


def buffer_tree(module: nn.Module) -> Tree:
    """Tree of the arrays of a module that are not trainable."""
    trained = dict(tree_flatten(module.trainable_parameters()))
    buffers = [item for item in dict(tree_flatten(module.parameters())).items() if item[0] not in trained]
    return tree_unflatten(buffers) if buffers else {}


def tree_state(tree: Tree) -> Stateful:
    """A dict or list that is restored in place, such as `optimizer.state`: compiled functions capture the container."""
    return Stateful(read=lambda: tree, write=lambda new: _assign(tree, new))


def flatten(objects: Mapping[str, Stateful]) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Named objects -> (arrays, plain values), by paths such as ``optimizer/layers/0/weight/m``."""
    leaves: dict[str, Any] = {}
    for name, one in objects.items():
        _collect(name, one.read(), leaves)
    arrays = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, mx.array)}
    return arrays, {path: leaf for path, leaf in leaves.items() if path not in arrays}


def restore(
    objects: Mapping[str, Stateful], arrays: Mapping[str, mx.array], values: Mapping[str, Any], where: str
) -> None:
    """Restore the result of `flatten`. Changes nothing unless all entries fit.

    Args:
        where: begins error messages.

    Raises:
        TrainingError: missing, unknown, misshapen or wrongly typed entries.
    """
    current_arrays, current_values = flatten(objects)
    expected, stored = current_arrays | current_values, dict(arrays) | dict(values)
    both = sorted(expected.keys() & stored.keys())
    described = [(path, _describe(stored[path]), _describe(expected[path])) for path in both]
    faults = {
        "missing ": [path for path in expected if path not in stored],
        "unknown ": [path for path in stored if path not in expected],
        "": [f"{path} is {have}, expected {want}" for path, have, want in described if have != want],
    }
    if any(faults.values()):
        raise TrainingError(f"{where}: cannot be restored: {summarize([*faults.items()])}")
    for name, one in objects.items():
        one.write(_rebuild(name, one.read(), stored))


def _describe(leaf: Any) -> str:
    if isinstance(leaf, mx.array):
        return f"{str(leaf.dtype).removeprefix('mlx.core.')}{tuple(leaf.shape)}"
    return "a plain value"


def _collect(path: str, tree: Tree, leaves: dict[str, Any]) -> None:
    if isinstance(tree, dict):
        for key, child in tree.items():
            _collect(f"{path}/{key}", child, leaves)
    elif isinstance(tree, (list, tuple)):
        for i, child in enumerate(tree):
            _collect(f"{path}/{i}", child, leaves)
    elif tree is None or isinstance(tree, (mx.array, str, int, float, bool)):
        leaves[path] = tree
    else:
        raise TypeError(f"{path} is a {type(tree).__name__}; expected an array or plain JSON")


def _rebuild(path: str, like: Tree, leaves: Mapping[str, Any]) -> Tree:
    if isinstance(like, dict):
        return {key: _rebuild(f"{path}/{key}", child, leaves) for key, child in like.items()}
    if isinstance(like, (list, tuple)):
        return [_rebuild(f"{path}/{i}", child, leaves) for i, child in enumerate(like)]
    return leaves[path]


def _assign(old: Tree, new: Tree) -> None:
    for key in old.keys() if isinstance(old, dict) else range(len(old)):
        if isinstance(old[key], (dict, list)):
            _assign(old[key], new[key])
        else:
            old[key] = new[key]
