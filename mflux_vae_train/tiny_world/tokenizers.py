"""Write CLIP and T5 tokenizers with a small vocabulary, in folders that transformers and diffusers read.

Each given word is one token; other text is split into smaller pieces. Equal words give files equal to the byte.
"""

from __future__ import annotations

import itertools
import json
import re
import string
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.text.tokenizer import END_OF_WORD, clip_backend

BOS, EOS = "<|startoftext|>", "<|endoftext|>"

_WORD, _SPACE, _CHARACTER = -2.0, -4.0, -6.0
"""Log-probabilities of T5 pieces: a whole word is more probable than its letters."""


def build_clip_tokenizer(words: Iterable[str], folder: str | Path, max_length: int) -> int:
    """Write a byte-pair tokenizer like OpenAI's CLIP's.

    Ids: the 256 bytes, the 256 bytes at a word's end, merged pieces, start of text, end of text. Rows are
    padded with the end of text, as FLUX.1's are.

    Args:
        words: lower-case ASCII words.
        folder: created if missing.
        max_length: `model_max_length`, tokens per row.

    Returns:
        the vocabulary's size.

    Raises:
        SettingsError: a word with other characters than lower-case ASCII letters.
    """
    from tokenizers import AddedToken

    merges = _merges(_checked(words))
    alphabet = list(_byte_characters().values())
    pieces = [*alphabet, *(character + END_OF_WORD for character in alphabet)]
    pieces += dict.fromkeys(left + right for left, right in merges)
    vocab = {piece: index for index, piece in enumerate([*pieces, BOS, EOS])}

    folder = _created(folder)
    backend = clip_backend(vocab, merges, bos=BOS, eos=EOS, unk=EOS)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (BOS, EOS)])
    backend.save(str(folder / "tokenizer.json"))
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    _write_settings(folder, "CLIPTokenizer", max_length, special, {"do_lower_case": True})
    return len(vocab)


def build_t5_tokenizer(words: Iterable[str], folder: str | Path, max_length: int) -> int:
    """Write a unigram tokenizer like T5's: pad 0, end 1, unknown 2, words with their space, characters.

    Unlike T5's it folds ASCII capitals, as SentencePiece's `_cf` rules do, to save vocabulary. Characters outside
    printable ASCII are unknown.

    Args, Returns, Raises: see `build_clip_tokenizer`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    characters = sorted(set(string.punctuation + string.digits + string.ascii_lowercase))
    pieces = [(token, 0.0) for token in special.values()]
    pieces += [("▁", _SPACE), *(("▁" + word, _WORD) for word in _checked(words))]
    pieces += [(character, _CHARACTER) for character in characters]

    backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    backend.normalizer = normalizers.Precompiled(_lower_case_rules())
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special.values()])

    folder = _created(folder)
    backend.save(str(folder / "tokenizer.json"))
    _write_settings(folder, "T5Tokenizer", max_length, special, {"extra_ids": 0})
    return len(pieces)


def _checked(words: Iterable[str]) -> list[str]:
    """Sorted words without duplicates."""
    unique = sorted(set(words))
    for word in unique:
        if not re.fullmatch("[a-z]+", word):
            raise SettingsError(f"tokenizer word {word!r} must consist of lower-case ASCII letters")
    return unique


def _byte_characters() -> dict[int, str]:
    """A printable character for every byte, in OpenAI's order; printable bytes represent themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al., 2016), learnt on `words` until each is one piece.

    The most frequent pair is merged next, ties in alphabetical order.
    """
    ranks: dict[tuple[str, str], int] = {}
    texts = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    while pairs := Counter(pair for text in texts for pair in itertools.pairwise(text)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks[best] = len(ranks)
        texts = [_merged(text, ranks) for text in texts]
    return list(ranks)


def _merged(text: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge neighbours, the earliest learnt first, until no known pair is left."""
    text = list(text)
    while known := [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(text)) if pair in ranks]:
        place = min(known)[1]
        text[place : place + 2] = [text[place] + text[place + 1]]
    return text


def _lower_case_rules() -> bytes:
    """SentencePiece's compiled normalization rules for A-Z -> a-z and nothing else.

    The format is a length, a Darts-clone double array (a trie of the keys, whose leaves point into the last part) and
    the replacements, each ended by a zero byte. All keys here have one byte, so the layout is simple: the root leads to
    a key's unit at 128 + byte, and this to its leaf, 128 units later. A unit holds its label in bits 0-7, "a leaf
    follows" in bit 8, and from bit 10 up the exclusive-or distance to its children.
    """
    units = [0] * 512  # for any byte after a leaf, the search stays within the array
    units[0] = 128 << 10
    for index, letter in enumerate(string.ascii_uppercase):
        place = 128 + ord(letter)
        units[place] = ((place ^ (place + 128)) << 10) | 1 << 8 | ord(letter)
        units[place + 128] = 1 << 31 | 2 * index
    replacements = b"".join(letter.encode() + b"\0" for letter in string.ascii_lowercase)
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + replacements


def _created(folder: str | Path) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_settings(folder: Path, kind: str, max_length: int, special: dict[str, str], more: dict[str, Any]) -> None:
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": kind, "model_max_length": max_length, **special, **more}
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
