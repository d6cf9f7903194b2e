"""Two starts in one folder, strangers where ranks meet, what listens to the network, launchers that are not ours."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.training_run import ROOT, TrainingRun, Workspace, errors_of, last_step, lines

from bert_fast.claims import remove_own
from bert_fast.launch.rendezvous_check import SECRET
from bert_fast.run_folder import RUN

pytestmark = pytest.mark.distributed


def test_of_two_starts_at_once_one_is_refused(workspace: Workspace) -> None:
    """Before either has made the folder; the one that goes on is not disturbed."""
    both = [workspace.start("run.folder=twice", "train.max_steps=6") for _ in range(2)]
    codes = [run.wait() for run in both]
    assert sorted(codes) == [0, 2], [run.stderr for run in both]
    refused, other = both[codes.index(2)], both[codes.index(0)]
    assert errors_of(refused) == [refused.stderr.rstrip("\n")]
    assert f"twice is in use by process {other.process.pid} on this host" in refused.stderr or (
        "already holds a finished run" in refused.stderr
    )
    assert [line["step"] for line in lines(workspace.folder / "twice")] == list(range(1, 7))


def test_every_file_that_a_run_writes_is_known_as_its_own(workspace: Workspace) -> None:
    """Else a run that starts over leaves it, and a new name here is one that a person's file may have."""
    settings = (
        "train.max_steps=12", "checkpoint.every_steps=4", "checkpoint.save_final_model=true", "run.tensorboard=true",
        "run.profile=true", "run.profile_after=1", "run.profile_steps=2", "system.preflight=true",
        "communication.bucket_mb=auto",
    )  # fmt: skip
    code, run = workspace.run("run.folder=all", *settings)
    assert code == 0, run.stderr
    assert remove_own(workspace.folder / "all", RUN.writes) == []
    assert [path.name for path in (workspace.folder / "all").iterdir()] == [".bert_fast.json"]


def listening(pids: list[int]) -> dict[int, set[str]]:
    """The addresses at which processes listen, in the kernel's hexadecimal; pid -> addresses."""
    found: dict[int, set[str]] = {}
    for pid in pids:
        inodes = set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    found.setdefault(pid, set()).add(fields[1].split(":")[0])
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_on_one_machine_listens_on_loopback_alone(workspace: Workspace) -> None:
    run = workspace.start("run.folder=quiet", "train.max_steps=100000")
    run.wait_until(lambda: last_step(workspace.folder / "quiet") >= 1)
    found = listening(list(run.processes()))
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    assert len(found) == 2, "the store of rank 0, gloo of both"
    assert set().union(*found.values()) == {"0100007F"}


class Ranks:
    """Ranks that somebody starts by hand."""

    def __init__(self, workspace: Workspace, folder: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = str(probe.getsockname()[1])
        self._workspace = workspace
        self._command = [
            sys.executable, str(ROOT / "run_pretraining.py"), "--config", str(workspace.config), f"run.folder={folder}",
            "train.max_steps=4", "communication.timeout_s=30",
        ]  # fmt: skip

    def start(self, rank: int, secret: str) -> subprocess.Popen[str]:
        variables = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._port, SECRET: secret, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return subprocess.Popen(
            self._command,
            cwd=self._workspace.folder,
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


@pytest.mark.slow
def test_a_stranger_that_comes_first_is_refused_and_the_run_goes_on(workspace: Workspace) -> None:
    ranks = Ranks(workspace, "stranger")
    processes: list[Any] = [ranks.start(0, "the job's"), ranks.start(1, "")]
    try:
        _, said = processes[1].communicate(timeout=60)
        assert processes[1].returncode == 2
        assert said.count("\n") == 1
        assert "does not have this rank's secret (BERT_FAST_SECRET)" in said
        time.sleep(1.5)  # for which rank 0 waits on
        processes.append(ranks.start(1, "the job's"))
        outputs = [processes[index].communicate(timeout=60) for index in (0, 2)]
        assert [processes[index].returncode for index in (0, 2)] == [0, 0], outputs
        assert (
            f"process {processes[1].pid} on {socket.gethostname()} came as rank 1 without this job's secret"
            in outputs[0][0]
        )
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("family", [("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")])
def test_mpirun_does_not_start_many_runs(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, family: tuple[str, str]
) -> None:
    monkeypatch.setenv(family[0], "1")
    monkeypatch.setenv(family[1], "2")
    code, run = workspace.run("run.folder=mpi")
    assert code == 2
    assert len(errors_of(run)) == 1
    assert f"started by an MPI launcher as rank 1 of 2 ({family[0]})" in run.stderr
    assert not (workspace.folder / "mpi").exists()


@pytest.mark.slow
def test_a_killed_launcher_leaves_a_folder_that_the_next_start_takes(workspace: Workspace) -> None:
    """At any time in its first seconds: around its first files, before the first checkpoint."""
    folder = workspace.folder / "again"
    for delay_s in (0.0, 0.2, 0.6, 1.2):
        run: TrainingRun = workspace.start("run.folder=again", "train.max_steps=100000")
        run.wait_until(folder.exists)
        time.sleep(delay_s)
        run.process.kill()
        assert not run.left_overs()
    (folder / "NOTES.md").write_text("mine", encoding="utf-8")
    code, run = workspace.run("run.folder=again", "train.max_steps=4")
    assert code == 0, run.stderr
    assert (folder / "NOTES.md").read_text(encoding="utf-8") == "mine"
