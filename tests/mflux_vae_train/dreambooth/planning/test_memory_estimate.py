"""Memory estimate, memory limit, automatic batch size; runs on quantized models."""

from __future__ import annotations

import logging

import mlx.nn as nn
import pytest
import yaml

from mflux_vae.errors import SettingsError
from mflux_vae.runtime import device
from mflux_vae.utils.formatting import GB
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.optimization import optimizer
from mflux_vae_train.dreambooth.planning import memory_estimate
from mflux_vae_train.dreambooth.planning.memory_estimate import fit_batch_size, fit_gradient_checkpointing, workload
from mflux_vae_train.dreambooth.reporting import report
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.monitoring.progress import Progress
from mflux_vae_train.pipelines import flux1, tiny
from mflux_vae_train.pipelines.capabilities import PromptTokens
from mflux_vae_train.pipelines.footprint import Footprint, Phase, Workload
from mflux_vae_train.pipelines.tiny import WEIGHTS
from mflux_vae_train.settings.flags import settings_from
from mflux_vae_train.training.hooks import Record, read_metrics
from tests.contracts.fake import FakePipeline
from tests.mflux_vae_train.dreambooth.planning.test_resolve import resolved_from

EXAMPLE = WEIGHTS.parent / "example"


class Weighed(FakePipeline):
    """A pipeline that estimates 1 GB plus 1 GB per sample in a pass, or 0.5 GB with gradient checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.recomputes: bool | None = None
        self.requests: list[Workload] = []

    def release(self, *uses: str) -> None:
        pass

    def quantize(self, bits: int) -> None:
        raise AssertionError("nothing to quantize")

    def skeleton(self) -> nn.Module:
        return self.denoiser

    def set_gradient_checkpointing(self, on: bool) -> None:
        self.recomputes = on

    def footprint(self, work: Workload) -> Footprint:
        self.requests.append(work)
        passes = work.batch * (GB // 2 if work.gradient_checkpointing else GB)
        return Footprint(phases=[Phase("text encoding", GB, 0, 1e9), Phase("training", GB, passes, 2e9)])


@pytest.fixture
def settings(short_run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "write_report", lambda *_, **__: None, raising=False)
    given = {"max_train_steps": 2, "lr_warmup_steps": 0, "with_prior_preservation": False}
    return lambda **changes: short_run(**{**given, **changes})


def log_text(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# estimates


def test_the_estimate_is_logged_before_weights_are_read(settings, caplog, monkeypatch) -> None:
    logs = []
    monkeypatch.setattr(memory_estimate, "_operations_per_second", lambda: 1e7)
    monkeypatch.setattr(
        "mflux_vae_train.dreambooth.planning.prepare.weights_hash", lambda *_: logs.append(log_text(caplog)) or "hash"
    )
    with caplog.at_level(logging.INFO):
        DreamBooth(Weighed()).train(settings(memory_limit=4))
    assert "estimated peak memory: text encoding 1.0 GB, training 2.0 GB (--memory_limit: 4.0 GB)" in logs[0]
    assert "time: at least 8 min, of which 100 s before the first update and 3 min per update" in logs[0]


def test_short_times_are_not_logged(settings, caplog, monkeypatch) -> None:
    monkeypatch.setattr(memory_estimate, "_operations_per_second", lambda: 1e9)
    with caplog.at_level(logging.INFO):
        DreamBooth(Weighed()).train(settings(dry_run=True))
    assert "estimated peak memory" in log_text(caplog) and "time:" not in log_text(caplog)


def test_the_first_update_is_compared_with_the_estimate(settings, caplog, monkeypatch) -> None:
    peaks = iter([2 * GB, 5 * GB, 7 * GB])
    monkeypatch.setattr(memory_estimate.mx, "get_peak_memory", lambda: next(peaks))
    estimate = memory_estimate.Estimate(
        footprint=Footprint(phases=[Phase("latents", 9 * GB, 0, 0), Phase("training", GB, 3 * GB, 0)]),
        limit=int(4.5 * GB),
        lines=[],
        problem=None,
    )
    hook = memory_estimate.compare_first_update(estimate)
    with caplog.at_level(logging.INFO):
        for update in (1, 2):
            hook(Record(update=update, total=2, metrics={}, seconds=1.0))
    assert "used 5.0 GB of memory at its peak (estimated: 4.0 GB)" in log_text(caplog)
    assert "more than the available 4.5 GB" in log_text(caplog) and len(caplog.records) == 2
    caplog.clear()
    peaks = iter([6 * GB, 6 * GB])
    with caplog.at_level(logging.INFO):
        memory_estimate.compare_first_update(estimate)(Record(update=1, total=2, metrics={}, seconds=1.0))
    assert (
        "used at most 6.0 GB of memory at its peak (estimated: 4.0 GB)" in log_text(caplog) and len(caplog.records) == 1
    )


def test_a_run_logs_the_memory_of_its_first_update(settings, caplog) -> None:
    with caplog.at_level(logging.INFO):
        DreamBooth(Weighed()).train(settings())
    assert log_text(caplog).count("the first update used") == 1


def test_a_dry_run_logs_the_estimate_and_reads_no_weights(settings, caplog, tmp_path) -> None:
    pipeline = Weighed()
    with caplog.at_level(logging.INFO):
        DreamBooth(pipeline).train(settings(dry_run=True, memory_limit=1.6, gradient_checkpointing=False))
    assert "this run would not fit: training takes 2.0 GB of 1.6 GB" in log_text(caplog)
    assert "it would fit with --gradient_checkpointing (1.5 GB)" in log_text(caplog)
    assert not pipeline.prompts_encoded and not (tmp_path / "out").exists()


def test_a_published_model_is_estimated_without_a_download(settings, caplog, monkeypatch) -> None:
    pipeline = flux1.load("schnell")
    monkeypatch.setattr("mflux_vae.pretrained.hub.download", lambda *_: pytest.fail("something was downloaded"))
    monkeypatch.setattr(pipeline._snapshot, "is_cached", lambda: False)
    with caplog.at_level(logging.INFO):
        DreamBooth(pipeline).train(settings(model="schnell", dry_run=True, guidance=7.5))
    text = log_text(caplog)
    assert "a LoRA of rank 16 on 418 layers: 65,372,160 weights (attention+mlp)" in text
    assert "to download: 33.7 GB" in text and "estimated peak memory: text encoding" in text
    assert "--guidance 7.5: this model was distilled" in text


def test_guidance_is_no_warning_for_a_guided_model(settings) -> None:
    run = resolved_from(settings(guidance=7.5), flux1.load("dev").recommended)
    assert not any("distilled" in line for line in run.warnings)


def test_a_run_beyond_the_limit_is_refused_with_flags_that_help(settings, tmp_path) -> None:
    with pytest.raises(SettingsError, match=r"--memory_limit.*--gradient_checkpointing \(1\.5"):
        DreamBooth(Weighed()).train(settings(memory_limit=1.6, gradient_checkpointing=False))
    with pytest.raises(SettingsError, match="no flag"):
        DreamBooth(Weighed()).train(settings(memory_limit=0.5))
    assert not (tmp_path / "out" / "run.json").exists()


def test_the_estimated_workload_is_the_run(settings) -> None:
    pipeline = Weighed()
    DreamBooth(pipeline).train(settings(gradient_checkpointing=True, optimizer="lion", rank=3, memory_limit=10))
    assert pipeline.recomputes is True
    work = pipeline.requests[-1]
    assert (work.gradient_checkpointing, work.state_bytes, work.batch, work.micro_batches) == (True, 4, 1, 4)
    assert work.trained == 3 * (14 + 24) + 3 * (24 + 24)


@pytest.mark.parametrize(
    ("small", "pixels", "exact", "joined"),
    [(10**6, 1, False, 1), (10**6, 10**6, False, 4), (1, 10**6, False, 1), (10**6, 10**6, True, 1)],
)
def test_joined_micro_batches_are_estimated(settings, monkeypatch, small, pixels, exact, joined) -> None:
    monkeypatch.setattr(optimizer, "SMALL", small)
    monkeypatch.setattr(optimizer, "PIXELS", pixels)
    monkeypatch.setattr(optimizer, "is_cpu", lambda: True)
    pipeline = Weighed()
    DreamBooth(pipeline).train(settings(dry_run=True, exact_micro_batches=exact))
    assert (pipeline.requests[-1].micro_batches, pipeline.requests[-1].joined_micro_batches) == (4, joined)


@pytest.mark.parametrize(
    "changes", [{"quantize": 4}, {"gradient_checkpointing": True}, {"memory_limit": 5}, {"train_batch_size": None}]
)
def test_flags_without_the_capability_are_refused(settings, changes) -> None:
    with pytest.raises(SettingsError, match="capabilities"):
        DreamBooth(FakePipeline()).train(settings(**changes))


def test_the_largest_image_and_prompt_limit_are_estimated(settings) -> None:
    pipeline = Weighed()
    pipeline.prompt_limit = None
    DreamBooth(pipeline).train(settings(aspect_ratio_buckets="16,16;8,40;24,24", dry_run=True, max_sequence_length=7))
    # images are 20 x 16; the nearest shape is the first square
    assert (pipeline.requests[-1].trained_shape, pipeline.requests[-1].prompt_tokens) == ((16, 16), 7)
    DreamBooth(pipeline).train(settings(aspect_ratio_buckets="40,32;8,48", dry_run=True))
    assert (pipeline.requests[-1].trained_shape, pipeline.requests[-1].resolution) == ((40, 32), 16)
    DreamBooth(pipeline).train(settings(dry_run=True))
    assert (pipeline.requests[-1].trained_shape, pipeline.requests[-1].prompt_tokens) == ((16, 16), None)


def test_the_longest_prompt_is_estimated_where_padding_has_no_effect(settings) -> None:
    pipeline = Weighed()
    pipeline.trim = lambda conditioning: conditioning
    pipeline.inspect_prompts = lambda prompts, limit=None: {
        "words": [PromptTokens(ids=(), count=len(one.split()), limit=limit or 9, end=len(one)) for one in prompts]
    }
    pipeline.prompt_limit = None
    for limit, tokens in ((None, 6), (4, 4)):
        prompts = ("a sks dog on a beach",)
        DreamBooth(pipeline).train(settings(dry_run=True, validation_prompt=prompts, max_sequence_length=limit))
        assert pipeline.requests[-1].prompt_tokens == tokens


@pytest.mark.parametrize("changes", [{"quantize": 5}, {"quantize": 4, "train_mode": "full"}])
def test_invalid_quantizations_are_refused(settings, changes) -> None:
    with pytest.raises(SettingsError, match="--quantize"):
        settings(**changes)


# automatic gradient checkpointing


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("limit", "given", "on"), [(1.6, None, True), (1.6, False, False), (2.1, None, False), (2.1, True, True)]
)
def test_checkpointing_turns_itself_on_where_a_run_does_not_fit(
    settings, caplog, monkeypatch, limit, given, on, dry_run
) -> None:
    monkeypatch.setattr(memory_estimate.tiling_plan, "available_bytes", lambda: int(limit * GB))
    pipeline = Weighed()
    with caplog.at_level(logging.INFO):
        DreamBooth(pipeline).train(settings(gradient_checkpointing=given, dry_run=dry_run))
    assert pipeline.requests[-1].gradient_checkpointing == on and pipeline.recomputes in (on, None)
    lines = [line for line in warnings_of(caplog) if "gradient checkpointing is on" in line]
    assert len(lines) == (on and given is None)
    assert ("it would fit with --gradient_checkpointing" in log_text(caplog)) == (given is False)


def test_checkpointing_is_a_derived_setting_that_may_change_on_resume(settings, tmp_path, monkeypatch) -> None:
    available = [1.6 * GB]
    monkeypatch.setattr(memory_estimate.tiling_plan, "available_bytes", lambda: int(available[0]))

    def stop(progress: Progress) -> None:
        if progress.update == 1 and progress.loss is not None:
            raise KeyError

    pipelines = [Weighed(), Weighed()]
    with pytest.raises(KeyError):
        DreamBooth(pipelines[0]).train(settings(), on_progress=stop)
    written = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())
    assert written["derived"]["gradient_checkpointing"] is True and "gradient_checkpointing" not in written
    available[0] = 100 * GB
    assert DreamBooth(pipelines[1]).train(settings()).updates == 1
    assert [pipeline.recomputes for pipeline in pipelines] == [True, False]


def test_checkpointing_needs_a_known_limit_and_a_smaller_update(settings) -> None:
    other = "cuda" if device.kind() == "mac" else "mac"
    for changes, on in (({}, False), ({"memory_limit": 1.6}, True), ({"memory_limit": 0.9}, True)):
        resolved = resolved_from(settings(dry_run=True, estimate_for=other, **changes))
        work = workload(Weighed(), resolved, trained=100, shape=(16, 16), prompts=3, class_images=0)
        assert fit_gradient_checkpointing(Weighed(), resolved, work)[0].gradient_checkpointing == on

    class Constant(Weighed):
        def footprint(self, work: Workload) -> Footprint:
            return Footprint(phases=[Phase("training", GB, GB, 0)])

    resolved = resolved_from(settings(memory_limit=1))
    assert fit_gradient_checkpointing(Constant(), resolved, work) == (resolved, work)


def test_auto_batch_size_stays_one_with_automatic_checkpointing(settings) -> None:
    """A run that continues with less memory is the same run."""
    for given, size in ((None, 1), (True, 4)):
        pipeline = Weighed()
        changes = {"gradient_checkpointing": given, "train_batch_size": None, "memory_limit": 1.9 if size == 1 else 3.1}
        DreamBooth(pipeline).train(settings(dry_run=True, **changes))
        assert (pipeline.requests[-1].batch, pipeline.requests[-1].gradient_checkpointing) == (size, True)


def test_the_flag_has_an_opposite(instance_dir) -> None:
    flags = ["--model", "x", "--instance_data_dir", str(instance_dir), "--instance_prompt", "a"]
    for more, value in (([], None), (["--gradient_checkpointing"], True), (["--no_gradient_checkpointing"], False)):
        assert settings_from(DreamBoothSettings, [*flags, *more]).gradient_checkpointing is value


# micro-batches


@pytest.mark.parametrize(
    ("limit", "prior", "size"), [(2.1, False, 1), (3.1, False, 2), (6, False, 4), (13.1, False, 12), (6, True, 2)]
)
def test_auto_batch_size_is_the_largest_that_fits(settings, limit, prior, size) -> None:
    given = settings(
        train_batch_size=None,
        gradient_accumulation_steps=12,
        memory_limit=limit,
        with_prior_preservation=prior,
        prior_preservation="class_images" if prior else "none",
    )
    start = resolved_from(given)
    work = workload(Weighed(), start, trained=100, shape=(16, 16), prompts=3, class_images=0)
    found, work = fit_batch_size(Weighed(), start, work)
    assert (work.batch, work.micro_batches) == (size * (2 if prior else 1), 12 // size)
    assert (found.train_batch_size, found.gradient_accumulation_steps) == (size, 12 // size)
    assert f"micro-batches of {size}" in found.notes[-1]


@pytest.mark.parametrize(("processes", "size"), [(1, 12), (2, 6), (3, 4), (5, 2), (12, 1), (40, 1)])
def test_auto_batch_size_leaves_micro_batches_for_every_process(settings, processes, size) -> None:
    given = {"train_batch_size": None, "gradient_accumulation_steps": 12, "prior_preservation": "none"}
    start = resolved_from(settings(**given, memory_limit=100, with_prior_preservation=False))
    work = workload(Weighed(), start, trained=100, shape=(16, 16), prompts=3, class_images=0)
    assert fit_batch_size(Weighed(), start, work, processes)[0].train_batch_size == size


def test_auto_is_a_value_of_the_flag(instance_dir) -> None:
    flags = ["--model", "x", "--instance_data_dir", str(instance_dir), "--instance_prompt", "a"]
    assert settings_from(DreamBoothSettings, [*flags, "--train_batch_size", "auto"]).train_batch_size is None
    assert settings_from(DreamBoothSettings, flags).train_batch_size == 1


def test_a_limit_below_batch_size_one_is_refused(settings) -> None:
    with pytest.raises(SettingsError, match="--memory_limit"):
        DreamBooth(Weighed()).train(settings(train_batch_size=None, memory_limit=1.2))


def test_losses_do_not_depend_on_the_batch_size(settings, tmp_path) -> None:
    """With memory for all four images at once, and for one."""
    losses = []
    for limit, out in ((100, "all"), (2.1, "one")):
        DreamBooth(Weighed()).train(
            settings(train_batch_size=None, memory_limit=limit, output_dir=str(tmp_path / out), max_train_steps=3)
        )
        losses.append([record["loss"] for record in read_metrics(tmp_path / out / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# on the embedded pipeline


def test_an_adapter_on_a_quantized_model_learns(settings, tmp_path) -> None:
    pipeline = tiny.load()
    run = settings(
        model="tiny",
        instance_data_dir=str(EXAMPLE),
        instance_prompt="a photo of xyz star",
        resolution=32,
        quantize=8,
        gradient_checkpointing=True,
        train_batch_size=4,
        gradient_accumulation_steps=1,
        max_train_steps=12,
        learning_rate=3e-3,
    )
    DreamBooth(pipeline).train(run)
    assert isinstance(pipeline.denoiser.transformer_blocks[0].norm1.linear, nn.QuantizedLinear)
    losses = [record["loss"] for record in read_metrics(tmp_path / "out" / "metrics.jsonl")]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), losses


def test_encoders_are_released_during_training(settings, monkeypatch) -> None:
    pipeline = tiny.load()
    seen = []
    whole = type(pipeline).predict

    def predict(self, *arguments, **named):
        seen.append([part.loaded is None for part in (self.prompts.clip, self.prompts.t5, self.parts.vae)])
        return whole(self, *arguments, **named)

    monkeypatch.setattr(type(pipeline), "predict", predict)
    DreamBooth(pipeline).train(
        settings(model="tiny", instance_data_dir=str(EXAMPLE), instance_prompt="a photo of xyz star")
    )
    assert seen and all(gone == [True, True, True] for gone in seen)


def test_speed_on_a_gpu_is_that_of_one_graph_of_products(monkeypatch) -> None:
    evaluations = []
    monkeypatch.setattr(memory_estimate.mx, "eval", lambda product: evaluations.append(product))
    seconds = iter(range(100))
    monkeypatch.setattr(memory_estimate.time, "perf_counter", lambda: next(seconds))
    for kind, products in (("cpu", 1), ("mac", 20), ("cuda", 20)):
        monkeypatch.setattr(memory_estimate, "device_kind", lambda kind=kind: kind)
        evaluations.clear()
        assert memory_estimate._operations_per_second(side=8, repeats=2) == products * 2 * 8**3
        assert len(evaluations) == 3


def test_times_are_formatted() -> None:
    texts = [memory_estimate._seconds_text(seconds) for seconds in (0.031, 60, 600, 7200)]
    assert texts == ["0.031 s", "60 s", "10 min", "2 h 00 min"]
