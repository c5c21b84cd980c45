"""Training inside a model object as mflux builds it: it changes at the end of a run, and only then."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.train import DreamBooth
from tests.mflux_vae_train.pipelines.mflux.fake_host import LoRALinear, fake_host

QUICK = {"max_train_steps": 2, "resolution": 16, "learning_rate": 1e-2, "gradient_accumulation_steps": 1}
QUICK |= {"lr_warmup_steps": 0, "prior_preservation": "none"}


@pytest.fixture
def host(tmp_path, monkeypatch):
    return fake_host(tmp_path / "parts", monkeypatch, 8)


class Stop(Exception):
    pass


def test_a_host_changes_only_when_the_training_has_succeeded(host, short_run, tmp_path, monkeypatch) -> None:
    before = host.state()

    def stop(progress) -> None:
        if progress.phase == "training" and progress.update == 1:
            raise Stop

    options = {**QUICK, "train_text_encoder": True, "lora_layers": "attention+mlp", "output_dir": str(tmp_path / "run")}
    with pytest.raises(SettingsError, match="quantize"):
        DreamBooth(host.pipeline).train(short_run(**options, quantize=4))
    with pytest.raises(Stop):
        DreamBooth(host.pipeline).train(short_run(**options), on_progress=stop)
    assert host.state() == before and host.model.prompt_cache

    resumed = fake_host(tmp_path / "parts", monkeypatch, 8)  # the same weights
    assert DreamBooth(resumed.pipeline).train(short_run(**options)).updates == 1
    adapted = {name for name, layer in resumed.model.named_modules() if isinstance(layer, LoRALinear)}
    assert {
        "transformer.transformer_blocks.0.ff.linear1",
        "transformer.single_transformer_blocks.1.proj_out",
    } <= adapted
    assert "clip.text_model.encoder.layers.0.self_attn.q_proj" in adapted and not resumed.model.prompt_cache
    ids = mx.array([[1, 2, 3]])
    clips = resumed.model.clip, resumed.pipeline.prompts.clip.get(), host.model.clip
    theirs, ours, base = (clip(ids)[1] for clip in clips)
    assert mx.allclose(theirs, ours, atol=1e-5).item() and not mx.allclose(theirs, base, atol=1e-3).item()

    finished = fake_host(tmp_path / "parts", monkeypatch, 8)
    assert DreamBooth(finished.pipeline).train(short_run(**options)).updates == 0
    assert {name for name, layer in finished.model.named_modules() if isinstance(layer, LoRALinear)} == adapted
    assert mx.allclose(finished.model.clip(ids)[1], theirs, atol=1e-5).item()


def test_trained_weights_replace_those_of_the_host(short_run, tmp_path, monkeypatch) -> None:
    host = fake_host(tmp_path / "parts", monkeypatch)
    before = host.state()
    DreamBooth(host.pipeline).train(short_run(**QUICK, train_mode="full"))
    arrays, modules = host.state()
    assert modules == before[1] and arrays != before[0]
    ours = {id(array) for _, array in tree_flatten(host.pipeline.denoiser.parameters())}
    assert ours == {id(array) for _, array in tree_flatten(host.model.transformer.parameters())}
