"""A sentencepiece model as a tokenizer of transformers, by asking sentencepiece itself.

This file is copied into exported folders whose tokenizer the `tokenizers` library cannot reproduce exactly.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer


class DLATokenizer(PreTrainedTokenizer):
    """Ids and texts of `tokenizer.model`."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        add_bos_token: bool = False,
        **kwargs: Any,  # transformers hands its own settings through here
    ) -> None:
        self.vocab_file, self.add_bos_token = vocab_file, add_bos_token
        self._processor = SentencePieceProcessor(model_file=vocab_file)
        super().__init__(add_bos_token=add_bos_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return int(self._processor.get_piece_size())

    def get_vocab(self) -> dict[str, int]:
        """Id of every piece."""
        return {self._processor.id_to_piece(index): index for index in range(self.vocab_size)}

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Ids of a text, or of two behind each other, after BOS where the model's documents began with it."""
        begin = [self.bos_token_id] if self.add_bos_token else []
        return begin + token_ids_0 + (token_ids_1 or [])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces."""
        return str(self._processor.decode_pieces(tokens))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the sentencepiece model."""
        name = "tokenizer.model" if filename_prefix is None else f"{filename_prefix}-tokenizer.model"
        return (str(shutil.copyfile(self.vocab_file, Path(save_directory) / name)),)

    def _tokenize(self, text: str) -> list[str]:
        return list(self._processor.encode(text, out_type=str))

    def _convert_token_to_id(self, token: str) -> int:
        return int(self._processor.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self._processor.id_to_piece(index))
