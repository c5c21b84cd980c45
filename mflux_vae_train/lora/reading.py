"""Read adapter files of any spelling into the layers of a model; see `dialects` for keys and `metadata` for alpha."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mflux_vae.errors import WeightsError
from mflux_vae.utils.formatting import count_text, first_few, shortened, summarize
from mflux_vae_train.lora.dialects import (
    ALPHA,
    DORA_SCALE,
    MAGNITUDE,
    PEFT_NETWORK,
    A,
    B,
    LayerNames,
    Modules,
    check_kind,
    check_magnitudes,
    counterpart,
    outline,
    renamed,
)
from mflux_vae_train.lora.from_checkpoint import CHECKPOINT_NETWORK, checkpoint_adapter, is_checkpoint
from mflux_vae_train.lora.kohya import split
from mflux_vae_train.lora.layers import LayerChange, bases
from mflux_vae_train.lora.metadata import Statements, pattern_value
from mflux_vae_train.lora.targets import dimensions, kernel_of

Networks: TypeAlias = Mapping[str, nn.Module]
"""Networks by the prefix of their keys, such as "transformer"; the denoiser first."""

Names: TypeAlias = Mapping[str, Modules]
"""Other names of layers of each network, such as kohya's, by the same prefix."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The adapter of one network in a file.

    Attributes:
        tensors: by PEFT's key without the prefix.
        ranks, alphas: by path of the adapted layer.
        dora: whether there are magnitudes.
        unstated: number of layers whose alpha the file does not state.
        kernels: (kh, kw) of convolutions, by path.
        targets: PEFT's `target_modules`; None if the file does not list them.
    """

    tensors: Mapping[str, mx.array]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    dora: bool
    unstated: int
    kernels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    targets: Sequence[str] | None = None

    @cached_property
    def changes(self) -> Mapping[str, LayerChange]:
        """By path of the adapted layer."""
        return {
            path: LayerChange(
                a=self.tensors[f"{path}{A}"],
                b=self.tensors[f"{path}{B}"],
                scale=self.alphas[path] / rank,
                kernel=self.kernels.get(path),
                magnitudes=self.tensors.get(f"{path}{MAGNITUDE}"),
            )
            for path, rank in self.ranks.items()
        }

    @cached_property
    def rank(self) -> int:
        """The most frequent rank."""
        return Counter(self.ranks.values()).most_common(1)[0][0]

    @cached_property
    def alpha(self) -> float:
        """The most frequent alpha of layers of that rank."""
        alphas = [alpha for path, alpha in self.alphas.items() if self.ranks[path] == self.rank]
        return Counter(alphas).most_common(1)[0][0]


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file's tensors by PEFT's ends of keys.

    Attributes:
        source: key in the file, by PEFT's.
        kernels: (kh, kw) where A is a kernel, by name of the layer.
    """

    path: Path
    tensors: Mapping[str, mx.array]
    source: Mapping[str, str]
    kernels: Mapping[str, tuple[int, int]]
    statements: Statements

    @cached_property
    def layers(self) -> Mapping[str, Mapping[str, mx.array]]:
        """Tensors of each layer, by name and end of the key."""
        layers: dict[str, dict[str, mx.array]] = {}
        for key, tensor in self.tensors.items():
            if (end := _end(key)) is not None:
                layers.setdefault(key.removesuffix(end), {})[end] = tensor
        return layers

    @property
    def unknown(self) -> list[str]:
        """Keys with other ends."""
        return [self.source[key] for key in self.tensors if _end(key) is None]


