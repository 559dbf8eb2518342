"""Best-fit packing: against placing pieces one by one, every token once, short documents whole, padding inert."""

import bisect
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dla_train.data.best_fit import PADDING, BestFit, RowGroups, pack_lengths
from dla_train.data.indexed import TokenFiles
from dla_train.data.row_source import RowSource
from tests.data.conftest import numbered_files

WriteFiles = Callable[..., str]


def one_by_one(lengths: list[int], context: int) -> list[int]:
    """Space left in every row, of best-fit decreasing done a piece at a time."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(spaces, length)
        bisect.insort(spaces, (spaces.pop(place) if place < len(spaces) else context) - length)
    return spaces


def rows_of(groups: RowGroups) -> list[list[tuple[int, int]]]:
    """Every row as (length, which piece of that length)."""
    rows = []
    for group in range(len(groups.first_row) - 1):
        for inside in range(groups.first_row[group + 1] - groups.first_row[group]):
            row = []
            for entry in range(groups.first_entry[group], groups.first_entry[group + 1]):
                first = groups.first_piece[entry] + inside * groups.pieces[entry]
                row += [(int(groups.lengths[entry]), int(first) + i) for i in range(groups.pieces[entry])]
            rows.append(row)
    return rows


@settings(max_examples=300)
@given(context=st.integers(1, 40), lengths=st.lists(st.integers(1, 40), max_size=60))
def test_groups_equal_placing_the_pieces_one_by_one(context: int, lengths: list[int]) -> None:
    lengths = [min(length, context) for length in lengths]
    rows = rows_of(pack_lengths(np.bincount(lengths, minlength=context + 1), context))
    assert sorted(context - sum(length for length, _ in row) for row in rows) == one_by_one(lengths, context)
    wanted = [(length, i) for length, count in Counter(lengths).items() for i in range(count)]
    assert sorted(piece for row in rows for piece in row) == sorted(wanted)


def test_groups_stay_few_for_many_documents() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.4, 2_000_000).astype(np.int64), 1, 4095)
    groups = pack_lengths(np.bincount(lengths, minlength=4096), 4096)
    assert len(groups.first_row) < 10_000
    assert 0 <= groups.rows * 4096 - lengths.sum() < 1e-4 * lengths.sum()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), context=st.integers(1, 30), epoch=st.integers(0, 3)
)
def test_every_token_is_an_input_once_and_documents_that_fit_are_whole(
    tmp_path: Path, lengths: list[int], context: int, epoch: int
) -> None:
    edges = np.concatenate([[0], np.cumsum(lengths)]) + 1  # tokens 1, 2, 3, ...; padding is 0
    documents = [list(range(edges[i], edges[i + 1])) for i in range(len(lengths))]
    files = numbered_files(tmp_path, lengths)
    packing = BestFit(files, context)
    rows = packing.epoch(5, epoch).cut(np.arange(packing.rows))
    inputs, targets = rows.tokens[:, :-1], rows.targets()
    assert sorted(inputs[inputs != PADDING].tolist()) == list(range(1, edges[-1]))
    assert packing.rows * context - (edges[-1] - 1) == packing.report().padding_tokens == (inputs == PADDING).sum()
    first_tokens = set(edges.tolist())
    predicted = []
    for row, wanted, begins in zip(inputs.tolist(), targets.tolist(), rows.starts.tolist(), strict=True):
        for column, token in enumerate(row):
            if token == PADDING:
                assert wanted[column] == -100 and begins[column]
            elif wanted[column] != -100:
                assert wanted[column] == token + 1  # the next token of the same document
                predicted.append(token + 1)
            if column and token in first_tokens:
                assert begins[column]
    for document in documents:
        if len(document) <= context:
            where = np.argwhere(np.isin(inputs, document))
            assert len(set(where[:, 0])) == 1 and np.array_equal(np.diff(where[:, 1]), np.ones(len(document) - 1))
    assert sorted(predicted) == sorted(set(range(1, edges[-1])) - first_tokens)


def test_a_piece_behind_another_document_begins_a_document(write_files: WriteFiles) -> None:
    """A document of 11 in rows of 8 leaves a rest of 3, which shares a row with a document of 5."""
    files = TokenFiles([write_files([list(range(1, 12)), list(range(21, 26))])])
    packing = BestFit(files, 8)
    rows = packing.epoch(0, 0).cut(np.arange(2))
    assert rows.tokens.tolist() == [list(range(1, 10)), [21, 22, 23, 24, 25, 9, 10, 11, PADDING]]
    assert rows.targets().tolist() == [list(range(2, 10)), [22, 23, 24, 25, -100, 10, 11, -100]]
    assert rows.cu_seqlens().tolist() == [0, 8, 13, 16]
    report = packing.report()
    assert (report.split_documents, report.shortened_tokens, report.padding_tokens) == (1, 3, 0)


def test_epochs_differ_and_any_row_is_found_alone(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(1, 20, 200)
    files = numbered_files(tmp_path, lengths.tolist())
    packing = BestFit(files, 16)
    first, second = (packing.epoch(0, epoch).cut(np.arange(packing.rows)) for epoch in (0, 1))
    assert not np.array_equal(first.tokens, second.tokens)
    alone = packing.epoch(0, 1).cut(np.array([7, 3, 7]))
    assert np.array_equal(alone.tokens, second.tokens[[7, 3, 7]]) and np.array_equal(
        alone.starts, second.starts[[7, 3, 7]]
    )


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_the_report_counts_what_the_rows_show(tmp_path: Path, packing: str) -> None:
    lengths = np.random.default_rng(2).integers(1, 40, 100)
    edges = np.concatenate([[0], np.cumsum(lengths)]) + 1
    files = numbered_files(tmp_path, lengths.tolist())
    shape = {"context_tokens": 16, "global_batch_rows": 4, "seed": 0}
    report = RowSource("a", files, packing=packing, **shape).report()
    if packing == "concatenate":
        split = [i for i in range(100) if (edges[i] - 1) // 16 != (edges[i + 1] - 2) // 16]
        shortened = sum(edges[i + 1] - 1 - (edges[i] - 1) // 16 * 16 - 16 for i in split)
        assert (report.padding_tokens, report.rows) == (0, (edges[-1] - 2) // 16)
    else:
        split = [i for i in range(100) if lengths[i] > 16]
        shortened = sum(lengths[i] - 16 for i in split)
    assert (report.split_documents, report.shortened_tokens) == (len(split), shortened)
    assert (report.documents, report.tokens) == (100, edges[-1] - 1)
