"""Damaged and hostile folders end in FolderError, whatever was done to them, or in a model of finite shapes."""

import json
import random

import pytest

from dla_train.huggingface.conversions import convert
from dla_train.huggingface.errors import FolderError
from dla_train.huggingface.foreign import Source
from tests.huggingface.sources import SOURCES

STRANGE = [None, -1, 0, 1, 10**9, 1e400, "x", "", [], {}, [None], True, {"a": 1}, 0.5, "\u0000"]


@pytest.fixture(scope="module", params=["mamba2", "state-spaces", "gated_deltanet", "qwen3_next"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("fuzz") / request.param
    SOURCES[request.param](made)
    return made


def outcome(folder):
    try:
        convert(Source(folder), "small")
    except FolderError as error:
        return str(error)
    return ""


def test_any_value_of_any_setting_is_taken_or_refused(folder):
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    refused = 0
    for key in whole:
        for value in STRANGE:
            path.write_text(json.dumps({**whole, key: value}))
            refused += bool(outcome(folder))
        path.write_text(json.dumps({other: x for other, x in whole.items() if other != key}))
        outcome(folder)
    path.write_text(json.dumps(whole))
    assert refused > 50
    assert outcome(folder) == ""


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_bytes_are_taken_or_refused(folder, name):
    path, random_numbers = folder / name, random.Random(0)
    whole = path.read_bytes()
    refused = 0
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[random_numbers.randrange(len(damaged)) :]
        for _ in range(trial % 5 + 1):
            if damaged:
                damaged[random_numbers.randrange(min(len(damaged), 400))] = random_numbers.randrange(256)
        path.write_bytes(bytes(damaged))
        refused += bool(outcome(folder))
    path.write_bytes(whole)
    assert refused > 20


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", "[" * 100_000, '{"a": ' * 50_000, "\udcff"])
def test_a_config_that_is_no_object_is_refused(folder, text):
    path = folder / "config.json"
    whole = path.read_bytes()
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "config.json is not" in outcome(folder)
    path.write_bytes(whole)
