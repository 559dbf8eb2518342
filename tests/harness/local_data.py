"""Local copies of every task's documents: a few made-up ones, in each data set's own columns."""

import json
from pathlib import Path
from typing import Any

from dla_train.harness.catalogue import catalogue
from dla_train.harness.documents import HAYSTACK

WORDS = ("line", "adds", "one", "two", "seven", "to", "the", "old", "count", "and", "stops")


def text(number: int, words: int) -> str:
    """Some words, others for every number."""
    return " ".join(WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(words))


def _labelled(number: int, letters: str = "ABCD") -> dict[str, list[str]]:
    return {"text": [f"{letter.lower()} {text(number, 3)}" for letter in letters], "label": list(letters)}


def _span(answer: str) -> dict[str, Any]:
    return {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": [answer]}


def document(task: str, number: int) -> dict[str, Any]:
    """A document of a task."""
    question = f"Which {text(number, 4)}"
    choice = {"question": question, "answerKey": "B", "id": str(number)}
    if task.startswith("longbench"):
        classes = ["Food", "Number", "Place"] if task.endswith("trec") else None
        return {
            "input": question,
            "question": question,
            "context": text(number, 90 + 20 * number),
            "answers": ["Number"] if classes else ["one two", "seven"],
            "length": 90,
            "dataset": task.removeprefix("longbench_"),
            "language": "en",
            "all_classes": classes,
            "_id": str(number),
        }
    return {
        "lambada_openai": {"text": f"{text(number, 12 + number)} stops"},
        "piqa": {"goal": question, "sol1": text(number, 3), "sol2": text(number + 1, 5), "label": number % 2},
        "hellaswag": {
            "ind": number,
            "activity_label": "Counting",
            "ctx_a": text(number, 6),
            "ctx_b": text(number, 2),
            "ctx": text(number, 8),
            "endings": [text(number + end, 2 + end) for end in range(4)],
            "label": str(number % 4),
        },
        "winogrande": {
            "sentence": f"The old count and the line stop, for _ {text(number, 3)}.",
            "option1": "the count",
            "option2": "the line",
            "answer": str(1 + number % 2),
        },
        "arc_easy": {**choice, "choices": _labelled(number)},
        "arc_challenge": {**choice, "choices": _labelled(number)},
        "openbookqa": {**choice, "question_stem": question, "choices": _labelled(number)},
        "commonsense_qa": {**choice, "question_concept": "line", "choices": _labelled(number, "ABCDE")},
        "squad_completion": _completion(number),
        "swde": _completion(number),
        "fda": _completion(number),
        "triviaqa": {
            "question": question,
            "question_id": str(number),
            "answer": {"aliases": ["seven", "the seven"], "value": "seven", "normalized_aliases": ["seven"]},
        },
        "drop": {
            "section_id": "s",
            "query_id": str(number),
            "passage": text(number, 40),
            "question": question,
            "answer": _span("seven"),
            "validated_answers": {
                "number": ["", "7"],
                "date": [{"day": "", "month": "", "year": ""}] * 2,
                "spans": [["the seven"], []],
            },
        },
        "nq_open": {"question": question, "answer": ["seven", "two"]},
        "wikitext": {"page": f" = Lines = \n\n {text(number, 80)} . \n"},
    }[task]


def _completion(number: int) -> dict[str, Any]:
    return {"doc_id": str(number), "title": "t", "text": f"  {text(number, 30)}: ", "value": " 2001-05-07 "}


def write_local_data(folder: Path, documents: int = 3, few_shot: bool = False) -> Path:
    """Local copies of all tasks, and a haystack; returns the folder."""
    for entry in catalogue().values():
        for split in (entry.split, entry.few_shot_split if few_shot else None):
            if split is not None:
                path = folder / entry.name / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                first = 0 if split == entry.split else 5  # solved examples are others
                lines = [json.dumps(document(entry.name, first + number)) for number in range(documents)]
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    haystack = folder / HAYSTACK
    haystack.parent.mkdir(parents=True, exist_ok=True)
    haystack.write_text(" ".join(f"{text(number, 9).capitalize()}." for number in range(400)), encoding="utf-8")
    return folder
