"""Reads source files as streams of texts: decompressed, decoded, split into documents. Memory is bounded."""

from __future__ import annotations

import bz2
import gzip
import html
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from bert_fast.data.parquet import read_rows
from bert_fast.data.text import without_fences
from bert_fast.errors import UserError

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_STRETCH = 1 << 20  # characters of a long document that are passed on at once
_LONGEST_LINE = 1 << 25  # bytes of a line that cannot be cut


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


def read_texts(kind: str, source: Source, column: str = "text") -> Iterator[Text]:
    """Documents of one source file as text. Memory does not grow with the file.

    Args:
        kind: one of `corpus.KINDS`.
        column: the field or column that holds the text, of JSON lines and Parquet.

    Raises:
        UserError: text that is not UTF-8, a damaged file, or a file of another kind; the line or row is named.
    """
    if kind == "prose":
        lines = (line for _, line in _lines(source))
        is_markdown = bare_name(source.name.lower()).endswith(".md")
        yield from _stretches(source.name, without_fences(lines) if is_markdown else lines)
    elif kind == "mlcommons":
        yield from _read_mlcommons(source)
    elif kind == "jsonl":
        yield from _read_json_lines(source, column)
    elif kind == "wikiextractor":
        yield from _read_wikiextractor(source)
    elif kind == "parquet":
        for block, row, value in read_rows(source.path, column):
            yield from _stretches(f"{source.name}#{block}.{row}", (value or "").splitlines(keepends=True))
    else:
        raise ValueError(f"no texts of a corpus {kind}")


def _stretches(origin: str, lines: Iterable[str]) -> Iterator[Text]:
    """A document in stretches that end at a blank line, or at any line if there is none for long."""
    held: list[str] = []
    size = 0
    for line in lines:
        if size >= _STRETCH and (not line.strip() or size >= 2 * _STRETCH):
            yield Text(origin, "".join(held), goes_on=True)
            held, size = [], 0
        for begin in range(0, len(line), _STRETCH):
            held.append(line[begin : begin + _STRETCH])
            size += len(held[-1])
    yield Text(origin, "".join(held))


def _lines(source: Source, whole: bool = False) -> Iterator[tuple[int, str]]:
    """Number and text of each line, decompressed and decoded. `whole`: refuse a line that is too long, and do not cut it.

    Raises:
        UserError: not UTF-8 (file, line and byte), a damaged file, WikiExtractor's <doc> lines, or a line that is too long.
    """
    number, offset = 1, 0
    try:
        with _opened(source) as file:
            while raw := file.readline(_LONGEST_LINE if whole else _STRETCH):
                if whole and len(raw) == _LONGEST_LINE and raw[-1:] != b"\n":
                    raise UserError(f"{source.path}, line {number} is longer than {_LONGEST_LINE >> 20} MiB")
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


def _read_mlcommons(source: Source) -> Iterator[Text]:
    sentences: list[str] = []
    index = size = 0
    for _, raw in _lines(source):
        for line in map(str.strip, raw.removesuffix("\n").split("\n")):
            if line:
                if size >= _STRETCH:
                    yield Text(f"{source.name}#{index}", "\n".join(sentences), goes_on=True)
                    sentences, size = [], 0
                sentences.append(line)
                size += len(line)
            elif sentences:
                yield Text(f"{source.name}#{index}", "\n".join(sentences))
                index, size, sentences = index + 1, 0, []
    if sentences:
        yield Text(f"{source.name}#{index}", "\n".join(sentences))


def _read_json_lines(source: Source, column: str) -> Iterator[Text]:
    for number, line in _lines(source, whole=True):
        if line.strip():
            yield from _json_document(source, number, line, column)


def _json_document(source: Source, number: int, line: str, column: str) -> Iterator[Text]:
    where = f"{source.path}, line {number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({str(error)[:100]}); a file of JSON lines has an object a line"
        ) from None
    if not isinstance(entry, dict):
        raise UserError(f"{where} holds no JSON object; a file of JSON lines has an object a line")
    if column not in entry:
        raise UserError(
            f"{where}: no field {column}; it has {', '.join(map(str, entry))[:200]} (--column names another)"
        )
    value = entry[column]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: field {column} holds no string")
    yield from _stretches(f"{source.name}#{number}", (value or "").splitlines(keepends=True))


def _read_wikiextractor(source: Source) -> Iterator[Text]:
    """Articles between <doc ...> and </doc>, one paragraph per line; or one JSON object per line."""
    start: int | None = None  # line of the <doc> that is open
    title = ""
    paragraphs: list[str] = []
    for number, raw in _lines(source, whole=True):
        line = raw.strip()
        if start is None and line.startswith("{"):
            yield from _json_document(source, number, line, "text")
        elif start is None and line.startswith("<doc "):
            start, found = number, re.search(r'\btitle="(.*?)"', line)
            title = html.unescape(found[1]) if found else ""
        elif start is not None and line == "</doc>":
            yield from _stretches(f"{source.name}#{start}", paragraphs)
            start, paragraphs = None, []
        elif start is not None:
            paragraph = html.unescape(line)
            if paragraphs or paragraph not in ("", title):  # its title stands above an article
                paragraphs.append(f"{paragraph}\n\n")
        elif line:
            raise UserError(
                f"{source.path}, line {number} stands outside of <doc> ... </doc>; is it a file of WikiExtractor?"
            )
    if start is not None:
        raise UserError(f"{source.path} ends within the <doc> of line {start}; write the file again")
