"""Corpora: which files are read, in which order, how they become sentences, and who is held out."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bert_fast.data import corpus as corpora
from bert_fast.data import prepare as prepare_module
from bert_fast.data import streams
from bert_fast.data.corpora import base, jsonl, prose
from bert_fast.data.corpora.base import Document
from bert_fast.data.corpus import is_held_out, list_sources, read_documents
from bert_fast.errors import UserError


def read(kind: str, folder: Path) -> list[Document]:
    return [document for source in list_sources(kind, str(folder)) for document in read_documents(kind, source)]


def sentences(documents: list[Document]) -> list[str]:
    return [sentence for document in documents for block in document.blocks for sentence in block]


# ---- mlcommons ------------------------------------------------------------------------------------------------------


def test_mlcommons_is_one_sentence_a_line_and_a_blank_line_between_documents(tmp_path: Path) -> None:
    (tmp_path / "part-2").write_text("Third. Not split here.\n", encoding="utf-8")
    (tmp_path / "part-1").write_text("\n\nOne é.\nTwo.\n\n \t\n\n  Padded.  \n\n", encoding="utf-8")
    (tmp_path / ".hidden").write_text("No.\n")
    documents = read("mlcommons", tmp_path)
    assert documents == [
        Document("part-1#0", [["One é.", "Two."]]),
        Document("part-1#1", [["Padded."]]),
        Document("part-2#0", [["Third. Not split here."]]),
    ]


def test_mlcommons_that_is_not_utf8_names_the_file_and_the_line(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("Fine.\n")
    (tmp_path / "latin").write_bytes(b"Fine.\nStill fine.\n" + b"Fine again.\n" * 20_000 + "Café.\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin is not UTF-8 text .*iconv") as caught:
        read("mlcommons", tmp_path)
    assert str(tmp_path / "latin") in str(caught.value)


# ---- prose ----------------------------------------------------------------------------------------------------------


def test_prose_reads_texts_in_sorted_order_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b/two.md", "a.txt", "b/one.RST", "picture.png", "b/c/three.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"This is the file {Path(name).stem} here.")
    assert [source.name for source in list_sources("prose", str(tmp_path))] == [
        "a.txt",
        "b/c/three.txt",
        "b/one.RST",
        "b/two.md",
    ]
    assert [document.origin for document in read("prose", tmp_path)] == [
        "a.txt",
        "b/c/three.txt",
        "b/one.RST",
        "b/two.md",
    ]


def test_prose_splits_sentences_and_joins_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "Mr. Smith went to Washington. He bought\nversion 2.0 of it! Did he?\n\nA new paragraph starts here; it ends there.\n"
    )
    assert sentences(read("prose", tmp_path)) == [
        "Mr. Smith went to Washington.",
        "He bought version 2.0 of it!",
        "Did he?",
        "A new paragraph starts here; it ends there.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Use torch.nn.Linear for the projection.",
        "The result of numpy.linalg.norm is a scalar, e.g. for vectors.",
        "Call torch.nn.functional.scaled_dot_product_attention with a mask of shape [B, 1, L].",
    ],
)
def test_a_dotted_name_is_not_broken(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(f"First comes this. {text} Then comes that.")
    assert sentences(read("prose", tmp_path)) == ["First comes this.", text, "Then comes that."]


def test_markup_is_dropped_from_prose(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "# A title of words\n\n* a list item here\n\n```python\ncode = never.seen()\n```\n\n-----\n\n"
        "> Quoted text stays here.\n"
    )
    assert sentences(read("prose", tmp_path)) == ["A title of words", "a list item here", "Quoted text stays here."]


def test_one_word_paragraphs_and_empty_files_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Supercalifragilistic\n\n\n\n1234 5\n")
    (tmp_path / "empty.txt").write_text("")
    assert read("prose", tmp_path) == []


def test_prose_that_is_not_utf8_names_the_file_and_the_byte(tmp_path: Path) -> None:
    (tmp_path / "utf16.txt").write_bytes("Ten chars. Ünicode".encode("latin-1"))
    with pytest.raises(UserError, match=r"utf16\.txt is not UTF-8 text \(byte 11\)"):
        read("prose", tmp_path)


def test_scene_breaks_and_underlines_are_no_fences(tmp_path: Path) -> None:
    """A block of code lies between fences in Markdown alone: in other texts `~~~` parts scenes or underlines a title."""
    parts = [f"The {n} part of the story is here." for n in ("first", "second", "third")]
    for name, mark in (("a.txt", "~~~"), ("b.rst", "~~~~~~~~~"), ("c.txt", "```"), ("d.txt", "* * *")):
        (tmp_path / name).write_text(f"\n\n{mark}\n\n".join(parts))
    (tmp_path / "e.rst").write_text(
        "A title of words\n~~~~~~~~\n" + parts[0] + "\n\nAnother title here\n~~~~~~~~\n" + parts[1]
    )
    documents = read("prose", tmp_path)
    assert [document.blocks[0] for document in documents[:4]] == [parts] * 4
    assert documents[4].blocks[0] == ["A title of words", parts[0], "Another title here", parts[1]]


# ---- what is read, and what is left out ------------------------------------------------------------------------------


def stamp_of(recipe: prepare_module.Recipe, out: Path, lines: list[str] | None = None) -> dict[str, Any]:
    log = (lines if lines is not None else []).append
    return prepare_module.text_stage(recipe, out, InProcess(), log)  # type: ignore[arg-type]


def num_documents(stamp: dict[str, Any]) -> int:
    return stamp["train"]["documents"] + stamp["eval"]["documents"]


def test_a_folder_of_many_languages_keeps_every_document(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [
        "The cat number {} sat on the mat.", "Die Katze {} lag auf der Matte.", "Le chat {} est sur le tapis.",
        "Кошка {} спит на ковре.", "今天天气很好我们去公园散步{}次。", "猫が{}匹マットの上で寝ています。",
        "고양이 {} 마리가 잔다 여기서.",
        "แมว{}ตัวนอนบนเสื่ออุ่นมาก", "القطة {} تنام على السجادة.", "बिल्ली {} चटाई पर सोती है।",
    ]  # fmt: skip
    for index, text in enumerate(texts):
        for n in range(8):
            (folder / f"{index}-{n}.txt").write_text(text.format(n) + text.format(n + 10), encoding="utf-8")
    lines: list[str] = []
    stamp = stamp_of(prepare_module.Recipe("prose", str(folder), eval_fraction=0.2), tmp_path / "out", lines)
    assert num_documents(stamp) == 80
    assert not any("left out" in line for line in lines)


def test_what_is_left_out_is_counted_and_said(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(30):
        (folder / f"{n}.txt").write_text(f"This is the text with number {n}. It is read.")
    for name in ("a.jsonl", "b.zip", "c.png", "d.parquet", "e.xml.bz2"):
        (folder / name).write_bytes(b"x")
    (folder / "empty.txt").write_text(" \n")
    (folder / "short1.txt").write_text("Word")
    (folder / "short2.txt").write_text("Another")
    (folder / ".hidden.txt").write_text("Hidden files are not read.")
    lines: list[str] = []
    recipe = prepare_module.Recipe("prose", str(folder), eval_fraction=0.3)
    stamp = stamp_of(recipe, tmp_path / "out", lines)
    assert num_documents(stamp) == 30
    (said,) = [line for line in lines if "left out" in line]
    assert said.startswith("text: 5 files and 3 documents left out: ")
    for part in (
        "1 file that --corpus jsonl reads (a.jsonl)", "1 packed file (unpack them) (b.zip)",
        "1 file of another kind (c.png)", "1 file that --corpus parquet reads (d.parquet)",
        "1 file that --corpus mediawiki reads (e.xml.bz2)",
        "1 document without text (empty.txt)", "2 documents without a sentence of two words (short1.txt, short2.txt)",
    ):  # fmt: skip
        assert part in said
    again: list[str] = []
    assert stamp_of(recipe, tmp_path / "out", again) == stamp
    assert said in again


def test_a_folder_with_nothing_to_read_says_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(
        UserError, match=r"holds no .txt or .md or .rst files; there are 1 file that --corpus jsonl reads"
    ):
        list_sources("prose", str(tmp_path))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("kind", ["prose", "mlcommons", "jsonl", "wikiextractor"])
def test_compressed_texts_are_read(tmp_path: Path, kind: str, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    name, content = {
        "prose": ("a.txt", "One sentence is here. Another one follows."),
        "mlcommons": ("part-1", "One sentence is here.\nAnother one follows.\n"),
        "jsonl": ("a.jsonl", json.dumps({"text": "One sentence is here. Another one follows."})),
        "wikiextractor": (
            "wiki_00",
            '<doc id="1" title="T">\nT\n\nOne sentence is here. Another one follows.\n</doc>\n',
        ),
    }[kind]
    (tmp_path / f"{name}{suffix}").write_bytes(pack(content.encode()))
    assert sentences(read(kind, tmp_path)) == ["One sentence is here.", "Another one follows."]
    damaged = pack(random.Random(0).randbytes(5000))
    (tmp_path / f"{name}{suffix}").write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(UserError, match=rf"{name}{suffix}, after line \d+: .*|{name}{suffix} is not UTF-8"):
        read(kind, tmp_path)


# ---- JSON lines and WikiExtractor -----------------------------------------------------------------------------------


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "One is here. Two is there.", "id": 1}\n\n{"id": 2, "text": null}\n{"text": "A half \\ud83d of a pair."}\n'
    )
    assert sentences(read("jsonl", tmp_path)) == ["One is here.", "Two is there.", "A half \ufffd of a pair."]
    source = list_sources("jsonl", str(path))[0]
    assert [text.origin for text in jsonl.CORPUS.texts(source, "text")] == ["a.jsonl#1", "a.jsonl#3", "a.jsonl#4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2 is not JSON"),
        ("[1]", "line 2 holds no JSON object"),
        ('{"body": "x", "id": 1}', r"line 2: no field text; it has body, id \(--column names another\)"),
        ('{"text": 5}', "line 2: field text holds no string"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("x" * 4000, "line 2 is longer than"),
    ],
)
def test_json_lines_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str) -> None:
    if "longer" in message:
        monkeypatch.setattr(streams, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "Fine."}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"a.jsonl, {message}"):
        read("jsonl", tmp_path)


WIKI = """<doc id="12" url="https://en.wikipedia.org/wiki?curid=12" title="Anarchism &amp; more">
Anarchism &amp; more

