"""`dla-evaluate` as its user meets it: settings, mistakes, fetching, tables."""

import json
from dataclasses import fields

import pytest
from datasets import Dataset

from dla_train.config import ConfigError
from dla_train.harness import fetch as fetch_module
from dla_train.harness.catalogue import catalogue
from dla_train.harness.command import main
from dla_train.harness.documents import HAYSTACK, local_files, read_documents
from dla_train.harness.errors import EvaluateError
from dla_train.harness.fetch import fetch
from dla_train.harness.report import published, table
from dla_train.harness.settings import EvaluateConfig, compose
from tests.harness.local_data import document


def test_a_command_prints_each_task_and_the_table_and_says_where_the_results_are(run, data, tmp_path, capsys):
    words = [f"run={run}", f"data_dir={data}", f"output={tmp_path}/out", "max_length=300", "tasks=[piqa]", "limit=2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "piqa: acc " in said and "(2 documents" in said
    assert "## commonsense" in said and f"results: {tmp_path}/out" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], ""),
        (["suite=ruler"], "run has no value; name a run directory"),
        (["run=x", "suite=comonsense"], "did you mean suite=commonsense?"),
        (["run=x", "tasks=[piqua]"], "tasks: piqua is not a task of suite=commonsense; did you mean piqa?"),
        (["run=x", "tasks=[swde]"], "swde is not a task of suite=commonsense; it is a task of another suite"),
        (["run=x", "memory=single"], "memory is not a setting of an evaluation: a checkpoint is asked with"),
        (["run=x", "memory.policy=single"], "memory is not a setting of an evaluation: a checkpoint is asked with"),
        (
            ["run=x", "+memory.policy=single"],
            "memory is not a setting of an evaluation: a checkpoint is asked with",
        ),
        (["run=x", "+colour=3"], "colour is not a setting of an evaluation"),
        (["run=x", "batchtokens=3"], "batchtokens is not a setting of an evaluation; did you mean batch_tokens?"),
        (["run=x", "limit=-1"], "limit=-1 is below 0"),
        (["run=x", "limit=many"], "limit: "),
        (["run=x", "max_length=1"], "max_length=1 holds no prompt with an answer"),
        (["run=x", "dtype=half"], "dtype=half is not one of the choices"),
        (["run=x", "device=tpu"], "device=tpu is not one of the choices"),
        (["run=x", "num_fewshot=2"], "num_fewshot=2 needs solved examples, which lambada_openai have not"),
        (["run=x", "suite=ruler", "max_length=4096"], "max_length=4096 would cut the needle out"),
        (["run=x", "suite=ruler", "suite.lengths=[]"], "must name lengths of 256 tokens or more"),
        (["run=x", "suite=ruler", "suite.samples=0"], "suite.samples=0 is below 1"),
        (["run=x", "~suite"], "suite.tables names no task"),
        (["run=nowhere", "data_dir=none"], "none/lambada_openai/test.jsonl cannot be read"),
        (["fetch", "suite=all"], "data_dir has no value"),
    ],
)
def test_mistakes_are_told_in_one_line_with_the_mend(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_fetch_writes_what_an_evaluation_reads_and_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    asked = []
    by_hub = {(entry.hub, entry.subset): name for name, entry in catalogue().items()}

    def load(hub, subset, *, split):
        asked.append((hub, subset, split))
        if (hub, subset) not in by_hub:
            assert (hub, split) == (fetch_module.ESSAYS, "train")
            return Dataset.from_list([{"text": "One essay."}, {"text": "Another."}])
        return Dataset.from_list([document(by_hub[hub, subset], number) for number in range(2)])

    def refuse(hub, subset, *, split):
        raise EvaluateError("no network")

    config = compose(["run=none", "suite=all", f"data_dir={tmp_path}"])
    written = fetch(config, load)
    assert len(written) == len(asked) == 8 + 6 + 12 + 1
    assert (tmp_path / HAYSTACK).read_text() == "One essay. Another."
    for entry in catalogue().values():
        for path in local_files(tmp_path, entry, 0).values() if entry.name != "wikitext" and entry.hub else ():
            kept = read_documents(path, entry.columns)
            assert [kept[number]["question" if "question" in kept[0] else next(iter(kept[0]))] for number in (0, 1)]
    victim = tmp_path / "piqa/validation.jsonl"
    before = victim.read_text()
    victim.unlink()
    victim.with_name("validation.jsonl.partial").write_text("cut off")
    asked.clear()
    assert fetch(config, load) == [victim] and asked == [("baber/piqa", None, "validation")]
    assert victim.read_text() == before
    monkeypatch.setattr(fetch_module, "_load_dataset", refuse)
    with pytest.raises(EvaluateError, match="no network"):
        fetch(compose(["run=none", "tasks=[piqa]", f"data_dir={tmp_path}/absent"]))
    assert not (tmp_path / "absent").exists()
    few = compose(["run=none", "tasks=[piqa]", "num_fewshot=1", f"data_dir={tmp_path}"])
    assert fetch(few, load) == [tmp_path / "piqa/train.jsonl"]


def test_fetch_reads_data_sets_with_datasets_itself(tmp_path, monkeypatch):
    source = tmp_path / "hub"
    source.mkdir()
    lines = [json.dumps(document("piqa", number)) for number in range(2)]
    (source / "validation.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = list(fetch_module._load_dataset(str(source), None, split="validation"))
    assert found == [document("piqa", number) for number in range(2)]
    with pytest.raises(EvaluateError, match=r"the data set .*absent .validation. cannot be had: .* check the network"):
        fetch_module._load_dataset(str(tmp_path / "absent"), None, split="validation")


def test_published_means_are_those_of_their_columns():
    for name, rows in published()["tables"].items():
        for row in rows:
            assert row["source"] in published()["sources"]
            if name in ("commonsense", "retrieval", "longbench") and "mean" in row and row["source"] == "MARCH":
                found = row["values"].values()
                assert abs(sum(found) / len(found) - row["mean"]) < 0.06, row["model"]


def test_a_table_has_a_mean_only_where_every_column_has_a_number():
    result = {"task": "piqa", "length": None, "metrics": {"acc": {"value": 0.5, "stderr": 0.01}}}
    swde = {"task": "swde", "length": None, "metrics": {"contains": {"value": 0.25, "stderr": None}}}
    page = table({"t": ["piqa", "swde"]}, {"piqa": result, "swde": swde}, "mine")
    assert "| **mine** | 50.0 ± 1.0 | 25.0 | 37.5 |  |" in page
    assert "| **mine** | 50.0 ± 1.0 |  |  |  |" in table({"t": ["piqa", "swde"]}, {"piqa": result}, "mine")


def test_an_unknown_suite_is_a_config_error():
    with pytest.raises(ConfigError, match="choose from all, commonsense, longbench, retrieval, ruler, wikitext"):
        compose(["run=x", "suite=nothing"])


def test_a_run_given_as_a_flag_is_told_of_and_help_prints_every_setting(capsys):
    assert main(["--run", "x"]) == 2
    assert "--run: write run=VALUE, without --; `dla-evaluate --help` prints every" in capsys.readouterr().err
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {item.name}" in printed for item in fields(EvaluateConfig))
    assert "  suite.name=commonsense\n" in printed
