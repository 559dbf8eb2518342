"""The measuring programs above the kernels: the CPU's, training steps, and the pages and pictures of both."""

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dla_kernels.bench.inputs import TAU, boundary_rate, layer_inputs
from dla_kernels.bench.measure import Stopwatch
from dla_train.bench import cpu, layouts, training
from dla_train.bench.__main__ import PROGRAMS, main
from dla_train.bench.cpu import BACKBONES, SMALL, Timing, layer_seconds, measure_in_turn, table
from dla_train.bench.render import kernels_page, render, training_page
from dla_train.bench.training import ARMS, Trainer, configuration, judge, measure_steps
from dla_train.config_rules import validate
from dla_train.models import language_model

# The CPU


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_measured_layer_opens_slots_as_often_as_text_does(backbone):
    assert 0.7 < boundary_rate(layer_inputs(SMALL.of(backbone), 1, 2048), TAU, "torch") < 0.8


@pytest.mark.parametrize("backend", ["torch", "recurrent"])
def test_a_layer_is_timed_with_and_without_gradients(backend):
    assert layer_seconds("gated_deltanet", 40, backend, backward=True) > 0
    assert layer_seconds("mamba2", 40, backend, backward=False) > 0
    assert torch.is_grad_enabled()


def test_things_are_timed_in_turn_and_the_first_round_is_not_counted():
    calls: list[str] = []

    def thing(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    timings = measure_in_turn({"a": lambda: thing("a"), "b": lambda: thing("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert timings["a"] == Timing([3.0, 5.0, 7.0]) and timings["b"].median == 6.0


def test_the_table_holds_every_number_and_its_target():
    results = {
        "environment": {"shape": "S", "torch": "2", "threads": 2, "python": "3"},
        "against_token_loop": {"mamba2, forward": {"ratio": 21.4, "boundary_rate": 0.75}},
        "growth_with_length": {"mamba2": {"ratios": {"4096/2048": 1.987}}},
        "trainer_overhead": {"median": 0.012, "least": 0.01, "most": 0.02, "steps": 9},
    }
    text = table(results)
    for part in (
        "| mamba2, forward | 0.75 | 21 | 20 |",
        "| mamba2, 4096/2048 | 1.99 | 2.2 |",
        "| 1.2% | 5% |",
    ):
        assert part in text


def test_the_table_of_layouts_holds_every_share_and_its_target():
    share = {"median": 0.034, "least": 0.01, "most": 0.041, "steps": 9, "seconds": 2.0, "exchange": 0.012}
    text = layouts.table({"environment": {"torch": "2", "python": "3"}, "layouts": {"data 4": share}})
    assert "| data 4 | 3.4% (1.0% to 4.1%) | 1.2% | 5% |" in text


@pytest.mark.parametrize("cuda", [False, True])
def test_kernels_are_measured_where_there_is_a_gpu_and_elsewhere_it_says_so(tmp_path, monkeypatch, capsys, cuda):
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(cpu, "measure_cpu", lambda output, rounds, steps: done.append(f"cpu {rounds} {steps}"))
    for module in ("dla_kernels.bench.__main__", "dla_train.bench.render"):
        monkeypatch.setattr(f"{module}.main", lambda arguments, module=module: bool(done.append(module)))
    assert main([f"--output={tmp_path}", "--rounds=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    if cuda:
        assert done == ["cpu 3 12", "dla_kernels.bench.__main__", "dla_train.bench.render"] and lines == []
    else:
        assert done == ["cpu 3 12"] and len(lines) == 1 and "need a CUDA device" in lines[0]


# Training steps


@pytest.mark.parametrize("model, memory", ARMS)
def test_measured_configurations_are_the_papers(model, memory):
    config = configuration(model, memory, toy=False)
    validate(config)
    assert config.model.name == model and config.memory.policy == memory
    assert (config.data.context_tokens, config.train.dtype, config.train.recompute) == (16384, "bfloat16", True)
    assert memory != "dla" or config.memory.capacity == 30


def test_a_toy_run_trains_every_setting_and_records_it(tmp_path):
    arms = "--arms=mamba2_780m/dla,transformer_778m/none"
    code = main(["training", "--toy", "--device=cpu", "--steps=2", "--contexts=24", f"--output={tmp_path}", arms])
    found = json.loads((tmp_path / "training.json").read_text())
    assert code == 0 and found["left_out"] == []
    assert [(r["model"], r["recompute"], r["status"]) for r in found["steps"]] == [
        (model, recompute, "ok") for model in ("mamba2_780m", "transformer_778m") for recompute in (True, False)
    ]
    for record in found["steps"]:
        assert record["tokens_per_second"]["median"] > 0 and record["flops_per_token"] > 0
        assert sum(record["phases"].values()) == pytest.approx(record["milliseconds"]["median"], rel=0.5)
        assert set(record["phases"]) == {"forward", "backward", "step"}
    dynamic, attention = found["steps"][0], found["steps"][2]
    assert 0 < dynamic["boundary_rate"] <= 1 and 1 <= dynamic["live_slots"] <= 30
    assert attention["boundary_rate"] is None
    for profile in found["profiles"]:
        assert len(profile["top"]) == 5 and 0 < sum(kernel["share"] for kernel in profile["top"]) <= 1
    assert {target["met"] for target in found["targets"].values()} == {None}


def test_a_step_recomputes_where_it_should_and_moves_every_parameter(monkeypatch):
    recomputed: list[object] = []

    def counted(block, *inputs, **options):
        recomputed.append(block)
        return checkpoint(block, *inputs, **options)

    monkeypatch.setattr(language_model, "checkpoint", counted)
    trainer = Trainer(configuration("transformer_778m", "none", toy=True), torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    found = [measure_steps(trainer, 8, 2, recompute, 1, Stopwatch(torch.device("cpu"))) for recompute in (False, True)]
    assert len(recomputed) == 2 * trainer.config.model.num_layers, "one step to warm up, one timed"
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    speed, milliseconds = (found[0][key]["median"] for key in ("tokens_per_second", "milliseconds"))
    assert speed * milliseconds == pytest.approx(16 * 1000)


def test_checkpoints_are_measured_beside_plain_files_and_plain_steps(tmp_path):
    arguments = ["checkpoint", "--model=gated_deltanet_tiny", "--rounds=1"]
    assert main([*arguments, f"--output={tmp_path}", f"--folder={tmp_path}"]) == 0
    found = json.loads((tmp_path / "checkpoint.json").read_text())
    assert all(seconds > 0 for record in found["saving"] + found["loading"] for seconds in record.values())
    assert found["saving"][0]["bytes"] > 12 * 1.4e6 and len(found["overlap"][0]["disturbed_seconds"]) >= 1
    text = (tmp_path / "checkpoint.md").read_text()
    assert "| written, hashed and flushed |" in text and "| first step |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "checkpoint.md"]


def test_compiling_takes_one_step_of_one_layer(tmp_path, monkeypatch):
    steps: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        Trainer, "train", lambda self, context, rows: steps.append((len(self.model.blocks), context, rows))
    )
    assert main(["training", "--toy", "--device=cpu", f"--output={tmp_path}", "--compile=mamba2_780m/log_linear"]) == 0
    assert steps == [(1, 256, 1)] and not list(tmp_path.iterdir())


def test_an_arm_out_of_memory_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    def measured(trainer, context, rows, recompute, steps, stopwatch):
        if not recompute:
            raise torch.OutOfMemoryError("Tried to allocate 90 GiB")
        return {"tokens_per_second": {"median": 1.0, "least": 1.0, "most": 1.0}, "mfu": None, "peak_bytes": None}

    monkeypatch.setattr(training, "measure_steps", measured)
    monkeypatch.setattr(training, "costliest", lambda *given: [])
    monkeypatch.setattr(training, "Trainer", FakeTrainer)
    main(["training", "--toy", "--device=cpu", f"--output={tmp_path}", "--contexts=16", "--arms=*/single"])
    found = json.loads((tmp_path / "training.json").read_text())["steps"]
    assert [r["status"] for r in found] == ["ok", "out_of_memory"] * 2
    assert "90 GiB" in found[1]["detail"]


class FakeTrainer:
    """Takes no time."""

    def __init__(self, config, device):
        self.config = config

    def forget(self):
        pass


def speeds(dla: float, single: float, transformer: float, gated: float = 0.6, **changed) -> dict:
    rows = [
        ("mamba2_780m", "dla", dla),
        ("mamba2_780m", "single", single),
        ("transformer_778m", "none", transformer),
        ("gated_deltanet_1300m", "dla", gated),
        ("gated_deltanet_1300m", "single", 1.0),
    ]
    steps = [
        {
            "model": model,
            "memory": memory,
            "context": 16384,
            "rows": 1,
            "recompute": recompute,
            "status": "ok",
            "tokens_per_second": dict.fromkeys(("median", "least", "most"), speed if recompute else 7.0),
            "mfu": 0.31,
            "peak_bytes": 2**34,
            "boundary_rate": 0.75,
        }
        for model, memory, speed in rows
        for recompute in (True, False)
    ]
    results = {
        "environment": {"device": "NVIDIA H200", "torch": "2", "triton": "3", "python": "3"},
        "options": {"contexts": [16384]},
        "steps": steps,
        "profiles": [
            {
                "model": "mamba2_780m",
                "memory": "dla",
                "context": 16384,
                "top": [{"name": "void sweep<1, 2>(int)", "share": 0.42}],
            }
        ],
        "left_out": [{"job": "x/y", "reason": "the time was up"}],
    }
    return results | changed


def test_training_targets_are_met_or_missed_by_the_numbers():
    def verdicts(results):
        return {name: target["met"] for name, target in judge(results).items()}

    assert verdicts(speeds(0.5, 1.0, 0.4)) == {"single": True, "transformer": True}
    assert verdicts(speeds(0.49, 1.0, 0.4)) == {"single": False, "transformer": True}
    assert verdicts(speeds(0.6, 1.0, 0.6, gated=0.4)) == {"single": False, "transformer": False}
    longer = speeds(0.6, 1.0, 0.5, options={"contexts": [16384, 32768]})
    assert verdicts(longer) == {"single": True, "transformer": None}
    assert verdicts(speeds(1, 1, 1, steps=[])) == {"single": None, "transformer": None}


# Pages and pictures


def kernel_results() -> dict:
    def row(arm: str, length: int, milliseconds: float, which: str) -> dict:
        return {
            "kind": "layers",
            "shape": "mamba2",
            "arm": arm,
            "regime": "dense",
            "length": length,
            "batch": 131072 // length,
            "pass": which,
            "status": "ok",
            "peak_bytes": 2**31,
            "milliseconds": {"median": milliseconds},
        }

    arms = {"dla_k30_transition_content": 30.0, "single": 5.0, "flash_attention": 90.0}
    shares = {"plan": 0.18, "affinity": 0.1, "weights": 0.02, "mixing": 0.7}
    return {
        "environment": {"device": "NVIDIA H200", "torch": "2", "triton": "3", "python": "3", "fla": "absent"},
        "options": {"tokens": 131072, "lengths": [16384, 65536], "dtype": "bfloat16", "rounds": 5},
        "matrix_rate": {"tflops": {"median": 780.0}},
        "inputs": {},
        "layers": [
            row(arm, length, milliseconds * (1 + 2 * (arm == "flash_attention") * (length > 20000)), which)
            for arm, milliseconds in arms.items()
            for length in (16384, 65536)
            for which in ("forward", "forward_backward")
        ],
        "parts": [
            {
                "shape": "mamba2",
                "arm": "dla_k30_transition_content",
                "length": 16384,
                "milliseconds": 10.0,
                "stage_shares": shares,
                "part_shares": {"drift": 0.18, "affinity": 0.12, "sweep": 0.4, "read": 0.3},
                "live_slots": 29.9,
                "mixing_tflops": 300.0,
                "mixing_share_of_matrix_rate": 0.385,
            }
        ],
        "decode": [
            {
                "shape": "mamba2",
                "batch": 1,
                "context": context,
                "bytes": 12345,
                "eager": {"median": 0.3},
                "graph": {"median": 0.05},
            }
            for context in (1024, 131072)
        ],
        "left_out": [],
    }


def assert_picture(path: Path) -> None:
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 200 and pixels.shape[1] > 400
    assert pixels[..., :3].std() > 0.05, "the picture is blank"


def test_pages_and_pictures_are_made_from_the_json_alone(tmp_path, capsys):
    (tmp_path / "kernels.json").write_text(json.dumps(kernel_results()))
    (tmp_path / "training.json").write_text(json.dumps(speeds(0.6, 1.0, 0.5)))
    assert main(["render", f"--results={tmp_path}", f"--images={tmp_path / 'images'}"]) == 0
    printed = capsys.readouterr().out.split()
    pictures = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert pictures == ["kernels_decode.png", "kernels_layers.png", "kernels_parts.png", "training_speed.png"]
    for picture in pictures:
        assert_picture(tmp_path / "images" / picture)
    assert sorted(Path(path).name for path in printed) == ["kernels.md", *pictures[:3], "training.md", pictures[3]]


def test_the_kernels_page_judges_and_tabulates():
    text = kernels_page(kernel_results())
    for part in (
        "NVIDIA H200",
        "| single | 5 / 5, 2 |",
        "| 18% | 10% | 2% | 70% | 29.9 | 300 | 38% |",
        "| mamba2 | 1 | 1,024 | 0.3 |",
    ):
        assert part in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert rows["planning takes at most 20% of a forward pass at 16K"].endswith("| met |")
    assert rows["latency and cache of a step flat within 5% from 1K to 128K"].endswith("| met |")


def test_the_training_page_shows_speed_verdicts_kernels_and_gaps():
    text = training_page(speeds(0.6, 1.0, 0.7))
    for part in ("| 31.0% | 16.0 | 0.75 |", "met |", "**missed**", "`sweep` 42%", "| x/y | the time was up |"):
        assert part in text


def test_an_empty_folder_renders_nothing(tmp_path, capsys):
    assert render(tmp_path, tmp_path / "images") == []
    assert main(["render", f"--results={tmp_path}", f"--images={tmp_path}"]) == 2
    assert "measure first" in capsys.readouterr().err


def test_the_command_line_tells_apart_its_programs(monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr("dla_kernels.bench.__main__.main", lambda arguments: len(seen.append(arguments) or []))
    assert main(["kernels", "--toy", "--device=cpu"]) == 0
    assert seen == [["--toy", "--device=cpu"]]


def test_a_misspelt_program_is_told_which_there_are(capsys):
    assert main(["decod"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m dla_train.bench: error: decod is no program; choose from kernels, training, ")
    assert all(program in error for program in PROGRAMS) and error.count("\n") == 1
