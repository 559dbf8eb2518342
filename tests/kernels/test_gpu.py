"""Full-size correctness on a CUDA device (`make test-gpu`): bfloat16 and float32, every head size, long rows, graphs.

Expected values are the chunkwise form's in float64 on the same device, from the same rounded inputs and the same plan.
"""

import pytest
import torch
from kernel_cases import BACKBONES, make_case
from tolerances import RMS_FLOAT32, RMS_HALF, assert_rms_close

import dla_kernels as dk

pytestmark = pytest.mark.gpu

NAMES = ("dq", "dk", "dv", "dlog_decay", "dbeta")


@pytest.fixture(autouse=True)
def needs_a_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def case_on_device(backbone, dtype, **shape):
    return make_case(backbone, **shape).map(lambda x: x.to("cuda", dtype))


def poisoned(x):
    """The same values as a view of a larger buffer of NaN."""
    buffer = torch.full((*x.shape[:-1], x.shape[-1] + 7), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[..., 3:-4]
    view.copy_(x)
    return view


def run(case, weights, plan, closed, backend, cache=None):
    leaves = case.map(lambda x: x.detach().requires_grad_())
    weights = weights.detach().requires_grad_()
    o, after = dk.dla_attention(
        *leaves.all, read_weights=weights, plan=plan, closed_slots=closed, cache=cache, return_cache=True,
        backend=backend,
    )  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(1)
    d_o = torch.randn(o.shape, generator=generator, device="cuda")
    ((o.double() * d_o).sum() + after.states.double().sin().sum()).backward()
    grads = dict(zip(NAMES, (None if x is None else x.grad for x in leaves.all), strict=True))
    return {"o": o.detach(), "states": after.states.detach(), **grads, "dread_weights": weights.grad}


def assert_layer_agrees(case, dtype, *, closed="transition", capacity=8, tau=0.6, cu_seqlens=None, view=False):
    batch, tokens, heads, _ = case.v.shape
    plan = dk.plan_memory(*case.keys, tau=tau, capacity=capacity, cu_seqlens=cu_seqlens)
    weights = torch.rand(batch, tokens, heads, capacity, device="cuda") + 0.1
    expected = run(case.map(torch.Tensor.double), weights.double(), plan, closed, "torch")
    actual = run(case.map(poisoned) if view else case, weights, plan, closed, None)
    for name, value in expected.items():
        if value is not None:
            limit = RMS_FLOAT32 if dtype == torch.float32 else RMS_HALF.get(name, 8e-3)
            assert_rms_close(name, actual[name], value, limit)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 500, 2048])
def test_lengths(backbone, dtype, tokens):
    case = case_on_device(backbone, dtype, tokens=tokens, key_heads=2, heads=4, key_dim=64, value_dim=64, decay=0.05)
    assert_layer_agrees(case, dtype)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("closed", ["transition", "frozen"])
@pytest.mark.parametrize("dims", [(32, 32), (64, 96), (96, 64), (128, 64), (128, 128), (192, 384), (256, 256)])
def test_head_sizes(backbone, closed, dims):
    case = case_on_device(backbone, torch.bfloat16, tokens=500, heads=2, key_dim=dims[0], value_dim=dims[1], decay=0.05)
    assert_layer_agrees(case, torch.bfloat16, closed=closed)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("tau", [-1.0, 0.6, 3.0])
@pytest.mark.parametrize("capacity", [1, 8, 30, 64])
def test_thresholds_and_capacities(backbone, tau, capacity):
    case = case_on_device(backbone, torch.bfloat16, tokens=700, batch=1, key_dim=64, value_dim=64, decay=0.02)
    assert_layer_agrees(case, torch.bfloat16, tau=tau, capacity=capacity)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("closed", ["transition", "frozen"])
def test_packed_documents_in_views_of_poisoned_buffers(backbone, closed):
    case = case_on_device(backbone, torch.bfloat16, tokens=600, key_dim=64, value_dim=64)
    cu_seqlens = torch.tensor([0, 1, 130, 131, 600, 664, 1200])
    assert_layer_agrees(case, torch.bfloat16, closed=closed, cu_seqlens=cu_seqlens, view=True)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("drift", ["token", "update"])
def test_decisions_equal_those_of_the_chunkwise_form_but_for_near_ties(backbone, drift):
    """A decision may differ where a score lies within float32 rounding of tau, and nowhere else."""
    case = case_on_device(backbone, torch.bfloat16, tokens=4096, heads=4, key_dim=128, value_dim=64, decay=0.02)
    options = {"tau": 0.6, "capacity": 30, "drift": drift}
    expected = dk.plan_memory(*case.keys, **options, backend="torch")
    actual = dk.plan_memory(*case.keys, **options)
    first = (expected.boundary != actual.boundary).int().argmax(1)
    differs = (expected.boundary != actual.boundary).any(1)
    near = (expected.score - 0.6).abs().gather(1, first[:, None])[:, 0] < 1e-4
    assert (near | ~differs).all(), "the first decision that differs was no near-tie"
    assert differs.float().mean() <= 0.25
    same = ~differs[:, None].expand_as(expected.merged)
    assert torch.equal(expected.merged[same], actual.merged[same])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_results_are_the_same_to_the_last_bit_run_to_run(backbone):
    case = case_on_device(backbone, torch.bfloat16, tokens=1000, heads=8, key_heads=4, key_dim=128, value_dim=64)
    weights = torch.rand(2, 1000, 8, 30, device="cuda")
    plans = [dk.plan_memory(*case.keys, tau=0.6, capacity=30) for _ in range(2)]
    assert torch.equal(plans[0].score, plans[1].score) and torch.equal(plans[0].death, plans[1].death)
    first, second = (run(case, weights, plans[0], "transition", None) for _ in range(2))
    assert all(first[name] is None or torch.equal(first[name], second[name]) for name in first)


