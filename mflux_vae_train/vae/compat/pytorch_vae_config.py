"""Settings files in sections, as PyTorch-VAE's training scripts and those modelled on them have (`exp_params`, ...)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mflux_vae.errors import SettingsError

logger = logging.getLogger(__name__)

RECIPE = {"preset": "vanilla-256", "data_kind": "frames"}
"""What such a script does and its file does not say."""

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
"""By section and name there: the setting here, or None where there is none."""

_WITHOUT = {
    "val_batch_size": "validation takes --batch_size",
    "num_workers": "pictures are read ahead by threads",
    "pin_memory": "memory of a Mac is one, and MLX copies by itself",
    "gpus": "MLX takes the one there is; several: mlx.launch",
    "log_every_n_steps": "every update is logged",
}
"""Settings that do nothing here: why."""


def flattened(content: Mapping[Any, Any], where: str) -> Mapping[Any, Any]:
    """The content of a settings file in sections under our names; that of another file as it is.

    Args:
        content: of the file.
        where: begins the messages.

    Raises:
        SettingsError: sections or names that are not known, all of them; two names of one setting with two values;
            another network than `NETWORK`.
    """
    if not any(name in SECTIONS for name in content):
        return content
    given = {
        (section, key): value
        for section, values in content.items()
        for key, value in (values.items() if isinstance(values, Mapping) else [("", values)])
    }
    if unknown := [f"{section}.{key}".rstrip(".") for section, key in given if key not in SECTIONS.get(section, {})]:
        raise SettingsError(f"{where}unknown settings: {', '.join(unknown)}; --help lists the settings there are")
    if (network := content.get("model_params", {}).get("name", NETWORK)) != NETWORK:
        raise SettingsError(f"{where}model_params.name is {network!r}; {NETWORK} is allowed")
    found: dict[str, Any] = dict(RECIPE)
    told: dict[str, str] = {}
    for (section, key), value in given.items():
        name = SECTIONS[section][key]
        if name is None:
            if key in _WITHOUT:
                logger.warning("%s.%s has no effect: %s", section, key, _WITHOUT[key])
            continue
        if name in told and found[name] != value:
            raise SettingsError(
                f"{where}{told[name]} is {found[name]} and {section}.{key} {value}: they are one setting"
            )
        found[name], told[name] = value, f"{section}.{key}"
    return found
