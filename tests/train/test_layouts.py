"""Runs divided by heads, along time and by rows walk the path of one rank, and go on from each other's checkpoints."""

from pathlib import Path

import pytest
import torch

from tests.train.runs import TINY, numbers_of, run_training, tensors_of

LAYOUTS: dict[str, list[str]] = {
    "data": [],
    "tensor": ["parallel.tensor=2"],
    "sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "context": ["parallel.context=2"],
}
MODELS = {
    "gated_deltanet": ["memory.tau_control=rate", "memory.routing=qk", "optim.z_loss=1e-3"],
    "mamba2": ["model.backbone=mamba2", "model.num_key_heads=1", "memory.closed_slots=frozen", "train.recompute=true"],
    "attention": ["model=transformer_tiny", "memory=none"],
}
RELATIVE = 2e-5
"""Losses and norms in float32 over 8 steps: sums in another order."""


@pytest.fixture(scope="session")
def runs(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of finished runs: <model>_one, <model>_<layout>, and <model>_moved, begun divided, ended on one rank."""
    folder = tmp_path_factory.mktemp("layouts")

    def run(name: str, model: str, *overrides: str) -> list[str]:
        rich = ["train.validation_batches=2", "train.micro_batch_rows=2", "checkpoint.keep_last=0"]
        return [*TINY, *corpus, *MODELS[model], *rich, f"name={name}", f"run_dir={folder}/{name}", *overrides]

    one = [run(f"{model}_one", model) for model in MODELS]
    divided = [run(f"{m}_{layout}", m, *keys) for m in MODELS for layout, keys in LAYOUTS.items()]
    begun = [run(f"{m}_moved", m, *LAYOUTS["sequence"], "train.stop_at_step=4") for m in MODELS]
    run_training(folder / "one.json", one)
    plain = run("first", "gated_deltanet", "train.stop_at_step=1")  # its layout is the shared process group's
    run_training(folder / "two.json", [plain, *divided, *begun], ranks=2)
    run_training(folder / "moved.json", [run(f"{m}_moved", m, "checkpoint.resume=required") for m in MODELS])
    return folder


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_norms_and_statistics_equal_those_of_one_rank(runs: Path, model: str, layout: str) -> None:
    names = ["loss", "grad_norm", "lr"] + ([] if model == "attention" else ["boundary_rate", "live_slots", "tau"])
    expected, actual = (numbers_of(runs / f"{model}_{name}", *names) for name in ("one", layout))
    assert len(actual) == 8
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=RELATIVE, atol=1e-6)
    names = ["validation_loss", "validation_bits_per_byte", "validation_loss_0_2", "validation_loss_16_32"]
    names += [] if model == "attention" else ["validation_soft_loss"]
    expected, actual = (numbers_of(runs / f"{model}_{name}", *names) for name in ("one", layout))
    assert len(actual) == 1
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=RELATIVE, atol=0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_hold_the_whole_state_whatever_the_layout(runs: Path, model: str, layout: str) -> None:
    expected, actual = (tensors_of(runs / f"{model}_{name}", 8) for name in ("one", layout))
    names = {name for name in expected if not name.startswith("rng/")}
    assert names == {name for name in actual if not name.startswith("rng/")}
    for name in names:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-3, atol=2e-5, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.parametrize("model", MODELS)
def test_a_divided_run_goes_on_on_one_rank(runs: Path, model: str) -> None:
    names = ("loss", "grad_norm", "lr")
    expected, actual = (numbers_of(runs / f"{model}_{name}", *names) for name in ("one", "moved"))
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=RELATIVE, atol=0)