def test_more_programs_than_a_second_grid_axis_holds():
    """Batch times heads times chunks beyond 65535."""
    case = case_on_device("mamba2", torch.bfloat16, batch=70, heads=32, tokens=2000, key_dim=16, value_dim=16)
    plan = dk.plan_memory(*case.keys, tau=0.6, capacity=4)
    weights = torch.rand(70, 2000, 32, 4, device="cuda")
    o = dk.dla_attention(*case.all, read_weights=weights, plan=plan)
    row = case.rows(69, 0, 2000)
    alone = dk.dla_attention(*row.all, read_weights=weights[69:], plan=dk.plan_memory(*row.keys, tau=0.6, capacity=4))
    assert torch.equal(o[69:], alone)


def test_offsets_beyond_32_bits():
    """More than 2^31 values: the last document of a long row equals the same document alone."""
    tokens, heads, dim, last = 2**20 + 640, 16, 128, 640
    shape = (1, tokens, heads)
    v = torch.randn(*shape, dim, device="cuda", dtype=torch.bfloat16)
    q, k = (torch.randn(1, tokens, 1, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    log_decay = -torch.rand(*shape, device="cuda")
    cu_seqlens = torch.tensor([0, tokens - last, tokens])
    outputs = []
    for part, packed in ((slice(None), cu_seqlens), (slice(tokens - last, None), None)):
        inputs = [x[:, part] for x in (q, k, v, log_decay)]
        plan = dk.plan_memory(*inputs[1:], tau=0.6, capacity=2, cu_seqlens=packed)
        weights = torch.ones(*inputs[2].shape[:3], 2, device="cuda")
        outputs.append(dk.dla_attention(*inputs, read_weights=weights, plan=plan)[:, -last:])
    assert_rms_close("o", outputs[0].float(), outputs[1].float(), RMS_HALF["o"])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_can_be_captured_in_a_cuda_graph(backbone):
    case = case_on_device(backbone, torch.bfloat16, tokens=40, heads=4, key_dim=64, value_dim=64)
    now = case.map(lambda x: x[:, 0].clone())
    weights, tau = torch.ones(2, 4, 8, device="cuda"), torch.full((4,), 0.6, device="cuda")
    caches = [dk.MergeCache.empty(2, 4, 8, 64, 64, device="cuda") for _ in range(2)]

    def step(cache):
        return dk.dla_step(*now.all, read_weights=weights, tau=tau, cache=cache)

    step(caches[0])  # compiles
    caches[0].reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(caches[0])
    caches[0].reset()
    for t in range(40):
        for buffer, x in zip(now.all, case.all, strict=True):
            if buffer is not None:
                buffer.copy_(x[:, t])
        expected = step(caches[1])
        graph.replay()
        assert torch.equal(captured, expected)
    assert torch.equal(caches[0].states, caches[1].states)


def test_memory_of_forward_and_backward_stays_within_the_formula():
    """B H S K V 4 (2 (G + 1) + N / G) bytes of states and adjoints, beside what grows with T alone."""
    from dla_kernels.launch import mixing_chunk_size
    from dla_kernels.memory.mixing_triton import group_size

    peaks = {}
    for capacity in (8, 32):
        case = case_on_device("mamba2", torch.bfloat16, batch=1, tokens=8192, heads=8, key_dim=128, value_dim=64)
        plan = dk.plan_memory(*case.keys, tau=0.6, capacity=capacity)
        weights = torch.rand(1, 8192, 8, capacity, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(case, weights, plan, "transition", None)
        peaks[capacity] = torch.cuda.max_memory_allocated() - before
    chunks = 8192 // mixing_chunk_size(plan.chunk, "triton", case.q)
    edges = {}
    for capacity in peaks:
        edge = 8 * capacity * 128 * 64 * 4
        group = group_size(chunks, edge)
        edges[capacity] = edge * (2 * (group + 1) + chunks // group)
    by_token = 3 * 8192 * 8 * (32 - 8) * 4 * 3  # read weights, their gradient and their copies by slot
    assert peaks[32] - peaks[8] <= 1.1 * (edges[32] - edges[8]) + by_token


def test_operations_pick_triton_on_this_device():
    from dla_kernels.launch import resolve_backend

    assert resolve_backend(None, torch.zeros(1, device="cuda")) == "triton"
