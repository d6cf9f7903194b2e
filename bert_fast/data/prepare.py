"""From a corpus to two stores, in three restartable stages.

    text     sources, read in parallel ─▶ text/{train,eval}-00000.txt (MLCommons' form), split by document
    vocab    given, or trained on the training text ─▶ vocab.txt
    samples  every text file in parallel ─▶ parts ─▶ train/ and eval/ stores

Every stage leaves a stamp with the hash of what it was made from; a finished stage, or a finished part, is not made
again. The result does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bert_fast.data import corpus as corpora
from bert_fast.data.folders import PART_FILES, PIECE_FILES, TEXT_FILES, claim_preparation, remove_files
from bert_fast.data.pool import Pool
from bert_fast.data.samples import SampleParams, make_samples
from bert_fast.data.store import Part, merge_parts, read_part, take_evenly, take_first, write_part
from bert_fast.data.wordpiece import WordPiece, load_vocabulary, train_vocabulary
from bert_fast.errors import UserError
from bert_fast.files import check_space, sha256_of, write_atomically, write_json

_TEXT_FILE_BYTES = 1 << 19
# Bytes of text, pieces and stores together over those of the sources, at ten passes. A compressed dump becomes five times as
# much text; a byte of text becomes about half a byte a pass, twice for a while.
_SPACE = {
    "pydocs": 3, "prose": 12, "mlcommons": 12, "jsonl": 12, "wikiextractor": 12, "mediawiki": 20, "parquet": 20,
}  # fmt: skip
SPLITS = ("train", "eval")
PICKS = ("first", "evenly")


@dataclass(frozen=True)
class Recipe:
    """What to prepare. Two equal recipes over the same text give the same bytes.

    language: whose rules end sentences; `auto` tells it from each text.
    eval_input: text of the evaluation split alone, in place of a held-out share.
    eval_pick: which candidates `eval_max_samples` keeps: the first, or evenly spread ones as MLPerf's reference does.
    """

    corpus: str = "pydocs"
    input: str | None = None
    column: str = "text"
    packages: tuple[str, ...] = corpora.PYDOCS_PACKAGES
    vocab: str | None = None
    vocab_size: int = 2048
    eval_fraction: float = 0.02
    eval_max_samples: int | None = None
    params: SampleParams = field(default_factory=SampleParams)
    language: str = corpora.AUTO
    eval_input: str | None = None
    eval_pick: str = "first"

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be prepared."""
        if self.eval_pick not in PICKS:
            raise UserError(f"--eval-pick {self.eval_pick}: give {' or '.join(PICKS)}")
        if self.eval_pick != "first" and not self.eval_max_samples:
            raise UserError(f"--eval-pick {self.eval_pick} needs --eval-max-samples, the number of samples to pick")
        if self.eval_input is not None and self.corpus == "pydocs":
            raise UserError("--eval-input: corpus pydocs has no text but that of packages; choose another --corpus")
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9-]+)?|auto", self.language):
            raise UserError(f"--language {self.language}: give a code such as en, de or zh, or auto")

    def text_key(self) -> dict[str, Any]:
        """What the text stage depends on."""
        packages = list(self.packages) if self.corpus == "pydocs" else []
        key = {
            "corpus": self.corpus, "input": self.input, "packages": packages, "eval_fraction": self.eval_fraction,
            "seed": self.params.seed,
        }  # fmt: skip
        if self.corpus in ("parquet", "jsonl"):
            key["column"] = self.column
        if self.corpus != "pydocs":
            key["language"] = self.language
        return {**key, "eval_input": self.eval_input} if self.eval_input else key


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
    claim_preparation(out, recipe.vocab, (recipe.input, recipe.eval_input))
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
    """Write the corpus as sentences, a line each. Returns the stamp: files, hashes, counts by split, what was left out."""
    key, stamp_path = recipe.text_key(), out / "text" / "stamp.json"
    found = _sources(recipe)
    sources = [*found.sources, *found.evaluation]
    key["sources"] = hashlib.sha256(
        "\n".join(f"{s.name} {(stat := os.stat(s.path)).st_size} {stat.st_mtime_ns}" for s in sources).encode()
    ).hexdigest()
    done = _stamp_matches(stamp_path, key)
    if done:
        log(f"text: {done['train']['documents']:,} + {done['eval']['documents']:,} documents, already there")
        _say_left_out(done, log)
        return done
    start = time.perf_counter()
    remove_files(out / "text", TEXT_FILES)
    check_space(out, int(_SPACE[recipe.corpus] * sum(map(corpora.num_bytes, sources))), "the preparation")
    tag = hashlib.sha256(json.dumps(["stretches", key], sort_keys=True).encode()).hexdigest()[:12]
    pieces_folder = out / f"pieces-{tag}"
    for stale in out.glob("pieces-*"):
        if stale != pieces_folder:
            remove_files(stale, PIECE_FILES)
    splitter = _Splitter(recipe, out / "text", found)
    number, last_line = 0, start
    for is_evaluation, part in ((False, found.sources), (True, found.evaluation)):
        pieces = enumerate(corpora.list_pieces(recipe.corpus, part, recipe.column), number)
        jobs = ((str(pieces_folder / f"{n:06d}.pickle"), recipe.corpus, piece, recipe.language) for n, piece in pieces)
        for documents in pool.map(_read_piece, jobs):
            number += 1
            for document in documents:
                splitter.add(*document, is_evaluation)
            if time.perf_counter() - last_line > 5:
                last_line = time.perf_counter()
                count = splitter.num_documents
                log(f"text: {count:,} documents, {count / (last_line - start):,.0f} a second")
    stamp = {"key": key, **splitter.close()}
    _say_left_out(stamp, log)
    for split in SPLITS:
        if not stamp[split]["documents"]:
            where = f" (in {recipe.input})" if recipe.input else ""
            hint = "raise --eval-fraction" if split == "eval" and stamp["train"]["documents"] else "is the text empty?"
            raise UserError(f"corpus {recipe.corpus}: no document for the {split} split; {hint}{where}")
    write_json(stamp_path, stamp)
    remove_files(pieces_folder, PIECE_FILES)
    megabytes, seconds = sum(stamp[s]["bytes"] for s in SPLITS) / 1e6, time.perf_counter() - start
    log(
        f"text: {len(sources):,} files -> {stamp['train']['documents']:,} + {stamp['eval']['documents']:,} documents, "
        f"{megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)"
    )
    return stamp


