"""A pipeline with wrong members is refused at the door, and one that returns something else at its first use."""

from __future__ import annotations

import dataclasses
import logging
import re
import textwrap
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mflux_vae.errors import PluginError, SettingsError
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines import checks, flux1, protocol, tiny
from tests.contracts.fake import FakePipeline


def pipeline_with(**members: Any) -> FakePipeline:
    return type("Broken", (FakePipeline,), members)()


def recommended(**changes: Any) -> protocol.Recommended:
    return dataclasses.replace(FakePipeline.recommended, **changes)


async def asynchronous(self, prompts):
    return {}


@pytest.mark.parametrize("pipeline", [FakePipeline, tiny.load, lambda: flux1.load("dev")], ids=["fake", "tiny", "dev"])
def test_good_pipelines_pass(pipeline) -> None:
    pipeline = pipeline()
    assert checks.faults(pipeline) == [] and checks.half_implemented(pipeline) == {}


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"recommended": {"resolution": 16}}, ["recommended", "dict", "Recommended"]),
        ({"recommended": recommended(resolution="16")}, ["recommended.resolution", "'16'", "whole number"]),
        ({"recommended": recommended(resolution=18)}, ["recommended.resolution", "18", "multiple"]),
        ({"recommended": recommended(steps=0)}, ["recommended.steps", "0"]),
        ({"recommended": recommended(rank=2.5)}, ["recommended.rank", "2.5"]),
        ({"recommended": recommended(learning_rate=float("nan"))}, ["recommended.learning_rate", "nan"]),
        ({"recommended": recommended(guidance=None)}, ["recommended.guidance", "None"]),
        ({"recommended": recommended(weighting_scheme="cosine")}, ["weighting_scheme", "cosine", "cosmap"]),
        ({"name": None}, ["name", "None"]),
        ({"adapter_prefix": "a.b"}, ["adapter_prefix", "'a.b'"]),
        ({"adapter_prefix": 3}, ["adapter_prefix", "3"]),
        ({"encode_images": lambda self: None}, ["encode_images(pixels)"]),
        ({"encode_prompts": asynchronous}, ["encode_prompts", "asynchronous"]),
        ({"loss": 7}, ["loss", "7", "loss(latents, conditioning, *, key, guidance)"]),
        ({"loss": lambda self, latents, conditioning, key: key}, ["loss", "guidance"]),
        ({"sample": lambda self, conditioning, size: size}, ["sample(conditioning, size)", "steps"]),
        ({"predict": lambda self, image: image}, ["predict(image)", "SupportsPrediction"]),
        ({"denoiser": property(lambda self: None), "lora_targets": None}, ["lora_targets", "None"]),
    ],
)
def test_wrong_members_are_named(members, words) -> None:
    if "denoiser" in members:
        members = {**members, "__init__": lambda self: None}
    with pytest.raises(PluginError) as error:
        DreamBooth(pipeline_with(**members))
    assert all(word in str(error.value) for word in ["Broken", *words]), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) <= 320


def test_a_denoiser_of_another_kind_is_named() -> None:
    pipeline = FakePipeline()
    pipeline.denoiser = {"weights": mx.zeros(3)}
    with pytest.raises(PluginError, match=r"denoiser is a dict.*Module"):
        DreamBooth(pipeline)


def test_members_inherited_from_the_protocol_are_missing() -> None:
    class Half(protocol.DiffusionPipeline):
        name, adapter_prefix, recommended = "half", "unet", FakePipeline.recommended

        def lora_targets(self):
            return ["*"]

    with pytest.raises(PluginError, match=r"lacks denoiser, encode_images\(pixels\)"):
        DreamBooth(Half())


def test_a_class_is_not_a_pipeline() -> None:
    with pytest.raises(PluginError, match="class FakePipeline"):
        DreamBooth(FakePipeline)  # type: ignore[arg-type]


def test_a_denoiser_is_not_loaded_at_the_door() -> None:
    pipeline = pipeline_with(
        __init__=lambda self: None, denoiser=property(lambda self: pytest.fail("the denoiser was loaded"))
    )
    assert checks.faults(pipeline) == []


