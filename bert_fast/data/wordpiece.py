"""WordPiece: loads a BERT `vocab.txt`, or trains one with `tokenizers`, and turns text into token ids."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.errors import UserError
from bert_fast.files import write_atomically

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in id order, and the ids that samples are built from.

    `sha256` is the hash of the tokens, each followed by a newline, so that the file's line ends do not matter.
    """

    tokens: tuple[str, ...]
    sha256: str
    cls_id: int
    sep_id: int
    mask_id: int

    def __len__(self) -> int:
        return len(self.tokens)


def load_vocabulary(path: str | Path) -> Vocabulary:
    """Read a `vocab.txt`: one token per line, whose id is the number of the line, from 0.

    Raises:
        UserError: missing file, not UTF-8, a special token missing, a token twice, or too many for 16-bit ids.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"vocabulary {path} does not exist; train one with scripts/prepare_data.py --vocab-size N")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")  # some editors begin a file with this mark
    except UnicodeDecodeError as error:
        raise UserError(f"vocabulary {path} is not UTF-8 text (byte {error.start})") from None
    lines = text.split("\n")  # not splitlines(): only a newline ends a token for the tokenizer
    tokens = tuple(line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1]))
    index = {token: i for i, token in enumerate(tokens)}
    missing = [token for token in SPECIAL_TOKENS if token not in index]
    if missing:
        raise UserError(f"vocabulary {path} has no {', '.join(missing)}; it is no BERT vocabulary")
    if len(index) != len(tokens):
        raise UserError(f"vocabulary {path} holds {len(tokens) - len(index)} tokens twice")
    if len(tokens) > 65536:
        raise UserError(f"vocabulary {path} has {len(tokens)} tokens; the store holds 16-bit ids, at most 65536")
    sha256 = hashlib.sha256(as_text(tokens).encode()).hexdigest()
    return Vocabulary(tokens, sha256, index["[CLS]"], index["[SEP]"], index["[MASK]"])


def as_text(tokens: Iterable[str]) -> str:
    """The content of a `vocab.txt` with these tokens."""
    return "".join(f"{token}\n" for token in tokens)


@dataclass(frozen=True)
class Normalization:
    """What is done to text before its words are looked up. BERT's uncased models do both, its cased models neither."""

    lowercase: bool
    strip_accents: bool

    def __str__(self) -> str:
        return f"{'lower case' if self.lowercase else 'cased'}, accents {'stripped' if self.strip_accents else 'kept'}"


_FOREIGN_SHARE = 0.001  # of the tokens, so that one or two added tokens do not decide


def normalization_of(tokens: Iterable[str], cased: bool | None = None) -> Normalization:
    """The normalization that a vocabulary was made for, read from its tokens.

    Upper-case letters in it mean that case is kept; letters that stripping accents would change mean that they are not
    stripped (German umlauts in an uncased vocabulary, Korean syllables). `cased` overrides the first.
    """
    words = [token for token in tokens if not (token[:1] in ("[", "<") and token[-1:] in ("]", ">"))]
    least = _FOREIGN_SHARE * len(words)
    if cased is None:
        cased = sum(token != token.lower() for token in words) > least
    accented = sum(token != _without_accents(token) for token in words) > least
    return Normalization(lowercase=not cased, strip_accents=not cased and not accented)


def _without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


def _normalizer(normalization: Normalization) -> Any:
    from tokenizers import normalizers

    return normalizers.BertNormalizer(lowercase=normalization.lowercase, strip_accents=normalization.strip_accents)


