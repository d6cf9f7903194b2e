"""Time to train against transformers: the baseline, and interleaved pairs of runs of both."""
