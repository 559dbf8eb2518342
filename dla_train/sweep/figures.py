"""The pictures of a sweep's report: curves, loss by position, heat map, parallel coordinates, merge statistics.

Settings are told apart by colour and line style or marker together, baselines beside axes are grey; only the best few
are drawn, because more than that cannot be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dla_train.sweep.definition import Axis, Range, Scalar, sweep_axes
from dla_train.sweep.point_results import MERGE_STATISTICS
from dla_train.sweep.positions import Span, compared, span_difference, span_words, spans_of
from dla_train.sweep.results import Results, SettingResult

CURVES = 5
"""Settings drawn as curves, beside the baselines."""
POSITION_LINES = 8
"""Settings drawn by position, beside the reference."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#7a5c00")
"""Told apart by colour-blind readers too: those of Okabe and Ito, but for yellow (pale on white) and black (a grey)."""
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MAP = "viridis"
_STATISTICS = dict(zip(MERGE_STATISTICS, ("boundaries per token", "live slots", "tau"), strict=True))


def loss_curves(results: Results) -> Figure | None:
    """Held-out and training loss of the best settings and the baselines, means over seeds; None without any."""
    shown = _shown(results)
    if not shown:
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name, title in zip(panels, (results.sweep.objective, "loss"), ("held out", "training"), strict=True):
        for setting, colour, style in shown:
            curve = setting.curve(name)
            marker = "o" if len(curve) < 15 else None
            axes.plot(list(curve), list(curve.values()), style, color=colour, marker=marker, ms=3, lw=1.3)
        _finish(axes, "optimizer step", title)
    panels[0].set_ylabel(_words(results.sweep.objective))
    panels[1].set_ylabel("loss (nats per token)")
    _legend(figure, results, shown)
    return figure


def merge_statistics(results: Results) -> Figure | None:
    """Boundary rate, live slots and tau by step, of the same settings; None where no run has any."""
    shown = [item for item in _shown(results) if any(item[0].curve(name) for name in _STATISTICS)]
    if not shown:
        return None
    there = {name: title for name, title in _STATISTICS.items() if any(item[0].curve(name) for item in shown)}
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(there), squeeze=False)[0], there.items(), strict=True):
        for setting, colour, style in shown:
            curve = setting.curve(name)
            axes.plot(list(curve), list(curve.values()), style, color=colour, lw=1.3)
        _finish(axes, "optimizer step", title)
    _legend(figure, results, shown)
    return figure


def loss_by_position(results: Results) -> Figure | None:
    """Differences to the reference by position with their intervals, a line a setting; None where there are none."""
    shown, reference = compared(results)[:POSITION_LINES], results.reference
    if not shown or reference is None:
        return None
    spans = spans_of([*shown, reference])
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots()
    apart = 0.72 / len(shown)
    for number, setting in enumerate(shown):
        shift = (number - (len(shown) - 1) / 2) * apart
        _position_line(axes, setting, reference, spans, shift, (_COLOURS[number], _MARKERS[number]))
    axes.axhline(0, color="0.35", lw=1)
    for border in range(1, len(spans)):
        axes.axvline(border - 0.5, color="0.85", lw=0.8)
    axes.set_xticks(range(len(spans)), [span_words(span) for span in spans])
    axes.set_xlim(-0.5, len(spans) - 0.5)
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel(f"nats per token more than {reference.name}")
    axes.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside upper center", ncols=min(4, len(shown)), fontsize=9, frameon=False)
    return figure


def _position_line(
    axes: Axes,
    setting: SettingResult,
    reference: SettingResult,
    spans: Sequence[Span],
    shift: float,
    look: tuple[str, str],
) -> None:
    """Points beside each other within a span, joined by a thin line; bars are intervals, none with one seed."""
    found = {place: span_difference(setting, reference, span) for place, span in enumerate(spans)}
    there = {place + shift: spread for place, spread in found.items() if spread is not None}
    means = [spread.mean for spread in there.values()]
    reach = [spread.interval.high - spread.mean if spread.interval else 0.0 for spread in there.values()]
    axes.plot(list(there), means, color=look[0], lw=1, alpha=0.45)
    bars = reach if any(spread.interval for spread in there.values()) else None
    axes.errorbar(
        list(there), means, yerr=bars, fmt=look[1], color=look[0], ms=6, lw=1.5, capsize=3, label=setting.name
    )


