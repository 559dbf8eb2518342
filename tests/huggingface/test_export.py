"""`dla-export` as its user meets it: verified in another process, or nothing is left."""

import pytest
import torch
from safetensors.torch import load_file

from dla_train.evaluate.loading import load_model
from dla_train.huggingface import verify
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.export import main
from dla_train.huggingface.writing import write_folder
from dla_train.hydra_app import compose
from dla_train.train import train
from tests.train.runs import TINY


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A trained run with checkpoints of steps 2 and 3."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    settings = ("memory.capacity=4", "train.steps=3", "checkpoint.interval_steps=2", "train.dtype=bfloat16")
    train(compose([*TINY, *corpus, f"run_dir={run_dir}", *settings]))
    return run_dir


def test_a_run_is_exported_and_verified_by_a_process_without_this_project(run, tmp_path, capsys):
    main(["--run", str(run), "--output", str(tmp_path / "out"), "--step", "2"])
    said = capsys.readouterr().out
    assert "step 2 in float32" in said and "tokenizer agrees on 17 texts" in said
    stored, model = load_file(tmp_path / "out/model.safetensors"), load_model(run, 2)[0]
    assert stored.keys() == {f"model.{name}" for name in model.state_dict()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[f"model.{name}"], tensor), name
    assert not (tmp_path / "out.partial").exists()
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1, "all files, weights too, are read"


@pytest.mark.parametrize("answer", ["whole", "decoded"])
def test_a_folder_whose_logits_differ_is_not_kept(content, tmp_path, monkeypatch, answer):
    made = content("mamba2", "dla")
    tokens = torch.randint(310, (2, 64), generator=torch.Generator().manual_seed(0))
    native = made.native("float32")
    found = {"whole": verify.whole_logits(native, tokens), "decoded": verify.decoded_logits(native, tokens)}
    found[answer][1, -1, 7] += 2e-5 * found[answer].abs().max()
    monkeypatch.setattr(verify, "_ask", lambda folder, tokens, scratch, decoded: (found, []))
    monkeypatch.setattr(verify, "_compare_tokenizers", lambda tokenizer, texts: 0)
    with pytest.raises(FolderError, match="differ from the run's by 2e-05 of the largest logit, more than 1e-05"):
        write_folder(made, tmp_path / "out", dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_told_and_nothing_is_written(run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for arguments, message in (
        (["--run", str(run), "--output", str(tmp_path / "there")], "there exists; choose another folder"),
        (["--run", str(run), "--output", str(tmp_path / "a"), "--step", "7"], "has no checkpoint of step 7"),
        (["--run", str(tmp_path / "no"), "--output", str(tmp_path / "a")], "holds no complete checkpoint"),
        (["--run", str(run), "--output", str(tmp_path / "a"), "--shard-gigabytes", "0"], "shard size 0 bytes"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
