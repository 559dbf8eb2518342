"""Blended batches: the same under every split, every token of a source once an epoch, exact resume, changed blends."""

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dla_train.data import best_fit, index_file, indexed, order
from dla_train.data import packing as packing_module
from dla_train.data.batch import Batch
from dla_train.data.blend import Phase
from dla_train.data.errors import CorpusTooSmallError, DataError
from dla_train.data.indexed import TokenFiles
from dla_train.data.loader import BatchSource
from dla_train.data.row_source import RowSource
from tests.data.conftest import numbered_files
from tests.train.runs import run_python

FIRST = {"web": 1, "code": 100_001, "books": 200_001}
LENGTHS = {"web": (300, 11), "code": (120, 23), "books": (30, 70)}  # documents, mean length
Weights = dict[str, int]


def make_files(folder: Path) -> dict[str, TokenFiles]:
    return {
        name: numbered_files(folder, [1 + i * i * 7 % (2 * mean - 1) for i in range(count)], name, FIRST[name])
        for name, (count, mean) in LENGTHS.items()
    }


@pytest.fixture
def files(tmp_path: Path) -> dict[str, TokenFiles]:
    return make_files(tmp_path)


def make(
    files: dict[str, TokenFiles],
    *phases: tuple[int, Weights] | tuple[int, Weights, int],
    context: int = 16,
    rows: int = 12,
    seed: int = 7,
    packing: str = "concatenate",
    **options: Any,
) -> BatchSource:
    shape: dict[str, Any] = {"context_tokens": context, "global_batch_rows": rows, "seed": seed, "packing": packing}
    named = {name for phase in phases for name in phase[1]}
    sources = [RowSource(name, files[name], **shape) for name in sorted(named)]
    made = [
        Phase(phase[0], {n: Fraction(w) for n, w in phase[1].items() if w}, phase[2] if len(phase) > 2 else context)
        for phase in phases
    ]
    return BatchSource(sources, made, **shape, **options)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(getattr(a, part), getattr(b, part))
        for a, b in zip(one, other, strict=True)
        for part in ("tokens", "targets", "cu_seqlens")
    )


def tokens_of(batches: list[Batch]) -> np.ndarray:
    return torch.cat([batch.tokens.flatten() for batch in batches]).numpy()


def source_of(token: int) -> str:
    return max((name for name in FIRST if FIRST[name] <= token), key=FIRST.__getitem__)


PHASES: tuple[Any, ...] = (
    (0, {"web": 6, "code": 3}),
    (9, {"web": 2, "code": 0, "books": 1}),
    (15, {"books": 1, "web": 3}, 4),
)


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


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.integers(0, 60), min_size=1, max_size=4).map(sorted),
    world=st.sampled_from([1, 2, 3, 4, 6, 12]),
    packing=st.sampled_from(["concatenate", "best_fit"]),
)
def test_stopping_and_resuming_anywhere_repeats_and_drops_nothing(
    files: dict[str, TokenFiles], stops: list[int], world: int, packing: str
) -> None:
    """The books have 110 rows or so: several epochs go by, and the later stops resume in the middle of one."""
    phases = PHASES if packing == "concatenate" else PHASES[:2]
    whole, state = make(files, *phases, packing=packing), None
    for stop in stops:
        run = make(files, *phases, packing=packing)
        if state:
            assert run.resume_step(json.loads(state)) == json.loads(state)["tokens"] // 192
        state = json.dumps(run.state(stop))
        assert run.state(stop) == whole.state(stop)
    resumed = make(files, *phases, packing=packing)
    assert resumed.resume_step(json.loads(state or "")) == stops[-1]
    for step in range(stops[-1], stops[-1] + 8):
        for rank in {0, world - 1}:
            assert same(resumed.batch(step, rank, world, 12 // world), whole.batch(step, rank, world, 12 // world))
        assert resumed.ledger(step) == whole.ledger(step)


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


def test_a_phase_added_later_continues_where_the_old_blend_would_have_been(files: dict[str, TokenFiles]) -> None:
    old = make(files, (0, {"web": 2, "code": 1}))
    state = old.state(10)
    new = make(files, (0, {"web": 2, "code": 1}), (14, {"web": 1, "books": 1}))
    assert new.resume_step(state) == 10
    for step in range(10, 14):
        assert same(new.batch(step, 0, 1, 12), old.batch(step, 0, 1, 12))
    assert {e.name: e.rows for e in new.ledger(16)} == {"web": 112 + 12, "code": 56, "books": 12}
    web = [row for row, name in zip(*_rows(new, 14), strict=True) if name == "web"]
    expected = old.sources["web"].read(112, 6).tokens.tolist()
    assert web == expected  # the source goes on with its next row


def _rows(run: BatchSource, step: int) -> tuple[list[list[int]], list[str]]:
    packed, names = run.rows(step, 0, 1)
    return packed.tokens.tolist(), names


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ([(0, {"web": 1, "code": 1})], ["past phase 0", "weights code 1/3, web 2/3", "code 1/2, web 1/2"]),
        ([(0, {"web": 2, "code": 1}), (9, {"web": 1})], ["past phase 1 was not there", "from step 9"]),
        ([(0, {"web": 2, "code": 1}, 8)], ["past phase 0", "context_tokens=16", "context_tokens=8"]),
    ],
)
def test_a_changed_past_is_refused_with_its_name(
    files: dict[str, TokenFiles], phases: list[Any], words: list[str]
) -> None:
    state = make(files, (0, {"web": 2, "code": 1})).state(10)
    with pytest.raises(DataError) as caught:
        make(files, *phases).resume_step(state)
    for word in [*words, "data.allow_changed=true"]:
        assert word in str(caught.value)


