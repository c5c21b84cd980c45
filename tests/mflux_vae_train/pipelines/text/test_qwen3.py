"""Qwen3 and the prompt encoders on it: padding, precision, partial files, and prompts that are cut."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train.pipelines.footprint import Precision, Workload
from mflux_vae_train.pipelines.loading.folder import fill, read_tensors, save_network
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.quantization import quantize, stored_bytes
from mflux_vae_train.pipelines.text import qwen3, qwen3_memory
from mflux_vae_train.pipelines.text.qwen3_prompts import KleinPrompts, QwenPrompts, ZImagePrompts
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn
from tests.mflux_vae_train.pipelines.text.qwen_folder import write_qwen_tokenizer

CONFIG = qwen3.Qwen3Config(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=False,
)
HEAD = {"lm_head.weight": mx.ones((300, 64))}


@pytest.fixture(scope="module")
def encoder() -> qwen3.Qwen3Encoder:
    return drawn(qwen3.Qwen3Encoder(CONFIG), 0)


def tensors(encoder: qwen3.Qwen3Encoder) -> dict[str, mx.array]:
    return dict(tree_flatten(encoder.parameters()))


def distance(a: mx.array, b: mx.array) -> float:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return float(mx.abs(a - b).max() / mx.abs(b).max())


IDS = mx.array(np.random.default_rng(0).integers(0, 300, (2, 40)))
MASK = mx.arange(40) < mx.array([[40], [7]])


def test_padding_is_not_read(encoder: qwen3.Qwen3Encoder) -> None:
    """Nor do tokens read later ones."""
    states = encoder(IDS, MASK, [2, 4])
    alone = encoder(IDS[1:, :7], MASK[1:, :7], [2, 4])
    assert distance(states[1:, :7], alone) <= 1e-5
    others = mx.where(MASK, IDS, 5)
    assert distance(encoder(others, MASK, [2, 4])[1, :7], states[1, :7]) <= 1e-5


@pytest.mark.usefixtures("gpu_branch")
def test_code_for_gpus_agrees(encoder: qwen3.Qwen3Encoder) -> None:
    """In bfloat16 within its rounding. It can be traced, too; compiling for a CPU would take a minute."""
    half = fill(qwen3.Qwen3Encoder(CONFIG, 3), tensors(encoder) | HEAD, Path("a file"), None)
    traced = mx.compile(lambda ids, mask: half(ids, mask, [1, 3]))(IDS, MASK)
    assert (traced.shape, traced.dtype) == ((2, 40, 2 * 64), mx.bfloat16)
    mx.disable_compile()
    try:
        assert distance(half(IDS, MASK, [1, 3]), encoder(IDS, MASK, [1, 3])) <= 0.05
    finally:
        mx.enable_compile()


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.03), (4, 0.5)])
def test_quantized_layers(encoder: qwen3.Qwen3Encoder, bits: int, tolerance: float) -> None:
    smaller = fill(qwen3.Qwen3Encoder(CONFIG, 2), tensors(encoder), Path("a file"), None)
    quantize(smaller, bits, qwen3.is_quantized_text_layer)
    assert not any(key.endswith("proj.weight") and one.dtype != mx.uint32 for key, one in tensors(smaller).items())
    assert distance(smaller(IDS, MASK, [2]), encoder(IDS, MASK, [2])) <= tolerance


def test_tensors_that_are_not_needed_are_saved(encoder: qwen3.Qwen3Encoder, tmp_path: Path) -> None:
    partial = fill(qwen3.Qwen3Encoder(CONFIG, 2), tensors(encoder) | HEAD, tmp_path, None)
    assert len(tensors(partial)) == 1 + 2 * 11
    save_network(Lazy.of(partial), tmp_path, "model", "float32")
    saved = read_tensors(tmp_path, "model")
    assert saved.keys() == tensors(encoder).keys() | HEAD.keys()
    assert all(mx.array_equal(saved[key], one) for key, one in tensors(encoder).items())


def test_unknown_and_missing_tensors_raise(encoder: qwen3.Qwen3Encoder) -> None:
    known = tensors(encoder)
    for wrong in (
        known | {"model.layers.4.mlp.up_proj.weight": mx.ones((1,))},
        known | {"vision.weight": mx.ones((1,))},
    ):
        with pytest.raises(WeightsError, match="unknown"):
            fill(qwen3.Qwen3Encoder(CONFIG, 2), wrong, Path("a file"), None)
    known.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(WeightsError, match="missing"):
        fill(qwen3.Qwen3Encoder(CONFIG, 2), known, Path("a file"), None)


def test_mfluxs_file_is_read(encoder: qwen3.Qwen3Encoder) -> None:
    """It has no prefix, rotary frequencies, and a quantized embedding."""
    stored = {key.removeprefix("model."): one for key, one in tensors(encoder).items()}
    stored["rotary_emb.inv_freq"] = mx.ones((16,))
    packed = mx.quantize(stored.pop("embed_tokens.weight"), 64, 8)
    stored |= {f"embed_tokens.{kind}": one for kind, one in zip(("weight", "scales", "biases"), packed, strict=True)}
    found = fill(qwen3.Qwen3Encoder(CONFIG, 2), qwen3.published_names(stored), Path("a file"), None)
    assert distance(found(IDS, MASK, [2]), encoder(IDS, MASK, [2])) <= 0.03


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "gelu"}, {"rope_scaling": {"type": "yarn"}}, {"num_key_value_heads": 3}, {"model_type": "x"}],
)
def test_unsupported_configurations_raise(changes: dict) -> None:
    with pytest.raises(SettingsError):
        qwen3.Qwen3Config.from_dict(CONFIG.to_dict() | changes)


@pytest.fixture(params=[KleinPrompts, ZImagePrompts])
def prompts(request: pytest.FixtureRequest, encoder: qwen3.Qwen3Encoder, tmp_path: Path) -> QwenPrompts:
    write_qwen_tokenizer(tmp_path)
    parts = SimpleNamespace(
        networks={"text_encoder": Lazy.of(encoder)}, tokenizers={"tokenizer": LazyTokenizer(tmp_path)}
    )
    return request.param(parts, (1, 2, 3)) if request.param is KleinPrompts else request.param(parts)


def test_rows_do_not_depend_on_the_batch(prompts: QwenPrompts) -> None:
    prompts.limit = 80
    texts = ["a dog", "", "a photo of a dog that sleeps in the garden"]
    together = prompts.encode(texts)
    assert together["prompt_embeds"].shape[:2] == (3, 80)
    for row, text in enumerate(texts):
        for name, array in prompts.encode([text]).items():
            assert distance(together[name][row : row + 1], array) <= 1e-5, name
    both = prompts.with_unconditional(prompts.encode(["a dog"]))
    assert all(distance(array, together[name][mx.array([1, 0])]) <= 1e-5 for name, array in both.items())


def test_settings_change_the_fingerprint(prompts: QwenPrompts) -> None:
    before = prompts.fingerprint()
    prompts.limit = 80
    assert prompts.fingerprint() != before


def test_places_are_those_of_the_prompt(prompts: QwenPrompts) -> None:
    prompt = "a photo of a dog"
    whole, cut = (prompts.inspect([prompt], limit)["Qwen3"][0] for limit in (None, 12))
    assert (whole.end, whole.is_cut, whole.limit) == (len(prompt), False, 512)
    assert cut.is_cut and len(cut.ids) == cut.limit == 12 and cut.count == whole.count
    assert 0 < cut.end < len(prompt)
    assert whole.ids[: cut.limit] == cut.ids
    only_template = prompts.inspect([prompt], whole.count - 1)["Qwen3"][0]
    assert only_template.is_cut and only_template.end == len(prompt)


def layers_of(config: qwen3.Qwen3Config) -> qwen3.Qwen3Encoder:
    return qwen3.Qwen3Encoder(config, 3)


def test_estimated_weights_are_exact(encoder: qwen3.Qwen3Encoder) -> None:
    work, half = Workload(resolution=64, trained=1), Precision(width=2, fused=True)
    phase = qwen3_memory.text_encoding(layers_of, CONFIG, work, 80, half, states=3)
    assert phase.weights == stored_bytes(layers_of(CONFIG), 2)
    assert qwen3_memory.stored_bytes(CONFIG, 2) == stored_bytes(encoder, 2) + 2 * HEAD["lm_head.weight"].size
    longer = qwen3_memory.text_encoding(layers_of, CONFIG, work, 160, half, states=3)
    assert longer.work == 2 * phase.work and longer.operations > 2 * phase.operations
