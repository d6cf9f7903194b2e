"""Parts of scripts/fault_drill.py: what goes wrong (victim), how a run is watched (watched), the drills."""
