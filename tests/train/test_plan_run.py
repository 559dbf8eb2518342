"""The dry run against real steps on the CPU, on one and two ranks: what is held and sent; its rules and reports.

The bound asked for is 10%; the formulas count tensors one by one, so what is kept is held to 2%.
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from dla_kernels import launch
from dla_train.config import Config
from dla_train.hydra_app import compose
from dla_train.models import LanguageModel
from dla_train.parallel.axes import Axes
from dla_train.plan_run import Layout, Plan, Target, plan, report, table_markdown
from dla_train.plan_run.activations import kept_by_head
from dla_train.plan_run.command import run
from dla_train.plan_run.shape import LayerShape
from dla_train.plan_run.worked import best_plan
from tests.parallel.ranks import Check, Outcomes, run_on_ranks
from tests.train.divided_memory import configuration
from tests.train.held_memory import Held, held_after_forward, most_in_a_step, state_bytes

KEPT, PEAK = 0.02, 0.1
"""Relative bounds of what autograd keeps, and of the most that is alive at once."""
TINY = ("train.device=cpu", "train.micro_batch_rows=2", "data.context_tokens=128", "model.num_layers=2")
SMALL = ("model.vocab_size=512", "data.context_tokens=192")
CASES = {
    "transformer": ("model=transformer_tiny", "memory=none"),
    "transformer grouped": ("model=transformer_tiny", "memory=none", "model.num_key_heads=2", "model.mlp_width=0"),
    "mamba2 single": ("model=mamba2_tiny", "memory=single"),
    "mamba2 dla": ("model=mamba2_tiny", "memory=dla"),
    "mamba2 grouped frozen": ("model=mamba2_tiny", "memory=dla_frozen", "model.num_key_heads=2"),
    "mamba2 log-linear": ("model=mamba2_tiny", "memory=log_linear", "model.tie_embeddings=false"),
    "mamba2 hard": ("model=mamba2_tiny", "memory=dla", "memory.gate=hard", "data.context_tokens=100"),
    "mamba2 small": ("model=mamba2_125m", "memory=dla", *SMALL),
    "gated single": ("model=gated_deltanet_tiny", "memory=single"),
    "gated dla": ("model=gated_deltanet_tiny", "memory=dla"),
    "gated frozen slots": ("model=gated_deltanet_tiny", "memory=dla_frozen", "data.context_tokens=100"),
    "gated fixed": ("model=gated_deltanet_tiny", "memory=fixed", "model.conv_width=2"),
    "gated projected": ("model=gated_deltanet_tiny", "memory=dla_learned", "memory.routing=projected"),
    "gated slot weights": ("model=gated_deltanet_tiny", "memory=dla_slot", "memory.chunk_tokens=64"),
    "gated small": ("model=gated_deltanet_125m", "memory=single", *SMALL),
}
PEAKS = ("transformer", "mamba2 single", "mamba2 dla", "mamba2 small", "gated dla", "gated frozen slots", "gated small")
DTYPES = ("float32", "bfloat16")


def configured(*overrides: str) -> Config:
    return compose(["experiment=quickstart", *TINY, *overrides])


def planned(config: Config, target: Target | None = None, **layout: object) -> Plan:
    target = Target(packed=False) if target is None else target
    return plan(config, dataclasses.replace(Layout.of(config, target.world_size), **layout), target)


def predicted(config: Config, found: Plan) -> Held:
    assert found.memory is not None
    shape = LayerShape.of(config, found.layout, found.target)
    head = sum(part.bytes for part in kept_by_head(shape))
    return Held(blocks=found.memory.activations - head, head=head, loss=0, plans=found.memory.plans)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward_keeps_what_the_plan_says(case: str, dtype: str) -> None:
    config = configured(*CASES[case], f"train.dtype={dtype}")
    expected, real = predicted(config, planned(config)), held_after_forward(config)
    assert expected.blocks == pytest.approx(real.blocks, rel=KEPT)
    assert expected.head == pytest.approx(real.head, rel=KEPT)


@pytest.mark.parametrize("case", ["transformer", "mamba2 log-linear", "mamba2 grouped frozen", "gated dla"])
def test_recomputation_keeps_inputs_and_plans_as_the_plan_says(case: str) -> None:
    config = configured(*CASES[case], "train.recompute=true", "train.dtype=bfloat16")
    expected, real = predicted(config, planned(config)), held_after_forward(config)
    assert expected.blocks == pytest.approx(real.blocks, rel=KEPT)
    assert expected.plans == pytest.approx(real.plans, rel=KEPT)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", PEAKS)
def test_the_most_held_at_once_in_a_step_is_within_ten_percent(case: str, recompute: bool) -> None:
    config = configured(*CASES[case], f"train.recompute={recompute}")
    memory = planned(config).memory
    assert memory is not None
    states = memory.states
    expected = memory.total - states.weights - states.gradients - states.optimizer - states.buffers
    assert expected == pytest.approx(most_in_a_step(config), rel=PEAK)


def test_packed_rows_cost_attention_a_mask_a_layer() -> None:
    config = configured(*CASES["transformer"])
    real = held_after_forward(config, packed=True)
    assert predicted(config, planned(config, Target())).blocks == pytest.approx(real.blocks, rel=KEPT)
    assert predicted(config, planned(config)).blocks < 0.98 * real.blocks


@pytest.mark.parametrize("case", ["transformer", "gated projected", "mamba2 log-linear"])
def test_the_local_engine_keeps_the_states_that_the_plan_says(case: str) -> None:
    config = configured(*CASES[case])
    memory = planned(config).memory
    assert memory is not None
    states = (memory.states.weights, memory.states.gradients, memory.states.optimizer)
    assert states == pytest.approx(state_bytes(config), rel=1e-3)
    assert memory.states.buffers == 0


@pytest.mark.parametrize("case", ["mamba2 dla", "gated frozen slots", "gated single"])
@pytest.mark.parametrize("fused", [False, True])
def test_triton_operations_keep_what_the_plan_says(case: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter; `fused`: norms and convolution in Triton too, as on CUDA."""
    pytest.importorskip("triton", reason="needs Triton")
    sizes = ("memory.chunk_tokens=16", "data.context_tokens=40", "train.micro_batch_rows=1", "model.num_layers=1")
    config = configured(*CASES[case], "memory.backend=triton", *sizes)
    if fused:
        chosen = launch.resolve_backend
        monkeypatch.setattr(launch, "resolve_backend", lambda backend, *tensors: chosen(backend or "triton", *tensors))
    on_cuda = dataclasses.replace(config, train=dataclasses.replace(config.train, device="auto"))
    expected, real = predicted(on_cuda, planned(on_cuda if fused else config)), held_after_forward(config)
    if not fused:
        expected = predicted(config, planned(config))
    assert expected.blocks == pytest.approx(real.blocks, rel=KEPT)
    assert expected.head == pytest.approx(real.head, rel=KEPT)


