"""Read weights in Triton against the PyTorch path in float64, given the same plan: values and gradients by name."""

import dataclasses
import functools

import pytest
import torch
from kernel_cases import PACKED, make_case, plan_options
from tolerances import RMS_FLOAT32, RMS_HALF, assert_rms_close

import dla_kernels as dk
from dla_kernels.inputs import to_chunks
from dla_kernels.launch import override_tuning
from dla_kernels.memory import affinity_triton, gates_triton, table_triton
from dla_kernels.memory.affinity import carried_key_sums, chunk_affinity
from dla_kernels.memory.gates import gate_read_weights
from dla_kernels.memory.slots import chunk_slots
from dla_kernels.memory.table import slot_table
from dla_kernels.plan import NEVER
from dla_kernels.tuning import TUNING
from tests.rounding import rounding_as_a_gpu

PLANS = ("log_linear", "fixed", "dla", "dla packed", "dla carried", "dla carried packed", "log_linear carried")


def carried_case(policy, *, split=20, tokens=45, packed=False, **shape):
    """(plan of the tokens after `split`, the cache before them)."""
    case = make_case("gated_deltanet", key_heads=1, tokens=tokens, **shape)
    options = plan_options(policy)
    first = dk.plan_memory(*case.tokens(0, split).keys, **options)
    cut = case.tokens(0, split)
    ones = torch.ones(*cut.v.shape[:3], first.capacity, dtype=torch.float64)
    gates = torch.rand(cut.v.shape[:3], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    _, cache = dk.dla_attention(
        *cut.all, read_weights=ones, plan=first, gates=gates, routing_keys=cut.k, return_cache=True
    )
    rest = tokens - split
    documents = [0, 9, rest, rest + 3, 2 * rest] if shape.get("batch", 2) > 1 else [0, 9, rest]
    return dk.plan_memory(
        *case.tokens(split, tokens).keys, **options, cu_seqlens=torch.tensor(documents) if packed else None, cache=cache
    ), cache


@functools.cache
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


def carried_gates_of(cache):
    return None if cache is None else cache.gates.clone().requires_grad_()


@pytest.mark.parametrize("name, chunk", [*((name, 16) for name in PLANS), ("dla carried packed", 32), ("dla", 20)])
def test_gated_weights_and_their_gradients_equal_pytorch(name, chunk):
    plan, cache = make_plan(name)
    shape = plan.boundary.shape
    weights, gates = random(*shape, plan.capacity).requires_grad_(), random(*shape, seed=2).requires_grad_()
    carried = carried_gates_of(cache)
    leaves = [x for x in (weights, gates, carried) if x is not None]
    expected = gate_read_weights(weights.transpose(1, 2), gates.transpose(1, 2), plan, carried, chunk).transpose(1, 2)
    upstream = random(*expected.shape, seed=3) - 0.5
    d_expected = torch.autograd.grad(expected, leaves, upstream)

    singles = [poisoned(x.detach()).requires_grad_() for x in leaves]
    gated = gates_triton.gate_read_weights_triton(singles[0], singles[1], slot_table(plan, chunk), *singles[2:])
    assert_rms_close("weights", gated, expected, RMS_FLOAT32)
    gradients = torch.autograd.grad(gated, singles, poisoned(upstream))
    for name, a, b in zip(("dweights", "dgates", "dcarried_gates"), gradients, d_expected, strict=False):
        assert b.abs().max() > 0.05
        assert_rms_close(name, a, b, RMS_FLOAT32)


def test_a_gate_is_moved_by_reads_of_later_chunks():
    """A boundary of the first chunk that lives on: tokens of the third alone read across it."""
    plan, _ = make_plan("dla")
    gates = random(*plan.boundary.shape, seed=2).float().requires_grad_()
    weights = random(*plan.boundary.shape, plan.capacity).float()
    gated = gates_triton.gate_read_weights_triton(weights, gates, slot_table(plan, 16))
    (d_gates,) = torch.autograd.grad(gated[:, 32:].sum(), gates)
    assert d_gates[:, :16].abs().max() > 0.05


def test_gates_of_1_leave_the_weights_as_they_are():
    plan, _ = make_plan("dla")
    weights = random(*plan.boundary.shape, plan.capacity).float()
    gated = gates_triton.gate_read_weights_triton(weights, torch.ones(plan.boundary.shape), slot_table(plan, 16))
    assert torch.equal(gated, weights)


@pytest.mark.parametrize("slots", [1, 3, 12])
def test_content_weights_and_their_gradients_equal_pytorch(slots):
    shape = (2, 11, 3, slots)
    slot, affinity = random(*shape), 4 * random(*shape, seed=2) - 2
    affinity[:, :5, :, slots // 2 :] = float("-inf")
    affinity[:, 0] = float("-inf")
    gain, sharpness = random(3, seed=3), 8 * random(3, seed=4)
    leaves = [x.requires_grad_() for x in (slot, affinity, gain, sharpness)]
    expected = dk.content_read_weights(slot, affinity, gain=gain, sharpness=sharpness)
    upstream = random(*shape, seed=5) - 0.5
    d_expected = torch.autograd.grad(expected, leaves, upstream)

    singles = [poisoned(x.detach()).requires_grad_() for x in leaves]
    weights = gates_triton.content_read_weights_triton(*singles)
    assert_rms_close("weights", weights, expected, RMS_FLOAT32)
    gradients = torch.autograd.grad(weights, singles, poisoned(upstream))
    for name, a, b in zip(("dslot", "daffinity", "dgain", "dsharpness"), gradients, d_expected, strict=True):
        assert_rms_close(name, a, b, RMS_FLOAT32)


def test_a_content_gain_of_0_gives_the_slot_weights_exactly():
    slot, affinity = random(2, 9, 3, 5).float(), 40 * random(2, 9, 3, 5, seed=2).float()
    weights = gates_triton.content_read_weights_triton(slot, affinity, torch.zeros(3), torch.full((3,), 16.0))
    assert torch.equal(weights, slot)


def affinity_inputs(plan, cache, groups, dim):
    """float64 leaves rho, kappa and, with a cache, its key sums."""
    batch, tokens, heads = plan.boundary.shape
    rho = random(batch, tokens, groups[0], dim, seed=2) - 0.4
    kappa = random(batch, tokens, groups[1], dim, seed=3) - 0.4
    leaves = [rho, kappa]
    if cache is not None:
        used = torch.arange(plan.capacity) < plan.carried_fill[..., None]
        leaves.append(torch.where(used[..., None], random(batch, heads, plan.capacity, dim, seed=4), 0.0))
    return [x.requires_grad_() for x in leaves]


def expected_affinity(leaves, plan, chunk):
    heads = plan.boundary.shape[2]
    rho, kappa = (x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for x in leaves[:2])
    return chunk_affinity(rho, kappa, plan, leaves[2] if len(leaves) > 2 else None, chunk).transpose(1, 2)


AFFINITY_CASES = [
    *((name, 16, (1, 1), 8, {}) for name in PLANS),
    ("dla", 16, (2, 2), 20, {}),
    ("dla carried packed", 16, (4, 2), 5, {"heads": 4, "batch": 1}),
    ("dla", 20, (2, 4), 18, {"heads": 4, "batch": 1, "tokens": 30}),
    *(("dla", 16, (1, 1), 8, {"tokens": tokens, "batch": 1}) for tokens in (1, 15, 16, 17)),
]


def check_affinity(name, chunk, groups, dim, shape):
    plan, cache = make_plan(name, **shape)
    leaves = affinity_inputs(plan, cache, groups, dim)
    expected = expected_affinity(leaves, plan, chunk)
    live = expected > float("-inf")
    upstream = random(*expected.shape, seed=6) - 0.5
    d_expected = torch.autograd.grad(expected.masked_fill(~live, 0.0), leaves, upstream)

    singles = [poisoned(x.detach()).requires_grad_() for x in leaves]
    affinity = affinity_triton.chunk_affinity_triton(singles[0], singles[1], slot_table(plan, chunk), *singles[2:])
    assert torch.equal(affinity > float("-inf"), live)
    assert_rms_close("affinity", affinity.masked_fill(~live, 0.0), expected.masked_fill(~live, 0.0), RMS_FLOAT32)
    # What comes back for ranks without a slot is nobody's.
    gradients = torch.autograd.grad(affinity, singles, upstream.masked_fill(~live, float("nan")).float())
    for name, a, b in zip(("drho", "dkappa", "dkey_sums"), gradients, d_expected, strict=False):
        assert_rms_close(name, a, b, RMS_FLOAT32)


@pytest.mark.parametrize("name, chunk, groups, dim, shape", AFFINITY_CASES)
def test_affinities_and_their_gradients_equal_pytorch(name, chunk, groups, dim, shape):
    check_affinity(name, chunk, groups, dim, shape)


def test_affinities_in_several_blocks_of_columns_tokens_and_heads_equal_pytorch():
    """32 tokens in blocks of 16, 20 columns in blocks of 16, gradients of 3 heads that share a key in parts of 2."""
    small = {"BR": 16, "BT": 16, "GROUP": 2}
    kernels = [name for name in TUNING if name.startswith(("affinity_", "key_sums_"))]
    sizes = {kernel: {k: v for k, v in small.items() if k in TUNING[kernel][90]} for kernel in kernels}
    with override_tuning(**sizes):
        check_affinity("dla carried packed", 32, (1, 1), 20, {"heads": 3, "tokens": 56, "batch": 1})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_affinities_of_16_bit_inputs_are_within_their_rounding(dtype):
    plan, _ = make_plan("dla")
    leaves = [x.detach().to(dtype).double().requires_grad_() for x in affinity_inputs(plan, None, (1, 2), 8)]
    expected = expected_affinity(leaves, plan, 16)
    live = expected > float("-inf")
    upstream = random(*expected.shape, seed=6) - 0.5
    d_expected = torch.autograd.grad(expected.masked_fill(~live, 0.0), leaves, upstream)
    halves = [poisoned(x.detach(), dtype).requires_grad_() for x in leaves]
    with rounding_as_a_gpu():
        affinity = affinity_triton.chunk_affinity_triton(*halves, slot_table(plan, 16))
        gradients = torch.autograd.grad(affinity, halves, upstream.float())
    assert affinity.dtype == torch.float32
    assert_rms_close("affinity", affinity.masked_fill(~live, 0.0), expected.masked_fill(~live, 0.0), RMS_HALF["o"])
    for name, limit, a, b in zip(("drho", "dkappa"), ("dq", "dk"), gradients, d_expected, strict=True):
        assert a.dtype == dtype
        assert_rms_close(name, a, b, RMS_HALF[limit])


@pytest.mark.parametrize("name", PLANS)
def test_the_last_key_sums_and_their_gradients_equal_pytorch(name):
    plan, cache = make_plan(name)
    _, *leaves = affinity_inputs(plan, cache, (1, 1), 8)
    keys = to_chunks(leaves[0].repeat_interleave(2, 2).transpose(1, 2), 16)
    expected = carried_key_sums(keys, chunk_slots(plan, 16), plan.capacity, *(leaves[1:] or [None]))[:, :, -1]
    d_expected = torch.autograd.grad(expected.sin().sum(), leaves)
    singles = [poisoned(x.detach()).requires_grad_() for x in leaves]
    sums = affinity_triton.final_key_sums(singles[0], slot_table(plan, 16), *singles[1:], block_tokens=7)
    assert_rms_close("key sums", sums, expected, RMS_FLOAT32)
    for name, a, b in zip(
        ("dkappa", "dkey_sums"), torch.autograd.grad(sums.sin().sum(), singles), d_expected, strict=False
    ):
        assert_rms_close(name, a, b, RMS_FLOAT32)
