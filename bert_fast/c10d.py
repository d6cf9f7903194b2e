"""Classes that torch.distributed offers without declaring them: type checkers find them in torch's binding only."""

from torch._C._distributed_c10d import GradBucket, HashStore, PrefixStore, Store, TCPStore

__all__ = ["GradBucket", "HashStore", "PrefixStore", "Store", "TCPStore"]
