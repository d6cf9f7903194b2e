"""Articles out of a MediaWiki dump, and texts out of tables: what is kept, what is dropped, what damage is said of."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.paths import ROOT

from bert_fast.data import corpus as corpora
from bert_fast.data import prepare as prepare_module
from bert_fast.data import wikitext
from bert_fast.data.corpora import base
from bert_fast.data.parquet import read_rows
from bert_fast.data.prepare import Recipe, prepare
from bert_fast.data.samples import SampleParams
from bert_fast.data.wikitext import Page, TooCostlyError, clean, is_dump, read_pages, seconds_to_parse
from bert_fast.errors import UserError

ARTICLE = """{{Infobox planet|name=Mars|mass={{val|6.4|e=23}}}}
'''Mars''' is the [[4th|fourth]] planet from the [[Sun]].<ref>A {{cite web|url=x}}</ref> It is red &amp; dusty.<!-- secret -->
[[File:Mars.jpg|thumb|A caption with a [[link]] that is no text]]
== Moons ==
It has two moons ({{lang|grc|Φόβος}}), [[Phobos (moon)|Phobos]] and ''Deimos''<ref name="m"/>.

{| class="wikitable"
! Moon !! Radius
|-
| Phobos || 11 km
|}
* The first item of a list stands here.
[[Category:Planets]]
__NOTOC__ <math>E = mc^2</math>
"""


class InProcess:
    """A pool without processes."""

    def map(self, function, arguments):
        return (function(*each) for each in arguments)


def make_dump(pages: list[tuple[str, str, str]]) -> str:
    """A dump of (title, namespace, wikitext); a text of `#REDIRECT` becomes a redirect."""
    entries = [
        f"<page><title>{escape(title)}</title><ns>{space}</ns><id>{n}</id>"
        + ('<redirect title="Elsewhere" />' if text.startswith("#REDIRECT") else "")
        + f'<revision><id>{n}</id><text bytes="9" xml:space="preserve">{escape(text)}</text></revision></page>'
        for n, (title, space, text) in enumerate(pages)
    ]
    spaces = "".join(
        f'<namespace key="{key}">{name}</namespace>' for key, name in ((0, ""), (6, "Datei"), (14, "Kategorie"))
    )
    return (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11">'
        f"<siteinfo><namespaces>{spaces}</namespaces></siteinfo>\n" + "\n".join(entries) + "\n</mediawiki>\n"
    )


PAGES = [
    ("Mars", "0", ARTICLE),
    ("Diskussion:Mars", "1", "Talk is no article at all."),
    ("Red planet", "0", "#REDIRECT [[Mars]]"),
    ("Venus", "0", "Venus is hot. It has no moon at all.\n\nIt is a planet."),
]


@pytest.mark.parametrize(("suffix", "pack"), [(".xml", bytes), (".xml.bz2", bz2.compress), (".xml.gz", gzip.compress)])
def test_articles_are_read_and_nothing_else(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"wiki{suffix}"
    path.write_bytes(pack(make_dump(PAGES).encode()))
    pages = list(read_pages(path))
    assert [page.title for page in pages] == ["Mars", "Venus"]
    assert pages[0].wikitext == ARTICLE
    assert pages[0].spaces == {"datei", "kategorie"}


def test_a_dump_of_several_streams(tmp_path: Path) -> None:
    text = make_dump(PAGES).encode()
    path = tmp_path / "wiki-multistream.xml.bz2"
    path.write_bytes(b"".join(bz2.compress(text[i : i + 400]) for i in range(0, len(text), 400)))
    assert [page.title for page in read_pages(path)] == ["Mars", "Venus"]


def test_reading_keeps_one_page_in_memory(tmp_path: Path) -> None:
    """The tree that is parsed does not grow: finished pages are taken out of it."""
    path = tmp_path / "wiki.xml"
    path.write_text(make_dump([(f"P{n}", "0", "word " * 2000) for n in range(300)]))
    tracemalloc.start()
    count = sum(1 for _ in read_pages(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 300
    assert peak < path.stat().st_size / 4


def test_wikitext_becomes_running_text() -> None:
    assert clean(Page("Mars", ARTICLE, frozenset())).split("\n\n") == [
        "Mars is the fourth planet from the Sun. It is red & dusty.",
        "It has two moons, Phobos and Deimos.",
        "The first item of a list stands here.",
    ]


def test_namespaces_of_the_dump_decide_which_links_are_dropped() -> None:
    text = (
        "Noch eins<br />dazu hier. [[Image:foo.jpg|thumb|left|Eine dritte mit Worten]]\n"
        "Ein Satz steht hier.\n[[Datei:Bild.jpg|mini|Eine Unterschrift mit Worten]]\nNoch ein [[Satz:Art|ganzer]] Satz."
    )
    page = Page("x", text, frozenset({"datei"}))
    assert clean(page) == "Noch eins dazu hier.\n\nEin Satz steht hier.\n\nNoch ein ganzer Satz."


@pytest.mark.parametrize(
    "link",
    [
        "[[Imagen:gato.jpg|thumb|250px|right|Un gato blanco duerme]]",
        "[[Archivo2:gato|mini|Un gato blanco]]",
        "[[Bestand:gato|x200px|Un gato blanco]]",
        "[[Imagen:gato.SVG]]",
        "[[Slika: gato.png |Un gato blanco duerme]]",
        "[[gato|thumb|upright=1.2|Un [[gato]] blanco]]",
        "[[Imagen:gato.jpg|thumb|alt=a text|Un {{x}} [http://a.b gato] blanco]]",
        "[[Plik:gato.ogv|thumb|thumbtime=3|Un gato]]",
    ],
)
def test_pictures_whose_namespace_the_dump_does_not_name(link: str) -> None:
    page = Page("x", f"El gato es un animal {link} que vive aquí.", frozenset({"archivo"}))
    assert clean(page) == "El gato es un animal que vive aquí."


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ("[[gato|a cat]]", "a cat"),
        ("[[Star Wars: Episode I|the film]]", "the film"),
        ("[[:Imagen:gato.jpg|the picture]]", "the picture"),
        ("[[:Categoría:Gatos]]", "Categoría:Gatos"),
        ("[[Node.js]]", "Node.js"),
        ("[[.jpg|files of pictures]]", "files of pictures"),
        ("[[Thumb|thumb]]", "thumb"),
    ],
)
def test_links_that_are_no_pictures_keep_their_text(link: str, shown: str) -> None:
    assert clean(Page("x", f"This is {link} of a text.", frozenset())) == f"This is {shown} of a text."


@pytest.mark.parametrize(
    ("reference", "character"),
    [
        ("&#xD83D;&#xDE00;", "😀"), ("&#55357;&#56832;", "😀"), ("&#xD83D; &#xDE00;", "\ufffd \ufffd"), ("&#xDE00;", "\ufffd"),
        ("&#128512;", "😀"), ("&eacute;", "é"), ("&#x110000;", "&#x110000;"),
    ],
)  # fmt: skip
def test_character_references(reference: str, character: str) -> None:
    cleaned = clean(Page("x", f"A message holds {reference} as a face.", frozenset()))
    assert cleaned == f"A message holds {character} as a face."
    cleaned.encode()


OPENINGS = [
    "{{a|b=c ",
    "{{{a|b ",
    "[http://a.b c ",
    "\n{| \n| x ",
    "<ref>a ",
    "<div>a ",
    "<br ",
    '<b x="',
    "<!-- ",
    "[[a|b ",
]


@pytest.mark.parametrize("opening", OPENINGS)
def test_markup_that_is_never_closed_has_a_bound(opening: str) -> None:
    """A page is cleaned in time, or refused before it is parsed. Alone the parser takes minutes for some of these."""
    page = Page("x", "The text begins here. " + (opening + "words of text ") * 20_000, frozenset())
    start = time.perf_counter()
    with contextlib.suppress(TooCostlyError):
        clean(page)
    assert time.perf_counter() - start < 10


def test_closings_before_openings_close_nothing() -> None:
    assert seconds_to_parse("}}" * 2000 + "{{a|b " * 2000) > 0.9 * seconds_to_parse("x" * 4000 + "{{a|b " * 2000) > 0


def test_markup_that_is_closed_costs_nothing() -> None:
    markup = '{{a|{{b}}}} [[c|d [[e]]]] [http://f g] <ref name="h">i</ref> <br> <ref name=j /> <li>k {| l |} < m'
    assert seconds_to_parse(markup * 1000) == 0.0


def test_comments_go_and_one_that_never_ends_is_text() -> None:
    text = "One <!-- a [[b --> and two are here. <!-- {{ -->Three too. <!-- no end of this"
    assert clean(Page("x", text, frozenset())) == "One and two are here. Three too. no end of this"


def test_pages_that_are_skipped_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wikitext, "LONGEST_TEXT", 1 << 20)
    open_pages = [(f"Open {n}", "0", "Text. " + "{{a|b=c " * 10_000) for n in range(7)]
    pages = [*PAGES, *open_pages, ("Long", "0", "word " * 250_000), ("Empty", "0", "{{only a template}}")]
    path = tmp_path / "wiki.xml"
    path.write_text(make_dump(pages))
    recipe = Recipe("mediawiki", str(path), eval_fraction=0.5)
    lines: list[str] = []

    with contextlib.suppress(UserError):  # which split the two articles go to is not of interest
        prepare_module.text_stage(recipe, tmp_path / "out", InProcess(), lines.append)  # type: ignore[arg-type]
    assert (
        "text: 0 files and 9 documents left out: "
        "7 pages with markup that is never closed (Open 0, Open 1, Open 2, Open 3, Open 4, ...); "
        "1 page of more than 1 MiB (Long); 1 document without text (Empty)"
    ) in lines


def test_memory_does_not_grow_with_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wikitext, "LONGEST_TEXT", 1 << 16)
    path = tmp_path / "wiki.xml"
    path.write_text(make_dump([("Long", "0", "word\n" * 2_000_000)]))
    tracemalloc.start()
    (page,) = read_pages(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (page.title, page.wikitext, page.left_out) == ("Long", "", "pages of more than 0 MiB")
    assert peak < path.stat().st_size / 8


def test_the_language_of_a_dump_reaches_the_splitter(tmp_path: Path) -> None:
    text = "Am 3. Oktober 1990 kam er.\n\nNa gut, so war es."
    for language, count in (("de", 2), ("en", 3)):
        path = tmp_path / f"{language}.xml"
        path.write_text(make_dump([("A", "0", text)]).replace("<mediawiki ", f'<mediawiki xml:lang="{language}" ', 1))
        (page,) = read_pages(path)
        assert page.language == language
        (document,) = corpora.read_piece("mediawiki", [page])
        assert len(document.blocks[0]) == count
        (document,) = corpora.read_piece("mediawiki", [page], "de")
        assert len(document.blocks[0]) == 2


def test_articles_in_a_script_without_blanks_are_kept() -> None:
    text = "今天天气很好。\n\n我们去公园散步。\n\n[[猫]]"
    assert clean(Page("x", text, frozenset())) == "今天天气很好。\n\n我们去公园散步。"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda raw: raw[: len(raw) * 2 // 3],
            r"wiki.xml.bz2 is cut or damaged \(.*\): \d+ articles before it were whole",
        ),
        (lambda raw: b"not a dump", r"wiki.xml.bz2 is no MediaWiki dump"),
        (
            lambda raw: bz2.compress(bz2.decompress(raw)[:-400]),
            r"is cut or damaged .*: 3\d+ articles .* the last is 'P3\d+'",
        ),
        (lambda raw: bz2.compress(make_dump([("T", "1", "talk")]).encode()), "no article in it"),
        (lambda raw: bz2.compress(make_dump([("T", "0", "caf\u00e9 au lait")]).encode("latin-1")), "is cut or damaged"),
    ],
)
def test_damaged_dumps(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    text = make_dump([(f"P{n}", "0", " ".join(str(n * k) for k in range(300))) for n in range(40)])
    path = tmp_path / "wiki.xml.bz2"
    path.write_bytes(damage(bz2.compress(text.encode(), 1)))
    with pytest.raises(UserError, match=message):
        list(read_pages(path))


TEXTS = [f"Row {n} is a document. It has two sentences." for n in range(10)]


def write_parquet(path: Path, column: str = "text", values: list[Any] | None = None) -> None:
    pq.write_table(pa.table({"id": list(range(10)), column: values or TEXTS}), path, row_group_size=4)


def write_arrow(path: Path, stream: bool) -> None:
    table = pa.table({"text": TEXTS})
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
def test_texts_of_a_table_come_block_by_block(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"data.{'parquet' if form == 'parquet' else 'arrow'}"
    if form == "parquet":
        write_parquet(path)
    else:
        write_arrow(path, form == "stream")
    assert list(read_rows(path)) == [(n // 4, n % 4, text) for n, text in enumerate(TEXTS)]


def test_a_table_without_the_column_says_which_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, "content")
    with pytest.raises(UserError, match=r"a.parquet: no column text; it has id, content \(--column names another\)"):
        list(read_rows(path))
    assert len(list(read_rows(path, "content"))) == 10
    with pytest.raises(UserError, match="column id holds int64, not strings"):
        list(read_rows(path, "id"))


def test_a_table_with_the_column_twice_or_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([["One."], ["Two."]], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"a.parquet: 2 columns are called text; rename all but"):
        list(read_rows(path))
    raw = pa.array([b"Fine.", b"Fine too.", "Caf\u00e9".encode("latin-1"), b"Last."])
    strings = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": strings}), path, row_group_size=2)
    with pytest.raises(UserError, match=r"a.parquet: row group 1, row 0: column text is not UTF-8 \(byte 3\)"):
        list(read_rows(path))
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": strings}))
    with pytest.raises(UserError, match=r"a.arrow: record batch 0, row 2: column text is not UTF-8 \(byte 3\)"):
        list(read_rows(tmp_path / "a.arrow"))


def test_a_row_group_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    random = np.random.default_rng(0)
    texts = [random.bytes(2000).hex() for _ in range(8000)]  # 32 MB that do not compress to little
    pq.write_table(pa.table({"text": texts}), path, row_group_size=8000, compression="none")
    del texts
    read = "import sys, pyarrow; from bert_fast.data.parquet import read_rows; count = sum(1 for _ in read_rows(sys.argv[1]))"
    told = "print(count, pyarrow.default_memory_pool().max_memory())"  # the highest of a process
    command = [sys.executable, "-c", f"{read}; {told}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    count, most = map(int, done.stdout.split())
    assert count == 8000
    assert most < 24e6


@pytest.mark.parametrize("name", ["cut.parquet", "cut.arrow"])
def test_a_damaged_table(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_parquet(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=f"{name}: damaged, or no "):
        list(read_rows(path))


def test_from_a_dump_to_stores_with_a_stop_in_the_middle(
    tmp_path: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped text stage goes on where it was: finished pieces are not cleaned again, and the stores are the same."""
    body = "\n\n".join("The shape of the input is xyz. It returns a tensor of the shape." for _ in range(3))
    pages = [(f"P{n}", "0", f"Number {n} is here. " + body) for n in range(40)]
    path = tmp_path / "wiki.xml.bz2"
    path.write_bytes(bz2.compress(make_dump(pages).encode()))
    monkeypatch.setattr(base, "PIECE_BYTES", 2000)
    params = SampleParams(max_seq_len=32, max_predictions=5, dupe_factor=1, seed=1)
    recipe = Recipe("mediawiki", str(path), vocab=str(vocab_file), eval_fraction=0.2, params=params)
    whole = prepare(recipe, tmp_path / "whole", 1, log=lambda line: None)
    assert whole["train"]["documents"] + whole["eval"]["documents"] == 40
    cut = tmp_path / "out"
    path.write_bytes(bz2.compress(make_dump(pages).encode()))  # same bytes, another time: sources are told by both
    original = path.read_bytes()
    path.write_bytes(original[: len(original) - 60])
    with pytest.raises(UserError, match="is cut or damaged"):
        prepare(recipe, cut, 1, log=lambda line: None)
    assert not (cut / "train").exists()
    path.write_bytes(original)
    again = prepare(recipe, cut, 1, log=lambda line: None)
    assert again["train"]["sha256"] == whole["train"]["sha256"]


