"""How heads, rows and micro-batches divide over ranks: every rule once, with the numbers that would do.

A rule gives the sentence about what is wrong, "" where it holds. A run stops at the first (config_rules.py), dla-plan
shows all side by side, and a model that is built for ranks asks for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dla_train.config import ConfigError, ModelConfig, ParallelConfig


def refuse(problems: Iterable[str]) -> None:
    """Raise ConfigError with the first of `problems` that is not empty."""
    for problem in problems:
        if problem:
            raise ConfigError(problem)


def ranks_along_time(parallel: ParallelConfig) -> int:
    """Ranks that divide the residual stream of a row."""
    return parallel.context * (parallel.tensor if parallel.sequence else 1)


def tensor_problems(model: ModelConfig, tensor: int) -> dict[str, str]:
    """By setting, whether so many tensor ranks have equal parts of it. A single key head is whole on every rank."""
    counts = {"model.num_heads": model.num_heads, "model.mlp_width": model.mlp_width}
    if model.num_key_heads > 1:
        counts["model.num_key_heads"] = model.num_key_heads
    legal = [n for n in divisors(model.num_heads) if all(count % n == 0 for count in counts.values())]
    wrong = f"is not divisible by parallel.tensor={tensor}; choose parallel.tensor from {listed(legal)}"
    return {f"{key}={count}": f"{key}={count} {wrong}" if count % tensor else "" for key, count in counts.items()}


def context_problems(model: ModelConfig, tensor: int, context: int) -> dict[str, str]:
    """By setting, whether the heads of a tensor rank divide over the context ranks; a single key head goes to each."""
    problems = {}
    for key, count in (("model.num_heads", model.num_heads), ("model.num_key_heads", model.num_key_heads)):
        own = max(count // tensor, 1)
        rule = f"leaves {own} a rank of parallel.tensor={tensor}, not divisible by parallel.context={context}"
        shared = key == "model.num_key_heads" and own == 1
        mend = f"choose parallel.context from {listed(divisors(own))}"
        problems[f"{key}={count}"] = f"{key}={count} {rule}; {mend}" if own % context and not shared else ""
    return problems


def sequence_problem(sequence: bool, tensor: int) -> str:
    """Whether sequence parallelism has ranks to divide over."""
    rule = "is set, and divides the residual stream over the tensor ranks, of which there is one"
    return f"parallel.sequence=True {rule}; set parallel.sequence=false" if sequence and tensor == 1 else ""


def time_problem(setting: str, tokens: int, ranks: int, mend: str = "") -> str:
    """Whether `tokens`, which `setting` gives, divide over the ranks along time; mend: default the nearest that do."""
    if tokens % ranks == 0:
        return ""
    near = tokens // ranks * ranks
    mend = mend or f"choose {near + ranks}" + (f" or {near}" if near else "")
    return (
        f"{setting} is not divisible by the {ranks} ranks along time (parallel.context; x tensor with sequence); {mend}"
    )


def rows_problem(global_batch_rows: int, micro_batch_rows: int, data: int) -> str:
    """Whether a global batch is whole micro-batches of every data-parallel rank."""
    step = micro_batch_rows * data
    if global_batch_rows % step == 0:
        return ""
    lower = global_batch_rows // step * step
    near = [lower, lower + step] if lower else [step]
    what = f"train.micro_batch_rows={micro_batch_rows} x {data} data-parallel rank{'s' * (data > 1)}"
    mend = f"choose {listed(near)}, or other micro-batches"
    return f"train.global_batch_rows={global_batch_rows} is not a multiple of {what}; {mend}"


def divisors(number: int) -> list[int]:
    """Rising, 1 and `number` among them."""
    return [n for n in range(1, number + 1) if number % n == 0]


def listed(values: Sequence[int]) -> str:
    """`1, 2 or 4`."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
