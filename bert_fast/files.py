"""Files that are whole or absent: written to a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bert_fast.errors import UserError

_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK)  # errors of a file system without hard links
_HOST = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32]
_TEMPORARY = re.compile(r"\..+\.([A-Za-z0-9]*)-\d+\.bert_fast\.tmp")
_FOREIGN_IDLE_S = 3600  # another host's file that was not written to for so long has no writer
_swept: set[tuple[int, str]] = set()  # (process, folder): each process looks once per folder for what killed ones left


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that gets the name `path` only if the block ends without an error.

    Raises:
        UserError: the disk is full or the folder cannot be written. Nothing half-written is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.bert_fast.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
        with _held(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"disk full while writing {path}; free space and run the same command again") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def create_atomically(path: str | Path, content: str) -> None:
    """Write a whole new file. Of several processes that do so at once, on one host or on several, exactly one succeeds.

    Raises:
        FileExistsError: there is a file of that name. It is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # which, unlike a rename, never takes another file's place
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with open(path, "xb") as file:
                file.write(content.encode())
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _held(temporary: Path) -> Iterator[BinaryIO]:
    """The temporary file, locked. The lock ends with its process, so an unlocked file has no writer."""
    while True:
        with open(temporary, "wb") as file:
            if _lock(file, wait=True) and not _is_at(temporary, file):
                continue  # removed between being created and being locked
            yield file
        return


def _lock(file: BinaryIO, wait: bool) -> bool:
    """Try to lock the file; whether it is locked now. Some file systems have no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _sweep_once(folder: Path) -> None:
    key = (os.getpid(), os.path.abspath(folder))
    if key not in _swept:
        _swept.add(key)
        remove_temporaries(folder)


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files in `folder` whose processes were killed while they wrote them."""
    try:
        entries = list(os.scandir(folder))
    except OSError:  # missing, or not readable for us
        return
    for entry in entries:
        found = _TEMPORARY.fullmatch(entry.name)
        if not found or not entry.is_file(follow_symlinks=False):
            continue
        try:
            if found[1] != _HOST and time.time() - entry.stat().st_mtime < _FOREIGN_IDLE_S:
                continue  # locks may not reach from host to host
            with open(entry.path, "rb") as file:
                if _lock(file, wait=False):
                    os.unlink(entry.path)
        except OSError:  # gone meanwhile, or not removable for us
            continue


def check_space(folder: str | Path, needed: int, what: str) -> None:
    """Refuse work, before it begins, that needs more than the free bytes of a disk. Raises UserError.

    Args:
        needed: bytes.
        what: the work, for the message: `the import`.
    """
    folder = Path(folder)
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{place} has {free / 2**30:.1f} GiB free and {what} may take {needed / 2**30:.1f} GiB; make room"
        )


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a whole file or nothing. Raises UserError as `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def read_limited(path: str | Path, limit: int, what: str) -> bytes:
    """All bytes of a file that should be small; no more than `limit` of them are ever read.

    Raises:
        UserError: there is no such file, it cannot be read, or it is larger than `limit` bytes.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # opening a pipe would wait for its writer
            raise UserError(f"{what} {path} is not a file")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}") from None
    except ValueError:  # a null byte in the path
        raise UserError(f"{what} {str(path)!r} is no path") from None
    if len(data) > limit:
        raise UserError(
            f"{what} {path} is larger than the {limit:,} bytes that are read of such a file; is it the right one?"
        )
    return data


def read_json(path: str | Path, what: str, limit: int = 1 << 24) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError as `read_limited`, and where it holds no JSON object."""
    try:
        value = json.loads(read_limited(path, limit, what))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError, too
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{what} {path} is not JSON: {reason[:200]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} holds no JSON object but a {type(value).__name__}")
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically. Raises UserError as `atomic_file`."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def cut_last_line(path: str | Path) -> None:
    """Remove an unfinished last line, which a kill or a full disk has left, before more lines are appended."""
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - (1 << 16))
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                end = begin + found + 1
                break
            end = begin
        file.truncate(end)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
