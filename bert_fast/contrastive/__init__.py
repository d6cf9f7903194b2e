"""Embeddings from pairs of texts: the loss, its ring over ranks, and an encoder at constant memory (docs/contrastive.md)."""
