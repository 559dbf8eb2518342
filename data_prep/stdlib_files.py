"""What `data=quickstart` names, made from the running Python's standard library: corpus, tokenizer, token files."""

from __future__ import annotations

from pathlib import Path

from data_prep.sources import text_sources
from data_prep.stdlib_corpus import write_stdlib_corpus
from data_prep.train_tokenizer import train_tokenizer
from data_prep.write_tokens import TokenOptions, write_tokens

WORKERS = 2


def prepare_stdlib_files(tokenizer: str | Path, vocab_size: int) -> None:
    """Write a corpus, `tokenizer` (NAME.model) and token files NAME_train and NAME_validation beside it.

    What stands already is kept; what is made is printed.
    """
    model = Path(tokenizer)
    corpus, prefix = model.with_suffix(".jsonl"), model.with_suffix("")
    if not corpus.exists():
        print(f"corpus: {write_stdlib_corpus(corpus).text_bytes / 1e6:.1f} MB of Python's standard library")
    sources = text_sources([corpus])
    if not model.exists():
        report = train_tokenizer(sources, model, vocab_size)
        print(f"tokenizer: {report.vocab_size} ids, {report.bytes_per_token:.2f} bytes per token")
    if not Path(f"{prefix}_train.bin").exists():
        options = TokenOptions(validation_fraction=0.02)
        for split in write_tokens(sources, prefix, model, options, workers=WORKERS).splits.values():
            print(f"{split.prefix}: {split.documents:,} documents, {split.tokens:,} tokens")
