"""From raw text to batches: corpora, WordPiece, samples, the memory-mapped store, the loader."""
