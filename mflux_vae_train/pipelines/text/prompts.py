"""What encoders of prompts share: the unconditional encoding for classifier-free guidance, and a limit of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mflux_vae.runtime.threads import exclusive, thread_safe
from mflux_vae_train.pipelines.capabilities import PromptTokens
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer


class PromptEncoder(ABC):
    """Base of classes that encode prompts. Subclasses call `forget` when a setting changes encodings."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens per prompt, before a tokenizer is opened."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens per prompt: `longest`, or fewer if a tokenizer is configured so."""

    @property
    @abstractmethod
    def settings(self) -> str:
        """Other settings that the encodings depend on; empty, or with a leading space."""

    def __init__(self) -> None:
        self._unconditional: Conditioning | None = None
        self._negative = ""

    @property
    def negative(self) -> str:
        """The prompt that guidance leads away from: the empty one, unless it is set."""
        return self._negative

    @negative.setter
    def negative(self, prompt: str) -> None:
        self._negative = prompt
        self.forget()

    @abstractmethod
    def _encode(self, prompts: Sequence[str]) -> dict[str, mx.array]:
        """Prompts -> conditioning."""

    @abstractmethod
    def inspect(self, prompts: Sequence[str], limit: int | None) -> dict[str, list[PromptTokens]]:
        """What each text encoder reads of each prompt, with at most `limit` tokens."""

    def fingerprint(self) -> str:
        """Settings that the encodings depend on."""
        return f"{self.tokens}{self.settings}"

    @abstractmethod
    def _running(self) -> Sequence[Lazy[Any]]:
        """The text encoders that `encode` runs."""

    @thread_safe
    def encode(self, prompts: Sequence[str]) -> dict[str, mx.array]:
        """Prompts -> conditioning, one row each."""
        encoded = self._encode(prompts)
        if self.negative in prompts:
            index = list(prompts).index(self.negative)
            self._unconditional = {name: array[index : index + 1] for name, array in encoded.items()}
            mx.eval(self._unconditional)  # another thread may need it
        return encoded

    def finish(self, conditioning: Conditioning) -> Conditioning:
        """Run the text encoders that `encode` left to the training step, if any."""
        return conditioning

    def forget(self) -> None:
        """Encode the negative prompt again when it is next needed."""
        self._unconditional = None

    def with_unconditional(self, conditioning: Conditioning) -> Conditioning:
        """The negative prompt's rows, then the given ones: (2 B, ...)."""
        row = self.unconditional()
        return {
            name: mx.concatenate([mx.broadcast_to(row[name], value.shape), value])
            for name, value in conditioning.items()
        }

    @exclusive()
    def unconditional(self) -> Conditioning:
        """The negative prompt's row, encoded once; or every time if the caller may change a text encoder."""
        encoders = self._running()
        if self._unconditional is None or not all(encoder.reloadable for encoder in encoders):
            absent = [encoder for encoder in encoders if encoder.loaded is None]
            self.encode([self.negative])  # stores it
            mx.eval(self._unconditional)
            for encoder in absent:
                encoder.release()
            if absent:
                mx.clear_cache()
        assert self._unconditional is not None
        return self._unconditional


class LimitedPromptEncoder(PromptEncoder):
    """Base of prompt encoders whose main text encoder reads a number of tokens that the user can reduce.

    Args:
        tokenizer: the main text encoder's.
        longest: tokens per prompt in the model's training.
    """

    def __init__(self, tokenizer: LazyTokenizer, longest: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._longest = longest
        self._limit: int | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether the main text encoder, the first of those that run, is loaded."""
        return self._running()[0].loaded is not None

    @property
    def limit(self) -> int | None:
        """Tokens per prompt at most; None or a larger number than the model was trained with: as in its training."""
        return self._limit

    @limit.setter
    def limit(self, tokens: int | None) -> None:
        self._limit = tokens
        self.forget()

    @property
    def longest(self) -> int:
        """Tokens per prompt, before the tokenizer is opened."""
        return min(self._longest, self.limit or self._longest)

    @property
    def tokens(self) -> int:
        """Tokens per prompt: `longest`, or fewer if the tokenizer is configured so."""
        return min(self.tokenizer.get().max_length or self.longest, self.longest)

    @property
    def tokens_if_known(self) -> int:
        """`tokens`, without opening the tokenizer for it."""
        return self.longest if self.tokenizer.loaded is None else self.tokens
