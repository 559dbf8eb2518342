"""Rows as a model is fed them, as text: every document edge visible, special tokens and padding named."""

from __future__ import annotations

from itertools import pairwise

from dla_train.data.best_fit import PADDING
from dla_train.data.loader import BatchSource
from dla_train.data.tokenizer import Tokenizer

SHOWN = 200
"""Characters shown of each end of a long document."""


def sample_text(
    batches: BatchSource, tokenizer: Tokenizer, step: int, rank: int, world: int, rows: int, *, whole: bool = False
) -> str:
    """The first `rows` rows of a rank's batch in `step`; `whole` prints documents without shortening."""
    micro = batches.batch(step, rank, world, 1)
    _, names = batches.rows(step, rank, world)
    pieces = batches.context_tokens // batches.blend.phase(step).context_tokens
    lines: list[str] = []
    shown = 0
    for index, batch in enumerate(micro):
        length = batch.tokens.shape[1]
        edges = batch.cu_seqlens.tolist()
        for row, tokens in enumerate(batch.tokens.tolist()):
            if shown == rows:
                return "\n".join(lines)
            own = [edge - row * length for edge in edges if row * length <= edge <= (row + 1) * length]
            title = f"step {step}, rank {rank} of {world}, row {index * pieces + row}, source {names[index]}"
            lines += [f"=== {title}: {length} tokens", *_row(tokens, own, tokenizer, whole)]
            shown += 1
    return "\n".join(lines)


def _row(tokens: list[int], edges: list[int], tokenizer: Tokenizer, whole: bool) -> list[str]:
    lines, padding = [], 0
    for begin, end in reversed(list(pairwise(edges))):  # padding lies at the end, each token a document of its own
        if end - begin == 1 and tokens[begin] == PADDING and begin == len(tokens) - padding - 1 and begin:
            padding += 1
            continue
        text = tokenizer.decode(tokens[begin:end])
        if not whole and len(text) > 2 * SHOWN:
            text = f"{text[:SHOWN]} [... {len(text) - 2 * SHOWN} characters ...] {text[-SHOWN:]}"
        first = "BOS, " if tokens[begin] == tokenizer.bos_id else ""
        last = "ends with EOS" if tokens[end - 1] == tokenizer.eos_id else "goes on after the row"
        last = last if end == len(tokens) or tokens[end - 1] == tokenizer.eos_id else "ends without EOS"
        lines += [text, f"--- document, tokens {begin} to {end} ({end - begin}): {first}{last}"]
    if padding:
        lines = [f"--- padding, tokens {len(tokens) - padding} to {len(tokens)}", *lines]
    return lines[::-1]
