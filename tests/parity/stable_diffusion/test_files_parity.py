"""diffusers opens the folders and single files written here, with the same weights, and its adapters are read here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
diffusers = pytest.importorskip("diffusers")

from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae.weights.keymaps.diffusers import SAME_NAMES  # noqa: E402
from mflux_vae.weights.keymaps.rules import from_mlx  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.files import folder  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.files.single_file import write_single_file  # noqa: E402
from tests.mflux_vae_train.pipelines.stable_diffusion.files.small_models import (  # noqa: E402
    small_configs,
    small_parts,
)


def assert_same_weights(pipeline: Any, parts: Any) -> None:
    ours = {name: part.get() for name, part in parts.networks.items()} | {"vae": parts.vae.get().network}
    for name, network in ours.items():
        expected = from_mlx(dict(tree_flatten(network.parameters())), SAME_NAMES)
        found = getattr(pipeline, name).state_dict()
        if "text_model.final_layer_norm.bias" not in found:  # transformers 5
            expected = {key.removeprefix("text_model."): value for key, value in expected.items()}
        assert found.keys() == expected.keys(), name
        assert all(np.array_equal(found[key].float().numpy(), expected[key]) for key in expected), name


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_diffusers_opens_a_folder_and_a_single_file(kind: str, tmp_path: Path) -> None:
    configs = small_configs(kind, positions=77)
    parts = small_parts(configs, tmp_path / "tokenizers")
    folder.write(parts, configs, tmp_path / "folder", "float32")
    write_single_file(tmp_path / "a.safetensors", parts, configs, dtype="float32")
    cls = getattr(diffusers, configs.class_name)
    pipeline = cls.from_pretrained(tmp_path / "folder")
    assert_same_weights(pipeline, parts)
    schedule = pipeline.scheduler.config
    assert (schedule.prediction_type, schedule.beta_end) == (configs.schedule.prediction_type, 0.012)
    single = cls.from_single_file(str(tmp_path / "a.safetensors"), config=str(tmp_path / "folder"))
    assert_same_weights(single, parts)
