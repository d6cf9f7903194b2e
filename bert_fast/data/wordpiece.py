"""WordPiece vocabularies: load a BERT `vocab.txt`, or train one with `tokenizers`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bert_fast.errors import UserError
from bert_fast.files import write_atomically

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in id order, and the ids that samples are built from."""

    tokens: tuple[str, ...]
    sha256: str
    cls_id: int
    sep_id: int
    mask_id: int

    def __len__(self) -> int:
        return len(self.tokens)


def load_vocabulary(path: str | Path) -> Vocabulary:
    """Read a `vocab.txt` (one token a line, its id the line number).

    Raises:
        UserError: missing file, not UTF-8, a special token missing, a token twice, or too many for 16-bit ids.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"vocabulary {path} does not exist; train one with scripts/prepare_data.py --vocab-size N")
    data = path.read_bytes()
    try:
        lines = data.decode("utf-8").split("\n")  # not splitlines(): only a newline ends a token for the tokenizer
    except UnicodeDecodeError as error:
        raise UserError(f"vocabulary {path} is not UTF-8 text (byte {error.start})") from None
    tokens = tuple(line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1]))
    index = {token: i for i, token in enumerate(tokens)}
    missing = [token for token in SPECIAL_TOKENS if token not in index]
    if missing:
        raise UserError(f"vocabulary {path} has no {', '.join(missing)}; it is no BERT vocabulary")
    if len(index) != len(tokens):
        raise UserError(f"vocabulary {path} holds {len(tokens) - len(index)} tokens twice")
    if len(tokens) > 65536:
        raise UserError(f"vocabulary {path} has {len(tokens)} tokens; the store holds 16-bit ids, at most 65536")
    return Vocabulary(tokens, hashlib.sha256(data).hexdigest(), index["[CLS]"], index["[SEP]"], index["[MASK]"])


def train_vocabulary(files: Iterable[str | Path], size: int, path: str | Path) -> None:
    """Train an uncased WordPiece vocabulary of `size` tokens on text files and write it as `vocab.txt`."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train(
        [str(file) for file in files],
        vocab_size=size,
        min_frequency=2,
        limit_alphabet=400,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    write_atomically(path, "".join(f"{token}\n" for token, _ in by_id))


class WordPiece:
    """Text to token ids with the uncased BERT normalisation."""

    def __init__(self, vocab_path: str | Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we parallelise over processes
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        # Not BertWordPieceTokenizer: it makes an id of "[MASK]" in the text, the reference three tokens.
        vocabulary = {token: index for index, token in enumerate(load_vocabulary(vocab_path).tokens)}
        self._tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def encode(self, sentences: list[str]) -> list[list[int]]:
        """Token ids of each sentence, without special tokens."""
        return [e.ids for e in self._tokenizer.encode_batch(sentences, add_special_tokens=False)]
