"""From a corpus to two stores, in three restartable stages.

    text     sources, read in parallel ─▶ text/{train,eval}-00000.txt (MLCommons' form), split by document
    vocab    given, or trained on the training text ─▶ vocab.txt
    samples  every text file in parallel ─▶ parts ─▶ train/ and eval/ stores

Every stage leaves a stamp with the hash of what it was made from; a finished stage, or a finished part, is not made
again. The result does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bert_fast.claims import Kind, claimed, digits, owner_of, remove_own
from bert_fast.data import corpus as corpora
from bert_fast.data.pool import Pool
from bert_fast.data.samples import SampleParams, make_samples
from bert_fast.data.store import FILES, Part, merge_parts, read_part, take_first, write_part
from bert_fast.data.wordpiece import WordPiece, load_vocabulary, train_vocabulary
from bert_fast.errors import UserError
from bert_fast.files import check_space, sha256_of, write_atomically, write_json

_TEXT_FILE_BYTES = 1 << 19
# Bytes of text, pieces and stores together over those of the sources, at ten passes. A compressed dump becomes five times as
# much text; a byte of text becomes about half a byte a pass, twice for a while.
_SPACE = {"pydocs": 3, "prose": 12, "mlcommons": 12, "mediawiki": 20, "parquet": 20}
SPLITS = ("train", "eval")
_HEX = 12 * "[0-9a-f]"
_PIECES, _PARTS = f"pieces-{_HEX}", f"parts-*-{_HEX}"
_TEXT = (*(f"text/{split}-{digits(n)}.txt" for split in SPLITS for n in (5, 6, 7)), "text/stamp.json")
_PIECE = f"{digits(6)}.json"
_PART_FILES = (f"{digits(5)}.bin", f"{digits(5)}.bin.npz", "head.bin", "head.bin.npz")


def _is_older(folder: Path) -> bool:
    """Whether a version that left no mark has prepared this folder: its stamp of the text says what is in it."""
    try:
        stamp = json.loads((folder / "text" / "stamp.json").read_text(encoding="utf-8"))
        return all(set(stamp[split]) >= {"files", "documents", "sha256"} for split in SPLITS)
    except (OSError, ValueError, KeyError, TypeError):
        return False


PREPARATION = Kind(
    "a preparation",
    (
        *_TEXT, "vocab.txt", "vocab.stamp.json", *(f"{split}/{name}" for split in SPLITS for name in FILES),
        f"{_PIECES}/{_PIECE}", *(f"{_PARTS}/{name}" for name in _PART_FILES),
    ),
    "choose another --out",
    is_older=_is_older,
)  # fmt: skip


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
        UserError: unreadable or empty text, a bad vocabulary, a full disk (finished work is kept for a restart); a folder that
            another process is writing, or with files of others where this one would write.
    """
    start = time.perf_counter()
    if recipe.vocab is not None:
        load_vocabulary(recipe.vocab)  # a bad one is found before the long part
    out = Path(out)
    workers = num_workers or os.cpu_count() or 1
    with _claimed(out, recipe), Pool(workers) as pool:
        text = _text_stage(recipe, out, pool, log)
        vocab_path = _vocab_stage(recipe, out, text, log)
        manifests = {split: _sample_stage(recipe, out, split, text, vocab_path, pool, log) for split in SPLITS}
    seconds = time.perf_counter() - start
    log(f"prepared {out} in {seconds:.1f} s")
    return {**manifests, "seconds": seconds}


@contextlib.contextmanager
def _claimed(out: Path, recipe: Recipe) -> Iterator[None]:
    """The folder and its stores are this process's meanwhile."""
    given = recipe.vocab is not None and Path(recipe.vocab).resolve() == (out / "vocab.txt").resolve()
    kind = replace(
        PREPARATION, writes=tuple(name for name in PREPARATION.writes if not (given and name == "vocab.txt"))
    )
    _check_stores_are_free(out)
    with claimed(out, kind):
        _check_stores_are_free(out)  # of an import that began meanwhile one of us has seen the other
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
    remove_own(out, _TEXT)
    size = sum(os.path.getsize(source.path) for source in sources)
    check_space(out, int(_SPACE[recipe.corpus] * size), "the preparation")
    tag = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    pieces_folder = out / f"pieces-{tag}"
    for stale in out.glob(_PIECES):
        if stale != pieces_folder:
            remove_own(out, [f"{stale.name}/{_PIECE}"])
    writers = {split: _TextWriter(out / "text", split) for split in SPLITS}
    seen: set[bytes] = set()
    pieces = corpora.list_pieces(recipe.corpus, sources, recipe.column)
    jobs = ((str(pieces_folder / f"{n:06d}.json"), recipe.corpus, piece) for n, piece in enumerate(pieces))
    last_line, documents_read = start, 0
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
                identity = origin if recipe.corpus == "pydocs" else blocks[0][0].hex()
                held_out = corpora.is_held_out(identity, recipe.eval_fraction, recipe.params.seed)
                writers["eval" if held_out else "train"].add(kept)
    stamp = {"key": key, **{split: writer.close() for split, writer in writers.items()}}
    for split in SPLITS:
        if not stamp[split]["documents"]:
            where = f" (in {recipe.input})" if recipe.input else ""
            hint = "raise --eval-fraction" if split == "eval" and stamp["train"]["documents"] else "is the text empty?"
            raise UserError(f"corpus {recipe.corpus}: no document for the {split} split; {hint}{where}")
    write_json(stamp_path, stamp)
    remove_own(out, [f"{pieces_folder.name}/{_PIECE}"])
    megabytes, seconds = sum(stamp[s]["bytes"] for s in SPLITS) / 1e6, time.perf_counter() - start
    log(
        f"text: {len(sources):,} files -> {stamp['train']['documents']:,} + {stamp['eval']['documents']:,} documents, "
        f"{megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)"
    )
    return stamp


