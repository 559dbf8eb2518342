"""lm_eval's own model, on the exported folder, gives the scores and answers that this project's gives."""

from pathlib import Path

import pytest
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM

from dla_train.evaluate.loading import load_model
from dla_train.harness.catalogue import task_entry
from dla_train.harness.model import DlaModel
from dla_train.harness.settings import Unit, compose
from dla_train.harness.tasks import build_task
from dla_train.huggingface.writing import Content, write_files

TASKS = ("lambada_openai", "piqa", "arc_easy", "winogrande", "commonsense_qa", "wikitext", "fda", "longbench_trec")


def results_of(model, data):
    """Every metric and answer of the tasks."""
    config = compose(["run=none", f"data_dir={data}", "suite=all"])
    found = {}
    for name in TASKS:
        if isinstance(model, HFLM):  # it would put BOS twice in front of a whole text, and score the second
            model.add_bos_token = name != "wikitext"
        task = build_task(Unit(task_entry(name)), config, None)
        task.set_config(key="num_fewshot", value=0)
        result = evaluate(model, task_dict={"tasks": {name: task}}, bootstrap_iters=0)
        numbers = {key: value for key, value in result["results"][name].items() if "," in key and value != "N/A"}
        found[name] = numbers, [sample["filtered_resps"] for sample in result["samples"][name]]
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_exported_folder_scores_the_same_in_lm_evals_own_model(run, data, tokenizer, tmp_path, batch_size):
    native, config, _ = load_model(run)
    content = Content(config.model, config.memory, native.state_dict(), Path(config.data.tokenizer), True, 640)
    write_files(content, tmp_path, "float32", 10**9)
    options = {"trust_remote_code": True, "device": "cpu", "dtype": "float32", "max_length": 640}
    theirs = HFLM(pretrained=str(tmp_path), batch_size=batch_size, **options)
    ours = DlaModel(native, tokenizer, max_length=640, bos=True, batch_tokens=batch_size * 200, decode_rows=batch_size)
    expected, found = results_of(theirs, data), results_of(ours, data)
    for task in TASKS:
        assert found[task][0] == pytest.approx(expected[task][0], rel=1e-5), task
        for one, other in zip(found[task][1], expected[task][1], strict=True):
            if isinstance(one[0], str):
                assert one == other, task
            else:
                flat = [part if isinstance(part, list | tuple) else (part,) for part in one]
                wanted = [part if isinstance(part, list | tuple) else (part,) for part in other]
                for mine, their in zip(flat, wanted, strict=True):
                    assert mine[0] == pytest.approx(their[0], rel=2e-5), task
                    assert tuple(mine[1:]) == tuple(their[1:]), task
