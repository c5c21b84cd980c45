"""Text encoders and tokenizers against transformers, live, in float32."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Attention as TheirT5Attention  # noqa: E402

from mflux_vae_train import lora  # noqa: E402
from mflux_vae_train.pipelines.text import clip, t5  # noqa: E402
from mflux_vae_train.pipelines.text.tokenizer import load_tokenizer  # noqa: E402
from mflux_vae_train.tiny_world.tokenizers import build_clip_tokenizer, build_t5_tokenizer  # noqa: E402
from tests.mflux_vae_train.pipelines.text.clip_folders import LAYOUTS, write_clip_folder  # noqa: E402

PUBLISHED_CLIP = {
    "CLIP-L": dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12),
    "OpenCLIP-H": dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23),
    "OpenCLIP-bigG": dict(
        hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280
    ),
}
PUBLISHED_COUNTS = {"CLIP-L": (123_060_480, 196), "OpenCLIP-H": (340_387_840, 372), "OpenCLIP-bigG": (694_659_840, 517)}
"""Parameters and tensors."""

KINDS = {
    False: (clip.CLIPTextModel, clip.CLIPTextConfig, transformers.CLIPTextModel),
    True: (
        clip.CLIPTextModelWithProjection,
        clip.CLIPTextConfigWithProjection,
        transformers.CLIPTextModelWithProjection,
    ),
}
"""Our classes and theirs, by whether the pooled output is projected."""
T5_XXL = dict(
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_heads=64,
    num_layers=24,
    feed_forward_proj="gated-gelu",
    vocab_size=32128,
)
SMALL_CLIP = dict(
    vocab_size=99,
    hidden_size=48,
    intermediate_size=80,
    num_attention_heads=4,
    num_hidden_layers=3,
    max_position_embeddings=20,
)
SMALL_T5 = dict(
    vocab_size=99, d_model=48, d_ff=64, d_kv=10, num_heads=3, num_layers=3, relative_attention_max_distance=20
)


def shapes(module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tree_flatten(module.parameters())}


def load(module, state: dict) -> None:
    module.load_weights([(key, mx.array(value.numpy())) for key, value in state.items()], strict=True)


def relative_error(ours: mx.array, theirs) -> float:
    reference = theirs.detach().numpy()
    return float(np.abs(np.array(ours) - reference).max() / np.abs(reference).max())


def shaken(model):
    """Biases and norms away from 0 and 1, so that none can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator) * parameter.std().nan_to_num(1.0))
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, 57])
def test_clip_agrees(act: str, eos: int) -> None:
    torch.manual_seed(0)
    settings = dict(SMALL_CLIP, hidden_act=act, eos_token_id=eos, initializer_factor=3.0)
    theirs = shaken(transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings)))
    ours = clip.CLIPTextModel(clip.CLIPTextConfig(**settings))
    load(ours, clip.published_names(theirs.state_dict()))

    ids = torch.randint(3, 99, (4, 13))
    ids[0, 5], ids[1, 12], ids[2, 3], ids[2, 9] = 57, 57, 57, 57
    ids[3] = torch.where(ids[3] == 57, 56, ids[3])  # a row without an end token
    expected = theirs(ids)
    hidden, pooled = ours(mx.array(ids.numpy()))
    assert relative_error(hidden, expected.last_hidden_state) <= 1e-4
    assert relative_error(pooled, expected.pooler_output) <= 1e-4


def pair(projected: bool, act: str, **changes) -> tuple:
    """A small encoder of ours and theirs with the same weights."""
    torch.manual_seed(0)
    model, config, their_model = KINDS[projected]
    settings = dict(SMALL_CLIP, hidden_act=act, initializer_factor=3.0, projection_dim=20) | changes
    theirs = shaken(their_model(transformers.CLIPTextConfig(**settings)))
    ours = model(config(**settings))
    load(ours, clip.published_names(theirs.state_dict()))
    return ours, theirs


