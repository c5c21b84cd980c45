"""A large object that is loaded on first use and can be freed when its work is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from mflux_vae.runtime.threads import exclusive, portable

T = TypeVar("T")


class Lazy(Generic[T]):
    """A lazily loaded object.

    Args:
        load: creates the object. None for an object that exists already and is never freed.
        prepare: called before `load`, while other threads may compute: for a download.

    Attributes:
        loaded: the object, or None while it is not loaded.
    """

    def __init__(
        self,
        load: Callable[[], T] | None = None,
        *,
        loaded: T | None = None,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        if load is None and loaded is None:
            raise ValueError("Lazy needs load or loaded")
        self._load, self.loaded, self._prepare = load, loaded, prepare
        self._changes: list[tuple[Callable[[T], object], str]] = []
        self._loaded_hash: str | None = None

    @classmethod
    def of(cls, given: T | Lazy[T]) -> Lazy[T]:
        """`given` itself if it is lazy, else a `Lazy` that holds it."""
        return given if isinstance(given, Lazy) else cls(loaded=given)

    @property
    def reloadable(self) -> bool:
        """Whether `release` frees the object."""
        return self._load is not None

    def get(self) -> T:
        """The object, loaded now if necessary. Any thread may compute its weights."""
        loaded = self.loaded
        if loaded is None:
            self._prepare()
            return self._open()
        return loaded

    @exclusive()
    @portable()
    def _open(self) -> T:
        loaded = self.loaded
        if loaded is None:  # no other thread was faster
            assert self._load is not None
            loaded = self._load()
            for change, _ in self._changes:
                change(loaded)
            self.loaded = loaded
        return loaded

    def borrow(self) -> T:
        """The object for one use: if it has to be loaded for it, it is not kept."""
        kept, borrowed = self.loaded is not None, self.get()
        if not kept:
            self.release()
        return borrowed

    @exclusive()
    @portable()
    def apply(self, change: Callable[[T], object], name: str = "") -> None:
        """Change the object in place: now if it is loaded, and again after every load.

        Args:
            name: of the change, for `fingerprint`; empty if it does not affect what the object computes.
        """
        self._changes.append((change, name))
        if self.loaded is not None:
            change(self.loaded)

    def fingerprint(self, hash_of: Callable[[T], str]) -> str:
        """`hash_of(object)` before any change, followed by the names of the changes.

        No change is applied for this, as it may take long. An object that is loaded for it is not kept; its hash is.
        """
        source = self.loaded
        if source is not None and not (self._changes and self.reloadable):
            found = hash_of(source)
        elif (known := self._loaded_hash) is not None:
            found = known
        else:
            assert self._load is not None
            self._prepare()
            with exclusive(), portable():
                source = self._load()
            found = self._loaded_hash = hash_of(source)
        return " ".join([found, *dict.fromkeys(name for _, name in self._changes if name)])

    def keep(self) -> T:
        """The object, which is never freed from now on because it is going to be changed."""
        kept = self.get()
        self._load = None
        return kept

    def release(self) -> None:
        """Drop the object if it can be loaded again. Its memory is free once nothing else refers to it."""
        if self.reloadable:
            self.loaded = None
