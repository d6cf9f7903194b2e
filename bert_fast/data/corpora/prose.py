"""A folder of .txt, .md and .rst files, one document per file; sentences are split by `sentencex`."""

from __future__ import annotations

from collections.abc import Iterator

from bert_fast.data.corpora.base import TextCorpus, language_of
from bert_fast.data.streams import Source, Text, bare_name, read_lines, stretches
from bert_fast.data.text import split_sentences, strip_marks, without_fences


class Prose(TextCorpus):
    suffixes = (".txt", ".md", ".rst")

    def texts(self, source: Source, column: str) -> Iterator[Text]:
        lines = (line for _, line in read_lines(source))
        is_markdown = bare_name(source.name.lower()).endswith(".md")
        return stretches(source.name, without_fences(lines) if is_markdown else lines)

    def sentences(self, text: str, language: str) -> list[str]:
        text = strip_marks(text)
        return split_sentences(text, language_of(language, text))


CORPUS = Prose()
