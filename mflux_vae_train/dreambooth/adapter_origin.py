"""Where an adapter comes from: the settings of the run whose folder holds its file, and the model that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mflux_vae_train.dreambooth.run_folder import read_settings, run_of
from mflux_vae_train.lora import metadata


def run_settings(file: Path) -> Mapping[str, Any]:
    """All settings of the run whose folder, or checkpoint, holds a file; empty if none does.

    Raises:
        SettingsError: they cannot be read.
    """
    root = run_of(file)
    return {} if root is None else read_settings(root)


def base_model(file: Path, *, opens: bool = False) -> str | None:
    """Model that an adapter is for, by its run or as files state it; None if none does.

    Args:
        opens: only what may be a value of ``--model``, unlike names in a file's metadata.
    """
    if model := run_settings(file).get("model"):
        return str(model)
    named = metadata.base_model(file)
    return None if named is None or (opens and named[0] == "metadata") else named[1]
