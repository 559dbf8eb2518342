"""Corpora of many shards: `PREFIX.shards.json` names them, so that PREFIX stands for all wherever a prefix is given.

It is written last, so a corpus whose preparation has not ended has none, and it counts: a shard that is missing, or is
left from another preparation, is an error. A pattern of file names would notice neither.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from dla_train.config import DataConfig
from dla_train.data.errors import TokenFileError
from dla_train.data.manifest import read_manifest
from dla_train.data.token_file import token_file_paths
from dla_train.data_config import training_sources
from dla_train.durable import write_atomically

FORMAT_VERSION = 1
_REMAKE = "copy it again from where it was made, or write the corpus again with `dla-prepare tokens`"


@dataclass(frozen=True)
class Shard:
    """One token file of a corpus."""

    name: str
    """Its prefix's last part; it lies beside the list."""
    documents: int
    """Documents in it."""
    tokens: int
    """Tokens in it."""
    text_bytes: int
    """UTF-8 bytes of their text."""


def shard_list_path(prefix: str | Path) -> Path:
    """Where the list of a prefix's shards is."""
    return Path(f"{prefix}.shards.json")


def write_shard_list(prefix: str | Path, shards: Sequence[Shard]) -> None:
    """Write the list of PREFIX atomically."""
    path = shard_list_path(prefix)
    contents = {"format_version": FORMAT_VERSION, "shards": [dataclasses.asdict(shard) for shard in shards]}
    write_atomically(path, json.dumps(contents, indent=2) + "\n")


def read_shard_list(prefix: str | Path) -> list[Shard]:
    """The shards of PREFIX, in order. Raises TokenFileError if the list is not one of this version."""
    path = shard_list_path(prefix)
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenFileError(f"{path} is not valid JSON ({error}); {_REMAKE}") from error
    entries = contents.get("shards") if isinstance(contents, dict) else None
    if not isinstance(entries, list) or not entries or contents.get("format_version") != FORMAT_VERSION:
        raise TokenFileError(f"{path} is not a version {FORMAT_VERSION} list of shards; {_REMAKE}")
    return [_shard(path, entry) for entry in entries]


def expand_prefixes(prefixes: Sequence[str | Path]) -> list[str]:
    """`prefixes`, each that is a corpus of shards replaced by its shards' prefixes.

    Raises TokenFileError for a prefix that is both, or a shard whose manifest is not what the list says.
    """
    expanded: list[str] = []
    for prefix in map(str, prefixes):
        if not shard_list_path(prefix).is_file():
            expanded.append(prefix)
            continue
        bin_path, idx_path, _ = token_file_paths(prefix)
        if idx_path.exists() or bin_path.exists():
            rule = f"is both a token file and a list of shards ({shard_list_path(prefix)})"
            raise TokenFileError(f"{prefix} {rule}; remove the one that is not meant")
        expanded += [_checked(prefix, shard) for shard in read_shard_list(prefix)]
    return expanded


def _checked(prefix: str, shard: Shard) -> str:
    found = str(Path(prefix).with_name(shard.name))
    manifest_path = token_file_paths(found)[2]
    if manifest_path.exists():
        manifest = read_manifest(manifest_path)
        if (manifest.documents, manifest.tokens) != (shard.documents, shard.tokens):
            here, listed = f"{manifest.tokens} tokens", f"{shard_list_path(prefix)} says {shard.tokens}"
            raise TokenFileError(f"{manifest_path} says {here}, {listed}: not a shard of this corpus; {_REMAKE}")
    return found


def _shard(path: Path, entry: object) -> Shard:
    fields = {item.name: str(item.type) for item in dataclasses.fields(Shard)}
    if not isinstance(entry, dict) or set(entry) != set(fields):
        raise TokenFileError(f"{path} has an entry that is no shard of version {FORMAT_VERSION}; {_REMAKE}")
    for name, kind in fields.items():
        value = entry[name]
        right = isinstance(value, str) if kind == "str" else type(value) is int and value >= 0
        if not right:
            raise TokenFileError(f"{path} has {name}={value!r}, which is not of its type {kind}; {_REMAKE}")
    if PurePath(entry["name"]).name != entry["name"] or entry["name"] in ("", ".."):
        raise TokenFileError(f"{path} names the shard {entry['name']!r}, which does not lie beside it; {_REMAKE}")
    return Shard(**entry)


def trained_with_bos(data: DataConfig) -> bool:
    """Whether documents began with BOS in training; files without a manifest are taken to have none."""
    manifest = Path(f"{expand_prefixes(training_sources(data)[0].prefixes)[0]}.json")
    return manifest.is_file() and read_manifest(manifest).bos
