"""The embedded pipeline in diffusers: the same picture, and the same picture again with an adapter trained here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402

from mflux_vae_train.dreambooth.config import DreamBoothSettings  # noqa: E402
from mflux_vae_train.dreambooth.train import DreamBooth  # noqa: E402
from mflux_vae_train.pipelines import tiny  # noqa: E402
from mflux_vae_train.tiny_world.recipe import SIZE, TEXT_TOKENS  # noqa: E402

PROMPTS = ["a photo of a red heart on snow", "a photo of xyz star"]
EXAMPLE = Path(tiny.__file__).parent / "example"
LEVELS = 255


@pytest.fixture(scope="module")
def theirs():
    pipeline = diffusers.FluxPipeline.from_pretrained(tiny.WEIGHTS).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, SIZE // 8, SIZE // 8, 16)).astype(np.float32)


def draw_ours(pipeline, guidance: float) -> np.ndarray:
    drawn = pipeline.sample(
        pipeline.encode_prompts(PROMPTS),
        size=(SIZE, SIZE),
        steps=14,
        guidance=guidance,
        key=mx.zeros((2, 2), mx.uint32),
        latents=mx.array(noise()),
    )
    return (np.array(drawn) + 1) / 2


def draw_theirs(pipeline, guidance: float) -> np.ndarray:
    start = torch.from_numpy(noise().transpose(0, 3, 1, 2).copy())
    return pipeline(
        PROMPTS,
        height=SIZE,
        width=SIZE,
        latents=pipeline._pack_latents(start, *start.shape),
        num_inference_steps=14,
        max_sequence_length=TEXT_TOKENS,
        true_cfg_scale=guidance,
        negative_prompt=["", ""],
        output_type="np",
    ).images


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_pictures_agree(theirs, guidance):
    assert np.abs(draw_ours(tiny.load(), guidance) - draw_theirs(theirs, guidance)).max() * LEVELS <= 2


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_dora": True}, {"train_text_encoder": True, "text_encoder_lr": 3e-3}],
    ids=["lora", "dora", "clip"],
)
def test_an_adapter_trained_here_gives_the_same_pictures(theirs, tmp_path, changes):
    pipeline = tiny.load()
    before = draw_ours(pipeline, 1.0)
    outcome = DreamBooth(pipeline).train(
        DreamBoothSettings(
            model="tiny",
            instance_data_dir=str(EXAMPLE),
            instance_prompt="a photo of xyz star",
            output_dir=str(tmp_path),
            with_prior_preservation=False,
            gradient_accumulation_steps=1,
            max_train_steps=10,
            lr_warmup_steps=0,
            lr_scheduler="constant",
            learning_rate=1e-3,
            lora_alpha=16.0,  # not the rank: the scale must travel with the file
            num_validation_images=0,
            **changes,
        )
    )
    theirs.load_lora_weights(str(outcome.result.parent), weight_name=outcome.result.name)
    try:
        after = draw_ours(pipeline, 1.0)
        assert np.abs(after - before).max() * LEVELS > 20, "the adapter changes nothing: nothing would be compared"
        assert np.abs(after - draw_theirs(theirs, 1.0)).max() * LEVELS <= 2
        if "train_text_encoder" in changes:
            theirs.text_encoder.disable_adapters()
            without = np.abs(after - draw_theirs(theirs, 1.0)).max() * LEVELS
            theirs.text_encoder.enable_adapters()
            assert without > 4, "CLIP's adapter changes nothing: it would not be compared"
    finally:
        theirs.unload_lora_weights()
