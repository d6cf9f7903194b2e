"""Whose a folder is, who writes into it, and what may be removed there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.paths import ROOT

from bert_fast import claims as module
from bert_fast.claims import Kind, check, claim, claimed, dissolve, owner_of, release, remove_own, start_time
from bert_fast.errors import UserError
from bert_fast.files import create_atomically

KIND = Kind("a box", ("a.txt", "parts/*.bin", "deep/in/[0-9].txt"), "choose another box")
ALONE = Kind("a box", KIND.writes, KIND.fix, alone=True)


def note(folder: Path, **changes: Any) -> None:
    """Claim a folder and change the claim into another process's, which `release` then leaves in place."""
    claim(folder, KIND)
    path = folder / ".running.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_my_own_folder_is_free_to_me(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert owner_of(folder) is None
    claim(folder, KIND)
    assert owner_of(folder) is None
    claim(folder, KIND)
    (folder / "a.txt").write_text("a", encoding="utf-8")
    release(folder)
    assert {path.name for path in folder.iterdir()} == {".bert_fast.json", "a.txt"}
    (folder / "a.txt").unlink()
    with claimed(folder, KIND):
        pass
    assert list(tmp_path.iterdir()) == [folder], "nothing was written, and the folder was there before"
    with claimed(tmp_path / "newer", KIND):
        pass
    assert list(tmp_path.iterdir()) == [folder]


def test_a_living_process_owns_it_and_a_dead_one_does_not(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        note(tmp_path, pid=other.pid, started=start_time(other.pid))
        assert owner_of(tmp_path) == f"process {other.pid} on this host"
        assert other.stdin is not None
        other.stdin.close()
    assert owner_of(tmp_path) is None


def test_another_process_of_the_same_number_does_not(tmp_path: Path) -> None:
    note(tmp_path, pid=os.getppid(), started="1")
    assert owner_of(tmp_path) is None


@pytest.mark.parametrize(
    ("state", "mine", "owned"), [("RUNNING", "8", True), ("", "8", False), ("RUNNING", "7", False)]
)
def test_on_another_host_its_job_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, mine: str, owned: bool
) -> None:
    """Not if it is this very job, started again."""
    assert socket.gethostname() != "elsewhere"
    note(tmp_path, host="elsewhere", job="7")
    monkeypatch.setenv("SLURM_JOB_ID", mine)
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=f"{state}\n"))
    assert owner_of(tmp_path) == ("job 7 on elsewhere" if owned else None)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_note_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / ".running.json").write_text(text, encoding="utf-8")
    assert owner_of(tmp_path) is None


@pytest.mark.parametrize("lives", [True, False])
def test_on_another_host_without_a_job_its_touch_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    monkeypatch.setattr(module, "TOUCH_EVERY_S", 0.05)
    monkeypatch.setattr(module, "SILENT_S", 0.3)
    note(tmp_path, host="elsewhere", pid=17, job=None)
    if not lives:
        release(tmp_path)
        time.sleep(0.1)
    assert owner_of(tmp_path) == ("process 17 on elsewhere" if lives else None)
    if not lives:
        began = time.monotonic()
        module.claim(tmp_path, KIND)
        assert time.monotonic() - began < 0.2, "it is not waited for again"
    release(tmp_path)


# ---- of several processes one ---------------------------------------------------------------------------------------

START = """
import sys, time
from pathlib import Path
from bert_fast.claims import Kind, claim, release
from bert_fast.errors import UserError
folder, go, done = map(Path, sys.argv[1:])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.0005)
try:
    claim(folder, Kind("a box", ("a.txt",), "choose another box", alone=True))
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
(folder / "a.txt").write_text("made")
print("mine", flush=True)
while not done.exists():
    time.sleep(0.001)
"""


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a killed process's claim", "a killed rival's right"])
def test_of_many_that_start_at_once_one_gets_the_folder(tmp_path: Path, before: str) -> None:
    folder, go, done = tmp_path / "box", tmp_path / "go", tmp_path / "done"
    if before == "an empty folder":
        folder.mkdir()
    elif before != "nothing":
        note(folder, pid=os.getppid(), started="1")
        release(folder)
    if before == "a killed rival's right":
        stale = (folder / ".running.json").read_bytes()
        right = folder / f"..running.json.{hashlib.sha256(stale).hexdigest()[:12]}.tmp"
        right.write_bytes(stale)
    command = [sys.executable, "-c", START, str(folder), str(go), str(done)]
    with contextlib.ExitStack() as stack:
        starts = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
            for _ in range(6)
        ]
        outputs = [start.stdout for start in starts]
        for output in outputs:
            assert output is not None
            assert output.readline() == "ready\n"
        go.touch()
        said = [output.readline() for output in outputs if output is not None]
        done.touch()
    winners = [start.pid for start, line in zip(starts, said, strict=True) if line == "mine\n"]
    assert len(winners) == 1, said
    others = [line for line in said if line != "mine\n"]
    assert (
        others
        == [f"{folder} is in use by process {winners[0]} on this host; wait for it, stop it, or choose another box\n"]
        * 5
    )
    assert not list(folder.glob("*.tmp"))


