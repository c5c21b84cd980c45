"""Nested settings files of PyTorch-VAE and similar projects (`model_params`, `exp_params`, ...)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae.utils.formatting import first_few
from mflux_vae.utils.text_files import Table

logger = logging.getLogger(__name__)

DEFAULTS = {"preset": "vanilla-256", "data_kind": "frames"}
"""Settings that such scripts hard-code."""

NETWORK = "VanillaVAE"

SECTIONS: Mapping[str, Mapping[str, str | None]] = {
    "model_params": {
        "name": None,
        "in_channels": "in_channels",
        "hidden_dims": "hidden_dims",
        "latent_dim": "latent_dim",
        "image_size": "image_size",
    },
    "data_params": {
        "data_path": "data",
        "image_size": "image_size",
        "train_batch_size": "batch_size",
        "val_batch_size": None,
        "num_workers": None,
        "pin_memory": None,
    },
    "exp_params": {
        "LR": "learning_rate",
        "weight_decay": "weight_decay",
        "scheduler_gamma": "lr_gamma",
        "kld_weight": "beta",
        "max_grad_norm": "max_grad_norm",
    },
    "trainer_params": {
        "gpus": None,
        "max_epochs": "num_epochs",
        "gradient_clip_val": "max_grad_norm",
        "check_val_every_n_epoch": "val_every",
        "log_every_n_steps": None,
    },
    "logging_params": {
        "save_dir": "output_dir",
        "name": "experiment_name",
        "save_every_n_steps": "save_every_n_steps",
        "log_images_every_n_steps": "log_images_every_n_steps",
    },
}
"""Section -> name -> field of `VAETrainingSettings`, or None if there is no counterpart."""

_IGNORED = {
    "val_batch_size": "validation uses --batch_size",
    "num_workers": "images are prefetched by threads",
    "pin_memory": "MLX manages memory itself",
    "gpus": "use mlx.launch for several devices",
    "log_every_n_steps": "every update is logged",
}
"""Ignored settings -> reason."""


def flatten_sections(content: Mapping[Any, Any], path: Path) -> Mapping[Any, Any]:
    """Translate a nested settings file to field names; other files are returned unchanged.

    Args:
        content: content of the file.
        path: the file, for messages.

    Raises:
        SettingsError: unknown sections or names (all are listed), contradicting values, or another network than
            `NETWORK`.
    """
    if not any(name in SECTIONS for name in content):
        return content
    flat = {
        (section, key): value
        for section, values in content.items()
        for key, value in (values.items() if isinstance(values, Mapping) else [("", values)])
    }
    if unknown := [f"{section}.{key}".rstrip(".") for section, key in flat if key not in SECTIONS.get(section, {})]:
        raise SettingsError(f"{path}: unknown settings: {first_few(unknown)}; see --help")
    if (network := content.get("model_params", {}).get("name", NETWORK)) != NETWORK:
        raise SettingsError(f"{path}: model_params.name is {network!r}; {NETWORK} is allowed")
    found = Table(DEFAULTS)
    sources: dict[str, str] = {}
    for (section, key), value in flat.items():
        name = SECTIONS[section][key]
        if name is None:
            if key in _IGNORED:
                logger.warning("%s.%s has no effect: %s", section, key, _IGNORED[key])
            continue
        if name in sources and found[name] != value:
            raise SettingsError(
                f"{path}: {sources[name]} is {found[name]} and {section}.{key} is {value}; give only one"
            )
        found[name], sources[name] = value, f"{section}.{key}"
        if isinstance(table := content[section], Table) and key in table.lines:
            found.lines[name] = table.lines[key]
    return found
