"""What a checkpoint consists of: each file's size and sha256, and the marker that says the list is final.

`manifest.json` lists every other file; `COMPLETE` holds the sha256 of the manifest, in the form that `sha256sum -c`
reads, so a changed bit in any file shows. Nothing that stands in these files is trusted: a name must be one that this
package writes (so no path leaves the folder), a size must be the size on disk before anything of that size is read, and
a file must be a plain file and not a link.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dla_train.checkpoint.errors import CheckpointError, DamagedError

FORMAT = 2
"""Version of the folder's layout. Version 1 stored tensors beside a pickle and is refused."""
MARKER, MANIFEST, TRAINER, TENSORS = "COMPLETE", "manifest.json", "trainer.json", "tensors"
LARGEST_JSON_BYTES = 64 * 2**20
"""Most that is read of a JSON file; a manifest of 10,000 ranks has 6 MB."""
CHUNK_BYTES = 8 * 2**20
"""Bytes hashed and written at a time: large enough that Python's lock is held for no noticeable part of it."""
_NAME = re.compile(r"trainer\.json|tensors/(model|optim|rng)-\d{5}-\d{3}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Files of one checkpoint, by their path in its folder."""

    step: int
    files: dict[str, FileRecord]

    def of_kind(self, *kinds: str) -> list[str]:
        """Names of the tensor files of some kinds ("model", "optim", "rng"), sorted."""
        starts = tuple(f"{TENSORS}/{kind}-" for kind in kinds)
        return sorted(name for name in self.files if name.startswith(starts))

    @property
    def total_bytes(self) -> int:
        """Bytes of all files listed."""
        return sum(record.bytes for record in self.files.values())


def write_hashed(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file from `pieces`, flushed to the disk, and hash it on the way. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "xb") as file:
            for piece in pieces:
                view = memoryview(piece)
                for begin in range(0, len(view), CHUNK_BYTES):
                    chunk = view[begin : begin + CHUNK_BYTES]
                    digest.update(chunk)
                    size += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # the system does not say which file a write failed in
        raise
    return FileRecord(size, digest.hexdigest())


def write_manifest(folder: Path, step: int, files: dict[str, FileRecord]) -> str:
    """Write `manifest.json` and return the text of the marker that makes it final."""
    listed = {name: asdict(files[name]) for name in sorted(files)}
    text = json.dumps({"format": FORMAT, "step": step, "files": listed}, indent=1)
    return marker_text(write_hashed(folder / MANIFEST, [text.encode()]).sha256)


def marker_text(manifest_sha256: str) -> str:
    """The whole content of the marker."""
    return f"{manifest_sha256}  {MANIFEST}\n"


def read_manifest(folder: Path, step: int | None = None) -> Manifest:
    """The manifest of a complete checkpoint; sizes of all files are compared, contents are not (see `check_file`).

    step: the one that the folder's name says, if it does. Raises DamagedError, and CheckpointError for another layout
    or files that may not be read.
    """
    marker = read_small(folder / MARKER)
    if marker.startswith(b"{"):
        raise CheckpointError(
            f"{folder} has layout 1, this version reads {FORMAT}; go on with the version that wrote it, or start anew "
            "in another run_dir"
        )
    content = read_small(folder / MANIFEST)
    if marker != marker_text(hashlib.sha256(content).hexdigest()).encode():
        raise DamagedError(f"{folder} is damaged: {MANIFEST} is not the one its {MARKER} marker names")
    manifest = _manifest_of(folder, parse_json(folder / MANIFEST, content))
    if step is not None and manifest.step != step:
        raise DamagedError(f"{folder} holds step {manifest.step} by its {MANIFEST}; it was renamed or copied here")
    for name, record in manifest.files.items():
        _check_size(folder, name, record)
    return manifest


def check_file(folder: Path, name: str, record: FileRecord, progress: Callable[[int], object] | None = None) -> None:
    """Raise DamagedError unless the file holds what was written. `progress` gets the bytes of each piece read."""
    _check_size(folder, name, record)
    digest = hashlib.sha256()
    try:
        with open(folder / name, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                if progress is not None:
                    progress(len(chunk))
    except OSError as error:
        raise _unreadable(folder / name, error) from error
    if digest.hexdigest() != record.sha256:
        raise DamagedError(f"{folder} is damaged: {name} has {record.bytes} bytes, but not those that were written")


def read_small(path: Path) -> bytes:
    """A small plain file whole. Raises DamagedError where it is absent, a link or too large."""
    size = _plain_size(path)
    if size > LARGEST_JSON_BYTES:
        raise DamagedError(f"{path} has {size} bytes, more than the {LARGEST_JSON_BYTES} of any such file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object that `content`, read from `path`, holds. Raises DamagedError."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path} holds {type(value).__name__} where an object belongs")
    return value


def deal(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Which rank takes what, by name: the largest first, each to the rank that has least so far."""
    shares, loads = [list[str]() for _ in range(ranks)], [0] * ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        shares[rank].append(name)
        loads[rank] += sizes[name]
    return shares


def is_count(value: object) -> bool:
    """Whether a value read from JSON is a whole number from 0 to 2^63 - 1."""
    return type(value) is int and 0 <= value < 2**63


def _manifest_of(folder: Path, value: dict[str, Any]) -> Manifest:
    where = folder / MANIFEST
    if value.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has layout {value.get('format')!r:.20}, this version reads {FORMAT}")
    step, files = value.get("step"), value.get("files")
    if type(step) is not int or not is_count(step) or not isinstance(files, dict) or TRAINER not in files:
        raise DamagedError(f"{where} lacks a step, or files with {TRAINER} among them")
    records = {}
    for name, record in files.items():
        if not _NAME.fullmatch(name):
            raise DamagedError(f"{where} lists {name!r:.80}, which is no file of a checkpoint")
        size, sha256 = (record.get("bytes"), record.get("sha256")) if isinstance(record, dict) else (None, None)
        if type(size) is not int or not is_count(size) or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise DamagedError(f"{where} gives no size and sha256 of {name}")
        records[name] = FileRecord(size, sha256)
    return Manifest(step, records)


def _check_size(folder: Path, name: str, record: FileRecord) -> None:
    if Path(name).parent.name and not stat.S_ISDIR(_mode(folder / TENSORS).st_mode):
        raise DamagedError(f"{folder / TENSORS} is not a folder")
    size = _plain_size(folder / name)
    if size != record.bytes:
        raise DamagedError(f"{folder} is damaged: {name} has {size} bytes where {record.bytes} were written")


def _plain_size(path: Path) -> int:
    found = _mode(path)
    if not stat.S_ISREG(found.st_mode):
        raise DamagedError(f"{path} is not a plain file")
    return found.st_size


def _mode(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, PermissionError):
        return CheckpointError(f"{path} may not be read; give this user the right to read it")
    return DamagedError(f"{path} cannot be read: {error.strerror}")
