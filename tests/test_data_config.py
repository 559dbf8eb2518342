"""data.train and data.phases: the forms they may be written in, and every mistake named."""

from fractions import Fraction

import pytest

from dla_train.config import Config, ConfigError
from dla_train.config_rules import validate
from dla_train.data_config import training_phases, training_sources
from dla_train.hydra_app import compose, config_from_dict, config_to_yaml

QUICK = "experiment=quickstart"  # 8 rows of 512 tokens, 200 steps: 819,200 tokens
BLEND = "data.train=[{name: web, prefixes: [a, b], weight: 0.7}, {name: code, prefixes: c, weight: 0.3}]"
NAMED = "data.train=[{name: web, prefixes: [a, b]}, {name: code, prefixes: c}]"


def checked(*overrides: str) -> Config:
    config = compose([QUICK, *overrides])
    validate(config)
    return config


def test_a_list_of_prefixes_is_one_source_in_whole_batches() -> None:
    data = checked("data.train=[a,b]").data
    (source,) = training_sources(data)
    assert (source.name, source.prefixes, source.weight, source.whole_batches) == ("train", ("a", "b"), 1, True)
    (phase,) = training_phases(data)
    assert (phase.start_tokens, phase.weights, phase.context_tokens) == (0, {"train": 1}, 512)


def test_named_sources_have_exact_weights_and_one_or_several_prefixes() -> None:
    data = checked(BLEND).data
    web, code = training_sources(data)
    assert (web.prefixes, code.prefixes, web.whole_batches) == (("a", "b"), ("c",), False)
    assert training_phases(data)[0].weights == {"web": Fraction(7, 10), "code": Fraction(3, 10)}


def test_phases_weigh_sources_and_may_shorten_rows() -> None:
    phases = "data.phases=[{start_tokens: 0, weights: {web: 1}, context_tokens: 128}, "
    data = checked(NAMED, phases + "{start_tokens: 400000, weights: {web: 1, code: 3}}]").data
    first, second = training_phases(data)
    assert (first.weights, first.context_tokens) == ({"web": 1}, 128)
    assert (second.weights, second.context_tokens, second.start_tokens) == ({"web": 1, "code": 3}, 512, 400_000)


def test_a_plain_list_may_have_phases_without_weights() -> None:
    data = checked("data.phases=[{start_tokens: 0, context_tokens: 256}, {start_tokens: 100000}]").data
    assert [(p.weights, p.context_tokens) for p in training_phases(data)] == [({"train": 1}, 256), ({"train": 1}, 512)]


def test_sources_and_phases_survive_the_files_a_run_writes() -> None:
    import dataclasses

    import yaml

    config = checked(NAMED, "data.phases=[{start_tokens: 0, weights: {web: 1, code: 0.25}}]")
    for values in (dataclasses.asdict(config), yaml.safe_load(config_to_yaml(config))):
        again = config_from_dict(values)
        assert (training_sources(again.data), training_phases(again.data)) == (
            training_sources(config.data),
            training_phases(config.data),
        )


