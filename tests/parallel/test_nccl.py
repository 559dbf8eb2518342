"""The checks of test_training.py and test_training_four.py with NCCL, on as many CUDA devices as there are.

One device checks the engines and their collectives of one rank; `make test-multigpu` on a machine with 2, 4 or 8 the
layouts too. The expected path is that of one of these devices.
"""

import pytest
import torch

from tests.parallel import test_training, test_training_four
from tests.parallel.ranks import run_on_ranks
from tests.parallel.test_training import LOCAL, MAIN, ROUNDED, STAGES, checks_of

EIGHT = ({"tensor": 2, "context": 2}, {"tensor": 4, "sequence": True}, {"context": 4}, {})
CHECKS = {
    1: [
        *checks_of([{}], MAIN, [LOCAL, 0, *STAGES]),
        *checks_of([{}], MAIN, STAGES, dtype="bfloat16", changes=ROUNDED),
    ],
    2: [*test_training.FLOAT32, *test_training.BFLOAT16, *test_training.STARTS],
    4: [*test_training_four.FLOAT32, *test_training_four.BFLOAT16],
    8: [*checks_of(EIGHT[:3], MAIN, [LOCAL, *STAGES]), *checks_of(EIGHT[3:], MAIN, STAGES)],
}


@pytest.mark.gpu
@pytest.mark.parametrize("count", CHECKS)
def test_devices_train_as_one(count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA devices, there are {torch.cuda.device_count()}")
    folder = tmp_path_factory.mktemp(f"nccl{count}")
    outcomes = run_on_ranks("tests.parallel.equal_training", CHECKS[count], count, folder, 1500, on="cuda")
    differing = {test_training.named(check): outcomes.of(check)[0]["differ"] for check in CHECKS[count]}
    assert not {name: what for name, what in differing.items() if what}
