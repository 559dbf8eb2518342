"""No kernel relies on an order that a GPU does not keep (tests/hazards.py), and none is left unwatched."""

import pytest
import torch
from kernel_cases import make_case

import dla_kernels as dk

triton = pytest.importorskip("triton", reason="needs Triton")

import triton.language as tl  # noqa: E402

from dla_kernels.launch import override_tuning  # noqa: E402
from dla_kernels.memory import drift_triton  # noqa: E402
from dla_kernels.memory.table_triton import slot_table_triton  # noqa: E402
from dla_kernels.tuning import TUNING  # noqa: E402
from tests.hazards import watching  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used where there is no GPU")

OPTIONS = {"backend": "triton", "chunk_size": 16}
TILES = {"BK": 16, "BV": 16, "BR": 16, "BX": 32, "BC": 32}
SMALL = {name: {b: n for b, n in TILES.items() if b in settings[90]} for name, settings in TUNING.items()}
"""Tiles so small that there are several of each dimension."""


@pytest.fixture
def guesses_are_wrong(monkeypatch):
    """Every guess of the planner's is found wrong, so that its walk makes states itself."""
    real = drift_triton.launch

    def spoil(kernel, grid, *args, **constants):
        if kernel is drift_triton.drift_walk_kernel:
            args[14].fill_(-3)
        real(kernel, grid, *args, **constants)

    monkeypatch.setattr(drift_triton, "launch", spoil)


def planned(case, cache=None, **options):
    keys = (None if x is None else x.detach() for x in case.keys)
    tau = torch.tensor([0.6, 0.9])
    plan = dk.plan_memory(*keys, tau=tau, capacity=4, cache=cache, score_gradients=True, **options, **OPTIONS)
    plan.table_by_chunk[16] = slot_table_triton(plan, 16)
    return plan


def layer(case, plan, closed, cache=None):
    """A layer with gates and content reads, forward and backward; returns the cache after it."""
    gates = dk.boundary_gate(dk.boundary_score(case.k, case.v, plan), plan, tau=0.9, temperature=0.3)
    ones = torch.ones(2, requires_grad=True)
    affinity = dk.slot_affinity(case.q, case.k, plan, cache=cache, **OPTIONS)
    weights = torch.ones(*case.v.shape[:3], 4, requires_grad=True)
    weights = dk.content_read_weights(weights, affinity, gain=ones, sharpness=ones, backend="triton")
    o, after = dk.dla_attention(
        *case.all, read_weights=weights, plan=plan, gates=gates, closed_slots=closed, routing_keys=case.k, cache=cache,
        return_cache=True, **OPTIONS,
    )  # fmt: skip
    (o.sum() + after.states.sum()).backward()
    return after.clone()


def decode(case, cache, **options):
    """Three tokens that are read by content, on a full memory."""
    ones = torch.ones(2)
    for t in range(3):
        now = case.map(lambda x, t=t: x.detach()[:, t])
        dk.dla_step(
            *now.all, read_weights=torch.ones(1, 2, 4), tau=-1.0, cache=cache, rho=now.q, kappa=now.k, gain=ones,
            sharpness=ones, backend="triton", **options,
        )  # fmt: skip


def around_a_layer(case):
    """Short convolution and norm."""
    x = case.v.detach().flatten(2).requires_grad_()
    weight = torch.ones(x.shape[-1], 4, requires_grad=True)
    mixed = dk.short_conv(x, weight, history=torch.ones(1, x.shape[-1], 3), backend="triton")
    scale = torch.ones(x.shape[-1], requires_grad=True)
    dk.norm.gated_rms_norm(mixed, x, scale, backend="triton").sum().backward()


def unused_by(backbone, closed):
    """Kernels that no layer of this kind launches."""
    if backbone == "mamba2":
        erasing = {"write_matrix", "drift_keys", "mix_erase_backward"}
        return {name for name in TUNING if name.startswith("gated_")} | erasing
    versions = {"slot_versions"} if closed == "transition" else set()
    return {name for name in TUNING if name.startswith("mamba2_")} | versions


def assert_ordered(watch):
    assert not watch.found, "\n".join(sorted(watch.found))


