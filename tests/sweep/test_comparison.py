"""A sweep of baselines alone: paired intervals, loss by position, size and cost, and a report kept without its runs."""

import json
import math
import re
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from dla_train.models.cost import cache_bytes, parameter_count
from dla_train.sweep import figures
from dla_train.sweep.command import checked_points, run
from dla_train.sweep.definition import read_sweep
from dla_train.sweep.kept import KEPT_FILE, open_results, write_kept
from dla_train.sweep.outcomes import finished_outcome, write_outcome
from dla_train.sweep.point_results import CURVE_POINTS, read_point_result
from dla_train.sweep.points import Point, write_point
from dla_train.sweep.positions import spans_of
from dla_train.sweep.report import write_report
from dla_train.sweep.results import SWEEP_FILE, read_results
from tests.sweep.conftest import SWEPT, write_metrics

ARMS = {"single": "memory=single", "log_linear": "memory=log_linear", "slot": "memory=dla"}
SEEDS = {0: 0.0, 1: 0.5, 2: -0.3}
"""What a seed adds to every value."""
GAIN = {"single": (0.0, 0.0, 0.0), "log_linear": (0.01, 0.02, 0.06), "slot": (0.1, 0.2, 0.3)}
"""By seed: what an arm is better than `single`; nothing in the first span, this in the second."""
HALF = 4.302653 * statistics.stdev(GAIN["log_linear"]) / math.sqrt(3)
"""Of log_linear's interval: Student's t of two degrees, from a table."""


def fake_sweep(tmp_path: Path, seeds: list[int], *words: str) -> Path:
    """A finished sweep of ARMS in tmp_path/sweep, read from nothing but what fake runs left."""
    file, folder = tmp_path / "arms.yaml", tmp_path / "sweep"
    file.write_text("baselines: {" + ", ".join(f"{name}: [{word}]" for name, word in ARMS.items()) + "}\n")
    sweep, overrides = read_sweep(
        [f"sweep={file}", f"sweep.folder={folder}", f"sweep.seeds={seeds}".replace(" ", ""), *SWEPT, *words]
    )
    points, configs = checked_points(sweep, overrides)
    for point in points:
        write_point(folder, point, configs[point.name])
        loss = 3.0 + SEEDS[point.seed] - GAIN.get(point.setting, GAIN["single"])[point.seed]
        spans = {"8_32": loss, "0_8": 4.0 + SEEDS[point.seed]}
        write_metrics(point.folder(folder), {4: loss + 1, 8: loss}, spans)
        write_outcome(point.folder(folder), finished_outcome(point.folder(folder), "validation_loss"))
    (folder / SWEEP_FILE).write_text(json.dumps({"sweep": asdict(sweep), "overrides": overrides}))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_sweep(tmp_path_factory.mktemp("finished"), [0, 1, 2])


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A finished sweep of three seeds, to change and to report on."""
    return Path(shutil.copytree(finished, tmp_path / "sweep"))


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of a report's time, and most tests look at none."""
    monkeypatch.setattr("dla_train.sweep.document._png", lambda figure: b"")


def rows(text: str, title: str, table: int = 0) -> dict[str, list[str]]:
    """Cells of a table under a heading, by setting."""
    section = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [found for found in re.split(r"\n\n", section) if found.startswith("|")][table].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    at = cells[0].index("setting")
    return {row[at]: row for row in [cells[0], *cells[2:]]}


def told(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / KEPT_FILE).read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.usefixtures("unpainted")
def test_differences_have_students_interval_over_seeds(folder: Path) -> None:
    write_report(read_results(folder))
    ranks = rows((folder / "report.md").read_text(), "Settings, the best first")
    assert ranks["setting"][2:6] == ["validation_loss", "difference to single", "95% interval", "better in"]
    assert ranks["log_linear"][3:6] == ["-0.0300 ± 0.0265", f"{-0.03 - HALF:+.4f} to {-0.03 + HALF:+.4f}", "3 of 3"]
    assert ranks["single"][3:6] == ["", "", ""]
    difference = next(item["difference"] for item in told(folder)["settings"] if item["name"] == "log_linear")
    assert (difference["low"], difference["high"]) == pytest.approx((-0.03 - HALF, -0.03 + HALF), rel=1e-5)


@pytest.mark.usefixtures("unpainted")
def test_with_one_seed_there_is_a_difference_and_no_interval(tmp_path: Path) -> None:
    folder = fake_sweep(tmp_path, [1])
    write_report(read_results(folder))
    text = (folder / "report.md").read_text()
    assert "95%" not in text and "(Student" not in text
    assert rows(text, "Settings, the best first")["slot"][3:5] == ["-0.2000", "1 of 1"]
    assert rows(text, "Loss by position", 1)["slot"] == ["slot", "+0.0000", "-0.2000"]
    assert (folder / "report/loss_by_position.png").is_file()


