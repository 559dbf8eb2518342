"""What DeepSpeed is told: its whole configuration, and who its ranks are."""

from __future__ import annotations

import inspect
import logging
import warnings
from typing import Any

import torch.distributed as dist

from dla_train.config import Config, ConfigError
from dla_train.data_config import segments_of_a_row
from dla_train.parallel.axes import Axes

# DeepSpeed's own sizes suit models of many billions: two buffers of 5e8 gradients whatever the model, and up to 1e9
# weights that stage 3 leaves gathered, which is all of the paper's models.
BUCKET_ELEMENTS = 2**25
"""Gradients summed at once; there are two such buffers, one being filled while the other is summed."""
LIVE_ELEMENTS = 2**27
"""Weights that stage 3 keeps gathered at most."""
PREFETCH_ELEMENTS = 2**25
"""Weights that stage 3 gathers ahead of their use."""
PERSISTENT_ELEMENTS = 2**14
"""Weights of at most this size stay gathered: vectors, for which a gather costs more than it saves."""


class ModelParallelUnit:
    """The names under which DeepSpeed asks Megatron about ranks (`mpu`), answered from the axes.

    Its data parallel ranks are ours of data and context: all that have the same parameters. There must be no
    `initialize_sequence_parallel` here: DeepSpeed takes its presence for another scheme and ignores tensor ranks.
    """

    def __init__(self, axes: Axes) -> None:
        self._tensor, self._batch = axes.tensor, axes.batch

    def get_model_parallel_rank(self) -> int:
        """Of the tensor axis."""
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """Of the tensor axis."""
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Of the tensor axis."""
        return self._tensor.process_group()

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        """The first of the tensor axis, among all ranks."""
        return dist.get_global_rank(self._tensor.process_group(), 0)

    def get_data_parallel_rank(self) -> int:
        """Of the batch axis."""
        return self._batch.rank

    def get_data_parallel_world_size(self) -> int:
        """Of the batch axis."""
        return self._batch.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Of the batch axis."""
        return self._batch.process_group()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """The batch axis, as ranks among all."""
        return dist.get_process_group_ranks(self._batch.process_group())

    def get_pipeline_model_parallel_world_size(self) -> int:
        """There is no pipeline."""
        return 1


def backward_passes(config: Config, axes: Axes) -> int:
    """Backward passes of one rank in a step of the longest rows: one for each segment of each micro-batch."""
    micro_batches = config.train.global_batch_rows // (config.train.micro_batch_rows * axes.data.size)
    return micro_batches * segments_of_a_row(config)


def deepspeed_config(config: Config, axes: Axes, device: str) -> dict[str, Any]:
    """The whole configuration DeepSpeed sees. Batch sizes are explicit, so that it asserts our ranks.

    It counts a row once for every context rank, which are data parallel to it, and for every segment. Gradients are
    summed, accumulated over micro-batches and kept in float32 whatever the parameters are stored in. Reduction overlaps
    backward.
    """
    train, stage = config.train, config.engine.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {"overlap_comm": True, "reduce_bucket_size": BUCKET_ELEMENTS}
    if stage == 3:
        zero |= {
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
            "stage3_prefetch_bucket_size": PREFETCH_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        }
    if config.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    settings = {
        "train_batch_size": train.micro_batch_rows * backward_passes(config, axes) * axes.batch.size,
        "train_micro_batch_size_per_gpu": train.micro_batch_rows,
        "gradient_accumulation_steps": backward_passes(config, axes),
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if config.engine.weights == "bfloat16":
        # at stage 1 gradients of earlier micro-batches would otherwise be added once more with every later one
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def import_deepspeed() -> Any:
    """The deepspeed module, quiet below errors. Raises ConfigError where it is not installed."""
    deepspeeds_own_calls = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", deepspeeds_own_calls, FutureWarning)
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        mend = "pip install 'dla-train[deepspeed]' (Linux), or use engine=local"
        raise ConfigError(f"engine.name=deepspeed needs the package deepspeed; {mend}") from error
    # for inference on CPUs; it is compiled at the first start, under a lock that a process killed then leaves for ever
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _forget_the_group_at_import()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _forget_the_group_at_import() -> None:
    """Some methods' defaults are the group that existed when deepspeed was imported, and would hold it for ever."""
    from deepspeed.comm.torch import TorchBackend

    for method in (TorchBackend.barrier, TorchBackend.monitored_barrier):
        function = inspect.unwrap(method)
        defaults = function.__defaults__ or ()
        function.__defaults__ = tuple(None if isinstance(value, dist.ProcessGroup) else value for value in defaults)
