"""The command line: from nothing to training batches, and mistakes in one line without a traceback."""

from pathlib import Path

import pytest

from data_prep.prepare import main
from dla_train.config import DataConfig
from dla_train.data.loader import open_sources


def test_from_a_folder_of_text_to_training_batches(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, corpus = tmp_path / "my.model", tmp_path / "corpus"
    assert main(["tokenizer", str(text_folder), "--output", str(model), "--vocab-size", "512", "--quiet"]) == 0
    assert "bytes per token" in capsys.readouterr().out
    tokens = ["tokens", str(text_folder), "--tokenizer", str(model), "--output", str(corpus), "--bos"]
    assert main([*tokens, "--validation-fraction", "0.3", "--quiet"]) == 0
    assert "documents" in capsys.readouterr().out
    data = DataConfig(
        name="t",
        train=[f"{corpus}_train"],
        validation=[f"{corpus}_validation"],
        tokenizer=str(model),
        context_tokens=64,
    )
    sources = open_sources(data, global_batch_rows=4, seed=0, vocab_size=512)
    assert sources.train.batch(3, 0, 1, 2)[1].tokens.shape == (2, 64)
    assert sources.validation is not None
    files = sources.train.sources["train"].files
    assert files.bytes_per_token is not None and files.bytes_per_token > 1.2


def test_a_hugging_face_dataset_is_an_input(tokenizer_path: Path, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"body": ["one text", "another text"]}).save_to_disk(str(tmp_path / "set"))
    arguments = ["tokens", "--dataset", str(tmp_path / "set"), "--text-field", "body", "--quiet"]
    assert main([*arguments, "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out.idx").exists()


def test_progress_has_a_bar_with_a_total(
    text_folder: Path, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["tokens", str(text_folder), "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")])
    assert "tokenise: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokens", "absent.txt"], "absent.txt does not exist"),
        (["tokens"], "no input given"),
        (["tokens", "x", "--dataset", "y"], "dataset y is given beside paths or a separator"),
        (["tokens", "--dataset", "y", "--separator", "|"], "dataset y is given beside paths or a separator"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(
    arguments: list[str], message: str, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dla-prepare: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("value", ["x", "1.5", "inf", "nan"])
def test_a_number_that_is_not_whole_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["tokens", "a", "--tokenizer", "t", "--output", "o", "--shard-tokens", value])
    assert f"{value} is not a whole number, such as 1000000 or 1e6" in capsys.readouterr().err


def test_wrong_tokenizer_is_a_mistake_too(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokens", str(text_folder), "--tokenizer", "absent.model", "--output", str(tmp_path / "out")]) == 2
    assert "absent.model does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tokenizer", "tokens", "stdlib"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    assert f"dla-prepare {command}" in capsys.readouterr().out
