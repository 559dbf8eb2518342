"""Tokenizers of exported folders make the ids and texts of the originals."""

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer

from dla_train.data.tokenizer import load_tokenizer
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.tokenizer_files import PROBES, write_tokenizer
from dla_train.huggingface.verify import _compare_tokenizers

TEXT = [
    line for name in ("README.md", "docs/dla.md") for line in (Path(__file__).parents[2] / name).read_text().split("\n")
]
AS_PREPARED = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
}
KINDS = {
    "bpe, as dla-prepare trains it": {"model_type": "bpe", **AS_PREPARED},
    "unigram, as dla-prepare trains it": {"model_type": "unigram", **AS_PREPARED},
    "unigram, as sentencepiece trains it": {"model_type": "unigram"},
    "bpe with a prefix and a word of its own": {
        "model_type": "bpe",
        **AS_PREPARED,
        "add_dummy_prefix": True,
        "user_defined_symbols": ["[INST]"],
    },
}


def trained(folder, **settings):
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / "trained"),
        vocab_size=700,
        byte_fallback=True,
        minloglevel=2,
        **settings,
    )
    return folder / "trained.model"


def answers(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    decoded = [tokenizer.decode(x, skip_special_tokens=True, clean_up_tokenization_spaces=False) for x in ids]
    return list(zip(ids, decoded, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_model_in_transformers_makes_the_same_ids_and_texts(tmp_path, kind):
    source = trained(tmp_path, **KINDS[kind])
    tokenizer = load_tokenizer(source)
    (tmp_path / "out").mkdir()
    write_tokenizer(source, tokenizer, tmp_path / "out", bos=False, context_tokens=999)
    texts = [*PROBES, *(line for line in TEXT[:200] if "\u2581" not in line)]
    assert (tmp_path / "out/tokenizer.json").exists() == (KINDS[kind]["model_type"] == "bpe")
    for text, (ids, decoded) in zip(texts, answers(tmp_path / "out", texts), strict=True):
        assert ids == tokenizer.encode(text), text
        assert decoded == tokenizer.decode(ids), text


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_encoding_begins_with_bos_where_documents_did(tmp_path, bos, model_type):
    source = trained(tmp_path, model_type=model_type, **AS_PREPARED)
    write_tokenizer(source, load_tokenizer(source), tmp_path, bos=bos, context_tokens=64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    plain = tokenizer("line 3", add_special_tokens=False)["input_ids"]
    assert tokenizer("line 3")["input_ids"] == ([tokenizer.bos_token_id, *plain] if bos else plain)


def test_a_hugging_face_tokenizer_is_copied(tokenizer_path, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    write_tokenizer(tokenizer_path, load_tokenizer(tokenizer_path), first, bos=True, context_tokens=64)
    copied = load_tokenizer(first)
    write_tokenizer(first, copied, second, bos=True, context_tokens=64)
    assert load_tokenizer(second).fingerprint == copied.fingerprint
    assert json.loads((second / "tokenizer_config.json").read_text())["model_max_length"] == 64


def test_opening_a_folders_tokenizer_runs_no_code_of_the_folder(content, folder):
    path = folder(content("mamba2", "dla"))
    (path / "configuration_dla.py").write_text("raise SystemExit('code of the folder ran')")
    assert load_tokenizer(path).encode("line 3") == load_tokenizer(path / "tokenizer.model").encode("line 3")


def test_a_tokenizer_that_disagrees_is_named_with_the_text(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    right = [[tokenizer.encode(text), tokenizer.decode(tokenizer.encode(text))] for text in PROBES]
    assert _compare_tokenizers(tokenizer, right) == len(PROBES)
    for place, wrong in ((0, [9]), (1, "Hello")):
        changed = [list(answer) for answer in right]
        changed[3][place] = wrong
        with pytest.raises(FolderError, match="tiny.model has no exact form in transformers: of 'Hello, world!'"):
            _compare_tokenizers(tokenizer, changed)
