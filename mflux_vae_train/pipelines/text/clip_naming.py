"""Layers of CLIP's text encoders that adapters change, and their names in kohya's scripts."""

from __future__ import annotations

from mflux_vae_train.pipelines.text.clip import CLIPTextConfig

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

CLIP_ATTENTION = tuple(f"*.self_attn.{name}" for name in _PROJECTIONS)
"""Patterns of the projections of attention, which diffusers' scripts adapt."""


def kohya_modules(config: CLIPTextConfig, prefix: str) -> dict[str, tuple[str]]:
    """Names of the layers that kohya's scripts adapt: those of attention and of the MLP.

    Args:
        prefix: `lora_te`, or `lora_te1` and `lora_te2` where there are two encoders.
    """
    paths = [
        f"text_model.encoder.layers.{index}.{layer}"
        for index in range(config.num_hidden_layers)
        for layer in (*(f"self_attn.{name}" for name in _PROJECTIONS), "mlp.fc1", "mlp.fc2")
    ]
    return {f"{prefix}_{path.replace('.', '_')}": (path,) for path in paths}
