"""The parts of bench_overlap.py: hosts, models that wait instead of compute, variants, predictions, pictures."""