def _end(key: str) -> str | None:
    return next((end for end in (A, B, MAGNITUDE, ALPHA) if key.endswith(end)), None)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer of a file, and the layers of the model that it stands for."""

    name: str
    prefix: str
    paths: Sequence[str]
    tensors: Mapping[str, mx.array]

    @property
    def rank(self) -> int:
        return self.tensors[A].shape[0]


def read_adapter(
    path: str | Path, networks: Networks, names: Names | None = None, *, scale: float = 1.0
) -> dict[str, Adapter]:
    """The adapters of these networks in a file, by prefix; networks may be missing.

    Args:
        networks: only the paths and shapes of their layers are used.
        names: other names that files give the layers; None if unknown.
        scale: alpha / rank of layers whose alpha the file does not state.

    Raises:
        WeightsError: another kind of adapter or number format; an adapter of another model; missing, unknown or
            misshapen keys; a part for a network that is not among these; or statements that cannot be read or
            contradict each other or the tensors.
    """
    file = _open(Path(path), networks)
    file.statements.check(networks)
    placed = _placed(file, networks, names or {})
    return {
        prefix: _adapter([one for one in placed if one.prefix == prefix], bases(networks[prefix]), file, scale)
        for prefix in networks
        if any(one.prefix == prefix for one in placed)
    }


def read_by_names(path: str | Path) -> dict[str, Adapter]:
    """The adapters in a file without their model: layers are as in the file, fused ones included.

    Returns:
        by the first component of the layers' names if it names a network, as in PEFT's files; else by "".

    Raises:
        WeightsError: as `read_adapter`, without the comparison with a model.
    """
    file = _open(Path(path), [CHECKPOINT_NETWORK])
    stated = file.statements.prefixes()
    found: dict[str, list[_Layer]] = {}
    faults: dict[str, list[str]] = {"missing ": [], "unknown ": file.unknown, "": []}
    for name, parts in file.layers.items():
        first, _, rest = name.partition(".")
        prefix = first if rest and (first in stated or PEFT_NETWORK.fullmatch(first)) else ""
        layer = _Layer(name=name, prefix=prefix, paths=[rest if prefix else name], tensors=parts)
        if A not in parts or B not in parts:
            faults["missing "].append(counterpart(file.source[f"{name}{next(iter(parts))}"]))
        elif wrong := _wrong_shapes(layer, parts[B].shape[0], parts[A].shape[-1], file.source):
            faults[""].append(wrong)
        else:
            found.setdefault(prefix, []).append(layer)
    if any(faults.values()):
        raise WeightsError(f"{path}: not a whole adapter: {summarize([*faults.items()])}; take another file")
    file.statements.check(found)
    return {prefix: _adapter(layers, None, file, 1.0) for prefix, layers in found.items()}


def _open(path: Path, prefixes: Iterable[str]) -> _File:
    """Read a file.

    Args:
        prefixes: of the networks, the denoiser's first.

    Raises:
        WeightsError: another kind of adapter or number format, two keys for one tensor, or statements that cannot be
            read.
    """
    from mflux_vae.weights.formats.files import open_weights

    if is_checkpoint(path):
        tensors, metadata = checkpoint_adapter(path, prefixes)
    else:
        stored, metadata = open_weights(path)
        check_kind(stored, str(path))
        tensors = {key: tensor.load() for key, tensor in stored.items()}
    for key, tensor in tensors.items():
        if not mx.issubdtype(tensor.dtype, mx.floating) and not key.endswith(ALPHA):
            dtype = str(tensor.dtype).removeprefix("mlx.core.")
            raise WeightsError(
                f"{path}: {shortened(key, 100)} is {dtype}, and an adapter has floats; save it as float32"
            )
    check_magnitudes(tensors, str(path))
    found, source = renamed(tensors, str(path))
    kernels = {
        key.removesuffix(A): (shape[2], shape[3])
        for key in found
        if key.endswith(A) and len(shape := tensors[source[key]].shape) == 4
    }
    return _File(path=path, tensors=found, source=source, kernels=kernels, statements=Statements(metadata, path))


def _placed(file: _File, networks: Networks, names: Names) -> list[_Layer]:
    """The layers of a file, found in the networks, with two matrices of fitting shapes each."""
    path, source, by_layer = file.path, file.source, file.layers
    faults: dict[str, list[str]] = {"missing ": [], "unknown ": file.unknown, "": []}
    linears = {prefix: bases(module) for prefix, module in networks.items()}
    lookup = LayerNames(linears, names)
    placed: list[_Layer] = []
    others: dict[str, list[str]] = {}
    taken: dict[tuple[str, tuple[str, ...]], str] = {}
    for name, parts in by_layer.items():
        prefix, paths = lookup.find(name)
        keys = [source[f"{name}{end}"] for end in parts]
        layer = _Layer(name=name, prefix=prefix, paths=paths, tensors=parts)
        if prefix not in networks:
            others.setdefault(prefix, []).extend(keys)
        elif not paths or not linears[prefix].keys() >= {*paths} or (A not in parts and B not in parts):
            faults["unknown "] += keys
        elif A not in parts or B not in parts:
            faults["missing "].append(counterpart(keys[0]))
        elif wrong := _wrong_shapes(
            layer,
            sum(dimensions(linears[prefix][path])[0] for path in paths),
            dimensions(linears[prefix][paths[0]])[1],
            source,
        ):
            faults[""].append(wrong)
        elif (first := taken.setdefault((prefix, tuple(paths)), keys[0])) != keys[0]:
            faults[""].append(f"{first} and {keys[0]} are for one layer")
        else:
            placed.append(layer)
    if any(faults.values()):
        fit = sum(len(one.tensors) for one in placed)
        _refuse(
            path, by_layer, lookup, networks, faults, f"{fit} of {len(file.tensors)} keys match", nothing=not placed
        )
    if others:
        (prefix, keys), *_ = others.items()
        raise WeightsError(
            f"{path}: also contains an adapter for {prefix!r} ({count_text(len(keys), 'key')}, such as"
            f" {shortened(keys[0], 110)}), which this run does not train; remove it"
            + (" or try --train_text_encoder" if len(networks) == 1 else "")
        )
    return placed


def _wrong_shapes(layer: _Layer, outputs: int, inputs: int, source: Mapping[str, str]) -> str:
    """What is wrong with the shapes of a layer with this many outputs and inputs; empty if they fit."""
    down, up, alpha, magnitude = (layer.tensors.get(end) for end in (A, B, ALPHA, MAGNITUDE))
    assert down is not None and up is not None
    if down.ndim != 2 or up.ndim != 2 or not down.shape[0] == up.shape[1] > 0:
        return f"{layer.name} has the shapes {tuple(down.shape)} and {tuple(up.shape)}"
    if up.shape[0] != outputs:
        return f"{source[f'{layer.name}{B}']} has {up.shape[0]} rows, expected {outputs}"
    for end, tensor, shape in ((A, down, (down.shape[0], inputs)), (MAGNITUDE, magnitude, (outputs,))):
        if tensor is not None and tuple(tensor.shape) != shape:
            return f"{source[f'{layer.name}{end}']} is {tuple(tensor.shape)}, expected {shape}"
    return f"{source[f'{layer.name}{ALPHA}']} is {tuple(alpha.shape)}" if alpha is not None and alpha.size != 1 else ""


def _refuse(
    path: Path,
    by_layer: Mapping[str, Mapping[str, mx.array]],
    lookup: LayerNames,
    networks: Networks,
    faults: Mapping[str, Sequence[str]],
    matches: str,
    *,
    nothing: bool,
) -> NoReturn:
    """Say which model the file was made for, if that shows, or which keys do not fit."""
    prefix, module = next(iter(networks.items()))
    theirs = outline(
        (rest, parts[A].shape[-1])
        for name, parts in by_layer.items()
        for its, rest in [lookup.network(name)]
        if its == prefix and A in parts and parts[A].ndim
    )
    ours = outline((name, dimensions(layer)[1]) for name, layer in bases(module).items())
    if theirs is not None and ours is not None:
        same = len(theirs[1]) == len(ours[1])
        larger = same and any(count > most for count, most in zip(theirs[1], ours[1], strict=True))
        if theirs[0] != ours[0] or larger or (nothing and not same):
            kind = next(
                (kind for kind in ("unet", "transformer") if any(key.startswith(f"{kind}.") for key in by_layer)),
                prefix,
            )
            keys, blocks = [key for group in faults.values() for key in group], " + ".join(map(str, theirs[1]))
            raise WeightsError(
                f"{path}: made for a {kind} of width {theirs[0]} with {blocks} blocks; this model has {ours[0]} and"
                f" {' + '.join(map(str, ours[1]))}; {matches}, not {first_few(keys[:2], 2, 55)}; give the"
                " model it was made for"
            )
    raise WeightsError(f"{path}: does not fit this {prefix}; {matches}: {summarize([*faults.items()], 220)}")


def _adapter(found: Sequence[_Layer], linears: Mapping[str, Any] | None, file: _File, scale: float) -> Adapter:
    """
    Args:
        linears: the network's layers; None if the layers of the file are those of the network.
    """
    prefix, path, source, statements = found[0].prefix, file.path, file.source, file.statements
    stated, hint = statements.alpha(prefix), statements.layer_rank(prefix)
    alpha_pattern, rank_pattern = (statements.pattern(f"{kind}_pattern", prefix) for kind in ("alpha", "rank"))
    root = statements.flag("use_rslora", prefix)  # scale alpha / sqrt(rank), arXiv:2312.03732
    given = {one.name: _alpha_tensor(one, source, path) for one in found if ALPHA in one.tensors}
    _check_statements(found, statements, given, rank_pattern, fused=linears is None)
    dora = any(MAGNITUDE in one.tensors for one in found)
    if without := [one.name for one in found if dora and MAGNITUDE not in one.tensors]:
        of_kohya = any(key.endswith(DORA_SCALE) for key in source.values())
        missing = [f"{name}{DORA_SCALE if of_kohya else MAGNITUDE}" for name in without]
        raise WeightsError(f"{path}: missing {first_few(missing, 2)}; take a whole file")
    if statements.flag("use_dora", prefix) and not dora:
        raise WeightsError(f"{path}: states use_dora and has no magnitudes; take a whole file")
    tensors: dict[str, mx.array] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    kernels: dict[str, tuple[int, int]] = {}
    unstated, usual = 0, hint or min(one.rank for one in found)
    for one in found:
        alpha = given.get(one.name, pattern_value(alpha_pattern, one.paths[0]) or stated)
        if alpha is None:
            unstated += 1
            alpha = scale * one.rank
        elif root:
            alpha *= math.sqrt(one.rank)
        outputs = [one.tensors[B].shape[0] if linears is None else dimensions(linears[part])[0] for part in one.paths]
        rows = np.cumsum(outputs)[:-1].tolist()
        magnitudes = list(mx.split(one.tensors[MAGNITUDE], rows)) if dora else []
        for index, pair in enumerate(split(one.tensors[A], one.tensors[B], outputs, usual)):
            if pair is None:
                continue
            part = one.paths[index]
            tensors[f"{part}{A}"], tensors[f"{part}{B}"] = pair
            ranks[part] = pair[0].shape[0]
            alphas[part] = alpha if ranks[part] == one.rank else alpha * ranks[part] / one.rank
            if dora:
                tensors[f"{part}{MAGNITUDE}"] = magnitudes[index]
            if (kernel := file.kernels.get(one.name) if linears is None else kernel_of(linears[part])) is not None:
                kernels[part] = kernel
    return Adapter(
        tensors=tensors,
        ranks=ranks,
        alphas=alphas,
        dora=dora,
        unstated=unstated,
        kernels=kernels,
        targets=statements.targets(prefix),
    )


def _alpha_tensor(layer: _Layer, source: Mapping[str, str], path: Path) -> float:
    value = float(np.array(layer.tensors[ALPHA].astype(mx.float32)).item())
    if not 0 < value < math.inf:
        key = shortened(source[f"{layer.name}{ALPHA}"], 100)
        raise WeightsError(f"{path}: {key} is {value:g}; a positive number is needed: correct the file")
    return value


def _check_statements(
    found: Sequence[_Layer],
    statements: Statements,
    given: Mapping[str, float],
    rank_pattern: Mapping[str, float],
    *,
    fused: bool,
) -> None:
    """Compare stated ranks and alphas with the tensors.

    Args:
        fused: layers may be several ones that are fused.

    Raises:
        WeightsError: they contradict each other.
    """
    prefix = found[0].prefix
    rank, usual, alpha = statements.rank(prefix), statements.layer_rank(prefix), statements.alpha(prefix)
    for one in found:
        expected = pattern_value(rank_pattern, one.paths[0]) or rank
        if expected is not None and expected != one.rank:
            _contradiction(statements.path, f"rank {expected:g}", f"{shortened(one.name, 100)} has rank {one.rank}")
    multiples = {one.rank / count for one in found for count in range(1, len(one.paths) + 1)}
    if usual is not None and usual not in multiples and not fused:
        some = sorted({one.rank for one in found})
        _contradiction(statements.path, f"rank {usual}", f"its layers have rank {first_few([*map(str, some)])}")
    if alpha is not None and len(given) == len(found):
        scales = {given[one.name] / one.rank for one in found}
        if alpha not in given.values() and alpha / (rank or usual or found[0].rank) not in scales:
            values = sorted({f"{value:g}" for value in given.values()})
            _contradiction(statements.path, f"alpha {alpha:g}", f"its alpha tensors are {first_few(values)}")


def _contradiction(path: Path, stated: str, found: str) -> NoReturn:
    raise WeightsError(f"{path}: its metadata states {stated}, and {found}; correct the file's metadata")
