"""What a kind of corpus does: find its source files, read them as a stream of pieces, make documents of a piece."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from bert_fast.config.choices import CORPORA, find
from bert_fast.data.folders import files_below
from bert_fast.data.streams import Source, Text, bare_name
from bert_fast.data.text import detect_language, num_words, split_sentences
from bert_fast.errors import UserError

AUTO = "auto"  # a language that each text's script and words tell
_PACKED = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".zst", ".7z", ".rar", ".lz4", ".z")
_CHECKSUMS = re.compile(r".*\.(md5|md5sum|sha1|sha256|sha512)|(md5|sha256)sums?(\.txt)?", re.I)
PIECE_BYTES = 1 << 20
"""Bytes of text that one worker reads at a time, at least."""

Piece = list[Any]
"""What one worker reads at a time: picklable items that the kind's own `pieces` yields and its `read` takes."""


@dataclass(frozen=True)
class Document:
    """Sentences in reading order, grouped in blocks (a paragraph run, a documentation string).

    All documents of one `origin` (a document of its own, or the module that several came from) go to the same split.
    `goes_on`: the next one is the rest of this one. `left_out`: why there are no blocks, or empty.
    """

    origin: str
    blocks: list[list[str]]
    goes_on: bool = False
    left_out: str = ""


@dataclass(frozen=True)
class Found:
    """Source files in a fixed order, those of a given evaluation text, and the names that are left out by the reason."""

    sources: list[Source]
    evaluation: list[Source] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)


class Corpus(ABC):
    """A kind of corpus. Has no state: workers in other processes find it by its name."""

    suffixes: ClassVar[tuple[str, ...]]
    """Endings of the names of its files, in lower case, before that of a compression; empty if it reads files of any name."""

    space: ClassVar[float] = 13
    """Bytes of text, pieces, token ids and stores together over those of the sources, at ten passes. A byte of text becomes
    about half a byte per pass, twice for a while, and a byte of token ids."""

    reads_column: ClassVar[bool] = False
    """Whether the text is in a column or field that `--column` names."""

    reads_packages: ClassVar[bool] = False
    """Whether it reads installed packages, and no folder. Their text is English that repeats itself: every block is kept once,
    and all of a module goes to the same split."""

    def find(self, name: str, folder: str | None, packages: tuple[str, ...]) -> Found:
        """What of a folder, or of one file, is read. Nothing that a preparation or an export wrote is text.

        Args:
            name: of this kind, for messages.
            packages: for kinds that read packages.

        Raises:
            UserError: no such folder, nothing in it to read (it says what lies there instead), or a folder that cannot be
                listed.
        """
        if folder is not None and Path(folder).is_file():
            return Found([Source(Path(folder).name, str(folder))])
        if folder is None or not Path(folder).is_dir():
            raise UserError(f"corpus {name}: folder {folder} does not exist; pass --input FOLDER with text files in it")
        root = Path(folder)
        files, unreadable = files_below(root)
        left_out: dict[str, list[str]] = {}
        for path, why in sorted(unreadable.items()):
            left_out.setdefault(why, []).append(path.relative_to(root).as_posix())
        sources: list[Source] = []
        evaluation: list[Source] = []
        why_skipped = self.skips(files)
        for path in files:
            relative = path.relative_to(root).as_posix()
            why = self._why_left_out(path, why_skipped)
            if why:
                left_out.setdefault(why, []).append(relative)
            elif path.name[0] != ".":
                (evaluation if self.is_evaluation(path.name) else sources).append(Source(relative, str(path)))
        if not sources:  # a lone evaluation text is a text like another
            sources, evaluation = evaluation, []
        if not sources:
            what = f"no {' or '.join(self.suffixes)} files" if self.suffixes else "no files"
            there = f"; there are {describe(left_out)}" if left_out else ""
            raise UserError(f"corpus {name}: folder {folder} holds {what}{there}")
        return Found(sources, evaluation, left_out)

    def recognizes(self, name: str) -> bool:
        """Whether a file of this name (in lower case) is one of this kind and no other."""
        return bool(self.suffixes) and bare_name(name).endswith(self.suffixes)

    def skips(self, files: list[Path]) -> Callable[[Path], str]:
        """Of all the files in a folder: a function that says why one that could be read is not; empty if it is."""
        return lambda path: ""

    def is_evaluation(self, name: str) -> bool:
        """Whether a file is held out, by its name."""
        return False

    @abstractmethod
    def pieces(self, sources: list[Source], column: str) -> Iterator[Piece]:
        """The corpus in pieces of about a MiB, in a fixed order. Streams: a source is read as its pieces are taken.

        Raises:
            UserError: a file cannot be read; it names the line or row.
        """

    @abstractmethod
    def read(self, piece: Piece, language: str) -> Iterator[Document]:
        """Documents of a piece. One without sentences says why."""

    def _why_left_out(self, path: Path, why_skipped: Callable[[Path], str]) -> str:
        """Why a file is no source of this kind; empty if it is one (or hidden, which goes without saying)."""
        name = path.name.lower()
        if name[0] == ".":
            return ""
        if self.recognizes(name) or not self.suffixes:
            why = why_skipped(path)
            if why or self.suffixes:
                return why
            if _CHECKSUMS.fullmatch(name):
                return "files of checksums"
        if name.endswith(_PACKED):
            return "packed files (unpack them)"
        if not self.suffixes:
            return ""
        for other in CORPORA:
            if find(CORPORA, other).recognizes(name):
                return f"files that --corpus {other} reads"
        return "files of another kind"


