"""Writing a model folder: config.json, safetensors, tokenizer, code; verified under a temporary name, then renamed.

A folder under its final name is one whose logits were compared with the native model's, so nothing half-written or
wrong can be uploaded by mistake. Matrices are stored in the chosen dtype; vectors (norms, decays, thresholds, gains)
stay float32, as the model reads them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dla_train.config import MemoryConfig, ModelConfig
from dla_train.data.tokenizer import Tokenizer, load_tokenizer
from dla_train.huggingface.bundle import bundle
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.tokenizer_files import write_tokenizer
from dla_train.huggingface.verify import Verified, verify_folder
from dla_train.initial_model import MODEL_TYPE
from dla_train.models.build import COMPUTE_DTYPES
from dla_train.models.language_model import LanguageModel

PREFIX = "model."
"""Before a logical name in the files: the attribute of `DLAForCausalLM` that holds the model."""
SHARD_BYTES = 5 * 10**9
"""Default size above which weights go into another file."""


@dataclass(frozen=True)
class Content:
    """What a model folder is made of."""

    model: ModelConfig
    memory: MemoryConfig
    tensors: Mapping[str, Tensor]
    """float32 tensors of the whole model by logical name."""
    tokenizer: Path | None
    """A sentencepiece model, a Hugging Face folder or a tokenizer.json."""
    bos: bool
    """Whether documents began with BOS."""
    context_tokens: int
    """Longest row the model was trained on."""

    def native(self, dtype: str) -> LanguageModel:
        """The model itself in evaluation mode, computing in `dtype`, on the CPU."""
        model = LanguageModel(self.model, self.memory, compute_dtype=COMPUTE_DTYPES[dtype], device="cpu")
        state = model.state_dict()
        for name, tensor in state.items():
            tensor.copy_(self.tensors[name])
        return model.eval()


def write_folder(content: Content, output: Path, *, dtype: str, shard_bytes: int = SHARD_BYTES) -> Verified:
    """Write, verify and name the folder `output`. Raises FolderError, and then leaves nothing of that name."""
    if output.exists():
        raise FolderError(f"output={output} exists; choose another folder, or remove it")
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise FolderError(f"output={output} cannot be made: {error.strerror}; choose another folder") from error
    try:
        tokenizer = write_files(content, partial, dtype, shard_bytes)
        verified = verify_folder(
            partial, content.native, content.model.vocab_size, content.context_tokens, tokenizer, dtype
        )
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return verified


def write_files(content: Content, folder: Path, dtype: str, shard_bytes: int) -> Tokenizer | None:
    """Write every file of a model folder into `folder`, unverified; the tokenizer, if there is one."""
    tokenizer = load_tokenizer(content.tokenizer) if content.tokenizer is not None else None
    config = _config(content, tokenizer, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokens = {key: value for key, value in config.items() if key.endswith("_token_id")}
    generation = {"_from_model_config": False, **tokens}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    for name, text in bundle().items():
        (folder / name).write_text(text, encoding="utf-8")
    if tokenizer is not None and content.tokenizer is not None:
        write_tokenizer(content.tokenizer, tokenizer, folder, bos=content.bos, context_tokens=content.context_tokens)
    _write_weights(content.tensors, folder, COMPUTE_DTYPES[dtype], shard_bytes)
    return tokenizer


def _config(content: Content, tokenizer: Tokenizer | None, dtype: str) -> dict[str, Any]:
    memory = dataclasses.replace(content.memory, backend="auto")  # a run's choice of kernels is not the model's
    tokens: dict[str, Any] = {}
    if tokenizer is not None:
        tokens = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
        if tokenizer.bos_id is not None:
            tokens["bos_token_id"] = tokenizer.bos_id
    return {
        "architectures": ["DLAForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_dla.DLAConfig",
            "AutoModelForCausalLM": "modeling_dla.DLAForCausalLM",
        },
        "architecture": dataclasses.asdict(content.model),
        "memory": dataclasses.asdict(memory),
        "max_position_embeddings": content.context_tokens,
        "torch_dtype": dtype,
        "use_cache": True,
        **tokens,
        "dla_train_version": version("dla-train"),
    }


def _write_weights(tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shards = list(_shards(tensors, dtype, shard_bytes))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        alone = len(shards) == 1
        file_name = "model.safetensors" if alone else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stored = {PREFIX + name: tensors[name].to(_stored_dtype(tensors[name], dtype)).contiguous() for name in names}
        save_file(stored, folder / file_name, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file_name)  # safetensors' own may be read by its owner alone
        places.update(dict.fromkeys(stored, file_name))
    if len(shards) > 1:
        size = sum(_stored_bytes(tensor, dtype) for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each file; one that is larger than a file has its own."""
    names, size = list[str](), 0
    for name, tensor in tensors.items():
        stored = _stored_bytes(tensor, dtype)
        if names and size + stored > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += stored
    yield names


def _stored_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.dim() > 1 else torch.float32


def _stored_bytes(tensor: Tensor, dtype: torch.dtype) -> int:
    return tensor.numel() * _stored_dtype(tensor, dtype).itemsize
