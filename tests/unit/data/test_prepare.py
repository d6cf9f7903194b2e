"""prepare(): the same bytes whatever the number of processes, whatever was interrupted; done work is not done again."""

from __future__ import annotations

import concurrent.futures
import errno
import io
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bert_fast import files
from bert_fast.data import corpus
from bert_fast.data import pool as pool_module
from bert_fast.data import prepare as module
from bert_fast.data.corpora import base
from bert_fast.data.prepare import Recipe, prepare
from bert_fast.data.samples import SampleParams
from bert_fast.data.store import Store
from bert_fast.errors import UserError


@pytest.fixture
def recipe(tmp_path: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """40 documents in 8 files; small limits make several text files and several reading chunks of them."""
    rng = random.Random(0)
    words = ["the", "of", "returns", "tensor", "input", "is", "shape", "xyz", "bcd"]
    folder = tmp_path / "in"
    folder.mkdir()
    for file in range(8):
        text = ""
        for _ in range(5):
            for _ in range(rng.randint(5, 9)):
                text += " ".join(rng.choice(words) for _ in range(rng.randint(4, 12))) + ".\n"
            text += "\n"
        (folder / f"{file}.txt").write_text(text)
    monkeypatch.setattr(base, "PIECE_BYTES", 2500)
    monkeypatch.setattr(module, "TEXT_FILE_BYTES", 2000)
    params = SampleParams(max_seq_len=32, max_predictions=5, dupe_factor=2, seed=9)
    return Recipe("mlcommons", str(folder), vocab=str(vocab_file), eval_fraction=0.2, params=params)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads for processes: quick, and monkeypatches reach the workers. None is left running after an error."""

    class Threads(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers: int, mp_context: Any, initializer: Any) -> None:
            super().__init__(workers)

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=True, cancel_futures=cancel_futures)

    monkeypatch.setattr(pool_module, "ProcessPoolExecutor", Threads)


@pytest.fixture
def lines() -> list[str]:
    return []


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def run(recipe: Recipe, out: Path, workers: int = 2, lines: list[str] | None = None) -> dict[str, bytes]:
    prepare(recipe, out, workers, log=(lines if lines is not None else []).append)
    return contents(out)


def test_result_is_two_stores_that_fit_together(
    recipe: Recipe, tmp_path: Path, in_process: None, lines: list[str]
) -> None:
    result = prepare(recipe, tmp_path / "out", 2, log=lines.append)
    train, evaluation = Store(tmp_path / "out" / "train"), Store(tmp_path / "out" / "eval")
    assert result["train"] == train.manifest
    assert result["eval"] == evaluation.manifest
    assert result["seconds"] > 0
    train.verify()
    evaluation.verify()
    assert len(train) > len(evaluation) > 0
    assert train.manifest["vocab_sha256"] == evaluation.manifest["vocab_sha256"]
    assert train.manifest["documents"] + evaluation.manifest["documents"] == 40
    assert train.manifest["params"]["seed"] == 9
    assert len(list((tmp_path / "out" / "text").glob("train-*.txt"))) > 3, "the test means several parts"
    assert not list((tmp_path / "out").glob("parts-*")), "parts are removed when they are merged"
    assert any("MB/s" in line for line in lines)
    assert any("samples/s" in line for line in lines)


def test_number_of_processes_does_not_matter(recipe: Recipe, tmp_path: Path) -> None:
    """Real processes, once."""
    assert run(recipe, tmp_path / "one", workers=1) == run(recipe, tmp_path / "two", workers=2)


def test_a_second_run_does_nothing(
    recipe: Recipe, tmp_path: Path, in_process: None, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(recipe, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".npy")}

    def never(*_args: Any) -> None:
        raise AssertionError("work was done again")

    monkeypatch.setattr(module, "make_samples", never)
    monkeypatch.setattr(corpus, "read_piece", never)
    assert run(recipe, tmp_path / "out", lines=lines) == first
    assert sum("already there" in line for line in lines) == 3
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.parametrize(
    "lost",
    [
        "text/stamp.json",
        "text/train-00001.txt+text/stamp.json",
        "train/manifest.json",
        "eval/manifest.json",
        "vocab.txt",
    ],
)
def test_a_lost_stage_is_made_again_the_same(recipe: Recipe, tmp_path: Path, in_process: None, lost: str) -> None:
    first = run(recipe, tmp_path / "out")
    for name in lost.split("+"):
        (tmp_path / "out" / name).unlink()
    assert run(recipe, tmp_path / "out") == first


def test_restart_makes_only_the_missing_parts(
    recipe: Recipe, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(recipe, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:

        def interrupted(*_args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(module, "merge_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, out)
    parts = sorted(out.glob("parts-train-*/*.bin"))
    assert len(parts) > 3
    parts[1].unlink()
    parts[2].with_name(parts[2].name + ".npz").unlink()
    os.truncate(parts[3], 10)
    made: list[str] = []
    write_part = module.write_part
    monkeypatch.setattr(
        module, "write_part", lambda path, samples: (made.append(Path(path).name), write_part(path, samples))[1]
    )
    assert run(recipe, out) == expected
    num_eval = len(list((out / "text").glob("eval-*.txt")))
    assert sorted(made) == sorted([p.name for p in parts[1:4]] + [f"{n:05d}.bin" for n in range(num_eval)])


@pytest.mark.parametrize("change", ["seed", "length", "vocab", "fraction", "text"])
def test_another_recipe_is_made_anew(
    recipe: Recipe, tmp_path: Path, in_process: None, vocab_file: Path, change: str
) -> None:
    run(recipe, tmp_path / "out")
    if change == "seed":
        recipe = replace(recipe, params=replace(recipe.params, seed=10))
    elif change == "length":
        recipe = replace(recipe, params=replace(recipe.params, max_seq_len=24))
    elif change == "vocab":
        other = tmp_path / "vocab.txt"
        other.write_text(vocab_file.read_text() + "extra\n")
        recipe = replace(recipe, vocab=str(other))
    elif change == "fraction":
        recipe = replace(recipe, eval_fraction=0.4)
    else:
        (tmp_path / "in" / "9.txt").write_text("a new file.\nof the input.\n")
    assert run(recipe, tmp_path / "out") == run(recipe, tmp_path / "fresh")


def test_text_edited_at_equal_length_is_seen(recipe: Recipe, tmp_path: Path, in_process: None) -> None:
    run(recipe, tmp_path / "out")
    path = tmp_path / "in" / "0.txt"
    path.write_text(path.read_text().replace("tensor", "xyzxyz"))
    os.utime(path, ns=(1, 1))
    assert run(recipe, tmp_path / "out") == run(recipe, tmp_path / "fresh")


def test_evaluation_can_be_cut_to_its_first_samples(recipe: Recipe, tmp_path: Path, in_process: None) -> None:
    run(recipe, tmp_path / "all")
    whole = Store(tmp_path / "all" / "eval")
    for count in (1, 7, len(whole) - 1, len(whole) + 5):
        run(replace(recipe, eval_max_samples=count), tmp_path / str(count))
        cut = Store(tmp_path / str(count) / "eval")
        assert len(cut) == min(count, len(whole))
        tokens = cut.manifest["num_tokens"]
        assert tokens == int(whole.lengths[: len(cut)].sum(dtype=int))
        ids = np.arange(len(cut))
        assert (cut.batch(ids).input_ids == whole.batch(ids).input_ids).all()
        cut.verify()


def test_evaluation_can_be_picked_evenly_as_the_reference_does(
    recipe: Recipe, tmp_path: Path, in_process: None
) -> None:
    run(recipe, tmp_path / "all")
    whole = Store(tmp_path / "all" / "eval")
    for count in (1, 7, len(whole) - 1, len(whole), len(whole) + 5):
        run(replace(recipe, eval_max_samples=count, eval_pick="evenly"), tmp_path / str(count))
        picked = Store(tmp_path / str(count) / "eval")
        expected = [int(i * (len(whole) / count)) for i in range(count)] if count < len(whole) else range(len(whole))
        assert len(picked) == len(expected)
        for ours, theirs in zip((picked[i] for i in range(len(picked))), (whole[i] for i in expected), strict=True):
            assert (ours.input_ids == theirs.input_ids).all()
            assert (ours.masked_labels == theirs.masked_labels).all()
            assert ours.is_random_next == theirs.is_random_next
        picked.verify()
        assert picked.manifest["num_random_next"] == sum(picked[i].is_random_next for i in range(len(picked)))


def test_vocabulary_is_trained_if_none_is_given_and_kept(
    recipe: Recipe, tmp_path: Path, in_process: None, lines: list[str]
) -> None:
    recipe = replace(recipe, vocab=None, vocab_size=50)
    first = run(recipe, tmp_path / "out")
    assert Store(tmp_path / "out" / "train").manifest["vocab_size"] <= 50
    assert run(recipe, tmp_path / "out", lines=lines) == first
    assert "vocabulary: already there" in lines


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_bad_text_reaches_the_caller_through_real_processes(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "in" / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"bad\.txt is not UTF-8 text"):
        run(recipe, tmp_path / "out", workers=1)


def test_text_too_short_for_a_sample(recipe: Recipe, tmp_path: Path, in_process: None) -> None:
    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(f"{'x' * n}\n\n" for n in range(1, 30)))
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nx\n##x\n")
    recipe = replace(recipe, input=str(folder), vocab=str(vocab), eval_fraction=0.08)
    with pytest.raises(UserError, match="no samples for store .*(eval|train).*too short"):
        run(recipe, tmp_path / "out")


def test_samples_too_short_to_hold_a_pair_are_refused(recipe: Recipe, tmp_path: Path, in_process: None) -> None:
    with pytest.raises(UserError):
        run(replace(recipe, params=replace(recipe.params, max_seq_len=4)), tmp_path / "out")


def test_remains_of_other_preparations_go(recipe: Recipe, tmp_path: Path, in_process: None) -> None:
    out = tmp_path / "out"
    first = run(recipe, out)
    for name in (
        "pieces-0123456789ab/000003.pickle",
        "parts-train-0123456789ab/00003.bin",
        "parts-eval-0123456789ab/00000.bin.npz",
    ):
        (out / name).parent.mkdir()
        (out / name).write_bytes(b"x")
    (out / "pieces-0123456789ab/mine").write_bytes(b"x")
    (out / "text/notes.txt").write_bytes(b"x")
    again = replace(recipe, params=replace(recipe.params, seed=10))
    run(again, out)
    assert run(recipe, out) == {**first, "pieces-0123456789ab/mine": b"x", "text/notes.txt": b"x"}


@pytest.mark.parametrize("room", [500, 6000, 20_000, 40_000])
def test_disk_full_anywhere_is_one_clear_error_and_a_rerun_completes(
    recipe: Recipe, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    expected = run(recipe, tmp_path / "whole")
    assert room < sum(map(len, expected.values())), "the disk must become full"
    left = [room]

    class Limited(io.FileIO):
        def write(self, data: Any) -> int:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    real: Callable[..., Any] = open
    with monkeypatch.context() as patch:
        patch.setattr(
            files, "open", lambda p, mode="r": Limited(p, "w") if mode == "wb" else real(p, mode), raising=False
        )
        with pytest.raises(UserError, match="disk full while writing"):
            run(recipe, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert run(recipe, tmp_path / "out") == expected
