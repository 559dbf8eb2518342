"""Tensor files of a checkpoint: written piece by piece and hashed on the way, read without unpickling anything.

The files are safetensors: a JSON header, then plain bytes. Other tools open them, and a folder of them is what
`torch.distributed.checkpoint.HuggingFaceStorageReader` reads. That package's default layout is not used, because its
`.metadata` is a pickle, which runs whatever its author wrote. Its writer of safetensors is not either: it builds a
whole file in memory and cannot hash what it writes, and planning would issue collectives from the saving thread. So the
library reads (and checks every offset against the file's size) and this module writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dla_train.checkpoint.errors import DamagedError
from dla_train.checkpoint.manifest import TENSORS, FileRecord, write_hashed

FILE_BYTES = 2**30
"""Size above which a rank begins another file, so that one rank hashes a large checkpoint with several threads."""
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}
_ALIGNMENT = 64


def write_tensor_files(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, FileRecord]:
    """Write contiguous CPU tensors, float32 or uint8, named `<kind>/...`, into `folder`; each kind has its own files.

    Returns the files by their path in `folder`. Raises OSError.
    """
    written = {}
    for kind, number, names in _grouped(tensors):
        name = f"{TENSORS}/{kind}-{rank:05d}-{number:03d}.safetensors"
        written[name] = write_hashed(folder / name, _pieces({name: tensors[name] for name in names}))
    return written


def _grouped(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, int, list[str]]]:
    """(kind, number of the file within the kind, names of its tensors)."""
    for kind in dict.fromkeys(name.split("/", 1)[0] for name in tensors):
        number, names, size = 0, list[str](), 0
        for name in (name for name in tensors if name.startswith(f"{kind}/")):
            if names and size + tensors[name].nbytes > FILE_BYTES:
                yield kind, number, names
                number, names, size = number + 1, [], 0
            names.append(name)
            size += tensors[name].nbytes
        yield kind, number, names


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: length of the header (8 bytes, little-endian), header, data."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of some files, by name, each read when it is asked for.

    A tensor is a private view of its file's pages, which the system drops under pressure: holding them all costs no
    more than the page cache. Writing to one does not reach the file.
    The file must stay as it is meanwhile: a page that is gone when it is looked at ends the process (SIGBUS).
    Raises DamagedError where a file is no safetensors file or a name occurs twice.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file_name in names:
            try:
                self._open(file_name)
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                raise DamagedError(f"{folder} is damaged: {file_name} is no tensor file: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise DamagedError(f"{self._folder} is damaged: {name} cannot be read: {error}") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(type as safetensors writes it, e.g. "F32"; shape) of a tensor, without reading it."""
        return self._entries[name]

    def _open(self, file_name: str) -> None:
        # the library checks the header against the file's size before it maps anything
        file = safe_open(self._folder / file_name, framework="pt", device="cpu")
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if name in self._files:
                raise ValueError(f"{name} is stored twice")
            part = file.get_slice(name)
            self._files[name], self._entries[name] = file, (part.get_dtype(), tuple(part.get_shape()))
