"""Whose a folder is: what the program writes into it, what it may remove there, and that one process at a time does so.

A folder that the program writes into has a mark, `.bert_fast.json`, which is its first file and says what the folder is for.
While a process writes there, `.running.json` says which one. Both are created so that of two processes exactly one succeeds,
on a network file system too. Files are removed in a folder with the mark only, and of those only the names that its kind
writes: whatever else lies there is the user's and stays.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bert_fast.errors import UserError
from bert_fast.files import create_atomically

MARK, LOCK = ".bert_fast.json", ".running.json"  # hidden: nobody takes them for data
FORMAT = "bert_fast folder 1"
CLAIM = "BERT_FAST_CLAIM"  # variable: names the launcher's claim to the ranks that it starts; no secret
# How files.create_atomically and files.atomic_file name what is not whole yet
_TEMPORARY = re.compile(r"\.(?P<of>.+)\.([0-9a-f-]+|[A-Za-z0-9]*-\d+\.bert_fast)\.tmp")
_RIVAL_S, _WRITTEN_S = 0.02, 0.2
_BEAT_S = 5.0  # between two touches of a claim, which show another host that its process lives
_SILENT_S = 3 * _BEAT_S  # without one: it does not

_held: dict[str, dict[str, Any]] = {}  # claims of this process, by folder
_silent: set[str] = set()  # claims of processes on other hosts that were found to be gone


@dataclass(frozen=True)
class Kind:
    """A kind of folder that the program writes.

    Attributes:
        name: with its article, as messages say it.
        writes: patterns of the files' paths below the folder; `*` stands for part of one name.
        mend: what a person can do about a folder that cannot be taken.
        alone: whether a folder that is not ours must be empty; else it may hold whatever `writes` does not name.
        is_older: whether a folder without a mark was written by a version that left none.
    """

    name: str
    writes: tuple[str, ...]
    mend: str
    alone: bool = False
    is_older: Callable[[Path], bool] = lambda _folder: False


def digits(count: int) -> str:
    """A pattern of so many digits."""
    return count * "[0-9]"


def check(folder: Path, kind: Kind) -> None:
    """Refuse a folder that is not ours to write into, or that a living process has. Changes nothing. Raises UserError."""
    _check_files(folder, kind)
    owner = owner_of(folder)
    if owner:
        raise _in_use(folder, owner, kind)


def claim(folder: Path, kind: Kind) -> None:
    """Take `folder` for this process, and make and mark it where it is new. Of several processes one succeeds.

    Raises:
        UserError: another process has it, named; or it holds files that are not ours; or it cannot be written.
    """
    _check_files(folder, kind)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            create_atomically(folder / MARK, _text({"format": FORMAT, "kind": kind.name}))
        note = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "claim": secrets.token_hex(8),
            "is_new": is_new,
        }
        owner = _take(folder / LOCK, note)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"disk full while writing {folder}; free space and run the same command again") from None
        raise UserError(f"cannot write {folder}: {error.strerror}; {kind.mend}") from None
    if owner:
        raise _in_use(folder, owner, kind)


def release(folder: Path) -> None:
    """Give back what this process has claimed; nothing where the claim is another's. A folder without anything in it goes."""
    note = _held.pop(_key(folder), None)
    if note is None or _read(folder / LOCK) != note:
        return
    with contextlib.suppress(OSError):  # a folder that has been removed, a disk that has turned read-only
        if {path.name for path in folder.iterdir()} == {MARK, LOCK}:
            (folder / MARK).unlink()
            (folder / LOCK).unlink()
            if note["is_new"]:
                folder.rmdir()
            return
        (folder / LOCK).unlink()


@contextlib.contextmanager
def claimed(folder: Path, kind: Kind) -> Iterator[None]:
    """A claim for as long as a block takes."""
    claim(folder, kind)
    try:
        yield
    finally:
        release(folder)


def claim_name(folder: Path) -> str:
    """What this process's claim is called, for the variable `CLAIM`; empty without one."""
    note = _held.get(_key(folder))
    return "" if note is None else str(note["claim"])


def is_marked(folder: Path, kind: Kind) -> bool:
    """Whether the program has written this folder, for this purpose."""
    return _mark_of(folder) == kind.name


