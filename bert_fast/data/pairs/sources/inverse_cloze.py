"""The inverse cloze task (Lee et al., arXiv 1906.00300): a sentence of a passage is the query, the rest of it the positive."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from bert_fast.data.corpora.base import Document
from bert_fast.data.pairs.sources.base import CorpusPairs, SourceOptions, TextPair
from bert_fast.data.text import num_words


class InverseCloze(CorpusPairs):
    def of_document(self, document: Document, options: SourceOptions) -> Iterator[TextPair]:
        """A pair of each passage: sentences in a row of one document, up to `passage_words` words or a little more."""
        for passage in _passages([sentence for block in document.blocks for sentence in block], options.passage_words):
            if len(passage) > 1:
                text = "\n".join(passage).encode("utf-8", "surrogatepass")
                digest = hashlib.blake2b(text, digest_size=8, salt=options.seed.to_bytes(8, "little")).digest()
                chosen = int.from_bytes(digest, "little") % len(passage)
                rest = " ".join(passage[:chosen] + passage[chosen + 1 :])
                yield TextPair(document.origin, passage[chosen], rest)


def _passages(sentences: list[str], words: int) -> Iterator[list[str]]:
    """Sentences in order, in lists that end with the sentence that reaches so many words; the last may have fewer."""
    passage: list[str] = []
    size = 0
    for sentence in sentences:
        passage.append(sentence)
        size += num_words(sentence)
        if size >= words:
            yield passage
            passage, size = [], 0
    yield passage


READER = InverseCloze()
