"""Folders of data: nothing of ours is read as the user's, nothing of the user's is taken for ours, nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.paths import ROOT

from bert_fast.claims import claimed
from bert_fast.data import corpus as corpora
from bert_fast.data.folders import PREPARATION, files_below
from bert_fast.data.formats.convert import export_store, find_sources, import_store
from bert_fast.data.prepare import Recipe, prepare
from bert_fast.data.samples import Sample, SampleParams
from bert_fast.data.store import merge_parts, write_part
from bert_fast.errors import UserError
from bert_fast.files import atomic_file, remove_temporaries, write_atomically

PARAMS = SampleParams(max_seq_len=32, max_predictions=5, dupe_factor=1, seed=1)


def write_texts(folder: Path, count: int = 20, suffix: str = ".txt") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        (folder / f"{n:02d}{suffix}").write_text(
            f"The shape of number {n} is xyz. It returns a tensor. The input is a shape."
        )


def names_below(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files_below(root)[0]]


# ---- outputs are no inputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prose", "mlcommons"])
@pytest.mark.parametrize("where", ["out", "deep/er/out", "."])
def test_out_inside_input_gives_the_same_each_time(tmp_path: Path, vocab_file: Path, kind: str, where: str) -> None:
    folder = tmp_path / "in"
    write_texts(folder, suffix=".txt" if kind == "prose" else "")
    results = []
    for seed in (1, 1, 2):
        recipe = Recipe(
            kind,
            str(folder),
            vocab=str(vocab_file),
            eval_fraction=0.3,
            max_unknown=1.0,
            params=SampleParams(32, 5, seed=seed),
        )
        made = prepare(recipe, folder / where, 1, log=lambda _line: None)
        results.append(made["train"]["documents"] + made["eval"]["documents"])
    assert results == [20, 20, 20]
    prepare(recipe, folder / "another", 1, log=lambda _line: None)  # beside the first one's text
    assert json.loads((folder / "another/text/stamp.json").read_text())["train"]["documents"] <= 20
    assert len(corpora.list_sources(kind, str(folder))) == 20


def test_a_stopped_preparation_is_known_by_its_first_file(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", 3)
    with claimed(tmp_path / "in/out", PREPARATION):
        write_atomically(tmp_path / "in/out/text/train-00000.txt", "Half of a text.\n")
        write_atomically(tmp_path / "in/out/pieces-0123456789ab/000000.json", b"")
    assert names_below(tmp_path / "in") == ["00.txt", "01.txt", "02.txt"]


@pytest.mark.parametrize(
    "name", ["text/train-00000.txt", "train/manifest.json", "vocab.txt", "eval/samples.bin", "pieces-0123456789ab/000001.json"]
)  # fmt: skip
def test_a_name_that_a_preparation_would_write_may_be_the_users(tmp_path: Path, vocab_file: Path, name: str) -> None:
    write_texts(tmp_path / "in", 8)
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("The user's own.")
    recipe = Recipe(
        "prose", str(tmp_path / "in"), vocab=str(vocab_file), eval_fraction=0.3, max_unknown=1.0, params=PARAMS
    )
    with pytest.raises(UserError, match=rf"{out} holds files that are not a preparation's .*{name}"):
        prepare(recipe, out, 1, log=lambda _line: None)
    assert (out / name).read_text() == "The user's own."
    assert sorted(path.name for path in out.iterdir()) == [name.split("/")[0]]


def test_a_preparation_does_not_remove_its_input(tmp_path: Path, vocab_file: Path) -> None:
    write_texts(tmp_path / "in")
    recipe = Recipe(
        "prose", str(tmp_path / "in"), vocab=str(vocab_file), eval_fraction=0.3, max_unknown=1.0, params=PARAMS
    )
    prepare(recipe, tmp_path / "out", 1, log=lambda _line: None)
    text = tmp_path / "out/text"
    before = {path: path.read_bytes() for path in text.iterdir()}
    for given in ({"input": str(text)}, {"input": str(tmp_path / "in"), "eval_input": str(text / "eval-00000.txt")}):
        again = Recipe("mlcommons", **given, vocab=str(vocab_file), params=PARAMS)
        with pytest.raises(
            UserError, match=r"the input .* lies in .*/out/text, which a preparation into .*/out writes"
        ):
            prepare(again, tmp_path / "out", 1, log=lambda _line: None)
    assert {path: path.read_bytes() for path in text.iterdir()} == before
    assert all(name.endswith(".txt") for name in names_below(text))  # elsewhere it may be read, without the stamp
    with pytest.raises(UserError, match=r"vocab.txt is a file, not a folder; choose another --out"):
        prepare(Recipe("prose", str(tmp_path / "in"), vocab=str(vocab_file), params=PARAMS), vocab_file, 1)


def test_stores_and_exports_below_a_folder_of_text_are_no_text(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", 2)
    store = make_store(tmp_path / "in/store", 10)
    export_store(
        store, tmp_path / "in/exported", "tfrecord", width=32, most_masked=8, per_file=5, log=lambda _line: None
    )
    (tmp_path / "in/store/readme").write_text("The user's.")
    (tmp_path / "in/exported/readme").write_text("The user's.")
    assert names_below(tmp_path / "in") == ["00.txt", "01.txt", "exported/readme", "store/readme"]


# ---- links ----------------------------------------------------------------------------------------------------------


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "in"
    write_texts(elsewhere / "deep", 2)
    write_texts(root / "z", 1)
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (root / "a").symlink_to(root / "z")  # it goes by its own name
    (root / "loop").symlink_to(root)
    (elsewhere / "back").symlink_to(root)
    (root / "same.txt").symlink_to(root / "z/00.txt")
    (root / "other.txt").symlink_to(tmp_path / "single")
    (tmp_path / "single").write_text("A file outside of the folder.")
    (root / "broken").symlink_to(tmp_path / "nothing")
    os.mkfifo(root / "pipe")
    found, left_out = files_below(root)
    assert [path.relative_to(root).as_posix() for path in found] == [
        "again/deep/00.txt", "again/deep/01.txt", "other.txt", "z/00.txt",
    ]  # fmt: skip
    assert {path.name: why for path, why in left_out.items()} == {
        "same.txt": "links to files that are read already", "broken": "links to nothing", "pipe": "no regular files",
    }  # fmt: skip


# ---- saved datasets -------------------------------------------------------------------------------------------------


def save(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": [f"Row {n} of {path.name} is here." for n in range(count)]})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def rows(folder: Path) -> int:
    sources = corpora.list_sources("parquet", str(folder))
    return sum(len(piece) for piece in corpora.list_pieces("parquet", sources))


def test_what_a_saved_dataset_does_not_count_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    save(folder / "data-00000-of-00002.arrow", 60)
    save(folder / "data-00001-of-00002.arrow", 60)
    save(folder / "cache-0123456789abcdef.arrow", 120)
    assert rows(tmp_path) == 120
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": f"data-0000{n}-of-00002.arrow"} for n in (0, 1)]})
    )
    save(folder / "data-00000-of-00001.arrow", 120)  # of an earlier save
    assert rows(tmp_path) == 120
    found = corpora.find_sources("parquet", str(tmp_path))
    assert sorted(found.left_out["files that `datasets` does not count (caches)"]) == [
        "train/cache-0123456789abcdef.arrow", "train/data-00000-of-00001.arrow",
    ]  # fmt: skip
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"state.json names data-00001-of-00002.arrow, which is not there"):
        rows(tmp_path)


# ---- exports --------------------------------------------------------------------------------------------------------


def make_store(folder: Path, count: int) -> Path:
    import numpy as np

    ids = np.arange(3, 13, dtype=np.uint16)
    positions, labels = np.array([2, 5], np.uint16), np.array([7, 8], np.uint16)
    samples = (Sample(ids + n % 7, 4, positions, labels, n % 2) for n in range(count))
    part = write_part(folder.with_name("part.bin"), samples)
    merge_parts(folder, [part], {"vocab_size": 400, "vocab_sha256": "0"})
    for path in folder.parent.glob("part.bin*"):
        path.unlink()
    return folder


def export(store: Path, out: Path, per_file: int, form: str = "tfrecord") -> None:
    export_store(store, out, form, width=32, most_masked=8, per_file=per_file, log=lambda _line: None)


@pytest.fixture
def big_vocab(tmp_path: Path) -> Path:
    path = tmp_path / "big.txt"
    path.write_text("".join(f"{t}\n" for t in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(395))]))
    return path


def test_an_export_replaces_an_earlier_one(tmp_path: Path, big_vocab: Path) -> None:
    store, out = make_store(tmp_path / "store", 50), tmp_path / "out"
    for per_file, form, count in ((10, "tfrecord", 5), (25, "tfrecord", 2), (20, "hdf5", 3), (50, "tfrecord", 1)):
        export(store, out, per_file, form)
        assert len(find_sources(out)) == count
    manifest = import_store(find_sources(out), tmp_path / "back", big_vocab, num_workers=1, log=lambda _line: None)
    assert manifest["num_samples"] == 50


def test_an_export_beside_foreign_files_is_refused(tmp_path: Path) -> None:
    store, out = make_store(tmp_path / "store", 10), tmp_path / "out"
    out.mkdir()
    for name in ("part-00000-of-00500", "part-00000-of-00001.tfrecord", "notes.md"):
        (out / name).write_text("The user's.")
        with pytest.raises(
            UserError, match=rf"holds files that are not an export's \({name}\); choose an empty folder"
        ):
            export(store, out, 10)
        assert (out / name).read_text() == "The user's."
        (out / name).unlink()
    with pytest.raises(UserError, match="holds files that are not an export's"):
        export(store, store, 10)


def test_a_stopped_export_is_not_imported_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, out = make_store(tmp_path / "store", 50), tmp_path / "out"
    export(store, out, 10)
    with monkeypatch.context() as patch:
        written: list[Any] = []

        def stop(path: Path, *_arguments: Any) -> None:
            if written:
                raise KeyboardInterrupt
            written.append(path)
            path.write_bytes(b"x")

        patch.setattr("bert_fast.data.formats.convert.write_tfrecord", stop)
        with pytest.raises(KeyboardInterrupt):
            export(store, out, 20)
    with pytest.raises(UserError, match="an export into it was stopped; run that again"):
        find_sources(out)
    export(store, out, 25)
    assert len(find_sources(out)) == 2


def test_parts_of_two_sets_are_refused(tmp_path: Path) -> None:
    for name in ("part-00000-of-00002", "part-00001-of-00002", "extra.tfrecord"):
        (tmp_path / name).write_bytes(b"x")
    assert len(find_sources(tmp_path)) == 3
    (tmp_path / "part-00000-of-00001").write_bytes(b"x")
    with pytest.raises(
        UserError, match="holds parts of 2 sets .part-00000-of-00001 and part-00000-of-00002., which may"
    ):
        find_sources(tmp_path)


def test_a_store_is_not_made_in_the_folder_of_its_samples(tmp_path: Path, big_vocab: Path) -> None:
    store, out = make_store(tmp_path / "store", 10), tmp_path / "out"
    export(store, out, 10)
    with pytest.raises(
        UserError, match="is the folder of part-00000-of-00001.tfrecord; give the store a folder of its own"
    ):
        import_store(find_sources(out), out, big_vocab, num_workers=1, log=lambda _line: None)


# ---- what killed processes leave ------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from bert_fast.files import atomic_file
with atomic_file(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_temporary_files_of_killed_processes_go(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", KILLED, str(target)], env=environment).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    users = [tmp_path / ".notes.tmp", tmp_path / ".notes.12.tmp", tmp_path / "x.bert_fast.tmp"]
    for path in users:
        path.write_text("The user's.")
    with atomic_file(tmp_path / "other") as file:  # the first write of a process into a folder
        file.write(b"x")
        assert [path.name.split(".")[1] for path in tmp_path.glob(".*.tmp") if path not in users] == ["other"]
    assert all(path.is_file() for path in users)


def test_a_temporary_file_that_is_being_written_stays(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a") as file:
        file.write(b"x")
        remove_temporaries(tmp_path)
        assert len(list(tmp_path.glob(".*.tmp"))) == 1
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_temporary_file_of_another_host_goes_when_nobody_wrote_to_it_for_long(tmp_path: Path) -> None:
    foreign = tmp_path / ".a.anotherhost-1.bert_fast.tmp"
    foreign.write_bytes(b"x")
    remove_temporaries(tmp_path)
    assert foreign.exists()
    os.utime(foreign, (time.time() - 7200,) * 2)
    remove_temporaries(tmp_path)
    assert not foreign.exists()


WORKING = """
import re, sys, time
from pathlib import Path
from bert_fast.data.pool import Pool

def work(kind, folder):
    import os
    Path(folder, str(os.getpid())).touch()
    if kind == "asleep":
        time.sleep(600)
    if kind == "busy in C":
        re.match("(a+)+$", "a" * 60 + "b")  # holds the interpreter for good
    return kind

if __name__ == "__main__":
    with Pool(3) as pool:
        for _ in pool.map(work, iter([("asleep", sys.argv[1]), ("busy in C", sys.argv[1]), ("idle", sys.argv[1])])):
            pass
"""


def test_no_worker_outlives_its_parent(tmp_path: Path) -> None:
    script, started = tmp_path / "working.py", tmp_path / "started"
    script.write_text(WORKING)
    started.mkdir()
    with subprocess.Popen(
        [sys.executable, str(script), str(started)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as parent:  # fmt: skip
        deadline = time.monotonic() + 60
        while len(list(started.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = [int(path.name) for path in started.iterdir()]
        time.sleep(0.2)
        parent.kill()
    assert len(workers) >= 2
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