def owner_of(folder: Path) -> str | None:
    """The living process in `folder`, in words; None if there is none, or nobody can tell, or it is this one.

    On this host the process is looked up; on another one its Slurm job, if that is not this one. Without a job, its claim is
    watched for 15 s: a living process touches it.
    """
    return _owner(_read(folder / LOCK), folder / LOCK)


def remove_own(folder: Path, writes: Sequence[str], keep: Collection[str] = ()) -> list[Path]:
    """Remove the files that `writes` names, and sub-folders that are empty then. Links and everything else stay.

    Call it in a folder with the mark only.

    Args:
        keep: paths below the folder that stay though `writes` names them.

    Returns:
        What has stayed, as paths below `folder`, without the mark and the claim.
    """
    stays, folders = [], []
    for path, is_file in _entries(folder, folder, writes):
        inside = path.relative_to(folder)
        if inside.as_posix() in keep:
            continue
        if is_file and _is_own(inside, writes):
            path.unlink(missing_ok=True)
        elif _leads_to_own(inside, writes) and path.is_dir() and not path.is_symlink():
            folders.append(path)
        elif inside.as_posix() not in (MARK, LOCK):
            stays.append(inside)
    for path in reversed(folders):  # the deepest first
        with contextlib.suppress(OSError):  # something of the user's is in it
            path.rmdir()
    return stays


