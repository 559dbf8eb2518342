"""Shards: the same bytes whatever the processes and the interruptions, and a corpus that is found by one prefix."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_prep import write_tokens as module
from data_prep.encoding import EncodedBatch
from data_prep.records import PrepareError
from data_prep.report import TokensReport
from data_prep.sources import text_sources
from data_prep.write_tokens import TokenOptions, write_tokens
from dla_train.data.errors import TokenFileError
from dla_train.data.shard_list import read_shard_list
from tests.data_prep.corpora import contents, plain_tokens, stored_tokens, texts, write_jsonl

DOCUMENTS = texts(120)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", [{"text": text} for text in DOCUMENTS[:70]])
    write_jsonl(folder / "b.jsonl", [{"text": text} for text in DOCUMENTS[70:]])
    return folder


@pytest.fixture(autouse=True)
def small_batches_and_no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.encoding._BATCH_BYTES", 3000)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # minutes on a slow disk; no test here turns the power off


def write(corpus: Path, output: Path, tokenizer: Path, **options: Any) -> TokensReport:
    rest = {name: options.pop(name) for name in ("workers", "overwrite") if name in options}
    return write_tokens(text_sources([corpus]), output, tokenizer, TokenOptions(**options), progress=False, **rest)


def test_any_number_of_processes_writes_the_same_bytes(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    written = []
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        write(corpus, folder / "c", tokenizer_path, shard_tokens=4000, validation_fraction=0.1, workers=workers)
        written.append(contents(folder, "c"))
    assert written[0] == written[1] == written[2]
    assert {"c_train_00000.bin", "c_train_00001.bin", "c_validation_00000.idx", "c_train.shards.json"} <= set(
        written[0]
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shard_tokens=st.integers(1, 30000), batch=st.integers(1, 20000), fraction=st.sampled_from([0.0, 0.3]))
def test_shards_hold_a_plain_tokenisation_in_order(
    shard_tokens: int,
    batch: int,
    fraction: float,
    corpus: Path,
    tokenizer_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data_prep.encoding._BATCH_BYTES", batch)
    folder = tmp_path_factory.mktemp("out")
    report = write(corpus, folder / "c", tokenizer_path, shard_tokens=shard_tokens, validation_fraction=fraction)
    expected = plain_tokens(DOCUMENTS, tokenizer_path)
    stored = [stored_tokens(split.prefix) for split in report.splits.values()]
    assert Counter(tokens for part in stored for tokens in part) == Counter(expected)
    for part in stored:
        assert part == [tokens for tokens in expected if tokens in set(part)]
    main = next(iter(report.splits.values()))
    shards = read_shard_list(main.prefix)
    assert sum(shard.tokens for shard in shards) == main.tokens and sum(s.documents for s in shards) == len(stored[0])
    for number, shard in enumerate(shards):
        whole = stored_tokens(folder / shard.name)
        assert sum(map(len, whole[:-1])) < shard_tokens  # it ended with the document that filled it
        assert shard.tokens >= shard_tokens or number == len(shards) - 1


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_at(event: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before the event-th of: taking a batch, putting a shard in place, writing the state, finishing."""
    left = [event]

    def dying(original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return original(*arguments, **named)

        return call

    preparation = module._Preparation
    monkeypatch.setattr(preparation, "_take", dying(preparation._take))
    monkeypatch.setattr(preparation, "_finish", dying(preparation._finish))
    monkeypatch.setattr(module.ShardWriter, "seal", dying(module.ShardWriter.seal))
    monkeypatch.setattr(preparation, "_abandon", close_files)
    monkeypatch.setattr(module, "write_state", dying(module.write_state))
    monkeypatch.setattr(module, "write_shard_list", dying(module.write_shard_list))
    monkeypatch.setattr("dla_train.data.manifest.Manifest.write", dying(module_manifest_write()))


def close_files(preparation: Any) -> None:
    """All that a kill does about them."""
    for part in preparation._writer._parts.values():
        part.writer._bin.close()


def module_manifest_write() -> Any:
    from dla_train.data.manifest import Manifest

    return Manifest.write


@pytest.mark.parametrize("options", [{}, {"duplicates": "near", "validation_fraction": 0.2}])
def test_a_run_killed_anywhere_ends_with_the_bytes_of_one_that_nobody_killed(
    options: dict[str, Any], tokenizer_path: Path, tmp_path: Path
) -> None:
    corpus, records = tmp_path / "in", [*DOCUMENTS[:70], *DOCUMENTS[:30]]  # copies, of which a restart must know
    corpus.mkdir()
    write_jsonl(corpus / "a.jsonl", [{"text": text} for text in records[:50]])
    write_jsonl(corpus / "b.jsonl", [{"text": text} for text in records[50:]])
    chosen = {"shard_tokens": 3000, **options}
    write(corpus, tmp_path / "whole" / "c", tokenizer_path, **chosen)
    expected = contents(tmp_path / "whole", "c")
    for event in range(1, 200):
        output, died = tmp_path / str(event) / "c", False
        with pytest.MonkeyPatch.context() as patch:
            killed_at(event, patch)
            try:
                write(corpus, output, tokenizer_path, **chosen)
            except Killed:
                died = True
        if not died:
            break
        finished = {path: path.stat().st_mtime_ns for path in output.parent.glob("*_0000[0-9].idx")}
        report = write(corpus, output, tokenizer_path, **chosen)
        assert contents(output.parent, "c") == expected, event
        kept = [path for path, changed in finished.items() if path.stat().st_mtime_ns == changed]
        assert len(kept) >= len(finished) - 2, event  # those of the one shard whose state was not written
        assert sum(report.counts.values()) == len(records)
    assert event > 20


def test_a_process_that_is_killed_leaves_no_process_behind_and_is_gone_on_with(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    documents = texts(3000, seed=1)
    write_jsonl(tmp_path / "big.jsonl", [{"text": text} for text in documents])
    command = [sys.executable, "-m", "data_prep.prepare", "tokens", str(tmp_path / "big.jsonl"), "--quiet"]
    command += ["--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "c"), "--shard-tokens", "20_000"]
    process = subprocess.Popen([*command, "--workers", "2"])
    wait_for(lambda: (tmp_path / "c.unfinished.json").exists() and (tmp_path / "c_00001.idx").exists())
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and len(workers) >= 2
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert not (tmp_path / "c.shards.json").exists()
    with pytest.raises(TokenFileError, match="does not exist"):
        stored_tokens(tmp_path / "c")
    first = (tmp_path / "c_00000.idx").stat().st_mtime_ns
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "c_00000.idx").stat().st_mtime_ns == first
    assert stored_tokens(tmp_path / "c") == plain_tokens(documents, tokenizer_path)
    assert not (tmp_path / "c.unfinished.json").exists() and not list(tmp_path.glob("*.seen"))


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def test_a_worker_that_dies_is_an_error_that_keeps_finished_shards(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, killed = module._Preparation._take, []

    def kill_after_a_shard(self: Any, batch: EncodedBatch, began: float) -> None:
        original(self, batch, began)
        if self.state.shards and not killed:
            killed.extend(children(os.getpid()))
            for pid in killed:
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(module._Preparation, "_take", kill_after_a_shard)
    monkeypatch.setattr("data_prep.encoding._WAITING_PER_WORKER", 1)
    with pytest.raises(PrepareError, match=r"process was killed.*--workers.*finished shards are kept"):
        write(corpus, tmp_path / "c", tokenizer_path, shard_tokens=1000, workers=2)
    assert (tmp_path / "c_00000.idx").exists() and (tmp_path / "c.unfinished.json").exists()


def test_a_restart_with_other_settings_or_changed_inputs_is_refused(
    corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"text": text} for text in DOCUMENTS])
    (folder / "b.jsonl").write_text("{broken\n")
    with pytest.raises(PrepareError, match=r"b\.jsonl, line 1 is not JSON"):
        write(folder, tmp_path / "c", tokenizer_path, shard_tokens=3000)
    with pytest.raises(PrepareError, match=r"c\.unfinished\.json .* with shard_tokens=3000, now it is 4000; finish"):
        write(folder, tmp_path / "c", tokenizer_path, shard_tokens=4000)
    (folder / "b.jsonl").write_text('{"text": "mended"}\n')  # it has not been read yet: a mended input goes on
    kept = (folder / "a.jsonl").stat()
    os.utime(folder / "a.jsonl", ns=(0, 0))
    with pytest.raises(PrepareError, match=r"input 0 of .* has been read, was .*a\.jsonl"):
        write(folder, tmp_path / "c", tokenizer_path, shard_tokens=3000)
    os.utime(folder / "a.jsonl", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    write(folder, tmp_path / "c", tokenizer_path, shard_tokens=3000)
    assert stored_tokens(tmp_path / "c") == plain_tokens([*DOCUMENTS, "mended"], tokenizer_path)


@pytest.mark.parametrize("damage", ["{", "[]", '{"format_version": 1}', '{"format_version": 9, "splits": {}}'])
def test_a_damaged_state_is_refused_and_overwritten_on_demand(
    damage: str, corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "c.unfinished.json").write_text(damage)
    with pytest.raises(PrepareError, match=r"c\.unfinished\.json .*--overwrite"):
        write(corpus, tmp_path / "c", tokenizer_path, shard_tokens=3000)
    write(corpus, tmp_path / "c", tokenizer_path, shard_tokens=3000, overwrite=True)
    assert stored_tokens(tmp_path / "c") == plain_tokens(DOCUMENTS, tokenizer_path)


def test_overwriting_leaves_nothing_of_the_corpus_before(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    write(corpus, tmp_path / "c", tokenizer_path, shard_tokens=1000)
    (tmp_path / "c_notes.txt").write_text("mine")
    with pytest.raises(TokenFileError, match="exists already"):
        write(corpus, tmp_path / "c", tokenizer_path)
    with pytest.raises(TokenFileError, match="exists already"):
        write(corpus, tmp_path / "c", tokenizer_path, shard_tokens=9000)
    write(corpus, tmp_path / "c", tokenizer_path, shard_tokens=9000, overwrite=True)
    write(corpus, tmp_path / "fresh" / "c", tokenizer_path, shard_tokens=9000)
    assert contents(tmp_path, "c") == contents(tmp_path / "fresh", "c") | {"c_notes.txt": b"mine"}
    write(corpus, tmp_path / "c", tokenizer_path, overwrite=True)  # shards to one file
    assert set(contents(tmp_path, "c")) == {"c.bin", "c.idx", "c.json", "c.sha256", "c_notes.txt"}
    write(corpus, tmp_path / "c", tokenizer_path, shard_tokens=9000, overwrite=True)  # and back
    assert stored_tokens(tmp_path / "c") == plain_tokens(DOCUMENTS, tokenizer_path)


def test_two_preparations_of_one_output_do_not_mix(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    from data_prep.state import locked

    with locked(str(tmp_path / "c")), pytest.raises(PrepareError, match=r"c\.lock is held"):
        write(corpus, tmp_path / "c", tokenizer_path)
    write(corpus, tmp_path / "c", tokenizer_path)
    assert not (tmp_path / "c.lock").exists()


def test_the_report_counts_names_and_hashes(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    import hashlib

    write(corpus, tmp_path / "c", tokenizer_path, shard_tokens=5000)
    report = json.loads((tmp_path / "c.report.json").read_text())
    assert report["counts"] == {"kept": len(DOCUMENTS)} and report["tokens_per_second"] > 0
    assert report["tokenizer"]["vocab_size"] == 512 and len(report["inputs"]) == 2
    shards = report["splits"]["all"]["shards"]
    assert sum(shard["documents"] for shard in shards) == len(DOCUMENTS) and len(shards) > 2
    for shard in shards:
        assert set(shard["sha256"]) == {f"{shard['name']}.{suffix}" for suffix in ("bin", "idx", "json")}
        for name, value in shard["sha256"].items():
            assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == value
    manifest = json.loads((tmp_path / "c_00000.json").read_text())
    assert manifest["sources"] == [str(corpus / "a.jsonl")]  # those it is made of, not all


@pytest.mark.parametrize("size", [1000, 70000])  # uint16 and int32 files
def test_megatron_reads_every_shard_and_its_own_shards_are_read(
    size: int, corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == 70000:
        original = module.ShardWriter.__init__

        def larger(self: Any, output: str, tails: Any, tokenizer: Any, **policy: bool) -> None:
            tokenizer.vocab_size = size
            original(self, output, tails, tokenizer, **policy)

        monkeypatch.setattr(module.ShardWriter, "__init__", larger)
    write(corpus, tmp_path / "c", tokenizer_path, shard_tokens=5000)
    read: list[tuple[int, ...]] = []
    for shard in read_shard_list(tmp_path / "c"):
        dataset = IndexedDataset(str(tmp_path / shard.name))
        assert dataset.index.dtype == (np.uint16 if size == 1000 else np.int32)
        assert dataset.document_indices.tolist() == list(range(len(dataset) + 1)) and len(dataset) == shard.documents
        read += [tuple(dataset[i].tolist()) for i in range(len(dataset))]
        builder = IndexedDatasetBuilder(str(tmp_path / f"m_{shard.name}.bin"), dtype=dataset.index.dtype)
        for i in range(len(dataset)):
            builder.add_document(dataset[i], [len(dataset[i])])
        builder.finalize(str(tmp_path / f"m_{shard.name}.idx"))
        for suffix in ("bin", "idx"):
            theirs = (tmp_path / f"m_{shard.name}.{suffix}").read_bytes()
            assert theirs == (tmp_path / f"{shard.name}.{suffix}").read_bytes()
    assert read == stored_tokens(tmp_path / "c") == plain_tokens(DOCUMENTS, tokenizer_path)
