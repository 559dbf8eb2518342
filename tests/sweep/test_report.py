"""The report: ranks, spread, paired differences, pictures, failures, and nothing from outside the file."""

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from dla_train.sweep.command import checked_points, run
from dla_train.sweep.definition import SweepConfig
from dla_train.sweep.document import PICTURES
from dla_train.sweep.outcomes import Outcome, finished_outcome, write_outcome
from dla_train.sweep.points import write_point
from dla_train.sweep.report import write_report
from dla_train.sweep.results import SWEEP_FILE, Results, paired_difference, read_results
from tests.sweep.conftest import write_metrics

SEEDS = {0: 0.0, 1: 0.5}
"""What a seed adds to every value: large beside the differences, as in life."""
TABLE_ROW = re.compile(r"^\| (\d+) \| (\S+)", re.MULTILINE)


def value_of(tau: float, capacity: int, seed: int) -> float:
    return 2.0 + abs(tau - 0.7) + capacity / 1000 + SEEDS[seed]


def results_of(folder: Path, sweep: SweepConfig, overrides: list[str]) -> Results:
    (folder / SWEEP_FILE).write_text(json.dumps({"sweep": asdict(sweep), "overrides": overrides}))
    return read_results(folder)


@pytest.fixture
def results(sweep: Callable[..., object], tmp_path: Path) -> Results:
    """tau x capacity x 2 seeds and two baselines; one point failed, one was pruned, one has not ended."""
    words = ["sweep.seeds=[0,1]", "sweep.axes.memory.capacity=[4,8,16]", "sweep.axes.memory.tau=[0.5,0.7,0.9]"]
    found, overrides = sweep(*words, "sweep.baselines.ll=['memory=log_linear']", "sweep.description='a <b> | c'")
    points, configs = checked_points(found, overrides)
    for point in points:
        folder = tmp_path / "sweep"
        write_point(folder, point, configs[point.name])
        run_dir = point.folder(folder)
        if point.name == "tau_0.9-capacity_16-seed_1":
            write_outcome(run_dir, Outcome("failed", 5, reason="loss is nan | at <step> 5"))
        elif point.name == "tau_0.5-capacity_16-seed_1":
            write_outcome(run_dir, Outcome("pruned", 4, reason="behind"))
        elif point.name != "tau_0.5-capacity_8-seed_1":
            tau, capacity = point.values.get("memory.tau", 1.0), point.values.get("memory.capacity", 0)
            value = value_of(tau, capacity, point.seed)
            write_metrics(run_dir, {4: value + 1, 8: value})
            write_outcome(run_dir, finished_outcome(run_dir, "validation_loss"))
    return results_of(tmp_path / "sweep", found, overrides)


def test_settings_are_ranked_by_the_mean_over_seeds_and_incomplete_ones_are_not(results: Results) -> None:
    names = [setting.name for setting in results.ranked]
    assert names[:2] == ["tau_0.7-capacity_4", "tau_0.7-capacity_8"]
    missing = {"tau_0.9-capacity_16", "tau_0.5-capacity_16", "tau_0.5-capacity_8"}
    assert len(results.settings) == 11 and {s.name for s in results.settings} - set(names) == missing
    best = results.ranked[0]
    assert best.spread is not None and best.mean == pytest.approx(2.254)
    assert best.spread.deviation == pytest.approx(0.5 / 2**0.5) and best.spread.count == 2


def test_a_paired_difference_is_free_of_what_seeds_do_to_both(results: Results) -> None:
    reference = results.reference
    assert reference is not None and reference.name == "single"
    found = paired_difference(results.ranked[0].scores, reference.scores)
    assert found is not None and found.mean == pytest.approx(0.004 - 0.3)
    assert found.deviation == pytest.approx(0.0, abs=1e-12) and found.count == 2


def test_the_report_holds_every_part_in_both_forms(results: Results) -> None:
    page = write_report(results)
    text, markup = (results.folder / "report.md").read_text(), page.read_text()
    ranks = TABLE_ROW.findall(text)
    assert [int(rank) for rank, _ in ranks] == list(range(1, 9)) and ranks[0][1] == "tau_0.7-capacity_4"
    assert "| -0.2960 ± 0.0000 | -0.2960 to -0.2960 | 2 of 2 |" in text and "2.2540 ± 0.3536" in text
    assert "| tau_0.5-capacity_8-seed_1 | waiting | 0 |" in text
    for part in ("Failed points", "Pruned points", "Not finished yet", "Every point", "Merge statistics", "Two axes"):
        assert f"## {part}" in text and f"<h2>{part}</h2>" in markup
    assert "loss is nan \\| at <step> 5" in text and "loss is nan | at &lt;step&gt; 5" in markup
    assert "a &lt;b&gt; | c" in markup
    assert "memory.tau=0.7 memory.capacity=4" in text and "seed=0" in text


def test_the_best_setting_alone_stands_out(results: Results) -> None:
    markup = write_report(results).read_text()
    assert (
        markup.count("<tr class=first>") == 1 and 'class=first><td>1</td><td class="text">tau_0.7-capacity_4' in markup
    )


def test_the_page_needs_nothing_but_itself_and_its_tags_close(results: Results) -> None:
    markup = write_report(results).read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(|<script""", markup)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', markup)
    assert len(pictures) == 4
    for data in pictures:
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))
        assert pixels.shape[0] > 200 and pixels[..., :3].std() > 0.03, "the picture is blank"
    open_tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Tags().feed(markup.partition("\n")[2])
    assert open_tags == []


def test_the_pictures_of_the_markdown_lie_beside_it(results: Results) -> None:
    write_report(results)
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (results.folder / "report.md").read_text())
    assert len(named) == 4 and all(name.startswith(PICTURES) and (results.folder / name).is_file() for name in named)


def test_a_report_of_a_sweep_that_has_only_begun_is_written_too(results: Results) -> None:
    for path in (results.folder / "points").glob("*/outcome.json"):
        path.unlink()
    assert run(["report", str(results.folder)]) == 0
    text = (results.folder / "report.md").read_text()
    assert "22 unfinished" in text and "## The best" not in text and "| single-seed_0 | 0 | unfinished | 8 |" in text


@pytest.mark.parametrize("sampler", ["random", "one axis", "three axes"])
def test_every_shape_of_a_sweep_has_its_pictures(sweep, tmp_path: Path, sampler: str) -> None:
    words = {
        "random": ["sweep.sampler=random", "sweep.budget=6", "sweep.axes.optim.eps={low: 1e-9, high: 1e-5, log: true}"],
        "one axis": [],
        "three axes": ["sweep.axes.memory.capacity=[4,8]", "sweep.axes.memory.drift=[token,update]"],
    }[sampler]
    found, overrides = sweep(*words)
    points, configs = checked_points(found, overrides)
    for number, point in enumerate(points):
        write_point(tmp_path / "sweep", point, configs[point.name])
        write_outcome(point.folder(tmp_path / "sweep"), Outcome("finished", 8, 2.0 + number / 10))
        write_metrics(point.folder(tmp_path / "sweep"), {8: 2.0 + number / 10})
    write_report(results_of(tmp_path / "sweep", found, overrides))
    drawn = {path.stem for path in (tmp_path / "sweep" / PICTURES).glob("*.png")}
    expected = {"parallel_coordinates", "loss_curves", "merge_statistics", "heat_map"}
    assert drawn == (expected - {"heat_map"} if sampler == "one axis" else expected)
