"""Blended batches: the same under every split, every token of a source once an epoch, pinned for ever."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dla_train.data import best_fit, index_file, indexed, order
from dla_train.data import packing as packing_module
from dla_train.data.errors import CorpusTooSmallError
from dla_train.data.indexed import TokenFiles
from tests.data.blends import FIRST, PHASES, Weights, make, make_files, same, source_of, tokens_of
from tests.data.conftest import numbered_files
from tests.train.runs import run_python


@pytest.fixture
def files(tmp_path: Path) -> dict[str, TokenFiles]:
    return make_files(tmp_path)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize(("world", "micro", "workers"), [(1, 1, 0), (2, 6, 0), (3, 2, 2), (12, 1, 3), (4, 3, 0)])
def test_global_batch_is_the_same_for_every_world_micro_size_and_thread_count(
    files: dict[str, TokenFiles], packing: str, world: int, micro: int, workers: int
) -> None:
    phases = PHASES if packing == "concatenate" else PHASES[:2]
    plain, split = (make(files, *phases, packing=packing, loader_workers=n) for n in (0, workers))
    for step in (0, 1, 8, 9, 14, 15, 16, 40):
        parts = [batch for rank in range(world) for batch in split.batch(step, rank, world, micro)]
        assert sum(batch.tokens.numel() for batch in parts) == 12 * 16
        assert len(parts) == 12 // micro
        assert np.array_equal(tokens_of(parts), tokens_of(plain.batch(step, 0, 1, 12)))
        targets = torch.cat([batch.targets.flatten() for batch in parts])
        assert torch.equal(targets, plain.batch(step, 0, 1, 12)[0].targets.flatten())
    split.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=st.fixed_dictionaries({name: st.integers(1, 9) for name in FIRST}),
    rows=st.integers(1, 17),
    context=st.integers(1, 40),
    packing=st.sampled_from(["concatenate", "best_fit"]),
    seed=st.integers(0, 99),
)
def test_every_source_gives_each_of_its_tokens_once_an_epoch_and_the_ledger_knows(
    files: dict[str, TokenFiles], weights: Weights, rows: int, context: int, packing: str, seed: int
) -> None:
    run = make(files, (0, weights), rows=rows, context=context, packing=packing, seed=seed)
    row_tokens: dict[str, list[int]] = {name: [] for name in FIRST}
    for step in range(30):
        packed, names = run.rows(step, 0, 1)
        for tokens, name in zip(packed.tokens[:, :-1].tolist(), names, strict=True):
            assert all(token == 0 or source_of(token) == name for token in tokens)
            row_tokens[name] += tokens
        for entry in run.ledger(step + 1):
            assert entry.tokens == len(row_tokens[entry.name]) == entry.rows * context
            ideal = (step + 1) * rows * weights[entry.name] / sum(weights.values())
            assert abs(entry.rows - ideal) <= 1  # ceil(log2 3) / 2
            assert entry.epochs == pytest.approx(entry.rows / run.sources[entry.name].rows)
    for name, seen in row_tokens.items():
        epoch, total = run.sources[name].rows * context, files[name].tokens
        for begin in range(0, len(seen) - epoch + 1, epoch):
            once = [token for token in seen[begin : begin + epoch] if token]
            assert len(set(once)) == len(once)
            left_out = (total - 1) % context + 1 if packing == "concatenate" else 0
            assert len(once) == total - left_out


def test_a_phase_of_shorter_rows_has_the_same_tokens_and_targets_in_rows_that_start_anew(
    files: dict[str, TokenFiles],
) -> None:
    long, short = (make(files, (0, {"web": 1}, context), rows=4) for context in (16, 4))
    for step in range(5):
        (a,), (b, c) = long.batch(step, 0, 1, 4), short.batch(step, 0, 1, 2)
        assert (a.tokens.shape, b.tokens.shape, c.tokens.shape) == ((4, 16), (8, 4), (8, 4))
        assert torch.equal(torch.cat([b.tokens, c.tokens]).flatten(), a.tokens.flatten())
        assert torch.equal(torch.cat([b.targets, c.targets]).flatten(), a.targets.flatten())
        edges = set(b.cu_seqlens.tolist()) | {32 + offset for offset in c.cu_seqlens.tolist()}
        assert edges == set(a.cu_seqlens.tolist()) | set(range(0, 65, 4))


def test_a_source_smaller_than_a_batch_is_read_many_times_and_one_without_a_row_is_refused(tmp_path: Path) -> None:
    small = {"web": numbered_files(tmp_path, [40, 9]), "books": numbered_files(tmp_path, [15], "books", FIRST["books"])}
    run = make(small, (0, {"web": 1}), rows=12)
    assert run.sources["web"].rows == 3
    rows = run.batch(0, 0, 1, 12)[0].tokens[:, 0].tolist()
    assert sorted(rows) == sorted([1, 17, 33] * 4) or len(set(rows)) > 3  # four epochs, each in its own order
    assert run.ledger(1)[0].epochs == 4
    with pytest.raises(CorpusTooSmallError, match=r"books has 15 tokens = 0 rows .* a source needs 1 row"):
        make(small, (0, {"books": 1}))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_working_in_pieces_changes_nothing(tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large corpora are gone through in pieces of a million documents; here in pieces of 12."""
    whole = make(make_files(tmp_path), *PHASES[:2], packing=packing)
    expected = [whole.batch(step, 0, 1, 12) for step in range(12)]
    reports, state = [source.report() for source in whole.sources.values()], whole.state(12)
    for module in (packing_module, best_fit, order, index_file, indexed):
        monkeypatch.setattr(module, "_PIECE", 12)
    monkeypatch.setattr(packing_module, "_STRIDE", 4)
    pieces = make(make_files(tmp_path), *PHASES[:2], packing=packing)
    assert all(same(pieces.batch(step, 0, 1, 12), expected[step]) for step in range(12))
    assert [source.report() for source in pieces.sources.values()] == reports and pieces.state(12) == state


@pytest.mark.gpu
def test_pinned_batches_are_equal(files: dict[str, TokenFiles]) -> None:
    pinned, plain = (make(files, *PHASES, pin_memory=pin, loader_workers=2).batch(15, 0, 1, 6) for pin in (True, False))
    assert same(pinned, plain) and all(batch.tokens.is_pinned() and batch.cu_seqlens.is_pinned() for batch in pinned)


GOLDEN = "f17427af54e1ffc832c09bd6034267454ab18c4382db485447123bf5c492147d"


def digest(folder: Path) -> str:
    """Hash of the batches of 40 steps of a blend in phases, both packings."""
    found = hashlib.sha256()
    for packing, phases in (("concatenate", PHASES), ("best_fit", PHASES[:2])):
        run = make(make_files(folder), *phases, packing=packing)
        for step in range(40):
            for batch in run.batch(step, 0, 1, 12):
                for part in (batch.tokens, batch.targets, batch.cu_seqlens):
                    found.update(part.numpy().tobytes())
    return found.hexdigest()


def test_the_order_is_pinned_and_another_process_finds_the_same(tmp_path: Path) -> None:
    assert digest(tmp_path) == GOLDEN
    program = (
        "import sys, pathlib\n"
        "from tests.data.test_blended_batches import digest; print(digest(pathlib.Path(sys.argv[1])))"
    )
    done = run_python(["-W", "ignore", "-c", program, str(tmp_path)])
    assert done.stdout.strip() == GOLDEN, done.stderr
