"""The images' files, without an engine: sources exist, versions are the tested ones, signals arrive, nobody is root."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from dla_train.config_rules import validate
from dla_train.hydra_app import compose
from dla_train.launch.settings import load_launcher, split

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "docker/Dockerfile", ROOT / "docker/Dockerfile.cpu"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) in order; comments and line breaks taken out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def given(path: Path, word: str) -> list[str]:
    return [rest for name, rest in instructions(path) if name == word]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_everything_that_is_copied_exists_and_reaches_the_engine(path: Path) -> None:
    copied = [shlex.split(rest)[:-1] for rest in given(path, "COPY") if "--from=" not in rest]
    sources = {name for names in copied for name in names}
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert "*" in ignored and {f"!{name}" for name in sources} == {line for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in sources)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tops = {"kernels" if package.startswith("dla_kernels") else package.split(".")[0] for package in packages}
    others = {"configs", "pyproject.toml", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"]}
    assert tops | others == sources


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_base_is_pinned_and_of_the_tested_python_and_every_install_takes_the_tested_versions(path: Path) -> None:
    (base,) = [rest for rest in given(path, "ARG") if rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=python:3\.11\.\d+-slim-bookworm", base)
    assert "Python 3.11" in (ROOT / "constraints.txt").read_text().splitlines()[0]
    assert all(rest.startswith("${BASE} AS ") for rest in given(path, "FROM"))
    installs = re.findall(r"pip install ([^&]*)", " ".join(given(path, "RUN")))
    assert installs and all("-c constraints.txt" in install for install in installs)
    assert not re.search(r"==|:latest", path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_signals_arrive_and_the_process_is_not_root(path: Path) -> None:
    assert given(path, "ENTRYPOINT") == ['["tini", "--", "dla-launch"]'] and "dla-launch" in PROJECT["scripts"]
    (user,) = given(path, "USER")
    assert user == "1000:1000" and "--uid 1000" in " ".join(given(path, "RUN"))
    last = [index for index, (word, _) in enumerate(instructions(path)) if word == "RUN"][-1]
    assert instructions(path).index(("USER", user)) > last


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_extras_that_are_installed_exist(path: Path) -> None:
    extras = re.findall(r"'\.\[([\w,]+)\]'", " ".join(given(path, "RUN")))
    assert extras and {name for group in extras for name in group.split(",")} <= set(PROJECT["optional-dependencies"])


def test_the_compose_files_run_is_legal_and_both_hosts_are_started_alike() -> None:
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    assert services["first"] == services["second"] and services["data"]["image"] == services["first"]["image"]
    own, run = split(services["first"]["command"])
    launcher = load_launcher(own)
    assert launcher.nodes == 2 and launcher.endpoint.partition(":")[0] in services
    config = compose(run)
    assert config.train.global_batch_rows == 2 * config.train.micro_batch_rows
    file = services["first"]["build"]["dockerfile"]
    assert (ROOT / file).is_file() and (ROOT / "docker" / services["first"]["build"]["context"]).resolve() == ROOT
    tried = services["data"]["entrypoint"]
    short = compose(["experiment=quickstart", *[word for word in tried if "=" in word]])
    validate(short)
    assert short.run_dir != config.run_dir and short.data == config.data


def test_the_apptainer_recipe_starts_from_the_image_that_is_documented() -> None:
    recipe = (ROOT / "docker/dla-train.def").read_text()
    image = re.search(r"^From: (\S+)$", recipe, re.MULTILINE)
    assert image and not image[1].endswith(":latest")
    assert f"-t {image[1]} ." in (ROOT / "docker/Dockerfile").read_text()
    assert f"-t {image[1]} ." in (ROOT / "docs/docker.md").read_text()
    assert 'exec dla-launch "$@"' in recipe
