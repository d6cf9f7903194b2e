"""What lossy wire formats and compressed preconditioners cost, and whether a model learns with them."""
