"""Ownership of folders: what the program writes into one, what it may remove there, and one writing process at a time.

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

MARK, LOCK = ".bert_fast.json", ".running.json"  # hidden, so that nobody takes them for data
FORMAT = "bert_fast folder 1"
CLAIM = "BERT_FAST_CLAIM"  # environment variable by which ranks know their launcher's claim; not a secret
# How files.create_atomically and files.atomic_file name unfinished files
_TEMPORARY = re.compile(r"\.(?P<of>.+)\.([0-9a-f-]+|[A-Za-z0-9]*-\d+\.bert_fast)\.tmp")
_RIVAL_S, _WRITTEN_S = 0.02, 0.2
TOUCH_EVERY_S = 5.0
"""Seconds between two touches of a claim, which show other hosts that its process lives."""
SILENT_S = 3 * TOUCH_EVERY_S
"""Seconds without a touch after which the process of a claim on another host is taken to be gone."""

_held: dict[str, dict[str, Any]] = {}  # this process's claims, by folder
_silent: set[str] = set()  # claims of processes on other hosts that were found to be gone


@dataclass(frozen=True)
class Kind:
    """A kind of folder that the program writes.

    Attributes:
        name: with its article, as messages print it.
        writes: patterns of the files' paths below the folder; `*` matches part of one name.
        fix: what a user can do about a folder that cannot be claimed.
        alone: whether a folder that is not ours must be empty; otherwise it may hold whatever `writes` does not name.
        is_older: whether a folder without a mark was written by a version that did not leave one.
    """

    name: str
    writes: tuple[str, ...]
    fix: str
    alone: bool = False
    is_older: Callable[[Path], bool] = lambda _folder: False


def digits(count: int) -> str:
    """A pattern that matches `count` digits."""
    return count * "[0-9]"


def check(folder: Path, kind: Kind) -> None:
    """Refuse a folder that is not ours to write into, or that a living process has. Changes nothing. Raises UserError."""
    _check_files(folder, kind)
    owner = owner_of(folder)
    if owner:
        raise _in_use(folder, owner, kind)


def claim(folder: Path, kind: Kind) -> None:
    """Claim `folder` for this process; a new one is created and marked. Of several processes, exactly one succeeds.

    Raises:
        UserError: another process, which is named, has it; or it holds files that are not ours; or it cannot be written.
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
            "started": start_time(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "claim": secrets.token_hex(8),
            "is_new": is_new,
        }
        owner = _take(folder / LOCK, note)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"disk full while writing {folder}; free space and run the same command again") from None
        raise UserError(f"cannot write {folder}: {error.strerror}; {kind.fix}") from None
    if owner:
        raise _in_use(folder, owner, kind)


def release(folder: Path) -> None:
    """Give up this process's claim, and remove the folder if nothing was written. Does nothing if another process has it."""
    note = _held.pop(_key(folder), None)
    if note is None or _read(folder / LOCK) != note:
        return
    with contextlib.suppress(OSError):  # the folder was removed, or the disk became read-only
        if {path.name for path in folder.iterdir()} == {MARK, LOCK}:
            (folder / MARK).unlink()
            (folder / LOCK).unlink()
            if note["is_new"]:
                folder.rmdir()
            return
        (folder / LOCK).unlink()


@contextlib.contextmanager
def claimed(folder: Path, kind: Kind) -> Iterator[None]:
    """Hold a claim while the block runs. Raises UserError as `claim`."""
    claim(folder, kind)
    try:
        yield
    finally:
        release(folder)


def claim_name(folder: Path) -> str:
    """The name of this process's claim, for the variable `CLAIM`; empty without a claim."""
    note = _held.get(_key(folder))
    return "" if note is None else str(note["claim"])


def is_marked(folder: Path, kind: Kind) -> bool:
    """Whether the folder's mark says that the program wrote it for this purpose."""
    return _mark_of(folder) == kind.name


def owner_of(folder: Path) -> str | None:
    """A description of the living process that has `folder`; None if no process has it, this one does, or it is unknown.

    A process on this host is looked up by its id, one on another host by its Slurm job. Without a job, its claim is watched
    for 15 s, as a living process touches it regularly.
    """
    return _owner(_read(folder / LOCK), folder / LOCK)


def start_time(pid: int) -> str | None:
    """The start time of a living process on this host, in the kernel's ticks; None if there is no such process.

    A claim notes it beside the process id, which the kernel gives to another process later.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def remove_own(folder: Path, writes: Sequence[str], keep: Collection[str] = ()) -> list[Path]:
    """Remove the files that `writes` names, and sub-folders that become empty. Links and everything else stay.

    Only call it for a folder with the mark.

    Args:
        keep: paths below the folder that stay although `writes` names them.

    Returns:
        What is left, as paths below `folder`, without the mark and the claim.
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
        with contextlib.suppress(OSError):  # it holds something of the user's
            path.rmdir()
    return stays


