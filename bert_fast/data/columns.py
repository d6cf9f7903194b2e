"""Text out of Parquet files and of folders that Hugging Face `datasets` saved (Arrow), without `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bert_fast.errors import UserError

COLUMN_SUFFIXES = (".parquet", ".arrow")


def num_blocks(path: str | Path) -> int:
    """Row groups (Parquet) or record batches (Arrow) of a file: what workers share out. Raises UserError if damaged."""
    with _Table(path) as table:
        return table.num_blocks


def read_texts(path: str | Path, block: int, column: str = "text") -> Iterator[str]:
    """Texts of one block of a file; missing values are left out.

    Raises:
        UserError: the file is damaged, or has no such column of strings (it says which it has).
    """
    with _Table(path) as table:
        yield from table.texts(block, column)


class _Table:
    """A Parquet file, or an Arrow stream or file, as numbered blocks of rows."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._arrow = _pyarrow()
        try:
            if str(path).endswith(".parquet"):
                self._file = self._arrow.parquet.ParquetFile(path)
                self.num_blocks, self._schema = self._file.num_row_groups, self._file.schema_arrow
            else:
                self._file = self._arrow.memory_map(str(path))
                self._batches = self._read_arrow()
                self.num_blocks, self._schema = len(self._batches), self._arrow_schema
        except (self._arrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged, or no {Path(path).suffix[1:]} file ({str(error)[:120]})") from None

    def _read_arrow(self) -> list[Any]:
        """`datasets` saves streams; other tools save files. Batches are views into the memory map."""
        try:
            reader = self._arrow.ipc.open_stream(self._file)
            self._arrow_schema = reader.schema
            return list(reader)
        except self._arrow.ArrowInvalid:
            self._file.seek(0)
            reader = self._arrow.ipc.open_file(self._file)
            self._arrow_schema = reader.schema
            return [reader.get_batch(index) for index in range(reader.num_record_batches)]

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def texts(self, block: int, column: str) -> Iterator[str]:
        if column not in self._schema.names:
            raise UserError(
                f"{self._path}: no column {column}; it has {', '.join(self._schema.names)} (--column names another)"
            )
        kind = str(self._schema.field(column).type)
        if kind not in ("string", "large_string", "string_view"):
            raise UserError(f"{self._path}: column {column} holds {kind}, not strings")
        try:
            if str(self._path).endswith(".parquet"):
                values = self._file.read_row_group(block, columns=[column]).column(0)
            else:
                values = self._batches[block].column(self._schema.names.index(column))
        except (self._arrow.ArrowException, OSError) as error:
            raise UserError(f"{self._path}: block {block} is damaged ({str(error)[:120]})") from None
        for value in values.to_pylist():
            if value:
                yield value


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError("reading Parquet or Arrow files needs pyarrow; pip install pyarrow") from None
    return pyarrow
