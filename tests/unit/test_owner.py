"""Whose a run's folder is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bert_fast.launch import owner as module
from bert_fast.launch.owner import claim, owner_of, release


def note(folder: Path, **changes: Any) -> None:
    claim(folder)
    path = folder / "running.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_my_own_folder_is_free_to_me(tmp_path: Path) -> None:
    assert owner_of(tmp_path) is None
    claim(tmp_path)
    assert owner_of(tmp_path) is None
    release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_living_process_owns_it_and_a_dead_one_does_not(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        note(tmp_path, pid=other.pid, started=module._started(other.pid))
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
    (tmp_path / "running.json").write_text(text, encoding="utf-8")
    assert owner_of(tmp_path) is None
