"""Adapters of a lower rank, and adapters times a factor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx

from mflux_vae_train.lora.editing.adapter import Changes
from mflux_vae_train.lora.editing.low_rank import Cut, cut
from mflux_vae_train.lora.layers import LayerChange


@dataclass(frozen=True, kw_only=True)
class Resized:
    """
    Attributes:
        changes: with scale 1.
        errors: of each layer, by name: norm of what was lost, relative to that of the given change.
        error: of all layers together.
    """

    changes: Changes
    errors: Mapping[str, float]
    error: float


def scaled(changes: Changes, factor: float) -> Changes:
    """The changes times a factor, with scale 1."""
    return {
        prefix: {path: _scaled(change, factor) for path, change in of_network.items()}
        for prefix, of_network in changes.items()
    }


def _scaled(change: LayerChange, factor: float) -> LayerChange:
    return replace(change, b=factor * change.scale * change.b.astype(mx.float32), scale=1.0)


def resized(changes: Changes, *, rank: int | None = None, keep: float | None = None) -> Resized:
    """Each layer's nearest change of a lower rank; magnitudes of DoRA are unchanged.

    Args:
        rank: most ranks of a layer; None for any.
        keep: share of each layer's squared norm to keep with as few ranks as possible.
    """
    cuts = {
        prefix: {path: cut(change, rank=rank, keep=keep) for path, change in of_network.items()}
        for prefix, of_network in changes.items()
    }
    every = {f"{prefix}.{path}".lstrip("."): one for prefix, of in cuts.items() for path, one in of.items()}
    lost, total = sum(map(_lost, every.values())), sum(one.total for one in every.values())
    return Resized(
        changes={prefix: {path: one.change for path, one in of.items()} for prefix, of in cuts.items()},
        errors={name: math.sqrt(_lost(one) / one.total) if one.total else 0.0 for name, one in every.items()},
        error=math.sqrt(lost / total) if total else 0.0,
    )


def _lost(one: Cut) -> float:
    return max(one.total - one.kept, 0.0)
