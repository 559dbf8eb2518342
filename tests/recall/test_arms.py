"""What a study compares, and that arms differ in nothing else."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dla_train.config import ConfigError
from dla_train.recall.arms import ATTENTION, study_arms, study_tasks
from dla_train.recall.model import build_recall_model, token_columns, token_ids
from dla_train.recall.settings import compose
from dla_train.recall.tasks.errors import RecallError
from tests.recall.conftest import SHIPPED


def arms_of(study):
    return study_arms(study, study_tasks(study))


def models_of(study, seed=0):
    vocabulary = study_tasks(study)["many"].vocabulary
    begin = study.decay_rate, study.step_size
    return {arm.name: build_recall_model(arm.run(1e-2, seed), vocabulary, "cpu", *begin) for arm in arms_of(study)}


def test_every_backbone_gets_every_memory_and_attention_is_an_arm_of_its_own(tiny):
    both = dataclasses.replace(tiny, backbones=["mamba2", "gated_deltanet"], attention={"key_dim": 16})
    names = [arm.name for arm in arms_of(both)]
    assert names == ["mamba2_single", "mamba2_dla", "gated_deltanet_single", "gated_deltanet_dla", ATTENTION]


def test_arms_have_the_same_number_of_parameters_within_a_hundredth(tiny):
    both = dataclasses.replace(tiny, backbones=["mamba2", "gated_deltanet"], attention={"key_dim": 16})
    counts = [arm.parameters for arm in arms_of(both)]
    assert max(counts) <= 1.01 * min(counts)
    unmatched = dataclasses.replace(both, match_parameters=False)
    assert max(arm.parameters for arm in arms_of(unmatched)) > 1.02 * min(arm.parameters for arm in arms_of(unmatched))


def test_the_counted_parameters_are_those_of_the_model(tiny):
    models = models_of(tiny)
    for arm in arms_of(tiny):
        assert arm.parameters == sum(p.numel() for p in models[arm.name].parameters())


def test_parameters_that_two_arms_share_begin_alike_and_with_another_seed_otherwise(tiny):
    study = dataclasses.replace(tiny, match_parameters=False)
    models, others = models_of(study), models_of(study, seed=1)
    single, dla = (dict(models[f"gated_deltanet_{memory}"].named_parameters()) for memory in ("single", "dla"))
    assert set(single) < set(dla)
    for name, value in single.items():
        assert torch.equal(value, dla[name]), name
    assert not torch.equal(single["embedding.weight"], others["gated_deltanet_single"].embedding.weight)


def test_decay_and_step_size_of_every_head_begin_as_given_and_as_in_pretraining_otherwise(tiny):
    usual, given = (
        models_of(dataclasses.replace(tiny, decay_rate=rate, step_size=step))["gated_deltanet_dla"]
        for rate, step in ((None, None), (0.01, 2.0))
    )
    begun, drawn = (model.blocks[0].mixer.backbone.decay for model in (given, usual))
    torch.testing.assert_close(begun.A_log.exp(), torch.full_like(begun.A_log, 0.01))
    torch.testing.assert_close(F.softplus(begun.dt_bias), torch.full_like(begun.dt_bias, 2.0))
    assert drawn.A_log.exp().min() >= 1 and F.softplus(drawn.dt_bias).max() <= 0.1


def test_a_tokens_columns_are_one_id_and_come_back():
    inputs = torch.stack([torch.arange(6) % 3, torch.arange(6) % 2], -1)[None]
    ids = token_ids(inputs, (3, 2))
    assert len(ids.unique()) == 6
    assert torch.equal(torch.stack(token_columns(ids, (3, 2)), -1), inputs)
    assert torch.equal(token_ids(ids, (6,)), ids)


def test_a_paired_token_is_embedded_as_the_sum_of_its_key_and_its_value(tiny):
    model = models_of(tiny)["gated_deltanet_single"]
    keys, values = study_tasks(tiny)["many"].vocabulary
    ids = token_ids(torch.tensor([[[3, 5]]]), (keys, values))
    table = model.embedding.weight
    torch.testing.assert_close(model.embedding(ids)[0, 0], table[3] + table[keys + 5])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task": {}}, ConfigError, "task.name: no value given"),
        ({"task": {"name": "mqr"}}, RecallError, "did you mean mqar"),
        ({"memories": {"single": {"policy": "single", "capcity": 1}}}, ConfigError, "memories.single.*capcity"),
        ({"memories": {"single": {"policy": "single"}}}, ConfigError, "memories.single: memory.capacity=30"),
        ({"model": {"width": 32}}, ConfigError, "model.*no value|MISSING|missing"),
        ({"parts": {"a": {"needles": 2}, "b": {"needles": 2, "keys": 9}}}, ConfigError, "parts differ in their vocab"),
        ({"optim": {"warmup_steps": 50}}, ConfigError, "optim.warmup_steps=50 is longer than train.steps=12"),
    ],
)
def test_a_study_that_cannot_be_names_the_setting(tiny, change, error, message):
    with pytest.raises(error, match=message):
        arms_of(dataclasses.replace(tiny, **change))


def test_arms_too_small_to_be_matched_are_refused(tiny):
    wide = dataclasses.replace(tiny, model={**tiny.model, "width": 8, "mlp_width": 1, "num_layers": 3, "value_dim": 3})
    memories = {**tiny.memories, "dla": {**tiny.memories["dla"], "capacity": 3, "routing": "qk"}}
    with pytest.raises(ConfigError, match="match_parameters: .* widen model"):
        arms_of(dataclasses.replace(wide, memories=memories))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_study_can_be_built(name):
    study = compose([f"study={name}"])
    assert len(arms_of(study)) >= 4
