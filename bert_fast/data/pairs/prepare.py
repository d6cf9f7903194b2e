"""Makes pair stores of sources: `out/train` and `out/eval`, which have no text in common.

    read     sources as a stream ─▶ pieces of about a MiB, tokenized in parallel ─▶ parts-pairs/000000.bin, keys of texts
    groups   pairs with a text in common; a hash of each group says whether it is held out
    stores   the parts' records, chosen by split ─▶ train/ and eval/

Nothing in `train` or `eval` is touched before all sources have been read and checked. Equal inputs give equal bytes, for any
number of processes.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.claims import claimed, remove_own
from bert_fast.data.corpora.base import Piece
from bert_fast.data.folders import PAIR_FILES, PAIRS, SPLITS
from bert_fast.data.pairs.groups import groups_of, held_out, numbered, text_key
from bert_fast.data.pairs.recipe import PairRecipe, find_reader
from bert_fast.data.pairs.sources.base import SourceOptions, TextPair
from bert_fast.data.pairs.store import PairSource, pair_sample, write_pair_store
from bert_fast.data.pool import Pool
from bert_fast.data.prepare import Log
from bert_fast.data.samples import Sample
from bert_fast.data.store import Part, picked, write_part, write_part_of_records
from bert_fast.data.text import whole_characters
from bert_fast.data.wordpiece import Vocabulary, WordCount, WordPiece, as_text, load_vocabulary
from bert_fast.errors import UserError
from bert_fast.files import write_atomically

PARTS = "parts-pairs"
_FEWEST = 2  # pairs of a source: the positive of one is the negative of another


@dataclass(frozen=True)
class Tokenization:
    """How texts become tokens.

    prefixes:    of the query, and of all other texts of a pair
    max_seq_len: tokens of a text, [CLS] and [SEP] included; a longer one is cut
    """

    vocab: str
    vocab_sha256: str
    cased: bool | None
    prefixes: tuple[str, str]
    max_seq_len: int


@dataclass(frozen=True)
class Negatives:
    """How many hard negatives a pair has: the first so many of those that are there, or exactly as many as in pair `like`."""

    count: int
    like: str | None = None

    def of(self, pair: TextPair) -> tuple[str, ...]:
        """The negatives of a pair that are kept. Raises UserError for a pair with another number."""
        found = len(pair.negatives)
        if self.like is not None and found != self.count:
            fewest = min(found, self.count)
            raise UserError(
                f"{pair.where}: {found} negatives, and {self.count} in {self.like}; --negatives {fewest} keeps the first "
                f"{fewest} of each pair"
            )
        if found < self.count:
            raise UserError(
                f"{pair.where}: {found} negatives, fewer than --negatives {self.count}; lower it or leave the pair out"
            )
        return pair.negatives[: self.count]


@dataclass(frozen=True)
class PairPart:
    """A part of a store with what is known of its pairs.

    keys:    uint64 [n, 2], of query and positive
    longest: uint16 [n], tokens of each pair's longest text
    """

    part: Part
    keys: np.ndarray
    longest: np.ndarray
    words: WordCount


def prepare_pairs(recipe: PairRecipe, num_workers: int | None = None, log: Log = print) -> dict[str, Any]:
    """Make the stores `out/train` and `out/eval` of a recipe, and `out/vocab.txt`. Returns their manifests by split.

    Raises:
        UserError: a source, a weight or the vocabulary is missing or wrong, a row is no pair, or there are too few pairs. Then
            nothing is written. Or the disk is full, another process is writing the folder, or it holds files of others.
    """
    start = time.perf_counter()
    sources = recipe.sources()
    weights = recipe.weights([source.name for source in sources])
    if recipe.vocab is None:
        raise UserError("no vocabulary; give --vocab FILE, the vocab.txt of a prepared folder or of a model")
    vocabulary = load_vocabulary(recipe.vocab)
    tokenization = Tokenization(
        recipe.vocab, vocabulary.sha256, recipe.cased, (recipe.query_prefix, recipe.key_prefix), recipe.max_seq_len
    )
    _check_prefixes(tokenization)
    out = Path(recipe.out)
    for source in sources:
        _check_place(source, out)
    keeps_vocab = Path(recipe.vocab).resolve() == (out / "vocab.txt").resolve()
    kind = replace(PAIRS, writes=tuple(name for name in PAIRS.writes if not (keeps_vocab and name == "vocab.txt")))
    with claimed(out, kind), _parts_folder(out), Pool(num_workers or recipe.workers or os.cpu_count() or 1) as pool:
        found = _read_sources(sources, recipe, tokenization, out / PARTS, pool, log)
        splits = _split(found, recipe, log)
        if not keeps_vocab:
            write_atomically(out / "vocab.txt", as_text(vocabulary.tokens))
        for split in SPLITS:  # two splits of different preparations could have a text in common
            (out / split / "manifest.json").unlink(missing_ok=True)
        manifests = {
            split: _write_split(split, ids, found, weights, recipe, tokenization, vocabulary, log)
            for split, ids in splits.items()
        }
    log(f"prepared {out} in {time.perf_counter() - start:.1f} s")
    return manifests


@contextmanager
def _parts_folder(out: Path) -> Iterator[None]:
    """Nothing is in the folder of parts before, and nothing after."""
    patterns = [f"{PARTS}/{name}" for name in PAIR_FILES]
    remove_own(out, patterns)
    try:
        yield
    finally:
        remove_own(out, patterns)


def _check_place(source: SourceOptions, out: Path) -> None:
    if source.path is not None and out.resolve() in Path(source.path).resolve().parents:
        name = Path(source.path).resolve().relative_to(out.resolve()).parts[0]
        if name in (*SPLITS, PARTS):
            raise UserError(f"source {source.name} lies in {out / name}, which is written; choose another --out")


def _check_prefixes(tokenization: Tokenization) -> None:
    for option, tokens in zip(("query", "key"), _prefix_tokens(tokenization), strict=True):
        if len(tokens) + 3 > tokenization.max_seq_len:
            raise UserError(
                f"--{option}-prefix takes {len(tokens)} tokens, and --max-seq-len {tokenization.max_seq_len} leaves no room "
                "for a text; raise it or shorten the prefix"
            )


# ---- read -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """All sources: their parts in order, the number of pairs of each, and their pairs' keys, groups and longest texts."""

    names: list[str]
    parts: list[Part]
    counts: list[int]
    keys: np.ndarray
    longest: np.ndarray
    is_kept: np.ndarray
    groups: np.ndarray
    words: WordCount
    texts_per_pair: int


