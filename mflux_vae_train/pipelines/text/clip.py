"""CLIP's text encoder: causal pre-norm transformer, pooled at the end-of-text token.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4. OpenCLIP's
text encoders, as transformers publishes them, are the same network with other sizes and GELU.
Parameter paths are the keys of the published `text_encoder/model.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae.networks.layers import Linear
from mflux_vae_train.pipelines.layers.encoder import Encoder, LayerNorm, check_encoder
from mflux_vae_train.pipelines.loading.config_check import JSONConfig
from mflux_vae_train.pipelines.text.init_weights import draw_weights

_PREFIX = "text_model."
_POSITION_IDS = "text_model.embeddings.position_ids"


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(JSONConfig):
    """`config.json` of a CLIP text encoder; field names and defaults are those of transformers.

    Attributes:
        hidden_act: "quick_gelu" or "gelu".
        eos_token_id: token of the pooled output; 2 means the highest id, see `CLIPTextModel`.
        projection_dim: width of the projected output; unused without projection.
        attention_dropout, initializer_range, pad_token_id, bos_token_id: part of the file format; unused here.
        initializer_factor: scales every standard deviation of `init_weights`.
    """

    kinds: ClassVar[dict[str, object]] = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407

    def __post_init__(self) -> None:
        check_encoder(self, "CLIP text config")


CLIP_L = CLIPTextConfig(
    hidden_size=768,
    intermediate_size=3072,
    projection_dim=768,
    num_attention_heads=12,
    bos_token_id=0,
    eos_token_id=2,
)
"""OpenAI's CLIP ViT-L/14, the text encoder of FLUX.1, Stable Diffusion 1 and SDXL."""


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfigWithProjection(CLIPTextConfig):
    """`config.json` of a CLIP text encoder with projection. `from_dict` does not check a file's `architectures`."""

    kinds: ClassVar[dict[str, object]] = {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModelWithProjection"],
    }


class CLIPTextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, input_ids: mx.array) -> mx.array:
        positions = self.position_embedding.weight
        length = input_ids.shape[1]
        if length > positions.shape[0]:
            raise SettingsError(f"CLIP reads at most {positions.shape[0]} tokens, not {length}: shorten max_length")
        return self.token_embedding(input_ids) + positions[:length]


class CLIPTextTransformer(nn.Module):
    """The module that the published files call `text_model`."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, input_ids: mx.array, *, skip: int = 0, final_norm: bool = True) -> mx.array:
        """State before the last `skip` layers, which are not computed."""
        return self._run(*self._embed(input_ids), slice(self._depth - skip), final_norm=final_norm)

    def hidden_and_last(self, input_ids: mx.array, *, skip: int) -> tuple[mx.array, mx.array]:
        """State before the last `skip` layers, and the last one after the final norm."""
        x, mask = self._embed(input_ids)
        hidden = self._run(x, mask, slice(self._depth - skip), final_norm=False)
        return hidden, self._run(hidden, mask, slice(self._depth - skip, None), final_norm=True)

    @property
    def _depth(self) -> int:
        return len(self.encoder.layers)

    def _embed(self, input_ids: mx.array) -> tuple[mx.array, mx.array]:
        """Embedded tokens and the causal mask (1, 1, L, L)."""
        x = self.embeddings(input_ids)
        length = x.shape[1]
        future = mx.arange(length)[:, None] < mx.arange(length)[None, :]
        mask = mx.where(future, mx.array(mx.finfo(x.dtype).min, x.dtype), mx.array(0, x.dtype))
        return x, mask[None, None]

    def _run(self, x: mx.array, mask: mx.array, layers: slice, *, final_norm: bool) -> mx.array:
        x = self.encoder(x, mask, layers)
        return self.final_layer_norm(x) if final_norm else x


class CLIPTextModel(nn.Module):
    """CLIP text encoder without projection: FLUX.1's, Stable Diffusion's, and the first one of SDXL.

    The pooled output is the final state at the first end-of-text token. Configurations older than the
    `eos_token_id` they were trained with say 2; then the position of the highest id is used, which for
    OpenAI's vocabulary is the same token (and the first token of a row without one).

    Token ids are (B, L), L <= max_position_embeddings; all methods raise SettingsError if there are more.
    """

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def __call__(self, input_ids: mx.array) -> tuple[mx.array, mx.array]:
        """Token ids -> last hidden state (B, L, D) after the final norm, pooled (B, D)."""
        hidden = self.text_model(input_ids)
        return hidden, self._pool(hidden, input_ids)

    def hidden_state(self, input_ids: mx.array, *, skip: int = 0, final_norm: bool = False) -> mx.array:
        """Token ids -> state before the last `skip` layers (B, L, D), transformers' ``hidden_states[-(skip + 1)]``.

        Args:
            final_norm: apply the norm that follows the last layer.
        """
        return self.text_model(input_ids, skip=skip, final_norm=final_norm)

    def hidden_and_pooled(self, input_ids: mx.array, *, skip: int) -> tuple[mx.array, mx.array]:
        """`hidden_state` without the norm, and the pooled output of all layers, as `__call__` returns it."""
        hidden, last = self.text_model.hidden_and_last(input_ids, skip=skip)
        return hidden, self._pool(last, input_ids)

    def _pool(self, hidden: mx.array, input_ids: mx.array) -> mx.array:
        eos = self.config.eos_token_id
        marks = input_ids if eos == 2 else (input_ids == eos).astype(mx.int32)
        place = mx.argmax(marks, axis=-1)[:, None, None]
        return mx.take_along_axis(hidden, place, axis=1)[:, 0]


class CLIPTextModelWithProjection(CLIPTextModel):
    """CLIP text encoder whose pooled output is projected: the second one of SDXL."""

    def __init__(self, config: CLIPTextConfigWithProjection):
        super().__init__(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim or config.hidden_size, bias=False)

    def _pool(self, hidden: mx.array, input_ids: mx.array) -> mx.array:
        return self.text_projection(super()._pool(hidden, input_ids))


def published_names(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Tensors of any CLIP text encoder file under the names of the published ones, which are `CLIPTextModel`'s.

    transformers 5 writes no `text_model.` prefix, except with a projection. Files of transformers before 4.31 contain
    `position_ids`, which are 0, 1, 2, ... and dropped.
    """
    outside = (_PREFIX, "text_projection.")  # the projection lies beside the text model
    named = {key if key.startswith(outside) else _PREFIX + key: value for key, value in tensors.items()}
    named.pop(_POSITION_IDS, None)
    return named


def init_weights(model: CLIPTextModel, key: mx.array, *, embedding_std: float | None = None) -> None:
    """Set random initial weights as transformers' `CLIPPreTrainedModel._init_weights` does.

    Args:
        key: MLX random key; the same key gives the same weights.
        embedding_std: standard deviation of token and position embeddings; None: CLIP's 0.02 (times
            `initializer_factor`), which suits large vocabularies and long trainings.
    """
    config, factor = model.config, model.config.initializer_factor
    residual = (2 * config.num_hidden_layers) ** -0.5
    std = {
        "token_embedding": 0.02 * factor if embedding_std is None else embedding_std,
        "position_embedding": 0.02 * factor if embedding_std is None else embedding_std,
        "out_proj": config.hidden_size**-0.5 * factor,
        "fc1": (2 * config.hidden_size) ** -0.5 * factor,
        "text_projection": config.hidden_size**-0.5 * factor,
    } | dict.fromkeys(("q_proj", "k_proj", "v_proj", "fc2"), config.hidden_size**-0.5 * residual * factor)
    draw_weights(model, key, std)
