"""Detect the autoencoder in a file: key naming and architecture from keys and shapes, scaling from hints."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from mflux_vae.errors import WeightsError
from mflux_vae.networks.laq import code_counts
from mflux_vae.pretrained import refused
from mflux_vae.utils.formatting import shortened
from mflux_vae.weights.keymaps import mlx_examples
from mflux_vae.weights.kinds import kind_of

Shapes = Mapping[str, Sequence[int]]

GROUPS = 32
"""Groups of group norm, not visible in a file: the value of every published autoencoder."""

FRAME = 256
"""Side of LAPA's frames (pixels), not visible in a file either."""


@dataclass(frozen=True)
class Match:
    """Position of an autoencoder in a file: its keys start with `prefix`."""

    prefix: str
    family: str
    naming: str


SIGNATURES = {
    ("AutoencoderKLQwenImage", "diffusers"): r"(?:encoder|decoder)\.mid_block\.resnets\.0\.norm1\.gamma",
    ("AutoencoderKLQwenImage", "wan"): r"(?:encoder|decoder)\.middle\.0\.residual\.0\.gamma",
    ("TAEHV", "diffusers"): r"encoder\.2\.conv\.weight",
    ("AutoencoderKL", "diffusers"): r"(?:encoder|decoder)\.mid_block\.resnets\.0\.conv1\.weight",
    ("AutoencoderKL", "compvis"): r"(?:encoder|decoder)\.mid\.block_1\.conv1\.weight",
    ("AutoencoderTiny", "diffusers"): r"(?:encoder|decoder)\.layers\.0\.weight",
    ("AutoencoderTiny", "taesd"): r"(?:taesd_)?(?:encoder\.0|decoder\.1)\.weight",
    ("FlatAutoencoder", "diffusers"): r"encoder\.mean\.weight",
    ("FlatAutoencoder", "pytorch-vae"): r"fc_mu\.weight",
    ("FlatAutoencoder", mlx_examples.NAMING): r"encoder\.proj_mu\.weight",
    ("LatentActionQuantizer", "lapa"): r"vq\.codebooks",
    ("PlainAutoencoder", "diffusers"): r"encoder\.mu\.weight",
}
"""Key by family and naming; with several matches the first row counts."""

_TWINS = {"AutoencoderKLQwenImage", "AutoencoderKLWan"}
"""Families whose files have the same keys and shapes; without a hint in their names it is the first."""

_NESTED = ("encoder.quant_conv.weight", "decoder.post_quant_conv.weight")
_STATISTICS = "bn.running_mean"
_PREFERRED = ("ema.", "first_stage_model.", "vae.", "")
"""Preference between several autoencoders in a file: EMA weights, then the usual prefix."""

_MODEL_KEYS = {
    "sdxl": "conditioner.embedders.1.",
    "sd2": "cond_stage_model.model.",
    "sd1": "cond_stage_model.transformer.",
    "sd3": "joint_blocks.",
    "flux1": "double_blocks.",
}
"""Part of the keys of the whole model, by preset."""

_NAME_PATTERNS = {
    "playground": r"playground",
    "sdxl-fp16-fix": r"fp16[-_.]?fix",
    "sdxl": r"(?:sd|diffusion)[-_. ]?xl",
    "sd3": r"(?:sd|diffusion)[-_. ]?v?3",
    "z-image": r"z[-_. ]?image",
    "qwen-image": r"qwen|krea[-_. ]?2",
    "wan2.1": r"(?<![a-z])wan",
    "flux1": r"flux|/ae\.",
    "sd-vae-ft-mse": r"ft[-_]mse",
    "sd2": r"(?:sd|diffusion)[-_. ]?v?2",
    "sd1": r"(?:sd|diffusion)[-_. ]?v?1|sd[-_]vae",
}
"""Pattern of file names and metadata, by preset; the first match counts."""

_METADATA_KEYS = ("modelspec.architecture", "modelspec.title", "ss_base_model_version")


