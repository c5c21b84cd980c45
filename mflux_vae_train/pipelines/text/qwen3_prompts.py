"""Prompts -> conditioning, by Qwen3 as a chat model that is about to answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mlx.core as mx

from mflux_vae.runtime.threads import thread_safe
from mflux_vae_train.pipelines.capabilities import PromptTokens
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.text.prompts import LimitedPromptEncoder
from mflux_vae_train.pipelines.text.qwen3 import Qwen3Encoder

EMBEDS, LENGTH = "prompt_embeds", "length"
"""Arrays of a conditioning: (B, L, D), and the number of tokens before the padding, (B,) int32."""

TOKENS = 512
"""Tokens per prompt in training of the published models, those of the chat template included."""

KLEIN_TAPS = (9, 18, 27)
"""Layers of Qwen3 after which FLUX.2 klein reads the hidden states."""

_ROUNDED = 32
"""Rows that need no padding are encoded with a multiple of this length, so that few shapes occur."""


@dataclass(frozen=True)
class ChatTemplate:
    """Text around a prompt. These two strings are all that Qwen3's template adds to one message of a user."""

    before: str
    after: str

    def __call__(self, prompt: str) -> str:
        return f"{self.before}{prompt}{self.after}"

    def inspected(self, tokens: PromptTokens, prompt: str) -> PromptTokens:
        """Tokens of the whole text, with the places of characters in the prompt alone."""
        start, length = len(self.before), len(prompt)
        unknown = [(a - start, b - start) for a, b in tokens.unknown if a >= start and b <= start + length]
        return replace(tokens, end=min(max(tokens.end - start, 0), length), unknown=tuple(unknown))


THINKING = ChatTemplate("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
NOT_THINKING = replace(THINKING, after=f"{THINKING.after}<think>\n\n</think>\n\n")
"""`enable_thinking=False` answers with an empty thought."""


class QwenPrompts(LimitedPromptEncoder):
    """Base of the prompt encoders. Text that exceeds the limit is cut at its end, the template's included.

    Args:
        parts: with `text_encoder` and `tokenizer`.

    Attributes:
        encoder: the text encoder.
    """

    template: ClassVar[ChatTemplate]

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts.tokenizers["tokenizer"], TOKENS)
        self.encoder: Lazy[Qwen3Encoder] = parts.networks["text_encoder"]

    def _encode(self, prompts: Sequence[str]) -> dict[str, mx.array]:
        texts = [self.template(prompt) for prompt in prompts]
        return self._encode_tokens(*self.tokenizer.get().encode_with_lengths(texts, self.tokens))

    @abstractmethod
    def _encode_tokens(self, ids: mx.array, lengths: list[int]) -> dict[str, mx.array]:
        """Padded ids (B, L) -> conditioning."""

    def _running(self) -> Sequence[Lazy[Any]]:
        return [self.encoder]

    @thread_safe
    def inspect(self, prompts: Sequence[str], limit: int | None) -> dict[str, list[PromptTokens]]:
        """What Qwen3 reads of each prompt. `count` and `limit` include the template's tokens."""
        texts = [self.template(prompt) for prompt in prompts]
        found = self.tokenizer.get().inspect(texts, min(self.tokens, limit or self.tokens))
        pairs = zip(found, prompts, strict=True)
        return {"Qwen3": [self.template.inspected(one, prompt) for one, prompt in pairs]}

    @property
    def settings(self) -> str:
        """See `PromptEncoder`."""
        return f" {self.template}"


class KleinPrompts(QwenPrompts):
    """FLUX.2 klein's prompts: `prompt_embeds` (B, L, 3 * hidden_size), the states after several layers side by side.

    Rows are padded to L tokens, and the transformer reads the padding, too. In Qwen3, no token attends to padding.

    Args:
        taps: numbers of layers, see `Qwen3Encoder`.
    """

    template = NOT_THINKING

    def __init__(self, parts: Parts, taps: Sequence[int] = KLEIN_TAPS) -> None:
        super().__init__(parts)
        self.taps = tuple(taps)

    def _encode_tokens(self, ids: mx.array, lengths: list[int]) -> dict[str, mx.array]:
        return {EMBEDS: self.encoder.get()(ids, _mask(ids.shape[1], mx.array(lengths)), self.taps)}

    @property
    def settings(self) -> str:
        """See `PromptEncoder`."""
        return f"{super().settings} {self.taps}"


class ZImagePrompts(QwenPrompts):
    """Z-Image's prompts: `prompt_embeds` (B, L, hidden_size), the state before the last layer, and `length` (B,).

    Embeddings beyond a row's length are zero. L is the limit of tokens for every prompt, so that rows of different
    batches fit together; `ZImagePipeline.trim` makes it shorter. Only tokens up to the longest row are encoded.
    """

    template = THINKING

    def _encode_tokens(self, ids: mx.array, lengths: list[int]) -> dict[str, mx.array]:
        encoder = self.encoder.get()
        length = mx.array(lengths, mx.int32)
        width = min(-(-max(lengths) // _ROUNDED) * _ROUNDED, ids.shape[1])
        mask = _mask(width, length)
        states = encoder(ids[:, :width], mask, [encoder.config.num_hidden_layers - 1])
        embeds = mx.where(mask[..., None], states, mx.zeros((), states.dtype))
        return {EMBEDS: mx.pad(embeds, [(0, 0), (0, ids.shape[1] - width), (0, 0)]), LENGTH: length}


def _mask(width: int, lengths: mx.array) -> mx.array:
    """(B, width), True for the first `lengths` (B,) tokens."""
    return mx.arange(width) < lengths[:, None]
