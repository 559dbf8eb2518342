"""From raw records to token ids, in this process or in several; the results come in the records' order.

What a process is sent is bytes, what it sends back is one array of ids for a batch and a few numbers a document.
Parsing, filters, hashes and tokenising all run there, so the process that reads only cuts and writes. Processes end
with the one that started them, however that ends: one that is killed leaves none behind.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.near_duplicates import NearDuplicates
from data_prep.records import PrepareError, Record, RecordError, TextSource, document
from dla_train.data.tokenizer import Tokenizer, load_tokenizer

_BATCH_BYTES = 1 << 18
_WAITING_PER_WORKER = 4  # batches queued per process: bounds memory, keeps every process busy


class Placed(NamedTuple):
    """A record's source (its number in the list of sources), its number there, and its progress."""

    source: int
    number: int
    progress: int


class Outcome(NamedTuple):
    """What became of a record."""

    kind: str
    """`kept`, or one of FILTERED or FAULTS."""
    message: str
    """Of a fault: file, place and mend."""
    tokens: int
    """Tokens of a kept document, without BOS and EOS."""
    text_bytes: int
    """UTF-8 bytes of a kept document."""
    fingerprint: int
    """Hash of its text, 64 bits."""
    bands: tuple[int, ...]
    """What a near-duplicate shares one of; empty if that was not asked."""


@dataclass(frozen=True)
class EncodedBatch:
    """Outcomes of a batch of records, in order, and the ids of the kept ones, one after another."""

    placed: list[Placed]
    outcomes: list[Outcome]
    ids: NDArray[np.integer]


@dataclass(frozen=True)
class Encoder:
    """What a process does with a batch; opened in each."""

    tokenizer: Tokenizer
    near_duplicates: NearDuplicates | None

    def encode(self, records: Sequence[Record]) -> tuple[list[Outcome], NDArray[np.integer]]:
        """Outcomes of records, and the ids of the kept ones."""
        outcomes: list[Outcome] = []
        texts: list[str] = []
        for record in records:
            try:
                text, unwanted = document(record)
            except RecordError as error:
                outcomes.append(_dropped(error.kind, error.message))
                continue
            outcomes.append(_dropped(unwanted) if unwanted else self._kept(text))
            if not unwanted:
                texts.append(text)
        encoded = self.tokenizer.encode_batch(texts)
        kind = np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.int32  # of what is sent, not of the file
        ids: NDArray[np.integer] = np.fromiter(
            itertools.chain.from_iterable(encoded), dtype=kind, count=sum(map(len, encoded))
        )
        lengths = iter(map(len, encoded))
        return [_with_tokens(outcome, lengths) for outcome in outcomes], ids

    def _kept(self, text: str) -> Outcome:
        data = text.encode("utf-8")
        fingerprint = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
        bands = self.near_duplicates.bands(text) if self.near_duplicates else ()
        return Outcome("kept", "", 0, len(data), fingerprint, bands)


def encoded_batches(
    sources: Sequence[TextSource],
    first: tuple[int, int],
    tokenizer_path: Path,
    similarity: float | None,
    workers: int,
) -> Generator[EncodedBatch, None, None]:
    """Every record of `sources` from `first` (source, records of it that are done), encoded by `workers` processes.

    Near-duplicates are prepared for if `similarity` is given. Raises PrepareError if a process dies.
    """
    if workers == 1:
        encoder = _encoder(tokenizer_path, similarity)
        for placed, records in _batches(sources, first):
            yield EncodedBatch(placed, *encoder.encode(records))
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks of torch and tqdm
    arguments = (tokenizer_path, similarity)
    with ProcessPoolExecutor(workers, context, _begin_worker, arguments) as pool:
        waiting: deque[tuple[list[Placed], Future[tuple[list[Outcome], NDArray[np.integer]]]]] = deque()
        try:
            for placed, records in _batches(sources, first):
                waiting.append((placed, pool.submit(_encode_in_worker, records)))
                if len(waiting) >= workers * _WAITING_PER_WORKER:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        except BrokenProcessPool as error:
            rule = "a tokenising process was killed, most often for want of memory"
            mend = "take fewer --workers or a smaller --largest-megabytes; finished shards are kept"
            raise PrepareError(f"{rule}; {mend}") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batches(sources: Sequence[TextSource], first: tuple[int, int]) -> Iterator[tuple[list[Placed], list[Record]]]:
    placed: list[Placed] = []
    records: list[Record] = []
    size = 0
    for index in range(first[0], len(sources)):
        for record in sources[index].records(first[1] if index == first[0] else 0):
            placed.append(Placed(index, record.number, record.progress))
            records.append(record)
            size += 0 if isinstance(record.payload, RecordError) else len(record.payload)
            if size >= _BATCH_BYTES or len(records) >= _BATCH_BYTES >> 6:
                yield placed, records
                placed, records, size = [], [], 0
    if records:
        yield placed, records


def _finished(placed: list[Placed], future: Future[tuple[list[Outcome], NDArray[np.integer]]]) -> EncodedBatch:
    return EncodedBatch(placed, *future.result())


def _dropped(kind: str, message: str = "") -> Outcome:
    return Outcome(kind, message, 0, 0, 0, ())


def _with_tokens(outcome: Outcome, lengths: Iterator[int]) -> Outcome:
    if outcome.kind != "kept":
        return outcome
    tokens = next(lengths)
    return outcome._replace(tokens=tokens) if tokens else _dropped("empty")  # a tokenizer may know no character of it


def _encoder(tokenizer_path: Path, similarity: float | None) -> Encoder:
    return Encoder(load_tokenizer(tokenizer_path), None if similarity is None else NearDuplicates(similarity))


_worker_encoder: list[Encoder] = []  # of this process, set once by the pool's initializer


def _begin_worker(tokenizer_path: Path, similarity: float | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process, or they fight for the same cores
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _worker_encoder.append(_encoder(tokenizer_path, similarity))


def _end_with(parent: BaseProcess) -> None:
    """A parent that was killed says nothing, and a pool's processes would wait for it for ever."""
    parent.join()
    os._exit(1)


def _encode_in_worker(records: list[Record]) -> tuple[list[Outcome], NDArray[np.integer]]:
    return _worker_encoder[0].encode(records)
