"""Who meets whom: ranks with the job's secret, one of each, and nobody else."""

from __future__ import annotations

import ast
import pickle
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.paths import ROOT

from bert_fast.errors import LostRankError, UserError
from bert_fast.launch import mpi
from bert_fast.launch.rendezvous_check import on_one_machine
from bert_fast.train import rendezvous as meeting
from bert_fast.train.collectives import broadcast_json
from bert_fast.train.rendezvous import known_to_each_other

SECRET = b"of the job"


class Meeting:
    """Processes that come to one store, as threads."""

    def __init__(self) -> None:
        self.store, self.said = dist.HashStore(), [list[str](), list[str]()]
        self._threads: list[threading.Thread] = []
        self._found: list[Any] = []

    def come(self, rank: int, secret: bytes = SECRET, world: int = 2, timeout_s: float = 5.0) -> None:
        index = len(self._found)
        self._found.append(None)

        def go() -> None:
            try:
                self._found[index] = known_to_each_other(
                    self.store, secret, rank, world, timeout_s, self.said[min(rank, 1)].append, look_s=0.05
                )
            except Exception as error:
                self._found[index] = error

        self._threads.append(threading.Thread(target=go))
        self._threads[-1].start()

    def end(self) -> list[Any]:
        for thread in self._threads:
            thread.join(20)
        return self._found


def test_ranks_of_a_job_know_each_other() -> None:
    meeting_ = Meeting()
    for rank in range(5):
        meeting_.come(rank, world=5)
    found = meeting_.end()
    found[0].set("a", "b")
    assert [store.get("a") for store in found] == [b"b"] * 5
    assert not meeting_.store.check(["a"]), "only the secret gives the key"
    assert not meeting_.said[0]


@pytest.mark.parametrize("secret", [b"", b"another job's"])
def test_a_stranger_is_refused_by_name_and_the_real_rank_let_in(secret: bytes) -> None:
    meeting_ = Meeting()
    meeting_.come(1, secret)
    time.sleep(0.05)
    meeting_.come(0)
    time.sleep(0.3)
    meeting_.come(1)
    stranger, first, second = meeting_.end()
    assert isinstance(stranger, UserError)
    assert "which is rank 0 at" in str(stranger)
    assert "one of the two is not of this job" in str(stranger)
    assert isinstance(first, dist.Store)
    assert isinstance(second, dist.Store)
    assert len(meeting_.said[0]) == 1
    assert "came as rank 1 without this job's secret" in meeting_.said[0][0]


def test_a_stranger_that_comes_as_rank_0_is_believed_by_none() -> None:
    meeting_ = Meeting()
    meeting_.come(0, b"", timeout_s=0.5)
    meeting_.come(1)
    stranger, real = meeting_.end()
    assert isinstance(real, UserError)
    assert "does not have this rank's secret" in str(real)
    assert isinstance(stranger, UserError)
    assert "without this job's secret (BERT_FAST_SECRET) came to" in str(stranger)


def test_who_does_not_come_is_named() -> None:
    meeting_ = Meeting()
    for rank in (0, 2):
        meeting_.come(rank, world=4, timeout_s=0.3)
    first, second = meeting_.end()
    assert isinstance(first, LostRankError)
    assert str(first).endswith("in 0.3 s did not come rank 1, 3")
    assert isinstance(second, LostRankError)


def test_two_that_come_as_one_rank() -> None:
    meeting_ = Meeting()
    for rank in (0, 1, 1):
        meeting_.come(rank, world=3, timeout_s=1.0)
    first, _, _ = meeting_.end()
    assert isinstance(first, UserError)
    assert "two processes came as one rank, and none as rank 2" in str(first)


def test_a_rank_of_a_thousand_sends_a_handful_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """And rank 0 some for every other one."""
    calls = [0]

    class Counting:
        def __init__(self, store: dist.Store) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            calls[0] += 1
            return getattr(self._store, name)

    store = dist.HashStore()
    for rank in range(1, 1024):  # they come, and do not wait
        with pytest.raises(LostRankError):
            known_to_each_other(Counting(store), SECRET, rank, 1024, 0.0, print)  # type: ignore[arg-type]
    assert calls[0] <= 6 * 1023
    calls[0] = 0
    monkeypatch.setattr(meeting, "PrefixStore", lambda _key, held: held)
    known_to_each_other(Counting(store), SECRET, 0, 1024, 0.0, print)  # type: ignore[arg-type]
    assert 1024 <= calls[0] < 1024 + 10


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}, False),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "no.such.host.invalid"}, False),
        ({"WORLD_SIZE": "4"}, False),
    ],
)
def test_whether_a_run_is_on_one_machine(variables: dict[str, str], expected: bool) -> None:
    assert on_one_machine(variables) is expected