Anarchism is a political philosophy. It &lt;doubts&gt; authority.
The second paragraph is here.
</doc>
<doc id="13" title="Empty">
Empty

</doc>
"""


def test_what_wikiextractor_writes(tmp_path: Path) -> None:
    (tmp_path / "AA").mkdir()
    (tmp_path / "AA" / "wiki_00").write_text(WIKI)
    (tmp_path / "AA" / "wiki_01").write_text(
        json.dumps({"id": "1", "title": "T", "text": "One is here. Two is there."}) + "\n"
    )
    documents = read("wikiextractor", tmp_path)
    assert [(document.origin, document.blocks[0]) for document in documents] == [
        (
            "AA/wiki_00#1",
            ["Anarchism is a political philosophy.", "It <doubts> authority.", "The second paragraph is here."],
        ),
        ("AA/wiki_01#1", ["One is here.", "Two is there."]),
    ]


@pytest.mark.parametrize(
    ("text", "message"), [("Text.\n" + WIKI, "line 1 stands outside"), (WIKI[:-8], "ends within the <doc> of line 7")]
)
def test_what_wikiextractor_did_not_write(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wiki_00").write_text(text)
    with pytest.raises(UserError, match=f"wiki_00.*{message}"):
        read("wikiextractor", tmp_path)


@pytest.mark.parametrize(("kind", "name"), [("mlcommons", "wiki_00"), ("prose", "wiki.txt")])
def test_doc_lines_are_not_taken_for_text(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_text("\n" + WIKI)
    with pytest.raises(
        UserError, match=rf"{name}, line 2 is a <doc> line of WikiExtractor; use --corpus wikiextractor"
    ):
        read(kind, tmp_path)


# ---- MLCommons' folder as it is handed out ---------------------------------------------------------------------------


def hand_out(folder: Path, shards: int = 3) -> None:
    folder.mkdir()
    for shard in range(shards):
        text = "".join(f"Document {n} of shard {shard} begins.\nIt has two sentences.\n\n" for n in range(20))
        (folder / f"part-{shard:05d}-of-{shards:05d}").write_text(text)
    (folder / "eval.txt").write_text("".join(f"Evaluation text {n} is here.\nIt ends here.\n\n" for n in range(7)))
    (folder / "eval.md5").write_text("".join(f"{n:032x}\n" for n in range(7)))


def test_mlcommons_folder_is_read_as_it_is_handed_out(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    hand_out(folder)
    (folder / "vocab.txt").write_text("[PAD]\n")
    lines: list[str] = []
    stamp = stamp_of(prepare_module.Recipe("mlcommons", str(folder), eval_fraction=0.5), tmp_path / "out", lines)
    assert (stamp["train"]["documents"], stamp["eval"]["documents"]) == (60, 7)
    evaluation = (tmp_path / "out/text/eval-00000.txt").read_text()
    assert evaluation == (folder / "eval.txt").read_text()
    assert "0000000" not in (tmp_path / "out/text/train-00000.txt").read_text()
    assert any(
        "2 files and 0 documents left out: 2 files beside part-*-of-* and eval.txt, which are the text (eval.md5, vocab.txt)"
        in line
        for line in lines
    )


@pytest.mark.parametrize("inside", [True, False])
def test_evaluation_text_can_be_given(tmp_path: Path, inside: bool) -> None:
    """A file or folder, outside of the text or in it: it is then no training text."""
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(10):
        (folder / f"{n}.txt").write_text(f"This is the text with number {n}. It is read.")
    given = (folder if inside else tmp_path) / "held"
    given.mkdir()
    for n in range(4):
        (given / f"{n}.txt").write_text(f"This is the evaluation text with number {n}.")
    (given / "4.txt").write_text("This is the text with number 3. It is read.")
    recipe = prepare_module.Recipe("prose", str(folder), eval_input=str(given))
    lines: list[str] = []
    stamp = stamp_of(recipe, tmp_path / "out", lines)
    assert (stamp["train"]["documents"], stamp["eval"]["documents"]) == (10, 5)
    assert "text: 1 document both in the training and in the evaluation text" in lines
    single = stamp_of(prepare_module.Recipe("prose", str(folder), eval_input=str(given / "0.txt")), tmp_path / "single")
    assert (single["train"]["documents"], single["eval"]["documents"]) == (14 if inside else 10, 1)


def test_evaluation_text_beside_shards_gives_way_to_the_given_one(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    hand_out(folder)
    (tmp_path / "mine.txt").write_text("One document.\nOf mine.\n")
    lines: list[str] = []
    recipe = prepare_module.Recipe("mlcommons", str(folder), eval_input=str(tmp_path / "mine.txt"))
    stamp = stamp_of(recipe, tmp_path / "out", lines)
    assert (stamp["train"]["documents"], stamp["eval"]["documents"]) == (60, 1)
    assert any("1 evaluation text other than that of --eval-input (eval.txt)" in line for line in lines)


def test_evaluation_text_that_is_all_there_is(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("One text is here.")
    recipe = prepare_module.Recipe("prose", str(tmp_path / "in"), eval_input=str(tmp_path / "in"))
    with pytest.raises(UserError, match="is all the text there is in"):
        stamp_of(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_input": "x"}, "--eval-input: corpus pydocs"),
        ({"eval_pick": "last"}, "--eval-pick last: give first or evenly"),
        ({"eval_pick": "evenly"}, "--eval-pick evenly needs --eval-max-samples"),
        ({"language": "German"}, "--language German: give a code such as en"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_module.Recipe(**options)


def test_the_language_reaches_the_splitter(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("Am 3. Oktober 1990 kam er. Dann ging er.")
    counts = {}
    for language in ("de", "en"):
        recipe = prepare_module.Recipe(
            "prose", str(tmp_path / "in"), language=language, eval_input=str(tmp_path / "e.txt")
        )
        (tmp_path / "e.txt").write_text("Some text is here.")
        counts[language] = stamp_of(recipe, tmp_path / language)["train"]["sentences"]
    assert counts == {"de": 2, "en": 3}


# ---- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prose", "mlcommons", "jsonl", "wikiextractor"])
def test_memory_does_not_grow_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(streams, "STRETCH", 1 << 14)
    monkeypatch.setattr(base, "PIECE_BYTES", 1 << 14)
    line = "A sentence of some words stands in this line of the text."
    count = 20_000
    if kind == "jsonl":
        text = "".join(f'{{"text": "{line}"}}\n' for _ in range(count))
    elif kind == "wikiextractor":
        text = "".join(f'<doc id="{n}" title="T">\n{line}\n</doc>\n' for n in range(count // 2))
    else:
        text = "".join(f"{line}\n" for _ in range(count))
    path = tmp_path / ("a.jsonl" if kind == "jsonl" else "a.txt")
    path.write_text(text)
    size = len(text)
    del text
    tracemalloc.start()
    total = 0
    for piece in corpora.list_pieces(kind, list_sources(kind, str(tmp_path))):
        total += sum(len(text.text) for text in piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total >= 10_000 * len(line)
    assert peak < size / 4


@pytest.mark.parametrize("kind", ["prose", "mlcommons", "jsonl"])
@pytest.mark.parametrize("break_every", [1, 7, 10_000])
def test_a_long_document_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, break_every: int
) -> None:
    """It travels in stretches and is counted, split and written as one."""
    monkeypatch.setattr(streams, "STRETCH", 300)
    monkeypatch.setattr(prepare_module, "TEXT_FILE_BYTES", 500)
    folder = tmp_path / "in"
    folder.mkdir()
    for book in range(6):
        lines = [f"This is the sentence {n} of book {book}." for n in range(40)]
        if kind == "jsonl":
            text = json.dumps({"text": "".join(f"{x}\n" + "\n" * (n % break_every == 0) for n, x in enumerate(lines))})
        elif kind == "mlcommons":
            text = "\n".join(lines)
        else:
            text = "".join(f"{x}\n" + "\n" * (n % break_every == 0) for n, x in enumerate(lines))
        (folder / f"{book}.{'jsonl' if kind == 'jsonl' else 'txt'}").write_text(text)
    stamp = stamp_of(prepare_module.Recipe(kind, str(folder), eval_fraction=0.3), tmp_path / "out")
    assert num_documents(stamp) == 6
    assert stamp["train"]["sentences"] + stamp["eval"]["sentences"] == 240
    for split in ("train", "eval"):
        text = "".join((tmp_path / "out/text" / name).read_text() for name in stamp[split]["files"])
        documents = [document.split("\n") for document in text.split("\n\n") if document]
        assert [len(document) for document in documents] == [40] * stamp[split]["documents"]
        assert all(len({line.split()[-1] for line in document}) == 1 for document in documents)


def test_a_character_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stretch in range(20, 32):
        monkeypatch.setattr(streams, "STRETCH", stretch)
        (tmp_path / "a.txt").write_text("ab é 今天 😀 " * 50, encoding="utf-8")
        source = list_sources("prose", str(tmp_path))[0]
        assert "".join(text.text for text in prose.CORPUS.texts(source, "text")) == "ab é 今天 😀 " * 50


@pytest.mark.parametrize("ending", ["\r\n", "\r", "\n"])
def test_line_endings_and_a_byte_order_mark(tmp_path: Path, ending: str) -> None:
    text = ending.join(["\ufeffOne is here.", "Two is here.", "", "Three is here.", ""])
    (tmp_path / "part-1").write_bytes(text.encode())
    assert [document.blocks for document in read("mlcommons", tmp_path)] == [
        [["One is here.", "Two is here."]],
        [["Three is here."]],
    ]


# ---- folders that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prose", "mlcommons"])
def test_missing_and_empty_folders_are_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist; pass --input"):
        list_sources(kind, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="pass --input"):
        list_sources(kind, None)
    with pytest.raises(UserError, match=f"{tmp_path} holds no"):
        list_sources(kind, str(tmp_path))


def test_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("Text.")
    source = list_sources("mlcommons", str(tmp_path))[0]
    with pytest.raises(
        UserError, match="unknown corpus kind webtext; known: pydocs, .*, jsonl, wikiextractor, mediawiki, parquet"
    ):
        list(read_documents("webtext", source))


# ---- pydocs ---------------------------------------------------------------------------------------------------------

MODULE = '''"""The module says what it is for."""

add_docstr(base.abs, r"""
Computes the absolute value of each element, which is a long enough string to be taken for documentation.
""" + "short")

print("A call that documents nothing, however long the string that it is given may turn out to be.")


class Thing:
    """A thing with a purpose. It uses torch.nn.Linear inside.

    .. directive:: is dropped

    Args:
        width: how wide the thing is

    Example::

        >>> Thing(3).grow()
        Thing of 4 that is doctest output
        and goes on

    After the example prose goes on.
    """

    def grow(self):
        """Grows the thing by one step."""

        def inner():
            """Inner functions are documented as well."""


if True:

    async def late():
        """Defined under a condition, read all the same."""
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package on sys.path with a good module, a broken one, a test folder and an undocumented one."""
    root = tmp_path / "documented_pkg_for_tests"
    for name, text in {
        "__init__.py": '"""Top of the package says hello to everyone."""',
        "core/thing.py": MODULE,
        "core/broken.py": "def (:",
        "core/null.py": "\0",
        "core/silent.py": "x = 1",
        "tests/test_thing.py": '"""Tests are not part of the corpus at all."""',
        "alpha.py": '"""Alpha is read before the core folder."""',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    # Only this package: the standard library is another test's.
    monkeypatch.setattr(
        "bert_fast.data.corpora.pydocs.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "no_stdlib")}
    )
    return root.name


def test_pydocs_lists_modules_by_label_in_order_without_tests(package: str) -> None:
    names = [source.name for source in list_sources("pydocs", packages=(package,))]
    expected = ["__init__.py", "alpha.py", "core/broken.py", "core/null.py", "core/silent.py", "core/thing.py"]
    assert names == [f"{package}/{name}" for name in expected]


def test_pydocs_is_one_document_a_definition_of_one_origin_a_module(package: str) -> None:
    sources = list_sources("pydocs", packages=(package,))
    documents = [document for source in sources for document in read_documents("pydocs", source)]
    assert [d.origin.rsplit("/", 1)[-1] for d in documents] == ["__init__.py", "alpha.py"] + ["thing.py"] * 4
    module, added, thing, late = documents[2:]
    assert module.blocks == [["The module says what it is for."]]
    text = "Computes the absolute value of each element, which is a long enough string to be taken for documentation."
    assert added.blocks == [[text]]
    assert [block[0] for block in thing.blocks[1:]] == [
        "Grows the thing by one step.",
        "Inner functions are documented as well.",
    ]
    assert late.blocks == [["Defined under a condition, read all the same."]]


def test_docstrings_are_cleaned_of_what_is_not_prose(package: str) -> None:
    source = list_sources("pydocs", packages=(package,))[-1]
    block = list(read_documents("pydocs", source))[2].blocks[0]
    assert block[:2] == ["A thing with a purpose.", "It uses torch.nn.Linear inside."]
    assert block[-1] == "After the example prose goes on."
    joined = " ".join(block)
    assert "width: how wide the thing is" in joined
    for gone in (">>>", "doctest output", "and goes on", "directive", "grow()"):
        assert gone not in joined


def test_pydocs_is_deterministic(package: str) -> None:
    runs = [[list(read_documents("pydocs", s)) for s in list_sources("pydocs", packages=(package,))] for _ in range(2)]
    assert runs[0] == runs[1]


def test_pydocs_reads_the_standard_library_first() -> None:
    sources = list_sources("pydocs", packages=("bert_fast",))
    labels = [source.name.split("/")[0] for source in sources]
    assert labels[0] == "python"
    assert labels[-1] == "bert_fast"
    assert labels.index("bert_fast") == labels.count("python") > 500
    assert all("site-packages" not in source.name and "/test/" not in source.name for source in sources)
    argparse = next(source for source in sources if source.name == "python/argparse.py")
    assert any("command-line" in sentence for sentence in sentences(list(read_documents("pydocs", argparse))))


def test_pydocs_package_that_is_not_installed_says_how_to_get_it() -> None:
    with pytest.raises(
        UserError, match="package no_such_package_xyz is not installed; pip install no_such_package_xyz"
    ):
        list_sources("pydocs", packages=("no_such_package_xyz",))


def test_pydocs_subpackage_of_a_package_that_is_not_installed() -> None:
    with pytest.raises(UserError, match="not installed"):
        list_sources("pydocs", packages=("no_such_package_xyz.sub",))


def test_pydocs_single_file_module_is_not_said_to_be_missing() -> None:
    with pytest.raises(UserError) as caught:
        list_sources("pydocs", packages=("typing_extensions",))
    assert "is not installed" not in str(caught.value)


# ---- the split ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.02, 0.3])
def test_held_out_share_is_the_fraction(fraction: float) -> None:
    count = 20_000
    share = sum(is_held_out(f"folder/file-{n}.py", fraction, seed=7) for n in range(count)) / count
    assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / count) ** 0.5


