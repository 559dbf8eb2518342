"""Mixing in Triton against the chunkwise form in float64, from the same operators, weights and plan."""

import pytest
import torch
from kernel_cases import BACKBONES, PACKED, POLICIES, make_case, plan_options
from tolerances import RMS_FLOAT32, RMS_HALF, RMS_TWICE_ROUNDED, assert_rms_close

import dla_kernels as dk
from dla_kernels.backbones.operators import ChunkOperators, Transition, chunk_operators, visible_tokens
from dla_kernels.inputs import heads_first, to_chunks
from dla_kernels.launch import mixing_chunk_size
from dla_kernels.memory.mixing import mix_operators
from dla_kernels.memory.table import slot_table

mixing_triton = pytest.importorskip("dla_kernels.memory.mixing_triton", reason="needs Triton")

from tests.rounding import rounding_as_a_gpu  # noqa: E402

NAMES = ("mixing", "query", "query_open", "key_end", "decay", "erase", "restore", "v", "read_weights", "initial")


def operators_of(case, plan, chunk, frozen):
    heads = case.v.shape[2]

    def chunks(x):
        return to_chunks(heads_first(x, heads, torch.float64), chunk)

    after = to_chunks(plan.boundary.transpose(1, 2), chunk) if frozen else None
    beta = None if case.beta is None else chunks(case.beta)
    sees = visible_tokens(plan.document_start, chunk)
    return chunk_operators(chunks(case.q), chunks(case.k), chunks(case.log_decay), beta, sees, frozen_after=after)


def leaves_of(case, plan, chunk, frozen, initial):
    """Every input of mixing by name, float64."""
    ops = operators_of(case, plan, chunk, frozen)
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(*case.v.shape[:3], plan.capacity, generator=generator, dtype=torch.float64) + 0.1
    opened = ops.transition_open
    values = (ops.mixing, ops.query_closed, ops.query_open if frozen else None, ops.key_end, opened.decay)
    return dict(zip(NAMES, (*values, opened.erase, opened.restore, case.v.double(), weights, initial), strict=True))


def bundle(x, frozen):
    opened = Transition(x["decay"], x["erase"], x["restore"])
    query_open = x["query_open"] if frozen else x["query"]
    return ChunkOperators(x["mixing"], x["query"], query_open, x["key_end"], None if frozen else opened, opened)


def expected_of(leaves, plan, chunk, frozen):
    x = {name: None if t is None else t.clone().requires_grad_() for name, t in leaves.items()}
    values = to_chunks(heads_first(x["v"], x["v"].shape[2], torch.float64), chunk)
    weights = x["read_weights"].transpose(1, 2)
    o, states = mix_operators(x["initial"], bundle(x, frozen), values, weights, plan, chunk=chunk, frozen=frozen)
    return o.transpose(1, 2), states, x


def actual_of(leaves, plan, chunk, frozen, dtype, group):
    wide = ("decay", "read_weights", "initial")
    x = {
        name: None if t is None else t.to(torch.float32 if name in wide else dtype).requires_grad_()
        for name, t in leaves.items()
    }
    o, states = mixing_triton.mix_triton(
        x["initial"], bundle(x, frozen), x["v"], x["read_weights"], slot_table(plan, chunk),
        key_dim=leaves["initial"].shape[-2], group=group,
    )  # fmt: skip
    return o, states, x


def gradients(o, states, x, d_o, d_states):
    ((o * d_o).sum() + (states * d_states).sum()).backward()
    return {f"d{name}": t.grad for name, t in x.items() if t is not None}


