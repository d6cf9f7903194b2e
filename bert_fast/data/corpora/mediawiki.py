"""A dump of Wikipedia (.xml.bz2), one document per article."""

from __future__ import annotations

from collections.abc import Iterator

from bert_fast.data.corpora.base import Corpus, Document, Piece, by_size, language_of, why_empty
from bert_fast.data.streams import Source
from bert_fast.data.text import split_sentences
from bert_fast.data.wikitext import Page, TooCostlyError, clean, is_dump, read_pages


class MediaWiki(Corpus):
    suffixes = (".xml", ".xml.bz2", ".xml.gz")
    space = 22  # a compressed dump becomes five times as much text

    def recognizes(self, name: str) -> bool:
        return is_dump(name)

    def pieces(self, sources: list[Source], column: str) -> Iterator[Piece]:
        pages = (page for source in sources for page in read_pages(source.path))
        return by_size(pages, lambda page: len(page.wikitext))

    def read(self, piece: list[Page], language: str) -> Iterator[Document]:
        for page in piece:
            try:
                why, text = page.left_out, clean(page)
            except TooCostlyError as error:
                why, text = str(error), ""
            sentences = split_sentences(text, language_of(language, text, page.language))
            left_out = why or why_empty(sentences, text)
            yield Document(page.title, [sentences] if sentences else [], left_out=left_out)


CORPUS = MediaWiki()