BROKEN = {
    "no files": (["data.train=[]"], ["data.train", "names no files"]),
    "prefixes and sources": (["data.train=[a, {name: b, prefixes: c, weight: 1}]"], ["neither all prefixes"]),
    "a number": (["data.train=[3]"], ["neither all prefixes"]),
    "unknown key of a source": (
        ["data.train=[{name: a, prefix: b, weight: 1}]"],
        ["data.train[0].prefix", "name, prefixes, weight"],
    ),
    "a source without a name": (["data.train=[{prefixes: b, weight: 1}]"], ["data.train[0].name"]),
    "a name with a slash": (
        ["data.train=[{name: a/b, prefixes: b, weight: 1}]"],
        ["data.train[0].name=a/b", "letters"],
    ),
    "a source without files": (["data.train=[{name: a, prefixes: [], weight: 1}]"], ["data.train[0].prefixes=[]"]),
    "a source without a weight": (["data.train=[{name: a, prefixes: b}]"], ["data.train[0] (a) has no weight"]),
    "a negative weight": (["data.train=[{name: a, prefixes: b, weight: -1}]"], ["data.train[0].weight=-1"]),
    "a weight that is no number": (["data.train=[{name: a, prefixes: b, weight: much}]"], ["weight=much"]),
    "an infinite weight": (["data.train=[{name: a, prefixes: b, weight: inf}]"], ["weight=inf"]),
    "no weight above 0": (["data.train=[{name: a, prefixes: b, weight: 0}]"], ["no source of a weight above 0"]),
    "two sources of a name": (
        ["data.train=[{name: a, prefixes: b, weight: 1}, {name: a, prefixes: c, weight: 1}]"],
        ["two sources called a"],
    ),
    "weights in two places": (
        [BLEND, "data.phases=[{start_tokens: 0, weights: {web: 1, code: 1}}]"],
        ["data.train[0].weight", "data.phases"],
    ),
    "a phase of an unknown source": (
        [NAMED, "data.phases=[{start_tokens: 0, weights: {web: 1, coed: 1}}]"],
        ["data.phases[0].weights.coed", "web, code"],
    ),
    "a phase without weights": ([NAMED, "data.phases=[{start_tokens: 0}]"], ["data.phases[0].weights={}"]),
    "a source no phase weighs": ([NAMED, "data.phases=[{start_tokens: 0, weights: {web: 1}}]"], ["source code"]),
    "an unknown key of a phase": (["data.phases=[{start_tokens: 0, contxt: 4}]"], ["contxt"]),
    "a phase without a start": (["data.phases=[{context_tokens: 256}]"], ["start_tokens"]),
    "a late first phase": (["data.phases=[{start_tokens: 4096}]"], ["data.phases[0].start_tokens=4096", "0"]),
    "phases out of order": (
        ["data.phases=[{start_tokens: 0}, {start_tokens: 9000}, {start_tokens: 8000}]"],
        ["data.phases[2].start_tokens=8000", "9000"],
    ),
    "phases in one step": (
        ["data.phases=[{start_tokens: 0}, {start_tokens: 5000}, {start_tokens: 6000}]"],
        ["data.phases[2].start_tokens=6000", "step 2"],
    ),
    "a phase after the end": (
        ["data.phases=[{start_tokens: 0}, {start_tokens: 819200}]"],
        ["data.phases[1].start_tokens=819200", "819200 tokens"],
    ),
    "a context that does not divide": (
        ["data.phases=[{start_tokens: 0, context_tokens: 500}]"],
        ["data.phases[0].context_tokens=500", "does not divide data.context_tokens=512"],
    ),
    "a longer context": (
        ["data.phases=[{start_tokens: 0, context_tokens: 1024}]"],
        ["data.phases[0].context_tokens=1024", "data.context_tokens a multiple"],
    ),
    "a context of 0": (["data.phases=[{start_tokens: 0, context_tokens: 0}]"], ["context_tokens=0"]),
    "a context shorter than a chunk": (
        ["memory.chunk_tokens=64", "data.phases=[{start_tokens: 0, context_tokens: 32}]"],
        ["data.phases[0].context_tokens=32", "memory.chunk_tokens=64"],
    ),
    "a context over ranks along time": (
        ["parallel.context=4", "data.phases=[{start_tokens: 0, context_tokens: 2}]"],
        ["data.phases[0].context_tokens=2", "4 ranks along time"],
    ),
    "short rows of whole documents": (
        ["data.packing=best_fit", "data.phases=[{start_tokens: 0, context_tokens: 256}]"],
        ["data.phases[0].context_tokens=256", "data.packing=best_fit"],
    ),
    "an unknown packing": (["data.packing=bestfit"], ["did you mean best_fit"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_names_the_key_the_rule_and_the_mend(case: str) -> None:
    overrides, words = BROKEN[case]
    with pytest.raises(ConfigError) as caught:
        checked(*overrides)
    for word in words:
        assert word in str(caught.value), str(caught.value)
