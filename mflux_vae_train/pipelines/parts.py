"""Networks and tokenizers of a pipeline: loaded on first use, quantized, fingerprinted, freed and saved.

`PartsPipeline` is the base of pipelines that consist of them.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.pretrained.loading import describe, new_network, open_network
from mflux_vae.pretrained.locate import SCALING, locate, not_downloaded
from mflux_vae.runtime.threads import thread_safe
from mflux_vae.vae import VAE
from mflux_vae_train.fingerprint import weights_hash
from mflux_vae_train.pipelines.capabilities import PromptTokens, Use
from mflux_vae_train.pipelines.loading.folder import copy_files, save_network
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.loading.snapshot import Snapshot
from mflux_vae_train.pipelines.noise import NoiseSampling, Prediction
from mflux_vae_train.pipelines.protocol import Conditioning, Recommended
from mflux_vae_train.pipelines.quantization import quantize
from mflux_vae_train.pipelines.text.prompts import PromptEncoder
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer

logger = logging.getLogger(__name__)


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


class PartsPipeline(ABC):
    """Base of pipelines with an autoencoder and text encoders. Latents are (B, H/8, W/8, C), scaled.

    Args:
        parts: networks and tokenizers; the denoiser's name is `adapter_prefix`.
        prompts: encodes prompts with the text encoders of `parts`.
        snapshot: where parts are downloaded from, if they are.
        base_model: repository of the published model that all parts belong to.
    """

    adapter_prefix: str
    prompts: Any
    configs: Any
    """Dataclass of the parts' configurations, `vae` among them."""

    def __init__(
        self,
        parts: Parts,
        prompts: PromptEncoder,
        recommended: Recommended,
        *,
        name: str,
        snapshot: Snapshot | None = None,
        base_model: str | None = None,
    ) -> None:
        self.parts, self.recommended, self.name, self.base_model = parts, recommended, name, base_model
        self.prompts, self._snapshot = prompts, snapshot
        self._denoiser: Lazy[Any] = parts.networks[self.adapter_prefix]

    @property
    def denoiser(self) -> Any:
        return self._denoiser.get()

    @property
    def vae(self) -> VAE:
        return self.parts.vae.get()

    def replace_vae(self, source: str) -> None:
        """Use another autoencoder, see `open_vae`."""
        vae, config = open_vae(source, self.configs.vae)
        self.parts, self.configs = replace(self.parts, vae=vae), replace(self.configs, vae=config)
        if self._snapshot is not None:
            self._snapshot.skip(["vae"])

    @property
    @abstractmethod
    def dtype(self) -> mx.Dtype:
        """Dtype that the denoiser computes in."""

    @abstractmethod
    def _write(self, folder: Path, dtype: str) -> None:
        """See `save_pretrained`."""

    def save_pretrained(self, folder: str | Path, dtype: str | None = None) -> None:
        """Write a folder in diffusers' layout.

        Args:
            dtype: of the stored weights: float16, bfloat16 or float32; None for bfloat16 if the denoiser computes in
                it, else float16.

        Raises:
            SettingsError: an unknown dtype.
        """
        half = "bfloat16" if self.dtype == mx.bfloat16 else "float16"
        self._write(Path(folder), dtype or half)

    def encode_images(self, pixels: mx.array) -> mx.array:
        """(B, H, W, 3) in [-1, 1] -> latents (B, H/8, W/8, C), the posterior's mode."""
        self._download()
        return self._encode_images(pixels)

    @thread_safe
    def _encode_images(self, pixels: mx.array) -> mx.array:
        return self.vae.encode_nhwc(pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See `PromptEncoder.encode`."""
        self._download()
        return self.prompts.encode(prompts)

    def _download(self) -> None:
        """Download all parts, while other threads may compute; at once if they are there."""
        if self._snapshot is not None:
            self._snapshot()

    def loss(self, latents: mx.array, conditioning: Conditioning, *, key: mx.array, guidance: float) -> mx.array:
        """Weighted squared error at a random noise level, averaged over each sample: (B,) float32."""
        return self.predict(latents, conditioning, key=key, guidance=guidance).loss()

    @abstractmethod
    def predict(
        self,
        latents: mx.array,
        conditioning: Conditioning,
        *,
        key: mx.array,
        guidance: float,
        sampling: NoiseSampling | None = None,
    ) -> Prediction:
        """See `capabilities.SupportsPrediction`."""

    # capabilities.SupportsMemoryControl, without skeleton and footprint

    def release(self, *uses: Use) -> None:
        """See `Parts.release`."""
        self.parts.release(*uses)

    def quantize(self, bits: int) -> None:
        """See `Parts.quantize`."""
        self.parts.quantize(bits)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Keep only the inputs of the denoiser's blocks for the backward pass, which runs the blocks again."""
        self._denoiser.apply(lambda module: setattr(module, "gradient_checkpointing", on))

    # capabilities.SupportsPreviewModel

    def encodes_as(self, other: PartsPipeline, use: Use) -> bool:
        """Whether encodings are equal: by the files that the hub lists, which then are not downloaded, or by hashes."""
        if self.prompts is other.prompts if use == "prompts" else self.parts.vae is other.parts.vae:
            return True
        ours, theirs, folders = self._snapshot, other._snapshot, ["vae"]
        if use == "prompts":
            folders = [*list(self.parts.networks)[1:], *self.parts.tokenizers]
        if ours is None or theirs is None or ours.is_cached() or not ours.lists_same_files(theirs, folders):
            return self.encoder_fingerprint(use) == other.encoder_fingerprint(use)
        settings = [(each.prompts.longest, each.prompts.settings) for each in (self, other)]
        configs = [[getattr(each.configs, folder, None) for folder in folders] for each in (self, other)]
        if configs[0] != configs[1] or (use == "prompts" and settings[0] != settings[1]):
            return False
        ours.skip(folders)
        return True

    def share_encoders(self, other: PartsPipeline, use: Use) -> None:
        """Use the text encoders or the autoencoder of another pipeline, whose encodings are equal."""
        if use == "prompts":
            self.prompts = other.prompts
        else:
            self.parts = replace(self.parts, vae=other.parts.vae)

    def release_denoiser(self) -> None:
        """Free the denoiser, if it can be loaded again."""
        self._denoiser.release()
        mx.clear_cache()

    # capabilities.SupportsNegativePrompt, without reads_negative_prompt

    @property
    def negative_prompt(self) -> str:
        """See `PromptEncoder.negative`."""
        negative: str = self.prompts.negative
        return negative

    @negative_prompt.setter
    def negative_prompt(self, prompt: str) -> None:
        self.prompts.negative = prompt

    # capabilities.SupportsPromptInspection

    def inspect_prompts(
        self, prompts: Sequence[str], *, limit: int | None = None
    ) -> Mapping[str, Sequence[PromptTokens]] | None:
        """See `PromptEncoder.inspect`."""
        if self._snapshot is not None and not self._snapshot.is_cached():
            return None
        return self.prompts.inspect(prompts, limit)

    # capabilities.SupportsEncodingCache

    def encoder_fingerprint(self, use: Use) -> str:
        """Hash of weights and tokenizers, precision, and for prompts the settings of their encoding."""
        fingerprint = self.parts.encoder_fingerprint(use)
        return fingerprint if use == "images" else f"{fingerprint} {self.prompts.fingerprint()}"


def open_vae(source: str, replaces: Mapping[str, Any]) -> tuple[Lazy[VAE], dict[str, Any]]:
    """Open an autoencoder from anything that `VAE.from_pretrained` opens. Its weights are read on first use.

    The scaling of latents that a file does not state is that of the replaced autoencoder.

    Args:
        replaces: configuration of the pipeline's autoencoder.

    Returns:
        the autoencoder and its configuration.

    Raises:
        WeightsError: files are missing, broken, or of an unknown kind.
        SettingsError: it is another kind of network, or its latents have another shape.
    """
    try:
        return _open_vae(source, replaces)
    except (SettingsError, WeightsError) as error:
        raise type(error)(f"--vae {source}: {str(error).removeprefix(f'{source}: ')}") from error


def _open_vae(source: str, replaces: Mapping[str, Any]) -> tuple[Lazy[VAE], dict[str, Any]]:
    config, stated = (found := describe(source)).config, found.assumed is None
    if not stated:
        config = config | {name: replaces[name] for name in SCALING if name in replaces}
    ours, theirs = (VAE(network=new_network(each)) for each in (replaces, config))  # lazy, never computed
    kinds = [(type(one.network).__name__, one.latent_channels, one.spatial_scale) for one in (theirs, ours)]
    if kinds[0] != kinds[1]:
        given, needed = (
            f"{kind} with {count} latent channels at 1/{scale} of the size" for kind, count, scale in kinds
        )
        raise SettingsError(f"holds {given}; the model needs {needed}")
    if theirs.scaling_factor != ours.scaling_factor:
        logger.warning(
            "--vae %s: its latents are scaled by %g, the model's by %g: it may belong to another model",
            *(source, theirs.scaling_factor, ours.scaling_factor),
        )
    stating = None if stated else config
    vae = Lazy(lambda: VAE(network=open_network(source, config=stating)), prepare=lambda: locate(source, stating))
    if not_downloaded(source) is None:
        vae.get()  # compares names and shapes of its tensors
        vae.release()
    else:
        logger.info("--vae %s: downloaded when it is first used", source)
    return vae, config


def _quantize(module: nn.Module, *, bits: int, selects: Callable[[str], bool]) -> None:
    quantize(module, bits, selects)


def _hash_and_dtypes(module: nn.Module) -> str:
    """Hash of a network's weights, and their dtypes."""
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    return " ".join([weights_hash(module), ", ".join(sorted({str(array.dtype) for array in parameters.values()}))])