def test_a_launchers_claim_is_its_ranks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        note(tmp_path, pid=launcher.pid, started=start_time(launcher.pid), claim="0123")
        release(tmp_path)
        with pytest.raises(UserError, match=f"in use by process {launcher.pid}"):
            claim(tmp_path, KIND)
        monkeypatch.setenv(module.CLAIM, "0123")
        claim(tmp_path, KIND)
        release(tmp_path)
        assert (tmp_path / ".running.json").exists(), "the launcher gives it back"
        assert launcher.stdin is not None
        launcher.stdin.close()


def test_without_hard_links_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    claim(tmp_path / "box", KIND)
    with pytest.raises(FileExistsError):
        create_atomically(tmp_path / "box" / ".running.json", "x")
    assert not list((tmp_path / "box").glob("*.tmp"))


@pytest.mark.parametrize(
    ("code", "says"), [(errno.ENOSPC, "disk full while writing"), (errno.EROFS, "cannot write .*choose another box")]
)
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str) -> None:
    def fails(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(UserError, match=says):
            claim(tmp_path / "box", ALONE)
    claim(tmp_path / "box", ALONE)


# ---- what is whose --------------------------------------------------------------------------------------------------


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")


def test_own_names_are_removed_and_nothing_else(tmp_path: Path) -> None:
    box, elsewhere = tmp_path / "box", tmp_path / "elsewhere"
    claim(box, KIND)
    own = ("a.txt", ".a.txt.77.tmp", ".a.txt.77-0af3.tmp", "parts/1.bin", "parts/.1.bin.5.tmp", "deep/in/3.txt")
    mine = (
        "b.txt",
        "a.txt.bak",
        ".a.txt",
        "parts/1.txt",
        "parts/sub/1.bin",
        "deep/in/33.txt",
        "deep/3.txt",
        "plots/a.txt",
    )
    fill(box, *own, *mine)
    fill(elsewhere, "1.bin", "in/1.txt")
    (box / "parts" / "9.bin").symlink_to(elsewhere / "1.bin")
    stays = remove_own(box, KIND.writes)
    assert sorted(str(path) for path in stays) == sorted(
        {
            "b.txt",
            "a.txt.bak",
            ".a.txt",
            "parts/1.txt",
            "parts/sub",
            "deep/in/33.txt",
            "deep/3.txt",
            "plots",
            "parts/9.bin",
        }
    )
    assert all((box / name).read_text(encoding="utf-8") == name for name in mine)
    assert not any((box / name).exists() for name in own)
    assert (elsewhere / "1.bin").exists()
    assert (box / ".running.json").exists()


def test_a_linked_sub_folder_is_not_looked_into(tmp_path: Path) -> None:
    claim(tmp_path / "box", KIND)
    fill(tmp_path / "elsewhere", "1.bin")
    (tmp_path / "box" / "parts").symlink_to(tmp_path / "elsewhere")
    assert remove_own(tmp_path / "box", KIND.writes) == [Path("parts")]
    assert (tmp_path / "elsewhere" / "1.bin").exists()


def test_a_folder_for_a_while_goes_and_stays_with_files_of_others(tmp_path: Path) -> None:
    for name, mine in (("empty", ()), ("mine", ("parts/mine.txt",))):
        with claimed(tmp_path / name, KIND):
            fill(tmp_path / name, "a.txt", "parts/1.bin", *mine)
        dissolve(tmp_path / name, KIND)
    assert not (tmp_path / "empty").exists()
    assert [p.name for p in (tmp_path / "mine/parts").iterdir()] == ["mine.txt"]
    fill(tmp_path / "users", "a.txt")
    dissolve(tmp_path / "users", KIND)
    assert (tmp_path / "users/a.txt").exists(), "no mark, no removal"


@pytest.mark.parametrize(
    ("kind", "files", "refused"),
    [
        (KIND, ("a.txt",), "not a box's and that one would write over \\(a.txt\\); choose another box"),
        (KIND, ("parts/x.bin", ".running.json"), "\\(.running.json, parts/x.bin\\)"),
        (KIND, ("b.txt", "parts/x.txt", "deep/a.txt"), None),
        (ALONE, ("b.txt", "c", "d", "e"), "files that are not a box's \\(b.txt, c, d and 1 more\\)"),
        (ALONE, (".bert_fast.json.17-ab.tmp",), "not a box's"),
        (ALONE, ("..bert_fast.json.17-ab.tmp",), None),  # a start that was killed with its first byte
    ],
)
def test_a_folder_without_the_mark(tmp_path: Path, kind: Kind, files: tuple[str, ...], refused: str | None) -> None:
    fill(tmp_path, *files)
    if refused is None:
        check(tmp_path, kind)
        claim(tmp_path, kind)
    else:
        for take in (check, claim):
            with pytest.raises(UserError, match=refused):
                take(tmp_path, kind)
    assert all((tmp_path / name).read_text(encoding="utf-8") == name for name in files)


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    with claimed(tmp_path, KIND):
        fill(tmp_path, "a.txt")
    with pytest.raises(UserError, match="is the folder of a box, not of a bag; choose another bag"):
        claim(tmp_path, Kind("a bag", (), "choose another bag"))
    (tmp_path / ".bert_fast.json").write_text('{"format": "bert_fast folder 9"}', encoding="utf-8")
    with pytest.raises(UserError, match="is not a mark that this version has written"):
        claim(tmp_path, KIND)
