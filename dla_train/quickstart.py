"""The newcomer's run (`make quickstart`): from nothing to a trained, resumed, sampled DLA language model, on a CPU.

Corpus, tokenizer and token files come from the running Python's own standard library: no download. Training is stopped
half way and resumed in a new process, by the same command a user would type. What was measured goes into report.json
and two pictures. Running it again keeps finished parts; remove build/quickstart to start anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.sources import PrepareError
from data_prep.stdlib_files import prepare_stdlib_files
from dla_train.checkpoint.errors import CheckpointError
from dla_train.checkpoint.folders import checkpoints_of, complete_steps
from dla_train.config import MISTAKE, Config, ConfigError
from dla_train.data.errors import DataError
from dla_train.data.indexed import TokenFiles
from dla_train.data.loader import DataSources, HeldOutSource, open_sources
from dla_train.data.tokenizer import load_tokenizer
from dla_train.data_config import training_sources
from dla_train.evaluate.held_out import HeldOut, held_out_loss
from dla_train.evaluate.loading import load_model
from dla_train.evaluate.loss_curve import plot_loss_curve
from dla_train.evaluate.unigram import unigram_entropy
from dla_train.generate import Sampling, generate
from dla_train.hydra_app import compose
from dla_train.inspect_memory.history import inspect_text
from dla_train.inspect_memory.merge_map import plot_merge_map
from dla_train.run_process import exit_code
from dla_train.trackers import METRICS_FILE

PROMPT = "def parse_arguments(self, "
MAP_CHARACTERS = 1200
"""Length of the held-out text in the merge map."""
HELD_OUT_BATCHES = 16


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, 2 after a mistake that was explained, 130 after Ctrl-C outside the training, or the
    exit status of the training."""
    parser = argparse.ArgumentParser(prog="python -m dla_train.quickstart", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="settings of the training run, e.g. train.steps=60")
    overrides = ["experiment=quickstart", *parser.parse_args(arguments).overrides]
    try:
        return quickstart(overrides)
    except (ConfigError, DataError, PrepareError, CheckpointError) as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("quickstart: stopped; finished parts are kept, and the same command goes on", file=sys.stderr)
        return 130


def quickstart(overrides: list[str]) -> int:
    """Run every part in turn; returns 0, or the exit status of the training if that failed."""
    config = compose(overrides)
    folder = Path(config.data.tokenizer).parent
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    with _timed("1/4 corpus, tokenizer and token files", seconds):
        prepare_stdlib_files(config.data.tokenizer, config.model.vocab_size)
    with _timed("2/4 training, stopped half way and resumed in a new process", seconds):
        half = config.train.steps // 2
        trained = max(complete_steps(checkpoints_of(config.run_dir)), default=0)
        # the last part always runs: a finished run ends at once, and one of other settings is refused
        for stop in (half, config.train.steps)[trained >= half :]:
            status = _train(overrides, stop)
            if status:
                return status
    with _timed("3/4 held-out loss and samples", seconds):
        report = measure(config)
    with _timed("4/4 pictures", seconds):
        pictures = draw(config, report["unigram_entropy"], half)
    report |= {"seconds": seconds, "seconds_total": time.perf_counter() - started}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _print_summary(report, [*pictures, folder / "report.json"])
    return 0


@contextmanager
def _timed(title: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    started = time.perf_counter()
    yield
    seconds[title] = time.perf_counter() - started


def _train(overrides: list[str], stop: int) -> int:
    """Train up to step `stop` in a process of its own, as a user would; its exit status."""
    words = [*overrides, f"train.stop_at_step={stop}"]
    print("$ dla-train " + " ".join(words), flush=True)
    return exit_code(words, 1)


def _sources(config: Config) -> tuple[DataSources, HeldOutSource]:
    """The run's data, and of it what is held out."""
    sources = open_sources(
        config.data,
        global_batch_rows=config.train.global_batch_rows,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
    )
    assert sources.validation is not None  # the experiment names validation files
    return sources, sources.validation


def measure(config: Config) -> dict[str, object]:
    """Held-out loss, bits per byte, the unigram entropy to beat, and a sample, of the run's newest checkpoint."""
    model, _, step = load_model(config.run_dir)
    sources, held_out = _sources(config)
    batches = held_out.validation_batches(HELD_OUT_BATCHES, 0, 1, config.train.micro_batch_rows)
    result: HeldOut = held_out_loss(model, batches, sources.tokenizer, model.embedding.weight.device)
    training_files = TokenFiles([prefix for source in training_sources(config.data) for prefix in source.prefixes])
    prompt = sources.tokenizer.encode(PROMPT)
    made = generate(model, [prompt], 120, Sampling(temperature=0.7, top_k=40))
    report = {
        "step": step,
        "held_out_loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "held_out_tokens": result.tokens,
        "unigram_entropy": unigram_entropy(training_files, config.model.vocab_size),
        "prompt": PROMPT,
        "sample": sources.tokenizer.decode(made.continuations[0].tokens),
        "cache_bytes": made.cache_bytes,
        "decode_tokens_per_second": made.decode_tokens_per_second,
    }
    sources.train.close()
    return report


def draw(config: Config, entropy: object, resumed_at: int) -> list[Path]:
    """Loss curve and merge map; returns the files."""
    model, _, step = load_model(config.run_dir)
    tokenizer = load_tokenizer(config.data.tokenizer)
    run = Path(config.run_dir)
    curve, drawn = run / "loss_curve.png", run / "merge_map.png"
    title = f"{config.model.name} x {config.memory.policy} on Python's standard library"
    plot_loss_curve(
        run / METRICS_FILE,
        curve,
        title=title,
        levels={"unigram entropy": float(str(entropy))},
        resumed_at=[resumed_at],
    )
    sources, held_out = _sources(config)
    text = tokenizer.decode(held_out.files.read(0).tolist())[:MAP_CHARACTERS]
    sources.train.close()
    found = inspect_text(model, tokenizer, text)
    head = found.typical(config.memory.target_boundary_rate)
    drawn_as = f"{config.model.name}, step {step}: a held-out text in one head's memory"
    plot_merge_map(found.pieces, head, drawn, title=drawn_as)
    return [curve, drawn]


def _print_summary(report: dict[str, object], files: list[Path]) -> None:
    print(
        f"\nheld-out loss {report['held_out_loss']:.3f} nats per token, {report['bits_per_byte']:.3f} bits per byte "
        f"(unigram entropy {report['unigram_entropy']:.3f})"
    )
    print(f"caches {report['cache_bytes']:,} bytes at any context, {report['decode_tokens_per_second']:.0f} tokens/s")
    print(f"sample: {report['prompt']}{report['sample']}\n")
    print(f"{report['seconds_total']:.0f} s; see " + ", ".join(str(file) for file in files))


if __name__ == "__main__":
    sys.exit(main())
