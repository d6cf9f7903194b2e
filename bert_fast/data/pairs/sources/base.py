"""What a kind of source does: read files as a stream of pieces, and make pairs of texts of a piece."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from bert_fast.data import corpus as corpora
from bert_fast.data.corpora.base import AUTO, Document, Piece
from bert_fast.data.folders import files_below
from bert_fast.data.streams import Source, bare_name
from bert_fast.errors import UserError

LIST_OF_NEGATIVES = "negatives"
_NEGATIVE = re.compile(r"negative(?:_(\d+))?")


@dataclass(frozen=True)
class SourceOptions:
    """A source of pairs, as `--source` and the options that all sources share describe it.

    name:   what the store calls it
    kind:   one of `config.choices.PAIR_SOURCES`
    corpus: kind of the corpus, for a source that reads one
    path:   a file or folder, where the source reads one
    """

    name: str
    kind: str
    corpus: str | None = None
    path: str | None = None
    query_column: str = "query"
    positive_column: str = "positive"
    column: str = "text"
    packages: tuple[str, ...] = corpora.PYDOCS_PACKAGES
    language: str = AUTO
    unit: Literal["sentence", "document"] = "sentence"
    passage_words: int = 100
    seed: int = 12345


@dataclass(frozen=True)
class TextPair:
    """A query, its positive and hard negatives. `where`: the file and line or row, for messages."""

    where: str
    query: str
    positive: str
    negatives: tuple[str, ...] = ()


class PairReader(ABC):
    """A kind of source. Has no state: workers in other processes find it by its name."""

    takes: ClassVar[Literal["path", "corpus", "packages"]] = "path"
    """What `--source` names after the kind: a path, a kind of corpus and its path, or nothing, as it reads packages."""

    is_made: ClassVar[bool] = False
    """Whether pairs are made from plain text: there are no negatives, and what has no token or occurs twice is left out."""

    @abstractmethod
    def pieces(self, options: SourceOptions) -> Iterator[Piece]:
        """The source in pieces of about a MiB, in a fixed order. Streams: a file is read as its pieces are taken.

        Raises:
            UserError: there is nothing to read, or a file cannot be read; it names the line or row.
        """

    @abstractmethod
    def read(self, piece: Piece, options: SourceOptions) -> Iterator[TextPair]:
        """Pairs of a piece. Raises UserError naming the line or row that is no pair."""


class CorpusPairs(PairReader):
    """A kind that makes pairs of the documents of a corpus."""

    takes = "corpus"
    is_made = True

    def pieces(self, options: SourceOptions) -> Iterator[Piece]:
        assert options.corpus is not None
        found = corpora.find_sources(options.corpus, options.path, options.packages)
        return corpora.list_pieces(options.corpus, [*found.sources, *found.evaluation], options.column)

    def read(self, piece: Piece, options: SourceOptions) -> Iterator[TextPair]:
        assert options.corpus is not None
        for document in corpora.read_piece(options.corpus, piece, options.language):
            yield from self.of_document(document, options)

    @abstractmethod
    def of_document(self, document: Document, options: SourceOptions) -> Iterator[TextPair]:
        """Pairs of a document, or of a stretch of one."""


def files_of(options: SourceOptions, suffixes: tuple[str, ...]) -> list[Source]:
    """The file of a source, or the files of a folder with one of these endings, in a fixed order; a compression may follow.

    Raises:
        UserError: there is no such file or folder, or nothing in it to read.
    """
    assert options.path is not None
    root = Path(options.path)
    if root.is_file():
        return [Source(root.name, str(root))]
    if not root.is_dir():
        raise UserError(f"source {options.name}: {root} does not exist; name a file or folder after {options.kind}:")
    names = [path for path in files_below(root)[0] if path.name[0] != "."]
    files = [path for path in names if bare_name(path.name.lower()).endswith(suffixes)]
    if not files:
        raise UserError(f"source {options.name}: folder {root} holds no {' or '.join(suffixes)} files")
    return [Source(path.relative_to(root).as_posix(), str(path)) for path in files]


# ---- columns --------------------------------------------------------------------------------------------------------


def check_columns(where: str, what: str, names: Sequence[str], options: SourceOptions) -> list[str]:
    """The columns that are read: query, positive, and those of negatives in the order of their numbers.

    Args:
        what: `column` or `field`, for messages.

    Raises:
        UserError: one is missing, or is there twice, or negatives are there in both forms.
    """
    for option, wanted in (("query", options.query_column), ("positive", options.positive_column)):
        if wanted not in names:
            raise UserError(
                f"{where}: no {what} {wanted}; it has {', '.join(names)[:200]} (--{option}-column names another)"
            )
    used = (options.query_column, options.positive_column)
    found = {name: _NEGATIVE.fullmatch(name) for name in names if name not in used}
    numbered = sorted((int(match[1] or 0), name) for name, match in found.items() if match)
    has_list = LIST_OF_NEGATIVES in found
    if numbered and has_list:
        raise UserError(
            f"{where}: negatives are in {what} {LIST_OF_NEGATIVES} and in {numbered[0][1]}; rename those that are not meant"
        )
    chosen = [*used, *([LIST_OF_NEGATIVES] if has_list else [name for _, name in numbered])]
    twice = next((name for name in chosen if list(names).count(name) > 1), None)
    if twice:
        raise UserError(f"{where}: two columns are called {twice}; rename the one that is not meant")
    return chosen


def pair_of(where: str, what: str, names: Sequence[str], values: Sequence[Any]) -> TextPair:
    """The pair in a row whose columns `names` are those of `check_columns`. A negative that is null is none.

    Raises:
        UserError: a value is no text.
    """
    texts: list[str] = []
    for name, value in zip(names, values, strict=True):
        is_negative = len(texts) >= 2
        several = value if is_negative and name == LIST_OF_NEGATIVES and isinstance(value, list) else [value]
        for text in several:
            if text is None and is_negative:
                continue
            if text is not None and not isinstance(text, str):
                raise UserError(f"{where}: {what} {name} holds no text but {str(text)[:80]!r}; write it as a text")
            texts.append(text or "")
    return TextPair(where, texts[0], texts[1], tuple(texts[2:]))
