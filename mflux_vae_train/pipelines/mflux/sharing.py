"""Networks that hold the arrays of mflux's modules, and the way back: adapters and trained weights into its modules."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from importlib import import_module
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any, Generic, TypeVar
from weakref import finalize

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae.errors import PluginError, SettingsError
from mflux_vae.weights.formats.files import read_json, write_json
from mflux_vae.weights.keymaps.rules import Tensors, load_strict
from mflux_vae_train.pipelines.loading.folder import PartialNetwork
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.quantization import adopt_quantization
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer

N = TypeVar("N", bound=nn.Module)

Named = Callable[[Tensors], Tensors]
"""Arrays under mflux's names -> the same arrays under the names of a network here."""

_ADAPTER_ARRAYS = {"lora_A", "lora_a", "loras", "lokr_w1"}


class Shared(Lazy[N], Generic[N]):
    """A network with the arrays of a module of mflux.

    Args:
        build: creates the network, with weights that are lazy and never computed.
        module: mflux's module.
        named: arrays under its names -> the same arrays under the network's names.
        embeddings: paths of embeddings that stay quantized if they are; other quantized embeddings are dequantized.

    Raises:
        SettingsError: the module carries an adapter.
    """

    def __init__(
        self, build: Callable[[], N], module: nn.Module, named: Named = dict, embeddings: Collection[str] = ()
    ) -> None:
        if any(_ADAPTER_ARRAYS & layer.keys() for layer in module.modules()):
            raise SettingsError(
                f"mflux's {type(module).__name__} carries an adapter already: build the model without lora_paths, or"
                " with bake_lora, and train it once"
            )
        super().__init__(self._share)
        self.module, self._build, self._named, self._embeddings = module, build, named, embeddings

    def _share(self) -> N:
        network, where = self._build(), f"mflux's {type(self.module).__name__}"
        tensors = self._named(dict(tree_flatten(self.module.parameters())))
        if isinstance(network, PartialNetwork):
            tensors = network.take(tensors)
        load_strict(network, adopt_quantization(network, tensors, where, embeddings=self._embeddings), where=where)
        return network

    def result(self, adapter: Callable[[nn.Module, Any], nn.Module]) -> tuple[nn.Module, Any, Any]:
        """Changes of the network since it was built: the module, its new layers, its new arrays.

        Args:
            adapter: (layer of the module, adapted layer of the network) -> new layer of the module.
        """
        network: Any = self.loaded
        if network is None:
            return self.module, {}, {}
        layers, held = dict(self.module.named_modules()), dict(tree_flatten(self.module.parameters()))
        their_name = {id(array): name for name, array in held.items()}
        theirs = {name: their_name[id(array)] for name, array in self._named(held).items() if id(array) in their_name}
        adapted = {path: layer for path, layer in network.named_modules() if "lora_a" in layer}
        new_layers = []
        for path, layer in adapted.items():
            their_path = theirs[f"{path}.weight"].removesuffix(".weight")
            new_layers.append((their_path, adapter(layers[their_path], layer)))
        arrays: dict[str, mx.array] = {} if adapted else dict(tree_flatten(network.parameters()))
        new_arrays = [
            (theirs[name], array)
            for name, array in arrays.items()
            # a dequantized embedding has another shape than the module's
            if name in theirs and array is not held[theirs[name]] and array.shape == held[theirs[name]].shape
        ]
        return self.module, tree_unflatten(new_layers), tree_unflatten(new_arrays)


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
    """A tokenizer of transformers inside one of mflux's, which limits its length, through its files."""

    @cache
    def folder() -> Path:
        place = Path(mkdtemp(prefix="tokenizer-"))
        finalize(ours, rmtree, place, ignore_errors=True)
        theirs.tokenizer.save_pretrained(place)
        settings = place / "tokenizer_config.json"
        write_json(settings, read_json(settings) | {"model_max_length": theirs.max_length})
        return place

    ours = LazyTokenizer(folder)
    return ours
