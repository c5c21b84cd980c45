"""What DreamBooth trains on FLUX.1, against diffusers, peft and torch: noise levels, loss, gradients, updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from diffusers.training_utils import (  # noqa: E402
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae_train import lora  # noqa: E402
from mflux_vae_train.dreambooth.config import DreamBoothSettings  # noqa: E402
from mflux_vae_train.dreambooth.data.batches import Plan, micro_batches  # noqa: E402
from mflux_vae_train.dreambooth.optimization.objective import add_base_prediction, dreambooth_loss  # noqa: E402
from mflux_vae_train.dreambooth.optimization.optimizer import build_optimizers  # noqa: E402
from mflux_vae_train.dreambooth.optimization.trainable import combined  # noqa: E402
from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule  # noqa: E402
from mflux_vae_train.pipelines.flux1.packing import image_ids, text_ids  # noqa: E402
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline  # noqa: E402
from mflux_vae_train.pipelines.noise import NoiseSampling, error_weight, training_levels  # noqa: E402
from mflux_vae_train.training.step import Arrays, MicroBatch, Step  # noqa: E402
from tests.mflux_vae_train.dreambooth.data.small_dataset import small_dataset  # noqa: E402
from tests.mflux_vae_train.pipelines.flux1.small_flux import small_pipeline  # noqa: E402

THEIR_SCHEMES = ("none", "logit_normal", "mode", "cosmap", "sigma_sqrt")
NUMBERS = {"logit_mean": 0.4, "logit_std": 1.3, "mode_scale": 0.9}
GUIDANCE, RATE, PRIOR_WEIGHT, UPDATES = 3.5, 1e-2, 0.7, 20
TEXT_RATE, TEXT_DECAY = 5e-3, 1e-2


# noise levels and weights


def their_levels(scheme: str, count: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """What diffusers' script trains at, and the plain draws behind it, from one generator's state."""
    u = compute_density_for_timestep_sampling(scheme, count, **NUMBERS, generator=torch.Generator().manual_seed(0))
    plain = torch.Generator().manual_seed(0)
    draws = torch.randn(count, generator=plain) if scheme == "logit_normal" else torch.rand(count, generator=plain)
    table = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift).sigmas
    return table[(u * 1000).long()].numpy(), draws.numpy()


@pytest.mark.parametrize("scheme", THEIR_SCHEMES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_same_draws_give_the_same_noise_levels(scheme: str, shift: float) -> None:
    """Theirs are of a table of a thousand; ours lie between its rows."""
    theirs, draws = their_levels(scheme, 5000, shift)
    ours = training_levels(mx.array(draws), NoiseSampling(scheme=scheme, **NUMBERS))
    schedule = FlowMatchSchedule(shift=shift)
    ours = np.array(schedule.shifted(mx.maximum(ours, 1 / 1000), image_tokens=64))
    assert np.abs(ours - theirs).max() <= max(shift, 1 / shift) / 1000 + 1e-6


@pytest.mark.parametrize("scheme", THEIR_SCHEMES)
def test_levels_drawn_here_are_spread_as_theirs(scheme: str) -> None:
    theirs, _ = their_levels(scheme, 20_000, 1.0)
    keys = mx.random.split(mx.random.key(3), 20_000)
    ours = FlowMatchSchedule().training_sigmas(keys, NoiseSampling(scheme=scheme, **NUMBERS), image_tokens=64)
    # Kolmogorov-Smirnov: two samples of one distribution differ by more than 0.02 once in a thousand times
    grid = np.linspace(0, 1, 200)
    ours, theirs = np.sort(np.array(ours)), np.sort(theirs)
    gap = np.abs(np.searchsorted(ours, grid) - np.searchsorted(theirs, grid)).max() / 20_000
    assert gap < 0.02


@pytest.mark.parametrize("scheme", THEIR_SCHEMES)
def test_weights_agree(scheme: str) -> None:
    sigma = np.linspace(0.001, 1, 500, dtype=np.float32)
    theirs = compute_loss_weighting_for_sd3(scheme, torch.from_numpy(sigma)).numpy()
    np.testing.assert_allclose(error_weight(mx.array(sigma), NoiseSampling(scheme=scheme)), theirs, rtol=1e-5)


# loss, gradients, updates


class Theirs:
    """diffusers' transformer with peft's adapter, trained as diffusers' script does, on our micro-batches.

    And transformers' CLIP, where ours has an adapter, too.
    """

    def __init__(self, ours: FluxPipeline) -> None:
        settings = {name: value for name, value in ours.denoiser.config.to_dict().items() if name != "_class_name"}
        self.model = diffusers.FluxTransformer2DModel(**settings)
        groups = [{"params": self._take(self.model, ours.denoiser), "weight_decay": 1e-4, "lr": RATE}]
        self.parameters = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        self.clip = None
        if lora.layers(clip := ours.prompts.clip.get()):
            self.clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip.config.to_dict()))
            own = self._take(self.clip, clip)
            groups.append({"params": own, "weight_decay": TEXT_DECAY, "lr": TEXT_RATE})
            self.parameters |= {name: one for name, one in self.clip.named_parameters() if one.requires_grad}
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    @staticmethod
    def _take(theirs, ours: nn.Module) -> list:
        """Weights and adapter of ours; the adapter's parameters."""
        with lora.disabled(ours):
            base = named(dict(tree_flatten(ours.parameters())))
        adapters = lora.layers(ours)
        rank = next(iter(adapters.values())).lora_a.shape[1]
        theirs.load_state_dict({name: torch.from_numpy(value) for name, value in base.items()})
        targets = sorted(name.removeprefix("text_model.") for name in adapters)
        theirs.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        parameters = {name: one for name, one in theirs.named_parameters() if one.requires_grad}
        with torch.no_grad():
            for name, value in named(lora.adapter_tensors(ours, "x")).items():
                parameters[name].copy_(torch.from_numpy(value))
        return list(parameters.values())

    def loss(self, ours: FluxPipeline, batch: MicroBatch, scheme: str):
        """Of instance and class pictures."""
        predicted, target, weighting = self.predicted(ours, batch, scheme)
        return self.combined(predicted, target, weighting)

    def loss_with_base(self, ours: FluxPipeline, batch: MicroBatch, scheme: str):
        """Of instance pictures, and of what the model without its adapters predicts for the class prompt."""
        predicted, target, weighting = self.predicted(ours, batch, scheme)
        networks = [self.model, *([] if self.clip is None else [self.clip])]
        for network in networks:
            network.disable_adapters()
        with torch.no_grad():
            base, _, _ = self.predicted(ours, batch, scheme)
        for network in networks:
            network.enable_adapters()
        half = len(predicted) // 2
        return self.combined(predicted, torch.cat([target[:half], base[half:]]), weighting)

    @staticmethod
    def combined(predicted, target, weighting):
        errors = (weighting.float() * (predicted.float() - target.float()) ** 2).reshape(len(predicted), -1)
        instance, prior = errors.mean(1).chunk(2)
        return instance.mean() + PRIOR_WEIGHT * prior.mean()

    def predicted(self, ours: FluxPipeline, batch: MicroBatch, scheme: str):
        """Prediction, target and weights. Noise and levels are ours; all that is made of them is theirs."""
        given = {
            name: torch.from_numpy(np.array(array)) for name, array in tree_flatten(batch.arrays) if "key" not in name
        }
        latents = given["latents"].permute(0, 3, 1, 2)
        said = ("prompt_embeds", "pooled" if self.clip is None else "clip_tokens")
        pooled = given.get("conditioning.pooled")
        if self.clip is not None:
            pooled = self.clip(given["conditioning.clip_tokens"].long()).pooler_output
        drawn = ours.predict(
            batch.arrays["latents"],
            {name: batch.arrays["conditioning"][name] for name in said},
            key=batch.arrays["key"],
            guidance=GUIDANCE,
            sampling=NoiseSampling(scheme=scheme),
        )
        noise = torch.from_numpy(np.array(drawn.target)).permute(0, 3, 1, 2) + latents
        sigma = torch.from_numpy(np.array(drawn.sigma)).reshape(-1, 1, 1, 1)
        count, channels, height, width = latents.shape
        pack, unpack = diffusers.FluxPipeline._pack_latents, diffusers.FluxPipeline._unpack_latents
        predicted = self.model(
            hidden_states=pack((1 - sigma) * latents + sigma * noise, count, channels, height, width),
            timestep=sigma.flatten(),
            guidance=torch.full((count,), GUIDANCE),
            pooled_projections=pooled,
            encoder_hidden_states=given["conditioning.prompt_embeds"],
            txt_ids=torch.from_numpy(np.array(text_ids(given["conditioning.prompt_embeds"].shape[1]))),
            img_ids=torch.from_numpy(np.array(image_ids(height, width))),
            return_dict=False,
        )[0]
        predicted = unpack(predicted, height=8 * height, width=8 * width, vae_scale_factor=8)
        return predicted, noise - latents, compute_loss_weighting_for_sd3(scheme, sigma)

    def update(self, ours: FluxPipeline, batches: list[MicroBatch], scheme: str) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss = self.loss(ours, batch, scheme) / len(batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        return total


def named(tensors: Mapping[str, mx.array]) -> dict[str, np.ndarray]:
    """Our tensors by the names that they have in a model with peft's adapters; transformers 5 has no `text_model`."""
    adapter = any(".lora_" in name for name in tensors)
    return {
        (name.replace(".weight", ".default.weight") if adapter else name)
        .removeprefix("x.")
        .removeprefix("text_model."): np.array(value)
        for name, value in tensors.items()
    }


@pytest.fixture(params=["transformer", "transformer and CLIP"])
def ours(tmp_path: Path, request) -> FluxPipeline:
    """With adapters whose B is not zero, so that A has a gradient."""
    pipeline = small_pipeline(tmp_path, guidance_embeds=True)
    lora.add_lora(pipeline.denoiser, pipeline.lora_targets(), rank=4)
    if request.param != "transformer":
        pipeline.encode_text_in_step(True)
        clip, targets = pipeline.text_encoders_to_train(), pipeline.text_encoder_targets()
        lora.add_lora(clip["text_encoder"], targets["text_encoder"], rank=4)
    for number, layer in enumerate(lora.layers(together(pipeline)).values()):
        layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    return pipeline


def together(pipeline: FluxPipeline) -> nn.Module:
    """All that has adapters."""
    networks = {"transformer": pipeline.denoiser, "text_encoder": pipeline.prompts.clip.get()}
    return combined({name: network for name, network in networks.items() if lora.layers(network)})


def adapters(pipeline: FluxPipeline) -> dict[str, np.ndarray]:
    """As `named` has them."""
    networks = (pipeline.denoiser, pipeline.prompts.clip.get())
    return {name: value for network in networks for name, value in named(lora.adapter_tensors(network, "x")).items()}


@pytest.fixture
def batches(ours: FluxPipeline) -> Callable[[int], list[MicroBatch]]:
    """Two micro-batches of two instance and two class pictures to an update."""
    latents = mx.random.normal((7, 4, 6, 4), key=mx.random.key(9))
    prompts = ours.encode_prompts(["a photo of sks dog", "a photo of a dog", ""])
    cache = small_dataset(latents[:4], latents[4:], prompts)
    plan = Plan(samples=4 * UPDATES, batch_size=2, accumulation=2)
    return lambda update: micro_batches(cache, plan, update=update, seed=5, caption_dropout=0.1)


def our_loss(pipeline: FluxPipeline, scheme: str):
    def loss(_: nn.Module, arrays: Arrays):
        return dreambooth_loss(
            pipeline,
            arrays,
            guidance=GUIDANCE,
            prior_loss_weight=PRIOR_WEIGHT,
            sampling=NoiseSampling(scheme=scheme),
        )

    return loss


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "cosmap", "sigma_sqrt"])
def test_loss_and_gradients_agree(ours: FluxPipeline, batches, scheme: str) -> None:
    theirs, batch = Theirs(ours), batches(0)[0]
    agree(ours, batch, scheme, theirs, theirs.loss(ours, batch, scheme))


