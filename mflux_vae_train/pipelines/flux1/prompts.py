"""What FLUX.1 reads: prompts -> conditioning, by T5 and CLIP; all of it before the training, or CLIP's part within."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mflux_vae_train.pipelines.capabilities import Use
from mflux_vae_train.pipelines.flux1 import naming
from mflux_vae_train.pipelines.flux1.parts import FluxParts
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.pipelines.text.clip import CLIPTextModel

EMBEDS, POOLED, TOKENS = "prompt_embeds", "pooled", "clip_tokens"
"""Of a conditioning: what T5 makes of a prompt (B, L, D); what CLIP does (B, P), or in its place the tokens (B, N)."""


class FluxPrompts(FluxParts):
    """The parts of a pipeline, and how prompts become conditioning.

    Args:
        parts: see `FluxParts`.
    """

    text_encoder_prefix = "text_encoder"

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.guidance_embeds: bool = self._transformer.config.guidance_embeds
        self._empty: Conditioning | None = None
        self._prompt_limit: int | None = None
        self._late = False

    @property
    def max_text_tokens(self) -> int:
        """Tokens per prompt for T5: what its tokenizer is configured for, at most `longest_prompt`."""
        return min(self.tokenizer_2.max_length or self.longest_prompt, self.longest_prompt)

    @property
    def longest_prompt(self) -> int:
        """512, or 256 for models without embedded guidance, as the published models were trained; or `prompt_limit`."""
        longest = 512 if self.guidance_embeds else 256
        return min(longest, self.prompt_limit or longest)

    @property
    def prompt_limit(self) -> int | None:
        """See `capabilities.LimitsPrompts`."""
        return self._prompt_limit

    @prompt_limit.setter
    def prompt_limit(self, tokens: int | None) -> None:
        self._prompt_limit, self._empty = tokens, None  # which is as long as prompts were

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> `prompt_embeds` (B, L, D) from T5, and `pooled` (B, P) from CLIP or, late, its `clip_tokens`."""
        for_clip = self.tokenizer.encode(prompts)
        tokens = self.tokenizer_2.encode(prompts, self.max_text_tokens)
        encoded = {EMBEDS: self.text_encoder_2(tokens), TOKENS: for_clip}
        if not self._late:
            encoded = dict(self._read(encoded))
        if "" in prompts:
            self._empty = _row(encoded, list(prompts).index(""))
        return encoded

    def encoder_identity(self, use: Use) -> str:
        """As `FluxParts.encoder_identity`; and how long a prompt may be, and what is left for later."""
        identity = super().encoder_identity(use)
        late = f" {TOKENS}" if self._late else ""
        return identity if use == "images" else f"{identity} {self.max_text_tokens}{late}"

    def release(self, *uses: Use) -> None:
        """As `FluxParts.release`. What classifier-free guidance needs of the text encoders is kept."""
        if "prompts" in uses and self._text_encoder_2.loaded is not None and not self.guidance_embeds:
            mx.eval(self._unconditional())
        super().release(*uses)

    # CLIP as something that learns, see `capabilities.TrainsTextEncoder`

    def encode_text_in_step(self, on: bool) -> None:
        """Let `encode_prompts` leave CLIP's part to whoever is given the conditioning."""
        self._late, self._empty = on, None

    def text_encoder_to_train(self) -> CLIPTextModel:
        """CLIP, which stays loaded from now on. T5, forty times as large, is left alone, as everywhere."""
        return self._text_encoder.keep()

    def text_encoder_outline(self) -> nn.Module:
        """CLIP if it is there; else its layers, with weights that nobody computes."""
        return self._text_encoder.loaded or CLIPTextModel(self._text_encoder.config)

    def text_encoder_targets(self) -> Sequence[str]:
        """Attention's four projections, as in diffusers' scripts."""
        return naming.CLIP_ATTENTION

    def _read(self, conditioning: Conditioning) -> Conditioning:
        """With what CLIP makes of its tokens in their place, differentiable in its weights."""
        if TOKENS not in conditioning:
            return conditioning
        _, pooled = self.text_encoder(conditioning[TOKENS])
        return {EMBEDS: conditioning[EMBEDS], POOLED: pooled}

    def _unconditional(self) -> Conditioning:
        """The empty prompt's row, encoded once; again each time where text encoders are not this pipeline's own."""
        if self._empty is None or not self._text_encoder_2.on_demand:
            were_here = self._text_encoder_2.loaded is not None
            self.encode_prompts([""])  # which keeps it
            mx.eval(self._empty)
            if not were_here:
                super().release("prompts")
        assert self._empty is not None
        return self._empty

    def _with_unconditional(self, conditioning: Conditioning) -> Conditioning:
        """The empty prompt's rows in front of the given ones: (2 B, ...)."""
        empty = self._unconditional()
        return {
            name: mx.concatenate([mx.broadcast_to(empty[name], value.shape), value])
            for name, value in conditioning.items()
        }


def _row(conditioning: Conditioning, index: int) -> Conditioning:
    return {name: array[index : index + 1] for name, array in conditioning.items()}
