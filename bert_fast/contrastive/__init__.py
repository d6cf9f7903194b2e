"""The home of the tile-wise contrastive objective and its data."""
