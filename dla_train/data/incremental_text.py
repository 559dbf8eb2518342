"""Text of tokens that arrive one by one: each token's own piece, at a cost that does not grow with the text.

A tokenizer decodes a sequence, not a token: sentencepiece drops the space at the start of what it decodes, and a
character may take several byte tokens. So a piece is what a token adds to the decoded text of the few tokens before it;
bytes of an unfinished character wait until it is complete.
"""

from __future__ import annotations

from collections.abc import Sequence

from dla_train.data.tokenizer import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_BEFORE = 8
"""Tokens of the text so far that are decoded along: enough for a space or a character to find its neighbours."""
_LONGEST = 8
"""Tokens after which bytes that make no character are shown as they are."""


class IncrementalText:
    """Pieces of text after `before`, tokens whose text is known."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._ids = list(before[-_BEFORE:])
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is unfinished."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(_UNFINISHED) and len(self._ids) - self._shown < _LONGEST:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """What is still unfinished, as the tokenizer shows it."""
        return self._show(self._new_text())

    def _new_text(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]

    def _show(self, text: str) -> str:
        self._ids = self._ids[max(0, self._shown - _BEFORE) :] if len(self._ids) > 4 * _BEFORE else self._ids
        self._shown = len(self._ids)
        return text


def token_pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text each token adds; bytes of an unfinished character show where it is complete."""
    text = IncrementalText(tokenizer)
    pieces = [text.push(token) for token in ids]
    if pieces:
        pieces[-1] += text.flush()
    return pieces
