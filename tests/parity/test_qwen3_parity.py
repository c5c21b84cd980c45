"""Qwen3, its tokenizer and the prompt encoders of FLUX.2 klein and Z-Image against transformers and diffusers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae.weights.keymaps.rules import load_strict  # noqa: E402
from mflux_vae_train.pipelines.loading.lazy import Lazy  # noqa: E402
from mflux_vae_train.pipelines.text import qwen3  # noqa: E402
from mflux_vae_train.pipelines.text.qwen3_prompts import KleinPrompts, ZImagePrompts  # noqa: E402
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer, load_tokenizer  # noqa: E402
from tests.mflux_vae_train.pipelines.text.qwen_folder import write_qwen_tokenizer  # noqa: E402

SMALL = dict(
    vocab_size=280,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
)
PUBLISHED = {  # layers: parameters, tensors
    "4B": (qwen3.QWEN3_4B, {27: (3_114_088_192, 298), 35: (3_921_534_720, 386), None: (4_022_468_096, 398)}),
    "8B": (qwen3.QWEN3_8B, {27: (5_831_883_520, 298), None: (7_568_405_504, 398)}),
}
PROMPTS = [
    "a photo of a dog",
    "",
    "  two  spaces\n\nand lines  ",
    "Ünïcode — 漢字 🐕 e\u0301",
    "<|im_end|> <think>",
    "1234 's",
]


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    return model


def ours(theirs, layers: int | None = None) -> qwen3.Qwen3Encoder:
    config = qwen3.Qwen3Config.from_dict(theirs.config.to_dict())
    encoder = qwen3.Qwen3Encoder(config, layers)
    tensors = qwen3.published_names({name: mx.array(value.numpy()) for name, value in theirs.state_dict().items()})
    load_strict(encoder, encoder.take(tensors), where="reference")
    return encoder


def error(found: mx.array, expected) -> float:
    return float(np.abs(np.array(found) - expected.detach().numpy()).max() / expected.detach().abs().max())


@pytest.mark.parametrize("compiled", [False, True])
def test_every_hidden_state_agrees(theirs, compiled: bool) -> None:
    """Padding included, whose tokens attend to the tokens before it."""
    ids = torch.randint(0, 280, (3, 70))
    mask = (torch.arange(70)[None] < torch.tensor([70, 33, 5])[:, None]).long()
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    encoder = ours(theirs)

    def states(ids: mx.array, mask: mx.array) -> list[mx.array]:
        return encoder.hidden_states(ids, mask, range(5))

    found = (mx.compile(states) if compiled else states)(mx.array(ids.numpy()), mx.array(mask.numpy()))
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) <= 1e-4
    fewer = ours(theirs, 2).hidden_states(mx.array(ids.numpy()), mx.array(mask.numpy()), [2, 1])
    assert max(error(a, expected[tap]) for a, tap in zip(fewer, [2, 1], strict=True)) <= 1e-4


@pytest.mark.parametrize("limit", [512, 12])
def test_prompt_encoders_agree(theirs, tmp_path: Path, limit: int) -> None:
    write_qwen_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    parts = type("Parts", (), {"tokenizers": {"tokenizer": LazyTokenizer(tmp_path)}})()

    parts.networks = {"text_encoder": Lazy.of(ours(theirs, 3))}
    klein = KleinPrompts(parts, (1, 2, 3))
    klein.limit = limit
    expected = diffusers.Flux2KleinPipeline._get_qwen3_prompt_embeds(
        theirs, tokenizer, PROMPTS, max_sequence_length=limit, hidden_states_layers=(1, 2, 3)
    )
    assert error(klein.encode(PROMPTS)["prompt_embeds"], expected) <= 1e-4

    z_image = ZImagePrompts(parts)
    z_image.limit = limit
    pipeline = diffusers.ZImagePipeline.__new__(diffusers.ZImagePipeline)
    pipeline.tokenizer, pipeline.text_encoder = tokenizer, theirs.model
    rows = pipeline._encode_prompt(list(PROMPTS), "cpu", max_sequence_length=limit)
    found = z_image.encode(PROMPTS)
    assert np.array(found["length"]).tolist() == [len(row) for row in rows]
    for row, right in zip(found["prompt_embeds"], rows, strict=True):
        assert row.shape == (limit, 48) and error(row[: len(right)], right) <= 1e-4
        assert not np.array(row[len(right) :]).any()


@pytest.mark.parametrize("fast", [False, True])
def test_tokenizers_agree(tmp_path: Path, fast: bool) -> None:
    """Also in a folder that transformers saved."""
    write_qwen_tokenizer(tmp_path / "ours", fast=fast)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        tokenizer = load_tokenizer(tmp_path / folder)
        assert tokenizer.pad_id == theirs.pad_token_id
        for length in (4, 40):
            expected = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True, padding_side="right")
            ids, lengths = tokenizer.encode_with_lengths(PROMPTS, length)
            assert np.array(ids).tolist() == expected.input_ids
            assert lengths == [sum(row) for row in expected.attention_mask]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_encoders_have_the_published_keys(name: str) -> None:
    config, counts = PUBLISHED[name]
    with torch.device("meta"):
        state = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config.to_dict())).state_dict()
    for layers, count in counts.items():
        encoder = qwen3.Qwen3Encoder(config, layers)
        found = {key: value.shape for key, value in tree_flatten(encoder.parameters())}
        assert found == {key: tuple(value.shape) for key, value in state.items() if encoder.is_needed(key)}
        assert (sum(map(math.prod, found.values())), len(found)) == count


def test_configurations_are_read_and_written(theirs, tmp_path: Path) -> None:
    """transformers 5 writes `rope_parameters`; releases 4 wrote `rope_theta`."""
    newer = theirs.config.to_dict() | {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}
    older = {key: value for key, value in newer.items() if key != "rope_parameters"}
    config = qwen3.Qwen3Config.from_dict(newer)
    assert config.rope_theta == 5e6
    assert qwen3.Qwen3Config.from_dict(older | {"rope_theta": 5e6, "rope_scaling": None}) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters["rope_theta"] == 5e6
    assert qwen3.Qwen3Config.from_dict(read.to_dict()) == replace(config, max_position_embeddings=32768)
