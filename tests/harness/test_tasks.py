"""The catalogue against lm_eval's definitions, and every task end to end on local copies without a network."""

import json

import numpy as np
import pytest
from lm_eval.tasks import TaskManager

from dla_train.config import ConfigError
from dla_train.harness import model as model_module
from dla_train.harness.asking import ask
from dla_train.harness.catalogue import catalogue, task_entry
from dla_train.harness.documents import local_files, read_documents
from dla_train.harness.errors import EvaluateError
from dla_train.harness.evaluation import evaluate
from dla_train.harness.model import DlaModel
from dla_train.harness.settings import Unit, compose, units
from dla_train.harness.tasks import CLASSES, PACKAGED, build_task

SUITES = {"commonsense": 8, "retrieval": 6, "ruler": 6, "longbench": 12}


def test_the_suites_are_the_published_ones():
    for name, count in SUITES.items():
        assert len({unit.task.name for unit in units(compose(["run=none", f"suite={name}"]))}) == count
    everything = compose(["run=none", "suite=all"])
    assert len(units(everything)) == 8 + 6 + 6 * 4 + 12
    assert everything.suite.lengths == [4096, 8192, 16384, 32768] and everything.suite.samples == 500
    assert {name for names in everything.suite.tables.values() for name in names} == set(catalogue()) - {"wikitext"}


@pytest.mark.parametrize("name", [name for name, entry in catalogue().items() if not entry.needles])
def test_the_catalogue_says_what_lm_evals_definition_says(name):
    entry = task_entry(name)
    if name in CLASSES:
        base = CLASSES[name]
        assert (entry.hub, entry.subset) == (base.DATASET_PATH, base.DATASET_NAME)
        return
    from lm_eval.tasks._yaml_loader import load_yaml

    there = load_yaml(PACKAGED / entry.file)
    assert there["task"] == name
    assert (there["dataset_path"], there.get("dataset_name")) == (entry.hub, entry.subset)
    evaluated = there.get("test_split") or there["validation_split"]
    assert entry.split == evaluated and entry.few_shot_split in (None, there.get("training_split"))
    assert entry.metric in {one["metric"] for one in there["metric_list"]}


def test_the_needle_tasks_are_lm_evals_with_other_documents(tokenizer):
    entry = task_entry("niah_multiquery")
    found = TaskManager(include_path=(PACKAGED / entry.file).parent, include_defaults=False)
    assert all(name in found.all_subtasks for name, one in catalogue().items() if one.needles)


def test_every_task_of_every_suite_runs_on_local_copies_without_a_network(
    run, data, tmp_path, no_network, monkeypatch, capsys
):
    short = model_module.answers
    monkeypatch.setattr(  # what answers are is shown elsewhere; here they need not be long
        model_module,
        "answers",
        lambda model, prompts, new, done, **bounds: short(model, prompts, min(new, 4), done, **bounds),
    )
    words = [f"run={run}", "suite=all", f"data_dir={data}", f"output={tmp_path}/out", "max_length=4000", "limit=2"]
    output = evaluate(compose([*words, "suite.lengths=[3000,4000]", "progress=false"]))
    results = json.loads((output / "results.json").read_text())
    assert len(results["units"]) == 8 + 6 + 6 * 2 + 12
    for name, unit in results["units"].items():
        found = unit["metrics"][task_entry(unit["task"]).metric]
        assert unit["documents"] == 2 and 0 <= found["value"] <= 1, name
        assert unit["counts"]["truncated"] == 0 and unit["counts"]["requests"] >= 2, name
        assert len((output / "units" / f"{name}.samples.jsonl").read_text().splitlines()) == 2
    page = (output / "results.md").read_text()
    for heading in ("## commonsense", "## retrieval", "## ruler, 3000 tokens", "## ruler, 4000 tokens", "## longbench"):
        assert heading in page
    assert "| Gated DeltaNet + MARCH | 49.5 | 66.9 |" in page
    points = np.load(output / "needles.npz")
    assert points["niah_multiquery_hit"].shape == (2 * 2 * 4,) and set(points["niah_single_1_length"]) == {3000, 4000}
    assert (output / "needles.png").stat().st_size > 5000
    assert "38/38" not in capsys.readouterr().err  # progress=false is quiet


