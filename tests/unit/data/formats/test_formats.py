"""MLPerf's sample files: round trips to the byte, an Example made by the protobuf library, damage of every kind."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.paths import ROOT

from bert_fast import files as files_module
from bert_fast.crc32c import masked_crc32c
from bert_fast.data.formats import convert as importer
from bert_fast.data.formats import tfrecord
from bert_fast.data.formats.convert import FORMS, export_store, find_sources, import_store
from bert_fast.data.formats.mlperf import FEATURES, read_blocks
from bert_fast.data.samples import Sample
from bert_fast.data.store import Store, merge_parts, write_part
from bert_fast.errors import UserError
from scripts.benchmarks import tfrecord_import

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(395))]
WIDTH, MOST = 64, 10


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        length = int(rng.integers(5, WIDTH + 1))
        masks = int(rng.integers(1, min(MOST, length - 1) + 1))
        positions = np.sort(rng.choice(np.arange(1, length), masks, replace=False)).astype(np.uint16)
        tokens, labels = (rng.integers(5, 400, n).astype(np.uint16) for n in (length, masks))
        samples.append(Sample(tokens, int(rng.integers(2, length - 1)), positions, labels, int(rng.integers(2))))
    return samples


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    part = write_part(folder / "part.bin", make_samples(2500))
    merge_parts(folder / "s", [part], {"vocab_size": 400, "vocab_sha256": "0"})
    return folder / "s"


def export(store: Path, out: Path, form: str, per_file: int = 700) -> list[str]:
    export_store(store, out, form, width=WIDTH, most_masked=MOST, per_file=per_file, log=lambda _line: None)
    return find_sources(out)


@pytest.mark.parametrize("form", FORMS)
def test_a_round_trip_loses_nothing(tmp_path: Path, store: Path, vocab: Path, form: str) -> None:
    files = export(store, tmp_path / "out", form)
    assert [Path(path).name.split(".")[0] for path in files] == [f"part-0000{i}-of-00004" for i in range(4)]
    manifest = import_store(files, tmp_path / "back", vocab, num_workers=1, log=lambda _line: None)
    assert manifest["num_samples"] == 2500
    for name in ("samples.bin", "offsets.npy", "lengths.npy", "num_masked.npy"):
        assert (tmp_path / "back" / name).read_bytes() == (store / name).read_bytes()
    assert manifest["num_random_next"] == Store(store).manifest["num_random_next"]


def test_samples_are_picked_evenly_as_the_reference_does(tmp_path: Path, store: Path, vocab: Path) -> None:
    files = export(store, tmp_path / "out", "tfrecord")
    import_store(files, tmp_path / "picked", vocab, max_samples=7, pick="evenly", num_workers=1, log=lambda _line: None)
    picked, whole = Store(tmp_path / "picked"), Store(store)
    assert len(picked) == 7
    for index in range(7):
        np.testing.assert_array_equal(picked[index].input_ids, whole[int(index * (2500 / 7))].input_ids)


def test_the_first_samples_and_their_hash(tmp_path: Path, store: Path, vocab: Path) -> None:
    files = export(store, tmp_path / "out", "tfrecord")
    manifest = import_store(files, tmp_path / "first", vocab, max_samples=1000, num_workers=1, log=lambda _line: None)
    assert manifest["num_samples"] == 1000
    whole = Store(store)
    for index in (0, 699, 700, 999):
        ours, theirs = Store(tmp_path / "first")[index], whole[index]
        np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
        np.testing.assert_array_equal(ours.masked_labels, theirs.masked_labels)
    assert manifest["num_random_next"] == sum(whole[i].is_random_next for i in range(1000))
    Store(tmp_path / "first").check(vocab_size=400, max_seq_len=64, vocab_sha256=None, sha256=manifest["sha256"])


def test_a_stopped_import_goes_on(tmp_path: Path, store: Path, vocab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file stops it; with that file fetched again (another time, the same size), only the missing parts are made."""
    files = export(store, tmp_path / "out", "tfrecord")
    good = Path(files[2]).read_bytes()
    Path(files[2]).write_bytes(good[:-10] + bytes(10))
    with pytest.raises(UserError, match=r"part-00002-of-00004.tfrecord: record 699 .*the 699 before it are good"):
        import_store(files, tmp_path / "back", vocab, num_workers=1, log=lambda _line: None)
    assert not (tmp_path / "back").exists()
    assert not list((tmp_path / "back.parts").glob("*.tmp")), "no worker is writing any more"
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "back.parts").glob("*.bin")}
    assert {name.rsplit("-", 1)[0] for name in before} >= {Path(files[0]).name, Path(files[1]).name}
    Path(files[2]).write_bytes(good)
    (tmp_path / "back.parts" / "gone.tfrecord-0123456789ab.bin").write_bytes(
        b"a part of a source that is no longer there"
    )
    (tmp_path / "back.parts" / "mine.bin").write_bytes(b"x")
    seen: dict[str, int] = {}

    def merging(folder: Path, parts: list[Any], manifest: dict[str, Any]) -> dict[str, Any]:
        seen.update({path.name: path.stat().st_mtime_ns for path in (tmp_path / "back.parts").glob("*.bin")})
        return merge_parts(folder, parts, manifest)

    monkeypatch.setattr(importer, "merge_parts", merging)
    import_store(files, tmp_path / "back", vocab, num_workers=1, log=lambda _line: None)
    assert {name: seen[name] for name in before} == before, "finished parts are taken as they are"
    assert "gone.tfrecord-0123456789ab.bin" not in seen
    assert (tmp_path / "back/samples.bin").read_bytes() == (store / "samples.bin").read_bytes()
    assert {path.name for path in (tmp_path / "back.parts").iterdir()} == {"mine.bin", ".bert_fast.json"}


