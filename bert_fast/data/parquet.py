"""Reads text from Parquet files, and from folders that Hugging Face `datasets` saved (Arrow), without `datasets`.

Rows are read in batches of about a MiB, so memory does not grow with a file or its row groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bert_fast.errors import UserError

COLUMN_SUFFIXES = (".parquet", ".arrow")
_BATCH_BYTES = 1 << 20
_MOST_ROWS = 4096


def read_rows(path: str | Path, column: str = "text") -> Iterator[tuple[int, int, str | None]]:
    """(row group or record batch, row in it, text or None) of every row of a file, in order.

    Raises:
        UserError: the file is damaged; it has no such column of strings, or two; or a text is not UTF-8. The message names
            the columns, or the row.
    """
    arrow = _pyarrow()
    is_parquet = str(path).endswith(".parquet")
    try:
        batches = _parquet_batches(arrow, path, column) if is_parquet else _arrow_batches(arrow, path, column)
        for block, first_row, values in batches:
            for row, value in enumerate(values, first_row):
                try:
                    yield block, row, value.as_py()
                except UnicodeDecodeError as error:
                    what = "row group" if is_parquet else "record batch"
                    raise UserError(
                        f"{path}: {what} {block}, row {row}: column {column} is not UTF-8 (byte {error.start}); write the file "
                        "again from decoded text"
                    ) from None
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged, or no {Path(path).suffix[1:]} file ({str(error)[:120]})") from None


def _check_column(path: str | Path, schema: Any, column: str) -> None:
    count = schema.names.count(column)
    if not count:
        raise UserError(f"{path}: no column {column}; it has {', '.join(schema.names)[:200]} (--column names another)")
    if count > 1:
        raise UserError(f"{path}: {count} columns are called {column}; rename all but the one that is meant")
    kind = str(schema.field(column).type)
    if kind not in ("string", "large_string", "string_view"):
        raise UserError(f"{path}: column {column} holds {kind}, not strings")


def _parquet_batches(arrow: Any, path: str | Path, column: str) -> Iterator[tuple[int, int, Any]]:
    # Read through a buffer: otherwise a whole column of a row group is loaded before its first row
    with arrow.parquet.ParquetFile(path, buffer_size=_BATCH_BYTES, pre_buffer=False) as file:
        _check_column(path, file.schema_arrow, column)
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            rows = max(1, min(_MOST_ROWS, _BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))
            first = 0
            for batch in file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
                yield group, first, batch.column(0)
                first += batch.num_rows


def _arrow_batches(arrow: Any, path: str | Path, column: str) -> Iterator[tuple[int, int, Any]]:
    """`datasets` saves streams; other tools save files. Batches are views into the memory map."""
    with arrow.memory_map(str(path)) as file:
        try:
            reader = arrow.ipc.open_stream(file)
            batches = iter(reader)
        except arrow.ArrowInvalid:
            file.seek(0)
            reader = arrow.ipc.open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        _check_column(path, reader.schema, column)
        for block, batch in enumerate(batches):
            yield block, 0, batch.column(reader.schema.names.index(column))


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError("reading Parquet or Arrow files needs pyarrow; pip install pyarrow") from None
    return pyarrow
