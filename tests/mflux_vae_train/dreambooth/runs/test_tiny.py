"""Runs on the embedded pipeline, which consists of FLUX.1's classes."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mflux_vae_train import lora
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines import parts, tiny
from mflux_vae_train.pipelines.quantization import quantize
from mflux_vae_train.training.hooks import NONDETERMINISTIC

EXAMPLE = Path(tiny.__file__).parent / "example"


def train(output: Path, **changes) -> list[dict[str, float]]:
    """Metrics of a short run."""
    settings = {
        "model": "tiny",
        "instance_data_dir": str(EXAMPLE),
        "instance_prompt": "a photo of xyz star",
        "output_dir": str(output),
        "resolution": 32,
        "num_class_images": 4,
        "max_train_steps": 4,
        "lr_warmup_steps": 1,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.1,
        "num_validation_images": 0,
        "checkpointing_steps": 2,
    }
    DreamBooth(tiny.load()).train(DreamBoothSettings(**(settings | changes)))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_four_micro_batches_of_one_equal_one_of_four(tmp_path):
    """Compares loss and gradient; weights after AdamW's first step only follow the signs of the gradient."""
    same = {"max_train_steps": 1, "lora_dropout": 0.0, "exact_micro_batches": True}
    one = train(tmp_path / "one", gradient_accumulation_steps=4, **same)
    four = train(tmp_path / "four", gradient_accumulation_steps=1, train_batch_size=4, **same)
    for name in ("loss", "instance_loss", "prior_loss", "grad_norm"):
        assert one[0][name] == pytest.approx(four[0][name], rel=1e-5), name


def test_resumed_equals_uninterrupted(tmp_path):
    whole = train(tmp_path / "whole")
    parts = tmp_path / "parts"
    train(parts)
    # a process killed after update 3 leaves the checkpoint of update 2
    (parts / "run.json").write_text((parts / "run.json").read_text().replace('"finished": true', '"finished": false'))
    for path in (parts / "checkpoint-4").iterdir():
        path.unlink()
    (parts / "checkpoint-4").rmdir()
    (parts / "pytorch_lora_weights.safetensors").unlink()
    resumed = train(parts)
    measured = dict.fromkeys(NONDETERMINISTIC, 0)
    assert [{**line, **measured} for line in resumed] == [{**line, **measured} for line in whole]
    adapters = [mx.load(str(folder / "pytorch_lora_weights.safetensors")) for folder in (tmp_path / "whole", parts)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(mx.array_equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


@pytest.mark.parametrize("preservation", ["class_images", "dop"])
def test_joined_micro_batches_train_the_same(tmp_path, caplog, preservation):
    caplog.set_level("INFO", "mflux_vae_train")
    changes = {"prior_preservation": preservation, "max_train_steps": 3}
    joined = train(tmp_path / "joined", **changes)
    assert "--exact_micro_batches" in caplog.text
    caplog.clear()
    single = train(tmp_path / "single", **changes, exact_micro_batches=True)
    assert "--exact_micro_batches" not in caplog.text
    for one, other in zip(joined, single, strict=True):
        for name in one.keys() - NONDETERMINISTIC:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


SMALL = {
    "prior_preservation": "none",
    "max_train_steps": 2,
    "gradient_accumulation_steps": 1,
    "checkpointing_steps": 99,
}


@pytest.mark.parametrize("how", [{}, {"quantize": 4}, {"use_dora": True}, {"quantize": 8, "use_dora": True}], ids=str)
@pytest.mark.parametrize("layers", [*tiny.load().lora_presets(), lora.ALL_LAYERS])
def test_every_layer_preset_trains(tmp_path, layers, how):
    lines = train(tmp_path / "out", **SMALL, lora_layers=layers, **how)
    assert [line["update_size"] > 0 for line in lines] == [True, True]
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_a_run_starts_from_an_adapter_of_every_layer(tmp_path):
    train(tmp_path / "first", **SMALL, lora_layers="all")
    file = tmp_path / "first" / "pytorch_lora_weights.safetensors"
    train(tmp_path / "second", **SMALL, lora_weights=str(file), quantize=4)
    before, after = (mx.load(str(tmp_path / name / file.name)) for name in ("first", "second"))
    assert before.keys() == after.keys() and "transformer.x_embedder.lora_A.weight" in before


def test_each_network_is_quantized_once(tmp_path, monkeypatch):
    given = []

    def counted(module, *arguments):
        given.append(type(module).__name__)
        quantize(module, *arguments)

    monkeypatch.setattr(parts, "quantize", counted)
    train(tmp_path / "out", **SMALL, quantize=4)
    assert sorted(given) == ["FluxTransformer", "T5Encoder"]


def test_a_run_begins_with_at_most_fifteen_lines(tmp_path, caplog):
    caplog.set_level("INFO", "mflux_vae_train")
    changes = {"max_train_steps": 2, "num_class_images": 2, "lora_dropout": 0.0}

    def order() -> list[str]:
        words = [record.getMessage().partition(" ")[0] for record in caplog.records]
        return [word for word in words if word in ("pipeline", "estimated", "training")]

    with pytest.raises(FileNotFoundError, match="metrics"):  # a dry run writes none
        train(tmp_path / "dry", **changes, dry_run=True)
    assert order() == ["pipeline", "estimated", "training"]
    caplog.clear()
    train(tmp_path / "out", **changes, checkpointing_steps=200, num_validation_images=1)
    assert 5 < len([record for record in caplog.records if record.levelname == "INFO"]) <= 15
    assert order()[:3] == ["pipeline", "estimated", "training"]
