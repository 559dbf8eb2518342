"""Tensors come back bit for bit, from files that other tools read, and are dealt evenly to the ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import load_file
from torch import Tensor

from dla_train.checkpoint import tensor_files
from dla_train.checkpoint.errors import CheckpointError, DamagedError
from dla_train.checkpoint.manifest import TENSORS, deal
from dla_train.checkpoint.state import Staging, check_shapes, stored_random_state
from dla_train.checkpoint.tensor_files import StoredTensors, write_tensor_files
from tests.checkpoint.small_runs import SmallState


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    special = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, 3.4e38])
    return {
        "model/special": special,
        "model/matrix": torch.randn(7, 3),
        "model/scalar": torch.tensor(2.5),
        "model/empty": torch.empty(0, 4),
        "optim/matrix/exp_avg": torch.randn(7, 3),
        "rng/0/cpu": torch.arange(256, dtype=torch.uint8),
    }


def written(folder: Path, tensors: dict[str, Tensor]) -> StoredTensors:
    (folder / TENSORS).mkdir()
    return StoredTensors(folder, list(write_tensor_files(folder, 0, tensors)))


def test_tensors_come_back_bit_for_bit(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    stored = written(tmp_path, tensors)
    assert stored.keys() == tensors.keys() and len(stored) == 6
    for name, tensor in tensors.items():
        assert stored[name].shape == tensor.shape and stored[name].dtype == tensor.dtype
        assert stored[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    assert stored.entry("model/matrix") == ("F32", (7, 3))


def test_each_kind_has_its_own_files_of_bounded_size(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 90)
    stored = written(tmp_path, tensors)
    names = sorted(path.name for path in (tmp_path / TENSORS).iterdir())
    assert names == [
        "model-00000-000.safetensors",
        "model-00000-001.safetensors",
        "optim-00000-000.safetensors",
        "rng-00000-000.safetensors",
    ]
    assert torch.equal(stored["model/matrix"], tensors["model/matrix"])


def test_the_libraries_of_others_read_the_files(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    written(tmp_path, tensors)
    loaded = load_file(tmp_path / TENSORS / "model-00000-000.safetensors")
    np.testing.assert_array_equal(loaded["model/matrix"], tensors["model/matrix"].numpy())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torch_distributed_checkpoint_reads_the_folder(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    del tensors["model/empty"]  # its planner plans nothing for it
    written(tmp_path, tensors)
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / TENSORS)), no_dist=True)
    for name, tensor in tensors.items():
        assert into[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def test_a_tensor_that_is_stored_twice_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / TENSORS).mkdir()
    files = [name for rank in (0, 1) for name in write_tensor_files(tmp_path, rank, tensors)]
    with pytest.raises(DamagedError, match="is stored twice"):
        StoredTensors(tmp_path, files)


def test_changing_a_tensor_that_was_read_does_not_change_the_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    stored = written(tmp_path, tensors)
    stored["model/matrix"].zero_()
    again = StoredTensors(tmp_path, [f"{TENSORS}/model-00000-000.safetensors"])
    assert torch.equal(again["model/matrix"], tensors["model/matrix"])


def test_tensors_are_dealt_once_and_evenly() -> None:
    sizes = {f"model/{n}": n * 7 % 31 + 1 for n in range(100)} | {"model/embedding": 900}
    for ranks in (1, 2, 3, 8):
        shares = deal(sizes, ranks)
        assert sorted(name for share in shares for name in share) == sorted(sizes)
        loads = [sum(sizes[name] for name in share) for share in shares]
        assert max(loads) - min(loads) <= 31 or max(loads) == 900
    assert deal(sizes, 8) == deal(dict(reversed(sizes.items())), 8)


def test_a_rank_copies_its_share_alone_into_the_same_buffers_each_time() -> None:
    state = SmallState(1.0)
    staged = [Staging(rank, 2, torch.device("cpu")) for rank in (0, 1)]
    first = [staging.copy(state) for staging in staged]
    names = [{name for name in copied if not name.startswith("rng/")} for copied in first]
    assert names[0] | names[1] == state.shapes().keys() and not names[0] & names[1]
    assert [set(staging._buffers) for staging in staged] == names, "no memory for what another rank writes"
    assert "rng/1/cpu" in first[1] and "rng/1/cpu" not in first[0]
    state.train(2.0)
    assert all(float(first[rank][name].max()) == 1.0 for rank in (0, 1) for name in names[rank])
    again = staged[0].copy(state)
    for name in names[0]:
        assert again[name].data_ptr() == first[0][name].data_ptr() and float(again[name].max()) == 2.0


@pytest.mark.parametrize(
    "state", [torch.zeros(5056, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), torch.ones(2)]
)
def test_what_is_no_random_state_is_found_before_anything_is_changed(state: Tensor, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    with pytest.raises(DamagedError, match="rng/0/cpu is no random state"):
        stored_random_state(tmp_path, {"rng/0/cpu": state}, 0, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert stored_random_state(tmp_path, {"rng/0/cpu": before}, 1, torch.device("cpu")) == {}


def test_only_float32_is_saved_and_loaded(tmp_path: Path) -> None:
    state = SmallState()
    state.state["model/half"] = torch.zeros(2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"model/half is torch.bfloat16; checkpoints hold float32 only"):
        Staging(0, 1, torch.device("cpu")).copy(state)
    stored = written(tmp_path, {"model/a": torch.zeros(2, dtype=torch.uint8)})
    with pytest.raises(DamagedError, match="holds model/a as U8"):
        check_shapes(tmp_path, stored, {"model/a": (2,)})


def test_tensors_of_another_model_are_named_the_first_ones(tmp_path: Path) -> None:
    stored = written(tmp_path, {f"model/{name}": torch.zeros(2, 3) for name in "abcdef"})
    wanted = {f"model/{name}": (2, 4) for name in "bcdefg"}
    with pytest.raises(CheckpointError) as caught:
        check_shapes(tmp_path, stored, wanted)
    assert "model/a is [2, 3] there and absent here; model/b is [2, 3] there and [2, 4] here" in str(caught.value)
    assert "and 3 more" in str(caught.value)
    check_shapes(tmp_path, stored, {f"model/{name}": (2, 3) for name in "abcdef"})
