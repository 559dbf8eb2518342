"""The kernels' benchmark: what its layers compute, how it times and survives, what it decides from numbers."""

import inspect
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

from dla_kernels import plan_memory
from dla_kernels.bench import layers, session
from dla_kernels.bench.__main__ import main
from dla_kernels.bench.decode import Decoder, filled_caches, repeated
from dla_kernels.bench.inputs import (
    SHAPES,
    SPARSE_RATE,
    TAU,
    TOY_ATTENTION,
    TOY_SHAPES,
    Shape,
    boundary_rate,
    layer_inputs,
    tau_for_rate,
)
from dla_kernels.bench.layers import (
    FLA,
    Arm,
    FlaLogLinear,
    FlaSingle,
    MemoryLayer,
    build_layer,
    core_arms,
    variant_arms,
)
from dla_kernels.bench.measure import Case, Stopwatch, kernel_times, matrix_rate, measure_in_turn, outcome, run_at_once
from dla_kernels.bench.parts import PARTS, live_slots, mixing_flops, part_of, part_shares
from dla_kernels.bench.schedule import schedule
from dla_kernels.bench.session import PASSES, Budget, merged, write_json
from dla_kernels.bench.tables import markdown
from dla_kernels.bench.targets import DYNAMIC, TARGETS, judge
from dla_kernels.memory.slots import chunk_slots
from dla_kernels.tuning import TUNING
from tests.tolerances import assert_close

CPU = torch.device("cpu")
LENGTHS = [2048, 4096, 8192, 16384, 32768, 65536, 131072]


# What is measured


def test_inputs_open_slots_as_often_as_text_and_a_tau_is_found_for_any_rate():
    inputs = layer_inputs(TOY_SHAPES["gated_deltanet"], 2, 256, gradients=False)
    assert 0.65 < boundary_rate(inputs, TAU, "torch") < 0.85
    tau = tau_for_rate(inputs, SPARSE_RATE, "torch")
    assert abs(boundary_rate(inputs, tau, "torch") - SPARSE_RATE) < 0.02


def test_inputs_are_the_same_at_every_call_and_rows_differ():
    first, second = (layer_inputs(TOY_SHAPES["mamba2"], 2, 12, gradients=False) for _ in range(2))
    assert torch.equal(first.v, second.v) and torch.equal(first.log_decay, second.log_decay)
    assert not torch.equal(first.v[0], first.v[1])
    assert first.beta is None and len(first.tensors) == 4


@pytest.mark.parametrize(
    "arm", [arm for arm in core_arms() + variant_arms() if "fla_" not in arm.family], ids=lambda a: a.name
)
def test_every_arm_runs_forward_and_gives_a_gradient_to_all_it_is_given(arm):
    shape = TOY_SHAPES["gated_deltanet"]
    inputs = layer_inputs(shape, 1, 12)
    layer = build_layer(arm, shape, inputs, attention=TOY_ATTENTION, tau=TAU, backend="torch")
    forward, both = (session._pass(layer, name) for name in PASSES)
    assert not forward().requires_grad
    gradients = both()
    assert [g.shape for g in gradients] == [leaf.shape for leaf in layer.leaves]
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in gradients)


def naive_operations():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
        from fla.ops.log_linear_attn.naive import naive_log_linear_attn
        from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
    return {
        "gated_delta_rule": naive_recurrent_gated_delta_rule,
        "simple_gla": naive_recurrent_simple_gla,
        "log_linear_attn": lambda **inputs: (naive_log_linear_attn(**inputs), None),
    }


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])
def test_flas_single_state_is_asked_for_what_our_single_state_computes(monkeypatch, name):
    monkeypatch.setattr(layers, "fla_operations", naive_operations)
    inputs = layer_inputs(TOY_SHAPES[name], 2, 20, gradients=False)
    ours = MemoryLayer(Arm("single"), TOY_SHAPES[name], inputs, TAU, "torch")
    ours.weights.fill_(1.0)
    assert_close("o", FlaSingle(TOY_SHAPES[name], inputs).forward(False), ours.forward(False))


