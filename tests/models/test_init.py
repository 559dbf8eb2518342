"""Every parameter is a pure function of (seed, name), drawn as the table says."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from dla_train.models import InitError, LanguageModel, init_weights, initial_value

KINDS = [("mamba2", "dla"), ("gated_deltanet", "dla"), ("gated_deltanet", "log_linear"), ("attention", "none")]


def state(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize(("backbone", "policy"), KINDS)
def test_meta_and_direct_construction_start_identical(tiny, backbone, policy):
    configs = tiny(backbone, policy)
    with torch.device("meta"):
        late = LanguageModel(*configs)
    assert all(p.is_meta for p in late.parameters())
    late, direct = init_weights(late, 3), init_weights(LanguageModel(*configs, device="cpu"), 3)
    assert state(late).keys() == state(direct).keys()
    for name, tensor in state(direct).items():
        assert torch.equal(tensor, state(late)[name]), name
        assert tensor.isfinite().all(), name


def test_parts_of_a_meta_model_get_storage_one_after_the_other(tiny):
    with torch.device("meta"):
        model = LanguageModel(*tiny("mamba2", "dla"))
    names = {id(module): name for name, module in model.named_modules()}
    seen = []

    def divide(part):
        assert not any(tensor.is_meta for tensor in part.state_dict().values())
        seen.append(names[id(part)])
        later = [name for name, tensor in model.named_parameters() if not name.startswith(tuple(seen))]
        assert all(model.get_parameter(name).is_meta for name in later)
        for parameter in part.parameters():
            parameter.data = parameter.data.new_empty(0)  # as ZeRO stage 3 does

    init_weights(model, 3, after_part=divide)
    assert seen == ["embedding", "blocks.0", "blocks.1", "final_norm", "head"]
    assert all(parameter.numel() == 0 for parameter in model.parameters())


def test_a_parameter_does_not_depend_on_other_layers_or_on_the_global_generator(tiny):
    model, memory = tiny("gated_deltanet", "dla")
    deeper = dataclasses.replace(model, num_layers=3)
    torch.manual_seed(1)
    short = state(init_weights(LanguageModel(model, memory), 0))
    torch.manual_seed(2)
    deep = state(init_weights(LanguageModel(deeper, memory), 0))
    scaled = ("out.weight", "down.weight")
    for name, tensor in short.items():
        expected = tensor * math.sqrt(2 / 3) if name.endswith(scaled) else tensor
        torch.testing.assert_close(deep[name], expected, msg=name)


def test_seeds_and_names_give_different_values(tiny):
    configs = tiny("gated_deltanet", "dla")
    first, second = state(init_weights(LanguageModel(*configs), 0)), state(init_weights(LanguageModel(*configs), 1))
    name = "blocks.0.mixer.backbone.q.weight"
    assert not torch.equal(first[name], second[name])
    assert not torch.equal(first[name], first[name.replace("0", "1")])
    assert not torch.equal(first[name], first["blocks.0.mixer.backbone.k.weight"])


def test_values_follow_the_table(tiny):
    model, memory = tiny("mamba2", "dla", width=256, num_heads=64, gain_init=0.25, tau_control="learned")
    values = state(init_weights(LanguageModel(model, memory), 0))
    backbone, reader = "blocks.1.mixer.backbone.", "blocks.1.mixer.reader."
    assert values[backbone + "x.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert values[backbone + "out.weight"].std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert values[backbone + "decay.A_log"].exp().min() >= 1 and values[backbone + "decay.A_log"].exp().max() <= 16
    dt = nn.functional.softplus(values[backbone + "decay.dt_bias"])
    assert dt.min() >= 9.9e-4 and dt.max() <= 0.101 and dt.max() / dt.min() > 10
    assert values[backbone + "conv.x"].abs().max() <= 0.5
    assert values[backbone + "norm.D"].unique().tolist() == [1.0]
    assert values[reader + "routing.gain"].unique().tolist() == [0.25]
    assert values[reader + "slots.weight"].unique().tolist() == [0.0]


@pytest.mark.parametrize("control", ["fixed", "learned", "rate"])
def test_tau_starts_at_its_configured_value(tiny, control):
    lm = init_weights(LanguageModel(*tiny("mamba2", "dla", tau=0.45, tau_control=control)), 0)
    torch.testing.assert_close(lm.blocks[0].mixer.reader.tau(), torch.full((4,), 0.45))


@pytest.mark.parametrize(("backbone", "policy"), KINDS)
def test_vectors_take_no_weight_decay_also_after_meta_construction(tiny, backbone, policy):
    with torch.device("meta"):
        lm = LanguageModel(*tiny(backbone, policy, tau_control="learned" if policy == "dla" else "fixed"))
    for name, parameter in init_weights(lm, 0).named_parameters():
        assert getattr(parameter, "no_weight_decay", False) == (parameter.dim() < 2), name
        assert parameter.dtype == torch.float32, name


def test_an_uncovered_parameter_is_an_error_before_anything_is_written(tiny):
    lm = init_weights(LanguageModel(*tiny("attention", "none")), 0)
    before = lm.embedding.weight.clone()
    lm.register_parameter("novelty", nn.Parameter(torch.ones(2)))
    with pytest.raises(InitError, match="novelty"):
        init_weights(lm, 1)
    assert torch.equal(lm.embedding.weight, before)


def test_one_parameter_can_be_drawn_alone(tiny):
    model, memory = tiny("gated_deltanet", "dla")
    whole = dict(init_weights(LanguageModel(model, memory), 7).named_parameters())
    name = "blocks.0.mlp.down.weight"
    assert torch.equal(initial_value(name, (12, 20), 7, model, memory), whole[name])
