"""Settings of an evaluation: the schema that configs/evaluate.yaml and configs/suite/*.yaml fill, and its rules.

An evaluation is no part of a run, so it has a configuration of its own; the model and tokenizer come from the run.
Nothing here imports torch or lm_eval.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dla_train.config import ConfigError
from dla_train.config_sentences import explain, leaves
from dla_train.harness.catalogue import TaskEntry, catalogue, task_entry
from dla_train.hydra_app import config_directory

OF_THE_CHECKPOINT = ("model", "memory")
"""Groups of a run's settings that cannot be chosen for its checkpoint."""


@dataclass
class SuiteConfig:
    """Which tasks, in which tables."""

    name: str = ""
    """Label of the suite."""
    tables: dict[str, list[str]] = field(default_factory=dict)
    """Tasks of catalogue.yaml by table, in the order of its columns."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of a needle task's prompt with the 128 of its answer; each is an evaluation of its own."""
    samples: int = 500
    """Prompts of a needle task at each length."""


@dataclass
class EvaluateConfig:
    """One evaluation of one checkpoint."""

    run: str = MISSING
    """Run directory, with its checkpoints."""
    step: int | None = None
    """Checkpoint's step; None is the newest."""
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    """Tables of tasks: `commonsense`, `retrieval`, `ruler`, `longbench` or `all`."""
    tasks: list[str] = field(default_factory=list)
    """Only these tasks of the suite; empty takes all."""
    num_fewshot: int = 0
    """Solved examples in front of every question; the published numbers have none."""
    limit: int = 0
    """First documents of every task (of a needle task, at each length); 0 takes all."""
    max_length: int | None = None
    """Most tokens of a prompt with its answer, longer ones lose their beginning; None is the run's
    data.context_tokens. Needle tasks have their own lengths."""
    batch_tokens: int = 16384
    """Tokens, padding included, that are scored at once."""
    decode_rows: int = 16
    """Answers generated at once; each holds a memory of its own."""
    bos: bool | None = None
    """Whether prompts begin with BOS; None does as in training, by the training files' manifest."""
    data_dir: str | None = None
    """Local copies of the tasks' documents (`dla-evaluate fetch`); None loads them from the hub."""
    haystack: str | None = None
    """Text file that hides RULER's needles; None is needles/haystack.txt in data_dir."""
    output: str | None = None
    """Folder of the results; None is evaluation/step_N in the run directory. Finished tasks there are not repeated."""
    seed: int = 1234
    """Of needle prompts, of few-shot examples and of lm_eval."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    dtype: str | None = None
    """Compute type of matrix products, `float32` or `bfloat16`; None is the run's train.dtype."""
    progress: bool = True
    """Progress bars with ETA on standard error."""


@dataclass(frozen=True)
class Unit:
    """What is evaluated, kept and repeated as a whole: a task, or a needle task at one length."""

    task: TaskEntry
    length: int | None = None
    """Tokens of a needle task's prompts with their answers."""

    @property
    def name(self) -> str:
        """Name of its results."""
        return self.task.name if self.length is None else f"{self.task.name}_{self.length}"


def compose(words: Sequence[str]) -> EvaluateConfig:
    """The checked settings of a command line such as `["run=runs/a", "suite=ruler"]`. Raises ConfigError."""
    try:
        composed = _composed(words)
        known = {item.name for item in fields(EvaluateConfig)}
        if added := [str(key) for key in composed if key not in known]:  # by +key=value
            raise ConfigError(_unknown(added[0]))
        if OmegaConf.is_missing(composed, "run"):
            raise ConfigError("run has no value; name a run directory: dla-evaluate run=runs/...")
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, _unknown, "dla-evaluate --help")) from error
    assert isinstance(config, EvaluateConfig)
    check(config)
    return config


def defaults() -> str:
    """One indented line `key=default` for every setting, those of the default suite among them, for the help."""
    composed = _composed([])
    return "\n".join(f"  {key}={OmegaConf.select(composed, key, default='RUN_DIR')}" for key in leaves(composed))


def _composed(words: Sequence[str]) -> DictConfig:
    ConfigStore.instance().store(name="base_evaluate", node=EvaluateConfig)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_directory())):
        return hydra.compose("evaluate", list(words))


def units(config: EvaluateConfig) -> list[Unit]:
    """What is evaluated, in the order of the suite's tables."""
    found: list[Unit] = []
    for entry in _entries(config):
        lengths = config.suite.lengths if entry.needles else [None]
        found += [Unit(entry, length) for length in lengths]
    return found


def check(config: EvaluateConfig) -> None:
    """Check what can be checked without the run. Raises ConfigError at the first rule broken."""
    for key, least in (("num_fewshot", 0), ("limit", 0), ("batch_tokens", 1), ("decode_rows", 1), ("seed", 0)):
        if getattr(config, key) < least:
            raise ConfigError(f"{key}={getattr(config, key)} is below {least}; use {least} or more")
    if config.max_length is not None and config.max_length < 2:
        raise ConfigError(f"max_length={config.max_length} holds no prompt with an answer; use 2 or more")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={config.device} is not one of the choices; choose auto, cpu or cuda")
    if config.dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(
            f"dtype={config.dtype} is not one of the choices; choose float32 or bfloat16, or leave it out"
        )
    entries = _entries(config)
    if config.num_fewshot:
        without = [entry.name for entry in entries if entry.few_shot_split is None]
        if without:
            raise ConfigError(
                f"num_fewshot={config.num_fewshot} needs solved examples, which {', '.join(without)} have not; "
                "set num_fewshot=0, or name the others in tasks=[...]"
            )
    if any(entry.needles for entry in entries):
        _check_lengths(config)


def _check_lengths(config: EvaluateConfig) -> None:
    suite = config.suite
    if not suite.lengths or min(suite.lengths) < 256 or len(set(suite.lengths)) < len(suite.lengths):
        raise ConfigError(f"suite.lengths={suite.lengths} must name lengths of 256 tokens or more, each once")
    if suite.samples < 1:
        raise ConfigError(f"suite.samples={suite.samples} is below 1; RULER has 500")
    if config.max_length is not None and config.max_length < max(suite.lengths):
        raise ConfigError(
            f"max_length={config.max_length} would cut the needle out of prompts of suite.lengths={suite.lengths}; "
            "shorten suite.lengths, or leave max_length out"
        )


def _entries(config: EvaluateConfig) -> list[TaskEntry]:
    names = [name for table in config.suite.tables.values() for name in table]
    if not names:
        raise ConfigError("suite.tables names no task; choose suite=commonsense, retrieval, ruler, longbench or all")
    chosen = config.tasks or names
    for name in chosen:
        if name not in names:
            known = ", ".join(sorted(names))
            elsewhere = (
                f"it is a task of another suite, try suite=all; {config.suite.name} has"
                if (name in catalogue())
                else f"{_near(name, names)}choose from"
            )
            raise ConfigError(f"tasks: {name} is not a task of suite={config.suite.name}; {elsewhere} {known}")
    return [task_entry(name) for name in names if name in chosen]


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""


def _unknown(key: str) -> str:
    if key.partition(".")[0] in OF_THE_CHECKPOINT:
        return (
            f"{key} is not a setting of an evaluation: a checkpoint is asked with the model and memory that it was "
            "trained with; with another memory it is another model, which has to be trained (train.initial=FOLDER)"
        )
    names = [item.name for item in fields(EvaluateConfig)]
    names += [f"suite.{item.name}" for item in fields(SuiteConfig)]
    return f"{key} is not a setting of an evaluation; {_near(key, names)}choose from {', '.join(names)}"
