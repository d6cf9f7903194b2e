"""Files of JSON lines, one pair per line."""

from __future__ import annotations

import json
from collections.abc import Iterator

from bert_fast.data.corpora.base import Piece, by_size
from bert_fast.data.pairs.sources.base import PairReader, SourceOptions, TextPair, check_columns, files_of, pair_of
from bert_fast.data.streams import read_lines
from bert_fast.errors import UserError


class JsonLines(PairReader):
    def pieces(self, options: SourceOptions) -> Iterator[Piece]:
        lines = (
            (f"{source.path}, line {number}", line)
            for source in files_of(options, (".jsonl", ".ndjson", ".json"))
            for number, line in read_lines(source, whole=True)
            if line.strip()
        )
        return by_size(lines, lambda line: len(line[1]))

    def read(self, piece: Piece, options: SourceOptions) -> Iterator[TextPair]:
        for where, line in piece:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{where} is not JSON ({str(error)[:100]}); a file of JSON lines has one object per line"
                ) from None
            if not isinstance(entry, dict):
                raise UserError(f"{where} holds no JSON object; a file of JSON lines has one object per line")
            names = check_columns(where, "field", list(entry), options)
            yield pair_of(where, "field", names, [entry[name] for name in names])


READER = JsonLines()
