"""Starting ranks: on this machine, under Slurm; which cores and which network cards a rank gets. Imports no torch."""
