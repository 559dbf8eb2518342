"""The tokenizer of an exported folder.

A Hugging Face tokenizer is copied. A sentencepiece model becomes a `tokenizer.json` with the same pieces, merges and
byte fallback where that makes the same ids and texts, which is tried out: it does for the models that `dla-prepare`
makes by default. Otherwise (unigram models, whose ties are broken in another order; normalisation) the folder brings
a tokenizer class that asks sentencepiece.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dla_train.data.tokenizer import HUGGING_FACE_FILES, Tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # sentencepiece's types of pieces
_BPE = 2  # its type of models that merge
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

PROBES: tuple[str, ...] = (
    "",
    " ",
    "  two  spaces  ",
    "Hello, world!",
    " leading",
    "trailing ",
    "a\tb\nc\r\n\n\n  indented\n\tif x:\n        return 0x1f",
    "0 12 345 6789 3.14159 1,000,000 2026-01-31",
    "caf\u00e9 cafe\u0301 na\u00efve \u00df \u0130 \ufb01 \u2460 \u00bd",
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940 \u0639\u0631\u0628\u064a",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U00010348",
    "\u00a0nbsp\u2003em\u200bzero",
    "<s> </s> <unk> <0x41> [INST]",
    "def f(x):\n    return {k: v**2 for k, v in x.items() if v != None}\n",
    "x" * 300,
    "\x00\x01\x7f",
    "The quick brown fox jumps over the lazy dog. " * 5,
)
"""Texts whose ids and decoding must agree. Sentencepiece's own mark of a space (U+2581) is not among them: what either
library makes of it as text depends on the settings."""


def write_tokenizer(source: Path, tokenizer: Tokenizer, folder: Path, *, bos: bool, context_tokens: int) -> None:
    """Write the files of the tokenizer at `source` into `folder`.

    bos: whether encoding with special tokens begins with BOS, as the model's documents did.
    """
    if source.suffix == ".model":
        _write_sentencepiece(source, tokenizer, folder, bos=bos, context_tokens=context_tokens)
        return
    found = [source] if source.is_file() else [source / name for name in HUGGING_FACE_FILES]
    for path in found:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _write_sentencepiece(source: Path, tokenizer: Tokenizer, folder: Path, *, bos: bool, context_tokens: int) -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto()
    proto.ParseFromString(source.read_bytes())
    pieces = [piece.piece for piece in proto.pieces]
    begins = bos and tokenizer.bos_id is not None
    shutil.copyfile(source, folder / "tokenizer.model")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if tokenizer.bos_id is None else pieces[tokenizer.bos_id],
        "eos_token": pieces[tokenizer.eos_id],
        "pad_token": pieces[tokenizer.eos_id],
        "unk_token": next((piece.piece for piece in proto.pieces if piece.type == _UNKNOWN), None),
        "add_bos_token": begins,
        "split_special_tokens": True,  # text that reads like a special token is text, as in training
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": context_tokens,
    }
    fast = _converted(proto)
    if fast is not None and _agree(fast, tokenizer):
        if begins:
            from tokenizers.processors import TemplateProcessing

            word = pieces[tokenizer.bos_id or 0]
            fast.post_processor = TemplateProcessing(single=f"{word} $A", special_tokens=[(word, tokenizer.bos_id)])
        fast.save(str(folder / "tokenizer.json"))
    else:
        settings["tokenizer_class"] = "DLATokenizer"
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_dla.DLATokenizer", None]}
        code = Path(__file__).with_name("tokenization_dla.py")
        shutil.copyfile(code, folder / code.name)
    text = json.dumps({key: value for key, value in settings.items() if value is not None}, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _agree(fast: Any, tokenizer: Tokenizer) -> bool:
    fast.encode_special_tokens = True
    return all(
        (ids := fast.encode(text, add_special_tokens=False).ids) == tokenizer.encode(text)
        and fast.decode(ids) == tokenizer.decode(ids)
        for text in PROBES
    )


def _converted(proto: Any) -> Any:
    """The `tokenizers.Tokenizer` of a sentencepiece model; None for one that is no plain BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    if proto.trainer_spec.model_type != _BPE or proto.normalizer_spec.precompiled_charsmap:
        return None
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    unknown = next((piece.piece for piece in proto.pieces if piece.type == _UNKNOWN), None)
    byte_fallback = any(piece.type == _BYTE for piece in proto.pieces)
    fast = Tokenizer(BPE(vocabulary, _merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback))
    prefix = proto.normalizer_spec.add_dummy_prefix
    space = normalizers.Replace(" ", _SPACE)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), space]) if prefix else space
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    fast.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    fast.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    words = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    fast.add_tokens([AddedToken(word, normalized=False) for word in words])
    return fast


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Pairs in the order in which sentencepiece joins them: by the score of what they make."""
    learned = {piece.piece: piece.score for piece in proto.pieces if piece.type not in (_UNKNOWN, _CONTROL, _BYTE)}
    order = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    merges: list[tuple[str, str]] = []
    for word in sorted((word for word in learned if len(word) > 1), key=lambda word: (-learned[word], order[word])):
        pairs = [(word[:cut], word[cut:]) for cut in range(1, len(word))]
        known = [pair for pair in pairs if pair[0] in learned and pair[1] in learned]
        merges += sorted(known, key=lambda pair: (order[pair[0]], order[pair[1]]))
    return merges
