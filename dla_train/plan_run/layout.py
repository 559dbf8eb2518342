"""How a run would lie on ranks, and whether it may: every rule of the layout, each with the values that would do.

config_rules.py stops at the first rule that is broken, since a run cannot start then. Here all rules of the layout are
reported side by side, because a person who chooses one wants to see them together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dla_train.config import Config, ConfigError
from dla_train.config_rules import check_engine, validate
from dla_train.data_config import segments_of_a_row
from dla_train.layout_rules import (
    context_problems,
    ranks_along_time,
    rows_problem,
    sequence_problem,
    tensor_problems,
    time_problem,
)
from dla_train.parallel.vocab import padded_vocab


@dataclass(frozen=True)
class Layout:
    """How many ranks there are and what they divide."""

    world_size: int
    """All ranks."""
    tensor: int
    """Ranks that divide heads, MLP channels and vocabulary."""
    context: int
    """Ranks that divide rows along time."""
    sequence: bool
    """Whether tensor ranks divide the residual stream along time."""
    engine: str
    """`local` or `deepspeed`."""
    zero_stage: int
    """What the data and context ranks divide: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too."""
    recompute: bool
    """Whether blocks are computed again in backward."""
    micro_batch_rows: int
    """Rows of a micro-batch."""
    weights: str
    """Type that weights are stored in; `bfloat16` leaves float32 values to the optimizer."""
    offload: bool
    """Whether the optimizer's values and moments are in the host's memory."""

    @classmethod
    def of(cls, config: Config, world_size: int = 0) -> Layout:
        """The layout of a configuration; world_size 0 is one data-parallel rank."""
        parallel = config.parallel
        return cls(
            world_size=world_size or parallel.tensor * parallel.context,
            tensor=parallel.tensor,
            context=parallel.context,
            sequence=parallel.sequence,
            engine=config.engine.name,
            zero_stage=config.engine.zero_stage,
            recompute=config.train.recompute,
            micro_batch_rows=config.train.micro_batch_rows,
            weights=config.engine.weights,
            offload=config.engine.offload_optimizer,
        )

    def onto(self, config: Config) -> Config:
        """The configuration with this layout in place of its own."""
        parallel = dataclasses.replace(
            config.parallel, tensor=self.tensor, context=self.context, sequence=self.sequence
        )
        engine = dataclasses.replace(
            config.engine,
            name=self.engine,
            zero_stage=self.zero_stage,
            weights=self.weights,
            offload_optimizer=self.offload,
        )
        train = dataclasses.replace(config.train, recompute=self.recompute, micro_batch_rows=self.micro_batch_rows)
        return dataclasses.replace(config, parallel=parallel, engine=engine, train=train)

    @property
    def data(self) -> int:
        """Ranks with different rows."""
        return max(1, self.world_size // (self.tensor * self.context))

    @property
    def shards(self) -> int:
        """Ranks with the same weights, over which gradients are summed and ZeRO divides."""
        return self.data * self.context

    def micro_batches(self, config: Config) -> int:
        """Micro-batches of a rank in one step."""
        return max(1, config.train.global_batch_rows // (self.micro_batch_rows * self.data))

    def backward_passes(self, config: Config) -> int:
        """Backward passes of a rank in one step: one for each segment of each micro-batch."""
        return self.micro_batches(config) * segments_of_a_row(config)


@dataclass(frozen=True)
class Check:
    """One rule and whether it holds."""

    rule: str
    """What is asked for, with its numbers."""
    problem: str = ""
    """What is wrong and what would do; empty where the rule holds."""
    of_sizes: bool = True
    """Whether a rank's sizes cannot be told while the rule is broken."""


def checks(config: Config, layout: Layout) -> list[Check]:
    """Every rule of the layout, then those of config_rules.py, which stop at the first that is broken."""
    found = [
        _check_ranks(layout),
        *_check_tensor(config, layout),
        *_check_context(config, layout),
        _check_time(config, layout),
        _check_rows(config, layout),
        _check_engine(config, layout),
        _check_backend(config),
    ]
    known = {check.problem.split(" ")[0] for check in found}
    return [*found, *(check for check in _check_settings(config, layout) if check.problem.split(" ")[0] not in known)]


