"""`dla-diagnose seeds=[...]`: what was compared with each seed, as one comparison whose intervals are over seeds."""

import json
from pathlib import Path

import pytest

from dla_train.diagnose.command import main
from dla_train.hydra_app import compose
from dla_train.intervals import t_quantile
from dla_train.train import train
from tests.train.runs import TINY

SHORT = ["context_tokens=48", "minimum_tokens=30", "documents=6"]


@pytest.fixture(scope="module")
def compared(corpus, tmp_path_factory):
    """Folder of the comparisons 0, 1 and 2 of dla with its single state, one of each seed."""
    folder = tmp_path_factory.mktemp("compared")
    for seed in range(3):
        for memory in ("single", "dla"):
            run = [f"memory={memory}", f"seed={seed}", f"name={memory}", f"run_dir={folder}/{memory}_{seed}"]
            train(compose([*TINY, *corpus, "train.steps=4", *run]))
        runs = f"runs=[{folder}/single_{seed},{folder}/dla_{seed}]"
        assert main([runs, f"output={folder}/{seed}", *SHORT]) == 0
    return folder


def seeds(folder: Path, *numbers: int) -> str:
    return f"seeds=[{','.join(f'{folder}/{number}' for number in numbers)}]"


def test_means_and_intervals_are_over_seeds(compared, tmp_path, capsys):
    assert main([seeds(compared, 0, 1, 2), f"output={tmp_path}", "confidence=0.9"]) == 0
    text = capsys.readouterr().out
    assert "Seeds 0, 1, 2. 6 documents" in text and (tmp_path / "diagnostics.md").read_text().startswith(text.rstrip())
    report = json.loads((tmp_path / "diagnostics.json").read_text())
    parts = [json.loads((compared / str(seed) / "diagnostics.json").read_text()) for seed in range(3)]
    assert report["seeds"] == [[0, 0], [1, 1], [2, 2]] and report["arms"][1]["name"] == "dla"
    for key in ("bands", "curve", "lengths", "recalled"):
        for place, line in enumerate(report[key]):
            of_seeds = [part[key][place] for part in parts]
            assert (line["first"], line["end"]) == (of_seeds[0]["first"], of_seeds[0]["end"])
            for found, each in (
                (line["arms"]["single"], [one["arms"]["single"]["mean"] for one in of_seeds]),
                (line["differences"]["dla"], [one["differences"]["dla"]["mean"] for one in of_seeds]),
            ):
                check_student(found, [value for value in each if value is not None])
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"loss_by_position.png", "perplexity_by_length.png", "recalled.png"}


def check_student(found: dict, values: list[float]) -> None:
    """`found` is the mean of the values with Student's t interval, by hand."""
    assert found["seeds"] == len(values)
    if not values:
        assert found["mean"] is None
        return
    mean = sum(values) / len(values)
    assert found["mean"] == pytest.approx(mean, rel=1e-12)
    if len(values) > 1:
        deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
        half = t_quantile(0.95, len(values) - 1) * deviation / len(values) ** 0.5
        assert found["high"] - found["mean"] == pytest.approx(half, rel=1e-9, abs=1e-12)


def test_a_difference_over_seeds_is_that_of_the_pairs(compared, tmp_path):
    """Not that of the means: what a seed does to both arms cancels."""
    assert main([seeds(compared, 0, 1, 2), f"output={tmp_path}"]) == 0
    band = json.loads((tmp_path / "diagnostics.json").read_text())["bands"][-1]
    arms, difference = band["arms"], band["differences"]["dla"]
    assert difference["mean"] == pytest.approx(arms["dla"]["mean"] - arms["single"]["mean"], abs=1e-9)
    assert difference["high"] - difference["low"] < arms["single"]["high"] - arms["single"]["low"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report["text"].update(fingerprint="other"), "fingerprint of the text is other in"),
        (lambda report: report["arms"][1].update(name="fixed"), "name of the arm dla is fixed in"),
        (lambda report: report["arms"][1]["memory"].update(tau=0.5), "memory of the arm dla is"),
        (lambda report: report["arms"].pop(), "the number of arms is 1 in"),
        (lambda report: report["bands"].pop(), "the ranges of bands is"),
        (lambda report: report.pop("recalled"), "is no report of dla-diagnose ('recalled')"),
    ],
)
def test_comparisons_of_something_else_are_refused_with_what_differs(compared, tmp_path, capsys, change, message):
    report = json.loads((compared / "1" / "diagnostics.json").read_text())
    change(report)
    (tmp_path / "diagnostics.json").write_text(json.dumps(report))
    assert main([f"seeds=[{compared}/0,{tmp_path}]", f"output={tmp_path}/out"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000])
def test_a_file_that_is_no_report_is_told(compared, tmp_path, capsys, text):
    (tmp_path / "diagnostics.json").write_text(text)
    assert main([f"seeds=[{compared}/0,{tmp_path}]", f"output={tmp_path}/out"]) == 2
    assert "is no report of dla-diagnose" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda folder: [seeds(folder, 0)], "names one comparison; give those of two seeds or more"),
        (lambda folder: [seeds(folder, 0, 1, 0)], "names the same checkpoint twice"),
        (lambda folder: [f"seeds=[{folder}/0,{folder}/absent]"], "absent/diagnostics.json is no report of"),
        (lambda folder: [seeds(folder, 0, 1), "documents=3"], "documents is not used with seeds"),
        (lambda folder: [seeds(folder, 0, 1), f"runs=[{folder}/dla_0]"], "runs is not used with seeds"),
    ],
)
def test_mistakes_are_told_with_their_mend(compared, tmp_path, capsys, words, message):
    assert main([*words(compared), f"output={tmp_path}/out"]) == 2
    assert message in capsys.readouterr().err