def _sources(recipe: Recipe) -> corpora.Found:
    """Sources of both splits: a given evaluation text takes the place of one that lies beside the text."""
    found = corpora.find_sources(recipe.corpus, recipe.input, recipe.packages)
    if recipe.eval_input is None:
        return found
    given = corpora.find_sources(recipe.corpus, recipe.eval_input)
    evaluation = [*given.sources, *given.evaluation]
    same = {os.path.realpath(source.path) for source in evaluation}
    sources = [
        source for source in found.sources if os.path.realpath(source.path) not in same
    ]  # it may lie in the folder
    if not sources:
        raise UserError(f"--eval-input {recipe.eval_input} is all the text there is in {recipe.input}; give other text")
    left_out = dict(found.left_out)
    for why, names in given.left_out.items():
        left_out[why] = sorted({*left_out.get(why, []), *names})
    beside = [source.name for source in found.evaluation if os.path.realpath(source.path) not in same]
    if beside:
        left_out["evaluation texts other than that of --eval-input"] = beside
    return corpora.Found(sources, evaluation, left_out)


def _say_left_out(stamp: dict[str, Any], log: Log) -> None:
    """One line for all that is not in the text, and one for documents on both sides, where there are such."""
    left_out = stamp.get("left_out", {"files": {}, "documents": {}})
    if any(left_out.values()):
        numbers = [
            corpora.counted(sum(entry["count"] for entry in entries.values()), what)
            for what, entries in left_out.items()
        ]
        why = [
            corpora.counted(entry["count"], reason, entry["first"])
            for entries in left_out.values()
            for reason, entry in entries.items()
        ]
        log(f"text: {' and '.join(numbers)} left out: {'; '.join(why)}")
    if stamp.get("on_both_sides"):
        log(
            f"text: {corpora.counted(stamp['on_both_sides'], 'documents')} both in the training and in the evaluation text"
        )


