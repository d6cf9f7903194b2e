"""Text files with one sentence per line and a blank line between documents, as MLPerf's cleaned shards are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from bert_fast.data import streams
from bert_fast.data.corpora.base import TextCorpus
from bert_fast.data.streams import Source, Text, read_lines

_SHARD = re.compile(r"part-\d+-of-\d+(\.(gz|bz2|xz))?")  # beside which eval.txt and eval.md5 lie
_EVAL_TEXT = re.compile(r"eval\.txt(\.(gz|bz2|xz))?")


class MLCommons(TextCorpus):
    suffixes = ()

    def skips(self, files: list[Path]) -> Callable[[Path], str]:
        has_shards = any(_SHARD.fullmatch(path.name) for path in files)

        def why(path: Path) -> str:
            if has_shards and not (_SHARD.fullmatch(path.name) or _EVAL_TEXT.fullmatch(path.name)):
                return "files beside part-*-of-* and eval.txt, which are the text"
            return ""

        return why

    def is_evaluation(self, name: str) -> bool:
        return _EVAL_TEXT.fullmatch(name) is not None

    def texts(self, source: Source, column: str) -> Iterator[Text]:
        sentences: list[str] = []
        index = size = 0
        for _, raw in read_lines(source):
            for line in map(str.strip, raw.removesuffix("\n").split("\n")):
                if line:
                    if size >= streams.STRETCH:
                        yield Text(f"{source.name}#{index}", "\n".join(sentences), goes_on=True)
                        sentences, size = [], 0
                    sentences.append(line)
                    size += len(line)
                elif sentences:
                    yield Text(f"{source.name}#{index}", "\n".join(sentences))
                    index, size, sentences = index + 1, 0, []
        if sentences:
            yield Text(f"{source.name}#{index}", "\n".join(sentences))

    def sentences(self, text: str, language: str) -> list[str]:
        return text.split("\n")


CORPUS = MLCommons()
