"""Two-way key tables between the naming and layout of a checkpoint and of a network.

A rule relates two patterns with the same wildcards: ``{name}`` matches any text, or digits if the name is one letter.
The first matching rule counts. `ours=None` drops keys; `reads_only` marks old spellings that are never written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae.errors import WeightsError
from mflux_vae.utils.formatting import first_few, summarize
from mflux_vae.weights.kinds import kind_of

Transform: TypeAlias = Callable[[mx.array], mx.array]
Tensors: TypeAlias = Mapping[str, mx.array]
Step: TypeAlias = Callable[[str, mx.array], "tuple[str, mx.array] | None"]


@dataclass(frozen=True)
class Rule:
    """One line of a key table.

    Attributes:
        theirs, ours: key patterns; `ours` None drops matches of `theirs`.
        to_mlx, from_mlx: transform of the tensor and its inverse; None: unchanged.
        reads_only: not used for writing.
    """

    theirs: str
    ours: str | None
    to_mlx: Transform | None = None
    from_mlx: Transform | None = None
    reads_only: bool = False

    @cached_property
    def _theirs(self) -> re.Pattern[str]:
        return _compile(self.theirs)

    @cached_property
    def _ours(self) -> re.Pattern[str]:
        return _compile(self.ours or "")

    def read(self, key: str, tensor: mx.array) -> tuple[str, mx.array] | None:
        """Their key and tensor -> ours; key "" if dropped; None if the rule does not match."""
        if (match := self._theirs.fullmatch(key)) is None:
            return None
        if self.ours is None:
            return "", tensor
        # copied: a transposed view is slower and rounds differently (see `mflux_vae.weights`)
        return self.ours.format(**match.groupdict()), mx.contiguous(self.to_mlx(tensor)) if self.to_mlx else tensor

    def write(self, key: str, tensor: mx.array) -> tuple[str, mx.array] | None:
        """Inverse of `read`."""
        if self.ours is None or self.reads_only or (match := self._ours.fullmatch(key)) is None:
            return None
        return self.theirs.format(**match.groupdict()), self.from_mlx(tensor) if self.from_mlx else tensor


def to_mlx(tensors: Tensors, rules: Sequence[Rule]) -> dict[str, mx.array]:
    """Convert tensors of a checkpoint to our names and layouts; unknown keys are unchanged.

    Raises:
        WeightsError: two keys name the same tensor.
    """
    return _apply(tensors, [rule.read for rule in rules])


def from_mlx(tensors: Tensors, rules: Sequence[Rule]) -> dict[str, mx.array]:
    """Convert our tensors to the names and layouts of a checkpoint."""
    return _apply(tensors, [rule.write for rule in rules])


def _apply(tensors: Tensors, steps: Sequence[Step]) -> dict[str, mx.array]:
    out: dict[str, mx.array] = {}
    source: dict[str, str] = {}
    for key, tensor in tensors.items():
        new_key, new = next((done for step in steps if (done := step(key, tensor)) is not None), (key, tensor))
        if new_key in out:
            raise WeightsError(f"{first_few([key, source[new_key]], 2, 80)} name the same tensor; remove one")
        if new_key:
            out[new_key], source[new_key] = new, key
    return out


def _compile(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)
    names = (rf"(?P<{name}>\d+)" if len(name) == 1 else f"(?P<{name}>.+)" for name in parts[1::2])
    return re.compile("".join(a + b for a, b in zip(map(re.escape, parts[::2]), [*names, ""], strict=True)))


def load_strict(module: nn.Module, tensors: Tensors, *, where: str, dtype: mx.Dtype | None = None) -> None:
    """Load tensors into a module: all or none.

    Args:
        tensors: by parameter path of `module`.
        where: file or folder, for messages.
        dtype: dtype of floating-point tensors; None: unchanged.

    Raises:
        WeightsError: keys are missing, unknown or misshapen, or have integers for floating-point parameters.
    """
    parameters = dict(tree_flatten(module.parameters()))
    common = sorted(parameters.keys() & tensors.keys())
    shapes = {key: (tuple(tensors[key].shape), tuple(parameters[key].shape)) for key in common}
    floating = {key: mx.issubdtype(parameters[key].dtype, mx.floating) for key in common}
    faults = {
        "missing": sorted(parameters.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - parameters.keys()),
        "misshapen": [
            f"{key} is {found}, expected {needed}" for key, (found, needed) in shapes.items() if found != needed
        ],
        "not floats": [
            f"{key} is {str(tensors[key].dtype).removeprefix('mlx.core.')}"
            for key in common
            if floating[key] > mx.issubdtype(tensors[key].dtype, mx.floating)
        ],
    }
    if any(faults.values()):
        fit = len(common) - len(faults["misshapen"])
        limit = 260 if sum(map(len, faults.values())) <= 4 else 170
        listed = summarize([(f"{len(keys)} {what}: ", keys) for what, keys in faults.items()], limit)
        holds = f"it holds {kind}; " if not fit and (kind := kind_of(tensors)) else ""
        raise WeightsError(
            f"{where}: weights do not fit this {type(module).__name__} ({fit} of {len(tensors)} match): {listed};"
            f" {holds}give a file of this network"
        )
    converted = {
        key: tensor.astype(dtype) if dtype is not None and mx.issubdtype(tensor.dtype, mx.floating) else tensor
        for key, tensor in tensors.items()
    }
    module.update(tree_unflatten(list(converted.items())))


def conv_to_mlx(tensor: mx.array) -> mx.array:
    """Kernel OIHW -> OHWI; other tensors unchanged."""
    return tensor.transpose(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def conv_from_mlx(tensor: mx.array) -> mx.array:
    """Kernel OHWI -> OIHW; other tensors unchanged."""
    return tensor.transpose(0, 3, 1, 2) if tensor.ndim == 4 else tensor


def matrix_to_mlx(tensor: mx.array) -> mx.array:
    """1x1 kernel (O, I, 1, 1) or (O, I, 1) -> matrix (O, I); other tensors unchanged."""
    return tensor.reshape(tensor.shape[:2]) if tensor.shape[2:] in ((1, 1), (1,)) else tensor


def pointwise_from_mlx(tensor: mx.array) -> mx.array:
    """Matrix (O, I) -> 1x1 kernel (O, I, 1, 1); other tensors unchanged."""
    return tensor[:, :, None, None] if tensor.ndim == 2 else tensor
