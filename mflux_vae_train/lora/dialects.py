"""Keys of adapter files of other programs -> PEFT's keys, `{layer}.lora_A.weight`, and the layers of a network.

Read are renamings, transposed matrices (mlx-examples), kernels of convolutions, and layers that are fused there
(`kohya.split`). Other kinds of adapters are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

import mlx.core as mx

from mflux_vae.errors import WeightsError
from mflux_vae.utils.formatting import first_few
from mflux_vae.weights.keymaps.rules import (
    Rule,
    conv_from_mlx,
    conv_to_mlx,
    matrix_to_mlx,
    pointwise_from_mlx,
    to_mlx,
)
from mflux_vae.weights.kinds import kind_of

Modules: TypeAlias = Mapping[str, Sequence[str]]
"""Name of a layer of the original network -> paths of its parts here, in the order of its outputs."""

A, B, MAGNITUDE, ALPHA = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".alpha"
"""Ends of PEFT's keys, and of kohya's alpha."""

DOWN, UP = ".lora_down.weight", ".lora_up.weight"
"""Ends of kohya's keys."""

DORA_SCALE = ".dora_scale"
"""End of kohya's keys of DoRA's magnitudes: (out, 1), or (1, in) where they are of columns."""

_REFUSED = {
    r"\.processor\.(qkv|proj)_lora\d*\.": "XLabs' form",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.(oft|boft)_": "OFT",
    r"\.(ia3_l|on_input)": "(IA)3",
    r"\.lora_mid\.": "LoCon with a third matrix",
    r"\.lora_E$": "AdaLoRA",
    r"\.vera_lambda": "VeRA",
    r"\.lora_embedding_": "LoRA on embeddings",
    r"\.(lora_[AB]\.(.+\.)?bias|lora_(down|up)\.bias)$": "LoRA with biases",
    r"\.modules_to_save\.": "whole layers (modules_to_save)",
    r"\.(diff|diff_b|set_weight)$": "weight differences",
    r"^(bundle_emb|string_to_param|emb_params|clip_[lg]$)": "embeddings of prompts",
}
"""Patterns of keys -> kind of adapter that is not supported."""


def _matrix_transposed(tensor: mx.array) -> mx.array:
    return tensor.T if tensor.ndim == 2 else tensor


def _matrix(tensor: mx.array) -> mx.array:
    """Kernel (O, I, kh, kw) -> matrix (O, kh * kw * I); other tensors unchanged."""
    return matrix_to_mlx(conv_to_mlx(tensor).flatten(1) if tensor.ndim == 4 else tensor)


def as_kernels(down: mx.array, up: mx.array, kernel: tuple[int, int] | None) -> tuple[mx.array, mx.array]:
    """A and B in the shapes of PEFT and kohya's scripts, which are kernels for a convolution with this kernel."""
    if kernel is None:
        return down, up
    return conv_from_mlx(down.reshape(down.shape[0], *kernel, -1)), pointwise_from_mlx(up)


def _pair(first: str, second: str, *, transposed: bool = False) -> list[Rule]:
    transform = _matrix_transposed if transposed else _matrix
    return [Rule(theirs, f"{{path}}{ours}", transform) for theirs, ours in ((first, A), (second, B))]


