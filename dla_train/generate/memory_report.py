"""Which states a prompt left in the memory: for every layer and head the live slots, their tokens and their text.

Slots are contiguous and in order, so a slot's span follows from the counts in the cache. A slot whose tokens were
merged from several segments shows as one: its edges are where surviving boundaries lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dla_kernels import MergeCache
from dla_train.generate.errors import GenerationError
from dla_train.models.mixer import Cache

EDGE_CHARACTERS = 28
"""Of a slot's text at either end."""


@dataclass(frozen=True)
class Slot:
    """One state of one head."""

    first: int
    """First token of the prompt in it."""
    end: int
    """One past the last."""
    mean_score: float
    """Mean drift of its tokens."""


@dataclass(frozen=True)
class HeadMemory:
    """One head's live slots, oldest first; the last one is open."""

    layer: int
    head: int
    slots: list[Slot]
    capacity: int


def head_memories(
    caches: Sequence[Cache], row: int = 0, *, layer: int | None = None, head: int | None = None
) -> list[HeadMemory]:
    """The memories of sequence `row`, of all layers and heads or those chosen.

    Raises GenerationError for a layer or head there is not, and for softmax attention, which has no slots.
    """
    found = []
    for index, cache in enumerate(caches):
        if not isinstance(cache, MergeCache):
            raise GenerationError("softmax attention keeps every token: it has no memory slots to show")
        heads = cache.fill.shape[1]
        _check_choice("layer", layer, len(caches))
        _check_choice("head", head, heads)
        if layer in (None, index):
            found += [_head_memory(cache, row, index, h) for h in range(heads) if head in (None, h)]
    return found


def _check_choice(name: str, chosen: int | None, count: int) -> None:
    if chosen is not None and not 0 <= chosen < count:
        raise GenerationError(f"{name} {chosen} does not exist; choose 0 to {count - 1}")


def _head_memory(cache: MergeCache, row: int, layer: int, head: int) -> HeadMemory:
    live = int(cache.fill[row, head])
    position = int(cache.position[row])
    starts = (cache.slot_starts()[row, head, :live] + position).tolist()
    counts, scores = cache.counts[row, head, :live].tolist(), cache.scores[row, head, :live].tolist()
    slots = [
        Slot(first, first + count, score / max(count, 1))
        for first, count, score in zip(starts, counts, scores, strict=True)
    ]
    return HeadMemory(layer, head, slots, cache.slots)


def memory_text(memories: Sequence[HeadMemory], pieces: Sequence[str], *, scored: bool) -> str:
    """The memories as lines; `pieces` are the prompt's tokens as text, `scored` says whether drift was measured."""
    width = len(str(len(pieces)))
    lines = []
    for memory in memories:
        lines.append(f"layer {memory.layer}, head {memory.head}: {len(memory.slots)} of {memory.capacity} states")
        for number, slot in enumerate(memory.slots):
            count = slot.end - slot.first
            span = f"{slot.first:>{width}}..{slot.end - 1:<{width}}"
            drift = f"  drift {slot.mean_score:.2f}" if scored else ""
            is_open = "  (open)" if number == len(memory.slots) - 1 else ""
            tokens = f"{count:>{width}} token{'s' if count > 1 else ' '}"
            lines.append(f"  {number:>3}  {span}  {tokens}{drift}  {_edges(pieces[slot.first : slot.end])}{is_open}")
    return "\n".join(lines)


def _edges(pieces: Sequence[str]) -> str:
    """Both ends of a slot's text, quoted; whole where it is short."""
    text = "".join(pieces)
    if len(text) <= 2 * EDGE_CHARACTERS + 5:
        return repr(text)
    return f"{text[:EDGE_CHARACTERS]!r} ... {text[-EDGE_CHARACTERS:]!r}"
