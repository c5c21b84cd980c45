"""Low-rank adapters (LoRA, arXiv:2106.09685) on the linear layers of any module, in PEFT's file format.

y = W x + b + (alpha / rank) B A x, with A (rank, in) uniform in +-1/sqrt(in) and B (out, rank) zero at the
start. The layers are mlx-lm's; it keeps lora_a = A^T and lora_b = B^T.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train.randomness import Stream, rng

METADATA_KEY = "lora_adapter_metadata"
_A, _B = ".lora_A.weight", ".lora_B.weight"


def add_lora(
    module: nn.Module,
    patterns: Sequence[str],
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Adapt every `nn.Linear` whose path matches a pattern; freeze all else.

    Args:
        patterns: fnmatch patterns over module paths, e.g. ``transformer_blocks.*.attn.to_q``.
        alpha: None means `rank`, a scale of 1.
        dropout: share of A's inputs dropped; takes effect only inside `dropout_keys`.
        seed: A depends on (seed, path of the layer) alone.

    Returns:
        the adapted paths, sorted.

    Raises:
        SettingsError: no linear layer matches; some that are there are named.
    """
    from mlx_lm.tuner.lora import LoRALinear  # imports transformers: seconds

    if layers(module):
        raise ValueError("the module has adapters already; fuse them first")
    linears = _linears(module)
    targets = list(matching(module, patterns))
    module.freeze()
    keys = _DropoutKeys()
    adapted = []
    for path in targets:
        layer = LoRALinear.from_base(linears[path], r=rank, scale=(rank if alpha is None else alpha) / rank)
        inputs = layer.lora_a.shape[0]
        salt = zlib.crc32(path.encode())
        limit = 1 / math.sqrt(inputs)
        layer.lora_a = mx.array(rng(seed, Stream.INIT, salt).uniform(-limit, limit, (inputs, rank)), mx.float32)
        layer.dropout = KeyedDropout(dropout, salt, keys)
        adapted.append((path, layer))
    module.update_modules(tree_unflatten(adapted))
    mx.eval(module.trainable_parameters())
    return targets


def matching(module: nn.Module, patterns: Sequence[str]) -> dict[str, int]:
    """Paths of the linear layers that match a pattern, sorted, each with (inputs + outputs): weights per rank.

    Raises:
        SettingsError: none matches; some that are there are named.
    """
    linears = _linears(module)
    matched = sorted(path for path in linears if any(fnmatchcase(path, pattern) for pattern in patterns))
    if not matched:
        some = ", ".join(sorted(linears)[:8]) or "none at all"
        raise SettingsError(f"no linear layer matches {', '.join(patterns)}; the module has {some}")
    return {path: sum(_dimensions(linears[path])) for path in matched}


def layers(module: nn.Module) -> dict[str, Any]:
    """The layers that `add_lora` adapted, by path: they carry its dropout. (No import of mlx-lm just to look.)"""
    modules = sorted(module.named_modules(), key=lambda item: item[0])
    return {path: layer for path, layer in modules if isinstance(layer.get("dropout"), KeyedDropout)}


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """Within the block the module is the base model, bit by bit: the adapted layers are taken out."""
    adapted = layers(module)
    module.update_modules(tree_unflatten([(path, layer.linear) for path, layer in adapted.items()]))
    try:
        yield
    finally:
        module.update_modules(tree_unflatten(list(adapted.items())))


def fuse(module: nn.Module) -> None:
    """Add the adapters into the weights and remove them."""
    module.update_modules(tree_unflatten([(path, layer.fuse()) for path, layer in layers(module).items()]))


# Dropout


class _DropoutKeys:
    """Where the adapted layers of one module look for this micro-batch's keys."""

    rows: mx.array | None = None


class KeyedDropout(nn.Module):
    """Dropout whose mask for sample i depends on (its key, this layer) alone; the identity where no keys are set.

    mlx.nn's Dropout draws from the global generator: a mask would depend on what else is in the batch and on
    all draws before, and a resumed run or one that accumulates differently would not be the same run.
    """

    def __init__(self, p: float, salt: int, keys: _DropoutKeys) -> None:
        super().__init__()
        self.p, self.salt, self._keys = p, salt, keys

    def __call__(self, x: mx.array) -> mx.array:
        rows = self._keys.rows
        if self.p == 0 or rows is None:
            return x
        keep = 1 - self.p
        own = rows ^ mx.array([self.salt, 0], mx.uint32)
        masks = mx.vmap(lambda key: mx.random.bernoulli(keep, x.shape[1:], key))(own)
        return x * masks.astype(x.dtype) * (1 / keep)


