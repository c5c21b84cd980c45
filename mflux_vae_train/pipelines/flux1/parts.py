"""What a FLUX.1 pipeline is made of: each part there when it is needed, and no longer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.vae import VAE
from mflux_vae_train.fingerprint import weights_hash
from mflux_vae_train.pipelines.capabilities import Use
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer
from mflux_vae_train.pipelines.lazy import Lazy
from mflux_vae_train.pipelines.quantization import quantize
from mflux_vae_train.pipelines.text.clip import CLIPTextModel
from mflux_vae_train.pipelines.text.t5 import T5Encoder
from mflux_vae_train.pipelines.text.tokenizer import Tokenizer, load_tokenizer

Folder: TypeAlias = "str | Path | Callable[[], Path]"
"""A folder, or what gives one when it is needed, as it may have to be downloaded."""


def is_quantized_layer(path: str) -> bool:
    """Which of the transformer's layers `quantize` takes: all of the blocks'. The embedders are small, and delicate."""
    return path.startswith(("transformer_blocks.", "single_transformer_blocks."))


def is_quantized_text_layer(path: str) -> bool:
    """Which of T5's layers `quantize` takes. CLIP, of 0.1 billion parameters, stays as it is."""
    return path.startswith("encoder.block.")


class FluxParts:
    """Networks and tokenizers, loaded when they are first used.

    Args:
        transformer, vae, text_encoder, text_encoder_2: networks, or parts that give them.
        tokenizer_folder, tokenizer_2_folder: the tokenizers' files. Of a folder that is there, faults are told now.
    """

    def __init__(
        self,
        *,
        transformer: FluxTransformer | Lazy[FluxTransformer],
        vae: VAE | Lazy[VAE],
        text_encoder: CLIPTextModel | Lazy[CLIPTextModel],
        text_encoder_2: T5Encoder | Lazy[T5Encoder],
        tokenizer_folder: Folder,
        tokenizer_2_folder: Folder,
    ) -> None:
        self._transformer = Lazy.of(transformer)
        # its configuration as a folder has it, wherever it comes from
        self._vae = vae if isinstance(vae, Lazy) else Lazy(loaded=vae, config=vae.config.to_dict())
        self._text_encoder, self._text_encoder_2 = Lazy.of(text_encoder), Lazy.of(text_encoder_2)
        self._folders = tokenizer_folder, tokenizer_2_folder
        self._tokenizer, self._tokenizer_2 = (Lazy(partial(_open_tokenizer, folder)) for folder in self._folders)
        for tokenizer, folder in zip((self._tokenizer, self._tokenizer_2), self._folders, strict=True):
            if not callable(folder):
                tokenizer.get()

    @property
    def denoiser(self) -> FluxTransformer:
        """The transformer, which is what is trained."""
        return self._transformer.get()

    @property
    def vae(self) -> VAE:
        return self._vae.get()

    @property
    def text_encoder(self) -> CLIPTextModel:
        return self._text_encoder.get()

    @property
    def text_encoder_2(self) -> T5Encoder:
        return self._text_encoder_2.get()

    @property
    def tokenizer(self) -> Tokenizer:
        """CLIP's."""
        return self._tokenizer.get()

    @property
    def tokenizer_2(self) -> Tokenizer:
        """T5's."""
        return self._tokenizer_2.get()

    @property
    def tokenizer_folder(self) -> Path:
        return _path(self._folders[0])

    @property
    def tokenizer_2_folder(self) -> Path:
        return _path(self._folders[1])

    @property
    def networks(self) -> Mapping[str, Lazy]:
        """All but the autoencoder, by the name of their folder."""
        parts = self._transformer, self._text_encoder, self._text_encoder_2
        return dict(zip(("transformer", "text_encoder", "text_encoder_2"), parts, strict=True))

    def check(self) -> None:
        """Open every part and look whether all of it fits, without reading its numbers.

        Raises:
            WeightsError: a file is missing or broken, or its tensors are not the network's; all are listed.
        """
        for part in (*self.networks.values(), self._vae):
            part.get()
            part.release()
        self._tokenizer.get()
        self._tokenizer_2.get()

    def quantize(self, bits: int) -> None:
        """Hold the linear layers of the transformer's blocks and of T5 in 4 or 8 bits, from now on."""
        for part in (self._transformer, self._text_encoder_2):
            part.release()  # what was only looked at is quantised when it is loaded again
        name = f"{bits} bits"
        self._transformer.then(lambda module: quantize(module, bits, is_quantized_layer), name)
        self._text_encoder_2.then(lambda module: quantize(module, bits, is_quantized_text_layer), name)

    def recompute_activations(self, on: bool) -> None:
        """Let the transformer's blocks keep their inputs alone in a forward pass, see `FluxTransformer.recompute`."""
        self._transformer.then(partial(_set_recompute, on=on))

    def release(self, *uses: Use) -> None:
        """Forget the text encoders (`prompts`) or the autoencoder (`images`), where they can be loaded again."""
        for use in uses:
            for part in self._serving(use):
                part.release()
        mx.clear_cache()

    def _serving(self, use: Use) -> tuple[Lazy, ...]:
        return (self._vae,) if use == "images" else (self._text_encoder, self._text_encoder_2)

    def encoder_identity(self, use: Use) -> str:
        """Weights, precision and tokenizers. Of weights that are not loaded, little is read and nothing quantised."""
        if use == "images":
            return self._vae.identity(lambda vae: f"{_weights(vae.network)} {vae.config.to_dict()}")
        networks = [part.identity(_weights) for part in (self._text_encoder, self._text_encoder_2)]
        return " ".join([*networks, _files_of(self.tokenizer_folder), _files_of(self.tokenizer_2_folder)])

    def outline(self) -> nn.Module:
        """The transformer if it is there; else its layers, with weights that nobody computes."""
        return self._transformer.loaded or FluxTransformer(self._transformer.config)


def _set_recompute(module: FluxTransformer, *, on: bool) -> None:
    module.recompute = on


def _weights(module: nn.Module) -> str:
    """Hash of a network's weights, and their dtypes."""
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    return " ".join([weights_hash(module), ", ".join(sorted({str(array.dtype) for array in parameters.values()}))])


def _files_of(folder: Path) -> str:
    """Hash of the contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _path(folder: Folder) -> Path:
    return folder() if callable(folder) else Path(folder)


def _open_tokenizer(folder: Folder) -> Tokenizer:
    return load_tokenizer(_path(folder))
