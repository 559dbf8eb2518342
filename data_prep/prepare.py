"""The console script `dla-prepare`: arguments to the functions of this package, and their reports to standard output.

A mistake in the input or in the arguments ends with one line on standard error and exit status 2, never with a
traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_prep.pairs import PairOptions, write_pairs
from data_prep.recipe import RecipeSource, recipe_sources
from data_prep.records import INVALID_UTF8, ON_ERROR, PrepareError, TextSource
from data_prep.report import TokensReport
from data_prep.stdlib_corpus import write_stdlib_corpus
from data_prep.train_tokenizer import MODEL_TYPES, train_tokenizer
from data_prep.write_tokens import DUPLICATES, TokenOptions, write_tokens
from dla_train.data.errors import DataError

_SHOWN_FAULTS = 10
_EXAMPLES = """examples:
  a corpus without a download, a tokenizer for it, and its token files:
    dla-prepare stdlib --output data/stdlib.jsonl
    dla-prepare tokenizer data/stdlib.jsonl --output data/stdlib.model --vocab-size 4096
    dla-prepare tokens data/stdlib.jsonl --tokenizer data/stdlib.model --output data/stdlib --validation-fraction 0.02

  a folder of text with a Hugging Face tokenizer, in 8 processes:
    dla-prepare tokens books/ --tokenizer path/to/tokenizer/ --output data/books --workers 8

  one file of many documents with a mark between them:
    dla-prepare tokens stories.txt --separator '<|endoftext|>' --tokenizer data/my.model --output data/stories

  compressed JSON lines in shards of a billion tokens, without copies, bad lines left out; started again, it goes on:
    dla-prepare tokens crawl/ --text-field content --language-field meta.language --languages en de \\
        --duplicates exact --on-error skip --shard-tokens 1e9 --workers 32 --tokenizer data/my.model --output data/crawl

  documents that can only be recalled, for a share of the training data and to diagnose recall:
    dla-prepare pairs --tokenizer data/my.model --output data/pairs.jsonl
    dla-prepare tokens data/pairs.jsonl --tokenizer data/my.model --output data/pairs --validation-fraction 0.05

  a Hugging Face dataset, or sources with fields and filters of their own:
    dla-prepare tokens --dataset roneneldan/TinyStories --split train --tokenizer data/my.model --output data/stories
    dla-prepare tokens --recipe long_data_collections --shard-tokens 1e9 --tokenizer data/my.model --output data/long
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dla-prepare`; returns the exit status: 0, 2 after a mistake that was explained on standard error, 130 after
    Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (PrepareError, DataError) as error:
        print(f"dla-prepare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dla-prepare: stopped; the same command goes on from the last finished shard", file=sys.stderr)
        return 130
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
    _add_pairs(commands.add_parser("pairs", help="write documents that can only be recalled, to blend into text"))
    return parser


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train a sentencepiece model with byte fallback; decoding gives back the exact text."
    _add_sources(parser)
    parser.add_argument("--output", required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=_count, default=32000, help="number of token ids (default %(default)s)")
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
        "fraction into OUTPUT_train and OUTPUT_validation. With --shard-tokens into shards, named by "
        "OUTPUT.shards.json; the same command after a kill goes on behind the last finished one. OUTPUT.report.json "
        "says what was done."
    )
    _add_sources(parser)
    add, boolean = parser.add_argument, argparse.BooleanOptionalAction
    add("--tokenizer", required=True, help="sentencepiece .model, Hugging Face folder or tokenizer.json")
    add("--output", required=True, help="prefix of the files to write")
    add("--bos", action=boolean, default=False, help="begin every document with the tokenizer's BOS (default no)")
    add("--eos", action=boolean, default=True, help="end every document with the tokenizer's EOS (default yes)")
    add(
        "--validation-fraction",
        type=float,
        default=0.0,
        help="share of documents to hold out, chosen by a hash of their text (default 0)",
    )
    add("--shard-tokens", type=_count, default=0, help="tokens of a shard, such as 1e9 (default 0: one file)")
    add(
        "--duplicates",
        choices=DUPLICATES,
        default="keep",
        help="keep copies, leave out exact ones, or near ones too (needs datasketch; default %(default)s)",
    )
    add("--similarity", type=float, default=0.8, help="from here on documents are near copies (default %(default)s)")
    add(
        "--max-error-share",
        type=float,
        default=0.01,
        help="with --on-error skip: more bad records than this share are an error (default %(default)s)",
    )
    add("--workers", type=_count, default=1, help="processes that tokenise; any number writes the same (default 1)")
    _add_common(parser)
    parser.set_defaults(run=_run_tokens)


def _add_stdlib(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the running Python's reference topics, C docstrings and sources as JSONL, a document a line."
    )
    parser.add_argument("--output", required=True, help="the .jsonl file to write")
    _add_common(parser)
    parser.set_defaults(run=_run_stdlib)


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write documents of word pairs that come again, as JSONL: after a key that came before its value is certain. "
        "Blended into text they teach a small model early to recall from its context."
    )
    add, default = parser.add_argument, PairOptions()
    add("--tokenizer", required=True, help="words are those that are one token of it")
    add("--output", required=True, help="the .jsonl file to write")
    add("--documents", type=_count, default=default.documents, help="how many (default %(default)s)")
    add("--words", type=_count, default=default.words, help="words of a document (default %(default)s)")
    add("--least", type=_count, default=default.least, help="fewest pairs of a document (default %(default)s)")
    add("--most", type=_count, default=default.most, help="most pairs of a document (default %(default)s)")
    add("--seed", type=int, default=default.seed, help="of the draws (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.set_defaults(run=_run_pairs)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", nargs="*", help="text, .jsonl or .parquet files (.gz and .zst too), or folders of them")
    add("--recipe", help="a YAML file of sources with fields and filters of their own, instead of what follows")
    add("--dataset", help="a Hugging Face dataset instead of paths: a hub name or a local folder")
    add("--dataset-config", help="configuration of the dataset")
    add("--data-files", help="files of the dataset to take, a pattern")
    add("--revision", help="commit, branch or tag of the dataset")
    add("--split", default="train", help="split of the dataset (default %(default)s)")
    add("--streaming", action="store_true", help="read the dataset over the network instead of downloading it first")
    add("--text-field", default="text", help="field or column that holds the text (default %(default)s)")
    add("--language-field", default="", help="field that holds the language's tag (meta.language: a field of a field)")
    add("--languages", nargs="+", default=[], help="tags to keep (default all)")
    add("--min-characters", type=_count, default=0, help="leave out shorter documents (default %(default)s)")
    add("--max-characters", type=_count, default=0, help="leave out longer documents (default no limit)")
    add(
        "--largest-megabytes",
        type=float,
        default=64.0,
        help="a larger record is an error, unread (default %(default)s)",
    )
    add("--separator", help="cut text files into documents at this string")
    add(
        "--invalid-utf8",
        choices=INVALID_UTF8,
        default="error",
        help="text that is not UTF-8: an error, or U+FFFD in its place (default %(default)s)",
    )
    add(
        "--on-error",
        choices=ON_ERROR,
        default="stop",
        help="a record that cannot be used: stop with its place, or leave it out and count (default %(default)s)",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _count(text: str) -> int:
    """A whole number, also as 1e9."""
    try:
        value = float(text)
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text} is not a whole number, such as 1000000 or 1e6")


def _sources(options: argparse.Namespace) -> list[TextSource]:
    if options.recipe is None:
        return RecipeSource(
            text_field=options.text_field,
            language_field=options.language_field,
            languages=options.languages,
            min_characters=options.min_characters,
            max_characters=options.max_characters,
            largest_bytes=int(options.largest_megabytes * 1e6),
            separator=options.separator,
            invalid_utf8=options.invalid_utf8,
            paths=options.paths,
            dataset=options.dataset,
            config=options.dataset_config,
            split=options.split,
            data_files=options.data_files,
            revision=options.revision,
            streaming=options.streaming,
        ).open()
    if options.paths or options.dataset:
        raise PrepareError("--recipe cannot be combined with paths or --dataset; put them into the recipe")
    return recipe_sources(options.recipe)


def _run_pairs(options: argparse.Namespace) -> None:
    chosen = PairOptions(options.documents, options.words, options.least, options.most, options.seed)
    words = write_pairs(options.output, options.tokenizer, chosen, overwrite=options.overwrite)
    print(f"{options.output}: {chosen.documents} documents of {chosen.least} to {chosen.most} pairs, of {words} words")


def _run_tokenizer(options: argparse.Namespace) -> None:
    report = train_tokenizer(
        _sources(options),
        options.output,
        options.vocab_size,
        model_type=options.model_type,
        sample_megabytes=options.sample_megabytes,
        on_error=options.on_error,
        overwrite=options.overwrite,
        progress=not options.quiet,
    )
    print(
        f"{report.path}: {report.model_type}, {report.vocab_size} ids, {report.bytes_per_token:.2f} bytes per token, "
        f"trained on {report.sample_bytes / 1e6:.1f} MB in {report.seconds:.1f} s\n"
        f"{report.byte_share:.3%} of tokens are single bytes, {report.unknown_share:.3%} unknown\n{report.example}"
    )


def _run_tokens(options: argparse.Namespace) -> None:
    report = write_tokens(
        _sources(options),
        options.output,
        options.tokenizer,
        TokenOptions(
            bos=options.bos,
            eos=options.eos,
            validation_fraction=options.validation_fraction,
            shard_tokens=options.shard_tokens,
            duplicates=options.duplicates,
            similarity=options.similarity,
            on_error=options.on_error,
            max_error_share=options.max_error_share,
        ),
        workers=options.workers,
        overwrite=options.overwrite,
        progress=not options.quiet,
    )
    _print_report(report)


def _print_report(report: TokensReport) -> None:
    for split in report.splits.values():
        shards = f" in {split.shards} shards" if split.shards > 1 else ""
        print(
            f"{split.prefix}: {split.documents:,} documents, {split.tokens:,} tokens{shards}, "
            f"{split.text_bytes / split.tokens:.2f} bytes per token"
        )
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in report.counts.items() if kind != "kept")
    speed = sum(split.tokens for split in report.splits.values()) / max(report.seconds, 1e-9)
    print(f"left out: {left_out or 'nothing'}; {report.seconds:.1f} s, {speed / 1e6:.2f}M tokens/s")
    for fault in report.faults[:_SHOWN_FAULTS]:
        print(f"left out: {fault}", file=sys.stderr)
    if report.errors > _SHOWN_FAULTS:
        print(f"and {report.errors - _SHOWN_FAULTS} more: the first 100 are in the report", file=sys.stderr)


def _run_stdlib(options: argparse.Namespace) -> None:
    report = write_stdlib_corpus(options.output, overwrite=options.overwrite, progress=not options.quiet)
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.documents.items())
    print(
        f"{report.path}: {report.text_bytes / 1e6:.1f} MB; documents: {kinds}; left out: {report.not_utf8} not UTF-8, "
        f"{report.too_short} too short, {report.near_copies} near copies"
    )


if __name__ == "__main__":
    sys.exit(main())