def test_held_out_is_a_function_of_name_and_seed_alone() -> None:
    names = [f"torch/nn/module_{n}.py" for n in range(2000)]
    first = [is_held_out(name, 0.1, 12345) for name in names]
    assert first == [is_held_out(name, 0.1, 12345) for name in names]
    assert first != [is_held_out(name, 0.1, 12346) for name in names]
    # A larger fraction only adds: nothing held out goes back to training.
    assert all(is_held_out(name, 0.2, 12345) for name, held in zip(names, first, strict=True) if held)
    # Known answers: the split must not move between versions, machines or Python's hash seeds.
    assert [n for n in range(60) if is_held_out(f"doc-{n}", 0.1, 0)] == [14, 22, 25, 51, 57, 59]


def test_nothing_and_everything_held_out() -> None:
    assert not any(is_held_out(str(n), 0.0, 0) for n in range(100))
    assert all(is_held_out(str(n), 1.0, 0) for n in range(100))


class InProcess:
    """Stands in for prepare's process pool."""

    def map(self, function, arguments):
        return (function(*a) for a in arguments)


def split_texts(recipe: prepare_module.Recipe, out: Path) -> dict[str, list[str]]:
    """Documents of both splits, as the text stage writes them."""
    stamp = prepare_module.text_stage(recipe, out, InProcess(), lambda line: None)  # type: ignore[arg-type]
    return {
        split: [
            document
            for name in stamp[split]["files"]
            for document in (out / "text" / name).read_text(encoding="utf-8").split("\n\n")
            if document
        ]
        for split in ("train", "eval")
    }


