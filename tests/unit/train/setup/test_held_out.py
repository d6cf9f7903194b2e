"""The evaluation split where documents are few, and where the other document of a random next sentence comes from."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest

from bert_fast.data import prepare as module
from bert_fast.data import tokens as tokens_module
from bert_fast.data.corpus import is_held_out
from bert_fast.data.prepare import SPLITS, Recipe, prepare
from bert_fast.data.samples import Sample, SampleParams
from bert_fast.data.store import Store
from bert_fast.data.verify import verify_store
from bert_fast.data.wordpiece import Vocabulary, load_vocabulary
from bert_fast.errors import UserError


class InProcess:
    """A pool without processes."""

    def __init__(self, workers: int) -> None:
        pass

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Callable[..., Any], arguments: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
        return (function(*each) for each in arguments)


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Pool", InProcess)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


def split_lines(recipe: Recipe, out: Path) -> dict[str, list[str]]:
    """The sentences of both splits, as the text stage writes them."""
    stamp = module.text_stage(recipe, out, InProcess(1), lambda line: None)  # type: ignore[arg-type]
    texts = {
        split: "".join((out / "text" / name).read_text(encoding="utf-8") for name in stamp[split]["files"])
        for split in SPLITS
    }
    return {split: [line for line in text.split("\n") if line] for split, text in texts.items()}


def all_on_one_side(folder: Path, fraction: float) -> int:
    """A seed with which the hashes of all documents lie on one side."""
    digests = [
        hashlib.blake2b(path.read_text().strip().encode(), digest_size=16).hexdigest() for path in folder.iterdir()
    ]
    return next(seed for seed in range(1000) if len({is_held_out(digest, fraction, seed) for digest in digests}) == 1)


# ---- few documents --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.5, 0.9])
@pytest.mark.parametrize("documents", [1, 3])
def test_of_few_documents_the_end_of_the_text_is_held_out(
    tmp_path: Path, folder: Path, documents: int, fraction: float
) -> None:
    """Whichever split the hashes leave empty: both get sentences, and none is lost or in both."""
    lines = [f"This is sentence number {n} of the book." for n in range(300)]
    size = len(lines) // documents
    for n in range(documents):
        (folder / f"{n}.txt").write_text("\n".join(lines[n * size : (n + 1) * size]))
    params = SampleParams(seed=all_on_one_side(folder, fraction))
    found = split_lines(Recipe("mlcommons", str(folder), eval_fraction=fraction, params=params), tmp_path / "out")
    assert found["train"] + found["eval"] == lines
    assert len(found["eval"]) == max(2, round(300 * fraction))


def test_the_end_of_a_text_that_occurs_twice_is_held_out_of_both(tmp_path: Path, folder: Path) -> None:
    for name in "ab":
        (folder / f"{name}.txt").write_text("".join(f"This is sentence number {n} of the book.\n" for n in range(50)))
    found = split_lines(Recipe("mlcommons", str(folder), eval_fraction=0.1), tmp_path / "out")
    assert len(found["train"]) == 45
    assert len(found["eval"]) == 5
    assert not set(found["train"]) & set(found["eval"])


def test_where_both_splits_have_documents_none_is_cut(tmp_path: Path, folder: Path) -> None:
    (folder / "a.txt").write_text(
        "".join(f"The first of {n}.\nThe second of {n}.\nThe third of {n}.\n\n" for n in range(100))
    )
    found = split_lines(Recipe("mlcommons", str(folder), eval_fraction=0.2), tmp_path / "out")
    for lines in found.values():
        assert [line.split()[1] for line in lines] == ["first", "second", "third"] * (len(lines) // 3)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        *(({"eval_fraction": value}, "--eval-fraction .*above 0 and below 1") for value in (0.0, 1.0, -0.1, 2.0, np.nan)),
        *(({"max_unknown": value}, "--max-unknown .*between 0 and 1") for value in (-0.1, 1.5, np.nan)),
        *(({"eval_max_samples": value}, "--eval-max-samples .*at least 1") for value in (0, -5)),
        *(({"vocab_size": value}, "--vocab-size .*between 6 and 65536") for value in (0, -1, 5, 70_000)),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(values: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Recipe(**values)  # type: ignore[arg-type]


# ---- the other document ---------------------------------------------------------------------------------------------


def write_books(folder: Path, count: int, sentences: int, vocabulary: tuple[str, ...]) -> None:
    """Books of random words whose first letters say which book it is."""
    rng = random.Random(1)
    words = [word for word in vocabulary[5:] if word.isalpha()]
    for book in range(count):
        own = words[book :: count + 1]
        lines = [" ".join(rng.choice(own) for _ in range(12)) for _ in range(sentences)]
        (folder / f"{book}.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("books", [1, 2, 5])
def test_long_documents_get_random_next_sentences(
    tmp_path: Path, folder: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch, books: int
) -> None:
    """Each fills a text file of its own, as a book does at 512 KiB. Both stores look right, even that of one book."""
    monkeypatch.setattr(module, "TEXT_FILE_BYTES", 2000)
    vocabulary = load_vocabulary(vocab_file)
    write_books(folder, books, 1500, vocabulary.tokens)
    params = SampleParams(max_seq_len=64, max_predictions=10, dupe_factor=2)
    recipe = Recipe("mlcommons", str(folder), vocab=str(vocab_file), eval_fraction=0.2, params=params)
    prepare(recipe, tmp_path / "out", log=lambda line: None)
    assert len(list((tmp_path / "out" / "text").glob("*.txt"))) >= books
    for split in SPLITS:
        store = Store(tmp_path / "out" / split)
        share = store.manifest["num_random_next"] / len(store)
        assert 0.40 < share < 0.65, split
        assert {f.name: f.found for f in verify_store(store, vocabulary) if not f.passed} == {}
        if store.manifest["documents"] > 1:
            ids = range(0, len(store), 5)
            pairs = [(*books_of(store[index], vocabulary, books), store[index].is_random_next) for index in ids]
            assert all((of_a != of_b) == random_next for of_a, of_b, random_next in pairs)


def books_of(sample: Sample, vocabulary: Vocabulary, count: int) -> tuple[int, int]:
    """Which of `write_books` each segment is from: from the words before masking."""
    words = [word for word in vocabulary.tokens[5:] if word.isalpha()]
    book = {word: n % (count + 1) for n, word in enumerate(words)}
    ids = sample.input_ids.copy()
    ids[sample.masked_positions] = sample.masked_labels
    segments = ids[1 : sample.len_a - 1], ids[sample.len_a : -1]
    of_a, of_b = (Counter(book[vocabulary.tokens[token]] for token in s).most_common(1)[0][0] for s in segments)
    return of_a, of_b


def test_text_of_the_other_split_is_never_the_next_sentence(
    tmp_path: Path, folder: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TEXT_FILE_BYTES", 2000)
    lines = [["the of the"] * 20, ["returns tensor returns"] * 20, ["input is input"] * 20]
    for n, document in enumerate(lines):
        (folder / f"{n}.txt").write_text("\n".join(document))
    params = SampleParams(max_seq_len=32, max_predictions=5, dupe_factor=20, seed=1)
    recipe = Recipe("mlcommons", str(folder), vocab=str(vocab_file), eval_fraction=0.34, params=params)
    prepare(recipe, tmp_path / "out", log=lambda line: None)
    words = {}
    for split in SPLITS:
        batch = (store := Store(tmp_path / "out" / split)).batch(np.arange(len(store)))
        kept = np.setdiff1d(np.arange(len(batch.input_ids)), batch.masked_positions)
        words[split] = set(batch.input_ids[kept].tolist()) - {2, 3}
    assert words["train"]
    assert words["eval"]
    assert not words["train"] & words["eval"]


def test_restart_reads_the_token_ids_again(
    tmp_path: Path, folder: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the ids are put together, or after it: files that are there are not tokenized again."""
    monkeypatch.setattr(module, "TEXT_FILE_BYTES", 2000)
    write_books(folder, 6, 40, load_vocabulary(vocab_file).tokens)
    params = SampleParams(max_seq_len=64, max_predictions=10, dupe_factor=1)
    recipe = Recipe("mlcommons", str(folder), vocab=str(vocab_file), eval_fraction=0.3, params=params)
    prepare(recipe, tmp_path / "whole", log=lambda line: None)
    for stage in ("merge_token_parts", "merge_parts"):

        def stopped(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, stage, stopped)
            with pytest.raises(KeyboardInterrupt):
                prepare(recipe, tmp_path / "out", log=lambda line: None)
    parts = sorted(tmp_path.glob("out/parts-train-*/tokens/*.npz"))
    assert len(parts) > 2
    tokenized: list[str] = []
    tokenize = tokens_module.tokenize_file
    monkeypatch.setattr(module, "tokenize_file", lambda *a: (tokenized.append(Path(a[0]).name), tokenize(*a))[1])
    prepare(recipe, tmp_path / "out", log=lambda line: None)
    assert all(name.startswith("eval") for name in tokenized)
    for name in ("samples.bin", "manifest.json"):
        assert (tmp_path / "out" / "train" / name).read_bytes() == (tmp_path / "whole" / "train" / name).read_bytes()


