"""Parts of a start add up to the whole, also those before this process."""

import time

import pytest

from dla_train.start_clock import STARTED, StartClock, process_began, starting


def test_this_process_began_before_now_and_not_long_ago() -> None:
    began = process_began()
    assert began is not None and 0 < time.time() - began < 3600


def test_parts_before_the_process_last_until_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    began = process_began()
    assert began is not None
    for key, value in starting(("dla-launch", began - 3), ("torchrun", began - 1)).items():
        monkeypatch.setenv(key, value)
    clock = StartClock.of_process()
    clock.part("data")
    assert list(clock.seconds) == ["dla-launch", "torchrun", "imports", "data"]
    assert clock.seconds["dla-launch"] == pytest.approx(2, abs=0.01)
    assert clock.seconds["torchrun"] == pytest.approx(1, abs=0.05)
    assert sum(clock.seconds.values()) == pytest.approx(time.time() - began + 3, abs=0.05)


@pytest.mark.parametrize("again", [{"TORCHELASTIC_RESTART_COUNT": "1"}, {STARTED: "no moment"}, {STARTED: ""}])
def test_a_second_start_and_nonsense_begin_with_the_process(
    monkeypatch: pytest.MonkeyPatch, again: dict[str, str]
) -> None:
    for key, value in (starting(("torchrun", 1.0)) | again).items():
        monkeypatch.setenv(key, value)
    assert list(StartClock.of_process().seconds) == ["imports"]


def test_the_report_is_given_once_and_names_every_part() -> None:
    clock = StartClock()
    clock.part("model")
    clock.part("first step")
    assert clock.report() == "first step done 0.0 s after the start: model 0.0, first step 0.0"
    assert clock.report() == ""
