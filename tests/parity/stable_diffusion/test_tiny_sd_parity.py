"""The embedded Stable Diffusion in diffusers: the same picture, and the same again with an adapter trained here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers, with numpy 2
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from mflux_vae_train.dreambooth.config import DreamBoothSettings  # noqa: E402
from mflux_vae_train.dreambooth.train import DreamBooth  # noqa: E402
from mflux_vae_train.pipelines import tiny, tiny_sd  # noqa: E402
from tests.parity.stable_diffusion.test_pipeline_parity import (  # noqa: E402
    LEVELS,
    draw_ours,
    draw_theirs,
    noise_of,
)

EXAMPLE = Path(tiny.__file__).parent / "example"


def test_pictures_agree_also_with_an_adapter_trained_here(tmp_path: Path) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd.WEIGHTS).to(torch.float32)
    theirs.set_progress_bar_config(disable=True)
    ours = tiny_sd.load()
    before = draw_ours(ours, noise_of(8, 8))
    assert np.abs(before - draw_theirs(theirs, noise_of(8, 8))).max() * LEVELS <= 2
    outcome = DreamBooth(ours).train(
        DreamBoothSettings(
            model="tiny-sd",
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
            train_text_encoder=True,
            text_encoder_lr=3e-3,
            num_validation_images=0,
        )
    )
    theirs.load_lora_weights(str(outcome.result.parent), weight_name=outcome.result.name)
    after = draw_ours(ours, noise_of(8, 8))
    assert np.abs(after - before).max() * LEVELS > 20, "the adapter changes nothing: nothing would be compared"
    assert np.abs(after - draw_theirs(theirs, noise_of(8, 8))).max() * LEVELS <= 2
