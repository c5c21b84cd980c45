"""Adapters in the naming of kohya's scripts, which ComfyUI and others read.

One layer of the original network may correspond to several layers here, such as queries, keys and values with one
projection. Its adapter then combines theirs: A stacked, B block diagonal. `dialects` reads these names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mflux_vae.errors import SettingsError
from mflux_vae.utils.formatting import first_few
from mflux_vae_train.lora.dialects import ALPHA, DORA_SCALE, DOWN, UP, Modules, as_kernels
from mflux_vae_train.lora.layers import LayerChange, bases, changes
from mflux_vae_train.lora.targets import dimensions


def check_kohya(paths: Sequence[str], modules: Modules) -> None:
    """Check that all layers have a name in kohya's naming.

    Raises:
        SettingsError: names the layers that have none.
    """
    if without := unnamed(paths, modules):
        raise SettingsError(
            f"--output_kohya_format has no names for {first_few(without, 4, 50)}; use fewer --lora_layers"
        )


def unnamed(paths: Iterable[str], modules: Modules) -> list[str]:
    """Layers that have no name in kohya's naming."""
    known = {member for members in modules.values() for member in members}
    return [path for path in paths if path not in known]


def kohya_tensors(module: nn.Module, modules: Modules) -> dict[str, mx.array]:
    """The tensors of a module's adapters, see `kohya_layers`.

    Raises:
        SettingsError: see `check_kohya`; or there are DoRA magnitudes, which not every reader applies.
    """
    adapted = changes(module)
    check_kohya(list(adapted), modules)
    if any(change.magnitudes is not None for change in adapted.values()):
        raise SettingsError("--output_kohya_format cannot store the magnitudes of --use_dora")
    return kohya_layers(adapted, modules, {path: dimensions(layer)[0] for path, layer in bases(module).items()})


def kohya_layers(
    adapted: Mapping[str, LayerChange], modules: Modules, outputs: Mapping[str, int]
) -> dict[str, mx.array]:
    """``{name}.lora_down.weight`` (rank, in), ``.lora_up.weight`` (out, rank) and ``.alpha``, equal to the rank.

    Matrices of convolutions are kernels, as in `files`. Magnitudes are ``{name}.dora_scale`` (out, 1).

    The scale is multiplied into the weights, as some readers ignore the alpha of some layers.

    Args:
        adapted: by path; all have a name in `modules`.
        outputs: number of outputs of the layers in `modules`, by path.

    Raises:
        SettingsError: a layer with magnitudes is fused with one that has none.
    """
    tensors = {}
    for name, members in modules.items():
        present = [path for path in members if path in adapted]
        if not present:
            continue
        down = mx.concatenate([adapted[path].a for path in present])
        rows, offset = [], 0
        for path in members:
            change = adapted.get(path)
            up = mx.zeros((outputs[path], 0)) if change is None else change.scale * change.b.astype(mx.float32)
            rows.append(mx.pad(up, [(0, 0), (offset, down.shape[0] - offset - up.shape[1])]))
            offset += up.shape[1]
        kernel = adapted[present[0]].kernel
        tensors[f"{name}{DOWN}"], tensors[f"{name}{UP}"] = as_kernels(down, mx.concatenate(rows), kernel)
        tensors[f"{name}{ALPHA}"] = mx.array(float(down.shape[0]))
        magnitudes = [one for path in present if (one := adapted[path].magnitudes) is not None]
        if magnitudes and len(magnitudes) < len(members):
            some = first_few(present, 2, 50)
            raise SettingsError(
                f"{name} is one layer in kohya's naming, and DoRA adapts parts of it alone ({some}): its magnitudes"
                " cannot be stored"
            )
        if magnitudes:
            tensors[f"{name}{DORA_SCALE}"] = mx.concatenate(magnitudes).reshape(
                -1, *((1,) if kernel is None else (1, 1, 1))
            )
    return tensors


def split(
    down: mx.array, up: mx.array, outputs: Sequence[int], rank: int | None = None
) -> list[tuple[mx.array, mx.array] | None]:
    """The inverse of `kohya_tensors` for one layer: (A, B) of each part; None for parts without an adapter.

    Parts of an adapter that was trained on the whole layer share A.

    Args:
        down: (rank of the layer, in).
        up: (out, rank of the layer).
        outputs: number of outputs of each part.
        rank: of one part, if known.
    """
    rows = mx.split(up, list(accumulate(outputs))[:-1])
    if len(rows) == 1 or down.shape[0] == rank:
        return [(down, part) for part in rows]
    used = np.stack([np.array(mx.any(part != 0, axis=0)) for part in rows])
    owners = _owners(used, rank)
    if owners is None:
        return [(down, part) for part in rows]
    parts: list[tuple[mx.array, mx.array] | None] = []
    for index, part in enumerate(rows):
        block = np.flatnonzero(owners == index)  # adjacent columns
        columns = slice(int(block[0]), int(block[-1]) + 1) if block.size else None
        parts.append(None if columns is None else (down[columns], part[:, columns]))
    return parts


def _owners(used: np.ndarray, rank: int | None) -> np.ndarray | None:
    """Part that each column belongs to, if B is block diagonal; else None.

    Args:
        used: (parts, columns), whether a part has values in a column.
        rank: columns of each block, if known.
    """
    parts, columns = used.shape
    if rank and columns % rank == 0 and columns // rank <= parts:
        blocks: np.ndarray = np.any(used.reshape(parts, -1, rank), axis=2)
        count = blocks.shape[1]
        # with as many blocks as parts the assignment is known, even for blocks of zeros
        owners = np.arange(parts) if count == parts else np.flatnonzero(np.any(blocks, axis=1))
        if len(owners) == count and not np.any(blocks[np.arange(parts)[:, None] != owners]):
            return np.repeat(owners, rank)
    number: np.ndarray = used.sum(axis=0)
    if not np.any(number) or np.any(number > 1):
        return None
    # columns of zeros go with the block before them, or with the first
    found = np.maximum.accumulate(np.where(number > 0, used.argmax(axis=0), -1))
    found[found < 0] = found[found >= 0][0]
    return found if np.array_equal(np.where(number > 0, used.argmax(axis=0), found), found) else None
