"""Runs broken on purpose (drill): what goes wrong (victim), how a run is watched (watched), the drills."""
