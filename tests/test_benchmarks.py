"""The benchmark harness: order, comparison and output. No test depends on a measured time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import dreambooth_quality, kernels, quick_start
from benchmarks.__main__ import SCRIPTS
from benchmarks.diffusers_scripts import __main__ as diffusers_scripts
from benchmarks.gpu import __main__ as gpu
from benchmarks.harness import measure as measuring
from benchmarks.harness.at_once import at_once
from benchmarks.harness.cli import Options, main, select
from benchmarks.harness.measure import Disagreement, measure, relative_error
from benchmarks.harness.process import ROOT, ImplementationFailed, Process, Reused
from benchmarks.harness.rows import Implementation, Measured, Result, Row, Work
from benchmarks.harness.table import ratio, summary, table
from benchmarks.harness.weights import tensor
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.settings.flags import settings_from

OURS, FIRST, LAST = (Implementation(name=name, build=f"nowhere:{name}") for name in ("ours", "first", "last"))
ROW = Row(work="a work", ours=OURS, peers=[FIRST, LAST], target=1.3)


class Fake:
    """Implementations without processes: outputs and times by name; `order` lists the calls."""

    def __init__(self, seconds: dict[str, list[float]], outputs: dict[str, float] | None = None) -> None:
        self.seconds, self.outputs, self.order = seconds, outputs or {}, []

    def __call__(self, side: Implementation, threads: int) -> FakeRun:
        return FakeRun(self, side.name)


class FakeRun:
    def __init__(self, fake: Fake, name: str) -> None:
        self.fake, self.name, self.asked = fake, name, 0

    def __enter__(self) -> FakeRun:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def output(self, path: Path) -> None:
        np.savez(path, answer=np.array([1.0, self.fake.outputs.get(self.name, 2.0)]))

    def time(self) -> float:
        self.fake.order.append(self.name)
        self.asked += 1
        return self.fake.seconds[self.name][self.asked - 1]

    def begin_time(self) -> Callable[[], float]:
        return self.time

    def memory(self) -> tuple[int, int]:
        return len(self.name) * 2**20, 7


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(measuring, "PAUSE", 0.0)


def run_row(row: Row, fake: Fake, rounds: int = 3) -> Result:
    return measure(row, rounds=rounds, threads=1, start=fake)


def measurement(name: str = "ours", seconds: float = 2.0, units: float = 1.0, memory: int = 10) -> Measured:
    return Measured(name=name, seconds=[seconds], units=units, memory=memory, base=0, error=None)


def test_implementations_alternate_and_the_fastest_peer_counts():
    fake = Fake({"ours": [2.0, 9.0, 1.0], "first": [6.0, 5.0, 0.0], "last": [3.0, 3.0, 30.0]})
    result = run_row(ROW, fake)
    assert fake.order == ["ours", "first", "last"] * 2 + ["ours", "last"]  # the first one is slow
    assert result.ours.median == 2.0 and result.best.name == "last"
    assert result.ratio == 1.5 and result.met
    assert result.memory_ratio == 1.0
    assert result.ours.error is None and result.best.error == 0.0
    assert not replace(result, row=replace(ROW, target=1.6)).met
    assert result.spread == (pytest.approx(1 / 3), 30.0)


def test_a_failing_optional_peer_is_missing():
    def output(self, path: Path) -> None:
        raise ImplementationFailed(f"{self.name}: no compiler")

    fake = Fake({"ours": [2.0], "last": [3.0]})
    fails = type("Fails", (FakeRun,), {"output": output})

    def start(side: Implementation, threads: int) -> FakeRun:
        return (fails if side.name == "first" else FakeRun)(fake, side.name)

    row = replace(ROW, peers=[replace(FIRST, optional=True), LAST])
    result = measure(row, rounds=1, threads=1, start=start)
    assert result.missing == ["first: no compiler"] and result.ratio == 1.5
    assert "compiler" in measure(replace(row, peers=[FIRST, LAST]), rounds=1, threads=1, start=start).failure


def test_seconds_are_per_unit_and_memory_needs_equal_units():
    result = Result(row=ROW, ours=measurement(seconds=8.0, units=4.0), peers=[measurement("peer", seconds=1.5)])
    assert result.ratio == 0.75
    assert result.memory_ratio is None
    assert replace(result, ours=measurement(memory=5), peers=[measurement("peer")]).memory_ratio == 0.5


def test_disagreeing_outputs_are_not_timed():
    fake = Fake({}, {"last": 2.01})
    result = run_row(ROW, fake)
    assert fake.order == []
    assert result.ratio is None and result.met is None
    assert result.failure == "last and ours disagree: relative error 0.005, allowed 0.001"
    assert "a work: not measured, last and ours disagree" in table([result])


def test_half_precision_is_timed_and_its_error_reported():
    half = Implementation(name="half", build="nowhere:half", compared=False)
    fake = Fake({"ours": [2.0], "half": [1.0]}, {"half": 2.2})
    result = run_row(replace(ROW, peers=[], beside=[half]), fake, rounds=1)
    assert result.best is None and result.ratio is None
    assert result.beside[0].error == pytest.approx(0.1)
    assert "a work, beside: half 1 s, 4 MB, error 1.0e-01" in table([result])


@pytest.mark.parametrize(
    ("output", "words"),
    [({"a": np.zeros(2)}, "outputs are"), ({"b": np.zeros(3)}, "outputs are"), ({"b": np.full(2, np.nan)}, "finite")],
)
def test_names_shapes_and_nan_disagree(output, words):
    with pytest.raises(Disagreement, match=words):
        relative_error(output, {"b": np.ones(2)})


def test_missing_peer_is_reported_and_the_rest_measured():
    absent = replace(FIRST, imports=("no_such_package.inside", "numpy"))
    fake = Fake({"ours": [2.0], "last": [3.0]})
    result = run_row(replace(ROW, peers=[absent, LAST]), fake, rounds=1)
    assert result.missing == ["first: no_such_package is not installed"]
    assert result.ratio == 1.5
    alone = run_row(replace(ROW, peers=[absent]), fake, rounds=1)
    assert alone.ratio is None and alone.failure is None
    text = table([alone])
    assert "| a work | 2 s |  |  |  | ≥ 1.3 |" in text
    assert "a work: first: no_such_package is not installed" in text
    assert "no_such_package" in summary(alone)


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (1.304, "1.30x"), (0.5, "0.50x"), (9.994, "9.99x"), (63.7, "64x")]
)
def test_ratios_are_short(value, text):
    assert ratio(value) == text


def test_table_marks_missed_targets_and_prints_rates():
    row = replace(ROW, unit="steps")
    result = Result(
        row=row, ours=measurement(seconds=2.0, units=8.0), peers=[measurement("peer", seconds=2.0, units=8.0)]
    )
    assert "| 2 s, 4 steps/s | 2 s, 4 steps/s (peer) | 1.00x |  | ≥ 1.3 (missed) | 0 MB | 0 MB | 1.00x |" in table(
        [result]
    )
    assert "| **0.50x** |  | ≥ 1.3 (missed) |" in table([replace(result, ours=measurement(seconds=4.0, units=8.0))])
    data = json.loads(json.dumps(result.to_dict()))
    assert data["ratio"] == 1.0 and data["met"] is False
    assert [(one["name"], one["role"]) for one in data["sides"]] == [("ours", "ours"), ("peer", "peer")]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_name_existing_functions_and_are_unique(quick, gpu, compiled):
    rows = list(select({**SCRIPTS, "kernels": kernels.rows}, Options(quick=quick, gpu=gpu, compiled=compiled), []))
    assert len({row.work for row in rows}) == len(rows)
    for row in rows:
        sides = [row.ours, *row.peers, *row.beside]
        assert len({one.name for one in sides}) == len(sides)
        assert row.tolerance is None or len({one.units for one in sides}) == 1  # what is compared is the same work
        for one in sides:
            module, function = one.build.split(":")
            source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
            assert f"def {function}(" in source
            assert json.loads(json.dumps(dict(one.settings))) == one.settings


def test_select_by_script_or_part_of_the_name():
    scripts = {
        "one": lambda options: [replace(ROW, work="encode 1"), replace(ROW, work="decode 1")],
        "two": lambda options: [replace(ROW, work="encode 2")],
    }
    assert [row.work for row in select(scripts, Options(), ["one"])] == ["encode 1", "decode 1"]
    assert [row.work for row in select(scripts, Options(), ["encode"])] == ["encode 1", "encode 2"]
    assert len(list(select(scripts, Options(), []))) == 3


def test_command_line_lists_rows(capsys: pytest.CaptureFixture) -> None:
    rows = {"one": lambda options: [ROW, replace(ROW, work=f"quick {options.quick}, {options.compiled}")]}
    assert main(rows, None, ["--list", "--quick", "--compile", "--only", "quick"]) == 0
    assert capsys.readouterr().out == "quick True, True\n"


def test_weights_depend_on_name_and_shape():
    one = tensor("conv.weight", (8, 4, 3, 3))
    assert np.array_equal(one, tensor("conv.weight", (8, 4, 3, 3)))
    assert not np.array_equal(one, tensor("other.weight", (8, 4, 3, 3)))
    assert np.std(one) == pytest.approx(36**-0.5, rel=0.15)
    assert np.mean(tensor("norm.weight", (500,))) == pytest.approx(1, abs=0.05)
    assert np.mean(tensor("norm.bias", (500,))) == pytest.approx(0, abs=0.05)


def doubled(count: int) -> Work:
    """An implementation for the test below."""
    return Work(run=lambda: {"answer": 2 * np.arange(count)})


def test_slowdown_of_two_processes() -> None:
    times = {"ours": [1.0, 1.5, 1.25, 1.25], "first": [3.0, 4.0, 6.0, 6.0]}
    text = at_once([ROW], 2, 1, 1, Fake(times))
    assert text.splitlines()[-1] == "| a work | 1 s | 1.5 s | 1.50x | 3 s | 4 s | 1.33x |"


def test_one_process_serves_implementations_of_a_name(tmp_path: Path) -> None:
    with Reused() as start:
        for count in (3, 5):
            side = Implementation(name="a", build="tests.test_benchmarks:doubled", settings={"count": count})
            with start(side, 1) as run:
                run.output(tmp_path / "out.npz")
            assert len(np.load(tmp_path / "out.npz")["answer"]) == count
        with pytest.raises(ImplementationFailed), start(replace(side, build="tests.test_benchmarks:broken"), 1) as run:
            run.time()
        with start(side, 1) as run:
            assert run.time() >= 0


@pytest.mark.parametrize("name", ["conv 3x3, 8x8x8, 96 to 96", "linear with LoRA, 128 rows, 192 to 192"])
def test_operations_return_outputs_and_gradients(name: str) -> None:
    outputs = kernels.our_operation(name, backward=True).run()
    assert outputs.keys() == {"output", *kernels.OPERATIONS[name].inputs}


def broken() -> Work:
    print("printing must not disturb the answers")

    def fail() -> dict[str, int]:
        raise ValueError("no more paper")

    return Work(run=fail)


def test_process_builds_runs_and_measures(tmp_path):
    with Process(
        Implementation(name="doubled", build="tests.test_benchmarks:doubled", settings={"count": 3}), threads=1
    ) as run:
        run.output(tmp_path / "out.npz")
        assert np.load(tmp_path / "out.npz")["answer"].tolist() == [0, 2, 4]
        assert run.time() >= 0
        memory, base = run.memory()
        assert memory >= 0 and base > 2**20


@pytest.mark.parametrize(
    ("build", "words"),
    [
        ("tests.test_benchmarks:broken", "no more paper"),
        ("tests.test_benchmarks:nothing", "AttributeError"),
    ],
)
def test_failure_is_one_line(build, words, tmp_path):
    with (
        Process(Implementation(name="broken", build=build), threads=1) as run,
        pytest.raises(ImplementationFailed, match=rf"^broken: .*{words}"),
    ):
        run.output(tmp_path / "out.npz")


@pytest.mark.parametrize("way", dreambooth_quality.WAYS)
def test_variants_are_valid_settings(way: str) -> None:
    given = {"model": "tiny", "instance_data_dir": "there", "instance_prompt": "a photo of sks star"}
    plain, changed = DreamBoothSettings(**given), DreamBoothSettings(**given, **dreambooth_quality.WAYS[way])
    assert all(getattr(changed, name) == value for name, value in dreambooth_quality.WAYS[way].items())
    assert plain != changed


def test_quick_start_is_the_command_of_the_readme() -> None:
    readme = settings_from(DreamBoothSettings, quick_start.flags())
    assert readme.model == "tiny" and readme.max_train_steps > 100
    assert settings_from(DreamBoothSettings, quick_start.flags(7)).max_train_steps == 7


def test_both_commands_train_with_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(diffusers_scripts, "sample_images", lambda _, prompts, seed: np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(FileNotFoundError, match="--scripts"):
        diffusers_scripts.prepare("tiny", tmp_path, "python", tmp_path / "without", [0])
    (tmp_path / "train_dreambooth_lora_flux.py").touch()
    comparison = diffusers_scripts.prepare("tiny", tmp_path, "python", tmp_path / "data", [0])
    position = mx.load(str(tmp_path / "data/pipeline/text_encoder/model.safetensors"))
    name = "text_model.embeddings.position_embedding.weight"
    assert len(position[name]) == 77 and not position[name][16:].any() and position[name][15].any()

    ours, theirs = (comparison.command(whose, 60, 0, tmp_path / "out") for whose in ("ours", "theirs"))
    settings = settings_from(DreamBoothSettings, ours[3:])
    assert settings.max_train_steps == 60 and settings.caption_dropout == 0 and settings.checkpointing_steps is None
    shared = {flag.partition("=")[0] for flag in ours} & {flag.partition("=")[0] for flag in theirs}
    differ = {flag.partition("=")[0] for flag in {*ours} ^ {*theirs}}
    assert {"--learning_rate", "--rank", "--train_batch_size", "--prior_loss_weight"} < shared - differ
    assert shared & differ == {"--checkpointing_steps", "--weighting_scheme"}  # none and uniform are the same


WITH_BLOCKS = {"memory:training", "memory:small_graphs", "memory:sampling"}
"""Sections with blocks of FLUX take seconds; the tests of FLUX's memory run the same stack."""


