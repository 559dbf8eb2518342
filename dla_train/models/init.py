r"""Initialisation: one table, and every parameter a pure function of (seed, logical name).

The table (`RULES`, first match wins; D model width, L layers, s = model.init_std):

| parameter (end of its name)                     | distribution                            | scale                  |
|-------------------------------------------------|-----------------------------------------|------------------------|
| `*norm.weight`, `*.norm.D`                      | constant                                | 1                      |
| `mixer.out.weight`, `mixer.backbone.out.weight`, `mlp.down.weight` | normal               | std s / sqrt(2 L)      |
| `backbone.conv.bias_*`                          | constant                                | 0                      |
| `backbone.conv.*`, `routing.conv.*`             | uniform in +-1/sqrt(W), W taps          |                        |
| `backbone.decay.A_log`                          | log of uniform in [1, 16]               |                        |
| `backbone.decay.dt_bias`                        | inverse softplus of log-uniform in [1e-3, 1e-1] |                |
| `reader.slots.weight`, `reader.slots.bias`      | constant                                | 0 (read weights are 1) |
| `reader.tau.theta`, `reader.tau.value`          | constant                                | memory.tau             |
| `reader.routing.gain`                           | constant                                | memory.gain_init       |
| `reader.routing.log_sharpness`                  | constant                                | log sharpness_init     |
| every other matrix (embedding, head, projections) | normal                                | std s                  |
| `mixer.statistics`                              | constant                                | 0                      |

Residual outputs are scaled down by sqrt(2 L) so that the residual stream's variance does not grow with depth
(GPT-2). A_log and dt_bias as published with Mamba and Mamba-2. Values come from a generator on the CPU seeded by a
hash of seed and name, in float32, and are then moved: any device, any order of construction and any sharding (a
slice of the whole) starts from the same numbers.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dla_train.config import TAU_RANGE, MemoryConfig, ModelConfig
from dla_train.models.language_model import LanguageModel
from dla_train.models.linear import no_decay
from dla_train.parallel.sections import part_of, whole_shape

Rule = Callable[[tuple[int, ...], torch.Generator, ModelConfig, MemoryConfig], Tensor]


class InitError(ValueError):
    """A parameter that the table of initialisation does not cover."""


def _constant(value: Callable[[ModelConfig, MemoryConfig], float]) -> Rule:
    return lambda shape, generator, model, memory: torch.full(shape, float(value(model, memory)))


def _normal(std: Callable[[ModelConfig], float]) -> Rule:
    return lambda shape, generator, model, memory: torch.empty(shape).normal_(0.0, std(model), generator=generator)


def _conv_taps(shape: tuple[int, ...], generator: torch.Generator, model: ModelConfig, memory: MemoryConfig) -> Tensor:
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _decay_rates(
    shape: tuple[int, ...], generator: torch.Generator, model: ModelConfig, memory: MemoryConfig
) -> Tensor:
    return torch.empty(shape).uniform_(1.0, 16.0, generator=generator).log()


def _step_bias(shape: tuple[int, ...], generator: torch.Generator, model: ModelConfig, memory: MemoryConfig) -> Tensor:
    dt = torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
    return dt + torch.log(-torch.expm1(-dt))


def _tau_logit(model: ModelConfig, memory: MemoryConfig) -> float:
    """theta for which the bounded threshold equals memory.tau; a tau on a bound is taken just inside it."""
    low, high = TAU_RANGE
    share = min(max((memory.tau - low) / (high - low), 1e-3), 1 - 1e-3)
    return math.log(share / (1 - share))


_residual = _normal(lambda model: model.init_std / math.sqrt(2 * model.num_layers))
_matrix = _normal(lambda model: model.init_std)
_one, _zero = _constant(lambda model, memory: 1.0), _constant(lambda model, memory: 0.0)

RULES: tuple[tuple[str, Rule], ...] = (
    ("*norm.weight", _one),
    ("*.norm.D", _one),
    ("*.mixer.out.weight", _residual),
    ("*.mixer.backbone.out.weight", _residual),
    ("*.mlp.down.weight", _residual),
    ("*.backbone.conv.bias_*", _zero),
    ("*.backbone.conv.*", _conv_taps),
    ("*.routing.conv.*", _conv_taps),
    ("*.backbone.decay.A_log", _decay_rates),
    ("*.backbone.decay.dt_bias", _step_bias),
    ("*.reader.slots.*", _zero),
    ("*.reader.tau.theta", _constant(_tau_logit)),
    ("*.reader.tau.value", _constant(lambda model, memory: memory.tau)),
    ("*.reader.routing.gain", _constant(lambda model, memory: memory.gain_init)),
    ("*.reader.routing.log_sharpness", _constant(lambda model, memory: math.log(memory.sharpness_init))),
    ("*.mixer.statistics", _zero),
    ("embedding.weight", _matrix),
    ("head.weight", _matrix),
    ("*.mlp.gate.weight", _matrix),
    ("*.mlp.up.weight", _matrix),
    *((f"*.mixer.{name}.weight", _matrix) for name in ("q", "k", "v")),
    *((f"*.backbone.{name}.weight", _matrix) for name in ("q", "k", "v", "a", "b", "gate", "z", "x", "B", "C", "dt")),
    *((f"*.routing.{name}.weight", _matrix) for name in ("rho", "kappa")),
)
"""Pattern of a logical name -> how its value is drawn; first match wins."""


def name_seed(seed: int, name: str) -> int:
    """Seed of one parameter's generator: 63 bits of a hash of (seed, name)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def initial_value(name: str, shape: tuple[int, ...], seed: int, model: ModelConfig, memory: MemoryConfig) -> Tensor:
    """The whole initial tensor of parameter or buffer `name`, float32 on the CPU; InitError if no rule covers it."""
    for pattern, rule in RULES:
        if fnmatch.fnmatchcase(name, pattern):
            generator = torch.Generator(device="cpu").manual_seed(name_seed(seed, name))
            with torch.device("cpu"):
                return rule(shape, generator, model, memory)
    raise InitError(
        f"no rule initialises {name!r} of shape {list(shape)}; add one to RULES in dla_train/models/init.py"
    )


