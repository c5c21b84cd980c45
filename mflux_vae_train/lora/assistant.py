"""An assistant: a frozen adapter that is active while another one is trained, and neither trained nor saved.

Training a distilled model undoes its distillation. An assistant undoes it beforehand; images are drawn without it, so
that they show what the trained adapter changes. Its matrices are no parameters of the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import WeightsError
from mflux_vae.networks.layers import Conv2d
from mflux_vae.runtime.device import compute_dtype
from mflux_vae.runtime.threads import exclusive
from mflux_vae.weights.formats.lazy_tensor import check_numbers
from mflux_vae_train.lora.dialects import A, B
from mflux_vae_train.lora.layers import bases
from mflux_vae_train.lora.reading import Adapter, Names, read_adapter


class LowRank:
    """x -> scale B A x in the dtype of x; the matrices have the dtype of the device."""

    def __init__(self, a: mx.array, b: mx.array, scale: float) -> None:
        dtype = compute_dtype()
        self._a = mx.contiguous(a.T.astype(dtype))
        self._b = mx.contiguous((scale * b.T.astype(mx.float32)).astype(dtype))
        mx.eval(self._a, self._b)

    def __call__(self, x: mx.array) -> mx.array:
        return ((x @ self._a) @ self._b).astype(x.dtype)


def read_assistant(path: Path, prefix: str, module: nn.Module, names: Names | None = None) -> Adapter:
    """The adapter of a network in a file; arguments as in `read_adapter`.

    Raises:
        WeightsError: as `read_adapter`; or it has magnitudes, adapts convolutions, or has values that are not finite.
    """
    found = read_adapter(path, {prefix: module}, names)
    if prefix not in found:
        raise WeightsError(f"{path}: holds no adapter for {prefix!r}")
    adapter, layers = found[prefix], bases(module)
    if adapter.dora or any(isinstance(layers[layer], Conv2d) for layer in adapter.ranks):
        raise WeightsError(f"{path}: has magnitudes or adapts convolutions; an assistant is LoRA on linear layers")
    check_numbers(adapter.tensors, str(path), "an adapter's values")
    return adapter


@contextmanager
def assisted(module: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Within the block the layers, below other adapters, add the output of this one."""
    layers = bases(module)
    with exclusive():
        assistants = {
            path: LowRank(adapter.tensors[f"{path}{A}"], adapter.tensors[f"{path}{B}"], adapter.alphas[path] / rank)
            for path, rank in adapter.ranks.items()
        }
    with ExitStack() as stack:
        for path, assistant in assistants.items():
            layer, plain = layers[path], cast(Any, type(layers[path]))
            stack.enter_context(_of_class(layer, _assisted(plain)))
            layer.assistant = assistant
            stack.callback(delattr, layer, "assistant")
        yield


@contextmanager
def without_assistant(module: nn.Module) -> Iterator[None]:
    """Within the block the module computes without its assistant, if it has one."""
    with ExitStack() as stack:
        for layer in bases(module).values():
            if isinstance(layer, Assisted):
                stack.enter_context(_of_class(layer, type(layer).plain))
        yield


class Assisted:
    """Marks the classes of layers with an assistant.

    Attributes:
        plain: class of the layer without it.
    """

    plain: type[Any]


@cache
def _assisted(kind: Any) -> Any:
    """A subclass, so that paths, parameters and kind of a layer stay the same."""

    class AssistedLayer(Assisted, kind):
        plain = kind

        def __call__(self, x: mx.array) -> mx.array:
            y: mx.array = super().__call__(x)
            return y + self.assistant(x)

    return AssistedLayer


@contextmanager
def _of_class(layer: Any, kind: type[Any]) -> Iterator[None]:
    before, layer.__class__ = type(layer), kind
    try:
        yield
    finally:
        layer.__class__ = before