def dissolve(folder: Path, kind: Kind) -> None:
    """Remove a temporary folder with what the program wrote there. It stays if it holds other files."""
    if is_marked(folder, kind) and not remove_own(folder, kind.writes):
        (folder / MARK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


# ---- what is there ----------------------------------------------------------------------------------------------------


def _check_files(folder: Path, kind: Kind) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder; {kind.fix}")
    mark = _mark_of(folder)
    if mark is not None and mark != kind.name:
        raise UserError(f"{folder} is the folder of {mark}, not of {kind.name}; {kind.fix}")
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
    if (
        found and not kind.is_older(folder) and _mark_of(folder) is None
    ):  # again, as a concurrent start may have created it
        names = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise UserError(f"{folder} {what} ({names}); {kind.fix}")


def _entries(top: Path, folder: Path, writes: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    """Every path below `folder` and whether it is a plain file; only sub-folders that may hold our files are entered."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
        for entry in sorted(found, key=lambda each: each.name):
            path = Path(entry.path)
            yield path, entry.is_file(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False) and _leads_to_own(path.relative_to(top), writes):
                yield from _entries(top, path, writes)


def _is_own(path: Path, writes: Sequence[str]) -> bool:
    """Whether a pattern names this path, or the file that this temporary one was meant to become."""
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
    """What the folder's mark says it is for; None without a mark."""
    mark = _read(folder / MARK)
    if mark is None:
        return None
    if mark.get("format") != FORMAT or not isinstance(mark.get("kind"), str):
        raise UserError(f"{folder / MARK} is not a mark that this version has written; choose another folder")
    return str(mark["kind"])


# ---- who is there -----------------------------------------------------------------------------------------------------


def _in_use(folder: Path, owner: str, kind: Kind) -> UserError:
    return UserError(f"{folder} is in use by {owner}; wait for it, stop it, or {kind.fix}")


def _take(path: Path, note: dict[str, Any]) -> str | None:
    """Create `path` with `note`, replacing the note of a process that is gone. Returns who else has it, or None."""
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
        if raw is not None:  # otherwise it has just been released
            _remove_stale(path, raw, note)


def _remove_stale(path: Path, raw: bytes, note: dict[str, Any]) -> None:
    """Remove the note of a process that is gone. Of all that find it, the one that creates a file named after it does so."""
    right = path.with_name(f".{path.name}.{hashlib.sha256(raw).hexdigest()[:12]}.tmp")
    try:
        create_atomically(right, _text(note))
    except FileExistsError:
        rival = _raw(right)
        if rival is not None and _owner(_parsed(rival), right) is None:  # the rival is gone as well
            _remove_stale(right, rival, note)
        time.sleep(_RIVAL_S)
        return
    try:
        if _raw(path) == raw:  # otherwise a rival was faster, and has finished
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
        return f"process {pid} on this host" if pid != os.getpid() and started == start_time(pid) is not None else None
    if job is None:
        if name not in _silent and not _is_touched(path):
            _silent.add(name)
        return None if name in _silent else f"process {pid} on {host}"
    if job == os.environ.get("SLURM_JOB_ID"):
        return None
    return f"job {job} on {host}" if _job_runs(job) else None


def _hold(path: Path, note: dict[str, Any]) -> None:
    """Remember a claim, and touch it as long as this process lives and holds it."""
    _held[_key(path.parent)] = note

    def touch() -> None:
        while _held.get(_key(path.parent)) is note:
            time.sleep(TOUCH_EVERY_S)
            with contextlib.suppress(OSError):
                if _held.get(_key(path.parent)) is note:
                    os.utime(path)

    threading.Thread(target=touch, daemon=True, name="claim").start()


def _is_touched(path: Path) -> bool:
    """Whether a process on another host touches its claim. Only changes count, as its clock may differ from ours."""

    def time_of() -> float | None:
        try:
            with open(path, "rb") as file:  # opened, so that a network file system asks its server
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return None

    first, deadline = time_of(), time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        now = time_of()
        if now != first:
            return now is not None
        time.sleep(TOUCH_EVERY_S / 5)
    return False


def _names_of_ours(folder: Path) -> list[str]:
    """Names of the claims on a folder that this process or its launcher holds."""
    return [name for name in (claim_name(folder), os.environ.get(CLAIM, "")) if name]


def _key(folder: Path) -> str:
    return os.path.abspath(folder)


def _text(value: Any) -> str:
    return json.dumps(value) + "\n"


def _raw(path: Path) -> bytes | None:
    """The content of a note; None if it does not exist."""
    try:
        raw = path.read_bytes()
        if not raw:  # on a file system without links, another process is still writing it
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
    """A note or a mark; None if it does not exist or cannot be read."""
    return _parsed(_raw(path))


def _job_runs(job: str) -> bool:
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format=%T"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() in ("RUNNING", "COMPLETING", "SUSPENDED")
