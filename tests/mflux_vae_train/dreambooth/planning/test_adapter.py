"""Adapters of other programs as the start of a run: what is assumed is said, and ranks of single layers are kept."""

from __future__ import annotations

import json
import logging
import shutil

import mlx.core as mx
import pytest

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.lora.layers import bases
from tests.contracts.fake import FakePipeline

RANKS = {"blocks.0.to_out": 4, "proj_in": 2, "proj_out": 2}


def file(folder, ranks=RANKS, metadata=None, name="start.safetensors"):
    """An adapter of the fake pipeline without prefixes."""
    tensors = {}
    for path, layer in bases(FakePipeline().denoiser).items():
        outputs, inputs = layer.weight.shape
        tensors[f"{path}.lora_A.weight"] = 0.1 * mx.ones((ranks[path], inputs))
        tensors[f"{path}.lora_B.weight"] = 0.1 * mx.ones((outputs, ranks[path]))
    write_safetensors(folder / name, tensors, metadata or {})
    return str(folder / name)


@pytest.fixture
def train(short_run, caplog):
    """Trains the fake pipeline from a file; returns the pipeline and the warnings."""

    def run(path, **changes):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pipeline = FakePipeline()
            changes = {"prior_preservation": "none", "learning_rate": 1e-6, "gradient_accumulation_steps": 1} | changes
            DreamBooth(pipeline).train(short_run(lora_weights=path, max_train_steps=2, **changes))
        return pipeline, [record.getMessage() for record in caplog.records]

    return run


def assert_same_adapter(folder):
    """The adapter that a checkpoint holds for other programs is that of its state."""
    networks = {"transformer": FakePipeline().denoiser}
    file = lora.adapter_file(folder)
    one, other = (lora.read_adapter(path, networks)["transformer"] for path in (file, folder / "state.safetensors"))
    assert file.name == "pytorch_lora_weights.safetensors" and one.tensors.keys() == other.tensors.keys()
    assert all(mx.array_equal(array, other.tensors[name]) for name, array in one.tensors.items())
    assert (one.ranks, one.alphas, one.dora, one.unstated) == (other.ranks, other.alphas, other.dora, other.unstated)


def scales(pipeline):
    return {path: layer.scale for path, layer in lora.layers(pipeline.denoiser).items()}


@pytest.mark.parametrize("dry_run", [False, True])
def test_alpha_that_nothing_states_is_a_warning(train, tmp_path, dry_run):
    pipeline, warnings = train(file(tmp_path), dry_run=dry_run)
    assert sum("alpha is not stated" in line for line in warnings) == 1
    assert dry_run or scales(pipeline) == dict.fromkeys(RANKS, 1.0)


def test_alpha_can_be_given_where_nothing_states_it(train, tmp_path):
    pipeline, warnings = train(file(tmp_path), lora_alpha=4.0)
    assert scales(pipeline) == dict.fromkeys(RANKS, 2.0) and not any("alpha is not" in line for line in warnings)
    with pytest.raises(SettingsError, match=r"--lora_alpha is 3.*has 8"):
        train(file(tmp_path, metadata={"lora_alpha": "8"}), lora_alpha=3.0)


def test_ranks_of_single_layers_are_trained_resumed_and_saved(train, tmp_path):
    start = file(tmp_path, metadata={"lora_alpha": "4"})
    pipeline, warnings = train(start, checkpointing_steps=1, output_kohya_format=False)
    assert not any("alpha is not" in line for line in warnings)
    assert {path: layer.lora_a.shape[1] for path, layer in lora.layers(pipeline.denoiser).items()} == RANKS
    assert scales(pipeline) == {path: 4 / rank for path, rank in RANKS.items()}
    result = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    whole = result.read_bytes()
    read = lora.read_adapter(result, {"transformer": FakePipeline().denoiser})["transformer"]
    assert read.ranks == RANKS and set(read.alphas.values()) == {4.0}
    result.unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    train(start, checkpointing_steps=1)
    assert result.read_bytes() == whole, "continued after update 1"
    assert_same_adapter(tmp_path / "out" / "checkpoint-2")
    state = tmp_path / "out" / "checkpoint-2" / "state.safetensors"
    again, _ = train(str(state), output_dir=str(tmp_path / "from checkpoint"))
    assert scales(again) == scales(pipeline)


def test_alphas_of_single_layers_are_known_from_a_checkpoint(train, tmp_path):
    patterns = {"lora_alpha": 2, "alpha_pattern": {"proj_in": 0.3}}
    start = file(tmp_path, dict.fromkeys(RANKS, 2), {lora.METADATA_KEY: json.dumps(patterns)})
    pipeline, _ = train(start)
    assert scales(pipeline) == {"blocks.0.to_out": 1.0, "proj_in": 0.15, "proj_out": 1.0}
    assert_same_adapter(tmp_path / "out" / "checkpoint-2")
    state = tmp_path / "out" / "checkpoint-2" / "state.safetensors"
    again, _ = train(str(state), output_dir=str(tmp_path / "from checkpoint"))
    assert scales(again) == scales(pipeline)


def test_a_folder_of_peft_is_where_training_begins(train, tmp_path):
    (folder := tmp_path / "peft").mkdir()
    file(folder, name="adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "rank_pattern": {"to_out": 4}, "lora_alpha": 2, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pipeline, _ = train(str(folder))
    assert scales(pipeline) == pytest.approx({path: 2 / rank**0.5 for path, rank in RANKS.items()})
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "all"}))
    with pytest.raises(WeightsError, match="bias"):
        train(str(folder))