RULES = (
    *_pair(f"{{path}}{A}", f"{{path}}{B}"),
    *_pair("{path}.lora_A.{adapter}.weight", "{path}.lora_B.{adapter}.weight"),  # PEFT, not saved by PEFT
    *_pair("{path}.lora_A", "{path}.lora_B"),
    *_pair(f"{{path}}{DOWN}", f"{{path}}{UP}"),
    *_pair("{path}.lora.down.weight", "{path}.lora.up.weight"),  # diffusers before PEFT
    *_pair("{path}.lora_linear_layer.down.weight", "{path}.lora_linear_layer.up.weight"),
    Rule("{path}.processor.{name}_lora.down.weight", f"{{path}}.{{name}}{A}"),
    Rule("{path}.processor.{name}_lora.up.weight", f"{{path}}.{{name}}{B}"),
    Rule("{path}.self_attn.to_{name}_lora.down.weight", f"{{path}}.self_attn.{{name}}_proj{A}"),
    Rule("{path}.self_attn.to_{name}_lora.up.weight", f"{{path}}.self_attn.{{name}}_proj{B}"),
    *_pair("{path}.lora_a", "{path}.lora_b", transposed=True),  # mlx-lm, mlx-examples
    Rule("{path}.lora_magnitude_vector.{adapter}", f"{{path}}{MAGNITUDE}", mx.flatten),
    Rule(f"{{path}}{MAGNITUDE}", f"{{path}}{MAGNITUDE}", mx.flatten),  # of convolutions (1, out, 1, 1)
    Rule(f"{{path}}{DORA_SCALE}", f"{{path}}{MAGNITUDE}", mx.flatten),
)
"""Ends of keys, which are read and never written: this project writes PEFT's and kohya's."""

_PAIRS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora_a", "lora_b"), (".down.", ".up."))

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:base_model\.model|_orig_mod|module|state_dict)\.")
"""Levels that PEFT, torch.compile and data parallelism insert."""

PEFT_NETWORK = re.compile(r"unet|transformer|text_encoder(_\d)?")
"""First component of diffusers' keys, which names the network."""

_BLOCK = re.compile(r"([a-z][a-z_]*?)[._](\d{1,6})[._]")
_DENOISER = re.compile(r"(?:model\.)?diffusion_model\.|lora_(?:unet|transformer)_")
_TEXT_ENCODER = re.compile(
    r"(?:lora_)?(?:te|text_encoder_?)(\d?)[._]|(?:text_encoders\.)?(clip_[lgh]|t5xxl|qwen\w*)\.(?:transformer\.)?"
)
_SECOND = ("clip_g", "t5xxl")
"""Text encoders that come second wherever they are used."""


def check_kind(keys: Collection[str], where: str) -> None:
    """Check that these are keys of a LoRA adapter.

    Raises:
        WeightsError: another kind of adapter, or no adapter.
    """
    for pattern, kind in _REFUSED.items():
        if refused := [key for key in keys if re.search(pattern, key)]:
            some = first_few(refused, 1, 110)
            raise WeightsError(f"{where}: holds {kind} ({some}), which is not supported; convert it to plain LoRA")
    ends = [to_mlx({key: mx.array(0.0)}, RULES) for key in keys if "lora" in key]
    if not keys:
        raise WeightsError(f"{where}: holds no tensors; give a file with LoRA weights")
    if not any(key.endswith((A, B)) for names in ends for key in names):
        some, kind = first_few(sorted(keys), 2, 70), kind_of(keys) or "other tensors"
        if kind == "an adapter":
            raise WeightsError(
                f"{where}: holds an adapter whose keys are not known ({some}); convert it to PEFT's names"
            )
        raise WeightsError(f"{where}: contains no adapter, but {kind} ({some}); give a file with LoRA weights")


def check_magnitudes(tensors: Mapping[str, mx.array], where: str) -> None:
    """Check that kohya's magnitudes of DoRA are those of outputs, as PEFT's are.

    Raises:
        WeightsError: names the first that is not.
    """
    for key, tensor in tensors.items():
        if key.endswith(DORA_SCALE) and tensor.size != (tensor.shape or (0,))[0]:
            raise WeightsError(
                f"{where}: holds DoRA with magnitudes of inputs ({first_few([key], 1, 110)}), which is not supported;"
                " convert it to plain LoRA"
            )