@pytest.mark.usefixtures("unpainted")
def test_loss_by_position_is_told_by_span_in_order_and_paired(folder: Path) -> None:
    results = read_results(folder)
    assert spans_of(results.ranked) == [(0, 8), (8, 32)]
    write_report(results)
    text = (folder / "report.md").read_text()
    means, differences = rows(text, "Loss by position"), rows(text, "Loss by position", 1)
    assert means["setting"] == differences["setting"] == ["setting", "0 to 7", "8 to 31"]
    spread = statistics.stdev(SEEDS.values())
    assert means["single"][1] == f"{4 + statistics.fmean(SEEDS.values()):.4f} ± {spread:.4f}"
    assert "single" not in differences and list(differences)[1:] == ["slot", "log_linear"]
    interval = f"-0.0300 [{-0.03 - HALF:+.4f} to {-0.03 + HALF:+.4f}]"
    assert differences["log_linear"][1:] == ["+0.0000 [+0.0000 to +0.0000]", interval]


@pytest.mark.usefixtures("unpainted")
def test_runs_without_positions_have_no_such_section(folder: Path) -> None:
    for path in folder.glob("points/*/metrics.jsonl"):
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if "_8_32" not in line))
    results = read_results(folder)
    write_report(results)
    assert "Loss by position" not in (folder / "report.md").read_text() and figures.loss_by_position(results) is None


def test_the_picture_has_a_line_and_bars_for_every_setting_but_the_reference(folder: Path) -> None:
    figure = figures.loss_by_position(read_results(folder))
    assert figure is not None
    (axes,) = figure.axes
    drawn = {bars.get_label(): bars for bars in axes.containers}
    assert list(drawn) == ["slot", "log_linear"]
    for name, bars in drawn.items():
        line, caps, _ = bars.lines
        assert list(line.get_ydata()) == pytest.approx([0, -statistics.fmean(GAIN[name])]) and len(caps) == 2
    upper = drawn["log_linear"].lines[1][1].get_ydata()
    assert upper[1] == pytest.approx(-0.03 + HALF, rel=1e-4)
    places = [tuple(bars.lines[0].get_xdata()) for bars in drawn.values()]
    assert places[0][1] < places[1][1] and all(abs(x - n) < 0.5 for place in places for n, x in enumerate(place))
    write_report(read_results(folder))
    assert matplotlib.image.imread(folder / "report/loss_by_position.png")[..., :3].std() > 0.03


def test_baselines_alone_are_drawn_in_colours_and_only_what_some_run_has(folder: Path) -> None:
    for path in folder.glob("points/*/metrics.jsonl"):
        path.write_text(path.read_text().replace('"tau"', '"other"'))
    results = read_results(folder)
    curves, slots = figures.loss_curves(results), figures.merge_statistics(results)
    assert curves is not None and slots is not None
    assert [axes.get_title() for axes in slots.axes] == ["boundaries per token", "live slots"]
    colours = {line.get_color() for line in curves.axes[0].lines}
    assert len(colours) == 3 and all(colour.startswith("#") for colour in colours), "shades of grey are for baselines"
    assert [text.get_text() for text in curves.legends[0].get_texts()] == ["slot", "log_linear", "single"]


def test_the_reference_is_found_by_a_name_that_a_folder_cannot_have(tmp_path: Path) -> None:
    folder = fake_sweep(tmp_path, [0], "sweep.baselines={one+state: ['memory=single'], slot: ['memory=dla']}")
    reference = read_results(folder).reference
    assert reference is not None and reference.name == "one_state"