def assert_mixing_agrees(case, plan, chunk, frozen, *, initial=None, dtype=torch.float32, group=None, limits=None):
    batch, _, heads, value_dim = case.v.shape
    if initial is None:
        initial = torch.zeros(batch, heads, plan.capacity, case.k.shape[-1], value_dim, dtype=torch.float64)
    leaves = leaves_of(case, plan, chunk, frozen, initial)
    if dtype != torch.float32:  # the expected values are those of the rounded inputs
        leaves = {n: None if t is None else t.to(dtype).double() for n, t in leaves.items()}
    generator = torch.Generator().manual_seed(4)
    o, states, x = expected_of(leaves, plan, chunk, frozen)
    d_o, d_states = (torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in (o, states))
    expected = {"o": o.detach(), "states": states.detach()} | gradients(o, states, x, d_o, d_states)
    o, states, x = actual_of(leaves, plan, chunk, frozen, dtype, group)
    actual = {"o": o.detach(), "states": states.detach()}
    actual |= gradients(o, states, x, d_o.to(o.dtype), d_states.float())
    for name, value in expected.items():
        limit = RMS_FLOAT32 if limits is None else limits.get(name, 8e-3)
        assert_rms_close(name, actual[name], value, limit)


def plan_of(case, policy="dla", **options):
    return dk.plan_memory(*case.keys, **(plan_options(policy) | options), backend="torch")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_states_and_gradients_equal_the_chunkwise_form(backbone, frozen, packed):
    case = make_case(backbone, key_heads=1, heads=2, key_dim=10, value_dim=20)
    plan = plan_of(case, cu_seqlens=PACKED if packed else None)
    assert (plan.merged >= 0).any()
    assert_mixing_agrees(case, plan, 16, frozen)


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "dla"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_policy_is_mixed_alike(policy, backbone):
    case = make_case(backbone, batch=1)
    assert_mixing_agrees(case, plan_of(case, policy), 16, frozen=False)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("group", [1, 2])
def test_dividing_the_chunks_into_groups_changes_nothing(backbone, frozen, group):
    """Three chunks in groups of 1 and of 2: states cross groups in full, the last group is short."""
    case = make_case(backbone, batch=1, decay=0.05)
    assert_mixing_agrees(case, plan_of(case), 16, frozen, group=group)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_carried_cache_is_read_and_gets_its_gradient(backbone, frozen):
    whole = make_case(backbone, batch=1, tokens=60)
    closed = "frozen" if frozen else "transition"
    first = whole.tokens(0, 25)
    plan = plan_of(first)
    ones = torch.ones(1, 25, 2, 4, dtype=torch.float64)
    _, cache = dk.dla_attention(
        *first.all, read_weights=ones, plan=plan, closed_slots=closed, return_cache=True, backend="torch"
    )
    rest = whole.tokens(25, 60)
    for cu_seqlens in (None, torch.tensor([0, 20, 35])):
        after = plan_of(rest, cache=cache, cu_seqlens=cu_seqlens)
        assert_mixing_agrees(rest, after, 16, frozen, initial=cache.states)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
@pytest.mark.parametrize("frozen", [False, True])
def test_any_length_is_mixed(tokens, frozen):
    case = make_case("gated_deltanet", batch=1, tokens=tokens)
    assert_mixing_agrees(case, plan_of(case), 16, frozen)


@pytest.mark.parametrize("capacity", [1, 8, 30, 64])
def test_any_capacity_is_mixed(capacity):
    case = make_case("mamba2", batch=1, tokens=70)
    assert_mixing_agrees(case, plan_of(case, capacity=capacity, tau=0.6), 32, frozen=False)


