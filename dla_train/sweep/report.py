"""What a sweep found: `report.html`, `report.md` and `report.json` in its folder, made of its points at any time.

Every claim is a paired one: a setting stands beside the first baseline with the difference seed by seed. The tables say
how many seeds a number has and how far they spread; a setting without all its seeds is listed, but not ranked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from dla_train.config import ConfigError
from dla_train.intervals import CONFIDENCE
from dla_train.sweep import figures
from dla_train.sweep.document import Block, Code, Heading, Paragraph, Picture, Table, write_document
from dla_train.sweep.kept import KEPT_FILE, open_results, write_kept
from dla_train.sweep.point_results import COSTS, LOSSES, MERGE_STATISTICS
from dla_train.sweep.points import command_line, written
from dla_train.sweep.positions import compared, span_difference, span_loss, span_words, spans_of
from dla_train.sweep.results import SWEEP_FILE, Results, SettingResult, Spread, paired_difference

_FORMS: dict[str, Callable[[Spread], str]] = {
    "boundary_rate": lambda spread: _spread(spread, ".3f"),
    "live_slots": lambda spread: _spread(spread, ".1f"),
    "tau": lambda spread: _spread(spread, ".3f"),
    "parameters": lambda spread: f"{spread.mean:,.0f}",
    "tokens_per_second": lambda spread: _spread(spread, ",.0f"),
    "memory_bytes": lambda spread: f"{spread.mean / 2**20:,.0f}",
    "cache_bytes": lambda spread: f"{spread.mean / 2**10:,.1f}",
}
"""Cells of the table of slots, size and cost."""
_COLUMNS = {
    "validation_bits_per_byte": "bits per byte",
    "tokens_per_second": "tokens/s",
    "memory_bytes": "peak memory, MiB",
    "cache_bytes": "decode cache, KiB",
}


def write_report(results: Results, to: Path | None = None) -> Path:
    """Write the report into the sweep's folder, or Markdown and JSON alone into `to`; returns the page.

    Raises ConfigError where `to` holds another sweep or its report.
    """
    folder = to or results.folder
    if to is not None:
        _check_place(results, to)
        to.mkdir(parents=True, exist_ok=True)
    write_kept(results, folder)
    return write_document(folder, report_blocks(results), with_html=to is None)


def _check_place(results: Results, folder: Path) -> None:
    """Raise ConfigError rather than write over what belongs to another sweep."""
    if (folder / SWEEP_FILE).is_file():
        if folder.resolve() != results.folder.resolve():
            raise ConfigError(f"{folder} holds a sweep of its own, whose report lies there; choose another folder")
    elif (folder / KEPT_FILE).is_file() and (there := open_results(folder).sweep.name) != results.sweep.name:
        raise ConfigError(f"{folder} holds the report of the sweep {there}; choose another folder")


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
    blocks += _costs(results)
    blocks += _loss_by_position(results)
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
            f"Difference: setting minus {results.reference.name}, seed by seed, mean ± standard deviation"
            f"{_interval_words(results)}, and in how many of the seeds the setting is better. "
        )
    return text + "The other numbers are those of the runs' last lines."


def _interval_words(results: Results) -> str:
    return f", {CONFIDENCE:.0%} interval (Student's t over seeds)" if len(results.sweep.seeds) > 1 else ""


def _ranking(results: Results) -> Table:
    names = [name for name in LOSSES if name != results.sweep.objective]
    names = [name for name in names if any(setting.number(name) for setting in results.ranked)]
    head = ["", "setting", *results.sweep.axes, results.sweep.objective]
    if results.reference:
        head += [f"difference to {results.reference.name}", *_interval_head(results), "better in"]
    rows = []
    for rank, setting in enumerate(results.ranked, start=1):
        values = [written(setting.values[key]) if key in setting.values else "" for key in results.sweep.axes]
        numbers = [_spread(setting.number(name)) for name in names]
        difference = _difference(results, setting)
        rows.append([str(rank), results.label(setting), *values, _spread(setting.spread), *difference, *numbers])
    return Table([*head, *map(_column, names)], rows, left=["setting"], best_first=True)


def _interval_head(results: Results) -> list[str]:
    return [f"{CONFIDENCE:.0%} interval"] if len(results.sweep.seeds) > 1 else []


def _difference(results: Results, setting: SettingResult) -> list[str]:
    """Cells of the paired difference; empty ones of the reference itself."""
    reference, interval_cells = results.reference, len(_interval_head(results))
    if reference is None:
        return []
    found = paired_difference(setting.scores, reference.scores)
    if found is None or setting is reference:
        return [""] * (2 + interval_cells)
    better = sum(value < reference.scores[seed] for seed, value in setting.scores.items() if seed in reference.scores)
    return [_spread(found, "+.4f"), *[_interval(found)] * interval_cells, f"{better} of {found.count}"]


def _costs(results: Results) -> list[Block]:
    """Slots, size and cost of the ranked settings; a column only where some run has the number."""
    names = [name for name in (*MERGE_STATISTICS, *COSTS) if any(setting.number(name) for setting in results.ranked)]
    if not names:
        return []
    rows = []
    for setting in results.ranked:
        found = [(name, setting.number(name)) for name in names]
        rows.append([results.label(setting), *(_FORMS[name](spread) if spread else "" for name, spread in found)])
    text = (
        "In the order of the table above. Boundaries, slots and tau are of the runs' last lines, tokens/s the median "
        "over a run's lines. Peak memory: the device's, or of the whole process on a CPU, of the rank that had most; "
        "mean over seeds. Decode cache: of one sequence as long as a row of training, by formula, as are the "
        "parameters; only attention's grows with the sequence."
    )
    return [
        Heading("Slots, size and cost"),
        Paragraph(text),
        Table(["setting", *map(_column, names)], rows, left=["setting"]),
    ]


def _loss_by_position(results: Results) -> list[Block]:
    spans = spans_of(results.ranked)
    if not spans:
        return []
    head = ["setting", *map(span_words, spans)]
    means = [[results.label(s), *(_spread(span_loss(s, span)) for span in spans)] for s in results.ranked]
    text = "Held-out loss in nats per token by position in the document: means over seeds ± standard deviation."
    blocks: list[Block] = [Heading("Loss by position"), Paragraph(text), Table(head, means, left=["setting"])]
    reference, others = results.reference, compared(results)
    if reference is None or not others:
        return blocks
    rows = []
    for setting in others:
        found = [span_difference(setting, reference, span) for span in spans]
        rows.append([results.label(setting), *(_with_interval(spread) for spread in found)])
    brackets = f", in brackets the {CONFIDENCE:.0%} interval (Student's t)" if len(results.sweep.seeds) > 1 else ""
    text = f"Setting minus {reference.name}, seed by seed: mean over seeds{brackets}. Below 0 the setting is better."
    blocks += [Paragraph(text), Table(head, rows, left=["setting"])]
    if picture := figures.loss_by_position(results):
        caption = f"Difference to {reference.name} by position{brackets and ' with these intervals'}"
        more = f", the best {figures.POSITION_LINES} settings" if len(others) > figures.POSITION_LINES else ""
        blocks.append(Picture("loss_by_position", picture, f"{caption}{more}."))
    return blocks


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
    rows = [[result.point.name, result.state, str(result.step)] for result in found]
    return [Heading("Not finished yet"), Table(["point", "state", "steps"], rows, left=["point", "state"])]


def _all_points(results: Results) -> Table:
    rows = []
    for result in results.points:
        outcome = result.outcome
        value = f"{outcome.value:.4f}" if outcome and outcome.value is not None else ""
        state = outcome.state if outcome else "unfinished"
        rows.append([result.point.name, str(result.point.seed), state, str(result.step), value])
    return Table(["point", "seed", "state", "steps", results.sweep.objective], rows, left=["point", "state"])


def _spread(spread: Spread | None, form: str = ".4f") -> str:
    if spread is None:
        return ""
    mean = format(spread.mean, form)
    return mean if spread.deviation is None else f"{mean} ± {format(spread.deviation, form.lstrip('+'))}"


def _interval(spread: Spread) -> str:
    return f"{spread.interval.low:+.4f} to {spread.interval.high:+.4f}" if spread.interval else ""


def _with_interval(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.mean:+.4f}" + (f" [{_interval(spread)}]" if spread.interval else "")


def _column(name: str) -> str:
    return _COLUMNS.get(name, name.replace("_", " "))
