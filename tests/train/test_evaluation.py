"""Published tasks during training: when, what they say, that they disturb nothing, and what is refused at the start."""

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from dla_train.checkpoint.folders import complete_steps
from dla_train.config import Config, ConfigError
from dla_train.data.tokenizer import Tokenizer, load_tokenizer
from dla_train.harness import asking, planned
from dla_train.harness.errors import EvaluateError
from dla_train.harness.evaluation import evaluate
from dla_train.harness.model import DlaModel
from dla_train.harness.settings import EvaluateConfig, SuiteConfig, Unit
from dla_train.hydra_app import compose
from dla_train.resilience.exit_codes import read_status
from dla_train.resilience.watchdog import Watchdog
from dla_train.train import train
from tests.harness.local_data import write_local_data
from tests.train.runs import TINY, numbers_of, run_training, tensors_of

MakeConfig = Callable[..., Config]
TASKS = ("piqa", "lambada_openai", "swde", "niah_single_1")
"""By likelihood with solved examples left out, by likelihood with a perplexity, by an answer, and a needle."""
UNITS = ("piqa", "lambada_openai", "swde", "niah_single_1_800")
FEW = ("evaluation.tasks=[piqa,lambada_openai]", "evaluation.max_length=300")
RICH = ("memory=dla_rate", "memory.capacity_rule=random")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_local_data(tmp_path_factory.mktemp("documents"), documents=7, few_shot=True)


@pytest.fixture
def evaluated(tiny: MakeConfig, data: Path) -> MakeConfig:
    """`tiny` with two tasks on local data."""
    return lambda *overrides: tiny(*FEW, f"evaluation.data_dir={data}", *overrides)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = DlaModel._answers

    def short(self: DlaModel, prompts: Any, new_tokens: int, until: Any) -> Iterator[Any]:
        return whole(self, prompts, min(new_tokens, 4), until)

    monkeypatch.setattr(DlaModel, "_answers", short)


