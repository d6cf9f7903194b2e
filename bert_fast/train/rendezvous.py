"""Where the ranks meet, and that whoever comes there is one of them.

They meet at torch's TCP store, which lets in who reaches its port. So before anything is exchanged, every rank shows that it
has the job's secret (`BERT_FAST_SECRET`, from the launcher or the supervisor): it writes its name under a key that only the
secret gives. What ranks say afterwards goes under such keys too. A process that comes as a rank without the secret finds
nothing, and is told so; the others name it and go on waiting for the real one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from bert_fast.c10d import HashStore, PrefixStore, Store, TCPStore
from bert_fast.errors import LostRankError, UserError
from bert_fast.launch.rendezvous_check import SECRET, on_one_machine

_LOOPBACK = "127.0.0.1"
_BACKLOG = 4096
_POLL_S = (0.002, 0.25)  # the first pause and the longest
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def meet(rank: int, world: int, timeout_s: float, log: Callable[[str], None]) -> Store:
    """Meet the other ranks. Returns the store that they share. A collective.

    Args:
        log: takes a line about a process that is none of them.

    Raises:
        UserError: the port is taken; this process, or the one that holds the store, does not have the job's secret.
        LostRankError: a rank has not come in time.
    """
    timeout = timedelta(seconds=timeout_s)
    if on_one_machine(os.environ):
        _stay_on_loopback()
    if world == 1:
        return HashStore()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or not os.environ["MASTER_PORT"].isdecimal():
        what = (
            f"{' and '.join(missing)} not set" if missing else f"MASTER_PORT={os.environ['MASTER_PORT']} is not a port"
        )
        raise UserError(
            f"this is rank {rank} of {world}, and {what}; start the ranks with torchrun or run_pretraining.py"
        )
    try:
        store = _store(rank, world, timeout)
        secret = os.environ.get(SECRET, "").encode()
        return known_to_each_other(store, secret, rank, world, timeout_s, log)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        text = str(error).splitlines()[0]
        if "in use" in text.lower():
            raise _port_in_use() from None
        raise LostRankError(f"ranks could not meet at {os.environ['MASTER_ADDR']}: {text[:200]}") from None


def _stay_on_loopback() -> None:
    """Have gloo and NCCL listen where only this machine can reach them. What is set already stays."""
    name = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if name is not None:
        for variable in _INTERFACES:
            os.environ.setdefault(variable, name)


def _store(rank: int, world: int, timeout: timedelta) -> Store:
    its_own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds the store
    if its_own or not on_one_machine(os.environ):
        return next(rendezvous("env://", rank, world, timeout=timeout))[0]
    port = int(os.environ["MASTER_PORT"])
    if rank != 0:
        return TCPStore(_LOOPBACK, port, world, False, timeout, wait_for_workers=False)
    # Without a socket of ours torch listens on every interface
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((_LOOPBACK, port))
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise _port_in_use() from None
    return TCPStore(_LOOPBACK, port, world, True, timeout, wait_for_workers=False, master_listen_fd=listening.detach())


def _port_in_use() -> UserError:
    return UserError(f"port {os.environ['MASTER_PORT']} is in use; set system.master_port=0 to pick a free one")


def known_to_each_other(
    store: Store,
    secret: bytes,
    rank: int,
    world: int,
    timeout_s: float,
    log: Callable[[str], None],
    look_s: float = 1.0,
) -> Store:
    """Show the secret, and see that the others have it. A collective of a few small messages per rank.

    Args:
        timeout_s: seconds for which to wait for the others.
        log: takes a line about a process that is refused.
        look_s: seconds from one time that rank 0 looks for such processes to the next.

    Returns:
        The store, under keys that only the secret gives.

    Raises:
        UserError: a process without the secret took a rank's place, or two processes came as one rank.
        LostRankError: a rank has not come in `timeout_s`.
    """

    def key(*names: Any) -> str:
        return hmac.new(secret, json.dumps(names).encode(), hashlib.sha256).hexdigest()

    me = f"process {os.getpid()} on {socket.gethostname()}"
    store.set(key("here", rank), me)  # before the name that all can read: who has that one alone is a stranger
    store.add(key("count"), 1)
    store.set(f"came/{rank}", me)
    deadline, pause, named, looked = time.monotonic() + timeout_s, _POLL_S[0], set[str](), time.monotonic()
    while not store.check([key("complete")]):
        if rank == 0 and store.add(key("count"), 0) >= world:
            missing = _missing(store, key, world)
            if missing:
                raise UserError(f"two processes came as one rank, and none as rank {missing[0]}; start every rank once")
            store.set(key("complete"), "yes")
            break
        if rank != 0 and store.check(["came/0"]) and not store.check([key("here", 0)]):
            raise UserError(
                f"{_read(store, 'came/0')}, which is rank 0 at {_where()}, does not have this rank's secret ({SECRET}): one of "
                "the two is not of this job; start all ranks by one launcher"
            )
        if rank == 0 and time.monotonic() - looked > look_s:
            looked = time.monotonic()
            for other, stranger in _strangers(store, key, world):
                if stranger not in named:
                    log(f"warning: {stranger} came as rank {other} without this job's secret ({SECRET}): it is refused")
                    named.add(stranger)
        if time.monotonic() > deadline:
            raise _not_all_here(store, key, rank, world, timeout_s)
        time.sleep(pause)
        pause = min(2 * pause, _POLL_S[1])
    return PrefixStore(key("the run"), store)


def _strangers(store: Store, key: Callable[..., str], world: int) -> list[tuple[int, str]]:
    """Who came as a rank and did not show the secret: (rank, who)."""
    came = [rank for rank in range(world) if store.check([f"came/{rank}"]) and not store.check([key("here", rank)])]
    return [(rank, _read(store, f"came/{rank}")) for rank in came]


def _missing(store: Store, key: Callable[..., str], world: int) -> list[int]:
    return [rank for rank in range(world) if not store.check([key("here", rank)])]


def _not_all_here(store: Store, key: Callable[..., str], rank: int, world: int, timeout_s: float) -> Exception:
    where = _where()
    if rank != 0:  # of a thousand ranks, one looks for all the others
        return LostRankError(f"ranks could not meet at {where}: rank 0 has not seen all of them in {timeout_s:g} s")
    strangers = _strangers(store, key, world)
    if strangers:
        who = "; ".join(f"{stranger} as rank {other}" for other, stranger in strangers[:4])
        return UserError(
            f"without this job's secret ({SECRET}) came to {where}: {who}; start all ranks by one launcher"
        )
    missing = _missing(store, key, world)
    names = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return LostRankError(f"ranks could not meet at {where}: in {timeout_s:g} s did not come rank {names}")


def _where() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _read(store: Store, name: str) -> str:
    """What somebody says of itself: any bytes."""
    text = store.get(name)[:200].decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)
