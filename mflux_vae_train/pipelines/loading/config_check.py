"""Configurations in JSON files of transformers and diffusers, as dataclasses with checked types."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from mflux_vae.errors import SettingsError, WeightsError

T = TypeVar("T")
C = TypeVar("C", bound="JSONConfig")

_LARGEST, _MOST_LAYERS = 2**31 - 1, 1000
"""Larger numbers, and more layers, are mistakes in a file and would fill the memory."""


@dataclass(frozen=True)
class JSONConfig:
    """Base of dataclasses whose fields are keys of a config.json.

    Attributes:
        kinds: keys that name the kind of model and their values, the first of which `from_dict` checks.
    """

    kinds: ClassVar[Mapping[str, Any]]

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Read a parsed config.json. Keys without a field are ignored; lists become tuples.

        Raises:
            SettingsError: another kind of model, or an unsupported option.
        """
        key, expected = next(iter(cls.kinds.items()))
        if (kind := values.get(key, expected)) != expected:
            raise SettingsError(f"config of a {kind!r}, which is not supported; {expected} is")
        known: dict[str, Any] = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**{name: _frozen(value) for name, value in known.items()})

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers or diffusers read."""
        return {**self.kinds, **asdict(self)}


def _frozen(value: Any) -> Any:
    """Lists, and lists in them, as tuples."""
    return tuple(tuple(one) if isinstance(one, list) else one for one in value) if isinstance(value, list) else value


def check_config(build: Callable[[], T], file: object) -> T:
    """The dataclass that `build` returns, if each field has its declared type. Numbers as text are refused.

    Args:
        file: for messages.

    Raises:
        WeightsError: `build` fails, or a field has another type or an excessive value.
    """
    try:
        config = build()
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise WeightsError(f"{file}: its values do not fit ({str(error)[:200]})") from error
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        excessive = name.endswith("layers") and type(value) is int and value > _MOST_LAYERS
        if typing.get_origin(hint) is not typing.ClassVar and (excessive or not _fits(value, hint)):
            raise WeightsError(f"{file}: {name} is {repr(value)[:100]}, which it cannot be")
    return config


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if hint is int:
        return type(value) is int and abs(value) <= _LARGEST
    if hint is float:
        return type(value) in (int, float) and abs(value) <= _LARGEST and math.isfinite(value)
    return not isinstance(hint, type) or isinstance(value, hint)