def test_loss_and_gradients_agree_where_the_models_output_is_preserved(ours: FluxPipeline) -> None:
    """The second half, on the instances' own latents and noise, is compared with the model without its adapters."""
    theirs, latents = Theirs(ours), mx.random.normal((4, 4, 6, 4), key=mx.random.key(9))
    prompts = ours.encode_prompts(["a photo of sks dog", "a photo of a dog", ""])
    cache = replace(small_dataset(latents, latents, prompts), class_latents=None, preserves_output=True)
    plan = Plan(samples=4, batch_size=4, accumulation=1)
    (batch,) = micro_batches(cache, plan, update=0, seed=5, caption_dropout=0.0)
    asked = {"guidance": GUIDANCE, "sampling": NoiseSampling(scheme="cosmap")}
    with_targets = add_base_prediction(ours, together(ours), batch, **asked)
    agree(ours, with_targets, "cosmap", theirs, theirs.loss_with_base(ours, batch, "cosmap"))


def agree(ours: FluxPipeline, batch: MicroBatch, scheme: str, theirs: Theirs, expected) -> None:
    """The loss and its gradients for every array of the adapters."""
    learners = together(ours)
    loss, parameters = our_loss(ours, scheme), learners.trainable_parameters()

    def objective(parameters: dict) -> mx.array:
        learners.update(parameters)
        return loss(learners, batch.arrays)[0]

    value, gradients = mx.value_and_grad(objective)(parameters)
    learners.update(parameters)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    learners.update(gradients)  # so that they can be named as the weights are
    found = adapters(ours)
    assert found.keys() == theirs.parameters.keys()
    for name, gradient in found.items():
        reference = theirs.parameters[name].grad.numpy()
        assert np.linalg.norm(reference) > 0, name
        assert np.linalg.norm(gradient - reference) <= 1e-3 * np.linalg.norm(reference), name


def test_twenty_updates_follow_each_other(ours: FluxPipeline, batches) -> None:
    theirs = Theirs(ours)
    before, learners = adapters(ours), together(ours)
    settings = DreamBoothSettings(
        model="small",
        instance_data_dir="there",
        instance_prompt="a photo of sks dog",
        learning_rate=RATE,
        train_text_encoder=learners is not ours.denoiser,
        text_encoder_lr=TEXT_RATE,
        adam_weight_decay_text_encoder=TEXT_DECAY,
    )
    optimizer = build_optimizers(settings, text_encoders=["text_encoder"] * settings.train_text_encoder)
    step = Step(learners, optimizer, our_loss(ours, "none"), max_grad_norm=1.0, compile=False)
    for update in range(UPDATES):
        expected = theirs.update(ours, batches(update), "none")
        found = step(update, batches(update), RATE)["loss"]
        assert found == pytest.approx(expected, rel=1e-3), update
    for name, after in adapters(ours).items():
        reference = theirs.parameters[name].detach().numpy()
        moved = np.linalg.norm(reference - before[name])
        assert moved > 0.1 * np.linalg.norm(before[name]), f"{name} hardly moved: nothing is compared"
        assert np.linalg.norm(after - reference) <= 1e-3 * moved, name
