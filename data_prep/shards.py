"""Token files of one output: a shard of every split at a time, each written whole or not at all.

Shards of all splits end at the same record, so one position in the input describes them. Beside each lies
`PREFIX.sha256`, in sha256sum's format, which `dla-data verify` compares with.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dla_train.data.indexed import TokenFileWriter
from dla_train.data.manifest import Manifest
from dla_train.data.shard_list import Shard, shard_list_path
from dla_train.data.token_file import token_file_paths
from dla_train.data.tokenizer import Tokenizer


@dataclass
class _Part:
    """One split's file of the present shard."""

    writer: TokenFileWriter
    text_bytes: int = 0
    sources: list[str] = field(default_factory=list)


class ShardWriter:
    """The present shard of every split. `seal` puts it in place, `abandon` removes it."""

    def __init__(self, output: str, tails: dict[str, str], tokenizer: Tokenizer, *, bos: bool, eos: bool) -> None:
        self._output, self._tails, self._tokenizer = output, tails, tokenizer
        self._policy = (bos, eos)
        self._first = np.array([tokenizer.bos_id] if bos else [], dtype=np.int64)
        self._last = np.array([tokenizer.eos_id] if eos else [], dtype=np.int64)
        self._parts: dict[str, _Part] = {}

    def prefix(self, split: str, number: int | None) -> str:
        """Prefix of a shard; of a whole split if `number` is None."""
        return f"{self._output}{self._tails[split]}" + ("" if number is None else f"_{number:05d}")

    def tokens(self, split: str) -> int:
        """Tokens of the present shard of a split."""
        return self._parts[split].writer.tokens if split in self._parts else 0

    def add(self, split: str, number: int | None, ids: NDArray[np.integer], text_bytes: int, source: str) -> None:
        """Append a document to a split of the shard `number`; its file is begun with its first document."""
        if split not in self._parts:  # old files of this name stay until they are replaced
            prefix = self.prefix(split, number)
            self._parts[split] = _Part(TokenFileWriter(prefix, self._tokenizer.vocab_size, overwrite=True))
        part = self._parts[split]
        part.writer.add(np.concatenate([self._first, ids, self._last]))
        part.text_bytes += text_bytes
        if not part.sources or part.sources[-1] != source:
            part.sources.append(source)

    def seal(self) -> dict[str, Shard]:
        """Put the files of every split that has documents in place; what they hold."""
        sealed: dict[str, Shard] = {}
        for split, part in self._parts.items():
            writer = part.writer
            prefix = Path(writer.prefix)
            prefix.with_name(f"{prefix.name}.sha256").unlink(missing_ok=True)
            writer.commit(self._manifest(split, part))
            _write_hashes(prefix)
            sealed[split] = Shard(prefix.name, writer.documents, writer.tokens, part.text_bytes)
        self._parts = {}
        return sealed

    def abandon(self) -> None:
        """Remove what is not sealed."""
        for part in self._parts.values():
            part.writer.__exit__(None, None, None)
        self._parts = {}

    def _manifest(self, split: str, part: _Part) -> Manifest:
        bos, eos = self._policy
        return Manifest(
            tokenizer=self._tokenizer.name,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            bos=bos,
            eos=eos,
            documents=part.writer.documents,
            tokens=part.writer.tokens,
            text_bytes=part.text_bytes,
            split=split,
            sources=part.sources,
        )


def existing_files(output: str, tails: Sequence[str]) -> list[Path]:
    """Token files, shards, lists, hashes and the report of an output, whoever wrote them."""
    names = "|".join(re.escape(Path(output).name + tail) for tail in tails)
    ours = re.compile(rf"({names})((_\d{{5,}})?\.(bin|idx|json|sha256|seen)|\.shards\.json)")
    folder = Path(output).parent
    found = [path for path in folder.iterdir() if ours.fullmatch(path.name)] if folder.is_dir() else []
    report = Path(f"{output}.report.json")
    return sorted([*found, report] if report.exists() else found)


def files_of(prefix: str) -> list[Path]:
    """Every file of a token file or a list of shards."""
    return [*token_file_paths(prefix), Path(f"{prefix}.sha256"), shard_list_path(prefix)]


def _write_hashes(prefix: Path) -> None:
    lines = []
    for path in token_file_paths(prefix):
        with path.open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {path.name}\n")
    prefix.with_name(f"{prefix.name}.sha256").write_text("".join(lines), encoding="utf-8")
