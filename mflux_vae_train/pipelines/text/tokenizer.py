"""Prompts -> token ids, by the tokenizer folders of published pipelines.

The ids are those of transformers. The `tokenizers` library is used directly, as it imports in a fiftieth of the time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.utils.text_files import parse_json, read_text
from mflux_vae_train.pipelines.capabilities import PromptTokens
from mflux_vae_train.pipelines.loading.lazy import Lazy

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_WORD = "</w>"
_CLIP_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LONGEST = 1_000_000
"""transformers writes a larger `model_max_length` if there is none."""


class Tokenizer:
    """A tokenizer whose rows are padded or truncated to one length; truncation keeps the end token.

    Attributes:
        vocab_size: number of ids, special tokens included.
        max_length: the folder's `model_max_length`; None if it has none.
        pad_id: id that fills short rows.
        unknown_id: id of text that the vocabulary lacks; None if there is none.
    """

    def __init__(self, backend: Backend, *, pad_id: int, max_length: int | None, unknown_id: int | None = None):
        backend.no_padding()
        self._backend = backend
        self._fixed = backend.num_special_tokens_to_add(False)
        self.pad_id = pad_id
        self.unknown_id = unknown_id
        self.max_length = max_length
        self.vocab_size: int = backend.get_vocab_size()

    def encode(self, prompts: Sequence[str] | str, max_length: int | None = None) -> mx.array:
        """Prompts -> ids, int32 (B, max_length); arguments and errors as in `encode_with_lengths`."""
        return self.encode_with_lengths(prompts, max_length)[0]

    def encode_with_lengths(
        self, prompts: Sequence[str] | str, max_length: int | None = None
    ) -> tuple[mx.array, list[int]]:
        """Prompts -> ids, int32 (B, max_length), and the number of ids of each row before its padding.

        Args:
            prompts: any text, the empty one included; a single string is a batch of one.
            max_length: tokens per row, special tokens included; None for the folder's.

        Raises:
            SettingsError: `max_length` leaves no room for the special tokens, or is needed and missing.
        """
        length = self._length(max_length)
        self._backend.enable_truncation(length)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids, lengths = np.full((len(prompts), length), self.pad_id, np.int32), []
        for row, prompt in zip(ids, prompts, strict=True):
            found = self._backend.encode(prompt).ids
            row[: len(found)] = found
            lengths.append(len(found))
        return mx.array(ids), lengths

    def inspect(self, prompts: Sequence[str], max_length: int | None = None) -> list[PromptTokens]:
        """What `encode` reads of each prompt; arguments and errors as there."""
        length = self._length(max_length)
        found = []
        for prompt in prompts:
            self._backend.no_truncation()
            whole = self._backend.encode(prompt)
            self._backend.enable_truncation(length)
            read = self._backend.encode(prompt)
            special = zip(read.offsets, read.special_tokens_mask, strict=True)
            places = zip(whole.ids, whole.offsets, whole.special_tokens_mask, strict=True)
            found.append(
                PromptTokens(
                    ids=tuple(read.ids),
                    count=len(whole.ids),
                    limit=length,
                    end=max((end for (_, end), is_special in special if not is_special), default=0),
                    unknown=tuple(span for one, span, mark in places if one == self.unknown_id and not mark),
                )
            )
        return found

    def _length(self, max_length: int | None) -> int:
        length = self.max_length if max_length is None else max_length
        if length is None:
            raise SettingsError("the tokenizer has no model_max_length: give max_length")
        if length < max(self._fixed, 1):
            raise SettingsError(f"max_length is {length}; the special tokens alone take {self._fixed}")
        return length


class LazyTokenizer(Lazy[Tokenizer]):
    """A tokenizer and its folder, opened on first use.

    Args:
        folder: its files, which are checked now; or a function that returns it, and may download it.
    """

    def __init__(self, folder: Path | Callable[[], Path]) -> None:
        super().__init__(lambda: load_tokenizer(self.folder))
        self._folder = folder
        if not callable(folder):
            self.get()

    @property
    def folder(self) -> Path:
        return self._folder() if callable(self._folder) else self._folder

    def fingerprint_files(self) -> str:
        """Hash of names and contents of the files."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.folder.iterdir() if path.is_file()):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Open a tokenizer folder: `tokenizer.json`, or the older `vocab.json` and `merges.txt` of CLIP and Qwen.

    Raises:
        WeightsError: the folder or one of its files is missing or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"no tokenizer folder at {folder}")
    settings = _read_json(folder / "tokenizer_config.json")
    special = folder / "special_tokens_map.json"
    if special.is_file():
        # as in transformers: without descriptions of the tokens, as in Stable Diffusion 2, this file counts
        described = "added_tokens_decoder" in settings
        settings = _read_json(special) | settings if described else settings | _read_json(special)

    if (folder / "tokenizer.json").is_file():
        backend = _open_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _open_vocab_and_merges(folder, settings)
    else:
        raise WeightsError(f"{folder} has neither tokenizer.json nor vocab.json with merges.txt")
    try:
        _mark_special(backend, settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder}: tokenizer_config.json has malformed added_tokens_decoder") from error

    pad = _content(settings.get("pad_token"))
    pad_id = None if pad is None else backend.token_to_id(pad)
    if pad_id is None:
        raise WeightsError(f"{folder}: pad_token {pad!r} of tokenizer_config.json is not in the vocabulary")
    length = settings.get("model_max_length")
    max_length = int(length) if isinstance(length, int | float) and 0 < length <= _LONGEST else None
    unknown = _content(settings.get("unk_token"))
    unknown_id = None if unknown is None else backend.token_to_id(unknown)
    return Tokenizer(backend, pad_id=pad_id, max_length=max_length, unknown_id=unknown_id)