def dissolve(folder: Path, kind: Kind) -> None:
    """Remove a folder that was made for a while, with what the program wrote there. One with other files in it stays."""
    if is_marked(folder, kind) and not remove_own(folder, kind.writes):
        (folder / MARK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


# ---- what is there ----------------------------------------------------------------------------------------------------


def _check_files(folder: Path, kind: Kind) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder; {kind.mend}")
    mark = _mark_of(folder)
    if mark is not None and mark != kind.name:
        raise UserError(f"{folder} is the folder of {mark}, not of {kind.name}; {kind.mend}")
    if mark is not None or not folder.is_dir():
        return
    if kind.alone:
        found = sorted(path.name for path in folder.iterdir() if not _is_temporary(path.name, MARK))
        what = f"holds files that are not {kind.name}'s"
    else:
        writes = (*kind.writes, LOCK)
        found = sorted(
            inside.as_posix()
            for path, _ in _entries(folder, folder, writes)
            if _is_own(inside := path.relative_to(folder), writes)
        )
        what = f"holds files that are not {kind.name}'s and that one would write over"
    if found and not kind.is_older(folder) and _mark_of(folder) is None:  # asked again: a start beside may have made it
        names = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise UserError(f"{folder} {what} ({names}); {kind.mend}")


def _entries(top: Path, folder: Path, writes: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    """Every path below `folder` and whether it is a plain file; sub-folders first, and only those of ours are looked into."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
        for entry in sorted(found, key=lambda each: each.name):
            path = Path(entry.path)
            yield path, entry.is_file(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False) and _leads_to_own(path.relative_to(top), writes):
                yield from _entries(top, path, writes)


def _is_own(path: Path, writes: Sequence[str]) -> bool:
    """Whether a pattern names this path, or a file that was to take its name."""
    parts = path.parts
    temporary = _TEMPORARY.fullmatch(parts[-1])
    names = [parts, (*parts[:-1], temporary["of"])] if temporary else [parts]
    return any(_matches(each, pattern.split("/")) for pattern in writes for each in names)


def _leads_to_own(path: Path, writes: Sequence[str]) -> bool:
    """Whether a pattern names files below this path."""
    patterns = (pattern.split("/") for pattern in writes)
    return any(len(p) > len(path.parts) and _matches(path.parts, p[: len(path.parts)]) for p in patterns)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))


def _is_temporary(name: str, of: str) -> bool:
    found = _TEMPORARY.fullmatch(name)
    return found is not None and found["of"] == of


def _mark_of(folder: Path) -> str | None:
    """What the folder is for, by its mark; None without one."""
    mark = _read(folder / MARK)
    if mark is None:
        return None
    if mark.get("format") != FORMAT or not isinstance(mark.get("kind"), str):
        raise UserError(f"{folder / MARK} is not a mark that this version has written; choose another folder")
    return str(mark["kind"])


# ---- who is there -----------------------------------------------------------------------------------------------------


def _in_use(folder: Path, owner: str, kind: Kind) -> UserError:
    return UserError(f"{folder} is in use by {owner}; wait for it, stop it, or {kind.mend}")


def _take(path: Path, note: dict[str, Any]) -> str | None:
    """Create `path` with `note`, in place of a note whose process is gone; else who has it, in words."""
    while True:
        with contextlib.suppress(FileExistsError):
            create_atomically(path, _text(note))
            _hold(path, note)
            return None
        raw = _raw(path)
        found = _parsed(raw)
        if found is not None and found.get("claim") in _names_of_ours(path.parent):
            return None
        owner = _owner(found, path)
        if owner is not None:
            return owner
        if raw is not None:  # else it has just been given back
            _remove_stale(path, raw, note)


def _remove_stale(path: Path, raw: bytes, note: dict[str, Any]) -> None:
    """Remove the note of a process that is gone. Of all that find it, the one who creates a file named after it may."""
    right = path.with_name(f".{path.name}.{hashlib.sha256(raw).hexdigest()[:12]}.tmp")
    try:
        create_atomically(right, _text(note))
    except FileExistsError:
        rival = _raw(right)
        if rival is not None and _owner(_parsed(rival), right) is None:  # its process is gone as well
            _remove_stale(right, rival, note)
        time.sleep(_RIVAL_S)
        return
    try:
        if _raw(path) == raw:  # else a rival was here before us, and has finished
            path.unlink(missing_ok=True)
    finally:
        right.unlink(missing_ok=True)


def _owner(note: dict[str, Any] | None, path: Path) -> str | None:
    if note is None or not {"host", "pid", "started", "job"} <= note.keys():
        return None
    host, pid, started, job = (note[name] for name in ("host", "pid", "started", "job"))
    name = str(note.get("claim"))
    if name == os.environ.get(CLAIM, ""):
        return None
    if host == socket.gethostname():
        return f"process {pid} on this host" if pid != os.getpid() and started == _started(pid) is not None else None
    if job is None:
        if name not in _silent and not _is_touched(path):
            _silent.add(name)
        return None if name in _silent else f"process {pid} on {host}"
    if job == os.environ.get("SLURM_JOB_ID"):
        return None
    return f"job {job} on {host}" if _job_runs(job) else None


def _hold(path: Path, note: dict[str, Any]) -> None:
    """Remember a claim, and touch it as long as this process lives and has it."""
    _held[_key(path.parent)] = note

    def touch() -> None:
        while _held.get(_key(path.parent)) is note:
            time.sleep(_BEAT_S)
            with contextlib.suppress(OSError):
                if _held.get(_key(path.parent)) is note:
                    os.utime(path)

    threading.Thread(target=touch, daemon=True, name="claim").start()


def _is_touched(path: Path) -> bool:
    """Whether a process on another host touches its claim. Only changes count: its clock may differ from ours."""

    def time_of() -> float | None:
        try:
            with open(path, "rb") as file:  # opened, so that a network file system asks its server
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return None

    first, deadline = time_of(), time.monotonic() + _SILENT_S
    while time.monotonic() < deadline:
        now = time_of()
        if now != first:
            return now is not None
        time.sleep(_BEAT_S / 5)
    return False


def _names_of_ours(folder: Path) -> list[str]:
    """Of the claims on a folder that this process, or its launcher, holds."""
    return [name for name in (claim_name(folder), os.environ.get(CLAIM, "")) if name]


def _key(folder: Path) -> str:
    return os.path.abspath(folder)


def _text(value: Any) -> str:
    return json.dumps(value) + "\n"


def _raw(path: Path) -> bytes | None:
    """What is in a note; None where there is none."""
    try:
        raw = path.read_bytes()
        if not raw:  # where files cannot be linked, somebody is writing it
            time.sleep(_WRITTEN_S)
            raw = path.read_bytes()
    except OSError:
        return None
    return raw


def _parsed(raw: bytes | None) -> dict[str, Any] | None:
    try:
        value = json.loads(raw or b"")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read(path: Path) -> dict[str, Any] | None:
    """A note or a mark; None where there is none, or none that can be read."""
    return _parsed(_raw(path))


def _started(pid: int) -> str | None:
    """When a living process was started, in the kernel's ticks; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _job_runs(job: str) -> bool:
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format=%T"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() in ("RUNNING", "COMPLETING", "SUSPENDED")
