"""Recipes: YAML files that say what a corpus is read from, each source with its own fields and filters.

    sources:
      - {paths: [data/raw/books], min_characters: 2000}
      - {paths: [data/raw/web], text_field: content, language_field: meta.language, languages: [en]}
      - {dataset: togethercomputer/Long-Data-Collections, data_files: pretrain/*.jsonl.zst, streaming: true}

Sources are read in this order, into one output: a corpus that a blend shall weigh by itself is a recipe of its own. A
recipe that comes with this package is given by its name alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_prep.huggingface import HuggingFaceDataset
from data_prep.records import PrepareError, SourceOptions, TextSource
from data_prep.sources import text_sources

RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class RecipeSource(SourceOptions):
    """Files, or a Hugging Face dataset, and what to take from them."""

    paths: list[str] = field(default_factory=list)
    """Files and folders."""
    dataset: str | None = None
    """Instead of paths: a name on the hub, or a folder."""
    config: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split of the dataset."""
    data_files: str | None = None
    """Files of the dataset to take, a pattern."""
    revision: str | None = None
    """Commit, branch or tag of a dataset on the hub; a commit makes a restart the same."""
    streaming: bool = False
    """Read over the network instead of downloading first."""

    def open(self) -> list[TextSource]:
        """The sources. Raises PrepareError if neither or both of paths and dataset are given."""
        options = SourceOptions(**{item.name: getattr(self, item.name) for item in dataclasses.fields(SourceOptions)})
        if self.dataset is None:
            given = [name for name in ("config", "data_files", "revision", "streaming") if getattr(self, name)]
            if given:
                raise PrepareError(f"{given[0]} is of a dataset, but none is given; name one, or leave it out")
            return text_sources(self.paths, options)
        if self.paths or self.separator:
            raise PrepareError(f"dataset {self.dataset} is given beside paths or a separator; give one or the other")
        return [
            HuggingFaceDataset(
                self.dataset,
                options,
                split=self.split,
                config=self.config,
                data_files=self.data_files,
                revision=self.revision,
                streaming=self.streaming,
            )
        ]


@dataclass(frozen=True)
class Recipe:
    """What a corpus is read from."""

    sources: list[RecipeSource]


def recipe_sources(recipe: str) -> list[TextSource]:
    """The sources of a recipe: a YAML file, or the name of one that comes with this package. Raises PrepareError."""
    path = Path(recipe)
    if not path.is_file() and (RECIPES / f"{recipe}.yaml").is_file():
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in RECIPES.glob("*.yaml")))
        raise PrepareError(f"recipe {recipe} is neither a file nor one that comes with this package ({known})")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.load(path))
        contents = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError, ValueError, OSError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise PrepareError(f"recipe {path}: {reason}; its form is in docs/data.md") from error
    assert isinstance(contents, Recipe)
    if not contents.sources:
        raise PrepareError(f"recipe {path} has no sources; list at least one")
    return [source for entry in contents.sources for source in entry.open()]
