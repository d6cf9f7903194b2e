"""Turns a corpus into two stores, in three restartable stages.

    text     sources, read in parallel ─▶ text/{train,eval}-00000.txt (MLCommons' form), split by document
    vocab    given, or trained on the training text ─▶ vocab.txt
    samples  every text file in parallel ─▶ token ids ─▶ parts ─▶ train/ and eval/ stores

Every stage leaves a stamp with the hash of what it was made from. A finished stage, or a finished part, is not made again.
The result does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from bert_fast.claims import claimed, owner_of, remove_own
from bert_fast.data import corpus as corpora
from bert_fast.data.corpora.base import AUTO, Found, Piece, counted
from bert_fast.data.folders import (
    PART_FILES,
    PARTS_FOLDER,
    PIECE_FILES,
    PIECES_FOLDER,
    PREPARATION,
    SPLITS,
    TEXT_FILES,
    check_inputs,
)
from bert_fast.data.overlap import note_shared_text
from bert_fast.data.pool import Pool
from bert_fast.data.samples import SampleParams, make_samples
from bert_fast.data.store import Part, Store, merge_parts, read_part, take_evenly, take_first, write_part
from bert_fast.data.tokens import TokenizedText, TokenPart, merge_token_parts, read_token_part, tokenize_file
from bert_fast.data.wordpiece import (
    Vocabulary,
    WordCount,
    WordPiece,
    as_text,
    load_vocabulary,
    normalization_of,
    train_vocabulary,
)
from bert_fast.errors import UserError
from bert_fast.files import check_space, sha256_of, write_atomically, write_json

TEXT_FILE_BYTES = 1 << 19
"""Characters of a text file, after which the next sentence begins another one."""
_ALGORITHM = 2  # of samples: a store that an older one made is made anew
PICKS = ("first", "evenly")


@dataclass(frozen=True)
class Recipe:
    """What to prepare. Equal recipes over the same text give the same bytes."""

    corpus: str = "pydocs"
    input: str | None = None
    column: str = "text"
    packages: tuple[str, ...] = corpora.PYDOCS_PACKAGES
    vocab: str | None = None
    vocab_size: int = 2048
    eval_fraction: float = 0.02
    eval_max_samples: int | None = None
    params: SampleParams = field(default_factory=SampleParams)
    cased: bool | None = None  # None: as the vocabulary is; one that is trained is then uncased
    max_unknown: float = 0.05  # share of the words
    language: str = AUTO  # whose rules end sentences; `auto` tells it from each text
    eval_input: str | None = None  # text of the evaluation split alone, in place of a held-out share
    eval_pick: str = (
        "first"  # samples that `eval_max_samples` keeps: the first, or evenly spread as MLPerf's reference does
    )

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        if not 0 < self.eval_fraction < 1:
            raise UserError(f"--eval-fraction {self.eval_fraction}: the share held out is above 0 and below 1")
        if not 0 <= self.max_unknown <= 1:
            raise UserError(f"--max-unknown {self.max_unknown}: a share of the words is between 0 and 1")
        if self.eval_max_samples is not None and self.eval_max_samples < 1:
            raise UserError(f"--eval-max-samples {self.eval_max_samples}: at least 1, or leave it out to keep all")
        if not 6 <= self.vocab_size <= 65536:
            raise UserError(f"--vocab-size {self.vocab_size}: between 6 and 65536, as ids of tokens have 16 bits")
        if self.eval_pick not in PICKS:
            raise UserError(f"--eval-pick {self.eval_pick}: give {' or '.join(PICKS)}")
        if self.eval_pick != "first" and not self.eval_max_samples:
            raise UserError(f"--eval-pick {self.eval_pick} needs --eval-max-samples, the number of samples to pick")
        if self.eval_input is not None and corpora.find_corpus(self.corpus).reads_packages:
            raise UserError(
                f"--eval-input: corpus {self.corpus} has no text but that of packages; choose another --corpus"
            )
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9-]+)?|auto", self.language):
            raise UserError(f"--language {self.language}: give a code such as en, de or zh, or auto")

    def text_key(self) -> dict[str, Any]:
        """What the text stage depends on."""
        corpus = corpora.find_corpus(self.corpus)
        packages = list(self.packages) if corpus.reads_packages else []
        key = {
            "corpus": self.corpus,
            "input": self.input,
            "packages": packages,
            "eval_fraction": self.eval_fraction,
            "seed": self.params.seed,
        }
        if corpus.reads_column:
            key["column"] = self.column
        if not corpus.reads_packages:
            key["language"] = self.language
        return {**key, "eval_input": self.eval_input} if self.eval_input else key


Log = Callable[[str], None]


def prepare(recipe: Recipe, out: str | Path, num_workers: int | None = None, log: Log = print) -> dict[str, Any]:
    """Make `out/train` and `out/eval`. Returns `{"train": manifest, "eval": manifest, "seconds": ...}`.

    Raises:
        UserError: unreadable or empty text, a bad vocabulary, or a full disk (finished work is kept for a restart); or another
            process is writing the folder, or it has files of others that this one would overwrite.
    """
    start = time.perf_counter()
    if recipe.vocab is not None:
        load_vocabulary(recipe.vocab)  # finds a bad vocabulary before hours of work
    out = Path(out)
    workers = num_workers or os.cpu_count() or 1
    check_inputs(out, (recipe.input, recipe.eval_input))
    with _claimed(out, recipe), Pool(workers) as pool:
        text = text_stage(recipe, out, pool, log)
        vocab_path = _vocab_stage(recipe, out, text, log)
        manifests = {split: _sample_stage(recipe, out, split, text, vocab_path, pool, log) for split in SPLITS}
        shared = note_shared_text(Store(out / "train"), Store(out / "eval"))
        manifests["eval"] = Store(out / "eval").manifest
    if shared.found:
        log(f"eval: {shared.found:,} of {shared.compared:,} samples are of text that the training store has as well")
    seconds = time.perf_counter() - start
    log(f"prepared {out} in {seconds:.1f} s")
    return {**manifests, "seconds": seconds}


@contextlib.contextmanager
def _claimed(out: Path, recipe: Recipe) -> Iterator[None]:
    """Claim the folder and its stores while the block runs. Raises UserError."""
    given = recipe.vocab is not None and Path(recipe.vocab).resolve() == (out / "vocab.txt").resolve()
    kind = replace(
        PREPARATION, writes=tuple(name for name in PREPARATION.writes if not (given and name == "vocab.txt"))
    )
    _check_stores_are_free(out)
    with claimed(out, kind):
        _check_stores_are_free(out)  # if an import began meanwhile, at least one of the two has seen the other
        yield


def _check_stores_are_free(out: Path) -> None:
    for split in SPLITS:
        owner = owner_of(out / split)
        if owner:
            raise UserError(f"{out / split} is in use by {owner}; wait for it, stop it, or choose another --out")


def _stamp_matches(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    stamp: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stamp if stamp.get("key") == key else None


def text_stage(recipe: Recipe, out: Path, pool: Pool, log: Log) -> dict[str, Any]:
    """The first stage: write the corpus to `out/text` as one sentence per line, unless it is there already.

    Returns:
        The stamp: files, hashes and counts by split, and what was left out.

    Raises:
        UserError: as `prepare`, of what concerns the text.
    """
    key, stamp_path = recipe.text_key(), out / "text" / "stamp.json"
    found = _sources(recipe)
    sources = [*found.sources, *found.evaluation]
    key["sources"] = hashlib.sha256(
        "\n".join(f"{s.name} {(stat := os.stat(s.path)).st_size} {stat.st_mtime_ns}" for s in sources).encode()
    ).hexdigest()
    done = _stamp_matches(stamp_path, key)
    if done:
        log(f"text: {done['train']['documents']:,} + {done['eval']['documents']:,} documents, already there")
        _log_left_out(done, log)
        return done
    start = time.perf_counter()
    remove_own(out, TEXT_FILES)
    check_space(
        out, int(corpora.find_corpus(recipe.corpus).space * sum(map(corpora.num_bytes, sources))), "the preparation"
    )
    tag = hashlib.sha256(json.dumps(["stretches", key], sort_keys=True).encode()).hexdigest()[:12]
    pieces_folder = out / f"pieces-{tag}"
    for stale in out.glob(PIECES_FOLDER):
        if stale != pieces_folder:
            remove_own(out, [f"{stale.name}/{name}" for name in PIECE_FILES])

    def documents() -> Iterator[tuple[_Read, bool]]:
        """Every document, or stretch of one, and whether it is evaluation text. The second time from the kept pieces."""
        number, last_line, count, began = 0, time.perf_counter(), 0, time.perf_counter()
        for is_evaluation, part in ((False, found.sources), (True, found.evaluation)):
            pieces = enumerate(corpora.list_pieces(recipe.corpus, part, recipe.column), number)
            jobs = (
                (str(pieces_folder / f"{n:06d}.json"), recipe.corpus, piece, recipe.language) for n, piece in pieces
            )
            for read in pool.map(_read_piece, jobs):
                number += 1
                for document in read:
                    count += not document[2]
                    yield document, is_evaluation
                if time.perf_counter() - last_line > 5:
                    last_line = time.perf_counter()
                    log(f"text: {count:,} documents, {count / (last_line - began):,.0f} a second")

    splitter = _Splitter(recipe, out / "text", found)
    for document, is_evaluation in documents():
        splitter.add(*document, is_evaluation)
    stamp = {"key": key, **splitter.close()}
    _log_left_out(stamp, log)
    missing = next((split for split in SPLITS if not stamp[split]["documents"]), None)
    if missing and found.evaluation:
        where = recipe.eval_input if missing == "eval" and recipe.eval_input else recipe.input
        raise UserError(f"corpus {recipe.corpus}: no document for the {missing} split; is the text empty? (in {where})")
    if missing:
        remove_own(out, TEXT_FILES)
        stamp |= _split_at_the_end(documents, missing, recipe, out / "text", log)
    write_json(stamp_path, stamp)
    remove_own(out, [f"{pieces_folder.name}/{name}" for name in PIECE_FILES])
    megabytes, seconds = sum(stamp[s]["bytes"] for s in SPLITS) / 1e6, time.perf_counter() - start
    log(
        f"text: {len(sources):,} files -> {stamp['train']['documents']:,} + {stamp['eval']['documents']:,} documents, "
        f"{megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)"
    )
    return stamp


def _sources(recipe: Recipe) -> Found:
    """Sources of both splits: a given evaluation text takes the place of one that lies beside the text."""
    found = corpora.find_sources(recipe.corpus, recipe.input, recipe.packages)
    if recipe.eval_input is None:
        return found
    given = corpora.find_sources(recipe.corpus, recipe.eval_input)
    evaluation = [*given.sources, *given.evaluation]
    same = {os.path.realpath(source.path) for source in evaluation}
    # The given text may be in the folder of the other
    sources = [source for source in found.sources if os.path.realpath(source.path) not in same]
    if not sources:
        raise UserError(f"--eval-input {recipe.eval_input} is all the text there is in {recipe.input}; give other text")
    left_out = dict(found.left_out)
    for why, names in given.left_out.items():
        left_out[why] = sorted({*left_out.get(why, []), *names})
    beside = [source.name for source in found.evaluation if os.path.realpath(source.path) not in same]
    if beside:
        left_out["evaluation texts other than that of --eval-input"] = beside
    return Found(sources, evaluation, left_out)


def _log_left_out(stamp: dict[str, Any], log: Log) -> None:
    """Log one line for all that is not in the text, and one for documents on both sides, if there are any."""
    left_out = stamp.get("left_out", {"files": {}, "documents": {}})
    if any(left_out.values()):
        numbers = [
            counted(sum(entry["count"] for entry in entries.values()), what) for what, entries in left_out.items()
        ]
        why = [
            counted(entry["count"], reason, entry["first"])
            for entries in left_out.values()
            for reason, entry in entries.items()
        ]
        log(f"text: {' and '.join(numbers)} left out: {'; '.join(why)}")
    if stamp.get("on_both_sides"):
        log(f"text: {counted(stamp['on_both_sides'], 'documents')} both in the training and in the evaluation text")


_Blocks = list[tuple[bytes, list[str]]]  # hash of a block, its sentences
_Read = tuple[
    str, _Blocks, bool, str
]  # origin, blocks, whether the next one is the rest of this one, why there are no blocks


def _read_piece(path: str, kind: str, piece: Piece, language: str) -> list[_Read]:
    """Documents of a piece, kept in `path` until the stage is over: cleaning a whole Wikipedia is hours of work."""
    finished = _stored_piece(path)
    if finished is not None:
        return finished
    documents = [
        (
            document.origin,
            [(hashlib.blake2b("\n".join(b).encode(), digest_size=16).digest(), b) for b in document.blocks],
            document.goes_on,
            document.left_out,
        )
        for document in corpora.read_piece(kind, piece, language)
    ]
    stored = [
        [origin, [[digest.hex(), sentences] for digest, sentences in blocks], goes_on, left_out]
        for origin, blocks, goes_on, left_out in documents
    ]
    write_atomically(path, json.dumps(stored, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return documents


def _stored_piece(path: str) -> list[_Read] | None:
    """A piece that was kept, as JSON, which runs no code. None if it does not exist or is damaged, and must be made again."""
    try:
        stored = json.loads(Path(path).read_bytes().decode("utf-8", "surrogatepass"))
        return [
            (
                str(origin),
                [(bytes.fromhex(digest), [str(line) for line in sentences]) for digest, sentences in blocks],
                bool(goes_on),
                str(left_out),
            )
            for origin, blocks, goes_on, left_out in stored
        ]
    except (OSError, ValueError, TypeError):
        return None


class _Splitter:
    """Distributes documents to the two splits. All stretches of a long document go to the same one."""

    _NAMED = 5  # of what is left out for one reason

    def __init__(self, recipe: Recipe, folder: Path, found: Found) -> None:
        self._recipe, self._found = recipe, found
        self._writers = {split: _TextWriter(folder, split) for split in SPLITS}
        self._keep = _Unrepeated(recipe)
        self._left_out: dict[str, dict[str, Any]] = {}
        self._side = ""  # split of the document whose rest is to come, once some of it was kept
        self._train: set[bytes] = set()  # hashes, if the evaluation text was given and may repeat it
        self._both = 0

    def add(self, origin: str, blocks: _Blocks, goes_on: bool, left_out: str, is_evaluation: bool) -> None:
        """Add the next document, or stretch of one."""
        kept = self._keep.of(blocks)
        if kept and not self._side:
            self._side = self._choose_side(origin, blocks[0][0], is_evaluation)
        if self._side and (kept or not goes_on):
            self._writers[self._side].add(kept, goes_on)
        if not goes_on:
            if not self._side and left_out:
                entry = self._left_out.setdefault(left_out, {"count": 0, "first": []})
                entry["count"] += 1
                entry["first"] += [origin] if len(entry["first"]) < self._NAMED else []
            self._side = ""

    def _choose_side(self, origin: str, digest: bytes, is_evaluation: bool) -> str:
        if self._found.evaluation:
            if is_evaluation:
                self._both += digest in self._train
                return "eval"
            self._train.add(digest)
            return "train"
        # A text that occurs twice goes to one side. Modules of packages stay whole, so they go by their name.
        identity = origin if corpora.find_corpus(self._recipe.corpus).reads_packages else digest.hex()
        held_out = corpora.is_held_out(identity, self._recipe.eval_fraction, self._recipe.params.seed)
        return "eval" if held_out else "train"

    def close(self) -> dict[str, Any]:
        """Finish the files. Returns the stamp's entries about the text."""
        files = {
            why: {"count": len(names), "first": names[: self._NAMED]} for why, names in self._found.left_out.items()
        }
        return {
            **{split: writer.close() for split, writer in self._writers.items()},
            "left_out": {"files": files, "documents": self._left_out},
            "on_both_sides": self._both,
        }


