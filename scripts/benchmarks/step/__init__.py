"""One training step: sizes and batches, variants to measure, where the time goes. scripts/profile_step.py uses it too."""
