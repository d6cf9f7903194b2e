"""Corpora: the sources of text. Each kind lists its source files and reads them into documents of sentences.

Kinds:
    mlcommons      folder of text files, one sentence per line, a blank line between documents (MLPerf's cleaned shards)
    prose          folder of .txt, .md, .rst files, one document per file; sentences are split by `sentencex`
    jsonl          files of JSON lines, one document per line
    wikiextractor  folder of WikiExtractor's output: <doc> lines, or JSON lines
    pydocs         documentation strings of the Python standard library and of installed packages, one document per module
    mediawiki      a dump of Wikipedia (.xml.bz2), one document per article
    parquet        Parquet files, or a folder that Hugging Face `datasets` saved, one document per row of a text column

A document's text comes in blocks (several paragraphs, a documentation string), so that repeated blocks can be dropped. One
process reads the sources as a stream, and many split the text into sentences. A document of more than a MiB is passed on in
stretches.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, get_args

from bert_fast.data.docstrings import clean_docstring, documentation
from bert_fast.data.folders import files_below, is_part_of_dataset
from bert_fast.data.parquet import COLUMN_SUFFIXES
from bert_fast.data.streams import COMPRESSED, Source, Text, bare_name, read_texts
from bert_fast.data.text import detect_language, num_words, split_sentences, strip_marks
from bert_fast.data.wikitext import Page, TooCostlyError, clean, is_dump, read_pages
from bert_fast.errors import UserError

CorpusKind = Literal["pydocs", "prose", "mlcommons", "jsonl", "wikiextractor", "mediawiki", "parquet"]
KINDS: tuple[str, ...] = get_args(CorpusKind)

AUTO = "auto"  # detect the language of each text from its script and words
PYDOCS_PACKAGES = ("torch", "numpy", "transformers")
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "testing", "idlelib", "lib2to3"}
_SUFFIXES = {
    "prose": (".txt", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "mediawiki": (".xml", ".xml.bz2", ".xml.gz"),
    "parquet": COLUMN_SUFFIXES,
    "mlcommons": ("",),
    "wikiextractor": ("",),
}
_PACKED = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".zst", ".7z", ".rar", ".lz4", ".z")
_SHARD = re.compile(
    r"part-\d+-of-\d+(\.(gz|bz2|xz))?"
)  # files of MLCommons' text, next to which are eval.txt and eval.md5
_EVAL_TEXT = re.compile(r"eval\.txt(\.(gz|bz2|xz))?")
_CHECKSUMS = re.compile(r".*\.(md5|md5sum|sha1|sha256|sha512)|(md5|sha256)sums?(\.txt)?", re.I)
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """Sentences in reading order, grouped in blocks.

    All documents of one `origin` (one document, or the module of several) go to the same split.
    `goes_on`: the next one is the rest of this one. `left_out`: why there are no blocks, or empty.
    """

    origin: str
    blocks: list[list[str]]
    goes_on: bool = False
    left_out: str = ""


@dataclass(frozen=True)
class Found:
    """Source files in a fixed order, those of a given evaluation text, and names that are left out, by reason."""

    sources: list[Source]
    evaluation: list[Source] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)


def list_sources(kind: str, folder: str | None = None, packages: tuple[str, ...] = PYDOCS_PACKAGES) -> list[Source]:
    """Source files of a corpus in a fixed order. Raises UserError if there are none."""
    return find_sources(kind, folder, packages).sources


def find_sources(kind: str, folder: str | None = None, packages: tuple[str, ...] = PYDOCS_PACKAGES) -> Found:
    """The files of a folder, or the one file, that a kind of corpus reads; never what a preparation or an export wrote.

    Raises:
        UserError: the folder does not exist, cannot be listed, or has nothing to read; the message says what it has instead.
    """
    if kind == "pydocs":
        return Found(_modules(packages))
    _check_kind(kind)
    if folder is not None and Path(folder).is_file():
        return Found([Source(Path(folder).name, str(folder))])
    if folder is None or not Path(folder).is_dir():
        raise UserError(f"corpus {kind}: folder {folder} does not exist; pass --input FOLDER with text files in it")
    root = Path(folder)
    files, unreadable = files_below(root)
    left_out: dict[str, list[str]] = {}
    for path, why in sorted(unreadable.items()):
        left_out.setdefault(why, []).append(path.relative_to(root).as_posix())
    sources: list[Source] = []
    evaluation: list[Source] = []
    has_shards = kind == "mlcommons" and any(_SHARD.fullmatch(path.name) for path in files)
    datasets: dict[Path, set[str] | None] = {}
    for path in files:
        name = path.relative_to(root).as_posix()
        why = _why_not(kind, path, has_shards, datasets)
        if why:
            left_out.setdefault(why, []).append(name)
        elif path.name[0] != ".":
            is_eval = kind == "mlcommons" and _EVAL_TEXT.fullmatch(path.name)
            (evaluation if is_eval else sources).append(Source(name, str(path)))
    if not sources:  # an eval.txt alone is an ordinary text
        sources, evaluation = evaluation, []
    if not sources:
        what = "no files" if _SUFFIXES[kind] == ("",) else f"no {' or '.join(_SUFFIXES[kind])} files"
        there = f"; there are {describe(left_out)}" if left_out else ""
        raise UserError(f"corpus {kind}: folder {folder} holds {what}{there}")
    return Found(sources, evaluation, left_out)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"unknown corpus kind {kind}; known: {', '.join(KINDS)}")


def _modules(packages: tuple[str, ...]) -> list[Source]:
    roots = [("python", Path(sysconfig.get_paths()["stdlib"]))]
    for package in packages:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError, AttributeError):  # its parent is missing, broken, or not a package
            spec = None
        if spec is None:
            raise UserError(f"corpus pydocs: package {package} is not installed; pip install {package}")
        if not spec.submodule_search_locations:
            raise UserError(f"corpus pydocs: {package} is a single module; name a package, which is a folder")
        roots.append((package, Path(next(iter(spec.submodule_search_locations)))))
    return [
        Source(f"{label}/{file.relative_to(root).as_posix()}", str(file))
        for label, root in roots
        for file in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(file.relative_to(root).parts)
    ]


def _why_not(kind: str, path: Path, has_shards: bool, datasets: dict[Path, set[str] | None]) -> str:
    """Why a file is not a source of this kind; empty if it is one, or hidden."""
    name = path.name.lower()
    if name[0] == ".":
        return ""
    if kind in ("mlcommons", "wikiextractor"):
        if has_shards and not (_SHARD.fullmatch(path.name) or _EVAL_TEXT.fullmatch(path.name)):
            return "files beside part-*-of-* and eval.txt, which are the text"
        if _CHECKSUMS.fullmatch(name):
            return "files of checksums"
    elif kind == "mediawiki":
        if is_dump(name):
            return ""
    elif kind == "parquet":
        if name.endswith(COLUMN_SUFFIXES):
            return "" if is_part_of_dataset(path, datasets) else "files that `datasets` does not count (caches)"
    elif bare_name(name).endswith(_SUFFIXES[kind]):
        return ""
    if name.endswith(_PACKED):
        return "packed files (unpack them)"
    if kind in ("mlcommons", "wikiextractor"):
        return ""
    for other, reads in (("jsonl", bare_name(name)), ("parquet", name), ("prose", bare_name(name))):
        if other != kind and reads.endswith(_SUFFIXES[other]):
            return f"files that --corpus {other} reads"
    return "files that --corpus mediawiki reads" if is_dump(name) else "files of another kind"


def describe(left_out: dict[str, list[str]]) -> str:
    """What was left out, as part of a sentence: each reason with the number of files and a few names."""
    return "; ".join(counted(len(names), why, names[:3]) for why, names in left_out.items())


def counted(count: int, what: str, names: list[str] | None = None) -> str:
    """`2 files of another kind (a, b)`, or in the singular. `names` may be fewer than `count`."""
    if count == 1:
        what = re.sub(r"\b(file|document|link|page|text)s\b", r"\1", what, count=1)
    if names is None:
        return f"{count:,} {what}"
    return f"{count:,} {what} ({', '.join(name[:60] for name in names)}{', ...' if count > len(names) else ''})"


def num_bytes(source: Source) -> int:
    """An estimate of the bytes of text in a source; a compressed file is taken to be a quarter of its text."""
    compressed = os.path.splitext(source.name.lower())[1] in COMPRESSED and not is_dump(source.name)
    return os.path.getsize(source.path) * (4 if compressed else 1)


# What one worker reads at a time: modules, articles of a dump, or texts
Piece = list[Source] | list[Page] | list[Text]


def list_pieces(kind: str, sources: list[Source], column: str = "text") -> Iterator[Piece]:
    """The corpus in pieces of about a MiB, in a fixed order. A source is read only as its pieces are taken."""
    if kind == "pydocs":
        yield from _by_size(sources, lambda source: os.path.getsize(source.path))
    elif kind == "mediawiki":
        pages = (page for source in sources for page in read_pages(source.path))
        yield from _by_size(pages, lambda page: len(page.wikitext))
    else:
        texts = (text for source in sources for text in read_texts(kind, source, column))
        yield from _by_size(texts, lambda text: len(text.text) + 50)


_Item = TypeVar("_Item", Source, Page, Text)


def _by_size(items: Iterable[_Item], size_of: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    chunk: list[_Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += size_of(item)
        if size >= _PIECE_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def read_piece(kind: str, piece: Piece, language: str = AUTO) -> Iterator[Document]:
    """Documents of a piece. One without sentences has the reason in `left_out`."""
    for item in piece:
        if isinstance(item, Page):
            yield _article(item, language)
        elif isinstance(item, Text):
            yield _document(kind, item, language)
        else:
            for texts in documentation(item.path):
                blocks = [sentences for text in texts if (sentences := split_sentences(clean_docstring(text)))]
                if blocks:
                    yield Document(item.name, blocks)


def read_documents(kind: str, source: Source, column: str = "text", language: str = AUTO) -> Iterator[Document]:
    """Documents of one source file that have sentences. Raises UserError for what cannot be read."""
    _check_kind(kind)
    for piece in list_pieces(kind, [source], column):
        yield from (document for document in read_piece(kind, piece, language) if document.blocks)


def _article(page: Page, language: str) -> Document:
    try:
        why, text = page.left_out, clean(page)
    except TooCostlyError as error:
        why, text = str(error), ""
    sentences = split_sentences(text, _language(language, text, page.language))
    return Document(page.title, [sentences] if sentences else [], left_out=why or _why_empty(sentences, text))


def _document(kind: str, item: Text, language: str) -> Document:
    if item.left_out:
        return Document(item.origin, [], item.goes_on, item.left_out)
    if kind == "mlcommons":
        sentences = item.text.split("\n")
    else:
        text = strip_marks(item.text) if kind == "prose" else item.text
        sentences = split_sentences(text, _language(language, text))
    return Document(item.origin, [sentences] if sentences else [], item.goes_on, _why_empty(sentences, item.text))


def _language(wanted: str, text: str, of_source: str = "") -> str:
    return wanted if wanted != AUTO else of_source.partition("-")[0] or detect_language(text)


def _why_empty(sentences: list[str], text: str) -> str:
    if sentences:
        return ""
    return "documents without a sentence of two words" if num_words(text) else "documents without text"


# ---- what is held out -----------------------------------------------------------------------------------------------


def is_held_out(origin: str, fraction: float, seed: int) -> bool:
    """Whether documents of `origin` belong to the evaluation split, by a hash of its name, so that they never move."""
    digest = hashlib.blake2b(f"{seed}:{origin}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
