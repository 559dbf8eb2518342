"""What DeepSpeed is kept from doing when it is imported."""

from tests.train.runs import run_python

PROGRAM = """
from dla_train.engine.zero_settings import import_deepspeed
import_deepspeed()
from deepspeed.comm.torch import build_shm_op
print("compiled" if build_shm_op() is not None else "not compiled")
"""


def test_no_operator_is_compiled_under_a_lock_at_the_start() -> None:
    done = run_python(["-c", PROGRAM])
    assert done.stdout.splitlines()[-1:] == ["not compiled"], done.stderr