@pytest.mark.parametrize("tau", [-1.0, 3.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_token_or_no_token_a_boundary(tau, frozen):
    case = make_case("gated_deltanet", batch=1, tokens=50)
    assert_mixing_agrees(case, plan_of(case, tau=tau, capacity=6), 16, frozen)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("frozen", [False, True])
def test_key_and_value_blocks_beyond_one_are_mixed(backbone, frozen):
    """Blocks of 16 make several of each dimension, the last ones partly filled."""
    from dla_kernels.launch import override_tuning
    from dla_kernels.tuning import TUNING

    kernels = [n for n in TUNING if n.startswith(("mix_", "sweep_", "write_chunks"))]
    small = {n: {b: 16 for b in ("BK", "BV") if b in TUNING[n][90]} for n in kernels}
    case = make_case(backbone, batch=1, key_dim=24, value_dim=20)
    with override_tuning(**small):
        assert_mixing_agrees(case, plan_of(case), 16, frozen)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operands_of_16_bits_stay_within_their_bounds(backbone, frozen, dtype):
    case = make_case(backbone, batch=1, key_dim=16, value_dim=16, tokens=50)
    limits = {"o": RMS_HALF["o"], "ddecay": RMS_HALF["dlog_decay"], "dread_weights": RMS_HALF["dread_weights"]}
    limits["derase"] = limits["drestore"] = RMS_TWICE_ROUNDED[dtype]
    with rounding_as_a_gpu():
        assert_mixing_agrees(case, plan_of(case), 16, frozen, dtype=dtype, limits=limits)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_unwritten_is_read(monkeypatch, backbone, frozen):
    """Every buffer starts as NaN."""

    def poisoned(real):
        def make(*args, **options):
            out = real(*args, **options)
            return out.fill_(float("nan") if out.is_floating_point() else -(2**30))

        return make

    monkeypatch.setattr(mixing_triton.torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(mixing_triton.torch, "empty_like", poisoned(torch.empty_like))
    case = make_case(backbone, batch=1)
    plan = plan_of(case, cu_seqlens=torch.tensor([0, 7, 45]))
    assert_mixing_agrees(case, plan, 16, frozen, group=2)


@pytest.mark.parametrize(("dtype", "chunk"), [(torch.bfloat16, 128), (torch.float16, 128), (torch.float32, 64)])
def test_chunks_of_float32_are_short_enough_to_compile(monkeypatch, dtype, chunk):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert mixing_chunk_size(32, "triton", torch.empty(1, dtype=dtype)) == chunk  # as on sm90
    assert mixing_chunk_size(32, "torch", torch.empty(1, dtype=dtype)) == 32


def test_results_are_the_same_to_the_last_bit_run_to_run():
    case = make_case("gated_deltanet", batch=1)
    plan = plan_of(case)
    leaves = leaves_of(case, plan, 16, False, torch.zeros(1, 2, 4, 5, 4, dtype=torch.float64))
    runs = []
    for _ in range(2):
        o, states, x = actual_of(leaves, plan, 16, False, torch.float32, None)
        runs.append([o, states, *gradients(o, states, x, torch.ones_like(o), torch.ones_like(states)).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_groups_hold_the_memory_to_the_formula():
    """sqrt(N) chunks a group unless GROUP_BYTES hold more."""
    edge = mixing_triton.GROUP_BYTES // 4
    assert mixing_triton.group_size(256, edge) == 16
    assert mixing_triton.group_size(256, edge // 16) == 64
    assert mixing_triton.group_size(3, edge * 100) == 2
    assert mixing_triton.group_size(5, 8) == 5


@pytest.mark.parametrize("group", [1, 2, 3])
def test_edges_kept_and_buffered_follow_the_formula(monkeypatch, group):
    """Of 3 chunks: kept are the first edge and that of every later group; buffers hold G + 1 edges, two in backward."""
    case = make_case("mamba2", batch=1)
    plan = plan_of(case)
    leaves = leaves_of(case, plan, 16, False, torch.zeros(1, 2, 4, 5, 4, dtype=torch.float64))
    buffers, saved = [], []
    real = mixing_triton._edges

    def counted(initial, sizes):
        buffers.append(real(initial, sizes))
        return buffers[-1]

    monkeypatch.setattr(mixing_triton, "_edges", counted)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        o, states, x = actual_of(leaves, plan, 16, False, torch.float32, group)
    groups = -(-3 // group)
    assert saved.count((1, 2, 4, 5, 4)) == groups
    assert [b.shape[2] for b in buffers] == [group + 1]
    o.sum().backward()
    assert [b.shape[2] for b in buffers] == [group + 1] * 3