def test_flas_log_linear_is_asked_for_what_our_log_linear_computes(monkeypatch):
    monkeypatch.setattr(layers, "fla_operations", naive_operations)
    shape = TOY_SHAPES["mamba2"]
    inputs = layer_inputs(shape, 2, 20, gradients=False)
    ours, theirs = MemoryLayer(Arm("log_linear"), shape, inputs, TAU, "torch"), FlaLogLinear(shape, inputs)
    ours.weights[..., : theirs.scales.shape[-1]] = theirs.scales
    assert_close("o", theirs.forward(False), ours.forward(False))


@pytest.mark.parametrize("module", FLA)
def test_flas_kernels_take_the_arguments_they_are_given(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operation = inspect.unwrap(layers.fla_operations()[module])
    given = {"q", "k", "v", "g", "scale"}
    given |= {"gated_delta_rule": {"beta"}, "log_linear_attn": {"level_scales"}}.get(module, set())
    inspect.signature(operation).bind(**dict.fromkeys(given))


def test_flas_kernels_are_refused_on_a_cpu():
    inputs = layer_inputs(TOY_SHAPES["mamba2"], 1, 4)
    with pytest.raises(ValueError, match="CUDA"):
        build_layer(Arm("fla_single"), TOY_SHAPES["mamba2"], inputs, attention=TOY_ATTENTION, tau=TAU, backend=None)


def test_live_slots_are_those_at_chunk_edges():
    inputs = layer_inputs(TOY_SHAPES["mamba2"], 2, 75, gradients=False)
    plan = plan_memory(*inputs.keys, tau=TAU, capacity=8, chunk_size=16)
    assert live_slots(plan) == pytest.approx(float(chunk_slots(plan, 16).fill[..., :-1].double().mean()))


def test_reading_30_states_of_128_by_128_costs_a_megaflop():
    shape = Shape("mamba2", 1, 1, 128, 128)
    per_slot = mixing_flops(shape, 64, 31.0, "transition") - mixing_flops(shape, 64, 30.0, "transition")
    assert 30 * per_slot == 2 * 30 * 128 * 128
    assert mixing_flops(shape, 64, 0.0, "transition") == 64 * 128 + 2 * 128 * 128 + 64 * 128


def test_frozen_slots_save_the_transitions_of_closed_states():
    shape = SHAPES["gated_deltanet"]
    saved = mixing_flops(shape, 64, 30.0, "transition") - mixing_flops(shape, 64, 30.0, "frozen")
    assert saved == pytest.approx(shape.heads * 29 * 4 * shape.key_dim * shape.value_dim)


def test_decoding_continues_a_prefill_of_the_context():
    shape = TOY_SHAPES["gated_deltanet"]
    caches = dict(filled_caches(shape, 4, [8, 40], torch.float32, CPU, "torch"))
    assert [int(cache.position[0]) for cache in caches.values()] == [8, 40]
    assert caches[8].nbytes == caches[40].nbytes
    many = repeated(caches[40], 3)
    assert torch.equal(many.states[2], caches[40].states[0])
    tokens = layer_inputs(shape, 3, 5, gradients=False)
    decoder = Decoder(shape, many, tokens)
    before = many.key_sums.sum(2)
    for _ in range(2):
        assert decoder.step().shape == (3, shape.heads, shape.value_dim)
        decoder.next_token()
    assert many.position.tolist() == [42, 42, 42]
    assert_close("keys of two tokens", many.key_sums.sum(2) - before, tokens.k[:, 0] + tokens.k[:, 1])


# How it is measured


def test_cases_are_timed_in_turn_after_two_calls_that_do_not_count():
    calls: list[str] = []
    cases = [Case(lambda name=name: calls.append(name), {}) for name in "ab"]
    measure_in_turn(cases, 2, Stopwatch(CPU), hurry=lambda: False)
    assert calls == [*"aabb", *"abab"]
    for case in cases:
        assert case.record["status"] == "ok" and len(case.record["milliseconds"]["rounds"]) == 2
        assert case.record["peak_bytes"] is None


def test_one_case_may_run_out_of_memory_or_fail_and_the_others_go_on():
    saved: list[list[str]] = []
    spent = iter(range(100))

    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB\nmore")

    def breaks_later():
        if next(spent) >= 2:
            raise RuntimeError("unspecified launch failure")

    cases = [Case(run, {"status": "started"}) for run in (no_memory, breaks_later, lambda: None)]
    measure_in_turn(
        cases, 2, Stopwatch(CPU), after=lambda: saved.append([c.record["status"] for c in cases]), hurry=lambda: False
    )
    records = [case.record for case in cases]
    assert [record["status"] for record in records] == ["out_of_memory", "failed", "ok"]
    assert records[0]["detail"].endswith("Tried to allocate 90 GiB ... more") and "milliseconds" not in records[0]
    assert "launch failure" in records[1]["detail"]
    assert saved[0] == ["out_of_memory", "started", "started"], "written after every arm"


def test_an_interruption_is_not_swallowed():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outcome(interrupted)


def test_when_time_is_up_the_first_round_ends_and_no_other_begins():
    answers = iter([False, False, True])
    cases = [Case(lambda: None, {"status": "started"}) for _ in range(2)]
    measure_in_turn(cases, 9, Stopwatch(CPU), hurry=lambda: next(answers))
    assert [len(case.rounds) for case in cases] == [1, 1]
    measure_in_turn(cases[:1], 9, Stopwatch(CPU), hurry=lambda: True)
    assert cases[0].record["status"] == "left_out"


def test_a_job_that_would_outlast_the_time_is_not_begun():
    clock = iter([0.0, 50.0, 50.0, 50.0])
    budget = Budget(1.0, now=lambda: next(clock))
    budget.spent[("layers", "mamba2", 3)] = 11.0
    assert not budget.fits(("layers", "mamba2", 3))
    assert budget.fits(("decode", "mamba2", 0))
    assert not budget.is_over()


def test_laps_kernels_and_the_matrix_rate_are_positive():
    stopwatch = Stopwatch(CPU)
    product = torch.ones(64, 64)
    assert all(lap > 0 for lap in stopwatch.laps([lambda: product @ product, lambda: product + 1]))
    kernels = kernel_times(CPU, lambda: product @ product)
    assert any("mm" in kernel["name"] for kernel in kernels)
    assert kernels == sorted(kernels, key=lambda kernel: -kernel["milliseconds"])
    assert matrix_rate(stopwatch, size=32, repeats=2)["tflops"]["median"] > 0


def test_every_forward_kernel_belongs_to_a_part():
    elsewhere = ("backward", "gradient", "adjoint", "step_", "conv", "norm", "mixing_chunk", "gated_inputs")
    forward = [name for name in TUNING if not any(word in name for word in elsewhere)]
    unclaimed = [name for name in forward if all("other" in part_of(stage, f"{name}_kernel") for stage in PARTS)]
    assert unclaimed == [], "add them to PARTS in dla_kernels/bench/parts.py"


def test_shares_of_parts_divide_a_stage_as_its_kernels_do():
    kernels = {
        "plan": [{"name": "drift_tables_kernel", "milliseconds": 3.0}, {"name": "elementwise", "milliseconds": 1.0}],
        "mixing": [
            {"name": "sweep_states_kernel", "milliseconds": 1.0},
            {"name": "mix_read_kernel", "milliseconds": 1.0},
        ],
    }
    shares = part_shares({"plan": 2.0, "mixing": 8.0}, kernels)
    assert shares == pytest.approx({"drift": 0.15, "plan: other": 0.05, "sweep": 0.4, "read": 0.4})


# In which order


def test_what_targets_need_comes_first():
    jobs = schedule(list(SHAPES), LENGTHS, [])
    first = [(job.kind, job.length) for job in jobs[:7]]
    assert first == [("layers", 16384)] * 2 + [("parts", 16384)] * 3 + [("decode", 0)] * 2
    variants = next(i for i, job in enumerate(jobs) if "frozen" in "".join(arm.name for arm in job.arms))
    core = [job.length for job in jobs[:variants] if job.kind == "layers" and job.regime == "dense"]
    assert sorted(set(core)) == LENGTHS and {job.kind for job in jobs[:variants]} >= {"batch_1", "decode", "parts"}
    names = {f"{job.shape}/{arm.name}" for job in jobs for arm in job.arms}
    assert {
        f"{shape}/dla_k{k}_{c}_{r}"
        for shape in SHAPES
        for k in (8, 30)
        for c in ("transition", "frozen")
        for r in ("slot", "content")
    } <= names


def test_arms_are_chosen_by_patterns():
    jobs = schedule(list(SHAPES), LENGTHS, ["mamba2/dla_k8*slot", "*/decode"])
    assert {job.kind for job in jobs} == {"layers", "decode"}
    assert {arm.name for job in jobs for arm in job.arms} == {"dla_k8_transition_slot", "dla_k8_frozen_slot"}
    assert {job.shape for job in jobs if job.arms} == {"mamba2"}


# What it decides


def results_with(**tables) -> dict:
    return {
        "environment": {"device": "H200", "torch": "2", "triton": "3", "python": "3.12", "fla": "0.6"},
        "options": {"tokens": 131072, "lengths": LENGTHS, "dtype": "bfloat16", "rounds": 5, "toy": False},
        "matrix_rate": {"tflops": {"median": 780.0}},
        "inputs": {"mamba2": {"dense": {"tau": 0.6, "boundary_rate": 0.75}}},
        "layers": [],
        "parts": [],
        "decode": [],
        "left_out": [],
    } | tables


def record(shape, arm, length, milliseconds, *, batch=None, kind="layers", peak=2**30, **more) -> dict:
    return {
        "kind": kind,
        "shape": shape,
        "arm": arm,
        "regime": "dense",
        "length": length,
        "batch": batch or 131072 // length,
        "pass": "forward_backward",
        "status": "ok",
        "peak_bytes": peak,
        "milliseconds": {"median": milliseconds},
    } | more


def verdict(name: str, results: dict):
    return judge(results)[name]["met"]


K30, K8 = DYNAMIC.format(30), DYNAMIC.format(8)


def test_log_linear_is_beaten_in_time_and_memory_at_every_length_or_not_at_all():
    def rows(time=1.0, peak=1, arm="fla_log_linear"):
        dla = [record("mamba2", K30, t, time, peak=peak) for t in LENGTHS]
        return results_with(layers=dla + [record("mamba2", arm, t, 2.0, peak=2) for t in LENGTHS])

    assert verdict("log_linear", rows()) is True
    assert verdict("log_linear", rows(arm="log_linear")) is True, "ours stands in where fla is absent"
    assert verdict("log_linear", rows(time=3.0)) is False
    assert verdict("log_linear", rows(peak=3)) is False
    short = rows()
    short["layers"] = [r for r in short["layers"] if r["length"] != 8192]
    assert verdict("log_linear", short) is None
    below = rows()
    below["layers"] = [
        r | {"milliseconds": {"median": 9.0}} if (r["arm"], r["length"]) == (K30, 2048) else r for r in below["layers"]
    ]
    assert verdict("log_linear", below) is True, "2K is not asked for"


def test_the_single_state_limits_each_capacity_by_its_own_factor():
    def rows(k30, k8):
        pairs = ((K30, k30), (K8, k8), ("single", 0.1), ("fla_single", 1.0))
        return results_with(layers=[record("gated_deltanet", arm, 16384, time) for arm, time in pairs])

    assert verdict("single_state", rows(3.9, 1.9)) is True
    assert verdict("single_state", rows(4.1, 1.9)) is False
    assert verdict("single_state", rows(3.9, 2.1)) is False
    assert judge(rows(3.9, 1.9))["single_state"]["numbers"]["K = 8"]["against"] == "fla_single"
    assert verdict("single_state", results_with()) is None


def test_attention_must_be_beaten_from_16k_and_fourfold_at_64k():
    def rows(at_64k=4.0, at_16k=1.5):
        times = {16384: at_16k, 32768: 2.0, 65536: at_64k, 131072: 8.0}
        layers_ = [
            record(shape, arm, t, time if arm != K30 else 1.0)
            for shape in ("mamba2", "gated_deltanet")
            for arm in (K30, "flash_attention")
            for t, time in times.items()
        ]
        return results_with(layers=layers_)

    assert verdict("attention", rows()) is True
    assert verdict("attention", rows(at_64k=3.9)) is False
    assert verdict("attention", rows(at_16k=0.9)) is False


def test_growth_is_that_of_one_sequence_and_the_constant_work_stands_beside_it():
    def rows(ratio):
        found = []
        for shape in ("mamba2", "gated_deltanet"):
            for doublings, length in enumerate(LENGTHS[2:]):
                found.append(record(shape, K30, length, ratio**doublings, kind="batch_1", batch=1))
                found.append(record(shape, K30, length, 1.1**doublings))
        return results_with(layers=found)

    assert verdict("growth", rows(2.05)) is True
    assert verdict("growth", rows(2.15)) is False
    numbers = judge(rows(2.05))["growth"]["numbers"]["mamba2, 16384/8192"]
    assert numbers == pytest.approx({"batch 1": 2.05, "constant B T": 2.2})


@pytest.mark.parametrize("share, plan, met", [(0.36, 0.19, True), (0.34, 0.21, False)])
def test_mixing_rate_and_planner_share_are_compared_with_their_limits(share, plan, met):
    row = {
        "shape": "mamba2",
        "arm": K30,
        "length": 16384,
        "mixing_share_of_matrix_rate": share,
        "stage_shares": {"plan": plan},
    }
    frozen = row | {"arm": "dla_k30_frozen_content", "mixing_share_of_matrix_rate": 0.0, "stage_shares": {"plan": 1.0}}
    results = results_with(parts=[row, frozen])
    assert verdict("matrix_rate", results) is met and verdict("planner", results) is met
    assert verdict("matrix_rate", results_with()) is None


def test_decoding_is_judged_by_its_graph_over_the_whole_range():
    def rows(latency, size=100, longest=131072):
        return results_with(
            decode=[
                {
                    "shape": "mamba2",
                    "batch": 1,
                    "context": c,
                    "bytes": b,
                    "eager": {"median": e},
                    "graph": {"median": g},
                }
                for c, b, e, g in ((1024, 100, 9.0, 1.0), (longest, size, 1.0, latency))
            ]
        )

    assert verdict("decode", rows(1.04)) is True
    assert verdict("decode", rows(1.06)) is False
    assert verdict("decode", rows(1.0, size=106)) is False
    assert verdict("decode", rows(1.0, longest=65536)) is None


def test_a_failed_arm_counts_as_not_measured():
    failed = record("gated_deltanet", K30, 16384, 1.0, status="failed", detail="x")
    others = [record("gated_deltanet", arm, 16384, 1.0) for arm in (K8, "single")]
    assert verdict("single_state", results_with(layers=[failed, *others])) is None


def test_a_second_run_replaces_what_it_measured_again_and_keeps_the_rest():
    old = results_with(layers=[record("mamba2", K30, t, 1.0) for t in (4096, 8192)])
    new = results_with(layers=[record("mamba2", K30, 8192, 2.0)], inputs={})
    found = {r["length"]: r["milliseconds"]["median"] for r in merged(old, new)["layers"]}
    assert found == {4096: 1.0, 8192: 2.0}
    assert "mamba2" in merged(old, new)["inputs"]


def test_the_page_shows_numbers_failures_and_verdicts():
    results = results_with(
        layers=[
            record("mamba2", K30, 16384, 12.34),
            record("mamba2", K30, 16384, 4.56, **{"pass": "forward"}),
            record("mamba2", "flash_attention", 16384, 1.0, status="out_of_memory", detail="no memory"),
        ],
        left_out=[{"job": "decode mamba2", "reason": "the time was up"}],
    )
    text = markdown(results | {"targets": judge(results)})
    for part in (
        f"| {K30} | 4.56 / 12.3, 1 |",
        "| flash_attention | out of memory |",
        "no memory",
        "| decode mamba2 | left out |",
        "780 TFLOP/s",
        "not measured",
    ):
        assert part in text, part
    assert all(claim in text for claim, _ in TARGETS.values())


# The program


def test_a_toy_run_measures_writes_and_prints_everything(tmp_path, capsys):
    arms = "mamba2/dla_k30_transition_content,gated_deltanet/single,mamba2/flash_attention,mamba2/decode,mamba2/parts"
    code = main(
        [
            "--toy",
            "--device=cpu",
            f"--output={tmp_path}",
            "--rounds=1",
            "--tokens=32",
            "--lengths=16,32",
            f"--arms={arms}",
        ]
    )
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert code == 0 and results["left_out"] == []
    assert {r["status"] for r in results["layers"]} == {"ok"}
    assert {(r["kind"], r["regime"]) for r in results["layers"]} >= {
        ("layers", "dense"),
        ("layers", "sparse"),
        ("batch_1", "dense"),
    }
    assert {(r["length"], r["batch"]) for r in results["layers"] if r["kind"] == "layers"} == {(16, 2), (32, 1)}
    assert all(r["milliseconds"]["median"] > 0 for r in results["layers"])
    assert abs(sum(results["parts"][0]["part_shares"].values()) - 1) < 1e-6
    assert results["parts"][0]["mixing_share_of_matrix_rate"] > 0
    assert len(results["decode"]) == 6 and results["environment"]["fla"].startswith("not measured")
    assert set(results["targets"]) == set(TARGETS)
    assert "| target | measured |  |" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json"]


def test_a_killed_run_leaves_what_it_had(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    calls = iter(range(100))

    def forward(self, training):
        if next(calls) >= 8:
            raise Killed
        return self.weights.sum()

    monkeypatch.setattr(MemoryLayer, "forward", forward)
    with pytest.raises(Killed):
        main(
            ["--toy", "--device=cpu", f"--output={tmp_path}", "--lengths=16", "--arms=mamba2/single,mamba2/log_linear"]
        )
    found = json.loads((tmp_path / "kernels.json").read_text())["layers"]
    assert [r["status"] for r in found] == ["ok"] * 4


def test_compiling_processes_divide_the_arms_among_them(monkeypatch):
    done: list[str] = []
    monkeypatch.setattr(session, "_run_once", lambda options, arm, shape, inputs: done.append(f"{shape} {arm.name}"))
    options = session.Options(CPU, Path(), 64, [16], ["*/dla*", "*/single"], 1.0, 1, 2, None, True)
    for index in range(2):
        session.compile_one_of(options, index, 2)
    assert len(done) == len(set(done)) == 3 * 9


def test_processes_run_side_by_side_and_a_late_one_is_stopped():
    codes = ["pass", "raise SystemExit(3)", "import time; time.sleep(60)"]
    done = run_at_once([[sys.executable, "-S", "-c", code] for code in codes], 1.0)
    assert done == {"processes": 3, "failed": 1, "stopped": 1}


def test_a_part_of_the_compiling_is_a_program_of_its_own(tmp_path, capsys):
    arguments = ["--toy", "--device=cpu", f"--output={tmp_path}", "--arms=mamba2/single", "--compile-part=0/1"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir()), "it writes no results, and nothing failed"


def test_without_a_gpu_the_default_device_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([f"--output={tmp_path}"]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_results_are_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
