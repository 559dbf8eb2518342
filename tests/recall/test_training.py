"""One run: paired with other arms, repeatable, and able to learn."""

import dataclasses

import pytest
import torch

from dla_train.recall.arms import study_arms, study_tasks
from dla_train.recall.settings import compose
from dla_train.recall.training import PartDraw, judge, train_run
from tests.recall.conftest import SHIPPED
from tests.recall.tasks.examples import EXAMPLES


def run(study, name, seed=0, rate=1e-2, split="held_out"):
    tasks = study_tasks(study)
    arm = next(arm for arm in study_arms(study, tasks) if arm.name == name)
    return train_run(study, arm.run(rate, seed), tasks, split, torch.device("cpu"))


def test_a_run_is_the_same_each_time_and_another_with_another_seed(tiny):
    one, again, other = (run(tiny, "gated_deltanet_dla", seed) for seed in (0, 0, 1))
    assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(again, seconds=0.0)
    assert one.parts != other.parts


def test_every_arm_of_a_seed_sees_the_same_rows_and_no_seed_those_of_another(tiny):
    tasks = study_tasks(tiny)
    one, again, other = (PartDraw(tasks, {}, seed) for seed in (0, 0, 1))
    for _ in range(4):
        first, second, third = (draw.batch(8)[0] for draw in (one, again, other))
        assert torch.equal(first, second) and not torch.equal(first, third)


def test_every_part_is_trained_on_and_judged(tiny):
    assert set(asked(tiny, {}, 20)) == {2, 8}
    found = run(tiny, "gated_deltanet_single")
    assert list(found.parts) == ["few", "many"]
    assert [step for step, _ in found.curve] == [5, 10, 12]
    assert 0 <= found.parts["many"].accuracy <= 1


def asked(study, weights, steps):
    """Needles asked for in each of some steps: 2 of the part `few`, 8 of `many`."""
    draw = PartDraw(study_tasks(study), weights, 0)
    return [int((draw.batch(4)[1] >= 0).sum(1)[0]) for _ in range(steps)]


def test_parts_are_trained_on_as_often_as_their_odds_say_and_one_without_odds_never(tiny):
    assert set(asked(tiny, {"many": 2.0}, 20)) == {8}
    share = asked(tiny, {"many": 3.0, "few": 1.0}, 400).count(8) / 400
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / 400) ** 0.5


def test_a_model_learns_and_reports_when_it_did(tiny):
    long = dataclasses.replace(tiny, steps=250, batch_rows=32, curve_interval_steps=50, curve_rows=128)
    found = run(long, "gated_deltanet_dla")
    assert found.parts["few"].accuracy > 0.7  # chance is 1/8
    reached = found.steps_to("few", 0.5)
    assert reached is not None and 50 <= reached <= 250
    assert found.steps_to("few", 1.01) is None


@pytest.mark.parametrize("name", SHIPPED)
def test_every_arm_of_a_shipped_study_trains_and_is_judged(name):
    few = ["steps=1", "optim.warmup_steps=1", "batch_rows=2", "held_out_rows=2", "curve_rows=2"]
    study = compose([f"study={name}", *few])
    tasks = study_tasks(study)
    for arm in study_arms(study, tasks):
        found = train_run(study, arm.config, tasks, "held_out", torch.device("cpu"))
        assert list(found.parts) == list(study.parts), arm.name
        assert all(0 < judged.loss < 20 for judged in found.parts.values()), arm.name


@pytest.mark.parametrize("task", EXAMPLES, ids=lambda task: task["name"])
def test_every_task_can_be_trained_on(tiny, task):
    """Whatever its tokens are made of: most have more kinds of token than of answer."""
    few = {"steps": 5, "batch_rows": 2, "held_out_rows": 2, "curve_rows": 2}
    study = dataclasses.replace(tiny, task=task, parts={}, easy=None, match_parameters=False, **few)
    (judged,) = run(study, "gated_deltanet_dla").parts.values()
    assert 0 < judged.loss < 20


def test_only_a_soft_gate_has_a_loss_with_the_boundaries_of_training(tiny):
    found = run(tiny, "gated_deltanet_dla").parts["many"]
    assert found.soft_loss is not None and found.soft_loss != found.loss
    hard = {**tiny.memories, "dla": {**tiny.memories["dla"], "gate": "hard"}}
    assert run(dataclasses.replace(tiny, memories=hard), "gated_deltanet_dla").parts["many"].soft_loss is None


def test_a_memory_is_described_and_a_single_state_has_one_slot(tiny):
    dla, single = run(tiny, "gated_deltanet_dla"), run(tiny, "gated_deltanet_single")
    assert 1 < dla.live_slots <= 6 and 0 < dla.boundary_rate < 1
    assert (single.live_slots, single.boundary_rate) == (1, 0)


def test_a_controlled_threshold_moves_towards_its_rate(tiny):
    rate = {"policy": "dla", "capacity": 6, "read": "content", "tau_control": "rate", "target_boundary_rate": 0.02}
    rate["tau_step"] = 0.05
    study = dataclasses.replace(tiny, memories={**tiny.memories, "rate": rate}, steps=40)
    assert run(study, "gated_deltanet_rate").boundary_rate < run(study, "gated_deltanet_dla").boundary_rate


def test_a_loss_that_is_not_finite_ends_the_run_with_its_reason(tiny):
    with pytest.raises(FloatingPointError, match="step .* use a lower rate"):
        run(tiny, "gated_deltanet_dla", rate=1e30)


def test_rows_to_choose_a_rate_by_are_not_those_that_are_reported(tiny):
    assert run(tiny, "gated_deltanet_single").parts != run(tiny, "gated_deltanet_single", split="tuning").parts


def test_accuracy_and_loss_are_those_of_all_answers_however_they_are_batched(tiny):
    class Copies(torch.nn.Module):
        """Answers the value id of a table by key; half of the keys are wrong."""

        def __init__(self):
            super().__init__()
            self.final_norm = torch.nn.LayerNorm(1)

        def forward(self, ids, positions):
            logits = torch.zeros(len(positions), 8)
            logits[..., 3] = 2.0
            return type("Output", (), {"logits": logits})

    tasks = study_tasks(tiny)
    found = judge(Copies(), tasks, 300, "held_out", soft=False)
    for part, judged in found.items():
        share = judged.accuracy
        assert abs(share - 1 / 8) < 5 * (7 / 64 / (300 * tasks[part].asked)) ** 0.5
        norm = torch.logsumexp(torch.tensor([2.0] + [0.0] * 7), 0)
        assert judged.loss == pytest.approx(float(norm - 2 * share), rel=1e-5)
