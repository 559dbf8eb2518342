"""What a sweep found: `report.html` and `report.md` in its folder, made of its points at any time.

Every claim is a paired one: a setting stands beside the first baseline with the difference seed by seed. The tables say
how many seeds a number has and how far they spread; a setting without all its seeds is listed, but not ranked.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure

from dla_train.runs import read_run
from dla_train.sweep import figures
from dla_train.sweep.document import Block, Code, Heading, Paragraph, Picture, Table, write_document
from dla_train.sweep.points import command_line, written
from dla_train.sweep.results import PointResult, Results, SettingResult, Spread, paired_difference

_NUMBERS = ("validation_bits_per_byte", "loss", "boundary_rate", "live_slots", "tau", "tokens_per_second")
"""Of the last lines of the runs, in the ranked table."""
_FORMS = {"tokens_per_second": ",.0f", "live_slots": ".1f", "tau": ".3f", "boundary_rate": ".3f"}


def write_report(results: Results) -> Path:
    """Write the report into the sweep's folder; returns the HTML file."""
    return write_document(results.folder, report_blocks(results))


def report_blocks(results: Results) -> list[Block]:
    """The report."""
    sweep = results.sweep
    blocks: list[Block] = [Heading(f"Sweep {sweep.name}", 1)]
    if sweep.description:
        blocks.append(Paragraph(sweep.description + "."))
    blocks += [Paragraph(_counts(results)), Paragraph("Settings of every run:")]
    blocks.append(Code(" ".join([*results.sweep.settings, *results.overrides]) or "the defaults"))
    if results.ranked:
        blocks += _best(results)
    blocks += [Heading("Settings, the best first"), Paragraph(_how_to_read(results)), _ranking(results)]
    blocks += _pictures(results)
    blocks += _without_value(results, "failed", "Failed points")
    blocks += _without_value(results, "pruned", "Pruned points")
    blocks += _unfinished(results)
    blocks += [Heading("Every point"), _all_points(results)]
    return blocks


def _counts(results: Results) -> str:
    states = Counter(result.outcome.state if result.outcome else "unfinished" for result in results.points)
    listed = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    seeds = ", ".join(map(str, results.sweep.seeds))
    return (
        f"{len(results.points)} points ({listed or 'none yet'}), sampler {results.sweep.sampler}, seeds {seeds}; "
        f"objective {results.sweep.objective}, smaller is better."
    )


def _best(results: Results) -> list[Block]:
    best = results.ranked[0]
    point = next(iter(best.points.values())).point
    seeds = f", with seed {point.seed}" if len(best.points) > 1 else ""
    text = f"{best.name}: {results.sweep.objective} {_spread(best.spread)}"
    if best.baseline and results.swept:
        after = results.swept[0]
        text += f", a baseline; the best setting on the axes is {after.name} with {_spread(after.spread)}"
    return [
        Heading("The best"),
        Paragraph(f"{text}. This runs {best.name} again{seeds}:"),
        Code(command_line(results.folder, point)),
    ]


def _how_to_read(results: Results) -> str:
    text = "Means over seeds ± standard deviation of a sample (none with one seed). "
    if results.reference:
        text += (
            f"Difference: setting minus {results.reference.name}, seed by seed, mean ± standard deviation, and in how "
            "many of the seeds the setting is better. "
        )
    return text + "The other numbers are those of the runs' last lines."


def _ranking(results: Results) -> Table:
    names = [name for name in _NUMBERS if name != results.sweep.objective]
    names = [name for name in names if any(setting.number(name) for setting in results.ranked)]
    difference = [f"difference to {results.reference.name}", "better in"] if results.reference else []
    head = ["", "setting", *results.sweep.axes, results.sweep.objective, *difference, *map(_column, names)]
    rows = []
    for rank, setting in enumerate(results.ranked, start=1):
        values = [written(setting.values[key]) if key in setting.values else "" for key in results.sweep.axes]
        label = setting.name + (" (baseline)" if setting.baseline else "")
        numbers = [_spread(setting.number(name), _FORMS.get(name, ".4f")) for name in names]
        rows.append([str(rank), label, *values, _spread(setting.spread), *_difference(results, setting), *numbers])
    return Table(head, rows, left=["setting"], best_first=True)


def _difference(results: Results, setting: SettingResult) -> list[str]:
    reference = results.reference
    if reference is None:
        return []
    found = paired_difference(setting, reference)
    if found is None or setting is reference:
        return ["", ""]
    better = sum(value < reference.scores[seed] for seed, value in setting.scores.items() if seed in reference.scores)
    return [_spread(found, "+.4f"), f"{better} of {found.count}"]


def _pictures(results: Results) -> list[Block]:
    others = " (means over the other axes)" if len(results.sweep.axes) > 2 else ""
    drawn: list[tuple[str, Figure | None, str, str]] = [
        (
            "heat_map",
            figures.heat_map(results),
            "Two axes",
            f"The objective over two axes{others}; the best is bold or ringed.",
        ),
        (
            "parallel_coordinates",
            figures.parallel_coordinates(results),
            "All axes",
            "A line a setting, through its values to its objective; the best is thick.",
        ),
        (
            "loss_curves",
            figures.loss_curves(results),
            "Loss curves",
            f"Means over seeds of the best {figures.CURVES} settings and the baselines.",
        ),
        (
            "merge_statistics",
            figures.merge_statistics(results),
            "Merge statistics",
            "Boundaries per token, live slots a head, and the mean threshold tau, where the memory has them.",
        ),
    ]
    return [
        block
        for name, figure, title, caption in drawn
        if figure is not None
        for block in (Heading(title), Picture(name, figure, caption))
    ]


def _without_value(results: Results, state: str, title: str) -> list[Block]:
    found = [result for result in results.points if result.outcome and result.outcome.state == state]
    if not found:
        return []
    rows = [[result.point.name, str(result.outcome.step), result.outcome.reason] for result in found if result.outcome]
    return [Heading(title), Table(["point", "steps", "reason"], rows, left=["point", "reason"])]


def _unfinished(results: Results) -> list[Block]:
    found = [result for result in results.points if result.outcome is None]
    if not found:
        return []
    states = [read_run(result.point.folder(results.folder)).state for result in found]
    rows = [[result.point.name, state, _steps(result)] for result, state in zip(found, states, strict=True)]
    return [Heading("Not finished yet"), Table(["point", "state", "steps"], rows, left=["point", "state"])]


def _all_points(results: Results) -> Table:
    rows = []
    for result in results.points:
        outcome = result.outcome
        value = f"{outcome.value:.4f}" if outcome and outcome.value is not None else ""
        state = outcome.state if outcome else "unfinished"
        rows.append([result.point.name, str(result.point.seed), state, _steps(result), value])
    return Table(["point", "seed", "state", "steps", results.sweep.objective], rows, left=["point", "state"])


def _steps(result: PointResult) -> str:
    if result.outcome:
        return str(result.outcome.step)
    return str(result.lines[-1]["step"]) if result.lines else "0"


def _spread(spread: Spread | None, form: str = ".4f") -> str:
    if spread is None:
        return ""
    mean = format(spread.mean, form)
    return mean if spread.deviation is None else f"{mean} ± {format(spread.deviation, form.lstrip('+'))}"


def _column(name: str) -> str:
    return name.removeprefix("validation_").replace("_", " ").replace("tokens per second", "tokens/s")
