"""Key table of LAPA's checkpoints for `LatentActionQuantizer`."""

from __future__ import annotations

import mlx.core as mx

from mflux_vae.weights.keymaps.rules import Rule, conv_from_mlx, conv_to_mlx

_LAYER, _BLOCK = "{stack}_transformer.layers.{i}", "{stack}.blocks.{i}"


def _taps_to_mlx(tensor: mx.array) -> mx.array:
    """Depthwise kernel (C, 1, T, H, W) -> (T, H, W, C); other tensors unchanged."""
    return tensor[:, 0].transpose(1, 2, 3, 0) if tensor.ndim == 5 else tensor


def _taps_from_mlx(tensor: mx.array) -> mx.array:
    return tensor.transpose(3, 0, 1, 2)[:, None] if tensor.ndim == 4 else tensor


LAPA = (
    Rule("{path}.beta", None),  # an untrained shift: zeros
    Rule(f"{_LAYER}.1.null_kv", None),  # empty without cross-attention
    Rule("to_patch_emb_first_frame.1.{kind}", "patches.norm.{kind}"),
    Rule("to_patch_emb_first_frame.2.{kind}", "patches.linear.{kind}"),
    Rule("to_patch_emb_first_frame.3.{kind}", "patches.norm_out.{kind}"),
    Rule("spatial_rel_pos_bias.net.{i}.0.{kind}", "position_bias.layers.{i}.{kind}"),
    Rule("spatial_rel_pos_bias.net.2.{kind}", "position_bias.out.{kind}"),
    Rule(f"{_LAYER}.0.dsconv.{{kind}}", f"{_BLOCK}.position.{{kind}}", _taps_to_mlx, _taps_from_mlx),
    Rule(f"{_LAYER}.1.{{path}}", f"{_BLOCK}.attention.{{path}}"),
    Rule(f"{_LAYER}.2.{{path}}", f"{_BLOCK}.cross.{{path}}"),
    Rule(f"{_LAYER}.3.0.{{kind}}", f"{_BLOCK}.feed_forward.norm.{{kind}}"),
    Rule(f"{_LAYER}.3.1.{{kind}}", f"{_BLOCK}.feed_forward.up.{{kind}}"),
    Rule(f"{_LAYER}.3.4.{{kind}}", f"{_BLOCK}.feed_forward.down.{{kind}}"),
    Rule("{stack}_transformer.norm_out.gamma", "{stack}.norm_out.gamma"),
    Rule("vq.project_{way}.{kind}", "quantizer.project_{way}.{kind}"),
    Rule("vq.cnn_encoder.0.{kind}", "quantizer.convolutions.0.{kind}", conv_to_mlx, conv_from_mlx),
    Rule("vq.cnn_encoder.2.{kind}", "quantizer.convolutions.1.{kind}", conv_to_mlx, conv_from_mlx),
    Rule("vq.codebooks", "quantizer.codebook"),
    Rule("to_pixels_first_frame.0.{kind}", "to_pixels.{kind}"),
)
