"""Low-rank adapters (LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353) on linear layers and convolutions of any module.

y = W x + b + (alpha / rank) B A x. Initially A (rank, in) is uniform in +-1/sqrt(in) and B (out, rank) is zero. DoRA
scales each row of W + (alpha / rank) B A to a trained magnitude, initially the norm of W's row. The layers have
mlx-lm's attributes: lora_a = A^T, lora_b = B^T and magnitudes m. W may be quantized.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mflux_vae.errors import SettingsError
from mflux_vae.networks.layers import Conv2d
from mflux_vae.runtime.device import eval_each
from mflux_vae.runtime.threads import exclusive
from mflux_vae.utils.modules import replace_layers
from mflux_vae_train.lora.dropout import DropoutKeys, KeyedDropout
from mflux_vae_train.lora.linear import LoRAConv2d, LoRALinear
from mflux_vae_train.lora.targets import dimensions, kernel_of, linears, matching
from mflux_vae_train.randomness import Stream, rng


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """The change of a layer: W -> W + scale B A; with magnitudes, each row is then scaled to its magnitude.

    Attributes:
        a: A, (rank, in). Inputs of a convolution are the numbers in its window, (kh, kw, in) flattened.
        b: B, (out, rank).
        scale: alpha / rank.
        kernel: (kh, kw) of a convolution.
        magnitudes: (out,), DoRA's.
    """

    a: mx.array
    b: mx.array
    scale: float
    kernel: tuple[int, int] | None = None
    magnitudes: mx.array | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def alpha(self) -> float:
        return self.scale * self.rank


def add_lora(
    module: nn.Module,
    patterns: Sequence[str],
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    dora: bool = False,
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
) -> list[str]:
    """Adapt every linear layer and convolution whose path matches a pattern; freeze everything else.

    Args:
        patterns: fnmatch patterns over module paths, e.g. ``transformer_blocks.*.attn.to_q``.
        alpha: None means `rank`, which is a scale of 1.
        dropout: probability of dropping an input of A; has an effect only within `dropout_keys`.
        dora: also train magnitudes; not of convolutions.
        seed: A depends only on the seed and the path of the layer.
        ranks: of single layers, by path, instead of `rank`.

    Returns:
        the adapted paths, sorted.

    Raises:
        SettingsError: no layer matches; names some existing layers. Or DoRA on a convolution.
    """
    if layers(module):
        raise ValueError("the module already has adapters; fuse them first")
    originals = linears(module)
    targets = list(matching(module, patterns))
    convolutions = [path for path in targets if isinstance(originals[path], Conv2d)]
    if dora and convolutions:
        raise SettingsError(f"DoRA on convolutions ({convolutions[0]}) is not supported; name linear layers only")
    linear: Any = LoRALinear
    if dora:  # late, as it imports transformers, which takes seconds
        from mflux_vae_train.lora.dora import DoRALinear as linear
    module.freeze()
    keys = DropoutKeys()
    adapted = []
    for path in targets:
        kind: Any = LoRAConv2d if path in convolutions else linear
        size = (ranks or {}).get(path, rank)
        layer: Any = kind.from_base(originals[path], r=size, scale=(size if alpha is None else alpha) / size)
        _, inputs = dimensions(originals[path])
        salt = zlib.crc32(path.encode())
        limit = 1 / math.sqrt(inputs)
        layer.lora_a = mx.array(rng(seed, Stream.INIT, salt).uniform(-limit, limit, (inputs, size)), mx.float32)
        layer.dropout = KeyedDropout(dropout, salt, keys)
        adapted.append((path, layer))
    module.update_modules(tree_unflatten(adapted))
    with exclusive():
        eval_each(module.trainable_parameters())  # DoRA's magnitudes take each weight in full width
    return targets


def layers(module: nn.Module) -> dict[str, Any]:
    """The layers that `add_lora` adapted, by path. Recognized by their dropout, without importing mlx-lm."""
    modules = sorted(module.named_modules(), key=lambda item: item[0])
    return {path: layer for path, layer in modules if isinstance(layer.get("dropout"), KeyedDropout)}


def bases(module: nn.Module) -> dict[str, Any]:
    """Layers that can be adapted, by path; of adapted layers the original one."""
    adapted = layers(module)
    inside = tuple(f"{path}." for path in adapted)
    plain = {path: layer for path, layer in linears(module).items() if not path.startswith(inside)}
    return plain | {path: layer.linear for path, layer in adapted.items()}


def is_dora(layer: Any) -> bool:
    """Whether an adapted layer has magnitudes."""
    return "m" in layer


def changes(module: nn.Module) -> dict[str, LayerChange]:
    """The changes of the layers that `add_lora` adapted, by path."""
    return {
        path: LayerChange(
            a=layer.lora_a.T,
            b=layer.lora_b.T,
            scale=layer.scale,
            kernel=kernel_of(layer.linear),
            magnitudes=layer.m if is_dora(layer) else None,
        )
        for path, layer in layers(module).items()
    }


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """Within the block the module is the base model, bit for bit: the adapted layers are replaced by the original."""
    adapted = layers(module)
    module.update_modules(tree_unflatten([(path, layer.linear) for path, layer in adapted.items()]))
    try:
        yield
    finally:
        module.update_modules(tree_unflatten(list(adapted.items())))


@contextmanager
def scaled(module: nn.Module, factor: float) -> Iterator[None]:
    """Within the block adapted layers compute with W + factor (W' - W), where W' includes the adapter.

    0 is the base model and 1 the adapter, both bit for bit. DoRA's weights are blended likewise, as in ComfyUI; PEFT
    scales only B A, which at 0 leaves the trained magnitudes.
    """
    if factor == 0:
        with disabled(module):
            yield
        return
    with ExitStack() as stack:
        for layer in layers(module).values():
            name = "strength" if is_dora(layer) else "scale"
            before = getattr(layer, name)
            setattr(layer, name, before * factor)
            stack.callback(setattr, layer, name, before)
        yield


@contextmanager
def transplanted(module: nn.Module, other: nn.Module) -> Iterator[None]:
    """Within the block `other` has the adapters of `module`, the same arrays on its base layers of the same paths."""
    layers_of = linears(other)
    moved = {path: copy(layer) for path, layer in layers(module).items()}
    for path, layer in moved.items():
        layer.linear = layers_of[path]
    other.update_modules(tree_unflatten(list(moved.items())))
    try:
        yield
    finally:
        other.update_modules(tree_unflatten([(path, layer.linear) for path, layer in moved.items()]))


def fuse(module: nn.Module) -> None:
    """Add the adapters into the weights, which keep their dtype (and bits), and remove them: one layer at a time."""
    replace_layers(module, list(layers(module)), _fused)


def _fused(layer: Any) -> nn.Module:
    fused: nn.Module = layer.fuse()
    if isinstance(layer.linear, nn.Linear):
        fused.weight = fused.weight.astype(layer.linear.weight.dtype)
    return fused


@contextmanager
def dropout_keys(module: nn.Module, rows: mx.array) -> Iterator[None]:
    """Within the block the adapters apply dropout, to sample i of a batch by rows[i].

    Args:
        rows: one key per sample, (B, 2) uint32; may be traced by `mx.compile`.
    """
    holders = {id(layer.dropout._keys): layer.dropout._keys for layer in layers(module).values()}
    with ExitStack() as stack:
        for holder in holders.values():
            stack.enter_context(holder.using(rows))
        yield
