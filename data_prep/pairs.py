"""Documents that can only be recalled: pairs of words that come again, to be blended into text.

A document takes some pairs of a key and a value, both drawn without replacement, gives each once and then goes on with
pairs drawn again at random: after a key that came before, its value is certain, and nothing else is. Language models
learn to recall from their context late; a share of such documents makes them learn it early, so that memories can be
compared by what they recall (`dla-diagnose`, docs/diagnostics.md).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.records import PrepareError
from dla_train.data.indexed import refuse_existing
from dla_train.data.tokenizer import Tokenizer, load_tokenizer
from dla_train.durable import write_atomically


@dataclass(frozen=True)
class PairOptions:
    """What the documents are like."""

    documents: int = 4000
    words: int = 500
    """Words of a document, two a pair; nearly its tokens."""
    least: int = 4
    """Fewest pairs of a document."""
    most: int = 64
    """Most; the number is drawn so that every doubling is as likely."""
    seed: int = 0


def write_pairs(
    output: str | Path, tokenizer: str | Path, options: PairOptions = PairOptions(), *, overwrite: bool = False
) -> int:
    """Write OUTPUT (`.jsonl`: text), the same for the same tokenizer and options; returns the number of words used.

    Words are those that are one token of `tokenizer`; every other one is a key, the rest are values. Raises
    PrepareError where options contradict each other or there are too few words, TokenFileError if OUTPUT exists and
    `overwrite` is false.
    """
    output = Path(output)
    _check(options)
    refuse_existing([output], overwrite)
    words = single_words(load_tokenizer(tokenizer))
    if len(words) < 2 * options.most:
        raise PrepareError(
            f"{tokenizer} has {len(words)} words of one token, {options.most} pairs need {2 * options.most}; "
            "lower --most, or take a larger vocabulary"
        )
    generator = random.Random(options.seed)
    keys, values = words[::2], words[1::2]
    lines = (json.dumps({"text": text}) + "\n" for text in _documents(keys, values, options, generator))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, "".join(lines))
    return len(words)


def single_words(tokenizer: Tokenizer) -> list[str]:
    """Lower-case words of three letters or more that are one token after a space, in alphabetical order."""
    found = {tokenizer.decode([index]).strip() for index in range(tokenizer.vocab_size)}
    candidates = sorted(
        word for word in found if len(word) > 2 and word.isascii() and word.isalpha() and word.islower()
    )
    return [word for word in candidates if len(tokenizer.encode(f"{word} {word}")) == 2]


def _check(options: PairOptions) -> None:
    for name in ("documents", "least"):
        if getattr(options, name) < 1:
            raise PrepareError(f"--{name}={getattr(options, name)} is below 1; give 1 or more")
    if options.most < options.least:
        raise PrepareError(f"--most={options.most} is below --least={options.least}; raise it")
    if options.words % 2:
        raise PrepareError(f"--words={options.words} is odd, and a pair is two words; give {options.words + 1}")
    if options.words < 4 * options.most:
        raise PrepareError(
            f"--words={options.words} does not hold {options.most} pairs twice; give {4 * options.most} or more"
        )


def _documents(
    keys: Sequence[str], values: Sequence[str], options: PairOptions, generator: random.Random
) -> Iterator[str]:
    for _ in range(options.documents):
        drawn = math.exp(generator.uniform(math.log(options.least), math.log(options.most + 1)))
        count = min(int(drawn), options.most)
        pairs = list(zip(generator.sample(keys, count), generator.sample(values, count), strict=True))
        again = generator.choices(pairs, k=options.words // 2 - count)
        yield " ".join(f"{key} {value}" for key, value in [*pairs, *again])
