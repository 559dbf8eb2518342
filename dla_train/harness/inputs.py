"""What an evaluation reads from this machine's disk, found before anything is asked: documents, and needles' text."""

from __future__ import annotations

from pathlib import Path

from dla_train.data.tokenizer import Tokenizer
from dla_train.harness.documents import HAYSTACK, check_first, file_hash, local_files, read_haystack
from dla_train.harness.errors import EvaluateError
from dla_train.harness.needles import TASKS, Needles
from dla_train.harness.settings import EvaluateConfig, Unit


def check_files(config: EvaluateConfig, wanted: list[Unit]) -> dict[str, dict[str, str]]:
    """Every local file is there and begins as it should: {unit: {file: sha256}}. Raises EvaluateError."""
    hashes: dict[Path, str] = {}
    found: dict[str, dict[str, str]] = {}
    for unit in wanted:
        paths: list[Path] = []
        if unit.length is None and config.data_dir is not None:
            paths = list(local_files(Path(config.data_dir), unit.task, config.num_fewshot).values())
            for path in paths:
                check_first(path, unit.task.columns)
        elif unit.length is not None and _essay(unit):
            paths = [_haystack(config)]
            read_haystack(paths[0])
        for path in paths:
            hashes[path] = hashes.get(path) or file_hash(path)
        found[unit.name] = {"/".join(path.parts[-2:]): hashes[path] for path in paths}
    return found


def needles_of(config: EvaluateConfig, unit: Unit, tokenizer: Tokenizer, bos: bool) -> Needles | None:
    """The prompts of a needle task; None for the others. Raises EvaluateError where its text cannot be read."""
    if unit.length is None:
        return None
    text = read_haystack(_haystack(config)) if _essay(unit) else ""
    return Needles(tokenizer, bos, text, needle_samples(config), config.seed)


def needle_samples(config: EvaluateConfig) -> int:
    """Prompts of a needle task at each length."""
    return min(config.suite.samples, config.limit or config.suite.samples)


def _haystack(config: EvaluateConfig) -> Path:
    if config.haystack is None and config.data_dir is None:
        raise EvaluateError(
            "the needle tasks hide their needles in a text; name one with haystack=FILE, or set data_dir"
        )
    return Path(config.haystack) if config.haystack is not None else Path(config.data_dir or "") / HAYSTACK


def _essay(unit: Unit) -> bool:
    return TASKS[unit.task.name]["type_haystack"] == "essay"
