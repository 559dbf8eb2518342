"""RULER's needle tasks, generated without a network by lm_eval's own functions, with any text for a haystack.

lm_eval splits a haystack into sentences with NLTK's Punkt, whose parameters it downloads. Where they are not installed
Punkt is given empty ones, which know no abbreviations: needles may then lie after "Mr.", and nothing else changes.
Lengths are counted with the run's tokenizer, BOS, the answer's beginning and its 128 tokens included. A needle's depth
is where it begins, as a share of the prompt's characters.
"""

from __future__ import annotations

import atexit
import functools
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dla_train.data.tokenizer import Tokenizer
from dla_train.harness.errors import EvaluateError

TASKS: dict[str, dict[str, Any]] = {
    "niah_single_1": {"type_haystack": "repeat", "type_needle_k": "words", "type_needle_v": "numbers"},
    "niah_single_2": {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "numbers"},
    "niah_single_3": {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "uuids"},
    "niah_multikey_1": {
        "type_haystack": "essay",
        "type_needle_k": "words",
        "type_needle_v": "numbers",
        "num_needle_k": 4,
    },
    "niah_multivalue": {
        "type_haystack": "essay",
        "type_needle_k": "words",
        "type_needle_v": "numbers",
        "num_needle_v": 4,
    },
    "niah_multiquery": {
        "type_haystack": "essay",
        "type_needle_k": "words",
        "type_needle_v": "numbers",
        "num_needle_q": 4,
    },
}
"""What lm_eval's functions of these names give to its generator."""
ANSWER_TOKENS = 128
"""Room for the answer in a prompt's length."""


@dataclass(frozen=True)
class Needles:
    """Prompts of the needle tasks for one tokenizer and text; the same seed gives the same prompts."""

    tokenizer: Tokenizer
    bos: bool
    """Whether the model is given BOS before a prompt, which counts."""
    text: str
    """Haystack of the tasks that hide needles in an essay; the others have RULER's own sentence."""
    samples: int
    seed: int

    def documents(self, task: str, length: int) -> list[dict[str, Any]]:
        """`samples` documents of lm_eval's form, and under `depths` where each of their `outputs` lies.

        Raises EvaluateError where the text is too short, or a prompt without any text is longer than `length`.
        """
        generator, template, repeated = _generator()
        kind = TASKS[task]
        essay = kind["type_haystack"] == "essay"
        words = re.sub(r"\s+", " ", self.text).strip().split(" ") if essay else []
        if essay:
            self._check_text(task, length, words)
        state = random.getstate()
        random.seed(f"{self.seed} {task} {length}")  # lm_eval draws keys, values and places from the global generator
        try:
            documents = generator(
                words if essay else repeated,
                TOKENIZER=self._count,
                max_seq_length=length,
                template=template,
                num_samples=self.samples,
                tokens_to_generate=ANSWER_TOKENS,
                **kind,
            )
        except ValueError as error:
            raise EvaluateError(f"{task} with prompts of {length} tokens: {error}; use longer suite.lengths") from error
        finally:
            random.setstate(state)
        if len(documents) < self.samples:
            rule = f"fit into {length} tokens for {self.samples - len(documents)} of {self.samples} prompts"
            raise EvaluateError(f"{task}: the needles did not {rule}; use longer suite.lengths")
        return [{**document, "depths": depths(document["input"], document["outputs"])} for document in documents]

    def _count(self, text: str) -> SimpleNamespace:
        """What lm_eval asks of a tokenizer: the tokens of a prompt.

        It counts neither BOS nor the words that begin the answer, which the model reads too: its prompts outgrow their
        length. Those words repeat the prompt's last line; that line is counted twice.
        """
        begun = text.rsplit("\n", 1)[-1]
        return SimpleNamespace(input_ids=[0] * self.bos + self.tokenizer.encode(text) + self.tokenizer.encode(begun))

    def _check_text(self, task: str, length: int, words: Sequence[str]) -> None:
        """lm_eval would make shorter prompts of a short text, and say nothing."""
        tokens = len(self.tokenizer.encode(" ".join(words)))
        if tokens < length:
            raise EvaluateError(
                f"the haystack has {tokens:,} tokens, and {task} hides needles in prompts of {length:,}; give a longer "
                "text with haystack=FILE, or shorten suite.lengths"
            )


def depths(prompt: str, values: Sequence[str]) -> list[float]:
    """Where the needle of each value begins in the prompt, from 0 to 1."""
    return [
        prompt.rfind("One of the special magic", 0, prompt.index(f"is: {value}.")) / len(prompt) for value in values
    ]


def hits(prediction: str, values: Sequence[str]) -> list[bool]:
    """Which values the answer names: RULER's string_match_all is the share of them."""
    return [value.lower() in prediction.lower() for value in values]


@functools.cache
def _generator() -> tuple[Any, str, str]:
    """(lm_eval's generator, its prompt, RULER's repeated sentence)."""
    install_sentences()
    try:
        from lm_eval.tasks.ruler.niah_utils import TEMPLATE
        from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack
    except ImportError as error:
        raise EvaluateError(f"the needle tasks need {error.name}; run `pip install dla-train[evaluate]`") from error
    return generate_samples, TEMPLATE, get_haystack(type_haystack="repeat")


def install_sentences() -> None:
    """Let NLTK find Punkt's parameters, empty ones where there are none; lm_eval looks for them when imported."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        folder = tempfile.TemporaryDirectory()
        atexit.register(folder.cleanup)
        language = Path(folder.name) / "tokenizers/punkt_tab/english"
        language.mkdir(parents=True)
        for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
            (language / name).write_text("")
        nltk.data.path.append(folder.name)
