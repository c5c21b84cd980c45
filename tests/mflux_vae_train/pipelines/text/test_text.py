"""Properties of the text encoders that need no other implementation to check against."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mflux_vae.errors import SettingsError
from mflux_vae.weights.keymaps.rules import load_strict
from mflux_vae_train.pipelines.text import clip, t5

GOLDEN = Path(__file__).parent / "golden"
PROJECTED = (clip.CLIPTextModelWithProjection, clip.CLIPTextConfigWithProjection)

CLIP = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)
T5 = dict(vocab_size=60, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu")


def fresh_clip(**settings) -> clip.CLIPTextModel:
    model = clip.CLIPTextModel(clip.CLIPTextConfig(**CLIP | {"eos_token_id": 50} | settings))
    clip.init_weights(model, mx.random.key(0), embedding_std=1.0)
    return model


def fresh_t5(**settings) -> t5.T5Encoder:
    model = t5.T5Encoder(t5.T5Config(**T5 | settings))
    t5.init_weights(model, mx.random.key(0), relative_bias_std=2.0)
    return model


def tokens(shape: tuple[int, ...], low: int = 3, high: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, shape)


def close(a, b, tolerance: float = 1e-5) -> bool:
    return bool(np.allclose(np.array(a), np.array(b), rtol=tolerance, atol=tolerance))


def test_clip_is_causal() -> None:
    model = fresh_clip()
    ids = tokens((1, 12))
    changed = ids.copy()
    changed[0, 7] = 51
    before, after = (np.array(model(mx.array(x))[0]) for x in (ids, changed))
    assert close(before[:, :7], after[:, :7])
    assert (np.abs(before - after).max(axis=-1)[0, 7:] > 1e-3).all()


def test_clip_pools_at_the_first_end_token() -> None:
    ids = tokens((3, 12))
    ids[0, 4], ids[1, [6, 9]], ids[2, 11] = 50, 50, 50
    hidden, pooled = fresh_clip()(mx.array(ids))
    assert close(pooled, np.array(hidden)[[0, 1, 2], [4, 6, 11]], 0)


def test_clip_with_old_config_pools_at_the_highest_id() -> None:
    ids = tokens((3, 12))
    ids[0, 4], ids[1, [6, 9]], ids[2, 0] = 59, 58, 57
    hidden, pooled = fresh_clip(eos_token_id=2)(mx.array(ids))
    assert close(pooled, np.array(hidden)[[0, 1, 2], [4, 6, 0]], 0)


def test_clip_pooled_output_ignores_padding() -> None:
    model = fresh_clip()
    ids = tokens((1, 12))
    ids[0, 6:] = 50
    padded = model(mx.array(ids))[1]
    assert close(padded, model(mx.array(ids[:, :7]))[1])
    ids[0, 8:] = 5
    assert close(padded, model(mx.array(ids))[1])


@pytest.mark.parametrize("name", ["clip_l", "openclip_h", "openclip_bigg"])
def test_clip_answers_as_transformers_does(name: str) -> None:
    """Written by `tests/parity/make_golden.py`."""
    folder = GOLDEN / name
    kind, config = PROJECTED if name == "openclip_bigg" else (clip.CLIPTextModel, clip.CLIPTextConfig)
    model = kind(config.from_dict(json.loads((folder / "config.json").read_text())))
    load_strict(model, clip.published_names(mx.load(str(folder / "model.safetensors"))), where=name, dtype=mx.float32)
    golden = mx.load(str(folder / "golden.safetensors"))
    ids = golden["input_ids"]
    last, pooled = model(ids)
    assert close(last, golden["last"]) and close(pooled, golden["pooled"])
    depth = model.config.num_hidden_layers
    assert close(model.hidden_state(ids, final_norm=True), last, 0)
    for skip in range(depth + 1):
        expected = golden[f"hidden.{depth - skip}"]
        assert close(model.hidden_state(ids, skip=skip), expected)
        hidden, of_all = model.hidden_and_pooled(ids, skip=skip)
        assert close(hidden, expected) and close(of_all, golden["pooled"])


@pytest.mark.parametrize(
    ("sizes", "projected", "parameters", "tensors"),
    [
        ((768, 3072, 12, 12), False, 123_060_480, 196),  # CLIP-L
        ((1024, 4096, 16, 23), False, 340_387_840, 372),  # OpenCLIP-H, whose last layer is not published
        ((1280, 5120, 20, 32), True, 694_659_840, 517),  # OpenCLIP-bigG
    ],
)
def test_published_sizes_of_clip(sizes, projected: bool, parameters: int, tensors: int) -> None:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    kind, config = PROJECTED if projected else (clip.CLIPTextModel, clip.CLIPTextConfig)
    model = kind(config(**dict(zip(names, sizes, strict=True)), projection_dim=sizes[0]))  # its weights are lazy
    found = tree_flatten(model.parameters())
    assert (sum(value.size for _, value in found), len(found)) == (parameters, tensors)


def test_clip_does_not_compute_skipped_layers() -> None:
    model = fresh_clip()
    model.text_model.encoder.layers[-1].mlp.fc1.weight *= float("nan")
    ids = mx.array(tokens((2, 12)))
    assert bool(mx.isfinite(model.hidden_state(ids, skip=1, final_norm=True)).all())
    assert not bool(mx.isfinite(model.hidden_state(ids)).all())


def test_too_many_tokens_for_clip_raise() -> None:
    model = fresh_clip(max_position_embeddings=10)
    assert model(mx.array(tokens((1, 10))))[0].shape == (1, 10, 32)
    with pytest.raises(SettingsError, match="tokens"):
        model(mx.array(tokens((1, 11))))


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_t5_mask_removes_padding(kind: str) -> None:
    model = fresh_t5(feed_forward_proj=kind)
    ids = tokens((2, 12))
    mask = (np.arange(12) < 7).astype(np.int32)[None].repeat(2, 0)
    masked = np.array(model(mx.array(ids), mx.array(mask)))
    assert close(masked[:, :7], model(mx.array(ids[:, :7])))
    assert not close(masked[:, :7], np.array(model(mx.array(ids)))[:, :7], 1e-3)


def test_t5_order_depends_on_the_position_bias() -> None:
    model = fresh_t5()
    ids = tokens((1, 9))
    forward, backward = (np.array(model(mx.array(x))) for x in (ids, ids[:, ::-1].copy()))
    assert not close(forward, backward[:, ::-1], 1e-3)
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    bias.weight = mx.zeros_like(bias.weight)
    forward, backward = (np.array(model(mx.array(x))) for x in (ids, ids[:, ::-1].copy()))
    assert close(forward, backward[:, ::-1])


def test_relative_position_buckets() -> None:
    buckets = t5.relative_position_buckets(300, 32, 128)
    assert np.array_equal(buckets[0, :8], [0, 17, 18, 19, 20, 21, 22, 23])  # keys after the query
    assert np.array_equal(buckets[:8, 0], range(8))  # keys before it
    assert (np.diff(buckets[0]) >= 0)[1:].all()
    assert (buckets[0, 128:] == 31).all()
    assert (buckets[128:, 0] == 15).all()
    assert np.array_equal(buckets[:-1, :-1], buckets[1:, 1:])  # distance is all that counts


@pytest.mark.parametrize(("kind", "dtype"), [("relu", mx.float16), ("relu", mx.bfloat16), ("gated-gelu", mx.float16)])
def test_t5_does_not_overflow_in_half_precision(kind: str, dtype: mx.Dtype) -> None:
    model = fresh_t5(feed_forward_proj=kind)
    for block in model.encoder.block:
        feed_forward = block.layer[1].DenseReluDense
        feed_forward.wo.weight = 3e4 * feed_forward.wo.weight
        assert mx.abs(feed_forward.wo.weight).max() < 65504
    ids = mx.array(tokens((2, 12)))
    expected = np.array(model(ids))
    model.update(tree_map(lambda value: value.astype(dtype), model.parameters()))
    found = model(ids)
    assert found.dtype == dtype
    error = np.abs(np.array(found.astype(mx.float32)) - expected).max() / np.abs(expected).max()
    assert error < (0.01 if dtype == mx.float16 else 0.1)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_clip_in_half_precision(dtype: mx.Dtype) -> None:
    model = fresh_clip(hidden_act="gelu")
    ids = mx.array(tokens((2, 12)))
    expected = np.array(model(ids)[0])
    model.update(tree_map(lambda value: value.astype(dtype), model.parameters()))
    hidden, pooled = model(ids)
    assert hidden.dtype == pooled.dtype == dtype
    assert close(hidden.astype(mx.float32), expected, 0.2 if dtype == mx.bfloat16 else 0.02)


def test_gradient_reaches_every_weight() -> None:
    """No parameter is cut off from the output: each has a gradient somewhere."""
    ids = mx.array(np.arange(3, 19)[None] % 16)
    target = mx.random.normal((16, 32), key=mx.random.key(1))
    for model, read in ((fresh_clip(), lambda m: m(ids)[0]), (fresh_t5(), lambda m: m(ids))):
        _, gradients = nn.value_and_grad(model, lambda m, read=read: (read(m)[0] * target).sum())(model)
        silent = [path for path, value in tree_flatten(gradients) if not mx.abs(value).max() > 0]
        # a bias on the keys moves all scores of a query alike: softmax does not see it
        assert [path for path in silent if "k_proj.bias" not in path] == []


@pytest.mark.parametrize("fresh", [fresh_clip, fresh_t5])
def test_initial_weights_depend_only_on_the_key(fresh) -> None:
    module = clip if fresh is fresh_clip else t5
    first, second = (dict(tree_flatten(fresh().parameters())) for _ in range(2))
    assert all(mx.array_equal(first[path], second[path]) for path in first)
    other = fresh()
    module.init_weights(other, mx.random.key(1))
    different = dict(tree_flatten(other.parameters()))
    drawn = [path for path in first if first[path].ndim == 2]
    assert not any(mx.array_equal(first[path], different[path]) for path in drawn)
    draws = [first[path].flatten()[:8].tolist() for path in drawn]
    assert len({tuple(np.round(np.array(draw) / np.abs(draw[0]), 4)) for draw in draws}) == len(drawn)


def test_initial_standard_deviation_option() -> None:
    bias = fresh_t5().encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert float(mx.std(bias)) == pytest.approx(2.0, rel=0.2)
    embeddings = fresh_clip().text_model.embeddings
    assert float(mx.std(embeddings.token_embedding.weight)) == pytest.approx(1.0, rel=0.1)


def test_config_file_round_trip() -> None:
    _, projected = PROJECTED
    for config in (clip.CLIPTextConfig(**CLIP, hidden_act="gelu"), projected(**CLIP), t5.T5Config(**T5)):
        bookkeeping = {"_name_or_path": "x", "torch_dtype": "bfloat16", "transformers_version": "4.43.3"}
        assert type(config).from_dict(config.to_dict() | bookkeeping) == config


def test_invalid_configs_raise() -> None:
    with pytest.raises(SettingsError, match="hidden_act"):
        clip.CLIPTextConfig(hidden_act="tanh")
    with pytest.raises(SettingsError, match="not a multiple"):
        clip.CLIPTextConfig(hidden_size=100, num_attention_heads=12)
    with pytest.raises(SettingsError, match="feed_forward_proj"):
        t5.T5Config(feed_forward_proj="gated-silu")
    with pytest.raises(SettingsError, match="t5"):
        clip.CLIPTextConfig.from_dict({"model_type": "t5"})
    with pytest.raises(SettingsError, match="umt5"):
        t5.T5Config.from_dict({"model_type": "umt5"})


def test_published_names() -> None:
    one, two = mx.array([1.0]), mx.array([2.0])
    assert clip.published_names({"text_projection.weight": one}) == {"text_projection.weight": one}
    expected = {"text_model.final_layer_norm.bias": one}
    assert clip.published_names({"final_layer_norm.bias": one}) == expected
    old = {"text_model.embeddings.position_ids": two, "text_model.final_layer_norm.bias": one}
    assert clip.published_names(old) == expected
    newest = {**expected, "text_projection.weight": two}  # prefix and projection
    assert clip.published_names(newest) == newest
    assert t5.published_names({"shared.weight": one, "encoder.embed_tokens.weight": two}) == {"shared.weight": one}
    assert t5.published_names({"encoder.embed_tokens.weight": two}) == {"shared.weight": two}
