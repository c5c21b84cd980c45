"""The loop: order of hooks, interruption, and resumed runs that equal uninterrupted ones."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mflux_vae.runtime import device
from mflux_vae_train import lora
from mflux_vae_train.checkpointing import checkpoint, state
from mflux_vae_train.distributed.interrupts import Interrupted
from mflux_vae_train.monitoring.progress import Pace, ProgressBar, duration
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.optimizers.grouped import Grouped
from mflux_vae_train.optimizers.muon import Muon
from mflux_vae_train.training.ema import EMA
from mflux_vae_train.training.hooks import MetricsLog, Record, every, read_metrics
from mflux_vae_train.training.loop import fit
from mflux_vae_train.training.lr_schedule import learning_rate
from mflux_vae_train.training.step import Step
from tests.mflux_vae_train.training.tiny_model import Net, loss, window


class Run:
    """A training with all objects of a checkpoint."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.net = Net()
        if kind == "lora":
            lora.add_lora(self.net, ["blocks.*", "out"], rank=2, dropout=0.2)
        groups = [
            (Muon(), 1.0, lambda path, weight: weight.ndim >= 2 and not path.startswith("out.")),
            (AdamW(), 1.0, None),
        ]
        optimizer = Grouped(groups) if kind == "muon" else AdamW()
        self.ema = EMA(self.net.trainable_parameters(), decay=0.5)
        self.step = Step(self.net, optimizer, self.loss, ema=self.ema)
        self.objects = {
            "parameters": state.parameters(self.net),
            "optimizer": state.tree_state(optimizer.state),
            "ema": state.tree_state(self.ema.state),
        }

    def loss(self, model: Any, arrays: Any) -> Any:
        with lora.dropout_keys(model, arrays["key"]):
            return loss(model, arrays)

    def train(self, start: int, hooks: list[Any]) -> None:
        with MetricsLog(self.folder / "metrics.jsonl", resumed_at=start) as log:
            fit(
                step=self.step,
                batches=window,
                learning_rate=learning_rate(peak=1e-2, total=8, warmup=2, shape="cosine"),
                total=8,
                start=start,
                observers=[log],
                hooks=hooks,
                checkpoint=self.save,
            )

    def save(self, updates: int) -> None:
        checkpoint.save(self.folder, updates, self.objects, fingerprint={"seed": 0}, total_limit=2)

    def everything(self) -> dict[str, mx.array]:
        return dict(tree_flatten({name: one.read() for name, one in self.objects.items()}))

    def metrics(self) -> list[dict[str, float]]:
        return [line | {"seconds": 0} for line in read_metrics(self.folder / "metrics.jsonl")]


def send(number: int, at: int) -> Any:
    """A hook that sends a signal to this process."""
    return lambda record: os.kill(os.getpid(), number) if record.update == at else None


