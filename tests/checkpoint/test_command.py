"""`dla-checkpoint` shows, checks and prunes, and names what is damaged."""

from pathlib import Path

import pytest

from dla_train.checkpoint.command import main
from dla_train.checkpoint.folders import checkpoint_folder, complete_steps, set_aside
from tests.checkpoint.small_runs import write_checkpoints

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_checkpoints(tmp_path, 1, 2, 3, 4)


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_list_shows_steps_sizes_and_what_is_damaged(root: Path, capsys: Capture) -> None:
    code, out, _ = run(capsys, "list", root.parent)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["step", "1", "2", "3", "4"]
    assert out.count("complete") == 4 and "0.01 MB  0 min" in out
    (checkpoint_folder(root, 2) / "trainer.json").unlink()
    set_aside(checkpoint_folder(root, 3))
    (checkpoint_folder(root, 4) / "COMPLETE").unlink()
    code, out, _ = run(capsys, "list", root.parent)
    lines = out.splitlines()
    assert code == 1 and len(lines) == 4
    assert "damaged" in lines[2] and "trainer.json" in lines[2]
    assert lines[3].startswith("step_00000003.damaged") and lines[3].endswith("set aside as damaged")


def test_inspect_shows_the_run_and_its_tensors(root: Path, capsys: Capture) -> None:
    code, out, _ = run(capsys, "inspect", root.parent, "--step", 2, "--tensors")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert code == 0 and facts["step"] == "2" and facts["tokens"] == "64"
    assert facts["model.backbone"] == "gated_deltanet"
    assert facts["model/table"].split(maxsplit=1) == ["F32", "[5, 3]"]
    assert facts["model/scalar"].split() == ["F32", "[]"]
    assert "4, of the model 16 numbers" in out and "torch " in out and "safetensors " in out
    code, out, _ = run(capsys, "inspect", root.parent)
    assert code == 0 and "model/table" not in out and out.splitlines()[0].split() == ["step", "4"]


def test_verify_hashes_everything_and_names_the_damaged_file(root: Path, capsys: Capture) -> None:
    code, out, _ = run(capsys, "verify", root.parent)
    assert code == 0 and out.splitlines() == [f"step {step}: complete" for step in (1, 2, 3, 4)]
    flip(checkpoint_folder(root, 2) / "tensors/optim-00000-000.safetensors")
    assert run(capsys, "list", root.parent)[0] == 0  # sizes alone do not show it
    code, out, _ = run(capsys, "verify", root.parent)
    assert code == 1 and "step 2: damaged" in out and "tensors/optim-00000-000.safetensors" in out
    assert run(capsys, "verify", root.parent, "--step", 3)[0] == 0
    assert run(capsys, "verify", root.parent, "--step", 2)[0] == 1
    code, _, err = run(capsys, "verify", root.parent, "--step", 9)
    assert code == 2 and "holds no complete checkpoint of step 9; choose from 1, 2, 3, 4" in err


def test_prune_deletes_what_it_said_it_would_and_never_the_newest(root: Path, capsys: Capture) -> None:
    arguments = ("prune", root.parent, "--keep-last", 1, "--keep-every", 2)
    code, out, _ = run(capsys, *arguments, "--dry-run")
    assert code == 0 and out.count("would delete") == 2 and complete_steps(root) == [1, 2, 3, 4]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.count("deleted") == 2 and complete_steps(root) == [2, 4]
    assert run(capsys, *arguments)[1] == "nothing to delete\n"
    (root / "step_00000005.tmp").mkdir()
    assert run(capsys, "prune", root.parent, "--keep-last", 1)[0] == 0
    assert sorted(path.name for path in root.iterdir()) == ["step_00000004", "step_00000005.tmp"]
    with pytest.raises(SystemExit):
        main(["prune", str(root.parent), "--keep-last", "0"])


def test_prune_counts_undamaged_ones_alone_and_leaves_damaged_ones_unless_told(root: Path, capsys: Capture) -> None:
    (checkpoint_folder(root, 4) / "trainer.json").unlink()
    set_aside(checkpoint_folder(root, 1))
    assert run(capsys, "prune", root.parent, "--keep-last", 1)[0] == 0
    assert complete_steps(root) == [3] and checkpoint_folder(root, 4).is_dir()
    assert (root / "step_00000001.damaged").is_dir()
    assert run(capsys, "prune", root.parent, "--keep-last", 1, "--damaged")[0] == 0
    assert not (root / "step_00000001.damaged").exists()


@pytest.mark.parametrize("command", [["list"], ["inspect"], ["verify"], ["prune", "--keep-last", "1"]])
def test_a_folder_without_checkpoints_is_a_clear_error(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    code, _, err = run(capsys, command[0], tmp_path / "absent", *command[1:])
    assert code == 2 and err.startswith("dla-checkpoint: error:") and "absent" in err
