"""Runs on the fake pipeline: output files, resuming, repeated commands."""

from __future__ import annotations

import json
import logging

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from safetensors import safe_open

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae.images import load_image, save_image
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data import encoding
from mflux_vae_train.dreambooth.reporting import previews
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.settings import flags
from mflux_vae_train.training import loop
from mflux_vae_train.training.hooks import NONDETERMINISTIC, read_metrics
from tests.contracts.fake import FakePipeline


@pytest.fixture
def settings(short_run):
    """Settings of a short run with previews and class images; keyword arguments change them."""
    given = {"num_class_images": 4, "num_validation_images": 2, "gradient_accumulation_steps": 2, "validation_steps": 3}
    return lambda **changes: short_run(**{**given, **changes})


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def adapter(folder):
    with safe_open(str(folder / "pytorch_lora_weights.safetensors"), "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def assert_equal_adapters(one, other):
    (first, _), (second, _) = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


class Stop(Exception):
    """Ends a run like a crash."""


def interrupted_after(update, monkeypatch):
    """Make the next run crash after observers and hooks of an update."""
    original = loop.Record

    def record(**values):
        if values["update"] == update + 1:
            raise Stop
        return original(**values)

    monkeypatch.setattr(loop, "Record", record)


# output files


def test_a_run_writes_all_promised_files(settings, tmp_path, monkeypatch):
    monkeypatch.undo()
    outcome = DreamBooth(FakePipeline()).train(settings())
    out = tmp_path / "out"
    assert outcome.result == out / "pytorch_lora_weights.safetensors" and outcome.updates == 6
    expected = {
        "pytorch_lora_weights.safetensors",
        "README.md",
        "settings.yaml",
        "run.json",
        "metrics.jsonl",
        "train.log",
        "report.html",
        "loss.png",
        "samples/progress.png",
        *(f"samples/step-{update:05d}.png" for update in (0, 3, 6)),
        *(f"class_images/class-{index:05d}.png" for index in range(4)),
        *(f"checkpoint-6/{name}" for name in ("state.safetensors", "state.json", "pytorch_lora_weights.safetensors")),
    }
    encodings = {name for name in files(out) if name.startswith("encodings/")}
    assert files(out) - encodings == expected
    name = "pytorch_lora_weights.safetensors"
    assert (out / "checkpoint-6" / name).read_bytes() == (out / name).read_bytes()
    assert len(encodings) == 5 + 4 + 3, "of instance pictures, class pictures and prompts"
    assert load_image(out / "samples/step-00003.png").shape == (16, 32, 3)
    records = read_metrics(out / "metrics.jsonl")
    assert [record["update"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "instance_loss", "prior_loss", "learning_rate", "grad_norm"} <= records[0].keys()
    for record in records:
        weighted = record["instance_loss"] + FakePipeline.recommended.prior_loss_weight * record["prior_loss"]
        assert record["loss"] == pytest.approx(weighted, rel=1e-5)


def test_the_adapter_has_pefts_names_and_its_alpha(settings, tmp_path):
    DreamBooth(FakePipeline()).train(settings(rank=3, lora_alpha=6.0))
    tensors, metadata = adapter(tmp_path / "out")
    assert set(tensors) == {
        f"transformer.{layer}.lora_{side}.weight" for layer in ("proj_in", "blocks.0.to_out") for side in "AB"
    }
    assert tensors["transformer.proj_in.lora_A.weight"].shape == (3, 14)
    assert tensors["transformer.proj_in.lora_B.weight"].shape == (24, 3)
    config = json.loads(metadata["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (3, 6)


def test_settings_yaml_reproduces_the_run(settings, tmp_path):
    DreamBooth(FakePipeline()).train(settings())
    written = flags.from_yaml(DreamBoothSettings, tmp_path / "out" / "settings.yaml")
    assert written.learning_rate == FakePipeline.recommended.learning_rate
    assert written.class_prompt == "a photo of a dog"
    (tmp_path / "out").rename(tmp_path / "first")
    DreamBooth(FakePipeline()).train(written)
    assert_equal_adapters(tmp_path / "first", tmp_path / "out")


def test_the_subject_appears_in_the_previews(settings, tmp_path, instance_dir):
    DreamBooth(FakePipeline()).train(
        settings(
            max_train_steps=60,
            validation_steps=60,
            with_prior_preservation=False,
            rank=8,
            train_batch_size=4,
            learning_rate=0.05,
        )
    )
    subject = load_image(instance_dir / "picture-2.png", resolution=16).astype(float)

    def distance(update):
        strip = load_image(tmp_path / "out" / "samples" / f"step-{update:05d}.png").astype(float)
        return np.mean([np.abs(part - subject).mean() for part in np.split(strip, 2, axis=1)])

    assert distance(60) < 0.7 * distance(0)


def test_previews_share_noise_and_the_first_shows_the_base_model(settings, tmp_path):
    pipeline = FakePipeline()
    base = DreamBooth(pipeline)
    base.train(settings(learning_rate=1e-9))
    samples = tmp_path / "out" / "samples"
    first, last = load_image(samples / "step-00000.png"), load_image(samples / "step-00006.png")
    assert np.abs(first.astype(int) - last).max() <= 1
    assert (first[:, :16] != first[:, 16:]).any()


def test_everything_is_encoded_once(settings):
    pipeline = FakePipeline()
    DreamBooth(pipeline).train(settings())
    assert pipeline.images_encoded == 5 + 4
    trained_on = [prompt for prompt in pipeline.prompts_encoded if prompt]
    assert trained_on == ["a photo of sks dog", "a photo of a dog"]


def test_without_a_class_prompt_there_is_no_prior_loss(settings, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    DreamBooth(FakePipeline()).train(settings(instance_prompt="a photo of xyz"))
    assert "prior preservation is off: no class word follows the identifier 'xyz'" in caplog.text
    assert not (tmp_path / "out" / "class_images").exists()
    assert "prior_loss" not in read_metrics(tmp_path / "out" / "metrics.jsonl")[0]
    assert "prior preservation is off" in (tmp_path / "out" / "train.log").read_text()


def test_existing_class_images_are_reused(settings, tmp_path):
    DreamBooth(FakePipeline()).train(settings(class_data_dir=str(tmp_path / "dogs")))
    again = FakePipeline()
    DreamBooth(again).train(settings(class_data_dir=str(tmp_path / "dogs"), output_dir=str(tmp_path / "second")))
    assert again.images_sampled == 3 * 2
    assert_equal_adapters(tmp_path / "out", tmp_path / "second")


def test_extra_class_images_are_ignored(settings, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    dogs = tmp_path / "dogs"
    for index in range(6):
        save_image(dogs / f"{index}.png", np.full((16, 16, 3), 40 * index, np.uint8))
    pipeline = FakePipeline()
    DreamBooth(pipeline).train(settings(class_data_dir=str(dogs), num_class_images=4))
    assert "6 present, 0 to generate, the first 4" in caplog.text
    assert pipeline.images_encoded == 5 + 4


def test_zero_validation_images_writes_no_previews(settings, tmp_path):
    DreamBooth(FakePipeline()).train(settings(num_validation_images=0))
    assert not (tmp_path / "out" / "samples").exists()


def test_a_failing_preview_does_not_end_the_run(settings, tmp_path, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(previews, "sample_images", broken)
    outcome = DreamBooth(FakePipeline()).train(settings())
    assert outcome.result.exists()
    assert "RuntimeError: out of memory" in caplog.text


def test_the_log_contains_the_error_that_ends_a_run(settings, tmp_path):
    for end, words in ((TrainingError("it broke"), "TrainingError: it broke"), (ZeroDivisionError(), "Traceback")):
        pipeline = FakePipeline()
        pipeline.encode_images = lambda _, end=end: (_ for _ in ()).throw(end)
        with pytest.raises(type(end)):
            DreamBooth(pipeline).train(settings())
        assert words in (tmp_path / "out" / "train.log").read_text()


def test_full_training_writes_the_denoiser(settings, tmp_path):
    pipeline = FakePipeline()
    before = dict(tree_flatten(FakePipeline().denoiser.parameters()))
    outcome = DreamBooth(pipeline).train(settings(train_mode="full"))
    assert outcome.result == tmp_path / "out" / "denoiser.safetensors"
    saved = mx.load(str(outcome.result))
    assert saved.keys() == before.keys()
    assert all(bool((saved[name] != array).any()) for name, array in before.items())


def test_full_training_calls_save_pretrained(settings, tmp_path):
    class Saving(FakePipeline):
        def save_pretrained(self, folder):
            folder.mkdir(parents=True)
            (folder / "model_index.json").write_text("{}")

    outcome = DreamBooth(Saving()).train(settings(train_mode="full"))
    assert outcome.result == tmp_path / "out" / "pipeline"
    assert files(outcome.result) == {"model_index.json"}
    assert DreamBooth(Saving()).train(settings(train_mode="full")).updates == 0


# the same result


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_resumed_equals_uninterrupted_bitwise(settings, tmp_path, monkeypatch, mode):
    changes = {"checkpointing_steps": 2, "train_mode": mode, "train_batch_size": 2}
    if mode == "lora":
        changes["lora_dropout"] = 0.2
    DreamBooth(FakePipeline()).train(settings(output_dir=str(tmp_path / "whole"), **changes))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        interrupted_after(3, patch)
        DreamBooth(FakePipeline()).train(settings(**changes))
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    outcome = DreamBooth(FakePipeline()).train(settings(**changes))
    assert outcome.updates == 4
    name = outcome.result.name
    assert outcome.result.read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    for file in ("samples/progress.png", "samples/step-00006.png"):
        np.testing.assert_array_equal(load_image(tmp_path / "out" / file), load_image(tmp_path / "whole" / file))
    for one, other in zip(*(read_metrics(tmp_path / d / "metrics.jsonl") for d in ("out", "whole")), strict=True):
        assert {**one, **dict.fromkeys(NONDETERMINISTIC)} == {**other, **dict.fromkeys(NONDETERMINISTIC)}


def test_a_run_interrupted_after_class_images_resumes(settings, tmp_path, monkeypatch):
    DreamBooth(FakePipeline()).train(settings(output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(encoding, "encode_images", lambda *_, **__: (_ for _ in ()).throw(Stop))
        DreamBooth(FakePipeline()).train(settings())
    (tmp_path / "out" / "class_images" / "class-00002.png").unlink()
    DreamBooth(FakePipeline()).train(settings())
    assert_equal_adapters(tmp_path / "whole", tmp_path / "out")


def test_a_run_that_lost_its_last_files_is_finished(settings, tmp_path):
    DreamBooth(FakePipeline()).train(settings())
    out = tmp_path / "out"
    whole = (out / "pytorch_lora_weights.safetensors").read_bytes()
    (out / "pytorch_lora_weights.safetensors").unlink()
    (out / "samples" / "step-00006.png").unlink()
    assert DreamBooth(FakePipeline()).train(settings()).updates == 0
    assert (out / "pytorch_lora_weights.safetensors").read_bytes() == whole
    assert (out / "samples" / "step-00006.png").exists()


def test_four_micro_batches_equal_one(settings, tmp_path):
    for name, batch_size, accumulation in (("ones", 1, 4), ("fours", 4, 1)):
        changes = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        DreamBooth(FakePipeline()).train(settings(output_dir=str(tmp_path / name), **changes))
    (ones, _), (fours, _) = adapter(tmp_path / "ones"), adapter(tmp_path / "fours")
    for name, array in ones.items():
        assert np.linalg.norm(array - fours[name]) <= 1e-5 * np.linalg.norm(array)


def test_the_last_update_may_be_partial(settings, tmp_path):
    outcome = DreamBooth(FakePipeline()).train(
        settings(num_train_epochs=2, train_batch_size=3, gradient_accumulation_steps=3, validation_steps=2)
    )
    assert outcome.updates == 2  # 10 samples, 9 per update
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [record["update"] for record in records] == [1, 2]
    assert records[1]["grad_norm"] > 0
    assert outcome.result.exists()


def test_prior_loss_weight_changes_the_result(settings, tmp_path):
    for name, changes in {
        "none": {"with_prior_preservation": False},
        "zero": {"prior_loss_weight": 0.0},
        "one": {"prior_loss_weight": 1.0},
    }.items():
        DreamBooth(FakePipeline()).train(settings(output_dir=str(tmp_path / name), caption_dropout=0.0, **changes))
    (none, _), (zero, _), (one, _) = (adapter(tmp_path / name) for name in ("none", "zero", "one"))
    for name, array in none.items():
        np.testing.assert_allclose(array, zero[name], rtol=1e-4, atol=1e-6)
    assert any(np.abs(array - one[name]).max() > 1e-3 for name, array in none.items())


# repeated commands


def test_a_finished_run_is_not_repeated(settings, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    DreamBooth(FakePipeline()).train(settings())
    again = FakePipeline()
    outcome = DreamBooth(again).train(settings())
    assert outcome.updates == 0 and outcome.result.exists()
    assert again.images_encoded == 0 and "already complete" in caplog.text


def test_changed_settings_are_refused_with_the_differences(settings):
    DreamBooth(FakePipeline()).train(settings())
    message = r"holds another run \(rank was 2, is now 4; learning_rate was 0.02, is now 0.1\)"
    with pytest.raises(SettingsError, match=message):
        DreamBooth(FakePipeline()).train(settings(learning_rate=0.1, rank=4, lora_alpha=2.0))


def test_changed_images_are_refused(settings, instance_dir):
    DreamBooth(FakePipeline()).train(settings())
    save_image(instance_dir / "picture-9.png", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(SettingsError, match="instance pictures was"):
        DreamBooth(FakePipeline()).train(settings())


def test_settings_that_do_not_affect_the_result_may_change(settings):
    DreamBooth(FakePipeline()).train(settings())
    assert DreamBooth(FakePipeline()).train(settings(checkpointing_steps=1)).updates == 0


@pytest.mark.parametrize("again", ["latest", "path"])
def test_resume_from_a_given_checkpoint(settings, tmp_path, monkeypatch, again):
    changes = {"checkpointing_steps": 2, "checkpoints_total_limit": None}
    DreamBooth(FakePipeline()).train(settings(**changes))
    whole = (tmp_path / "out" / "pytorch_lora_weights.safetensors").read_bytes()
    where = "latest" if again == "latest" else str(tmp_path / "out" / "checkpoint-4")
    outcome = DreamBooth(FakePipeline()).train(settings(resume_from_checkpoint=where, **changes))
    assert outcome.updates == (0 if again == "latest" else 2)
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").read_bytes() == whole


def test_a_checkpoint_with_other_class_images_is_refused(settings, tmp_path, monkeypatch):
    changes = {"class_data_dir": str(tmp_path / "dogs"), "checkpointing_steps": 2}
    with monkeypatch.context() as patch, pytest.raises(Stop):
        interrupted_after(3, patch)
        DreamBooth(FakePipeline()).train(settings(**changes))
    save_image(tmp_path / "dogs" / "class-00000.png", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(SettingsError, match="class pictures was"):
        DreamBooth(FakePipeline()).train(settings(**changes))


# runs that cannot learn


def test_a_loss_independent_of_the_adapter(settings):
    class Deaf(FakePipeline):
        def predict(self, latents, conditioning, **options):
            return super().predict(latents, conditioning, **options)._replace(prediction=latents)

    with pytest.raises(TrainingError, match="update 3"):
        DreamBooth(Deaf()).train(settings())


def test_a_loss_that_is_not_finite(settings):
    class Exploding(FakePipeline):
        def predict(self, latents, conditioning, **options):
            predicted = super().predict(latents, conditioning, **options)
            return predicted._replace(weight=predicted.weight * mx.inf)

    with pytest.raises(TrainingError, match="update 1: loss is inf"):
        DreamBooth(Exploding()).train(settings())


# dry runs


def test_a_dry_run_logs_the_plan_and_changes_nothing(settings, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    Image.new("RGB", (8, 8)).save(tmp_path / "instance" / "picture-7.webp")
    before = files(tmp_path)
    pipeline = FakePipeline()
    outcome = DreamBooth(pipeline).train(settings(dry_run=True))
    assert outcome.result is None and outcome.updates == 0
    assert files(tmp_path) == before and not (tmp_path / "out").exists()
    assert pipeline.images_encoded == pipeline.images_sampled == 0
    for words in (
        "6 instance images in",
        "1 other file skipped",
        "learning_rate 0.02",
        "4 to generate",
        "a LoRA of rank 2 on 2 layers: 172 weights (proj_in, blocks.*.to_out)",
        "6 updates of 2 x 1",
        "nothing was written",
    ):
        assert words in caplog.text
    DreamBooth(pipeline).train(settings())