_FEWEST_SENTENCES = 2  # of a split, as a sample is a pair
_Documents = Callable[[], Iterator[tuple[_Read, bool]]]


def _split_at_the_end(documents: _Documents, missing: str, recipe: Recipe, folder: Path, log: Log) -> dict[str, Any]:
    """Hold out the end of the text, as there are so few documents that their hashes put none into the split `missing`.

    The share is one of sentences, so that a single document can be cut. A repeated document is left out, as its end may
    be held out.

    Returns:
        Files, hash and counts of each split.
    """
    sizes = _sizes_of_new(documents, recipe)
    total = sum(sizes)
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
    writers = {split: _TextWriter(folder, split) for split in SPLITS}
    number, left, open_side = 0, total - held_out, ""
    keep = _Unrepeated(recipe)
    for (_, blocks, goes_on, _), _ in documents():
        sentences = keep.of(blocks) if sizes[number] else []
        for side, part in (("train", sentences[:left]), ("eval", sentences[left:])):
            if part:
                if open_side and open_side != side:
                    writers[open_side].add([])  # the document ends here, and its rest is another document
                writers[side].add(part, goes_on=True)
                open_side = side
        left = max(0, left - len(sentences))
        if not goes_on:
            if open_side:
                writers[open_side].add([])
            number, open_side = number + 1, ""
    return {split: writer.close() for split, writer in writers.items()}


