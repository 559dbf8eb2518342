"""Read weights in Triton against the PyTorch path in float64, given the same plan: values and gradients by name."""

import dataclasses

import pytest
import torch
from kernel_cases import PACKED, make_case, plan_options
from tolerances import RMS_FLOAT32, assert_rms_close

import dla_kernels as dk
from dla_kernels.inputs import to_chunks
from dla_kernels.memory import gates_triton, table_triton
from dla_kernels.memory.slots import chunk_slots
from dla_kernels.memory.table import slot_table
from dla_kernels.plan import NEVER

PLANS = ("log_linear", "fixed", "dla", "dla packed", "dla carried", "dla carried packed", "log_linear carried")


def carried_case(policy, *, split=20, tokens=45, heads=2, packed=False):
    """(plan of the tokens after `split`, the cache before them)."""
    case = make_case("gated_deltanet", key_heads=1, heads=heads, tokens=tokens)
    options = plan_options(policy)
    first = dk.plan_memory(*case.tokens(0, split).keys, **options)
    cut = case.tokens(0, split)
    ones = torch.ones(*cut.v.shape[:3], first.capacity, dtype=torch.float64)
    gates = torch.rand(cut.v.shape[:3], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    _, cache = dk.dla_attention(
        *cut.all, read_weights=ones, plan=first, gates=gates, routing_keys=cut.k, return_cache=True
    )
    rest = tokens - split
    documents = torch.tensor([0, 9, rest, rest + 3, 2 * rest]) if packed else None
    return dk.plan_memory(*case.tokens(split, tokens).keys, **options, cu_seqlens=documents, cache=cache), cache


def make_plan(name, **shape):
    """(plan, carried cache or None)."""
    policy, *flags = name.split()
    if "carried" in flags:
        return carried_case(policy, packed="packed" in flags, **shape)
    case = make_case("gated_deltanet", key_heads=1, **shape)
    return dk.plan_memory(*case.keys, **plan_options(policy), cu_seqlens=PACKED if "packed" in flags else None), None


def random(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def poisoned(x, dtype=torch.float32):
    """`x` as a strided view of a larger buffer of NaN."""
    buffer = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=dtype)
    buffer[..., 1:-2] = x.to(dtype)
    return buffer[..., 1:-2]


@pytest.fixture(autouse=True)
def nan_outputs(monkeypatch):
    """What kernels allocate holds NaN until they write it."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-(10**6))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.mark.parametrize("name", PLANS)
def test_the_table_equals_the_one_derived_in_pytorch(name):
    plan, _ = make_plan(name)
    for chunk in (16, 20, 64):
        expected, table = slot_table(plan, chunk), table_triton.slot_table_triton(plan, chunk)
        for field in ("start", "death", "fill", "token_death", "document_start"):
            assert torch.equal(getattr(table, field), getattr(expected, field)), field
        assert table.chunk == chunk


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_the_table_of_a_short_row_equals_the_one_derived_in_pytorch(tokens):
    plan, _ = make_plan("dla", tokens=tokens, batch=1)
    expected, table = slot_table(plan, 16), table_triton.slot_table_triton(plan, 16)
    for field in ("start", "death", "fill", "token_death"):
        assert torch.equal(getattr(table, field), getattr(expected, field)), field


def test_a_plan_with_too_many_slots_writes_no_further_than_its_rows():
    plan, _ = make_plan("dla", batch=1)
    crowded = dataclasses.replace(
        plan, death=torch.where(plan.boundary, NEVER, plan.death), table_by_chunk={}, slots_by_chunk={}
    )
    with pytest.raises(ValueError, match="more than its capacity"):
        slot_table(crowded, 16)
    table = table_triton.slot_table_triton(crowded, 16)
    boundaries = plan.boundary[0].T.nonzero()
    for head in range(2):
        first = boundaries[boundaries[:, 0] == head][:4, 1]
        assert torch.equal(table.start[0, head, -1], first.int())
        assert table.fill[0, head, -1] == 4


def weights_of_old_slots(weights, plan, chunk):
    """[B, H, N, S, C] in PyTorch."""
    slots = chunk_slots(plan, chunk)
    by_rank = to_chunks(weights.transpose(1, 2), chunk)
    return (by_rank.gather(-1, slots.rank_slot) * slots.reads_slot).transpose(-1, -2)


@pytest.mark.parametrize("chunk", [16, 32])
@pytest.mark.parametrize("name", PLANS)
def test_weights_by_old_slot_and_their_gradient_equal_the_ranks_of_the_plan(name, chunk):
    plan, _ = make_plan(name)
    batch, tokens, heads = plan.boundary.shape
    weights = random(batch, tokens, heads, plan.capacity).requires_grad_()
    expected = weights_of_old_slots(weights, plan, chunk)
    upstream = random(*expected.shape, seed=2)
    (d_expected,) = torch.autograd.grad(expected, weights, upstream)

    table = slot_table(plan, chunk)
    by_slot = gates_triton.slot_weights_by_slot(poisoned(weights.detach()), table)
    assert torch.equal(by_slot, expected.detach().float())
    before = random(*weights.shape, seed=3)
    d_weights = before.float()
    gates_triton.add_slot_weight_gradients(poisoned(upstream), d_weights, table)
    assert_rms_close("dweights", d_weights, d_expected + before, RMS_FLOAT32)