def end_marked_ids() -> torch.Tensor:
    """Token ids (4, 13): the end token at different places, padding after it."""
    ids = torch.randint(3, 57, (4, 13), generator=torch.Generator().manual_seed(0))
    for row, end in enumerate((1, 5, 9, 12)):
        ids[row, end], ids[row, end + 1 :] = 98, 0
    return ids


@pytest.mark.parametrize(("projected", "act"), [(False, "quick_gelu"), (False, "gelu"), (True, "gelu")])
def test_every_hidden_state_of_clip_agrees(projected: bool, act: str) -> None:
    ours, theirs = pair(projected, act, eos_token_id=2)
    ids = end_marked_ids()
    read = mx.array(ids.numpy())
    expected = theirs(ids, output_hidden_states=True)
    pooled = expected.text_embeds if projected else expected.pooler_output
    assert pooled.shape[1] == (20 if projected else 48)
    norm = (theirs.text_model if projected else theirs).final_layer_norm
    assert len(expected.hidden_states) == 4
    for skip, state in enumerate(reversed(expected.hidden_states)):
        assert relative_error(ours.hidden_state(read, skip=skip), state) <= 1e-4
        assert relative_error(ours.hidden_state(read, skip=skip, final_norm=True), norm(state)) <= 1e-4
        hidden, of_all = ours.hidden_and_pooled(read, skip=skip)
        assert relative_error(hidden, state) <= 1e-4
        assert relative_error(of_all, pooled) <= 1e-4
    assert relative_error(ours(read)[1], pooled) <= 1e-4


@pytest.mark.parametrize("projected", [False, True])
def test_gradients_of_adapters_on_clip_agree(projected: bool) -> None:
    """The loss reads the penultimate state and the pooled output, as SDXL's does."""
    peft = pytest.importorskip("peft")
    ours, theirs = pair(projected, "gelu", eos_token_id=2)
    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=names, init_lora_weights=False))
    lora.add_lora(ours, [f"*.self_attn.{name}" for name in names], rank=4)
    trained = {name: value for name, value in theirs.named_parameters() if value.requires_grad}
    factors = clip.published_names(
        {name.replace(".default.weight", "").replace("_A", "_a").replace("_B", "_b"): v for name, v in trained.items()}
    )
    ours.load_weights([(name, mx.array(value.detach().numpy().T)) for name, value in factors.items()], strict=False)

    ids = end_marked_ids()
    output = theirs(ids, output_hidden_states=True)
    pooled = output.text_embeds if projected else output.pooler_output
    (output.hidden_states[-2].square().mean() + pooled.square().mean()).backward()

    def loss(model) -> mx.array:
        hidden, pooled = model.hidden_and_pooled(mx.array(ids.numpy()), skip=1)
        return hidden.square().mean() + pooled.square().mean()

    found = dict(tree_flatten(nn.value_and_grad(ours, loss)(ours)[1]))
    assert found.keys() == factors.keys() and len(found) == 3 * 4 * 2
    for name, gradient in found.items():
        assert relative_error(gradient, factors[name].grad.T) <= 1e-4, name


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
@pytest.mark.parametrize("masked", [False, True])
def test_t5_agrees(kind: str, masked: bool) -> None:
    torch.manual_seed(0)
    settings = dict(SMALL_T5, feed_forward_proj=kind)
    theirs = shaken(transformers.T5EncoderModel(transformers.T5Config(**settings)))
    ours = t5.T5Encoder(t5.T5Config(**settings))
    load(ours, t5.published_names(theirs.state_dict()))

    ids = torch.randint(0, 99, (3, 40))
    mask = (torch.arange(40)[None] < torch.tensor([40, 17, 5])[:, None]).long() if masked else None
    expected = theirs(ids, attention_mask=mask).last_hidden_state
    hidden = ours(mx.array(ids.numpy()), None if mask is None else mx.array(mask.numpy()))
    assert relative_error(hidden, expected) <= 1e-4


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (32, 20), (16, 64), (8, 1000)])
def test_relative_position_buckets_agree(buckets: int, distance: int) -> None:
    offset = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    expected = TheirT5Attention._relative_position_bucket(offset, True, buckets, distance).numpy()
    assert np.array_equal(t5.relative_position_buckets(600, buckets, distance), expected)


