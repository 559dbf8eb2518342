"""What the installed package holds: every code folder, the configurations, and commands that exist."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]


def folder_of(package: str) -> Path:
    top, _, rest = package.partition(".")
    return ROOT / FOLDERS.get(package, f"{FOLDERS.get(top, top)}/{rest.replace('.', '/')}")


def test_every_code_folder_is_packaged() -> None:
    listed = {folder_of(package).resolve() for package in PROJECT["tool"]["setuptools"]["packages"]}
    code = {path.parent for top in ("dla_train", "data_prep", "kernels") for path in (ROOT / top).rglob("*.py")}
    assert listed == code | {ROOT / "configs"}


def test_every_configuration_file_is_packaged() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    taken = {path for pattern in data["dla_train.configs"] for path in (ROOT / "configs").glob(pattern)}
    assert taken == {path for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert taken
    tables = {path for pattern in data["dla_train.harness"] for path in (ROOT / "dla_train/harness").glob(pattern)}
    assert tables == {path for path in (ROOT / "dla_train").rglob("*.yaml")} != set()
    pages = {
        path
        for pattern in data["dla_train.inspect_memory"]
        for path in (ROOT / "dla_train/inspect_memory").glob(pattern)
    }
    assert pages == {path for path in (ROOT / "dla_train").rglob("*.html")} != set()
    recipes = {path for pattern in data["data_prep"] for path in (ROOT / "data_prep").glob(pattern)}
    assert (
        recipes
        == {path for path in (ROOT / "data_prep").rglob("*") if path.is_file() and path.suffix == ".yaml"}
        != set()
    )


@pytest.mark.parametrize("command", sorted(PROJECT["project"]["scripts"]))
def test_every_console_script_names_a_function(command: str) -> None:
    module, function = PROJECT["project"]["scripts"][command].split(":")
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def test_every_required_package_has_a_tested_version() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    extras = PROJECT["project"]["optional-dependencies"].values()
    for requirement in [*PROJECT["project"]["dependencies"], *(item for extra in extras for item in extra)]:
        name = requirement.split(">")[0].split("[")[0].strip().lower()
        assert name == "dla-train" or name in pinned, requirement


def test_no_kernels_package_shadows_the_one_on_the_package_index() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
