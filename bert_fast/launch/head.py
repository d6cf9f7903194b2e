"""Checks of what a launcher has set, made by every rank before it looks for the others."""

from __future__ import annotations

import ipaddress
import os
import socket

from bert_fast.errors import UserError

HEAD_ADDRESSES = "BERT_FAST_HEAD_ADDRESSES"  # variable: what MASTER_ADDR resolves to on the first node, comma-separated


def addresses_of(name: str) -> list[str]:
    """What a host name resolves to here; the address itself if it is one."""
    try:
        return [str(ipaddress.ip_address(name))]
    except ValueError:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)})


def check_head() -> None:
    """Refuse a MASTER_ADDR that means another machine here than on the first node. Raises UserError naming both."""
    name, expected = os.environ.get("MASTER_ADDR"), os.environ.get(HEAD_ADDRESSES)
    if not name or not expected:
        return
    try:
        found = addresses_of(name)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot resolve MASTER_ADDR={name} ({error.strerror}); export it as an address: {expected}"
        ) from None
    if not set(found) & set(expected.split(",")):
        raise UserError(
            f"{socket.gethostname()} resolves MASTER_ADDR={name} to {', '.join(found)} and the first node to {expected}; mend "
            "the name service or export MASTER_ADDR as an address"
        )


def bound_by_slurm() -> bool:
    """Whether srun has already given this task cores of its own (`--cpu-bind`)."""
    return any(
        kind in os.environ.get("SLURM_CPU_BIND_TYPE", "") for kind in ("mask_cpu", "map_cpu", "mask_ldom", "map_ldom")
    )
