"""Flags that a run which does not fit is offered: they can be taken, and under them it fits."""

from __future__ import annotations

import logging
import re
import shlex
from dataclasses import replace

import mlx.core as mx
import pytest

from mflux_vae.errors import SettingsError
from mflux_vae.runtime import device
from mflux_vae.utils.formatting import GB
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.planning import memory_advice, memory_estimate
from mflux_vae_train.dreambooth.planning.memory_estimate import workload
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines import flux1
from mflux_vae_train.pipelines.footprint import Footprint, Phase, Workload
from mflux_vae_train.settings.flags import settings_from
from mflux_vae_train.training.hooks import Record
from tests.mflux_vae_train.dreambooth.planning.test_memory_estimate import Weighed
from tests.mflux_vae_train.dreambooth.planning.test_resolve import resolved_from


class Counted(Weighed):
    """Weights of 8 units at full width, and per sample in a pass a unit for each 16 x 16 pixels."""

    def footprint(self, work: Workload) -> Footprint:
        weights = GB * (work.quantize or 16) / 2
        height, width = work.trained_shape
        passes = GB * work.batch * height * width / 256 * (0.5 if work.gradient_checkpointing else 1)
        learning = work.trained * work.state_bytes * 1e5
        drawing = GB * work.images * work.resolution**2 / 256
        phases = [Phase("class images", int(weights), int(drawing), 0.0)] if work.class_images else []
        phases.append(Phase("training", int(weights + learning), int(passes), 0.0))
        return Footprint(phases=phases)


@pytest.fixture
def settings(short_run):
    given = {"prior_preservation": "none", "class_prompt": "a photo of a dog"}
    return lambda **changes: short_run(**{**given, **changes})


def advice(
    settings: DreamBoothSettings, limit: float, *, class_images: int = 0, pipeline: Weighed | None = None
) -> str:
    pipeline = pipeline or Counted()
    resolved = resolved_from(settings)
    shape = (resolved.resolution, resolved.resolution)
    work = workload(pipeline, resolved, trained=100, shape=shape, prompts=3, class_images=class_images)
    return memory_advice.advice(pipeline, resolved, work, int(limit * GB))


def offers(text: str) -> list[str]:
    return re.findall(r"(--[^(]*) \(", text)


def test_half_a_batch_is_offered_only_where_there_is_one(settings) -> None:
    assert "--train_batch_size" not in advice(settings(), 8.7)
    text = advice(settings(train_batch_size=6, gradient_accumulation_steps=2), 12)
    assert "--train_batch_size 3 --gradient_accumulation_steps 4" in offers(text)
    assert "--train_batch_size 2 --gradient_accumulation_steps 6" in offers(
        advice(settings(train_batch_size=6, gradient_accumulation_steps=2), 10.5)
    )


def test_a_flag_that_is_set_is_not_offered(settings) -> None:
    text = advice(settings(gradient_checkpointing=True, quantize=4, train_batch_size=1), 2.2)
    assert "--gradient_checkpointing" not in text and "--quantize" not in text and "--train_batch" not in text
    assert "--quantize 8" not in advice(settings(quantize=8), 3.2) and "--quantize 4" in advice(
        settings(quantize=8), 3.2
    )


def test_prior_preservation_is_given_up_after_milder_flags(settings) -> None:
    run = settings(prior_preservation="class_images", gradient_checkpointing=True, quantize=4)
    assert offers(advice(run, 3.5, class_images=5))[0].startswith("--sample_batch_size 1")
    both = advice(settings(prior_preservation="dop", gradient_checkpointing=True, quantize=4), 2.7)
    assert offers(both)[0] == "--prior_preservation none"


def test_the_mildest_comes_first(settings) -> None:
    found = offers(advice(settings(train_batch_size=4), 11))
    assert found[:3] == [
        "--gradient_checkpointing",
        "--train_batch_size 2 --gradient_accumulation_steps 8",
        "--quantize 8",
    ]


def test_flags_are_combined_where_none_is_enough(settings) -> None:
    found = offers(advice(settings(train_batch_size=4), 4.2))
    assert found and all("--quantize 4" in one for one in found)
    assert "--gradient_checkpointing --quantize 4" in found


def test_the_least_is_named_if_nothing_fits(settings) -> None:
    text = advice(settings(train_batch_size=4), 0.1)
    assert "no flag" in text and "the least is" in text
    (flags,) = offers(text)
    assert "--quantize 4" in flags and "--gradient_checkpointing" in flags and "--prior" not in flags


def test_full_training_is_offered_an_adapter(settings) -> None:
    text = advice(settings(train_mode="full"), 5)
    assert "--train_mode lora --quantize" in text and "--rank" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"train_batch_size": 4, "prior_preservation": "class_images"},
        {"quantize": 8, "optimizer": "prodigy"},
        {"train_mode": "full", "prior_preservation": "class_images"},
        {"aspect_ratio_buckets": "16,16;8,32"},
        {"resolution": 64, "gradient_checkpointing": True, "prior_preservation": "dop"},
        {"with_prior_preservation": True, "prior_preservation": "class_images", "fuse": True},
    ],
)
@pytest.mark.parametrize("limit", [1.5, 2.5, 4.5, 8.5])
def test_the_command_with_the_flags_is_valid_and_fits(settings, instance_dir, changes, limit) -> None:
    text = advice(settings(**changes), limit, class_images=5)
    if text.startswith("no flags"):
        return
    given = {"model": "x", "instance_data_dir": instance_dir, "instance_prompt": "a photo of sks dog"}
    given |= {"prior_preservation": "none", "num_validation_images": settings().num_validation_images} | changes
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value)) if word != "True"]
    for offered in offers(text):
        again = settings_from(DreamBoothSettings, [*flags, *shlex.split(offered)])
        resolved, whole = resolved_from(again), settings(**changes)
        shape = (resolved.resolution, resolved.resolution)
        images = 5 if resolved.prior_preservation == "class_images" else 0
        work = workload(Counted(), resolved, trained=50, shape=shape, prompts=3, class_images=images)
        assert Counted().footprint(work).peak <= limit * GB
        assert resolved.plan.batch_size * resolved.plan.accumulation == whole.train_batch_size * 4