def tasks_of(run_dir: str | Path) -> list[tuple[int, dict[str, float]]]:
    """(step, its numbers) of every line of published tasks."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [(line.pop("step"), line) for line in lines if any(name.startswith("eval/") for name in line)]


def at_step(run_dir: str | Path, step: int) -> dict[str, float]:
    return {name: value for at, numbers in tasks_of(run_dir) if at == step for name, value in numbers.items()}


def on_checkpoint(config: Config, step: int, output: Path, *, lengths: list[int] | None = None) -> dict[str, float]:
    """What `dla-evaluate` finds in the checkpoint of a step, under the names of a run."""
    chosen = config.evaluation
    settings = EvaluateConfig(
        run=config.run_dir,
        step=step,
        suite=SuiteConfig(name="all", tables={"all": chosen.tasks}, lengths=lengths or [], samples=500),
        limit=chosen.limit,
        num_fewshot=chosen.num_fewshot,
        max_length=chosen.max_length,
        data_dir=chosen.data_dir,
        batch_tokens=chosen.batch_tokens,
        decode_rows=chosen.decode_rows,
        bos=chosen.bos,
        output=str(output),
        progress=False,
    )
    units = json.loads((evaluate(settings) / "results.json").read_text())["units"]
    found = {}
    for name, unit in units.items():
        for metric, numbers in unit["metrics"].items():
            found[f"eval/{name}/{metric}"] = numbers["value"]
            if numbers["stderr"] is not None:
                found[f"eval/{name}/{metric}_stderr"] = numbers["stderr"]
    return found


def test_tasks_come_at_their_interval_and_at_the_end_with_standard_errors(evaluated: MakeConfig) -> None:
    config = evaluated("evaluation.interval_steps=3", "logging.tensorboard=true")
    train(config)
    lines = tasks_of(config.run_dir)
    assert [step for step, _ in lines] == [3, 3, 6, 6, 8, 8]
    assert set(lines[0][1]) == {f"eval/piqa/{name}" for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")}
    assert set(lines[1][1]) == {
        f"eval/lambada_openai/{name}" for name in ("acc", "acc_stderr", "perplexity", "perplexity_stderr")
    }
    perplexities = [numbers["eval/lambada_openai/perplexity"] for _, numbers in lines[1::2]]
    assert len(set(perplexities)) == 3  # of other weights each time
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{config.run_dir}/tensorboard")
    events.Reload()
    assert [event.step for event in events.Scalars("eval/lambada_openai/perplexity")] == [3, 6, 8]


def test_without_an_interval_tasks_come_at_the_end_and_without_tasks_never(
    evaluated: MakeConfig, tiny: MakeConfig, tmp_path: Path
) -> None:
    config = evaluated()
    train(config)
    assert [step for step, _ in tasks_of(config.run_dir)] == [8, 8]
    train(tiny(f"run_dir={tmp_path}/none"))
    assert tasks_of(tmp_path / "none") == []


def test_the_numbers_are_those_of_dla_evaluate_on_the_checkpoint_of_the_step(
    evaluated: MakeConfig, data: Path, tmp_path: Path
) -> None:
    config = evaluated(
        f"evaluation.tasks=[{','.join(TASKS)}]",
        "evaluation.lengths=[800]",
        "evaluation.limit=2",
        "evaluation.bos=true",
        "evaluation.batch_tokens=300",
        "evaluation.decode_rows=2",
    )
    train(config)
    found = at_step(config.run_dir, 8)
    assert {name.split("/")[1] for name in found} == set(UNITS)
    assert found == on_checkpoint(config, 8, tmp_path / "out", lengths=[800])


def test_solved_examples_are_the_same_at_every_evaluation(
    evaluated: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, scores = [], DlaModel._scores

    def noted(self: DlaModel, requests: Any) -> Iterator[Any]:
        asked.append([request.inputs for request in requests])
        return scores(self, requests)

    monkeypatch.setattr(DlaModel, "_scores", noted)
    train(evaluated("evaluation.tasks=[piqa]", "evaluation.num_fewshot=2", "evaluation.interval_steps=4"))
    assert len(asked) == 2 and asked[0] == asked[1]
    assert min(map(len, asked[0])) > 60  # solved examples are there


def test_evaluations_change_no_bit_of_the_run_also_where_it_is_resumed_around_one(
    tiny: MakeConfig, evaluated: MakeConfig, tmp_path: Path
) -> None:
    plain = tiny(*RICH)
    train(plain)
    often = [*RICH, "evaluation.interval_steps=2", f"run_dir={tmp_path}/often"]
    before = random.getstate(), np.random.get_state()[1].tolist()
    for stop in (2, 3, 8):
        train(evaluated(*often, f"train.stop_at_step={stop}"))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    train(evaluated(*RICH, "evaluation.interval_steps=2", f"run_dir={tmp_path}/whole"))
    assert [step for step, _ in tasks_of(tmp_path / "often")] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert tasks_of(tmp_path / "often") == tasks_of(tmp_path / "whole")
    names = ("loss", "grad_norm", "lr", "boundary_rate", "live_slots", "tau")
    without = tensors_of(plain.run_dir, 8)
    for run in ("often", "whole"):
        assert numbers_of(tmp_path / run, *names) == numbers_of(plain.run_dir, *names)
        tensors = tensors_of(tmp_path / run, 8)
        assert without.keys() == tensors.keys()
        assert [name for name in without if not torch.equal(without[name], tensors[name])] == []


@pytest.mark.parametrize("step", [4, 8])
def test_a_signal_ends_an_evaluation_with_everything_saved_and_the_next_start_does_what_is_left(
    evaluated: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    settings = ("evaluation.interval_steps=4", "evaluation.batch_tokens=64")
    whole = evaluated(*settings, f"run_dir={tmp_path}/whole")
    train(whole)
    config, scores, late = evaluated(*settings), DlaModel._scores, []

    def interrupted(self: DlaModel, requests: Any) -> Iterator[Any]:
        for found in scores(self, requests):
            if self.title == "lambada_openai" and at_step(config.run_dir, step):  # the other task is done
                late.append(complete_steps(Path(config.run_dir) / "checkpoints"))
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(DlaModel, "_scores", interrupted)
        result = train(config)
    assert (result.step, result.stopped_by) == (step, "SIGTERM")
    status = read_status(Path(config.run_dir))
    assert status is not None and status["state"] == "stopped"
    assert {name.split("/")[1] for name in at_step(config.run_dir, step)} == {"piqa"}
    assert len(late) == 1  # it ended after the first of many batches
    assert step == 4 or late == [[8]]  # what an evaluation at the end may not put at risk was saved before it
    asked: list[str] = []

    def ask(model: Any, unit: Unit, *rest: Any) -> Any:
        asked.append(unit.name)
        return asking.ask(model, unit, *rest)

    monkeypatch.setattr("dla_train.harness.in_training.ask", ask)
    assert train(config).stopped_by == ""
    assert asked[:2] == ["piqa", "lambada_openai"]  # rehearsed
    assert asked[2:] == ["lambada_openai", *(["piqa", "lambada_openai"] if step == 4 else [])]
    assert tasks_of(config.run_dir) == tasks_of(whole.run_dir)
    a, b = (tensors_of(one.run_dir, 8) for one in (config, whole))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_finished_run_that_is_started_again_asks_nothing(
    evaluated: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluated()
    train(config)
    monkeypatch.setattr(DlaModel, "_scores", lambda *arguments: pytest.fail("asked"))
    before = tasks_of(config.run_dir)
    train(config)
    assert tasks_of(config.run_dir) == before


def test_every_task_has_the_time_of_its_own_phase(evaluated: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []
    enter = Watchdog.enter
    limits: list[float] = []

    def note(self: Watchdog, phase: str) -> None:
        entered.append(phase)
        limits.append(self._limits.get(phase, 0.0))
        enter(self, phase)

    monkeypatch.setattr(Watchdog, "enter", note)
    train(evaluated("resilience.evaluation_minutes=7"))
    assert entered.count("evaluation") == 3  # begun, and anew after each of two tasks
    assert {limit for phase, limit in zip(entered, limits, strict=True) if phase == "evaluation"} == {420.0}


# ---- what is refused when the run starts ----


def refused(config: Config, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        train(config)
    assert not Path(config.run_dir).exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.tasks=[piqua]"], "evaluation.tasks: piqua is not a task .* did you mean piqa"),
        (["evaluation.tasks=[niah_single_1]"], r"evaluation.lengths=\[\] gives niah_single_1 no length"),
        (["evaluation.lengths=[512]"], r"evaluation.lengths=\[512\] is of needle tasks"),
        (["evaluation.num_fewshot=2"], "evaluation.num_fewshot=2 needs solved examples, which lambada_openai have not"),
    ],
)
def test_tasks_that_cannot_be_asked_are_an_error_at_the_start(
    evaluated: MakeConfig, overrides: list[str], message: str
) -> None:
    refused(evaluated(*overrides), ConfigError, message)


def test_prompts_begin_with_bos_as_documents_do_or_as_is_asked(
    evaluated: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(evaluated().data.tokenizer)
    without = SimpleNamespace(name="plain", bos_id=None)
    for trained in (False, True):
        monkeypatch.setattr(planned, "trained_with_bos", lambda data, trained=trained: trained)
        assert planned.prompts_with_bos(evaluated(), tokenizer) is trained
        assert planned.prompts_with_bos(evaluated("evaluation.bos=true"), tokenizer)
        assert not planned.prompts_with_bos(evaluated("evaluation.bos=false"), tokenizer)
        assert not planned.prompts_with_bos(evaluated(), cast(Tokenizer, without))
    with pytest.raises(ConfigError, match="evaluation.bos=true, but tokenizer plain has no BOS; set it to false"):
        planned.prompts_with_bos(evaluated("evaluation.bos=true"), cast(Tokenizer, without))


def test_absent_and_damaged_documents_are_an_error_at_the_start(evaluated: MakeConfig, tmp_path: Path) -> None:
    folder = write_local_data(tmp_path / "documents")
    config = evaluated(f"evaluation.data_dir={folder}")
    path = folder / "piqa/validation.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], '{"goal": "x"}']))
    refused(config, EvaluateError, "validation.jsonl, line 3, lacks sol1, sol2, label.*dla-evaluate fetch")
    path.unlink()
    refused(config, EvaluateError, "piqa/validation.jsonl cannot be read .*dla-evaluate fetch .*data_dir=")
    needles = ["evaluation.tasks=[niah_single_2]", "evaluation.lengths=[1200]"]
    (folder / "needles/haystack.txt").write_text("A short text.")
    refused(evaluated(f"evaluation.data_dir={folder}", *needles), EvaluateError, "give a longer text")


def test_a_question_that_does_not_fit_is_an_error_at_the_start(evaluated: MakeConfig) -> None:
    message = "evaluation of swde: max_length=32 leaves no room for a prompt .* raise max_length"
    refused(evaluated("evaluation.tasks=[swde]", "evaluation.max_length=null"), EvaluateError, message)


def test_lm_eval_that_is_not_installed_is_an_error_at_the_start(
    evaluated: MakeConfig, tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "find_spec", lambda name: None)
    refused(evaluated(), ConfigError, r"needs lm_eval, which is not installed.*dla-train\[evaluate\]")
    assert train(tiny("train.stop_at_step=1")).step == 1  # without tasks nobody asks for it


# ---- on several ranks ----

LAYOUTS: dict[str, list[str]] = {
    "data": [],
    "tensor": ["parallel.tensor=2", "parallel.sequence=true"],
    "zero3_context": ["engine=deepspeed", "engine.zero_stage=3", "parallel.context=2"],
    "rounded": ["engine=deepspeed", "engine.zero_stage=1", "engine.weights=bfloat16", "train.dtype=bfloat16"],
}


@pytest.fixture(scope="session")
def layouts(corpus: list[str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Settings of finished runs on two ranks, by layout, and of `data_plain`, which evaluated nothing."""
    folder = tmp_path_factory.mktemp("layouts")
    asked = [
        "evaluation.tasks=[piqa,lambada_openai]",
        f"evaluation.data_dir={data}",
        "evaluation.max_length=300",
        "evaluation.batch_tokens=200",
        "evaluation.interval_steps=4",
    ]
    few = [*TINY, *corpus, *RICH, "train.micro_batch_rows=2", "train.stop_at_step=4"]

    def run(name: str, *overrides: str) -> list[str]:
        return [*few, f"name={name}", f"run_dir={folder}/{name}", *overrides]

    runs = {name: run(name, *LAYOUTS[name], *asked) for name in LAYOUTS}
    runs |= {f"{name}_plain": run(f"{name}_plain", *LAYOUTS[name]) for name in ("data", "zero3_context")}
    run_training(folder / "two.json", list(runs.values()), ranks=2)
    return runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_two_ranks_the_numbers_are_those_of_one_rank_on_the_checkpoint(
    layouts: dict[str, list[str]], layout: str, tmp_path: Path
) -> None:
    config = compose(layouts[layout])
    found = at_step(config.run_dir, 4)
    assert {name.split("/")[1] for name in found} == {"piqa", "lambada_openai"}
    assert found == on_checkpoint(config, 4, tmp_path / "out")
    assert [step for step, _ in tasks_of(config.run_dir)] == [4, 4]  # one rank writes


@pytest.mark.parametrize("layout", ["data", "zero3_context"])
def test_on_two_ranks_evaluations_change_no_bit_of_the_run(layouts: dict[str, list[str]], layout: str) -> None:
    runs = [next(word for word in layouts[name] if word.startswith("run_dir=")) for name in (layout, f"{layout}_plain")]
    evaluated, plain = (tensors_of(word.removeprefix("run_dir="), 4) for word in runs)
    assert evaluated.keys() == plain.keys() and {"rng/0/cpu", "rng/1/cpu"} <= plain.keys()
    assert [name for name in plain if not torch.equal(plain[name], evaluated[name])] == []