@pytest.mark.parametrize("case", ["transformer", "mamba2 dla", "gated projected"])
def test_the_decode_cache_is_as_large_as_the_plan_says(case: str) -> None:
    config = configured(*CASES[case])
    model = LanguageModel(config.model, config.memory, device=torch.device("meta"))
    memory = planned(config).memory
    assert memory is not None
    assert memory.cache_bytes == sum(cache.nbytes for cache in model.empty_caches(1, config.data.context_tokens))


DIVIDED = ("model.vocab_size=500", "train.global_batch_rows=2")
AXES = ({"tensor": 2}, {"tensor": 2, "sequence": True}, {"context": 2})
KINDS = (
    (*CASES["transformer"], "train.recompute=true"),
    (*CASES["mamba2 dla"], "model.num_key_heads=1"),
    (*CASES["mamba2 log-linear"], "train.dtype=bfloat16"),
    (*CASES["gated projected"], "train.recompute=true", "train.dtype=bfloat16"),
    (*CASES["gated single"], "train.dtype=bfloat16"),
)
ON_TWO = [
    Check("held_and_sent", arguments={"overrides": json.dumps([*TINY, *kind, *DIVIDED])}, **axes)
    for kind in KINDS
    for axes in AXES
]
ZERO = [
    Check("engine_states", arguments={"overrides": json.dumps([*TINY, *CASES["mamba2 single"], "engine=deepspeed", s])})
    for s in ("engine.zero_stage=1", "engine.zero_stage=2", "engine.zero_stage=3")
]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_on_ranks("tests.train.divided_memory", [*ON_TWO, *ZERO], 2, tmp_path_factory.mktemp("ranks"))


def of_check(check: Check) -> tuple[Config, Plan]:
    config = configuration(str(check.arguments["overrides"]))
    layout = {"tensor": check.tensor, "context": check.context, "sequence": check.sequence}
    return config, planned(config, Target(packed=False, world_size=2), **layout)


@pytest.mark.parametrize("check", ON_TWO, ids=str)
def test_two_ranks_keep_and_send_what_the_plan_says(two_ranks: Outcomes, check: Check) -> None:
    config, found = of_check(check)
    assert found.traffic is not None and found.legal
    expected = predicted(config, found)
    for real in two_ranks.of(check):
        assert expected.blocks == pytest.approx(real["blocks"], rel=KEPT)
        assert expected.head == pytest.approx(real["head"], rel=KEPT)
        assert found.traffic.tensor == pytest.approx(real["tensor"], rel=KEPT)
        assert found.traffic.context == pytest.approx(real["context"], rel=KEPT)
        assert found.parameters_per_rank == real["parameters"]


