"""The arrays of a tree worked on one by one, on a CPU at once: a few megabytes at a time on each core."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mlx.utils import tree_map

from mflux_vae import kernels
from mflux_vae.kernels.cpu.parallel import is_eager

_AT_ONCE = 8 << 20
"""Bytes of the tree's own arrays: fewer make cores wait for each other, more leave memory for no other array."""


def parallel_tree_map(function: Callable[..., Any], tree: Any, *others: Any, consumed: bool = False) -> Any:
    """tree_map(function, tree, *others), whose results are computed on a CPU, with what it puts into `others`' dicts.

    MLX would compute them one after the other on one core, as all of them are described before.

    Args:
        function: of an array and what lies at its place in the other trees.
        consumed: the arrays of `tree` may be given up as they are read: results then lie in their memory.
    """
    leaves: list[tuple[Any, ...]] = []
    tree_map(lambda *arguments: leaves.append(arguments), tree, *others)
    if not leaves or not is_eager(leaves[0][0]):
        return tree_map(function, tree, *others)

    times = Counter(id(array) for array, *_ in leaves)

    def part(some: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        made = [(function(*arguments), *arguments[1:]) for arguments in some]
        for array, *_ in some if consumed else []:
            if times[id(array)] == 1:
                array[...] = 0  # a single number, spread: what it was belongs to what is made of it alone
        return made

    answers = kernels.side_by_side(partial(part, some) for some in _parts(leaves))
    results = iter([result for answer in answers for result, *_ in answer])
    return tree_map(lambda _: next(results), tree)


def _parts(leaves: list[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    part: list[tuple[Any, ...]] = []
    for arguments in leaves:
        part.append(arguments)
        if sum(array.nbytes for array, *_ in part) >= _AT_ONCE:
            yield part
            part = []
    if part:
        yield part
