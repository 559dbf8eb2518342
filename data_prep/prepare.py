"""The console script `dla-prepare`: arguments to the functions of this package, and their reports to standard output.

A mistake in the input or in the arguments ends with one line on standard error and exit status 2, never with a
traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_prep.huggingface import HuggingFaceDataset
from data_prep.sources import PrepareError, TextSource, text_sources
from data_prep.stdlib_corpus import write_stdlib_corpus
from data_prep.train_tokenizer import MODEL_TYPES, train_tokenizer
from data_prep.write_tokens import write_tokens
from dla_train.data.errors import DataError

_EXAMPLES = """examples:
  a corpus without a download, a tokenizer for it, and its token files:
    dla-prepare stdlib --output data/stdlib.jsonl
    dla-prepare tokenizer data/stdlib.jsonl --output data/stdlib.model --vocab-size 4096
    dla-prepare tokens data/stdlib.jsonl --tokenizer data/stdlib.model --output data/stdlib --validation-fraction 0.02

  a folder of text with a Hugging Face tokenizer, in 8 processes:
    dla-prepare tokens books/ --tokenizer path/to/tokenizer/ --output data/books --workers 8

  one file of many documents with a mark between them:
    dla-prepare tokens stories.txt --separator '<|endoftext|>' --tokenizer data/my.model --output data/stories

  a Hugging Face dataset:
    dla-prepare tokens --dataset roneneldan/TinyStories --split train --tokenizer data/my.model --output data/stories
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dla-prepare`; returns the exit status (0, or 2 after a mistake that was explained on standard error)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (PrepareError, DataError) as error:
        print(f"dla-prepare: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dla-prepare",
        description="Turn text into Megatron .bin/.idx token files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_tokenizer(commands.add_parser("tokenizer", help="train a sentencepiece tokenizer"))
    _add_tokens(commands.add_parser("tokens", help="tokenise text into .bin/.idx and a manifest"))
    _add_stdlib(commands.add_parser("stdlib", help="write Python's own standard library as a corpus"))
    return parser


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train a sentencepiece model with byte fallback; decoding gives back the exact text."
    _add_sources(parser)
    parser.add_argument("--output", required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of token ids")
    parser.add_argument(
        "--model-type", choices=MODEL_TYPES, default="bpe", help="how pieces are found (default %(default)s)"
    )
    parser.add_argument(
        "--sample-megabytes",
        type=float,
        default=16.0,
        help="most text to train on, spread over the input (default %(default)s)",
    )
    _add_common(parser)
    parser.set_defaults(run=_run_tokenizer)


def _add_tokens(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tokenise documents into OUTPUT.bin, .idx and .json (the manifest that training checks); with a validation "
        "fraction into OUTPUT_train and OUTPUT_validation."
    )
    _add_sources(parser)
    parser.add_argument(
        "--tokenizer", required=True, help="sentencepiece .model, Hugging Face folder or tokenizer.json"
    )
    parser.add_argument("--output", required=True, help="prefix of the files to write")
    boolean = argparse.BooleanOptionalAction
    parser.add_argument(
        "--bos", action=boolean, default=False, help="begin every document with the tokenizer's BOS (default no)"
    )
    parser.add_argument(
        "--eos", action=boolean, default=True, help="end every document with the tokenizer's EOS (default yes)"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        help="share of documents to hold out, chosen by a hash of their text (default 0)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that tokenise; any number writes the same files (default 1)"
    )
    _add_common(parser)
    parser.set_defaults(run=_run_tokens)


def _add_stdlib(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the running Python's reference topics, C docstrings and sources as JSONL, a document a line."
    )
    parser.add_argument("--output", required=True, help="the .jsonl file to write")
    _add_common(parser)
    parser.set_defaults(run=_run_stdlib)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="*", help="text, .jsonl or .parquet files (.gz too), or folders of them")
    parser.add_argument("--dataset", help="a Hugging Face dataset instead: a hub name or a local folder")
    parser.add_argument("--dataset-config", help="configuration of the dataset")
    parser.add_argument("--split", default="train", help="split of the dataset (default %(default)s)")
    parser.add_argument(
        "--text-field", default="text", help="field or column that holds the text (default %(default)s)"
    )
    parser.add_argument("--separator", help="cut text files into documents at this string")
    parser.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="text that is not UTF-8: stop with its place, or put U+FFFD (default %(default)s)",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _sources(options: argparse.Namespace) -> list[TextSource]:
    if options.dataset is None:
        return text_sources(
            options.paths, text_field=options.text_field, separator=options.separator, errors=options.errors
        )
    if options.paths or options.separator:
        raise PrepareError("--dataset cannot be combined with paths or --separator; give one or the other")
    dataset = HuggingFaceDataset(
        options.dataset,
        split=options.split,
        config=options.dataset_config,
        text_field=options.text_field,
        errors=options.errors,
    )
    return [dataset]


def _run_tokenizer(options: argparse.Namespace) -> None:
    report = train_tokenizer(
        _sources(options),
        options.output,
        options.vocab_size,
        model_type=options.model_type,
        sample_megabytes=options.sample_megabytes,
        overwrite=options.overwrite,
        progress=not options.quiet,
    )
    print(
        f"{report.path}: {report.model_type}, {report.vocab_size} ids, {report.bytes_per_token:.2f} bytes per token, "
        f"trained on {report.sample_bytes / 1e6:.1f} MB in {report.seconds:.1f} s"
    )


def _run_tokens(options: argparse.Namespace) -> None:
    report = write_tokens(
        _sources(options),
        options.output,
        options.tokenizer,
        bos=options.bos,
        eos=options.eos,
        validation_fraction=options.validation_fraction,
        workers=options.workers,
        overwrite=options.overwrite,
        progress=not options.quiet,
    )
    for split in report.splits.values():
        print(
            f"{split.prefix}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.text_bytes / split.tokens:.2f} bytes per token"
        )
    print(f"{report.skipped_empty} empty documents left out; {report.seconds:.1f} s")


def _run_stdlib(options: argparse.Namespace) -> None:
    report = write_stdlib_corpus(options.output, overwrite=options.overwrite, progress=not options.quiet)
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.documents.items())
    print(
        f"{report.path}: {report.text_bytes / 1e6:.1f} MB; documents: {kinds}; left out: {report.not_utf8} not UTF-8, "
        f"{report.too_short} too short, {report.near_copies} near copies"
    )


if __name__ == "__main__":
    sys.exit(main())
