"""Small corpora with everything in them that a preparation meets, and a plain account of what must come out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from pydoc_data.topics import topics

from dla_train.data.indexed import TokenFiles
from dla_train.data.tokenizer import load_tokenizer


def texts(count: int, seed: int = 0) -> list[str]:
    """Different documents of 1 to about 200 words of English."""
    words = " ".join(topics[name] for name in sorted(topics)[:30]).split()
    generator = random.Random(seed)
    found = []
    for number in range(count):
        begin = generator.randrange(len(words))
        found.append(f"{number} " + " ".join(words[begin : begin + generator.choice((1, 5, 40, 200))]))
    return found


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def plain_tokens(documents: list[str], tokenizer_path: Path) -> list[tuple[int, ...]]:
    """One by one, without batches, processes or files."""
    tokenizer = load_tokenizer(tokenizer_path)
    return [(*tokenizer.encode(text), tokenizer.eos_id) for text in documents]


def stored_tokens(prefix: Path | str) -> list[tuple[int, ...]]:
    """What a training run would read."""
    files = TokenFiles([prefix])
    return [tuple(files.read(i).tolist()) for i in range(files.documents)]


def contents(folder: Path, stem: str) -> dict[str, bytes]:
    """Every token file, manifest, hash and list of an output, by name; not the report, which holds seconds."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name.startswith(stem) and path.is_file() and not path.name.endswith("report.json")
    }
