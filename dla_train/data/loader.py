"""Batches as a pure function of (seed, epoch, step), cut for a rank's share of the global batch.

The global batch of a step is a fixed list of rows; a rank takes a contiguous share of it and cuts that into
micro-batches, so the world size, the micro-batch size and the number of reading threads cannot change what a step
trains on. Seeking is arithmetic: asking for step 1,000,000 first costs one epoch's shuffle and no replay. An epoch
ends when fewer rows than a global batch are left; the next one shuffles documents and rows anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dla_train.config import DataConfig
from dla_train.data.errors import CorpusTooSmallError, DataError, VocabularyError
from dla_train.data.indexed import TokenFiles
from dla_train.data.order import document_order, locate_step, row_order
from dla_train.data.packing import IGNORED_TARGET, EpochLayout, PackedRows, row_count
from dla_train.data.tokenizer import Tokenizer, load_tokenizer

DataState = dict[str, int | str]
"""Cursor of a run in its data, as a checkpoint stores it."""
_Request = tuple[int, int, int, int]  # step, rank, world, micro_batch_rows


@dataclass(frozen=True)
class Batch:
    """One micro-batch of b rows.

    tokens [b, T] int64; targets [b, T] int64, -100 where the next token is another document's first;
    cu_seqlens [M+1] int32, document offsets into the flattened b*T tokens, row edges included.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class CorpusReport:
    """What one epoch holds and leaves out, in documents, tokens, rows and steps."""

    documents: int
    tokens: int
    rows: int
    steps_per_epoch: int
    dropped_tail_tokens: int
    """Tokens at the end of an epoch's stream that fill no row."""
    dropped_rows: int
    """Rows of an epoch that fill no global batch; other ones every epoch."""