def _read_sources(
    sources: list[SourceOptions], recipe: PairRecipe, tokenization: Tokenization, folder: Path, pool: Pool, log: Log
) -> _Read:
    negatives = _num_negatives(sources, recipe.negatives)
    numbers = count()
    parts: list[PairPart] = []
    counts, kept = [], []
    for source in sources:
        start = time.perf_counter()
        reader = find_reader(source.kind)
        jobs = (
            (str(folder / f"{number:06d}.bin"), source, piece, negatives, tokenization)
            for piece, number in zip(reader.pieces(source), numbers, strict=False)
        )
        mine = _logged(pool.map(_make_part, jobs), source.name, log)
        num_pairs = sum(each.part.num_samples for each in mine)
        is_kept = np.ones(num_pairs, dtype=bool)
        if reader.is_made and num_pairs:
            is_kept[:] = False
            is_kept[np.unique(np.concatenate([each.keys for each in mine]), axis=0, return_index=True)[1]] = True
        if is_kept.sum() < _FEWEST:
            raise UserError(
                f"source {source.name}: {_pairs(int(is_kept.sum()))}; at least {_FEWEST} are needed, as the positive of one is "
                "the negative of another; give more text, or leave the source out"
            )
        _check_words(sum((each.words for each in mine), WordCount()), recipe, source.name)
        twice = f", {num_pairs - int(is_kept.sum()):,} of them twice" if reader.is_made else ""
        log(f"{source.name}: {_pairs(num_pairs)}{twice} in {time.perf_counter() - start:.1f} s")
        parts += mine
        counts.append(num_pairs)
        kept.append(is_kept)
    keys, is_kept = np.concatenate([each.keys for each in parts]), np.concatenate(kept)
    groups = np.zeros(len(keys), dtype=np.int64)
    groups[is_kept] = groups_of(keys[is_kept])
    return _Read(
        [source.name for source in sources],
        [each.part for each in parts],
        counts,
        keys,
        np.concatenate([each.longest for each in parts]),
        is_kept,
        groups,
        sum((each.words for each in parts), WordCount()),
        2 + negatives.count,
    )


