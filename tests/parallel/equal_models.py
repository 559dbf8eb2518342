"""Models divided over ranks against the same model on one rank, in float64, in one process each.

Every rank builds the whole model too, once for each case, so that nothing but the division differs.
"""

import functools
import json

import torch
import torch.distributed as dist

from dla_train.models import LanguageModel, init_weights, language_model
from dla_train.models.loss import next_token_loss
from dla_train.parallel import sections
from dla_train.parallel.axes import Axes
from dla_train.parallel.sections import part_of, whole_of
from tests.tiny import tiny_configs

LIMIT = 1e-9
"""Float64; sums in another order."""


def configs(backbone, policy, changes):
    changes = {name: value for name, value in changes.items() if name != "recompute"}
    return tiny_configs(backbone, policy, **{"num_heads": 8, "num_key_heads": 4, "mlp_width": 24, **changes})


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


def sample(packed):
    """tokens, targets [2, 24], and the edges of documents."""
    generator = torch.Generator().manual_seed(2)
    tokens, targets = (torch.randint(0, 17, (2, 24), generator=generator) for _ in range(2))
    targets[0, 3:5] = -100
    return tokens, targets, torch.tensor([0, 5, 24, 31, 32, 48]) if packed else None


@functools.cache
def of_one_rank(backbone, policy, packed, changes):
    """Loss, logits and gradients by name of the whole model."""
    whole = scattered(*configs(backbone, policy, json.loads(changes)), Axes.single())
    tokens, targets, cu_seqlens = sample(packed)
    logits = whole(tokens, cu_seqlens).logits
    loss = sum(next_token_loss(logits, targets, 1e-2)[:2])
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in whole.named_parameters()}
    return loss.detach(), logits.detach(), gradients


def differences(axes, backbone, policy, packed, changes="{}", bug=""):
    """Names of what differs: loss, logits and every parameter's gradient, "" for none; `bug` plants one."""
    loss, logits, gradients = of_one_rank(backbone, policy, packed, changes)
    changes = json.loads(changes)
    model, memory = configs(backbone, policy, changes)
    tokens, targets, cu_seqlens = sample(packed)

    if bug == "no sum of partial gradients":
        sections.sum_partial_gradients, kept = lambda *_, **__: None, sections.sum_partial_gradients
        language_model.sum_partial_gradients = sections.sum_partial_gradients
    lm = scattered(model, memory, axes, recompute=changes.get("recompute", False))
    if bug == "no sum of partial gradients":
        sections.sum_partial_gradients = language_model.sum_partial_gradients = kept
    if bug == "two sections swapped":
        projections = lm.blocks[0].mixer.backbone
        projections.a.weight.data, projections.b.weight.data = projections.b.weight.data, projections.a.weight.data
    if bug == "state crosses a document":
        cu_seqlens = cu_seqlens[[0, 2, 5]]
    output = lm(tokens, cu_seqlens)
    own_loss = sum(lm.token_loss(output.logits, targets, 1e-2)[:2])
    own_loss.backward()

    failures = []

    def compare(name, actual, wanted):
        error = (actual - wanted).abs().max().item() / max(1e-6, wanted.abs().max().item())
        if not error <= LIMIT:
            failures.append(f"{name}: {error:.2g}")

    total = own_loss.detach().clone()
    if axes.batch.size > 1:
        dist.all_reduce(total, group=axes.batch.group)
    compare("loss", total / axes.data.size, loss)
    compare("logits", whole_logits(output.logits.detach(), model, axes), logits)
    for name, parameter in lm.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if axes.batch.size > 1:
            dist.all_reduce(grad, group=axes.batch.group)
        grad = whole_of(name, grad, model, axes.tensor) / axes.data.size
        compare(f"d {name}", grad, gradients[name])
    return {"differ": "; ".join(failures)}


def whole_logits(part, model, axes):
    """[B, T, vocab] from the ranks' runs of tokens and rows of the vocabulary."""
    for axis, dim in ((axes.tensor, -1), (axes.context, 1)):
        if axis.size > 1:
            parts = [torch.empty_like(part) for _ in range(axis.size)]
            dist.all_gather(parts, part.contiguous(), group=axis.group)
            part = torch.cat(parts, dim=dim)
    return part[..., : model.vocab_size]


def carried(axes, backbone, changes="{}"):
    """Rows in two calls with the merge caches carried between them against rows in one; and the caches' bytes.

    The bytes are those of one rank, after 16 tokens, after 48, and after an optimizer step.
    """
    model, memory = configs(backbone, "dla", json.loads(changes))
    lm = scattered(model, memory, axes).eval()
    tokens = torch.randint(0, 17, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = lm(tokens, return_caches=True)
        first = lm(tokens[:, :16], return_caches=True)
        rest = lm(tokens[:, 16:], caches=first.caches)
    lm.train()
    lm(tokens).logits.sum().backward()
    torch.optim.SGD(lm.parameters(), 1e-3).step()
    after = lm.eval()(tokens, return_caches=True)
    parts = [whole_logits(part.logits, model, axes) for part in (first, rest)]
    error = (torch.cat(parts, dim=1) - whole_logits(whole.logits, model, axes)).abs().max()
    sizes = [float(sum(cache.nbytes for cache in output.caches)) for output in (first, whole, after)]
    empty = float(sum(cache.nbytes for cache in lm.empty_caches(2, 1)))
    return {"error": float(error), "after_16": sizes[0], "after_48": sizes[1], "after_a_step": sizes[2], "empty": empty}
