"""Tools for users, started as python scripts/NAME.py; benchmarks/ and faults/ are started with python -m from the root."""
