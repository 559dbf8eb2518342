"""The tokenizer and the token files: there, readable in every shard, of one another and of the model.

A start stops at the first file that is wrong; here every shard is opened, so that all that are missing are told.
"""

from __future__ import annotations

from dla_train.config import Config, ConfigError
from dla_train.data.errors import DataError
from dla_train.data.indexed import TokenFiles
from dla_train.data.loader import DataSources, open_sources
from dla_train.data.shard_list import expand_prefixes
from dla_train.data.tokenizer import Tokenizer, load_tokenizer
from dla_train.data_config import training_sources
from dla_train.doctor.findings import FAILED, OK, Finding
from dla_train.harness.errors import EvaluateError
from dla_train.harness.planned import planned

SHOWN = 5
"""Wrong shards that are named."""
ERRORS = (DataError, ConfigError, OSError)


def check_inputs(config: Config) -> tuple[list[Finding], DataSources | None]:
    """Findings, and the opened data where nothing is wrong. Reads 64 blocks of every shard, writes nothing."""
    tokenizer, about_tokenizer = _tokenizer(config)
    wrong = _wrong_shards(config, tokenizer)
    if wrong or about_tokenizer.state == FAILED:
        return [about_tokenizer, *wrong], None
    try:
        sources = open_sources(
            config.data,
            global_batch_rows=config.train.global_batch_rows,
            seed=config.seed,
            vocab_size=config.model.vocab_size,
        )
        about_data = _about(config, sources)
    except ERRORS as error:
        return [about_tokenizer, Finding("data", FAILED, str(error))], None
    return [about_tokenizer, about_data, *_tasks(config)], sources


def _tasks(config: Config) -> list[Finding]:
    """Whether the published tasks that training asks are known and their documents there."""
    if not config.evaluation.tasks:
        return []
    try:
        planned(config)
    except (*ERRORS, EvaluateError) as error:
        return [Finding("evaluation", FAILED, str(error))]
    return [Finding("evaluation", OK, f"{', '.join(config.evaluation.tasks)} in {config.evaluation.data_dir}")]


def _tokenizer(config: Config) -> tuple[Tokenizer | None, Finding]:
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
    except ERRORS as error:
        return None, Finding("tokenizer", FAILED, str(error))
    rows, ids = config.model.vocab_size, tokenizer.vocab_size
    if ids > rows:
        what = f"{tokenizer.name} has {ids} ids, model.vocab_size={rows} is smaller; set it to at least {ids}"
        return tokenizer, Finding("tokenizer", FAILED, what)
    what = f"{tokenizer.name}: {ids} ids in a vocabulary of {rows}, fingerprint {tokenizer.fingerprint[:12]}"
    return tokenizer, Finding("tokenizer", OK, what)


def _wrong_shards(config: Config, tokenizer: Tokenizer | None) -> list[Finding]:
    """A finding for every shard that cannot be opened, or is of another tokenizer or too large a vocabulary."""
    groups = [*(source.prefixes for source in training_sources(config.data)), tuple(config.data.validation)]
    rows = config.model.vocab_size
    fits = tokenizer is not None and tokenizer.vocab_size <= rows  # else that is the mistake, and every shard has it
    wrong: list[str] = []
    for group in groups:
        try:
            prefixes = expand_prefixes(group)
        except ERRORS as error:
            wrong.append(str(error))
            continue
        for prefix in prefixes:
            try:
                TokenFiles([prefix], tokenizer=tokenizer, vocab_size=rows if fits else None)
            except ERRORS as error:
                wrong.append(str(error))
    more = [f"{len(wrong) - SHOWN} more shards"] if len(wrong) > SHOWN else []
    return [Finding("data", FAILED, problem) for problem in [*wrong[:SHOWN], *more]]


def _about(config: Config, sources: DataSources) -> Finding:
    train = sources.train
    fingerprint = train.fingerprint  # reads of every source
    train.rows(0, 0, 1)
    shards = sum(len(source.files.prefixes) for source in train.sources.values())
    tokens = sum(source.files.tokens for source in train.sources.values())
    read = ", ".join(f"{entry.name} {entry.epochs:.3g} times" for entry in train.ledger(config.train.steps))
    what = f"{shards} shard(s), {tokens:,} tokens; the run reads {read}; fingerprint {fingerprint[:12]}"
    return Finding("data", OK, what)
