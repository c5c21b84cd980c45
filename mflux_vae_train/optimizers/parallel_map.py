"""`tree_map` over arrays on a CPU: a few megabytes at a time on each core, evaluated at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mlx.utils import tree_map

from mflux_vae import kernels
from mflux_vae.kernels.cpu.parallel import is_eager

_CHUNK_BYTES = 8 << 20
"""Array bytes per task. Smaller tasks make cores wait for each other; larger ones need more memory."""


def parallel_tree_map(function: Callable[..., Any], tree: Any, *others: Any, donate: bool = False) -> Any:
    """tree_map(function, tree, *others), evaluated in parallel on a CPU, including what it stores in dicts of `others`.

    MLX alone would compute all arrays in sequence on one core.

    Args:
        donate: whether the arrays of `tree` may be overwritten: results then reuse their memory.
    """
    leaves: list[tuple[Any, ...]] = []
    tree_map(lambda *arguments: leaves.append(arguments), tree, *others)
    if not leaves or not is_eager(leaves[0][0]):
        return tree_map(function, tree, *others)

    uses = Counter(id(array) for array, *_ in leaves)

    def run(chunk: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        results = [(function(*arguments), *arguments[1:]) for arguments in chunk]
        for array, *_ in chunk if donate else []:
            if uses[id(array)] == 1:
                array[...] = 0  # a broadcast scalar: the buffer is left to the result
        return results

    chunks = kernels.run_parallel(partial(run, chunk) for chunk in _chunks(leaves))
    results = iter([result for chunk in chunks for result, *_ in chunk])
    return tree_map(lambda _: next(results), tree)


def _chunks(leaves: list[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    chunk: list[tuple[Any, ...]] = []
    for arguments in leaves:
        chunk.append(arguments)
        if sum(array.nbytes for array, *_ in chunk) >= _CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
