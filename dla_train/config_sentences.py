"""What settings there are, and the sentences a user reads after a mistake in one.

Hydra's own messages name its internals, so each is translated: the key, the nearest legal one, the mend.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterator

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from dla_train.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LoggingConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ResilienceConfig,
)

GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "memory": MemoryConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "evaluation": EvaluationConfig,
    "parallel": ParallelConfig,
    "engine": EngineConfig,
    "checkpoint": CheckpointConfig,
    "resilience": ResilienceConfig,
    "logging": LoggingConfig,
}
"""Hydra groups that fill one node of the configuration; `experiment` fills any."""

USUAL_NAMES = {
    "batch_size": "train.global_batch_rows",
    "block_size": "data.context_tokens",
    "context_length": "data.context_tokens",
    "d_model": "model.width",
    "global_batch_size": "train.global_batch_rows",
    "grad_clip": "optim.clip_norm",
    "gradient_checkpointing": "train.recompute",
    "hidden_size": "model.width",
    "intermediate_size": "model.mlp_width",
    "learning_rate": "optim.lr",
    "max_grad_norm": "optim.clip_norm",
    "max_iters": "train.steps",
    "max_seq_len": "data.context_tokens",
    "max_steps": "train.steps",
    "micro_batch_size": "train.micro_batch_rows",
    "n_embd": "model.width",
    "n_head": "model.num_heads",
    "n_layer": "model.num_layers",
    "n_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_hidden_layers": "model.num_layers",
    "num_steps": "train.steps",
    "output_dir": "run_dir",
    "precision": "train.dtype",
    "save_steps": "checkpoint.interval_steps",
    "seq_len": "data.context_tokens",
    "seq_length": "data.context_tokens",
    "sequence_length": "data.context_tokens",
    "vocab": "model.vocab_size",
}
"""What settings are called elsewhere, without their group, and what they are here."""


@functools.cache
def setting_names() -> tuple[str, ...]:
    """Every legal dotted key, `model.width` and so on, in the order of the schema."""
    return tuple(leaves(OmegaConf.structured(Config)))


def leaves(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted keys below a node, in its order, each after `prefix`."""
    for key in node:
        name = prefix + str(key)
        child = MISSING if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(child, DictConfig):
            yield from leaves(child, f"{name}.")
        else:
            yield name


def unknown_setting(key: str, options: Collection[str] = ()) -> str:
    """The sentence about a key that is not in the schema, with the nearest one that is.

    options: what the program takes beside settings.
    """
    group, _, leaf = key.rpartition(".")
    names = setting_names()
    of_group = {name.rpartition(".")[2]: name for name in names if group and name.startswith(f"{group}.")}
    same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
    if of_group:
        near = [of_group[name] for name in difflib.get_close_matches(leaf, of_group, n=1)]
        rest = f"{group} has {', '.join(of_group)}"
    else:
        near = difflib.get_close_matches(key, [*options, *names, *GROUPS, "experiment"], n=1)
        rest = "`dla-train --cfg job` prints every setting"
    usual = [USUAL_NAMES[leaf]] if leaf in USUAL_NAMES else []
    meant = [*same_leaf, *usual, *near]
    return f"{key} is not a setting; " + (f"did you mean {meant[0]}?" if meant else rest)


def unreadable(word: str, listing: str) -> str:
    """The sentence about a word that Hydra's grammar does not read; listing: the command that prints every setting."""
    if flag := re.match(r"--(\w[^=]*)=?(.*)", word, re.DOTALL):
        return f"{word}: write {flag[1]}={flag[2] or 'VALUE'}, without --; `{listing}` prints every setting"
    if any(word.count(opening) != word.count(closing) for opening, closing in ("[]", "{}", "()")):
        return f"{word} has half of a pair of brackets; quote the whole word, or leave no space inside brackets"
    if given := re.fullmatch(r"([+~]*[\w./@]+)=([^'\"]+)", word):
        return f"{word} cannot be read; quote the value, \"{given[1]}='{given[2]}'\"; `{listing}` prints every setting"
    return f"{word} cannot be read; write key=value; `{listing}` prints every setting"


def several_values(word: str, multirun: bool) -> str:
    """The sentence about a word such as `optim.lr=1,2` where one value is taken; multirun: whether there is one."""
    key, _, value = word.partition("=")
    each = "add --multirun to run each, " if multirun else ""
    one = f"quote it for one value, \"{key}='{value}'\""
    return f"{word} gives several values; {each}write {key}=[{value}] for a list, or {one}"


def wrong_value(word: str, error: OmegaConfBaseException) -> str:
    """The sentence about a word, or a key alone, whose value has not the setting's type."""
    key, _, value = word.partition("=")
    reason = str(error).splitlines()[0].rstrip(".")
    if value and "is not a ListConfig" in reason:
        return f"{word} is not a list; write {key}=[{value}]"
    return f"{key}: {reason[0].lower()}{reason[1:]}; give a value of the setting's type"


def explain(
    error: Exception,
    unknown: Callable[[str], str] = unknown_setting,
    listing: str = "dla-train --cfg job",
    multirun: bool = False,
) -> str:
    """One sentence for an error of Hydra or OmegaConf: what was given, what is legal.

    unknown: the sentence about a key that is not in the schema, listing: the command that prints every legal one; by
    default of a training run. multirun: whether the program takes --multirun.
    """
    for cause in _causes(error):
        if isinstance(cause, ConfigError):  # of an interpolation
            return str(cause)
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file and cause.options is not None:
            return _unknown_option(cause.missing_cfg_file, list(cause.options))
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.full_key:
            return unknown(str(cause.full_key))
        if isinstance(cause, ValidationError) and cause.full_key:
            given = re.match(r"Error merging override \+*(.+)", str(error))
            return wrong_value(given[1] if given else str(cause.full_key), cause)
        if isinstance(cause, OverrideParseException):
            return unreadable(cause.override, listing)
    if swept := re.match(r"Ambiguous value for argument '(.+)'", str(error)):
        return several_values(swept[1], multirun)
    if group := re.match(r"Could not override '(\w+)'", str(error)):  # with an option, where there is no such group
        return unknown(group[1])
    first_line = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return f"{first_line}; write overrides as key=value, `{listing}` prints every setting"


def _unknown_option(wanted: str, options: list[str]) -> str:
    group, _, option = wanted.rpartition("/")
    plugin = option.partition("_")[0]
    if group == "hydra/launcher" and plugin in ("joblib", "submitit"):
        return f"hydra/launcher={option} needs the package hydra-{plugin}-launcher; pip install 'dla-train[sweep]'"
    legal = [name for name in options if not name.startswith("base_")]
    near = difflib.get_close_matches(option, legal, n=1, cutoff=0.5)
    meant = f"did you mean {group}={near[0]}? " if near else ""
    return f"{group}={option} is not an option of the group {group}; {meant}choose from {', '.join(legal)}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
