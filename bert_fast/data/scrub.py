"""Detects changes of a store during a run by comparing checksums of its blocks in the background."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bert_fast.data.store import BLOCK_BYTES, Store


def file_stamp(path: Path) -> tuple[int, int]:
    """The inode and the size in bytes of the file that has this name now. Raises OSError."""
    stat = os.stat(path)
    return stat.st_ino, stat.st_size


class Scrubber:
    """A thread that reads this rank's share of a store's blocks at a low rate, again and again.

    Attributes:
        alarm: what is wrong, or None.
        vanished: the alarm is about a missing or replaced file and not about bytes: what was read before was right.
        passes: how often all of this rank's blocks were found unchanged.
    """

    def __init__(
        self, store: Store, share: int, shares: int, mb_per_s: float, pause_s: float = 1.0,
        read_stamp: Callable[[Path], tuple[int, int]] = file_stamp,
    ) -> None:  # fmt: skip
        """
        Args:
            share, shares: this rank reads every `shares`-th block from `share` on (the ranks of a node divide the work).
            mb_per_s: rate in 10^6 bytes per second; a checksum costs about 1 ms of a core per MB.
            pause_s: seconds from the end of one pass over the blocks to the start of the next.
            read_stamp: tells whether a name still belongs to the same file: what it returns must not change.
        """
        self.alarm: str | None = None
        self.vanished = False
        self.passes = 0
        self._store, self._share, self._shares, self._rate = store, share, shares, mb_per_s * 1e6
        self._pause_s, self._read_stamp = pause_s, read_stamp
        self._files = {name: read_stamp(store.folder / name) for name in ("samples.bin", "offsets.npy", "lengths.npy")}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="block watch")

    def start(self) -> None:
        """Start the thread, if the rate is above 0 and the store has checksums."""
        if self._rate > 0 and self._store.block_crcs is not None:
            self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the thread reads: it was started, and has neither raised the alarm nor been told to stop."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Tell the thread to stop."""
        self._end.set()

    def check_share(self) -> bool:
        """Read all of this rank's blocks once, at the rate. Returns whether all are unchanged; else sets `alarm`.

        It also returns False when it was told to stop meanwhile. Raises OSError where the file cannot be read.
        """
        assert self._store.block_crcs is not None
        with open(self._store.folder / "samples.bin", "rb") as file:
            for block in range(self._share, len(self._store.block_crcs), self._shares):
                found, size = self._check_block(file, block)
                if found:
                    self.alarm = found
                    return False
                if self._end.wait(size / self._rate) or not self._files_are_same():
                    return False
        return True

    def changed(self, ids: np.ndarray) -> str | None:
        """What is wrong now with the blocks of these samples (int64 [B]); None if they are unchanged, or without checksums."""
        crcs = self._store.block_crcs
        if crcs is None:
            return None
        first, last = (each // BLOCK_BYTES for each in self._store.byte_ranges(ids))
        try:
            with open(self._store.folder / "samples.bin", "rb") as file:
                for block in sorted({n for a, b in zip(first, last, strict=True) for n in range(a, b + 1)}):
                    found, _ = self._check_block(file, block)
                    if found:
                        return found
        except OSError as error:
            return f"store {self._store.folder} can no longer be read ({error.strerror or error})"
        return None

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                if not self._files_are_same() or not self.check_share():
                    return
                self.passes += 1
                self._end.wait(self._pause_s)
        except OSError as error:
            with suppress(OSError):  # which file has gone since the last check of the names?
                if not self._files_are_same():
                    return
            self.vanished = True
            self.alarm = f"store {self._store.folder} can no longer be read ({error.strerror or error})"

    def _files_are_same(self) -> bool:
        """Whether every name still belongs to the file that was opened; else sets `alarm`."""
        for name, stamp in self._files.items():
            path = self._store.folder / name
            try:
                now = self._read_stamp(path)
            except FileNotFoundError:
                self.vanished = True
                self.alarm = f"{path} has vanished; put the store back"
                return False
            if now != stamp:
                self.alarm = f"{path} was replaced or cut while the run used it; put the store back"
                return False
        return True

    def _check_block(self, file: BinaryIO, block: int) -> tuple[str | None, int]:
        """What is wrong with a block (None if nothing is), and its size in bytes."""
        assert self._store.block_crcs is not None
        file.seek(block * BLOCK_BYTES)
        content = file.read(BLOCK_BYTES)
        sound = zlib.crc32(content) == self._store.block_crcs[block]
        return None if sound else self._text(block, len(content)), len(content)

    def _text(self, block: int, size: int) -> str:
        begin = block * BLOCK_BYTES
        first, last = self._store.samples_at(begin, begin + max(1, size))
        return (
            f"store {self._store.folder} changed under the run: bytes {begin:,} to {begin + size:,} of samples.bin (samples "
            f"{first:,} to {last:,}) are not those that were written; prepare the data again or put it back"
        )