@pytest.mark.parametrize("check", ZERO, ids=str)
def test_zero_divides_states_over_two_ranks_as_the_plan_says(two_ranks: Outcomes, check: Check) -> None:
    _, found = of_check(check)
    assert found.memory is not None
    for real in two_ranks.of(check):
        assert found.memory.states.weights == pytest.approx(real["weights"], rel=1e-3)
        assert found.memory.states.optimizer == pytest.approx(real["optimizer"], rel=1e-3)


@pytest.mark.parametrize("name", ["paper_mamba2_780m_dla", "paper_gated_deltanet_1300m_dla", "paper_transformer_778m"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_parameters_of_a_rank_are_those_of_its_part_of_the_model(name: str, ranks: int) -> None:
    config = compose([f"experiment={name}"])
    axes = Axes.planned(tensor=ranks, sequence=ranks > 1)
    model = LanguageModel(config.model, config.memory, axes=axes, device=torch.device("meta"))
    found = planned(config, tensor=ranks, world_size=ranks)
    assert found.parameters_per_rank == sum(weight.numel() for weight in model.parameters())


def test_traffic_of_data_ranks_counts_sums_gathers_and_micro_batches() -> None:
    config = compose(["experiment=paper_transformer_778m"])
    weights = planned(config, world_size=8).parameters
    sent = {stage: planned(config, world_size=8, zero_stage=stage).traffic for stage in range(4)}
    volume = 7 / 8 * 4 * weights  # float32, over a ring of 8
    for stage, times in {0: 2, 1: 2, 2: 32 + 1, 3: 3 * 32}.items():  # 256 rows are 32 micro-batches of a row
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


BROKEN = [
    ({"tensor": 3, "world_size": 3}, "model.num_heads=8 is not divisible by parallel.tensor=3; choose .* 1, 2, 4 or 8"),
    ({"tensor": 3, "world_size": 3}, "model.mlp_width=5632 is not divisible by parallel.tensor=3; choose"),
    ({"context": 16, "world_size": 16}, "model.num_heads=8 leaves 8 .* parallel.context=16; choose .* 1, 2, 4 or 8"),
    ({"tensor": 2, "context": 8, "world_size": 16}, "model.num_key_heads=8 leaves 4 .* choose .* from 1, 2 or 4"),
    ({"world_size": 12, "tensor": 8}, "world_size=12 is not a multiple of parallel.tensor=8 .*; choose 8 or 16"),
    ({"world_size": 3}, "train.global_batch_rows=256 is not a multiple of .* 3 data-parallel ranks; choose 255 or 258"),
    ({"world_size": 512}, "train.global_batch_rows=256 .* parallel.tensor x parallel.context = 2"),
    ({"sequence": True}, "parallel.sequence=True .*; set parallel.sequence=false"),
    ({"engine": "local", "zero_stage": 2}, "engine.zero_stage=2 needs DeepSpeed; set engine.zero_stage=0"),
    ({"zero_stage": 4}, "engine.zero_stage=4 is not a stage of ZeRO; choose 0, 1, 2 or 3"),
    (
        {"weights": "bfloat16", "zero_stage": 0, "tensor": 2, "world_size": 2},
        "engine.zero_stage=0 with bfloat16 weights .*; choose engine.zero_stage 1, 2 or 3",
    ),
    ({"weights": "bfloat16", "engine": "local", "zero_stage": 0}, "engine.weights=bfloat16 needs .*; use deepspeed"),
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


def test_the_token_loop_is_not_planned() -> None:
    found = planned(configured(*CASES["mamba2 dla"], "memory.backend=recurrent"))
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
        (["experiment=quickstart", "wrold_size=8"], 2, "dla-plan: error: "),
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


def test_the_best_plan_fits_without_recomputation_if_any_does_and_sends_least() -> None:
    config = compose(["experiment=paper_mamba2_780m_single"])
    chosen = best_plan(config, 8, Target())
    assert chosen.fits and chosen.layout.world_size == 8 and not chosen.layout.recompute
    tight = best_plan(config, 8, Target(device_gb=22))
    assert tight.fits and (tight.layout.recompute or tight.traffic.total > chosen.traffic.total)
    assert not best_plan(config, 8, Target(device_gb=3)).fits


def test_the_worked_table_marks_what_does_not_fit() -> None:
    config = compose(["experiment=paper_mamba2_780m_single"])
    table = table_markdown([best_plan(config, 8, Target()), best_plan(config, 8, Target(device_gb=3))])
    rows = [line for line in table.splitlines() if line.startswith("| paper")]
    assert len(rows) == 4 and "does not fit" not in rows[0] and "does not fit**" in rows[1]
    assert len({line.count("|") for line in table.splitlines()[:4]}) == 1
