"""What DreamBooth trains on Z-Image, against diffusers, peft and torch: loss with class images, gradients, updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae_train import lora  # noqa: E402
from mflux_vae_train.dreambooth.config import DreamBoothSettings  # noqa: E402
from mflux_vae_train.dreambooth.data.batches import Plan, micro_batches  # noqa: E402
from mflux_vae_train.dreambooth.optimization.objective import dreambooth_loss  # noqa: E402
from mflux_vae_train.dreambooth.optimization.optimizer import build_optimizers  # noqa: E402
from mflux_vae_train.pipelines.z_image.pipeline import ZImagePipeline  # noqa: E402
from mflux_vae_train.training.step import Arrays, MicroBatch, Step  # noqa: E402
from tests.mflux_vae_train.dreambooth.data.small_dataset import small_dataset  # noqa: E402
from tests.mflux_vae_train.pipelines.z_image.small_z_image import small_pipeline  # noqa: E402

RATE, PRIOR_WEIGHT, UPDATES = 1e-2, 0.7, 20


def adapter(pipeline: ZImagePipeline) -> dict[str, np.ndarray]:
    """By the names in a model with peft's adapters."""
    tensors = lora.adapter_tensors(pipeline.denoiser, "x")
    return {
        name.removeprefix("x.").replace(".weight", ".default.weight"): np.array(one) for name, one in tensors.items()
    }


class Theirs:
    """diffusers' transformer with peft's adapter, trained as diffusers' script does, on our micro-batches."""

    def __init__(self, ours: ZImagePipeline) -> None:
        settings = {name: value for name, value in ours.denoiser.config.to_dict().items() if name != "_class_name"}
        self.model = diffusers.ZImageTransformer2DModel(**settings)
        with lora.disabled(ours.denoiser):
            weights = {name: torch.from_numpy(np.array(one)) for name, one in tree_flatten(ours.denoiser.parameters())}
        self.model.load_state_dict(weights)
        self.model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(lora.layers(ours.denoiser))))
        self.parameters = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        with torch.no_grad():
            for name, value in adapter(ours).items():
                self.parameters[name].copy_(torch.from_numpy(value))
        options = {"lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), **options)

    def loss(self, ours: ZImagePipeline, batch: MicroBatch):
        """Noise and levels are ours; what follows from them is the script's, with its lists of captions mended."""
        conditioning = batch.arrays["conditioning"]
        drawn = ours.predict(batch.arrays["latents"], conditioning, key=batch.arrays["key"], guidance=0.0)
        latents, velocity = (
            torch.from_numpy(np.array(one)).permute(0, 3, 1, 2) for one in (batch.arrays["latents"], drawn.target)
        )
        noise, sigma = velocity + latents, torch.from_numpy(np.array(drawn.sigma))
        level = sigma.reshape(-1, 1, 1, 1)
        noisy = ((1.0 - level) * latents + level * noise).unsqueeze(2)
        lengths = np.array(conditioning["length"])
        captions = [
            torch.from_numpy(one[:length].copy())
            for one, length in zip(np.array(conditioning["prompt_embeds"]), lengths, strict=True)
        ]
        outputs = self.model(list(noisy.unbind(dim=0)), (1000 - 1000 * sigma) / 1000, captions, return_dict=False)[0]
        errors = (-torch.stack(outputs).squeeze(2) - (noise - latents)) ** 2
        instance, prior = errors.reshape(len(latents), -1).mean(1).chunk(2)
        return instance.mean() + PRIOR_WEIGHT * prior.mean()

    def update(self, ours: ZImagePipeline, batches: list[MicroBatch]) -> float:
        self.optimizer.zero_grad()
        losses = [self.loss(ours, batch) / len(batches) for batch in batches]
        for loss in losses:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        return sum(loss.item() for loss in losses)


def our_loss(pipeline: ZImagePipeline):
    def loss(_: nn.Module, arrays: Arrays):
        return dreambooth_loss(pipeline, arrays, guidance=0.0, prior_loss_weight=PRIOR_WEIGHT)

    return loss


def test_loss_gradients_and_twenty_updates_agree(tmp_path: Path) -> None:
    """Prompts of several lengths are in one batch."""
    ours = small_pipeline(tmp_path)
    network = ours.denoiser
    lora.add_lora(network, ours.lora_targets(), rank=4)
    for number, layer in enumerate(lora.layers(network).values()):  # so that A has a gradient
        layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    latents = mx.random.normal((7, 4, 6, 4), key=mx.random.key(9))
    prompts = ours.encode_prompts(["a photo of sks dog on a circle, and of nothing else", "a dog", ""])
    assert len({-(-length // 32) for length in np.array(prompts["length"]).tolist()}) > 1
    cache = small_dataset(latents[:4], latents[4:], prompts)
    plan = Plan(samples=4 * UPDATES, batch_size=2, accumulation=2)

    def batches(update: int) -> list[MicroBatch]:
        return micro_batches(cache, plan, update=update, seed=5, caption_dropout=0.1)

    theirs, batch, loss = Theirs(ours), batches(0)[0], our_loss(ours)

    def objective(parameters: dict) -> mx.array:
        network.update(parameters)
        return loss(network, batch.arrays)[0]

    before, weights = adapter(ours), network.trainable_parameters()
    value, gradients = mx.value_and_grad(objective)(weights)
    expected = theirs.loss(ours, batch)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    network.update(gradients)  # so that they can be named as the weights are
    for name, gradient in adapter(ours).items():
        reference = theirs.parameters[name].grad.numpy()
        assert np.linalg.norm(gradient - reference) <= 1e-3 * np.linalg.norm(reference), name
    network.update(weights)

    settings = DreamBoothSettings(
        model="small", instance_data_dir="there", instance_prompt="a photo of sks dog", learning_rate=RATE
    )
    step = Step(network, build_optimizers(settings, text_encoders=[]), loss, max_grad_norm=1.0, compile=False)
    for update in range(UPDATES):
        reference = theirs.update(ours, batches(update))
        assert step(update, batches(update), RATE)["loss"] == pytest.approx(reference, rel=1e-3), update
    for name, after in adapter(ours).items():
        reference = theirs.parameters[name].detach().numpy()
        moved = np.linalg.norm(reference - before[name])
        assert moved > 0.1 * np.linalg.norm(before[name]), f"{name} hardly moved: nothing is compared"
        assert np.linalg.norm(after - reference) <= 1e-3 * moved, name
