"""A file that grows, read line by line while another process writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bert_fast.errors import UserError
from bert_fast.foreign import open_regular, shown
from bert_fast.report.metrics import MAX_LINE_BYTES

_HEAD = 256  # first bytes of a file, by which a file that took its place is told


class Tail:
    """Whole lines of a file that grows, each once; from its beginning again if it was replaced."""

    def __init__(self, path: Path, block_bytes: int = 1 << 22) -> None:
        """`block_bytes` are read at a time; a line may be longer."""
        self.path, self._block_bytes, self._offset, self._head = path, block_bytes, 0, b""

    def read(self) -> tuple[bool, Iterator[bytes]]:
        """Whether the file is another than at the last call, and its new lines. A last line without its end waits.

        Raises:
            UserError: no regular file, one that cannot be read, or (from the lines) a line longer than any of a run.
        """
        try:
            descriptor = open_regular(self.path)  # anew each time: so a network file system asks its server
        except FileNotFoundError:
            replaced = self._offset > 0
            self._offset, self._head = 0, b""
            return replaced, iter(())
        file = os.fdopen(descriptor, "rb")
        head = file.read(_HEAD)
        replaced = not head.startswith(self._head)  # a shorter file does not start so either, or is caught below
        replaced = replaced or file.seek(0, 2) < self._offset
        if replaced:
            self._offset = 0
        self._head = head
        return replaced, self._lines(file)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        with file:
            file.seek(self._offset)
            rest = b""
            while block := file.read(self._block_bytes):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    self._offset += len(line) + 1
                    yield line
                if len(rest) > MAX_LINE_BYTES:
                    raise UserError(
                        f"{shown(self.path)}: the line at byte {self._offset:,} is longer than {MAX_LINE_BYTES >> 20} MiB; "
                        "no run writes such lines"
                    )