def _logged(results: Iterator[PairPart], name: str, log: Log) -> list[PairPart]:
    parts: list[PairPart] = []
    pairs, last_line, began = 0, time.perf_counter(), time.perf_counter()
    for each in results:
        parts.append(each)
        pairs += each.part.num_samples
        now = time.perf_counter()
        if now - last_line > 5:
            last_line = now
            log(f"{name}: {_pairs(pairs)}, {pairs / (now - began):,.0f} a second")
    return parts


def _num_negatives(sources: list[SourceOptions], wanted: int | None) -> Negatives:
    """The number of negatives of every pair: what `--negatives` says, else that of the first pair of the first source."""
    made = next((source for source in sources if find_reader(source.kind).is_made), None)
    if wanted is not None:
        if made is not None and wanted:
            raise UserError(
                f"--negatives {wanted}: source {made.name} of kind {made.kind} has no negatives; give --negatives 0"
            )
        return Negatives(wanted)
    if made is not None:
        return Negatives(0, f"source {made.name} of kind {made.kind}")
    source = sources[0]
    reader = find_reader(source.kind)
    first = next((pair for piece in reader.pieces(source) for pair in reader.read(piece, source)), None)
    return Negatives(len(first.negatives), first.where) if first else Negatives(0)


def _check_words(words: WordCount, recipe: PairRecipe, name: str) -> None:
    """Refuse text with too many words that are unknown to the vocabulary. Raises UserError."""
    share = words.unknown / max(1, words.words)
    if share > recipe.max_unknown:
        such_as = ", ".join(repr(word[:40]) for word in words.examples)
        raise UserError(
            f"source {name}: {share:.1%} of the words ({words.unknown:,} of {words.words:,}, such as {such_as}) are unknown to "
            f"the vocabulary {recipe.vocab}, more than --max-unknown {recipe.max_unknown}; give another --vocab, --cased or "
            "--no-cased, or raise the limit"
        )


def _pairs(number: int) -> str:
    return f"{number:,} pair{'' if number == 1 else 's'}"


# ---- in a worker ----------------------------------------------------------------------------------------------------


def _make_part(
    path: str, source: SourceOptions, piece: Piece, negatives: Negatives, tokenization: Tokenization
) -> PairPart:
    reader = find_reader(source.kind)
    pairs = list(reader.read(piece, source))
    texts = [[pair.query, pair.positive, *negatives.of(pair)] for pair in pairs]
    per_pair = 2 + negatives.count
    prefixes = [*tokenization.prefixes, *tokenization.prefixes[1:] * negatives.count]
    heads = [_prefix_tokens(tokenization)[min(1, index)] for index in range(per_pair)]
    tokenizer, vocabulary = _tokenizer(tokenization.vocab, tokenization.vocab_sha256, tokenization.cased)
    flat, words = tokenizer.encode_and_count(
        [prefix + whole_characters(text) for each in texts for prefix, text in zip(prefixes, each, strict=True)]
    )
    samples: list[Sample] = []
    keys: list[tuple[int, int]] = []
    longest: list[int] = []
    for index, pair in enumerate(pairs):
        tokens = [ids[: tokenization.max_seq_len - 2] for ids in flat[index * per_pair : (index + 1) * per_pair]]
        own = [_after(head, ids) for head, ids in zip(heads, tokens, strict=True)]
        empty = [place for place, ids in enumerate(own) if not ids]
        if empty and reader.is_made:
            continue
        if empty:
            what = ("query", "positive")[empty[0]] if empty[0] < 2 else f"negative {empty[0] - 1}"
            raise UserError(f"{pair.where}: the {what} is empty; write a text there, or leave the pair out")
        try:
            samples.append(pair_sample(tokens, vocabulary.cls_id, vocabulary.sep_id))
        except ValueError as error:
            raise UserError(f"{pair.where}: {error}; lower --max-seq-len or --negatives") from None
        keys.append((text_key(own[0]), text_key(own[1])))
        longest.append(max(map(len, tokens)) + 2)
    part = write_part(path, samples)
    return PairPart(part, np.array(keys, dtype=np.uint64).reshape(-1, 2), np.array(longest, dtype=np.uint16), words)


