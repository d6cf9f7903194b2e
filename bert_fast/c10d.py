"""What torch.distributed has without declaring it: classes that type checkers find in torch's binding only, and a timeout."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket, HashStore, PrefixStore, Store, TCPStore

__all__ = ["GradBucket", "HashStore", "PrefixStore", "Store", "TCPStore", "timeout_of_default_group"]


def timeout_of_default_group() -> timedelta | None:
    """How long collectives of the default group wait; None: its backend does not say.

    Further groups have torch's half an hour unless they are told.
    """
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    backend = dist.distributed_c10d._get_default_group()._get_backend(device)
    timeout: timedelta | None = getattr(backend.options, "_timeout", None)
    return timeout
