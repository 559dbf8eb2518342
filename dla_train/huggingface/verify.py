"""The check that a model folder must pass before it gets its name: another process loads it and must agree.

That process cannot import this project (verify_process.py), so what it computes is the folder's alone. Compared are
logits of whole rows, logits of decoding token by token on the cache, and the tokenizer's ids and texts. The native
model computes in the folder's dtype, so bounds are tight: both do the same operations in the same order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dla_train.data.tokenizer import Tokenizer
from dla_train.huggingface import verify_process
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.tokenizer_files import PROBES
from dla_train.models.language_model import LanguageModel

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}
"""Largest |difference| of logits, as a share of the largest logit: summation order, and one rounding to 8 bits."""
ROWS, ROW_TOKENS, DECODED_TOKENS = 2, 256, 8
"""Size of the comparison."""


@dataclass(frozen=True)
class Verified:
    """What the comparison found."""

    logits: float
    """Largest difference of logits as a share of the largest one."""
    decoding: float
    """The same of decoding with the cache."""
    bound: float
    """What both stayed under."""
    rounding: float
    """The same between the folder and the model in float32: what storing it in this dtype costs."""
    texts: int
    """Texts on which the tokenizers agreed."""


def verify_folder(
    folder: Path,
    native: Callable[[str], LanguageModel],
    vocab_size: int,
    context_tokens: int,
    tokenizer: Tokenizer | None,
    dtype: str,
) -> Verified:
    """Compare `folder` with the native model (made in the dtype asked for). Raises FolderError where they differ."""
    length = min(ROW_TOKENS, context_tokens)
    tokens = torch.randint(vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        found, texts = _ask(folder, tokens, Path(scratch), DECODED_TOKENS)
    model = native(dtype)
    expected, decoded = whole_logits(model, tokens), decoded_logits(model, tokens)
    verified = Verified(
        logits=_share(found["whole"], expected),
        decoding=_share(found["decoded"], decoded),
        bound=BOUNDS[dtype],
        rounding=0.0 if dtype == "float32" else _share(found["whole"], whole_logits(native("float32"), tokens)),
        texts=_compare_tokenizers(tokenizer, texts) if tokenizer is not None else 0,
    )
    for what, difference in (("logits", verified.logits), ("decoding with the cache", verified.decoding)):
        if not difference <= verified.bound:
            raise FolderError(
                f"the folder's {what} differ from the run's by {difference:.3g} of the largest logit, more than "
                f"{verified.bound:g} in {dtype}; nothing was kept. This is a fault of dla-train: please report it"
            )
    return verified


@torch.no_grad()
def whole_logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits [B, T, vocab] of whole rows."""
    return model(tokens).logits.float()


def source_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits [B, T, vocab] of somebody else's folder by transformers, in float32. Raises FolderError if it cannot."""
    with tempfile.TemporaryDirectory() as scratch:
        return _ask(folder, tokens, Path(scratch), 0)[0]["whole"]


@torch.no_grad()
def decoded_logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits [B, DECODED_TOKENS, vocab] of the last tokens, each read by a step on the cache."""
    start = max(tokens.shape[1] - DECODED_TOKENS, 1)
    caches = model.empty_caches(tokens.shape[0], tokens.shape[1])
    out = model(tokens[:, :start], caches=caches, return_caches=True)
    assert out.caches is not None
    steps = [model.step(tokens[:, place], out.caches) for place in range(start, tokens.shape[1])]
    return torch.stack([out.logits[:, -1], *steps], 1).float()


def _share(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _ask(folder: Path, tokens: Tensor, scratch: Path, decoded: int) -> tuple[dict[str, Tensor], list[list[object]]]:
    """What a process without this project computes: logits, and (ids, text) of every probe."""
    save_file({"tokens": tokens}, scratch / "tokens.safetensors")
    (scratch / "probes.json").write_text(json.dumps(PROBES))
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the native model it is compared with is on the CPU
    command = [sys.executable, "-P", verify_process.__file__, str(folder), str(scratch), str(decoded)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).splitlines()[-6:])
        raise FolderError(f"transformers cannot use {folder}; nothing was kept. It says:\n{said}")
    return load_file(scratch / "logits.safetensors"), json.loads((scratch / "texts.json").read_text())


def _compare_tokenizers(tokenizer: Tokenizer, found: list[list[object]]) -> int:
    for text, (ids, decoded) in zip(PROBES, found, strict=True):
        wanted = tokenizer.encode(text)
        if ids != wanted or decoded != tokenizer.decode(wanted):
            raise FolderError(
                f"the tokenizer {tokenizer.name} has no exact form in transformers: of {text[:40]!r} it makes "
                f"{wanted[:8]} and transformers {str(ids)[:60]}, decoded as {str(decoded)[:40]!r}; nothing was kept"
            )
    return len(PROBES)
