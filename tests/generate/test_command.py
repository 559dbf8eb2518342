"""The program: prompts from everywhere, streaming, stop strings, memory, and mistakes in one line."""

import io
import json
from types import SimpleNamespace

import pytest
import torch

from dla_train.data.manifest import Manifest
from dla_train.generate import Sampling, command, generate


class LetterTokenizer:
    """Letters a to p as tokens 0 to 15, and token 16 as BOS."""

    bos_id, eos_id = 16, -1

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids):
        return "".join("^" if i == 16 else chr(ord("a") + i) for i in ids)


@pytest.fixture
def run(tiny, build, monkeypatch, tmp_path):
    """run(*words, backbone=, policy=, stdin=) -> exit code; the model is random and run.model its model."""

    def go(*words, backbone="gated_deltanet", policy="dla", stdin=""):
        go.model = build(*tiny(backbone, policy), dtype=torch.float32)
        data = SimpleNamespace(tokenizer="letters", train=[str(tmp_path / "corpus")], phases=[], context_tokens=16)
        config = SimpleNamespace(data=data, model=go.model.model_config, memory=go.model.memory_config)
        monkeypatch.setattr(command, "load_model", lambda run, step, device: (go.model, config, 7))
        monkeypatch.setattr(command, "load_tokenizer", lambda path: LetterTokenizer())
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        return command.main(["--run", str(tmp_path), *words])

    return go


@pytest.mark.parametrize(
    ("option", "manifest_bos", "shown"),
    [([], None, 3), ([], False, 3), ([], True, 4), (["--bos"], None, 4), (["--no-bos"], True, 3)],
)
def test_prompts_begin_as_training_did(run, tmp_path, capsys, option, manifest_bos, shown):
    if manifest_bos is not None:
        Manifest("letters", "0" * 64, 17, manifest_bos, False, 1, 3, 3).write(tmp_path / "corpus.json")
    assert run("--prompt", "abc", "--max-new-tokens", "4", *option) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("abc") and len(captured.out.strip("\n")) == 7
    held = sum(cache.nbytes for cache in run.model.empty_caches(1, 1))
    assert f"step 7: {shown} prompt tokens at " in captured.err and f"caches {held:,} bytes" in captured.err
    assert "4 new tokens at " in captured.err


def test_prompts_come_from_words_files_lines_and_standard_input(run, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("bcd", encoding="utf-8")
    (tmp_path / "lines.txt").write_text("ac\n\nca\n", encoding="utf-8")
    greedy = ["--temperature", "0", "--max-new-tokens", "3"]
    words = ["--prompt", "abc", "--prompt", "a", "--prompt-file", str(tmp_path / "one.txt")]
    assert run(*words, "--prompts", str(tmp_path / "lines.txt"), "--json", *greedy) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["abc", "a", "bcd", "ac", "ca"]
    expected = generate(run.model, [[0, 1, 2], [0], [1, 2, 3], [0, 2], [2, 0]], 3, Sampling(temperature=0))
    assert [line["tokens"] for line in lines] == [c.tokens for c in expected.continuations]
    assert {line["ended_by"] for line in lines} == {"length"}
    assert run("--max-new-tokens", "2", stdin="cab") == 0
    assert capsys.readouterr().out.startswith("cab")
    assert run("--max-new-tokens", "2", "--prompts", "-", stdin="cab\nb\n") == 0
    assert capsys.readouterr().out.startswith("--- 0\ncab")


def test_a_line_of_prompts_ends_at_a_line_break_alone(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LetterTokenizer, "encode", lambda self, text: [ord(letter) % 16 for letter in text])
    (tmp_path / "lines.txt").write_text("a\u2028b\x0cc\u0085\r\nd\n", encoding="utf-8")
    assert run("--prompts", str(tmp_path / "lines.txt"), "--json", "--max-new-tokens", "1") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert [line["prompt"] for line in lines] == ["a\u2028b\x0cc\u0085", "d"]


def test_a_stop_string_ends_the_text_before_it_also_across_tokens(run, capsys):
    words = ["--prompt", "abc", "--max-new-tokens", "8", "--seed", "5"]
    assert run(*words) == 0
    whole = capsys.readouterr().out.strip("\n")
    stop = whole[6:8]
    assert run(*words, "--stop", stop) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop, 3)] + "\n"
    assert run(*words, "--stop", stop, "--json") == 0
    line = json.loads(capsys.readouterr().out)
    assert line["ended_by"] == "stop_string" and line["text"] == whole[3 : whole.index(stop, 3)]
    assert len(line["tokens"]) == whole.index(stop, 3) - 1


def test_one_prompt_is_written_as_it_is_made(run, monkeypatch):
    writes = []
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=writes.append, flush=lambda: None))
    assert run("--prompt", "abc", "--max-new-tokens", "5") == 0
    assert [len(text) for text in writes if text] == [4, 1, 1, 1, 1, 1]


def test_the_memory_of_the_prompt_is_shown_and_nothing_need_be_generated(run, capsys):
    assert run("--prompt", "abcdefgh", "--max-new-tokens", "0", "--show-memory", "1.2") == 0
    captured = capsys.readouterr()
    assert captured.out == "", "the prompt is not repeated where nothing follows it"
    assert captured.err.count("layer 1, head 2") == 1 and "layer 0" not in captured.err and "(open)" in captured.err
    assert run("--prompt", "ab", "--prompt", "cab", "--max-new-tokens", "1", "--show-memory") == 0
    assert capsys.readouterr().err.count("layer 0, head 0") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--prompt", ""], "prompt 1 is empty"),
        ([], "the prompt is empty"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0 must be at least 0"),
        (["--prompt", "a", "--top-k", "-1"], "top_k=-1"),
        (["--prompt", "a", "--top-p", "2"], "top_p=2.0"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty=0.0"),
        (["--prompt", "a", "--max-new-tokens", "-1"], "max_new_tokens=-1"),
        (["--prompt", "a", "--batch-rows", "0"], "batch_rows=0"),
        (["--prompt", "a", "--stop", ""], "stop string is empty"),
        (["--prompt", "a", "--show-memory", "x"], "--show-memory=x is not LAYER"),
        (["--prompt", "a", "--show-memory", "5"], "layer 5 does not exist"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file=nowhere.txt cannot be read: No such file"),
        (["--prompts", "-"], "has no lines"),
    ],
)
def test_a_mistake_is_told_in_one_line(run, capsys, words, message):
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dla-generate: error: ") and captured.err.count("\n") == 1 and not captured.out
    assert message in captured.err


def test_softmax_attention_says_where_its_training_ended(run, capsys):
    attention = {"backbone": "attention", "policy": "none"}
    assert run("--prompt", "a" * 13, "--max-new-tokens", "4", **attention) == 2
    assert "13 tokens, with --max-new-tokens=4 more than data.context_tokens=16" in capsys.readouterr().err
    assert run("--prompt", "a" * 13, "--max-new-tokens", "4", "--beyond-context", **attention) == 0
    assert run("--prompt", "a" * 13, "--max-new-tokens", "4") == 0
    assert run("--prompt", "a", "--max-new-tokens", "1", "--show-memory", **attention) == 2
    assert "no memory slots" in capsys.readouterr().err


def test_a_missing_run_is_named(tmp_path, capsys):
    assert command.main(["--run", str(tmp_path / "nowhere"), "--prompt", "x"]) == 2
    assert "nowhere" in capsys.readouterr().err
