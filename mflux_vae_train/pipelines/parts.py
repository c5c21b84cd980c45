"""Networks and tokenizers of a pipeline: loaded on first use, quantized, fingerprinted, freed and saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.vae import VAE
from mflux_vae_train.fingerprint import weights_hash
from mflux_vae_train.pipelines.capabilities import Use
from mflux_vae_train.pipelines.folder import copy_files, save_network
from mflux_vae_train.pipelines.lazy import Lazy
from mflux_vae_train.pipelines.quantization import quantize
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Networks and tokenizers, by the names of their folders in diffusers' layout.

    Attributes:
        networks: the denoiser first, then the text encoders.
        quantized: for networks that `quantize` changes, which of their layers, by path.
    """

    networks: Mapping[str, Lazy[Any]]
    vae: Lazy[VAE]
    tokenizers: Mapping[str, LazyTokenizer]
    quantized: Mapping[str, Callable[[str], bool]]

    def check(self) -> None:
        """Open every part and compare names and shapes of its tensors, without reading their values.

        Raises:
            WeightsError: a file is missing or broken, or its tensors do not fit the network.
        """
        for part in (*self.networks.values(), self.vae):
            part.get()
            part.release()
        for tokenizer in self.tokenizers.values():
            tokenizer.get()

    def quantize(self, bits: int) -> None:
        """Hold the linear layers selected by `quantized` in 4 or 8 bits from now on."""
        for name, selects in self.quantized.items():
            part = self.networks[name]
            part.release()  # a network that was only checked is quantized layer by layer when it is loaded again
            part.apply(partial(_quantize, bits=bits, selects=selects), f"{bits} bits")

    def release(self, *uses: Use) -> None:
        """Free the text encoders (`prompts`) or the autoencoder (`images`), where they can be loaded again."""
        for use in uses:
            for part in [self.vae] if use == "images" else self._text_encoders():
                part.release()
        mx.clear_cache()

    def encoder_fingerprint(self, use: Use) -> str:
        """Hash of weights and tokenizers, and precision. Weights that are not loaded are not quantized for this."""
        if use == "images":
            return self.vae.fingerprint(lambda vae: f"{_hash_and_dtypes(vae.network)} {vae.config.to_dict()}")
        networks = [part.fingerprint(_hash_and_dtypes) for part in self._text_encoders()]
        return " ".join([*networks, *(tokenizer.fingerprint_files() for tokenizer in self.tokenizers.values())])

    def save(self, folder: Path, dtype: str, stems: Mapping[str, str]) -> None:
        """Write every part. Each file is written whole or not at all.

        Args:
            stems: names of the weights files by part.

        Raises:
            SettingsError: an unknown dtype.
        """
        for name, part in self.networks.items():
            save_network(part, folder / name, stems[name], dtype)
        self.vae.get().save_pretrained(folder / "vae", dtype)
        for name, tokenizer in self.tokenizers.items():
            copy_files(tokenizer.folder, folder / name)

    def _text_encoders(self) -> list[Lazy[Any]]:
        return list(self.networks.values())[1:]


def _quantize(module: nn.Module, *, bits: int, selects: Callable[[str], bool]) -> None:
    quantize(module, bits, selects)


def _hash_and_dtypes(module: nn.Module) -> str:
    """Hash of a network's weights, and their dtypes."""
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    return " ".join([weights_hash(module), ", ".join(sorted({str(array.dtype) for array in parameters.values()}))])
