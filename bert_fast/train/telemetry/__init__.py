"""What a run measures while it trains."""
