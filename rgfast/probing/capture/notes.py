"""What a result says about how it was made, one sentence per reason."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Notes"]


class Notes:
    """Sentences in the order they came, each once."""

    def __init__(self) -> None:
        self._sentences: dict[str, None] = {}

    def add(self, sentence: str) -> None:
        """Add a sentence, unless it is there."""
        self._sentences[sentence] = None

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._sentences))
