"""Loss by position in the document, of a sweep's runs that have it: its spans, their means and paired differences.

Each span's difference is taken seed by seed to the reference's same span, so that it has an interval over seeds of its
own. Spans of one run are not independent of each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from dla_train.sweep.results import Results, SettingResult, Spread, paired_difference

Span = tuple[int, int]
"""Positions [first, end)."""
_SPAN = re.compile(r"validation_loss_(\d+)_(\d+)")


def spans_of(settings: Iterable[SettingResult]) -> list[Span]:
    """The spans that any run of the settings has, in order."""
    names = {name for setting in settings for result in setting.points.values() for name in result.numbers}
    return sorted((int(found[1]), int(found[2])) for found in map(_SPAN.fullmatch, names) if found)


def span_loss(setting: SettingResult, span: Span) -> Spread | None:
    """Loss over a span, nats per token; None where no finished run has it."""
    return setting.number(_number(span))


def span_difference(setting: SettingResult, reference: SettingResult, span: Span) -> Spread | None:
    """Setting minus reference over a span; None where no seed has both."""
    return paired_difference(setting.by_seed(_number(span)), reference.by_seed(_number(span)))


def compared(results: Results) -> list[SettingResult]:
    """Ranked settings that have a difference to the reference over some span."""
    reference, spans = results.reference, spans_of(results.ranked)
    if reference is None:
        return []
    others = [setting for setting in results.ranked if setting is not reference]
    return [item for item in others if any(span_difference(item, reference, span) for span in spans)]


def span_words(span: Span) -> str:
    """`0 to 31`: both ends are in it."""
    return f"{span[0]} to {span[1] - 1}"


def _number(span: Span) -> str:
    return f"validation_loss_{span[0]}_{span[1]}"
