"""Groups of layers, dead layers, and the spelling of files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae_train.lora.editing.adapter import open_adapter
from mflux_vae_train.lora.editing.description import dialect, groups, training
from tests.mflux_vae_train.lora.editing.random_changes import change, deltas, saved


def test_layers_with_the_same_name_but_for_numbers_are_one_group(tmp_path: Path) -> None:
    dead = replace(change("out", 2), b=mx.zeros((3, 2)))
    layers = {"blocks.0.attn1": change("out", 2), "blocks.11.attn1": change("out", 3, scale=2.0), "blocks.1.ff.0": dead}
    saved_file = replace(_read(tmp_path), changes={"text_encoder_2": layers})
    attention, feed_forward = groups(saved_file)
    assert (attention.network, attention.name) == ("text_encoder_2", "blocks.*.attn1")
    assert (attention.layers, attention.ranks, attention.alphas) == (2, {2: 1, 3: 1}, {2.0: 1, 6.0: 1})
    norms = [np.linalg.norm(one) for one in deltas({"": layers}).values()]
    assert attention.norm == pytest.approx(np.hypot(*norms[:2]), rel=1e-5) and attention.unchanged == 0
    assert (feed_forward.norm, feed_forward.unchanged, feed_forward.parameters) == (0.0, 1, 16)


def _read(folder: Path):
    return saved(folder / "a.safetensors", {"unet": {"down": change("down", 2)}})


def test_groups_of_kohya_tell_their_network(tmp_path: Path) -> None:
    saved(tmp_path / "a.safetensors", {"unet": {"down": change("down", 2)}}, naming="kohya")
    (group,) = groups(open_adapter(tmp_path / "a.safetensors"))
    assert (group.network, group.name, group.convolutions) == ("unet", "down", 1)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("unet.a.lora_A.weight", "PEFT"),
        ("lora_unet_a.lora_down.weight", "kohya"),
        ("unet.a.lora.down.weight", "diffusers"),
        ("unet.a.processor.to_q_lora.down.weight", "diffusers"),
        ("a.lora_a", "MLX"),
    ],
)
def test_the_spelling_shows_in_the_keys(key: str, name: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {key: mx.ones((2, 2))})
    assert name in dialect(tmp_path / "a.safetensors")


def test_the_training_is_what_the_metadata_states() -> None:
    assert training({"ss_seed": "1", "ss_steps": "None", "unrelated": "x"}) == {"ss_seed": "1"}
