"""The program `dla-generate`: continue prompts with a checkpoint of a run.

One prompt is written as it is made; several are decoded as one batch and written in their order. Text goes to standard
output, what it took (tokens a second, cache bytes) to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from dla_train.checkpoint.errors import CheckpointError
from dla_train.config import MISTAKE, Config, ConfigError
from dla_train.data.errors import DataError
from dla_train.data.incremental_text import IncrementalText, token_pieces
from dla_train.data.shard_list import trained_with_bos
from dla_train.data.tokenizer import Tokenizer, load_tokenizer
from dla_train.evaluate.loading import load_model
from dla_train.generate.decoding import BATCH_ROWS, Continued, generate
from dla_train.generate.errors import GenerationError
from dla_train.generate.memory_report import head_memories, memory_text
from dla_train.generate.sampling import Sampling
from dla_train.generate.stop_strings import StopStrings
from dla_train.models.language_model import LanguageModel
from dla_train.models.mixer import Cache
from dla_train.parallel.mesh import pick_device

_EXAMPLES = """examples:
  dla-generate --run runs/my-run --prompt "Once upon a time" --max-new-tokens 200
  dla-generate --run runs/my-run --prompt-file book.txt --show-memory 0.3 --max-new-tokens 0
  dla-generate --run runs/my-run --prompts questions.txt --temperature 0 --stop "\\n" --json > answers.jsonl
  dla-generate --run runs/my-run < prompt.txt
"""


def main(arguments: list[str] | None = None) -> int:
    """Console entry; returns 0, or 2 after a mistake that was explained."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:
        of_the_run = rest[0].lstrip("+").startswith(("memory", "model"))
        why = "; a checkpoint generates with the model and memory that it was trained with" if of_the_run else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{why}")
    try:
        _run(options)
    except (GenerationError, ConfigError, CheckpointError, DataError, OSError) as error:
        print(f"dla-generate: error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dla-generate",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder (config and checkpoints)")
    parser.add_argument("--step", type=int, help="checkpoint to take; by default the newest")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default %(default)s")
    prompts = parser.add_argument_group("prompts, of any number and length; without any, standard input is one")
    prompts.add_argument("--prompt", action="append", default=[], help="text to continue; may be given again")
    prompts.add_argument("--prompt-file", action="append", default=[], help="a file that is one prompt; - is stdin")
    prompts.add_argument("--prompts", help="a file with a prompt on each line, \\n in it a new line; - is stdin")
    prompts.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin with BOS; by default as the training files' manifest says",
    )
    choice = parser.add_argument_group("choice of tokens")
    choice.add_argument("--max-new-tokens", type=int, default=128, help="default %(default)s")
    choice.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default %(default)s)")
    choice.add_argument("--top-k", type=int, default=0, help="keep the k most likely tokens; 0 keeps all")
    choice.add_argument("--top-p", type=float, default=1.0, help="keep the most likely tokens up to this probability")
    choice.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 makes tokens seen less likely")
    choice.add_argument("--stop", action="append", default=[], help="end before this text (\\n is a new line); again")
    choice.add_argument("--seed", type=int, default=0, help="prompt i is drawn with seed + i (default %(default)s)")
    choice.add_argument("--batch-rows", type=int, default=BATCH_ROWS, help="decoded together (default %(default)s)")
    choice.add_argument(
        "--beyond-context", action="store_true", help="let softmax attention read more than it was trained on"
    )
    shown = parser.add_argument_group("output")
    shown.add_argument("--json", action="store_true", help="one JSON object a prompt instead of text")
    shown.add_argument(
        "--show-memory",
        nargs="?",
        const="all",
        metavar="LAYER[.HEAD]",
        help="also print which states the prompt left in the memory, of all heads or those named",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.repetition_penalty)
    stops = [_unescaped(stop) for stop in options.stop]
    StopStrings(stops)
    chosen = _chosen_heads(options.show_memory)
    texts = _prompts(options)
    model, config, step = load_model(options.run, options.step, pick_device(options.device, "--device"))
    tokenizer = load_tokenizer(config.data.tokenizer)
    begins = options.bos if options.bos is not None else trained_with_bos(config.data)
    bos = [tokenizer.bos_id] if tokenizer.bos_id is not None and begins else []
    prompts = [[*bos, *tokenizer.encode(text)] for text in texts]
    _check_lengths(prompts, options.max_new_tokens, config, beyond=options.beyond_context)
    output = _Output(texts, prompts, tokenizer, stops, sys.stdout, as_json=options.json)

    def show_memory(rows: Sequence[int], caches: list[Cache]) -> None:
        for place, row in enumerate(rows):
            _show_memory(model, prompts[row], tokenizer, caches, place, chosen)

    result = generate(
        model,
        prompts,
        options.max_new_tokens,
        sampling,
        seed=options.seed,
        stop_ids=frozenset([tokenizer.eos_id]),
        batch_rows=options.batch_rows,
        on_token=output.take,
        on_prompt=show_memory if options.show_memory else None,
    )
    if options.max_new_tokens or options.json:  # a long prompt would push the memory it left out of sight
        output.finish(result)
    name = f"{config.model.name} x {config.memory.policy}, step {step}"
    print(f"[{name}: {_account(result, len(prompts))}]", file=sys.stderr)


