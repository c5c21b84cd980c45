"""Adapters as kohya's scripts name them, and ComfyUI and others read them.

A layer of the original network may be several here, as when queries, keys and values have one projection there. Its
adapter is then all of theirs side by side: A one below the other, B block by block on the diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae_train.lora.layers import is_dora, layers
from mflux_vae_train.lora.targets import dimensions, linears

Modules = Mapping[str, Sequence[str]]
"""Layers of the original network by name: the paths of the layers here, its outputs in this order."""


def check_kohya(paths: Sequence[str], modules: Modules) -> None:
    """Whether all of these layers have a name there.

    Raises:
        SettingsError: some have none; they are named.
    """
    known = {member for members in modules.values() for member in members}
    if without := [path for path in paths if path not in known]:
        some = ", ".join(without[:4]) + (f" and {len(without) - 4} more" if len(without) > 4 else "")
        raise SettingsError(f"--output_kohya_format has no names for {some}: give fewer --lora_layers")


def kohya_tensors(module: nn.Module, modules: Modules) -> dict[str, mx.array]:
    """``{name}.lora_down.weight`` (rank, in), ``.lora_up.weight`` (out, rank) and ``.alpha``, which is the rank.

    What scale there is is part of the numbers: some readers pass over the alpha of some layers.

    Raises:
        SettingsError: see `check_kohya`; or there are magnitudes, for which FLUX files have no place.
    """
    adapted, bases = layers(module), linears(module)
    check_kohya(list(adapted), modules)
    if any(map(is_dora, adapted.values())):
        raise SettingsError("--output_kohya_format cannot hold what --use_dora trains")
    tensors = {}
    for name, members in modules.items():
        present = [path for path in members if path in adapted]
        if not present:
            continue
        down = mx.concatenate([adapted[path].lora_a.T for path in present])
        rows, before = [], 0
        for path in members:
            layer = adapted.get(path)
            outputs, _ = dimensions(bases[path] if layer is None else layer.linear)
            up = mx.zeros((outputs, 0)) if layer is None else layer.scale * layer.lora_b.T
            rows.append(mx.pad(up, [(0, 0), (before, down.shape[0] - before - up.shape[1])]))
            before += up.shape[1]
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = mx.concatenate(rows)
        tensors[f"{name}.alpha"] = mx.array(float(down.shape[0]))
    return tensors
