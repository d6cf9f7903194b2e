"""A store of pairs: the samples of a store (`data.store`) are pairs of texts, with hard negatives if there are any.

The record of a pair holds its texts end to end, query, positive, negatives, each `[CLS] tokens [SEP]`:

    input_ids        the tokens of all texts
    len_a            tokens of the query
    masked_positions where each text starts; so `num_masked` of a pair is its number of texts, the same in all of a store
    masked_labels    zeros
    is_random_next   0

The manifest has in addition `kind: pairs`, `texts_per_pair`, `max_text_length`, `sources` (pairs of a source are contiguous)
and `prefixes`. `groups.npy` (uint32, N) numbers groups of pairs with a text in common: no batch may hold two of a group, as
one's positive would be the other's negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bert_fast.data.samples import Sample
from bert_fast.data.store import DAMAGED, Part, Store, merge_parts, read_table
from bert_fast.errors import UserError

KIND = "pairs"
GROUPS = "groups.npy"
MOST_TOKENS = 65_535  # of a pair: a store's lengths have 16 bits


@dataclass(frozen=True)
class PairSource:
    """The pairs of a source in a store: pairs `first` to `first + num_pairs - 1`, and their weight in the draw."""

    name: str
    first: int
    num_pairs: int
    weight: float


def pair_sample(texts: Sequence[Sequence[int]], cls_id: int, sep_id: int) -> Sample:
    """The sample of a pair.

    Args:
        texts: token ids of query, positive and negatives, without special tokens.

    Raises:
        ValueError: a pair of more than `MOST_TOKENS` tokens.
    """
    framed = [np.array([cls_id, *text, sep_id], dtype=np.uint16) for text in texts]
    lengths = np.array([len(text) for text in framed])
    if lengths.sum() > MOST_TOKENS:
        raise ValueError(f"a pair of {lengths.sum():,} tokens, and a store holds at most {MOST_TOKENS:,}")
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.uint16)
    return Sample(np.concatenate(framed), len(framed[0]), starts, np.zeros(len(framed), np.uint16), 0)


def write_pair_store(
    folder: str | Path,
    parts: list[Part],
    groups: np.ndarray,
    sources: Sequence[PairSource],
    *,
    texts_per_pair: int,
    max_text_length: int,
    prefixes: dict[str, str],
    manifest: dict[str, Any],
) -> dict[str, Any]:
    """Join parts of pairs into a store in `folder`. Returns its manifest.

    Args:
        groups: uint32 [N], the group of every pair.
        sources: in the order of the parts' pairs, all of them together.
        max_text_length: tokens of the longest text, its special tokens included.
        prefixes: what stands before each `query` and each `key`.
        manifest: further entries, those of the vocabulary among them.

    Raises:
        UserError: as `merge_parts`.
    """
    own = {
        "kind": KIND,
        "texts_per_pair": texts_per_pair,
        "max_text_length": max_text_length,
        "sources": [asdict(source) for source in sources],
        "prefixes": prefixes,
    }
    return merge_parts(folder, parts, {**own, **manifest}, {GROUPS: groups.astype(np.uint32)})


class PairStore(Store):
    """Read access to a store of pairs.

    Attributes:
        groups: uint32 [N], memory-mapped; pairs of a group have a text in common.
        sources: in the order of their pairs.
        texts_per_pair: 2, and the hard negatives of a pair.
        max_text_length: tokens of the longest text.
        prefixes: what stands before each `query` and each `key`.
    """

    kind: ClassVar[str] = KIND
    command: ClassVar[str] = "scripts/prepare_pairs.py"

    def __init__(self, folder: str | Path) -> None:
        """Open `folder`. Raises UserError for a missing, foreign or truncated store, and for one that holds no pairs."""
        super().__init__(folder)
        manifest, path = self.manifest, self.folder / "manifest.json"
        if manifest.get("kind") != KIND:
            raise UserError(
                f"store {self.folder} holds pretraining samples and no pairs of texts; make pairs with: "
                f"python {self.command} --out {self.folder.parent}"
            )
        entries = {"texts_per_pair": int, "max_text_length": int, "sources": list, "prefixes": dict}
        for name, kind in entries.items():
            if not isinstance(manifest.get(name), kind):
                raise UserError(f"{path}: {name} is {manifest.get(name)!r:.100}; prepare the pairs again")
        self.texts_per_pair: int = manifest["texts_per_pair"]
        self.max_text_length: int = manifest["max_text_length"]
        self.prefixes: dict[str, str] = manifest["prefixes"]
        if self.texts_per_pair < 2 or manifest["num_masked"] != len(self) * self.texts_per_pair:
            raise UserError(
                f"{path}: {manifest['num_masked']} texts in {len(self)} pairs of {self.texts_per_pair}; prepare the pairs again"
            )
        self.sources = self._read_sources()
        try:
            self.groups = read_table(self.folder / GROUPS)
        except DAMAGED as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"store {self.folder} is damaged ({reason}); prepare the pairs again") from None
        if len(self.groups) != len(self):
            raise UserError(
                f"store {self.folder} is truncated: {len(self.groups)} groups of {len(self)} pairs; prepare the pairs again"
            )

    @property
    def longest_sequence(self) -> int:
        return self.max_text_length

    def _read_sources(self) -> tuple[PairSource, ...]:
        try:
            sources = tuple(
                PairSource(str(each["name"]), int(each["first"]), int(each["num_pairs"]), float(each["weight"]))
                for each in self.manifest["sources"]
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            sources = ()
        ends = np.cumsum([0, *(source.num_pairs for source in sources)]).tolist()
        fits = [source.first for source in sources] == ends[:-1] and ends[-1] == len(self)
        sound = all(each.num_pairs > 0 and math.isfinite(each.weight) and each.weight > 0 for each in sources)
        if not sources or not fits or not sound:
            raise UserError(
                f"{self.folder / 'manifest.json'}: sources are not {len(self)} pairs one after the other; prepare the pairs "
                "again"
            )
        return sources
