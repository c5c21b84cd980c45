"""Configurations of networks that are this project's own: a config.json has their fields and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, TypeVar

from mflux_vae.errors import SettingsError

C = TypeVar("C", bound="OwnConfig")


class OwnConfig:
    """A dataclass is made of it; `NAME` is its network's class."""

    NAME: ClassVar[str]

    @classmethod
    def from_dict(cls: type[C], config: Mapping[str, Any]) -> C:
        """Read config.json; keys that start with an underscore are bookkeeping.

        Raises:
            SettingsError: an unknown key, or a value that does not go.
        """
        try:
            return cls(**{name: value for name, value in config.items() if not name.startswith("_")})
        except TypeError as error:
            raise SettingsError(f"{cls.NAME}: not its configuration ({error})") from error

    def to_dict(self: Any) -> dict[str, Any]:
        """What `from_dict` reads, as JSON has it."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"_class_name": self.NAME, **values}
