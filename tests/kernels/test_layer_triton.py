"""A whole layer in Triton through the public operations: plan, affinity, gates, reads, mixing, decoding, caches."""

import pytest
import torch
from kernel_cases import BACKBONES, PACKED, POLICIES, make_case, plan_options
from tolerances import RMS_FLOAT32, assert_rms_close

import dla_kernels as dk

pytest.importorskip("triton", reason="needs Triton")

CHUNK = 16


def layer(case, weights, policy, *, closed="transition", backend, soft=False, cache=None, cu_seqlens=None, plan=None):
    """(o, cache, plan) with content reads on q and k and, where soft, gates."""
    options = {"backend": backend, "chunk_size": CHUNK}
    gain, sharpness = (torch.tensor(x, dtype=weights.dtype) for x in ((1.5, 0.7), (4.0, 8.0)))
    keys = tuple(None if x is None else x.detach() for x in case.keys)
    if plan is None:
        plan = dk.plan_memory(
            *keys, **plan_options(policy), cu_seqlens=cu_seqlens, cache=cache, score_gradients=soft, **options
        )
    gates = None
    if soft:
        score = dk.boundary_score(case.k, case.v, plan)
        gates = dk.boundary_gate(score, plan, tau=torch.tensor([0.9, 1.0]), temperature=0.3)
    affinity = dk.slot_affinity(case.q, case.k, plan, cache=cache, **options)
    read = dk.content_read_weights(weights, affinity, gain=gain, sharpness=sharpness, backend=backend)
    o, after = dk.dla_attention(
        *case.all, read_weights=read, plan=plan, gates=gates, closed_slots=closed, routing_keys=case.k, cache=cache,
        return_cache=True, **options,
    )  # fmt: skip
    return o, after, plan


def inputs(backbone, policy, dtype=torch.float32, **shape):
    """One case in float64 and in `dtype`, the same numbers, as leaves."""
    wide = make_case(backbone, **({"dtype": dtype} | shape)).map(torch.Tensor.double)
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(*wide.v.shape[:3], plan_options(policy)["capacity"], generator=generator).double() + 0.1
    out = []
    for kind in (torch.float64, dtype):
        case = wide.map(lambda x, kind=kind: x.detach().clone().to(kind).requires_grad_())
        out.append((case, weights.clone().to(torch.promote_types(kind, torch.float32)).requires_grad_()))
    return out


