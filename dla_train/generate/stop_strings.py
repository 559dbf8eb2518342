"""Stop strings in text that arrives in pieces: they may begin in one token and end in another.

Text that could still become a stop string is held back, so that what was shown never has to be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

from dla_train.generate.errors import GenerationError


class StopStrings:
    """Watches one text. Raises GenerationError for an empty stop string."""

    def __init__(self, strings: Sequence[str]) -> None:
        if "" in strings:
            raise GenerationError("a stop string is empty; it would stop everything at once: leave it out")
        self._strings = tuple(strings)
        self._held = ""
        self.found = False
        """Whether a stop string has come."""

    def feed(self, piece: str) -> str:
        """What can be shown after `piece`: text up to the first stop string, less what may be the beginning of one."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for place in (text.find(string) for string in self._strings) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and has become no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` with which `string` begins."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if string.startswith(text[-length:]):
            return length
    return 0
