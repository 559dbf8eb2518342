"""Every command explains itself: what it does, its exit code 0, and examples that can be copied."""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module, _, function = COMMANDS[command].partition(":")
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    try:
        code = getattr(importlib.import_module(module), function)()
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr().out
    assert not code
    assert len(re.findall(rf"^ +{command}\b", printed, re.M)) >= 2, printed
