"""What lies in the folders of data: which files are ours, and which of the user's are read.

One place, so that nothing of ours is ever taken for text or samples, and nothing of the user's for ours. A preparation and an
export say in a hidden file that a folder holds files of theirs; only names that they write are then theirs, all else stays the
user's.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bert_fast.errors import UserError
from bert_fast.files import remove_temporaries, write_json

_PREPARED, _EXPORTED = ".prepared.json", ".exported.json"
_OF_PREPARATION = re.compile(
    r"text|train|eval|vocab\.txt|vocab\.stamp\.json|pieces-[0-9a-f]{12}|parts-(train|eval)-[0-9a-f]{12}"
)
_OF_STORE = {"manifest.json", "samples.bin", "offsets.npy", "lengths.npy", "num_masked.npy", "blocks.npy"}
TEXT_FILES = re.compile(r"(train|eval)-\d{5,}\.txt|stamp\.json")
PIECE_FILES = re.compile(r"\d{6,}\.pickle")
PART_FILES = re.compile(r"(\d{5,}|head|picked|.+-[0-9a-f]{12})\.bin(\.npz)?")
_NUMBERED = re.compile(r"(?P<stem>.+)-\d+-of-(?P<set>\d+(\..+)?)")


def claim_preparation(out: Path, vocab: str | None = None, inputs: Iterable[str | None] = ()) -> None:
    """Mark `out` as a folder that a preparation writes to, before it does.

    Raises:
        UserError: names that it would write are there, and no preparation wrote them; or its input lies in one of them.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    for given in filter(None, inputs):
        inside = Path(given).resolve()
        if out.resolve() in inside.parents:
            name = inside.relative_to(out.resolve()).parts[0]
            if _OF_PREPARATION.fullmatch(name):
                raise UserError(
                    f"the input {given} lies in {out / name}, which a preparation into {out} writes; give another --out"
                )
    if _is_prepared(out):
        return
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        is_vocab = vocab is not None and path.name == "vocab.txt" and os.path.exists(vocab) and path.samefile(vocab)
        is_empty = path.is_dir() and not any(path.iterdir())
        if _OF_PREPARATION.fullmatch(path.name) and not is_vocab and not is_empty:
            raise UserError(
                f"{path} is there and no preparation wrote it, but this one would write there; give another --out, "
                "or move it away"
            )
    write_json(out / _PREPARED, {"format": "bert_fast preparation 1"})


def _is_prepared(folder: Path) -> bool:
    return (folder / _PREPARED).is_file() or (folder / "text" / "stamp.json").is_file()  # older ones have no mark


def remove_files(folder: Path, names: re.Pattern[str], but: Iterable[str] = ()) -> None:
    """Remove our files in `folder`: those of these names, and what killed processes left; then the folder if it is empty."""
    if not folder.is_dir():
        return
    remove_temporaries(folder)
    keep = set(but)
    for path in folder.iterdir():
        if names.fullmatch(path.name) and path.name not in keep and path.is_file():
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


# ---- text -----------------------------------------------------------------------------------------------------------


def files_below(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """Files below a folder in a fixed order, none of ours; and those that cannot be read, with why.

    Linked folders are followed, every folder once. Raises UserError for a folder that cannot be listed.
    """
    files: list[Path] = []
    left_out: dict[Path, str] = {}
    folders, linked, seen = deque([root]), deque[Path](), set[tuple[int, int]]()
    while folders or linked:
        folder = folders.popleft() if folders else linked.popleft()  # a folder goes by its own name before a link's
        try:
            stat = folder.stat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; nothing in it can be read") from None
        own = _own_names(folder, [entry.name for entry in entries])
        for entry in entries:
            path = folder / entry.name
            if entry.name in own:
                continue
            if entry.is_dir():
                (linked if entry.is_symlink() else folders).append(path)
            elif entry.is_file():
                files.append(path)
            else:
                left_out[path] = "links to nothing" if entry.is_symlink() else "no regular files"
    real = {(stat.st_dev, stat.st_ino) for path in files if not path.is_symlink() for stat in [path.stat()]}
    for path in [path for path in files if path.is_symlink()]:
        if ((stat := path.stat()).st_dev, stat.st_ino) in real:
            files.remove(path)
            left_out[path] = "links to files that are read already"
    return sorted(files), left_out


def _own_names(folder: Path, names: list[str]) -> set[str]:
    """Names in a folder that a preparation, an import or an export wrote."""
    own: set[str] = set()
    if _is_prepared(folder):
        own |= {name for name in names if _OF_PREPARATION.fullmatch(name)} | {_PREPARED}
    if folder.name == "text" and _is_prepared(folder.parent):
        own.add("stamp.json")  # a preparation's text may be read on purpose
    if {"manifest.json", "samples.bin"} <= set(names):
        own |= _OF_STORE
    if _EXPORTED in names:
        own |= {_EXPORTED, *_exported_names(folder)}
    return own


# ---- a folder that Hugging Face `datasets` saved --------------------------------------------------------------------


def is_part_of_dataset(path: Path, cache: dict[Path, set[str] | None]) -> bool:
    """Whether a table file counts: `state.json` beside it says so; where there is none, a `cache-*` of `datasets` does not."""
    folder = path.parent
    if folder not in cache:
        cache[folder] = _files_of_dataset(folder)
    named = cache[folder]
    return path.name in named if named is not None else not path.name.startswith("cache-")


def _files_of_dataset(folder: Path) -> set[str] | None:
    state = folder / "state.json"
    try:
        entries = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        named = {str(entry["filename"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise UserError(f"{folder}: state.json names {missing[0]}, which is not there; save or copy the dataset again")
    return named


# ---- files of samples -----------------------------------------------------------------------------------------------


def check_one_set(files: list[str]) -> None:
    """Refuse parts of two sets (part-00000-of-00004 beside part-00000-of-00002). Raises UserError."""
    sets: dict[str, dict[str, str]] = {}
    for file in files:
        found = _NUMBERED.fullmatch(Path(file).name)
        if found:
            sets.setdefault(found["stem"], {}).setdefault(found["set"], file)
    for of_stem in sets.values():
        if len(of_stem) > 1:
            first, second = list(of_stem.values())[:2]
            raise UserError(
                f"{Path(first).parent} holds parts of {len(of_stem)} sets ({Path(first).name} and {Path(second).name}), which "
                "may be the same samples; move one set to a folder of its own"
            )


def claim_export(out: Path, names: list[str]) -> None:
    """Say in `out` that these names are an export's, and remove those that an earlier export wrote and this one does not.

    Raises:
        UserError: another file lies there. Whoever reads the folder would take it for samples.
    """
    earlier = _exported_names(out)
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if not path.name.startswith(".") and path.name not in earlier:
            raise UserError(f"{path} is there and no export wrote it; give an empty folder for --out")
    write_json(out / _EXPORTED, {"files": sorted({*earlier, *names})})  # first: a killed export is known by it
    remove_temporaries(out)
    for name in earlier - set(names):
        (out / name).unlink(missing_ok=True)
    write_json(out / _EXPORTED, {"files": names})


def _exported_names(folder: Path) -> set[str]:
    try:
        record: Any = json.loads((folder / _EXPORTED).read_text(encoding="utf-8"))
        return {name for name in record["files"] if _NUMBERED.fullmatch(name) and "/" not in name}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def is_exported(folder: Path, files: list[str]) -> bool:
    """Whether all that an export was to write in `folder` is there; true of other folders."""
    return _exported_names(folder) <= {Path(file).name for file in files}
