"""From a corpus to two stores, in three restartable stages.

    text     sources, read in parallel ─▶ text/{train,eval}-00000.txt (MLCommons' form), split by document
    vocab    given, or trained on the training text ─▶ vocab.txt
    samples  every text file in parallel ─▶ token ids ─▶ parts ─▶ train/ and eval/ stores

Every stage leaves a stamp with the hash of what it was made from; a finished stage, or a finished part, is not made
again. The result does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from bert_fast.data import corpus as corpora
from bert_fast.data.pool import Pool
from bert_fast.data.samples import SampleParams, make_samples
from bert_fast.data.store import Part, merge_parts, read_part, take_first, write_part
from bert_fast.data.tokens import TokenizedText, TokenPart, merge_token_parts, read_token_part, tokenize_file
from bert_fast.data.wordpiece import (
    Vocabulary,
    WordCount,
    WordPiece,
    as_text,
    load_vocabulary,
    normalization_of,
    train_vocabulary,
)  # fmt: skip
from bert_fast.errors import UserError
from bert_fast.files import check_space, sha256_of, write_atomically, write_json

_TEXT_FILE_BYTES = 1 << 19
# Bytes of text, pieces, token ids and stores together over those of the sources, at ten passes. A compressed dump becomes
# five times as much text; a byte of text becomes about half a byte a pass, twice for a while, and a byte of token ids.
_SPACE = {"pydocs": 3, "prose": 13, "mlcommons": 13, "mediawiki": 22, "parquet": 22}
SPLITS = ("train", "eval")
_ALGORITHM = 2  # of samples: a store that an older one made is made anew


@dataclass(frozen=True)
class Recipe:
    """What to prepare. Two equal recipes over the same text give the same bytes."""

    corpus: str = "pydocs"
    input: str | None = None
    column: str = "text"
    packages: tuple[str, ...] = corpora.PYDOCS_PACKAGES
    vocab: str | None = None
    vocab_size: int = 2048
    eval_fraction: float = 0.02
    eval_max_samples: int | None = None
    params: SampleParams = field(default_factory=SampleParams)
    cased: bool | None = None  # None: as the vocabulary is; a trained one is then uncased
    max_unknown: float = 0.05  # share of the words

    def __post_init__(self) -> None:
        """Raises UserError for values outside of their range."""
        if not 0 < self.eval_fraction < 1:
            raise UserError(f"--eval-fraction {self.eval_fraction}: the share held out is above 0 and below 1")
        if not 0 <= self.max_unknown <= 1:
            raise UserError(f"--max-unknown {self.max_unknown}: a share of the words is between 0 and 1")
        if self.eval_max_samples is not None and self.eval_max_samples < 1:
            raise UserError(f"--eval-max-samples {self.eval_max_samples}: at least 1, or leave it out to keep all")
        if not 6 <= self.vocab_size <= 65536:
            raise UserError(f"--vocab-size {self.vocab_size}: between 6 and 65536, as ids of tokens have 16 bits")

    def text_key(self) -> dict[str, Any]:
        """What the text stage depends on."""
        packages = list(self.packages) if self.corpus == "pydocs" else []
        key = {
            "corpus": self.corpus, "input": self.input, "packages": packages, "eval_fraction": self.eval_fraction,
            "seed": self.params.seed,
        }  # fmt: skip
        return {**key, "column": self.column} if self.corpus == "parquet" else key


Log = Callable[[str], None]


def prepare(recipe: Recipe, out: str | Path, num_workers: int | None = None, log: Log = print) -> dict[str, Any]:
    """Make `out/train` and `out/eval`. Returns `{"train": manifest, "eval": manifest, "seconds": ...}`.

    Raises:
        UserError: unreadable or empty text, a bad vocabulary, a full disk. Finished work is kept for a restart.
    """
    start = time.perf_counter()
    if recipe.vocab is not None:
        load_vocabulary(recipe.vocab)  # a bad one is found before the long part
    out = Path(out)
    workers = num_workers or os.cpu_count() or 1
    with Pool(workers) as pool:
        text = _text_stage(recipe, out, pool, log)
        vocab_path = _vocab_stage(recipe, out, text, log)
        manifests = {split: _sample_stage(recipe, out, split, text, vocab_path, pool, log) for split in SPLITS}
    seconds = time.perf_counter() - start
    log(f"prepared {out} in {seconds:.1f} s")
    return {**manifests, "seconds": seconds}


def _stamp_matches(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    stamp: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stamp if stamp.get("key") == key else None


def _text_stage(recipe: Recipe, out: Path, pool: Pool, log: Log) -> dict[str, Any]:
    """Write the corpus as sentences, a line each. Returns the stamp: files, hashes and counts by split."""
    key, stamp_path = recipe.text_key(), out / "text" / "stamp.json"
    sources = corpora.list_sources(recipe.corpus, recipe.input, recipe.packages)
    key["sources"] = hashlib.sha256(
        "\n".join(f"{s.name} {(stat := os.stat(s.path)).st_size} {stat.st_mtime_ns}" for s in sources).encode()
    ).hexdigest()
    done = _stamp_matches(stamp_path, key)
    if done:
        log(f"text: {done['train']['documents']:,} + {done['eval']['documents']:,} documents, already there")
        return done
    start = time.perf_counter()
    shutil.rmtree(out / "text", ignore_errors=True)
    size = sum(os.path.getsize(source.path) for source in sources)
    check_space(out, int(_SPACE[recipe.corpus] * size), "the preparation")
    tag = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    pieces_folder = out / f"pieces-{tag}"
    for stale in out.glob("pieces-*"):
        if stale != pieces_folder:
            shutil.rmtree(stale)

    def documents() -> Iterator[tuple[str, list[str]]]:
        return _documents(recipe, sources, pieces_folder, pool, log)

    def by_hash() -> Iterator[tuple[str, list[str]]]:
        for identity, sentences in documents():
            held_out = corpora.is_held_out(identity, recipe.eval_fraction, recipe.params.seed)
            yield "eval" if held_out else "train", sentences

    counts = _write_splits(out, by_hash())
    missing = next((split for split in SPLITS if not counts[split]["documents"]), None)
    if missing:
        counts = _write_splits(out, _by_the_end(documents, missing, recipe, log))
    stamp = {"key": key, **counts}
    write_json(stamp_path, stamp)
    shutil.rmtree(pieces_folder, ignore_errors=True)
    megabytes, seconds = sum(stamp[s]["bytes"] for s in SPLITS) / 1e6, time.perf_counter() - start
    log(
        f"text: {len(sources):,} files -> {stamp['train']['documents']:,} + {stamp['eval']['documents']:,} documents, "
        f"{megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)"
    )
    return stamp


def _documents(
    recipe: Recipe, sources: list[corpora.Source], pieces_folder: Path, pool: Pool, log: Log
) -> Iterator[tuple[str, list[str]]]:
    """Every document in order: what decides its split, and its sentences. What was read once is read from its pieces."""
    seen: set[bytes] = set()
    pieces = corpora.list_pieces(recipe.corpus, sources, recipe.column)
    jobs = ((str(pieces_folder / f"{n:06d}.pickle"), recipe.corpus, piece) for n, piece in enumerate(pieces))
    start = last_line = time.perf_counter()
    documents_read = 0
    for documents in pool.map(_read_piece, jobs):
        documents_read += len(documents)
        if time.perf_counter() - last_line > 5:
            last_line = time.perf_counter()
            log(f"text: {documents_read:,} documents, {documents_read / (last_line - start):,.0f} a second")
        for origin, blocks in documents:
            kept = []
            for digest, sentences in blocks:
                if recipe.corpus == "pydocs":  # generated documentation repeats itself
                    if digest in seen:
                        continue
                    seen.add(digest)
                kept.extend(sentences)
            if kept:
                # A text that occurs twice goes to one side. Modules stay whole, so pydocs goes by the module's name.
                yield (origin if recipe.corpus == "pydocs" else blocks[0][0].hex()), kept


def _write_splits(out: Path, documents: Iterator[tuple[str, list[str]]]) -> dict[str, Any]:
    """Write documents, each with the name of its split. Returns each split's files, hash and counts."""
    writers = {split: _TextWriter(out / "text", split) for split in SPLITS}
    for split, sentences in documents:
        writers[split].add(sentences)
    return {split: writer.close() for split, writer in writers.items()}


