"""Several processes train as one does; when one is gone, all end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.distributed.process_group import SINGLE
from mflux_vae_train.training.hooks import read_metrics
from tests.mflux_vae_train.distributed.launch import launch, ring
from tests.mflux_vae_train.distributed.worker import TOTAL, WINDOWS, Run


def processes(count: int, task: str, folder: Path, *options: str) -> None:
    """Run a task of `worker`."""
    for status, said in ring(count, command(task, folder, *options)):
        assert status == 0, said


def command(task: str, folder: Path, *options: str) -> list[object]:
    return [sys.executable, "-m", "tests.mflux_vae_train.distributed.worker", task, folder, *options]


def notes(folder: Path) -> dict[int, Any]:
    return {int(path.stem): json.loads(path.read_text()) for path in sorted(folder.glob("?.json"))}


def states(folder: Path) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(path)) for path in sorted(folder.glob("?.npz"))]


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Within 1e-5 of the largest element of each array; optimizer state, where sums cancel, within 1e-3."""
    assert one.keys() == other.keys()
    for path, array in one.items():
        near = 1e-3 if path.startswith("optimizer") else 1e-5
        np.testing.assert_allclose(array, other[path], rtol=near, atol=near * float(np.abs(other[path]).max()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, np.ndarray], list[dict[str, float]]]]:
    """State and metrics of a run of one process, by kind of window."""
    left = {}
    for name, windows in WINDOWS.items():
        run = Run(SINGLE, tmp_path_factory.mktemp(name), windows)
        run.train()
        left[name] = (run.arrays(), read_metrics(run.folder / "metrics.jsonl"))
    return left


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of `worker.together` with two processes."""
    folder = tmp_path_factory.mktemp("two")
    processes(2, "together", folder)
    return folder


@pytest.mark.parametrize("name", WINDOWS)
def test_two_processes_give_the_weights_of_one(name: str, two: Path, alone: Any) -> None:
    check(two / name, 2, *alone[name])


def test_four_processes_give_the_weights_of_one(tmp_path: Path, alone: Any) -> None:
    processes(4, "train", tmp_path, "ragged")
    check(tmp_path / "ragged", 4, *alone["ragged"])


def check(folder: Path, count: int, expected: dict[str, np.ndarray], metrics: list[dict[str, float]]) -> None:
    """All processes have equal state, bit for bit, which is close to that of a single process."""
    left = states(folder)
    assert len(left) == count
    for other in left[1:]:
        for path, array in left[0].items():
            np.testing.assert_array_equal(other[path], array)
    same(left[0], expected)
    together = read_metrics(folder / "metrics.jsonl")
    assert len(together) == len(metrics) == TOTAL
    for line, other_line in zip(metrics, together, strict=True):
        assert line.keys() == other_line.keys()
        for key in line.keys() - {"seconds"}:
            assert other_line[key] == pytest.approx(line[key], rel=1e-4), key


def test_exchange(two: Path) -> None:
    results = notes(two)
    assert len(results) == 2
    for rank, each in results.items():
        assert each["gathered"] == [{"rank": other, "text": "x" * 3000 * other} for other in range(2)]
        assert each["arrays"] == [[[[7.0, 7.0]] * other, list(range(other))] for other in range(2)]
        assert each["given"] == [["b", [1, 2]], ["a", True]]
        assert each["rounds"] == [[item, [ord(item), place % 2]] for place, item in enumerate("abcde")]
        assert each["made"] == list("abcde"[rank::2])
        assert each["from first"] == ["said", 1]
        assert each["copied"] == [[0x80000000, np.float32(1.5).view(np.uint32)], 3]
        assert each["sum"] == [3.0, [[2, 2, 2]] * 2]
        assert each["sent"] == 4 + 24
        assert "process 2 of 2" in each["differs"] and "seed is 1, not 0" in each["differs"]


def test_a_loss_that_is_not_finite_stops_all(two: Path) -> None:
    results = notes(two / "broken")
    assert len(results) == 2 and results[0] == results[1] and "update 3" in results[0] and "nan" in results[0]


def test_a_signal_to_one_stops_all_and_another_number_of_processes_resumes(tmp_path: Path, alone: Any) -> None:
    processes(2, "interrupted", tmp_path)
    assert notes(tmp_path) == {rank: {"exit code": 143, "update": 4} for rank in range(2)}
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-4"
    run = Run(SINGLE, tmp_path, WINDOWS["ragged"])
    run.train()
    same(run.arrays(), alone["ragged"][0])
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_signal_to_one_interrupts_long_work_in_all(tmp_path: Path) -> None:
    processes(3, "left", tmp_path, "2")  # the last one notifies the main process, which notifies all
    results = notes(tmp_path)
    assert len(results) == 3 and all((one["exit code"], one["update"]) == (143, 2) for one in results.values())
    assert all(one["seconds"] < 45 for one in results.values()), results
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("kill", "process 2 of 2 ended without a message"),
        ("raise", "process 2 of 2 stopped: no such picture"),
        ("memory", "process 2 of 2 stopped: out of memory ([malloc] Unable to allocate 8 bytes)"),
        ("stop", "process 2 of 2 has been silent"),
        ("engine", "process 2 of 2 has been silent"),
    ],
)
def test_after_the_loss_of_one_process_the_others_save_and_end(how: str, why: str, tmp_path: Path) -> None:
    (status, said), _ = ring(2, command("lost", tmp_path, how), wait_for_last=False)
    assert status == 1 and f"ProcessLost: {why}" in said
    results = notes(tmp_path)
    assert results.keys() == {0} and why in results[0]["why"] and results[0]["seconds"] < 60
    assert results[0]["why"].count("the same command") == 1
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-2"


def test_processes_stopped_together_continue(tmp_path: Path, alone: Any) -> None:
    processes(2, "paused", tmp_path)
    assert notes(tmp_path).keys() == {0, 1}
    together = read_metrics(tmp_path / "metrics.jsonl")
    for line, other in zip(alone["even"][1], together, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)


def test_a_process_that_cannot_be_woken_ends_with_a_message(tmp_path: Path) -> None:
    """As with RDMA, where a collective operation without a peer does not fail."""
    (status, said), _ = ring(2, command("lost", tmp_path, "engine", "asleep"), wait_for_last=False)
    assert status == 1 and "error: process 2 of 2 has been silent" in said and not notes(tmp_path)


def test_one_process_of_the_launcher_is_single() -> None:
    process = launch(
        1,
        [
            sys.executable,
            "-c",
            "from mflux_vae_train.distributed.process_group import SINGLE, join; print(join() is SINGLE)",
        ],
    )
    assert "True" in process.stdout
