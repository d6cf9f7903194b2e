"""Pairs of texts, from which an embedding model is trained: their stores, and what they are made from."""