_Blocks = list[tuple[bytes, list[str]]]  # hash of a block, its sentences


def _read_piece(path: str, kind: str, piece: corpora.Piece) -> list[tuple[str, _Blocks]]:
    """Documents of a piece, kept in `path` until the stage is over: cleaning a whole Wikipedia is hours of work."""
    finished = _stored_piece(path)
    if finished is not None:
        return finished
    documents = [
        (
            document.origin,
            [(hashlib.blake2b("\n".join(b).encode(), digest_size=16).digest(), b) for b in document.blocks],
        )
        for document in corpora.read_piece(kind, piece)
    ]
    stored = [[origin, [[digest.hex(), sentences] for digest, sentences in blocks]] for origin, blocks in documents]
    write_atomically(path, json.dumps(stored, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return documents


def _stored_piece(path: str) -> list[tuple[str, _Blocks]] | None:
    """A piece as it was kept, as JSON, which runs nothing. None where there is none; one that is damaged is made again."""
    try:
        stored = json.loads(Path(path).read_bytes().decode("utf-8", "surrogatepass"))
        return [
            (str(origin), [(bytes.fromhex(digest), [str(line) for line in sentences]) for digest, sentences in blocks])
            for origin, blocks in stored
        ]
    except (OSError, ValueError, TypeError):
        return None


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
    path, new = out / "vocab.txt", out / f".vocab.txt.{os.getpid()}.tmp"
    if recipe.vocab is not None:
        vocabulary = load_vocabulary(recipe.vocab)
        content = Path(recipe.vocab).read_bytes()
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(new, content)
            _put_vocabulary(out, new, {"given": vocabulary.sha256})
        log(f"vocabulary: {len(vocabulary):,} tokens from {recipe.vocab}")
        return path
    key, stamp_path = {"text": text["train"]["sha256"], "size": recipe.vocab_size}, out / "vocab.stamp.json"
    if path.is_file() and _stamp_matches(stamp_path, key):
        log("vocabulary: already there")
        return path
    start = time.perf_counter()
    train_vocabulary([out / "text" / name for name in text["train"]["files"]], recipe.vocab_size, new)
    _put_vocabulary(out, new, key)
    log(f"vocabulary: {len(load_vocabulary(path)):,} tokens trained in {time.perf_counter() - start:.1f} s")
    return path


def _put_vocabulary(out: Path, new: Path, key: dict[str, Any]) -> None:
    """Let a whole new file become vocab.txt. Raises UserError where that is a file that somebody else wrote, or has changed."""
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
    write_json(
        stamp_path, {"key": key, "sha256": sha256_of(new)}
    )  # first: a kill here must not make our file a stranger's
    os.replace(new, path)


def _sample_stage(
    recipe: Recipe, out: Path, split: str, text: dict[str, Any], vocab_path: Path, pool: Pool, log: Log
) -> dict[str, Any]:
    vocabulary = load_vocabulary(vocab_path)
    key = {"text": text[split]["sha256"], "vocab": vocabulary.sha256, **recipe.params.as_dict()}
    if split == "eval":
        key["eval_max_samples"] = recipe.eval_max_samples
    folder = out / split
    done = _stamp_matches(folder / "manifest.json", key)
    if done:
        log(f"{split}: {done['num_samples']:,} samples, already there")
        return done
    start = time.perf_counter()
    tag = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    parts_folder = out / f"parts-{split}-{tag}"
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
        parts = take_first(parts, recipe.eval_max_samples, parts_folder)
    manifest = merge_parts(
        folder, parts,
        {
            "key": key, "corpus": recipe.corpus, "text_sha256": text[split]["sha256"],
            "documents": text[split]["documents"], "vocab_sha256": vocabulary.sha256, "vocab_size": len(vocabulary),
            "mask_id": vocabulary.mask_id,
            "params": asdict(recipe.params),
        },
    )  # fmt: skip
    remove_own(out, [f"{parts_folder.name}/{name}" for name in _PART_FILES])
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
