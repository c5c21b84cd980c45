"""Checkpoints are complete or absent, verified, and restored strictly."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae_train.checkpointing import checkpoint, state
from mflux_vae_train.checkpointing.state import Stateful
from tests.mflux_vae_train.training.tiny_model import Net


def holder(**entries: Any) -> tuple[dict[str, Any], dict[str, Stateful]]:
    tree = entries or {
        "a": mx.arange(6.0).reshape(2, 3),
        "list": [{"n": mx.array(3, mx.uint64)}, "text", 1.5, None],
    }
    return tree, {"run": state.tree_state(tree)}


def test_round_trip_of_arrays_and_plain_values_in_place(tmp_path: Path) -> None:
    tree, objects = holder()
    folder = checkpoint.save(tmp_path, 7, objects, fingerprint={"seed": 1, "rate": 5e-6})
    assert folder == tmp_path / "checkpoint-7"
    inner = tree["list"][0]
    tree["a"], inner["n"], tree["list"][1] = mx.zeros((2, 3)), mx.array(9, mx.uint64), "other"
    assert checkpoint.load(folder, objects, fingerprint={"seed": 1, "rate": 5e-6}) == 7
    assert mx.array_equal(tree["a"], mx.arange(6.0).reshape(2, 3))
    assert inner["n"].item() == 3 and tree["list"][0] is inner
    assert tree["list"][1:] == ["text", 1.5, None]


def test_restoring_lists_all_faults_and_changes_nothing(tmp_path: Path) -> None:
    _, objects = holder(a=mx.zeros((2,)), b=mx.zeros((2,)), c=mx.zeros((2,)), d=1)
    folder = checkpoint.save(tmp_path, 1, objects)
    tree, other = holder(a=mx.ones((3,)), b=mx.ones((2,), mx.float16), e=mx.ones((1,)), d=2)
    with pytest.raises(TrainingError) as caught:
        checkpoint.load(folder, other)
    message = str(caught.value)
    for fault in (
        "missing run/e",
        "unknown run/c",
        "run/a is float32(2,), expected float32(3,)",
        "run/b is float32(2,), expected float16(2,)",
    ):
        assert fault in message
    assert tree["a"].sum().item() == 3 and tree["d"] == 2


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    _, objects = holder()
    folder = checkpoint.save(tmp_path, 1, objects, fingerprint={"rank": 4, "seed": 0})
    with pytest.raises(SettingsError, match="rank") as caught:
        checkpoint.load(folder, objects, fingerprint={"rank": 8, "seed": 0})
    assert "seed" not in str(caught.value)


@pytest.mark.parametrize("name", [checkpoint.ARRAYS, checkpoint.VALUES])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_skipped(
    name: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, objects = holder()
    good = checkpoint.save(tmp_path, 10, objects)
    bad = checkpoint.save(tmp_path, 20, objects)
    assert checkpoint.latest(tmp_path) == bad
    content = bytearray((bad / name).read_bytes())
    if how == "flip":
        content[content.index(b"step") + 7 if name == checkpoint.VALUES else -3] ^= 1
    (bad / name).write_bytes(content[: len(content) // 2] if how == "truncate" else content)
    if how == "remove":
        (bad / name).unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == good
    assert "checkpoint-20" in caplog.text
    with pytest.raises(TrainingError, match="checkpoint-20"):
        checkpoint.load(bad, objects)


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_a_failed_write_leaves_no_checkpoint_and_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, objects = holder()
    checkpoint.save(tmp_path, 1, objects)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    for step in (1, 2):
        with pytest.raises(TrainingError, match="space"):
            checkpoint.save(tmp_path, step, objects, total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_files_for_other_programs_are_part_of_a_checkpoint(error: BaseException, tmp_path: Path) -> None:
    _, objects = holder()
    folder = checkpoint.save(tmp_path, 1, objects, write_more=lambda place: (place / "more").write_text("1"))
    assert (folder / "more").read_text() == "1" and checkpoint.load(folder, objects) == 1

    def fails(place: Path) -> None:
        (place / "more").write_text("half")
        raise error

    for step in (1, 2):
        with pytest.raises(TrainingError if isinstance(error, OSError) else KeyboardInterrupt):
            checkpoint.save(tmp_path, step, objects, write_more=fails)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (folder / "more").read_text() == "1"
    (folder / "more").unlink()
    assert checkpoint.latest(tmp_path) == folder, "written before there were such files"


def test_partial_checkpoints_are_ignored_and_deleted(tmp_path: Path) -> None:
    _, objects = holder()
    (tmp_path / ".checkpoint-5.writing").mkdir()
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 6, objects)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def test_the_oldest_are_deleted_and_never_the_new_one(tmp_path: Path) -> None:
    _, objects = holder()
    for step in (5, 10, 100, 20):
        checkpoint.save(tmp_path, step, objects, total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    tree, objects = holder(n=1)
    checkpoint.save(tmp_path, 5, objects)
    tree["n"] = 2
    folder = checkpoint.save(tmp_path, 5, objects)
    assert json.loads((folder / checkpoint.VALUES).read_text())["values"] == {"run/n": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_parameters_of_a_module(tmp_path: Path) -> None:
    net, other = Net(seed=1), Net(seed=2)
    net.blocks[0].freeze()
    other.blocks[0].freeze()
    folder = checkpoint.save(tmp_path, 1, {"parameters": state.parameters(net)})
    checkpoint.load(folder, {"parameters": state.parameters(other)})
    assert mx.array_equal(net.out.weight, other.out.weight)
    assert not mx.array_equal(net.blocks[0].weight, other.blocks[0].weight)


def test_what_is_neither_array_nor_json_is_refused(tmp_path: Path) -> None:
    _, objects = holder(a={1, 2})
    with pytest.raises(TypeError, match="run/a"):
        checkpoint.save(tmp_path, 1, objects)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [3, 3000])
def test_the_error_for_entries_that_do_not_fit_stays_short(count: int) -> None:
    now = {"run": state.tree_state({f"{'deep.' * 40}{i}": mx.ones(2) for i in range(count)})}
    arrays, _ = state.flatten(
        {"run": state.tree_state({f"{'deep.' * 40}{i}": mx.ones(3) for i in range(1, 2 * count)})}
    )
    with pytest.raises(TrainingError, match="cannot be restored") as caught:
        state.restore(now, arrays, {}, where="")
    assert len(str(caught.value)) <= 300
    for word in ("missing", "unknown", "float32(2,)"):
        assert word in str(caught.value)


@pytest.mark.parametrize("volume", ["local", "network", "other system"])
def test_files_reach_the_disk_as_each_system_wants_it(
    volume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []

    def fake_fcntl(handle: int, command: int) -> None:
        assert command == 51
        if volume == "network":
            raise OSError("not supported")
        flushed.append("all the way")

    if volume != "other system":
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
        monkeypatch.setattr(fcntl, "fcntl", fake_fcntl)
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append("fsync"))
    checkpoint.save(tmp_path, 1, holder()[1])
    assert flushed == ["all the way" if volume == "local" else "fsync"] * 4
