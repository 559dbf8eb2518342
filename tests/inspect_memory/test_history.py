"""What is read off a text is the model's own plan and reads, and what cannot be shown is named."""

import numpy as np
import pytest
import torch

from dla_train.config import ConfigError
from dla_train.data.tokenizer import load_tokenizer
from dla_train.inspect_memory.history import inspect_text
from dla_train.models.build import build_model

TEXT = "line 3 adds 9 to 1\nGr\u00fc\u00dfe from line 4\n" * 3


def opened(tiny, *overrides):
    config = tiny("memory.capacity=4", "memory.tau=1.3", "memory.gain_init=0.7", *overrides)
    return build_model(config, "cpu"), load_tokenizer(config.data.tokenizer)


@pytest.mark.parametrize("policy", ["dla", "fixed", "log_linear", "single"])
def test_a_history_is_the_models_own_plan_and_weights(tiny, policy):
    overrides = [] if policy == "dla" else [f"memory={policy}", "memory.tau=0.6", "memory.gain_init=0"]
    overrides += {"fixed": ["memory.interval_tokens=5", "memory.capacity=4"], "log_linear": ["memory.capacity=9"]}.get(
        policy, []
    )
    overrides += ["memory.capacity=1"] if policy == "single" else []
    model, tokenizer = opened(tiny, *overrides)
    found = inspect_text(model, tokenizer, TEXT)
    assert "".join(found.pieces) == TEXT
    assert [(head.layer, head.head) for head in found.heads] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    seen = {}
    model.eval()(torch.tensor([tokenizer.encode(TEXT)]), observe=seen.__setitem__)
    for head in found.heads:
        reading = seen[head.layer]
        starts = reading.plan.slot_starts()[0, :, head.head]
        assert [[s for s in row if s >= 0] for row in starts.tolist()] == head.live
        assert head.score.tolist() == reading.plan.score[0, :, head.head].tolist()
        for time, live in enumerate(head.live):
            expected = reading.weights[0, time, head.head, : len(live)].tolist()
            assert head.weights[time, : len(live)].tolist() == expected
            assert np.isnan(head.weights[time, len(live) :]).all()
            slots = [sum(start <= token for start in live) - 1 for token in range(time + 1)]
            assert head.slot_of_token(time).tolist() == slots
        assert (head.tau is None) == (policy != "dla") == (head.gate is None)
    assert max(len(starts) for starts in found.heads[0].live) == {"single": 1, "log_linear": 6}.get(policy, 4)


def test_gates_are_those_of_training_at_a_temperature(tiny):
    model, tokenizer = opened(tiny)
    for temperature in (0.05, 1.0):
        for head in inspect_text(model, tokenizer, TEXT, gate_temperature=temperature).heads:
            expected = 1 / (1 + np.exp((head.tau - head.score.astype(np.float64)) / temperature))
            expected = np.where(head.boundary, expected, 1.0)
            expected[0] = 1.0
            np.testing.assert_allclose(head.gate, expected, rtol=1e-5)
    hard, tokenizer = opened(tiny, "memory.gate=hard")
    assert inspect_text(hard, tokenizer, TEXT).heads[0].gate is None


def test_layer_and_head_choose_and_the_typical_head_is_nearest_to_a_rate(tiny):
    model, tokenizer = opened(tiny)
    every = inspect_text(model, tokenizer, TEXT)
    (one,) = inspect_text(model, tokenizer, TEXT, layer=1, head=0).heads
    assert (one.layer, one.head) == (1, 0) and one.score.tolist() == every.heads[2].score.tolist()
    assert len(inspect_text(model, tokenizer, TEXT, layer=1).heads) == 2
    rates = [sum(head.boundary.tolist()[1:]) / (head.tokens - 1) for head in every.heads]
    for target in (0.0, 1.0):
        assert abs(every.typical(target).boundary_rate - target) == min(abs(rate - target) for rate in rates)


def test_looking_leaves_counts_and_mode_as_they_were(tiny):
    model, tokenizer = opened(tiny)
    model.train()
    inspect_text(model, tokenizer, TEXT)
    assert model.training and model.memory_statistics().count_nonzero() == 0


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({"layer": 2}, TEXT, "layer=2 does not exist; choose 0 to 1"),
        ({"head": 2}, TEXT, "head=2 does not exist; choose 0 to 1"),
        ({}, "", "the text is empty"),
        ({"max_tokens": 5}, TEXT, "more than max_tokens=5"),
    ],
)
def test_what_is_not_there_is_named(tiny, options, text, message):
    with pytest.raises(ConfigError, match=message):
        inspect_text(*opened(tiny), text, **options)


def test_softmax_attention_has_nothing_to_show(tiny):
    config = tiny("model.backbone=attention", "model.conv_width=0", "memory=none")
    with pytest.raises(ConfigError, match="no memory slots"):
        inspect_text(build_model(config, "cpu"), load_tokenizer(config.data.tokenizer), TEXT)


def test_a_text_longer_than_a_log_linear_memory_holds_is_refused(tiny):
    with pytest.raises(ConfigError, match="log_linear memory holds 8; shorten it"):
        inspect_text(*opened(tiny, "memory=log_linear", "memory.capacity=4", "memory.tau=0.6"), TEXT)
