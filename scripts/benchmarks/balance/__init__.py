"""The balancing strategies: imbalance of their plans, measured step times, pictures of who gets what."""