def _prompts(options: argparse.Namespace) -> list[str]:
    """Every prompt that was given, in the order of the options. Raises GenerationError for an empty one."""
    texts = list(options.prompt) + [_read(name, "--prompt-file") for name in options.prompt_file]
    if options.prompts is not None:
        lines = [line for line in _read(options.prompts, "--prompts").split("\n") if line.strip()]
        if not lines:
            raise GenerationError(f"--prompts={options.prompts} has no lines; write a prompt on each")
        texts += [_unescaped(line) for line in lines]
    elif not texts:
        texts = [_read("-", "standard input")]
    empty = next((number for number, text in enumerate(texts) if not text), None)
    if empty is not None:
        which = f"prompt {empty}" if len(texts) > 1 else "the prompt"
        raise GenerationError(f"{which} is empty; give --prompt, --prompt-file, --prompts or standard input some text")
    return texts


def _read(name: str, option: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise GenerationError(
            f"{option}={name} cannot be read: {error.strerror}; give a file that holds text"
        ) from error
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"{option}={name} is not UTF-8 text ({error.reason} at byte {error.start}); `iconv -t UTF-8` converts it"
        ) from error


def _unescaped(text: str) -> str:
    r"""`\n`, `\t` and `\\` as a command line or a line of a file can hold them."""
    known = {"n": "\n", "t": "\t", "\\": "\\"}
    result, rest = "", text
    while "\\" in rest:
        before, _, rest = rest.partition("\\")
        result += before + known.get(rest[:1], "\\" + rest[:1])
        rest = rest[1:]
    return result + rest


def _chosen_heads(chosen: str | None) -> tuple[int | None, int | None]:
    """(layer, head) of --show-memory; None is all."""
    if chosen in (None, "all"):
        return None, None
    layer, _, head = str(chosen).partition(".")
    if not layer.isdecimal() or (head and not head.isdecimal()):
        raise GenerationError(f"--show-memory={chosen} is not LAYER or LAYER.HEAD, e.g. 1 or 1.2")
    return int(layer), int(head) if head else None


def _check_lengths(prompts: list[list[int]], new_tokens: int, config: Config, *, beyond: bool) -> None:
    """Raise GenerationError where softmax attention would read positions it was not trained on."""
    longest = max(map(len, prompts)) + new_tokens
    trained = config.data.context_tokens
    if config.model.backbone == "attention" and longest > trained and not beyond:
        raise GenerationError(
            f"the longest prompt has {longest - new_tokens} tokens, with --max-new-tokens={new_tokens} more than "
            f"data.context_tokens={trained} that this softmax attention was trained on; shorten it, ask for fewer new "
            "tokens, or pass --beyond-context"
        )


def _show_memory(
    model: LanguageModel,
    prompt: list[int],
    tokenizer: Tokenizer,
    caches: list[Cache],
    row: int,
    chosen: tuple[int | None, int | None],
) -> None:
    memories = head_memories(caches, row, layer=chosen[0], head=chosen[1])
    pieces = token_pieces(prompt, tokenizer)
    scored = model.memory_config.policy == "dla"
    print(f"memory after {len(prompt)} prompt tokens (oldest state first)", file=sys.stderr)
    print(memory_text(memories, pieces, scored=scored), file=sys.stderr, flush=True)


def _account(result: Continued, prompts: int) -> str:
    """What it took, in one line."""
    new = sum(len(continuation.tokens) for continuation in result.continuations)
    of = f" of {prompts} prompts" if prompts > 1 else ""
    decoded = f" at {result.decode_tokens_per_second:,.1f} tokens/s" if result.stepped_tokens else ""
    return (
        f"{result.prompt_tokens} prompt tokens{of} at {result.prefill_tokens_per_second:,.1f} tokens/s, "
        f"{new} new tokens{decoded}, caches {result.cache_bytes:,} bytes"
    )


class _Output:
    """Continuations on their way to a stream: one as it comes, several when all are there."""

    def __init__(
        self,
        texts: list[str],
        prompts: list[list[int]],
        tokenizer: Tokenizer,
        stops: list[str],
        stream: TextIO,
        *,
        as_json: bool,
    ) -> None:
        self._texts, self._stream, self._as_json = texts, stream, as_json
        self._pieces = [IncrementalText(tokenizer, prompt) for prompt in prompts]
        self._stops = [StopStrings(stops) for _ in prompts]
        self._made = ["" for _ in prompts]
        self._streams = len(prompts) == 1 and not as_json
        self._echo = texts[0] if self._streams else ""  # held back until nothing can be refused any more

    def take(self, row: int, token: int) -> bool:
        """Show what `token` adds to prompt `row`; whether a stop string has come."""
        self._add(row, self._stops[row].feed(self._pieces[row].push(token)))
        return self._stops[row].found

    def finish(self, result: Continued) -> None:
        """Write what is left, and everything of several prompts."""
        for row in range(len(self._texts)):
            self._add(row, self._stops[row].feed(self._pieces[row].flush()) + self._stops[row].finish())
        for row, continuation in enumerate(result.continuations):
            if self._as_json:
                ended_by = "stop_string" if self._stops[row].found else continuation.ended_by
                line = {"prompt": self._texts[row], "text": self._made[row], "ended_by": ended_by}
                self._write(json.dumps(line | {"tokens": continuation.tokens}, ensure_ascii=False) + "\n")
            elif not self._streams:
                self._write(f"--- {row}\n{self._texts[row]}{self._made[row]}\n")
        if self._streams:
            self._write("\n")

    def _add(self, row: int, text: str) -> None:
        self._made[row] += text
        if self._streams:
            self._write(text)

    def _write(self, text: str) -> None:
        self._stream.write(self._echo + text)
        self._echo = ""
        self._stream.flush()
