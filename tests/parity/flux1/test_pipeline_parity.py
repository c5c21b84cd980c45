"""The whole FLUX pipeline against diffusers': a folder written here, opened there, from the same noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402

from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule  # noqa: E402
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline  # noqa: E402
from tests.mflux_vae_train.pipelines.flux1.small_flux import TEXT_TOKENS, small_pipeline  # noqa: E402

PROMPTS = ["a photo of a red star", "a blue dog on a circle and nothing else in the whole picture"]
KEYS = mx.zeros((2, 2), mx.uint32)
LEVELS = 255


def open_theirs(folder: Path):
    pipeline = diffusers.FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_theirs(theirs, noise: np.ndarray, **arguments) -> np.ndarray:
    """Images in [0, 1] from NHWC noise."""
    batch, height, width, channels = noise.shape
    packed = theirs._pack_latents(torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), batch, channels, height, width)
    return theirs(
        PROMPTS,
        height=height * 8,
        width=width * 8,
        latents=packed,
        max_sequence_length=TEXT_TOKENS,
        output_type="np",
        **arguments,
    ).images


@pytest.mark.parametrize("size", [(4, 4), (6, 10)])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("embedded", [False, True])
def test_images_agree(tmp_path: Path, size: tuple[int, int], guidance: float, embedded: bool) -> None:
    schedule = FlowMatchSchedule(shift=3.0, use_dynamic_shifting=embedded)
    written = small_pipeline(tmp_path / "parts", embedded, schedule=schedule)
    written.save_pretrained(tmp_path / "saved", "float32")
    ours, theirs = FluxPipeline.from_pretrained(tmp_path / "saved"), open_theirs(tmp_path / "saved")
    noise = np.random.default_rng(0).standard_normal((2, *size, 4)).astype(np.float32)
    guided = {"guidance_scale": guidance}
    if not embedded:
        guided = {"true_cfg_scale": guidance, "negative_prompt": [""] * len(PROMPTS)}
    expected = draw_theirs(theirs, noise, num_inference_steps=5, **guided)
    found = ours.sample(
        ours.encode_prompts(PROMPTS),
        size=(size[0] * 8, size[1] * 8),
        steps=5,
        guidance=guidance,
        key=KEYS,
        latents=mx.array(noise),
    )
    assert expected.std() > 0.05, "nothing to see"
    assert np.abs((np.array(found) + 1) / 2 - expected).max() * LEVELS <= 2


def test_prompts_are_encoded_alike(tmp_path: Path) -> None:
    ours = small_pipeline(tmp_path / "parts")
    ours.save_pretrained(tmp_path / "saved", "float32")
    prompts = [*PROMPTS, ""]
    embeds, pooled, _ = open_theirs(tmp_path / "saved").encode_prompt(prompts, max_sequence_length=TEXT_TOKENS)
    found = ours.encode_prompts(prompts)
    for mine, reference in ((found["prompt_embeds"], embeds), (found["pooled"], pooled)):
        expected = reference.detach().numpy()
        assert np.abs(np.array(mine) - expected).max() / np.abs(expected).max() <= 1e-4


@pytest.mark.parametrize("embedded", [False, True])
def test_a_folder_written_by_diffusers_opens(tmp_path: Path, embedded: bool) -> None:
    """Written here, opened and saved there, opened here again: the same images."""
    first = small_pipeline(tmp_path / "parts", embedded)
    first.save_pretrained(tmp_path / "ours", "float32")
    open_theirs(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    second = FluxPipeline.from_pretrained(tmp_path / "theirs")
    assert second.recommended.guidance == (3.5 if embedded else 1.0)
    assert second.schedule == first.schedule
    images = [
        np.array(p.sample(p.encode_prompts(PROMPTS), size=(32, 32), steps=2, guidance=1.0, key=KEYS))
        for p in (first, second)
    ]
    np.testing.assert_array_equal(*images)
