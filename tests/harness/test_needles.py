"""RULER's prompts without a network: lm_eval's own, sized by the run's tokenizer, the same for the same seed."""

import json
import random
from types import SimpleNamespace

import nltk
import numpy as np
import pytest

from dla_train.harness.documents import HAYSTACK
from dla_train.harness.errors import EvaluateError
from dla_train.harness.heat_map import shares, write_heat_map
from dla_train.harness.needles import TASKS, Needles, depths, hits, install_sentences

LENGTH = 3000


@pytest.fixture
def needles(tokenizer, data):
    def make(**changes):
        text = (data / HAYSTACK).read_text()
        return Needles(**{"tokenizer": tokenizer, "bos": True, "text": text, "samples": 3, "seed": 7, **changes})

    return make


@pytest.mark.parametrize("task", sorted(TASKS))
def test_prompts_hold_their_needles_and_fit_with_bos_and_answer(needles, tokenizer, task):
    documents = needles().documents(task, LENGTH)
    queried = 4 if task in ("niah_multivalue", "niah_multiquery") else 1
    kept = 4 if task == "niah_multikey_1" else queried
    for document in documents:
        prompt = document["input"]
        assert prompt.count("One of the special magic") == kept
        assert len(document["outputs"]) == len(document["depths"]) == queried
        for value, depth in zip(document["outputs"], document["depths"], strict=True):
            begin = round(depth * len(prompt))
            assert prompt[begin:].startswith("One of the special magic") and value in prompt[begin : begin + 150]
        tokens = 1 + len(tokenizer.encode(f"{prompt} {document['gen_prefix']}")) + 128
        assert LENGTH - 2000 < tokens <= LENGTH
    assert len({tuple(document["outputs"]) for document in documents}) == 3


def test_the_same_seed_gives_the_same_prompts_and_leaves_pythons_own_draws_alone(needles):
    random.seed(3)
    expected = random.random()
    random.seed(3)
    first = needles().documents("niah_multikey_1", LENGTH)
    assert random.random() == expected
    assert needles().documents("niah_multikey_1", LENGTH) == first
    assert needles(seed=8).documents("niah_multikey_1", LENGTH) != first


def test_niah_single_1_is_lm_evals_own(needles, tokenizer):
    install_sentences()
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

    ours = needles().documents("niah_single_1", 4096)
    random.seed("7 niah_single_1 4096")
    theirs = generate_samples(
        get_haystack(type_haystack="repeat"),
        # lm_eval counts neither BOS nor the answer's beginning, of about 90 of this tokenizer's ids
        TOKENIZER=lambda text: SimpleNamespace(input_ids=[0] * 90 + tokenizer.encode(text)),
        max_seq_length=4096,
        template=TEMPLATE,
        type_haystack="repeat",
        type_needle_k="words",
        type_needle_v="numbers",
        num_samples=3,
    )
    without = ("depths", "length")
    assert [{k: v for k, v in one.items() if k not in without} for one in ours] == [
        {k: v for k, v in one.items() if k not in without} for one in theirs
    ]


def test_nothing_is_downloaded(needles, no_network, monkeypatch):
    monkeypatch.setattr(nltk, "download", lambda *arguments: pytest.fail("a download"))
    install_sentences()
    nltk.data.find("tokenizers/punkt_tab")
    assert nltk.sent_tokenize("The grass is green. The sky is blue.") == ["The grass is green.", "The sky is blue."]
    assert len(needles().documents("niah_single_2", LENGTH)) == 3


def test_a_text_that_is_too_short_and_a_length_that_holds_no_needles_are_refused(needles):
    with pytest.raises(
        EvaluateError, match=r"the haystack has \d+ tokens, and niah_single_2 hides .* of 3,000; give a"
    ):
        needles(text="Few words. " * 20).documents("niah_single_2", LENGTH)
    with pytest.raises(EvaluateError, match="niah_multikey_1 with prompts of 300 tokens: .* use longer suite.lengths"):
        needles().documents("niah_multikey_1", 300)


def test_scores_are_rulers(needles):
    from lm_eval.tasks.ruler.common_utils import string_match_all

    values = ["1234567", "ABC-d", "99"]
    for answer in ("it is 1234567 and abc-D.", "none", "99 99"):
        named = hits(answer, values)
        assert sum(named) / 3 == pytest.approx(string_match_all([answer], [values]))
    assert depths("One of the special magic numbers for a is: 5. x", ["5"]) == [0.0]


def test_the_heat_map_shares_are_of_each_cell():
    length, depth = np.array([1, 1, 1, 2]), np.array([0.02, 0.09, 0.999, 1.0])
    grid = shares(length, depth, np.array([True, False, True, False]), [1, 2])
    assert grid[0, 0] == 0.5 and grid[9, 0] == 1.0 and grid[9, 1] == 0.0
    assert np.isnan(grid[1:9]).all()


def test_the_heat_map_is_drawn_of_answers_with_any_character(tmp_path):
    sample = {"answer": "a\u2028b\u0085c", "depths": [0.5], "hits": [True]}
    (tmp_path / "units").mkdir()
    line = json.dumps(sample, ensure_ascii=False) + "\n"
    (tmp_path / "units/niah_single_1_4096.samples.jsonl").write_text(line, encoding="utf-8")
    write_heat_map(tmp_path, {"niah_single_1_4096": {"task": "niah_single_1", "length": 4096}})
    assert (tmp_path / "needles.png").is_file()
