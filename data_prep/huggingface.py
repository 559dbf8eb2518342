"""Records out of Hugging Face datasets: saved folders, folders in the hub's layout, and names on the hub.

Only data is ever loaded: no argument lets a dataset bring code of its own, so one that is made by a script is an error.
Streamed or not, rows come in the dataset's own order. A network that fails ends the preparation whatever the policy for
bad records, for the rest of a dataset is not a bad record; the same command goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.records import PrepareError, Record, RecordForm, SourceOptions
from data_prep.sources import ROWS_PER_READ, within


class HuggingFaceDataset:
    """A split of a Hugging Face dataset: a folder written by `save_to_disk`, or what `load_dataset` takes.

    Raises PrepareError if it cannot be loaded, or has no such split or field.
    """

    unit = "doc"

    def __init__(
        self,
        dataset: str,
        options: SourceOptions | None = None,
        *,
        split: str = "train",
        config: str | None = None,
        data_files: str | None = None,
        revision: str | None = None,
        streaming: bool = False,
    ) -> None:
        self.name = f"{dataset}:{split}" + (f":{data_files}" if data_files else "")
        self.options = options or SourceOptions()
        self._streaming = streaming
        self._dataset = _load_dataset(dataset, split, config, data_files, revision, streaming)
        names = self._column_names()
        self._columns = [self.options.text_field]
        if self.options.languages:
            self._columns.append(self.options.language_field.partition(".")[0])
        for column in self._columns:
            if column not in names:
                raise PrepareError(f"dataset {self.name} has no field {column!r}; choose one of {names}")
        fingerprint = "" if streaming else str(self._dataset._fingerprint)
        self.identity: list[str | int] = [self.name, config or "", revision or "", fingerprint, self.total or 0]
        """Names, and the library's fingerprint of the rows where there is one."""

    def _column_names(self) -> list[str]:
        if self._dataset.column_names is not None:
            return list(self._dataset.column_names)
        with self._readable("at its first row"):  # a stream whose columns nobody declared
            return list(next(iter(self._dataset), {}))

    @property
    def total(self) -> int | None:
        """Rows; of a stream only if the dataset declares them."""
        if not self._streaming:
            return len(self._dataset)
        split = (self._dataset.info.splits or {}).get(str(self._dataset.split))
        return split.num_examples if split is not None and split.num_examples else None

    def records(self, start: int = 0) -> Iterator[Record]:
        """Rows after the first `start`. Raises PrepareError if the dataset cannot be read on."""
        form, done = RecordForm(self.name, "row", False, self.options), start
        if not self._streaming and start >= len(self._dataset):
            return
        rows = self._dataset.select_columns(self._columns).skip(start).iter(batch_size=ROWS_PER_READ)
        while True:
            with self._readable(f"after row {done}"):
                batch = next(rows, None)
            if batch is None:
                return
            texts = batch[self._columns[0]]
            tags = batch[self._columns[-1]] if self.options.languages else [None] * len(texts)
            for text, tag in zip(texts, tags, strict=True):
                done += 1
                yield Record(form, _payload(text, done, form), self._tag(tag), done, 0, 1)

    def _tag(self, tag: Any) -> Any:
        for name in self.options.language_field.split(".")[1:]:
            tag = tag.get(name) if isinstance(tag, dict) else None
        return tag

    @contextmanager
    def _readable(self, where: str) -> Iterator[None]:
        import datasets

        try:
            yield
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            mend = "mend it or try again: the same command goes on from the last finished shard"
            raise PrepareError(f"dataset {self.name} cannot be read {where}: {error}; {mend}") from error


def _payload(text: Any, number: int, form: RecordForm) -> Any:
    """The text, nothing for null; what is of another type is found out with the other records."""
    if not isinstance(text, str) or len(text) * 4 <= form.options.largest_bytes:
        return "" if text is None else text
    checked = within(text.encode("utf-8", "surrogatepass"), number, form)
    return text if isinstance(checked, bytes) else checked


def _load_dataset(
    name: str, split: str, config: str | None, data_files: str | None, revision: str | None, streaming: bool
) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise PrepareError(f"dataset {name} needs `datasets`; run `pip install dla-train[huggingface]`") from error
    folder = Path(name)
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        if not saved:
            return datasets.load_dataset(
                name, config, split=split, data_files=data_files, revision=revision, streaming=streaming
            )
        dataset = datasets.load_from_disk(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # unknown name or split, no network, a damaged folder, a dataset that is a script
        raise PrepareError(f"dataset {name} (split {split!r}) cannot be loaded: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise PrepareError(f"dataset {name} has no split {split!r}; pass --split, one of {sorted(dataset)}")
        dataset = dataset[split]
    return dataset.to_iterable_dataset() if streaming else dataset
