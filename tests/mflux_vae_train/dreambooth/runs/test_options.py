"""Runs with all options of crops, captions, masks, concepts and prior preservation."""

from __future__ import annotations

import logging
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.images import save_image
from mflux_vae_train.dreambooth.config import Concept
from mflux_vae_train.dreambooth.data.dataset import load_dataset
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines.registry import open_pipeline
from mflux_vae_train.training import loop
from mflux_vae_train.training.hooks import read_metrics
from tests.contracts.fake import FakePipeline


@pytest.fixture
def settings(short_run, instance_dir):
    """A short run on images of three shapes, one with a mask, one with a caption."""
    rng = np.random.default_rng(0)
    for index, size in enumerate([(16, 40), (16, 40), (40, 16), (24, 20)]):
        save_image(instance_dir / f"other-{index}.png", rng.integers(0, 255, (*size, 3), dtype=np.uint8))
    save_image(instance_dir / "other-2-mask.png", np.tile(np.linspace(0, 255, 16, dtype=np.uint8), (40, 1))[..., None])
    (instance_dir / "other-3.txt").write_text("sks dog, small")
    return lambda **changes: short_run(**{"num_class_images": 3, "gradient_accumulation_steps": 4, **changes})


EVERYTHING = {
    "use_aspect_ratio_buckets": True,
    "random_flip": True,
    "center_crop": False,
    "num_crops": 3,
    "masked_loss": True,
    "caption_dropout": 0.3,
    "lora_dropout": 0.2,
    "repeats": 2,
}
WAYS = {
    "class images": EVERYTHING,
    "dop": {**EVERYTHING, "prior_preservation": "dop"},
    "weighted": {**EVERYTHING, "prior_preservation": "none", "weighting_scheme": "sigma_sqrt"},
}


def adapter(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


class Stop(Exception):
    """Ends a run like a crash."""


@pytest.mark.parametrize("way", WAYS)
def test_resumed_equals_uninterrupted_bitwise(settings, tmp_path, monkeypatch, way):
    changes = {"checkpointing_steps": 2, "train_batch_size": 2, **WAYS[way]}
    DreamBooth(FakePipeline()).train(settings(output_dir=str(tmp_path / "whole"), **changes))
    original = loop.Record

    def record(**values):
        if values["update"] == 4:
            raise Stop
        return original(**values)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, "Record", record)
        DreamBooth(FakePipeline()).train(settings(**changes))
    again = FakePipeline()
    assert DreamBooth(again).train(settings(**changes)).updates == 4
    assert again.images_encoded == 0 and not again.prompts_encoded, "the first part of the run has encoded all"
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_four_micro_batches_equal_one(settings, tmp_path, way):
    for name, batch_size, accumulation in (("ones", 1, 4), ("fours", 4, 1)):
        changes = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation, **WAYS[way]}
        DreamBooth(FakePipeline()).train(settings(output_dir=str(tmp_path / name), **changes))
    ones, fours = adapter(tmp_path / "ones"), adapter(tmp_path / "fours")
    for name, array in ones.items():
        assert np.linalg.norm(array - fours[name]) <= 1e-4 * np.linalg.norm(array)