@given(st.lists(st.integers(0, 2**21 - 1)))
def test_integers_there_and_back(values: list[int]) -> None:
    data = tfrecord.encode_varints(np.array(values, np.int64))
    np.testing.assert_array_equal(tfrecord.decode_varints(data)[0], values)


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1))
def test_integers_of_up_to_nine_bytes(values: list[int]) -> None:
    np.testing.assert_array_equal(tfrecord.decode_varints(b"".join(map(varint, values)))[0], values)


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (b"\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "an integer is negative or damaged"),
        (b"\x01\x02\x83", "the last integer is cut short"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_integer_names_its_record(packed: bytes, reason: str, place: int) -> None:
    good = message(1, message(1, message(1, b"a") + message(2, message(3, message(1, b"\x07\x08\xac\x02")))))
    bad = message(1, message(1, message(1, b"a") + message(2, message(3, message(1, packed)))))
    payloads = [bad if n == place else good for n in range(3)]
    with pytest.raises(ValueError, match=reason) as caught:
        tfrecord.parse_examples(payloads, ["a"])
    assert caught.value.args == (place, f"feature a: {reason}")


@pytest.mark.parametrize(
    ("pieces", "values"),
    [
        ((b"\x85\x00", b"\x07"), [5, 7]),
        ((b"\x01\x85\x00\x00", b"\x07\x08\x00"), [1, 5, 0, 7, 8, 0]),
        ((b"\x85\x80\x00\x00\x00", b"\x00\x81\x01\x00"), [5, 0, 0, 0, 129, 0]),
    ],
)
def test_integers_in_more_bytes_than_they_need(pieces: tuple[bytes, ...], values: list[int]) -> None:
    """Their last byte is no padding."""
    feature = [message(3, message(1, piece)) for piece in pieces]
    payloads = [message(1, message(1, message(1, b"a") + message(2, each))) for each in feature]
    for parse in (tfrecord.parse_examples, tfrecord.parse_one_by_one):
        np.testing.assert_array_equal(_all_values(parse(payloads, ["a"])["a"]), values)


def test_sizes_of_more_than_four_bytes_are_left_to_the_general_reader() -> None:
    body = message(1, message(1, b"a") + message(2, message(3, message(1, b"\x05"))))
    long = b"\x0a" + bytes([len(body) | 0x80, 0x80, 0x80, 0x80, 0x00]) + body
    cut = b"\x0a" + bytes([len(body) | 0x80, 0x80, 0x80, 0x80]) + body
    sound = message(1, body)
    np.testing.assert_array_equal(tfrecord.parse_examples([sound, long], ["a"])["a"].values, [5, 5])
    with pytest.raises(ValueError, match="is no tf.train.Example") as caught:
        tfrecord.parse_examples([sound, cut], ["a"])
    assert caught.value.args[0] == 1


def test_values_that_are_not_packed_and_other_fields() -> None:
    """An old writer's Example: one tag a value, an unknown field, a feature of bytes."""
    unpacked = b"".join(varint(1 << 3) + varint(value) for value in (3, 300, 70_000))
    entry = message(1, b"ids") + message(2, message(3, unpacked))
    other = message(1, b"text") + message(2, message(1, message(1, b"hello")))
    example = message(1, message(1, entry) + message(1, other)) + message(9, b"later")
    found = tfrecord.parse_examples([example, example], ["ids"])["ids"]
    np.testing.assert_array_equal(found.table(), [[3, 300, 70_000]] * 2)
    with pytest.raises(ValueError, match="holds bytes"):
        tfrecord.parse_examples([example], ["text"])
    with pytest.raises(ValueError, match="has no feature more"):
        tfrecord.parse_examples([example], ["more"])


def test_checksum_is_tfrecords() -> None:
    """The empty and a known input of CRC32-C (RFC 3720, B.4), masked."""

    def masked(crc: int) -> int:
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    assert masked_crc32c(b"") == masked(0)
    assert masked_crc32c(bytes(32)) == masked(0x8A9136AA)


def records_of(path: str) -> list[bytes]:
    return list(tfrecord.read_records(path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"record 99 is cut short; the 99 before it are good"),
        (lambda data: data + b"12345", r"record 100 is cut short in its head; the 100 before"),
        (lambda data: data[:8] + b"\0" + data[9:], r"record 0 has a length whose checksum"),
        (lambda data: data[:400] + b"\xff\xff" + data[402:], r"record \d+ has a"),
        (lambda data: b"not a record file at all, but text", r"record 0 has a length .*is this a TFRecord"),
    ],
)
def test_damaged_tfrecords(tmp_path: Path, store: Path, damage: Any, message: str) -> None:
    (path,) = export(store, tmp_path / "out", "tfrecord", per_file=10_000)
    tfrecord.write_records(path, records_of(path)[:100])
    Path(path).write_bytes(damage(Path(path).read_bytes()))
    with pytest.raises(UserError, match=message):
        list(read_blocks(path, 400))


def example_with(**changes: Any) -> bytes:
    features: dict[str, np.ndarray] = {
        "input_ids": np.array([2, 9, 9, 3, 9, 3, 0, 0]), "input_mask": np.array([1, 1, 1, 1, 1, 1, 0, 0]),
        "segment_ids": np.array([0, 0, 0, 0, 1, 1, 0, 0]), "masked_lm_positions": np.array([1, 4, 0]),
        "masked_lm_ids": np.array([7, 8, 0]), "masked_lm_weights": np.array([1.0, 1.0, 0.0]),
        "next_sentence_labels": np.array([1]),
    }  # fmt: skip
    return tfrecord.make_example({name: np.array(changes.get(name, value)) for name, value in features.items()})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_mask": [1, 1, 0, 1, 1, 1, 0, 0]}, "input mask that is not ones followed by zeros"),
        ({"segment_ids": [0, 1, 0, 1, 1, 1, 0, 0]}, "segments that are not one A followed by one B"),
        ({"input_ids": [2, 9, 400, 3, 9, 3, 0, 0]}, "token outside the 400"),
        ({"masked_lm_ids": [7, 9000, 0]}, "label outside the 400"),
        ({"masked_lm_positions": [1, 7, 0]}, "masks a position beyond its end"),
        ({"masked_lm_positions": [4, 1, 0]}, "positions that do not rise"),
        ({"masked_lm_weights": [0.0, 1.0, 0.0]}, "weights that are not ones followed by zeros"),
        ({"next_sentence_labels": [2]}, "next-sentence label other than"),
    ],
)
def test_records_that_are_no_samples(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    tfrecord.write_records(tmp_path / "a.tfrecord", [example_with(), example_with(), example_with(**changes)])
    with pytest.raises(UserError, match=f"a.tfrecord: record 2 .*{reason}.*; the 2 before it are good"):
        list(read_blocks(tmp_path / "a.tfrecord", 400))


def test_rows_of_another_length(tmp_path: Path) -> None:
    tfrecord.write_records(tmp_path / "a", [example_with(), example_with(input_ids=[2, 9, 3])])
    with pytest.raises(UserError, match="record 1 feature input_ids has another length than in its neighbours"):
        list(read_blocks(tmp_path / "a", 400))


def test_features_are_those_of_mlperf(tmp_path: Path, store: Path) -> None:
    (path,) = export(store, tmp_path / "out", "tfrecord", per_file=10_000)
    found = tfrecord.parse_examples(records_of(path)[:2], FEATURES)
    assert found["input_ids"].table().shape == (2, WIDTH)
    assert found["masked_lm_weights"].table().dtype == np.float32
    assert found["next_sentence_labels"].table().shape == (2, 1)


@pytest.mark.parametrize("form", ["hdf5", "hdf5-variable"])
def test_damaged_hdf5(tmp_path: Path, store: Path, form: str) -> None:
    (path,) = export(store, tmp_path / "out", form, per_file=10_000)
    with h5py.File(path, "a") as file:
        del file["segment_ids"]
    with pytest.raises(UserError, match="no field segment_ids; it has .*input_ids"):
        list(read_blocks(path, 400))
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="no HDF5 file, or damaged"):
        list(read_blocks(path, 400))


