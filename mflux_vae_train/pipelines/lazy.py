"""A part of a pipeline that is large: loaded when it is first used, and given back when its work is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Lazy(Generic[T]):
    """A lazily loaded object.

    Args:
        load: makes it. None for an object that is there already; such a one is never given back, as nothing could
            bring it again.
        config: what is known of it before it is loaded.

    Attributes:
        config: as given.
        loaded: the object, while it is there.
    """

    def __init__(self, load: Callable[[], T] | None = None, *, loaded: T | None = None, config: Any = None) -> None:
        if load is None and loaded is None:
            raise ValueError("a part needs a way to be loaded, or to be there")
        self._load, self.loaded, self.config = load, loaded, config
        self._changes: list[tuple[Callable[[T], object], str]] = []

    @classmethod
    def of(cls, given: T | Lazy[T]) -> Lazy[T]:
        """The part itself, or an object with a `config` as one."""
        return given if isinstance(given, Lazy) else cls(loaded=given, config=getattr(given, "config", None))

    @property
    def on_demand(self) -> bool:
        """Whether it can be given back."""
        return self._load is not None

    def get(self) -> T:
        """The object, loaded now if it is not there."""
        if self.loaded is None:
            assert self._load is not None
            loaded = self._load()
            for change, _ in self._changes:
                change(loaded)
            self.loaded = loaded
        return self.loaded

    def borrow(self) -> T:
        """The object for one use: if it is not there, it is loaded and not kept."""
        kept, borrowed = self.loaded is not None, self.get()
        if not kept:
            self.release()
        return borrowed

    def then(self, change: Callable[[T], object], name: str = "") -> None:
        """Change the object in place: now if it is there, and whenever it is loaded.

        Args:
            name: of the change, for `identity`; empty where it does not change what the object computes.
        """
        self._changes.append((change, name))
        if self.loaded is not None:
            change(self.loaded)

    def identity(self, of: Callable[[T], str]) -> str:
        """`of(object)` before any change, followed by the names of the changes.

        No change is made for this, however long it would take. An object that is loaded for it is not kept.
        """
        source = self.loaded
        if source is None or (self._changes and self._load is not None):
            assert self._load is not None
            source = self._load()
        return " ".join([of(source), *dict.fromkeys(name for _, name in self._changes if name)])

    def keep(self) -> T:
        """The object, which is never given back from now on: it is going to be changed."""
        kept = self.get()
        self._load = None
        return kept

    def release(self) -> None:
        """Forget the object if it can be loaded again. Its memory is free as soon as nobody else holds it."""
        if self.on_demand:
            self.loaded = None
