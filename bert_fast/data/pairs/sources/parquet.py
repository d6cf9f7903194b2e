"""Parquet files, one pair per row."""

from __future__ import annotations

from collections.abc import Iterator

from bert_fast.data.corpora.base import Piece, by_size
from bert_fast.data.pairs.sources.base import PairReader, SourceOptions, TextPair, check_columns, files_of, pair_of
from bert_fast.data.parquet import STRINGS, block_name, read_columns
from bert_fast.data.streams import Source
from bert_fast.errors import UserError


class Parquet(PairReader):
    suffixes: tuple[str, ...] = (".parquet",)

    def files(self, options: SourceOptions) -> list[Source]:
        """Files of the source in a fixed order. Raises UserError if there are none."""
        return files_of(options, self.suffixes)

    def pieces(self, options: SourceOptions) -> Iterator[Piece]:
        rows = (pair for source in self.files(options) for pair in _pairs(source.path, options))
        return by_size(rows, lambda pair: sum(map(len, (pair.query, pair.positive, *pair.negatives))) + 50)

    def read(self, piece: Piece, options: SourceOptions) -> Iterator[TextPair]:
        yield from piece


def _pairs(path: str, options: SourceOptions) -> Iterator[TextPair]:
    names: list[str] = []

    def choose(types: list[tuple[str, str]]) -> list[str]:
        names[:] = check_columns(path, "column", [name for name, _ in types], options)
        for name in names:
            kind = dict(types)[name]
            inner = kind[kind.find(": ") + 2 : -1] if kind.startswith(("list<", "large_list<")) else kind
            if inner not in (*STRINGS, "null"):
                raise UserError(f"{path}: column {name} holds {kind}, not strings")
        return names

    for block, row, values in read_columns(path, choose):
        yield pair_of(f"{path}, {block_name(path)} {block}, row {row}", "column", names, values)


READER = Parquet()
