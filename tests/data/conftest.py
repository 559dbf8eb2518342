"""Token files for the data tests: small corpora whose every token is known."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from data_prep.sources import text_sources
from data_prep.train_tokenizer import train_tokenizer
from dla_train.data.indexed import TokenFiles, TokenFileWriter
from dla_train.data.manifest import Manifest
from dla_train.data.tokenizer import SentencePieceTokenizer

Documents = Sequence[Sequence[int]]
WriteFiles = Callable[..., str]


def make_manifest(documents: int, tokens: int, *, vocab_size: int, fingerprint: str = "none") -> Manifest:
    return Manifest(
        tokenizer="test.model",
        tokenizer_fingerprint=fingerprint,
        vocab_size=vocab_size,
        bos=False,
        eos=True,
        documents=documents,
        tokens=tokens,
        text_bytes=3 * tokens,
    )


@pytest.fixture
def write_files(tmp_path: Path) -> WriteFiles:
    """write_files(documents, name=, vocab_size=, fingerprint=, manifest=) -> prefix"""

    def write(
        documents: Documents,
        name: str = "corpus",
        vocab_size: int = 1000,
        fingerprint: str = "none",
        manifest: bool = True,
    ) -> str:
        prefix = str(tmp_path / name)
        with TokenFileWriter(prefix, vocab_size) as writer:
            for document in documents:
                writer.add(document)
            writer.commit(
                make_manifest(writer.documents, writer.tokens, vocab_size=vocab_size, fingerprint=fingerprint)
            )
        if not manifest:
            Path(f"{prefix}.json").unlink()
        return prefix

    return write


def numbered_files(folder: Path, lengths: Sequence[int], name: str = "numbered", first: int = 1) -> TokenFiles:
    """Token files of tokens first, first + 1, ..., in documents of `lengths`; written bare, for many examples."""
    sizes = np.array(lengths, dtype="<i4")
    ends = np.cumsum(sizes, dtype=np.int64)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, len(sizes), len(sizes) + 1)
    pointers, edges = (ends - sizes) * 4, np.arange(len(sizes) + 1, dtype="<i8")
    (folder / f"{name}.idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + edges.tobytes())
    np.arange(first, first + ends[-1], dtype="<i4").tofile(folder / f"{name}.bin")
    return TokenFiles([folder / name])


@pytest.fixture
def random_documents() -> Callable[..., list[list[int]]]:
    """random_documents(count, mean_length, seed) -> documents whose tokens are all different: 0, 1, 2, ..."""

    def make(count: int = 40, mean_length: int = 13, seed: int = 0) -> list[list[int]]:
        lengths = np.random.default_rng(seed).geometric(1 / mean_length, size=count)
        edges = np.concatenate([[0], np.cumsum(lengths)])
        return [list(range(edges[i], edges[i + 1])) for i in range(count)]

    return make


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text("\n".join(topics[name] for name in sorted(topics)[:20]), encoding="utf-8")
    return train_tokenizer(text_sources([text]), folder / "small.model", 512, progress=False).path


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(sentencepiece_model)
