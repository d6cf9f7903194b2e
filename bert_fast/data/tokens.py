"""The token ids of a split's text, in one memory-mapped file: every worker reads any of its documents.

`tokens.bin` is uint16, sentence after sentence. `sentences.bin` (int64) says where each sentence starts in it and
`documents.bin` (int64) with which sentence each document starts; both end with the total. The files are kept until the samples
are made. Memory does not grow with them, as the operating system reads their pages on use and drops them again.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.data.samples import TokenDocument, Tokens
from bert_fast.data.wordpiece import WordCount, WordPiece
from bert_fast.files import atomic_file, write_json

_SENTENCES_AT_ONCE = 1000


@dataclass(frozen=True)
class TokenPart:
    """The token ids of one text file on disk, as one worker wrote them."""

    path: str
    num_documents: int
    words: WordCount


def tokenize_file(text_path: str, wordpiece: WordPiece, part_path: str) -> TokenPart:
    """Write the token ids of a text file (one sentence per line, a blank line after each document) to `part_path`.

    A document without a blank line at the end of the file goes on in the next file, where it is counted.
    """
    tokens, sentences, documents = array("H"), array("q"), array("q")  # ids; ends of sentences; ends of documents
    words = WordCount()
    with open(text_path, encoding="utf-8") as lines:
        while block := [line.rstrip("\n") for line in islice(lines, _SENTENCES_AT_ONCE)]:
            encoded, counted = wordpiece.encode_and_count(block)
            words += counted
            for line, ids in zip(block, encoded, strict=True):
                if ids:
                    tokens.extend(ids)
                    sentences.append(len(tokens))
                elif not line:
                    _end_document(sentences, documents)
    with atomic_file(part_path) as file:
        np.savez(file, tokens=tokens, sentences=sentences, documents=documents)
    write_json(_count_path(part_path), [len(documents), words.words, words.unknown, words.examples])
    return TokenPart(part_path, len(documents), words)


def _end_document(sentences: array[int], documents: array[int]) -> None:
    if len(sentences) > (documents[-1] if documents else 0):  # otherwise none of it became a token
        documents.append(len(sentences))


def read_token_part(path: str) -> TokenPart | None:
    """The part at `path` if it was finished, else None. Its count is written last."""
    if not _count_path(path).is_file():
        return None
    num_documents, words, unknown, examples = json.loads(_count_path(path).read_text(encoding="utf-8"))
    return TokenPart(path, num_documents, WordCount(words, unknown, tuple(examples)))


def _count_path(part_path: str) -> Path:
    return Path(f"{part_path}.json")


def merge_token_parts(folder: Path, parts: list[TokenPart]) -> None:
    """Join the parts of a split in `folder`, unless that is done already. Memory holds one part at a time."""
    names = ("tokens.bin", "sentences.bin", "documents.bin")  # the last one is renamed last
    if (folder / names[-1]).is_file():
        return
    with ExitStack() as stack:
        documents, sentences, tokens = (stack.enter_context(atomic_file(folder / name)) for name in reversed(names))
        num_tokens = num_sentences = 0
        for file in (sentences, documents):
            file.write(bytes(8))
        for part in parts:
            with np.load(part.path, allow_pickle=False) as loaded:
                tokens.write(loaded["tokens"].tobytes())
                sentences.write((loaded["sentences"] + num_tokens).tobytes())
                documents.write((loaded["documents"] + num_sentences).tobytes())
                num_tokens += len(loaded["tokens"])
                num_sentences += len(loaded["sentences"])


class _Document(Sequence[Tokens]):
    """Sentences `begin` ... `end` - 1 of the split, read on access."""

    def __init__(self, tokens: np.ndarray, sentences: np.ndarray, begin: int, end: int) -> None:
        self._tokens, self._sentences, self._begin, self._length = tokens, sentences, begin, end - begin

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(index)
        first = self._begin + index
        start, end = self._sentences[first : first + 2].tolist()
        return self._tokens[start:end].tolist()


class TokenizedText(Sequence[TokenDocument]):
    """The documents of a split, from the folder that `merge_token_parts` wrote. None is empty."""

    def __init__(self, folder: str | Path) -> None:
        kinds = {"tokens": np.uint16, "sentences": np.int64, "documents": np.int64}
        paths = {name: Path(folder) / f"{name}.bin" for name in kinds}
        self._tokens, self._sentences, self._documents = (
            np.memmap(path, kinds[name], "r").view(np.ndarray) if path.stat().st_size else np.zeros(0, kinds[name])
            for name, path in paths.items()
        )

    def __len__(self) -> int:
        return len(self._documents) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin, end = self._documents[index : index + 2].tolist()
        return _Document(self._tokens, self._sentences, begin, end)
