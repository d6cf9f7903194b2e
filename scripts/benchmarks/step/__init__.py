"""Parts of scripts/bench_step.py and scripts/profile_step.py: sizes and batches, variants to measure, where the time goes."""
