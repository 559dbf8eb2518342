"""What the dry run says beside memory: rules and their mends, speed, the report, the command and the worked table."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from dla_train.config import Config
from dla_train.hydra_app import compose
from dla_train.plan_run import Layout, Plan, Target, plan, report, table_markdown
from dla_train.plan_run.choice import DRAW, best_plan, comfortable, layouts, rough_seconds
from dla_train.plan_run.command import run
from dla_train.plan_run.reach import EXPERIMENT, SIZES, largest_that_fit, reach_plans, scaled


def planned(config: Config, target: Target | None = None, **layout: object) -> Plan:
    target = Target() if target is None else target
    return plan(config, dataclasses.replace(Layout.of(config, target.world_size), **layout), target)


def test_traffic_of_data_ranks_counts_sums_gathers_and_micro_batches() -> None:
    config = compose(["experiment=paper_transformer_778m"])
    weights = planned(config, world_size=8).parameters
    sent = {stage: planned(config, world_size=8, zero_stage=stage).traffic for stage in range(4)}
    volume = 7 / 8 * 4 * weights  # float32, over a ring of 8
    # 256 rows are 32 micro-batches of a row; sums that every rank gets count twice
    for stage, times in {0: 2, 1: 2 + 1, 2: 2 * 32 + 1, 3: 3 * 32}.items():
        traffic = sent[stage]
        assert traffic is not None
        assert traffic.data == pytest.approx(times * volume, rel=1e-6)
        assert (traffic.tensor, traffic.context) == (0, 0)


def test_speed_is_the_stated_share_of_the_peak_over_the_training_flops() -> None:
    found = planned(compose(["experiment=paper_mamba2_780m_single"]), Target(64, mfu=0.5, peak_tflops=1000))
    rate = 64 * 0.5e15 / found.flops.training
    assert found.speed.tokens_per_second == pytest.approx(rate)
    assert found.speed.tokens == 11921 * 256 * 16384
    assert found.speed.days == pytest.approx(found.speed.tokens / rate / 86400)
    assert found.speed.device_hours == pytest.approx(found.speed.days * 24 * 64)


def test_half_width_weights_need_no_casts_and_a_master_copy() -> None:
    config = compose(["experiment=paper_mamba2_780m_dla"])
    wide, narrow = (planned(config, world_size=8, weights=kind) for kind in ("float32", "bfloat16"))
    assert wide.memory is not None and narrow.memory is not None
    assert 2 * narrow.memory.states.weights == wide.memory.states.weights
    assert narrow.memory.states.optimizer == wide.memory.states.optimizer
    casts = {memory: {part.name: part.bytes for part in memory.layer} for memory in (wide.memory, narrow.memory)}
    assert casts[narrow.memory]["weights in the compute type"] == 0 < casts[wide.memory]["weights in the compute type"]


def test_the_copy_that_tasks_are_asked_of_counts_whole_on_every_rank() -> None:
    words = ["experiment=paper_mamba2_780m_dla", "train.micro_batch_rows=1", "train.recompute=true"]
    layout = {"world_size": 64, "tensor": 4, "zero_stage": 3}
    plain = planned(compose([*words, "engine=deepspeed"]), **layout).memory
    config = compose([*words, "engine=deepspeed", "evaluation=commonsense", "evaluation.batch_tokens=1000"])
    asked = planned(config, **layout)
    assert plain is not None and asked.memory is not None and plain.evaluation == 0
    assert asked.memory.evaluation == 4 * asked.parameters + 2 * 1000 * config.model.vocab_size
    states = asked.memory.states
    held = states.weights + states.optimizer + states.gradients + asked.memory.evaluation
    assert asked.memory.total == max(plain.total, held)
    config.evaluation.batch_tokens = 10**6
    much = planned(config, **layout)
    assert much.memory is not None and much.memory.total > plain.total
    assert "copy for published tasks" in report(much)


BROKEN = [
    ({"tensor": 3, "world_size": 3}, "model.num_heads=8 is not divisible by parallel.tensor=3; choose .* 1, 2, 4 or 8"),
    ({"tensor": 3, "world_size": 3}, "model.mlp_width=5632 is not divisible by parallel.tensor=3; choose"),
    ({"context": 16, "world_size": 16}, "model.num_heads=8 leaves 8 .* parallel.context=16; choose .* 1, 2, 4 or 8"),
    ({"tensor": 2, "context": 8, "world_size": 16}, "model.num_key_heads=8 leaves 4 .* choose .* from 1, 2 or 4"),
    ({"world_size": 12, "tensor": 8}, "world_size=12 is not a multiple of parallel.tensor=8 .*; choose 8 or 16"),
    ({"world_size": 3}, "train.global_batch_rows=256 is not a multiple of .* 3 data-parallel ranks; choose 255 or 258"),
    ({"world_size": 512}, "train.global_batch_rows=256 .* parallel.tensor x parallel.context = 2"),
    ({"sequence": True}, "parallel.sequence=True .*; set parallel.sequence=false"),
    ({"engine": "local", "zero_stage": 2}, "engine.zero_stage=2 needs DeepSpeed, .*; set engine.zero_stage=0"),
    ({"zero_stage": 4}, "engine.zero_stage=4 is not a stage of ZeRO; choose 0, 1, 2 or 3"),
    ({"weights": "bfloat16", "zero_stage": 0}, "engine.weights=bfloat16 needs .*; set engine=deepspeed and .*=1, 2 or"),
    ({"offload": True, "engine": "local", "zero_stage": 0}, "engine.offload_optimizer=True needs .*; set engine=deep"),
]


@pytest.mark.parametrize(("layout", "problem"), BROKEN)
def test_a_broken_rule_names_key_value_and_what_would_do(layout: dict[str, object], problem: str) -> None:
    found = planned(compose(["experiment=paper_gated_deltanet_1300m_dla"]), **layout)
    assert not found.legal
    text = " ".join(check.problem for check in found.checks)
    assert re.search(problem, text), text


def test_rows_must_divide_along_time() -> None:
    config = compose(["experiment=paper_gated_deltanet_1300m_dla", "data.context_tokens=100"])
    found = planned(config, context=8, world_size=8)
    assert any("data.context_tokens=100 is not divisible by the 8 ranks" in check.problem for check in found.checks)


def test_every_broken_rule_is_listed_once_and_sizes_of_a_rank_are_left_out() -> None:
    config = compose(["experiment=paper_gated_deltanet_1300m_dla", "memory.tau=3.0"])
    found = planned(config, tensor=3, world_size=4)
    problems = [check.problem.split(" ")[0] for check in found.checks if check.problem]
    assert len(problems) == len(set(problems)) >= 5
    assert {"world_size=4", "model.num_heads=8", "memory.tau=3.0"} <= set(problems)
    assert (found.memory, found.traffic, found.parameters_per_rank) == (None, None, None)
    assert found.parameters > 1e9 and "memory of a rank" not in report(found)


def test_a_batch_that_does_not_divide_leaves_the_sizes_of_a_rank_known() -> None:
    found = planned(compose(["experiment=paper_mamba2_780m_dla"]), world_size=3)
    assert not found.legal and found.memory is not None and found.traffic is not None


def test_the_token_loop_is_not_planned() -> None:
    found = planned(compose(["experiment=quickstart", "memory.backend=recurrent"]))
    assert any("memory.backend=recurrent" in check.problem for check in found.checks) and found.memory is None


def test_a_report_names_every_kind_of_memory_and_every_axis() -> None:
    text = report(planned(compose(["experiment=paper_mamba2_780m_dla"]), Target(world_size=8)))
    for words in ("parameters", "FLOPs a token", "weights", "gradients", "optimizer states", "engine's buffers"):
        assert f"\n  {words}" in text
    for words in ("activations", "memory plans", "workspace", "logits and loss", "most at once", "decode cache"):
        assert f"\n  {words}" in text
    for words in ("tensor", "context", "data", "tokens/s", "the whole run", "ok  8 ranks = 8 data"):
        assert f"\n  {words}" in text
    assert "fits 80 GB" in text and "  no  " not in text


def test_the_command_prints_a_plan_writes_json_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    assert run(["experiment=paper_mamba2_780m_dla", "world_size=8", "mfu=0.3", f"json={path}"]) == 0
    out = capsys.readouterr().out
    assert "paper_mamba2_780m_dla on 8 ranks" in out and "speed at 30% of 989 TFLOP/s" in out
    values = json.loads(path.read_text())
    assert values["legal"] and values["fits"] and values["layout"]["world_size"] == 8
    assert values["memory"]["total"] > values["memory"]["states"]["weights"] == 4 * values["parameters"]
    assert not torch.distributed.is_initialized()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["experiment=paper_mamba2_780m_dla", "world_size=12"], 1, "  no  train.global_batch_rows=256"),
        (["experiment=paper_mamba2_780m_dla", "device_gb=10"], 1, "does not fit 10 GB"),
        (["experiment=paper_mamba2"], 2, "dla-plan: error: experiment=paper_mamba2 is not an option"),
        (["experiment=quickstart", "world=8"], 2, "dla-plan: error: world is not a setting; did you mean world_size?"),
        (["experiment=quickstart", "mfu=high"], 2, "mfu=high is not a number"),
        (["experiment=quickstart", "mfu=1.5"], 2, "mfu=1.5 lies outside (0, 1]"),
        (["experiment=quickstart", "device=tpu"], 2, "device=tpu is not one of the choices; choose from cuda, cpu"),
        (["experiment=quickstart", "packed=1"], 2, "packed=1 is neither true nor false"),
        (["layouts=x.md", "experiment=quickstart"], 2, "leave out experiment=quickstart"),
        (["--help"], 0, "dla-plan experiment="),
    ],
)
def test_exit_codes_tell_legal_from_illegal_from_mistaken(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == code
    output = capsys.readouterr()
    assert words in output.out + output.err


def test_the_best_plan_is_the_simplest_of_the_quickest_of_those_that_fit_with_a_margin() -> None:
    config = compose(["experiment=paper_mamba2_780m_single"])
    legal = [found for found in (plan(config, layout, Target()) for layout in layouts(config, 8)) if found.legal]
    fitting = [found for found in legal if comfortable(found)]
    assert 5 < len(fitting) < len(legal)
    assert all(found.memory is not None and 1.1 * found.memory.total <= 80e9 for found in fitting)
    best, quickest = best_plan(config, 8, Target()), min(map(rough_seconds, fitting))
    assert comfortable(best) and rough_seconds(best) <= DRAW * quickest
    drawn = [found for found in fitting if rough_seconds(found) <= DRAW * quickest]
    assert len(drawn) > 1 and best.layout.tensor == min(found.layout.tensor for found in drawn)
    assert rough_seconds(best_plan(config, 8, Target(device_gb=25))) > DRAW * quickest
    assert not best_plan(config, 8, Target(device_gb=1)).fits


def test_the_rough_count_adds_arithmetic_again_and_what_is_sent() -> None:
    config = compose(["experiment=paper_mamba2_780m_single"])
    once, again = (planned(config, world_size=64, tensor=2, recompute=r) for r in (False, True))
    assert once.traffic is not None and again.traffic is not None
    for found, share in ((once, 1.0), (again, 4 / 3)):
        sent = found.traffic.tensor / 450e9 + found.traffic.data / 50e9
        assert rough_seconds(found) == pytest.approx(share * found.speed.step_seconds + sent)
    assert again.traffic.tensor > once.traffic.tensor


def test_the_worked_table_marks_what_does_not_fit() -> None:
    config = compose(["experiment=paper_mamba2_780m_single"])
    table = table_markdown([best_plan(config, 8, Target()), best_plan(config, 8, Target(device_gb=1))])
    rows = [line for line in table.splitlines() if line.startswith("| paper")]
    assert len(rows) == 4 and "does not fit" not in rows[0] and "does not fit**" in rows[1]
    assert len({line.count("|") for line in table.splitlines()[:4]}) == 1


def test_larger_models_move_the_optimizer_to_the_host_only_where_nothing_fits_without() -> None:
    plans = reach_plans(Target())
    assert len(plans) == len(SIZES) * 3 and all(found.legal for found in plans)
    for found in plans:
        without = found if not found.layout.offload else best_plan(scaled_to(found), found.layout.world_size, Target())
        assert comfortable(without) != found.layout.offload
    assert {found.layout.offload for found in plans} == {False, True}
    sizes = [found.parameters / 1e9 for found in plans[::3]]
    assert sizes == pytest.approx([7, 13, 30, 70, 180], rel=0.05)
    fits = [found for found in plans if found.layout.world_size == 8 and comfortable(found)]
    largest = max(found.parameters for found in fits if not found.layout.offload)
    assert f"{largest / 1e9:.0f}B on 8," in largest_that_fit(plans)


def scaled_to(found: Plan) -> Config:
    size = found.name.partition(",")[0]
    return scaled(compose([f"experiment={EXPERIMENT}"]), size, *SIZES[size])