_Blocks = list[tuple[bytes, list[str]]]  # hash of a block, its sentences
_Read = tuple[str, _Blocks, bool, str]  # origin, blocks, whether the next one is its rest, why there are no blocks


def _read_piece(path: str, kind: str, piece: corpora.Piece, language: str) -> list[_Read]:
    """Documents of a piece, kept in `path` until the stage is over: cleaning a whole Wikipedia is hours of work."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            return pickle.load(file)  # type: ignore[no-any-return]  # our own file
    documents = [
        (
            document.origin,
            [(hashlib.blake2b("\n".join(b).encode(), digest_size=16).digest(), b) for b in document.blocks],
            document.goes_on,
            document.left_out,
        )
        for document in corpora.read_piece(kind, piece, language)
    ]
    write_atomically(path, pickle.dumps(documents))
    return documents


class _Splitter:
    """Documents on their way to the two splits. The stretches of a long one come one after the other, to the same side."""

    _NAMED = 5  # of what is left out for one reason

    def __init__(self, recipe: Recipe, folder: Path, found: corpora.Found) -> None:
        self._recipe, self._found = recipe, found
        self._writers = {split: _TextWriter(folder, split) for split in SPLITS}
        self._seen: set[bytes] = set()
        self._left_out: dict[str, dict[str, Any]] = {}
        self._side = ""  # of the document whose rest is to come, once something of it was kept
        self._train: set[bytes] = set()  # hashes, where the evaluation text was given and may repeat it
        self._both = 0
        self.num_documents = 0

    def add(self, origin: str, blocks: _Blocks, goes_on: bool, left_out: str, is_evaluation: bool) -> None:
        """The next document, or stretch of one."""
        kept = self._new_sentences(blocks)
        if kept and not self._side:
            self._side = self._choose_side(origin, blocks[0][0], is_evaluation)
        if self._side and (kept or not goes_on):
            self._writers[self._side].add(kept, goes_on)
        if not goes_on:
            if not self._side and left_out:
                entry = self._left_out.setdefault(left_out, {"count": 0, "first": []})
                entry["count"] += 1
                entry["first"] += [origin] if len(entry["first"]) < self._NAMED else []
            self.num_documents += 1
            self._side = ""

    def _new_sentences(self, blocks: _Blocks) -> list[str]:
        kept: list[str] = []
        for digest, sentences in blocks:
            if self._recipe.corpus == "pydocs":  # generated documentation repeats itself
                if digest in self._seen:
                    continue
                self._seen.add(digest)
            kept.extend(sentences)
        return kept

    def _choose_side(self, origin: str, digest: bytes, is_evaluation: bool) -> str:
        if self._found.evaluation:
            if is_evaluation:
                self._both += digest in self._train
                return "eval"
            self._train.add(digest)
            return "train"
        # A text that occurs twice goes to one side. Modules stay whole, so pydocs goes by the module's name.
        identity = origin if self._recipe.corpus == "pydocs" else digest.hex()
        held_out = corpora.is_held_out(identity, self._recipe.eval_fraction, self._recipe.params.seed)
        return "eval" if held_out else "train"

    def close(self) -> dict[str, Any]:
        """What a stamp says of the text."""
        files = {
            why: {"count": len(names), "first": names[: self._NAMED]} for why, names in self._found.left_out.items()
        }
        return {
            **{split: writer.close() for split, writer in self._writers.items()},
            "left_out": {"files": files, "documents": self._left_out},
            "on_both_sides": self._both,
        }


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
        text = "".join(f"{sentence}\n" for sentence in sentences) + ("" if goes_on else "\n")
        self._lines.append(text)
        self._size += len(text)
        self._documents += not goes_on
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
        write_atomically(path, Path(recipe.vocab).read_bytes())
        log(f"vocabulary: {len(vocabulary):,} tokens from {recipe.vocab}")
        return path
    key, stamp_path = {"text": text["train"]["sha256"], "size": recipe.vocab_size}, out / "vocab.stamp.json"
    if path.is_file() and _stamp_matches(stamp_path, key):
        log("vocabulary: already there")
        return path
    start = time.perf_counter()
    train_vocabulary([out / "text" / name for name in text["train"]["files"]], recipe.vocab_size, path)
    write_json(stamp_path, {"key": key})
    log(f"vocabulary: {len(load_vocabulary(path)):,} tokens trained in {time.perf_counter() - start:.1f} s")
    return path


def _sample_stage(
    recipe: Recipe, out: Path, split: str, text: dict[str, Any], vocab_path: Path, pool: Pool, log: Log
) -> dict[str, Any]:
    vocabulary = load_vocabulary(vocab_path)
    key = {"text": text[split]["sha256"], "vocab": vocabulary.sha256, **recipe.params.as_dict()}
    if split == "eval":
        key["eval_max_samples"] = recipe.eval_max_samples
        if recipe.eval_pick != "first":
            key["eval_pick"] = recipe.eval_pick
    folder = out / split
    done = _stamp_matches(folder / "manifest.json", key)
    if done:
        log(f"{split}: {done['num_samples']:,} samples, already there")
        return done
    start = time.perf_counter()
    tag = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    parts_folder = out / f"parts-{split}-{tag}"
    for stale in out.glob(f"parts-{split}-*"):
        if stale != parts_folder:
            remove_files(stale, PART_FILES)
    jobs = (
        (str(out / "text" / name), str(vocab_path), recipe.params, chunk, str(parts_folder / f"{chunk:05d}.bin"))
        for chunk, name in enumerate(text[split]["files"])
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
        folder, parts,
        {
            "key": key, "corpus": recipe.corpus, "text_sha256": text[split]["sha256"],
            "documents": text[split]["documents"], "vocab_sha256": vocabulary.sha256, "vocab_size": len(vocabulary),
            "mask_id": vocabulary.mask_id,
            "params": asdict(recipe.params),
        },
    )  # fmt: skip
    remove_files(parts_folder, PART_FILES)
    seconds = time.perf_counter() - start
    log(
        f"{split}: {manifest['num_samples']:,} samples, {manifest['num_tokens']:,} tokens, mean length "
        f"{manifest['mean_length']:.0f} in {seconds:.1f} s ({manifest['num_samples'] / seconds:,.0f} samples/s)"
    )
    return manifest


def _make_part(text_path: str, vocab_path: str, params: SampleParams, chunk: int, part_path: str) -> Part:
    finished = read_part(part_path)
    if finished:
        return finished
    wordpiece, vocabulary = _tokenizer(vocab_path)
    documents: list[list[list[int]]] = []
    for block in Path(text_path).read_text(encoding="utf-8").split("\n\n"):
        sentences = [line for line in block.split("\n") if line]
        if sentences:
            documents.append([ids for ids in wordpiece.encode(sentences) if ids])
    return write_part(part_path, make_samples(documents, vocabulary, params, chunk))


_TOKENIZERS: dict[str, tuple[WordPiece, Any]] = {}


def _tokenizer(vocab_path: str) -> tuple[WordPiece, Any]:
    """One tokenizer a process, made at first use (keyed by content: the file may be replaced)."""
    key = sha256_of(vocab_path)
    if key not in _TOKENIZERS:
        _TOKENIZERS[key] = (WordPiece(vocab_path), load_vocabulary(vocab_path))
    return _TOKENIZERS[key]
