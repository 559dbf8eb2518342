"""The manifest beside a token file (`PREFIX.json`): who tokenised it, with which policy, and what it must hold.

Megatron's .idx knows lengths only. The manifest adds the tokenizer's fingerprint and the BOS/EOS policy, so that
training with another tokenizer is refused instead of learning noise. Files written by other tools have none; they are
accepted, and then only the token ids themselves can be checked.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from dla_train.config import DataConfig
from dla_train.data.errors import TokenFileError
from dla_train.data_config import training_sources

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Contents of `PREFIX.json`."""

    tokenizer: str
    """Name of the tokenizer, for messages."""
    tokenizer_fingerprint: str
    """sha256 of the tokenizer's files."""
    vocab_size: int
    """Ids of the tokenizer: every token in the file is below it."""
    bos: bool
    """Whether every document begins with the tokenizer's BOS."""
    eos: bool
    """Whether every document ends with the tokenizer's EOS."""
    documents: int
    """Documents in the file."""
    tokens: int
    """Tokens in the file, BOS and EOS included."""
    text_bytes: int
    """UTF-8 bytes of the text the tokens came from; bits per byte is measured against it."""
    split: str = "all"
    """`all`, `train` or `validation`."""
    sources: list[str] = field(default_factory=list)
    """Names of the inputs."""
    format_version: int = FORMAT_VERSION
    """Version of this layout."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, BOS and EOS counted as tokens of no text."""
        return self.text_bytes / max(self.tokens, 1)

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Read `path`; raises TokenFileError if it is not a manifest of this version."""
    remake = "write it again with `dla-prepare tokens`"
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenFileError(f"{path} is not valid JSON ({error}); {remake}") from error
    names = {item.name for item in dataclasses.fields(Manifest)}
    if not isinstance(contents, dict) or set(contents) != names or contents["format_version"] != FORMAT_VERSION:
        raise TokenFileError(f"{path} is not a version {FORMAT_VERSION} manifest of a token file; {remake}")
    for item in dataclasses.fields(Manifest):
        value = contents[item.name]
        if not _is_of_type(value, str(item.type)):
            raise TokenFileError(f"{path} has {item.name}={value!r}, which is not of its type {item.type}; {remake}")
    return Manifest(**contents)


def _is_of_type(value: object, annotation: str) -> bool:
    if annotation == "list[str]":
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if annotation == "int":
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, {"str": str, "bool": bool}[annotation])


def trained_with_bos(data: DataConfig) -> bool:
    """Whether documents began with BOS in training; files without a manifest are taken to have none."""
    manifest = Path(f"{training_sources(data)[0].prefixes[0]}.json")
    return manifest.is_file() and read_manifest(manifest).bos
