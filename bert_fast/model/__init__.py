"""BERT for pretraining, computed on unpadded tokens."""