def test_runs_share_an_encodings_folder(settings, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shared = {"encodings_dir": str(tmp_path / "shared"), "prior_preservation": "none", "random_flip": True}
    first, second = FakePipeline(), FakePipeline()
    DreamBooth(first).train(settings(output_dir=str(tmp_path / "one"), **shared))
    DreamBooth(second).train(settings(output_dir=str(tmp_path / "two"), seed=1, **shared))
    assert first.images_encoded == 2 * 9 and second.images_encoded == 0
    assert not (tmp_path / "two" / "encodings").exists()
    assert "reused, 0 new" in caplog.text


def test_every_crop_is_encoded_once(settings):
    given, pipeline = settings(**WAYS["dop"]), FakePipeline()
    crops = [one.crops for one in load_dataset(given, resolution=16, multiple=4).images]
    DreamBooth(pipeline).train(given)
    assert pipeline.images_encoded == sum(len(row) for rows in crops for row in rows) > 2 * len(crops)
    assert pipeline.images_sampled == 0, "output preservation needs no class pictures"


def test_concepts_have_separate_prompts_and_class_images(settings, instance_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_image(tmp_path / "cats" / "cat.png", np.full((16, 16, 3), 99, np.uint8))
    concepts = [
        Concept(instance_data_dir=instance_dir, instance_prompt="a photo of sks dog"),
        Concept(instance_data_dir=tmp_path / "cats", instance_prompt="a photo of xyz cat", repeats=4),
        Concept(
            instance_data_dir=tmp_path / "cats", instance_prompt="a drawing of zwx dog", class_prompt="a photo of a dog"
        ),
    ]
    pipeline = FakePipeline()
    DreamBooth(pipeline).train(settings(concepts=concepts, num_train_epochs=2))
    out = tmp_path / "out"
    assert len(list((out / "class_images").glob("*.png"))) == len(list((out / "class_images-2").glob("*.png"))) == 3
    assert not (out / "class_images-3").exists(), "one folder for one class"
    prompts = {prompt for prompt in pipeline.prompts_encoded if prompt}
    assert prompts == {
        *("a photo of sks dog", "sks dog, small", "a photo of xyz cat", "a drawing of zwx dog"),
        *("a photo of a dog", "a photo of a cat"),
    }
    assert "9 instance images in" in caplog.text and "1 instance image in" in caplog.text
    assert "2 epochs" in caplog.text
    # contents of the images count, not their paths
    (tmp_path / "cats").rename(tmp_path / "elsewhere")
    moved = [replace(one, instance_data_dir=one.instance_data_dir.replace("cats", "elsewhere")) for one in concepts]
    assert DreamBooth(FakePipeline()).train(settings(concepts=moved, num_train_epochs=2)).updates == 0


def test_dop_starts_at_zero_and_preserves_the_class(settings, tmp_path):
    common = {"caption_dropout": 0.0, "max_train_steps": 40, "train_batch_size": 2, "rank": 8}
    drift = {}
    for kind in ("dop", "none"):
        pipeline, base = FakePipeline(), FakePipeline()
        out = tmp_path / kind
        changes = {"prior_loss_weight": 3.0} if kind == "dop" else {}
        DreamBooth(pipeline).train(settings(output_dir=str(out), prior_preservation=kind, **common, **changes))
        records = read_metrics(out / "metrics.jsonl")
        if kind == "dop":
            assert records[0]["prior_loss"] == pytest.approx(0, abs=1e-10)
            assert max(record["prior_loss"] for record in records[5:]) > 1e-4
        conditioning = base.encode_prompts(["a photo of a dog"] * 8)
        keys = mx.arange(16).reshape(8, 2).astype(mx.uint32)
        options = {"key": keys, "guidance": 1.0}
        predictions = [
            one.predict(mx.zeros((8, 4, 4, 3)), conditioning, **options).prediction for one in (pipeline, base)
        ]
        drift[kind] = float(mx.square(predictions[0] - predictions[1]).mean())
    assert drift["dop"] < 0.5 * drift["none"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masked_loss": True}, "--masked_loss: pipeline fake does not offer it"),
        ({"weighting_scheme": "uniform"}, "--weighting_scheme: pipeline"),
        ({"prior_preservation": "dop"}, "--prior_preservation dop: pipeline"),
        ({"snr_gamma": 5.0}, "--snr_gamma: pipeline"),
        ({"offset_noise": True}, "--noise_offset: pipeline"),
    ],
)
def test_unsupported_settings_are_refused(settings, changes, message):
    members = {name: value for name, value in vars(FakePipeline).items() if not name.startswith("__dict")}
    del members["predict"]
    silent = type("Silent", (), {**members, "__weakref__": None})
    with pytest.raises(SettingsError, match=message):
        DreamBooth(silent()).train(settings(**changes))


def test_an_unsupported_weighting_scheme_is_refused(settings):
    with pytest.raises(SettingsError, match="no weighting scheme cosmap"):
        DreamBooth(FakePipeline()).train(settings(weighting_scheme="cosmap"))


@pytest.mark.parametrize(
    "changes", [{"snr_gamma": 5.0}, {"noise_offset": 0.1}, {"weighting_scheme": "debiased"}], ids=str
)
def test_options_of_discrete_schedules_are_refused_by_a_rectified_flow(settings, changes):
    with pytest.raises(SettingsError, match=next(iter(changes))):
        DreamBooth(open_pipeline("tiny")).train(settings(model="tiny", dry_run=True, **changes))


class SkippingPipeline(FakePipeline):
    """Has a text encoder with layers to leave out."""

    clip_skip: int | None = None
    max_clip_skip = 3

    def encoder_fingerprint(self, use):
        return f"{super().encoder_fingerprint(use)} {self.clip_skip}"

    def encode_prompts(self, prompts):
        return {name: array * (1 + (self.clip_skip or 0)) for name, array in super().encode_prompts(prompts).items()}


def test_skipped_layers_are_part_of_a_run(settings, tmp_path):
    def train(clip_skip: int, **changes) -> SkippingPipeline:
        pipeline = SkippingPipeline()
        shared = {"encodings_dir": str(tmp_path / "encodings"), "prior_preservation": "none", "max_train_steps": 1}
        DreamBooth(pipeline).train(settings(clip_skip=clip_skip, **shared, **changes))
        return pipeline

    first = train(2)
    assert first.clip_skip == 2 and first.prompts_encoded
    assert not train(2, output_dir=str(tmp_path / "same")).prompts_encoded
    assert train(1, output_dir=str(tmp_path / "other")).prompts_encoded, "the encodings of other layers were used"
    with pytest.raises(SettingsError, match="clip_skip"):
        train(1)
    with pytest.raises(SettingsError, match="at most 3"):
        train(4, dry_run=True)


def test_masked_loss_without_masks_is_refused(settings, instance_dir):
    (instance_dir / "other-2-mask.png").unlink()
    with pytest.raises(ImageError, match="--masked_loss"):
        DreamBooth(FakePipeline()).train(settings(masked_loss=True))
