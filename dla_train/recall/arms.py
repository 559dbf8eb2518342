"""The arms of a study: backbone x memory, and the softmax baseline, as configurations of ordinary runs.

Arms of a study may differ in nothing but what they are named after. Slot weights are parameters too, so an arm with
fewer gets a wider MLP (`match_parameters`): the baseline is then no smaller than what it is compared with, and what is
added to it is computation, not state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dla_train.config import Config, ConfigError, DataConfig, MemoryConfig, ModelConfig, OptimConfig, TrainConfig
from dla_train.config_rules import validate
from dla_train.config_sentences import explain
from dla_train.recall.model import count_parameters
from dla_train.recall.settings import StudyConfig
from dla_train.recall.tasks.registry import build_task
from dla_train.recall.tasks.task import RecallTask

ATTENTION = "transformer"
"""Name of the softmax arm."""
PARAMETER_TOLERANCE = 0.01
"""Largest share by which the parameters of matched arms may differ."""


@dataclass(frozen=True)
class Arm:
    """One model of a study, at a learning rate and seed that its runs fill in."""

    name: str
    backbone: str
    """`mamba2`, `gated_deltanet` or `attention`."""
    memory: str
    """Label among the study's memories; `none` of attention."""
    config: Config
    """Of a run with the first learning rate and seed."""
    parameters: int

    def run(self, learning_rate: float, seed: int) -> Config:
        """The configuration of one run."""
        optim = dataclasses.replace(self.config.optim, lr=learning_rate)
        return dataclasses.replace(self.config, optim=optim, seed=seed)


def study_tasks(study: StudyConfig) -> dict[str, RecallTask]:
    """The parts of a study by label. Raises ConfigError for a task that cannot be."""
    if not study.task.get("name"):
        raise ConfigError("task.name: no value given; name a task, e.g. task.name=paired_token")
    parts = {label: build_task({**study.task, **part}) for label, part in study.parts.items()}
    if not parts:
        return {str(study.task["name"]): build_task(study.task)}
    for key in ("vocabulary", "answers"):
        shapes = {label: getattr(task, key) for label, task in parts.items()}
        if len(set(shapes.values())) > 1:
            raise ConfigError(f"parts differ in their {key}: {shapes}; one model cannot answer both")
    return parts


def study_arms(study: StudyConfig, tasks: Mapping[str, RecallTask]) -> list[Arm]:
    """Every arm, in the order of the settings. Raises ConfigError where one breaks a rule of runs."""
    some = next(iter(tasks.values()))
    arms = []
    for backbone in study.backbones:
        for label, memory in study.memories.items():
            config = _config(study, tasks, {"backbone": backbone, **study.model}, memory, f"memories.{label}")
            arms.append(_arm(f"{backbone}_{label}", label, config, some.vocabulary))
    if study.attention is not None:
        model = {**study.model, "backbone": "attention", "conv_width": 0, **study.attention}
        config = _config(study, tasks, model, {"policy": "none", "read": "unit"}, "attention")
        arms.append(_arm(ATTENTION, "none", config, some.vocabulary))
    unknown = sorted(set(study.rates) - {arm.name for arm in arms})
    if unknown:
        raise ConfigError(f"rates.{unknown[0]} is none of the arms: {', '.join(arm.name for arm in arms)}")
    return _matched(arms, some.vocabulary) if study.match_parameters else arms


def _arm(name: str, memory: str, config: Config, vocabulary: Sequence[int]) -> Arm:
    return Arm(name, config.model.backbone, memory, config, count_parameters(config, vocabulary))


def _config(
    study: StudyConfig, tasks: Mapping[str, RecallTask], model: dict[str, Any], memory: dict[str, Any], where: str
) -> Config:
    answers = next(iter(tasks.values())).answers
    model = {"name": study.name, "vocab_size": answers, **model}
    context = max(task.tokens for task in tasks.values())
    config = Config(
        name=study.name,
        run_dir=study.name,
        seed=study.seeds[0],
        model=_structured(ModelConfig, model, "model"),
        memory=_structured(MemoryConfig, memory, where),
        optim=_structured(OptimConfig, {"lr": study.learning_rates[0], **study.optim}, "optim"),
        train=TrainConfig(
            steps=study.steps,
            global_batch_rows=study.batch_rows,
            micro_batch_rows=study.batch_rows,
            device=study.device,
        ),
        # a task's rows are made, not read: only their length is checked
        data=DataConfig(name=study.name, train=["made"], tokenizer="none", context_tokens=context),
    )
    try:
        config.engine.name = "local"
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return config


def _structured(kind: type, values: dict[str, Any], where: str) -> Any:
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {explain(error)}") from error


def _matched(arms: list[Arm], vocabulary: Sequence[int]) -> list[Arm]:
    """Widen MLPs until every arm has nearly the largest's parameters. Raises ConfigError where 1% is out of reach."""
    most = max(arm.parameters for arm in arms)
    matched = []
    for arm in arms:
        per_channel = 3 * arm.config.model.width * arm.config.model.num_layers
        channels = round((most - arm.parameters) / per_channel)
        model = dataclasses.replace(arm.config.model, mlp_width=arm.config.model.mlp_width + channels)
        arm = _arm(arm.name, arm.memory, dataclasses.replace(arm.config, model=model), vocabulary)
        if abs(arm.parameters - most) > PARAMETER_TOLERANCE * most:
            raise ConfigError(
                f"match_parameters: {arm.name} has {arm.parameters} parameters with model.mlp_width={model.mlp_width}, "
                f"the largest arm {most}, and one channel more or less is {per_channel}; widen model, or set "
                "match_parameters=false"
            )
        matched.append(arm)
    return matched
