"""An evaluation as a whole: what it leaves, what it does not repeat, how it goes on after a kill."""

import json

import pytest
import torch

from dla_train.checkpoint.errors import CheckpointError
from dla_train.checkpoint.stored import open_step
from dla_train.config import ConfigError
from dla_train.harness import model as model_module
from dla_train.harness.errors import EvaluateError
from dla_train.harness.evaluation import evaluate
from dla_train.harness.loading import open_run
from dla_train.harness.settings import compose
from tests.train.runs import run_python


@pytest.fixture
def words(run, data, tmp_path):
    """words(*more): a command line whose results go to tmp_path/out."""

    def of(*more):
        own = [f"run={run}", f"data_dir={data}", f"output={tmp_path}/out", "max_length=300", "progress=false"]
        return compose([*own, "tasks=[piqa,lambada_openai]", *more])

    return of


def values(output):
    units = json.loads((output / "results.json").read_text())["units"]
    return {name: unit["metrics"] for name, unit in units.items()}


def test_the_result_says_what_was_evaluated_how_and_on_what(words, run, data, tokenizer):
    output = evaluate(words("max_length=30", "batch_tokens=64"))
    results = json.loads((output / "results.json").read_text())
    folder = open_step(run)[0].folder
    assert results["checkpoint_manifest_sha256"] == (folder / "COMPLETE").read_text().split()[0]
    assert (results["step"], results["bos"], results["model"]["policy"]) == (3, False, "dla")
    assert results["versions"]["lm_eval"] and results["versions"]["torch"] == torch.__version__
    assert set(results["seeds"].values()) == {1234} and results["settings"]["batch_tokens"] == 64
    piqa = results["units"]["piqa"]
    assert piqa["documents"] == 3 and piqa["counts"]["requests"] == 6
    assert piqa["counts"]["truncated"] > 0 and piqa["counts"]["dropped_tokens"] > 0
    assert piqa["settings"]["tokenizer"] == tokenizer.fingerprint
    assert list(piqa["settings"]["documents"]) == ["piqa/validation.jsonl"]
    samples = [json.loads(line) for line in (output / "units/piqa.samples.jsonl").read_text().splitlines()]
    accuracy = sum(sample["acc"] for sample in samples) / 3
    assert piqa["metrics"]["acc"]["value"] == pytest.approx(accuracy)


def test_finished_tasks_are_not_repeated_and_a_new_one_is_added(words, monkeypatch):
    first = values(evaluate(words("tasks=[piqa]")))
    monkeypatch.setattr(model_module, "score", lambda *arguments, **bounds: pytest.fail("asked again"))
    assert values(evaluate(words("tasks=[piqa]"))) == first
    monkeypatch.undo()
    both = values(evaluate(words()))
    assert both["piqa"] == first["piqa"] and set(both) == {"piqa", "lambada_openai"}


