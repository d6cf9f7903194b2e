"""Reads what runs wrote, and writes it for people. Imports no torch."""
