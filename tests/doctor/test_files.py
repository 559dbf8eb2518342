"""What is really broken is found and named, and nothing is left behind: tokenizer, shards, run_dir, disk."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.sources import text_sources
from data_prep.train_tokenizer import train_tokenizer
from dla_train.checkpoint.folders import outdated_steps
from dla_train.checkpoint.run_lock import RunLock
from dla_train.config import CheckpointConfig, Config
from dla_train.doctor.command import preflight
from dla_train.doctor.findings import FAILED, OK, WARNING, Finding
from dla_train.doctor.run_folder import check_disk, check_run_folder, checkpoint_bytes, checkpoints_kept
from dla_train.train import train
from tests.harness.local_data import write_local_data

Tiny = Callable[..., Config]


def wrong(findings: list[Finding]) -> list[tuple[str, str]]:
    """(check, what) of all failures."""
    return [(finding.check, finding.what) for finding in findings if finding.state == FAILED]


def test_nothing_is_found_wrong_with_a_sound_run_and_nothing_is_left(tiny: Tiny, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = preflight(tiny(), 1)
    assert [finding.check for finding in found] == ["settings", "tokenizer", "data", "run_dir", "room"]
    assert {finding.state for finding in found} == {OK}
    assert check_disk(tiny(), 10**6).state == OK
    assert sorted(tmp_path.rglob("*")) == before


def test_every_missing_or_damaged_shard_is_named(tiny: Tiny, corpus: Path) -> None:
    for name in ("second", "third"):
        for suffix in ("bin", "idx", "json"):
            shutil.copy(corpus / f"tiny_train.{suffix}", corpus / f"{name}.{suffix}")
    (corpus / "second.bin").unlink()
    with open(corpus / "third.bin", "r+b") as file:
        file.truncate(100)
    (corpus / "tiny_validation.idx").unlink()
    config = tiny(f"data.train=[{corpus}/tiny_train,{corpus}/second,{corpus}/third]")
    named = wrong(preflight(config, 1))
    assert [check for check, _ in named] == ["data"] * 3
    for (_, what), part in zip(named, ("second.bin", "third.bin", "tiny_validation.idx"), strict=True):
        assert part in what


def test_a_long_list_of_missing_shards_is_cut(tiny: Tiny, corpus: Path) -> None:
    absent = ",".join(f"{corpus}/absent{number}" for number in range(9))
    named = wrong(preflight(tiny(f"data.train=[{absent}]"), 1))
    assert len(named) == 6 and named[-1] == ("data", "4 more shards")


def test_a_tokenizer_that_the_files_were_not_written_with_is_found(
    tiny: Tiny, whole_corpus: Path, corpus: Path
) -> None:
    other = train_tokenizer(
        text_sources(sorted(whole_corpus.glob("*.txt"))[:20]), corpus / "other.model", 300, progress=False
    )
    named = wrong(preflight(tiny(f"data.tokenizer={other.path}"), 1))
    assert {check for check, _ in named} == {"data"} and "was written with tokenizer tiny.model" in named[0][1]


def test_a_tokenizer_that_is_too_large_missing_or_damaged_is_found(tiny: Tiny, corpus: Path) -> None:
    assert wrong(preflight(tiny("model.vocab_size=300"), 1)) == [
        ("tokenizer", "tiny.model has 310 ids, model.vocab_size=300 is smaller; set it to at least 310")
    ]
    ((check, what),) = wrong(preflight(tiny(f"data.tokenizer={corpus}/absent.model"), 1))
    assert check == "tokenizer" and "absent.model does not exist" in what
    (corpus / "tiny.model").write_bytes(b"nonsense")
    ((check, what),) = wrong(preflight(tiny(), 1))
    assert check == "tokenizer" and "not a readable sentencepiece model" in what


def test_tasks_that_are_not_known_or_have_no_documents_are_found(tiny: Tiny, tmp_path: Path) -> None:
    write_local_data(tmp_path / "documents")
    asked = ["evaluation.tasks=[piqa]", f"evaluation.data_dir={tmp_path}/documents"]
    assert wrong(preflight(tiny(*asked), 1)) == []
    [(check, what)] = wrong(preflight(tiny(*asked, "evaluation.tasks=[piqua]"), 1))
    assert check == "evaluation" and "did you mean piqa?" in what
    [(check, what)] = wrong(preflight(tiny(*asked, "evaluation.num_fewshot=1"), 1))
    assert check == "evaluation" and "piqa/train.jsonl cannot be read" in what and "dla-evaluate fetch" in what


def test_too_little_text_is_found(tiny: Tiny) -> None:
    ((check, what),) = wrong(preflight(tiny("train.global_batch_rows=4000"), 1))
    assert check == "data" and "smaller train.global_batch_rows" in what


def test_all_broken_rules_of_a_layout_are_told_and_nothing_else_is_tried(tiny: Tiny) -> None:
    found = preflight(tiny("parallel.tensor=3", "data.train=[absent]"), 4)
    assert {finding.check for finding in found} == {"settings"} and len(wrong(found)) >= 3
    told = " ".join(what for _, what in wrong(found))
    assert "world_size=4 is not a multiple of parallel.tensor=3" in told and "model.num_heads=2" in told


def test_the_backend_that_dla_plan_does_not_plan_is_legal(tiny: Tiny) -> None:
    assert wrong(preflight(tiny("memory.backend=recurrent"), 1)) == []


@pytest.fixture
def held(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run")
    yield
    lock.release()


def test_a_run_directory_that_a_process_trains_in_is_refused(tiny: Tiny, held: None) -> None:
    ((check, what),) = wrong(preflight(tiny(), 1))
    assert check == "run_dir" and "is being trained by another process" in what and "run.lock" in what


def test_a_run_directory_of_another_run_is_refused_and_its_own_goes_on(tiny: Tiny) -> None:
    train(tiny("train.stop_at_step=1"))
    assert any("goes on after step 1" in finding.what for finding in preflight(tiny(), 1))
    ((check, what),) = wrong(preflight(tiny("seed=3"), 1))
    assert check == "run_dir" and "seed is 0 there and 3 here" in what


def test_a_checkpoint_has_the_size_that_is_counted_on(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("train.stop_at_step=1", "model.width=128", "model.mlp_width=256")
    train(config)
    sizes = [path.stat().st_size for path in (tmp_path / "run/checkpoints/step_00000001/tensors").iterdir()]
    assert checkpoint_bytes(config) <= sum(sizes) <= 1.05 * checkpoint_bytes(config)


@pytest.mark.parametrize("interval", [0, 1, 3, 10])
@pytest.mark.parametrize(("last", "every"), [(0, 0), (1, 0), (2, 0), (3, 0), (2, 2), (1, 3), (2, 30)])
def test_as_many_checkpoints_are_counted_as_lie_there_at_once(interval: int, last: int, every: int) -> None:
    steps, there, most = 31, list[int](), 0
    for step in range(1, steps + 1):
        if step == steps or (interval and step % interval == 0):
            there.append(step)
            most = max(most, len(there))  # the new one is complete before an old one goes
            gone = outdated_steps(there, last, every * interval)
            there = [kept for kept in there if kept not in gone]
    settings = CheckpointConfig(interval_steps=interval, keep_last=last, keep_every_steps=every * interval)
    counted = checkpoints_kept(settings, steps)
    assert most <= counted <= most + 2 and (every or counted == most)


@pytest.mark.parametrize(("free", "state"), [(0.9, FAILED), (1.1, WARNING), (1.3, OK)])
def test_a_disk_without_room_for_the_checkpoints_that_will_be_kept_is_found(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, free: float, state: str
) -> None:
    config = tiny("checkpoint.interval_steps=2", "checkpoint.keep_last=3")  # 8 steps: all four at once
    need = 4 * checkpoint_bytes(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(free * need)))
    (finding,) = [finding for finding in check_run_folder(config, None) if finding.check == "room"]
    assert finding.state == state and "4 checkpoint(s)" in finding.what
    assert ("keep fewer" in finding.what) == (state != OK)


def test_a_limit_on_file_sizes_is_found_and_the_file_removed(tiny: Tiny, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        finding = check_disk(tiny(), 8 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert finding.state == FAILED and "8 MB cannot be written" in finding.what
    assert [path for path in tmp_path.iterdir() if path.name != "corpus"] == []


def test_a_disk_that_takes_half_a_checkpoints_limit_is_a_warning(tiny: Tiny) -> None:
    finding = check_disk(tiny("resilience.checkpoint_minutes=1e-9"), 10**6)
    assert finding.state == WARNING and "use a faster file system" in finding.what


def test_a_file_in_place_of_run_dir_is_found(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "run").write_text(json.dumps({}))
    ((check, what),) = wrong(preflight(tiny(), 1))
    assert check == "run_dir" and "is a file" in what