@pytest.mark.usefixtures("unpainted")
def test_size_and_cost_are_those_of_the_configuration_and_of_all_lines(folder: Path) -> None:
    for path in folder.glob("points/*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in (line for line in lines if "tokens_per_second" in line):
            speed = {1: 10.0, 8: 9e9}.get(line["step"], 1000.0)  # the first compiles, the last is lucky
            line |= {"tokens_per_second": speed, "memory_bytes": 2**30 if line["step"] == 3 else 2**20}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = read_results(folder)
    write_report(results)
    cells = rows((folder / "report.md").read_text(), "Slots, size and cost")
    heads = ["boundary rate", "live slots", "tau", "parameters", "tokens/s", "peak memory, MiB", "decode cache, KiB"]
    assert cells["setting"] == ["setting", *heads]
    sweep = results.sweep
    points, configs = checked_points(sweep, results.overrides)
    for point in points:
        config = configs[point.name]
        size = parameter_count(config.model, config.memory)
        cache = cache_bytes(config.model, config.memory, 1, config.data.context_tokens)
        assert cells[point.setting][1:4] == ["0.250 ± 0.000", "3.0 ± 0.0", "0.600 ± 0.000"]
        assert cells[point.setting][4:] == [f"{size:,}", "1,000 ± 0", "1,024", f"{cache / 1024:,.1f}"]
    assert cells["single"][4] != cells["slot"][4] and cells["single"][7] != cells["slot"][7]


def test_attentions_cache_is_that_of_a_row_in_the_type_of_the_run(tmp_path: Path) -> None:
    words = ["model.backbone=attention", "model.conv_width=0", "memory=none", "train.dtype=bfloat16"]
    found = read_results(fake_sweep(tmp_path, [0], f"sweep.baselines.attention={words}".replace(" ", "")))
    numbers = next(item for item in found.settings if item.name == "attention").points[0].numbers
    assert numbers["cache_bytes"] == 2 * (2 * 32 * 2 * 8 * 2 + 8)  # layers x (keys and values of 32 tokens + counters)


@pytest.mark.usefixtures("unpainted")
def test_a_configuration_of_another_version_leaves_its_cells_empty(folder: Path) -> None:
    path = folder / "points/slot-seed_0/config.yaml"
    path.write_text(path.read_text().replace("  width:", "  breadth:"))
    write_report(read_results(folder))
    cells = rows((folder / "report.md").read_text(), "Slots, size and cost")
    assert cells["slot"][4] == cells["slot"][-1] == "" and cells["slot"][5] and cells["single"][4]


def test_a_kept_report_says_what_the_first_said_and_is_made_again_of_its_json_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "points/single-seed_1/metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": NaN}\n')
    assert run(["report", str(folder)]) == 0
    kept, text = tmp_path / "docs/results/arms", (folder / "report.md").read_text()
    assert run(["report", str(folder), "--to", str(kept)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder / "report.html"), str(kept / "report.md")]
    first = read_results(folder)
    shutil.rmtree(folder)
    assert sorted(path.name for path in kept.iterdir()) == ["report", KEPT_FILE, "report.md"]
    assert (kept / "report.md").read_text() == text
    assert open_results(kept) == first
    written = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    (kept / "report.md").unlink()
    shutil.rmtree(kept / "report")
    assert run(["report", str(kept)]) == 0
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == written
    assert {str(path.relative_to(kept)) for path in written if path.suffix == ".png"} == set(
        re.findall(r"\]\((report/[^)]+)\)", text)
    )


def test_report_json_holds_every_point_with_its_numbers_overrides_and_versions(folder: Path) -> None:
    write_kept(read_results(folder), folder)
    found = told(folder)
    assert found["reference"] == "single" and len(found["points"]) == 9 and found["sweep"]["seeds"] == [0, 1, 2]
    point = next(item for item in found["points"] if item["point"]["name"] == "slot-seed_2")
    assert point["numbers"]["validation_loss_8_32"] == pytest.approx(2.4)
    assert {"boundary_rate", "live_slots", "tokens_per_second", "parameters"} <= set(point["numbers"])
    assert "memory=dla" in point["point"]["overrides"] and "seed=2" in point["point"]["overrides"]
    assert point["outcome"]["state"] == "finished" and point["versions"] == {}
    slot = next(item for item in found["settings"] if item["name"] == "slot")
    assert slot["difference_by_position"]["8 to 31"]["mean"] == pytest.approx(-0.2)
    assert slot["loss_by_position"]["0 to 7"]["seeds"] == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to"], "--to names no folder"),
        (["{sweep}", "--to"], "--to names no folder"),
        (["--to", "{other}"], "0 folders were named"),
        (["{nowhere}"], "holds no sweep.json"),
        (["{sweep}", "--to", "{other}"], "holds a sweep of its own"),
        (["{sweep}", "--to", "{theirs}"], "holds the report of the sweep theirs"),
        (["{damaged}"], "report.json is no report of a sweep"),
        (["{newer}"], "format 2 where this program writes 1"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    write_kept(read_results(folder), folder)
    places = {name: tmp_path / name for name in ("sweep", "other", "theirs", "damaged", "newer", "nowhere")}
    for name in ("other", "theirs", "damaged", "newer"):
        places[name].mkdir()
    kept = (folder / KEPT_FILE).read_text()
    shutil.copy(folder / SWEEP_FILE, places["other"])
    (places["theirs"] / KEPT_FILE).write_text(kept.replace('"name": "arms"', '"name": "theirs"'))
    (places["damaged"] / KEPT_FILE).write_text(kept[: len(kept) // 2])
    (places["newer"] / KEPT_FILE).write_text(kept.replace('"format": 1', '"format": 2'))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(["report", *(word.format(**places) for word in words)]) == 2
    assert says in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_kept_curves_are_thinned_from_their_end(tmp_path: Path) -> None:
    steps = 2 * CURVE_POINTS + 1
    write_metrics(tmp_path, {steps: 3.0})
    found = read_point_result(Point("a", "a", {}, True, None, 0, ()), tmp_path, {})
    assert list(found.curves["loss"]) == list(range(steps, 0, -3))[::-1] and found.step == steps
    assert found.curves["validation_loss"] == {steps: 3.0}


def test_an_unfinished_seed_is_no_part_of_a_comparison_by_position(folder: Path) -> None:
    (folder / "points/single-seed_2/outcome.json").unlink()
    results = read_results(folder)
    assert [item.name for item in results.ranked] == ["slot", "log_linear"]
    write_kept(results, folder)
    found = {item["name"]: item for item in told(folder)["settings"]}
    assert found["slot"]["difference_by_position"]["8 to 31"]["seeds"] == 2
