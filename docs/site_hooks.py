"""What mkdocs.yml cannot say: the first page is the README, every package has a page made of its docstrings, and links
out of docs/ become plain text, for the site holds nothing else of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "dla_kernels": ROOT / "kernels" / "dla_kernels",
    "dla_train": ROOT / "dla_train",
    "data_prep": ROOT / "data_prep",
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?!https?:|#)[^)#]*)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the first page and the pages of the API, and these to the navigation."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_below_docs(readme)))
    pages = {f"api/{name}.md": text for name, text in _api()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    assert config.nav is not None
    config.nav.append({"API": [{Path(path).stem: path} for path in pages]})
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that leave docs/ as plain text."""
    return LINK.sub(lambda link: f"`{link[1]}`" if link[2].startswith("../") else link[0], markdown)


def _below_docs(readme: str) -> str:
    """The README as it reads from docs/: paths of docs lose their folder, all others leave it."""
    links = LINK.sub(lambda link: f"[{link[1]}]({_from_docs(link[2])}{link[3] or ''})", readme)
    return links.replace("](docs/", "](")


def _from_docs(path: str) -> str:
    return "results/README.md" if path == "docs/results" else path if path.startswith("docs/") else f"../{path}"


def _api() -> list[tuple[str, str]]:
    """Name and text of every page: a package's modules in alphabetical order, without programs that measure."""
    pages = []
    for package, folder in PACKAGES.items():
        own = [path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
        if package == "dla_kernels":
            pages.append((package, _page(package, [f"{package}.{name}" for name in _public(folder)])))
            continue
        pages.append((package, _page(package, [f"{package}.{path.stem}" for path in own])))
        for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
            if inner.name != "bench":
                modules = [path for path in sorted(inner.rglob("*.py")) if path.stem != "__init__"]
                names = [".".join(path.relative_to(folder.parent).with_suffix("").parts) for path in modules]
                pages.append((f"{package}.{inner.name}", _page(f"{package}.{inner.name}", names)))
    return pages


def _public(folder: Path) -> list[str]:
    """Names in a package's `__all__`."""
    text = (folder / "__init__.py").read_text(encoding="utf-8").partition("__all__ = [")[2]
    return re.findall(r'"(\w+)"', text)


def _page(title: str, names: list[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)]) + "\n"
