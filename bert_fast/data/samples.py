"""BERT's pretraining samples: [CLS] A [SEP] B [SEP] with static masks and an is-next label.

The algorithm of Devlin et al. (arXiv 1810.04805, appendix A.2) as their published generator has it, with MLPerf's
parameters. A document's target length is drawn once per pass over it, and is short with probability `short_seq_prob`. Its
sentences are gathered up to that length and cut into A and B at a random place. Half of the time B comes from another document
instead, and the sentences that B would have taken are used again. 15 % of the tokens are chosen for prediction: 80 % of them
become [MASK], 10 % a random token, and 10 % stay. One seed determines everything.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bert_fast.data.wordpiece import Vocabulary
from bert_fast.errors import UserError


@dataclass(frozen=True)
class SampleParams:
    """How samples are made. Defaults are MLPerf's."""

    max_seq_len: int = 512
    max_predictions: int = 76
    mask_prob: float = 0.15
    short_seq_prob: float = 0.1
    dupe_factor: int = 10
    seed: int = 12345

    def __post_init__(self) -> None:
        """Raises UserError for values with which no sample can be made."""
        if self.max_seq_len < 5:
            raise UserError(f"--max-seq-len {self.max_seq_len}: [CLS] A [SEP] B [SEP] takes at least 5 tokens")
        if self.max_seq_len > 65535:
            raise UserError(f"--max-seq-len {self.max_seq_len}: the store holds 16-bit lengths, at most 65535")
        if self.max_predictions < 1 or self.dupe_factor < 1:
            raise UserError("--max-predictions and --dupe-factor must be at least 1")
        if not (0 < self.mask_prob < 1 and 0 <= self.short_seq_prob <= 1):
            raise UserError("--mask-prob and --short-seq-prob are shares between 0 and 1")

    def as_dict(self) -> dict[str, Any]:
        """The parameters by name, for a manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """One pretraining sequence.

    input_ids:        [L] uint16, masks applied
    len_a:            tokens of the first segment, [CLS] and its [SEP] included
    masked_positions: [M] uint16, ascending
    masked_labels:    [M] uint16, the original tokens there
    is_random_next:   1 if B comes from another document
    """

    input_ids: np.ndarray
    len_a: int
    masked_positions: np.ndarray
    masked_labels: np.ndarray
    is_random_next: int


Tokens = list[int]
TokenDocument = Sequence[Tokens]  # sentences

_TRIES = 10  # to draw text from elsewhere in a split of a single document


def make_samples(
    documents: Sequence[TokenDocument],
    vocabulary: Vocabulary,
    params: SampleParams,
    chunk: int,
    chosen: range | None = None,
) -> Iterator[Sample]:
    """Samples of a chunk of documents, in `dupe_factor` passes over it.

    Args:
        documents: the whole split, as random next sentences are drawn from all of it. It may be read from disk on access.
        chunk: the number of the chunk, which selects its random stream.
        chosen: indices of the chunk's documents (default: all). If given, no document of the split may be empty.
    """
    if chosen is None:
        documents = [document for document in documents if document]
        chosen = range(len(documents))
    for duplicate in range(params.dupe_factor):
        masks = np.random.default_rng([params.seed, chunk, duplicate])
        for tokens_a, tokens_b, is_random in segment_pairs(documents, chosen, params, chunk, duplicate):
            yield _mask(tokens_a, tokens_b, is_random, vocabulary, params, masks)


def segment_pairs(
    documents: Sequence[TokenDocument], chosen: range, params: SampleParams, chunk: int, duplicate: int
) -> Iterator[tuple[Tokens, Tokens, int]]:
    """What a pass over a chunk makes samples of: the tokens of A and B, and 1 if B is from another document, else 0.

    Args:
        documents, chunk: as `make_samples` has them; no document is empty.
        chosen: indices of the chunk's documents.
        duplicate: the number of the pass; with the seed and the chunk, it selects the random stream.
    """
    rng = random.Random(f"{params.seed}:{chunk}:{duplicate}")
    for index in chosen:
        yield from _pairs_of_document(documents, index, params, rng)


def _pairs_of_document(
    documents: Sequence[TokenDocument], index: int, params: SampleParams, rng: random.Random
) -> Iterator[tuple[Tokens, Tokens, int]]:
    document = documents[index]
    if len(documents) == 1 and len(document) == 1:
        return  # the whole split has no second sentence
    budget = params.max_seq_len - 3  # [CLS], [SEP], [SEP]
    # Once per document and pass: either all of its samples are short or none is
    target = rng.randint(2, budget) if rng.random() < params.short_seq_prob else budget
    gathered: list[Tokens] = []
    total = 0
    position = 0
    while position < len(document):
        gathered.append(document[position])
        total += len(gathered[-1])
        position += 1
        if position < len(document) and total < target:
            continue
        cut = rng.randint(1, len(gathered) - 1) if len(gathered) > 1 else 1
        tokens_a = [token for sentence in gathered[:cut] for token in sentence]
        is_random = int(len(gathered) == 1 or rng.random() < 0.5)
        if is_random:
            tokens_b = _random_text(documents, index, target - len(tokens_a), rng)
            position -= len(gathered) - cut  # use the sentences again that B did not take
        else:
            tokens_b = [token for sentence in gathered[cut:] for token in sentence]
        _trim(tokens_a, tokens_b, budget, rng)
        if tokens_a and tokens_b:
            yield tokens_a, tokens_b, is_random
        gathered, total = [], 0


def _random_text(documents: Sequence[TokenDocument], index: int, target: int, rng: random.Random) -> Tokens:
    """Consecutive sentences from a random place of another document, up to `target` tokens.

    A split of a single document draws from that document, as the reference does. There, a place too close to the document's
    end is drawn again.
    """
    if len(documents) == 1:
        tokens = _text_from_random_place(documents[0], target, rng)
        for _ in range(_TRIES - 1):
            if len(tokens) >= target:
                break
            tokens = _text_from_random_place(documents[0], target, rng)
        return tokens
    other = rng.randrange(len(documents) - 1)
    return _text_from_random_place(documents[other + (other >= index)], target, rng)


def _text_from_random_place(document: TokenDocument, target: int, rng: random.Random) -> Tokens:
    tokens: Tokens = []
    for position in range(rng.randrange(len(document)), len(document)):
        tokens.extend(document[position])
        if len(tokens) >= target:
            break
    return tokens


def _trim(tokens_a: Tokens, tokens_b: Tokens, budget: int, rng: random.Random) -> None:
    """Shorten the longer segment, one token at a time, at a random end (in place)."""
    front_a = front_b = 0
    end_a, end_b = len(tokens_a), len(tokens_b)
    while (end_a - front_a) + (end_b - front_b) > budget:
        at_front = rng.random() < 0.5
        if end_a - front_a > end_b - front_b:
            front_a, end_a = (front_a + 1, end_a) if at_front else (front_a, end_a - 1)
        else:
            front_b, end_b = (front_b + 1, end_b) if at_front else (front_b, end_b - 1)
    tokens_a[:] = tokens_a[front_a:end_a]
    tokens_b[:] = tokens_b[front_b:end_b]


def num_to_predict(lengths: np.ndarray, fraction: float, most: int | None = None) -> np.ndarray:
    """How many tokens of samples of these lengths (tokens, int [N]) are predicted, int64 [N]: the rule of `make_samples`.

    `fraction` of each sample's tokens to the nearest whole number, at least 1, at most `most`, and never one of its three
    special tokens.
    """
    lengths = np.asarray(lengths).astype(np.int64)
    count = np.maximum(1, np.rint(lengths * fraction).astype(np.int64))
    if most is not None:
        count = np.minimum(count, most)
    return np.minimum(count, np.maximum(0, lengths - 3))


def _mask(
    tokens_a: Tokens,
    tokens_b: Tokens,
    is_random: int,
    vocabulary: Vocabulary,
    params: SampleParams,
    rng: np.random.Generator,
) -> Sample:
    len_a = len(tokens_a) + 2
    ids = np.array([vocabulary.cls_id, *tokens_a, vocabulary.sep_id, *tokens_b, vocabulary.sep_id], dtype=np.uint16)
    length = len(ids)
    count = min(params.max_predictions, max(1, round(length * params.mask_prob)), length - 3)
    order = rng.permutation(length - 3)[:count]  # candidates: everything but the three special tokens
    positions = np.sort(order + 1 + (order >= len_a - 2))
    labels = ids[positions]
    action = rng.random(count)
    randoms = rng.integers(0, len(vocabulary), count, dtype=np.uint16)
    ids[positions] = np.where(action < 0.8, vocabulary.mask_id, np.where(action < 0.9, randoms, labels))
    return Sample(ids, len_a, positions.astype(np.uint16), labels, is_random)
