"""Which autoencoder is in a file: its naming, its architecture and its scaling, from keys, shapes and hints."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from mflux_vae.errors import WeightsError
from mflux_vae.networks.laq import code_counts
from mflux_vae.weights.keymaps import mlx_examples

Shapes = Mapping[str, Sequence[int]]

GROUPS = 32
"""Channel groups of normalisation, which leave no trace in a file: what every published autoencoder has."""

FRAME = 256
"""Pixels of a side of LAPA's frames, which leave none either."""


@dataclass(frozen=True)
class Match:
    """Where in a file an autoencoder is: all its keys begin with `prefix`."""

    prefix: str
    family: str
    naming: str


SIGNATURES = {
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
"""By family and naming: a key that no other has."""

_NESTED = ("encoder.quant_conv.weight", "decoder.post_quant_conv.weight")
_STATISTICS = "bn.running_mean"
_PREFERRED = ("ema.", "first_stage_model.", "vae.", "")
"""Of several autoencoders in one file, the averaged one, then the one at the usual place."""

_BESIDE = {
    "sdxl": "conditioner.embedders.1.",
    "sd2": "cond_stage_model.model.",
    "sd1": "cond_stage_model.transformer.",
    "sd3": "joint_blocks.",
    "flux1": "double_blocks.",
}
"""By preset: a part of the keys of the rest of its model."""

_CALLED = {
    "playground": r"playground",
    "sdxl-fp16-fix": r"fp16[-_.]?fix",
    "sdxl": r"(?:sd|diffusion)[-_. ]?xl",
    "sd3": r"(?:sd|diffusion)[-_. ]?v?3",
    "z-image": r"z[-_. ]?image",
    "flux1": r"flux|/ae\.",
    "sd-vae-ft-mse": r"ft[-_]mse",
    "sd2": r"(?:sd|diffusion)[-_. ]?v?2",
    "sd1": r"(?:sd|diffusion)[-_. ]?v?1|sd[-_]vae",
}
"""By preset: how files are called, and how their metadata call the architecture; the first that fits says it."""

_TELLING = ("modelspec.architecture", "modelspec.title", "ss_base_model_version")


def find(keys: Collection[str], where: str, family: str | None = None) -> Match:
    """The autoencoder among a file's keys.

    Args:
        keys: all of the file.
        where: file or folder, for the message.
        family: its class name, where it is known.

    Raises:
        WeightsError: there is none of a known kind.
    """
    found = {
        (match[1], kind, naming)
        for (kind, naming), sign in SIGNATURES.items()
        for key in keys
        if (match := re.fullmatch(rf"((?:.*\.)?){sign}", key))
    }
    if not found and family:
        return Match("", family, "diffusers")  # what is missing is told by the one who loads it
    if not found:
        heads = sorted({".".join(key.split(".")[:2]) for key in keys})
        shown = ", ".join([*heads[:8], *(["..."] if len(heads) > 8 else [])]) or "nothing"
        raise WeightsError(f"{where}: no autoencoder of a known kind; its {len(keys)} tensors begin with {shown}")
    prefix, kind, naming = min(found, key=_rank)
    if naming == "compvis" and any(prefix + key in keys for key in _NESTED):
        naming = "bfl"
    if kind == "AutoencoderKL" and f"{prefix}{_STATISTICS}" in keys:
        kind = "AutoencoderKLFlux2"
    return Match(prefix, family or kind, naming)


def _rank(candidate: tuple[str, str, str]) -> tuple[int, int, tuple[str, str, str]]:
    prefix = candidate[0]
    places = [index for index, part in enumerate(_PREFERRED) if part in prefix]
    return places[0], len(prefix), candidate


def narrow(names: Sequence[str], keys: Collection[str], metadata: Mapping[str, str], path: Path) -> Sequence[str]:
    """The one preset that a file's other keys, its metadata or its name speak for; all of them where nothing does."""
    called = f"{path.parent.name}/{path.name}".lower()
    told = " ".join(metadata.get(key, "") for key in _TELLING).lower()
    clues = [name for name, sign in _BESIDE.items() if any(sign in key for key in keys)]
    clues += [name for text in (told, called) for name, sign in _CALLED.items() if re.search(sign, text)]
    return next(([name] for name in clues if name in names), names)


def settings(family: str, naming: str, shapes: Shapes, where: str) -> dict[str, Any]:
    """The configuration, as in a config.json, of a network with these parameters; scaling is not in it.

    Args:
        family: class name.
        naming: of the file's keys; some are of one network only.
        shapes: of the parameters, by our names in our layout (kernels OHWI).
        where: file, for the message.

    Raises:
        WeightsError: shapes from which nothing follows.
    """
    try:
        return {"_class_name": family, **ONE_NETWORK.get(naming, _SETTINGS[family])(shapes)}
    except (KeyError, IndexError, ValueError) as error:
        told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise WeightsError(f"{where}: its architecture is not recognised ({told}); give its configuration") from error


def _kl(shapes: Shapes) -> dict[str, Any]:
    levels = {
        half: [shapes[f"{half}.{level}.resnets.0.conv1.weight"][0] for level in _numbers(shapes, half)]
        for half in ("encoder.down_blocks", "decoder.up_blocks")
    }
    down, up = levels["encoder.down_blocks"], levels["decoder.up_blocks"][::-1]
    if odd := {width for width in (*down, *up) if width % GROUPS}:
        raise ValueError(f"{min(odd)} channels are no multiple of {GROUPS}, so that its norms have other groups")
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
    return found


def _plain(shapes: Shapes) -> dict[str, Any]:
    widths = [shapes[f"encoder.down.{level}.conv.weight"][0] for level in _numbers(shapes, "encoder.down")]
    return {
        **_ends(shapes, "encoder.conv_in", "decoder.conv_out"),
        "latent_channels": shapes["encoder.mu.weight"][0],
        "channels": [shapes["encoder.conv_in.weight"][0], *widths],
        "bottleneck_blocks": len(_numbers(shapes, "encoder.bottleneck")),
    }


def _flat(shapes: Shapes) -> dict[str, Any]:
    raise ValueError("nothing tells the size of its images, nor what its output is")


def _mlx_example(shapes: Shapes) -> dict[str, Any]:
    widths = [shapes[f"encoder.down.{level}.conv.weight"][0] for level in range(mlx_examples.LEVELS)]
    lengths, side = shapes["encoder.mean.weight"], mlx_examples.SIDE
    if lengths[1] * 4**mlx_examples.LEVELS != widths[-1] * side**2:
        raise ValueError(f"its images are not of {side} x {side} pixels, as MLX's example has them")
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
        raise ValueError(f"its frames are not of {FRAME} pixels, as all that were published")
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
    "AutoencoderTiny": _tiny,
    "FlatAutoencoder": _flat,
    "LatentActionQuantizer": _laq,
    "PlainAutoencoder": _plain,
}

