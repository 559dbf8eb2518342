"""Batches: against a token-by-token reference, the same under every split, every token once, and the errors."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dla_train.config import DataConfig
from dla_train.data.blend import Phase
from dla_train.data.errors import CorpusTooSmallError, DataError, TokenizerError, VocabularyError
from dla_train.data.indexed import TokenFiles
from dla_train.data.loader import Batch, BatchSource, open_sources
from dla_train.data.order import document_order, row_order
from dla_train.data.row_source import RowSource
from dla_train.data.tokenizer import SentencePieceTokenizer
from dla_train.data.validation import HeldOutSource

WriteFiles = Callable[..., str]
RandomDocuments = Callable[..., list[list[int]]]


def make_source(
    files: TokenFiles, context: int = 16, rows: int = 8, seed: int = 3, loader_workers: int = 0
) -> BatchSource:
    """What a plain list of prefixes gives: one source, whole batches."""
    shape = {"context_tokens": context, "global_batch_rows": rows, "seed": seed}
    source = RowSource("train", files, whole_batches=True, **shape)
    return BatchSource([source], [Phase(0, {"train": Fraction(1)}, context)], loader_workers=loader_workers, **shape)


def rows_of(source: BatchSource) -> int:
    return source.sources["train"].rows


def held_out(files: TokenFiles, context: int = 16, rows: int = 8) -> HeldOutSource:
    return HeldOutSource(files, context_tokens=context, global_batch_rows=rows)


def joined(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """tokens, targets and document offsets of a list of micro-batches, as one."""
    offsets, base = [0], 0
    for batch in batches:
        offsets += (batch.cu_seqlens[1:] + base).tolist()
        base += batch.tokens.numel()
    return torch.cat([b.tokens for b in batches]), torch.cat([b.targets for b in batches]), offsets


def reference_rows(documents: list[list[int]], order: np.ndarray, context: int) -> list[list[tuple[int, int, bool]]]:
    """Rows of (input, target, starts a document), by a loop over tokens."""
    stream = [(token, place == 0) for i in order for place, token in enumerate(documents[i])]
    rows = []
    for begin in range(0, len(stream) - context, context):
        row = []
        for place in range(context):
            token, starts = stream[begin + place]
            following, other_document = stream[begin + place + 1]
            row.append((token, -100 if other_document else following, starts or place == 0))
        rows.append(row)
    return rows


@pytest.fixture
def documents(random_documents: RandomDocuments) -> list[list[int]]:
    return random_documents(count=60, mean_length=13)


@pytest.fixture
def files(write_files: WriteFiles, documents: list[list[int]]) -> TokenFiles:
    return TokenFiles(
        [write_files(documents[:25], "a", vocab_size=60_000), write_files(documents[25:], "b", vocab_size=70_000)]
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(context=st.integers(1, 40), step=st.integers(0, 60), seed=st.integers(0, 5), rows=st.sampled_from([1, 2, 4, 6]))
def test_batches_equal_the_token_by_token_reference(
    files: TokenFiles, documents: list[list[int]], context: int, step: int, seed: int, rows: int
) -> None:
    source = make_source(files, context=context, rows=rows, seed=seed)
    steps_per_epoch = rows_of(source) // rows
    epoch, inside = divmod(step, steps_per_epoch)
    all_rows = reference_rows(documents, document_order(len(documents), seed, epoch), context)
    assert len(all_rows) == rows_of(source)
    chosen = [all_rows[i] for i in row_order(len(all_rows), seed, epoch)[inside * rows : (inside + 1) * rows]]
    tokens, targets, offsets = joined(source.batch(step, 0, 1, rows))
    assert tokens.tolist() == [[token for token, _, _ in row] for row in chosen]
    assert targets.tolist() == [[target for _, target, _ in row] for row in chosen]
    flat = [starts for row in chosen for _, _, starts in row]
    assert offsets == [i for i, starts in enumerate(flat) if starts] + [len(flat)]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 1), (2, 2), (2, 4), (4, 1), (8, 1)])
def test_global_batch_is_the_same_for_every_world_micro_size_and_thread_count(
    files: TokenFiles, world: int, micro: int, workers: int
) -> None:
    plain, split = make_source(files), make_source(files, loader_workers=workers)
    for step in (0, 1, 2, 9, 4):
        whole = joined(plain.batch(step, 0, 1, 8))
        parts = [batch for rank in range(world) for batch in split.batch(step, rank, world, micro)]
        assert all(batch.tokens.shape == (micro, 16) for batch in parts)
        tokens, targets, offsets = joined(parts)
        assert torch.equal(tokens, whole[0]) and torch.equal(targets, whole[1]) and offsets == whole[2]
    split.close()


def test_every_token_is_seen_exactly_once_in_an_epoch_but_for_the_counted_rest(files: TokenFiles) -> None:
    source = make_source(files, context=10, rows=4)
    tokens, rows = files.tokens, rows_of(source)
    tail, dropped, per_epoch = tokens - 1 - 10 * rows, rows % 4, rows // 4
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = torch.cat([b.tokens.flatten() for step in steps for b in source.batch(step, 0, 1, 2)])
        assert len(seen.unique()) == len(seen)
        assert len(seen) == tokens - 1 - tail - 10 * dropped
    assert 0 <= tail < 10


def test_epochs_differ_and_leave_out_different_rows(files: TokenFiles) -> None:
    source = make_source(files, context=10, rows=7)
    steps = rows_of(source) // 7
    assert rows_of(source) % 7
    seen = [
        frozenset(
            int(t)
            for step in range(e * steps, (e + 1) * steps)
            for t in source.batch(step, 0, 1, 7)[0].tokens.flatten()
        )
        for e in range(4)
    ]
    assert len(set(seen)) == 4


def test_seeking_equals_iterating(files: TokenFiles) -> None:
    walking = make_source(files, rows=4, loader_workers=2)
    walked = [walking.batch(step, 1, 2, 1) for step in range(40)]
    for step in (39, 0, 17, 11):
        fresh = make_source(files, rows=4).batch(step, 1, 2, 1)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(fresh, walked[step], strict=True))
        assert all(torch.equal(a.cu_seqlens, b.cu_seqlens) for a, b in zip(fresh, walked[step], strict=True))
    walking.close()


def test_a_distant_step_needs_no_replay(files: TokenFiles) -> None:
    source = make_source(files)
    assert source.batch(10**12, 0, 1, 8)[0].tokens.shape == (8, 16)
    assert source.state(10**12)["sources"]["train"]["epoch"] == 10**12 // (rows_of(source) // 8)


def test_batch_types_and_row_edges(files: TokenFiles) -> None:
    batch = make_source(files).batch(0, 0, 1, 4)[0]
    assert (batch.tokens.dtype, batch.targets.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int64, torch.int32)
    assert batch.tokens.is_contiguous() and batch.targets.is_contiguous()
    edges = set(batch.cu_seqlens.tolist())
    assert {0, 16, 32, 48, 64} <= edges
    assert (batch.cu_seqlens.diff() > 0).all()


def test_documents_of_one_token_give_no_targets(write_files: WriteFiles) -> None:
    batch = make_source(TokenFiles([write_files([[i] for i in range(40)])]), context=8, rows=4).batch(0, 0, 1, 4)[0]
    assert (batch.targets == -100).all()
    assert batch.cu_seqlens.tolist() == list(range(33))


def test_resuming_from_a_saved_state_continues_at_the_same_step(files: TokenFiles) -> None:
    for step in (0, 1, 30):
        state = make_source(files).state(step)
        assert state["tokens"] == step * 8 * 16
        assert make_source(files).resume_step(state) == step


@pytest.mark.parametrize(
    ("change", "key"), [({"seed": 4}, "seed"), ({"rows": 4}, "global_batch_rows"), ({"context": 8}, "context_tokens")]
)
def test_resuming_on_other_data_names_what_differs(files: TokenFiles, change: dict[str, int], key: str) -> None:
    state = make_source(files).state(5)
    with pytest.raises(DataError, match=f"{key}="):
        make_source(files, **change).resume_step(state)


@pytest.mark.parametrize("tokens", [None, "many", -128, 64, 1.5])
def test_a_cursor_that_counts_no_whole_steps_is_refused(files: TokenFiles, tokens: object) -> None:
    state = make_source(files).state(5) | {"tokens": tokens}
    with pytest.raises(DataError, match="the checkpoint's data cursor, tokens="):
        make_source(files).resume_step(state)  # type: ignore[arg-type]


def test_resuming_on_other_files_is_refused(
    files: TokenFiles, write_files: WriteFiles, documents: list[list[int]]
) -> None:
    other = TokenFiles([write_files(documents[::-1], "c", vocab_size=60_000)])
    with pytest.raises(DataError, match=r"source train was read from files=.*/c has .*data\.allow_changed=true"):
        make_source(other).resume_step(make_source(files).state(5))


def test_validation_is_in_file_order_and_the_same_for_every_world(
    files: TokenFiles, documents: list[list[int]]
) -> None:
    source = held_out(files)
    expected = reference_rows(documents, np.arange(len(documents)), 16)
    whole = [joined(batches) for batches in source.validation_batches(3, 0, 1, 8)]
    assert torch.cat([tokens for tokens, _, _ in whole]).tolist() == [[t for t, _, _ in row] for row in expected[:24]]
    ranks = [list(source.validation_batches(3, rank, 2, 2)) for rank in range(2)]
    for i, (tokens, targets, offsets) in enumerate(whole):
        got = joined([batch for rank in ranks for batch in rank[i]])
        assert torch.equal(got[0], tokens) and torch.equal(got[1], targets) and got[2] == offsets


def test_validation_shorter_than_asked_counts_every_row_once_on_equal_ranks(
    files: TokenFiles, documents: list[list[int]]
) -> None:
    rows = len(reference_rows(documents, np.arange(len(documents)), 16))
    source = held_out(files, rows=32)
    assert rows % 32
    ranks = [list(source.validation_batches(100, rank, 4, 2)) for rank in range(4)]
    assert {len(batches) for rank in ranks for batches in rank} == {4}
    counted = sum(bool((row != -100).any()) for rank in ranks for batches in rank for b in batches for row in b.targets)
    assert counted == rows


def test_held_out_source_may_be_smaller_than_a_global_batch_but_not_than_a_row(files: TokenFiles) -> None:
    source = held_out(files, rows=1024)
    assert len(list(source.validation_batches(5, 0, 1, 64))) == 1
    with pytest.raises(CorpusTooSmallError, match="a validation needs 1 row"):
        held_out(files, context=5000)


def test_corpus_smaller_than_a_global_batch_is_an_error_with_the_mend(files: TokenFiles) -> None:
    with pytest.raises(
        CorpusTooSmallError, match=r"b has \d+ tokens = \d+ rows .* needs 1024 row.* smaller train\.global_batch_rows"
    ):
        make_source(files, rows=1024)


def test_exactly_one_global_batch_is_enough(write_files: WriteFiles) -> None:
    enough = TokenFiles([write_files([list(range(33))], "enough")])
    assert make_source(enough, context=8, rows=4).batch(5, 0, 1, 4)[0].tokens.shape == (4, 8)
    short = TokenFiles([write_files([list(range(32))], "short")])
    with pytest.raises(CorpusTooSmallError):
        make_source(short, context=8, rows=4)


@pytest.mark.parametrize(
    ("rank", "world", "micro"), [(0, 3, 1), (0, 2, 8), (0, 1, 3), (2, 2, 1), (-1, 2, 1), (0, 1, 0)]
)
def test_impossible_shares_are_refused(files: TokenFiles, rank: int, world: int, micro: int) -> None:
    with pytest.raises(DataError, match="not divisible|not in a data-parallel group"):
        make_source(files).batch(0, rank, world, micro)


@pytest.mark.parametrize("workers", [0, 2])
def test_token_beyond_the_model_is_refused_even_without_a_manifest(write_files: WriteFiles, workers: int) -> None:
    files = TokenFiles([write_files([list(range(200))], manifest=False)], vocab_size=199)
    source = make_source(files, context=199, rows=1, loader_workers=workers)
    with pytest.raises(VocabularyError, match=r"corpus\.bin holds token id 199 in document 0, but .*vocab_size=199"):
        source.batch(0, 0, 1, 1)
    source.close()


def make_config(prefix: str, tokenizer: object, **changes: object) -> DataConfig:
    values: dict[str, object] = {"name": "t", "train": [prefix], "tokenizer": str(tokenizer), "context_tokens": 8}
    return DataConfig(**(values | changes))  # type: ignore[arg-type]


def test_open_sources_opens_train_validation_and_tokenizer(
    write_files: WriteFiles, sentencepiece_model: object, sentencepiece_tokenizer: SentencePieceTokenizer
) -> None:
    fingerprint = sentencepiece_tokenizer.fingerprint
    train = write_files([list(range(100))], "train", vocab_size=512, fingerprint=fingerprint)
    held_out = write_files([list(range(20))], "held", vocab_size=512, fingerprint=fingerprint)
    config = make_config(train, sentencepiece_model, validation=[held_out], loader_workers=1)
    sources = open_sources(config, global_batch_rows=4, seed=0, vocab_size=512)
    assert sources.tokenizer.fingerprint == fingerprint
    assert sources.train.batch(0, 0, 1, 4)[0].tokens.shape == (4, 8)
    assert sources.validation is not None and sources.validation.rows == 2
    sources.train.close()
    assert (
        open_sources(make_config(train, sentencepiece_model), global_batch_rows=4, seed=0, vocab_size=512).validation
        is None
    )


def test_open_sources_refuses_small_models_and_other_tokenizers(
    write_files: WriteFiles, sentencepiece_model: object
) -> None:
    prefix = write_files([list(range(100))], vocab_size=512, fingerprint="another")
    with pytest.raises(VocabularyError, match=r"model\.vocab_size=511 is smaller than the 512 ids"):
        open_sources(make_config(prefix, sentencepiece_model), global_batch_rows=4, seed=0, vocab_size=511)
    with pytest.raises(TokenizerError, match="was written with tokenizer"):
        open_sources(make_config(prefix, sentencepiece_model), global_batch_rows=4, seed=0, vocab_size=512)
