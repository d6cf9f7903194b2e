"""Classes of torch.distributed that it offers without declaring them, so that a type checker finds them in torch's binding only."""

from torch._C._distributed_c10d import GradBucket, HashStore, PrefixStore, Store, TCPStore

__all__ = ["GradBucket", "HashStore", "PrefixStore", "Store", "TCPStore"]