@torch.no_grad()
def init_weights(
    model: LanguageModel,
    seed: int,
    *,
    device: torch.device | str | None = None,
    after_part: Callable[[nn.Module], None] | None = None,
) -> LanguageModel:
    """Fill every parameter and buffer of `model` in place; a meta model is first given storage on `device` (CPU).

    Goes through the model part by part (embedding, every block, final norm, head). after_part: called with each part
    once it has its values, as by an engine that divides the parameters: no rank then holds more than a part whole.
    Returns the model. Raises InitError for a parameter without a rule, before anything is written.
    """
    named = dict(_named_tensors(model))
    for name in named:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in RULES):
            raise InitError(f"no rule initialises {name!r}; add one to RULES in dla_train/models/init.py")
    without_storage = any(tensor.is_meta for tensor in named.values())
    for prefix, part in _parts(model):
        if without_storage:
            _give_storage(part, device if device is not None else "cpu")
        for name, tensor in _named_tensors(part):
            tensor.copy_(initial_part(model, f"{prefix}.{name}", tuple(tensor.shape), seed))
        if after_part is not None:
            after_part(part)
    if without_storage:
        model.mark_parameters()
    return model


def initial_part(model: LanguageModel, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """What this rank's part, of `shape`, of parameter or buffer `name` begins as: a slice of `initial_value`."""
    config, axis = model.model_config, model.axes.tensor
    whole = initial_value(name, whole_shape(name, shape, config, axis.size), seed, config, model.memory_config)
    return part_of(name, whole, config, axis)


def _parts(model: LanguageModel) -> list[tuple[str, nn.Module]]:
    """Modules that own every parameter between them, by name: the model's children, and block by block its blocks."""
    return [
        (f"{name}.{index}", block) if isinstance(child, nn.ModuleList) else (name, child)
        for name, child in model.named_children()
        for index, block in (child.named_children() if isinstance(child, nn.ModuleList) else (("", child),))
    ]


def _give_storage(part: nn.Module, device: torch.device | str) -> None:
    undecayed = {name for name, tensor in part.named_parameters() if getattr(tensor, "no_weight_decay", False)}
    part.to_empty(device=device)  # makes new Parameters, without their marks
    for name, parameter in part.named_parameters():
        if name in undecayed:
            no_decay(parameter)


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
