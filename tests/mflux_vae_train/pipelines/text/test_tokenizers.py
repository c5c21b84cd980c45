"""Small tokenizers, written and read back: every word one token, any text encodable, rows of one length."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train.pipelines.text.tokenizer import Tokenizer, load_tokenizer
from mflux_vae_train.tiny_world.tokenizers import build_clip_tokenizer, build_t5_tokenizer
from tests.mflux_vae_train.pipelines.text.clip_folders import LAYOUTS, write_clip_folder

WORDS = "a an and are area blue dog grass in light night of on photo sks star starry stars tree zwx".split()
BUILDERS = {"clip": build_clip_tokenizer, "t5": build_t5_tokenizer}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, build in BUILDERS.items():
        build(WORDS, root / name, 16)
    return {name: root / name for name in BUILDERS}


@pytest.fixture(params=["clip", "t5"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokenizer(folders: dict[str, Path], kind: str) -> Tokenizer:
    return load_tokenizer(folders[kind])


def ids(tokenizer: Tokenizer, text: str, length: int | None = None) -> list[int]:
    return np.array(tokenizer.encode([text], length))[0].tolist()


def ends(tokenizer: Tokenizer, kind: str) -> tuple[list[int], int]:
    """Ids before the text, id after it."""
    return ([tokenizer.vocab_size - 2], tokenizer.vocab_size - 1) if kind == "clip" else ([], 1)


def test_each_word_is_one_token(tokenizer: Tokenizer, kind: str) -> None:
    before, after = ends(tokenizer, kind)
    place = len(before)
    found = {word: ids(tokenizer, word) for word in WORDS}
    for row in found.values():
        assert row[:place] == before
        assert row[place + 1 :] == [after] + [tokenizer.pad_id] * (16 - place - 2)
    assert len({row[place] for row in found.values()}) == len(WORDS)


def test_sentence_tokens_are_its_words(tokenizer: Tokenizer, kind: str) -> None:
    place = len(ends(tokenizer, kind)[0])
    sentence = "a photo of a blue star"
    words = [ids(tokenizer, word)[place] for word in sentence.split()]
    assert ids(tokenizer, sentence)[place : place + 6] == words
    assert ids(tokenizer, "  A Photo\tof a\nBLUE star ") == ids(tokenizer, sentence)


def test_empty_prompt_is_special_tokens_and_padding(tokenizer: Tokenizer, kind: str) -> None:
    before, after = ends(tokenizer, kind)
    assert ids(tokenizer, "", 5) == (before + [after] + [tokenizer.pad_id] * 5)[:5]


def test_truncated_prompts_keep_the_end_token(tokenizer: Tokenizer, kind: str) -> None:
    before, after = ends(tokenizer, kind)
    row = ids(tokenizer, "star " * 40)
    assert (row[: len(before)], row[-1], len(row)) == (before, after, 16)
    assert len(set(row[len(before) : -1])) == 1


def test_padding_ids(tokenizer: Tokenizer, kind: str) -> None:
    assert tokenizer.pad_id == (tokenizer.vocab_size - 1 if kind == "clip" else 0)


def test_ids_of_any_text_are_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.integers(0, 0xD800, 3000), rng.integers(0xE000, 0x110000, 3000), np.arange(256)])
    rng.shuffle(points)
    texts = ["".join(map(chr, chunk)) for chunk in np.array_split(points, 300)]
    texts += ["A\u0301\u0302", "👩‍👩‍👧", "</s><pad><unk><|endoftext|><extra_id_0>", "\0", "▁star"]
    rows = np.array(tokenizer.encode(texts, 64))
    assert rows.shape == (305, 64)
    assert rows.min() >= 0
    assert rows.max() < tokenizer.vocab_size


def test_printable_characters_have_tokens(tokenizer: Tokenizer) -> None:
    rows = {tuple(ids(tokenizer, chr(point))) for point in range(33, 127)}
    assert len(rows) == 94 - 26  # capitals are small letters


def test_rows_do_not_depend_on_their_batch(tokenizer: Tokenizer) -> None:
    prompts = ["a star", "", "a photo of a dog, at night"]
    batch = np.array(tokenizer.encode(prompts))
    assert batch.dtype == np.int32
    assert batch.tolist() == [ids(tokenizer, prompt) for prompt in prompts]
    assert np.array_equal(tokenizer.encode("a star"), tokenizer.encode(["a star"]))


@pytest.mark.parametrize("build", BUILDERS.values())
def test_files_depend_only_on_the_set_of_words(tmp_path: Path, build: Callable) -> None:
    sizes = [build(words, tmp_path / str(i), 16) for i, words in enumerate([WORDS, WORDS[::-1] + WORDS])]
    assert sizes[0] == sizes[1] == load_tokenizer(tmp_path / "0").vocab_size
    names = sorted(path.name for path in (tmp_path / "0").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "1").iterdir())
    for name in names:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


@pytest.mark.parametrize("word", ["", "Star", "two words", "naïve", "a-b"])
@pytest.mark.parametrize("build", BUILDERS.values())
def test_words_must_be_lower_case_letters(tmp_path: Path, build: Callable, word: str) -> None:
    with pytest.raises(SettingsError, match="lower-case"):
        build(["star", word], tmp_path, 16)


def test_vocab_and_merges_give_the_ids_of_tokenizer_json(tmp_path: Path, folders: dict[str, Path]) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (old / name).write_bytes((folders["clip"] / name).read_bytes())
    prompts = ["a photo of a dog", "Straße, naïve 123 stars!", "<|endoftext|> it's", "日本語"]
    ours, theirs = load_tokenizer(old), load_tokenizer(folders["clip"])
    assert np.array_equal(ours.encode(prompts), theirs.encode(prompts))


def test_max_length(tokenizer: Tokenizer, folders: dict[str, Path], tmp_path: Path) -> None:
    assert tokenizer.max_length == 16
    assert tokenizer.encode(["a"]).shape == (1, 16)
    assert tokenizer.encode(["a"], 40).shape == (1, 40)
    with pytest.raises(SettingsError, match="max_length"):
        tokenizer.encode(["a"], 0)
    for endless in (10**30, None):
        folder = copied(folders["t5"], tmp_path / str(endless), model_max_length=endless)
        with pytest.raises(SettingsError, match="model_max_length"):
            load_tokenizer(folder).encode(["a"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_of_stable_diffusions_tokenizers(tmp_path: Path, layout: str) -> None:
    """The map of special tokens counts where the settings have no `added_tokens_decoder`, as in SD 2."""
    end = write_clip_folder(WORDS, tmp_path, layout, 16) - 1
    tokenizer = load_tokenizer(tmp_path)
    pad, mark = (0, 0) if LAYOUTS[layout] == "!" else (end, 256)  # "!" of a prompt is the padding token, too
    assert tokenizer.pad_id == pad
    row = ids(tokenizer, "dog star!")
    assert row[3:] == [mark, end] + [pad] * 11


def copied(folder: Path, target: Path, **settings: object) -> Path:
    """A copy with other settings in tokenizer_config.json; special_tokens_map.json is left out."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name != "special_tokens_map.json":
            (target / path.name).write_bytes(path.read_bytes())
    config = target / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return target


def test_clear_errors_for_bad_folders(tmp_path: Path, folders: dict[str, Path], kind: str) -> None:
    good = folders[kind]
    with pytest.raises(WeightsError, match="no tokenizer folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="pad_token"):
        load_tokenizer(copied(good, tmp_path / "pad", pad_token="<nothing>"))
    with pytest.raises(WeightsError, match="added_tokens_decoder"):
        load_tokenizer(copied(good, tmp_path / "added", added_tokens_decoder={"0": "text"}))

    broken = copied(good, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="not a tokenizer"):
        load_tokenizer(broken)
    (broken / "tokenizer.json").unlink()
    if kind == "clip":
        (broken / "merges.txt").write_text("#version: 0.2\nq zz\n")
        with pytest.raises(WeightsError, match="do not fit together"):
            load_tokenizer(broken)
        (broken / "merges.txt").unlink()
    with pytest.raises(WeightsError, match=r"neither tokenizer\.json nor"):
        load_tokenizer(broken)
    (broken / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightsError, match="not JSON"):
        load_tokenizer(broken)
    (broken / "tokenizer_config.json").unlink()
    with pytest.raises(WeightsError, match="is missing"):
        load_tokenizer(broken)
