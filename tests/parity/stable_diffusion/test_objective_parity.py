"""What DreamBooth trains on Stable Diffusion and SDXL, against diffusers, peft and torch: loss, gradients, updates.

The reference computes as `train_dreambooth_lora.py` and `train_dreambooth_lora_sdxl.py`, with Min-SNR weights of the
instance samples' timesteps; the scripts take those of all samples (diffusers #6356).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import mlx.core as mx  # noqa: E402
from diffusers.training_utils import compute_snr  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae.weights.keymaps.diffusers import SAME_NAMES  # noqa: E402
from mflux_vae.weights.keymaps.rules import from_mlx  # noqa: E402
from mflux_vae_train import lora  # noqa: E402
from mflux_vae_train.dreambooth.data.batches import Plan, micro_batches  # noqa: E402
from mflux_vae_train.dreambooth.optimization.objective import dreambooth_loss  # noqa: E402
from mflux_vae_train.optimizers.adam import AdamW  # noqa: E402
from mflux_vae_train.pipelines.capabilities import CropGeometry  # noqa: E402
from mflux_vae_train.pipelines.noise import NoiseSampling  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.predict import predict  # noqa: E402
from mflux_vae_train.training.step import MicroBatch, Step  # noqa: E402
from tests.mflux_vae_train.dreambooth.data.small_dataset import small_dataset  # noqa: E402
from tests.mflux_vae_train.pipelines.stable_diffusion.small_sd import small_pipeline  # noqa: E402

RATE, DECAY, PRIOR_WEIGHT, UPDATES = 1e-2, 1e-2, 0.7, 20
GAMMA = 5.0
CASES = {
    "sd1": ("sd1", None),
    "sd1 snr": ("sd1", GAMMA),
    "sd2": ("sd2", None),
    "sd2 snr": ("sd2", GAMMA),
    "sdxl": ("sdxl", None),
}


class Theirs:
    """diffusers' UNet with peft's adapter, trained as diffusers' scripts do, on our micro-batches."""

    def __init__(self, ours: StableDiffusionPipeline, gamma: float | None) -> None:
        config = {name: value for name, value in ours.configs.unet.to_dict().items() if not name.startswith("_")}
        self.model, self.ours, self.gamma = diffusers.UNet2DConditionModel(**config), ours, gamma
        with lora.disabled(ours.denoiser):
            base = from_mlx(dict(tree_flatten(ours.denoiser.parameters())), SAME_NAMES)
        self.model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in base.items()})
        adapters = lora.layers(ours.denoiser)
        self.model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=sorted(adapters)))
        self.parameters = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        with torch.no_grad():
            for name, value in adapter_of(ours).items():
                self.parameters[name].copy_(torch.from_numpy(value))
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=RATE, weight_decay=DECAY)
        scheduler = {name: value for name, value in ours.schedule.to_dict().items() if name[0] != "_"}
        self.noise = diffusers.DDPMScheduler.from_config(scheduler)

    def loss(self, batch: MicroBatch):
        """Of instance and class images. Noise and timesteps are ours; what follows from them is theirs."""
        latents, conditioning = torch.from_numpy(np.array(batch.arrays["latents"])), batch.arrays["conditioning"]
        noise, timesteps = self.draws(batch)
        latents, noise = latents.permute(0, 3, 1, 2), noise.permute(0, 3, 1, 2)
        added = None
        if "pooled" in conditioning:
            text_embeds, time_ids = (torch.from_numpy(np.array(conditioning[name])) for name in ("pooled", "time_ids"))
            added = {"text_embeds": text_embeds, "time_ids": time_ids}
        predicted = self.model(
            self.noise.add_noise(latents, noise, timesteps),
            timesteps,
            torch.from_numpy(np.array(conditioning["prompt_embeds"])),
            added_cond_kwargs=added,
        ).sample
        target = noise
        if self.noise.config.prediction_type == "v_prediction":
            target = self.noise.get_velocity(latents, noise, timesteps)
        instance, prior = ((predicted - target) ** 2).mean(dim=(1, 2, 3)).chunk(2)
        if self.gamma is not None:
            snr = compute_snr(self.noise, timesteps)[: len(instance)]
            weights = torch.minimum(snr, torch.full_like(snr, self.gamma))
            instance = instance * weights / (snr + (self.noise.config.prediction_type == "v_prediction"))
        return instance.mean() + PRIOR_WEIGHT * prior.mean()

    def draws(self, batch: MicroBatch):
        """Noise (B, h, w, C) and timesteps, as our objective draws them."""
        seen: dict[str, Any] = {}

        def network(latents: mx.array, timesteps: mx.array) -> mx.array:
            seen["timesteps"] = torch.from_numpy(np.array(timesteps)).long()
            return latents

        epsilon = replace(self.ours.schedule, prediction_type="epsilon")
        options = {"key": batch.arrays["key"], "schedule": epsilon, "sampling": NoiseSampling()}
        drawn = predict(network, batch.arrays["latents"], **options)
        return torch.from_numpy(np.array(drawn.target)), seen["timesteps"]

    def update(self, batches: list[MicroBatch]) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss = self.loss(batch) / len(batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        return total


def adapter_of(pipeline: StableDiffusionPipeline) -> dict[str, np.ndarray]:
    """Arrays of the adapter by the names of peft."""
    tensors = lora.adapter_tensors(pipeline.denoiser, "x")
    return {
        name.removeprefix("x.").replace(".weight", ".default.weight"): np.array(value)
        for name, value in tensors.items()
    }


def our_loss(pipeline: StableDiffusionPipeline, gamma: float | None):
    def loss(_: Any, arrays: Any):
        sampling = NoiseSampling(snr_gamma=gamma)
        return dreambooth_loss(pipeline, arrays, guidance=1.0, prior_loss_weight=PRIOR_WEIGHT, sampling=sampling)

    return loss


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, tmp_path: Path):
    """Our pipeline with an adapter whose B is not zero, the limit of Min-SNR, and update -> two micro-batches."""
    model, gamma = request.param
    pipeline = small_pipeline(tmp_path, model)
    lora.add_lora(pipeline.denoiser, pipeline.lora_targets(), rank=4)
    for number, layer in enumerate(lora.layers(pipeline.denoiser).values()):
        layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    latents = mx.random.normal((7, 4, 6, 4), key=mx.random.key(9))
    changes: dict[str, Any] = {}
    if model == "sdxl":
        crops = [CropGeometry(original=(900 - i, 700), corner=(0, 3 * i), target=(32, 48)) for i in range(7)]
        changes["crops"] = pipeline.encode_crops(crops[:4])
        changes["class_crops"] = {(0, latents.shape[1:]): pipeline.encode_crops(crops[4:])}
    prompts = pipeline.encode_prompts(["a photo of sks dog", "a photo of a dog", ""])
    cache = small_dataset(latents[:4], latents[4:], prompts, **changes)
    plan = Plan(samples=4 * UPDATES, batch_size=2, accumulation=2)
    return pipeline, gamma, lambda update: micro_batches(cache, plan, update=update, seed=5, caption_dropout=0.1)


