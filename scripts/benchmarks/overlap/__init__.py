"""How much communication is hidden, over slow links: hosts, models that wait instead of compute, variants, predictions."""