@pytest.mark.parametrize("build", sorted({one.build for one in gpu.SECTIONS} - WITH_BLOCKS))
def test_gpu_sections_run_at_small_sizes(build: str) -> None:
    module, function = build.split(":")
    settings = {"weights": None} if function == "autoencoder" else {}
    mx.disable_compile()  # compilation for a CPU takes a minute
    try:
        figures = getattr(import_module(f"benchmarks.gpu.{module}"), function)(quick=True, **settings).run()
    finally:
        mx.enable_compile()
    assert figures and all(np.isfinite(value) and value >= 0 for value, _ in figures.values())
    missed = [name for name, (value, limit) in figures.items() if value > limit and "estimate" not in name]
    assert not missed  # a CPU's memory is not that of a GPU


def test_gpu_benchmark_shows_what_was_measured_before_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def run(section: gpu.Section, **_: Any) -> gpu.Result:
        if section is gpu.SECTIONS[1]:
            raise KeyboardInterrupt
        return gpu.Result(name=section.name, seconds=1, figures={"error": (0.5, 1)})

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main([]) == 1
    out = capsys.readouterr().out
    assert "| error | 0.5 |" in out and out.count("interrupted") == len(gpu.SECTIONS) - 1


def test_gpu_benchmark_goes_on_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    broken = gpu.Section(name="lost", build="numbers:nothing")
    monkeypatch.setattr(gpu, "SECTIONS", (broken, gpu.SECTIONS[0]))
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 1
    out, err = capsys.readouterr()
    assert "| lost | failed: " in out and "no figures of a GPU" in out and "[2/2] convolution" in err
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert not report["gpu"] and "failed" in report["sections"][0]["failure"]
    assert all(figure["met"] in (True, None) for figure in report["sections"][1]["figures"])
