"""One interface over sentencepiece models and Hugging Face tokenizers.

Special tokens are never added by `encode`: data_prep puts BOS and EOS in, and records in the manifest that it did. The
fingerprint is a hash of the tokenizer's own files, so two copies of one tokenizer agree and a retrained one does not.
transformers is imported only when a Hugging Face tokenizer is opened (its import takes seconds).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dla_train.data.errors import TokenizerError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

HUGGING_FACE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)
"""What a tokenizer folder may consist of."""
QUICKSTART_FOLDER = ("build", "quickstart")
"""Where the quickstart puts its tokenizer, below the folder of the command."""


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    name: str
    """File or folder name, for messages and manifests."""
    fingerprint: str
    """sha256, hexadecimal, of the tokenizer's files."""
    vocab_size: int
    """Number of token ids, special ones included: every id is below it."""
    bos_id: int | None
    """Beginning-of-document id, if the tokenizer has one."""
    eos_id: int
    """End-of-document id."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in one call."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens give no text."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a sentencepiece `.model` file, or a Hugging Face tokenizer folder or `tokenizer.json`.

    Raises TokenizerError when the path does not exist, is neither, is corrupt, or has no end-of-sequence token.
    """
    path = Path(path)
    if not path.exists():
        made = path.absolute().parent.parts[-2:] == QUICKSTART_FOLDER
        mend = "`make quickstart` makes it" if made else "train one with `dla-prepare tokenizer`"
        raise TokenizerError(
            f"tokenizer {path.absolute()} does not exist; give a sentencepiece .model file or a Hugging Face tokenizer "
            f"folder ({mend})"
        )
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.is_dir() or path.name == "tokenizer.json":
        return HuggingFaceTokenizer(path)
    raise TokenizerError(
        f"tokenizer {path} is neither a sentencepiece .model file nor a Hugging Face folder or tokenizer.json"
    )


class SentencePieceTokenizer:
    """A sentencepiece model file."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        model = path.read_bytes()
        try:
            self._processor: SentencePieceProcessor = SentencePieceProcessor(model_proto=model)
            if not model:  # it takes an empty file for "no model yet"
                raise RuntimeError("the file is empty")
        except RuntimeError as error:
            raise TokenizerError(
                f"tokenizer {path} is not a readable sentencepiece model; train or copy it again"
            ) from error
        self.name = path.name
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = int(self._processor.get_piece_size())
        bos_id, eos_id = int(self._processor.bos_id()), int(self._processor.eos_id())
        if eos_id < 0:
            raise TokenizerError(
                f"tokenizer {path} has no EOS piece; train it with an eos_id (`dla-prepare tokenizer` does)"
            )
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_id = eos_id

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on one thread (parallelism is data_prep's processes)."""
        return list(self._processor.encode(list(texts), num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control pieces give no text."""
        return str(self._processor.decode([int(i) for i in ids]))


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer: a folder as `save_pretrained` writes it, or one tokenizer.json."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = _open_hugging_face(path)
        if self._tokenizer.eos_token_id is None:
            raise TokenizerError(
                f"tokenizer {path} names no eos_token; set `eos_token` in its tokenizer_config.json "
                "(a lone tokenizer.json cannot name one: give the folder)"
            )
        self.name = path.name
        self.fingerprint = _hash_files([path] if path.is_file() else [path / name for name in HUGGING_FACE_FILES])
        self.vocab_size = len(self._tokenizer)
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_id = int(self._tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in one call; nothing is cut at the tokenizer's `model_max_length`."""
        if not texts:
            return []
        encoding = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoding["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens give no text."""
        return str(
            self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def _open_hugging_face(path: Path) -> PreTrainedTokenizerBase:
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ModuleNotFoundError as error:
        raise TokenizerError(
            f"tokenizer {path} needs transformers, which is not installed; run `pip install dla-train[huggingface]`"
        ) from error
    tokenizer_json = path if path.is_file() else path / "tokenizer.json"
    if tokenizer_json.exists() and not _has_model(tokenizer_json):  # the library raises a bare Exception for it
        raise TokenizerError(f"tokenizer {tokenizer_json} cannot be read: it is not a JSON object with a `model`")
    try:
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise TokenizerError(f"tokenizer {path} cannot be read as a Hugging Face tokenizer: {error}") from error


def _has_model(tokenizer_json: Path) -> bool:
    try:
        contents = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(contents, dict) and isinstance(contents.get("model"), dict)


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.exists():
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
