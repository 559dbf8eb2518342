"""Three optimizer steps of a divided model and engine against the local engine on one rank, in one process each.

Every rank walks the path of one rank too, once for each model, and keeps it. Both see the same rows; a divided run
takes its share of them, two a step, in micro-batches of one row. Three steps are the fewest in which moments are
begun, read and carried on, and two rows the fewest that accumulate: a rank's time is DeepSpeed's, a row at a time.
"""

import dataclasses
import functools
import json
import math
import warnings
from contextlib import closing

import torch
import torch.distributed as dist

from dla_train.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    LoggingConfig,
    MemoryConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)  # fmt: skip
from dla_train.config_rules import validate
from dla_train.data.batch import Batch
from dla_train.engine import LocalEngine, build_engine, gradients, zero_settings
from dla_train.logical_state import module_tensors
from dla_train.models.build import build_model, meta_model
from dla_train.parallel.axes import Axes
from dla_train.parallel.mesh import Mesh
from dla_train.parallel.sections import whole_of
from dla_train.segments import SegmentedForward, segments_of
from tests.parallel import ranks
from tests.parallel.equal_models import whole_logits
from tests.tiny import tiny_configs
from tests.tolerances import TRAINING

TOKENS, ROWS_OF_A_RANK, STEPS, KEPT = 24, 2, 3, (1, 3)
gradients.BUCKET_ELEMENTS = zero_settings.BUCKET_ELEMENTS = 700
zero_settings.LIVE_ELEMENTS, zero_settings.PREFETCH_ELEMENTS, zero_settings.PERSISTENT_ELEMENTS = 2000, 500, 20
"""So small that these models fill several buckets, some parameters fit in none, and stage 3 gathers and releases."""
EDGES = (0, 7, 8, 19)
"""Where documents begin in a row, if it is packed."""


SIZES = {
    "vocab_size": 40, "width": 16, "num_heads": 8, "num_key_heads": 4, "value_dim": 4, "mlp_width": 24, "init_std": 0.1,
}  # fmt: skip


def configuration(backbone, policy, changes, axes, stage, dtype, rows=None):
    """Of a run in the layout `axes` with DeepSpeed's `stage`, -1 for the local engine; two rows a rank by default."""
    model, memory = tiny_configs(backbone, policy, **SIZES)
    if memory.routes:
        memory.gain_init = 0.5
    if policy == "dla":  # in bfloat16 scores differ by hundredths between layouts: decide on more
        memory.tau = 1.1 if dtype == "float32" else 0.3
        memory.capacity_rule = MemoryConfig.capacity_rule if dtype == "float32" else "oldest"
    config = Config(
        name="tiny", run_dir="unused", seed=3, model=model, memory=memory,
        data=DataConfig(name="none", train=["none"], tokenizer="none", context_tokens=TOKENS),
        # A large epsilon: Adam divides by the root of the second moment, so that a gradient of rounding noise alone
        # would move its parameter by the whole learning rate, in a direction of its own.
        optim=OptimConfig(lr=2e-3, eps=1e-4, clip_norm=0.5, schedule="constant"),
        train=TrainConfig(
            steps=STEPS, global_batch_rows=rows or ROWS_OF_A_RANK * axes.data.size, micro_batch_rows=1, dtype=dtype,
            device=ranks.device.type,
        ),
        parallel=ParallelConfig(tensor=axes.tensor.size, sequence=axes.sequence, context=axes.context.size),
        engine=EngineConfig(name="local" if stage < 0 else "deepspeed", zero_stage=max(stage, 0)),
        checkpoint=CheckpointConfig(), logging=LoggingConfig(),
    )  # fmt: skip
    for key, value in changes.items():
        group, name = key.split(".")
        setattr(getattr(config, group), name, value)
    return config


