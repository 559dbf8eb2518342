"""Trains a sentencepiece tokenizer whose decoding gives back the exact text.

Exactness is the decision here: no normalisation, white space and newlines kept as ordinary characters (pieces such as
"):\\n" may form), digits split, and bytes for characters outside the alphabet, so no text maps to "unknown". The one
character that cannot return is U+2581, sentencepiece's own mark for a space.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from data_prep.records import PrepareError, TextSource, documents, progress_bar
from dla_train.data.indexed import refuse_existing
from dla_train.durable import write_atomically

MODEL_TYPES = ("bpe", "unigram")
_CHUNK_CHARACTERS = 4000
_SMALLEST_VOCABULARY = 300  # 256 bytes, unknown, BOS, EOS, and some characters
_MOST_THREADS = 16
_EXAMPLE_CHARACTERS = 60


class _Measures(TypedDict):
    """Fields of TokenizerReport that are measured on the sample."""

    bytes_per_token: float
    byte_share: float
    unknown_share: float
    example: str


@dataclass(frozen=True)
class TokenizerReport:
    """What `train_tokenizer` wrote."""

    path: Path
    model_type: str
    vocab_size: int
    sample_bytes: int
    """UTF-8 bytes it was trained on."""
    bytes_per_token: float
    """On part of that sample."""
    byte_share: float
    """Share of tokens there that are single bytes, which is how characters outside the vocabulary are spelt."""
    unknown_share: float
    """Share of tokens there that are unknown: 0 unless byte fallback fails."""
    example: str
    """The first words of it in pieces, `|` between them, line ends as `\\n`."""
    seconds: float


def train_tokenizer(
    sources: Sequence[TextSource],
    output: str | Path,
    vocab_size: int,
    *,
    model_type: str = "bpe",
    sample_megabytes: float = 16.0,
    on_error: str = "stop",
    overwrite: bool = False,
    progress: bool = True,
) -> TokenizerReport:
    """Train on a sample of at most `sample_megabytes`, spread over `sources`, and write OUTPUT (a `.model` file)
    atomically.

    Ids: 0 unknown, 1 BOS, 2 EOS. Deterministic. Records that cannot be used end it, or are passed over with `on_error`
    skip. Raises PrepareError (no text, vocabulary too large or too small for it, wrong suffix) and TokenFileError if
    OUTPUT exists and `overwrite` is false.
    """
    began = time.perf_counter()
    output = Path(output)
    if output.suffix != ".model":
        raise PrepareError(f"output {output} does not end in .model, by which a sentencepiece tokenizer is recognised")
    if model_type not in MODEL_TYPES:
        raise PrepareError(f"model_type={model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    if vocab_size < _SMALLEST_VOCABULARY:
        raise PrepareError(
            f"vocab_size={vocab_size} is below {_SMALLEST_VOCABULARY}: byte fallback alone takes 259 pieces"
        )
    refuse_existing([output], overwrite)
    sample = _sample(sources, int(sample_megabytes * 1e6), on_error, progress)
    if not sample:
        raise PrepareError("no text in the sources: a tokenizer cannot be trained on nothing")
    model = _train(sample, vocab_size, model_type)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, model)
    return TokenizerReport(
        path=output,
        model_type=model_type,
        vocab_size=vocab_size,
        sample_bytes=sum(len(chunk.encode()) for chunk in sample),
        **_measures(model, sample),
        seconds=time.perf_counter() - began,
    )


def _train(sample: list[str], vocab_size: int, model_type: str) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _CHUNK_CHARACTERS,
            num_threads=min(os.cpu_count() or 1, _MOST_THREADS),
            minloglevel=2,
        )
    except RuntimeError as error:  # sentencepiece raises nothing finer; its reason follows a source position in [ ]
        reason = str(error).splitlines()[-1].rpartition("] ")[2]
        reason = reason.partition(" Increase vocab_size or")[0].rstrip(". ")  # an option we do not have
        raise PrepareError(
            f"sentencepiece cannot make vocab_size={vocab_size} out of this text: {reason}; choose another "
            "--vocab-size, or give more text"
        ) from error
    return model.getvalue()


def _sample(sources: Sequence[TextSource], budget: int, on_error: str, progress: bool) -> list[str]:
    """Chunks of the text, at most `budget` bytes, chosen by hash in one pass over sources of unknown length.

    A chunk stays while its hash is under a threshold, which halves whenever twice the budget is held.
    """
    kept: list[tuple[int, str, int]] = []  # hash, chunk, bytes
    threshold, held = 1 << 64, 0
    with progress_bar(sources, "read", progress) as bar:
        for source in sources:
            for text, read in documents(source, on_error):
                for chunk in _chunks(text):
                    data = chunk.encode()
                    place = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
                    if place < threshold:
                        kept.append((place, chunk, len(data)))
                        held += len(data)
                while held > 2 * budget and threshold > 1:
                    threshold //= 2
                    kept = [item for item in kept if item[0] < threshold]
                    held = sum(item[2] for item in kept)
                bar.update(read)
    while held > budget and len(kept) > 1:
        threshold = threshold * 15 // 16
        kept = [item for item in kept if item[0] < threshold] or kept[:1]
        held = sum(item[2] for item in kept)
    return [chunk for _, chunk, _ in kept]


def _chunks(text: str) -> Iterator[str]:
    """Pieces of whole lines of about _CHUNK_CHARACTERS (sentencepiece skips sentences that are too long)."""
    if not text.strip():
        return
    chunk = ""
    for line in text.splitlines(keepends=True):
        for begin in range(0, len(line), _CHUNK_CHARACTERS):
            part = line[begin : begin + _CHUNK_CHARACTERS]
            if chunk and len(chunk) + len(part) > _CHUNK_CHARACTERS:
                yield chunk
                chunk = ""
            chunk += part
    yield chunk


def _measures(model: bytes, sample: list[str]) -> _Measures:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    part = sample[:: max(len(sample) // 250, 1)]
    ids = [i for chunk in part for i in processor.encode(chunk)]
    total = max(len(ids), 1)
    return {
        "bytes_per_token": sum(len(chunk.encode()) for chunk in part) / total,
        "byte_share": sum(processor.is_byte(i) for i in ids) / total,
        "unknown_share": sum(processor.is_unknown(i) for i in ids) / total,
        "example": "|".join(processor.encode(part[0][:_EXAMPLE_CHARACTERS], out_type=str)).replace("\n", "\\n"),
    }