@pytest.mark.parametrize("world", [1, 4])
def test_sockets_of_a_run_on_one_machine_are_loopbacks(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """What is set already stays."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")  # so that it is put back
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    if world == 1:
        assert isinstance(meeting.meet(0, 1, 1.0, print), dist.HashStore)
    else:
        with pytest.raises(UserError, match="this is rank 2 of 4, and MASTER_ADDR and MASTER_PORT not set"):
            meeting.meet(2, 4, 1.0, print)
    assert meeting.os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert meeting.os.environ["NCCL_SOCKET_IFNAME"] in [
        name for _, name in socket.if_nameindex() if name.startswith("lo")
    ]


# ---- nothing that is sent or read is run ------------------------------------------------------------------------------


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_from_another_rank_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """We are rank 1, and rank 0 sends the length of a pickle and the pickle, or a length alone that nobody has memory for."""
    content = torch.frombuffer(bytearray(pickle.dumps(Hostile(tmp_path / "proof"))), dtype=torch.uint8)
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src, group: tensor.copy_(sent.pop(0)))
    sent[:] = [torch.tensor([len(content)]), content]
    with pytest.raises(UserError, match="something else than JSON"):
        broadcast_json(None)
    sent[:] = [torch.tensor([1 << 40])]
    with pytest.raises(UserError, match="announced 1,099,511,627,776 bytes"):
        broadcast_json(None)
    assert not sent
    assert not (tmp_path / "proof").exists()


_UNPICKLE = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "recv_object_list"}


def calls_of(text: str) -> list[tuple[str, str, set[str]]]:
    """(owner, name, keywords) of every call with an owner, `pickle.load(...)`."""
    return [
        (ast.unparse(node.func.value), node.func.attr, {word.arg or "" for word in node.keywords})
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]


def is_unsafe(owner: str, name: str, words: set[str]) -> bool:
    return (
        name in _UNPICKLE
        or (owner == "pickle" and name in ("load", "loads", "Unpickler"))
        or (owner == "torch" and name == "load" and "weights_only" not in words)
        or (owner in ("dcp", "torch.distributed.checkpoint") and name in ("save", "load"))
    )


def test_no_code_of_ours_unpickles() -> None:
    """Not from the network, not from a folder."""
    for path in [*(ROOT / "bert_fast").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        assert not [call for call in calls_of(path.read_text(encoding="utf-8")) if is_unsafe(*call)], path
    for bad in ("pickle.loads(b'')", "torch.load(f)", "dist.all_gather_object(a, b)", "dcp.load({})"):
        assert is_unsafe(*calls_of(bad)[0])


# ---- mpirun ---------------------------------------------------------------------------------------------------------

OPEN_MPI = {
    f"OMPI_COMM_WORLD_{name}": value
    for name, value in {"RANK": "3", "SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def adopt(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], dict[str, str]]:
    """`adopt(variables)`: what a process started with them has then."""

    def run(variables: dict[str, str]) -> dict[str, str]:
        monkeypatch.setattr(mpi.os, "environ", dict(variables))
        mpi.adopt_mpi()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return {name: mpi.os.environ[name] for name in names if name in mpi.os.environ}

    return run


@pytest.mark.parametrize("family", [OPEN_MPI, HYDRA])
def test_ranks_of_mpirun_are_adopted(adopt: Callable[..., dict[str, str]], family: dict[str, str]) -> None:
    expected = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert adopt({**family, **MASTER}) == expected
    # mpirun under Slurm: its daemons' variables are not the rank's
    assert adopt({**family, **MASTER, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}) == expected


@pytest.mark.parametrize("family", [OPEN_MPI, HYDRA, {"PMI_RANK": "3", "PMI_SIZE": "8"}])
def test_ranks_of_mpirun_that_cannot_meet_are_refused_by_name(
    adopt: Callable[..., dict[str, str]], family: dict[str, str]
) -> None:
    with pytest.raises(
        UserError, match=r"started by an MPI launcher as rank 3 of 8 \(.*RANK\), but MASTER_ADDR and MASTER_PORT"
    ):
        adopt(family)
    with pytest.raises(UserError, match="RANK=x is not a number"):
        adopt({**family, **MASTER, next(iter(family)): "x"})


def test_what_is_no_mpirun_of_several_is_left_alone(adopt: Callable[..., dict[str, str]]) -> None:
    assert adopt({}) == {}
    assert adopt({"PMI_RANK": "0", "PMI_SIZE": "1"}) == {}
    assert adopt({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "2"}) == {"RANK": "0", "WORLD_SIZE": "2"}
    srun = {"PMI_RANK": "3", "PMI_SIZE": "8", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}
    assert adopt(srun) == {}, "adopt_slurm does it"