def rows_of(step, rows, packed):
    """(tokens, targets) [rows, TOKENS] of a step, and the edges of each row's documents."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 40, (rows, TOKENS + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[step % rows, 3:5] = -100
    edges = torch.tensor([*(EDGES if packed else (0,)), TOKENS])
    return tokens[:, :-1].contiguous().to(ranks.device), targets.to(ranks.device), edges.to(ranks.device)


@dataclasses.dataclass
class Path:
    """What a run of STEPS steps went through, whole."""

    losses: list
    norms: list
    logits: torch.Tensor
    gradients: dict
    parameters: dict


def walk(engine, config, axes, packed):
    """Train STEPS steps -> Path; the gradient and the logits (of the last segment) are those of the first."""
    rows = config.train.global_batch_rows
    share = rows // axes.data.size
    own = range(axes.data.rank * share, (axes.data.rank + 1) * share)
    path = Path([], [], None, {}, {})
    for step in range(1, STEPS + 1):
        tokens, targets, edges = rows_of(step, rows, packed)
        count, total = (targets != -100).sum(), torch.zeros((), device=ranks.device)
        for row in own:
            forward = SegmentedForward(engine.module, ranks.device)
            batch = Batch(tokens[row : row + 1].cpu(), targets[row : row + 1].cpu(), edges.cpu())
            for segment in segments_of(batch, config.train.segment_tokens):
                logits, wanted = forward(segment, gate_temperature=0.5)
                nats, partition, _ = engine.module.token_loss(logits, wanted, 1e-2)
                loss = (nats + partition) / count
                engine.backward(loss, last=segment.last and row == own[-1])
                total += loss.detach()
            if step == 1 and row == 0:
                path.logits = whole_logits(logits.detach(), config.model, axes)
        if axes.batch.size > 1:
            dist.all_reduce(total, group=axes.batch.group)
        if step == 1:
            path.gradients = {name: gradient.detach().clone().float() for name, gradient in engine.gradients()}
        path.losses.append(float(total))
        path.norms.append(engine.step(2e-3).grad_norm)
        if step in KEPT:
            state = {name: tensor.clone() for name, tensor in engine.export_state()}
            path.parameters[step] = {n: t for n, t in state.items() if not n.endswith("statistics")}
    return path


@functools.cache
def of_one_rank(backbone, policy, packed, changes, dtype, rows):
    """The path of the local engine on one rank."""
    axes = Axes.single()
    changes = {key: value for key, value in json.loads(changes).items() if not key.startswith("engine.")}
    config = configuration(backbone, policy, changes, axes, -1, dtype, rows)
    alone = Mesh(rank=0, size=1, device=ranks.device, owns_group=False)
    return walk(LocalEngine(config, meta_model(config).train(), alone), config, axes, packed)


def differences(axes, backbone, policy, stage, packed=True, changes="{}", dtype="float32", bug=""):
    """Names of what differs from one rank, "" for none; beside it the largest errors of each kind. `bug` plants one."""
    warnings.simplefilter("ignore")  # DeepSpeed's own, of names that torch has deprecated
    config = configuration(backbone, policy, json.loads(changes), axes, stage, dtype)
    rows = config.train.global_batch_rows
    validate(config, dist.get_world_size())
    mesh = Mesh(dist.get_rank(), dist.get_world_size(), ranks.device, False, axes)
    with closing(build_engine(config, meta_model(config, axes).train(), mesh)) as engine:
        stored = {getattr(p, "ds_tensor", p).dtype for p in engine.module.parameters()}
        assert stored == {getattr(torch, config.engine.weights)}
        if bug == "no gradients of other rows":
            engine._sum.start = lambda: None
            engine._sum.finish = lambda: None
        if bug == "micro-batches averaged":
            engine._loss_factor = axes.batch.size
        if bug == "divided parameters unmarked":
            for parameter in engine._bare_module.parameters():
                parameter.tensor_model_parallel = False
        actual, wanted = walk(engine, config, axes, packed), of_one_rank(backbone, policy, packed, changes, dtype, rows)
        return compared(actual, wanted, config, axes, TRAINING[dtype]) | decisions(engine)


def compared(actual, wanted, config, axes, limit):
    """Every number of a path against one rank's."""
    errors, failures = {}, []

    def compare(kind, name, x, y, floor=1e-12):
        error = float((x - y).double().norm() / max(float(y.double().norm()), floor))
        errors[kind] = max(errors.get(kind, 0.0), error)
        if not error <= limit[kind]:
            failures.append(f"{kind} {name}: {error:.2g}")

    for step, (x, y) in enumerate(zip(actual.losses, wanted.losses, strict=True), 1):
        compare("loss", f"of step {step}", torch.tensor(x), torch.tensor(y))
    for step, (x, y) in enumerate(zip(actual.norms, wanted.norms, strict=True), 1):
        compare("norm", f"of step {step}", torch.tensor(x), torch.tensor(y))
    if axes.data.rank == 0:
        compare("logits", "", actual.logits.float(), wanted.logits.float())
    assert actual.gradients.keys() == wanted.gradients.keys()
    for name, y in wanted.gradients.items():
        compare("gradient", name, actual.gradients[name], y, floor=1e-3 * wanted.norms[0])
    for step in KEPT:
        assert actual.parameters[step].keys() == wanted.parameters[step].keys()
        for name, y in wanted.parameters[step].items():
            if name.startswith("model/"):
                compare("parameter", f"{name} after {step}", actual.parameters[step][name], y, floor=1e-2)
    return {"differ": "; ".join(failures), **errors}