@pytest.mark.parametrize("kind", ["full", "lora", "muon"])
def test_resumed_equals_uninterrupted_bitwise(kind: str, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", kind)
    whole.train(0, [])

    first = Run(tmp_path / "parts", kind)
    first.train(0, [every(3, lambda record: first.save(record.update), last=False), lambda record: None])
    # as if the process had died after update 7: the log is ahead of checkpoint-6 and its last line is torn
    log = tmp_path / "parts" / "metrics.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:7]) + '{"update": 8, "lo')

    second = Run(tmp_path / "parts", kind)
    folder = checkpoint.latest(tmp_path / "parts")
    assert folder is not None
    start = checkpoint.load(folder, second.objects, fingerprint={"seed": 0})
    assert start == 6
    second.train(start, [])

    expected = whole.everything()
    found = second.everything()
    assert expected.keys() == found.keys()
    for path in expected:
        assert mx.array_equal(found[path], expected[path]), path
    assert second.metrics() == whole.metrics()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_after_a_checkpoint_and_it_resumes(number: int, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", "full")
    whole.train(0, [])

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    first = Run(tmp_path / "parts", "full")
    later: list[int] = []
    with pytest.raises(Interrupted) as caught:
        first.train(0, [send(number, at=4), lambda record: later.append(record.update)])
    assert caught.value.exit_code == 128 + number
    assert caught.value.update == 4
    assert isinstance(caught.value, KeyboardInterrupt)
    assert later == [1, 2, 3]  # later hooks are not called after the signal
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert len(first.metrics()) == 4

    second = Run(tmp_path / "parts", "full")
    start = checkpoint.load(tmp_path / "parts" / "checkpoint-4", second.objects, fingerprint={"seed": 0})
    second.train(start, [])
    for path, x in whole.everything().items():
        assert mx.array_equal(second.everything()[path], x), path
    assert second.metrics() == whole.metrics()


def test_a_second_signal_has_its_default_effect() -> None:
    seen = []

    def during(record: Record) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        seen.extend([signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)])

    with pytest.raises(Interrupted):
        fit(step=lambda *_: {"loss": 0.0}, batches=window, learning_rate=float, total=2, hooks=[during])
    assert seen == [signal.SIG_DFL, signal.SIG_DFL]


def test_hooks_run_when_due_after_the_observers() -> None:
    calls: list[tuple[str, int]] = []

    def named(name: str) -> Any:
        return lambda record: calls.append((name, record.update))

    fit(
        step=lambda update, batches, rate: {"loss": float(update)},
        batches=window,
        learning_rate=lambda update: 0.1,
        start=1,
        total=5,
        observers=[named("log")],
        hooks=[every(2, named("save")), every(None, named("end")), every(3, named("look"), last=False)],
    )
    assert calls == [
        ("log", 2),
        ("save", 2),
        ("log", 3),
        ("look", 3),
        ("log", 4),
        ("save", 4),
        ("log", 5),
        ("save", 5),
        ("end", 5),
    ]


def test_a_metrics_log_starts_empty_unless_resumed(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "metrics.jsonl"
    for _ in range(2):
        with MetricsLog(path) as log:
            log(Record(update=1, total=2, metrics={"loss": 0.5}, seconds=0.25))
    assert read_metrics(path) == [{"update": 1, "loss": 0.5, "seconds": 0.25}]
    assert read_metrics(tmp_path / "nowhere.jsonl") == []


def test_the_remaining_time_includes_updates_and_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("mflux_vae_train.monitoring.progress.time.monotonic", lambda: now[0])

    def took(seconds: float) -> Any:
        def hook(record: Record) -> None:
            now[0] += seconds

        return hook

    pace = Pace(10)
    hooks = [pace, pace.timed_every(4, took(60.0)), pace.timed_every(None, took(7.0), seconds=20.0)]
    assert pace.left(0) == 20
    left = []
    for update in range(1, 11):
        for hook in hooks:
            hook(Record(update=update, total=10, metrics={}, seconds=100.0 if update == 1 else 1.0))
        left.append(pace.left(update))
    assert left[2] == 7 * 1.0 + 20  # the duration of a preview is not known yet
    assert left[3:] == [6 + 2 * 60 + 20, 5 + 2 * 60 + 20, 4 + 2 * 60 + 20, 3 + 2 * 60 + 20, 2 + 60 + 20, 1 + 60 + 20, 0]
    assert now[0] == 3 * 60 + 7


@pytest.mark.parametrize("durations", [(1.0,), (1.0, 1.5, 1.2), (2.0, 2.2, 1.8)])
@pytest.mark.parametrize("start", [0, 30])
def test_the_remaining_time_is_right_from_the_fifth_update_on(
    durations: tuple[float, ...], start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update compiles, and so does another one; checkpoints, previews and trackers take their time."""
    now = [0.0]
    monkeypatch.setattr("mflux_vae_train.monitoring.progress.time.monotonic", lambda: now[0])
    total, predicted = 100, {}

    def took(seconds: float) -> Any:
        def hook(record: Record) -> None:
            now[0] += seconds

        return hook

    pace = Pace(total)
    hooks = [pace, took(0.1), pace.timed_every(10, took(1.0)), pace.timed_every(40, took(5.0), seconds=6.0)]
    for update in range(start + 1, total + 1):
        seconds = {start + 1: 49.0, start + 3: 30.0}.get(update, durations[update % len(durations)])
        now[0] += seconds
        record = Record(update=update, total=total, metrics={}, seconds=seconds)
        pace(record)
        predicted[update] = now[0], pace.left(update)
        for hook in hooks[1:]:
            hook(record)
        assert ("unknown" in pace.eta_text(update)) == (update < start + 5)
    for update in range(start + 5, total + 1):
        at, left = predicted[update]
        assert left == pytest.approx(now[0] - at, rel=0.2), update


def test_the_time_when_a_run_is_ready() -> None:
    pace = Pace(1000)
    pace(Record(update=1, total=1000, metrics={}, seconds=600.0))  # compiles
    for update in range(2, 5):
        pace(Record(update=update, total=1000, metrics={}, seconds=6.0))
    assert pace.eta_text(4) == "time left unknown until update 5"
    pace(Record(update=5, total=1000, metrics={}, seconds=6.0))
    assert pace.eta_text(990) == "60 s left"
    assert re.fullmatch(r"50 min left, ready at \d\d:\d\d", pace.eta_text(500))
    pace = Pace(100_000)
    for update in range(1, 6):
        pace(Record(update=update, total=100_000, metrics={}, seconds=6.0))
    assert re.fullmatch(r"6 d 22 h left, ready at \d\d:\d\d on \d{4}-\d\d-\d\d", pace.eta_text(1))


def test_durations_are_rounded_to_minutes() -> None:
    assert [duration(seconds) for seconds in (3, 119, 121, 3599, 4800, 90000)] == [
        *("3 s", "119 s", "2 min", "1 h 00 min", "1 h 20 min", "1 d 1 h"),
    ]


def test_without_a_terminal_progress_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ProgressBar(total=3, interval=1000) as bar:
        for update in (1, 2, 3):
            metrics = {"loss": 1.0, "learning_rate": 1e-4}
            bar(Record(update=update, total=3, metrics=metrics, seconds=0.1))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("update 3 of 3, loss 1.0000, rate 1.00e-04")


def test_the_bar_begins_with_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with ProgressBar(total=7, extra=lambda _: {"more": "text"}) as bar:
        for update in range(1, 6):
            bar(Record(update=update, total=7, metrics={"loss": 1.0, "learning_rate": 1e-4}, seconds=2.0))
    last = sys.stderr.getvalue().split("\r")[-1]
    assert "update/s, 4 s left, loss 1.0000, rate 1.0e-04, more text]" in last.replace("s/update", "update/s")


@pytest.mark.parametrize("kind", ["cpu", "mac", "cuda"])
def test_compiling_for_a_gpu_is_announced_once(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(device, "kind", lambda: kind)
    for start in (0, 3):
        fit(
            step=lambda update, batches, rate: {"loss": 1.0},
            batches=lambda update: [],
            learning_rate=lambda update: 1.0,
            total=3,
            start=start,
        )
    assert caplog.text.count("compiles kernels") == (kind == "cuda")
