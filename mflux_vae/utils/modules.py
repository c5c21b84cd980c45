"""Layers of a module by their paths, and large modules changed one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mflux_vae.runtime.threads import exclusive


def layer_at(module: nn.Module, path: str) -> Any:
    """The layer at a path of `named_modules`, such as ``blocks.0.attn.to_q``."""
    layer: Any = module
    for name in path.split("."):
        layer = layer[int(name) if isinstance(layer, (list, tuple)) else name]
    return layer


def replace_layers(module: nn.Module, paths: Iterable[str], change: Callable[[Any], nn.Module]) -> None:
    """Put `change(layer)` in the place of each layer; old and new weights of only one layer are in memory together.

    Every new layer is evaluated and every old one dropped before the next is looked up. A list of the layers
    (`named_modules` returns one) would keep all old weights alive.

    Args:
        paths: of the layers, see `layer_at`.
        change: old layer -> new layer; must not keep the old one.
    """
    for path in paths:
        new = change(layer_at(module, path))
        with exclusive():
            mx.eval(new.parameters())
        module.update_modules(tree_unflatten([(path, new)]))
    mx.clear_cache()