# ---- unknown words, case --------------------------------------------------------------------------------------------


def documents(folder: Path, *sentences: str) -> None:
    (folder / "a.txt").write_text(
        "\n\n".join("\n".join([*sentences, f"the {letter}"]) for letter in "abcdefghijklmnopqrst"), encoding="utf-8"
    )


def test_text_that_the_vocabulary_cannot_write_is_refused(tmp_path: Path, folder: Path, vocab_file: Path) -> None:
    documents(folder, "the input is the shape .", "Это другой язык ?")
    recipe = Recipe("mlcommons", str(folder), vocab=str(vocab_file), eval_fraction=0.3)
    says = r"train: 30\.0% of the words \(.*'Это', 'другой', 'язык'.*vocab\.txt, more than --max-unknown 0\.05; give"
    with pytest.raises(UserError, match=says):
        prepare(recipe, tmp_path / "out", log=lambda line: None)
    assert not (tmp_path / "out" / "train").exists()


def test_the_limit_of_unknown_words_can_be_raised(tmp_path: Path, folder: Path, vocab_file: Path) -> None:
    documents(folder, "the input is the shape .", "Это другой язык ?")
    recipe = {"corpus": "mlcommons", "input": str(folder), "vocab": str(vocab_file), "eval_fraction": 0.3}
    lines: list[str] = []
    result = prepare(Recipe(**recipe, max_unknown=0.5), tmp_path / "out", log=lines.append)  # type: ignore[arg-type]
    manifest = result["train"]
    assert manifest["num_unknown_words"] / manifest["num_words"] == 0.3
    assert any("30.00% of them unknown" in line for line in lines)
    with pytest.raises(UserError, match="more than --max-unknown 0.05"):  # of a finished store, too
        prepare(Recipe(**recipe), tmp_path / "out", log=lambda line: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("cased", [None, True, False])
def test_case_reaches_the_store(tmp_path: Path, folder: Path, cased: bool | None) -> None:
    documents(folder, "Berlin berlin Berlin", "berlin Berlin berlin")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Berlin", "berlin", "the", *ascii_lowercase])
    )
    with vocab.open("a") as file:
        file.writelines(f"\n##{letter}" for letter in ascii_lowercase)
    recipe = Recipe("mlcommons", str(folder), vocab=str(vocab), eval_fraction=0.3, cased=cased)
    manifest = prepare(recipe, tmp_path / "out", log=lambda line: None)["train"]
    assert manifest["lowercase"] is (cased is False)
    assert manifest["vocab_sha256"] == hashlib.sha256((tmp_path / "out" / "vocab.txt").read_bytes()).hexdigest()
    store = Store(tmp_path / "out" / "train")
    labels = np.bincount(store.batch(np.arange(len(store))).masked_labels, minlength=7)
    assert bool(labels[5] > 0) is (cased is not False)
    assert labels[6] > 0


@pytest.mark.parametrize(("cased", "ends"), [(False, "\n"), (None, "\r\n")])
def test_another_case_is_another_store_and_other_line_ends_are_not(
    tmp_path: Path, folder: Path, cased: bool | None, ends: str
) -> None:
    documents(folder, "Berlin berlin Berlin", "berlin Berlin berlin")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Berlin", "berlin", "the", *ascii_lowercase]
    tokens += [f"##{letter}" for letter in ascii_lowercase]
    vocab = tmp_path / "vocab.txt"
    vocab.write_bytes("\n".join(tokens).encode())
    recipe = {"corpus": "mlcommons", "input": str(folder), "vocab": str(vocab), "eval_fraction": 0.3}
    prepare(Recipe(**recipe), tmp_path / "out", log=lambda line: None)  # type: ignore[arg-type]
    vocab.write_bytes(ends.join(tokens).encode())
    lines: list[str] = []
    prepare(Recipe(**recipe, cased=cased), tmp_path / "out", log=lines.append)  # type: ignore[arg-type]
    assert any("train" in line and "already there" in line for line in lines) is (cased is None)
