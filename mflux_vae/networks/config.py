"""Base class of the configurations of networks that diffusers lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, TypeVar

from mflux_vae.errors import SettingsError

C = TypeVar("C", bound="NetworkConfig")


class NetworkConfig:
    """Base of frozen dataclasses; `NAME` is the class name of the network."""

    NAME: ClassVar[str]

    @classmethod
    def from_dict(cls: type[C], config: Mapping[str, Any]) -> C:
        """Read a config.json; keys that start with an underscore are ignored.

        Raises:
            SettingsError: an unknown key or an invalid value.
        """
        try:
            return cls(**{name: value for name, value in config.items() if not name.startswith("_")})
        except TypeError as error:
            raise SettingsError(f"{cls.NAME}: invalid configuration ({error})") from error

    def to_dict(self: Any) -> dict[str, Any]:
        """Return JSON values for `from_dict`."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"_class_name": self.NAME, **values}
