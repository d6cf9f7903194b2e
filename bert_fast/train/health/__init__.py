"""Noticing that a rank, a step or the machine is in trouble, and saying so."""