def test_a_killed_evaluation_goes_on_inside_its_task_and_ends_alike(words, tmp_path, monkeypatch):
    whole = values(evaluate(words(f"output={tmp_path}/whole", "batch_tokens=40")))
    score = model_module.score
    batches = []

    def killed(model, requests, **bounds):
        for number, batch in enumerate(score(model, requests, **bounds)):
            yield batch
            if number == 1:
                raise KeyboardInterrupt

    def counted(model, requests, **bounds):
        batches.append(len(requests))
        return score(model, requests, **bounds)

    monkeypatch.setattr(model_module, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(words("batch_tokens=40", "tasks=[piqa]"))
    assert not (tmp_path / "out/results.json").exists()
    monkeypatch.setattr(model_module, "score", counted)
    output = evaluate(words("batch_tokens=40"))
    assert values(output) == whole
    assert batches[-1] < 6 and list((output / "units").glob("*.journal")) == []
    piqa = json.loads((output / "units/piqa.json").read_text())
    assert piqa["counts"]["answered_before"] == 6 - batches[-1]


@pytest.mark.parametrize("changed", ["seed=5", "limit=2", "bos=true", "max_length=200", "step=2", "num_fewshot=1"])
def test_results_of_other_settings_are_neither_overwritten_nor_mixed(words, data, changed):
    evaluate(words("tasks=[piqa]"))
    key = {"step": "checkpoint"}.get(changed.partition("=")[0], changed.partition("=")[0])
    with pytest.raises(EvaluateError, match=f"piqa.json is of another evaluation: .*{key} is .* Choose another output"):
        evaluate(words("tasks=[piqa]", changed))


def test_changed_documents_are_another_evaluation(words, data, tmp_path):
    own = tmp_path / "data/piqa/validation.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text((data / "piqa/validation.jsonl").read_text())
    evaluate(words("tasks=[piqa]", f"data_dir={tmp_path}/data"))
    own.write_text("\n".join(own.read_text().splitlines()[:2]) + "\n")
    with pytest.raises(EvaluateError, match="documents is"):
        evaluate(words("tasks=[piqa]", f"data_dir={tmp_path}/data"))


def test_what_is_wrong_is_found_before_the_first_task(words, run, data, tmp_path):
    for more, error, message in (
        (["data_dir=nowhere"], EvaluateError, "nowhere/lambada_openai/test.jsonl cannot be read"),
        (["step=7"], CheckpointError, "has no checkpoint of step 7; choose from 2, 3"),
        ([f"run={tmp_path}"], CheckpointError, "holds no complete checkpoint"),
        (["device=cuda"], ConfigError, "device=cuda, but PyTorch sees no CUDA device"),
        (
            ["suite=ruler", "tasks=[niah_single_2]", "max_length=null", f"haystack={tmp_path}/no.txt"],
            EvaluateError,
            "no.txt, which cannot be read",
        ),
        (
            ["suite=ruler", "tasks=[niah_single_2]", "max_length=null", "data_dir=null"],
            EvaluateError,
            "name one with haystack=FILE, or set data_dir",
        ),
    ):
        if more == ["device=cuda"] and torch.cuda.is_available():
            continue
        with pytest.raises(error, match=message):
            evaluate(words(*more))
    assert not (tmp_path / "out").exists()


def test_a_context_longer_than_the_memory_holds_is_refused(words, run, monkeypatch):
    opened = open_run(str(run))
    opened.config.memory.policy, opened.config.memory.capacity = "log_linear", 8
    monkeypatch.setattr("dla_train.harness.evaluation.open_run", lambda *arguments, **settings: opened)
    with pytest.raises(ConfigError, match="max_length: lambada_openai would be read in 300 .* holds at most 128"):
        evaluate(words())


def test_a_tokenizer_that_is_not_the_runs_is_refused(run, tmp_path):
    record = run / "run.json"
    kept = record.read_text()
    changed = json.loads(kept)
    changed["identity"]["tokenizer fingerprint"] = "0" * 64
    record.write_text(json.dumps(changed))
    try:
        with pytest.raises(EvaluateError, match="is not the one the run was trained with .000000000000"):
            open_run(str(run))
    finally:
        record.write_text(kept)


def test_bos_that_is_not_known_has_to_be_said(run, monkeypatch, tokenizer):
    monkeypatch.setattr("dla_train.harness.loading.expand_prefixes", lambda prefixes: ["elsewhere/tokens"])
    with pytest.raises(EvaluateError, match="elsewhere/tokens.json, .* say bos=true or bos=false"):
        open_run(str(run))
    assert open_run(str(run), bos=True).bos is True


def on_two_ranks(config):
    """dla-evaluate under torchrun, of the same settings."""
    keys = ("run", "data_dir", "output", "max_length", "batch_tokens", "decode_rows", "limit")
    words = [f"{key}={getattr(config, key)}" for key in keys]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dla_train.harness.command"]
    return run_python([*launcher, *words, f"tasks=[{','.join(config.tasks)}]", "progress=false"])


def test_two_ranks_go_on_where_one_was_killed_and_find_what_one_finds(words, tmp_path, monkeypatch):
    settings = ("batch_tokens=64", "decode_rows=1")
    alone = evaluate(words(*settings, f"output={tmp_path}/alone"))
    keep = model_module.DlaModel._keep

    def killed(model, found):
        keep(model, found)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_module.DlaModel, "_keep", killed)
        evaluate(words(*settings))
    done = on_two_ranks(words(*settings))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("## commonsense") == done.stdout.count("piqa: acc ") == 1  # rank 0 alone speaks
    together = tmp_path / "out"
    assert values(together) == values(alone)
    for name in ("piqa", "lambada_openai"):
        there, here = ((folder / f"units/{name}.samples.jsonl").read_text() for folder in (alone, together))
        assert there == here
    results = json.loads((together / "results.json").read_text())
    counts = [results["units"][name]["counts"] for name in ("lambada_openai", "piqa")]
    assert counts[0]["answered_before"] > 0 == counts[1]["answered_before"]
    assert results["device"]["ranks"] == 2
    assert not list((together / "units").glob("*.journal"))
    refused = on_two_ranks(words(*settings, "limit=1"))
    assert refused.returncode != 0
    assert refused.stderr.count("is of another evaluation: limit is 0 there and 1 here") == 1
