"""Parameter groups, the optimizer, and the schedules as pure functions of the step.

Weight decay applies to every parameter of two or more dimensions, the embedding and the head included (as in Megatron
and GPT-NeoX), except those a module marked with `no_weight_decay`; vectors (norms, biases, decays, thresholds) take
none. Nothing here keeps a counter: a resumed run reads its learning rate from the step alone.

Parameters that may not be negative (`Routing.non_negative`) are a group of their own, and every update ends by putting
those below 0 back on it. Without that, a gain that starts at 0 and is no use yet, because keys and queries are still
to be learnt, drifts below it for thousands of steps and has to climb all the way back before it can open.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from dla_train.config import MemoryConfig, OptimConfig


def takes_weight_decay(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices that are not marked `no_weight_decay`."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # one that ZeRO stage 3 has divided is itself empty
    return len(shape) >= 2 and not getattr(parameter, "no_weight_decay", False)


def non_negative_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that modules name in `non_negative`; none of them takes weight decay."""
    return [getattr(module, name) for module in model.modules() for name in getattr(module, "non_negative", ())]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The decayed, the undecayed and the non-negative group (`floor`), each in the order of `named_parameters`.

    An empty one is left out.
    """
    floored = {id(parameter) for parameter in non_negative_parameters(model)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    free = [parameter for parameter in parameters if id(parameter) not in floored]
    groups: list[dict[str, object]] = [
        {"params": [parameter for parameter in free if takes_weight_decay(parameter)], "weight_decay": weight_decay},
        {"params": [parameter for parameter in free if not takes_weight_decay(parameter)], "weight_decay": 0.0},
        {
            "params": [parameter for parameter in parameters if id(parameter) in floored],
            "weight_decay": 0.0,
            "floor": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`. The learning rate is set before every step, by the engine."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optim.weight_decay),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    optimizer.register_step_post_hook(_put_back)
    return optimizer


@torch.no_grad()
def _put_back(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Clamp groups that have a floor; under ZeRO their parameters are one flat part of the whole group."""
    for group in optimizer.param_groups:
        if "floor" in group:
            for parameter in group["params"]:
                parameter.clamp_(min=group["floor"])


def learning_rate(optim: OptimConfig, steps: int, step: int) -> float:
    """Learning rate of optimizer step `step` (1 to `steps`): linear warm-up, then the schedule.

    The warm-up reaches the peak at step `warmup_steps`; `cosine` and the linear decay of `wsd` reach
    `final_lr_ratio` of the peak at step `steps`.
    """
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "wsd":
        remaining = min(1.0, (steps - step) / optim.decay_steps)
        return optim.lr * (optim.final_lr_ratio + (1.0 - optim.final_lr_ratio) * remaining)
    passed = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * passed))
    return optim.lr * (optim.final_lr_ratio + (1.0 - optim.final_lr_ratio) * cosine)


def gate_temperature(memory: MemoryConfig, steps: int, step: int) -> float:
    """Temperature of the boundary gate at optimizer step `step` (1 to `steps`): linear from first to last."""
    passed = (step - 1) / max(1, steps - 1)
    return memory.gate_temperature + (memory.gate_temperature_final - memory.gate_temperature) * passed
