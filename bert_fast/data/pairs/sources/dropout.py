"""Both sides are the same text, which two passes of the model with other dropout tell apart (SimCSE, arXiv 2104.08821)."""

from __future__ import annotations

from collections.abc import Iterator

from bert_fast.data.corpora.base import Document
from bert_fast.data.pairs.sources.base import CorpusPairs, SourceOptions, TextPair


class Dropout(CorpusPairs):
    def of_document(self, document: Document, options: SourceOptions) -> Iterator[TextPair]:
        """A pair of each sentence, or of the whole document."""
        sentences = [sentence for block in document.blocks for sentence in block]
        texts = sentences if options.unit == "sentence" else [" ".join(sentences)] if sentences else []
        for text in texts:
            yield TextPair(document.origin, text, text)


READER = Dropout()
