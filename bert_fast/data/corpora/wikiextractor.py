"""A folder of what WikiExtractor wrote: <doc> lines, or JSON lines."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from bert_fast.data.corpora.base import TextCorpus
from bert_fast.data.streams import Source, Text, json_document, read_lines, stretches
from bert_fast.errors import UserError


class WikiExtractor(TextCorpus):
    suffixes = ()

    def texts(self, source: Source, column: str) -> Iterator[Text]:
        """Articles between <doc ...> and </doc>, one paragraph per line; or one object per line."""
        start: int | None = None  # line of the <doc> that is open
        title = ""
        paragraphs: list[str] = []
        for number, raw in read_lines(source, whole=True):
            line = raw.strip()
            if start is None and line.startswith("{"):
                yield from json_document(source, number, line, "text")
            elif start is None and line.startswith("<doc "):
                start, found = number, re.search(r'\btitle="(.*?)"', line)
                title = html.unescape(found[1]) if found else ""
            elif start is not None and line == "</doc>":
                yield from stretches(f"{source.name}#{start}", paragraphs)
                start, paragraphs = None, []
            elif start is not None:
                paragraph = html.unescape(line)
                if paragraphs or paragraph not in ("", title):  # its title stands above an article
                    paragraphs.append(f"{paragraph}\n\n")
            elif line:
                raise UserError(
                    f"{source.path}, line {number} stands outside of <doc> ... </doc>; is it a file of WikiExtractor?"
                )
        if start is not None:
            raise UserError(f"{source.path} ends within the <doc> of line {start}; write the file again")


CORPUS = WikiExtractor()