def test_prompts_are_lm_evals_on_the_local_documents_with_solved_examples_where_asked(data):
    few = compose(["run=none", f"data_dir={data}", "tasks=[piqa]", "num_fewshot=2"])
    task = build_task(Unit(task_entry("piqa")), few, None)
    task.set_config(key="num_fewshot", value=2)
    task.build_all_requests(limit=1)
    document = read_documents(data / "piqa/validation.jsonl", [])[0]
    (context, continuation), *_ = [request.args for request in task.instances]
    assert context.endswith(f"Question: {document['goal']}\nAnswer:") and context.count("Answer:") == 3
    solved = [example["goal"] for example in read_documents(data / "piqa/train.jsonl", [])]
    assert sum(f"Question: {goal}\n" in context for goal in solved) == 2
    assert continuation == f" {document['sol1']}"


def test_values_that_look_like_dates_stay_text(data):
    task = build_task(Unit(task_entry("swde")), compose(["run=none", f"data_dir={data}", "suite=retrieval"]), None)
    assert task.doc_to_target(task.eval_docs[0]) == "2001-05-07"


def test_a_unit_has_the_standard_error_of_its_mean(run, data, tokenizer, small):
    model = DlaModel(small("mamba2", "dla"), tokenizer, max_length=200, bos=True)
    config = compose(["run=none", f"data_dir={data}"])
    unit = Unit(task_entry("lambada_openai"))
    metrics, samples = ask(model, unit, config, build_task(unit, config, None))
    logs = np.array([sample["perplexity"] for sample in samples])
    assert metrics["perplexity"]["value"] == pytest.approx(np.exp(-logs.mean()))
    error = logs.std(ddof=1) / np.sqrt(len(logs))
    assert metrics["perplexity"]["stderr"] == pytest.approx(error * np.exp(-logs.mean()))
    accuracy = np.array([sample["acc"] for sample in samples])
    assert metrics["acc"]["stderr"] == pytest.approx(accuracy.std(ddof=1) / np.sqrt(len(accuracy)))


def test_absent_and_damaged_local_copies_are_named_with_the_way_to_get_them(data, tmp_path):
    config = compose(["run=none", f"data_dir={tmp_path}", "tasks=[piqa]"])
    (path,) = local_files(tmp_path, task_entry("piqa"), 0).values()
    for content, message in (
        (None, "piqa/validation.jsonl cannot be read .*dla-evaluate fetch suite=all .*piqa.* data_dir="),
        ("", "validation.jsonl is empty"),
        ('{"goal": "x"}\n', "line 1, lacks sol1, sol2, label"),
        ((data / "piqa/validation.jsonl").read_text() + '{"goal"', "line 4, is not JSON"),
        ("[1]\n", "line 1, lacks goal"),
    ):
        if content is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        with pytest.raises(EvaluateError, match=message):
            build_task(Unit(task_entry("piqa")), config, None)
    path.write_bytes(b'{"goal": "\xff"}')
    with pytest.raises(EvaluateError, match="validation.jsonl is not UTF-8 text"):
        build_task(Unit(task_entry("piqa")), config, None)


def test_without_local_copies_or_a_network_the_error_says_what_to_do(monkeypatch, no_network):
    from datasets.exceptions import DatasetNotFoundError

    from dla_train.harness import tasks

    def refuse(*arguments, **settings):
        raise DatasetNotFoundError("not on the hub")

    monkeypatch.setattr(tasks.TaskManager, "load", refuse)
    with pytest.raises(EvaluateError, match="piqa: its data set baber/piqa cannot be loaded .* data_dir="):
        build_task(Unit(task_entry("piqa")), compose(["run=none", "tasks=[piqa]"]), None)


def test_a_task_that_nobody_knows_is_an_error():
    with pytest.raises(ConfigError, match="piqua is not a task that is known here; choose from arc_challenge"):
        task_entry("piqua")
