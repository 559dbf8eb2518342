"""What a row of losses and skipped steps leads to."""

import math

import pytest

from dla_train.config import ResilienceConfig
from dla_train.resilience.guard import LEAST_KNOWN, Guard, Judgement

CALM = [3.0 + 0.01 * math.sin(step) for step in range(40)]


def judged(guard: Guard, losses: list[float | None], begin: int = 1) -> list[Judgement]:
    """One judgement a loss; None is a step that was left out."""
    return [guard.judge(begin + i, loss, skipped=loss is None) for i, loss in enumerate(losses)]


def test_as_many_skipped_steps_in_a_row_as_allowed_are_put_up_with_and_one_more_is_not() -> None:
    guard = Guard(ResilienceConfig(max_skipped_steps=2))
    assert not any(j.rewind for j in judged(guard, [3.0, None, None, 3.0, None, None]))
    last = guard.judge(7, None, skipped=True)
    assert last.rewind and last.first_bad == 5 and "3 steps in a row" in last.reason


def test_without_a_setting_no_loss_is_a_spike_and_none_is_asked_for() -> None:
    guard = Guard(ResilienceConfig())
    assert not guard.wants_losses
    assert not any(j.rewind for j in judged(guard, [*CALM, *[1e6] * 50]))


def test_spikes_in_a_row_go_back_to_before_the_first_of_them() -> None:
    guard = Guard(ResilienceConfig(spike_deviations=10, spike_patience_steps=3))
    assert guard.wants_losses
    found = judged(guard, [*CALM, 9.0, 9.0, 3.0, 9.0, 8.0, 7.0])
    assert [j.rewind for j in found] == [False] * 45 + [True]
    assert found[-1].first_bad == 44 and "3 losses in a row" in found[-1].reason


def test_spikes_do_not_move_the_median_they_are_measured_against() -> None:
    guard = Guard(ResilienceConfig(spike_deviations=10, spike_patience_steps=10**6, spike_window_steps=30))
    judged(guard, [*CALM, *[9.0] * 100])
    assert guard.doubts
    guard.judge(200, 3.0, skipped=False)
    assert not guard.doubts


def test_a_falling_loss_and_one_that_rises_slowly_are_no_spikes() -> None:
    guard = Guard(ResilienceConfig(spike_deviations=10, spike_patience_steps=1))
    assert not any(j.rewind for j in judged(guard, [10 * 0.97**step for step in range(300)]))
    guard = Guard(ResilienceConfig(spike_deviations=10, spike_patience_steps=1))
    assert not any(j.rewind for j in judged(guard, [3 + 0.001 * step for step in range(300)]))


def test_a_constant_loss_makes_no_spike_of_rounding() -> None:
    guard = Guard(ResilienceConfig(spike_deviations=5, spike_patience_steps=1))
    assert not any(j.rewind for j in judged(guard, [2.0] * 50 + [2.001]))


@pytest.mark.parametrize("known", [LEAST_KNOWN - 1, LEAST_KNOWN])
def test_a_spike_needs_enough_losses_to_be_told_from(known: int) -> None:
    guard = Guard(ResilienceConfig(spike_deviations=10, spike_patience_steps=1))
    assert judged(guard, [*CALM[:known], 100.0])[-1].rewind == (known >= LEAST_KNOWN)


def test_checkpoints_wait_while_the_last_step_was_a_bad_one() -> None:
    guard = Guard(ResilienceConfig())
    guard.judge(1, None, skipped=True)
    assert guard.doubts
    guard.judge(2, None, skipped=False)
    assert not guard.doubts
