"""Corpora: where text comes from. Each kind lists its source files and reads them into documents of sentences.

The kinds are in `config.choices.CORPORA`. A document's text comes in blocks (a paragraph run, a documentation string) so that
repeated blocks can be dropped. One process reads the sources as a stream, many make sentences of it; a document of more than a
MiB travels in stretches.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from bert_fast.config.choices import CORPORA, find
from bert_fast.data.corpora.base import AUTO, Corpus, Document, Found, Piece
from bert_fast.data.streams import COMPRESSED, Source
from bert_fast.data.wikitext import is_dump
from bert_fast.errors import UserError

PYDOCS_PACKAGES = ("torch", "numpy", "transformers")  # that a corpus of packages reads by default


def find_corpus(kind: str) -> Corpus:
    """The corpus of a name of `CORPORA`. Raises UserError if there is none."""
    if kind not in CORPORA:
        raise UserError(f"unknown corpus kind {kind}; known: {', '.join(CORPORA)}")
    corpus: Corpus = find(CORPORA, kind)
    return corpus


def list_sources(kind: str, folder: str | None = None, packages: tuple[str, ...] = PYDOCS_PACKAGES) -> list[Source]:
    """Source files of a corpus in a fixed order. Raises UserError if there are none."""
    return find_sources(kind, folder, packages).sources


def find_sources(kind: str, folder: str | None = None, packages: tuple[str, ...] = PYDOCS_PACKAGES) -> Found:
    """What of a folder, or of one file, a kind of corpus reads. Raises UserError as `Corpus.find`."""
    return find_corpus(kind).find(kind, folder, packages)


def list_pieces(kind: str, sources: list[Source], column: str = "text") -> Iterator[Piece]:
    """The corpus in pieces of about a MiB, in a fixed order. Streams: a source is read as its pieces are taken."""
    return find_corpus(kind).pieces(sources, column)


def read_piece(kind: str, piece: Piece, language: str = AUTO) -> Iterator[Document]:
    """Documents of a piece. One without sentences says why."""
    return find_corpus(kind).read(piece, language)


def read_documents(kind: str, source: Source, column: str = "text", language: str = AUTO) -> Iterator[Document]:
    """Documents of one source file that have sentences. Raises UserError for what cannot be read."""
    corpus = find_corpus(kind)
    for piece in corpus.pieces([source], column):
        yield from (document for document in corpus.read(piece, language) if document.blocks)


def num_bytes(source: Source) -> int:
    """An estimate of the bytes of text in a source; a compressed file is taken to be a quarter of its text."""
    compressed = os.path.splitext(source.name.lower())[1] in COMPRESSED and not is_dump(source.name)
    return os.path.getsize(source.path) * (4 if compressed else 1)


def is_held_out(origin: str, fraction: float, seed: int) -> bool:
    """Whether documents of `origin` belong to the evaluation split, by a hash of its name, so that they never move."""
    digest = hashlib.blake2b(f"{seed}:{origin}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