def test_too_small_a_disk_and_too_small_rows(
    tmp_path: Path, store: Path, vocab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = export(store, tmp_path / "out", "tfrecord")
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(files_module.shutil, "disk_usage", lambda _place: usage)
    with pytest.raises(UserError, match="GiB free and the import may take"):
        import_store(files, tmp_path / "back", vocab, num_workers=1, log=lambda _line: None)
    with pytest.raises(UserError, match="rows of 32 and 10 do not hold them"):
        export_store(store, tmp_path / "b", "tfrecord", width=32, most_masked=10, per_file=10, log=lambda _line: None)
    with pytest.raises(UserError, match="no such file, or a folder without files"):
        find_sources(tmp_path / "nothing")


def test_the_command(tmp_path: Path, store: Path, vocab: Path) -> None:
    def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, str(ROOT / "scripts/prepare_data.py"), *map(str, arguments)]
        return subprocess.run(script, capture_output=True, text=True, timeout=60)

    done = command(
        "export", "--input", store, "--out", tmp_path / "out", "--max-seq-len", WIDTH, "--max-predictions", MOST,
        "--per-file", 1000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = ("import", "--input", tmp_path / "out", "--out", tmp_path / "back", "--vocab", vocab, "--workers", 2)
    done = command(*again)
    assert done.returncode == 0, done.stderr
    assert "2,500 samples from 3 files" in done.stdout
    assert "samples/s" in done.stdout
    assert "already there" in command(*again).stdout
    assert (tmp_path / "back/samples.bin").read_bytes() == (store / "samples.bin").read_bytes()
    (tmp_path / "out/part-00001-of-00003.tfrecord").write_bytes(struct.pack("<Q", 5))
    done = command(*again)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "part-00001-of-00003.tfrecord: record 0 is cut short in its head" in done.stderr


@given(
    st.lists(
        st.tuples(
            st.permutations(["input_ids", "weights", "a", "labels"]),
            st.lists(st.integers(0, 2**21 - 1), min_size=1, max_size=90),
            st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40),
        ),
        min_size=1, max_size=6,
    ),
    st.sampled_from(["", "unpacked", "extra", "double", "bytes"]),
)  # fmt: skip
def test_features_found_together_are_those_found_one_by_one(rows: list[Any], odd: str) -> None:
    """Keys in any order, values of any size; forms that the quick way does not know are left to the general one."""

    def entry(name: str, integers: list[int], floats: list[float]) -> bytes:
        if name == "weights":
            feature = message(2, message(1, np.array(floats, "<f4").tobytes()))
        elif name == "labels" and odd == "unpacked":
            feature = message(3, b"".join(varint(1 << 3) + varint(value) for value in integers))
        else:
            feature = message(3, message(1, b"".join(map(varint, integers))))
        return message(1, message(1, name.encode()) + message(2, feature))

    payloads = []
    for order, integers, floats in rows:
        entries = [entry(name, integers, floats) for name in order]
        if odd == "extra":
            entries.insert(1, entry("more", [1], []))
        if odd == "double":
            entries.append(entry("a", [5, 6], []))
        if odd == "bytes":
            entries.append(message(1, message(1, b"text") + message(2, message(1, message(1, b"x")))))
        payloads.append(message(1, b"".join(entries)))
    names = ["input_ids", "weights", "a", "labels"]
    quick, plain = tfrecord.parse_examples(payloads, names), tfrecord.parse_one_by_one(payloads, names)
    for name in names:
        np.testing.assert_array_equal(
            quick[name].num_values + quick[name].num_zeros, plain[name].num_values + plain[name].num_zeros
        )
        np.testing.assert_array_equal(_all_values(quick[name]), _all_values(plain[name]))