def find(keys: Collection[str], where: str, family: str | None = None) -> Match:
    """Find the autoencoder among the keys of a file.

    Args:
        keys: all keys.
        where: file or folder, for messages.
        family: class name, if known.

    Raises:
        WeightsError: no known autoencoder, or one that is not supported.
    """
    refused.check_keys(keys, where)
    found = {
        (match[1], kind, naming)
        for (kind, naming), sign in SIGNATURES.items()
        for key in keys
        if (match := re.fullmatch(rf"((?:.*\.)?){sign}", key))
    }
    if not found and family:
        return Match("", family, "diffusers")  # loading reports missing keys
    if not found:
        starts = sorted({".".join(key.split(".")[:2]) for key in keys})
        shown = ", ".join([shortened(start, 35) for start in starts[:4]] + ["..."] * (len(starts) > 4)) or "nothing"
        holds = f"it holds {kind}; " if (kind := kind_of(keys)) else ""
        raise WeightsError(
            f"{where}: no known autoencoder; {holds}give the file of a VAE; its {len(keys)} tensors start with {shown}"
        )
    prefix, kind, naming = min(found, key=_rank)
    if naming == "compvis" and any(prefix + key in keys for key in _NESTED):
        naming = "bfl"
    if kind == "AutoencoderKL" and f"{prefix}{_STATISTICS}" in keys:
        kind = "AutoencoderKLFlux2"
    return Match(prefix, family or kind, naming)


def same_files(a: str, b: str) -> bool:
    """Whether files cannot tell two families apart."""
    return a == b or {a, b} == _TWINS


def _rank(candidate: tuple[str, str, str]) -> tuple[int, int, int]:
    prefix, kind, naming = candidate
    places = [index for index, part in enumerate(_PREFERRED) if part in prefix]
    return places[0], len(prefix), list(SIGNATURES).index((kind, naming))


def narrow(names: Sequence[str], keys: Collection[str], metadata: Mapping[str, str], path: Path) -> Sequence[str]:
    """Preset suggested by other keys of the file, its metadata or its name; all `names` without a hint."""
    path_text = f"{path.parent.name}/{path.name}".lower()
    metadata_text = " ".join(metadata.get(key, "") for key in _METADATA_KEYS).lower()
    clues = [name for name, sign in _MODEL_KEYS.items() if any(sign in key for key in keys)]
    clues += [
        name for text in (metadata_text, path_text) for name, sign in _NAME_PATTERNS.items() if re.search(sign, text)
    ]
    return next(([name] for name in clues if name in names), names)


