"""Run by torchrun: models divided over ranks against the same model on one rank, in float64, in one process each.

Every rank builds the whole model too, so that nothing but the division differs: outputs, loss and every parameter's
gradient by name. Prints one JSON line per rank: the failures.
"""

import dataclasses
import json
import os
import sys
import traceback

import torch
import torch.distributed as dist

from dla_train.config import MemoryConfig, ModelConfig
from dla_train.models import LanguageModel, init_weights
from dla_train.models.loss import next_token_loss
from dla_train.parallel.axes import Axes
from dla_train.parallel.mesh import start_axes
from dla_train.parallel.sections import part_of, whole_of

LIMIT = 1e-9
"""Float64; sums in another order."""


def configs(backbone, policy, changes):
    model = ModelConfig(
        name="tiny", backbone=backbone, vocab_size=17, width=12, num_layers=2, num_heads=8, num_key_heads=4, key_dim=4,
        value_dim=4 if backbone == "attention" else 6, mlp_width=24, conv_width=0 if backbone == "attention" else 4,
    )  # fmt: skip
    reads = {"none": "unit", "single": "unit", "log_linear": "slot"}
    memory = MemoryConfig(
        policy=policy, capacity={"single": 1, "log_linear": 8}.get(policy, 4), read=reads.get(policy, "content"),
        levels=5, interval_tokens=3,
    )  # fmt: skip
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    model = dataclasses.replace(model, **{k: v for k, v in changes.items() if k in names})
    return model, dataclasses.replace(memory, **{k: v for k, v in changes.items() if k not in names | {"recompute"}})


def scattered(model, memory, axes, recompute=False):
    """Every parameter off its initial value, the same numbers at every layout."""
    lm = init_weights(LanguageModel(model, memory, compute_dtype=torch.float64, axes=axes, recompute=recompute), 0)
    lm.double()
    reference = init_weights(LanguageModel(model, memory, compute_dtype=torch.float64), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        own = dict(lm.named_parameters())
        for name, whole in reference.named_parameters():
            shift = 0.3 * torch.randn(whole.shape, generator=generator, dtype=torch.float64)
            shift = shift.abs() if name.endswith("routing.gain") else shift
            own[name].add_(part_of(name, shift, model, axes.tensor))
    return lm.train()


def check(backbone, policy, changes, axes, packed):
    model, memory = configs(backbone, policy, changes)
    generator = torch.Generator().manual_seed(2)
    tokens, targets = (torch.randint(0, 17, (2, 24), generator=generator) for _ in range(2))
    targets[0, 3:5] = -100
    cu_seqlens = torch.tensor([0, 5, 24, 31, 32, 48]) if packed else None

    whole = scattered(model, memory, Axes.single())
    expected = whole(tokens, cu_seqlens)
    loss = sum(next_token_loss(expected.logits, targets, 1e-2)[:2])
    loss.backward()

    lm = scattered(model, memory, axes, recompute=changes.get("recompute", False))
    time = slice(None)
    if axes.context.size > 1:
        length = 24 // axes.context.size
        time = slice(axes.context.rank * length, (axes.context.rank + 1) * length)
    output = lm(tokens[:, time], cu_seqlens)
    own_loss = sum(lm.token_loss(output.logits, targets[:, time], 1e-2)[:2])
    own_loss.backward()

    failures = []

    def compare(name, actual, wanted):
        error = (actual - wanted).abs().max().item() / max(1e-6, wanted.abs().max().item())
        if not error <= LIMIT:
            failures.append(f"{name}: {error:.2g}")

    total = own_loss.detach().clone()
    if axes.batch.size > 1:
        dist.all_reduce(total, group=axes.batch.group)
    compare("loss", total / axes.data.size, loss.detach())
    logits = whole_of("head.weight", output.logits.detach().flatten(0, 1).contiguous(), model, axes.tensor)
    del logits
    wanted = dict(whole.named_parameters())
    for name, parameter in lm.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if axes.batch.size > 1:
            dist.all_reduce(grad, group=axes.batch.group)
        grad = whole_of(name, grad, model, axes.tensor) / axes.data.size
        expected_grad = wanted[name].grad
        compare(f"d {name}", grad, torch.zeros_like(wanted[name]) if expected_grad is None else expected_grad)
    return failures


RECURRENT = [(b, p) for b in ("mamba2", "gated_deltanet") for p in ("single", "log_linear", "fixed", "dla")]
VARIANTS = (
    {"num_key_heads": 1},
    {"closed_slots": "frozen", "recompute": True},
    {"routing": "projected", "routing_dim": 3, "tie_embeddings": True},
    {"tau_control": "learned", "conv_width": 0},
)


def main():
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    layouts = {
        2: ((2, 1, False), (2, 1, True), (1, 2, False)),
        4: ((2, 2, False), (2, 2, True), (4, 1, True), (1, 4, False), (2, 1, True)),
    }[size]
    failures = {}
    for tensor, context, sequence in layouts:
        axes = start_axes(tensor, context, sequence)
        cases = [(b, p, {}) for b, p in [*RECURRENT, ("attention", "none")]]
        cases += [(b, "dla", v) for b in ("mamba2", "gated_deltanet") for v in VARIANTS]
        if size == 4:
            cases = [c for c in cases if c[1] in ("dla", "none")]
        for backbone, policy, changes in cases:
            for packed in (False, True):
                name = f"tensor={tensor} context={context} sequence={sequence} {backbone} {policy} {changes} {packed=}"
                try:
                    found = check(backbone, policy, changes, axes, packed)
                except Exception:
                    found = [traceback.format_exc()[-600:]]
                if found:
                    failures[name] = found
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    print("RESULT " + json.dumps({"rank": dist.get_rank(), "failures": failures}), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.exit(main())
