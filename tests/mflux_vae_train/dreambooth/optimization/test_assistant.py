"""An assistant: like other base weights in training, like none elsewhere."""

from __future__ import annotations

import logging

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.weights.formats.files import open_weights, write_safetensors
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.lora import assistant
from mflux_vae_train.lora.layers import bases
from mflux_vae_train.pipelines.gradient_checkpointing import checkpointed
from mflux_vae_train.pipelines.quantization import quantize
from tests.contracts.fake import FakePipeline

PATHS = ("blocks.0.to_out", "proj_in")
RANK, ALPHA = 2, 1.0


def matrices(path: str, network: nn.Module) -> dict[str, mx.array]:
    outputs, inputs = bases(network)[path].weight.shape
    keys = mx.random.split(mx.random.key(outputs), 2)
    a, b = mx.random.normal((RANK, inputs), key=keys[0]), mx.random.normal((outputs, RANK), key=keys[1])
    return {f"{path}.lora_A.weight": 0.3 * a, f"{path}.lora_B.weight": 0.3 * b}


@pytest.fixture
def file(tmp_path):
    tensors = {}
    for path in PATHS:
        tensors |= {f"diffusion_model.{key}": value for key, value in matrices(path, FakePipeline().denoiser).items()}
        tensors[f"diffusion_model.{path}.alpha"] = mx.array(ALPHA)
    write_safetensors(tmp_path / "assistant.safetensors", tensors, {})
    return tmp_path / "assistant.safetensors"


def assisted_by_weights(pipeline: FakePipeline) -> FakePipeline:
    """The assistant in the weights."""
    for path in PATHS:
        a, b = matrices(path, pipeline.denoiser).values()
        layer = bases(pipeline.denoiser)[path]
        layer.weight = layer.weight + ALPHA / RANK * b @ a
    return pipeline


def run(short_run, pipeline: FakePipeline, name: str, **changes) -> dict[str, np.ndarray]:
    settings = {"prior_preservation": "none", "max_train_steps": 4, "rank": 2, "num_validation_images": 0} | changes
    result = DreamBooth(pipeline).train(short_run(output_dir=name, **settings)).result
    return {key: np.array(stored.load()) for key, stored in open_weights(result)[0].items()}


@pytest.mark.parametrize("changes", [{}, {"prior_preservation": "dop", "class_prompt": "a dog"}], ids=["none", "dop"])
def test_training_is_that_of_a_base_with_the_assistant_in_its_weights(short_run, tmp_path, file, changes) -> None:
    pipeline, merged = FakePipeline(), assisted_by_weights(FakePipeline())
    expected = run(short_run, merged, str(tmp_path / "merged"), **changes)
    found = run(short_run, pipeline, str(tmp_path / "assisted"), assistant_lora=str(file), **changes)
    assert found.keys() == expected.keys(), "the assistant is not exported"
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-5)
    plain = run(short_run, FakePipeline(), str(tmp_path / "plain"), **changes)
    assert any(np.abs(plain[key] - found[key]).max() > 1e-3 for key in plain)


def test_previews_fused_weights_and_the_pipeline_afterwards_are_without_it(short_run, tmp_path, file) -> None:
    drawn = []

    class Watched(FakePipeline):
        def sample(self, conditioning, **options):
            drawn.append(any(isinstance(layer, assistant.Assisted) for layer in bases(self.denoiser).values()))
            return super().sample(conditioning, **options)

    pipeline = Watched()
    before = {path: layer.weight for path, layer in bases(pipeline.denoiser).items()}
    adapter = run(short_run, pipeline, str(tmp_path / "out"), assistant_lora=str(file), num_validation_images=1)
    assert len(drawn) >= 2 and not any(drawn)
    assert all(mx.array_equal(layer.weight, before[path]) for path, layer in bases(pipeline.denoiser).items())
    lora.fuse(pipeline.denoiser)
    path = PATHS[0]
    a, b = (adapter[f"transformer.{path}.lora_{letter}.weight"] for letter in "AB")
    fused = np.array(bases(pipeline.denoiser)[path].weight)
    np.testing.assert_allclose(fused, np.array(before[path]) + b @ a, rtol=1e-5, atol=1e-6)


def test_an_interrupted_run_continues_to_the_same_adapter(short_run, tmp_path, file) -> None:
    whole = run(short_run, FakePipeline(), str(tmp_path / "whole"), assistant_lora=str(file))
    options = {"assistant_lora": str(file), "checkpointing_steps": 1}

    def stop(progress) -> None:
        if progress.update == 2:
            raise RuntimeError("stop")

    settings = {"prior_preservation": "none", "max_train_steps": 4, "rank": 2, "output_dir": str(tmp_path / "parts")}
    with pytest.raises(RuntimeError):
        DreamBooth(FakePipeline()).train(short_run(**settings | options), stop)
    with pytest.raises(SettingsError, match="assistant"):
        DreamBooth(FakePipeline()).train(short_run(**settings))
    parts = run(short_run, FakePipeline(), str(tmp_path / "parts"), **options)
    assert all(np.array_equal(parts[key], whole[key]) for key in whole)


@pytest.mark.parametrize("bits", [None, 4])
def test_layers_of_any_kind_are_assisted_within_checkpointed_blocks(bits: int | None) -> None:
    block = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32))
    if bits:
        quantize(block, bits, bool)
    lora.add_lora(block, ["layers.1"], rank=2)
    a, b = mx.random.normal((3, 64), key=mx.random.key(0)), mx.random.normal((64, 3), key=mx.random.key(1))
    tensors = {"layers.0.lora_A.weight": a, "layers.0.lora_B.weight": b}
    adapter = lora.Adapter(tensors=tensors, ranks={"layers.0": 3}, alphas={"layers.0": 6.0}, dora=False, unstated=0)
    x = mx.random.normal((5, 64), key=mx.random.key(2))
    names = dict(tree_flatten(block.parameters())).keys()
    first = block.layers[0]
    plain = block(x)
    with lora.assisted(block, adapter):
        assert dict(tree_flatten(block.parameters())).keys() == names
        hidden = first(x)
        gradient = mx.grad(lambda x: checkpointed(block, x).sum())(x)
        direct = mx.grad(lambda x: block(x).sum())(x)
        with lora.without_assistant(block):
            assert mx.array_equal(block(x), plain)
        assert not mx.array_equal(block(x), plain)
    np.testing.assert_allclose(hidden, first(x) + 2.0 * (x @ a.T) @ b.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, direct, rtol=1e-5, atol=1e-5)
    assert mx.array_equal(block(x), plain)


def test_what_cannot_assist_is_refused(tmp_path, file, caplog, short_run) -> None:
    with pytest.raises(SettingsError, match="use_dora"):
        DreamBoothSettings(
            model="fake", instance_data_dir="a", instance_prompt="b", use_dora=True, assistant_lora=str(file)
        )
    with pytest.raises(WeightsError, match=r"none\.safetensors"):
        DreamBooth(FakePipeline()).train(short_run(assistant_lora=str(tmp_path / "none.safetensors")))
    with caplog.at_level(logging.INFO):
        DreamBooth(FakePipeline()).train(short_run(assistant_lora="owner/none/a.safetensors", dry_run=True))
    for words in ("not downloaded", "active in training only"):
        assert any(words in record.getMessage() for record in caplog.records)
