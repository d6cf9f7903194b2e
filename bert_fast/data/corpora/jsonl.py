"""Files of JSON lines, one document per line."""

from __future__ import annotations

from collections.abc import Iterator

from bert_fast.data.corpora.base import TextCorpus
from bert_fast.data.streams import Source, Text, json_document, read_lines


class JsonLines(TextCorpus):
    suffixes = (".jsonl", ".ndjson", ".json")
    reads_column = True

    def texts(self, source: Source, column: str) -> Iterator[Text]:
        for number, line in read_lines(source, whole=True):
            if line.strip():
                yield from json_document(source, number, line, column)


CORPUS = JsonLines()
