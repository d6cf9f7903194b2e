"""Reads source files as streams of texts: decompressed, decoded, split into documents. Memory is bounded."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from bert_fast.errors import UserError

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
STRETCH = 1 << 20  # characters of a document that travel at once
LONGEST_LINE = 1 << 25
"""Bytes of a line that cannot be cut; a file with a longer one is refused."""


@dataclass(frozen=True)
class Source:
    """One file of a corpus. `name` is stable across machines and decides the split; `path` is where it lies."""

    name: str
    path: str


@dataclass(frozen=True)
class Text:
    """The text of a document as it is in the source, or a stretch of it.

    `goes_on`: the next one is the rest of this one. `left_out`: why there is no text, or empty.
    """

    origin: str
    text: str
    goes_on: bool = False
    left_out: str = ""


def bare_name(name: str) -> str:
    """A name without the ending of its compression."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix in COMPRESSED else name


def stretches(origin: str, lines: Iterable[str]) -> Iterator[Text]:
    """A document in stretches that end at a blank line, or at any line where none comes for long."""
    held: list[str] = []
    size = 0
    for line in lines:
        if size >= STRETCH and (not line.strip() or size >= 2 * STRETCH):
            yield Text(origin, "".join(held), goes_on=True)
            held, size = [], 0
        for begin in range(0, len(line), STRETCH):
            held.append(line[begin : begin + STRETCH])
            size += len(held[-1])
    yield Text(origin, "".join(held))


def read_lines(source: Source, whole: bool = False) -> Iterator[tuple[int, str]]:
    """Number and text of each line, decompressed and decoded. `whole`: lines that cannot be cut where they are too long.

    Raises:
        UserError: not UTF-8 (file, line and byte), a damaged file, WikiExtractor's <doc> lines, or a line that is too long.
    """
    number, offset = 1, 0
    try:
        with _opened(source) as file:
            while raw := file.readline(LONGEST_LINE if whole else STRETCH):
                if whole and len(raw) == LONGEST_LINE and raw[-1:] != b"\n":
                    raise UserError(f"{source.path}, line {number} is longer than {LONGEST_LINE >> 20} MiB")
                raw += file.read(_missing_bytes(raw))
                try:
                    line = raw.decode("utf-8-sig" if offset == 0 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{source.path} is not UTF-8 text (byte {offset + error.start}) in line {number}; convert it with iconv"
                    ) from None
                offset += len(raw)
                if "\r" in line:
                    line = line.replace("\r\n", "\n").replace("\r", "\n")
                if not whole and line.startswith("<doc ") and "id=" in line:
                    raise UserError(
                        f"{source.path}, line {number} is a <doc> line of WikiExtractor; use --corpus wikiextractor"
                    )
                yield number, line
                number += raw[-1:] == b"\n"
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f"{source.path}, after line {number - 1}: {error}; the file is damaged or not readable"
        ) from None


def _opened(source: Source) -> BinaryIO:
    opener = COMPRESSED.get(os.path.splitext(source.name.lower())[1], open)
    return opener(source.path, "rb")


def _missing_bytes(raw: bytes) -> int:
    """Number of bytes that are missing of the last character, if a line was cut inside it."""
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        if byte & 0xC0 != 0x80:
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return max(0, length - back)
    return 0


def json_document(source: Source, number: int, line: str, column: str) -> Iterator[Text]:
    """The text in one field of a JSON object. Raises UserError naming the line: no object, no such field, no text in it."""
    where = f"{source.path}, line {number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({str(error)[:100]}); a file of JSON lines has one object per line"
        ) from None
    if not isinstance(entry, dict):
        raise UserError(f"{where} holds no JSON object; a file of JSON lines has one object per line")
    if column not in entry:
        raise UserError(
            f"{where}: no field {column}; it has {', '.join(map(str, entry))[:200]} (--column names another)"
        )
    value = entry[column]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: field {column} holds no string")
    yield from stretches(f"{source.name}#{number}", (value or "").splitlines(keepends=True))
