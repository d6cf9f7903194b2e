"""What every speed claim rests on: python -m scripts.benchmarks.NAME, from the root of the repository."""