class TextCorpus(Corpus):
    """A kind whose sources hold texts."""

    @abstractmethod
    def texts(self, source: Source, column: str) -> Iterator[Text]:
        """Documents of one source file as text. Memory does not grow with the file.

        Raises:
            UserError: text that is not UTF-8, a damaged file, a file of another kind; it names the line or row.
        """

    def sentences(self, text: str, language: str) -> list[str]:
        """A text in sentences."""
        return split_sentences(text, language_of(language, text))

    def pieces(self, sources: list[Source], column: str) -> Iterator[Piece]:
        texts = (text for source in sources for text in self.texts(source, column))
        return by_size(texts, lambda text: len(text.text) + 50)

    def read(self, piece: list[Text], language: str) -> Iterator[Document]:
        for item in piece:
            if item.left_out:
                yield Document(item.origin, [], item.goes_on, item.left_out)
            else:
                sentences = self.sentences(item.text, language)
                why = why_empty(sentences, item.text)
                yield Document(item.origin, [sentences] if sentences else [], item.goes_on, why)


_Item = TypeVar("_Item")


def by_size(items: Iterable[_Item], size_of: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """Items in lists of about a MiB."""
    chunk: list[_Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += size_of(item)
        if size >= PIECE_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def language_of(wanted: str, text: str, of_source: str = "") -> str:
    """The language whose rules end sentences: the wanted one, or under `auto` that of the source or of the text."""
    return wanted if wanted != AUTO else of_source.partition("-")[0] or detect_language(text)


def why_empty(sentences: list[str], text: str) -> str:
    """Why a document has no sentences; empty if it has."""
    if sentences:
        return ""
    return "documents without a sentence of two words" if num_words(text) else "documents without text"


def describe(left_out: dict[str, list[str]]) -> str:
    """What was left out, as part of a sentence: each reason with its number and a few names."""
    return "; ".join(counted(len(names), why, names[:3]) for why, names in left_out.items())


def counted(count: int, what: str, names: list[str] | None = None) -> str:
    """`2 files of another kind (a, b)`, in the singular where there is one. `names` may be fewer than there are."""
    if count == 1:
        what = re.sub(r"\b(file|document|link|page|text)s\b", r"\1", what, count=1)
    if names is None:
        return f"{count:,} {what}"
    return f"{count:,} {what} ({', '.join(name[:60] for name in names)}{', ...' if count > len(names) else ''})"
