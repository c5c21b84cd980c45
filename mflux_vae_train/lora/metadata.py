"""What a file states about an adapter: alpha, rank, and options of its training.

Read are PEFT's configuration in the metadata (`lora_adapter_metadata`, JSON with or without prefixes) or in
`adapter_config.json`, mlx-lm's `adapter_config.json`, and plain keys of the metadata, as SimpleTuner, mlx-examples and
kohya's scripts write them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mflux_vae.errors import InputError, WeightsError
from mflux_vae.utils.formatting import shortened
from mflux_vae.utils.text_files import parse_json, read_text
from mflux_vae.utils.yaml_io import parse_yaml
from mflux_vae.weights.formats.files import read_json
from mflux_vae_train.lora.location import CARD, FILES, PEFT_CONFIG

METADATA_KEY = "lora_adapter_metadata"

_ALPHA = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
_RANK = ("r", "rank", "lora_rank")
_LAYER_RANK = ("ss_network_dim", "network_dim")
"""Rank of most layers in files of kohya's scripts; fused layers may have a multiple of it."""

_BASE = ("base_model_name_or_path", "base_model", "ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
"""The model that an adapter was trained for: PEFT's key, those of model cards and of kohya's scripts."""

_NOTHING: tuple[Any, ...] = (
    None,
    False,
    "",
    "none",
    "None",
    "False",
    "false",
    "null",
    "[]",
    "{}",
    "Dynamic",
    "dynamic",
    [],
    {},
)
"""Values that state nothing."""

_REFUSED = (
    *("fan_in_fan_out", "modules_to_save", "bias", "lora_bias", "layer_replication", "trainable_token_indices"),
    *("target_parameters", "use_qalora", "megatron_config"),
)
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` that also change the weights of the base model."""


class Statements:
    """Statements of a file, by where they stand.

    Args:
        metadata: of the file.
        path: the file.

    Raises:
        WeightsError: they cannot be read, or need an option that is not supported.
    """

    def __init__(self, metadata: Mapping[str, str], path: Path) -> None:
        self.path = path
        self._sources: dict[str, Mapping[str, Any]] = {METADATA_KEY: self._json(metadata.get(METADATA_KEY, "{}"))}
        beside = path.with_name(PEFT_CONFIG)
        if path.name in FILES and not path.name.startswith("pytorch_lora") and os.path.lexists(beside):
            self._sources[PEFT_CONFIG] = _of_mlx_lm(read_json(beside))
        self._sources["metadata"] = metadata

    def check(self, prefixes: Iterable[str]) -> None:
        """Refuse options of PEFT that change more than the adapted layers.

        Raises:
            WeightsError: names the option.
        """
        for prefix in prefixes:
            options = [("peft_type", value) for _, value in self._find(("peft_type",), prefix) if value != "LORA"]
            options += [(name, value) for name in _REFUSED for _, value in self._find((name,), prefix)]
            options += [
                ("init_lora_weights", value)
                for _, value in self._find(("init_lora_weights",), prefix)
                if str(value).lower().startswith(_MOVES_BASE)
            ]
            for name, value in options:
                text = shortened(str(value), 40)
                raise WeightsError(
                    f"{self.path}: was trained with {name} {text}, which is not supported; use plain LoRA"
                )

    def prefixes(self) -> set[str]:
        """Names of the networks that PEFT's configuration in the metadata is for."""
        config = self._sources[METADATA_KEY]
        return {key.partition(".")[0] for key, value in config.items() if "." in key or isinstance(value, dict)}

    def targets(self, prefix: str) -> list[str] | None:
        """PEFT's `target_modules`; None if nothing lists them."""
        found = next((value for _, value in self._find(("target_modules",), prefix)), None)
        return [*map(str, found)] if isinstance(found, list) else None

    def alpha(self, prefix: str) -> float | None:
        """Alpha of a network's adapter; None if nothing states it."""
        return self._number(_ALPHA, prefix)

    def rank(self, prefix: str) -> int | None:
        """Rank of a network's adapter; None if nothing states it."""
        return self._whole(_RANK, prefix)

    def layer_rank(self, prefix: str) -> int | None:
        """Rank as kohya's scripts state it."""
        return self._whole(_LAYER_RANK, prefix)

    def flag(self, name: str, prefix: str) -> bool:
        """Whether an option is on."""
        return any(str(value).lower() in ("true", "1") for _, value in self._find((name,), prefix))

    def pattern(self, name: str, prefix: str) -> Mapping[str, float]:
        """Values of single layers: `rank_pattern` or `alpha_pattern`, by PEFT's regular expressions."""
        found: dict[str, float] = {}
        for where, value in self._find((name,), prefix):
            content = self._json(value, where) if isinstance(value, str) else value
            if not isinstance(content, dict):
                raise WeightsError(f"{self.path}: its {where} is not an object; correct the file")
            for key, number in content.items():
                if len(key) > 200 or re.search(r"[)\]}*+?][*+?{]", key):
                    raise WeightsError(f"{self.path}: {name} has the pattern {shortened(key, 60)}; write out the names")
                found[key] = self._positive(number, f"{name} of {shortened(key, 60)}")
        return found

    def _find(self, names: Iterable[str], prefix: str) -> Iterator[tuple[str, Any]]:
        for where, content in self._sources.items():
            nested = content.get(prefix)
            for name in names:
                for key in (f"{prefix}.{name}", name):
                    if key in content and not _states_nothing(content[key]):
                        yield (key if where == "metadata" else f"{key} in {where}"), content[key]
                if isinstance(nested, dict) and not _states_nothing(nested.get(name)):
                    yield f"{prefix}.{name} in {where}", nested[name]

    def _number(self, names: Iterable[str], prefix: str) -> float | None:
        found = {where: self._positive(value, where) for where, value in self._find(names, prefix)}
        if len(set(found.values())) > 1:
            (one, other) = sorted(found, key=lambda where: found[where])[:: len(found) - 1][:2]
            raise WeightsError(
                f"{self.path}: {one} is {found[one]:g} and {other} is {found[other]:g}; correct the file's metadata"
            )
        return next(iter(found.values()), None)

    def _whole(self, names: Iterable[str], prefix: str) -> int | None:
        number = self._number(names, prefix)
        if number is not None and number != int(number):
            raise WeightsError(f"{self.path}: its rank is {number:g}, not a whole number; correct the file's metadata")
        return None if number is None else int(number)

    def _positive(self, value: Any, what: str) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not 0 < number < math.inf:
            text = shortened(str(value), 40)
            raise WeightsError(f"{self.path}: its {what} is {text}; a positive number is needed: correct the file")
        return number

    def _json(self, text: str, what: str = METADATA_KEY) -> Mapping[str, Any]:
        try:
            content = parse_json(text)
            if not isinstance(content, dict):
                raise ValueError("not an object")
            return content
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{self.path}: its {what} cannot be read ({error}); correct the file") from error


def base_model(path: Path) -> tuple[str, str] | None:
    """Where an adapter's file, or a file beside it, names the model that it was trained for, and the name.

    Returns:
        None if none does, or only files that cannot be read.
    """
    from mflux_vae.weights.formats.files import open_weights

    sources: dict[str, Callable[[], Any]] = {
        "model card": lambda: card(path),
        PEFT_CONFIG: lambda: read_json(path.with_name(PEFT_CONFIG)),
        "metadata": lambda: open_weights(path)[1],
    }
    for where, read in sources.items():
        with suppress(InputError, OSError):
            content = read()
            names = [content.get(key) for key in _BASE] if isinstance(content, dict) else []
            if found := next((name for name in names if isinstance(name, str) and name.strip()), None):
                return where, found
    return None


def card(path: Path) -> Mapping[str, Any]:
    """Metadata of the model card beside an adapter's file, as the Hugging Face Hub reads it; empty if there is none."""
    with suppress(InputError, OSError):
        front = read_text(path.with_name(CARD)).partition("---\n")[2].partition("\n---")[0]
        content = parse_yaml(front, CARD)
        return content if isinstance(content, dict) else {}
    return {}


def other_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata without what `Statements` reads of ranks and alphas, and without hashes of the tensors."""
    read = {*_ALPHA, *_RANK, *_LAYER_RANK, "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "target_modules"}
    return {
        key: text
        for key, text in metadata.items()
        if key not in (METADATA_KEY, "format")
        and key.rpartition(".")[2] not in read
        and not key.startswith(("sshs_", "modelspec.hash"))
    }


def pattern_value(patterns: Mapping[str, float], path: str) -> float | None:
    """Value of the first pattern that matches a path as in PEFT; None if there is none."""
    for key, value in patterns.items():
        try:
            if re.match(rf"(?:.*\.)?(?:{key})$", path) or (key.startswith("^") and re.match(key, path)):
                return value
        except re.error:
            continue
    return None


def _states_nothing(value: object) -> bool:
    return any(value is nothing or (type(value) is type(nothing) and value == nothing) for nothing in _NOTHING)


def _of_mlx_lm(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """PEFT's configuration; mlx-lm states rank and scale."""
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        return config
    rank, scale = parameters.get("rank"), parameters.get("scale")
    alpha = rank * scale if isinstance(rank, int | float) and isinstance(scale, int | float) else scale
    return {"r": rank, "lora_alpha": alpha}
