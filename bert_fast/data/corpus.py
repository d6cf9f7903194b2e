"""Corpora: where text comes from. Each kind lists its source files and reads one into documents of sentences.

Kinds:
    mlcommons  folder of text files, one sentence a line, a blank line between documents (MLPerf's cleaned shards)
    prose      folder of .txt, .md, .rst files, one document a file; sentences are split by `sentencex`
    pydocs     documentation strings of the Python standard library and of installed packages, one document a module
    mediawiki  a dump of Wikipedia (.xml.bz2), one document an article
    parquet    Parquet files, or a folder that Hugging Face `datasets` saved, one document a row of a text column

A document's text comes in blocks (a paragraph run, a documentation string) so that repeated blocks can be dropped.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import sentencex

from bert_fast.data.columns import COLUMN_SUFFIXES, num_blocks, read_texts
from bert_fast.data.wikitext import Page, clean, is_dump, read_pages
from bert_fast.errors import UserError

KINDS = ("pydocs", "prose", "mlcommons", "mediawiki", "parquet")

PYDOCS_PACKAGES = ("torch", "numpy", "transformers")
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "testing", "idlelib", "lib2to3"}
_SUFFIXES = {
    "prose": (".txt", ".md", ".rst"),
    "mediawiki": (".xml", ".xml.bz2"),
    "parquet": COLUMN_SUFFIXES,
    "mlcommons": ("",),
}
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """One file of a corpus. `name` is stable across machines and decides the split; `path` is where it lies."""

    name: str
    path: str


@dataclass(frozen=True)
class Document:
    """Sentences in reading order, grouped in blocks.

    All documents of one `origin` (a document of its own, or the module that several came from) go to the same split.
    """

    origin: str
    blocks: list[list[str]]


def list_sources(kind: str, folder: str | None = None, packages: tuple[str, ...] = PYDOCS_PACKAGES) -> list[Source]:
    """Source files of a corpus in a fixed order. Raises UserError if there are none."""
    if kind == "pydocs":
        roots = [("python", Path(sysconfig.get_paths()["stdlib"]))]
        for package in packages:
            try:
                spec = importlib.util.find_spec(package)
            except (ImportError, ValueError, AttributeError):  # its parent is missing, broken or no package
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
    if folder is not None and kind in ("mediawiki", "parquet") and Path(folder).is_file():
        return [Source(Path(folder).name, str(folder))]
    if folder is None or not Path(folder).is_dir():
        raise UserError(f"corpus {kind}: folder {folder} does not exist; pass --input FOLDER with text files in it")
    root = Path(folder)
    suffixes = _SUFFIXES[kind]
    files = sorted(p for p in root.rglob("*") if p.is_file() and _is_text(kind, p.name))
    if not files:
        what = "no files" if suffixes == ("",) else f"no {' or '.join(suffixes)} files"
        raise UserError(f"corpus {kind}: folder {folder} holds {what}")
    return [Source(p.relative_to(root).as_posix(), str(p)) for p in files]


def _is_text(kind: str, name: str) -> bool:
    if kind == "mediawiki":
        return is_dump(name)
    return name[0] != "." and name.lower().endswith(_SUFFIXES[kind])


# What one worker reads at a time: whole files, articles of a dump, or a block of a table file.
Piece = list[Source] | list[Page] | tuple[Source, int, str]


def list_pieces(kind: str, sources: list[Source], column: str = "text") -> Iterator[Piece]:
    """The corpus in pieces of about a MiB, in a fixed order. Streams: a dump is read as its pieces are taken."""
    if kind == "parquet":
        for source in sources:
            yield from ((source, block, column) for block in range(num_blocks(source.path)))
    elif kind == "mediawiki":
        for source in sources:
            yield from _by_size(read_pages(source.path), lambda page: len(page.wikitext))
    else:
        yield from _by_size(sources, lambda source: os.path.getsize(source.path))


_Item = TypeVar("_Item", Source, Page)


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


def read_piece(kind: str, piece: Piece) -> Iterator[Document]:
    """Documents of a piece."""
    if isinstance(piece, tuple):
        source, block, column = piece
        for row, text in enumerate(read_texts(source.path, block, column)):
            sentences = _split_prose(text)
            if sentences:
                yield Document(f"{source.name}#{block}.{row}", [sentences])
        return
    for item in piece:
        if isinstance(item, Page):
            sentences = _split_prose(clean(item))
            if sentences:
                yield Document(item.title, [sentences])
        else:
            yield from read_documents(kind, item)


def read_documents(kind: str, source: Source) -> Iterator[Document]:
    """Documents of one source file. Raises UserError for text that is not UTF-8."""
    if kind == "pydocs":
        for texts in _documentation(source.path):
            blocks = [sentences for text in texts if (sentences := _split_prose(_clean_docstring(text)))]
            if blocks:
                yield Document(source.name, blocks)
    elif kind == "prose":
        paragraphs = _split_prose(_strip_markup(_read_utf8(source.path)))
        if paragraphs:
            yield Document(source.name, [paragraphs])
    elif kind == "mlcommons":
        yield from _read_mlcommons(source)
    else:
        raise UserError(f"unknown corpus kind {kind}; known: {', '.join(KINDS)}")


def is_held_out(origin: str, fraction: float, seed: int) -> bool:
    """Whether documents of `origin` belong to the evaluation split: a hash of its name, so that it never moves."""
    digest = hashlib.blake2b(f"{seed}:{origin}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _read_utf8(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from None


def _read_mlcommons(source: Source) -> Iterator[Document]:
    sentences: list[str] = []
    index = 0
    line_number = 0
    try:
        with open(source.path, encoding="utf-8") as lines:
            for line_number, line in enumerate(lines, 1):  # noqa: B007
                line = line.strip()
                if line:
                    sentences.append(line)
                elif sentences:
                    yield Document(f"{source.name}#{index}", [sentences])
                    index, sentences = index + 1, []
    except UnicodeDecodeError:
        raise UserError(f"{source.path} is not UTF-8 text (after line {line_number}); convert it with iconv") from None
    if sentences:
        yield Document(f"{source.name}#{index}", [sentences])


_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documentation(path: str) -> Iterator[list[str]]:
    """Documentation strings of a module in file order, a list for each top-level definition or documenting call."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken files inside packages
        return
    own_text = ast.get_docstring(tree, clean=False)
    if own_text:
        yield [own_text]
    stack: list[ast.stmt] = list(reversed(tree.body))
    while stack:
        node = stack.pop()
        if isinstance(node, _Definition):
            yield list(_docstrings(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            function = node.value.func
            called = getattr(function, "id", None) or getattr(function, "attr", "")
            if "doc" in called:  # add_docstr(torch.abs, "..."), add_newdoc("numpy", "abs", "...")
                yield [text for argument in node.value.args for text in _long_strings(argument)]
        elif isinstance(node, ast.If | ast.Try | ast.With):
            stack.extend(reversed(node.body))


def _docstrings(definition: _Definition) -> Iterator[str]:
    """The documentation string of a class or function and of the definitions inside it, in file order."""
    text = ast.get_docstring(definition, clean=False)
    if text:
        yield text
    for node in definition.body:
        if isinstance(node, _Definition):
            yield from _docstrings(node)


def _long_strings(argument: ast.AST) -> Iterator[str]:
    for node in ast.walk(argument):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 80:
            yield node.value


def _clean_docstring(text: str) -> str:
    """Drop what is not prose: doctests, underlines, directives, literal blocks."""
    kept: list[str] = []
    in_example = False
    for line in inspect.cleandoc(text).splitlines():
        stripped = line.strip()
        if stripped.startswith((">>>", "```")):
            in_example = True
            continue
        if not stripped:
            in_example = False
            kept.append("")
        elif in_example or stripped.startswith(("..", "+-", "|")) or not re.search(r"[A-Za-z]{2}", stripped):
            continue
        else:
            kept.append(stripped)
    return "\n".join(kept)


def _strip_markup(text: str) -> str:
    text = re.sub(r"^(```|~~~).*?^\1[^\n]*$", "", text, flags=re.M | re.S)
    kept = []
    for line in text.splitlines():
        stripped = line.strip().lstrip("#>*-").strip()
        kept.append("" if not re.search(r"\w", stripped) else stripped)
    return "\n".join(kept)


def _split_prose(text: str) -> list[str]:
    """Sentences of paragraphs that are separated by blank lines. A sentence keeps at least two words."""
    sentences: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        if len(joined) < 12:
            continue
        pending = ""
        for piece in sentencex.segment("en", joined):
            pending += piece
            if piece[-1].isspace():  # a break inside a word (torch.nn.Linear) is none
                sentences.append(pending.strip())
                pending = ""
        if pending.strip():
            sentences.append(pending.strip())
    return [s for s in sentences if " " in s]