def test_loss_and_gradients_agree(case) -> None:
    ours, gamma, batches = case
    theirs, (batch, _) = Theirs(ours, gamma), batches(0)
    loss, parameters = our_loss(ours, gamma), ours.denoiser.trainable_parameters()

    def objective(parameters: dict) -> mx.array:
        ours.denoiser.update(parameters)
        return loss(None, batch.arrays)[0]

    value, gradients = mx.value_and_grad(objective)(parameters)
    expected = theirs.loss(batch)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    ours.denoiser.update(gradients)  # so that they can be named as the weights are
    found = adapter_of(ours)
    assert found.keys() == theirs.parameters.keys()
    for name, gradient in found.items():
        reference = theirs.parameters[name].grad.numpy()
        assert np.linalg.norm(reference) > 0, name
        assert np.linalg.norm(gradient - reference) <= 1e-3 * np.linalg.norm(reference), name


@pytest.mark.parametrize("case", [CASES[name] for name in ("sd1 snr", "sd2", "sdxl")], indirect=True)
def test_twenty_updates_follow_each_other(case) -> None:
    ours, gamma, batches = case
    theirs, before = Theirs(ours, gamma), adapter_of(ours)
    step = Step(ours.denoiser, AdamW(weight_decay=DECAY), our_loss(ours, gamma), max_grad_norm=1.0, compile=False)
    for update in range(UPDATES):
        expected = theirs.update(batches(update))
        assert step(update, batches(update), RATE)["loss"] == pytest.approx(expected, rel=1e-3), update
    for name, after in adapter_of(ours).items():
        reference = theirs.parameters[name].detach().numpy()
        moved = np.linalg.norm(reference - before[name])
        assert moved > 0.1 * np.linalg.norm(before[name]), f"{name} hardly moved: nothing is compared"
        assert np.linalg.norm(after - reference) <= 1e-3 * moved, name