def test_shapes_shrink_with_the_resolution(settings) -> None:
    text = advice(
        settings(aspect_ratio_buckets="16,16;8,32", resolution=16, gradient_checkpointing=True, quantize=4), 2.3
    )
    assert '--resolution 8 --aspect_ratio_buckets "8,8;4,16"' in text


def test_flux_is_offered_what_fits_at_1024_pixels(settings) -> None:
    """The largest lever of a run with checkpointing and four bits is the prior image in each micro-batch."""
    run = settings(
        model="schnell",
        quantize=4,
        gradient_checkpointing=True,
        resolution=1024,
        prior_preservation="class_images",
        num_validation_images=0,
    )
    pipeline = flux1.load("schnell")
    resolved = resolved_from(run, pipeline.recommended)
    work = workload(pipeline, resolved, trained=10**7, shape=(1024, 1024), prompts=4, class_images=10)
    with device.assuming(cpu=False):
        least = pipeline.footprint(replace(work, batch=1, class_images=0)).peak
        text = memory_advice.advice(pipeline, resolved, work, least)
    assert "--prior_preservation none" in text and "--train_batch_size" not in text


def test_checkpointing_is_the_cure_of_a_limit_of_12_gb(settings, caplog) -> None:
    given = {"model": "schnell", "quantize": 4, "memory_limit": 13, "gradient_checkpointing": False}
    run = settings(**given, dry_run=True, estimate_for="mac")
    with caplog.at_level(logging.INFO):
        DreamBooth(flux1.load("schnell")).train(run)
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "it would fit with --gradient_checkpointing" in text
    assert "estimated for a Mac, bfloat16" in text and "time unknown until the first updates" in text


# other machines


def test_estimates_for_other_machines(settings, caplog) -> None:
    logs = []
    for name in ("cpu", "mac", "cuda"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            DreamBooth(flux1.load("schnell")).train(settings(model="schnell", dry_run=True, estimate_for=name))
        logs.append(next(one.getMessage() for one in caplog.records if "estimated peak" in one.getMessage()))
    here = device.kind()
    assert "available:" in logs[("cpu", "mac", "cuda").index(here)]
    assert sum("available:" in line for line in logs) == 1, "the memory of another machine is not known"
    assert "CPU, float32" in logs[0] and "Mac, bfloat16" in logs[1] and "NVIDIA GPU, bfloat16" in logs[2]
    peaks = [line.partition(": ")[2].partition(" (")[0].partition(";")[0] for line in logs]
    assert peaks[1] == peaks[2] != peaks[0]


def test_estimates_for_other_machines_compute_nothing() -> None:
    pipeline = flux1.load("schnell")
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with device.assuming(cpu=False):
        assert device.compute_dtype() == mx.bfloat16
        pipeline.footprint(Workload(resolution=1040, trained=1, images=4, class_images=4))
    assert mx.get_peak_memory() - before < 10**7, "attention of the autoencoder was computed"
    assert device.is_cpu() == (device.kind() == "cpu")


def test_another_machine_needs_a_dry_run_and_a_limit(settings) -> None:
    with pytest.raises(SettingsError, match="--dry_run"):
        DreamBooth(Weighed()).train(settings(estimate_for="mac"))
    other = "cuda" if device.kind() == "mac" else "mac"
    with pytest.raises(SettingsError, match="--memory_limit"):
        DreamBooth(Weighed()).train(settings(estimate_for=other, dry_run=True, train_batch_size=None))


def test_an_update_beyond_the_memory_names_flags_that_are_left(settings, caplog, monkeypatch) -> None:
    resolved = resolved_from(settings(gradient_checkpointing=True, quantize=4, memory_limit=100))
    work = workload(Counted(), resolved, trained=100, shape=(16, 16), prompts=3, class_images=0)
    estimate = replace(memory_estimate.estimate(Counted(), resolved, work), limit=GB)
    peaks = iter([0, 9 * GB])
    monkeypatch.setattr(memory_estimate.mx, "get_peak_memory", lambda: next(peaks))
    memory_estimate.compare_first_update(estimate)(Record(update=1, total=2, metrics={}, seconds=1.0))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "more than the available" in warning and "reduce it with --" in warning
    assert "--gradient_checkpointing" not in warning and "--train_batch_size" not in warning


def test_a_time_or_that_it_is_unknown(settings, monkeypatch) -> None:
    resolved = resolved_from(settings(quantize=4, max_train_steps=10))
    work = workload(Weighed(), resolved, trained=100, shape=(16, 16), prompts=3, class_images=0)
    for speed, known in ((1e7, True), (1e12, False)):
        monkeypatch.setattr(memory_estimate, "_operations_per_second", lambda speed=speed: speed)
        lines = memory_estimate.estimate(Weighed(), resolved, work).lines
        assert any(line.startswith("time: at least") for line in lines) == known
        assert any("time unknown until the first updates" in line for line in lines) != known
