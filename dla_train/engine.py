"""Who owns backward and step: plain PyTorch or DeepSpeed, behind one small protocol.

The only file that imports deepspeed, and only when it is asked for. Parameters, gradients and moments are float32 in
both engines (the model casts to its compute type itself), so ZeRO runs as a float32 engine at every stage and its
losses agree with the local ones. State leaves and enters under logical names with whole tensors (`model/<name>`,
`optim/<name>/exp_avg`), never as an engine's own partitions: any engine, stage and number of ranks reads it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dla_train.config import Config, ConfigError
from dla_train.logical_state import (
    MOMENTS,
    load_module,
    load_moments,
    module_tensors,
    moments,
    parameter_of,
    persistent_buffers,
    state_shapes,
)
from dla_train.optim import build_optimizer
from dla_train.parallel.mesh import Mesh
from dla_train.parallel.sections import part_of, whole_of, whole_shape

BUCKET_ELEMENTS = 2**26
"""Most gradient elements in one all-reduce of the local engine (256 MiB)."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports."""

    grad_norm: float
    """Global 2-norm of the gradient before clipping."""


class Engine(Protocol):
    """Backward, step, and logical state. Every method is collective: all ranks call it, in the same order."""

    module: Any
    """What to call for a forward pass: the model, or what passes everything on to it."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`. The losses of all micro-batches and ranks **sum** to the loss of the step.

        `last` marks the step's last micro-batch, where gradients are exchanged.
        """

    def step(self, lr: float) -> StepResult:
        """Clip, update at learning rate `lr`, and clear the gradients."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor of the state, by logical name."""

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        """(logical name, whole tensor) one by one; a tensor may be live storage and is valid until the next one."""

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Load every tensor of `shapes()` and continue as after `steps` optimizer steps."""


def build_engine(config: Config, model: nn.Module, mesh: Mesh) -> Engine:
    """The engine of `engine.name` around a model that lies on the mesh's device, initialised."""
    if config.engine.name == "deepspeed":
        return DeepSpeedEngine(config, model, mesh)
    return LocalEngine(config, model, mesh)


