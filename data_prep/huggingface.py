"""Documents out of Hugging Face datasets: saved folders and hub names. Imports `datasets` when one is opened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources import ROWS_PER_READ, Document, PrepareError, encodable


class HuggingFaceDataset:
    """A split of a Hugging Face dataset: a folder written by `save_to_disk`, or a name that `load_dataset` knows.

    Raises PrepareError if it cannot be loaded, or has no such split or field.
    """

    unit = "doc"

    def __init__(
        self,
        name: str,
        *,
        split: str = "train",
        config: str | None = None,
        text_field: str = "text",
        errors: str = "strict",
    ) -> None:
        self.name = f"{name}:{split}"
        self._field, self._errors = text_field, errors
        self._dataset = _load_dataset(name, split, config)
        if text_field not in self._dataset.column_names:
            raise PrepareError(
                f"dataset {self.name} has no field {text_field!r}; pass --text-field, one of "
                f"{self._dataset.column_names}"
            )

    @property
    def total(self) -> int:
        """Rows."""
        return len(self._dataset)

    def documents(self) -> Iterator[Document]:
        """One per row."""
        row = 0
        for rows in self._dataset.select_columns([self._field]).iter(batch_size=ROWS_PER_READ):
            for text in rows[self._field]:
                row += 1
                if text is not None and not isinstance(text, str):
                    raise PrepareError(f"{self.name}, row {row}: {self._field!r} is {type(text).__name__}, not text")
                yield Document(encodable(text or "", f"{self.name}, row {row}", self._errors), 1)


def _load_dataset(name: str, split: str, config: str | None) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise PrepareError(f"dataset {name} needs `datasets`; run `pip install dla-train[huggingface]`") from error
    folder = Path(name)
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        if not saved:
            return datasets.load_dataset(name, config, split=split)
        dataset = datasets.load_from_disk(name)
    except (OSError, ValueError) as error:  # unknown name or split, no network, damaged folder
        raise PrepareError(f"dataset {name} (split {split!r}) cannot be loaded: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise PrepareError(f"dataset {name} has no split {split!r}; pass --split, one of {sorted(dataset)}")
        return dataset[split]
    return dataset
