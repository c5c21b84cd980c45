"""What an adapter is: its layers in groups, and how much they change."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mflux_vae.weights.formats.files import open_weights
from mflux_vae_train.lora.editing.adapter import AdapterFile
from mflux_vae_train.lora.editing.low_rank import energy
from mflux_vae_train.lora.from_checkpoint import is_checkpoint
from mflux_vae_train.lora.layers import LayerChange

_DIALECTS = {
    r"\.lora_(down|up)\.": "kohya",
    r"\.processor\.|\.lora\.(down|up)\.|\.lora_linear_layer\.|_lora\.(down|up)\.": "diffusers before PEFT",
    r"\.lora_[ab]$": "MLX",
    r"\.lora_[AB]": "PEFT",
}
"""Spelling of keys, by a pattern of one of them."""

_KOHYA_NETWORK = re.compile(r"lora_(unet|transformer|te\d?)_")
_TRANSFORMER_BLOCKS = ("double_blocks", "single_blocks", "layers", "noise_refiner", "context_refiner")

TRAINING = (
    *("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture", "ss_network_module", "ss_network_args"),
    *("ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr", "ss_optimizer", "ss_lr_scheduler", "ss_lr_warmup_steps"),
    *("ss_max_train_steps", "ss_steps", "ss_num_epochs", "ss_epoch", "ss_num_train_images", "ss_resolution"),
    *("ss_batch_size_per_device", "ss_total_batch_size", "ss_gradient_accumulation_steps", "ss_seed", "ss_clip_skip"),
    *("ss_output_name", "modelspec.title", "modelspec.trigger_phrase", "modelspec.resolution", "adapter_edit"),
)
"""Keys of a file's metadata that tell how it was trained."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers whose names differ in numbers alone.

    Attributes:
        network: they belong to; "" where their names do not tell.
        name: without the network, with * for numbers.
        ranks, alphas: number of layers by value.
        norm: of scale B A of all its layers together, without magnitudes.
        unchanged: number of layers whose scale B A is zero.
    """

    network: str
    name: str
    layers: int
    convolutions: int
    parameters: int
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    norm: float
    unchanged: int


def groups(adapter: AdapterFile) -> list[Group]:
    """The groups, in order of their names."""
    members: dict[tuple[str, str], list[LayerChange]] = {}
    for prefix, changes in adapter.changes.items():
        for path in sorted(changes):
            network, rest = (prefix, path) if prefix else _network(path)
            pattern = re.sub(r"(?<![a-z])\d+(?![a-z])", "*", rest)
            members.setdefault((network, pattern), []).append(changes[path])
    return [_group(*names, changes) for names, changes in members.items()]


def _network(name: str) -> tuple[str, str]:
    """Network of a layer by its name in a file, and the rest of the name."""
    match = _KOHYA_NETWORK.match(name)
    if match is None:
        return "", name
    rest = name[match.end() :]
    # files for transformers begin with lora_unet, too
    return "denoiser" if match[1] == "unet" and rest.startswith(_TRANSFORMER_BLOCKS) else match[1], rest


def _group(network: str, name: str, changes: Sequence[LayerChange]) -> Group:
    energies = [energy(change) for change in changes]
    return Group(
        network=network,
        name=name,
        layers=len(changes),
        convolutions=sum(change.kernel is not None for change in changes),
        parameters=sum(change.a.size + change.b.size for change in changes),
        ranks=dict(sorted(Counter(change.rank for change in changes).items())),
        alphas=dict(sorted(Counter(round(change.alpha, 6) for change in changes).items())),
        norm=math.sqrt(sum(energies)),
        unchanged=energies.count(0.0),
    )


def dialect(path: Path) -> str:
    """Whose spelling a file's keys have."""
    if is_checkpoint(path):
        return "a checkpoint of a run"
    keys = [*open_weights(path)[0]]
    return next(
        (name for pattern, name in _DIALECTS.items() if any(re.search(pattern, key) for key in keys)), "another"
    )


def training(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file's metadata states about its training."""
    return {key: metadata[key] for key in TRAINING if metadata.get(key, "None") not in ("None", "")}
