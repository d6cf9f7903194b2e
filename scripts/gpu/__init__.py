"""Stages of scripts/gpu_check.py, one file each: what a new GPU machine is checked for."""