def settings(family: str, naming: str, shapes: Shapes, where: str) -> dict[str, Any]:
    """Derive the configuration of a network, without scaling, from its parameters.

    Args:
        family: class name.
        naming: key naming of the file; some belong to a single network.
        shapes: shapes by parameter name in MLX layout (kernels OHWI).
        where: file, for messages.

    Raises:
        WeightsError: the architecture cannot be derived.
    """
    try:
        return {"_class_name": family, **ONE_NETWORK.get(naming, _SETTINGS[family])(shapes)}
    except (KeyError, IndexError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise WeightsError(f"{where}: unknown architecture ({reason}); pass its configuration") from error


def _kl(shapes: Shapes) -> dict[str, Any]:
    levels = {
        half: [shapes[f"{half}.{level}.resnets.0.conv1.weight"][0] for level in _numbers(shapes, half)]
        for half in ("encoder.down_blocks", "decoder.up_blocks")
    }
    down, up = levels["encoder.down_blocks"], levels["decoder.up_blocks"][::-1]
    if odd := {width for width in (*down, *up) if width % GROUPS}:
        raise ValueError(f"{min(odd)} channels are not a multiple of {GROUPS}, so the number of norm groups is unknown")
    inside = len(_numbers(shapes, "encoder.down_blocks.0.resnets"))
    deepest = _either(shapes, ("decoder.conv_in", -1), ("post_quant_conv", 0), ("quant_conv", -1, 2))
    latent = _either(shapes, ("post_quant_conv", -1), ("quant_conv", 0, 2), ("decoder.conv_in", -1))
    found = {
        **_ends(shapes, "encoder.conv_in", "decoder.conv_out"),
        "latent_channels": latent,
        "block_out_channels": down or up,
        "layers_per_block": inside or len(_numbers(shapes, "decoder.up_blocks.0.resnets")) - 1,
        "norm_num_groups": GROUPS,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(".mid_block.attentions." in key for key in shapes),
        "attention_type": "linear" if any(key.endswith(".to_qkv.weight") for key in shapes) else "vanilla",
        "resample_with_conv": len(down or up) == 1 or any("samplers.0.conv." in key for key in shapes),
        "double_z": _either(shapes, ("encoder.conv_out", 0), ("decoder.conv_in", -1)) != deepest or not down,
        "z_channels": None if deepest == latent else deepest,
        "down_block_types": _kinds(shapes, "encoder.down_blocks", len(down or up), "DownEncoderBlock2D"),
        "up_block_types": _kinds(shapes, "decoder.up_blocks", len(down or up), "UpDecoderBlock2D"),
    }
    if down and (stem := _either(shapes, ("encoder.conv_in", 0))) != down[0]:
        found["stem_channels"] = stem
    return found | ({"decoder_block_out_channels": up} if down and up and up != down else {})


def _tiny(shapes: Shapes) -> dict[str, Any]:
    blocks = {half: _between_convolutions(shapes, f"{half}.layers") for half in ("encoder", "decoder")}
    last = {half: max(_numbers(shapes, f"{half}.layers"), default=0) for half in blocks}
    found: dict[str, Any] = {
        **_ends(shapes, "encoder.layers.0", f"decoder.layers.{last['decoder']}"),
        "latent_channels": _either(shapes, ("decoder.layers.0", -1), (f"encoder.layers.{last['encoder']}", 0)),
    }
    for half, counts in blocks.items():
        width = shapes[f"{half}.layers.0.weight"][0]
        found |= {f"num_{half}_blocks": counts, f"{half}_block_out_channels": [width] * len(counts)}
    pool = any(".pool." in key for key in shapes)
    return {**found, "pool": pool, "patch_size": 1 + pool}  # TAEF2 alone has both


def _wan(shapes: Shapes) -> dict[str, Any]:
    levels: list[list[int]] = [[]]
    temporal = []
    for layer in _numbers(shapes, "encoder.down_blocks"):
        if f"encoder.down_blocks.{layer}.conv.weight" in shapes:
            levels.append([])
            temporal.append(f"encoder.down_blocks.{layer}.time_conv.weight" in shapes)
        else:
            levels[-1].append(shapes[f"encoder.down_blocks.{layer}.conv1.weight"][0])
    base, latent = shapes["encoder.conv_in.weight"][0], shapes["post_quant_conv.weight"][0]
    factors = [widths[-1] // base for widths in levels]
    return {
        **_ends(shapes, "encoder.conv_in", "decoder.conv_out"),
        "z_dim": latent,
        "base_dim": base,
        "decoder_base_dim": shapes["decoder.norm_out.gamma"][0] // factors[0],
        "dim_mult": factors,
        "num_res_blocks": len(levels[0]),
        "temperal_downsample": temporal,
        "latents_mean": [0.0] * latent,
        "latents_std": [1.0] * latent,
    }


def _taehv(shapes: Shapes) -> dict[str, Any]:
    convolutions = [number for number in _numbers(shapes, "decoder") if f"decoder.{number}.weight" in shapes]
    channels = shapes["encoder.0.weight"][-1]
    if channels > 4:
        raise ValueError(f"{channels} image channels: frames in patches, as in TAEW2.2, are not supported")
    return {
        "latent_channels": shapes["decoder.1.weight"][-1],
        "in_channels": channels,
        "out_channels": shapes[f"decoder.{convolutions[-1]}.weight"][0],
        "encoder_width": shapes["encoder.0.weight"][0],
        "decoder_widths": [shapes[f"decoder.{number}.weight"][0] for number in convolutions[:-1]],
    }


def _plain(shapes: Shapes) -> dict[str, Any]:
    widths = [shapes[f"encoder.down.{level}.conv.weight"][0] for level in _numbers(shapes, "encoder.down")]
    return {
        **_ends(shapes, "encoder.conv_in", "decoder.conv_out"),
        "latent_channels": shapes["encoder.mu.weight"][0],
        "channels": [shapes["encoder.conv_in.weight"][0], *widths],
        "bottleneck_blocks": len(_numbers(shapes, "encoder.bottleneck")),
    }


def _flat(shapes: Shapes) -> dict[str, Any]:
    raise ValueError("image size and output activation are not stored")


def _mlx_example(shapes: Shapes) -> dict[str, Any]:
    widths = [shapes[f"encoder.down.{level}.conv.weight"][0] for level in range(mlx_examples.LEVELS)]
    lengths, side = shapes["encoder.mean.weight"], mlx_examples.SIDE
    if lengths[1] * 4**mlx_examples.LEVELS != widths[-1] * side**2:
        raise ValueError(f"its images are not {side} x {side} pixels as in MLX's example")
    return {
        "in_channels": shapes["encoder.down.0.conv.weight"][-1],
        "out_channels": shapes[f"decoder.up.{mlx_examples.LEVELS - 1}.conv.weight"][0],
        "hidden_dims": widths,
        "latent_dim": lengths[0],
        "image_size": side,
        "batch_norm": True,
        "upsampling": "repeat",
        "last_conv": False,
        "output": "sigmoid",
    }


def _laq(shapes: Shapes) -> dict[str, Any]:
    numbers, dim = shapes["to_pixels.weight"]
    channels = next(count for count in (3, 1) if isqrt(numbers // count) ** 2 * count == numbers)
    patch = isqrt(numbers // channels)
    codebook, quant = shapes["quantizer.codebook"]
    layers = _numbers(shapes, "quantizer.convolutions")
    kernels = [shapes[f"quantizer.convolutions.{layer}.weight"][1] for layer in layers]
    counts = code_counts(FRAME // patch, kernels) if FRAME % patch == 0 else []
    if not counts:
        raise ValueError(f"its frames are not {FRAME} pixels as in the published models")
    return {
        "dim": dim,
        "quant_dim": quant,
        "codebook_size": codebook,
        "image_size": FRAME,
        "patch_size": patch,
        "spatial_depth": len(_numbers(shapes, "enc_spatial.blocks")),
        "temporal_depth": len(_numbers(shapes, "enc_temporal.blocks")),
        "dim_head": shapes["enc_spatial.blocks.0.attention.q_scale"][0],
        "heads": shapes["position_bias.out.weight"][0],
        "channels": channels,
        "code_seq_len": counts[0],
    }


_SETTINGS = {
    "AutoencoderKL": _kl,
    "AutoencoderKLFlux2": _kl,
    "AutoencoderKLQwenImage": _wan,
    "AutoencoderKLWan": _wan,
    "AutoencoderTiny": _tiny,
    "FlatAutoencoder": _flat,
    "LatentActionQuantizer": _laq,
    "PlainAutoencoder": _plain,
    "TAEHV": _taehv,
}

ONE_NETWORK = {mlx_examples.NAMING: _mlx_example}
"""Namings of a single network, which fixes what shapes do not show."""


def _numbers(shapes: Shapes, path: str) -> list[int]:
    """Indices of the layers in a list that have parameters."""
    return sorted({int(found[1]) for key in shapes if (found := re.match(rf"{re.escape(path)}\.(\d+)\.", key))})


def _either(shapes: Shapes, *candidates: tuple[Any, ...]) -> int:
    """Channels from the first existing layer of (name, kernel axis, divisor)."""
    for layer, axis, *divisor in candidates:
        if f"{layer}.weight" in shapes:
            return shapes[f"{layer}.weight"][axis] // (divisor[0] if divisor else 1)
    raise KeyError(candidates[0][0])


def _ends(shapes: Shapes, first: str, last: str) -> dict[str, int]:
    return {
        "in_channels": _either(shapes, (first, -1), (last, 0)),
        "out_channels": _either(shapes, (last, 0), (first, -1)),
    }


def _kinds(shapes: Shapes, path: str, levels: int, plain: str) -> list[str]:
    """Block names of diffusers per level, with or without attention."""
    return [
        f"Attn{plain}" if any(key.startswith(f"{path}.{level}.attentions.") for key in shapes) else plain
        for level in range(levels)
    ]


def _between_convolutions(shapes: Shapes, path: str) -> list[int]:
    """Number of blocks between consecutive convolutions of a list of layers."""
    counts: list[int] = []
    for number in _numbers(shapes, path):
        if f"{path}.{number}.weight" in shapes:
            counts.append(0)
        else:
            counts[-1] += 1
    return counts[:-1]
