"""Whether arrays lie in memory in their own order."""

from __future__ import annotations

from typing import Any

from mlx.utils import tree_flatten


def views(tree: Any) -> list[str]:
    """Paths of the arrays whose strides differ from those of a fresh array, such as transposed views."""
    return [path for path, array in tree_flatten(tree) if not memoryview(array).c_contiguous]
