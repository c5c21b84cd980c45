"""Prompts -> conditioning, by T5 and CLIP. CLIP may run inside the training step, so that it can be trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mflux_vae.runtime.threads import thread_safe
from mflux_vae_train.pipelines.capabilities import PromptTokens
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.pipelines.text.clip import CLIPTextModel
from mflux_vae_train.pipelines.text.prompts import LimitedPromptEncoder
from mflux_vae_train.pipelines.text.t5 import T5Encoder

CLIP = "text_encoder"
"""CLIP's folder, and first component of its LoRA keys in PEFT files."""

EMBEDS, POOLED, TOKENS = "prompt_embeds", "pooled", "clip_tokens"
"""Arrays of a conditioning: T5's output (B, L, D), CLIP's (B, P), or instead of the latter CLIP's input (B, N)."""


class FluxPrompts(LimitedPromptEncoder):
    """Encodes prompts; the limit of tokens is T5's.

    Padding is encoded and attended to, as in training of the published models.

    Args:
        guidance_embeds: whether the transformer embeds guidance; then prompts have up to 512 tokens, else 256.

    Attributes:
        clip, t5: the text encoders.
    """

    def __init__(self, parts: Parts, *, guidance_embeds: bool) -> None:
        super().__init__(parts.tokenizers["tokenizer_2"], 512 if guidance_embeds else 256)
        self.clip: Lazy[CLIPTextModel] = parts.networks[CLIP]
        self.t5: Lazy[T5Encoder] = parts.networks["text_encoder_2"]
        self._clip_tokenizer = parts.tokenizers["tokenizer"]
        self._clip_in_step = False

    @property
    def clip_in_step(self) -> bool:
        """Whether `encode` leaves CLIP to `finish`."""
        return self._clip_in_step

    @clip_in_step.setter
    def clip_in_step(self, on: bool) -> None:
        self._clip_in_step = on
        self.forget()

    def _encode(self, prompts: Sequence[str]) -> dict[str, mx.array]:
        """Prompts -> `prompt_embeds` (B, L, D) from T5, and `pooled` (B, P) from CLIP or its input `clip_tokens`."""
        clip_tokens = self._clip_tokenizer.get().encode(prompts)
        t5_tokens = self.tokenizer.get().encode(prompts, self.tokens)
        encoded = {EMBEDS: self.t5.get()(t5_tokens), TOKENS: clip_tokens}
        return encoded if self.clip_in_step else self.finish(encoded)

    def _running(self) -> Sequence[Lazy[Any]]:
        return [self.t5] if self.clip_in_step else [self.t5, self.clip]

    @thread_safe
    def inspect(self, prompts: Sequence[str], limit: int | None) -> dict[str, list[PromptTokens]]:
        """What CLIP and T5 read of each prompt, with at most `limit` tokens for T5."""
        length = min(self.tokens, limit or self.tokens)
        return {
            "CLIP": self._clip_tokenizer.get().inspect(prompts),
            "T5": self.tokenizer.get().inspect(prompts, length),
        }

    def finish(self, conditioning: Conditioning) -> dict[str, mx.array]:
        """Replace `clip_tokens` by CLIP's output, differentiable in its weights."""
        encoded = dict(conditioning)
        if TOKENS in encoded:
            _, encoded[POOLED] = self.clip.get()(encoded.pop(TOKENS))
        return encoded

    @property
    def settings(self) -> str:
        """See `PromptEncoder`."""
        return f" {TOKENS}" if self.clip_in_step else ""
