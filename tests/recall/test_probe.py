"""The mechanism, without training: which memory keeps needles apart that a single state mixes up."""

import pytest

from dla_kernels.memory.merging import CAPACITY_RULES
from dla_train.recall.probe import ARMS, SHARPNESS, TOKENS, ProbeArm, merge_table, probe, probe_rows, probe_table

BY_NAME = {arm.name: arm for arm in ARMS}
BACKBONES = ("mamba2", "gated_deltanet")


@pytest.fixture(scope="module")
def found():
    """Right answers by (backbone, memory, needles)."""
    rows = {needles: probe_rows(needles, 32, seed=0) for needles in (8, 16, 64)}
    return {
        (backbone, name, needles): probe(arm, backbone, made)
        for backbone in BACKBONES
        for name, arm in BY_NAME.items()
        for needles, made in rows.items()
    }


@pytest.mark.parametrize("backbone", BACKBONES)
def test_dynamic_boundaries_isolate_needles_while_there_are_slots_for_them(found, backbone):
    assert found[backbone, "dla", 8] > 0.95
    assert found[backbone, "dla", 16] > 0.8


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("other", ["single", "log_linear", "fixed"])
def test_no_other_partition_of_as_many_slots_comes_near(found, backbone, other):
    for needles, margin in ((8, 0.1), (16, 0.2)):
        assert found[backbone, "dla", needles] > found[backbone, other, needles] + margin


def test_with_more_needles_than_slots_they_share_slots_and_are_lost(found):
    for backbone in BACKBONES:
        assert 0.1 < found[backbone, "dla", 64] < 0.5


def test_drift_of_the_updated_state_fades_with_the_segment_unless_the_rule_bounds_the_state(found):
    """Of n equal writes the next one changes the sum by 1/n, so nothing drifts far enough; the delta rule keeps one."""
    assert found["mamba2", "dla, drift: update", 8] < 0.2
    assert found["gated_deltanet", "dla, drift: update", 8] > 0.95


def test_answers_come_from_reading_the_slot_that_is_asked_for():
    """With one value for all needles anything would be right; so ask for another needle and see it answered wrongly."""
    rows = probe_rows(8, 16, seed=1)
    assert len(rows.targets.unique()) > 8
    rows.q[:, TOKENS - 8 :] = rows.q[:, TOKENS - 8 :].roll(1, dims=1)  # ask for the neighbour's needle
    assert probe(BY_NAME["dla"], "gated_deltanet", rows) < 0.2


def test_the_table_has_a_row_for_every_memory_and_the_same_digits_each_time():
    table = probe_table(needles=(4,), rows=4)
    assert table == probe_table(needles=(4,), rows=4)
    assert table.count("\n") == 3 + 2 * len(ARMS)
    assert ProbeArm("single", "single").by_content is False and SHARPNESS > 0


def test_slots_stay_even_by_mass_and_what_is_old_gathers_in_one_by_density():
    lines = merge_table(tokens=(256,), rows=4).splitlines()[4:]
    longest = {rule.strip(): float(tokens) for _, rule, tokens, _ in (line.split("|") for line in lines)}
    assert set(longest) == set(CAPACITY_RULES)
    assert longest["mass"] < 20 < longest["random"] < longest["density"] < longest["oldest"] < 257
