"""The checkpoint of a run as an evaluation needs it: model, tokenizer, BOS, and what tells it from every other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dla_train.checkpoint.manifest import parse_json, read_small
from dla_train.checkpoint.run_directory import RUN_FILE
from dla_train.checkpoint.stored import open_step
from dla_train.config import Config
from dla_train.data.shard_list import expand_prefixes, trained_with_bos
from dla_train.data.tokenizer import Tokenizer, load_tokenizer
from dla_train.data_config import training_sources
from dla_train.evaluate.loading import load_model
from dla_train.harness.errors import EvaluateError
from dla_train.models.language_model import LanguageModel
from dla_train.parallel.mesh import pick_device


@dataclass(frozen=True)
class OpenedRun:
    """A model to be evaluated."""

    model: LanguageModel
    config: Config
    tokenizer: Tokenizer
    bos: bool
    """Whether prompts begin with BOS."""
    step: int
    checkpoint: str
    """sha256 of the checkpoint's manifest, which holds the sha256 of its files."""


def open_run(
    run: str,
    *,
    step: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    bos: bool | None = None,
) -> OpenedRun:
    """Open a checkpoint of a run, the newest by default, with its tokenizer; bos None is as in training.

    Raises CheckpointError, TokenizerError, ConfigError for a device that is absent, and EvaluateError for a tokenizer
    that is not the run's, and where it is not known whether the model was trained with BOS.
    """
    model, config, found = load_model(run, step, pick_device(device, "device"), dtype=dtype)
    tokenizer = load_tokenizer(config.data.tokenizer)
    _check_fingerprint(Path(run) / RUN_FILE, tokenizer, config)
    digest = open_step(run, found)[0].sha256
    return OpenedRun(model, config, tokenizer, _with_bos(config, tokenizer) if bos is None else bos, found, digest)


def _check_fingerprint(path: Path, tokenizer: Tokenizer, config: Config) -> None:
    """The run's own record of its tokenizer; a run directory without one is not checked."""
    if not path.is_file():
        return
    identity = parse_json(path, read_small(path)).get("identity")
    recorded = identity.get("tokenizer fingerprint") if isinstance(identity, dict) else None
    if recorded is not None and recorded != tokenizer.fingerprint:
        raise EvaluateError(
            f"tokenizer {config.data.tokenizer} (fingerprint {tokenizer.fingerprint[:12]}) is not the one the run was "
            f"trained with ({recorded[:12]}, {path}); put the tokenizer of the run back"
        )


def _with_bos(config: Config, tokenizer: Tokenizer) -> bool:
    """As the training files' manifest says. Raises EvaluateError where there is none, since scores depend on it."""
    if tokenizer.bos_id is None:
        return False
    prefix = expand_prefixes(training_sources(config.data)[0].prefixes)[0]
    if not Path(f"{prefix}.json").is_file():
        raise EvaluateError(
            f"{prefix}.json, the manifest of the training files, is not here, so it is not known whether documents "
            "began with BOS; say bos=true or bos=false"
        )
    return trained_with_bos(config.data)