def heat_map(results: Results) -> Figure | None:
    """The objective over two axes (tau and capacity where they are swept), the mean over any others; else None."""
    chosen = _two_axes(sweep_axes(results.sweep))
    if chosen is None or not results.swept:
        return None
    rows, columns = chosen
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    if any(isinstance(sweep_axes(results.sweep)[key], Range) for key in chosen):
        _scatter(axes, results, rows, columns)
    else:
        _cells(axes, results, rows, columns)
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    beside = [f"{item.name} {item.mean:.4f}" for item in results.ranked if item.baseline]
    axes.set_title("; ".join(["baselines: " + ", ".join(beside)] if beside else []), fontsize=9)
    return figure


def parallel_coordinates(results: Results) -> Figure | None:
    """A line a setting, through its values and the objective; the colour is the objective. None without settings."""
    swept, axes_of = results.swept, sweep_axes(results.sweep)
    if not swept or not axes_of:
        return None
    figure = Figure(figsize=(max(6.0, 1.9 * (len(axes_of) + 1)), 4.2), layout="constrained")
    axes = figure.subplots()
    colour = _Colours.of([setting.mean for setting in swept])
    scales = [_scale(axis, [setting.values[key] for setting in swept]) for key, axis in axes_of.items()]
    for setting in reversed(swept):  # the best on top
        heights = [scale[value] for scale, value in zip(scales, setting.values.values(), strict=True)]
        heights.append(colour.share(setting.mean))
        best = setting is swept[0]
        axes.plot(heights, color=colour.at(setting.mean), lw=2.6 if best else 1.2, alpha=1.0 if best else 0.75)
    for position, scale in enumerate(scales):
        axes.axvline(position, color="0.6", lw=0.8)
        for value, height in _ticks(scale):
            axes.annotate(_short(value), (position, height), xytext=(4, 0), textcoords="offset points", fontsize=8)
    end = len(scales)
    axes.axvline(end, color="0.6", lw=0.8)
    for value in {colour.low, colour.high}:
        axes.annotate(f"{value:.4f}", (end, colour.share(value)), xytext=(4, 0), textcoords="offset points", fontsize=8)
    axes.set_xticks(range(end + 1), [*axes_of, results.sweep.objective])
    axes.set_xlim(-0.1, end + 0.35)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    return figure


def _shown(results: Results) -> list[tuple[SettingResult, str, str]]:
    """The best settings and the baselines, with colour and style; baselines alone are in colour as settings are."""
    main = results.swept[:CURVES] if results.swept else results.ranked[: len(_COLOURS)]
    best = [(s, _COLOURS[n], _STYLES[n % 4]) for n, s in enumerate(main)]
    greys = [item for item in results.ranked if item.baseline and item not in main]
    return best + [(s, str(0.15 + 0.5 * n / len(greys)), _STYLES[n % 4]) for n, s in enumerate(greys)]


def _finish(axes: Axes, xlabel: str, title: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)


def _legend(figure: Figure, results: Results, shown: Sequence[tuple[SettingResult, str, str]]) -> None:
    first = figure.axes[0]
    handles = [first.plot([], [], style, color=colour, lw=1.6)[0] for _, colour, style in shown]
    names = [results.label(setting) for setting, _, _ in shown]
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)), fontsize=8, frameon=False)


def _two_axes(axes: dict[str, Axis]) -> tuple[str, str] | None:
    wanted = ("memory.tau", "memory.capacity")
    if all(key in axes for key in wanted):
        return wanted
    keys = list(axes)
    return (keys[0], keys[1]) if len(keys) > 1 else None


