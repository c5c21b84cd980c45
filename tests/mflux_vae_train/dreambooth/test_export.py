"""Adapter options, and exports: kohya's naming, fused pipeline, model card."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.weights.formats.files import read_safetensors
from mflux_vae_train import lora
from mflux_vae_train.dreambooth import train
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.export import FUSED, KOHYA, save_fused
from mflux_vae_train.dreambooth.reporting.previews import Previews
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from tests.contracts.fake import FakePipeline
from tests.mflux_vae_train.dreambooth.runs.test_train import Stop, assert_equal_adapters, interrupted_after
from tests.mflux_vae_train.pipelines.flux1.small_flux import RECOMMENDED, small_pipeline

ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture
def settings(instance_dir, tmp_path):
    """Settings of a run of four updates without previews; keyword arguments change them."""

    def make(out="out", **changes) -> DreamBoothSettings:
        given = {
            "model": "fake",
            "instance_data_dir": str(instance_dir),
            "instance_prompt": "a photo of sks dog",
            "output_dir": str(tmp_path / out),
            "max_train_steps": 4,
            "lr_warmup_steps": 0,
            "prior_preservation": "none",
            "num_validation_images": 0,
            "gradient_accumulation_steps": 1,
        }
        return DreamBoothSettings(**{**given, **changes})

    return make


def adapted(pipeline):
    return sorted(lora.layers(pipeline.denoiser))


def test_lora_layers_accepts_names_and_patterns(settings):
    DreamBooth(named := FakePipeline()).train(settings("named", lora_layers="to_out"))
    assert adapted(named) == ["blocks.0.to_out"]
    DreamBooth(every := FakePipeline()).train(settings("every", lora_layers="all"))
    assert set(adapted(every)) == {"blocks.0.to_out", "proj_in", "proj_out"}
    DreamBooth(both := FakePipeline()).train(settings("both", lora_layers="to_out, proj_*"))
    assert adapted(both) == ["blocks.0.to_out", "proj_in", "proj_out"]
    with pytest.raises(SettingsError, match="no linear layer matches to_q"):
        DreamBooth(FakePipeline()).train(settings("nothing", lora_layers="to_out,to_q"))
    with pytest.raises(SettingsError, match="fake has all"):
        DreamBooth(FakePipeline()).train(settings("preset", lora_layers="attention"))


def test_lora_layers_accepts_presets_of_the_pipeline(settings, tmp_path):
    pipeline = small_pipeline(tmp_path, recommended=RECOMMENDED)
    DreamBooth(pipeline).train(settings(lora_layers="attention", max_train_steps=1))
    assert adapted(pipeline) and all(".attn." in path for path in adapted(pipeline))


def test_training_starts_from_an_adapter(settings, tmp_path):
    first = DreamBooth(before := FakePipeline()).train(settings("first", rank=3, lora_alpha=6.0)).result
    start = str(first)
    DreamBooth(after := FakePipeline()).train(settings("second", lora_weights=start, learning_rate=1e-6))
    for path, layer in lora.layers(after.denoiser).items():
        other = lora.layers(before.denoiser)[path]
        assert layer.scale == other.scale == 2.0 and layer.lora_a.shape[1] == 3
        np.testing.assert_allclose(layer.lora_b, other.lora_b, atol=1e-4)
        assert not mx.array_equal(layer.lora_b, other.lora_b)
    DreamBooth(FakePipeline()).train(settings("folder", lora_weights=str(Path(start).parent), max_train_steps=1))
    with pytest.raises(WeightsError, match="holds no adapter"):
        DreamBooth(FakePipeline()).train(settings("third", lora_weights=str(tmp_path)))
    with pytest.raises(SettingsError, match=r"--rank is 5.*has 3"):
        DreamBooth(FakePipeline()).train(settings("third", lora_weights=start, rank=5))
    with pytest.raises(SettingsError, match="--lora_layers"):
        settings("third", lora_weights=start, lora_layers="all")
    with pytest.raises(WeightsError, match="no such"):
        DreamBooth(FakePipeline()).train(settings("third", lora_weights=str(tmp_path / "none.safetensors")))
    # another adapter in the same file is another run
    assert DreamBooth(FakePipeline()).train(settings("second", lora_weights=start, learning_rate=1e-6)).updates == 0
    DreamBooth(FakePipeline()).train(settings("other", rank=3, lora_alpha=6.0, seed=1))
    shutil.copy(tmp_path / "other" / ADAPTER, first)
    with pytest.raises(SettingsError, match="adapter to start from"):
        DreamBooth(FakePipeline()).train(settings("second", lora_weights=start, learning_rate=1e-6))


@pytest.mark.parametrize("changes", [{"optimizer": "prodigy"}, {"optimizer": "adamw8bit"}, {"use_dora": True}])
def test_interrupted_equals_uninterrupted(changes, settings, tmp_path, monkeypatch):
    given = {"checkpointing_steps": 2, "lora_dropout": 0.2, **changes}
    DreamBooth(FakePipeline()).train(settings("whole", **given))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        interrupted_after(2, patch)
        DreamBooth(FakePipeline()).train(settings("halves", **given))
    assert DreamBooth(FakePipeline()).train(settings("halves", **given)).updates == 2
    assert_equal_adapters(tmp_path / "whole", tmp_path / "halves")


def test_exports_for_other_programs(settings, tmp_path, monkeypatch):
    references, held = [], []

    class Watched(train.Step):
        def __init__(self, model, optimizer, *arguments, **named) -> None:
            super().__init__(model, optimizer, *arguments, **named)
            references.extend(weakref.ref(one) for one in (self, optimizer))

    def fuse(*arguments):
        held.extend(reference() for reference in references)
        return save_fused(*arguments)

    monkeypatch.setattr(train, "Step", Watched)
    monkeypatch.setattr(train, "save_fused", fuse)
    given = {"output_kohya_format": True, "fuse": True, "num_validation_images": 1, "resolution": 32}
    pipeline = small_pipeline(tmp_path / "parts", recommended=RECOMMENDED)
    base = dict(tree_flatten(small_pipeline(tmp_path / "parts").denoiser.parameters()))
    out = DreamBooth(pipeline).train(settings(**given, learning_rate=3e-2)).result.parent

    # fused pipeline: base weights plus adapter
    tensors, _ = read_safetensors(out / ADAPTER)
    fused = dict(tree_flatten(FluxPipeline.from_pretrained(out / FUSED).denoiser.parameters()))
    moved = {}
    for name in (key for key in base if f"transformer.{key.removesuffix('.weight')}.lora_A.weight" in tensors):
        a, b = (tensors[f"transformer.{name.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
        np.testing.assert_allclose(fused[name], base[name] + b @ a, atol=2e-3)  # half precision on disk
        moved[name] = float(mx.abs(b @ a).max())
    assert len(moved) == len(tensors) // 2 and max(moved.values()) > 2e-2
    assert not adapted(pipeline), "the adapter is in the weights, and would count twice"

    assert held == [None, None], "the step would hold the weights before fusing, the optimizer its state"

    # kohya's naming
    tensors, metadata = read_safetensors(out / KOHYA)
    kept, _ = read_safetensors(out / "checkpoint-4" / KOHYA)
    assert kept.keys() == tensors.keys() and all(mx.array_equal(array, tensors[name]) for name, array in kept.items())
    assert {key.rpartition("_0_")[0] for key in tensors if "_0_" in key} == {
        "lora_unet_double_blocks",
        "lora_unet_single_blocks",
    }
    assert metadata["modelspec.architecture"] == "flux-1-schnell/lora" and metadata["ss_network_dim"] == "4"
    assert metadata["modelspec.trigger_phrase"] == "a photo of sks dog"

    # model card
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["instance_prompt"] == "a photo of sks dog" and {"lora", "text-to-image"} <= set(front["tags"])
    assert "license" not in front and "base_model" not in front
    picture = front["widget"][-1]["output"]["url"]
    assert picture == "samples/step-00004.png" and (out / picture).is_file() and f"]({picture})" in text
    for words in ("load_lora_weights", "mflux-generate", KOHYA, f"`{FUSED}/`", "| rank | 4 |"):
        assert words in text


def test_model_card_names_base_model_and_programs(settings, tmp_path):
    base_model = "black-forest-labs/FLUX.1-schnell"
    pipeline = small_pipeline(tmp_path / "parts", recommended=RECOMMENDED, base_model=base_model)
    (tmp_path / "mine").mkdir()
    changes = {"use_dora": True, "vae": str(tmp_path / "mine")}
    out = DreamBooth(pipeline).train(settings(max_train_steps=1, **changes)).result.parent
    text = (out / "README.md").read_text()
    assert "| vae | mine |" in text and str(tmp_path) not in text
    assert "dora" in yaml.safe_load(text.split("---")[1])["tags"]
    assert "load_lora_weights" in text and "mflux reads no DoRA" in text and "mflux-generate" not in text
    assert yaml.safe_load(text.split("---")[1])["base_model"] == base_model
    assert f"https://huggingface.co/{base_model}" in text


def test_adapter_is_saved_before_the_last_preview(settings, tmp_path, monkeypatch):
    there = {}

    def look(self, updates):
        there[updates] = (tmp_path / "out" / ADAPTER).exists()

    monkeypatch.setattr(Previews, "__call__", look)
    DreamBooth(FakePipeline()).train(settings(num_validation_images=1, validation_steps=4))
    assert there == {0: False, 4: True}


def test_unsupported_exports_are_refused_early(settings):
    with pytest.raises(SettingsError, match="cannot save itself"):
        DreamBooth(FakePipeline()).train(settings(fuse=True))
    with pytest.raises(SettingsError, match="does not know the names"):
        DreamBooth(FakePipeline()).train(settings(output_kohya_format=True))
    for given in ({"fuse": True}, {"use_dora": True}, {"lora_layers": "all"}, {"output_kohya_format": True}):
        with pytest.raises(SettingsError, match="only with --train_mode lora"):
            settings(train_mode="full", **given)


class Published(FakePipeline):
    """A fake pipeline whose model is also published as one file."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()

    def save_single_file(self, file: Path) -> None:
        mx.save_safetensors(str(file), dict(tree_flatten(self.denoiser.parameters())))


