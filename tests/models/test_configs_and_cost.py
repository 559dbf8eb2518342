"""The shipped configurations have the sizes they claim, and the cost formulas equal what is counted."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dla_train.models import LanguageModel, cache_bytes, flops_per_token, init_weights, parameter_count

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
MEMORIES = sorted(path.stem for path in (CONFIGS / "memory").glob("*.yaml"))
PAIRS = [(m, p) for m in MODELS for p in MEMORIES if m.startswith("transformer") == (p == "none")]


def counted(model, memory):
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(model, memory).parameters())


@pytest.mark.parametrize(("model", "memory"), PAIRS)
def test_predicted_parameter_count_equals_counted(shipped, model, memory):
    configs = shipped("model", model), shipped("memory", memory)
    assert parameter_count(*configs) == counted(*configs)


@pytest.mark.parametrize(
    "changes",
    [
        {"routing": "qk"},
        {"routing_dim": 3},
        {"tau_control": "learned"},
        {"mlp_width": 0},
        {"conv_width": 0},
        {"conv_bias": True},
        {"tie_embeddings": True},
        {"read": "unit"},
        {"read": "content_only"},
        {"num_key_heads": 1},
        {"num_key_heads": 4},
    ],
)
@pytest.mark.parametrize("backbone", ["mamba2", "gated_deltanet"])
def test_predicted_parameter_count_equals_counted_for_every_option(tiny, backbone, changes):
    configs = tiny(backbone, "dla", **changes)
    assert parameter_count(*configs) == counted(*configs)


@pytest.mark.parametrize(
    ("name", "memory", "published"),
    [
        ("mamba2_780m", "single", 780e6),
        ("transformer_778m", "none", 778e6),
        ("gated_deltanet_1300m", "single", 1.3e9),
    ],
)
def test_sizes_are_within_two_percent_of_the_published_ones(shipped, name, memory, published):
    assert abs(parameter_count(shipped("model", name), shipped("memory", memory)) / published - 1) < 0.02


@pytest.mark.parametrize("rung", ["125m", "350m", "tiny"])
def test_backbones_of_a_rung_are_within_five_percent_of_each_other(shipped, rung):
    sizes = [
        parameter_count(shipped("model", f"{b}_{rung}"), shipped("memory", "none" if b == "transformer" else "single"))
        for b in ("mamba2", "gated_deltanet", "transformer")
    ]
    assert max(sizes) / min(sizes) < 1.05


@pytest.mark.parametrize("rung", ["125m", "350m", "tiny"])
def test_recurrent_backbones_of_a_rung_hold_equal_states(shipped, rung):
    shapes = [shipped("model", f"{b}_{rung}") for b in ("mamba2", "gated_deltanet")]
    assert len({m.num_heads * m.key_dim * m.value_dim * m.num_layers for m in shapes}) == 1


def _projection_flops(lm, tokens):
    """FLOPs of matrix products inside projections, by hooking them: memory products are not dense."""
    from dla_train.models.linear import Embedding, Linear
    from dla_train.models.memory_reads import SlotWeights

    counter, total = FlopCounterMode(display=False), 0

    def before(module, inputs):
        counter.__enter__()

    def after(module, inputs, output):
        nonlocal total
        counter.__exit__(None, None, None)
        total += counter.get_total_flops()

    for module in lm.modules():
        if isinstance(module, Linear | SlotWeights | Embedding):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    with torch.no_grad():
        lm(tokens)
    return total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("backbone", "policy"),
    [
        ("attention", "none"),
        ("mamba2", "single"),
        ("mamba2", "dla"),
        ("gated_deltanet", "dla"),
        ("gated_deltanet", "log_linear"),
    ],
)
def test_predicted_dense_flops_equal_counted(tiny, build, backbone, policy, tied):
    configs = tiny(backbone, policy, tie_embeddings=tied)
    tokens = torch.randint(0, 17, (2, 9))
    counted_flops = _projection_flops(build(*configs, dtype=torch.float32), tokens)
    assert flops_per_token(*configs, 9).dense * tokens.numel() == counted_flops


def test_predicted_attention_flops_equal_counted(tiny):
    """The math kernel's products over all T keys are counted; the formula has the (T + 1) / 2 a causal query sees."""
    context = 8
    model, memory = tiny("attention", "none", num_key_heads=4)
    lm = init_weights(LanguageModel(model, memory), 0)
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        lm(torch.zeros(1, context, dtype=torch.int64))
    predicted = flops_per_token(model, memory, context)
    assert counter.get_total_flops() == context * (predicted.dense + predicted.attention * 2 * context / (context + 1))


def test_memory_flops_do_not_grow_with_context_and_order_as_the_work_does(shipped):
    model = shipped("model", "gated_deltanet_1300m")
    cost = {
        name: flops_per_token(model, shipped("memory", name), 16384).memory for name in ("single", "dla", "dla_frozen")
    }
    assert cost["single"] < cost["dla_frozen"] < cost["dla"]
    assert flops_per_token(model, shipped("memory", "dla"), 2048).memory == cost["dla"]


def test_training_costs_three_forwards(shipped):
    cost = flops_per_token(shipped("model", "transformer_778m"), shipped("memory", "none"), 16384)
    assert cost.training == 3 * cost.forward


@pytest.mark.parametrize(
    ("backbone", "policy"),
    [
        *((b, p) for b in ("mamba2", "gated_deltanet") for p in ("single", "log_linear", "fixed", "dla")),
        ("attention", "none"),
    ],
)
def test_predicted_cache_bytes_equal_held_and_only_attention_grows(tiny, backbone, policy):
    model, memory = tiny(backbone, policy)
    lm = LanguageModel(model, memory)
    held = {n: sum(cache.nbytes for cache in lm.empty_caches(3, n)) for n in (8, 64)}
    assert held == {n: cache_bytes(model, memory, 3, n) for n in (8, 64)}
    assert (held[64] > held[8]) == (backbone == "attention")
