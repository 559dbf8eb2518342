"""The program `dla-data`: look at token files and blends before training on them.

WHAT is either prefixes of .bin/.idx pairs, or the settings of a training command (any word with `=`), whose data.train
is then looked at, blend and all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dla_train.config import MISTAKE, Config, ConfigError, DataConfig, TrainConfig
from dla_train.config_rules import validate
from dla_train.data.errors import DataError
from dla_train.data.indexed import TokenFiles
from dla_train.data.loader import BatchSource, training_batches
from dla_train.data.shard_list import expand_prefixes
from dla_train.data.tokenizer import load_tokenizer
from dla_train.data_config import training_sources
from dla_train.hydra_app import compose
from dla_train.inspect_data.contents import duplicates, verify
from dla_train.inspect_data.facts import blend_facts, blend_text, draw_lengths, facts_text, file_facts
from dla_train.inspect_data.samples import sample_text

_EXAMPLES = """examples:
  dla-data inspect data/web_train data/code_train
  dla-data inspect experiment=paper_gated_deltanet_1300m_dla --at-tokens 10e9 50e9
  dla-data stats data/web_train --picture lengths.png
  dla-data verify data/web_train --record
  dla-data sample experiment=quickstart --step 3 --rows 2
  dla-data sample data/web_train --tokenizer data/web.model --context-tokens 1024
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dla-data`; returns 0, 1 where `verify` found damage, 2 after a mistake that was explained."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ConfigError, DataError) as error:
        print(f"dla-data: error: {error}", file=sys.stderr)
        return MISTAKE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dla-data", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    inspect = commands.add_parser("inspect", help="documents, tokens, lengths; a run's packing, phases and ledger")
    _add_what(inspect)
    inspect.add_argument("--at-tokens", nargs="+", type=float, default=[], help="show the ledger here too")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    stats = commands.add_parser("stats", help="read everything: exact duplicates; a picture of the lengths")
    _add_what(stats)
    stats.add_argument("--picture", type=Path, help="write the distribution of lengths as a PNG here")
    stats.set_defaults(run=_stats)
    verified = commands.add_parser("verify", help="read everything: structure, token ids, sha256")
    _add_what(verified)
    verified.add_argument("--record", action="store_true", help="write PREFIX.sha256 instead of comparing with it")
    verified.set_defaults(run=_verify)
    sample = commands.add_parser("sample", help="rows as a rank is fed them in a step, as text")
    _add_what(sample)
    sample.add_argument("--step", type=int, default=0, help="optimizer step, from 0 (default %(default)s)")
    sample.add_argument("--rank", type=int, default=0, help="data-parallel rank (default %(default)s)")
    sample.add_argument("--ranks", type=int, default=1, help="data-parallel ranks (default %(default)s)")
    sample.add_argument("--rows", type=int, default=2, help="rows to show (default %(default)s)")
    sample.add_argument("--whole", action="store_true", help="do not shorten documents")
    sample.add_argument("--tokenizer", help="with prefixes: the tokenizer they were written with")
    sample.add_argument("--context-tokens", type=int, default=2048, help="with prefixes: T (default %(default)s)")
    sample.set_defaults(run=_sample)
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="+", metavar="WHAT", help="prefixes, or settings such as experiment=...")


def _inspect(options: argparse.Namespace) -> int:
    config = _config(options.what)
    opened = _open(options.what, config)
    facts = [file_facts(file) for files in opened.values() for file in files.files]
    blend = None
    if config is not None:
        blend = blend_facts(config, _batches(config, opened), [int(tokens) for tokens in options.at_tokens])
    elif options.at_tokens:
        raise ConfigError("--at-tokens asks for the ledger of a run; give its settings instead of prefixes")
    if options.json:
        print(json.dumps({"files": [dataclasses.asdict(f) for f in facts], "blend": blend}, indent=1))
    else:
        print(facts_text(facts) + ("" if blend is None else f"\n\n{blend_text(blend)}"))
    return 0


def _stats(options: argparse.Namespace) -> int:
    files = [file for opened in _open(options.what, _config(options.what)).values() for file in opened.files]
    print(facts_text([file_facts(file) for file in files]))
    found = duplicates(files)
    print(
        f"\nexact duplicates: {found.duplicate_documents:,} of {found.documents:,} documents "
        f"({found.duplicate_documents / found.documents:.2%}), {found.duplicate_tokens:,} of {found.tokens:,} tokens "
        f"({found.duplicate_tokens / found.tokens:.2%})"
    )
    if options.picture:
        draw_lengths(files, options.picture)
        print(options.picture)
    return 0


def _verify(options: argparse.Namespace) -> int:
    damaged = 0
    for prefix in _prefixes(options.what, _config(options.what)):
        try:
            print(verify(prefix, record=options.record))
        except DataError as error:
            print(f"{prefix}: DAMAGED: {error}")
            damaged += 1
    return 1 if damaged else 0


def _sample(options: argparse.Namespace) -> int:
    if options.step < 0:
        raise ConfigError(f"--step={options.step} is negative; steps count from 0")
    config = _config(options.what)
    if config is None:
        config = _config_of_prefixes(options)
    elif options.tokenizer:
        raise ConfigError("--tokenizer goes with prefixes; with settings, data.tokenizer is the one")
    batches = _batches(config, _open(options.what, config))
    tokenizer = load_tokenizer(config.data.tokenizer)
    where = (options.step, options.rank, options.ranks)
    print(sample_text(batches, tokenizer, *where, options.rows, whole=options.whole))
    return 0


def _config_of_prefixes(options: argparse.Namespace) -> Config:
    if not options.tokenizer:
        raise ConfigError("--tokenizer is needed to show prefixes as text; give the one they were written with")
    data = DataConfig("files", list(options.what), tokenizer=options.tokenizer, context_tokens=options.context_tokens)
    rows = options.rows * options.ranks
    return Config(data=data, train=TrainConfig(steps=1, global_batch_rows=rows, micro_batch_rows=1))


def _config(what: list[str]) -> Config | None:
    """The configuration of settings; None of prefixes."""
    settings = [word for word in what if "=" in word]
    if not settings:
        return None
    if len(settings) < len(what):
        other = next(word for word in what if "=" not in word)
        raise ConfigError(f"{other} is a prefix among settings; give prefixes alone, or data.train=[...]")
    config = compose(settings)
    validate(config)
    return config


def _prefixes(what: list[str], config: Config | None) -> list[str]:
    if config is None:
        return expand_prefixes(what)
    given = [*(p for source in training_sources(config.data) for p in source.prefixes), *config.data.validation]
    return expand_prefixes(given)


def _open(what: list[str], config: Config | None) -> dict[str, TokenFiles]:
    if config is None:
        return {"train": TokenFiles(what)}
    return {source.name: TokenFiles(source.prefixes) for source in training_sources(config.data)}


def _batches(config: Config, files: dict[str, TokenFiles]) -> BatchSource:
    """The training batches; reading threads would outlive the command, so there are none."""
    data = dataclasses.replace(config.data, loader_workers=0)
    return training_batches(data, files, global_batch_rows=config.train.global_batch_rows, seed=config.seed)


if __name__ == "__main__":
    sys.exit(main())
