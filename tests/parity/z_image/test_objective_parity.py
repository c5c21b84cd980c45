"""What DreamBooth trains on Z-Image, against diffusers, peft and torch: loss with class images, gradients, updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

import mlx.core as mx  # noqa: E402

from tests.mflux_vae_train.pipelines.z_image.small_z_image import small_pipeline  # noqa: E402
from tests.parity.references.flow_updates import check_twenty_updates  # noqa: E402


def predict(model, noisy, sigma, conditioning: dict[str, np.ndarray]):
    """As the script, with its lists of captions mended."""
    lengths, embeds = conditioning["length"], conditioning["prompt_embeds"]
    captions = [torch.from_numpy(one[:length].copy()) for one, length in zip(embeds, lengths, strict=True)]
    latents = list(noisy.unsqueeze(2).unbind(dim=0))
    outputs = model(latents, (1000 - 1000 * sigma) / 1000, captions, return_dict=False)[0]
    return -torch.stack(outputs).squeeze(2)


def test_loss_gradients_and_twenty_updates_agree(tmp_path: Path) -> None:
    """Prompts of several lengths are in one batch."""
    ours = small_pipeline(tmp_path)
    prompts = ours.encode_prompts(["a photo of sks dog on a circle, and of nothing else", "a dog", ""])
    assert len({-(-length // 32) for length in np.array(prompts["length"]).tolist()}) > 1
    latents = mx.random.normal((7, 4, 6, 4), key=mx.random.key(9))
    check_twenty_updates(ours, latents, prompts, diffusers.ZImageTransformer2DModel, predict)
