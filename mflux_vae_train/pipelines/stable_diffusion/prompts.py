"""Prompts -> conditioning, by one CLIP text encoder as in Stable Diffusion 1 and 2, or by two as in SDXL.

Either may run inside the training step, so that it can be trained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mflux_vae.errors import SettingsError
from mflux_vae.runtime.threads import thread_safe
from mflux_vae_train.pipelines.capabilities import PromptTokens
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.pipelines.text.clip import CLIPTextConfig, CLIPTextModel
from mflux_vae_train.pipelines.text.prompts import PromptEncoder

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Folders of the text encoders, which are also the first component of their LoRA keys, and of their tokenizers."""

EMBEDS, POOLED = "prompt_embeds", "pooled"
"""Arrays of a conditioning: (B, L, D), and in SDXL (B, P)."""

_TOKENS, _STATES = "_tokens", "_states"
"""Endings of arrays that replace `EMBEDS` while encoders run in the step: input (B, L) and output (B, L, D) of each."""

_ZEROS = -1
"""Token id of rows whose encoding is zero."""


class SDPrompts(PromptEncoder):
    """Encodes prompts. Padding is encoded and attended to, as in training of the published models.

    Stable Diffusion reads the last hidden state after the final norm. SDXL joins the penultimate states of both
    encoders, without the norm, and reads the projected output of the second one.

    Args:
        configs: of the text encoders, by folder: one, or two as in SDXL.
        zeros_for_empty: encode prompts that equal the empty one as zeros (`force_zeros_for_empty_prompt` of SDXL).

    Attributes:
        encoders: the text encoders, by folder.
    """

    def __init__(self, parts: Parts, configs: Mapping[str, CLIPTextConfig], *, zeros_for_empty: bool = False) -> None:
        super().__init__()
        self.encoders: Mapping[str, Lazy[CLIPTextModel]] = {name: parts.networks[name] for name in configs}
        self._tokenizers = {name: parts.tokenizers[TOKENIZERS[name]] for name in configs}
        self._joined = len(configs) > 1
        self._layers = min(config.num_hidden_layers for config in configs.values())
        self._longest = min(config.max_position_embeddings for config in configs.values())
        self._zeros_for_empty = zeros_for_empty
        self._clip_skip: int | None = None
        self._in_step: tuple[str, ...] = ()

    @property
    def clip_skip(self) -> int | None:
        """See `SupportsClipSkip`. diffusers' pipelines apply it to the prompt, not to the negative or empty one."""
        return self._clip_skip

    @clip_skip.setter
    def clip_skip(self, layers: int | None) -> None:
        if layers is not None and not 0 <= layers <= self.max_clip_skip:
            raise SettingsError(f"clip_skip is {layers}; give 0 to {self.max_clip_skip}")
        self._clip_skip = layers
        self.forget()

    @property
    def max_clip_skip(self) -> int:
        """Most layers that can be left out: one is always computed."""
        return max(0, self._layers - 1 - self._joined)

    @property
    def in_step(self) -> tuple[str, ...]:
        """Folders of the text encoders that `encode` leaves to `finish`."""
        return self._in_step

    @in_step.setter
    def in_step(self, names: Collection[str]) -> None:
        self._in_step = tuple(name for name in self.encoders if name in names)
        self.forget()

    @property
    def longest(self) -> int:
        """Tokens per prompt, before a tokenizer is opened."""
        return self._longest

    @property
    def tokens(self) -> int:
        """Tokens per prompt: `longest`, or fewer if a tokenizer is configured so."""
        return min(self.longest, *(one.get().max_length or self.longest for one in self._tokenizers.values()))

    def _encode(self, prompts: Sequence[str]) -> dict[str, mx.array]:
        """Prompts -> `prompt_embeds` (B, L, D) and, in SDXL, `pooled` (B, P); or what `finish` computes them from."""
        encoded: dict[str, mx.array] = {}
        for name in self.encoders:
            ids = self._token_ids(name, prompts)
            encoded |= {name + _TOKENS: ids} if name in self.in_step else self._run(name, ids)
        return encoded if self.in_step else self.finish(encoded)

    def _running(self) -> Sequence[Lazy[Any]]:
        return [encoder for name, encoder in self.encoders.items() if name not in self.in_step]

    @thread_safe
    def inspect(self, prompts: Sequence[str], limit: int | None) -> dict[str, list[PromptTokens]]:
        """What CLIP reads of each prompt, with at most `limit` tokens; both tokenizers of SDXL if they differ."""
        length = min(self.tokens, limit or self.tokens)
        found = [tokenizer.get().inspect(prompts, length) for tokenizer in self._tokenizers.values()]
        names = ("CLIP", "OpenCLIP") if found[0] != found[-1] else ("CLIP",)
        return dict(zip(names, found, strict=False))

    def finish(self, conditioning: Conditioning) -> dict[str, mx.array]:
        """Run the encoders that are left for the step, and join the states; differentiable in their weights."""
        encoded = dict(conditioning)
        for name in self.encoders:
            if (ids := encoded.pop(name + _TOKENS, None)) is not None:
                encoded |= self._run(name, ids)
        states = [encoded.pop(name + _STATES) for name in self.encoders if name + _STATES in encoded]
        return {EMBEDS: mx.concatenate(states, axis=-1), **encoded} if states else encoded

    def with_unconditional(self, conditioning: Conditioning) -> Conditioning:
        """The negative prompt's rows, then the given ones: (2 B, ...). No encoder runs if the former are zeros."""
        if self.negative or not self._zeros_for_empty:
            return super().with_unconditional(conditioning)
        fills = {name: _ZEROS if name.endswith(_TOKENS) else 0 for name in conditioning}
        return {
            name: mx.concatenate([mx.full(value.shape, fills[name], value.dtype), value])
            for name, value in conditioning.items()
        }

    @property
    def settings(self) -> str:
        """See `PromptEncoder`."""
        zeros = "zeros" if self._zeros_for_empty else "encoded"
        return f" clip_skip {self.clip_skip or 0} {zeros} {' '.join(self.in_step)}".rstrip()

    def _token_ids(self, name: str, prompts: Sequence[str]) -> mx.array:
        tokenizer, length = self._tokenizers[name].get(), self.tokens
        ids = tokenizer.encode(prompts, length)
        if not self._zeros_for_empty:
            return ids
        empty = (ids == tokenizer.encode("", length)).all(axis=1, keepdims=True)
        return mx.where(empty, mx.array(_ZEROS, ids.dtype), ids)

    def _run(self, name: str, ids: mx.array) -> dict[str, mx.array]:
        """Token ids -> states of one encoder and, from the last one of two, the pooled output."""
        encoder = self.encoders[name].get()
        skip = (self.clip_skip or 0) + self._joined
        real = mx.maximum(ids, 0)
        outputs: dict[str, mx.array] = {}
        if not self._joined:
            outputs[name + _STATES] = encoder.hidden_state(real, skip=skip, final_norm=True)
        elif name == "text_encoder":
            outputs[name + _STATES] = encoder.hidden_state(real, skip=skip)
        else:
            outputs[name + _STATES], outputs[POOLED] = encoder.hidden_and_pooled(real, skip=skip)
        if not self._zeros_for_empty:
            return outputs
        keep = ids[:, :1] != _ZEROS
        return {
            key: mx.where(keep if one.ndim == 2 else keep[..., None], one, mx.zeros_like(one))
            for key, one in outputs.items()
        }
