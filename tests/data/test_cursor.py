"""Stopping and resuming: nothing repeated or dropped, later phases at will, a changed past only if allowed."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dla_train.data.blend import Phase
from dla_train.data.errors import DataError
from dla_train.data.indexed import TokenFiles
from dla_train.data.loader import BatchSource
from dla_train.data.row_source import RowSource
from tests.data.blends import FIRST, PHASES, make, make_files, same
from tests.data.conftest import numbered_files


@pytest.fixture
def files(tmp_path: Path) -> dict[str, TokenFiles]:
    return make_files(tmp_path)


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


def test_a_plain_list_may_become_a_source_of_a_later_blend(files: dict[str, TokenFiles]) -> None:
    shape: dict[str, Any] = {"context_tokens": 16, "global_batch_rows": 12, "seed": 7}
    plain = BatchSource(
        [RowSource("train", files["web"], whole_batches=True, **shape)], [Phase(0, {"train": Fraction(1)}, 16)], **shape
    )
    renamed = {"train": files["web"], "books": files["books"]}
    blend = make(renamed, (0, {"train": 1}), (14, {"train": 1, "books": 1}))
    assert blend.resume_step(plain.state(10)) == 10
    assert all(same(blend.batch(step, 0, 1, 12), plain.batch(step, 0, 1, 12)) for step in range(10, 14))
    assert {e.name: e.rows for e in blend.ledger(16)} == {"train": 14 * 12 + 12, "books": 12}