@pytest.mark.parametrize(
    ("member", "result", "words"),
    [
        ("encode_images", lambda pixels: {"latents": pixels}, ["encode_images()", "a dict", "array (5, ...)"]),
        ("encode_images", lambda pixels: np.array(pixels), ["encode_images()", "numpy", "array"]),
        ("encode_images", lambda pixels: pixels[0, 0], ["encode_images()", "(16, 3)", "(5, ...)"]),
        ("encode_prompts", lambda prompts: mx.zeros((len(prompts), 4)), ["encode_prompts()", "an array", "dict"]),
        ("encode_prompts", lambda prompts: {}, ["encode_prompts()", "a dict"]),
        ("encode_prompts", lambda prompts: {"a": mx.zeros((7, 4))}, ["encode_prompts()['a']", "(7, 4)"]),
        ("encode_prompts", lambda prompts: {"a": [1.0]}, ["encode_prompts()['a']", "a list"]),
        ("lora_targets", lambda: "proj_in", ["lora_targets()", "'proj_in'", "list"]),
        ("lora_targets", lambda: [], ["lora_targets()", "list"]),
        ("predict", lambda *_, **__: mx.zeros(1), ["predict()", "Prediction"]),
        ("sample", lambda *_, **__: mx.zeros((16, 16, 3)), ["sample()", "(16, 16, 3)"]),
    ],
)
def test_wrong_results_are_named_at_their_first_use(member, result, words, short_run) -> None:
    pipeline = pipeline_with(**{member: lambda self, *args, **named: result(*args, **named)})
    run = short_run(num_class_images=1, max_train_steps=1, train_batch_size=1, sample_batch_size=1)
    run = dataclasses.replace(run, prior_preservation="class_images", with_prior_preservation=True)
    with pytest.raises(PluginError) as error:
        DreamBooth(pipeline).train(run)
    assert all(word in str(error.value) for word in ["Broken", *words]), error.value


def test_a_loss_that_is_a_mean_is_named() -> None:
    pipeline = pipeline_with(loss=lambda self, latents, conditioning, *, key, guidance: latents.mean())
    with pytest.raises(PluginError, match=r"Broken.loss\(\) returned an array \(\).*\(2,\)"):
        checks.loss(pipeline, mx.zeros((2, 4, 4, 3)), {}, key=mx.zeros((2, 2)), guidance=1.0)


def test_a_mean_ends_the_run_at_its_first_update(short_run) -> None:
    members = {name: value for name, value in vars(FakePipeline).items() if name not in ("predict", "__dict__")}
    members["recommended"] = recommended(weighting_scheme=None)
    members["loss"] = lambda self, latents, conditioning, *, key, guidance: self.denoiser.proj_in.lora_b.mean()
    pipeline = type("Broken", (), members)()
    with pytest.raises(PluginError, match=r"Broken.loss\(\) returned an array \(\)"):
        DreamBooth(pipeline).train(short_run(prior_preservation="none"))


def test_settings_of_another_kind_are_named() -> None:
    with pytest.raises(SettingsError, match=r"settings is a dict.*DreamBooth.Settings"):
        DreamBooth(FakePipeline()).train({"model": "fake"})  # type: ignore[arg-type]


def test_prompts_of_different_shapes_are_named() -> None:
    rows = [{"a": mx.zeros((1, 4))}, {"a": mx.zeros((1, 5))}]
    with pytest.raises(PluginError, match=r"encode_prompts\(\)\['a'\] is \(1, 4\) .* \(1, 5\)"):
        checks.check_rows(FakePipeline(), rows)


def test_capabilities_in_part_are_named(short_run, caplog) -> None:
    pipeline = pipeline_with(quantize=lambda self, bits: None, release=lambda self, *uses: None)
    with caplog.at_level(logging.INFO):
        DreamBooth(pipeline).train(short_run(dry_run=True))
    (line,) = [record.getMessage() for record in caplog.records if "in part" in record.getMessage()]
    assert "SupportsMemoryControl lacks footprint, set_gradient_checkpointing, skeleton" in line
    with pytest.raises(SettingsError, match=r"--quantize.*lacks footprint"):
        DreamBooth(pipeline).train(short_run(dry_run=True, quantize=4))


def test_the_example_in_the_documentation_runs(instance_dir, tmp_path, monkeypatch) -> None:
    code = "\n".join(re.findall(r"^    .*$|^$", protocol.__doc__ or "", re.MULTILINE))
    assert len([line for line in textwrap.dedent(code).splitlines() if line.strip()]) < 40
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(instance_dir)
    names: dict[str, Any] = {}
    exec(textwrap.dedent(code.replace("max_train_steps=100", "max_train_steps=3")), names)
    assert names["adapter"].is_file() and isinstance(names["Plain"]().denoiser, nn.Module)
