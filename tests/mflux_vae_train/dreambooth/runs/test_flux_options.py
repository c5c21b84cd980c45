"""Runs on a small FLUX pipeline with all options: resuming and other micro-batches do not change the result."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from mflux_vae.images import save_image
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.training import loop
from mflux_vae_train.training.hooks import read_metrics
from tests.mflux_vae_train.pipelines.flux1.small_flux import RECOMMENDED, small_pipeline

NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture
def train(tmp_path):
    """Train on images of two shapes; return the adapter's folder."""
    draws = np.random.default_rng(0)
    for index, size in enumerate([(32, 96), (32, 90), (40, 40), (32, 40)]):
        save_image(tmp_path / "dogs" / f"{index}.png", draws.integers(0, 255, (*size, 3), dtype=np.uint8))
    save_image(tmp_path / "dogs" / "0-mask.png", np.tile(np.linspace(0, 255, 96, dtype=np.uint8), (32, 1))[..., None])

    def run(name: str, **changes):
        given = {
            "model": "small",
            "instance_data_dir": tmp_path / "dogs",
            "instance_prompt": "a photo of sks dog",
            "output_dir": tmp_path / name,
            "prior_preservation": "dop",
            "aspect_ratio_buckets": "32,32;32,80",
            "random_flip": True,
            "center_crop": False,
            "num_crops": 2,
            "masked_loss": True,
            "weighting_scheme": "logit_normal",
            "logit_mean": 0.3,
            "caption_dropout": 0.2,
            "lora_dropout": 0.1,
            "num_validation_images": 0,
            "max_train_steps": 4,
            "lr_warmup_steps": 1,
            "train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        }
        pipeline = small_pipeline(tmp_path / "parts", guidance_embeds=True, recommended=RECOMMENDED)
        DreamBooth(pipeline).train(DreamBoothSettings(**{**given, **changes}))
        return tmp_path / name / NAME

    return run


@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True, "text_encoder_lr": 1e-3}])
def test_resumed_equals_uninterrupted_bitwise(train, monkeypatch, changes):
    class Stop(Exception):
        pass

    original = loop.Record

    def record(**values):
        if values["update"] == 3:
            raise Stop
        return original(**values)

    whole = train("whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, "Record", record)
        train("out", checkpointing_steps=1, **changes)
    assert train("out", checkpointing_steps=1, **changes).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True, "text_encoder_lr": 1e-3}])
def test_four_micro_batches_equal_one(train, changes):
    ones = load_file(train("ones", train_batch_size=1, gradient_accumulation_steps=4, **changes))
    fours = load_file(train("fours", train_batch_size=4, gradient_accumulation_steps=1, **changes))
    for name, array in ones.items():
        assert np.linalg.norm(array - fours[name]) <= 1e-3 * np.linalg.norm(array), name


def test_cached_encodings_need_no_encoder(train, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    small_pipeline(tmp_path / "parts", guidance_embeds=True, recommended=RECOMMENDED).save_pretrained(folder, "float32")
    given = {"prior_preservation": "none", "encodings_dir": tmp_path / "shared", "max_train_steps": 1}

    def reopened(*_, **__):
        pipeline = FluxPipeline.from_pretrained(folder)
        monkeypatch.setattr(pipeline, "release", lambda *_: None)
        opened.append(pipeline)
        return pipeline

    opened: list[FluxPipeline] = []
    monkeypatch.setattr("tests.mflux_vae_train.dreambooth.runs.test_flux_options.small_pipeline", reopened)
    train("first", **given)
    train("second", **given, seed=1)
    first, second = ([one.prompts.t5.loaded, one.parts.vae.loaded] for one in opened)
    assert None not in first
    assert second == [None, None]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"train_text_encoder": True, "use_dora": True},
        {"quantize": 8, "gradient_checkpointing": True},
        {"quantize": 4, "use_dora": True, "prior_preservation": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layers", ["all", "proj_out,norm_out.linear,*_embedder*"])
def test_every_choice_of_layers_trains(train, layers, how):

    lines = read_metrics(train("out", max_train_steps=2, lora_layers=layers, **how).with_name("metrics.jsonl"))
    assert [line["update_size"] > 0 for line in lines] == [True, True]
