"""A store that changes under a run."""

from __future__ import annotations

import errno
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.one_run import execute

from bert_fast.config import Config
from bert_fast.data import scrub as module
from bert_fast.data import store as store_module
from bert_fast.data.scrub import Scrubber, file_stamp
from bert_fast.data.store import BLOCK_BYTES, Store
from bert_fast.errors import UserError


@pytest.fixture
def copy(stores: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stores / "train", tmp_path / "train"))


@pytest.fixture
def watch(copy: Path) -> Iterator[Callable[..., Scrubber]]:
    """`watch()`: a started watch over the copy."""
    started: list[Scrubber] = []

    def start(read_stamp: Callable[[Path], tuple[int, int]] = file_stamp) -> Scrubber:
        started.append(Scrubber(Store(copy), 0, 1, mb_per_s=10_000.0, pause_s=0.01, read_stamp=read_stamp))
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def small_blocks(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The copy with a checksum for every 1,000 bytes."""
    for owner in (module, store_module):
        monkeypatch.setattr(owner, "BLOCK_BYTES", 1000)
    store, data = Store(copy), (copy / "samples.bin").read_bytes()
    store.block_crcs = np.array([zlib.crc32(data[i : i + 1000]) for i in range(0, len(data), 1000)], np.uint32)
    return store


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_unchanged_store_raises_no_alarm(watch: Callable[..., Scrubber]) -> None:
    found = watch()
    until(lambda: found.passes >= 3)
    assert found.alarm is None
    assert found.is_running


def test_a_changed_byte_is_found_and_its_samples_named(watch: Callable[..., Scrubber], copy: Path) -> None:
    found = watch()
    until(lambda: found.passes >= 1)
    with open(copy / "samples.bin", "r+b") as file:
        file.seek(40)
        byte = file.read(1)[0]
        file.seek(40)
        file.write(bytes([byte ^ 4]))
    until(lambda: found.alarm)
    assert "changed under the run: bytes 0 to" in str(found.alarm)
    assert f"(samples 0 to {len(Store(copy)) - 1:,})" in str(found.alarm)
    assert not found.vanished


@pytest.mark.parametrize("name", ["samples.bin", "offsets.npy", "lengths.npy"])
def test_a_file_that_goes_is_found(watch: Callable[..., Scrubber], copy: Path, name: str) -> None:
    found = watch()
    (copy / name).unlink()
    until(lambda: found.alarm)
    assert f"{name} has vanished" in str(found.alarm)
    assert found.vanished


def test_a_file_that_goes_between_two_looks_is_named(watch: Callable[..., Scrubber], copy: Path) -> None:
    looks = 0

    def then_it_goes(path: Path) -> tuple[int, int]:
        nonlocal looks
        looks += 1
        stamp = file_stamp(path)
        if looks == 6:  # three files when they were opened, the same three before the first block
            (copy / "samples.bin").unlink()
        return stamp

    found = watch(then_it_goes)
    until(lambda: found.alarm)
    assert "samples.bin has vanished" in str(found.alarm)
    assert found.vanished


def test_a_store_that_can_no_longer_be_looked_at(watch: Callable[..., Scrubber]) -> None:
    """As on a network file system whose server has gone: the alarm is raised, and the thread does not die in silence."""
    looks = 0

    def stale(path: Path) -> tuple[int, int]:
        nonlocal looks
        looks += 1
        if looks > 3:  # the three files were opened
            raise OSError(errno.ESTALE, "Stale file handle")
        return file_stamp(path)

    found = watch(stale)
    until(lambda: found.alarm)
    assert "can no longer be read (Stale file handle)" in str(found.alarm)
    assert found.vanished


def test_a_file_that_is_replaced_is_found(watch: Callable[..., Scrubber], copy: Path) -> None:
    found = watch()
    shutil.copyfile(copy / "samples.bin", copy / "new")
    os.replace(copy / "new", copy / "samples.bin")
    until(lambda: found.alarm)
    assert "was replaced or cut" in str(found.alarm)


def test_samples_whose_bytes_have_changed(copy: Path, small_blocks: Store) -> None:
    """Asked about samples, it looks at their blocks alone, at once."""
    store = small_blocks
    first, last = store.byte_ranges(np.arange(len(store)))
    assert first[0] == 0
    assert (first[1:] == last[:-1] + 1).all()
    assert last[-1] + 1 == (copy / "samples.bin").stat().st_size
    data = bytearray((copy / "samples.bin").read_bytes())
    watch = Scrubber(store, 0, 1, 10.0)
    every = np.arange(len(store))
    assert watch.changed(every) is None
    data[4500] ^= 1
    (copy / "samples.bin").write_bytes(data)
    touched = (first < 5000) & (last >= 4000)
    assert "bytes 4,000 to 5,000" in str(watch.changed(every))
    assert "bytes 4,000 to 5,000" in str(watch.changed(every[touched][-1:]))
    assert watch.changed(every[~touched]) is None
    (copy / "samples.bin").unlink()
    assert "can no longer be read" in str(watch.changed(every[:1]))


@pytest.mark.parametrize("part", ["tokens", "headers"])
def test_a_step_that_fails_of_a_changed_store_says_so(
    make_config: Callable[..., Config], copy: Path, part: str
) -> None:
    """Before the watch has come round: it is off here. Nothing is wrong with a store that is as it was written."""
    config = make_config(f"data.train={copy}", "data.scrub_mb_per_s=0", "train.max_steps=3")
    execute(config)
    values = np.fromfile(copy / "samples.bin", np.uint16)
    starts, ends = (each // 2 for each in Store(copy).byte_ranges(np.arange(len(Store(copy)))))
    values[ends if part == "tokens" else starts + 1] = 60_000  # the last token, the number of masks
    values.tofile(copy / "samples.bin")
    with pytest.raises(UserError, match=r"rank 0 on \S+: store .* changed under the run: bytes 0 to"):
        execute(config)


def test_without_checksums_or_rate_nothing_is_watched(copy: Path) -> None:
    still = Scrubber(Store(copy), 0, 1, mb_per_s=0)
    still.start()
    (copy / "blocks.npy").unlink()
    old = Scrubber(Store(copy), 0, 1, mb_per_s=10)
    old.start()
    assert not still.is_running
    assert not old.is_running


def test_ranks_of_a_node_share_the_blocks(copy: Path, small_blocks: Store) -> None:
    """A change in a block is found by one of them."""
    store, data = small_blocks, (copy / "samples.bin").read_bytes()
    watches = [Scrubber(store, share, 3, 1e6) for share in range(3)]
    assert all(each.check_share() for each in watches)
    with open(copy / "samples.bin", "r+b") as file:
        file.seek(4500)
        file.write(bytes([data[4500] ^ 1]))
    assert [each.check_share() for each in watches] == [True, False, True]
    assert "bytes 4,000 to 5,000" in str(watches[1].alarm)


def test_a_store_has_a_checksum_for_every_block(copy: Path) -> None:
    crcs = Store(copy).block_crcs
    assert crcs is not None
    assert len(crcs) == -(-(copy / "samples.bin").stat().st_size // BLOCK_BYTES)
    assert "blocks.npy" in Store(copy).manifest["tables_sha256"]
