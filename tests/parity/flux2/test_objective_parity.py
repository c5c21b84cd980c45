"""What DreamBooth trains on FLUX.2 klein, against diffusers, peft and torch: loss, gradients, updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
if not hasattr(diffusers, "Flux2KleinPipeline"):
    pytest.skip("diffusers without FLUX.2 klein", allow_module_level=True)

import mlx.core as mx  # noqa: E402

from tests.mflux_vae_train.pipelines.flux2.small_klein import small_pipeline  # noqa: E402
from tests.parity.references.flow_updates import check_twenty_updates  # noqa: E402


def predict(model, noisy, sigma, conditioning: dict[str, np.ndarray]):
    """As the script."""
    pipeline = diffusers.Flux2KleinPipeline
    embeds, ids = torch.from_numpy(conditioning["prompt_embeds"]), pipeline._prepare_latent_ids(noisy)
    velocity = model(
        hidden_states=pipeline._pack_latents(noisy),
        timestep=sigma,
        guidance=None,
        encoder_hidden_states=embeds,
        txt_ids=pipeline._prepare_text_ids(embeds),
        img_ids=ids,
        return_dict=False,
    )[0]
    return pipeline._unpack_latents_with_ids(velocity, ids)


def test_loss_gradients_and_twenty_updates_agree(tmp_path: Path) -> None:
    ours = small_pipeline(tmp_path)
    prompts = ours.encode_prompts(["a photo of sks dog", "a dog", ""])
    latents = mx.random.normal((7, 2, 3, 16), key=mx.random.key(9))
    check_twenty_updates(ours, latents, prompts, diffusers.Flux2Transformer2DModel, predict)
