"""MLPerf: the result log, the rules, the checker. Imports no torch: a login node can run it."""
