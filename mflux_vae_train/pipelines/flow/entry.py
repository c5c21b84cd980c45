"""The functions behind the entry points of a family, see `pipelines.registry`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flow.family import Family

P = TypeVar("P")


class Entry(Generic[P]):
    """`load`, `opens` and `knows` of a family.

    Args:
        package: its modules `family`, with `FAMILY`, and `pipeline` are imported when they are needed.
    """

    def __init__(self, package: str) -> None:
        self._package = package

    @property
    def _family(self) -> Family:
        family: Family = import_module(f"{self._package}.family").FAMILY
        return family

    def load(self, model: str, *, revision: str | None = None, variant: str | None = None, vae: str | None = None) -> P:
        """Open a model; arguments and errors as in `flow.files.load`."""
        from mflux_vae_train.pipelines.flow import files

        family = self._family
        pipeline: Any = getattr(import_module(f"{self._package}.pipeline"), family.class_name)
        opened: P = files.load(family, pipeline, model, revision=revision, variant=variant, vae=vae)
        return opened

    def opens(self, place: Path) -> bool:
        """Whether a file, or a folder that mflux saved without `model_index.json`, holds a model of the family."""
        from mflux_vae_train.pipelines.flow import files

        return files.opens(self._family, place)

    def knows(self, repository: str) -> bool:
        """Whether a repository on the hub is a model whose configurations are known without a download."""
        return self._family.repository_of(repository) is not None