def assert_same_cache(actual, expected):
    for name in ("fill", "position", "counts"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for name in ("states", "key_sums", "gates"):
        assert_rms_close(name, getattr(actual, name), getattr(expected, name), RMS_FLOAT32)
    assert (actual.scores - expected.scores).abs().max() < 2e-3


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_of_every_policy_equals_the_chunkwise_form_with_its_gradients(backbone, policy, packed):
    closed = "frozen" if packed else "transition"
    cu_seqlens = PACKED if packed else None
    (wide, wide_weights), (case, weights) = inputs(backbone, policy, batch=2 if packed else 1)
    soft = policy == "dla"
    results, plan = [], None
    for c, w, backend in ((wide, wide_weights, "torch"), (case, weights, "triton")):
        o, cache, own = layer(c, w, policy, closed=closed, backend=backend, soft=soft, cu_seqlens=cu_seqlens)
        if plan is not None:
            assert torch.equal(plan.boundary, own.boundary) and torch.equal(plan.death, own.death)
        plan = own
        (o.square().sum() + cache.states.sin().sum()).backward()
        results.append((o.detach(), cache, [x.grad for x in (*c.all, w) if x is not None]))
    assert_rms_close("o", results[1][0], results[0][0], RMS_FLOAT32)
    assert_same_cache(results[1][1], results[0][1])
    names = ("dq", "dk", "dv", "dlog_decay", *(("dbeta",) if case.beta is not None else ()), "dread_weights")
    for name, actual, expected in zip(names, results[1][2], results[0][2], strict=True):
        # gates are steep functions of scores, whose cosines carry float32 rounding
        assert_rms_close(name, actual, expected, RMS_FLOAT32 * (20 if soft else 2))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("split", [1, 23])
def test_splitting_a_sequence_and_carrying_the_cache_changes_nothing(backbone, split):
    (_, _), (case, weights) = inputs(backbone, "dla", batch=1)
    with torch.no_grad():
        whole, expected, _ = layer(case, weights, "dla", backend="triton", closed="frozen")
        first, cache, _ = layer(case.tokens(0, split), weights[:, :split], "dla", backend="triton", closed="frozen")
        rest, cache, _ = layer(
            case.tokens(split, 45), weights[:, split:], "dla", backend="triton", closed="frozen", cache=cache
        )
    assert_rms_close("o", torch.cat([first, rest], 1), whole, RMS_FLOAT32)
    assert_same_cache(cache, expected)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_decoding_after_a_prefill_equals_the_whole_sequence(backbone):
    (_, _), (case, weights) = inputs(backbone, "dla", tokens=30, batch=1)
    options = plan_options("dla")
    options.pop("capacity")
    gain, sharpness = torch.tensor([1.5, 0.7]), torch.tensor([4.0, 8.0])
    with torch.no_grad():
        whole, expected, _ = layer(case, weights, "dla", backend="triton")
        first, cache, _ = layer(case.tokens(0, 20), weights[:, :20], "dla", backend="triton")
        outputs = [first]
        for t in range(20, 30):
            now = case.map(lambda x, t=t: x[:, t])
            o = dk.dla_step(
                *now.all, read_weights=weights[:, t], cache=cache, rho=now.q, kappa=now.k, gain=gain,
                sharpness=sharpness, backend="triton", **options,
            )  # fmt: skip
            outputs.append(o[:, None])
    assert_rms_close("o", torch.cat(outputs, 1), whole, RMS_FLOAT32)
    assert_same_cache(cache, expected)


def test_unit_weights_give_the_single_state_whatever_the_boundaries():
    (_, _), (case, _) = inputs("gated_deltanet", "dla", batch=1)
    with torch.no_grad():
        outputs = []
        for options in (plan_options("dla"), {"tau": 0.6, "capacity": 1, "policy": "single"}):
            plan = dk.plan_memory(*case.keys, **options, backend="triton", chunk_size=CHUNK)
            ones = torch.ones(1, 45, 2, plan.capacity)
            outputs.append(dk.dla_attention(*case.all, read_weights=ones, plan=plan, backend="triton"))
    assert_rms_close("o", outputs[0], outputs[1], RMS_FLOAT32)


def test_a_recomputed_layer_with_the_same_plan_has_the_same_gradients_to_the_last_bit():
    """Activation recomputation: the plan is saved and never made again."""
    from torch.utils.checkpoint import checkpoint

    grads = []
    for recompute in (False, True):
        (_, _), (case, weights) = inputs("gated_deltanet", "dla", batch=1)
        plan = dk.plan_memory(
            *case.map(torch.Tensor.detach).keys, **plan_options("dla"), backend="triton", chunk_size=CHUNK
        )

        def run(*leaves, plan=plan, weights=weights):
            read = dk.dla_attention(*leaves, read_weights=weights, plan=plan, backend="triton")
            assert isinstance(read, torch.Tensor)
            return read

        o = checkpoint(run, *case.all, use_reentrant=False) if recompute else run(*case.all)
        o.square().sum().backward()
        grads.append([x.grad for x in (*case.all, weights)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_float64_is_refused_by_name():
    case = make_case("mamba2")
    with pytest.raises(dk.BackendError, match="float64"):
        dk.plan_memory(*case.keys, tau=0.9, capacity=4, backend="triton")


def test_a_compiled_function_leaves_the_kernels_alone():
    (_, _), (case, weights) = inputs("gated_deltanet", "dla", batch=1)
    plan = dk.plan_memory(*case.map(torch.Tensor.detach).keys, **plan_options("dla"), backend="torch", chunk_size=CHUNK)

    def doubled(*leaves):
        return 2 * dk.dla_attention(*leaves, read_weights=weights, plan=plan, backend="triton")

    with torch.no_grad():
        assert torch.equal(torch.compile(doubled, backend="aot_eager")(*case.all), doubled(*case.all))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("closed", ["transition", "frozen"])
def test_a_document_never_sees_another(backbone, closed):
    """Change a document in every input: all outputs of the others, in its chunk too, are the same to the last bit."""
    (_, _), (case, weights) = inputs(backbone, "dla")
    outputs = []
    with torch.no_grad():
        for change in (False, True):
            if change:
                for x in case.all:
                    if x is not None:
                        x[0, 4:7] *= -0.5 if x.dim() == 4 else 0.37
            outputs.append(layer(case, weights, "dla", backend="triton", closed=closed, cu_seqlens=PACKED)[0])
    same = (outputs[0] == outputs[1]).all(-1).all(-1)
    assert same[0, :4].all() and same[0, 7:].all() and same[1].all()
    assert not same[0, 4:7].any()
