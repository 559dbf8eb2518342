"""The checkpoints that are compared: opening them, what they have in common, and their losses on the same documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dla_train.checkpoint.stored import open_step
from dla_train.config import Config, ConfigError
from dla_train.config_rules import longest_context
from dla_train.data.indexed import TokenFiles
from dla_train.data.tokenizer import Tokenizer, load_tokenizer
from dla_train.diagnose.scoring import Documents, choose_documents, document_losses
from dla_train.diagnose.settings import DiagnoseConfig
from dla_train.evaluate.loading import load_model, stored_config
from dla_train.parallel.mesh import pick_device


@dataclass(frozen=True)
class Arm:
    """One checkpoint."""

    name: str
    """Label, different from the others'."""
    run: Path
    step: int
    config: Config
    checkpoint_sha256: str
    """Of its manifest, which holds the hashes of all its files."""

    @property
    def trained_tokens(self) -> int:
        """Context it was trained with."""
        return self.config.data.context_tokens


def open_arms(settings: DiagnoseConfig) -> list[Arm]:
    """The checkpoints of settings.runs, weights unread. Raises CheckpointError, ConfigError."""
    found = []
    for place in settings.runs:
        run, step = _run_and_step(place)
        checkpoint, chosen = open_step(run, step)
        found.append((run, chosen, stored_config(checkpoint), checkpoint.sha256))
    names = settings.names or _names([(config.name, run.absolute().name, step) for run, step, config, _ in found])
    return [Arm(name, *arm) for name, arm in zip(names, found, strict=True)]


def _run_and_step(place: str) -> tuple[Path, int | None]:
    run, at, step = place.rpartition("@")
    if at and step.isdecimal() and not Path(place).exists():
        return Path(run), int(step)
    return Path(place), None


def _names(runs: Sequence[tuple[str, str, int]]) -> list[str]:
    """Of (run's name, its folder's, step): the first of these that tells all apart, and a number where none does."""
    choices = (
        [name for name, _, _ in runs],
        [folder for _, folder, _ in runs],
        [f"{name}@{step}" for name, _, step in runs],
        [f"{folder}@{step}" for _, folder, step in runs],
    )
    names = next((names for names in choices if len(set(names)) == len(names)), choices[-1])
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]


def common_tokenizer(arms: Sequence[Arm]) -> Tokenizer:
    """The tokenizer of all arms. Raises ConfigError where they have not one."""
    opened = {path: load_tokenizer(path) for path in dict.fromkeys(arm.config.data.tokenizer for arm in arms)}
    first = opened[arms[0].config.data.tokenizer]
    for arm in arms[1:]:
        other = opened[arm.config.data.tokenizer]
        if other.fingerprint != first.fingerprint:
            raise ConfigError(
                f"{arm.name} was trained with tokenizer {other.name}, {arms[0].name} with {first.name}: losses of "
                "different tokens cannot be compared; compare bits per byte (dla-train's validation) instead"
            )
    return first


def open_documents(settings: DiagnoseConfig, arms: Sequence[Arm]) -> tuple[TokenFiles, Documents]:
    """The token files and what is read of them. Raises ConfigError, DataError."""
    context = settings.context_tokens or arms[0].trained_tokens
    prefixes = list(settings.data) or arms[0].config.data.validation
    if not prefixes:
        raise ConfigError(f"data=[] and {arms[0].name} has no data.validation; name token files with data=[PREFIX]")
    for arm in arms:
        memory = arm.config.memory
        longest = longest_context(memory)
        if longest is not None and context > longest:
            raise ConfigError(
                f"context_tokens={context} is more than the {longest} that the log_linear memory of "
                f"{arm.name} (memory.capacity={memory.capacity}) holds; lower it, or leave {arm.name} out"
            )
    vocabulary = min(arm.config.model.vocab_size for arm in arms)
    files = TokenFiles(prefixes, tokenizer=common_tokenizer(arms), vocab_size=vocabulary)
    return files, choose_documents(files, settings.documents, context, settings.minimum_tokens)


def losses_of(arm: Arm, documents: Documents, settings: DiagnoseConfig) -> NDArray[np.float32]:
    """[N, T] nats of one arm, nan where a document has no target. Raises CheckpointError."""
    device = pick_device(settings.device, "device")
    model, _, _ = load_model(arm.run, arm.step, device, dtype=settings.dtype or None)
    rows = list[NDArray[np.float32]]()
    batches = document_losses(model, documents, batch_rows=settings.batch_rows, chunk_tokens=settings.chunk_tokens)
    with tqdm(total=len(documents.tokens), desc=arm.name, unit="document", dynamic_ncols=True) as bar:
        for batch in batches:
            rows.append(batch)
            bar.update(len(batch))
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return np.concatenate(rows)