def renamed(tensors: Mapping[str, mx.array], where: str) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Tensors by PEFT's ends of keys, and the key in the file of each.

    Raises:
        WeightsError: two keys for one tensor.
    """
    found: dict[str, mx.array] = {}
    source: dict[str, str] = {}
    for key, tensor in tensors.items():
        ((new, value),) = to_mlx({key: tensor}, RULES).items()
        if new in found:
            raise WeightsError(f"{where}: {first_few([source[new], key], 2, 80)} are the same tensor; remove one")
        found[new], source[new] = value, key
    return found, source


def counterpart(key: str) -> str:
    """Key of the other matrix of a pair, in the same spelling."""
    for first, second in _PAIRS:
        for one, other in ((first, second), (second, first)):
            if one in key:
                return other.join(key.rsplit(one, 1))
    return key


class LayerNames:
    """Layers of networks by the names that files give them.

    Args:
        networks: paths of their linear layers by the prefix of their keys, the denoiser first.
        names: other names by prefix, in kohya's spelling or with dots replaced by underscores.
    """

    def __init__(self, networks: Mapping[str, Iterable[str]], names: Mapping[str, Modules]) -> None:
        self._denoiser = next(iter(networks))
        self._exact = {name: (prefix, paths) for prefix, modules in names.items() for name, paths in modules.items()}
        self._flat: dict[str, dict[str, Sequence[str]]] = {}
        for prefix, layers in networks.items():
            flat = self._flat.setdefault(prefix, {})
            flat |= {path.replace(".", "_"): (path,) for path in layers}
            flat |= {_without_network(name): paths for name, paths in names.get(prefix, {}).items()}

    def find(self, name: str) -> tuple[str, Sequence[str]]:
        """Prefix of the network, and paths of the layers that this layer of a file stands for; none if unknown."""
        if name in self._exact:
            return self._exact[name]
        prefix, rest = self.network(name)
        if paths := self._flat.get(prefix, {}).get(rest.replace(".", "_")):
            return prefix, paths
        prefix, rest = self.network(_WRAPPERS.sub("", name))
        flat = self._flat.get(prefix, {})
        for spelled in (rest, rest.replace(".layers.", "."), f"{rest}.0"):  # MLX's Sequential; diffusers before PEFT
            if paths := flat.get(spelled.replace(".", "_")):
                return prefix, paths
        if paths := self._flat[self._denoiser].get(name.replace(".", "_")):  # its first level is called as a network
            return self._denoiser, paths
        # transformers 5 leaves out the first level of CLIP
        ends = [paths for flat_name, paths in flat.items() if flat_name.endswith(f"_{rest.replace('.', '_')}")]
        return prefix, ends[0] if len(ends) == 1 and prefix != self._denoiser else ()

    def network(self, name: str) -> tuple[str, str]:
        """Prefix of the network that a layer of a file belongs to, and the rest of its name."""
        if found := next((prefix for prefix in self._flat if name.startswith(f"{prefix}.")), None):
            return found, name.removeprefix(f"{found}.")
        if match := _DENOISER.match(name):
            return self._denoiser, name[match.end() :]
        if match := _TEXT_ENCODER.match(name):
            number = "2" if match[2] in _SECOND else match[1] or ""
            return "text_encoder" + (f"_{number}" if number not in ("", "1") else ""), name[match.end() :]
        return ("text_encoder" if name.startswith("text_model.") else self._denoiser), name


def _without_network(name: str) -> str:
    return re.sub(r"^lora_(unet|transformer|te\d?)_", "", name)


def outline(layers: Iterable[tuple[str, int]]) -> tuple[int, list[int]] | None:
    """Width and numbers of blocks of a network, such as (3072, [19, 38]); None without numbered blocks.

    Args:
        layers: name, in any spelling, and number of inputs of its layers.
    """
    counts: dict[str, int] = {}
    widths = set()
    for name, inputs in layers:
        if match := _BLOCK.search(_WRAPPERS.sub("", name).replace(".", "_")):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
            widths.add(inputs)
    ordered = sorted(counts, key=lambda name: (len(name), name))
    return (min(widths), [counts[name] for name in ordered]) if counts else None
