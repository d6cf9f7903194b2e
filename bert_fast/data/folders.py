"""Files in the folders of data: which are ours, and which of the user's are read.

This is in one place, so that a file of ours is never read as text or samples, and a file of the user's is never removed. A
folder that the program writes has a mark (`claims`); only the names that its kind writes are ours, the rest is the user's.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from bert_fast.claims import LOCK, MARK, Kind, digits, is_marked
from bert_fast.data.pairs.store import GROUPS
from bert_fast.data.store import FILES, is_store
from bert_fast.errors import UserError

SPLITS = ("train", "eval")
_HEX = 12 * "[0-9a-f]"
TEXT_FILES = (*(f"text/{split}-{digits(n)}.txt" for split in SPLITS for n in (5, 6, 7)), "text/stamp.json")
PIECES_FOLDER = f"pieces-{_HEX}"
# Older versions wrote .pickle: such a file is never read, but ours to remove
PIECE_FILES = (f"{digits(6)}.json", f"{digits(6)}.pickle")
PARTS_FOLDER = f"parts-{{}}-{_HEX}"  # of a split
PART_FILES = (
    f"{digits(5)}.bin",
    f"{digits(5)}.bin.npz",
    "head.bin",
    "head.bin.npz",
    "picked.bin",
    "picked.bin.npz",
    f"tokens/{digits(5)}.npz",
    f"tokens/{digits(5)}.npz.json",
    *(f"tokens/{name}.bin" for name in ("tokens", "sentences", "documents")),
)


def _is_older(folder: Path) -> bool:
    """Whether a version that left no mark has prepared this folder, by its stamp of the text."""
    try:
        stamp = json.loads((folder / "text" / "stamp.json").read_text(encoding="utf-8"))
        return all(set(stamp[split]) >= {"files", "documents", "sha256"} for split in SPLITS)
    except (OSError, ValueError, KeyError, TypeError):
        return False


PREPARATION = Kind(
    "a preparation",
    (
        *TEXT_FILES,
        "vocab.txt",
        "vocab.stamp.json",
        *(f"{split}/{name}" for split in SPLITS for name in FILES),
        *(f"{PIECES_FOLDER}/{name}" for name in PIECE_FILES),
        *(f"{PARTS_FOLDER.format(split)}/{name}" for split in SPLITS for name in PART_FILES),
    ),
    "choose another --out",
    is_older=_is_older,
)
PAIR_FILES = (f"{digits(6)}.bin", f"{digits(6)}.bin.npz", *(f"{s}.bin{n}" for s in SPLITS for n in ("", ".npz")))
PAIRS = Kind(
    "a preparation of pairs",
    (
        "vocab.txt",
        *(f"{split}/{name}" for split in SPLITS for name in (*FILES, GROUPS)),
        *(f"parts-pairs/{name}" for name in PAIR_FILES),
    ),
    "choose another --out",
)
STORE = Kind("a store", FILES, "choose another --out", is_older=is_store)
IMPORT_PARTS = Kind(
    "an unfinished import",
    (
        f"*-{_HEX}.bin",
        f"*-{_HEX}.bin.npz",
        "head.bin",
        "head.bin.npz",
        "picked.bin",
        "picked.bin.npz",
    ),
    "move it, or choose another --out",
)
EXPORT = Kind(
    "an export",
    tuple(f"part-{digits(n)}-of-{digits(n)}.{suffix}" for n in (5, 6) for suffix in ("tfrecord", "hdf5")),
    "choose an empty folder for --out",
    alone=True,  # whoever reads the folder would take another file for samples
)
_NUMBERED = re.compile(r"(?P<stem>.+)-\d+-of-(?P<set>(?P<count>\d+)(\..+)?)")


def check_inputs(out: Path, inputs: Iterable[str | None]) -> None:
    """Refuse a preparation whose input is among what it would write. Raises UserError."""
    for given in filter(None, inputs):
        inside = Path(given).resolve()
        if out.resolve() in inside.parents:
            name = inside.relative_to(out.resolve()).parts[0]
            if _is_ours(name, PREPARATION):
                raise UserError(
                    f"the input {given} lies in {out / name}, which a preparation into {out} writes; give another --out"
                )


def _is_ours(name: str, kind: Kind) -> bool:
    """Whether a file or folder of this name, in a folder of this kind, is or contains what the program writes there."""
    return any(fnmatchcase(name, pattern.split("/")[0]) for pattern in kind.writes)


# ---- text -----------------------------------------------------------------------------------------------------------


def files_below(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """The user's files below a folder in a fixed order, and those that cannot be read, with the reason.

    Links to folders are followed, each folder once. Raises UserError for a folder that cannot be listed.
    """
    files: list[Path] = []
    left_out: dict[Path, str] = {}
    folders, linked, seen = deque([root]), deque[Path](), set[tuple[int, int]]()
    while folders or linked:
        folder = folders.popleft() if folders else linked.popleft()  # a folder is found by its own name before a link's
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
    """Names in a folder that a preparation, an import or an export writes."""
    own: set[str] = {MARK, LOCK}
    for kind in (PREPARATION, PAIRS, STORE, IMPORT_PARTS, EXPORT):
        if is_marked(folder, kind) or kind.is_older(folder):
            own |= {name for name in names if _is_ours(name, kind)}
    if folder.name == "text" and (is_marked(folder.parent, PREPARATION) or _is_older(folder.parent)):
        own.add("stamp.json")  # a preparation's text may be read on purpose
    return own


# ---- a folder that Hugging Face `datasets` saved --------------------------------------------------------------------


def is_part_of_dataset(path: Path, cache: dict[Path, set[str] | None]) -> bool:
    """Whether a table file is part of its dataset: listed in the `state.json` next to it; without one, all but `cache-*`."""
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


def check_one_set(folder: Path, files: list[str]) -> None:
    """Refuse parts of two sets (part-00000-of-00004 and part-00000-of-00002), and an export that was stopped.

    Raises:
        UserError: two of the files, or the folder, are named.
    """
    is_export = is_marked(folder, EXPORT)
    if is_export:
        files = [file for file in files if _is_ours(Path(file).name, EXPORT)]
    sets: dict[str, dict[str, list[str]]] = {}
    counts: dict[str, int] = {}
    for file in files:
        found = _NUMBERED.fullmatch(Path(file).name)
        if found:
            sets.setdefault(found["stem"], {}).setdefault(found["set"], []).append(file)
            counts[found["set"]] = int(found["count"])
    is_whole = all(len(parts) == counts[name] for of_stem in sets.values() for name, parts in of_stem.items())
    if is_export and (not is_whole or any(len(of_stem) > 1 for of_stem in sets.values())):
        raise UserError(f"{folder}: an export into it was stopped; run that again")
    for of_stem in sets.values():
        if len(of_stem) > 1:
            first, second = (parts[0] for parts in list(of_stem.values())[:2])
            raise UserError(
                f"{folder} holds parts of {len(of_stem)} sets ({Path(first).name} and {Path(second).name}), which "
                "may be the same samples; move one set to a folder of its own"
            )