def decisions(engine):
    """Share of this rank's tokens that began a slot, and live slots a token; {} without a memory."""
    boundaries, tokens, slots = engine.module.memory_statistics().sum(dim=(0, 1)).tolist()
    return {"boundary_rate": boundaries / tokens, "live_slots": slots / tokens} if tokens else {}


def initial_differences(axes, stage, weights):
    """Names of tensors that do not begin as the same bits as on one rank, "" for none."""
    warnings.simplefilter("ignore")
    changes = {"engine.weights": weights, "memory.tau_control": "learned"}
    config = configuration("gated_deltanet", "dla", changes, axes, stage, weights)
    mesh = Mesh(dist.get_rank(), dist.get_world_size(), ranks.device, False, axes)
    with closing(build_engine(config, meta_model(config, axes), mesh)) as engine:
        if stage < 0:
            state = ((name.removeprefix("model/"), tensor) for name, tensor in module_tensors(engine.module))
            state = ((name, whole_of(name, tensor, config.model, axes.tensor)) for name, tensor in state)
        else:
            state = ((n.removeprefix("model/"), t) for n, t in engine.export_state() if n.startswith("model/"))
        found = {name: tensor.clone() for name, tensor in state}
        expected = build_model(config, ranks.device).state_dict()
        assert found.keys() == expected.keys()
        return {"differ": "; ".join(name for name, tensor in expected.items() if not torch.equal(found[name], tensor))}


def poisoned(axes, stage, weights):
    """What differs, after three steps of which the second met gradients that are not finite, from the first and third.

    A NaN on rank 0 alone: "" where every rank left out the second step whole, and said so.
    """
    warnings.simplefilter("ignore")
    config = configuration("gated_deltanet", "dla", {"engine.weights": weights}, axes, stage, weights)
    mesh = Mesh(dist.get_rank(), dist.get_world_size(), ranks.device, False, axes)
    rows, first = config.train.global_batch_rows, axes.data.rank * ROWS_OF_A_RANK

    def state_after(steps):
        with closing(build_engine(config, meta_model(config, axes).train(), mesh)) as engine:
            for step in steps:
                poison = step == 2 and mesh.rank == 0
                tokens, targets, edges = rows_of(step, rows, packed=True)
                for row in (first, first + 1):
                    output = engine.module(tokens[row : row + 1], edges)
                    nats, _, count = engine.module.token_loss(output.logits, targets[row : row + 1])
                    engine.backward(nats / count * (float("nan") if poison else 1.0), last=row != first)
                result = engine.step(2e-3)
                assert result.applied == (step != 2) == math.isfinite(result.grad_norm), (step, result)
            return {name: tensor.clone() for name, tensor in engine.export_state() if not name.endswith("statistics")}

    expected, found = state_after((1, 3)), state_after((1, 2, 3))
    return {"differ": "; ".join(name for name, tensor in expected.items() if not torch.equal(found[name], tensor))}
