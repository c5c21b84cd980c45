"""What DreamBooth trains on a flow transformer, against diffusers, peft and torch: loss, gradients, twenty updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft
import pytest
import torch
from mlx.utils import tree_flatten

from mflux_vae_train import lora
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.batches import Plan, micro_batches
from mflux_vae_train.dreambooth.optimization.objective import dreambooth_loss
from mflux_vae_train.dreambooth.optimization.optimizer import build_optimizers
from mflux_vae_train.pipelines.flow.pipeline import FlowPipeline
from mflux_vae_train.training.step import Arrays, MicroBatch, Step
from tests.mflux_vae_train.dreambooth.data.small_dataset import small_dataset

RATE, PRIOR_WEIGHT, UPDATES = 1e-2, 0.7, 20

Predict = Callable[[Any, Any, Any, dict[str, np.ndarray]], Any]
"""diffusers' model, noisy latents (B, C, h, w), noise levels (B,), conditioning -> velocity (B, C, h, w)."""


def adapter(pipeline: FlowPipeline) -> dict[str, np.ndarray]:
    """By the names in a model with peft's adapters."""
    tensors = lora.adapter_tensors(pipeline.denoiser, "x")
    return {
        name.removeprefix("x.").replace(".weight", ".default.weight"): np.array(one) for name, one in tensors.items()
    }


class Theirs:
    """diffusers' transformer with peft's adapter, trained as diffusers' script does, on our micro-batches."""

    def __init__(self, ours: FlowPipeline, model_class: Any, predict: Predict) -> None:
        settings = {name: value for name, value in ours.denoiser.config.to_dict().items() if name != "_class_name"}
        self.model, self.predict = model_class(**settings), predict
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

    def loss(self, ours: FlowPipeline, batch: MicroBatch):
        """Noise and levels are ours; what follows from them is the script's."""
        conditioning = batch.arrays["conditioning"]
        drawn = ours.predict(batch.arrays["latents"], conditioning, key=batch.arrays["key"], guidance=1.0)
        latents, velocity = (
            torch.from_numpy(np.array(one)).permute(0, 3, 1, 2) for one in (batch.arrays["latents"], drawn.target)
        )
        noise, sigma = velocity + latents, torch.from_numpy(np.array(drawn.sigma))
        level = sigma.reshape(-1, 1, 1, 1)
        arrays = {name: np.array(one) for name, one in conditioning.items()}
        predicted = self.predict(self.model, (1.0 - level) * latents + level * noise, sigma, arrays)
        errors = (predicted - (noise - latents)) ** 2
        instance, prior = errors.reshape(len(latents), -1).mean(1).chunk(2)
        return instance.mean() + PRIOR_WEIGHT * prior.mean()

    def update(self, ours: FlowPipeline, batches: list[MicroBatch]) -> float:
        self.optimizer.zero_grad()
        losses = [self.loss(ours, batch) / len(batches) for batch in batches]
        for loss in losses:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        return sum(loss.item() for loss in losses)


def our_loss(pipeline: FlowPipeline):
    def loss(_: nn.Module, arrays: Arrays):
        return dreambooth_loss(pipeline, arrays, guidance=1.0, prior_loss_weight=PRIOR_WEIGHT)

    return loss


def check_twenty_updates(
    ours: FlowPipeline, latents: mx.array, prompts: Any, model_class: Any, predict: Predict
) -> None:
    """Compare the loss, its gradients, and the adapter after twenty updates with prior preservation.

    Args:
        latents: of four instance and three class images.
        prompts: conditioning of the instance prompt, the class prompt and the empty one.
    """
    network = ours.denoiser
    lora.add_lora(network, ours.lora_targets(), rank=4)
    for number, layer in enumerate(lora.layers(network).values()):  # so that A has a gradient
        layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    cache = small_dataset(latents[:4], latents[4:], prompts)
    plan = Plan(samples=4 * UPDATES, batch_size=2, accumulation=2)

    def batches(update: int) -> list[MicroBatch]:
        return micro_batches(cache, plan, update=update, seed=5, caption_dropout=0.1)

    theirs, batch, loss = Theirs(ours, model_class, predict), batches(0)[0], our_loss(ours)

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
