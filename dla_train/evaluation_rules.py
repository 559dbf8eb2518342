"""The rules of `evaluation`, the published tasks that a run asks while it trains, as far as no file is looked at.

That its tasks are known, and their documents there, is checked where a run starts (harness/planned.py).
"""

from __future__ import annotations

import dataclasses

from dla_train.config import ConfigError, EvaluationConfig

SHORTEST_NEEDLES = 256
"""Tokens of the shortest needle task: RULER's prompt and answer without any haystack take most of it."""


def check_evaluation(evaluation: EvaluationConfig, longest_context: int | None) -> None:
    """Raise ConfigError at the first rule broken; `longest_context`: most tokens that the memory can read, if any."""
    if not evaluation.tasks:
        _check_unused(evaluation)
        return
    twice = sorted({name for name in evaluation.tasks if evaluation.tasks.count(name) > 1})
    if twice:
        raise ConfigError(f"evaluation.tasks={evaluation.tasks} names {twice[0]} twice; name every task once")
    if not evaluation.data_dir:
        raise ConfigError(
            f"evaluation.tasks={evaluation.tasks} needs the tasks' documents on this machine, and evaluation.data_dir "
            "names no folder; set it, and write them where there is a network: dla-evaluate fetch data_dir=..."
        )
    if evaluation.max_length is not None and evaluation.max_length < 2:
        rule = "holds no prompt with an answer"
        raise ConfigError(f"evaluation.max_length={evaluation.max_length} {rule}; use 2 or more, or leave it out")
    lengths = evaluation.lengths
    if lengths and (min(lengths) < SHORTEST_NEEDLES or len(set(lengths)) < len(lengths)):
        rule = f"must name lengths of {SHORTEST_NEEDLES} tokens or more, each once"
        raise ConfigError(f"evaluation.lengths={lengths} {rule}; change it, or leave it out")
    _check_longest(evaluation, longest_context)


def _check_unused(evaluation: EvaluationConfig) -> None:
    """Without tasks every other setting would be ignored."""
    defaults = EvaluationConfig()
    for item in dataclasses.fields(evaluation):
        value, default = getattr(evaluation, item.name), getattr(defaults, item.name)
        if value != default:
            rule = "is used only with evaluation.tasks, which names none"
            raise ConfigError(f"evaluation.{item.name}={value} {rule}; name tasks, or leave it at {default}")


def _check_longest(evaluation: EvaluationConfig, longest: int | None) -> None:
    asked = {"lengths": max(evaluation.lengths, default=0), "max_length": evaluation.max_length or 0}
    for key, tokens in asked.items():
        if longest is not None and tokens > longest:
            rule = f"is more than the {longest} tokens that memory.policy=log_linear holds"
            raise ConfigError(f"evaluation.{key}={tokens} {rule}; shorten it, or raise memory.capacity")