def _all_values(features: tfrecord.Features) -> np.ndarray:
    ends = np.cumsum(features.num_values)
    pieces = np.split(features.values, ends[:-1])
    zeros = [np.zeros(count) for count in features.num_zeros]
    return np.concatenate([part for pair in zip(pieces, zeros, strict=True) for part in pair])


def test_the_quick_way_is_taken_for_what_writers_write(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = export(store, tmp_path / "out", "tfrecord", per_file=10_000)
    monkeypatch.setattr(tfrecord, "parse_one_by_one", lambda *_: pytest.fail("fell back"))
    assert sum(len(block) for block in read_blocks(path, 400)) == 2500


@pytest.mark.parametrize("size", [100, 5000])
def test_records_longer_than_a_block_of_the_file(tmp_path: Path, size: int) -> None:
    payloads = [bytes([n]) * (size + n) for n in range(20)]
    tfrecord.write_records(tmp_path / "a", payloads)
    assert list(tfrecord.read_records(tmp_path / "a", block_bytes=256)) == payloads


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"segment_ids": [0, 0, 0]}, "has 3 values of segment_ids, not 8"),
        ({"masked_lm_ids": [7, 8]}, "has 2 values of masked_lm_ids, not 3"),
        ({"next_sentence_labels": [1, 0]}, "has 2 values of next_sentence_labels, not 1"),
    ],
)
def test_tfrecord_fields_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    tfrecord.write_records(tmp_path / "a", [example_with(**changes)] * 2)
    with pytest.raises(UserError, match=reason):
        list(read_blocks(tmp_path / "a", 400))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("masked_lm_ids", lambda values: values[:, :2], "values of masked_lm_ids, not"),
        ("segment_ids", lambda values: values[:, 0], "segment_ids is no table of rows of one length"),
        ("input_ids", lambda values: 3, "input_ids is no array of rows"),
    ],
)
def test_hdf5_fields_that_do_not_belong_together(
    tmp_path: Path, store: Path, name: str, change: Any, reason: str
) -> None:
    import h5py

    (path,) = export(store, tmp_path / "out", "hdf5", per_file=10_000)
    with h5py.File(path, "a") as file:
        values = file[name][()]
        del file[name]
        file[name] = change(values)
    with pytest.raises(UserError, match=reason):
        list(read_blocks(path, 400))


def test_the_measurement_of_the_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """scripts/benchmarks/tfrecord_import.py, as the process that it starts for ours."""
    tfrecord_import.make_rows(50, tmp_path / "rows.npz")
    with np.load(tmp_path / "rows.npz") as rows:
        payloads = [tfrecord.make_example({name: rows[name][n] for name in rows}) for n in range(50)]
    tfrecord.write_records(tmp_path / "a.tfrecord", payloads)
    tfrecord_import.read_ours(str(tmp_path / "a.tfrecord"), str(tmp_path / "part.bin"))
    rate, mib = map(float, capsys.readouterr().out.split())
    assert rate > 0
    assert mib > 10