def test_an_allowed_change_goes_on_from_what_was_read_and_stays_on_record(
    files: dict[str, TokenFiles], caplog: pytest.LogCaptureFixture
) -> None:
    state = make(files, (0, {"web": 2, "code": 1})).state(10)
    changed = [(0, {"web": 1, "books": 1})]
    run = make(files, *changed, allow_changed=True)
    with caplog.at_level("WARNING"):
        assert run.resume_step(state) == 10
    assert "going on after step 10 with changed data" in caplog.text
    assert {e.name: e.rows for e in run.ledger(11)} == {"web": 80 + 6, "books": 6}
    later = run.state(20)
    assert later["sources"]["code"]["rows"] == 40  # no longer read, not forgotten
    assert [change["tokens"] for change in later["changes"]] == [10 * 12 * 16]
    again = make(files, *changed)  # the change needs no second permission
    assert again.resume_step(json.loads(json.dumps(later))) == 20
    assert same(again.batch(20, 0, 1, 12), run.batch(20, 0, 1, 12)) and again.state(25) == run.state(25)
    with pytest.raises(DataError, match="past phase 0"):
        make(files, (0, {"web": 1, "books": 2})).resume_step(later)


def test_changed_files_are_refused_and_if_allowed_start_a_new_epoch(
    files: dict[str, TokenFiles], tmp_path: Path
) -> None:
    state = make(files, (0, {"web": 2, "code": 1})).state(10)
    (tmp_path / "new").mkdir()
    other = files | {"code": numbered_files(tmp_path / "new", [9] * 90, "code", FIRST["code"])}
    with pytest.raises(DataError, match=r"source code was read from files=.*new/code has"):
        make(other, (0, {"web": 2, "code": 1})).resume_step(state)
    run = make(other, (0, {"web": 2, "code": 1}), allow_changed=True)
    run.resume_step(state)
    assert run.sources["code"].position(40) == run.sources["code"].position(40).__class__(40, 1, 0)
    assert run.sources["web"].position(80).row == 80


@pytest.mark.parametrize(
    ("change", "key"), [({"seed": 8}, "seed"), ({"rows": 6}, "global_batch_rows"), ({"packing": "best_fit"}, "packing")]
)
def test_what_rows_are_counted_in_cannot_be_changed_even_if_allowed(
    files: dict[str, TokenFiles], change: dict[str, Any], key: str
) -> None:
    state = make(files, (0, {"web": 1})).state(3)
    with pytest.raises(DataError, match=f"{key}="):
        make(files, (0, {"web": 1}), allow_changed=True, **change).resume_step(state)
    with pytest.raises(DataError, match="earlier version"):
        make(files, (0, {"web": 1})).resume_step({"tokens": 0, "files": "x"})


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
