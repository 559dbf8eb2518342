"""DeepSpeed's engine, ZeRO stage 0 to 3, with our AdamW, clipping, layouts and batch sizes spelled out.

The optimizer's values are float32 at every stage. Parameters are float32 too, or with `engine.weights=bfloat16` (stage
1 and above) bfloat16 copies that the optimizer's values are rounded to after every step. Vectors (norms, biases,
decays, thresholds, gains) are then read in float32 all the same, see `exact` in models/linear.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dla_train.config import Config
from dla_train.engine.gradients import gradient_norm
from dla_train.engine.protocol import StepResult
from dla_train.engine.zero_settings import ModelParallelUnit, backward_passes, deepspeed_config, import_deepspeed
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
from dla_train.models.init import init_weights, initial_part
from dla_train.models.language_model import LanguageModel
from dla_train.optim import build_optimizer, takes_weight_decay
from dla_train.parallel.mesh import Mesh
from dla_train.parallel.sections import part_of, whole_of, whole_shape


class DeepSpeedEngine:
    """An engine (see protocol.py) that divides states over the data and context ranks."""

    def __init__(self, config: Config, model: LanguageModel, mesh: Mesh) -> None:
        if mesh.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", "0")  # a single process without torchrun
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self._bare_module, self._model, self._axes = model, config.model, mesh.axes
        self._stage = config.engine.zero_stage
        self._settings = deepspeed_config(config, mesh.axes, mesh.device.type)
        self._loss_factor = mesh.axes.batch.size * backward_passes(config, mesh.axes)
        self._part_shapes = state_shapes(model)
        mpu = ModelParallelUnit(mesh.axes) if mesh.axes.tensor.size * mesh.axes.context.size > 1 else None
        deepspeed.utils.groups.mpu = mpu  # else that of an earlier engine of this process
        init_weights(model, config.seed, device=mesh.device, after_part=self._divider(deepspeed, mpu))
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.module: Any = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optim),
            config=self._settings,
            mpu=mpu,
            dist_init_required=False,
        )[0]
        self._rounds = config.engine.weights == "bfloat16"
        if self._stage:
            self._create_moments()
        if self._rounds:
            self._set_initial_values(config.seed)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """DeepSpeed averages over ranks and micro-batches where this protocol sums, hence the factor."""
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss * self._loss_factor)

    def step(self, lr: float) -> StepResult:
        for group in self.module.optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            return self._step_without_zero()
        self.module.step()
        self._refresh_exact()
        return StepResult(float(self.module.get_global_grad_norm()), applied=self.module.was_step_applied())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        ranks = self._axes.tensor.size
        parts = self._part_shapes.items()
        return {name: whole_shape(parameter_of(name), shape, self._model, ranks) for name, shape in parts}

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self._bare_module.named_parameters():
            part = parameter.grad if self._stage == 0 else safe_get_full_grad(parameter)
            if part is not None:
                yield name, whole_of(name, part, self._model, self._axes.tensor)

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, part in self._export_parts():
            yield name, whole_of(parameter_of(name), part, self._model, self._axes.tensor)

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        axis = self._axes.tensor
        parts = {name: part_of(parameter_of(name), state[name], self._model, axis) for name in self._part_shapes}
        if self._stage == 0:
            load_module(self._bare_module, parts)
            load_moments(self._bare_module, self.module.optimizer, parts, steps)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        for partition in self._partitions():
            self.module.optimizer.optimizer.state[partition]["step"].fill_(float(steps))
        for name, buffer in persistent_buffers(self._bare_module):
            buffer.copy_(parts[name])
        parameters = dict(self._bare_module.named_parameters())
        for name in self._names:
            parameter = parameters[name]
            self._set_parameter(parameter, parts[f"model/{name}"].to(parameter.device))
            for moment in MOMENTS:
                value = parts[f"optim/{name}/{moment}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, moment)
        self._refresh_exact()

    def close(self) -> None:
        self.module.destroy()
        for parameter in self._bare_module.parameters():
            vars(parameter).clear()  # stage 3 leaves its groups there

    def _divider(self, deepspeed: Any, mpu: ModelParallelUnit | None) -> Any:
        """What divides a part of the model over the ranks as soon as it has its values; None below stage 3."""
        if self._stage < 3:
            return None
        group = self._axes.batch.process_group() if mpu is not None else None
        dtype = torch.bfloat16 if "bf16" in self._settings else torch.float32

        def divide(part: nn.Module) -> None:
            for parameter in part.parameters():
                parameter.data = parameter.data.to(dtype)  # DeepSpeed converts only what is made under its own Init
            deepspeed.zero.Init(
                module=part, data_parallel_group=group, config_dict_or_path=self._settings, dtype=dtype, mpu=mpu
            )

        return divide

    def _export_parts(self) -> Iterator[tuple[str, Tensor]]:
        """This tensor rank's part of every tensor."""
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

    def _set_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Give a parameter and the optimizer's copy of it a value [whole over data ranks], float32."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param

        if self._stage < 3:
            parameter.data.copy_(value)
        else:
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)

    def _set_initial_values(self, seed: int) -> None:
        """Undo the rounding that DeepSpeed's way through bfloat16 parameters left in the optimizer's values."""
        for name, parameter in self._bare_module.named_parameters():
            shape = self._part_shapes[f"model/{name}"]
            self._set_parameter(parameter, initial_part(self._bare_module, name, shape, seed).to(parameter.device))
        self._refresh_exact()

    @torch.no_grad()
    def _refresh_exact(self) -> None:
        """Leave the optimizer's float32 values of vectors beside their bfloat16 parameters (see `exact`)."""
        if not self._rounds:
            return
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter in self._bare_module.parameters():
            if not takes_weight_decay(parameter):
                parameter.exact = safe_get_full_fp32_param(parameter)  # type: ignore[attr-defined]

    def _create_moments(self) -> None:
        """Give every partition its moments now, as zeros, which is what AdamW starts from.

        ZeRO makes them in the first step and links them to the parameters after the first **group's** update, when a
        second group has none yet: reading or setting those of our undecayed parameters would fail ever after.
        """
        inner = self.module.optimizer.optimizer
        for partition in self._partitions():
            inner.state[partition] = {moment: torch.zeros_like(partition) for moment in MOMENTS}
            inner.state[partition]["step"] = torch.zeros((), device=partition.device)
        if self._stage < 3:
            self.module.optimizer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[Tensor]:
        """This rank's flat float32 partitions, which the inner optimizer updates."""
        outer = self.module.optimizer
        if self._stage == 3:
            return list(outer.fp32_partitioned_groups_flat)
        return [part for group in outer.optimizer.param_groups for part in group["params"]]

    def _step_without_zero(self) -> StepResult:
        """A step of stage 0, where DeepSpeed reports no norm; gradients are whole and summed over data ranks by now."""
        grad_norm = float(gradient_norm(self._bare_module.parameters(), self._axes.tensor))
        if math.isfinite(grad_norm):
            self.module.step()
        else:
            self.module.zero_grad()
        return StepResult(grad_norm, applied=math.isfinite(grad_norm))