def _sizes_of_new(documents: _Documents, recipe: Recipe) -> list[int]:
    """Number of sentences of every document; 0 for a repeated one."""
    sizes: list[int] = []
    seen: set[bytes] = set()
    keep = _Unrepeated(recipe)
    digest, size = hashlib.blake2b(digest_size=16), 0
    for (_, blocks, goes_on, _), _ in documents():
        for sentence in keep.of(blocks):
            digest.update(sentence.encode("utf-8", "surrogatepass") + b"\n")
            size += 1
        if not goes_on:
            sizes.append(0 if digest.digest() in seen else size)
            seen.add(digest.digest())
            digest, size = hashlib.blake2b(digest_size=16), 0
    return sizes


class _Unrepeated:
    """Takes the sentences out of blocks. Of pydocs, which repeat themselves, every block is taken once."""

    def __init__(self, recipe: Recipe) -> None:
        self._seen: set[bytes] | None = set() if corpora.find_corpus(recipe.corpus).reads_packages else None

    def of(self, blocks: _Blocks) -> list[str]:
        kept: list[str] = []
        for digest, sentences in blocks:
            if self._seen is not None:
                if digest in self._seen:
                    continue
                self._seen.add(digest)
            kept.extend(sentences)
        return kept


class _TextWriter:
    """Writes documents of one split to files of about half a MiB."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._lines: list[str] = []
        self._size = 0
        self.files: list[str] = []
        self._digest = hashlib.sha256()
        self._documents = self._sentences = self._bytes = 0

    def add(self, sentences: list[str], goes_on: bool = False) -> None:
        if (
            sentences and self._size >= TEXT_FILE_BYTES
        ):  # before adding and not after, so that the end of a document stays with it
            self._flush()
        text = "".join(f"{sentence}\n" for sentence in sentences) + ("" if goes_on else "\n")
        self._lines.append(text)
        self._size += len(text)
        self._documents += not goes_on
        self._sentences += len(sentences)

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
            "files": self.files,
            "documents": self._documents,
            "sentences": self._sentences,
            "bytes": self._bytes,
            "sha256": self._digest.hexdigest(),
        }


def _vocab_stage(recipe: Recipe, out: Path, text: dict[str, Any], log: Log) -> Path:
    path, new = out / "vocab.txt", out / f".vocab.txt.{os.getpid()}.tmp"
    if recipe.vocab is not None:
        vocabulary = load_vocabulary(recipe.vocab)
        content = as_text(vocabulary.tokens).encode()
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(new, content)
            _put_vocabulary(out, new, {"given": vocabulary.sha256})
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
    train_vocabulary(files, recipe.vocab_size, new, cased=bool(recipe.cased))
    _put_vocabulary(out, new, key)
    log(f"vocabulary: {len(load_vocabulary(path)):,} tokens trained in {time.perf_counter() - start:.1f} s")
    return path


def _put_vocabulary(out: Path, new: Path, key: dict[str, Any]) -> None:
    """Rename a whole new file to vocab.txt. Raises UserError if that is a file that somebody else wrote or changed."""
    path, stamp_path = out / "vocab.txt", out / "vocab.stamp.json"
    try:
        stamp = json.loads(stamp_path.read_text(encoding="utf-8"))
        is_ours = "sha256" not in stamp or stamp["sha256"] == sha256_of(path)  # older stamps have no hash
    except (OSError, ValueError, TypeError):
        is_ours = False
    if path.exists() and not is_ours:
        new.unlink()
        raise UserError(
            f"{path} is not as this command wrote it; move it, name it with --vocab, or choose another --out"
        )
    path.unlink(missing_ok=True)
    # Before the rename: if this process is killed in between, the file is still known as ours
    write_json(stamp_path, {"key": key, "sha256": sha256_of(new)})
    os.replace(new, path)


def _sample_stage(
    recipe: Recipe, out: Path, split: str, text: dict[str, Any], vocab_path: Path, pool: Pool, log: Log
) -> dict[str, Any]:
    vocabulary = load_vocabulary(vocab_path)
    normalization = asdict(normalization_of(vocabulary.tokens, recipe.cased))
    key = {
        "algorithm": _ALGORITHM,
        "text": text[split]["sha256"],
        "vocab": vocabulary.sha256,
        **normalization,
        **recipe.params.as_dict(),
    }
    if split == "eval":
        key["eval_max_samples"] = recipe.eval_max_samples
        if recipe.eval_pick != "first":
            key["eval_pick"] = recipe.eval_pick
    folder = out / split
    done = _stamp_matches(folder / "manifest.json", key)
    if done:
        _check_words(WordCount(done["num_words"], done["num_unknown_words"]), recipe, split, vocab_path)
        log(f"{split}: {done['num_samples']:,} samples, already there")
        return done
    start = time.perf_counter()
    tag = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    parts_folder = out / f"parts-{split}-{tag}"
    for stale in out.glob(PARTS_FOLDER.format(split)):
        if stale != parts_folder:
            remove_own(out, [f"{stale.name}/{name}" for name in PART_FILES])
    token_parts = _tokenize(recipe, out, text[split]["files"], vocab_path, parts_folder / "tokens", pool)
    words = sum((part.words for part in token_parts), WordCount())
    _check_words(words, recipe, split, vocab_path)
    log(f"{split}: {words.words:,} words, {words.unknown / max(1, words.words):.2%} of them unknown to the vocabulary")
    ends = list(accumulate(part.num_documents for part in token_parts))
    jobs = (
        (
            str(parts_folder / "tokens"),
            str(vocab_path),
            recipe.params,
            chunk,
            range(begin, end),
            str(parts_folder / f"{chunk:05d}.bin"),
        )
        for chunk, (begin, end) in enumerate(pairwise([0, *ends]))
    )
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
        take = take_first if recipe.eval_pick == "first" else take_evenly
        parts = take(parts, recipe.eval_max_samples, parts_folder)
    manifest = merge_parts(
        folder,
        parts,
        {
            "key": key,
            "corpus": recipe.corpus,
            "text_sha256": text[split]["sha256"],
            "documents": text[split]["documents"],
            "vocab_sha256": vocabulary.sha256,
            "vocab_size": len(vocabulary),
            "mask_id": vocabulary.mask_id,
            **normalization,
            "num_words": words.words,
            "num_unknown_words": words.unknown,
            "params": asdict(recipe.params),
        },
    )
    remove_own(out, [f"{parts_folder.name}/{name}" for name in PART_FILES])
    seconds = time.perf_counter() - start
    log(
        f"{split}: {manifest['num_samples']:,} samples, {manifest['num_tokens']:,} tokens, mean length "
        f"{manifest['mean_length']:.0f} in {seconds:.1f} s ({manifest['num_samples'] / seconds:,.0f} samples/s)"
    )
    return manifest


def _tokenize(
    recipe: Recipe, out: Path, names: list[str], vocab_path: Path, folder: Path, pool: Pool
) -> list[TokenPart]:
    """Write the token ids of a split's text files, in parallel, and join them in `folder` for random next sentences."""
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
    """Refuse text with too many words that are unknown to the vocabulary and become [UNK]. Raises UserError."""
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
    """One tokenizer per process and vocabulary, made at first use; the key is the content, as the file may be replaced."""
    key = sha256_of(vocab_path), cased
    if key not in _TOKENIZERS:
        _TOKENIZERS[key] = (WordPiece(vocab_path, cased), load_vocabulary(vocab_path))
    return _TOKENIZERS[key]
