"""Pairs from every kind of source: what the stores hold, the split without a text in common, and every bad input."""

from __future__ import annotations

import concurrent.futures
import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.paths import ROOT

from bert_fast.config.choices import PAIR_SOURCES
from bert_fast.data import pool as pool_module
from bert_fast.data.pairs.groups import groups_of, held_out, numbered
from bert_fast.data.pairs.prepare import prepare_pairs
from bert_fast.data.pairs.recipe import PairRecipe, find_reader, read_pair_recipe
from bert_fast.data.pairs.sources.base import SourceOptions, TextPair
from bert_fast.data.pairs.store import PairStore
from bert_fast.data.wordpiece import load_vocabulary
from bert_fast.errors import UserError

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def _threads_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Threads(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers: int, mp_context: Any, initializer: Any) -> None:
            super().__init__(workers)

    monkeypatch.setattr(pool_module, "ProcessPoolExecutor", Threads)


def word(number: int) -> str:
    return "".join(chr(ord("b") + int(digit)) for digit in f"{number:03d}")


ROWS: list[Row] = [
    {"query": f"the {word(n)} is a tensor", "positive": f"it returns {word(n)} {word(n + 1)}"} for n in range(60)
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    data = text.encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def run(
    out: Path, vocab_file: Path, *sources: str, lines: list[str] | None = None, **options: Any
) -> tuple[PairStore, PairStore]:
    settings = {"eval_fraction": 0.2, "vocab": str(vocab_file), "workers": 2, **options}
    recipe = PairRecipe(source=list(sources), out=str(out), **settings)
    prepare_pairs(recipe, log=(lines if lines is not None else []).append)
    return PairStore(out / "train"), PairStore(out / "eval")


def texts_in(store: PairStore, vocab: Path) -> list[list[str]]:
    """The texts of every pair as words, without the marks of word pieces."""
    vocabulary = load_vocabulary(vocab)
    found = []
    for index in range(len(store)):
        sample = store[index]
        ends = [*sample.masked_positions.tolist()[1:], len(sample.input_ids)]
        texts = []
        for begin, end in zip(sample.masked_positions.tolist(), ends, strict=True):
            tokens = [vocabulary.tokens[i] for i in sample.input_ids[begin:end]]
            assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
            texts.append(" ".join(tokens[1:-1]).replace(" ##", ""))
        assert sample.len_a == ends[0]
        found.append(texts)
    return found


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- columns --------------------------------------------------------------------------------------------------------


def write_source(kind: str, folder: Path, rows: list[Row]) -> str:
    """Rows as a file of this kind; returns what --source names."""
    if kind in ("jsonl", "jsonl.gz"):
        return f"jsonl:{write_lines(folder / f'rows.{kind}', rows)}"
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, folder / "rows.parquet", row_group_size=7)
        return f"parquet:{folder / 'rows.parquet'}"
    saved = folder / "saved"
    saved.mkdir()
    halves = {"b.arrow": table.slice(0, 25), "a.arrow": table.slice(25)}  # in the order of state.json, not of names
    for name, half in halves.items():
        with pa.OSFile(str(saved / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(half, max_chunksize=10)
    (saved / "cache-1.arrow").write_bytes(b"")
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in halves]}))
    return f"datasets:{saved}"


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "datasets"])
def test_rows_become_pairs(kind: str, tmp_path: Path, vocab_file: Path) -> None:
    rows = [{**row, "negative": f"of {word(n)}", "negative_1": f"shape {word(n)}"} for n, row in enumerate(ROWS)]
    train, evaluation = run(tmp_path / "out", vocab_file, f"a={write_source(kind, tmp_path, rows)}")
    train.verify()
    evaluation.verify()
    order = [list(row.values()) for row in rows]
    both = [texts_in(store, vocab_file) for store in (train, evaluation)]
    assert sorted(both[0] + both[1]) == sorted(order)
    for texts in both:
        assert texts == [row for row in order if row in texts], "in the order of the rows"
    assert len(train) > len(evaluation) > 0
    assert train.texts_per_pair == 4
    assert train.sources[0].name == "a"
    assert train.sources[0].weight == len(train)
    assert (tmp_path / "out/vocab.txt").read_text() == vocab_file.read_text()
    assert not (tmp_path / "out/parts-pairs").exists()
    longest = max(len(text.split()) for texts in both[0] for text in texts)
    assert longest + 2 <= train.max_text_length < train.manifest["max_length"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_negatives_as_a_list_and_other_columns(kind: str, tmp_path: Path, vocab_file: Path) -> None:
    rows = [
        {"negatives": [f"of {word(n)}", "shape", "a"], "q": row["query"], "id": n, "p": row["positive"]}
        for n, row in enumerate(ROWS)
    ]
    options = {"query_column": "q", "positive_column": "p"}
    source = f"a={write_source(kind, tmp_path, rows)}"
    every, _ = run(tmp_path / "all", vocab_file, source, **options)
    first, _ = run(tmp_path / "one", vocab_file, source, negatives=1, **options)
    none, _ = run(tmp_path / "none", vocab_file, source, negatives=0, **options)
    assert [store.texts_per_pair for store in (every, first, none)] == [5, 3, 2]
    for store in (first, none):
        count = store.texts_per_pair
        assert texts_in(store, vocab_file) == [texts[:count] for texts in texts_in(every, vocab_file)]


def test_numbered_negatives_are_in_the_order_of_their_numbers(tmp_path: Path, vocab_file: Path) -> None:
    row = {"negative_10": "c", "negative_2": "b", "negative": "a", "negative_x": "z"}
    rows = [{**each, **row} for each in ROWS[:5]]
    train, _ = run(tmp_path / "out", vocab_file, f"a=jsonl:{write_lines(tmp_path / 'a.jsonl', rows)}")
    assert {tuple(texts[2:]) for texts in texts_in(train, vocab_file)} == {("a", "b", "c")}


def test_a_negative_that_is_null_is_none(tmp_path: Path, vocab_file: Path) -> None:
    rows = [{**row, "negative": None, "negative_1": "shape"} for row in ROWS[:5]]
    train, _ = run(tmp_path / "out", vocab_file, f"a=jsonl:{write_lines(tmp_path / 'a.jsonl', rows)}")
    assert {tuple(texts[2:]) for texts in texts_in(train, vocab_file)} == {("shape",)}


def test_a_folder_of_files(tmp_path: Path, vocab_file: Path) -> None:
    folder = tmp_path / "in" / "inner"
    folder.mkdir(parents=True)
    write_lines(folder / "b.jsonl.gz", ROWS[30:])
    write_lines(tmp_path / "in" / "a.json", ROWS[:30])
    (folder / "notes.txt").write_text("no pair")
    train, evaluation = run(tmp_path / "out", vocab_file, f"a=jsonl:{tmp_path / 'in'}")
    assert len(train) + len(evaluation) == 60


def test_prefixes_and_long_texts(tmp_path: Path, vocab_file: Path) -> None:
    rows = [
        {"query": "a" if n % 2 else f"{word(n)}", "positive": f"{word(n)} " * 50, "negative": "is"} for n in range(20)
    ]
    source = f"a=jsonl:{write_lines(tmp_path / 'a.jsonl', rows)}"
    options = {"query_prefix": "input: ", "key_prefix": "of: ", "max_seq_len": 12, "negatives": 1}
    train, _ = run(tmp_path / "out", vocab_file, source, **options)
    assert train.prefixes == {"query": "input: ", "key": "of: "}
    for query, positive, negative in texts_in(train, vocab_file):
        assert query.startswith("input [UNK] ")  # the vocabulary has no colon
        assert positive.startswith("of [UNK] ")
        assert negative == "of [UNK] is"
    assert train.max_text_length == 12
    assert (train.lengths <= 36).all()
    by_query = {tuple(train[i].input_ids[: train[i].len_a]): [] for i in range(len(train))}
    for index in range(len(train)):
        by_query[tuple(train[index].input_ids[: train[index].len_a])].append(int(train.groups[index]))
    assert all(len(set(groups)) == 1 for groups in by_query.values())


# ---- groups and the split -------------------------------------------------------------------------------------------


def test_groups_are_connected_components() -> None:
    keys = np.array([[1, 2], [3, 4], [5, 2], [6, 7], [8, 5], [7, 9], [10, 10], [4, 11]], dtype=np.uint64)
    assert groups_of(keys).tolist() == [0, 1, 0, 2, 0, 2, 3, 1]
    assert numbered(np.array([7, 3, 7, 9, 3])).tolist() == [0, 1, 0, 2, 1]


def test_groups_agree_with_a_plain_search() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 300, (200, 2)).astype(np.uint64)
    expected = list(range(200))
    for _ in range(200):
        for i in range(200):
            for j in range(i):
                if set(keys[i].tolist()) & set(keys[j].tolist()):
                    expected[i] = expected[j] = min(expected[i], expected[j])
        if expected == [expected[each] for each in expected]:
            break
    assert groups_of(keys).tolist() == numbered(np.array(expected)).tolist()


