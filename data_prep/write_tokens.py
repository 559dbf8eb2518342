"""Text sources to `.bin/.idx` shards with manifests, in one pass that may be killed and started again.

Documents keep their order and shards their borders whatever the number of processes and however often the work was
interrupted: what decides them is the documents alone. The validation split is decided by a hash of the text, so it does
not move when documents are added, and copies of one text never stand on both sides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.encoding import EncodedBatch, Outcome, Placed, encoded_batches
from data_prep.near_duplicates import NearDuplicates
from data_prep.records import FAULTS, ON_ERROR, PrepareError, RecordError, TextSource, progress_bar
from data_prep.report import TokensReport, write_report
from data_prep.seen import Seen
from data_prep.shards import ShardWriter, existing_files, files_of
from data_prep.state import State, locked, read_state, state_path, write_state
from dla_train.data.errors import TokenizerError
from dla_train.data.indexed import refuse_existing
from dla_train.data.shard_list import shard_list_path, write_shard_list
from dla_train.data.tokenizer import Tokenizer, load_tokenizer

DUPLICATES = ("keep", "exact", "near")
_JUDGED_RECORDS = 1000  # from here on the share of bad records is held against its limit before the end
_KEPT_FAULTS = 100
_NAMED_FILES = 3  # of an output that exists already


@dataclass(frozen=True)
class TokenOptions:
    """What decides the token files, beside text and tokenizer. Raises PrepareError for a value out of range."""

    bos: bool = False
    """Begin every document with the tokenizer's BOS."""
    eos: bool = True
    """End every document with its EOS."""
    validation_fraction: float = 0.0
    """Share of documents to hold out, in [0, 1)."""
    shard_tokens: int = 0
    """A shard ends with the first document that brings it (its train split) to this many tokens; 0: one file."""
    duplicates: str = "keep"
    """`keep` them, leave out `exact` copies, or `near` ones too."""
    similarity: float = 0.8
    """Share of runs of five words, from which documents are near-duplicates."""
    on_error: str = "stop"
    """At a record that cannot be used: `stop`, or `skip` it and count."""
    max_error_share: float = 0.01
    """Skipping more than this share of the records is an error."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation_fraction < 1.0:
            raise PrepareError(f"validation_fraction={self.validation_fraction} is not in [0, 1)")
        if self.shard_tokens < 0:
            raise PrepareError(f"shard_tokens={self.shard_tokens} is negative; 0 is one file")
        if self.duplicates not in DUPLICATES:
            raise PrepareError(f"duplicates={self.duplicates!r} is not one of {', '.join(DUPLICATES)}")
        if self.on_error not in ON_ERROR:
            raise PrepareError(f"on_error={self.on_error!r} is not one of {', '.join(ON_ERROR)}")
        if not 0.0 <= self.max_error_share <= 1.0:
            raise PrepareError(f"max_error_share={self.max_error_share} is not in [0, 1]")


def write_tokens(
    sources: Sequence[TextSource],
    output: str | Path,
    tokenizer_path: str | Path,
    options: TokenOptions | None = None,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> TokensReport:
    """Tokenise every document of `sources` into OUTPUT.bin/.idx/.json, or into shards OUTPUT_00000 and so on.

    With a validation fraction the outputs are OUTPUT_train and OUTPUT_validation. `workers` > 1 tokenises in that many
    processes (started by spawn: a script that calls this needs `if __name__ == "__main__"`). A finished shard stays:
    the same call after a kill goes on behind the last one. OUTPUT.shards.json, by which a corpus of shards is found,
    and OUTPUT.report.json come last. Raises PrepareError (no text, bad text, empty split, another unfinished
    preparation), TokenizerError, and TokenFileError if an output exists and `overwrite` is false.
    """
    if workers < 1:
        raise PrepareError(f"workers={workers} is not at least 1")
    options = options or TokenOptions()
    tokenizer = load_tokenizer(tokenizer_path)
    if options.bos and tokenizer.bos_id is None:
        raise TokenizerError(f"tokenizer {tokenizer.name} has no BOS token; pass --no-bos, or use one that has")
    with locked(str(output)):
        preparation = _Preparation(sources, str(output), tokenizer, options, overwrite)
        return preparation.run(Path(tokenizer_path), workers, progress)


class _Preparation:
    """One call of `write_tokens`: the state, and what is not in it yet."""

    def __init__(
        self, sources: Sequence[TextSource], output: str, tokenizer: Tokenizer, options: TokenOptions, overwrite: bool
    ) -> None:
        self._sources, self._output, self._tokenizer, self._options = sources, output, tokenizer, options
        held_out = options.validation_fraction > 0
        self._tails = {"train": "_train", "validation": "_validation"} if held_out else {"all": ""}
        self._main = next(iter(self._tails))
        self._writer = ShardWriter(output, self._tails, tokenizer, bos=options.bos, eos=options.eos)
        self._seen = Seen(options.duplicates != "keep", options.duplicates == "near")
        self.state = self._begin(overwrite)
        for number in range(self.state.shards):
            self._seen.load(self._seen_path(number))

    def run(self, tokenizer_path: Path, workers: int, progress: bool) -> TokensReport:
        state, began = self.state, time.perf_counter() - self.state.seconds
        similarity = self._options.similarity if self._options.duplicates == "near" else None
        batches = encoded_batches(self._sources, (state.source, state.record), tokenizer_path, similarity, workers)
        with contextlib.ExitStack() as stack:
            stack.callback(self._abandon)
            bar = stack.enter_context(progress_bar(self._sources, "tokenise", progress, state.progress))
            for batch in stack.enter_context(contextlib.closing(batches)):
                self._take(batch, began)
                self._check_share(final=False)
                self._show(bar, sum(placed.progress for placed in batch.placed))
            self._check_share(final=True)
            self._check_not_empty()
            self._seal(began)
        return self._finish(workers)

    def _begin(self, overwrite: bool) -> State:
        """The state of an unfinished run of the same settings, else a new one."""
        settings, inputs = self._settings(), [source.identity for source in self._sources]
        try:
            state = read_state(self._output, settings, inputs)
        except PrepareError:
            if not overwrite:
                raise
            state = None
            state_path(self._output).unlink()
        if state is None:
            refuse_existing(existing_files(self._output, list(self._tails.values()))[:_NAMED_FILES], overwrite)
            state = State(settings, inputs, splits={split: [] for split in self._tails})
            write_state(self._output, state)  # before any file: one that is found without a state is not ours
        return state

    def _abandon(self) -> None:
        """Remove what is not in place; a failure before the first shard leaves nothing at all."""
        self._writer.abandon()
        if self.state.shards == 0:
            state_path(self._output).unlink(missing_ok=True)

    def _settings(self) -> dict[str, Any]:
        """What decides the files' bytes."""
        chosen = dataclasses.asdict(self._options)
        for name in ("on_error", "max_error_share"):  # change no shard that is finished
            del chosen[name]
        if self._options.duplicates == "near":
            chosen["datasketch"] = NearDuplicates(self._options.similarity).version
        read = sorted({str(source.options) for source in self._sources})
        return {"tokenizer": self._tokenizer.fingerprint, **chosen, "sources": read}

    def _take(self, batch: EncodedBatch, began: float) -> None:
        first = 0
        for placed, outcome in zip(batch.placed, batch.outcomes, strict=True):
            self._take_one(placed, outcome, batch.ids[first : first + outcome.tokens])
            first += outcome.tokens
            if 0 < self._options.shard_tokens <= self._writer.tokens(self._main):
                self._seal(began)

    def _take_one(self, placed: Placed, outcome: Outcome, ids: NDArray[np.integer]) -> None:
        state, kind = self.state, outcome.kind
        if kind == "kept":
            kind = self._seen.duplicate(outcome) or kind
        if kind in FAULTS:
            if self._options.on_error == "stop":
                raise RecordError(kind, outcome.message)
            if len(state.faults) < _KEPT_FAULTS:
                state.faults.append(outcome.message)
        if kind == "kept":
            held_out = outcome.fingerprint < self._options.validation_fraction * 2.0**64
            split = "validation" if held_out else self._main
            name = self._sources[placed.source].name
            self._writer.add(split, self._number, ids, outcome.text_bytes, name)
        state.counts[kind] = state.counts.get(kind, 0) + 1
        state.source, state.record = placed.source, placed.number
        state.progress += placed.progress

    @property
    def _number(self) -> int | None:
        return self.state.shards if self._options.shard_tokens else None

    def _seal(self, began: float) -> None:
        """Put the present shard in place, then write that it is."""
        if self.state.shards == 0:
            for tail in self._tails.values():  # of an output that is overwritten
                shard_list_path(self._output + tail).unlink(missing_ok=True)
        for split, shard in self._writer.seal().items():
            self.state.splits[split].append(shard)
        self.state.seconds = time.perf_counter() - began
        if self._options.shard_tokens:
            self._seen.save(self._seen_path(self.state.shards))
            self.state.shards += 1
            write_state(self._output, self.state)

    def _seen_path(self, number: int) -> Path:
        return Path(f"{self._output}_{number:05d}.seen")

    def _finish(self, workers: int) -> TokensReport:
        """Remove what older preparations left, name the shards, write the report, and forget the state."""
        report = write_report(self._output, self._tails, self._tokenizer, self.state, workers)
        ours: set[Path] = {Path(f"{self._output}.report.json")}
        for split, tail in self._tails.items():
            for shard in self.state.splits[split]:
                ours |= set(files_of(str(Path(self._output).with_name(shard.name)))[:-1])
            if self._options.shard_tokens:
                ours.add(shard_list_path(self._output + tail))
        for path in existing_files(self._output, list(self._tails.values())):
            if path not in ours and path.suffix != ".seen":
                path.unlink()
        if self._options.shard_tokens:
            for split, tail in self._tails.items():
                write_shard_list(self._output + tail, self.state.splits[split])
        state_path(self._output).unlink(missing_ok=True)
        for path in existing_files(self._output, [""]):
            if path.suffix == ".seen":
                path.unlink()
        return report

    def _show(self, bar: tqdm, progress: int) -> None:
        done = sum(shard.tokens for shards in self.state.splits.values() for shard in shards)
        tokens = done + sum(self._writer.tokens(split) for split in self._tails)
        bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens, shard {self.state.shards}", refresh=False)
        bar.update(progress)

    def _check_share(self, *, final: bool) -> None:
        records = sum(self.state.counts.values())
        bad = sum(count for kind, count in self.state.counts.items() if kind in FAULTS)
        if bad > self._options.max_error_share * records and (final or records >= _JUDGED_RECORDS):
            rule = f"{bad} of {records} records cannot be used, more than max_error_share="
            mend = "mend them, or raise --max-error-share; the first: " + self.state.faults[0]
            raise PrepareError(f"{rule}{self._options.max_error_share}; {mend}")

    def _check_not_empty(self) -> None:
        filled = {
            split
            for split in self._tails
            if self._writer.tokens(split) or any(shard.tokens for shard in self.state.splits[split])
        }
        names = _few_names(self._sources)
        if not filled:
            left_out = ", ".join(f"{count} {kind}" for kind, count in sorted(self.state.counts.items()))
            raise PrepareError(f"no text in {names}: nothing was written ({left_out or 'no record'})")
        for split in self._tails:
            if split not in filled:
                raise PrepareError(
                    f"the {split} split of {names} is empty with validation_fraction="
                    f"{self._options.validation_fraction}; change it, or give more documents (a text file is one "
                    "document unless --separator cuts it)"
                )


def _few_names(sources: Sequence[TextSource]) -> str:
    names = [source.name for source in sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