ONE_NETWORK = {mlx_examples.NAMING: _mlx_example}
"""Namings that one program has, for one network: what shapes leave open is as there."""


def _numbers(shapes: Shapes, path: str) -> list[int]:
    """Indices of a list of layers, as far as they have parameters."""
    return sorted({int(found[1]) for key in shapes if (found := re.match(rf"{re.escape(path)}\.(\d+)\.", key))})


def _either(shapes: Shapes, *places: tuple[Any, ...]) -> int:
    """A number of channels from the first layer that is there: its name, axis of its kernel, and divisor."""
    for layer, axis, *divisor in places:
        if f"{layer}.weight" in shapes:
            return shapes[f"{layer}.weight"][axis] // (divisor[0] if divisor else 1)
    raise KeyError(places[0][0])


def _ends(shapes: Shapes, first: str, last: str) -> dict[str, int]:
    return {
        "in_channels": _either(shapes, (first, -1), (last, 0)),
        "out_channels": _either(shapes, (last, 0), (first, -1)),
    }


def _kinds(shapes: Shapes, path: str, levels: int, plain: str) -> list[str]:
    """diffusers' name of each level's block: with attention after every residual block, or without."""
    return [
        f"Attn{plain}" if any(key.startswith(f"{path}.{level}.attentions.") for key in shapes) else plain
        for level in range(levels)
    ]


def _between_convolutions(shapes: Shapes, path: str) -> list[int]:
    """How many blocks stand between one convolution of a list of layers and the next."""
    counts: list[int] = []
    for number in _numbers(shapes, path):
        if f"{path}.{number}.weight" in shapes:
            counts.append(0)
        else:
            counts[-1] += 1
    return counts[:-1]
