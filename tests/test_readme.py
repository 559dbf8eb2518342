"""What the README names exists, and its training commands are legal configurations with the sizes it states."""

import re
import shlex
from pathlib import Path

import pytest

from dla_train.config_rules import validate
from dla_train.hydra_app import compose
from dla_train.models.cost import parameter_count

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
TRAINING = re.findall(r"^dla-train ([^#\n]*)", SHELL, re.MULTILINE)
SIZES = re.findall(r"^\| `(\w+)`[^|]*\|(?:[^|]*\|){4} (\d+)M \| (?:(\d+)M)?", README, re.MULTILINE)


def test_links_and_pictures_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("name", sorted(set(re.findall(r"^make ([\w-]+)", SHELL, re.MULTILINE))))
def test_make_targets_exist(name):
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_are_legal(command):
    validate(compose(shlex.split(command)))


def test_there_are_training_commands_and_sizes_to_check():
    assert len(TRAINING) >= 2 and len(SIZES) == 9


@pytest.mark.parametrize("model, single, dla", SIZES)
def test_parameters_are_as_stated(model, single, dla):
    base = "none" if model.startswith("transformer") else "single"
    for memory, stated in ((base, single), ("dla", dla)):
        if stated:
            config = compose(["experiment=quickstart", f"model={model}", f"memory={memory}"])
            assert round(parameter_count(config.model, config.memory) / 1e6) == int(stated)


def test_every_memory_named_is_a_configuration():
    table = README[README.index("| `memory=`") : README.index("On text a fixed tau")]
    rows = [row.split("|")[1] for row in table.splitlines()[2:] if row]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    shipped = {path.stem for path in (ROOT / "configs/memory").glob("*.yaml")}
    assert named == shipped - {"dla_rate_small"}
