"""The store: what is written is read back, as samples and as batches; what is damaged is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bert_fast import files
from bert_fast.data.batch import Batch
from bert_fast.data.record import pack_record, unpack_record
from bert_fast.data.samples import Sample, SampleParams, make_samples
from bert_fast.data.store import FORMAT, Store, merge_parts, read_part, write_part
from bert_fast.data.wordpiece import Vocabulary
from bert_fast.errors import UserError

EXTRA = {"vocab_sha256": "v" * 64, "vocab_size": 60, "text_sha256": "0" * 64}


@pytest.fixture
def samples(vocabulary: Vocabulary, make_documents: Callable[..., Any]) -> list[Sample]:
    params = SampleParams(max_seq_len=40, max_predictions=9, short_seq_prob=0.4, dupe_factor=2)
    return list(make_samples(make_documents(25), vocabulary, params, chunk=0))


@pytest.fixture
def store(tmp_path: Path, samples: list[Sample]) -> Store:
    """A store of three parts, one of them empty."""
    parts = [write_part(tmp_path / f"{n}.bin", piece) for n, piece in enumerate((samples[:30], [], samples[30:]))]
    merge_parts(tmp_path / "store", parts, EXTRA)
    return Store(tmp_path / "store")


def assert_same(a: Sample, b: Sample) -> None:
    assert (a.len_a, a.is_random_next) == (b.len_a, b.is_random_next)
    np.testing.assert_array_equal(a.input_ids, b.input_ids)
    np.testing.assert_array_equal(a.masked_positions, b.masked_positions)
    np.testing.assert_array_equal(a.masked_labels, b.masked_labels)


def plain_batch(store: Store, ids: list[int]) -> Batch:
    """A batch put together sample by sample, longest first, equal lengths in the order given."""
    lengths = {i: len(store[i].input_ids) for i in ids}
    tokens, types, positions, masked, labels, next_labels, starts, sizes, order = [], [], [], [], [], [], [0], [], []
    for i in sorted(ids, key=lambda i: -lengths[i]):
        sample = store[i]
        masked += [len(tokens) + int(p) for p in sample.masked_positions]
        labels += sample.masked_labels.tolist()
        tokens += sample.input_ids.tolist()
        types += [int(place >= sample.len_a) for place in range(lengths[i])]
        positions += list(range(lengths[i]))
        next_labels.append(sample.is_random_next)
        starts.append(len(tokens))
        sizes.append(lengths[i])
        order.append(i)
    return Batch(
        np.array(tokens), np.array(types), np.array(positions), np.array(starts, np.int32), np.array(masked),
        np.array(labels), np.array(next_labels), sizes, np.array(order),
    )  # fmt: skip


def assert_same_batch(found: Batch, expected: Batch) -> None:
    for name in vars(expected):
        a, b = getattr(found, name), getattr(expected, name)
        if name == "lengths":
            assert a == b
            assert all(type(n) is int for n in a)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)
            assert a.dtype == b.dtype, name


# ---- round trip -----------------------------------------------------------------------------------------------------


def test_record_round_trip(samples: list[Sample]) -> None:
    for sample in samples:
        record = pack_record(sample)
        assert record.dtype == np.uint16
        assert len(record) == 3 + 2 * len(sample.masked_positions) + len(sample.input_ids)
        assert_same(unpack_record(record), sample)


def test_store_round_trip(store: Store, samples: list[Sample]) -> None:
    assert len(store) == len(samples)
    for index, sample in enumerate(samples):
        assert_same(store[index], sample)
    assert store.lengths.tolist() == [len(s.input_ids) for s in samples]
    assert store.num_masked.tolist() == [len(s.masked_positions) for s in samples]


def test_manifest_counts(store: Store, samples: list[Sample]) -> None:
    lengths = [len(s.input_ids) for s in samples]
    manifest = store.manifest
    assert manifest["format"] == FORMAT
    assert manifest["num_samples"] == len(samples)
    assert manifest["num_tokens"] == sum(lengths)
    assert manifest["num_masked"] == sum(len(s.masked_positions) for s in samples)
    assert manifest["num_random_next"] == sum(s.is_random_next for s in samples)
    assert manifest["max_length"] == max(lengths)
    assert manifest["mean_length"] == pytest.approx(np.mean(lengths), abs=1e-3)
    assert manifest["length_histogram"] == {str(n): lengths.count(n) for n in sorted(set(lengths))}
    assert manifest["vocab_size"] == 60


def test_a_part_is_read_back_only_if_it_was_finished(tmp_path: Path, samples: list[Sample]) -> None:
    path = tmp_path / "part.bin"
    assert read_part(path) is None
    written = write_part(path, samples)
    found = read_part(path)
    assert found is not None
    assert found.tables()[0].tolist() == [len(s.input_ids) for s in samples]
    assert found.tables()[1].tolist() == [len(s.masked_positions) for s in samples]
    assert found.num_random_next == written.num_random_next == sum(s.is_random_next for s in samples)
    os.truncate(path, path.stat().st_size - 2)
    assert read_part(path) is None
    path.unlink()
    assert read_part(path) is None


def test_no_samples_is_an_error(tmp_path: Path) -> None:
    for parts in ([], [write_part(tmp_path / "empty.bin", [])]):
        with pytest.raises(UserError, match="no samples for store .*the text is empty or too short"):
            merge_parts(tmp_path / "store", parts, EXTRA)


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_batch_equals_plain_assembly(store: Store, count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(20):
        ids = rng.permutation(len(store))[:count]
        assert_same_batch(store.batch(ids), plain_batch(store, ids.tolist()))


def test_batch_of_all_samples(store: Store) -> None:
    batch = store.batch(np.arange(len(store)))
    assert_same_batch(batch, plain_batch(store, list(range(len(store)))))
    assert batch.num_tokens == store.manifest["num_tokens"]
    assert len(batch.masked_labels) == store.manifest["num_masked"]


def test_batch_with_a_sample_twice(store: Store) -> None:
    """Can happen where a step lies across two epochs."""
    assert_same_batch(store.batch(np.array([5, 9, 5])), plain_batch(store, [5, 9, 5]))


def test_large_token_ids_survive(tmp_path: Path) -> None:
    """Everything is 16 bits in the file and int64 in the batch."""
    u16 = lambda *values: np.array(values, np.uint16)  # noqa: E731
    sample = Sample(u16(2, 65535, 3, 40000, 3), 3, u16(1, 3), u16(65535, 32768), 1)
    merge_parts(tmp_path, [write_part(tmp_path / "p", [sample])], EXTRA)
    batch = Store(tmp_path).batch(np.array([0]))
    assert batch.input_ids.tolist() == [2, 65535, 3, 40000, 3]
    assert batch.masked_labels.tolist() == [65535, 32768]


# ---- stores that are refused ----------------------------------------------------------------------------------------


def test_missing_store_says_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data at .*data/x/train .*python scripts/prepare_data\.py --out .*data/x$"):
        Store(tmp_path / "data" / "x" / "train")


def change_manifest(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(name: str, left: int | None = None, by: int = 0) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by if left is None else left)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("samples.bin", by=2), "is truncated: the manifest promises"),
        (cut("samples.bin", by=1), "is damaged"),
        (cut("samples.bin", left=0), "is damaged"),
        (lambda f: (f / "samples.bin").unlink(), "is damaged"),
        (cut("lengths.npy", by=2), "is damaged"),
        (cut("offsets.npy", by=8), "is damaged"),
        (lambda f: (f / "num_masked.npy").unlink(), "is damaged"),
        (lambda f: (f / "lengths.npy").write_bytes(b"not an array at all"), "is damaged"),
        (lambda f: np.save(f / "lengths.npy", np.zeros(3, np.uint16)), "is truncated"),
        (lambda f: change_manifest(f, num_samples=7), "is truncated: the manifest promises 7 samples"),
        (lambda f: change_manifest(f, format="other 2"), "is of format 'other 2', this code reads 'bert_fast store 1'"),
        (lambda f: (f / "manifest.json").write_text("{}"), "is of format None"),
        (lambda f: (f / "manifest.json").write_text('{"format":'), "is not JSON: .*; prepare the data again"),
    ],
)
def test_damaged_stores_are_refused(store: Store, damage: Callable[[Path], Any], message: str) -> None:
    damage(store.folder)
    with pytest.raises(UserError, match=message) as caught:
        Store(store.folder)
    assert str(store.folder) in str(caught.value)


def test_empty_table_is_refused(store: Store) -> None:
    os.truncate(store.folder / "offsets.npy", 0)
    with pytest.raises(UserError, match="is damaged"):
        Store(store.folder)


@pytest.mark.parametrize("content", ["[]", json.dumps({"format": FORMAT})])
def test_manifest_without_its_entries_is_refused(store: Store, content: str) -> None:
    (store.folder / "manifest.json").write_text(content)
    with pytest.raises(UserError):
        Store(store.folder)


def test_a_merge_that_was_cut_off_leaves_no_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: list[Sample]
) -> None:
    """The manifest goes first and comes last."""
    part = write_part(tmp_path / "again.bin", samples[:5])

    def interrupted(path: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("bert_fast.data.store.sha256_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_parts(store.folder, [part], EXTRA)
    with pytest.raises(UserError, match="no data at"):
        Store(store.folder)


CHECK: dict[str, Any] = {"vocab_size": 60, "max_seq_len": 40, "vocab_sha256": None, "sha256": None}


def test_check_accepts_what_fits(store: Store) -> None:
    store.check(**CHECK)
    store.check(
        **{**CHECK, "vocab_size": 64, "max_seq_len": 512, "vocab_sha256": "v" * 64, "sha256": store.manifest["sha256"]}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 59}, "a vocabulary of 60 tokens and model.vocab_size=59"),
        ({"max_seq_len": 39}, "a sample of 40 tokens and data.max_seq_len=39; raise it or prepare shorter"),
        ({"vocab_sha256": "w" * 64}, r"vocab.*vvvvvvvv.*wwwwwwww.*prepare the data"),
        ({"sha256": "x" * 64}, r"evaluation\.sha256.*xxxxxxxx.*prepare the data"),
    ],
    ids=["vocabulary too large", "sample too long", "other vocabulary", "other evaluation set"],
)
def test_check_refuses_what_does_not_fit(store: Store, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        store.check(**{**CHECK, **change})


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_verify_finds_a_changed_byte(store: Store) -> None:
    store.verify()
    flip_byte(store.folder / "samples.bin", 101)
    with pytest.raises(UserError, match=r"samples\.bin changed since it was written"):
        Store(store.folder).verify()


@pytest.mark.parametrize("name", ["lengths.npy", "num_masked.npy", "offsets.npy"])
def test_verify_finds_a_changed_table(store: Store, name: str) -> None:
    flip_byte(store.folder / name, 200)
    with pytest.raises(UserError):
        Store(store.folder).verify()


def test_verify_of_a_store_whose_tables_were_not_hashed(store: Store) -> None:
    manifest = json.loads((store.folder / "manifest.json").read_text())
    del manifest["tables_sha256"]
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        Store(store.folder).verify()
    except UserError as error:
        assert "prepare the data again" in str(error)  # noqa: PT017


# ---- full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """`disk(n)`: after n more bytes through atomic_file the disk is full; `disk(None)`: it has room again."""
    left: list[int | None] = [None]

    class Limited(io.FileIO):
        def write(self, data: Any) -> int:
            if left[0] is not None:
                left[0] -= len(data)
                if left[0] < 0:
                    super().write(bytes(data)[: len(data) // 2])  # half-written, as a full disk leaves it
                    raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def fake_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Limited(path, "w") if mode == "wb" else open(path, mode, *args, **kwargs)

    monkeypatch.setattr(files, "open", fake_open, raising=False)

    def limit(num_bytes: int | None) -> None:
        left[0] = num_bytes

    return limit


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and path.name.endswith(".tmp")]


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_disk_full_while_writing_a_part(
    tmp_path: Path, samples: list[Sample], disk: Callable[..., None], room: int
) -> None:
    disk(room)
    with pytest.raises(
        UserError, match=r"disk full while writing .*part\.bin; free space and run the same command again"
    ):
        write_part(tmp_path / "part.bin", samples)
    assert list(tmp_path.iterdir()) == []


def test_disk_full_while_syncing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="disk full"):
        files.write_json(tmp_path / "x.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_disk_full_keeps_the_file_that_was_there(tmp_path: Path, disk: Callable[..., None]) -> None:
    files.write_atomically(tmp_path / "x", "old")
    disk(1)
    with pytest.raises(UserError):
        files.write_atomically(tmp_path / "x", "new content")
    assert (tmp_path / "x").read_text() == "old"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("code", "message"), [(errno.EACCES, "cannot write"), (errno.EROFS, "cannot write")])
def test_folders_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(UserError, match=f"{message} .*; choose another folder"):
        files.write_atomically(tmp_path / "x", "content")


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with files.atomic_file(tmp_path / "x") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [0, 2000, 9000])
def test_disk_full_while_merging_leaves_no_store(
    tmp_path: Path, samples: list[Sample], disk: Callable[..., None], room: int
) -> None:
    part = write_part(tmp_path / "part.bin", samples)
    assert Path(part.path).stat().st_size > 2000
    disk(room)
    with pytest.raises(UserError, match="disk full"):
        merge_parts(tmp_path / "store", [part], EXTRA)
    assert leftovers(tmp_path) == []
    with pytest.raises(UserError, match="no data at"):
        Store(tmp_path / "store")
    disk(None)
    merge_parts(tmp_path / "store", [part], EXTRA)
    assert len(Store(tmp_path / "store")) == len(samples)
    shutil.rmtree(tmp_path / "store")