def test_what_is_held_out_stays_when_pairs_are_added() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, (3000, 2)).astype(np.uint64)
    out = held_out(np.arange(3000), keys, 0.1, seed=1)
    assert 230 < out.sum() < 370
    assert (held_out(np.arange(1000), keys[:1000], 0.1, seed=1) == out[:1000]).all()
    assert (held_out(np.arange(3000), keys, 0.1, seed=2) != out).any()
    groups = np.arange(3000) // 3
    by_group = held_out(groups, keys, 0.1, seed=1).reshape(-1, 3)
    assert (by_group.all(axis=1) == by_group.any(axis=1)).all()


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_no_side_is_empty(fraction: float) -> None:
    keys = np.arange(8, dtype=np.uint64).reshape(4, 2)
    out = held_out(np.array([0, 0, 0, 1]), keys, fraction, seed=0)
    assert out.tolist() == [False, False, False, True], "the smaller group"


def test_both_sides_have_no_text_in_common(tmp_path: Path, vocab_file: Path) -> None:
    rng = np.random.default_rng(0)
    first = [{"query": f"a {word(q)}", "positive": f"the {word(p)}"} for q, p in rng.integers(0, 160, (150, 2))]
    second = [{"query": f"the {word(q)}", "positive": f"is {word(p)}"} for q, p in rng.integers(0, 160, (40, 2))]
    sources = [f"{n}=jsonl:{write_lines(tmp_path / f'{n}.jsonl', rows)}" for n, rows in (("a", first), ("b", second))]
    train, evaluation = run(tmp_path / "out", vocab_file, *sources, eval_fraction=0.3)
    assert len(train) + len(evaluation) == 190
    sides = [{text for texts in texts_in(store, vocab_file) for text in texts} for store in (train, evaluation)]
    assert not sides[0] & sides[1]
    for store in (train, evaluation):
        groups: dict[str, set[int]] = {}
        for texts, group in zip(texts_in(store, vocab_file), store.groups.tolist(), strict=True):
            for text in texts:
                groups.setdefault(text, set()).add(group)
        assert all(len(each) == 1 for each in groups.values())
        assert store.manifest["num_groups"] == len(set(store.groups.tolist())) < len(store)
        assert store.groups[0] == 0


