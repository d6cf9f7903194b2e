"""Reads text from Parquet files, and from folders that Hugging Face `datasets` saved (Arrow), without `datasets`.

Rows are read in batches of about a MiB, so memory does not grow with a file or its row groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bert_fast.errors import UserError

COLUMN_SUFFIXES = (".parquet", ".arrow")
STRINGS = ("string", "large_string", "string_view")
"""Types of columns of strings."""
_BATCH_BYTES = 1 << 20
_MOST_ROWS = 4096


def read_rows(path: str | Path, column: str = "text") -> Iterator[tuple[int, int, str | None]]:
    """(row group or record batch, row in it, text or None) of every row of a file, in order.

    Raises:
        UserError: the file is damaged; it has no such column of strings, or two; or a text is not UTF-8. The message names
            the columns, or the row.
    """
    for block, row, values in read_columns(path, lambda types: [_check_column(path, types, column)]):
        yield block, row, values[0]


def read_columns(
    path: str | Path, choose: Callable[[list[tuple[str, str]]], list[str]]
) -> Iterator[tuple[int, int, list[Any]]]:
    """(row group or record batch, row in it, values) of every row of a file, in order.

    Args:
        choose: a function of the name and the type of each column that says which are read. What it raises is passed on.

    Raises:
        UserError: the file is damaged, or a text is not UTF-8; the message names the row.
    """
    arrow = _pyarrow()
    is_parquet = str(path).endswith(".parquet")
    try:
        for block, first_row, batch, names in (_parquet_batches if is_parquet else _arrow_batches)(arrow, path, choose):
            columns = [batch.column(batch.schema.names.index(name)) for name in names]
            for row in range(batch.num_rows):
                values = []
                for name, column in zip(names, columns, strict=True):
                    try:
                        values.append(column[row].as_py())
                    except UnicodeDecodeError as error:
                        raise UserError(
                            f"{path}: {block_name(path)} {block}, row {first_row + row}: column {name} is not UTF-8 (byte "
                            f"{error.start}); write the file again from decoded text"
                        ) from None
                yield block, first_row + row, values
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged, or no {Path(path).suffix[1:]} file ({str(error)[:120]})") from None


def block_name(path: str | Path) -> str:
    """What the rows of such a file are read in, as messages call it."""
    return "row group" if str(path).endswith(".parquet") else "record batch"


def _check_column(path: str | Path, types: list[tuple[str, str]], column: str) -> str:
    names = [name for name, _ in types]
    count = names.count(column)
    if not count:
        raise UserError(f"{path}: no column {column}; it has {', '.join(names)[:200]} (--column names another)")
    if count > 1:
        raise UserError(f"{path}: {count} columns are called {column}; rename all but the one that is meant")
    kind = dict(types)[column]
    if kind not in STRINGS:
        raise UserError(f"{path}: column {column} holds {kind}, not strings")
    return column


_Choose = Callable[[list[tuple[str, str]]], list[str]]
_Batches = Iterator[tuple[int, int, Any, list[str]]]  # block, its first row, record batch, chosen columns


def _types(schema: Any) -> list[tuple[str, str]]:
    return [(field.name, str(field.type)) for field in schema]


def _parquet_batches(arrow: Any, path: str | Path, choose: _Choose) -> _Batches:
    # Read through a buffer: otherwise a whole column of a row group is loaded before its first row
    with arrow.parquet.ParquetFile(path, buffer_size=_BATCH_BYTES, pre_buffer=False) as file:
        names = choose(_types(file.schema_arrow))
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            rows = max(1, min(_MOST_ROWS, _BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)))
            first = 0
            for batch in file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False):
                yield group, first, batch, names
                first += batch.num_rows


def _arrow_batches(arrow: Any, path: str | Path, choose: _Choose) -> _Batches:
    """`datasets` saves streams; other tools save files. Batches are views into the memory map."""
    with arrow.memory_map(str(path)) as file:
        try:
            reader = arrow.ipc.open_stream(file)
            batches = iter(reader)
        except arrow.ArrowInvalid:
            file.seek(0)
            reader = arrow.ipc.open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        names = choose(_types(reader.schema))
        for block, batch in enumerate(batches):
            yield block, 0, batch, names


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError("reading Parquet or Arrow files needs pyarrow; pip install pyarrow") from None
    return pyarrow
