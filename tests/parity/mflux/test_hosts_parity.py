"""Training inside mflux's model objects: weights are shared, they draw the subject, and errors change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae_train.pipelines.decoding import decode
from mflux_vae_train.pipelines.flow.sample import sample
from mflux_vae_train.plugin import DreamBooth
from tests.parity.mflux import TINY, host_models

pytestmark = pytest.mark.parity
pytest.importorskip("mflux", reason="extra `mflux` is not installed")
pytest.importorskip("transformers", reason="mflux's tokenizers need transformers")

STEPS = 2
HOSTS = [("flux1", None), ("klein", 4), ("z_image", 8)]


@pytest.fixture(autouse=True)
def precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from mflux.models.common.config.model_config import ModelConfig

    monkeypatch.setattr(ModelConfig, "precision", mx.float32)
    mx.disable_compile()  # compiling takes longer than it saves here
    yield
    mx.enable_compile()


class Latents:
    """A callback of mflux that keeps the noise."""

    def call_before_loop(self, latents: mx.array, config: Any, **_: Any) -> None:
        self.noise, self.sigmas = latents, config.scheduler.sigmas.tolist()


def settings(folder: Path, **changes: Any) -> Any:
    options = {
        "model": "mflux",
        "instance_data_dir": str(TINY.parent / "example"),
        "instance_prompt": host_models.PROMPT,
        "output_dir": str(folder),
        "max_train_steps": 2,
        "gradient_accumulation_steps": 1,
        "resolution": host_models.SIZE,
        "learning_rate": 2e-2,
        "lr_warmup_steps": 0,
        "rank": 2,
        "prior_preservation": "none",
        "num_validation_images": 0,
        "caption_dropout": 0.0,
    }
    return DreamBooth.Settings(**{**options, **changes})


def draw(model: Any) -> tuple[np.ndarray, Latents]:
    callback = Latents()
    model.callbacks.register(callback)
    size = {"height": host_models.SIZE, "width": host_models.SIZE}
    drawn = model.generate_image(seed=3, prompt=host_models.PROMPT, num_inference_steps=STEPS, guidance=1.0, **size)
    return np.array(drawn.image).astype(int), callback


def draw_ours(pipeline: Any, model: Any, callback: Latents) -> np.ndarray:
    """The pipeline's drawing, from mflux's noise at its noise levels."""
    conditioning = pipeline.prompts.finish(pipeline.encode_prompts([host_models.PROMPT]))
    latents = sample(
        lambda noisy, sigma: pipeline._velocity(noisy, sigma, conditioning, 1.0),
        host_models.latents(model, callback.noise),
        callback.sigmas,
    )
    pixels = decode(pipeline.vae, latents)[0]
    return np.array(mx.round(mx.clip(pixels / 2 + 0.5, 0, 1) * 255)).astype(int)


def state(model: Any) -> Any:
    arrays = [(name, id(array)) for name, array in tree_flatten(model.parameters())]
    return arrays, [(name, id(module), sorted(module._no_grad)) for name, module in model.named_modules()]


class Stop(Exception):
    pass


def stop(progress: Any) -> None:
    if progress.phase == "training" and progress.update == 1:
        raise Stop


@pytest.mark.parametrize(("kind", "bits"), HOSTS)
def test_a_host_draws_what_it_was_trained_to(tmp_path: Path, kind: str, bits: int | None) -> None:
    model = getattr(host_models, kind)(tmp_path, bits)
    before, _ = draw(model)
    untouched = state(model)
    held = mx.get_active_memory()
    plugin = DreamBooth(model)
    for part in plugin.pipeline.parts.networks.values():  # type: ignore[attr-defined]
        mx.eval(part.get().parameters())
    assert mx.get_active_memory() - held < 1e6 < held
    theirs = {id(array) for _, array in tree_flatten(model.parameters())}
    assert {id(array) for _, array in tree_flatten(plugin.pipeline.denoiser.parameters())} <= theirs

    if kind != "flux1":  # whose width mflux fixes: it is slow
        with pytest.raises(Stop):
            plugin.train(settings(tmp_path / "stopped"), on_progress=stop)
        assert state(model) == untouched and np.array_equal(draw(model)[0], before)
        plugin = DreamBooth(model)
    adapter = plugin.train(settings(tmp_path / "stopped")).result  # resumed
    after, callback = draw(model)
    assert np.abs(after - before).max() > 3
    assert np.abs(draw_ours(plugin.pipeline, model, callback) - after).max() <= 2
    layers = dict(model.transformer.named_modules())
    quantized = [layer for layer in layers.values() if isinstance(layer, nn.QuantizedLinear)]
    assert bool(quantized) == bool(bits) and all(layer.bits == bits for layer in quantized)

    if kind != "flux1":
        whole = DreamBooth(getattr(host_models, kind)(tmp_path, bits)).train(settings(tmp_path / "whole")).result
        one, other = (mx.load(str(path)) for path in (adapter, whole))
        assert one.keys() == other.keys() and all(mx.array_equal(one[name], other[name]).item() for name in one)
