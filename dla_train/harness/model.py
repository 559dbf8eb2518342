"""This project's models as lm_eval asks them: log-likelihoods, rolling log-likelihoods and greedy answers.

Registered as `dla`, so that `lm_eval.simple_evaluate("dla", "run=runs/a,bos=true", tasks=[...])` works too once this
module is imported. What lm_eval's own model of Hugging Face folders does is kept: the beginning of what is too long is
dropped (and here counted), and an empty context is one BOS, or EOS for a model that was trained without BOS. In one
thing it is not: in front of a whole text lm_eval puts BOS twice where prompts begin with it, and scores the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from dla_train.data.tokenizer import Tokenizer
from dla_train.harness.decoding import answers
from dla_train.harness.errors import EvaluateError
from dla_train.harness.journal import AnswersOfAnother, Journal, request_key
from dla_train.harness.loading import open_run
from dla_train.harness.scoring import Request, Score, score
from dla_train.models.language_model import LanguageModel
from dla_train.parallel.mesh import Mesh

DEFAULT_NEW_TOKENS = 256
"""Longest answer of a task that does not say; as in lm_eval."""
TAIL_TOKENS = 16
"""Tokens at an answer's end in which a stop string is looked for; the answer is cut at the whole text's first."""

Found = TypeVar("Found")


@dataclass
class Counts:
    """What was asked of the model."""

    requests: int = 0
    truncated: int = 0
    """Requests whose beginning was dropped."""
    dropped_tokens: int = 0
    tokens: int = 0
    """Tokens given to the model and made by it, for requests that were not in the journal."""


@register_model("dla")
class DlaModel(TemplateLM):
    """A language model of this project with its tokenizer."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        bos: bool = False,
        batch_tokens: int = 16384,
        decode_rows: int = 16,
        progress: bool = False,
        mesh: Mesh | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """max_length: most tokens of a context with its answer. Raises EvaluateError for another model's tokenizer.

        mesh: ranks that hold the same model, are asked the same, share the batches and all get every answer; None is
        this process alone. between: called after each round of batches, on every rank after the same ones.
        """
        super().__init__()
        check_tokenizer(model, tokenizer, bos)
        self.model, self.own_tokenizer, self.max_length = model.eval(), tokenizer, max_length
        self.bos, self.batch_tokens, self.decode_rows = bos, batch_tokens, decode_rows
        self.progress, self.title = progress, ""
        self._mesh, self._between = mesh, between
        self._share = (0, 1) if mesh is None else (mesh.rank, mesh.size)
        self.counts = Counts()
        self.journal: Journal | AnswersOfAnother | None = None

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> DlaModel:
        """From lm_eval's `model_args`: run, step, dtype, and what the constructor takes. Raises EvaluateError.

        lm_eval's batch size is not used: `batch_tokens` and `decode_rows` bound a batch.
        """
        device = (additional_config or {}).get("device") or "auto"
        places = {key: arg_dict[key] for key in ("step", "dtype", "bos") if key in arg_dict}
        rest = {key: value for key, value in arg_dict.items() if key not in ("run", *places)}
        if "run" not in arg_dict or set(rest) - {"max_length", "batch_tokens", "decode_rows", "progress"}:
            raise EvaluateError(f"model_args {arg_dict} must name run=DIR, and of the rest only what DlaModel takes")
        opened = open_run(str(arg_dict["run"]), device=str(device), **places)
        rest.setdefault("max_length", opened.config.data.context_tokens)
        return cls(opened.model, opened.tokenizer, bos=opened.bos, **rest)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> DlaModel:
        """The same from `run=...,max_length=...`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document, and an answer."""
        return self.own_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: BOS where prompts begin with it, else EOS."""
        return self.own_tokenizer.bos_id if self.bos and self.own_tokenizer.bos_id is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, after BOS where prompts begin with it and add_special_tokens is not False."""
        ids = self.own_tokenizer.encode(string)
        return ids if not self.bos or add_special_tokens is False else [self.prefix_token_id, *ids]

    @contextmanager
    def unit(self, title: str, max_length: int, journal: Journal | AnswersOfAnother | None) -> Iterator[Counts]:
        """Work on one unit of an evaluation: its own length, journal and counts."""
        before = self.max_length
        self.title, self.max_length, self.journal, self.counts = title, max_length, journal, Counts()
        try:
            yield self.counts
        finally:
            self.max_length, self.journal = before, None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats of the continuation, whether greedy decoding gives it) of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, each token once, in windows of max_length."""
        windows = [
            (number, *make_disjoint_window(window))
            for number, (text,) in enumerate(request.args for request in requests)
            for window in get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, 1
            )
        ]
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens([(("", ""), before, after) for _, before, after in windows])
        for (number, _, _), (value, _) in zip(windows, found, strict=True):
            totals[number] += value
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        wanted = [self._request(context, continuation) for _, context, continuation in requests]
        keys = [request_key("likelihood", request.inputs, request.targets) for request in wanted]
        found = {place: Score(*answer) for place, answer in self._answered(keys)}
        missing = [place for place in range(len(wanted)) if place not in found]
        with self._bar(len(missing), len(wanted)) as bar:
            for scored in self._scores([wanted[place] for place in missing]):
                new = [(missing[number], value) for number, value in self._of_all_ranks(scored)]
                found.update(new)
                self.counts.tokens += sum(len(wanted[place].inputs) for place, _ in new)
                self._keep([(keys[place], [value.log_likelihood, value.greedy]) for place, value in new])
                bar.update(len(new))
                self._between()
        return [(found[place].log_likelihood, found[place].greedy) for place in range(len(wanted))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers to each (context, settings), cut before the first stop string or EOS."""
        asked = [self._prompt(*request.args) for request in requests]
        keys = [request_key("answer", *one) for one in asked]
        found: dict[int, list[int]] = dict(self._answered(keys))
        with self._bar(len(asked) - len(found), len(asked)) as bar:
            for settings in sorted({one[1:] for one in asked}):
                places = [place for place, one in enumerate(asked) if one[1:] == settings and place not in found]
                for batch in self._answers([asked[place][0] for place in places], *settings):
                    new = [(places[number], tokens) for number, tokens in self._of_all_ranks(batch)]
                    found.update(new)
                    self.counts.tokens += sum(len(asked[place][0]) + len(tokens) for place, tokens in new)
                    self._keep([(keys[place], tokens) for place, tokens in new])
                    bar.update(len(new))
                    self._between()
        return [self._text(found[place], one[2]) for place, one in enumerate(asked)]

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        """What is given to the model and what is scored, the beginning dropped where it is too long."""
        self.counts.requests += 1
        if not continuation or len(continuation) > self.max_length:
            raise EvaluateError(
                f"a continuation of {len(continuation)} tokens cannot be scored in max_length={self.max_length}; "
                "raise max_length to its tokens"
            )
        whole = context + continuation
        self._count_dropped(len(whole) - (self.max_length + 1))
        return Request(tuple(whole[-(self.max_length + 1) :][:-1]), tuple(continuation))

    def _prompt(self, context: str, settings: dict[str, Any]) -> tuple[tuple[int, ...], int, tuple[str, ...]]:
        """(tokens, most new tokens, stop strings), the beginning dropped where it is too long."""
        self.counts.requests += 1
        chosen = normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS)
        if chosen["do_sample"]:
            raise EvaluateError(
                f"generation settings {settings} ask for sampling; answers are greedy: set do_sample=false"
            )
        room = self.max_length - chosen["max_gen_toks"]
        if room < 1:
            raise EvaluateError(
                f"max_length={self.max_length} leaves no room for a prompt beside answers of {chosen['max_gen_toks']} "
                "tokens; raise max_length"
            )
        tokens = self.tok_encode(context)
        if not tokens:
            raise EvaluateError(
                "a prompt is empty and the model was trained without BOS; give it text, or set bos=true"
            )
        self._count_dropped(len(tokens) - room)
        return tuple(tokens[-room:]), chosen["max_gen_toks"], tuple(chosen["until"])

    def _count_dropped(self, tokens: int) -> None:
        self.counts.truncated += tokens > 0
        self.counts.dropped_tokens += max(tokens, 0)

    def _scores(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Score]]]:
        rank, ranks = self._share
        yield from score(self.model, requests, batch_tokens=self.batch_tokens, rank=rank, ranks=ranks)

    def _answers(
        self, prompts: Sequence[tuple[int, ...]], new_tokens: int, until: tuple[str, ...]
    ) -> Iterator[list[tuple[int, list[int]]]]:
        def done(tokens: list[int]) -> bool:
            if tokens[-1] == self.eot_token_id:
                return True
            tail = self.own_tokenizer.decode(tokens[-TAIL_TOKENS:])
            return any(stop in tail for stop in until if stop)

        rank, ranks = self._share
        yield from answers(self.model, prompts, new_tokens, done, rows=self.decode_rows, rank=rank, ranks=ranks)

    def _of_all_ranks(self, found: list[Found]) -> list[Found]:
        """What all ranks found in a round. Collective: no rank waits longer for another than a batch takes."""
        return found if self._mesh is None else [one for part in self._mesh.gather(found) for one in part]

    def _text(self, tokens: list[int], until: tuple[str, ...]) -> str:
        end = tokens.index(self.eot_token_id) if self.eot_token_id in tokens else len(tokens)
        text = self.own_tokenizer.decode(tokens[:end])
        return str(postprocess_generated_text(text, list(until), None))

    def _answered(self, keys: Sequence[str]) -> Iterator[tuple[int, Any]]:
        if self.journal is not None:
            for place, key in enumerate(keys):
                if (answer := self.journal.get(key)) is not None:
                    yield place, answer

    def _keep(self, found: Sequence[tuple[str, Any]]) -> None:
        if self.journal is not None:
            self.journal.add(found)

    def _bar(self, missing: int, total: int) -> Any:
        return tqdm(
            total=total,
            initial=total - missing,
            desc=self.title,
            unit="request",
            disable=not self.progress,
            leave=False,
        )


def check_tokenizer(model: LanguageModel, tokenizer: Tokenizer, bos: bool) -> None:
    """Raises EvaluateError where a tokenizer cannot be the model's."""
    if tokenizer.vocab_size > model.model_config.vocab_size:
        raise EvaluateError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model {model.model_config.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    if bos and tokenizer.bos_id is None:
        raise EvaluateError(f"bos=true, but tokenizer {tokenizer.name} has no BOS; set bos=false")