def clip_backend(vocab: dict[str, int], merges: list[tuple[str, str]], *, bos: str, eos: str, unk: str) -> Backend:
    """CLIP's byte-pair encoding: lower case, words separate from digits and punctuation, `</w>` at a word's end.

    The regular expression is OpenAI's (Radford et al., 2021, `simple_tokenizer.py`), the normalization that
    of transformers' CLIPTokenizer.

    Raises:
        ValueError: `merges` and `vocab` do not fit together, or a special token has no id.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

    for token in (bos, eos, unk):
        if token not in vocab:
            raise ValueError(f"special token {token!r} is not in the vocabulary")
    backend = Tokenizer(_byte_pairs(vocab, merges, end_of_word_suffix=END_OF_WORD, unk_token=unk))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    pieces = pre_tokenizers.Split(Regex(_CLIP_PIECES), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(
        (eos, vocab[eos]), (bos, vocab[bos]), trim_offsets=False, add_prefix_space=False
    )
    return backend


def qwen_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Backend:
    """Qwen's byte-pair encoding (transformers' Qwen2Tokenizer), without special tokens.

    Raises:
        ValueError: `merges` and `vocab` do not fit together.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    backend = Tokenizer(_byte_pairs(vocab, merges))
    backend.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(_QWEN_PIECES), behavior="isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_of])
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_pairs(vocab: dict[str, int], merges: list[tuple[str, str]], **settings: str) -> Any:
    from tokenizers import models

    try:
        return models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", **settings)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(str(error)) from error


def _open_tokenizer_json(path: Path) -> Backend:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(read_text(path, WeightsError))
    except WeightsError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise WeightsError(f"{path} is not a tokenizer: {error}") from error


def _open_vocab_and_merges(folder: Path, settings: dict[str, Any]) -> Backend:
    vocab = _read_json(folder / "vocab.json")
    lines = read_text(folder / "merges.txt", WeightsError).split("\n")
    pairs = (line.strip().partition(" ") for line in lines if line.strip() and not line.startswith("#version"))
    merges = [(left, right) for left, _, right in pairs]
    if str(settings.get("tokenizer_class")).startswith("Qwen2Tokenizer"):
        build: Callable[[], Backend] = partial(qwen_backend, vocab, merges)
    else:
        build = partial(_clip_backend, vocab, merges, settings)
    try:
        return build()
    except ValueError as error:
        raise WeightsError(f"{folder}: vocab.json and merges.txt do not fit together: {error}") from error


def _clip_backend(vocab: dict[str, int], merges: list[tuple[str, str]], settings: dict[str, Any]) -> Backend:
    bos = _content(settings.get("bos_token")) or "<|startoftext|>"
    eos = _content(settings.get("eos_token")) or "<|endoftext|>"
    unk = _content(settings.get("unk_token")) or eos
    return clip_backend(vocab, merges, bos=bos, eos=eos, unk=unk)


def _mark_special(backend: Backend, settings: dict[str, Any]) -> None:
    """Let the backend recognise special tokens in text, as `tokenizer_config.json` describes them.

    With `normalized` a token is also recognised in capitals. As in transformers, this file overrides `tokenizer.json`.
    """
    from tokenizers import AddedToken

    flags = ("lstrip", "rstrip", "single_word", "normalized")
    marked = {token.content for token in backend.get_added_tokens_decoder().values()}
    tokens: dict[str, dict[str, bool]] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(name)
        text = _content(token)
        if text is not None and text not in marked and backend.token_to_id(text) is not None:
            table = token if isinstance(token, dict) else {}
            tokens[text] = {flag: bool(table.get(flag)) for flag in flags}
    described = settings.get("added_tokens_decoder") or {}
    for index in sorted(described, key=int):  # tokens new to the vocabulary get ids in this order
        tokens[described[index]["content"]] = {flag: bool(described[index].get(flag)) for flag in flags}
    backend.add_special_tokens([AddedToken(text, **kind) for text, kind in tokens.items()])


def _content(token: object) -> str | None:
    """Text of a special token, which files store as text or as a table."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_text(path, WeightsError))
    except FileNotFoundError as error:
        raise WeightsError(f"{path.name} is missing in {path.parent}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} is not a table of names and values")
    return values
