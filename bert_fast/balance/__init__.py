"""Which rank gets which sample of a step, computed by every rank alone."""