def test_a_whole_model_in_one_file(settings):
    for given, name in (({"fuse": True}, "fused"), ({"train_mode": "full"}, "pipeline")):
        pipeline = Published()
        out = DreamBooth(pipeline).train(settings(name, fuse_single_file=True, **given)).result.parent
        tensors, _ = read_safetensors(out / f"{name}.safetensors")
        trained = dict(tree_flatten(pipeline.denoiser.parameters()))
        assert (out / name).is_dir() and tensors.keys() == trained.keys()
        assert all(mx.array_equal(tensors[key], value) for key, value in trained.items())
        assert f"`{name}.safetensors`" in (out / "README.md").read_text()


def test_one_file_without_a_whole_model_is_refused(settings):
    with pytest.raises(SettingsError, match="give --fuse"):
        DreamBooth(Published()).train(settings(fuse_single_file=True))
    with pytest.raises(SettingsError, match="fuse_single_file"):
        DreamBooth(FakePipeline()).train(settings(train_mode="full", fuse_single_file=True))


def test_fusing_into_a_quantized_model_is_refused(settings, tmp_path):
    pipeline = small_pipeline(tmp_path, recommended=RECOMMENDED)
    pipeline.quantize(8)
    with pytest.raises(SettingsError, match="quantized"):
        DreamBooth(pipeline).train(settings(fuse=True))


def test_layers_without_a_kohya_name_are_refused(settings, tmp_path):
    pipeline = small_pipeline(tmp_path, recommended=RECOMMENDED)
    with pytest.raises(SettingsError, match="no names for context_embedder"):
        DreamBooth(pipeline).train(settings(output_kohya_format=True, lora_layers="all"))