def train_vocabulary(
    files: Iterable[str | Path],
    size: int,
    path: str | Path,
    *,
    cased: bool = False,
    min_letter_share: float = 1e-6,
) -> None:
    """Train a WordPiece vocabulary of `size` tokens on text files and write it as `vocab.txt`.

    Args:
        min_letter_share: share of the text's characters; a letter that is rarer gets no token of its own.

    Raises:
        UserError: the letters of the text alone need more than `size` tokens.
    """
    from tokenizers import BertWordPieceTokenizer

    paths = [str(file) for file in files]
    normalization = Normalization(lowercase=not cased, strip_accents=not cased)
    tokenizer = BertWordPieceTokenizer(lowercase=not cased, strip_accents=not cased)
    tokenizer.train(
        paths,
        vocab_size=size,
        min_frequency=2,
        limit_alphabet=max(1, _num_letters(paths, normalization, min_letter_share)),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if len(by_id) > size:
        raise UserError(
            f"--vocab-size {size}: the letters of this text alone take {len(by_id):,} tokens; give at least that many"
        )
    write_atomically(path, as_text(token for token, _ in by_id))


def _num_letters(paths: list[str], normalization: Normalization, min_share: float) -> int:
    """Number of different characters of the normalized text that each make up at least `min_share` of it."""
    counts = np.zeros(0x110000, np.int64)
    for path in paths:
        with open(path, encoding="utf-8") as file:
            while text := file.read(1 << 20):
                counts += np.bincount(np.frombuffer(text.encode("utf-32-le"), np.uint32), minlength=len(counts))
    normalizer = _normalizer(normalization)
    letters: Counter[str] = Counter()
    for code in np.flatnonzero(counts).tolist():
        for letter in normalizer.normalize_str(chr(code)).split():
            letters.update({each: int(counts[code]) for each in letter})
    return sum(count >= min_share * letters.total() for count in letters.values())


@dataclass(frozen=True)
class WordCount:
    """How many words of a text are unknown to a vocabulary, with examples. Only what has a letter or digit is a word."""

    words: int = 0
    unknown: int = 0
    examples: tuple[str, ...] = ()

    def __add__(self, other: WordCount) -> WordCount:
        examples = tuple(dict.fromkeys(self.examples + other.examples))[:_EXAMPLES]
        return WordCount(self.words + other.words, self.unknown + other.unknown, examples)


_EXAMPLES = 5


class WordPiece:
    """Turns text into token ids, with the normalization that the vocabulary was made for."""

    def __init__(self, vocab_path: str | Path, cased: bool | None = None) -> None:
        """Raises UserError as `load_vocabulary`. `cased` overrides what the vocabulary says about case."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we parallelize over processes
        from tokenizers import Tokenizer, models, pre_tokenizers

        tokens = load_vocabulary(vocab_path).tokens
        self.normalization = normalization_of(tokens, cased)
        # Not BertWordPieceTokenizer, which turns "[MASK]" in a text into its id, where the reference makes three tokens.
        vocabulary = {token: index for index, token in enumerate(tokens)}
        self._tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=200))
        self._tokenizer.normalizer = _normalizer(self.normalization)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._unknown_id = vocabulary["[UNK]"]
        self._begins_word = np.array([_is_word(t) and not t.startswith("##") and t != "[UNK]" for t in tokens])

    def encode(self, sentences: list[str]) -> list[list[int]]:
        """Token ids of each sentence, without special tokens."""
        return [e.ids for e in self._tokenizer.encode_batch(sentences, add_special_tokens=False)]

    def encode_and_count(self, sentences: list[str]) -> tuple[list[list[int]], WordCount]:
        """As `encode`, with a count of the words and of the unknown ones."""
        encodings = self._tokenizer.encode_batch(sentences, add_special_tokens=False)
        ids = [each.ids for each in encodings]
        unknown = []
        for sentence, tokens, encoding in zip(sentences, ids, encodings, strict=True):
            if self._unknown_id in tokens:
                places = zip(tokens, encoding.offsets, strict=True)
                unknown += [sentence[begin:end] for token, (begin, end) in places if token == self._unknown_id]
        unknown = [word for word in unknown if _is_word(word)]
        known = int(self._begins_word[np.fromiter(chain.from_iterable(ids), np.int64)].sum())
        return ids, WordCount(known + len(unknown), len(unknown), tuple(dict.fromkeys(unknown))[:_EXAMPLES])


def _is_word(text: str) -> bool:
    return any(character.isalnum() for character in text)
