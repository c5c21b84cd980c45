"""Training of CLIP beside the transformer: gradients, learning rate, saved adapter, sampling."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.weights.formats.files import read_safetensors
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.batches import Plan, micro_batches
from mflux_vae_train.dreambooth.export import FUSED, KOHYA
from mflux_vae_train.dreambooth.optimization.objective import add_base_prediction, dreambooth_loss
from mflux_vae_train.dreambooth.optimization.trainable import combined
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.training.step import Step
from tests.contracts.fake import FakePipeline
from tests.mflux_vae_train.dreambooth.data.small_dataset import small_dataset
from tests.mflux_vae_train.pipelines.flux1.small_flux import RECOMMENDED, small_pipeline

PROMPTS = ["a photo of sks dog", "a photo of a dog"]
RATE, TEXT_RATE = 1e-2, 1e-3


@pytest.fixture
def pipeline(tmp_path) -> FluxPipeline:
    return small_pipeline(tmp_path / "parts", guidance_embeds=True, recommended=RECOMMENDED)


@pytest.fixture
def settings(instance_dir, tmp_path):
    def make(out="out", **changes) -> DreamBoothSettings:
        given = {
            "model": "small",
            "instance_data_dir": str(instance_dir),
            "instance_prompt": PROMPTS[0],
            "output_dir": str(tmp_path / out),
            "train_text_encoder": True,
            "learning_rate": RATE,
            "text_encoder_lr": TEXT_RATE,
            "max_train_steps": 3,
            "lr_warmup_steps": 0,
            "lr_scheduler": "constant",
            "prior_preservation": "none",
            "num_validation_images": 0,
            "gradient_accumulation_steps": 1,
        }
        return DreamBoothSettings(**{**given, **changes})

    return make


def adapters(pipeline: FluxPipeline):
    return [lora.layers(network) for network in (pipeline.denoiser, pipeline.prompts.clip.get())]


def sampled(pipeline: FluxPipeline) -> mx.array:
    keys = mx.random.split(mx.random.key(3), 2)
    return pipeline.sample(pipeline.encode_prompts(PROMPTS), size=(32, 32), steps=2, guidance=2.0, key=keys)


def test_encoding_in_the_step_equals_encoding_before(pipeline) -> None:
    latents, keys = mx.random.normal((2, 4, 4, 4), key=mx.random.key(0)), mx.random.split(mx.random.key(1), 2)
    early = pipeline.encode_prompts(PROMPTS)
    identity = pipeline.encoder_fingerprint("prompts")
    expected = pipeline.loss(latents, early, key=keys, guidance=2.0), sampled(pipeline)
    pipeline.encode_text_in_step(True)
    late = pipeline.encode_prompts(PROMPTS)
    assert set(late) == {"prompt_embeds", "clip_tokens"} and late["clip_tokens"].dtype == mx.int32
    assert pipeline.encoder_fingerprint("prompts") != identity, "one kept on disk must not be taken for the other"
    assert mx.array_equal(pipeline.loss(latents, late, key=keys, guidance=2.0), expected[0])
    assert mx.array_equal(sampled(pipeline), expected[1])


@pytest.mark.parametrize("recompute", [False, True])
def test_text_encoder_gradients_match_finite_differences(pipeline, recompute) -> None:
    pipeline.encode_text_in_step(True)
    pipeline.set_gradient_checkpointing(recompute)
    networks = {"transformer": pipeline.denoiser, **pipeline.text_encoders_to_train()}
    lora.add_lora(pipeline.denoiser, pipeline.lora_targets(), rank=2)
    lora.add_lora(pipeline.prompts.clip.get(), pipeline.text_encoder_targets()["text_encoder"], rank=2)
    together = combined(networks)
    together.update(
        tree_map(lambda x: x + 0.05 * mx.sin(mx.arange(x.size)).reshape(x.shape), together.trainable_parameters())
    )
    latents, keys = mx.random.normal((2, 4, 4, 4), key=mx.random.key(0)), mx.random.split(mx.random.key(1), 2)
    conditioning, weights = pipeline.encode_prompts(PROMPTS), together.trainable_parameters()

    def loss(parameters) -> mx.array:
        together.update(parameters)
        return pipeline.loss(latents, conditioning, key=keys, guidance=2.0).mean()

    gradients = dict(tree_flatten(mx.grad(loss)(weights)))
    together.update(weights)
    flat = dict(tree_flatten(weights))
    in_clip = [name for name in flat if name.startswith("text_encoder.")]
    assert len(in_clip) == 2 * 4 * 2  # layers, projections, A and B
    for name in in_clip:
        # along the gradient the slope is its norm
        size = mx.linalg.norm(gradients[name]).item()
        assert size > 0, name
        ends = []
        for sign in (1, -1):
            changed = tree_map(lambda x: x, weights)
            together.update(changed)
            layer = lora.layers(pipeline.prompts.clip.get())[name.removeprefix("text_encoder.").rpartition(".")[0]]
            kind = name.rpartition(".")[2]
            layer[kind] = flat[name] + sign * 0.02 * gradients[name] / size
            ends.append(pipeline.loss(latents, conditioning, key=keys, guidance=2.0).mean().item())
        together.update(weights)
        assert (ends[0] - ends[1]) / 0.04 == pytest.approx(size, rel=0.05, abs=2e-5), name


@pytest.mark.slow  # calls a C++ compiler
def test_a_compiled_step_equals_an_uncompiled_one(tmp_path) -> None:
    losses = []
    for compiled in (False, True):
        pipeline = small_pipeline(tmp_path / "parts", guidance_embeds=True)
        pipeline.encode_text_in_step(True)
        networks = {"transformer": pipeline.denoiser, **pipeline.text_encoders_to_train()}
        for network, targets in zip(
            networks.values(), (pipeline.lora_targets(), pipeline.text_encoder_targets()["text_encoder"]), strict=True
        ):
            lora.add_lora(network, targets, rank=2, dropout=0.1)
        together = combined(networks)
        latents = mx.random.normal((4, 4, 6, 4), key=mx.random.key(0))
        cache = small_dataset(latents, None, pipeline.encode_prompts([*PROMPTS, ""]), preserves_output=True)
        plan = Plan(samples=12, batch_size=2, accumulation=2)

        def loss(together, arrays, pipeline=pipeline):
            with lora.dropout_keys(together, arrays["dropout_key"]):
                return dreambooth_loss(pipeline, arrays, guidance=2.0, prior_loss_weight=1.0)

        step = Step(together, AdamW(), loss, compile=compiled)
        losses.append([])
        for update in range(plan.updates):
            drawn_now = micro_batches(cache, plan, update=update, seed=0, caption_dropout=0.2)
            batches = [add_base_prediction(pipeline, together, one, guidance=2.0) for one in drawn_now]
            losses[-1].append(step(update, batches, RATE)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != pytest.approx(losses[0][2], rel=1e-2)


def test_the_first_update_follows_both_learning_rates(pipeline, settings) -> None:
    DreamBooth(pipeline).train(settings(max_train_steps=1))
    for layers, rate in zip(adapters(pipeline), (RATE, TEXT_RATE), strict=True):
        # Adam's first step has the size of its learning rate wherever there is a gradient
        furthest = [mx.abs(layer.lora_b).max().item() for layer in layers.values()]
        assert furthest == pytest.approx([rate] * len(layers), rel=1e-2)


def test_text_encoder_lr_defaults_to_a_twentieth(pipeline, settings, tmp_path) -> None:
    DreamBooth(pipeline).train(settings(text_encoder_lr=None, max_train_steps=1))
    assert f"text_encoder_lr: {RATE / 20}" in (tmp_path / "out" / "settings.yaml").read_text()


def test_prodigy_finds_one_rate_for_both(settings, tmp_path) -> None:
    adapted = []
    for rate in (None, 0.3):
        pipeline = small_pipeline(tmp_path / "parts", guidance_embeds=True, recommended=RECOMMENDED)
        DreamBooth(pipeline).train(
            settings(f"{rate}", optimizer="prodigy", learning_rate=None, text_encoder_lr=rate, max_train_steps=2)
        )
        adapted.append([layer.lora_b for layers in adapters(pipeline) for layer in layers.values()])
    assert all(mx.array_equal(one, other) for one, other in zip(*adapted, strict=True))


@pytest.mark.parametrize("optimizer", ["prodigy", "adafactor", "lion", "adamw8bit"])
def test_every_optimizer_trains_both(pipeline, settings, optimizer) -> None:
    rates = {"learning_rate": None, "text_encoder_lr": None} if optimizer == "prodigy" else {}
    DreamBooth(pipeline).train(settings(optimizer=optimizer, **rates))
    assert all(mx.any(layer.lora_b != 0) for layers in adapters(pipeline) for layer in layers.values())


def test_both_adapters_are_saved_in_both_namings(pipeline, settings, tmp_path) -> None:
    before = sampled(pipeline)
    out = DreamBooth(pipeline).train(settings(output_kohya_format=True)).result.parent
    after = sampled(pipeline)
    tensors, _ = read_safetensors(out / "pytorch_lora_weights.safetensors")
    key = "text_encoder.text_model.encoder.layers.1.self_attn.out_proj.lora_B.weight"
    assert "mflux ignores" in (out / "README.md").read_text()
    assert key in tensors and sum(name.startswith("text_encoder.") for name in tensors) == 16
    with lora.disabled(pipeline.prompts.clip.get()):
        without = sampled(pipeline)
    assert mx.abs(after - without).max() > 1e-4, "previews must show what CLIP has learnt"
    assert "lora_te1_text_model_encoder_layers_1_self_attn_out_proj.lora_up.weight" in read_safetensors(out / KOHYA)[0]

    for name in ("pytorch_lora_weights.safetensors", KOHYA):
        again = small_pipeline(tmp_path / "parts", guidance_embeds=True, recommended=RECOMMENDED)
        start = settings(f"from {name}", lora_weights=str(out / name), learning_rate=1e-9, text_encoder_lr=1e-9)
        DreamBooth(again).train(start)
        assert mx.abs(sampled(again) - after).max() < 1e-4 < mx.abs(before - after).max(), name
    with pytest.raises(WeightsError, match="adapter for 'text_encoder'"):
        other = small_pipeline(tmp_path / "parts", guidance_embeds=True, recommended=RECOMMENDED)
        alone = {"train_text_encoder": False, "text_encoder_lr": None}
        DreamBooth(other).train(settings("alone", lora_weights=str(out / "pytorch_lora_weights.safetensors"), **alone))


def test_a_new_text_encoder_adapter_beside_a_loaded_one(pipeline, settings, tmp_path) -> None:
    alone = {"train_text_encoder": False, "text_encoder_lr": None}
    first = DreamBooth(pipeline).train(settings("first", **alone)).result
    again = small_pipeline(tmp_path / "parts", guidance_embeds=True, recommended=RECOMMENDED)
    DreamBooth(again).train(settings(lora_weights=str(first)))
    assert [len(layers) for layers in adapters(again)][1] == 8


def test_the_text_encoder_adapter_is_fused(pipeline, settings) -> None:
    out = DreamBooth(pipeline).train(settings(fuse=True)).result.parent
    assert not any(adapters(pipeline))
    whole = FluxPipeline.from_pretrained(out / FUSED)
    np.testing.assert_allclose(sampled(whole), sampled(pipeline), atol=5e-2)  # half precision on disk
    base = small_pipeline(out / "parts", guidance_embeds=True)
    assert mx.abs(whole.encode_prompts(PROMPTS)["pooled"] - base.encode_prompts(PROMPTS)["pooled"]).max() > 5e-3


def test_clip_stays_loaded_and_t5_is_released(pipeline, settings, tmp_path, monkeypatch) -> None:
    pipeline.save_pretrained(tmp_path / "model", "float32")
    opened = FluxPipeline.from_pretrained(tmp_path / "model")
    seen = []
    whole = FluxPipeline.predict

    def predict(self, *arguments, **named):
        seen.append((self.prompts.clip.loaded is None, self.prompts.t5.loaded is None))
        return whole(self, *arguments, **named)

    monkeypatch.setattr(FluxPipeline, "predict", predict)
    DreamBooth(opened).train(settings(num_validation_images=1, prior_preservation="dop"))
    assert set(seen) == {(False, True)}
    opened.release("prompts", "images")
    assert any(lora.layers(opened.prompts.clip.get())), "what was learnt is not forgotten"


class Unsaved(FakePipeline):
    """Offers a text encoder and cannot save itself."""

    def encode_text_in_step(self, on):
        pass

    def text_encoders_to_train(self):
        return {"text_encoder": nn.Linear(2, 2)}

    def text_encoder_skeletons(self):
        return self.text_encoders_to_train()

    def text_encoder_targets(self):
        return {"text_encoder": ["*"]}


def test_training_an_unsupported_text_encoder_is_refused(settings) -> None:
    with pytest.raises(SettingsError, match="--train_text_encoder"):
        DreamBooth(FakePipeline()).train(settings())
    with pytest.raises(SettingsError, match="save"):
        DreamBooth(Unsaved()).train(settings(train_mode="full"))


def test_all_weights_of_denoiser_and_text_encoder_are_trained(pipeline, settings, tmp_path) -> None:
    before = pipeline.encode_prompts(PROMPTS)
    full = {"train_mode": "full", "learning_rate": 1e-3, "text_encoder_lr": None, "checkpointing_steps": 2}
    result = DreamBooth(pipeline).train(settings(**full)).result
    trained = FluxPipeline.from_pretrained(result)
    after = trained.encode_prompts(PROMPTS)
    drift = {name: mx.abs(before[name] - after[name]).max().item() for name in before}
    assert drift["prompt_embeds"] < 5e-3 < drift["pooled"], "half precision on disk; T5 is not trained"
    np.testing.assert_allclose(sampled(trained), sampled(pipeline), atol=5e-2)  # half precision on disk
    assert "text_encoder_lr: 0.001" in (tmp_path / "out" / "settings.yaml").read_text()

    for updates in (2, 3):
        again = small_pipeline(tmp_path / "parts", guidance_embeds=True, recommended=RECOMMENDED)
        DreamBooth(again).train(settings("again", max_train_steps=updates, allow_changes=True, **full))
    networks = [[one.denoiser, one.prompts.clip.get()] for one in (pipeline, again)]
    for whole, resumed in zip(*networks, strict=True):
        weights = [dict(tree_flatten(network.parameters())) for network in (whole, resumed)]
        assert all(mx.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_text_encoder_lr_without_text_encoder_is_a_warning(pipeline, settings, caplog) -> None:
    with caplog.at_level("WARNING"):
        DreamBooth(pipeline).train(settings(train_text_encoder=False, max_train_steps=1))
    assert "--text_encoder_lr has no effect: it is for --train_text_encoder" in caplog.text
