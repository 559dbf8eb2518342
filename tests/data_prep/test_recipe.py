"""Recipes, and datasets in the hub's layout: what they say is read, and no code of theirs ever runs."""

from pathlib import Path

import pytest

from data_prep.huggingface import HuggingFaceDataset
from data_prep.prepare import main
from data_prep.recipe import RECIPES, recipe_sources
from data_prep.records import PrepareError, SourceOptions, documents
from tests.data_prep.corpora import plain_tokens, stored_tokens, write_jsonl

LONG = "a text that is long enough"


def hub_folder(folder: Path) -> Path:
    """As a dataset lies on the hub: data files in folders, a card that names configurations and splits."""
    (folder / "pretrain").mkdir(parents=True)
    (folder / "other").mkdir()
    write_jsonl(folder / "pretrain" / "a.jsonl", [{"text": f"a{i}", "n": i} for i in range(150)])
    write_jsonl(folder / "pretrain" / "b.jsonl", [{"text": "b0", "n": 0}])
    write_jsonl(folder / "other" / "c.jsonl", [{"text": "c", "n": 0}])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: pre\n  data_files: pretrain/*.jsonl\n"
        "- config_name: rest\n  data_files:\n  - {split: test, path: other/*.jsonl}\n---\n"
    )
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_in_the_hubs_layout_is_read_by_configuration_split_and_pattern(
    streaming: bool, tmp_path: Path
) -> None:
    folder = str(hub_folder(tmp_path / "set"))
    expected = [f"a{i}" for i in range(150)] + ["b0"]
    source = HuggingFaceDataset(folder, config="pre", streaming=streaming)
    assert [text for text, _ in documents(source)] == expected
    assert [record.payload for record in source.records(149)] == expected[149:]
    assert streaming or source.total == 151
    rest = HuggingFaceDataset(folder, config="rest", split="test", streaming=streaming)
    assert [text for text, _ in documents(rest)] == ["c"]
    chosen = HuggingFaceDataset(folder, data_files="pretrain/b*.jsonl", streaming=streaming)
    assert [text for text, _ in documents(chosen)] == ["b0"]
    with pytest.raises(PrepareError, match=r"no field 'body'; choose one of \['text', 'n'\]"):
        HuggingFaceDataset(folder, SourceOptions(text_field="body"), config="pre", streaming=streaming)


def test_a_dataset_that_is_a_script_is_refused_and_not_run(tmp_path: Path) -> None:
    folder, mark = tmp_path / "evil", tmp_path / "ran"
    folder.mkdir()
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    with pytest.raises(PrepareError, match="cannot be loaded"):
        HuggingFaceDataset(str(folder))
    assert not mark.exists()


def test_a_stream_that_breaks_is_an_error_whatever_the_policy(tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text('{"text": "fine"}\n' * 3 + '{"text": ')
    arguments = ["tokens", "--dataset", str(tmp_path / "set"), "--streaming", "--on-error", "skip", "--quiet"]
    assert main([*arguments, "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")]) == 2
    assert not list(tmp_path.glob("out*"))


def test_a_recipe_reads_its_sources_in_order_with_their_own_fields_and_filters(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "web.jsonl", [{"content": LONG, "lang": "en"}, {"content": LONG + "!", "lang": "de"}])
    (tmp_path / "books.txt").write_text(f"{LONG} one|short|{LONG} two")
    recipe = tmp_path / "corpus.yaml"
    recipe.write_text(
        f"sources:\n  - {{paths: [{tmp_path}/books.txt], separator: '|', min_characters: 10}}\n"
        f"  - {{paths: [{tmp_path}/web.jsonl], text_field: content, language_field: lang, languages: [de]}}\n"
    )
    arguments = ["tokens", "--recipe", str(recipe), "--tokenizer", str(tokenizer_path), "--quiet"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    expected = plain_tokens([f"{LONG} one", f"{LONG} two", LONG + "!"], tokenizer_path)
    assert stored_tokens(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("sources: [{paths: [x], colour: red}]", "colour"),
        ("sources: [{paths: [x], min_characters: many}]", "min_characters|many"),
        ("sources: []", "no sources"),
        ("{}", "sources"),
        ("sources: [{paths: [absent.txt]}]", r"absent\.txt does not exist"),
        ("sources: [{paths: [x], dataset: y}]", "dataset y is given beside paths"),
        ("sources: [{paths: [x], streaming: true}]", "streaming is of a dataset"),
        ("sources: [{languages: [en], paths: [x]}]", "needs language_field"),
        (": [", "recipe"),
        ("- a", "recipe"),
    ],
)
def test_a_wrong_recipe_is_named_with_its_mistake(
    contents: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(contents)
    assert main(["tokens", "--recipe", str(tmp_path / "r.yaml"), "--tokenizer", "t", "--output", "o"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dla-prepare: error: ") and error.count("\n") == 1
    with pytest.raises(PrepareError, match=message):
        recipe_sources(str(tmp_path / "r.yaml"))


def test_recipes_of_the_package_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def record(name: str, split: str, config: object, data_files: object, revision: object, streaming: object) -> None:
        asked.append((name, split, data_files, streaming))
        raise PrepareError("asked")

    monkeypatch.setattr("data_prep.huggingface._load_dataset", record)
    names = [path.stem for path in RECIPES.glob("*.yaml")]
    assert "long_data_collections" in names
    for name in names:
        with pytest.raises(PrepareError, match="asked"):
            recipe_sources(name)
    assert ("togethercomputer/Long-Data-Collections", "train", "pretrain/*.jsonl.zst", True) in asked
    with pytest.raises(PrepareError, match=r"absent is neither a file nor .*\(.*long_data_collections.*\)"):
        recipe_sources("absent")
