"""The settings files that mflux ships as examples are read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.pipelines.mflux.train_json import translate
from mflux_vae_train.settings.flags import settings_from

pytestmark = pytest.mark.parity
pytest.importorskip("mflux", reason="extra `mflux` is not installed")


def test_examples_of_mflux() -> None:
    spec = find_spec("mflux.models.common.training")
    assert spec is not None and spec.submodule_search_locations
    files = sorted(Path(spec.submodule_search_locations[0], "_example").glob("*.json"))
    assert files
    for file in files:
        settings = settings_from(
            DreamBoothSettings, ["--config", str(file), "--instance_prompt", "a photo of sks dog"], translate=translate
        )
        assert settings.num_train_epochs and settings.rank == 16 and settings.lora_layers
