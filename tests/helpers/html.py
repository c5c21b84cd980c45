"""HTML for tests: parsed strictly, every element closed in order."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = ("meta", "img", "input", "br", "link")


class Page(HTMLParser):
    """What a page holds.

    Attributes:
        elements: (tag, attributes) in order.
        texts: (tag around it, text) in order.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self._open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data: str) -> None:
        if self._open and data.strip():
            self.texts.append((self._open[-1], data))

    def of(self, tag: str) -> list[dict[str, str]]:
        """Attributes of all elements of a kind."""
        return [attributes for each, attributes in self.elements if each == tag]

    def text(self) -> str:
        """All that a person reads."""
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style"))