def test_sources_are_contiguous_and_have_their_weights(tmp_path: Path, vocab_file: Path) -> None:
    sources = [
        f"{name}=jsonl:{write_lines(tmp_path / f'{name}.jsonl', ROWS[begin : begin + 20])}"
        for begin, name in enumerate(("x", "y"), 0)
        for begin in (30 * begin,)
    ]
    train, evaluation = run(tmp_path / "out", vocab_file, *sources, weight=["y=3", "x=0.5"], eval_fraction=0.3)
    for store in (train, evaluation):
        assert [(each.name, each.weight) for each in store.sources] == [("x", 0.5), ("y", 3.0)]
        assert store.sources[1].first == store.sources[0].num_pairs
        texts = texts_in(store, vocab_file)
        assert {each[0] for each in texts[: store.sources[1].first]} <= {row["query"] for row in ROWS[:20]}


def test_equal_inputs_give_equal_bytes(tmp_path: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bert_fast.data.corpora.base.PIECE_BYTES", 200)  # many pieces
    source = f"a=jsonl:{write_lines(tmp_path / 'a.jsonl', ROWS)}"
    run(tmp_path / "one", vocab_file, source, workers=1)
    run(tmp_path / "many", vocab_file, source, workers=3)
    first = digest(tmp_path / "one")
    assert digest(tmp_path / "many") == first
    run(tmp_path / "one", vocab_file, source, workers=2)
    assert digest(tmp_path / "one") == first, "a second preparation"
    run(tmp_path / "one", vocab_file, source, seed=7)
    assert digest(tmp_path / "one") != first


# ---- made of text ---------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(8):
        sentences = [f"The tensor {word(10 * n + k)} is of the shape {word(k)}." for k in range(9)]
        (folder / f"{n}.txt").write_text(" ".join(sentences))
    (folder / "again.txt").write_text((folder / "0.txt").read_text())
    return folder


def test_dropout_has_the_same_text_twice(text: Path, tmp_path: Path, vocab_file: Path) -> None:
    lines: list[str] = []
    options = {"max_unknown": 1.0, "lines": lines}
    stores = run(tmp_path / "out", vocab_file, f"d=dropout:prose:{text}", **options)
    pairs = [texts for store in stores for texts in texts_in(store, vocab_file)]
    assert len(pairs) == 72
    assert all(query == positive for query, positive in pairs)
    assert "d: 81 pairs, 9 of them twice in " in "".join(lines)
    whole = run(tmp_path / "whole", vocab_file, f"d=dropout:prose:{text}", unit="document", **options)
    assert sum(map(len, whole)) == 8


def test_inverse_cloze_takes_a_sentence_out_of_its_passage(text: Path, tmp_path: Path, vocab_file: Path) -> None:
    options = {"max_unknown": 1.0, "passage_words": 24}  # three sentences of eight words
    stores = run(tmp_path / "out", vocab_file, f"c=inverse_cloze:prose:{text}", **options)
    pairs = [texts for store in stores for texts in texts_in(store, vocab_file)]
    assert len(pairs) == 8 * 3
    places = set()
    for query, positive in pairs:
        assert query.count("the tensor") == 1
        assert positive.count("the tensor") == 2
        places.add(int(query.split()[-2].translate(str.maketrans("bcdefghijk", "0123456789"))) % 3)
        assert query not in positive
    assert places == {0, 1, 2}, "any sentence of a passage"
    again = run(tmp_path / "other", vocab_file, f"c=inverse_cloze:prose:{text}", seed=1, **options)
    assert sorted(texts for store in again for texts in texts_in(store, vocab_file)) != sorted(pairs)


MODULE = '''
"""A module of tensors."""

def whole():
    """Return the input as a tensor.

    >>> whole()

    The shape is that of the input. It is of the first kind.
    """

class Shape:
    def alone(self):
        """Return the shape of it."""

def nothing():
    pass

add_docstr(torch.abs, """
abs(input, *, out=None) -> Tensor

Return the absolute value of each input. The shape of what it returns is that of the input tensor itself.
""")
'''


def test_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "module.py"
    path.write_text(MODULE)
    from bert_fast.data.streams import Source

    monkeypatch.setattr("bert_fast.data.corpus.list_sources", lambda *_: [Source("pack/inner/module.py", str(path))])
    reader, options = find_reader("docstrings"), SourceOptions("d", "docstrings")
    pairs = [(p.query, p.positive) for piece in reader.pieces(options) for p in reader.read(piece, options)]
    assert pairs == [
        ("pack.inner.module", "A module of tensors."),
        ("Return the input as a tensor.", "The shape is that of the input. It is of the first kind."),
        ("pack.inner.module.Shape.alone", "Return the shape of it."),
        (
            "Return the absolute value of each input.",
            "The shape of what it returns is that of the input tensor itself.",
        ),
    ]


def test_a_new_kind_of_source(tmp_path: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dummy_of_pairs.py").write_text(
        "from pathlib import Path\n"
        "from bert_fast.data.pairs.sources.base import PairReader, TextPair\n\n"
        "class Lines(PairReader):\n"
        "    def pieces(self, options):\n"
        "        yield list(enumerate(Path(options.path).read_text().splitlines()))\n\n"
        "    def read(self, piece, options):\n"
        "        for number, line in piece:\n"
        "            yield TextPair(str(number), *line.split('/'))\n\n"
        "READER = Lines()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PAIR_SOURCES, "dummy", type(PAIR_SOURCES["jsonl"])("dummy_of_pairs:READER", "a dummy"))
    (tmp_path / "lines").write_text("the a/tensor b\nis c/of d\ninput e/shape f\n")
    stores = run(tmp_path / "out", vocab_file, f"n=dummy:{tmp_path / 'lines'}")
    assert sorted(texts for store in stores for texts in texts_in(store, vocab_file))[0] == ["input e", "shape f"]


# ---- bad input ------------------------------------------------------------------------------------------------------


def jsonl(*rows: Any) -> Callable[[Path], str]:
    return lambda folder: f"a=jsonl:{write_lines(folder / 'a.jsonl', list(rows))}"


def changed(number: int, **values: Any) -> list[Row]:
    return [{**row, **values} if n == number else row for n, row in enumerate(ROWS[:6])]


def saved(state: str | None) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / "saved" / "train").mkdir(parents=True)
        if state is not None:
            (folder / "saved" / "train" / "state.json").write_text(state)
        return f"a=datasets:{folder / 'saved'}" + ("" if state == "{}" else "/train")

    return make


def table(rows: list[Row]) -> Callable[[Path], str]:
    return lambda folder: f"a={write_source('parquet', folder, rows)}"


def given(text: str) -> Callable[[Path], str]:
    return lambda _: text


NEGATIVE = [{**row, "negative": "shape"} for row in ROWS[:6]]

BAD: list[tuple[Callable[[Path], str], dict[str, Any], str]] = [
    (jsonl(), {}, "source a: 0 pairs; at least 2 are needed"),
    (jsonl(ROWS[0]), {}, "source a: 1 pair; at least 2 are needed"),
    (jsonl(ROWS[0], ROWS[0], ROWS[0]), {}, "all 3 pairs have a text in common"),
    (jsonl({"query": "a", "answer": "b"}), {}, r"a\.jsonl, line 1: no field positive; it has query, answer \(--positive-c"),
    (jsonl(*ROWS[:3], {"positive": "a"}), {}, r"a\.jsonl, line 4: no field query; it has positive \(--query-column names"),
    (table([{"query": "a", "answer": "b"}]), {}, r"rows\.parquet: no column positive; it has query, answer"),
    (jsonl(*changed(3, query="")), {}, r"a\.jsonl, line 4: the query is empty"),
    (jsonl(*changed(2, positive=" \t")), {}, r"a\.jsonl, line 3: the positive is empty"),
    (jsonl(*changed(2, positive=None)), {}, r"a\.jsonl, line 3: the positive is empty"),
    (jsonl(*changed(2, positive=3)), {}, r"a\.jsonl, line 3: field positive holds no text but '3'"),
    (table(changed(5, positive="")), {}, r"rows\.parquet, row group 0, row 5: the positive is empty"),
    (table([{"query": 1, "positive": "b"}]), {}, r"rows\.parquet: column query holds int64, not strings"),
    (jsonl(*NEGATIVE[:3], {**ROWS[3], "negative": ""}), {}, r"a\.jsonl, line 4: the negative 1 is empty"),
    (jsonl(*NEGATIVE, ROWS[7]), {}, r"line 7: 0 negatives, and 1 in .*a\.jsonl, line 1; --negatives 0 keeps the first 0"),
    (jsonl(*ROWS[:3], NEGATIVE[4]), {}, r"line 4: 1 negatives, and 0 in .*line 1; --negatives 0 keeps"),
    (jsonl(*NEGATIVE), {"negatives": 2}, r"a\.jsonl, line 1: 1 negatives, fewer than --negatives 2; lower it"),
    (jsonl({**NEGATIVE[0], "negatives": []}), {}, "line 1: negatives are in field negatives and in negative; rename"),
    (jsonl(ROWS[0], "{query"), {}, r"a\.jsonl, line 2 is not JSON \(.*one object per line"),
    (jsonl(ROWS[0], "[1]"), {}, r"a\.jsonl, line 2 holds no JSON object"),
    (jsonl(ROWS[0], '{"query": "\udcff"}'), {}, r"a\.jsonl is not UTF-8 text \(byte \d+\) in line 2"),
    (jsonl(*changed(1, positive="q x " * 40_000)), {"max_seq_len": 65_535}, r"line 2: a pair of 65,5\d\d tokens.*; lower --m"),
    (jsonl(*[{"query": f"日{n}本", "positive": f"語{n}"} for n in range(4)]), {}, "source a: .* of the words .* are unknown"),
    (jsonl(*ROWS), {"query_prefix": "a " * 10, "max_seq_len": 12}, "--query-prefix takes 10 tokens, and --max-seq-len 12"),
    (jsonl(*ROWS), {"weight": ["a=0"]}, "--weight a=0: a weight is a number above 0"),
    (jsonl(*ROWS), {"weight": ["a=-1"]}, "--weight a=-1: a weight is a number above 0"),
    (jsonl(*ROWS), {"weight": ["a=nan"]}, "--weight a=nan: a weight is a number above 0"),
    (jsonl(*ROWS), {"weight": ["a=x"]}, "--weight a=x: a weight is a number above 0"),
    (jsonl(*ROWS), {"weight": ["b=1"]}, "--weight b=1: no source is called 'b'; give NAME=NUMBER with one of a"),
    (jsonl(*ROWS), {"vocab": None}, "no vocabulary; give --vocab FILE"),
    (jsonl(*ROWS), {"vocab": "none/vocab.txt"}, "vocabulary none/vocab.txt does not exist"),
    (given("a=csv:rows.csv"), {}, "--source a=csv:rows.csv: there is no kind csv; the kinds are jsonl, parquet, datasets"),
    (given("rows.jsonl"), {}, "--source rows.jsonl: give NAME=KIND:PATH"),
    (given("a=jsonl"), {}, "--source a=jsonl: a path is missing; give a=jsonl:PATH"),
    (given("a=jsonl:none.jsonl"), {}, "source a: none.jsonl does not exist; name a file or folder after jsonl:"),
    (given("a=datasets:none"), {}, "source a: folder none does not exist"),
    (given("a=dropout:books"), {}, "there is no corpus 'books'; give a=dropout:CORPUS:PATH with one of pydocs, prose"),
    (given("a=dropout:prose:none"), {}, "--source a=dropout:prose:none: none does not exist"),
    (given("a=dropout:prose"), {}, "a path is missing; give a=dropout:prose:PATH"),
    (given("a=docstrings:numpy"), {}, r"reads packages \(--packages\) and no path; give a=docstrings"),
    (given("a=docstrings"), {"packages": ["no_such_package"]}, "package no_such_package is not installed"),
    (given("a=docstrings"), {"negatives": 1}, "--negatives 1: source a of kind docstrings has no negatives; give --neg"),
    (saved(None), {}, "saved/train has no state.json; name a folder that save_to_disk"),
    (saved("{}"), {}, "saved holds train; name one, .*saved/train"),
    (saved("[]"), {}, "state.json names no files"),
    (saved('{"_data_files": [{"filename": "x.arrow"}]}'), {}, "state.json names x.arrow, which is not there"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "options", "message"), BAD, ids=[message[:50] for _, _, message in BAD])
def test_bad_input_is_one_line_and_nothing_is_written(
    make: Callable[[Path], str], options: dict[str, Any], message: str, tmp_path: Path, vocab_file: Path
) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / "out", vocab_file, make(tmp_path / "in"), **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_source_with_negatives_beside_one_without(text: Path, tmp_path: Path, vocab_file: Path) -> None:
    sources = [jsonl(*NEGATIVE)(tmp_path), f"d=dropout:prose:{text}"]
    with pytest.raises(
        UserError, match=r"a\.jsonl, line 1: 1 negatives, and 0 in source d of kind dropout; --negatives 0"
    ):
        run(tmp_path / "out", vocab_file, *sources, max_unknown=1.0)
    train, _ = run(tmp_path / "out", vocab_file, *sources, max_unknown=1.0, negatives=0)
    assert [each.name for each in train.sources] == ["a", "d"]


def test_some_sources_without_a_weight_or_with_one_name(tmp_path: Path, vocab_file: Path) -> None:
    source = jsonl(*ROWS)(tmp_path)
    with pytest.raises(UserError, match="--weight: b has none; give one for every source, or for none"):
        run(tmp_path / "out", vocab_file, source, f"b{source[1:]}", weight=["a=1"])
    with pytest.raises(UserError, match="--source a: two sources have this name"):
        run(tmp_path / "out", vocab_file, source, source)
    with pytest.raises(UserError, match="no source of pairs; give --source NAME=KIND:PATH"):
        run(tmp_path / "out", vocab_file)


def test_bad_input_leaves_the_stores_that_are_there(tmp_path: Path, vocab_file: Path) -> None:
    run(tmp_path / "out", vocab_file, jsonl(*ROWS)(tmp_path))
    before = digest(tmp_path / "out")
    with pytest.raises(UserError, match="the query is empty"):
        run(tmp_path / "out", vocab_file, jsonl(*changed(3, query=""))(tmp_path))
    assert digest(tmp_path / "out") == before
    assert not (tmp_path / "out/parts-pairs").exists()


def test_folders_of_others_are_not_written(tmp_path: Path, vocab_file: Path, stores: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds files that are not a preparation of pairs's and that one would write over"
    ):
        run(stores, vocab_file, jsonl(*ROWS)(tmp_path))
    inside = tmp_path / "out" / "train"
    inside.mkdir(parents=True)
    with pytest.raises(UserError, match=r"source a lies in .*out/train, which is written; choose another --out"):
        run(tmp_path / "out", vocab_file, jsonl(*ROWS)(inside))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_recipe_of_the_mini_benchmark() -> None:
    recipe = read_pair_recipe(ROOT / "configs/data/pydocs_pairs.yaml")
    assert [(each.name, each.kind) for each in recipe.sources()] == [("docs", "docstrings")]
    assert recipe.vocab == "data/pydocs-mini/vocab.txt"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "scripts/prepare_pairs.py"), *map(str, arguments)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=250)


def test_the_command(tmp_path: Path, vocab_file: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"source": [jsonl(*ROWS)(tmp_path)], "vocab": str(vocab_file), "eval_fraction": 0.3}))
    done = command("--recipe", recipe, "--out", tmp_path / "out", "--seed", 5, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert PairStore(tmp_path / "out/train").manifest["params"] == {
        "max_seq_len": 128, "negatives": 0, "eval_fraction": 0.3, "seed": 5,
    }  # fmt: skip
    assert "train: " in done.stdout


def test_a_failure_of_the_command_is_one_line(tmp_path: Path) -> None:
    failed = command("--source", "a=csv:x", "--out", tmp_path / "out")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: --source a=csv:x: there is no kind csv")
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_where_a_pair_is_from_travels_with_it() -> None:
    assert TextPair("f, line 1", "a", "b").negatives == ()