def _after(head: list[int], tokens: list[int]) -> list[int]:
    """The tokens of a text without those of its prefix."""
    return tokens[len(head) :] if tokens[: len(head)] == head else tokens


def _prefix_tokens(tokenization: Tokenization) -> list[list[int]]:
    """Tokens of the prefix of a query, and of that of another text."""
    tokenizer, _ = _tokenizer(tokenization.vocab, tokenization.vocab_sha256, tokenization.cased)
    return tokenizer.encode(list(tokenization.prefixes))


@functools.lru_cache(maxsize=2)
def _tokenizer(vocab: str, sha256: str, cased: bool | None) -> tuple[WordPiece, Vocabulary]:
    """One tokenizer per process and vocabulary; `sha256` is in the key, as the file may be replaced."""
    return WordPiece(vocab, cased), load_vocabulary(vocab)


# ---- write ----------------------------------------------------------------------------------------------------------


def _split(found: _Read, recipe: PairRecipe, log: Log) -> dict[str, np.ndarray]:
    """Ids of the pairs of each split, int64, ascending."""
    groups = found.groups[found.is_kept]
    sizes = np.bincount(groups)
    log(
        f"groups: {_pairs(len(groups))} in {len(sizes):,} groups without a text in common, the largest of {sizes.max():,}"
    )
    if len(sizes) < 2:
        raise UserError(
            f"all {_pairs(len(groups))} have a text in common with each other, so that none can be held out; give other pairs"
        )
    is_out = np.zeros(len(found.keys), dtype=bool)
    is_out[found.is_kept] = held_out(groups, found.keys[found.is_kept], recipe.eval_fraction, recipe.seed)
    ids = {"train": np.flatnonzero(found.is_kept & ~is_out), "eval": np.flatnonzero(is_out)}
    if len(ids["train"]) < _FEWEST:
        raise UserError(
            f"{_pairs(len(ids['train']))} left for training; at least {_FEWEST} are needed; give more pairs"
        )
    return ids


def _write_split(
    split: str,
    ids: np.ndarray,
    found: _Read,
    weights: dict[str, float] | None,
    recipe: PairRecipe,
    tokenization: Tokenization,
    vocabulary: Vocabulary,
    log: Log,
) -> dict[str, Any]:
    out = Path(recipe.out)
    ends = np.searchsorted(ids, np.cumsum(found.counts))
    sources: list[PairSource] = []
    for name, first, end in zip(found.names, [0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        if end > first:
            weight = weights[name] if weights else float(end - first)
            sources.append(PairSource(name, first, end - first, weight))
        else:
            log(f"{split}: no pair of source {name}")
    tokenizer, _ = _tokenizer(tokenization.vocab, tokenization.vocab_sha256, tokenization.cased)
    manifest = write_pair_store(
        out / split,
        [write_part_of_records(out / PARTS / f"{split}.bin", picked(found.parts, ids))],
        numbered(found.groups[ids]),
        sources,
        texts_per_pair=found.texts_per_pair,
        max_text_length=int(found.longest[ids].max()),
        prefixes={"query": recipe.query_prefix, "key": recipe.key_prefix},
        manifest={
            "num_groups": len(np.unique(found.groups[ids])),
            "vocab_sha256": vocabulary.sha256,
            "vocab_size": len(vocabulary),
            "mask_id": vocabulary.mask_id,
            **asdict(tokenizer.normalization),
            "num_words": found.words.words,
            "num_unknown_words": found.words.unknown,
            "params": {
                "max_seq_len": recipe.max_seq_len,
                "negatives": found.texts_per_pair - 2,
                "eval_fraction": recipe.eval_fraction,
                "seed": recipe.seed,
            },
        },
    )
    log(f"{split}: {_pairs(len(ids))}, {manifest['num_tokens']:,} tokens, {manifest['mean_length']:.0f} of a pair")
    return manifest