def divides(found: list[Check]) -> bool:
    """Whether sizes of a rank can be told."""
    return not any(check.problem for check in found if check.of_sizes)


def _check_ranks(layout: Layout) -> Check:
    model = layout.tensor * layout.context
    rule = f"{layout.world_size} ranks = {layout.data} data x {layout.context} context x {layout.tensor} tensor"
    if layout.world_size % model == 0:
        return Check(rule)
    lower = layout.world_size // model * model
    near = f"{lower} or {lower + model}" if lower else f"{model}"
    what = f"is not a multiple of parallel.tensor={layout.tensor} x parallel.context={layout.context}"
    return Check("ranks", f"world_size={layout.world_size} {what}; choose {near}")


def _check_tensor(config: Config, layout: Layout) -> list[Check]:
    model, ranks = config.model, layout.tensor
    over = f"over parallel.tensor={ranks}"
    found = [Check(f"{setting} {over}", problem) for setting, problem in tensor_problems(model, ranks).items()]
    rows = padded_vocab(model.vocab_size, ranks) // ranks
    found.append(Check(f"model.vocab_size={model.vocab_size} {over}: {rows} rows a rank"))
    if problem := sequence_problem(layout.sequence, ranks):
        found.append(Check("sequence", problem))
    return found


def _check_context(config: Config, layout: Layout) -> list[Check]:
    if config.model.num_heads % layout.tensor:
        return []  # what context ranks would divide is not settled
    problems = context_problems(config.model, layout.tensor, layout.context)
    over = f"over parallel.tensor={layout.tensor} x parallel.context={layout.context}"
    return [Check(f"{setting} {over}", problem) for setting, problem in problems.items()]


def _check_time(config: Config, layout: Layout) -> Check:
    context, ranks = config.data.context_tokens, ranks_along_time(layout.onto(config).parallel)
    rule = f"data.context_tokens={context} over {ranks} ranks along time"
    return Check(rule, time_problem(f"data.context_tokens={context}", context, ranks))


def _check_rows(config: Config, layout: Layout) -> Check:
    rows, step = config.train.global_batch_rows, layout.micro_batch_rows * layout.data
    rule = f"train.global_batch_rows={rows} over {layout.data} data ranks in micro-batches of {layout.micro_batch_rows}"
    problem = rows_problem(rows, layout.micro_batch_rows, layout.data)
    ranks = layout.world_size * layout.micro_batch_rows
    if rows < step and ranks % rows == 0:
        problem += f", or parallel.tensor x parallel.context = {ranks // rows}"
    return Check(rule, problem, of_sizes=False)


def _check_engine(config: Config, layout: Layout) -> Check:
    place = ", the optimizer on the host" if layout.offload else ""
    rule = f"engine.zero_stage={layout.zero_stage} with engine.name={layout.engine} and {layout.weights} weights{place}"
    return Check(rule, _problem(check_engine, layout.onto(config)))


def _check_backend(config: Config) -> Check:
    backend = config.memory.backend
    what = "is the definition, a loop over tokens for checks, and its memory is not planned"
    problem = f"memory.backend=recurrent {what}; choose auto, triton or torch" if backend == "recurrent" else ""
    return Check(f"memory.backend={backend}", problem)


def _check_settings(config: Config, layout: Layout) -> list[Check]:
    """Rules of config_rules.py: of the run as it is apart from its layout, then of what a run would be started with."""
    whole = dataclasses.replace(layout, world_size=layout.data, tensor=1, context=1, sequence=False)
    return [
        Check(
            "settings of the run",
            _problem(partial(validate, world_size=layout.data), whole.onto(config)),
            of_sizes=False,
        ),
        Check(
            "settings on these ranks",
            _problem(partial(validate, world_size=layout.world_size), layout.onto(config)),
            of_sizes=False,
        ),
    ]


def _problem(rules: Callable[[Config], None], config: Config) -> str:
    """What the first of the rules that is broken says; empty where none is."""
    try:
        rules(config)
    except ConfigError as error:
        return str(error)
    return ""
