"""docs/data.md: its settings and commands are legal, and its links lead somewhere."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from data_prep.prepare import _parser as prepare_parser
from data_prep.recipe import RecipeSource, recipe_sources
from dla_train.config_rules import validate
from dla_train.data_config import training_phases
from dla_train.hydra_app import compose
from dla_train.inspect_data.command import _parser

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
SHELL = "\n".join(text for language, text in BLOCKS if not language).replace("\\\n", " ")
EXAMPLES = [text for language, text in BLOCKS if language == "yaml"]


@pytest.mark.parametrize("number", range(3))
def test_the_examples_of_settings_are_legal(number: int) -> None:
    config = compose(["experiment=paper_gated_deltanet_1300m_dla"])
    data = OmegaConf.merge(OmegaConf.structured(config.data), yaml.safe_load(EXAMPLES[number])["data"])
    config.data = OmegaConf.to_object(data)
    validate(config)
    assert len(EXAMPLES) == 3 and len(training_phases(config.data)) == (1, 1, 2)[number]


@pytest.mark.parametrize("command", re.findall(r"^dla-train ([^#\n]*)", SHELL, re.MULTILINE))
def test_training_commands_are_legal(command: str) -> None:
    validate(compose(shlex.split(command)))


@pytest.mark.parametrize("command", re.findall(r"^dla-prepare ([^#\n]*)", SHELL, re.MULTILINE))
def test_commands_of_dla_prepare_are_known(command: str) -> None:
    assert prepare_parser().parse_args(shlex.split(command)).run


def test_the_recipe_on_the_page_is_legal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(text for text in re.findall(r"((?:^    .*\n)+)", PAGE, re.MULTILINE) if "sources:" in text)
    (tmp_path / "recipe.yaml").write_text(textwrap.dedent(block))
    opened: list[RecipeSource] = []
    monkeypatch.setattr(RecipeSource, "open", lambda self: opened.append(self) or [])
    recipe_sources(str(tmp_path / "recipe.yaml"))
    assert [bool(source.dataset) for source in opened] == [False, False, True]


def test_commands_of_dla_data_are_known() -> None:
    commands = re.findall(r"^dla-data ([^#\n]*)", SHELL, re.MULTILINE)
    assert len(commands) >= 8 and all(_parser().parse_args(shlex.split(command)) for command in commands)
