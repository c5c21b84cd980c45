"""Two-way key tables between a checkpoint's naming and layout and this project's.

A rule relates two patterns with the same wildcards: ``{name}`` stands for any text, or for digits where the name is
one letter. The first rule that matches a key decides; a rule with `ours=None` drops its keys on purpose, one with
`reads_only` is an old spelling that is understood and never written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae.errors import WeightsError

Transform: TypeAlias = Callable[[mx.array], mx.array]
Tensors: TypeAlias = Mapping[str, mx.array]
Step: TypeAlias = Callable[[str, mx.array], "tuple[str, mx.array] | None"]


@dataclass(frozen=True)
class Rule:
    """One line of a key table.

    Attributes:
        theirs, ours: patterns over keys; `ours` None drops what matches `theirs`.
        to_mlx, from_mlx: what happens to the tensor on the way, and its inverse; None for nothing.
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
        """Their key and tensor -> ours; a key of "" says: dropped. None where the rule does not apply."""
        if (match := self._theirs.fullmatch(key)) is None:
            return None
        if self.ours is None:
            return "", tensor
        # copied: a transposed view is slower and rounds differently (see `mflux_vae.weights`)
        return self.ours.format(**match.groupdict()), mx.contiguous(self.to_mlx(tensor)) if self.to_mlx else tensor

    def write(self, key: str, tensor: mx.array) -> tuple[str, mx.array] | None:
        """The inverse of `read`."""
        if self.ours is None or self.reads_only or (match := self._ours.fullmatch(key)) is None:
            return None
        return self.theirs.format(**match.groupdict()), self.from_mlx(tensor) if self.from_mlx else tensor


def to_mlx(tensors: Tensors, rules: Sequence[Rule]) -> dict[str, mx.array]:
    """A checkpoint's tensors under our names and layouts; keys that no rule knows keep their names.

    Raises:
        WeightsError: two of the checkpoint's keys are names of the same tensor.
    """
    return _apply(tensors, [rule.read for rule in rules])


def from_mlx(tensors: Tensors, rules: Sequence[Rule]) -> dict[str, mx.array]:
    """Our tensors under a checkpoint's names and layouts."""
    return _apply(tensors, [rule.write for rule in rules])


def _apply(tensors: Tensors, steps: Sequence[Step]) -> dict[str, mx.array]:
    out: dict[str, mx.array] = {}
    source: dict[str, str] = {}
    for key, tensor in tensors.items():
        new_key, new = next((done for step in steps if (done := step(key, tensor)) is not None), (key, tensor))
        if new_key in out:
            raise WeightsError(f"{key} and {source[new_key]} are two names of one tensor, {new_key}; remove one")
        if new_key:
            out[new_key], source[new_key] = new, key
    return out


def _compile(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)
    names = (rf"(?P<{name}>\d+)" if len(name) == 1 else f"(?P<{name}>.+)" for name in parts[1::2])
    return re.compile("".join(a + b for a, b in zip(map(re.escape, parts[::2]), [*names, ""], strict=True)))


def load_strict(module: nn.Module, tensors: Tensors, *, where: str, dtype: mx.Dtype | None = None) -> None:
    """Put tensors into a module: all of them, each in its place, or none.

    Args:
        tensors: by parameter path of `module`.
        where: file or folder, for the message.
        dtype: to convert floating-point tensors to; None keeps theirs.

    Raises:
        WeightsError: names every missing, unknown and misshapen key, and every one with whole numbers for real ones.
    """
    own = dict(tree_flatten(module.parameters()))
    faults = _listed("missing", sorted(own.keys() - tensors.keys()))
    faults += _listed("unknown", sorted(tensors.keys() - own.keys()))
    misshapen = [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in sorted(own.keys() & tensors.keys())
        if tensors[key].shape != own[key].shape
    ]
    whole = [
        f"{key} is {tensor.dtype}"
        for key, tensor in sorted(tensors.items())
        if key in own and mx.issubdtype(own[key].dtype, mx.floating) > mx.issubdtype(tensor.dtype, mx.floating)
    ]
    if faults := faults + _listed("misshapen", misshapen) + _listed("of the wrong type", whole):
        raise WeightsError(f"{where}: the weights are not this network's: {'; '.join(faults)}")
    converted = {
        key: tensor.astype(dtype) if dtype is not None and mx.issubdtype(tensor.dtype, mx.floating) else tensor
        for key, tensor in tensors.items()
    }
    module.update(tree_unflatten(list(converted.items())))


def _listed(what: str, keys: Iterable[str]) -> list[str]:
    keys = list(keys)
    return [f"{len(keys)} {what}: {', '.join(keys)}"] if keys else []


def conv_to_mlx(tensor: mx.array) -> mx.array:
    """A convolution kernel OIHW -> OHWI; anything else as it is."""
    return tensor.transpose(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def conv_from_mlx(tensor: mx.array) -> mx.array:
    """A convolution kernel OHWI -> OIHW; anything else as it is."""
    return tensor.transpose(0, 3, 1, 2) if tensor.ndim == 4 else tensor


def matrix_to_mlx(tensor: mx.array) -> mx.array:
    """The kernel of a convolution over single pixels, (O, I, 1, 1) or (O, I, 1) -> (O, I); anything else as it is."""
    return tensor.reshape(tensor.shape[:2]) if tensor.shape[2:] in ((1, 1), (1,)) else tensor


def pointwise_from_mlx(tensor: mx.array) -> mx.array:
    """A matrix (O, I) -> the kernel of a 1x1 convolution (O, I, 1, 1); anything else as it is."""
    return tensor[:, :, None, None] if tensor.ndim == 2 else tensor
