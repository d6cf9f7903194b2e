"""Parquet files, or a folder that Hugging Face `datasets` saved, one document per row of a text column."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from bert_fast.data.corpora.base import TextCorpus
from bert_fast.data.folders import is_part_of_dataset
from bert_fast.data.parquet import COLUMN_SUFFIXES, read_rows
from bert_fast.data.streams import Source, Text, stretches


class Parquet(TextCorpus):
    suffixes = COLUMN_SUFFIXES
    space = 22  # compressed text becomes five times as much
    reads_column = True

    def recognizes(self, name: str) -> bool:
        return name.endswith(self.suffixes)

    def skips(self, files: list[Path]) -> Callable[[Path], str]:
        datasets: dict[Path, set[str] | None] = {}
        why = "files that `datasets` does not count (caches)"
        return lambda path: "" if is_part_of_dataset(path, datasets) else why

    def texts(self, source: Source, column: str) -> Iterator[Text]:
        for block, row, value in read_rows(source.path, column):
            yield from stretches(f"{source.name}#{block}.{row}", (value or "").splitlines(keepends=True))


CORPUS = Parquet()
