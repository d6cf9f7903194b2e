"""Corpora: which files are read, in which order, how they become sentences, and who is held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_fast.data import prepare as prepare_module
from bert_fast.data.corpus import Document, is_held_out, list_sources, read_documents
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
        UserError, match="unknown corpus kind webtext; known: pydocs, prose, mlcommons, mediawiki, parquet"
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
    monkeypatch.setattr("bert_fast.data.corpus.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "no_stdlib")})
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
    stamp = prepare_module._text_stage(recipe, out, InProcess(), lambda line: None)  # type: ignore[arg-type]
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
