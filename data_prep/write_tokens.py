"""Text sources to `.bin/.idx` token files with a manifest, in one pass.

Documents keep their order whatever the number of worker processes. The validation split is decided by a hash of the
text, so it does not move when documents are added, and copies of one text never stand on both sides.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.sources import PrepareError, TextSource, progress_bar
from dla_train.data.errors import TokenizerError
from dla_train.data.indexed import TokenFileWriter
from dla_train.data.manifest import Manifest
from dla_train.data.tokenizer import Tokenizer, load_tokenizer

_BATCH_CHARACTERS = 1 << 18
_WAITING_PER_WORKER = 4  # batches queued per process: bounds memory, keeps every process busy


@dataclass(frozen=True)
class SplitReport:
    """One written token file."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class TokensReport:
    """What `write_tokens` wrote."""

    splits: dict[str, SplitReport]
    """`all`, or `train` and `validation`."""
    skipped_empty: int
    """Documents left out because they hold nothing but white space."""
    seconds: float


@dataclass(frozen=True)
class _TextBatch:
    texts: list[str]
    progress: int


class _Split:
    """One output: the writer, the BOS/EOS policy, and what the manifest will say."""

    def __init__(self, name: str, prefix: str, tokenizer: Tokenizer, bos: bool, eos: bool, overwrite: bool) -> None:
        self.name = name
        self.writer = TokenFileWriter(prefix, tokenizer.vocab_size, overwrite=overwrite)
        self._tokenizer, self._bos, self._eos = tokenizer, bos, eos
        self._first = np.array([tokenizer.bos_id] if bos else [], dtype=np.int32)
        self._last = np.array([tokenizer.eos_id] if eos else [], dtype=np.int32)
        self._text_bytes = 0

    def add(self, ids: NDArray[np.int32], text_bytes: int) -> None:
        self.writer.add(np.concatenate([self._first, ids, self._last]))
        self._text_bytes += text_bytes

    def commit(self, sources: list[str]) -> SplitReport:
        writer, tokenizer = self.writer, self._tokenizer
        writer.commit(
            Manifest(
                tokenizer=tokenizer.name,
                tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                bos=self._bos,
                eos=self._eos,
                documents=writer.documents,
                tokens=writer.tokens,
                text_bytes=self._text_bytes,
                split=self.name,
                sources=sources,
            )
        )
        return SplitReport(writer.prefix, writer.documents, writer.tokens, self._text_bytes)


def write_tokens(
    sources: Sequence[TextSource],
    output: str | Path,
    tokenizer_path: str | Path,
    *,
    bos: bool = False,
    eos: bool = True,
    validation_fraction: float = 0.0,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> TokensReport:
    """Tokenise every document of `sources` into OUTPUT.bin/.idx/.json.

    With `validation_fraction` in (0, 1) the outputs are OUTPUT_train and OUTPUT_validation. `workers` > 1 tokenises
    in that many processes (started by spawn: a script that calls this needs `if __name__ == "__main__"`). Nothing
    appears under the final names until all the text is read and tokenised. Raises PrepareError (no text, bad text,
    empty split), TokenizerError, and TokenFileError if an output exists and `overwrite` is false.
    """
    began = time.perf_counter()
    _check_options(validation_fraction, workers)
    tokenizer = load_tokenizer(tokenizer_path)
    if bos and tokenizer.bos_id is None:
        raise TokenizerError(f"tokenizer {tokenizer.name} has no BOS token; pass --no-bos, or use one that has")
    names = {"train": "_train", "validation": "_validation"} if validation_fraction else {"all": ""}
    skipped = 0
    with contextlib.ExitStack() as stack:
        splits: list[_Split] = []
        for name, tail in names.items():
            splits.append(_Split(name, f"{output}{tail}", tokenizer, bos, eos, overwrite))
            stack.enter_context(splits[-1].writer)
        bar = stack.enter_context(progress_bar(sources, "tokenise", progress))
        encoded = _encode(_batches(sources), tokenizer, Path(tokenizer_path), workers)
        for batch, documents in stack.enter_context(contextlib.closing(encoded)):
            for text, ids in zip(batch.texts, documents, strict=True):
                data = text.encode("utf-8")
                if data.strip() and ids.size:
                    held_out = validation_fraction > 0 and _hash_share(data) < validation_fraction
                    splits[-1 if held_out else 0].add(ids, len(data))
                else:
                    skipped += 1
            bar.update(batch.progress)
        _check_not_empty(splits, sources, validation_fraction)
        source_names = [source.name for source in sources]
        reports = {split.name: split.commit(source_names) for split in splits}
    return TokensReport(reports, skipped, time.perf_counter() - began)


def _check_options(validation_fraction: float, workers: int) -> None:
    if not 0.0 <= validation_fraction < 1.0:
        raise PrepareError(f"validation_fraction={validation_fraction} is not in [0, 1)")
    if workers < 1:
        raise PrepareError(f"workers={workers} is not at least 1")


def _check_not_empty(splits: Sequence[_Split], sources: Sequence[TextSource], validation_fraction: float) -> None:
    if not any(split.writer.documents for split in splits):
        raise PrepareError(f"no text in {_few_names(sources)}: every document is empty; nothing was written")
    for split in splits:
        if not split.writer.documents:
            raise PrepareError(
                f"the {split.name} split of {_few_names(sources)} is empty with validation_fraction="
                f"{validation_fraction}; change it, or give more documents (a text file is one document unless "
                "--separator cuts it)"
            )


def _few_names(sources: Sequence[TextSource]) -> str:
    names = [source.name for source in sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _hash_share(data: bytes) -> float:
    """Place of a text in [0, 1), by its hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) / 2**64


def _batches(sources: Sequence[TextSource]) -> Iterator[_TextBatch]:
    texts: list[str] = []
    characters = read = 0
    for source in sources:
        for document in source.documents():
            texts.append(document.text)
            characters += len(document.text)
            read += document.progress
            if characters >= _BATCH_CHARACTERS:
                yield _TextBatch(texts, read)
                texts, characters, read = [], 0, 0
    if texts:
        yield _TextBatch(texts, read)


def _encode(
    batches: Iterator[_TextBatch], tokenizer: Tokenizer, path: Path, workers: int
) -> Generator[tuple[_TextBatch, list[NDArray[np.int32]]], None, None]:
    if workers == 1:
        for batch in batches:
            yield batch, _arrays(tokenizer, batch.texts)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks of torch and tqdm
    with ProcessPoolExecutor(workers, context, _open_in_worker, (path,)) as pool:
        waiting: deque[tuple[_TextBatch, Future[list[NDArray[np.int32]]]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_encode_in_worker, batch.texts)))
                if len(waiting) >= workers * _WAITING_PER_WORKER:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker_tokenizer: list[Tokenizer] = []  # of this process, set once by the pool's initializer


def _open_in_worker(path: Path) -> None:
    _worker_tokenizer.append(load_tokenizer(path))


def _encode_in_worker(texts: list[str]) -> list[NDArray[np.int32]]:
    return _arrays(_worker_tokenizer[0], texts)


def _arrays(tokenizer: Tokenizer, texts: list[str]) -> list[NDArray[np.int32]]:
    return [np.array(ids, dtype=np.int32) for ids in tokenizer.encode_batch(texts)]