@pytest.mark.parametrize(
    ("backbone", "closed", "drift", "rule"),
    [
        ("gated_deltanet", "frozen", "update", "density"),
        ("mamba2", "transition", "token", "mass"),
        pytest.param("gated_deltanet", "transition", "token", "random", marks=pytest.mark.slow),
        pytest.param("mamba2", "frozen", "update", "oldest", marks=pytest.mark.slow),
    ],
)
def test_no_kernel_of_a_layer_relies_on_an_order(backbone, closed, drift, rule):
    case = make_case(backbone, tokens=34, batch=1, key_dim=20, value_dim=20, dtype=torch.float32)
    case = case.map(lambda x: x.requires_grad_())
    rules = {"drift": drift, "capacity_rule": rule}
    with watching() as watch, override_tuning(**SMALL):
        after = layer(case, planned(case, cu_seqlens=torch.tensor([0, 3, 34]), **rules), closed)
        decode(case, after, closed_slots=closed, **rules)
        around_a_layer(case)
    assert_ordered(watch)
    unwatched = {name.removesuffix("_erasing") for name in TUNING} - {x.removesuffix("_kernel") for x in watch.kernels}
    assert unwatched == {"mixing_chunk"} | unused_by(backbone, closed)


@pytest.mark.parametrize("backbone", [pytest.param("gated_deltanet", marks=pytest.mark.slow), "mamba2"])
def test_a_walk_that_makes_states_itself_relies_on_no_order(backbone, guesses_are_wrong):
    case = make_case(backbone, tokens=70, batch=1, key_dim=20, value_dim=20, dtype=torch.float32)
    with watching() as watch, override_tuning(**SMALL):
        planned(case)
    assert_ordered(watch)


@pytest.mark.parametrize("policy", ["log_linear", "fixed"])
def test_a_step_of_another_policy_relies_on_no_order(policy):
    case = make_case("mamba2", tokens=12, batch=1, dtype=torch.float32)
    cache = dk.MergeCache.empty(1, 2, 4, 5, 4, routing_dim=5)
    with watching() as watch:
        for t in (0, 3, 6, 9):
            decode(case.tokens(t, t + 3), cache, policy=policy, interval=1)
    assert_ordered(watch)


def test_operators_of_the_largest_chunk_rely_on_no_order():
    """Products of 128 x 128 pass through memory, those of smaller chunks do not."""
    case = make_case("gated_deltanet", tokens=100, batch=1, heads=1, dtype=torch.float32)
    case = case.map(lambda x: x.requires_grad_())
    plan = dk.plan_memory(*case.map(torch.Tensor.detach).keys, tau=0.6, capacity=2)
    with watching() as watch:
        weights = torch.ones(1, 100, 1, 2)
        dk.dla_attention(*case.all, read_weights=weights, plan=plan, chunk_size=128, backend="triton").sum().backward()
    assert_ordered(watch)


@triton.jit
def _turn(p_x, p_out, BARRIER: tl.constexpr):
    o_x = tl.arange(0, 64)
    tl.store(p_x + o_x, o_x)
    if BARRIER:
        tl.debug_barrier()
    tl.store(p_out + o_x, tl.load(p_x + 63 - o_x))


@triton.jit
def _add(p_x, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x)
    if TOGETHER:
        tl.store(p_x + o_x, b_x + 1)
    else:
        tl.store(p_x + (o_x ^ 1), b_x + 1)


@triton.jit
def _pass_on(p_x, NEXT: tl.constexpr):
    place = p_x + tl.program_id(0)
    tl.store(place + 1, tl.load(place + NEXT))


@pytest.mark.parametrize(
    ("kernel", "programs", "constants", "found"),
    [
        (_turn, 1, {"BARRIER": True}, None),
        (_turn, 1, {"BARRIER": False}, "stored at"),
        (_add, 1, {"BLOCK": 128, "TOGETHER": True}, None),
        (_add, 1, {"BLOCK": 128, "TOGETHER": False}, "loaded at"),
        (_add, 1, {"BLOCK": 64, "TOGETHER": True}, "loaded at"),  # two of four warps hold copies
        (_add, 2, {"BLOCK": 128, "TOGETHER": True}, "two programs write"),
        (_pass_on, 3, {"NEXT": 0}, "a program reads what another one writes"),
        (_pass_on, 3, {"NEXT": 1}, None),
    ],
)
def test_what_relies_on_an_order_is_found(kernel, programs, constants, found):
    x, out = torch.zeros(128, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    with watching() as watch:
        kernel[(programs,)](x, *([out] if kernel is _turn else []), **constants)
    assert (found in " ".join(watch.found)) if found else not watch.found
