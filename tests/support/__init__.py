"""Shared tasks and oracles of the tests; nothing here is a test."""
