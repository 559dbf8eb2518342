"""What a run's `evaluation` asks for, in the terms of an evaluation, checked when the run starts: known tasks, local
files that are there, lm_eval installed. Nothing here imports lm_eval, so a run without tasks does not need it.
"""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dla_train.config import Config, ConfigError
from dla_train.data.shard_list import trained_with_bos
from dla_train.data.tokenizer import Tokenizer
from dla_train.harness.catalogue import TaskEntry, catalogue
from dla_train.harness.inputs import check_files
from dla_train.harness.settings import EvaluateConfig, SuiteConfig, units
from dla_train.parallel.mesh import Mesh

if TYPE_CHECKING:
    from dla_train.harness.in_training import TrainingEvaluation


def evaluation_of(config: Config, mesh: Mesh, tokenizer: Tokenizer) -> TrainingEvaluation | None:
    """The tasks of a run, every document read and every prompt looked at; None where it has none.

    Raises ConfigError and EvaluateError for whatever could go wrong later.
    """
    if not config.evaluation.tasks:
        return None
    settings = planned(config)
    from dla_train.harness.in_training import TrainingEvaluation  # which imports lm_eval

    return TrainingEvaluation(config, settings, mesh, tokenizer, prompts_with_bos(config, tokenizer))


def planned(config: Config) -> EvaluateConfig:
    """The evaluation of a run that has `evaluation.tasks`. Raises ConfigError, and EvaluateError for absent files."""
    chosen = config.evaluation
    entries = [_entry(name) for name in chosen.tasks]
    needles = [entry.name for entry in entries if entry.needles]
    if needles and not chosen.lengths:
        raise ConfigError(f"evaluation.lengths=[] gives {', '.join(needles)} no length; set it, e.g. [1024,4096]")
    if chosen.lengths and not needles:
        rule = "is of needle tasks, and evaluation.tasks names none"
        raise ConfigError(
            f"evaluation.lengths={chosen.lengths} {rule}; leave it out, or name niah_single_2 or the like"
        )
    without = [entry.name for entry in entries if entry.few_shot_split is None]
    if chosen.num_fewshot and without:
        rule = f"needs solved examples, which {', '.join(without)} have not"
        raise ConfigError(f"evaluation.num_fewshot={chosen.num_fewshot} {rule}; set it to 0, or leave those tasks out")
    if find_spec("lm_eval") is None:
        raise ConfigError(
            f"evaluation.tasks={chosen.tasks} needs lm_eval, which is not installed; run "
            "`pip install dla-train[evaluate]`, or set evaluation=none"
        )
    settings = EvaluateConfig(
        run=config.run_dir,
        suite=SuiteConfig(name="evaluation", tables={"evaluation": chosen.tasks}, lengths=chosen.lengths),
        num_fewshot=chosen.num_fewshot,
        limit=chosen.limit,
        max_length=chosen.max_length or config.data.context_tokens,
        batch_tokens=chosen.batch_tokens,
        decode_rows=chosen.decode_rows,
        data_dir=chosen.data_dir,
        progress=config.logging.progress,
    )
    check_files(settings, units(settings))
    return settings


def prompts_with_bos(config: Config, tokenizer: Tokenizer) -> bool:
    """Whether prompts begin with BOS: as `evaluation.bos` says, else as documents do. Raises ConfigError."""
    bos = trained_with_bos(config.data) if config.evaluation.bos is None else config.evaluation.bos
    if config.evaluation.bos and tokenizer.bos_id is None:
        raise ConfigError(f"evaluation.bos=true, but tokenizer {tokenizer.name} has no BOS; set it to false")
    return bos and tokenizer.bos_id is not None


def _entry(name: str) -> TaskEntry:
    if name not in catalogue():
        near = difflib.get_close_matches(name, catalogue(), n=1, cutoff=0.5)
        meant = f"did you mean {near[0]}? " if near else ""
        known = ", ".join(sorted(catalogue()))
        raise ConfigError(f"evaluation.tasks: {name} is not a task that is known here; {meant}choose from {known}")
    return catalogue()[name]
