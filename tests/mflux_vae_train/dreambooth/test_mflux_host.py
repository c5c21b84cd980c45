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
        if progress.phase == "finished" or (progress.phase == "training" and progress.update == 1):
            raise Stop

    options = {**QUICK, "train_text_encoder": True, "lora_layers": "attention+mlp", "output_dir": str(tmp_path / "run")}
    with pytest.raises(SettingsError, match="quantize"):
        DreamBooth(host.pipeline).train(short_run(**options, quantize=4))
    with pytest.raises(Stop):
        DreamBooth(host.pipeline).train(short_run(**options), on_progress=stop)
    assert host.state() == before and host.model.prompt_cache

    resumed = fake_host(tmp_path / "parts", monkeypatch, 8)  # the same weights
    result = DreamBooth(resumed.pipeline).train(short_run(**options))
    whole = fake_host(tmp_path / "parts", monkeypatch, 8)
    options["output_dir"] = str(tmp_path / "whole")
    whole_result = DreamBooth(whole.pipeline).train(short_run(**options))
    one, other = (mx.load(str(run.result)) for run in (result, whole_result))
    assert result.updates == 1 and all(mx.array_equal(one[name], other[name]).item() for name in one)

    adapted = {name for name, layer in whole.model.named_modules() if isinstance(layer, LoRALinear)}
    assert {
        "transformer.transformer_blocks.0.ff.linear1",
        "transformer.single_transformer_blocks.1.proj_out",
    } <= adapted
    assert "clip.text_model.encoder.layers.0.self_attn.q_proj" in adapted and not whole.model.prompt_cache
    ids = mx.array([[1, 2, 3]])
    pooled = [clip(ids)[1] for clip in (whole.model.clip, whole.pipeline.prompts.clip.get(), host.model.clip)]
    assert (
        mx.allclose(pooled[0], pooled[1], atol=1e-5).item() and not mx.allclose(pooled[0], pooled[2], atol=1e-3).item()
    )


def test_trained_weights_replace_those_of_the_host(short_run, tmp_path, monkeypatch) -> None:
    host = fake_host(tmp_path / "parts", monkeypatch)
    before = host.state()
    DreamBooth(host.pipeline).train(short_run(**QUICK, train_mode="full"))
    arrays, modules = host.state()
    assert modules == before[1] and arrays != before[0]
    ours = {id(array) for _, array in tree_flatten(host.pipeline.denoiser.parameters())}
    assert ours == {id(array) for _, array in tree_flatten(host.model.transformer.parameters())}
