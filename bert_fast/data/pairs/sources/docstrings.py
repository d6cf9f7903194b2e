"""The first sentence of a documentation string as query, the rest of it as positive.

Where there is one sentence alone, it is the positive, and the query is the name of what it documents: `torch.nn.Linear`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from bert_fast.data import corpus as corpora
from bert_fast.data.corpora.base import Piece
from bert_fast.data.docstrings import clean_docstring, named_documentation
from bert_fast.data.pairs.sources.base import PairReader, SourceOptions, TextPair
from bert_fast.data.streams import Source
from bert_fast.data.text import split_sentences

_CORPUS = "pydocs"
_SIGNATURE = re.compile(r"[\w.]+ ?\(.*\)( *->.*)?")  # with which the documentation of compiled functions begins


class Docstrings(PairReader):
    takes = "packages"
    is_made = True

    def pieces(self, options: SourceOptions) -> Iterator[Piece]:
        return corpora.list_pieces(_CORPUS, corpora.list_sources(_CORPUS, None, options.packages))

    def read(self, piece: Piece, options: SourceOptions) -> Iterator[TextPair]:
        for source in piece:
            module = _module_of(source)
            for entries in named_documentation(source.path):
                for name, text in entries:
                    sentences = split_sentences(_without_signature(clean_docstring(text)))
                    if len(sentences) > 1:
                        yield TextPair(source.path, sentences[0], " ".join(sentences[1:]))
                    elif sentences:
                        yield TextPair(source.path, _whole_name(module, name), sentences[0])


def _module_of(source: Source) -> str:
    """The dotted name of a module: `torch.nn.functional` of `torch/nn/functional.py`, `json` of `python/json/__init__.py`."""
    name = source.name.removesuffix(".py").removesuffix("/__init__").removeprefix("python/")
    return name.replace("/", ".")


def _whole_name(module: str, name: str) -> str:
    if name.startswith("."):  # the whole name already
        return name[1:] or module
    return f"{module}.{name}" if name else module


def _without_signature(text: str) -> str:
    first, _, rest = text.lstrip().partition("\n")
    return rest if _SIGNATURE.fullmatch(first.strip()) else text


READER = Docstrings()
