"""Many samples as arrays, between the padded features of foreign files and the records of the store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bert_fast.data.record import HEADER, read_headers, sections_of
from bert_fast.integers import segment_ids, segment_ranges

LONGEST = 2**16 - 1  # tokens of a sample; a store's lengths have 16 bits


@dataclass(frozen=True)
class SampleTable:
    """n samples end to end.

    tokens [sum of lengths], lengths [n], len_a [n] (tokens of the first segment), positions and labels [sum of num_masked],
    num_masked [n], is_random_next [n]; all int64.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    len_a: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    num_masked: np.ndarray
    is_random_next: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)


def check(table: SampleTable, vocab_size: int, first: int = 0) -> None:
    """Raise ValueError(index, reason) for the first invalid sample. `first` is the index of the table's first sample."""

    def refuse(bad: np.ndarray, owner: np.ndarray | None, reason: str) -> None:
        if bad.any():
            place = int(np.flatnonzero(bad)[0])
            raise ValueError(first + (place if owner is None else int(owner[place])), reason)

    of_token = segment_ids(table.lengths)
    of_mask = segment_ids(table.num_masked)
    refuse(table.lengths < 3, None, "has fewer than 3 tokens")
    refuse(table.lengths > LONGEST, None, f"has more than the {LONGEST:,} tokens that a store holds")
    refuse(
        (table.tokens < 0) | (table.tokens >= vocab_size),
        of_token,
        f"has a token outside the {vocab_size:,} of the vocabulary",
    )
    refuse(
        (table.labels < 0) | (table.labels >= vocab_size),
        of_mask,
        f"has a label outside the {vocab_size:,} of the vocabulary",
    )
    refuse((table.len_a < 1) | (table.len_a > table.lengths), None, "has segments that are not one A followed by one B")
    refuse(
        (table.positions < 0) | (table.positions >= table.lengths[of_mask]), of_mask, "masks a position beyond its end"
    )
    repeated = np.zeros(len(table.positions), bool)
    repeated[1:] = (np.diff(table.positions) <= 0) & (of_mask[1:] == of_mask[:-1])
    refuse(repeated, of_mask, "has masked positions that do not rise")
    refuse(
        (table.is_random_next < 0) | (table.is_random_next > 1), None, "has a next-sentence label other than 0 and 1"
    )


def from_padded(
    input_ids: np.ndarray,
    input_mask: np.ndarray,
    segment_ids: np.ndarray,
    positions: np.ndarray,
    labels: np.ndarray,
    num_masked: np.ndarray,
    next_sentence: np.ndarray,
    first: int = 0,
) -> SampleTable:
    """Samples from padded rows [n, S] and [n, P]; `num_masked` [n] is how many of the P are used.

    Raises:
        ValueError: (index, reason) of a sample whose mask or segments have another form than BERT's.
    """
    lengths, len_a = segments_of(input_mask, segment_ids, first)
    real = np.arange(input_ids.shape[1]) < lengths[:, None]
    counted = np.arange(positions.shape[1]) < num_masked[:, None]
    return SampleTable(
        input_ids[real].astype(np.int64),
        lengths,
        len_a,
        positions[counted].astype(np.int64),
        labels[counted].astype(np.int64),
        num_masked.astype(np.int64),
        next_sentence.ravel().astype(np.int64),
    )


def segments_of(input_mask: np.ndarray, segment_ids: np.ndarray, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`lengths` and `len_a`, int64 [n], from padded rows [n, S].

    Raises:
        ValueError: (index, reason) of a sample whose mask or segments have another form than BERT's.
    """
    lengths = np.count_nonzero(input_mask, axis=1)
    columns = np.arange(input_mask.shape[1], dtype=np.int32)
    real = columns < lengths[:, None].astype(np.int32)
    ones = (segment_ids == 1) & real
    len_a = lengths - np.count_nonzero(ones, axis=1)
    second = (columns >= len_a[:, None].astype(np.int32)) & real
    for bad, reason in (
        (input_mask != real, "has an input mask that is not ones followed by zeros"),
        ((ones != second) | ((segment_ids > 1) & real), "has segments that are not one A followed by one B"),
    ):
        if bad.any():
            raise ValueError(first + int(np.flatnonzero(bad.any(axis=1))[0]), reason)
    return lengths, len_a


def to_padded(table: SampleTable, width: int, most_masked: int) -> dict[str, np.ndarray]:
    """MLPerf's features by name, padded with zeros; int64, the weights float32."""
    real = np.arange(width) < table.lengths[:, None]
    counted = np.arange(most_masked) < table.num_masked[:, None]

    def padded(values: np.ndarray, where: np.ndarray) -> np.ndarray:
        rows = np.zeros(where.shape, np.int64)
        rows[where] = values
        return rows

    return {
        "input_ids": padded(table.tokens, real),
        "input_mask": real.astype(np.int64),
        "segment_ids": (real & (np.arange(width) >= table.len_a[:, None])).astype(np.int64),
        "masked_lm_positions": padded(table.positions, counted),
        "masked_lm_ids": padded(table.labels, counted),
        "masked_lm_weights": counted.astype(np.float32),
        "next_sentence_labels": table.is_random_next[:, None],
    }


def to_records(table: SampleTable) -> np.ndarray:
    """The samples' records end to end, uint16 (`data.record`)."""
    header = np.stack([table.len_a, table.num_masked, table.is_random_next], axis=1)
    pieces = (header.ravel(), table.positions, table.labels, table.tokens)
    counts = np.stack([np.full(len(table), HEADER), table.num_masked, table.num_masked, table.lengths], axis=1)
    piece_of = np.repeat(np.tile(np.arange(len(pieces), dtype=np.uint8), len(table)), counts.ravel())
    out = np.empty(len(piece_of), np.uint16)
    for number, values in enumerate(pieces):
        out[piece_of == number] = values
    return out


def from_records(records: np.ndarray, starts: np.ndarray, lengths: np.ndarray, num_masked: np.ndarray) -> SampleTable:
    """The inverse: samples whose records start at `starts` (int64 [n]) in `records` (uint16)."""
    lengths, num_masked = lengths.astype(np.int64), num_masked.astype(np.int64)
    headers, sections = read_headers(records, starts), sections_of(starts, num_masked)
    return SampleTable(
        tokens=records[segment_ranges(sections.tokens, lengths)].astype(np.int64),
        lengths=lengths,
        len_a=headers.len_a,
        positions=records[segment_ranges(sections.positions, num_masked)].astype(np.int64),
        labels=records[segment_ranges(sections.labels, num_masked)].astype(np.int64),
        num_masked=num_masked,
        is_random_next=headers.is_random_next,
    )
