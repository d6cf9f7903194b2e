"""The record of a sample in a store's `samples.bin`: uint16 numbers,

    len_a, number of masks M, is_random_next, M masked positions, M masked labels, L tokens

Nothing outside of this module knows this order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bert_fast.data.samples import Sample

HEADER = 3  # numbers before the masked positions


def pack_record(sample: Sample) -> np.ndarray:
    """A sample as its record, uint16 [HEADER + 2 M + L]."""
    header = np.array([sample.len_a, len(sample.masked_positions), sample.is_random_next], dtype=np.uint16)
    return np.concatenate([header, sample.masked_positions, sample.masked_labels, sample.input_ids])


def unpack_record(record: np.ndarray) -> Sample:
    """The sample in a record; its arrays are views into it."""
    labels = HEADER + int(record[1])
    tokens = labels + int(record[1])
    return Sample(
        input_ids=record[tokens:],
        len_a=int(record[0]),
        masked_positions=record[HEADER:labels],
        masked_labels=record[labels:tokens],
        is_random_next=int(record[2]),
    )


def record_sizes(lengths: np.ndarray, num_masked: np.ndarray) -> np.ndarray:
    """Numbers in the records of samples with so many tokens and masks, int64 [n]."""
    return HEADER + 2 * num_masked.astype(np.int64) + lengths.astype(np.int64)


class Headers(NamedTuple):
    """The headers of n records; int64 [n] each."""

    len_a: np.ndarray
    num_masked: np.ndarray
    is_random_next: np.ndarray


def read_headers(data: np.ndarray, starts: np.ndarray) -> Headers:
    """Headers of the records that start at `starts` (int64 [n]) in `data` (uint16)."""
    return Headers(*np.ascontiguousarray(data[starts[:, None] + np.arange(HEADER)].T, dtype=np.int64))


def num_masked_at(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Number of masks of the records that start at `starts` (int64 [n]) in `data`; uint16 [n]."""
    return data[starts + 1]


def count_random_next(data: np.ndarray, starts: np.ndarray) -> int:
    """How many of the records that start at `starts` (int64 [n]) in `data` have a B from another document."""
    return int(data[starts + 2].sum())


class Sections(NamedTuple):
    """Where the sections of n records begin; int64 [n] each."""

    positions: np.ndarray
    labels: np.ndarray
    tokens: np.ndarray


def sections_of(starts: np.ndarray, num_masked: np.ndarray) -> Sections:
    """Where the masked positions, the masked labels and the tokens begin of records that start at `starts` (int64 [n])."""
    positions = starts + HEADER
    return Sections(positions, positions + num_masked, positions + 2 * num_masked)