_FEWEST_SENTENCES = 2  # of a split: a sample is a pair


def _by_the_end(
    documents: Callable[[], Iterator[tuple[str, list[str]]]], missing: str, recipe: Recipe, log: Log
) -> Iterator[tuple[str, list[str]]]:
    """Hold out the end of the text, where documents are so few that their hashes leave the split `missing` without any.

    The share is of sentences, so that a single document can be cut. A document that occurs again is left out: its end may
    be held out.
    """

    def once() -> Iterator[list[str]]:
        seen: set[bytes] = set()
        for _, sentences in documents():
            digest = hashlib.blake2b("\n".join(sentences).encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield sentences

    total = sum(len(sentences) for sentences in once())
    if total < 2 * _FEWEST_SENTENCES:
        where = f" (in {recipe.input})" if recipe.input else ""
        fix = (
            f"{total} sentences in all, and each split takes {_FEWEST_SENTENCES}; add text"
            if total
            else "is the text empty?"
        )
        raise UserError(f"corpus {recipe.corpus}: no document for the {missing} split; {fix}{where}")
    held_out = min(max(round(recipe.eval_fraction * total), _FEWEST_SENTENCES), total - _FEWEST_SENTENCES)
    log(
        f"text: no document's hash is in the {missing} split, as there are few; the last {held_out:,} of {total:,} "
        "sentences are held out instead"
    )
    left = total - held_out
    for sentences in once():
        for split, part in (("train", sentences[:left]), ("eval", sentences[left:])):
            if part:
                yield split, part
        left = max(0, left - len(sentences))


_Blocks = list[tuple[bytes, list[str]]]  # hash of a block, its sentences


def _read_piece(path: str, kind: str, piece: corpora.Piece) -> list[tuple[str, _Blocks]]:
    """Documents of a piece, kept in `path` until the stage is over: cleaning a whole Wikipedia is hours of work."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            return pickle.load(file)  # type: ignore[no-any-return]  # our own file
    documents = [
        (
            document.origin,
            [(hashlib.blake2b("\n".join(b).encode(), digest_size=16).digest(), b) for b in document.blocks],
        )
        for document in corpora.read_piece(kind, piece)
    ]
    write_atomically(path, pickle.dumps(documents))
    return documents


class _TextWriter:
    """Writes documents of one split to files of about half a MiB."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._lines: list[str] = []
        self._size = 0
        self.files: list[str] = []
        self._digest = hashlib.sha256()
        self._documents = self._sentences = self._bytes = 0

    def add(self, sentences: list[str]) -> None:
        text = "\n".join(sentences) + "\n\n"
        self._lines.append(text)
        self._size += len(text)
        self._documents += 1
        self._sentences += len(sentences)
        if self._size >= _TEXT_FILE_BYTES:
            self._flush()

    def _flush(self) -> None:
        content = "".join(self._lines).encode()
        name = f"{self._split}-{len(self.files):05d}.txt"
        write_atomically(self._folder / name, content)
        self._digest.update(content)
        self._bytes += len(content)
        self.files.append(name)
        self._lines, self._size = [], 0

    def close(self) -> dict[str, Any]:
        if self._lines:
            self._flush()
        return {
            "files": self.files, "documents": self._documents, "sentences": self._sentences, "bytes": self._bytes,
            "sha256": self._digest.hexdigest(),
        }  # fmt: skip


def _vocab_stage(recipe: Recipe, out: Path, text: dict[str, Any], log: Log) -> Path:
    path = out / "vocab.txt"
    if recipe.vocab is not None:
        vocabulary = load_vocabulary(recipe.vocab)
        write_atomically(path, as_text(vocabulary.tokens))
        normalization = normalization_of(vocabulary.tokens, recipe.cased)
        log(f"vocabulary: {len(vocabulary):,} tokens from {recipe.vocab} ({normalization})")
        return path
    key = {"text": text["train"]["sha256"], "size": recipe.vocab_size, "cased": bool(recipe.cased)}
    stamp_path = out / "vocab.stamp.json"
    if path.is_file() and _stamp_matches(stamp_path, key):
        log("vocabulary: already there")
        return path
    start = time.perf_counter()
    files = [out / "text" / name for name in text["train"]["files"]]
    train_vocabulary(files, recipe.vocab_size, path, cased=bool(recipe.cased))
    write_json(stamp_path, {"key": key})
    log(f"vocabulary: {len(load_vocabulary(path)):,} tokens trained in {time.perf_counter() - start:.1f} s")
    return path


def _sample_stage(
    recipe: Recipe, out: Path, split: str, text: dict[str, Any], vocab_path: Path, pool: Pool, log: Log
) -> dict[str, Any]:
    vocabulary = load_vocabulary(vocab_path)
    normalization = asdict(normalization_of(vocabulary.tokens, recipe.cased))
    key = {
        "algorithm": _ALGORITHM, "text": text[split]["sha256"], "vocab": vocabulary.sha256, **normalization,
        **recipe.params.as_dict(),
    }  # fmt: skip
    if split == "eval":
        key["eval_max_samples"] = recipe.eval_max_samples
    folder = out / split
    done = _stamp_matches(folder / "manifest.json", key)
    if done:
        _check_words(WordCount(done["num_words"], done["num_unknown_words"]), recipe, split, vocab_path)
        log(f"{split}: {done['num_samples']:,} samples, already there")
        return done
    start = time.perf_counter()
    tag = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    parts_folder = out / f"parts-{split}-{tag}"
    token_parts = _tokenize(recipe, out, text[split]["files"], vocab_path, parts_folder / "tokens", pool)
    words = sum((part.words for part in token_parts), WordCount())
    _check_words(words, recipe, split, vocab_path)
    log(f"{split}: {words.words:,} words, {words.unknown / max(1, words.words):.2%} of them unknown to the vocabulary")
    ends = list(accumulate(part.num_documents for part in token_parts))
    jobs = (
        (
            str(parts_folder / "tokens"), str(vocab_path), recipe.params, chunk, range(begin, end),
            str(parts_folder / f"{chunk:05d}.bin"),
        )
        for chunk, (begin, end) in enumerate(pairwise([0, *ends]))
    )  # fmt: skip
    parts: list[Part] = []
    samples = 0
    last_line = start
    for part in pool.map(_make_part, jobs):
        parts.append(part)
        samples += part.num_samples
        now = time.perf_counter()
        if now - last_line > 5:
            last_line = now
            log(f"{split}: {len(parts)}/{len(text[split]['files'])} files, {samples / (now - start):,.0f} samples/s")
    if split == "eval" and recipe.eval_max_samples:
        parts = take_first(parts, recipe.eval_max_samples, parts_folder)
    manifest = merge_parts(
        folder, parts,
        {
            "key": key, "corpus": recipe.corpus, "text_sha256": text[split]["sha256"],
            "documents": text[split]["documents"], "vocab_sha256": vocabulary.sha256, "vocab_size": len(vocabulary),
            "mask_id": vocabulary.mask_id, **normalization, "num_words": words.words,
            "num_unknown_words": words.unknown,
            "params": asdict(recipe.params),
        },
    )  # fmt: skip
    shutil.rmtree(parts_folder, ignore_errors=True)
    seconds = time.perf_counter() - start
    log(
        f"{split}: {manifest['num_samples']:,} samples, {manifest['num_tokens']:,} tokens, mean length "
        f"{manifest['mean_length']:.0f} in {seconds:.1f} s ({manifest['num_samples'] / seconds:,.0f} samples/s)"
    )
    return manifest


def _tokenize(
    recipe: Recipe, out: Path, names: list[str], vocab_path: Path, folder: Path, pool: Pool
) -> list[TokenPart]:
    """The token ids of a split's text files, in parallel, put together in `folder`: samples take text from all of it."""
    jobs = (
        (str(out / "text" / name), str(vocab_path), recipe.cased, str(folder / f"{n:05d}.npz"))
        for n, name in enumerate(names)
    )
    parts = list(pool.map(_make_token_part, jobs))
    merge_token_parts(folder, parts)
    return parts


def _make_token_part(text_path: str, vocab_path: str, cased: bool | None, part_path: str) -> TokenPart:
    return read_token_part(part_path) or tokenize_file(text_path, _tokenizer(vocab_path, cased)[0], part_path)


def _check_words(words: WordCount, recipe: Recipe, split: str, vocab_path: Path) -> None:
    """Refuse text that the vocabulary cannot write: each unknown word becomes [UNK]. Raises UserError."""
    share = words.unknown / max(1, words.words)
    if share <= recipe.max_unknown:
        return
    such_as = f", such as {', '.join(repr(word[:40]) for word in words.examples)}" if words.examples else ""
    fix = "another --vocab, --cased or --no-cased" if recipe.vocab else "a larger --vocab-size"
    raise UserError(
        f"{split}: {share:.1%} of the words ({words.unknown:,} of {words.words:,}{such_as}) are unknown to the vocabulary "
        f"{recipe.vocab or vocab_path}, more than --max-unknown {recipe.max_unknown}; give {fix}, or raise the limit"
    )


def _make_part(
    tokens_folder: str, vocab_path: str, params: SampleParams, chunk: int, chosen: range, part_path: str
) -> Part:
    finished = read_part(part_path)
    if finished:
        return finished
    vocabulary = _tokenizer(vocab_path)[1]
    return write_part(part_path, make_samples(TokenizedText(tokens_folder), vocabulary, params, chunk, chosen))


_TOKENIZERS: dict[tuple[str, bool | None], tuple[WordPiece, Vocabulary]] = {}


def _tokenizer(vocab_path: str, cased: bool | None = None) -> tuple[WordPiece, Vocabulary]:
    """One tokenizer a process, made at first use (keyed by content: the file may be replaced)."""
    key = sha256_of(vocab_path), cased
    if key not in _TOKENIZERS:
        _TOKENIZERS[key] = (WordPiece(vocab_path, cased), load_vocabulary(vocab_path))
    return _TOKENIZERS[key]
