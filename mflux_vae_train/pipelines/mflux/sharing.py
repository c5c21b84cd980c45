"""Networks that hold the arrays of mflux's modules, and the way back: adapters and trained weights into its modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae.errors import PluginError, SettingsError
from mflux_vae.weights.keymaps.rules import Rule, from_mlx, load_strict, to_mlx
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.quantization import adopt_quantization
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer

N = TypeVar("N", bound=nn.Module)

_ADAPTER_ARRAYS = {"lora_A", "lora_a", "loras", "lokr_w1"}


class Shared(Lazy[N], Generic[N]):
    """A network with the arrays of a module of mflux.

    Args:
        build: creates the network, with weights that are lazy and never computed.
        module: mflux's module.
        rules: from its names to the network's.
        embeddings: paths of embeddings that stay quantized if they are; other quantized embeddings are dequantized.

    Raises:
        SettingsError: the module carries an adapter.
    """

    def __init__(
        self, build: Callable[[], N], module: nn.Module, rules: Sequence[Rule] = (), embeddings: Collection[str] = ()
    ) -> None:
        if any(_ADAPTER_ARRAYS & layer.keys() for layer in module.modules()):
            raise SettingsError(
                f"mflux's {type(module).__name__} carries an adapter already: build the model without lora_paths, or"
                " with bake_lora, and train it once"
            )
        super().__init__(self._share)
        self.module, self._build, self._rules, self._embeddings = module, build, rules, embeddings

    @property
    def nbytes(self) -> int:
        """Bytes of the module's arrays."""
        return nbytes(self.module)

    def _share(self) -> N:
        network, where = self._build(), f"mflux's {type(self.module).__name__}"
        tensors = to_mlx(dict(tree_flatten(self.module.parameters())), self._rules)
        ready = adopt_quantization(network, tensors, where, embeddings=self._embeddings)
        load_strict(network, ready, where=where)
        return network

    def result(self, adapter: Callable[[nn.Module, Any], nn.Module]) -> tuple[nn.Module, Any, Any]:
        """Changes of the network since it was built: the module, its new layers, its new arrays.

        Args:
            adapter: (layer of the module, adapted layer of the network) -> new layer of the module.
        """
        network: Any = self.loaded
        layers = dict(network.named_modules()) if network is not None else {}
        originals, held = dict(self.module.named_modules()), dict(tree_flatten(self.module.parameters()))
        adapted = {path: layer for path, layer in layers.items() if "lora_a" in layer}
        new_layers = []
        for path, layer in adapted.items():
            theirs = self._their_name(f"{path}.weight").removesuffix(".weight")
            new_layers.append((theirs, adapter(originals[theirs], layer)))
        arrays = dict(tree_flatten(network.parameters())) if network is not None and not adapted else {}
        named = {self._their_name(name): array for name, array in arrays.items()}
        # a dequantized embedding has another shape than the module's
        new_arrays = [
            (name, array)
            for name, array in named.items()
            if name in held and array is not held[name] and array.shape == held[name].shape
        ]
        return self.module, tree_unflatten(new_layers), tree_unflatten(new_arrays)

    def _their_name(self, name: str) -> str:
        (theirs,) = from_mlx({name: mx.array(0)}, self._rules)
        return theirs


def nbytes(module: nn.Module) -> int:
    """Bytes of a module's arrays."""
    arrays: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    return sum(array.nbytes for array in arrays.values())


def adapter_kind() -> Any:
    """mflux's layer with an adapter.

    Raises:
        PluginError: this release of mflux has none under the name known here.
    """
    name = "mflux.models.common.lora.layer.linear_lora_layer"
    try:
        return import_module(name).LoRALinear
    except (ImportError, AttributeError) as error:
        raise PluginError(f"mflux has no {name}.LoRALinear; install the release that the tests run with") from error


def tokenizer(theirs: Any) -> LazyTokenizer:
    """A tokenizer of transformers inside one of mflux's, through its files."""
    kept: list[Any] = []

    def folder() -> Path:
        if not kept:
            kept.append(TemporaryDirectory(prefix="tokenizer-"))  # removed with the pipeline
            theirs.tokenizer.save_pretrained(kept[0].name)
        return Path(kept[0].name)

    return LazyTokenizer(folder)