def _cells(axes: Axes, results: Results, rows: str, columns: str) -> None:
    lists = sweep_axes(results.sweep)
    row_values, column_values = lists[rows], lists[columns]
    assert not isinstance(row_values, Range) and not isinstance(column_values, Range)
    means = [[_mean_at(results, {rows: row, columns: column}) for column in column_values] for row in row_values]
    known = [value for line in means for value in line if not math.isnan(value)]
    colour = _Colours.of(known)
    axes.imshow(means, cmap=_MAP, vmin=colour.low, vmax=colour.high, origin="lower", aspect="auto")
    for y, line in enumerate(means):
        for x, value in enumerate(line):
            dark = not math.isnan(value) and colour.share(value) < 0.55
            text = "-" if math.isnan(value) else f"{value:.4f}"
            weight = "bold" if value == min(known) else "normal"
            axes.text(x, y, text, ha="center", va="center", color="w" if dark else "k", fontsize=9, weight=weight)
    axes.set_xticks(range(len(column_values)), [_short(value) for value in column_values])
    axes.set_yticks(range(len(row_values)), [_short(value) for value in row_values])
    colour.bar(axes, _words(results.sweep.objective))


def _scatter(axes: Axes, results: Results, rows: str, columns: str) -> None:
    lists, swept = sweep_axes(results.sweep), results.swept
    colour = _Colours.of([setting.mean for setting in swept])
    x, y = (_positions(lists[key], [setting.values[key] for setting in swept]) for key in (columns, rows))
    axes.scatter(x, y, c=[colour.at(s.mean) for s in swept], s=60, edgecolor="k", linewidth=0.4)
    axes.scatter(x[:1], y[:1], s=220, facecolor="none", edgecolor="tab:red", linewidth=1.5)
    for key, set_scale in ((columns, axes.set_xscale), (rows, axes.set_yscale)):
        axis = lists[key]
        if isinstance(axis, Range) and axis.log:
            set_scale("log")
    colour.bar(axes, _words(results.sweep.objective))


def _positions(axis: Axis, values: Sequence[Scalar]) -> list[float] | list[str]:
    """Numbers of a range, names of a list."""
    if isinstance(axis, Range):
        return [float(value) for value in values if isinstance(value, int | float)]
    return [str(value) for value in values]


def _mean_at(results: Results, values: dict[str, Scalar]) -> float:
    found = [s.mean for s in results.swept if all(s.values[key] == value for key, value in values.items())]
    return sum(found) / len(found) if found else math.nan


@dataclass(frozen=True)
class _Colours:
    """Colours of the objective between its least and largest value."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> _Colours:
        return cls(min(values), max(values))

    def share(self, value: float) -> float:
        """0 for the least, 1 for the largest."""
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5

    def at(self, value: float) -> tuple[float, float, float, float]:
        return colormaps[_MAP](self.share(value))

    def bar(self, axes: Axes, label: str) -> None:
        assert isinstance(axes.figure, Figure)
        axes.figure.colorbar(ScalarMappable(Normalize(self.low, self.high), colormaps[_MAP]), ax=axes, label=label)


def _scale(axis: Axis, values: Sequence[Scalar]) -> dict[Scalar, float]:
    """Heights from 0 to 1: by size for a range, evenly for a list."""
    if isinstance(axis, Range):
        low, high = (math.log(axis.low), math.log(axis.high)) if axis.log else (axis.low, axis.high)
        numbers = {value: float(value) for value in values if isinstance(value, int | float)}
        return {value: ((math.log(n) if axis.log else n) - low) / (high - low) for value, n in numbers.items()}
    return {value: number / max(len(axis) - 1, 1) for number, value in enumerate(axis)}


def _ticks(scale: dict[Scalar, float]) -> list[tuple[Scalar, float]]:
    """All values of a list, and the ends of what was drawn from a range."""
    ordered = sorted(scale.items(), key=lambda item: item[1])
    return ordered if len(ordered) <= 12 else [ordered[0], ordered[-1]]


def _short(value: Scalar) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _words(objective: str) -> str:
    return {"validation_loss": "held-out loss (nats per token)"}.get(objective, "held-out bits per byte")
