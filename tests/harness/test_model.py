"""The face to lm_eval: order, BOS, truncation, windows, stop strings, and what cannot be asked."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from dla_train.harness.errors import EvaluateError
from dla_train.harness.journal import Journal
from dla_train.harness.model import DlaModel
from tests.tolerances import RELATIVE

TEXTS = ["line 3 adds 4 to 5.", "line 7", "adds 11 to 2. line 12 adds 0 to 9.", "x"]


def asked(kind, *arguments):
    return [Instance(kind, doc={}, arguments=one, idx=number) for number, one in enumerate(arguments)]


@pytest.fixture
def make(small, tokenizer):
    def of(**changes):
        return DlaModel(small("gated_deltanet", "dla"), tokenizer, **{"max_length": 64, "bos": True, **changes})

    return of


def logits_of(model, tokens):
    with torch.no_grad():
        return model.model(torch.tensor([tokens])).logits[0].double()


def likelihood(model, tokens, count):
    logits = logits_of(model, tokens[:-1])[-count:].log_softmax(-1)
    return logits.gather(-1, torch.tensor(tokens[-count:])[:, None]).sum().item()


def test_log_likelihoods_come_in_the_order_asked_and_begin_with_bos(make, tokenizer):
    model = make()
    pairs = [(text, " adds 2") for text in TEXTS]
    found = model.loglikelihood(asked("loglikelihood", *pairs))
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        whole = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
        count = len(whole) - 1 - len(tokenizer.encode(context))
        assert value == pytest.approx(likelihood(model, whole, count), rel=RELATIVE[torch.float32])
    assert model.counts.requests == len(TEXTS) and model.counts.truncated == 0


@pytest.mark.parametrize("bos", [True, False])
def test_an_empty_context_is_bos_or_for_a_model_trained_without_it_eos(make, tokenizer, bos):
    model = make(bos=bos)
    first = tokenizer.bos_id if bos else tokenizer.eos_id
    tokens = tokenizer.encode("line 3")
    ((value, _),) = model.loglikelihood(asked("loglikelihood", ("", "line 3")))
    assert value == pytest.approx(likelihood(model, [first, *tokens], len(tokens)), rel=RELATIVE[torch.float32])


def test_what_is_too_long_loses_its_beginning_and_is_counted(make, tokenizer, monkeypatch):
    model = make(max_length=10)
    context, continuation = TEXTS[2], " line 3"
    ((value, _),) = model.loglikelihood(asked("loglikelihood", (context, continuation)))
    whole = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
    count = len(whole) - 1 - len(tokenizer.encode(context))
    assert value == pytest.approx(likelihood(model, whole[-11:], count), rel=RELATIVE[torch.float32])
    assert (model.counts.truncated, model.counts.dropped_tokens) == (1, len(whole) - 11)
    model.counts.truncated, given = 0, []
    monkeypatch.setattr(
        "dla_train.harness.model.answers",
        lambda lm, prompts, new, done, **bounds: given.extend(prompts) or [list(enumerate([[5]] * len(prompts)))],
    )
    model.generate_until(
        asked("generate_until", *[(text, {"until": [], "max_gen_toks": 4}) for text in (context, "x")])
    )
    assert given[0] == tuple(model.tok_encode(context)[-6:])
    assert model.counts.truncated == 1


def test_rolling_windows_score_every_token_once(make, tokenizer):
    model = make(max_length=8)
    found = model.loglikelihood_rolling(asked("loglikelihood_rolling", *[(text,) for text in TEXTS]))
    for text, total in zip(TEXTS, found, strict=True):
        tokens, expected = tokenizer.encode(text), 0.0
        for begin in range(0, len(tokens), 8):
            end = min(begin + 8, len(tokens))
            before = [tokenizer.bos_id, *tokens][: end + 1][-9:]  # as much in front as fits
            expected += likelihood(model, before, end - begin)
        assert total == pytest.approx(expected, rel=RELATIVE[torch.float32])


def test_answers_are_cut_at_stop_strings_and_eos_and_come_in_order(make, tokenizer, monkeypatch):
    model = make()
    pieces = {text: tokenizer.encode(f"{number} adds. Then line") for number, text in enumerate(TEXTS)}
    ended = [*tokenizer.encode("seven"), tokenizer.eos_id, *tokenizer.encode("eight")]

    def canned(lm, prompts, new_tokens, done, **bounds):
        by_tokens = {tuple(model.tok_encode(text)): answer for text, answer in pieces.items()}
        for index in reversed(range(len(prompts))):
            answer = by_tokens[prompts[index]] if new_tokens > 20 else ended
            stop = next((n for n in range(1, len(answer) + 1) if done(answer[:n])), len(answer))
            yield [(index, answer[:stop])]

    monkeypatch.setattr("dla_train.harness.model.answers", canned)
    mixed = [(text, {"until": ["."], "max_gen_toks": 30}) for text in TEXTS] + [("x", {"until": [], "max_gen_toks": 9})]
    assert model.generate_until(asked("generate_until", *mixed)) == ["0 adds", "1 adds", "2 adds", "3 adds", "seven"]


def test_what_was_answered_is_in_the_journal_and_not_asked_again(make, tmp_path):
    requests = asked("loglikelihood", *[(text, " adds 2") for text in TEXTS])
    answers = asked("generate_until", *[(text, {"until": ["."], "max_gen_toks": 5}) for text in TEXTS])
    first, found = make(), []
    for part in (requests[:2], requests):
        with first.unit("t", 64, Journal(tmp_path / "j", {"a": 1})):
            found.append(first.loglikelihood(part) + first.generate_until(answers))
    again = make()
    again.model.forward = lambda *arguments: pytest.fail("asked again")
    with again.unit("t", 64, Journal(tmp_path / "j", {"a": 1})) as counts:
        assert again.loglikelihood(requests) + again.generate_until(answers) == found[1]
    assert (counts.requests, counts.tokens) == (8, 0)


def test_a_torn_line_is_left_out_and_a_journal_of_something_else_is_kept(tmp_path):
    path = tmp_path / "j"
    Journal(path, {"a": 1}).add([("k", [1.5, True]), ("l", "text\nof lines")])
    path.write_text(path.read_text() + '["m", [2')
    found = Journal(path, {"a": 1})
    assert (len(found), found.get("k"), found.get("l"), found.get("m")) == (2, [1.5, True], "text\nof lines", None)
    found.add([("m", 3)])
    assert Journal(path, {"a": 1}).get("m") == 3
    with pytest.raises(EvaluateError, match="j is of another evaluation: a is 1 there and 2 here"):
        Journal(path, {"a": 2})
    kept = path.read_text()
    for damaged in ("\0\0\n", kept.replace('["l",', '["l"'), kept + "3\n"):
        path.write_text(damaged)
        with pytest.raises(EvaluateError, match="j is damaged .* remove it"):
            Journal(path, {"a": 1})
    path.write_text('{"identity": {"a"')  # killed while it began
    assert len(Journal(path, {"a": 2})) == 0
    assert json.loads(path.read_text()) == {"identity": {"a": 2}}


def test_what_cannot_be_asked_is_refused_with_the_mend(make, small, tokenizer):
    model = make(max_length=6, bos=False)
    for ask, message in (
        (lambda: model.loglikelihood(asked("loglikelihood", ("x", TEXTS[2]))), "cannot be scored in max_length=6"),
        (lambda: model.generate_until(asked("g", ("x", {"max_gen_toks": 6}))), "leaves no room .* raise max_length"),
        (lambda: model.generate_until(asked("g", ("", {"max_gen_toks": 2}))), "a prompt is empty .* set bos=true"),
        (
            lambda: model.generate_until(asked("g", ("x", {"do_sample": True, "temperature": 1.0}))),
            "ask for sampling; answers are greedy",
        ),
    ):
        with pytest.raises(EvaluateError, match=message):
            ask()
    narrow = small("mamba2", "dla")
    narrow.model_config.vocab_size = 300
    with pytest.raises(EvaluateError, match="has 310 ids, the model 300; give the tokenizer"):
        DlaModel(narrow, tokenizer, max_length=8)


def test_lm_eval_finds_the_model_by_its_name_and_opens_a_run(run):
    model = get_model("dla").create_from_arg_string(
        f"run={run},step=2,max_length=50", {"batch_size": 1, "device": "cpu"}
    )
    assert isinstance(model, DlaModel) and model.max_length == 50 and not model.bos
    with pytest.raises(EvaluateError, match="must name run=DIR"):
        get_model("dla").create_from_arg_obj({"pretrained": "x"})


class Together:
    """The ranks of a model as threads of this process: `gather` waits for all of them."""

    def __init__(self, size):
        self.size, self.values, self.barrier = size, [None] * size, threading.Barrier(size, timeout=60)

    def rank(self, rank):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        return SimpleNamespace(rank=rank, size=self.size, gather=gather)

    def run(self, job):
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: job(self.rank(rank)), range(self.size)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batches_and_all_get_every_answer_of_one_rank(make, ranks):
    texts = [*TEXTS, "line"]
    pairs = [(text, end) for text in texts for end in (" adds 2", " line")]
    prompts = [(text, {"until": ["7"], "max_gen_toks": 5}) for text in texts]

    def answers_of(model):
        return (
            model.loglikelihood(asked("loglikelihood", *pairs)),
            model.loglikelihood_rolling(asked("loglikelihood_rolling", *[(text,) for text in texts])),
            model.generate_until(asked("generate_until", *prompts)),
        )

    def of_rank(mesh):
        computed, rounds = [], []
        model = make(batch_tokens=40, decode_rows=1, mesh=mesh, between=lambda: rounds.append(1))
        for name in ("_scores", "_answers"):
            inner = getattr(model, name)
            setattr(model, name, lambda *words, inner=inner: (computed.append(len(b)) or b for b in inner(*words)))
        return answers_of(model), computed, len(rounds)

    expected = answers_of(make(batch_tokens=40, decode_rows=1))
    found = Together(ranks).run(of_rank)
    assert [answers for answers, _, _ in found] == [expected] * ranks  # the same batches, so the same bits
    assert len({rounds for _, _, rounds in found}) == 1
    work = [sum(computed) for _, computed, _ in found]
    assert sum(work) == len(pairs) + len(texts) + len(prompts) and min(work) > 0
    assert any(0 in computed for _, computed, _ in found)  # a last round with fewer batches than ranks
