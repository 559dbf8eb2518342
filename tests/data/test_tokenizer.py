"""Tokenizers: exact text back, no special tokens added, fingerprints, and unreadable files."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dla_train.data.errors import TokenizerError
from dla_train.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from dla_train.hydra_app import compose

TEXT = "def f(x):\n\n    return  x\t# é 漢字 \x00 \r\n  "


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 10, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    folder = tmp_path_factory.mktemp("hugging_face")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", model_max_length=8).save_pretrained(folder)
    return folder


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text().filter(lambda text: "\u2581" not in text))
def test_sentencepiece_gives_back_the_exact_text(sentencepiece_tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = sentencepiece_tokenizer.encode(text)
    assert sentencepiece_tokenizer.decode(ids) == text
    assert all(0 <= i < sentencepiece_tokenizer.vocab_size for i in ids)
    assert sentencepiece_tokenizer.eos_id not in ids and sentencepiece_tokenizer.bos_id not in ids


def test_sentencepiece_encodes_a_batch_as_one_by_one(sentencepiece_tokenizer: SentencePieceTokenizer) -> None:
    texts = [TEXT, "", "x"]
    assert sentencepiece_tokenizer.encode_batch(texts) == [sentencepiece_tokenizer.encode(text) for text in texts]
    assert sentencepiece_tokenizer.encode_batch([]) == []


def test_texts_encoded_in_pieces_decode_to_the_joined_text(sentencepiece_tokenizer: SentencePieceTokenizer) -> None:
    pieces = [id for text in ("ab c", "d", " e", "\n") for id in sentencepiece_tokenizer.encode(text)]
    assert sentencepiece_tokenizer.decode(pieces) == "ab cd e\n"


def test_special_ids_decode_to_no_text(sentencepiece_tokenizer: SentencePieceTokenizer) -> None:
    ids = sentencepiece_tokenizer.encode("x y")
    assert sentencepiece_tokenizer.bos_id is not None
    assert (
        sentencepiece_tokenizer.decode([sentencepiece_tokenizer.bos_id, *ids, sentencepiece_tokenizer.eos_id]) == "x y"
    )


def test_hugging_face_gives_back_the_exact_text_beyond_its_model_max_length(hugging_face_folder: Path) -> None:
    tokenizer = load_tokenizer(hugging_face_folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    for text in (TEXT, "the cat sat on the mat " * 20, ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.eos_id not in tokenizer.encode(text)  # its template would put it first
    assert tokenizer.decode([*tokenizer.encode("the cat"), tokenizer.eos_id]) == "the cat"
    assert tokenizer.encode_batch(["the cat", "mat"]) == [tokenizer.encode("the cat"), tokenizer.encode("mat")]
    assert tokenizer.bos_id is None and 0 <= tokenizer.eos_id < tokenizer.vocab_size < 300


def test_fingerprint_follows_contents_not_place(
    sentencepiece_model: Path, hugging_face_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.model"
    copy.write_bytes(sentencepiece_model.read_bytes())
    assert load_tokenizer(copy).fingerprint == load_tokenizer(sentencepiece_model).fingerprint
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in hugging_face_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert load_tokenizer(folder).fingerprint == load_tokenizer(hugging_face_folder).fingerprint
    contents = json.loads((folder / "tokenizer.json").read_text())
    contents["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    assert load_tokenizer(folder).fingerprint != load_tokenizer(hugging_face_folder).fingerprint


def test_missing_tokenizer_names_the_path_and_the_mend(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent\.model does not exist.*dla-prepare tokenizer"):
        load_tokenizer(tmp_path / "absent.model")


def test_the_missing_tokenizer_of_the_quickstart_names_where_it_was_looked_for_and_what_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = compose(["experiment=quickstart"]).data.tokenizer
    with pytest.raises(TokenizerError, match=rf"{tmp_path}/{path} does not exist; .*\(`make quickstart` makes it\)"):
        load_tokenizer(path)


@pytest.mark.parametrize("contents", [b"", b"not a model"])
def test_corrupt_sentencepiece_model_is_an_error(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "bad.model"
    path.write_bytes(contents)
    with pytest.raises(TokenizerError, match=r"bad\.model is not a readable sentencepiece model"):
        load_tokenizer(path)


def test_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot be read as a Hugging Face tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_without_eos_asks_for_the_folder(hugging_face_folder: Path) -> None:
    with pytest.raises(TokenizerError, match="names no eos_token.*give the folder"):
        load_tokenizer(hugging_face_folder / "tokenizer.json")


@pytest.mark.parametrize("contents", ["", "{}", "[1]", '{"model": 3}'])
def test_corrupt_tokenizer_json_is_an_error(tmp_path: Path, contents: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(contents)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(path)


def test_other_files_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("x")
    with pytest.raises(TokenizerError, match=r"words\.txt is neither"):
        load_tokenizer(path)
