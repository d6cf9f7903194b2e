"""Gradients leave as soon as they exist: clip the group, fill the bucket, start its all-reduce, go on with backward."""