def test_evaluation_and_training_share_no_document(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for file in range(4):
        (folder / f"{file}").write_text(
            "".join(f"Sentence {n} of document.\nIt has two.\n\n" for n in range(100 * file, 100 * file + 100))
        )
    texts = split_texts(prepare_module.Recipe("mlcommons", str(folder), eval_fraction=0.2), tmp_path / "out")
    assert not set(texts["train"]) & set(texts["eval"])
    assert len(texts["train"]) + len(texts["eval"]) == 400
    assert 40 < len(texts["eval"]) < 130


def test_documents_of_one_module_go_to_one_split_and_repeated_blocks_are_dropped(package: str, tmp_path: Path) -> None:
    root = tmp_path / package
    for n in range(30):
        (root / f"module_{n}.py").write_text(
            f'"""Module number {n} begins."""\n'
            + "".join(f'def f{i}():\n    """Function {i} of module {n} is this one."""\n' for i in range(3))
            + 'def same():\n    """This text is in every module alike."""\n'
        )
    texts = split_texts(prepare_module.Recipe("pydocs", packages=(package,), eval_fraction=0.3), tmp_path / "out")
    modules = {
        split: {
            text.split("odule ")[-1].removeprefix("number ").split()[0]
            for text in documents
            if " begins" in text or "of module" in text
        }
        for split, documents in texts.items()
    }
    assert modules["train"]
    assert modules["eval"]
    assert not modules["train"] & modules["eval"]
    assert sum("in every module alike" in text for documents in texts.values() for text in documents) == 1


def test_a_document_that_occurs_twice_is_not_in_both_splits(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(40):
        for copy in ("a", "b"):
            (folder / f"{n}{copy}.txt").write_text(f"This is the text with number {n}. It was copied once.")
    texts = split_texts(prepare_module.Recipe("prose", str(folder), eval_fraction=0.3), tmp_path / "out")
    assert not set(texts["train"]) & set(texts["eval"])


def test_text_without_documents_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="corpus prose: no document for the train split; is the text empty"):
        split_texts(prepare_module.Recipe("prose", str(folder)), tmp_path / "out")
    assert not (tmp_path / "out" / "text" / "stamp.json").exists()


def test_the_error_for_empty_text_names_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError) as caught:
        split_texts(prepare_module.Recipe("prose", str(folder)), tmp_path / "out")
    assert str(folder) in str(caught.value)


def test_text_too_short_for_two_splits_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("This is a sentence of some length. And another one.")
    with pytest.raises(
        UserError, match=r"no document for the eval split; 2 sentences in all, and each split takes 2; add"
    ):
        split_texts(prepare_module.Recipe("prose", str(folder), eval_fraction=1e-9), tmp_path / "out")