class BatchSource:
    """Training batches of `files`, in rows of `context_tokens`.

    Raises CorpusTooSmallError if there is not one global batch (`held_out`: not one row) of tokens. `held_out` sources
    give `validation_batches` only, in file order. `loader_workers` threads read ahead of the last step asked for.
    """

    def __init__(
        self,
        files: TokenFiles,
        *,
        context_tokens: int,
        global_batch_rows: int,
        seed: int,
        vocab_size: int,
        loader_workers: int = 0,
        held_out: bool = False,
    ) -> None:
        self.files = files
        self.context_tokens = context_tokens
        self.global_batch_rows = global_batch_rows
        self.seed = seed
        self.vocab_size = vocab_size
        self.held_out = held_out
        self.rows = row_count(files.tokens, context_tokens)
        needed = 1 if held_out else global_batch_rows
        if self.rows < needed:
            raise CorpusTooSmallError(
                f"{', '.join(files.prefixes)} has {files.tokens} tokens = {self.rows} rows of "
                f"data.context_tokens={context_tokens}, but {'a validation' if held_out else 'one global batch'} needs "
                f"{needed} row(s); use more text, a shorter data.context_tokens or a smaller train.global_batch_rows"
            )
        self._layouts: dict[int, tuple[EpochLayout, NDArray[np.int64]]] = {}
        self._layout_lock = Lock()
        self._workers = loader_workers
        self._pool = ThreadPoolExecutor(loader_workers, "batch-reader") if loader_workers else None
        self._ahead: dict[_Request, Future[list[Batch]]] = {}

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one global batch."""
        return self.global_batch_rows * self.context_tokens

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the sequence of batches: the files' contents, T, global batch, seed."""
        parts = (self.files.fingerprint, self.context_tokens, self.global_batch_rows, self.seed)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def report(self) -> CorpusReport:
        """Sizes of an epoch."""
        return CorpusReport(
            documents=self.files.documents,
            tokens=self.files.tokens,
            rows=self.rows,
            steps_per_epoch=self.rows // self.global_batch_rows,
            dropped_tail_tokens=self.files.tokens - 1 - self.rows * self.context_tokens,
            dropped_rows=self.rows % self.global_batch_rows,
        )

    def batch(self, step: int, rank: int, world: int, micro_batch_rows: int) -> list[Batch]:
        """The micro-batches of one data-parallel rank in optimizer step `step` (0-based).

        Raises DataError if the global batch does not divide into world * micro_batch_rows, or the source is held out.
        """
        self._check_share(rank, world, micro_batch_rows)
        if self.held_out:
            raise DataError(f"{', '.join(self.files.prefixes)} is held out; ask for validation_batches, not batch")
        if self._pool is None:
            return self._training_batch(step, rank, world, micro_batch_rows)
        ahead: dict[_Request, Future[list[Batch]]] = {}
        for later in range(step, step + self._workers + 1):
            request = (later, rank, world, micro_batch_rows)
            ahead[request] = self._ahead.get(request) or self._pool.submit(self._training_batch, *request)
        for request, future in self._ahead.items():
            if request not in ahead:
                future.cancel()
        self._ahead = ahead
        return ahead[step, rank, world, micro_batch_rows].result()

    def validation_batches(
        self, count: int, rank: int = 0, world: int = 1, micro_batch_rows: int = 1
    ) -> Iterator[list[Batch]]:
        """Up to `count` global batches in file order, each as this rank's micro-batches.

        If the rows end inside the last batch it is filled with repeated rows whose targets are all -100, so every
        rank makes the same number of equal micro-batches.
        """
        self._check_share(rank, world, micro_batch_rows)
        layout = EpochLayout(self.files, np.arange(self.files.documents), self.context_tokens)
        share = self.global_batch_rows // world
        for first in range(0, min(count * self.global_batch_rows, self.rows), self.global_batch_rows):
            rows = first + rank * share + np.arange(share)
            yield self._micro_batches(layout, rows % self.rows, rows < self.rows, micro_batch_rows)

    def state(self, step: int) -> DataState:
        """Cursor after `step` steps: tokens taken, epoch of the next batch, and what the cursor counts in."""
        return {
            "tokens": step * self.tokens_per_step,
            "epoch": locate_step(step, self.rows, self.global_batch_rows).epoch,
            "context_tokens": self.context_tokens,
            "global_batch_rows": self.global_batch_rows,
            "seed": self.seed,
            "files": self.files.fingerprint,
            "fingerprint": self.fingerprint,
        }

    def resume_step(self, state: DataState) -> int:
        """Step to continue at from a saved cursor. Raises DataError, naming what differs, if it is of other data."""
        here = self.state(0)
        for key in ("files", "context_tokens", "global_batch_rows", "seed", "fingerprint"):
            if state.get(key) != here[key]:
                raise DataError(
                    f"the checkpoint was trained on data with {key}={state.get(key)}, this run has {here[key]}; "
                    "resume with the same data, seed and batch, or start a new run"
                )
        tokens = state.get("tokens")
        if not isinstance(tokens, int) or tokens < 0 or tokens % self.tokens_per_step:
            raise DataError(
                f"the checkpoint's data cursor, tokens={tokens}, is no multiple of the {self.tokens_per_step} of "
                "one step; resume from another checkpoint"
            )
        return tokens // self.tokens_per_step

    def close(self) -> None:
        """Stop the reading threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool, self._ahead = None, {}

    def _check_share(self, rank: int, world: int, micro_batch_rows: int) -> None:
        if world < 1 or micro_batch_rows < 1 or self.global_batch_rows % (world * micro_batch_rows):
            raise DataError(
                f"train.global_batch_rows={self.global_batch_rows} is not divisible by data-parallel ranks ({world}) x "
                f"train.micro_batch_rows={micro_batch_rows}"
            )
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} is not in a data-parallel group of {world}")

    def _training_batch(self, step: int, rank: int, world: int, micro_batch_rows: int) -> list[Batch]:
        position = locate_step(step, self.rows, self.global_batch_rows)
        layout, order = self._epoch(position.epoch)
        share = self.global_batch_rows // world
        begin = position.first_row + rank * share
        return self._micro_batches(layout, order[begin : begin + share], np.ones(share, np.bool_), micro_batch_rows)

    def _epoch(self, epoch: int) -> tuple[EpochLayout, NDArray[np.int64]]:
        """Layout and row order of an epoch; two are kept, for reading ahead over the edge."""
        with self._layout_lock:
            if epoch not in self._layouts:
                if len(self._layouts) >= 2:
                    del self._layouts[min(self._layouts)]
                documents = document_order(self.files.documents, self.seed, epoch)
                layout = EpochLayout(self.files, documents, self.context_tokens)
                self._layouts[epoch] = (layout, row_order(self.rows, self.seed, epoch))
            return self._layouts[epoch]

    def _micro_batches(
        self, layout: EpochLayout, rows: NDArray[np.int64], counted: NDArray[np.bool_], micro_batch_rows: int
    ) -> list[Batch]:
        packed = layout.cut(rows)
        if packed.tokens.max() >= self.vocab_size or packed.tokens.min() < 0:
            raise VocabularyError(
                f"{', '.join(self.files.prefixes)} holds token id {packed.tokens.max()}, but model.vocab_size="
                f"{self.vocab_size}; use the tokenizer the files were written with, or a larger model.vocab_size"
            )
        return [
            _to_batch(packed, counted, begin, begin + micro_batch_rows)
            for begin in range(0, len(rows), micro_batch_rows)
        ]


@dataclass(frozen=True)
class DataSources:
    """All a run reads."""

    tokenizer: Tokenizer
    train: BatchSource
    validation: BatchSource | None


def open_sources(data: DataConfig, *, global_batch_rows: int, seed: int, vocab_size: int) -> DataSources:
    """Open a run's tokenizer and files and check them against each other and the model's `vocab_size`.

    Raises a subclass of DataError; nothing is written.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise VocabularyError(
            f"model.vocab_size={vocab_size} is smaller than the {tokenizer.vocab_size} ids of tokenizer "
            f"{data.tokenizer}; set model.vocab_size to at least {tokenizer.vocab_size}"
        )

    def source(prefixes: list[str], *, held_out: bool, workers: int) -> BatchSource:
        return BatchSource(
            TokenFiles(prefixes, tokenizer=tokenizer, vocab_size=vocab_size),
            context_tokens=data.context_tokens,
            global_batch_rows=global_batch_rows,
            seed=seed,
            vocab_size=vocab_size,
            loader_workers=workers,
            held_out=held_out,
        )

    train = source(list(data.train), held_out=False, workers=data.loader_workers)
    validation = source(list(data.validation), held_out=True, workers=0) if data.validation else None
    return DataSources(tokenizer, train, validation)


def _to_batch(packed: PackedRows, counted: NDArray[np.bool_], begin: int, end: int) -> Batch:
    rows = PackedRows(packed.tokens[begin:end], packed.starts[begin:end])
    targets = rows.targets()
    targets[~counted[begin:end]] = IGNORED_TARGET
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(rows.tokens[:, :-1])),
        targets=torch.from_numpy(targets),
        cu_seqlens=torch.from_numpy(rows.cu_seqlens()),
    )
