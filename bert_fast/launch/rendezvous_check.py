"""What a launcher has set for the rendezvous: its address, and the secret by which ranks know each other.

Every rank reads it before it looks for the others.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from collections.abc import Mapping

from bert_fast.errors import UserError

RENDEZVOUS_ADDRESSES = (
    "BERT_FAST_RENDEZVOUS_ADDRESSES"  # variable: what MASTER_ADDR is on the first node, comma-separated
)
SECRET = "BERT_FAST_SECRET"  # variable: what the ranks of a job know each other by; never on a command line, which all can read


def new_secret() -> str:
    """A secret for one start of the ranks."""
    return secrets.token_hex(32)


def on_one_machine(variables: Mapping[str, str]) -> bool:
    """Whether all ranks run on this machine, by what their launcher has set: then nothing has to listen to the network."""
    world = variables.get("WORLD_SIZE", "1")
    if world == "1" or variables.get("LOCAL_WORLD_SIZE") == world:
        return True
    try:
        return all(ipaddress.ip_address(each).is_loopback for each in addresses_of(variables.get("MASTER_ADDR", "")))
    except (OSError, ValueError):
        return False


def addresses_of(name: str) -> list[str]:
    """What a host name resolves to here; the address itself if it is one."""
    try:
        return [str(ipaddress.ip_address(name))]
    except ValueError:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)})


def check_rendezvous_address() -> None:
    """Refuse a MASTER_ADDR that means another machine here than on the first node. Raises UserError naming both."""
    name, expected = os.environ.get("MASTER_ADDR"), os.environ.get(RENDEZVOUS_ADDRESSES)
    if not name or not expected:
        return
    try:
        addresses = addresses_of(name)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot resolve MASTER_ADDR={name} ({error.strerror}); export it as an address: {expected}"
        ) from None
    if not set(addresses) & set(expected.split(",")):
        raise UserError(
            f"{socket.gethostname()} resolves MASTER_ADDR={name} to {', '.join(addresses)} and the first node to {expected}; "
            "fix the name service or export MASTER_ADDR as an address"
        )
