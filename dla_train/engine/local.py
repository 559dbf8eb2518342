"""Plain PyTorch: AdamW on every rank, float32 parameters and gradients, no state divided over data ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dla_train.config import Config
from dla_train.engine.gradients import GradientSum, gradient_norm
from dla_train.engine.protocol import StepResult
from dla_train.logical_state import (
    load_module,
    load_moments,
    module_tensors,
    moments,
    parameter_of,
    state_shapes,
)
from dla_train.models.init import init_weights
from dla_train.models.language_model import LanguageModel
from dla_train.optim import build_optimizer
from dla_train.parallel.mesh import Mesh
from dla_train.parallel.sections import part_of, whole_of, whole_shape


class LocalEngine:
    """An engine (see protocol.py) that sums gradients over data and context ranks while backward runs."""

    def __init__(self, config: Config, model: LanguageModel, mesh: Mesh) -> None:
        init_weights(model, config.seed, device=mesh.device)
        self.module: Any = model
        self._model, self._tensor = config.model, mesh.axes.tensor
        self._optimizer = build_optimizer(model, config.optim)
        self._clip_norm = config.optim.clip_norm
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        batch = mesh.axes.batch
        self._sum = GradientSum(self._parameters, batch) if batch.size > 1 else None

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if last and self._sum is not None:
            self._sum.start()
        loss.backward()
        if last:
            self._complete_gradients()

    def step(self, lr: float) -> StepResult:
        total = gradient_norm(self._parameters, self._tensor)
        grad_norm = float(total)  # of all ranks' gradients: the same number everywhere
        if math.isfinite(grad_norm):
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm or float("inf"), total)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        if self._sum is None:
            self._optimizer.zero_grad(set_to_none=True)
        else:
            self._sum.clear()
        return StepResult(grad_norm, applied=math.isfinite(grad_norm))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        parts = state_shapes(self.module).items()
        return {name: whole_shape(parameter_of(name), shape, self._model, self._tensor.size) for name, shape in parts}

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                yield name, whole_of(name, parameter.grad, self._model, self._tensor)

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        for source in (module_tensors(self.module), moments(self.module, self._optimizer)):
            for name, tensor in source:
                yield name, whole_of(parameter_of(name), tensor, self._model, self._tensor)

    def import_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        parts = {name: part_of(parameter_of(name), state[name], self._model, self._tensor) for name in self.shapes()}
        load_module(self.module, parts)
        load_moments(self.module, self._optimizer, parts, steps)

    def close(self) -> None:
        """Nothing: what it holds goes with it."""

    def _complete_gradients(self) -> None:
        """Every parameter has a gradient now, which is that of all ranks; one that was not made is zero."""
        if self._sum is not None:
            self._sum.finish()
            return
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