@contextmanager
def dropout_keys(module: nn.Module, rows: mx.array) -> Iterator[None]:
    """Within the block the adapters drop inputs, sample i of a batch by rows[i].

    Args:
        rows: one key per sample, (B, 2) uint32; may be traced by `mx.compile`.
    """
    holders = {id(layer.dropout._keys): layer.dropout._keys for layer in layers(module).values()}
    for holder in holders.values():
        holder.rows = rows
    try:
        yield
    finally:
        for holder in holders.values():
            holder.rows = None


# Files


def adapter_tensors(module: nn.Module, prefix: str) -> dict[str, mx.array]:
    """``{prefix}.{path}.lora_A.weight`` (rank, in) and ``.lora_B.weight`` (out, rank) of every adapted layer."""
    tensors = {}
    for path, layer in layers(module).items():
        tensors[f"{prefix}.{path}{_A}"] = layer.lora_a.T
        tensors[f"{prefix}.{path}{_B}"] = layer.lora_b.T
    return tensors


def adapter_metadata(module: nn.Module, prefix: str) -> dict[str, str]:
    """Metadata of the safetensors file: the PEFT configuration, keys prefixed, as JSON. Alpha lives only there."""
    adapted = layers(module)
    if not adapted:
        raise ValueError("the module has no adapters to save")
    first = next(iter(adapted.values()))
    rank = int(first.lora_a.shape[1])
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": first.dropout.p,
        "target_modules": list(adapted),
        "bias": "none",
    }
    text = json.dumps({f"{prefix}.{key}": value for key, value in config.items()}, sort_keys=True)
    return {"format": "pt", METADATA_KEY: text}


def save_adapter(module: nn.Module, path: str | Path, prefix: str) -> None:
    """Write the adapters as a PEFT/diffusers safetensors file."""
    from mflux_vae.weights.files import write_safetensors

    write_safetensors(path, adapter_tensors(module, prefix), adapter_metadata(module, prefix))


def load_adapter(module: nn.Module, path: str | Path, prefix: str) -> list[str]:
    """Read such a file into a module: adds the layers where there are none yet; rank and alpha are the file's.

    Returns:
        the adapted paths.

    Raises:
        WeightsError: missing, unknown and misshapen keys, all listed; ranks or alphas that differ by layer; or
            metadata that cannot be read.
    """
    from mflux_vae.weights.files import read_safetensors

    tensors, metadata = read_safetensors(path)
    rank, alpha = _rank_and_alpha(tensors, metadata, prefix, path)
    adapted = layers(module)
    linears = {name: layer.linear for name, layer in adapted.items()} or _linears(module)
    in_file = {
        key.removeprefix(f"{prefix}.").removesuffix(end) for key in tensors for end in (_A, _B) if key.endswith(end)
    }
    names = sorted(adapted) or sorted(in_file & linears.keys())

    expected: dict[str, tuple[int, int]] = {}
    for name in names:
        outputs, inputs = _dimensions(linears[name])
        expected |= {f"{prefix}.{name}{_A}": (rank, inputs), f"{prefix}.{name}{_B}": (outputs, rank)}
    faults = [f"missing {key}" for key in expected if key not in tensors]
    faults += [f"unknown {key}" for key in tensors if key not in expected]
    faults += [
        f"{key} is {tuple(tensors[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    if faults:
        raise WeightsError(f"{path}: does not fit this model: " + "; ".join(sorted(faults)))

    if not adapted:
        add_lora(module, names, rank=rank)
    for name, layer in layers(module).items():
        # contiguous as trained: a transposed view would go another way through BLAS and round differently
        layer.lora_a = mx.contiguous(tensors[f"{prefix}.{name}{_A}"].T.astype(mx.float32))
        layer.lora_b = mx.contiguous(tensors[f"{prefix}.{name}{_B}"].T.astype(mx.float32))
        layer.scale = alpha / rank
    return names


def _rank_and_alpha(
    tensors: dict[str, mx.array], metadata: dict[str, str], prefix: str, path: str | Path
) -> tuple[int, float]:
    ranks = {x.shape[0] for key, x in tensors.items() if key.startswith(f"{prefix}.") and key.endswith(_A) and x.ndim}
    if not ranks:
        raise WeightsError(f"{path}: holds no adapter for {prefix!r}: no key {prefix}.*{_A}")
    try:
        config = json.loads(metadata.get(METADATA_KEY, "{}"))
        several = config.get(f"{prefix}.rank_pattern") or config.get(f"{prefix}.alpha_pattern")
        alpha = float(config.get(f"{prefix}.lora_alpha", min(ranks)))
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: its {METADATA_KEY} cannot be read ({error})") from error
    if len(ranks) > 1 or several:
        raise WeightsError(f"{path}: its layers differ in rank or alpha (ranks {sorted(ranks)}); one of each is read")
    return ranks.pop(), alpha


def _linears(module: nn.Module) -> dict[str, Any]:
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.QuantizedLinear))}


def _dimensions(layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a plain or quantized linear layer."""
    outputs, inputs = layer.weight.shape
    return outputs, inputs * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else inputs
