"""Greedy answers to many prompts of unequal length, batch by batch, so that each batch can be kept when it is done.

The work is `generate`'s: prompts of equal length are read together, then rows of any length are stepped side by side on
the fixed-size caches, without padding. Prompts are sorted by length, so that many are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dla_train.generate.decoding import generate
from dla_train.generate.sampling import Sampling
from dla_train.harness.scoring import dealt
from dla_train.models.language_model import LanguageModel

Done = Callable[[list[int]], bool]
"""Whether an answer, so far, is finished."""


def answers(
    model: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: int,
    done: Done,
    *,
    rows: int,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Likeliest continuations of up to `new_tokens`, batch by batch with the prompts' indices, longest first.

    done: asked of every answer after every token. rows: prompts at once, each with caches of its own. Several ranks
    share the batches as in `score`.
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), prompts[index]))
    for chosen in dealt([order[begin : begin + rows] for begin in range(0, len(order), rows)], rank, ranks):
        if chosen is None:
            yield []
            continue
        made: list[list[int]] = [[] for _ in chosen]

        def ended(place: int, token: int, made: list[list[int]] = made) -> bool:
            made[place].append(token)
            return done(made[place])

        asked = [prompts[index] for index in chosen]
        generate(model, asked, new_tokens, Sampling(temperature=0), batch_rows=rows, on_token=ended)
        yield list(zip(chosen, made, strict=True))
