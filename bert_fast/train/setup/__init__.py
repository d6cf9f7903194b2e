"""Before the clock: build, measure, check."""
