"""Batches as a pure function of (seed, step), cut for a rank's share of the global batch.

The global batch of a step is a fixed list of rows; a rank takes a contiguous share of it and cuts that into
micro-batches, so the world size, the micro-batch size and the number of reading threads cannot change what a step
trains on. Seeking is arithmetic: the blend says how many rows of each source the steps before took, the source says
where in which epoch that is. Asking for step 1,000,000 first costs one epoch's shuffle a source, and no replay.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dla_train.config import DataConfig
from dla_train.data.batch import Batch, check_share, micro_batches
from dla_train.data.blend import Blend, Phase, Start
from dla_train.data.cursor import CONSTANTS, DataState, differences, restored_position, source_state
from dla_train.data.errors import DataError, VocabularyError
from dla_train.data.indexed import TokenFiles
from dla_train.data.order import place_order
from dla_train.data.packing import PackedRows
from dla_train.data.row_source import Position, RowSource
from dla_train.data.tokenizer import Tokenizer, load_tokenizer
from dla_train.data.validation import HeldOutSource
from dla_train.data_config import training_phases, training_sources

logger = logging.getLogger(__name__)

_Request = tuple[int, int, int, int]  # step, rank, world, micro_batch_rows


@dataclass(frozen=True)
class SourceLedger:
    """What the steps so far took of one source."""

    name: str
    tokens: int
    """Positions of the rows read, padding of `best_fit` included."""
    rows: int
    epochs: float
    """Passes over the source, the present one in part."""


class BatchSource:
    """Training batches of `sources` in the phases of a run, rows of `context_tokens` (the longest of the phases').

    A phase of a shorter context gets the same tokens in shorter rows. `loader_workers` threads read ahead of the last
    step asked for. `allow_changed` lets `resume_step` take a cursor of other data.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        phases: Sequence[Phase],
        *,
        context_tokens: int,
        global_batch_rows: int,
        seed: int,
        packing: str = "concatenate",
        loader_workers: int = 0,
        pin_memory: bool = False,
        allow_changed: bool = False,
    ) -> None:
        self.sources = {source.name: source for source in sources}
        self.context_tokens, self.global_batch_rows, self.seed = context_tokens, global_batch_rows, seed
        self.blend = Blend(phases, global_batch_rows)
        self._packing, self._pin_memory, self._allow_changed = packing, pin_memory, allow_changed
        self._changes: list[dict[str, object]] = []
        self._gone: dict[str, object] = {}  # sources that were read and are no longer named
        self._workers = loader_workers
        self._pool = ThreadPoolExecutor(loader_workers, "batch-reader") if loader_workers else None
        self._ahead: dict[_Request, Future[list[Batch]]] = {}

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one global batch, in every phase."""
        return self.global_batch_rows * self.context_tokens

    @property
    def fingerprint(self) -> str:
        """sha256 of what never changes in a run: the constants that rows and their order are counted in."""
        return hashlib.sha256(repr(sorted(self._constants().items())).encode()).hexdigest()

    def ledger(self, step: int) -> list[SourceLedger]:
        """How far every source has been read after `step` steps, by name; a pure function of the step."""
        rows = self.blend.ledger(step)
        found = []
        for name, source in sorted(self.sources.items()):
            position = source.position(rows.get(name, 0))
            epochs = position.epoch + position.row / source.rows_per_epoch
            found.append(SourceLedger(name, position.rows * self.context_tokens, position.rows, epochs))
        return found

    def numbers(self, step: int) -> dict[str, float]:
        """The ledger as metrics: tokens and epochs of every source."""
        return {
            f"{what}/{entry.name}": value
            for entry in self.ledger(step)
            for what, value in (("tokens", entry.tokens), ("epochs", entry.epochs))
        }

    def batch(self, step: int, rank: int, world: int, micro_batch_rows: int) -> list[Batch]:
        """The micro-batches of one data-parallel rank in optimizer step `step` (0-based).

        micro_batch_rows counts rows of `context_tokens`; in a phase of a shorter context a micro-batch has as many more
        of them. Raises DataError if the global batch does not divide into world * micro_batch_rows.
        """
        check_share(self.global_batch_rows, rank, world, micro_batch_rows)
        if self._pool is None:
            return self._batch(step, rank, world, micro_batch_rows)
        ahead: dict[_Request, Future[list[Batch]]] = {}
        for later in range(step, step + self._workers + 1):
            request = (later, rank, world, micro_batch_rows)
            ahead[request] = self._ahead.get(request) or self._pool.submit(self._batch, *request)
        for request, future in self._ahead.items():
            if request not in ahead:
                future.cancel()
        self._ahead = ahead
        return ahead[step, rank, world, micro_batch_rows].result()

    def rows(self, step: int, rank: int, world: int) -> tuple[PackedRows, list[str]]:
        """A rank's rows of a step, of `context_tokens` whatever the phase, and the source of each."""
        before, after = self.blend.ledger(step), self.blend.ledger(step + 1)
        names = [name for name in sorted(after) if after[name] > before.get(name, 0)]
        counts = [after[name] - before.get(name, 0) for name in names]
        share = self.global_batch_rows // world
        if len(names) == 1:  # the general case would copy every row once more
            return self.sources[names[0]].read(before.get(names[0], 0) + rank * share, share), names * share
        source_of = np.repeat(np.arange(len(names)), counts)[place_order(self.global_batch_rows, self.seed, step)]
        own = source_of[rank * share : (rank + 1) * share]
        width = self.context_tokens + 1
        rows = PackedRows(np.empty((share, width), np.int64), np.empty((share, width), np.bool_))
        for index, name in enumerate(names):
            places = own == index
            skipped = int((source_of[: rank * share] == index).sum())
            if places.any():
                part = self.sources[name].read(before.get(name, 0) + skipped, int(places.sum()))
                rows.tokens[places], rows.starts[places] = part.tokens, part.starts
        return rows, [names[index] for index in own]

    def state(self, step: int) -> DataState:
        """Cursor after `step` steps (see cursor.py)."""
        rows = self.blend.ledger(step)
        sources = {name: source_state(source, rows.get(name, 0)) for name, source in self.sources.items()}
        return {
            "tokens": step * self.tokens_per_step,
            **self._constants(),
            "timeline": self.blend.timeline(step),
            "sources": sources | self._gone,
            "changes": self._changes,
        }

    def resume_step(self, state: DataState) -> int:
        """Go on from a saved cursor; returns the step to continue at.

        Raises DataError, naming what differs, where the cursor is of other data and `allow_changed` is not set.
        """
        tokens = state.get("tokens")
        if not isinstance(tokens, int) or tokens < 0 or tokens % self.tokens_per_step:
            raise DataError(
                f"the checkpoint's data cursor, tokens={tokens}, is no multiple of the {self.tokens_per_step} of "
                "one step; resume from another checkpoint"
            )
        found = differences(state, self._constants(), self.blend, self.sources)
        if found and not self._allow_changed:
            raise DataError(
                f"the checkpoint was trained on other data: {'; '.join(found)}. Resume with that run's files and "
                "past phases (later ones may change), or say data.allow_changed=true to go on with these"
            )
        step = tokens // self.tokens_per_step
        self._changes = list(state["changes"])
        if found:
            self._changes.append({"tokens": state["tokens"], "changed": found})
            logger.warning("data.allow_changed: going on after step %d with changed data: %s", step, "; ".join(found))
        stored = state["sources"]
        for name, source in self.sources.items():
            source.go_on_from(restored_position(source, stored[name]) if name in stored else Position())
        self._gone = {name: entry for name, entry in stored.items() if name not in self.sources}
        self.blend = Blend(
            self.blend.phases,
            self.global_batch_rows,
            Start(step, {name: entry["rows"] for name, entry in stored.items()}),
        )
        return step

    def close(self) -> None:
        """Stop the reading threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool, self._ahead = None, {}

    def _constants(self) -> dict[str, int | str]:
        values = (self.context_tokens, self.global_batch_rows, self.seed, self._packing)
        return dict(zip(CONSTANTS, values, strict=True))

    def _batch(self, step: int, rank: int, world: int, micro_batch_rows: int) -> list[Batch]:
        rows, _ = self.rows(step, rank, world)
        context = self.blend.phase(step).context_tokens
        if context != self.context_tokens:
            rows, micro_batch_rows = rows.split(context), micro_batch_rows * (self.context_tokens // context)
        return micro_batches(rows, micro_batch_rows, pin_memory=self._pin_memory)


@dataclass(frozen=True)
class DataSources:
    """All a run reads."""

    tokenizer: Tokenizer
    train: BatchSource
    validation: HeldOutSource | None


def open_sources(
    data: DataConfig, *, global_batch_rows: int, seed: int, vocab_size: int, pin_memory: bool = False
) -> DataSources:
    """Open a run's tokenizer and files and check them against each other and the model's `vocab_size`.

    Raises a subclass of DataError, or ConfigError for data.train and data.phases; nothing is written.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise VocabularyError(
            f"model.vocab_size={vocab_size} is smaller than the {tokenizer.vocab_size} ids of tokenizer "
            f"{data.tokenizer}; set model.vocab_size to at least {tokenizer.vocab_size}"
        )

    def files(prefixes: Sequence[str]) -> TokenFiles:
        return TokenFiles(prefixes, tokenizer=tokenizer, vocab_size=vocab_size)

    train = training_batches(
        data,
        {source.name: files(source.prefixes) for source in training_sources(data)},
        global_batch_rows=global_batch_rows,
        seed=seed,
        pin_memory=pin_memory,
    )
    held_out = None
    if data.validation:
        held_out = HeldOutSource(
            files(data.validation), context_tokens=data.context_tokens, global_batch_rows=global_batch_rows
        )
    return DataSources(tokenizer, train, held_out)


def training_batches(
    data: DataConfig, files: dict[str, TokenFiles], *, global_batch_rows: int, seed: int, pin_memory: bool = False
) -> BatchSource:
    """The batches of `data` from its opened files, by source. Raises CorpusTooSmallError, ConfigError."""
    sources = [
        RowSource(
            source.name,
            files[source.name],
            context_tokens=data.context_tokens,
            global_batch_rows=global_batch_rows,
            seed=seed,
            packing=data.packing,
            whole_batches=source.whole_batches,
        )
        for source in training_sources(data)
    ]
    step_tokens = global_batch_rows * data.context_tokens
    phases = [
        Phase(-(-phase.start_tokens // step_tokens), phase.weights, phase.context_tokens)
        for phase in training_phases(data)
    ]
    return BatchSource(
        sources,
        phases,
        context_tokens=data.context_tokens,
        global_batch_rows=global_batch_rows,
        seed=seed,
        packing=data.packing,
        loader_workers=data.loader_workers,
        pin_memory=pin_memory,
        allow_changed=data.allow_changed,
    )