class LocalEngine:
    """Plain PyTorch: AdamW, gradients summed over data and context ranks in flat buckets; it divides no state."""

    def __init__(self, config: Config, model: nn.Module, mesh: Mesh) -> None:
        self.module: Any = model
        self._mesh, self._model = mesh, config.model
        self._optimizer = build_optimizer(model, config.optim)
        self._clip_norm = config.optim.clip_norm
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        if last:
            self._exchange_gradients()

    def step(self, lr: float) -> StepResult:
        grad_norm = self._grad_norm()
        nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm or float("inf"), grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm=float(grad_norm))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        ranks = self._mesh.axes.tensor.size
        parts = state_shapes(self.module).items()
        return {name: whole_shape(parameter_of(name), shape, self._model, ranks) for name, shape in parts}

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        for source in (module_tensors(self.module), moments(self.module, self._optimizer)):
            for name, tensor in source:
                yield name, whole_of(parameter_of(name), tensor, self._model, self._mesh.axes.tensor)

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        axis = self._mesh.axes.tensor
        parts = {name: part_of(parameter_of(name), state[name], self._model, axis) for name in self.shapes()}
        load_module(self.module, parts)
        load_moments(self.module, self._optimizer, parts, steps)

    def _grad_norm(self) -> Tensor:
        """2-norm of the whole model's gradient: of divided parameters every rank's part, of whole ones this rank's."""
        axis = self._mesh.axes.tensor
        gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]
        if axis.size == 1:
            return nn.utils.get_total_norm([gradient for _, gradient in gradients])
        divided = [getattr(p, "tensor_model_parallel", False) for p, _ in gradients]
        parts = [g for (_, g), own in zip(gradients, divided, strict=True) if own]
        shared = [g for (_, g), own in zip(gradients, divided, strict=True) if not own]
        squares = self._mesh.sum(nn.utils.get_total_norm(parts).square(), axis)
        return (squares + nn.utils.get_total_norm(shared).square()).sqrt()

    def _exchange_gradients(self) -> None:
        """Sum the gradients over the ranks; one that is absent counts as zero, on every rank."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._mesh.axes.batch.size == 1:
            return
        group = self._mesh.axes.batch.process_group()
        bucket: list[Tensor] = []
        for gradient in [parameter.grad for parameter in self._parameters if parameter.grad is not None]:
            if bucket and sum(part.numel() for part in bucket) + gradient.numel() > BUCKET_ELEMENTS:
                _sum_over_ranks(bucket, group)
                bucket = []
            bucket.append(gradient)
        _sum_over_ranks(bucket, group)


class DeepSpeedEngine:
    """DeepSpeed's engine in float32, ZeRO stage 0 to 3, with our AdamW, clipping and batch sizes spelled out."""

    def __init__(self, config: Config, model: nn.Module, mesh: Mesh) -> None:
        if mesh.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", "0")  # a single process without torchrun
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self._settings = deepspeed_config(config, mesh.size)
        self._stage = config.engine.zero_stage
        self._loss_factor = mesh.size * self._settings["gradient_accumulation_steps"]
        self._bare_module = model
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._shapes = state_shapes(model)
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optim),
            config=self._settings,
            dist_init_required=False,
        )
        self.module: Any = engine
        if self._stage:
            self._create_moments()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """DeepSpeed averages over ranks and micro-batches where this protocol sums, hence the factor."""
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss * self._loss_factor)

    def step(self, lr: float) -> StepResult:
        for group in self.module.optimizer.param_groups:
            group["lr"] = lr
        grad_norm = self._plain_grad_norm() if self._stage == 0 else None
        self.module.step()
        if grad_norm is None:
            grad_norm = float(self.module.get_global_grad_norm())
        return StepResult(grad_norm=grad_norm)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        if self._stage == 0:
            yield from module_tensors(self._bare_module)
            yield from moments(self._bare_module, self.module.optimizer)
            return
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameters = dict(self._bare_module.named_parameters())
        yield from persistent_buffers(self._bare_module)
        for name in self._names:
            yield f"model/{name}", safe_get_full_fp32_param(parameters[name])
        for name in self._names:
            for moment in MOMENTS:
                yield f"optim/{name}/{moment}", safe_get_full_optimizer_state(parameters[name], moment)

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        if self._stage == 0:
            load_module(self._bare_module, state)
            load_moments(self._bare_module, self.module.optimizer, state, steps)
            return
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for part in self._partitions():
            self.module.optimizer.optimizer.state[part]["step"].fill_(float(steps))
        parameters = dict(self._bare_module.named_parameters())
        for name, buffer in persistent_buffers(self._bare_module):
            buffer.copy_(state[name])
        for name in self._names:
            parameter, value = parameters[name], state[f"model/{name}"]
            if self._stage < 3:
                parameter.data.copy_(value)
            else:
                with GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value)
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"optim/{name}/{moment}"], moment)

    def _create_moments(self) -> None:
        """Give every partition its moments now, as zeros, which is what AdamW starts from.

        ZeRO makes them in the first step and links them to the parameters after the first **group's** update, when a
        second group has none yet: reading or setting those of our undecayed parameters would fail ever after.
        """
        inner = self.module.optimizer.optimizer
        for part in self._partitions():
            inner.state[part] = {moment: torch.zeros_like(part) for moment in MOMENTS}
            inner.state[part]["step"] = torch.zeros((), device=part.device)
        if self._stage < 3:
            self.module.optimizer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[Tensor]:
        """This rank's flat float32 partitions, which the inner optimizer updates."""
        outer = self.module.optimizer
        if self._stage == 3:
            return list(outer.fp32_partitioned_groups_flat)
        return [part for group in outer.optimizer.param_groups for part in group["params"]]

    def _plain_grad_norm(self) -> float:
        """Norm at stage 0, where DeepSpeed reports none; gradients are whole and summed on every rank by now."""
        gradients = [parameter.grad for parameter in self._bare_module.parameters() if parameter.grad is not None]
        return float(nn.utils.get_total_norm(gradients))


def deepspeed_config(config: Config, ranks: int) -> dict[str, Any]:
    """The whole configuration DeepSpeed sees; batch sizes are explicit, so that it asserts our world size."""
    train = config.train
    return {
        "train_batch_size": train.global_batch_rows,
        "train_micro_batch_size_per_gpu": train.micro_batch_rows,
        "gradient_accumulation_steps": train.global_batch_rows // (train.micro_batch_rows * ranks),
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def import_deepspeed() -> Any:
    """The deepspeed module, quiet below errors. Raises ConfigError where it is not installed."""
    deepspeeds_own_calls = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", deepspeeds_own_calls, FutureWarning)
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        mend = "pip install 'dla-train[deepspeed]' (Linux), or use engine=local"
        raise ConfigError(f"engine.name=deepspeed needs the package deepspeed; {mend}") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _sum_over_ranks(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
