"""Reading files that others wrote, safely: bounded size and nesting, checked numbers, text that is safe to print."""

from __future__ import annotations

import json
import math
import os
import stat
import unicodedata
from pathlib import Path
from typing import Any

import yaml

from bert_fast.errors import UserError

MOST_DEPTH = 100  # of nested lists and objects
_MIB = 1 << 20


def open_regular(path: str | Path) -> int:
    """Open a regular file to read and return its descriptor. Does not wait for the other end of a pipe.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be opened, or is a device, a pipe or a folder, which may have no end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{shown(path)}: {reason}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{shown(path)} is no regular file; give a file on disk")
    return descriptor


def read_bounded(path: str | Path, most: int, what: str) -> bytes:
    """All bytes of a file.

    Args:
        most: the most bytes that are read.
        what: what the file is, for the message: `a result log`.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not a regular file, cannot be read, or is longer than `most`.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            data = file.read(most + 1) if size <= most else b""
        except OSError as error:
            raise UserError(f"{shown(path)}: {error.strerror}") from None
    if size > most or len(data) > most:
        size = max(size, len(data))
        raise UserError(
            f"{shown(path)} has {size / _MIB:,.0f} MiB, and of {what} at most {most / _MIB:,.0f} MiB are read; "
            "is it another kind of file?"
        )
    return data


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for text that is not JSON, or nested deeper than MOST_DEPTH."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"lists or objects are nested deeper than {MOST_DEPTH}") from None
    _check_depth(value)
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, plain types only. Raises ValueError for text that is not YAML, or nested too deep."""
    try:
        value = yaml.safe_load(text)  # the Python loader, as libyaml overflows the stack on deep nesting
    except RecursionError:
        raise ValueError(f"lists or mappings are nested deeper than {MOST_DEPTH}") from None
    except Exception as error:  # of the YAML, or whatever int(), datetime() and others raise for a scalar
        raise ValueError(getattr(error, "problem", None) or str(error)) from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    """Refuse a value nested deeper than MOST_DEPTH; each list and mapping is visited once per depth."""
    level, depth = [value], 0
    while level:
        if depth > MOST_DEPTH:
            raise ValueError(f"lists or objects are nested deeper than {MOST_DEPTH}")
        inner: dict[int, Any] = {}  # aliases of YAML may name one list many times
        for each in level:
            for one in each.values() if isinstance(each, dict) else each if isinstance(each, list) else ():
                if isinstance(one, dict | list):
                    inner[id(one)] = one
        level, depth = list(inner.values()), depth + 1


def number(value: Any, most: float = 1e15) -> float | None:
    """`value` if it is a finite number of at most this size, else None (text, booleans, lists, infinity)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -most <= value <= most and math.isfinite(value) else None


def whole_number(value: Any, most: int = 1 << 53) -> int | None:
    """`value` if it is a whole number from 0 to `most` (448.0 is one), else None."""
    found = number(value, most)
    return int(value) if found is not None and found >= 0 and value == int(value) else None


def shown(value: object, most: int = 200) -> str:
    """Foreign text made safe for a terminal: one line, no control characters, cut after `most` characters."""
    text = value if isinstance(value, str) else _text(value)
    cut = text[:most]
    safe = "".join(character if _is_plain(character) else _escaped(character) for character in cut)
    return safe if len(text) <= most else f"{safe}... ({len(text):,} characters)"


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 10_000:
        return f"a whole number of {value.bit_length():,} bits"  # str() refuses it
    try:
        return str(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


def _is_plain(character: str) -> bool:
    return (character.isascii() and character.isprintable()) or unicodedata.category(character)[0] not in "CZ"


def _escaped(character: str) -> str:
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character) or (
        f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
    )