def test_a_stopped_text_stage_reads_its_pieces_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "wiki.xml"
    path.write_text(make_dump([(f"P{n}", "0", f"Sentence {n} is here. Another one follows it.") for n in range(30)]))
    recipe = Recipe("mediawiki", str(path), eval_fraction=0.3)

    def make(out: str) -> dict[str, Any]:
        return prepare_module.text_stage(recipe, tmp_path / out, InProcess(), lambda line: None)  # type: ignore[arg-type]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_json", stop)  # of the stamp, which is written last
        with pytest.raises(KeyboardInterrupt):
            make("cut")
    whole = make("whole")
    monkeypatch.setattr(corpora, "read_piece", lambda *_: pytest.fail("cleaned again"))
    assert make("cut") == whole
    assert whole["train"]["documents"] + whole["eval"]["documents"] == 30


def test_a_table_as_a_corpus(tmp_path: Path, vocab_file: Path) -> None:
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    write_arrow(folder / "data-00000-of-00001.arrow", stream=True)
    (folder / "state.json").write_text("{}")
    sources = corpora.list_sources("parquet", str(tmp_path / "saved"))
    assert [source.name for source in sources] == ["train/data-00000-of-00001.arrow"]
    documents = [d for piece in corpora.list_pieces("parquet", sources) for d in corpora.read_piece("parquet", piece)]
    assert [document.blocks[0][0] for document in documents] == [f"Row {n} is a document." for n in range(10)]
    assert len({document.origin for document in documents}) == 10


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("enwiki-20200101-pages-articles.xml.bz2", True), ("enwiki-20200101-pages-articles1.xml-p10p30302.bz2", True),
        ("wiki.xml", True), ("wiki.xml.gz", True), ("index.txt.bz2", False), ("xml.txt", False),
    ],
)  # fmt: skip
def test_dumps_are_known_by_their_names(name: str, expected: bool) -> None:
    assert is_dump(name) is expected