@pytest.mark.parametrize("name", PUBLISHED_CLIP)
def test_published_clip_encoders_have_the_published_keys(name: str) -> None:
    settings = dict(PUBLISHED_CLIP[name], hidden_act="quick_gelu" if name == "CLIP-L" else "gelu", eos_token_id=2)
    model, config, theirs = KINDS[name == "OpenCLIP-bigG"]
    with torch.device("meta"):
        state = theirs(transformers.CLIPTextConfig(**settings)).state_dict()
    found = shapes(model(config(**settings)))
    assert found == {key: tuple(value.shape) for key, value in clip.published_names(state).items()}
    assert (sum(map(math.prod, found.values())), len(found)) == PUBLISHED_COUNTS[name]


def test_t5_xxl_has_the_published_keys() -> None:
    with torch.device("meta"):
        theirs = transformers.T5EncoderModel(transformers.T5Config(**T5_XXL))
    ours = t5.T5Encoder(t5.T5Config(**T5_XXL))
    assert shapes(ours) == {key: tuple(v.shape) for key, v in t5.published_names(theirs.state_dict()).items()}


def write_folder(folder: Path, module, config) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(module.parameters())), metadata={"format": "pt"}
    )


def loaded_without_complaint(kind, folder: Path):
    """transformers opens `folder` and neither misses nor rejects a tensor."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("projected", [False, True])
def test_transformers_opens_our_clip_folder(tmp_path: Path, projected: bool) -> None:
    model, kind, their_model = KINDS[projected]
    config = kind(**SMALL_CLIP, eos_token_id=57)
    ours = model(config)
    clip.init_weights(ours, mx.random.key(0))
    write_folder(tmp_path, ours, config)
    theirs = loaded_without_complaint(their_model, tmp_path)
    ids = np.arange(52, 64)[None]
    output = theirs(torch.tensor(ids))
    expected = output.text_embeds if projected else output.pooler_output
    assert relative_error(ours(mx.array(ids))[1], expected) <= 1e-4
    assert kind.from_dict(theirs.config.to_dict()) == config


def test_transformers_opens_our_t5_folder(tmp_path: Path) -> None:
    config = t5.T5Config(**SMALL_T5, feed_forward_proj="gated-gelu")
    ours = t5.T5Encoder(config)
    t5.init_weights(ours, mx.random.key(0))
    write_folder(tmp_path, ours, config)
    theirs = loaded_without_complaint(transformers.T5EncoderModel, tmp_path)
    ids = np.arange(52, 64)[None]
    assert relative_error(ours(mx.array(ids)), theirs(torch.tensor(ids)).last_hidden_state) <= 1e-4
    assert t5.T5Config.from_dict(theirs.config.to_dict()) == config


@pytest.mark.parametrize("which", ["clip", "clip with projection", "t5"])
def test_fresh_weights_have_transformers_spread(which: str) -> None:
    """Standard deviation of every kind of weight, averaged over layers, within the error of sampling."""
    torch.manual_seed(0)
    if which != "t5":
        settings = dict(SMALL_CLIP, hidden_size=96)
        kind, config, their_kind = KINDS["projection" in which]
        model = their_kind(transformers.CLIPTextConfig(**settings))
        theirs = clip.published_names(model.state_dict())
        ours = kind(config(**settings))
        clip.init_weights(ours, mx.random.key(0))
    else:
        settings = dict(SMALL_T5, d_model=96, feed_forward_proj="gated-gelu")
        theirs = transformers.T5EncoderModel(transformers.T5Config(**settings)).state_dict()
        ours = t5.T5Encoder(t5.T5Config(**settings))
        t5.init_weights(ours, mx.random.key(0))
    for key, value in tree_flatten(ours.parameters()):
        spread, error = theirs[key].std().item(), 8 / np.sqrt(value.size)
        assert float(mx.std(value)) == pytest.approx(spread, rel=error), key
        assert float(mx.mean(value)) == pytest.approx(theirs[key].mean().item(), abs=error * spread + 1e-7), key


WORDS = "a an and are area blue dog grass in light night of on photo sks star starry stars tree zwx".split()
TEXTS = [
    "",
    " ",
    "a photo of a sks dog",
    "A PHOTO of a Blue Star, on Grass!",
    "  two   spaces\t\nand lines ",
    "don't we'll 1234 5.6% foo_bar (x)",
    "star " * 100,
    "x" * 300,
    "naïve café Straße Ünïcöde İstanbul ǅ Ａ ﬁ",
    "日本語 عربى",
    "😀👩‍👩‍👧 emoji",
    "A\u0301\u0302 \u0301A e\u0301",
    "\x00\x01 \ufeff\u200b",
    "<|endoftext|> hi <|startoftext|>",
    "<|ENDOFTEXT|>hi",
    "</s> x <pad> y<unk> <extra_id_0>",
    "▁a ▁photo",
    "dog</w> a</w>",
    "hello! a star! a ! dog!! !",
]


def assert_same_ids(theirs, folder: Path) -> None:
    ours = load_tokenizer(folder)
    assert (ours.vocab_size, ours.pad_id) == (len(theirs), theirs.pad_token_id)
    assert ours.max_length == theirs.model_max_length
    for length in (3, 16, 77):
        expected = theirs(TEXTS, padding="max_length", max_length=length, truncation=True).input_ids
        for text, row, right in zip(TEXTS, np.array(ours.encode(TEXTS, length)).tolist(), expected, strict=True):
            assert row == right, (text, length)


@pytest.mark.parametrize("name", ["CLIPTokenizer", "CLIPTokenizerFast", "AutoTokenizer"])
def test_clip_tokenizers_agree(tmp_path: Path, name: str) -> None:
    build_clip_tokenizer(WORDS, tmp_path, 77)
    assert_same_ids(getattr(transformers, name).from_pretrained(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["T5Tokenizer", "T5TokenizerFast", "AutoTokenizer"])
def test_t5_tokenizers_agree(tmp_path: Path, name: str) -> None:
    build_t5_tokenizer(WORDS, tmp_path, 64)
    assert_same_ids(getattr(transformers, name).from_pretrained(tmp_path), tmp_path)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_clip_tokenizers_agree_on_folders_like_the_published_ones(tmp_path: Path, normalized: bool, fast: bool) -> None:
    """With the special tokens described, with and without `tokenizer.json`."""
    size = build_clip_tokenizer(WORDS, tmp_path, 77)
    if not fast:
        (tmp_path / "tokenizer.json").unlink()
    plain = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    bos, eos = ({"content": token, **plain} for token in ("<|startoftext|>", "<|endoftext|>"))
    special = {"bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": "<|endoftext|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {size - 2: {**bos, "special": True}, size - 1: {**eos, "special": True}},
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert_same_ids(transformers.CLIPTokenizer.from_pretrained(tmp_path), tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokenizers_of_stable_diffusion_agree(tmp_path: Path, layout: str) -> None:
    """As published, and as saved by transformers 5, which writes `tokenizer.json` alone with its settings."""
    write_clip_folder(WORDS, tmp_path / "published", layout)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "published")
    assert theirs.pad_token == LAYOUTS[layout]
    assert_same_ids(theirs, tmp_path / "published")
    theirs.save_pretrained(tmp_path / "saved")
    assert_same_ids(theirs, tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "settings"), [("CLIPTokenizer", {}), ("T5Tokenizer", {}), ("T5Tokenizer", {"extra_ids": 100})]
)
def test_folders_saved_by_transformers_open(tmp_path: Path, name: str, settings: dict) -> None:
    """With T5's hundred sentinels, too, which transformers adds behind the vocabulary."""
    build = build_clip_tokenizer if name == "CLIPTokenizer" else build_t5_tokenizer
    build(WORDS, tmp_path / "ours", 64)
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "ours", **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_ids(theirs, tmp_path / "theirs")
