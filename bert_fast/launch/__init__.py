"""Starting ranks: on this machine, under Slurm or MPI; which cores and network card each gets; what it reports if it fails.

Imports no torch.
"""
