"""Training: composes data, balance, model, communication, optim and the MLPerf log into a run."""
